"""Does anything see the future? Every row of MIXERS against every check, and planted leaks.

    python test_causality.py                # the table: mixers x checks, planted leaks x checks
    python test_causality.py afno gdn       # these rows of it
    python test_causality.py my_mixer.py:MyMixer --kwargs '{"dim": 64}'    # yours: share/leaks.py
    python -m pytest -q test_causality.py

All weights are drawn anew first: behind a projection that starts at zero, any leak is invisible.
The checks of a map (B, T, C) are in tests/checks.py; those of a whole GPT are here.
"""
import math
import sys

import pytest
import torch
import torch.nn as nn

from share import leaks
from support.flags import choices
from tests.checks import (C, T, alive, apart, awake, batch, decode, jacobian, noise, prefix, pure,
                          small)
from tests.published import PUBLISHED, ZeroPaddedAFNO
from train_gpt2 import GPT, MIXERS, Config, build

V = 16
# A second thread costs more than these sizes take.
torch.set_num_threads(1)

# A new row joins by itself; these are further settings.
CASES = {row: dict(mixer=row) for row in MIXERS} | {
    "attn/gqa": dict(mixer="attn", n_kv_head=2),
    "attn/conv": dict(mixer="attn", short_conv=True),
    "attn/window": dict(mixer="attn", window=100),
    "afno/fft": dict(mixer="afno", afno_backend="fft"),
    "afno/toeplitz": dict(mixer="afno", afno_backend="toeplitz"),
    "afno/banded": dict(mixer="afno", afno_backend="banded", afno_taps=100),
    "afno/cut": dict(mixer="afno", afno_hard_thresholding_fraction=0.4),
    "diff/gqa": dict(mixer="diff", n_kv_head=2),
    "fftnet/bank": dict(mixer="fftnet", fftnet_filter="bank"),
}
GPTS = {
    "gpt": dict(mixer="afno,attn", n_layer=5),
    "gpt/switches": dict(mixer="afno,attn", n_layer=4, value_residual=True, x0_shortcut=True,
                         unet_skips=True, output_conv=True, pos="learned"),
    "gpt/local": dict(mixer="attn", n_layer=4, window=(9, 0)),
    "gpt/parts": dict(mixer="gdn,fan", n_layer=3, linear="cola", norm="hybrid_star",
                      head_norm="qkv", residual="gated", mlp="swiglu"),
}
# Bit for bit: GEMMs meet the future as exact zeros, an FFT meets it as rounding.
EXACT = ("attn", "attn/gqa", "attn/conv", "attn/window", "afno/toeplitz", "afno/banded", "fan",
         "gdn", "diff", "diff/gqa", "diff_v2", "ngpt", "fftnet", "fftnet/bank")
# About 4 s each.
LEARNERS = (*MIXERS, "afno/fft", "fftnet/bank", "gpt/switches")


def config(case, **sizes):
    knobs = (CASES | GPTS)[case]
    base = dict(n_layer=2, n_head=4, n_embd=C, vocab_size=V, sequence_length=T, logit_softcap=0.0,
                zero_init=True)
    return Config(**base | small(knobs["mixer"]) | knobs | sizes)


def subject(case):
    """A map in fp64: a mixer, or a GPT without its embedding and the rounding of its logits."""
    cfg = config(case)
    if case in CASES:
        return awake(build("mixer", cfg.mixer, cfg, C, T)).double()
    gpt = awake(GPT(cfg)).double()
    gpt.wte = nn.Identity()
    gpt.logits = lambda h: gpt.head(h)
    return gpt


# The checks of a GPT: a case -> (what was measured, what is allowed)

def swap(case):
    """Other tokens from `cut` on: the fp32 logits before it stay, bit for bit where EXACT."""
    gpt = awake(GPT(config(case, n_layer=2)))
    idx = torch.randint(V, (2, T))
    worst = 0.0
    for cut in (1, 8, 23, 128, T - 1):
        other = torch.cat((idx[:, :cut], torch.randint(V, (2, T - cut))), 1)
        worst = max(worst, apart(gpt(other)[:, :cut], gpt(idx)[:, :cut]))
    # An FFT gives 6e-7; a leak, 1e-2 and more.
    return worst, 0.0 if case in EXACT else 1e-5


def learn(case, plant=None, steps=200):
    """On fresh uniform random tokens no causal model beats ln V; AdamW finds any leak there is.

    Measured in standard errors below ln V: no theory, no tolerance to argue about.
    """
    torch.manual_seed(0)
    gpt = GPT(config(case, n_layer=2, sequence_length=16))
    for block in gpt.blocks if plant else ():
        block.mixer = plant()
    opt = torch.optim.AdamW(gpt.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        idx = torch.randint(V, (32, 17))
        loss = gpt(idx[:, :-1], idx[:, 1:])
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    last = torch.tensor(losses[-20:])
    standard_error = last.std() / 20 ** 0.5
    return ((math.log(V) - last.mean()) / standard_error).item(), 3.0


MAP_CHECKS = dict(prefix=prefix, jacobian=jacobian, alive=alive, batch=batch, pure=pure,
                  decode=decode)
CHECKS = MAP_CHECKS | dict(swap=swap, learn=learn)


def measure(check, case):
    """-> (measured, allowed), or None where the check does not apply."""
    if check in MAP_CHECKS:
        return CHECKS[check](subject(case))
    return CHECKS[check](case) if check != "learn" or case in LEARNERS else None


PAIRS = [(case, check) for case in CASES | GPTS for check in CHECKS
         if check != "learn" or case in LEARNERS]


@pytest.mark.parametrize("case, check", PAIRS)
def test_causal(case, check):
    if (result := measure(check, case)) is None:
        pytest.skip("does not decode")
    assert result[0] <= result[1]


@pytest.mark.parametrize("case", GPTS)
def test_eval_mode(case):
    m = subject(case)
    x = noise()
    assert torch.equal(m.train()(x), m.eval()(x))
    measured, allowed = prefix(m)
    assert measured < allowed


# Planted leaks: a test that has never failed proves little. Published ones: tests/published.py.

def band(x, first, last):
    """The sum over lags first..last."""
    ones = torch.ones(x.size(1), x.size(1), dtype=x.dtype)
    return (ones.tril(-first) - ones.tril(-last - 1)) @ x


def cumulative(x):
    return band(x, 0, T)


FAULTS = {name: (awake(cls()).double(), (prefix, jacobian)) for name, cls in PUBLISHED.items()} | {
    "FFT over the sequence": (lambda x: torch.fft.fft(x, dim=1).real, (prefix, jacobian)),
    "mask off by one": (lambda x: band(x, -1, T), (prefix, jacobian)),
    "kernel on a grid of T": (
        lambda x: cumulative(x) * torch.linspace(1, 2, x.size(1))[:, None], (prefix,)),
    "mean over the batch": (lambda x: cumulative(x) + x.mean(0), (batch,)),
    "random at every call": (lambda x: cumulative(x) * torch.rand(()), (pure,)),
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


def print_row(name, results) -> bool:
    """Print a mark, or the number that is too large; True if there is one."""
    cells = []
    bad = False
    for result in results:
        cell = ""
        if result is not None:
            measured, allowed = result
            wrong = not measured <= allowed
            cell = f"{measured:.2g}" if wrong else "ok"
            bad = bad or wrong
        cells.append(cell)
    print(f"{name:22}" + "".join(f"{cell:>10}" for cell in cells), flush=True)
    return bad


def chosen(rows, words):
    """The rows of these names, with their settings: afno is afno and afno/fft; no words: all.

    SystemExit with one line for a word that names none.
    """
    names = list(rows) if not words else []
    for word in words:
        found = [row for row in rows if row == word or row.startswith(f"{word}/")]
        if not found:
            raise SystemExit(f"{word}: no such row; {choices(word, rows)}; a model of your own is "
                             "FILE.py:NAME or --hf NAME")
        names += found
    return dict.fromkeys(names)


def test_rows_are_chosen_by_name():
    found = list(chosen(CASES, ["gdn", "afno"]))
    assert found[:2] == ["gdn", "afno"] and "afno/fft" in found[2:]
    assert all(case.startswith("afno/") for case in found[2:])
    assert list(chosen(CASES, [])) == list(CASES)
    with pytest.raises(SystemExit, match="afnp: no such row; did you mean afno?"):
        chosen(CASES, ["attn", "afnp"])


def main(words=()):
    """Print the table; True (exit code 1) if a mixer fails or a planted fault passes."""
    names = chosen(CASES | GPTS | FAULTS, words)
    print(" " * 22 + "".join(f"{check:>10}" for check in CHECKS))
    failed = []
    for case in names:
        if case not in FAULTS:
            failed.append(print_row(case, [measure(check, case) for check in CHECKS]))
    caught = []
    if names.keys() & FAULTS.keys():
        print("\nplanted faults, each to be caught")
    for name in names:
        if name in FAULTS:
            m = FAULTS[name][0]
            caught.append(print_row(name, [check(m) for check in MAP_CHECKS.values()]))
    for name in names:
        if name in PUBLISHED:
            caught.append(print_row(name, [None] * 7 + [learn("attn", PUBLISHED[name])]))
    return any(failed) or not all(caught)


if __name__ == "__main__":
    words = sys.argv[1:]
    if any(word[0] == "-" or ":" in word or word.endswith(".py") for word in words if word):
        sys.exit(leaks.main(words))
    sys.exit(main(words))
