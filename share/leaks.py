"""The leak lab: does your model see the future? Any module, nothing of ours in its file.

    python test_causality.py my_mixer.py:MyMixer --kwargs '{"dim": 64}'
    python test_causality.py my_package.models:make_model        # installed; a class or a factory
    python test_causality.py --hf llama                          # a kind, a folder, a hub's name

It takes a map (B, T, C) -> (B, T, any width) or a language model, ids (B, T) -> (B, T, V), finds
out which, C or V, and the longest T of a few that it accepts; --dim, --vocab and --T say so.
All weights are drawn anew, since a projection that starts at zero hides any leak; --as_is keeps
them, and trained ones are kept. Everything is computed in fp64 where the module allows: what
rounding hides is stated, by the least precise type in which it computes.

Exit code 1: a leak; 0: none; 2: the module or the command does not work.
"""
import argparse
import inspect
import json
import math
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from share.strangers import (NOISE, Least, Stranger, Trouble, from_source, from_transformers,
                             read_kwargs, result, said, settle)
from support.flags import Parser
from tests.checks import apart, awake

# Tokens of the learned check, its windows, steps and seconds; more standard errors are a leak.
V, WINDOW, STEPS, SECONDS, ENOUGH = 16, 16, 200, 15.0, 5.0


# --------------------------------------------------------------------------------------------------
# Leaks. Each check: stranger -> what was measured, or None where it does not apply.

def cuts(T):
    return sorted({t for t in (1, 2, 7, 16, 64, 100, 128, T // 2, T - 1) if 0 < t < T})


def future(m):
    """Other inputs from a cut on: the outputs before it stay."""
    x = m.inputs(2)
    y = m(x)
    worst = 0.0
    for t in cuts(m.T):
        other = torch.cat((x[:, :t], m.inputs(2)[:, t:]), 1)
        worst = max(worst, apart(m(other)[:, :t], y[:, :t]))
    return worst


def prefix(m):
    """The outputs do not depend on how many inputs follow. Lengths that it refuses are skipped."""
    x = m.inputs(2)
    y = m(x)
    lengths = [t for t in cuts(m.T) if m.takes(2, t)]
    return max((apart(m(x[:, :t]), y[:, :t]) for t in lengths), default=None)


def influence(m):
    """{t: |dy_t / dx_s|, (T,)} along a random direction of y_t; of ids, by their embeddings.

    None where no gradient comes through.
    """
    found = []

    def embed(module, inputs, out):
        if not found and out.dim() == 3:
            found.append(out.detach().requires_grad_())
            return found[0]

    hooks = []
    if m.ids:
        hooks = [layer.register_forward_hook(embed) for layer in m.module.modules()
                 if isinstance(layer, nn.Embedding) and layer.num_embeddings >= m.size]
        y = m(m.inputs(1))
    else:
        found.append(m.inputs(1).requires_grad_())
        y = m(found[0])
    for hook in hooks:
        hook.remove()
    if not found or not y.requires_grad:
        return None
    sizes = {}
    for t in sorted({0, 1, 2, 6, m.T // 2, m.T - 2, m.T - 1}):
        along = (y[0, t] * torch.randn_like(y[0, t])).sum()
        grad, = torch.autograd.grad(along, found, retain_graph=True, allow_unused=True)
        if grad is None:
            return None
        sizes[t] = grad[0].abs().amax(-1).double()
    return sizes


def gradient(m):
    """The largest gradient from an input to an earlier output, relative to the largest of all."""
    J = influence(m)
    if J is None:
        return None
    ahead = max([size[t + 1:].max().item() for t, size in J.items() if t < m.T - 1], default=0.0)
    return ahead / (max(size.max().item() for size in J.values()) + 1e-99)


def batch(m):
    """A row does not change with the other rows, nor when it is alone."""
    x = m.inputs(3)
    y = m(x)[1:2]
    other = m.inputs(3)
    other[1] = x[1]
    alone = m(x[1:2]) if m.takes(1) else y
    return max(apart(m(other)[1:2], y), apart(alone, y))


def state(m):
    """The same call gives the same after another one; what it draws at random is drawn again."""
    x = m.inputs(2)
    y = m(x)
    m(m.inputs(2))
    return apart(m(x), y)


class NoDropout(TorchFunctionMode):
    """Dropout passes everything: which draw a token gets may depend on where a router sends it."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.dropout:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs = kwargs | dict(zip(("attn_mask", "dropout_p", "is_causal"), args[3:]))
            return func(*args[:3], **kwargs | dict(dropout_p=0.0))
        return func(*args, **kwargs)


def train(m):
    """The same in training mode but for dropout: later inputs, and other rows."""
    m.module.train()
    x = m.inputs(2)
    other = m.inputs(2)
    rows = torch.cat((x[:1], other[1:]))
    half = torch.cat((x[:, :m.T // 2], other[:, m.T // 2:]), 1)
    with NoDropout():
        y = m(x)
        return max(apart(m(rows)[:1], y[:1]), apart(m(half)[:, :m.T // 2], y[:, :m.T // 2]))


class Reader(nn.Module):
    """A language model around a map (B, T, C) -> (B, T, width)."""
    def __init__(self, m):
        super().__init__()
        self.dtype = torch.float32 if m.dtype == torch.float64 else m.dtype
        self.wte = nn.Embedding(V, m.size)
        self.map = m.origin.build().to(self.dtype)
        self.head = nn.LazyLinear(V)

    def forward(self, idx):
        x = self.wte(idx).to(self.dtype)
        return self.head(result(self.map(x), x).float())


def learn(m):
    """Standard errors below ln V after training on random tokens: causal models never get there.

    V random ids of its own vocabulary. As many steps as the clock allows.
    """
    torch.manual_seed(0)
    if m.ids:
        model = (m.origin.small or m.origin.build)().float()
    else:
        model = Reader(m)
    model.train()
    T = WINDOW if m.takes(2, WINDOW) else m.T
    vocab = min(V, m.size) if m.ids else V
    opt = None
    losses = []
    start = time.monotonic()
    while len(losses) < STEPS and (len(losses) < 25 or time.monotonic() - start < SECONDS):
        idx = torch.randint(vocab, (32, T + 1))
        logits = result(model(idx[:, :-1]), idx[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
        # The first forward makes the head's weights.
        opt = opt or torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        losses.append(loss.item())
    last = torch.tensor(losses[-20:], dtype=torch.float64)
    return ((math.log(vocab) - last.mean()) / (last.std() / 20 ** 0.5)).item()


# --------------------------------------------------------------------------------------------------
# What is no leak, but good to know

def accepts(m, name):
    return name in inspect.signature(m.module.forward).parameters


def cache(m):
    """Of transformers: greedy decoding with the cache has the logits of a forward pass."""
    if not (m.ids and hasattr(m.module, "can_generate") and m.module.can_generate()):
        return None
    x = m.inputs(2, 9)
    out = m.module.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=8,
                            min_new_tokens=8, do_sample=False, use_cache=True, output_logits=True,
                            return_dict_in_generate=True)
    # Behind the last token nothing is generated.
    return apart(torch.stack(out.logits, 1).double(), m(out.sequences[:, :-1])[:, 8:])


def padding(m):
    """Of transformers: masked tokens to the left, and positions that begin behind them."""
    if not (m.ids and accepts(m, "attention_mask")):
        return None
    x = m.inputs(2)
    mask = torch.ones_like(x)
    mask[:, :5] = 0
    arguments = dict(attention_mask=mask)
    if accepts(m, "position_ids"):
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return apart(m(x, **arguments)[:, 5:], m(x[:, 5:]))


def training(m):
    """How far apart training and evaluation are: dropout, statistics of the batch."""
    x = m.inputs(2)
    y = m(x)
    m.module.train()
    differs = apart(m(x), y)
    m.module.eval()
    return differs


# --------------------------------------------------------------------------------------------------
# The verdict

# {check: what it changes, for the table}
LEAKS = {"future": "other inputs from a cut on, outputs before it",
         "prefix": "the text ends there, outputs before it",
         "gradient": "from inputs to earlier outputs",
         "batch": "other rows, or none",
         "state": "another call in between",
         "train": "other inputs, other rows, in training mode without dropout",
         "learn": "standard errors below chance, trained on random tokens"}
NOTES = {"cache": "decoding against forward",
         "padding": "masked tokens on the left",
         "training": "training mode against evaluation"}
CHECKS = dict(future=future, prefix=prefix, gradient=gradient, batch=batch, state=state,
              train=train, learn=learn, cache=cache, padding=padding, training=training)


def reach(m, allowed):
    """(steps ahead, steps back) over which an input matters to an output; None: no gradients."""
    J = influence(m)
    if J is None:
        return None
    least = allowed * (max(size.max().item() for size in J.values()) + 1e-99)
    lags = [(s - t) for t, size in J.items() for s in (size > least).nonzero().flatten().tolist()]
    return max([0, *lags]), max([0, *(-lag for lag in lags)])


def sentence(name, found, failed, seen, steps):
    """The verdict in plain words."""
    leaks = []
    ahead = ""
    if steps and steps[0]:
        ahead = " one step ahead" if steps[0] == 1 else f" up to {steps[0]} steps ahead"
    if {"future", "gradient"} & failed:
        size = max(found[check] or 0 for check in ("future", "prefix", "gradient"))
        leaks.append(f"sees the future{ahead}: what comes later changes what stands before by "
                     f"{size:.2g} of the largest output")
    elif "prefix" in failed:
        leaks.append("depends on how long the text is: the same tokens have other outputs in a "
                     f"shorter one, by {found['prefix']:.2g} of the largest")
    elif "train" in failed:
        leaks.append("sees later inputs or other rows in training alone, as statistics of a batch "
                     f"do, by {found['train']:.2g} of the largest output")
    if "batch" in failed:
        leaks.append(f"mixes the rows of a batch, by {found['batch']:.2g}")
    if "state" in failed:
        leaks.append(f"gives something else at the second call, by {found['state']:.2g}: it keeps "
                     "a state")
    if "learn" in failed:
        leaks.append("learns what random tokens come next, where chance is the best there is, by "
                     f"{found['learn']:,.0f} standard errors")
    if leaks:
        return f"{name} leaks. It " + "; it ".join(leaks) + "."
    hidden = f"It could have seen leaks down to {seen:g} of the largest output."
    return f"No leak found in {name}. {hidden}"


def notes(found, failed, steps):
    """What else is worth a line each."""
    lines = []
    if steps and not any(steps) and not failed & LEAKS.keys():
        lines.append("it mixes no tokens at all: every output depends on its own input alone")
    if "cache" in failed:
        lines.append("decoding with its cache gives other logits than a forward pass, by "
                     f"{found['cache']:.2g}")
    if "padding" in failed:
        lines.append(f"masked tokens on the left change what follows, by {found['padding']:.2g}")
    if "training" in failed:
        lines.append(f"training and evaluation differ by {found['training']:.2g}: dropout, or "
                     "statistics of the batch")
    return lines


def examine(m, as_is=False) -> dict:
    """All that is found about a stranger: what --json prints. Trouble where it dies."""
    weights = "as they are" if as_is or m.origin.trained else "drawn anew"
    if weights == "drawn anew":
        awake(m.module)
        if not m.takes(2):
            m = Stranger(m.origin, m.ids, m.size, m.T, m.dtype)
            weights = "as it starts, since others give NaN"
    x = m.inputs(2)
    with torch.no_grad(), Least(x) as least:
        m(x)
    noise = NOISE[least.dtype]
    # transformers' generate hands out fp32.
    allowed = dict.fromkeys(CHECKS, noise) | dict(learn=ENOUGH, cache=max(noise, 1e-5))
    found, undone = {}, {}
    # The state first: where there is one, the others look at copies. The last two leave one behind.
    for check in ("state", "future", "prefix", "gradient", "batch", *NOTES, "train", "learn"):
        try:
            with torch.set_grad_enabled(check in ("gradient", "learn")):
                found[check] = CHECKS[check](m)
        except Exception as e:
            if check in ("state", "future"):
                raise
            found[check] = None
            undone[check] = str(e) if isinstance(e, Trouble) else said(e)
        if check == "state":
            m.copies = not found[check] <= allowed[check]
    failed = {check for check, size in found.items()
              if size is not None and not size <= allowed[check]}
    m.module.eval()
    steps = reach(m, allowed["gradient"]) if found["gradient"] is not None else None
    return dict(
        name=m.origin.name, input=f"ids (2, {m.T}) below {m.size:,}" if m.ids else
        f"floats (2, {m.T}, {m.size})", weights=weights,
        parameters=sum(p.numel() for p in m.module.parameters()),
        precision=str(least.dtype).split(".")[1], seen_down_to=noise,
        checks={check: dict(measured=found[check], allowed=allowed[check],
                            failed=check in failed, is_leak=check in LEAKS) for check in CHECKS},
        steps_ahead=steps and steps[0], steps_back=steps and steps[1], not_done=undone,
        leaks=bool(failed & LEAKS.keys()),
        verdict=sentence(m.origin.name, found, failed, noise, steps),
        notes=notes(found, failed, steps))


def show(report: dict):
    """The table, the verdict, the notes."""
    print(f"{report['name']}: {report['input']}, {report['parameters']:,} parameters "
          f"{report['weights']}, least precise type {report['precision']}\n")
    for check, row in report["checks"].items():
        if row["measured"] is None:
            mark = "not done" if check in report["not_done"] else "no such"
        else:
            bad = "LEAK" if row["is_leak"] else "differs"
            mark = bad if row["failed"] else "ok"
        size = "" if row["measured"] is None else f"{row['measured']:.2g}"
        print(f"{check:10}{size:>10}{mark:>10}   {(LEAKS | NOTES)[check]}")
    print(f"\n{report['verdict']}")
    for line in report["notes"]:
        print(f"note: {line}")
    for check, why in report["not_done"].items():
        print(f"note: {check} was not done: {why}")


def parse(argv):
    p = Parser(prog="test_causality.py", allow_abbrev=False, description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", nargs="?", metavar="FILE.py:NAME",
                   help="a class, a factory or a module; PACKAGE.MODULE:NAME, where installed")
    p.add_argument("--hf", metavar="NAME", help="a model of transformers instead")
    p.add_argument("--kwargs", default="{}", metavar="JSON",
                   help="what it is built with; with --hf, fields of its config")
    p.add_argument("--dim", type=int, metavar="C", help="its inputs are floats (B, T, C)")
    p.add_argument("--vocab", type=int, metavar="V", help="its inputs are ids (B, T) below V")
    p.add_argument("--T", type=int, metavar="N", help="its inputs have this length")
    p.add_argument("--as_is", action="store_true", help="keep its weights")
    p.add_argument("--json", action="store_true", help="print all that was found as JSON")
    args = argparse.Namespace(**p.typed(argv))
    if bool(args.source) == bool(args.hf):
        p.error("name one model: FILE.py:NAME or --hf NAME")
    if args.dim and args.vocab:
        p.error("--dim with --vocab: its inputs are floats or ids: drop one")
    for name, least in dict(dim=1, vocab=2, T=4).items():
        if (getattr(args, name) or least) < least:
            p.error(f"--{name} {getattr(args, name)}: at least {least}")
    return args


def main(argv) -> int:
    """-> the exit code."""
    try:
        args = parse(argv)
        kwargs = read_kwargs(args.kwargs)
        origin = (from_transformers(args.hf, kwargs) if args.hf
                  else from_source(args.source, kwargs))
        report = examine(settle(origin, args.dim, args.vocab, args.T), args.as_is)
    except Exception as e:
        name = f"{args.source or args.hf}: " if str(e)[:2] != "--" else ""
        print(e if isinstance(e, Trouble) else f"{name}{said(e)}", file=sys.stderr)
        return 2
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return 2 if e.code else 0
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
    return int(report["leaks"])
