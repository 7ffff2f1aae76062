"""Speed, side by side: every contender runs in turn, so that a busy machine slows all alike.

    python bench.py gdn                         # the delta rule in chunks, token by token, theirs
    python bench.py mixers --shortest 256       # every row of MIXERS, as a ratio to attention, by T
    python bench.py cores --plot cores.png      # AFNO's convolution to attention's kernel, by T
    python bench.py cores --tokens 32768 --sequence_length 32768      # as many tokens in every call
    python bench.py parts                       # where an attention and an AFNO layer spend theirs
    python bench.py products                    # linear layers by torch's library and by ours
    python bench.py scaling --mixer fftnet,attn # as many tokens in longer rows: linear or not?
    python bench.py compiled --mixer gdn        # by torch.compile and without, in longer rows
    python bench.py models --mixer 'attn;afno'  # whole models, small ones
    python bench.py decode                      # 512 tokens of d12: with states, and run anew

Milliseconds, forward and backward (decode: forward), minimum and median over the repeats; trust the
ratios, not the times. Tokens a second by the minimum; MiB is the most memory that a call had live
at once. On CUDA under bf16 autocast, as in training. With --tokens every call has as many, in more
rows where they are shorter: a row of 1,024 alone stays in a CPU's cache, one of 32,768 does not,
and what is asked is the length's cost. A new bench is a function that returns
{contender: callable} and a row of BENCHES; names end in ", T n" where rows of several lengths are
compared.
"""
import argparse
import importlib.util
import inspect
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, cycle

import torch
import torch.nn.functional as F

from deltanet import gated_delta_rule, gated_delta_rule_naive
from kernels import BACKENDS, linear
from support.machine import device_name, keep_memory, pick_device
from train_gpt2 import GPT, MIXERS, ROOT, Config, build

# A script, whose neighbours it imports by their names.
sys.path.append(str(ROOT / "records"))
import plot


def gdn(args, device):
    """The gated delta rule in fp32, n_head heads of n_embd / n_head (dk = dv).

    Ours by chunks of 32 and 64, and by its recurrence, which takes every token by itself;
    transformers' own where it is installed, whose chunks are of 64 as well.
    """
    B = args.batch_size
    T = args.sequence_length
    H = args.n_head
    D = args.n_embd // H
    if args.n_embd % H:
        raise ValueError(f"{args.n_embd} channels do not split into {H} heads: change --n_embd or "
                         "--n_head")
    q, k, v = (torch.randn(B, T, H, D, device=device) for _ in range(3))
    g = -0.5 * torch.rand(B, T, H, device=device)
    beta = torch.rand(B, T, H, device=device)
    inputs = (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta)
    inputs = [u.requires_grad_() for u in inputs]
    rules = {
        "chunks of 32": gated_delta_rule,
        "chunks of 64": partial(gated_delta_rule, chunk=64),
        "recurrence": gated_delta_rule_naive,
    }
    if importlib.util.find_spec("transformers"):
        rules |= transformers_rules()
    else:
        print("transformers is not installed: pip install transformers adds its forms")

    def forward_backward(rule):
        return torch.autograd.grad(rule(*inputs)[0].sum(), inputs)

    return {name: partial(forward_backward, rule) for name, rule in rules.items()}


def transformers_rules():
    """transformers' forms in torch: unwrapped, for it may put fla's kernel in their place."""
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid as theirs

    def rule(kind):
        function = inspect.unwrap(getattr(theirs, f"torch_{kind}_gated_delta_rule"))
        return lambda q, k, v, g, beta: function(q, k, v, g=g, beta=beta)

    return {"transformers, chunks": rule("chunk"), "transformers, recurrence": rule("recurrent")}


def passes(row, B, T, args, device, wrap=lambda mixer: mixer):
    """Forward and backward of a row of MIXERS with its default knobs, on (B, T, n_embd)."""
    cfg = Config(mixer=row, n_head=args.n_head, n_embd=args.n_embd, batch_size=B,
                 sequence_length=T)
    mixer = build("mixer", row, cfg, args.n_embd, T).to(device)
    x = torch.randn(B, T, args.n_embd, device=device, requires_grad=True)
    forward = wrap(mixer)
    return lambda: torch.autograd.grad(forward(x).sum(), [x, *mixer.parameters()])


def lengths(args) -> list[int]:
    """Tokens a row, doubling from --shortest to --sequence_length."""
    first = args.shortest or args.sequence_length
    doublings = (args.sequence_length // first).bit_length()
    return [first * 2**n for n in range(doublings)]


def rows_of(args, T: int) -> int:
    """How many rows of T tokens a call has."""
    return args.tokens // T or args.batch_size


def mixers(args, device):
    """Every row of MIXERS on (rows, T, n_embd); attention of that length is 1.00."""
    rows = sorted(MIXERS, key=lambda row: row != "attn")
    return {f"{row}, T {T}": passes(row, rows_of(args, T), T, args, device)
            for T in lengths(args) for row in rows}


def cores(args, device):
    """What mixes tokens, alone: attention's kernel of that length is 1.00.

    Causal attention in heads of 64 channels; AFNO's convolution with 16 channels a kernel, of all
    taps and of 16, as --afno_backend auto has it.
    """
    C = args.n_embd
    if C % 64:
        raise ValueError(f"{C} channels do not split into heads of 64: change --n_embd")
    contenders = {}
    for T in lengths(args):
        B = rows_of(args, T)
        heads = [torch.randn(B, C // 64, T, 64, device=device, requires_grad=True)
                 for _ in range(3)]
        u = torch.randn(B, T, C, device=device, requires_grad=True)
        h = torch.randn(C // 16, T, device=device, requires_grad=True)
        attention = partial(F.scaled_dot_product_attention, is_causal=True)
        contenders[f"attention, T {T}"] = partial(input_gradients, attention, heads)
        few = torch.randn(C // 16, min(16, T), device=device, requires_grad=True)
        contenders[f"afno, T {T}"] = partial(input_gradients, BACKENDS["auto"], [u, h])
        contenders[f"afno of 16 taps, T {T}"] = partial(input_gradients, BACKENDS["auto"], [u, few])
    return contenders


def parts(args, device):
    """What a layer of attention and one of AFNO are made of, each by itself."""
    B = args.batch_size
    T = args.sequence_length
    C = args.n_embd
    cfg = Config(mixer="attn,afno", n_layer=2, n_head=args.n_head, n_embd=C, sequence_length=T)
    attn, afno = (build("mixer", row, cfg, C, T).to(device) for row in cfg.mixers)
    view = attn.view(T, None, torch.device(device))

    def draw(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    heads = [draw(B, args.n_head, T, C // args.n_head) for _ in range(3)]
    x, y, u, z = draw(B, T, C), draw(B, T, C), draw(B, T, C), draw(B, T, 3 * C)
    h = draw(C // 16, T)
    def projections(mixer):
        return [layer.weight for layer in (mixer.q, mixer.k, mixer.v)]

    def norms(z):
        return torch.cat(attn.heads(z, None, view.at))

    def gated(q, y, u):
        return afno.proj(q * torch.addcmul(y, afno.D, u))

    # {part: (function, its inputs, its weights)}
    found = {
        "attn: q, k, v": (attn.qkv, [x], projections(attn)),
        "attn: norms, rotary": (norms, [z], []),
        "attn: kernel": (view.kernel, heads, []),
        "attn: output": (attn.proj, [y], [attn.proj.weight]),
        "afno: q, k, v": (afno.qkv, [x], projections(afno)),
        "afno: short convolution": (afno.short_conv, [z], [afno.short_conv.weight]),
        "afno: norms of k, v": (lambda z: afno.gate(z)[1], [z], []),
        "afno: kernels": (afno.kernel, [], [*afno.kernel.parameters()]),
        "afno: convolution": (afno.conv, [u, h], []),
        "afno: gate, output": (gated, [x, y, u], [afno.D, afno.proj.weight]),
    }
    whole = {row: passes(row, B, T, args, device) for row in ("attn", "afno")}
    return whole | {name: partial(input_gradients, *part) for name, part in found.items()}


def products(args, device):
    """One linear layer four times as wide, and back: torch's library and kernels.linear's."""
    x = torch.randn(args.batch_size, args.sequence_length, args.n_embd, device=device)
    contenders = {}
    for name, C, N in (("wider", 1, 4), ("narrower", 4, 1)):
        u = x.repeat(1, 1, C).requires_grad_()
        W = torch.randn(N * args.n_embd, C * args.n_embd, device=device, requires_grad=True)
        for library, function in (("torch", F.linear), ("ours", linear)):
            contenders[f"{name}, {library}"] = partial(input_gradients, function, [u, W])
    return contenders


def input_gradients(function, inputs, weights=()):
    return torch.autograd.grad(function(*inputs).sum(), [*inputs, *weights])


def scaling(args, device):
    """Each of --mixer on 8 batch_size sequence_length tokens, in rows of 1 to 8 times that."""
    contenders = {}
    for row in args.mixer.split(","):
        for n in (1, 2, 4, 8):
            T = n * args.sequence_length
            contenders[f"{row}, T {T}"] = passes(row, 8 // n * args.batch_size, T, args, device)
    return contenders


def compiled(args, device):
    """Each of --mixer as it is and by torch.compile, in rows of 1 to 8 times sequence_length."""
    kinds = {"eager": lambda mixer: mixer, "compiled": partial(torch.compile, dynamic=False)}
    contenders = {}
    for row in args.mixer.split(","):
        for n in (1, 2, 4, 8):
            T = n * args.sequence_length
            for kind, wrap in kinds.items():
                run = passes(row, args.batch_size, T, args, device, wrap)
                contenders[f"{row}, T {T}, {kind}"] = run
    return contenders


def models(args, device):
    """Whole models of 4 layers and 256 tokens of vocabulary: each of --mixer, separated by ';'.

    Attention alone has AFNO's short convolution, as the fair control.
    """
    T = args.sequence_length
    idx = torch.randint(256, (args.batch_size, T + 1), device=device)
    contenders = {}
    for row in args.mixer.split(";"):
        cfg = Config(mixer=row, n_layer=4, n_head=args.n_head, n_embd=args.n_embd, vocab_size=256,
                     sequence_length=T, short_conv=row == "attn")
        model = GPT(cfg).to(device)
        contenders[row] = partial(gradients, model, idx[:, :-1], idx[:, 1:])
    return contenders


def gradients(model, x, y):
    return torch.autograd.grad(model(x, y), list(model.parameters()))


class Share:
    """A contender that does one n-th of the work, evenly spread: its time counts n times."""
    def __init__(self, run, n: int):
        self.run = run
        self.n = n

    def __call__(self):
        return self.run()


def decode(args, device):
    """512 tokens of a d12 of each of --mixer: carried states against a forward for every token.

    Of the forwards one in 32 runs, and counts 32 times. Ratios to the first row: a mixer's own is
    that of its two rows.
    """
    contenders = {}
    idx = torch.randint(50304, (args.batch_size, 512), device=device)
    for row in args.mixer.split(","):
        cfg = Config(mixer=row, n_layer=12, n_head=args.n_head, n_embd=args.n_embd,
                     vocab_size=50304, sequence_length=args.sequence_length)
        model = GPT(cfg).to(device)
        contenders[f"{row}, states"] = partial(with_states, model, idx)
        contenders[f"{row}, run anew"] = Share(partial(run_anew, model, idx, 32), 32)
    return contenders


@torch.no_grad()
def with_states(model, idx):
    state = model.init_state(len(idx))
    for column in idx.unbind(1):
        _, state = model.step(column, state)


@torch.no_grad()
def run_anew(model, idx, every):
    # Places 16, 48, ...: on average as long as all of them.
    for t in range(every // 2, idx.size(1), every):
        model(idx[:, :t])


BENCHES = {"gdn": gdn, "mixers": mixers, "cores": cores, "parts": parts, "scaling": scaling,
           "compiled": compiled, "models": models, "decode": decode, "products": products}
# Whose times of the same length are the base, where it is not the first row.
BASES = {"cores": "attention", "mixers": "attn"}
# How many tokens a call has, where it is not rows_of(args, T) rows of T.
TOKENS = {"scaling": lambda args, T: 8 * args.batch_size * args.sequence_length,
          "decode": lambda args, T: 512 * args.batch_size}


def precision(device):
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


# Seconds that a call takes which is not repeated.
SLOW = 10


def measure(contenders, repeats, device):
    """{name: milliseconds of each repeat}, interleaved.

    An untimed call comes before each timed one: else a contender also pays for the memory that the
    last one gave back. One of SLOW seconds would not feel that, and is the only one.
    """
    times = {name: [] for name in contenders}
    slow = set()
    for _ in range(repeats):
        for name, run in contenders.items():
            for timed in (False, True) if name not in slow else ():
                start = time.perf_counter()
                with precision(device):
                    run()
                if device.type != "cpu":
                    getattr(torch, device.type).synchronize()
                seconds = time.perf_counter() - start
                if seconds > SLOW:
                    slow.add(name)
                if timed or name in slow:
                    n = run.n if isinstance(run, Share) else 1
                    times[name].append(1e3 * n * seconds)
                    break
    return times


def peak(run, device) -> int:
    """The most bytes that one call had live at once, beyond those that were before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with precision(device):
            run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as seen:
        run()
    # Of torch's allocator: what libraries take for themselves is not there.
    sizes = [event.nbytes() for event in seen.profiler.kineto_results.events()
             if event.name() == "[memory]"]
    return max(accumulate(sizes), default=0)


def draw(times, path: str):
    """Fastest times of contenders "NAME, T n" against T, both logarithmic."""
    from matplotlib import pyplot as plt
    curves = {}
    for name, ms in times.items():
        row, T = name.split(", T ")
        curves.setdefault(row, []).append((int(T), min(ms)))
    with plt.rc_context(plot.STYLE | {"axes.grid.axis": "both"}):
        figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
        for (row, points), colour in zip(curves.items(), cycle(plot.COLOURS)):
            axes.plot(*zip(*points), color=colour, linewidth=2.2, marker="o")
            axes.annotate(f"  {row}", points[-1], color=colour, weight="bold", va="center")
        axes.set(xlabel="tokens a row", ylabel="ms a call, forward and backward", yscale="log")
        axes.set_xscale("log", base=2)
        axes.set_xticks([T for T, _ in points], [f"{T:,}" for T, _ in points])
        axes.margins(x=0.15)
        plot.save(figure, path)


SIZES = dict(n_embd=512, n_head=8, batch_size=2, sequence_length=1024, repeats=5, threads=1)
# Where a bench has sizes of its own.
OWN = {"cores": dict(n_embd=768, batch_size=1, shortest=256, sequence_length=16384, repeats=3),
       "parts": dict(n_embd=768, n_head=12),
       "decode": dict(n_embd=768, n_head=12, batch_size=1, repeats=1, mixer="attn,afno")}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message} (--help lists the flags)\n")
    parser.add_argument("bench", choices=BENCHES)
    for name, default in SIZES.items():
        parser.add_argument("--" + name, type=int, default=default, help="default: %(default)s")
    parser.add_argument("--mixer", default="fftnet",
                        help="rows of MIXERS for scaling, models, decode; default: %(default)s")
    parser.add_argument("--shortest", type=int, default=0,
                        help="tokens a row that lengths double from, for mixers, cores; default: "
                             "sequence_length, of cores 256")
    parser.add_argument("--tokens", type=int, default=0,
                        help="tokens a call of mixers, cores, in as many rows as that makes; "
                             "default: batch_size rows of any length")
    parser.add_argument("--plot", metavar="FILE.png", default="",
                        help="draw mixers or cores, log-log")
    parser.add_argument("--device", default="cpu",
                        help="auto, cpu, cuda or mps; default: %(default)s")
    bench = parser.parse_args(argv).bench
    parser.set_defaults(**OWN.get(bench, {}))
    args = parser.parse_args(argv)
    for name in SIZES:
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not 0 <= args.shortest <= args.sequence_length:
        parser.error(f"--shortest {args.shortest} is not between 0 and --sequence_length "
                     f"{args.sequence_length}: change one")
    if args.tokens and bench not in BASES:
        parser.error(f"--tokens is for {' and '.join(BASES)}, not {bench}: leave it out")
    longest = lengths(args)[-1]
    if args.tokens < 0 or args.tokens % longest:
        parser.error(f"--tokens {args.tokens} is no multiple of {longest}, the longest row")
    return parser, args


def main(argv=None):
    parser, args = parse(argv)
    if args.plot and args.bench not in BASES:
        parser.error(f"--plot draws {' and '.join(BASES)}, not {args.bench}: leave it out")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs an optional package: pip install matplotlib")
    device = pick_device(args.device, 0)
    keep_memory(device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        contenders = BENCHES[args.bench](args, device)
    except ValueError as e:                  # sizes that do not fit
        parser.error(str(e))
    rows = f"{args.tokens} tokens a call" if args.tokens else f"B {args.batch_size}"
    print(f"{args.bench}: {rows}, T {args.sequence_length}, C {args.n_embd}, "
          f"H {args.n_head}, {args.repeats} repeats, {args.threads} threads, "
          f"{device_name(device)}, torch {torch.__version__}")
    print(f"{'':26}{'min ms':>10}{'median ms':>11}{'ratio':>9}{'ratio':>9}{'tok/s':>11}{'MiB':>8}"
          "   ratios to the first row (mixers, cores: of that T), min and median")
    times = measure(contenders, args.repeats, device)
    first = next(iter(times))
    for name, ms in times.items():
        T = int(name.split(", T ")[1].split(",")[0]) if ", T " in name else args.sequence_length
        base = times[f"{BASES[args.bench]}, T {T}" if args.bench in BASES else first]
        least = min(ms)
        median = statistics.median(ms)
        tokens = TOKENS.get(args.bench, lambda args, T: rows_of(args, T) * T)(args, T)
        rate = f"{1e3 * tokens / least:.0f}"
        # Decoding takes too long to run once more.
        memory = "" if args.bench == "decode" else f"{peak(contenders[name], device) / 2**20:.0f}"
        print(f"{name:26}{least:10.1f}{median:11.1f}{least / min(base):9.2f}"
              f"{median / statistics.median(base):9.2f}{rate:>11}{memory:>8}")
    if args.plot:
        draw(times, args.plot)


if __name__ == "__main__":
    main()
