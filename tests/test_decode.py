"""support/decode.py: states against forward, the window, and what tokens are drawn with."""
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn as nn

from support import decode
from support.decode import Context, generate
from tests.checks import apart, awake, small
from train_gpt2 import GPT, MIXERS, Config

# Past a chunk of FFTNet's, and a multiple of nothing.
T = 71
V = 11
CASES = {row: dict(mixer=row) for row in MIXERS} | {
    "grouped keys": dict(mixer="attn", n_kv_head=2),
    "one key": dict(mixer="diff_v2", n_kv_head=1),
    "convolution": dict(mixer="attn", short_conv=True),
    "window": dict(mixer="fan", window=20),
    "window in one layer": dict(mixer="attn", window=(20, 0)),
    "bank": dict(mixer="fftnet", fftnet_filter="bank"),
    "fft": dict(mixer="afno", afno_backend="fft"),
    "value residual": dict(mixer="afno,attn", value_residual=True, x0_shortcut=True),
    "of recurrent ones": dict(mixer="gdn,fftnet", value_residual=True, unet_skips=True),
    "output convolutions": dict(mixer="afno,attn", output_conv=True, afno_taps=9),
    "learned positions": dict(mixer="afno,attn", pos="learned", short_conv=True),
    "documents": dict(mixer="attn", batches="packed", document_token=1, window=30),
    "packed convolutions": dict(mixer="afno,attn", batches="packed", document_token=1, afno_taps=9,
                                short_conv=True, output_conv=True, value_residual=True),
}


def gpt(mixer, T=T, **knobs):
    cfg = Config(mixer=mixer, n_layer=2, n_head=4, n_embd=32, vocab_size=V, sequence_length=T,
                 **small(mixer) | knobs)
    return awake(GPT(cfg)).double().eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_states_equal_forward(case):
    """Behind a prompt of n tokens, and behind none: all that follows, in three rows."""
    m = gpt(**CASES[case])
    idx = torch.randint(V, (3, T))
    expected = m(idx)
    assert apart(expected[:, :-1], expected[:, 1:]) > 0.1
    for n, end in ((0, T), (2, 12), (T // 2 + 1, 50), (T - 5, T)):
        columns = []
        state = m.init_state(3)
        if n:
            logits, state = m.prefill(idx[:, :n])
            columns = [logits]
        for column in idx[:, n:end].unbind(1):
            logits, state = m.step(column, state)
            columns.append(logits)
        got = torch.stack(columns, 1)
        assert apart(got, expected[:, end - got.size(1):end]) < 1e-9, n


class OnlySteps(nn.Module):
    """A mixer that has no prefill."""
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer
        self.forward = mixer.forward
        self.init_state = mixer.init_state
        self.step = mixer.step


class OnlyForward(nn.Module):
    """A mixer that does not decode."""
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer
        self.forward = mixer.forward


@pytest.mark.parametrize("prompt", [1, 5, 8, 13])
@pytest.mark.parametrize("wrap", [lambda mixer: mixer, OnlySteps, OnlyForward])
def test_beyond_the_window(prompt, wrap):
    """Between half of T and T of the past, all of it while there is room; T without a step."""
    m = gpt("afno,attn", T=8)
    for block in m.blocks:
        block.mixer = wrap(block.mixer)
    context = Context(m, 2)
    assert (wrap is not OnlyForward, wrap not in (OnlySteps, OnlyForward)) == (
        context.decodes, context.prefills)
    context.add(torch.randint(V, (2, prompt)))
    lengths = []
    for _ in range(20):
        logits = context.logits()
        n = context.ids.size(1)
        lengths.append(n - context.first if context.decodes else min(n, 8))
        seen = context.ids[:, n - lengths[-1]:]
        assert apart(logits, m(seen)[:, -1]) < 1e-9
        context.add(torch.randint(V, (2, 1)))
    if context.decodes:
        cycle = itertools.chain(range(min(prompt, 8), 8 + 1), itertools.cycle(range(4, 8 + 1)))
        assert lengths == [*itertools.islice(cycle, 20)]
    else:
        assert lengths == [min(n, 8) for n in range(prompt, prompt + 20)]


# ---------------------------------------------------------------- what is drawn

class Fixed:
    """A context whose logits are always the same, and which counts its columns."""
    def __init__(self, logits, rows):
        self.values = logits.expand(rows, -1)
        self.ids = torch.empty(rows, 0, dtype=torch.long)

    def logits(self):
        return self.values.clone()

    def add(self, ids):
        self.ids = torch.cat((self.ids, ids), 1)


LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.3, 0.7, -0.2, 1.9, 0.0], dtype=torch.float64)
CHOICES = [dict(), dict(temperature=0.5), dict(temperature=2.0, top_k=3), dict(top_k=1),
           dict(top_p=0.6), dict(temperature=1.5, top_k=5, top_p=0.8), dict(top_p=1e-9),
           dict(top_k=100, top_p=0.999), dict(temperature=0)]


def exact(temperature=1.0, top_k=0, top_p=1.0):
    """{token: probability}, one token after another, from the likeliest on."""
    if temperature == 0:
        return {1: 1.0}
    weight = {i: math.exp(z / temperature) for i, z in enumerate(LOGITS.tolist())}
    likeliest = sorted(weight, key=weight.get, reverse=True)[:top_k or None]
    total = sum(weight[i] for i in likeliest)
    kept = {}
    for i in likeliest:
        if sum(kept.values()) >= top_p * total:
            break
        kept[i] = weight[i]
    return {i: w / sum(kept.values()) for i, w in kept.items()}


def misfit(choice, draws=8_000, rows=400):
    """Chi-squared of so many draws, in deviations from its mean (Wilson, Hilferty 1931)."""
    generators = [torch.Generator().manual_seed(i) for i in range(rows)]
    context = Fixed(LOGITS, rows)
    for _ in generate(context, draws // rows, generators, **choice):
        pass
    counts = context.ids.flatten().bincount(minlength=len(LOGITS)).tolist()
    p = exact(**choice)
    if any(n for i, n in enumerate(counts) if i not in p):
        return math.inf
    k = len(p) - 1
    if k == 0:
        return 0.0
    chi2 = sum((counts[i] - draws * p[i]) ** 2 / (draws * p[i]) for i in p)
    return ((chi2 / k) ** (1 / 3) - 1 + 2 / (9 * k)) / math.sqrt(2 / (9 * k))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_draws_follow_the_exact_distribution(choice):
    # One of 30,000 would be further off by chance.
    assert misfit(choice) < 4


def test_the_test_of_draws_finds_faults(monkeypatch):
    right = decode.probabilities

    def one_fewer(logits, temperature=1.0, top_k=0, top_p=1.0):
        p, order = logits.softmax(-1).sort(dim=-1, descending=True)
        p[p.cumsum(-1) >= top_p] = 0
        return torch.zeros_like(p).scatter(1, order, p)

    def one_more(logits, temperature=1.0, top_k=0, top_p=1.0):
        p, order = logits.softmax(-1).sort(dim=-1, descending=True)
        p[p.cumsum(-1).roll(2, -1).index_fill(-1, torch.tensor([0, 1]), 0) >= top_p] = 0
        return torch.zeros_like(p).scatter(1, order, p)

    def told_to(changed, logits, **choice):
        return right(logits, **changed)

    for fault in (one_fewer, one_more):
        monkeypatch.setattr(decode, "probabilities", fault)
        assert misfit(dict(top_p=0.6)) > 7
    for changed in (dict(temperature=1.2), dict(top_p=0.9)):
        monkeypatch.setattr(decode, "probabilities", partial(told_to, changed))
        assert misfit(dict()) > 7


def test_of_equals_the_first():
    p = decode.probabilities(torch.zeros(2, 5, dtype=torch.float64), top_k=3, top_p=0.5)
    assert p.tolist() == 2 * [[0.5, 0.5, 0, 0, 0]]


def test_a_text_ends_at_the_stop_token():
    logits = torch.tensor([0.0, 0.0, 8.0, 0.0, 9.0], dtype=torch.float64)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]

    def lengths(n, **knobs):
        columns = list(generate(Fixed(logits, 3), n, generators, **knobs))
        assert all(token is None or token != knobs.get("stop") for row in columns for token in row)
        return [sum(token is not None for token in row) for row in zip(*columns)]

    assert lengths(20) == [20, 20, 20]
    assert lengths(20, stop=2, temperature=0, size=4) == []
    assert lengths(20, stop=2, temperature=0, size=4, at_least=7) == [7, 7, 7]
    assert lengths(4, stop=2, temperature=0, size=4, at_least=4) == [4, 4, 4]
    # rows end at different places, and stay ended
    several = lengths(50, stop=2, temperature=5.0, at_least=1)
    assert len({*several}) > 1 and 1 <= min(several) < max(several) < 50


def test_a_row_does_not_depend_on_the_others():
    def rows(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        columns = generate(Fixed(LOGITS, len(seeds)), 30, generators)
        return [list(row) for row in zip(*columns)]

    a, b, c = rows(1, 2, 1)
    assert a == c != b and rows(2) == [b]
