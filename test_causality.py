"""Does anything see the future? Every row of MIXERS against every check, and planted leaks that must be caught.

    python test_causality.py                # the table: mixers x checks, planted leaks x checks
    python -m pytest -q test_causality.py

All weights are drawn anew first: behind a projection that starts at zero, any leak is invisible. Maps are (B, T, C).
"""
import math
import sys

import pytest
import torch
import torch.nn as nn

from tests.published import PUBLISHED, ZeroPaddedAFNO
from train_gpt2 import GPT, MIXERS, Config, build

T, C, V = 151, 32, 16                                       # longer than a block of 128, and a multiple of nothing
PROBES = (0, 1, 2, 6, 22, 23, 64, 99, 127, 128, T - 1)      # the outputs whose gradients are looked at
torch.set_num_threads(1)                                    # a second thread costs more than these sizes take
SMALL = {"afno": dict(afno_num_blocks=2, afno_group_size=4)}             # what a row needs at this size
CASES = {row: dict(mixer=row) for row in MIXERS} | {        # a new row joins by itself; these are further settings
    "attn/gqa": dict(mixer="attn", n_kv_head=2), "attn/conv": dict(mixer="attn", short_conv=True),
    "attn/window": dict(mixer="attn", window=100),
    "afno/fft": dict(mixer="afno", afno_backend="fft"), "afno/toeplitz": dict(mixer="afno", afno_backend="toeplitz"),
    "afno/cut": dict(mixer="afno", afno_hard_thresholding_fraction=0.4), "diff/gqa": dict(mixer="diff", n_kv_head=2),
    "fftnet/bank": dict(mixer="fftnet", fftnet_filter="bank")}
GPTS = {
    "gpt": dict(mixer="afno,attn", n_layer=5),
    "gpt/switches": dict(mixer="afno,attn", n_layer=4, value_residual=True, x0_shortcut=True, unet_skips=True,
                         pos="learned"),
    "gpt/parts": dict(mixer="gdn,fan", n_layer=3, linear="cola", norm="hybrid_star", head_norm="qkv", residual="gated",
                      mlp="swiglu")}
# Bit for bit: GEMMs meet the future as exact zeros, an FFT meets it as rounding.
EXACT = ("attn", "attn/gqa", "attn/conv", "attn/window", "afno/toeplitz", "fan", "gdn", "diff", "diff/gqa",
         "diff_v2", "ngpt", "fftnet", "fftnet/bank")
LEARNERS = (*MIXERS, "afno/fft", "fftnet/bank", "gpt/switches")      # about 4 s each


def config(case, **sizes):
    knobs = (CASES | GPTS)[case]
    small = {knob: value for row in knobs["mixer"].split(",") for knob, value in SMALL.get(row, {}).items()}
    base = dict(n_layer=2, n_head=4, n_embd=C, vocab_size=V, sequence_length=T, logit_softcap=0.0, zero_init=True)
    return Config(**base | small | knobs | sizes)


def awake(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * p.size(-1) ** -0.5)
    return module


def subject(case):
    """A map in fp64: a mixer, or a GPT without its embedding and without the rounding of its logits to fp32."""
    cfg = config(case)
    if case in CASES:
        return awake(build("mixer", cfg.mixer, cfg, C, T)).double()
    gpt = awake(GPT(cfg)).double()
    gpt.wte, gpt.logits = nn.Identity(), lambda h: gpt.head(h)
    return gpt


def noise(B=2, steps=T):
    return torch.randn(B, steps, C, dtype=torch.float64)


def apart(a, b):
    return ((a - b).abs().max() / (b.abs().max() + 1e-99)).item()


# The checks: a map, or a case -> (what was measured, what is allowed)

def prefix(m):
    """A token's output does not depend on how many tokens follow it. Decoding rests on it, too."""
    x = noise()
    y = m(x)
    return max(apart(m(x[:, :t]), y[:, :t]) for t in (1, 2, 7, 16, 100, 128, 129, T - 1)), 1e-11


def influence(m):                                           # {t: |dy_t / dx_s|, (T,)} along a random direction of y_t
    x = noise(1).requires_grad_()
    y = m(x)[0]
    grad = {t: torch.autograd.grad((y[t] * torch.randn_like(y[t])).sum(), x, retain_graph=True)[0] for t in PROBES}
    return {t: g[0].abs().amax(-1) for t, g in grad.items()}


def jacobian(m):
    """No gradient from a token to an earlier output, relative to the largest to a later one."""
    J = influence(m)
    return max(J[t][t + 1:].max() for t in PROBES[:-1]).item() / max(J[t][:t + 1].max() for t in PROBES).item(), 1e-12


def alive(m):
    """The past does matter, at each of these lags: what mixes nothing would pass everything else."""
    J = influence(m)
    weakest = min(max(J[t][t - lag] for t in PROBES if t >= lag) for lag in (1, 2, 5, 11, 20, 90))
    return -math.log10(weakest / max(J[t].max() for t in PROBES) + 1e-99), 9.0           # decades below the strongest


def batch(m):
    """A row alone gives what it gives in a batch."""
    x = noise(3)
    return apart(m(x[1:2]), m(x)[1:2]), 1e-11


def pure(m):
    """A call leaves nothing behind."""
    x = noise()
    y, _ = m(x), m(noise(3, 20))
    return apart(m(x), y), 0.0


def decode(m):
    """Token by token with a state, the same numbers. A mixer may leave this out."""
    if not hasattr(m, "step"):
        return None
    x, state, columns = noise(), m.init_state(2), []
    for t in range(T):
        y, state = m.step(x[:, t], state)
        columns.append(y)
    return apart(torch.stack(columns, 1), m(x)), 1e-10


def swap(case):
    """Other tokens from `cut` on: the fp32 logits before it stay, bit for bit where the future meets exact zeros."""
    gpt, idx, worst = awake(GPT(config(case, n_layer=2))), torch.randint(V, (2, T)), 0.0
    for cut in (1, 8, 23, 128, T - 1):
        other = torch.cat((idx[:, :cut], torch.randint(V, (2, T - cut))), 1)
        worst = max(worst, apart(gpt(other)[:, :cut], gpt(idx)[:, :cut]))
    return worst, 0.0 if case in EXACT else 1e-5            # an FFT gives 6e-7; a leak, 1e-2 and more


def learn(case, plant=None, steps=200):
    """On fresh uniform random tokens no causal model beats ln V, and a few steps of AdamW find any leak there is.

    Measured in standard errors below ln V: no theory, no tolerance to argue about.
    """
    torch.manual_seed(0)
    gpt, losses = GPT(config(case, n_layer=2, sequence_length=16)), []
    for block in gpt.blocks if plant else ():
        block.mixer = plant()
    opt = torch.optim.AdamW(gpt.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        idx = torch.randint(V, (32, 17))
        loss = gpt(idx[:, :-1], idx[:, 1:])
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    last = torch.tensor(losses[-20:])
    return ((math.log(V) - last.mean()) / (last.std() / 20 ** 0.5)).item(), 3.0


MAP_CHECKS = dict(prefix=prefix, jacobian=jacobian, alive=alive, batch=batch, pure=pure, decode=decode)
CHECKS = MAP_CHECKS | dict(swap=swap, learn=learn)


def measure(check, case):                                   # None: does not apply
    if check in MAP_CHECKS:
        return CHECKS[check](subject(case))
    return CHECKS[check](case) if check != "learn" or case in LEARNERS else None


@pytest.mark.parametrize("case, check", [(a, b) for a in CASES | GPTS for b in CHECKS if b != "learn" or a in LEARNERS])
def test_causal(case, check):
    if (result := measure(check, case)) is None:
        pytest.skip("does not decode")
    assert result[0] <= result[1]


@pytest.mark.parametrize("case", GPTS)
def test_eval_mode(case):
    m, x = subject(case), noise()
    assert torch.equal(m.train()(x), m.eval()(x)) and prefix(m)[0] < prefix(m)[1]


# Planted leaks: a test that has never failed proves little. The published ones are in tests/published.py.

def band(x, first, last):                                   # sum over lags first..last
    ones = torch.ones(x.size(1), x.size(1), dtype=x.dtype)
    return (ones.tril(-first) - ones.tril(-last - 1)) @ x


FAULTS = {name: (awake(cls()).double(), (prefix, jacobian)) for name, cls in PUBLISHED.items()} | {
    "FFT over the sequence": (lambda x: torch.fft.fft(x, dim=1).real, (prefix, jacobian)),
    "mask off by one": (lambda x: band(x, -1, T), (prefix, jacobian)),
    "kernel on a grid of T": (lambda x: band(x, 0, T) * torch.linspace(1, 2, x.size(1))[:, None], (prefix,)),
    "mean over the batch": (lambda x: band(x, 0, T) + x.mean(0), (batch,)),
    "random at every call": (lambda x: band(x, 0, T) * torch.rand(()), (pure,)),
    "mixes nothing": (lambda x: x.tanh(), (alive,)),
    "short memory": (lambda x: band(x, 0, 3), (alive,)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name):
    m, checks = FAULTS[name]
    for measured, allowed in (check(m) for check in checks):
        assert measured > 5 * allowed + 1e-3


def test_hidden_leak_is_caught_only_awake():
    m = ZeroPaddedAFNO().double()
    assert prefix(m)[0] == 0 and prefix(awake(m))[0] > 0.1


@pytest.mark.parametrize("name", PUBLISHED)
def test_learning_finds_the_leak(name):
    assert learn("attn", PUBLISHED[name])[0] > 10


def line(name, results):
    """Print a mark, or the number that is too large; True if there is one."""
    bad = [r is not None and not r[0] <= r[1] for r in results]
    cells = ["" if r is None else f"{r[0]:.2g}" if wrong else "ok" for r, wrong in zip(results, bad)]
    print(f"{name:22}" + "".join(f"{cell:>10}" for cell in cells), flush=True)
    return any(bad)


def main():
    """Print the table; True (exit code 1) if a mixer fails or a planted fault passes."""
    print(" " * 22 + "".join(f"{check:>10}" for check in CHECKS))
    failed = [line(case, [measure(check, case) for check in CHECKS]) for case in CASES | GPTS]
    print("\nplanted faults, each to be caught")
    caught = [line(name, [check(m) for check in MAP_CHECKS.values()]) for name, (m, _) in FAULTS.items()]
    caught += [line(name, [None] * 7 + [learn("attn", cls)]) for name, cls in PUBLISHED.items()]
    return any(failed) or not all(caught)


if __name__ == "__main__":
    sys.exit(main())
