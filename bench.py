"""Speed, side by side: every contender runs in turn, again and again, so that a busy machine slows all of them alike.

    python bench.py gdn                         # Gated DeltaNet's rule in chunks, token by token, and by transformers
    python bench.py mixers --n_embd 512         # forward and backward of every row of MIXERS, as a ratio to attention
    python bench.py scaling --mixer fftnet,attn # the same number of tokens in longer and longer rows: linear or not?

Milliseconds, forward and backward, minimum and median over the repeats; trust the ratios, not the times. On CUDA under
bf16 autocast, as in training. A new bench is a function that returns {contender: callable} and a row of BENCHES.
"""
import argparse
import importlib.util
import inspect
import statistics
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from deltanet import gated_delta_rule, gated_delta_rule_naive
from machine import device_name, pick_device
from train_gpt2 import MIXERS, Config, build


def gdn(args, device):
    """The gated delta rule in fp32, n_head heads of n_embd / n_head (dk = dv): ours by chunks of 32 and 64; the rest.

    The recurrences take every token by itself; transformers' chunks, where it is installed, are of 64 as well.
    """
    B, T, H, D = args.batch_size, args.sequence_length, args.n_head, args.n_embd // args.n_head
    if args.n_embd % H:
        raise ValueError(f"{args.n_embd} channels do not split into {H} heads: change --n_embd or --n_head")
    q, k, v = (torch.randn(B, T, H, D, device=device) for _ in range(3))
    g, beta = -0.5 * torch.rand(B, T, H, device=device), torch.rand(B, T, H, device=device)
    x = [u.requires_grad_() for u in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta)]
    rules = {"chunks of 32": gated_delta_rule, "chunks of 64": lambda *x: gated_delta_rule(*x, chunk=64),
             "recurrence": gated_delta_rule_naive}
    if importlib.util.find_spec("transformers"):
        from transformers.models.olmo_hybrid import modeling_olmo_hybrid as theirs
        chunk, recurrent = (inspect.unwrap(getattr(theirs, f"torch_{kind}_gated_delta_rule"))      # not fla's kernel,
                            for kind in ("chunk", "recurrent"))                                    # if that is there
        rules |= {"transformers, chunks": lambda q, k, v, g, beta: chunk(q, k, v, g=g, beta=beta),
                  "transformers, recurrence": lambda q, k, v, g, beta: recurrent(q, k, v, g=g, beta=beta)}
    else:
        print("transformers is not installed: pip install transformers adds its forms")
    return {name: lambda rule=rule: torch.autograd.grad(rule(*x)[0].sum(), x) for name, rule in rules.items()}


def passes(row, B, T, args, device):
    """Forward and backward of a row of MIXERS with its default knobs, on (B, T, n_embd)."""
    cfg = Config(mixer=row, n_head=args.n_head, n_embd=args.n_embd, batch_size=B, sequence_length=T)
    m = build("mixer", row, cfg, args.n_embd, T).to(device)
    x = torch.randn(B, T, args.n_embd, device=device, requires_grad=True)
    return lambda: torch.autograd.grad(m(x).sum(), [x, *m.parameters()])


def mixers(args, device):
    """Every row of MIXERS on (batch_size, sequence_length, n_embd); attention is 1.00."""
    return {row: passes(row, args.batch_size, args.sequence_length, args, device)
            for row in sorted(MIXERS, key=lambda row: row != "attn")}


def scaling(args, device):
    """Each of --mixer on 8 batch_size sequence_length tokens, in rows of 1, 2, 4 and 8 times sequence_length."""
    return {f"{row}, T {n * args.sequence_length}": passes(row, 8 // n * args.batch_size, n * args.sequence_length,
                                                           args, device)
            for row in args.mixer.split(",") for n in (1, 2, 4, 8)}


BENCHES = {"gdn": gdn, "mixers": mixers, "scaling": scaling}


def measure(contenders, repeats, device):
    """{name: milliseconds of each repeat}, interleaved.

    An untimed call comes before each timed one: else a contender also pays for the memory that the last one gave back.
    """
    times = {name: [] for name in contenders}
    precision = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    for _ in range(repeats):
        for name, run in contenders.items():
            for timed in (False, True):
                start = time.perf_counter()
                with precision:
                    run()
                if device.type != "cpu":
                    getattr(torch, device.type).synchronize()
                if timed:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message} (--help lists the flags)\n")
    parser.add_argument("bench", choices=BENCHES)
    for name, default in dict(n_embd=512, n_head=8, batch_size=2, sequence_length=1024, repeats=5, threads=1).items():
        parser.add_argument("--" + name, type=int, default=default, help="default: %(default)s")
    parser.add_argument("--mixer", default="fftnet", help="rows of MIXERS for scaling; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or mps; default: %(default)s")
    args = parser.parse_args(argv)
    if wrong := [name for name, value in vars(args).items() if isinstance(value, int) and value < 1]:
        parser.error(f"--{wrong[0]} must be at least 1")
    device = pick_device(args.device, 0)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        contenders = BENCHES[args.bench](args, device)
    except ValueError as e:                                 # sizes that do not fit
        parser.error(str(e))
    print(f"{args.bench}: B {args.batch_size}, T {args.sequence_length}, C {args.n_embd}, H {args.n_head}, "
          f"{args.repeats} repeats, {args.threads} threads, {device_name(device)}, torch {torch.__version__}")
    times = measure(contenders, args.repeats, device)
    base = next(iter(times.values()))
    print(f"{'':26}{'min ms':>10}{'median ms':>11}{'ratio':>9}{'ratio':>9}   ratios to the first row, min and median")
    for name, ms in times.items():
        print(f"{name:26}{min(ms):10.1f}{statistics.median(ms):11.1f}{min(ms) / min(base):9.2f}"
              f"{statistics.median(ms) / statistics.median(base):9.2f}")


if __name__ == "__main__":
    main()
