"""Documents: padded, packed and alone they have the same losses; windows and document masks against
dense masks; nothing crosses a document's start."""

import math
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attention import flex, visible
from support import masked
from support.documents import Padded, best_widths, document_token
from support.masked import document_conv, short_document_conv
from tests.checks import awake
from train_gpt2 import GPT, MIXERS, Config, Packed, build, main, parse

START, V, T = 7, 24, 64
MASKING = dict(attn=dict(mixer="attn"), gqa=dict(mixer="attn", n_kv_head=2), fan=dict(mixer="fan"),
               diff=dict(mixer="diff"), diff_v2=dict(mixer="diff_v2"),
               ngpt=dict(mixer="ngpt", head_norm="qk"), window=dict(mixer="attn", window=5),
               conv=dict(mixer="attn", short_conv=True, n_kv_head=2),
               diff_v2_conv=dict(mixer="diff_v2", short_conv=True),
               afno=dict(mixer="afno", afno_taps=9, afno_num_blocks=2),
               banded=dict(mixer="afno", afno_taps=32, afno_backend="banded", afno_num_blocks=2),
               hybrid=dict(mixer="afno,attn", afno_taps=9, afno_num_blocks=2, short_conv=True,
                           output_conv=True, value_residual=True, x0_shortcut=True))
SIZES = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=V, sequence_length=T)


def model(**knobs):
    torch.manual_seed(1)
    return awake(GPT(Config(**SIZES | knobs))).double()


# each starts with START, which is nowhere else
def documents(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    others = [token for token in range(V) if token != START]
    return [np.concatenate(([START], rng.choice(others, n - 1))) for n in lengths]


def losses(gpt, rows):
    """Loss of every target, (rows, T) fp64; 0 where it is padding."""
    x, y = rows[:, :-1].clamp(min=0), rows[:, 1:]
    each = F.cross_entropy(gpt(x).transpose(1, 2), y.clamp(min=0), reduction="none")
    return torch.where(y >= 0, each, 0)


def rows_of(cls, docs, batch_size=2, **sizes):
    cfg = SimpleNamespace(
        sequence_length=T,
        batch_size=batch_size,
        grad_accumulation_steps=1,
        shuffle=True,
        seed=3,
        document_token=START,
        tokens_per_step=batch_size * T,
        num_iterations=10,
        stages="",
    )
    vars(cfg).update(sizes)
    return cls({"s": np.concatenate(docs).astype(np.uint16)}, cfg)


# Rotary positions are attention's: without any, none is none.
@pytest.mark.parametrize("pos, case", [
    (pos, case) for pos in ("rope", "learned", "sinusoidal", "none") for case in MASKING
    if pos != "none" or case not in ("afno", "banded")])
def test_padded_packed_and_alone_have_the_same_losses(case, pos):
    # 64 tokens: one packed row, with the token that ends them
    docs = documents(9, 30, 3, 22)
    joined = torch.from_numpy(np.concatenate([*docs, [START]]))
    packed = losses(
        model(**MASKING[case], pos=pos, batches="packed", document_token=START), joined[None]
    )[0]
    free = model(**MASKING[case], pos=pos)                  # the same weights, no masks
    begin = 0
    padded = torch.full((4, 33), -1)
    for row, doc in zip(padded, docs):
        alone = torch.from_numpy(np.append(doc, START))
        row[:len(alone)] = alone
        assert (losses(free, alone[None])[0] - packed[begin:begin + len(doc)]).abs().max() < 1e-10
        begin += len(doc)
    together = losses(free, padded)
    assert (together[padded[:, 1:] >= 0] - packed).abs().max() < 1e-10
    # the mask does matter
    assert (losses(free, joined[None])[0] - packed).abs().max() > 1e-3


@pytest.fixture(params=["eager", "traced"])
def way(request, monkeypatch):
    """Either way of support/masked.py: documents laid apart, and what compilers see."""
    monkeypatch.setattr(masked, "traced", lambda x: request.param == "traced")


@pytest.mark.parametrize("case", ["conv", "diff_v2_conv", "afno", "banded", "hybrid"])
def test_a_packed_rows_gradients_are_those_of_its_documents(case, way):
    docs = documents(9, 30, 3, 1, 21)
    joined = torch.from_numpy(np.concatenate([*docs, [START]]))
    packed = model(**MASKING[case], batches="packed", document_token=START)
    free = model(**MASKING[case])
    ours = losses(packed, joined[None]).sum()
    theirs = sum(losses(free, torch.from_numpy(np.append(doc, START))[None]).sum() for doc in docs)
    assert abs(ours - theirs) < 1e-10
    grads = (torch.autograd.grad(loss, list(gpt.parameters()))
             for loss, gpt in ((ours, packed), (theirs, free)))
    for (name, _), a, b in zip(packed.named_parameters(), *grads):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max(), name


@torch.no_grad()
@pytest.mark.parametrize("case", ["conv", "afno", "banded", "hybrid"])
def test_documents_and_rows_are_blind_to_one_another_bit_for_bit(case, way):
    """In fp32: other words in one document move no bit of another, nor do tokens that follow, even
    where a document starts among them, nor other rows."""
    gpt = model(**MASKING[case], batches="packed", document_token=START).float()
    rows = [documents(9, 30, 3, 22), documents(40, 24, seed=1)]
    idx = torch.from_numpy(np.stack([np.concatenate(row) for row in rows]))
    y = gpt(idx)
    for begin, end in ((0, 9), (9, 39), (39, 42), (42, 64)):
        other = idx.clone()
        # all but the token that starts it
        other[0, begin + 1:end] = (idx[0, begin + 1:end] - START) % (V - 1) + START + 1
        other %= V
        assert not (other[0, begin + 1:end] == START).any()
        z = gpt(other)
        outside = torch.ones(T, dtype=torch.bool)
        outside[begin:end] = False
        assert torch.equal(z[0, outside], y[0, outside]) and torch.equal(z[1], y[1])
        assert not torch.equal(z[0, begin:end], y[0, begin:end])
    for cut in (1, 8, 30, 63):
        other = idx.clone()
        tail = np.concatenate(documents(1, 1, 1, T, seed=cut))
        other[0, cut:] = torch.from_numpy(tail)[:T - cut]
        z = gpt(other)
        assert torch.equal(z[0, :cut], y[0, :cut]) and torch.equal(z[1], y[1])
        assert (gpt(idx[:, :cut]) - y[:, :cut]).abs().max() < 1e-5


def ages(*rows):
    """Lengths of the documents of rows -> (B, T)"""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def convolved(x, w, age):
    """Tap by tap, token by token; the last row of w (M, C) is lag 0."""
    columns = []
    for b, row in enumerate(age.tolist()):
        for t, since in enumerate(row):
            lags = range(min(len(w), since + 1))
            columns.append(sum(x[b, t - lag] * w[-1 - lag] for lag in lags))
    return torch.stack(columns).view_as(x)


AGES = ages((1, 2, 5, 12), (20,), (7, 1, 1, 1, 10))


@pytest.mark.parametrize("M", [1, 4, 9, 20])
def test_masked_convolutions_against_loops(M, way):
    """Values and gradients: AFNO's, one kernel for several channels; the short one, and with v1."""
    torch.manual_seed(0)
    x, more, h, w, dy = (torch.randn(*size, dtype=torch.float64, requires_grad=True)
                         for size in ((3, 20, 6), (3, 20, 2), (2, M), (M, 6), (3, 20, 6)))
    pairs = {
        (x, h): (document_conv(x, h, AGES),
                 convolved(x, h.flip(1).repeat_interleave(3, 0).T, AGES)),
        (x, w): (short_document_conv(x, w, None, AGES), convolved(x, w, AGES)),
        (x, w, more): (short_document_conv(x, w, more, AGES),
                       convolved(x + F.pad(more, (4, 0)), w, AGES)),
    }
    for inputs, (ours, theirs) in pairs.items():
        assert (ours - theirs).abs().max() < 1e-12
        grads = (torch.autograd.grad(y, inputs, dy) for y in (ours, theirs))
        for a, b in zip(*grads):
            assert (a - b).abs().max() < 1e-12


def test_gradcheck_of_the_masked_convolution():
    x, w = (torch.randn(*size, dtype=torch.float64, requires_grad=True)
            for size in ((3, 20, 2), (5, 2)))
    torch.autograd.gradcheck(lambda x, w: masked.MaskedCausalConv.apply(x, w, AGES), (x, w))


REACHES = masked.reaches
LAYOUT = masked.layout
FAULTS = {
    "a tap too many": ("traced", "reaches", lambda age, lag: REACHES(age + 1, lag)),
    "a tap too few": ("traced", "reaches", lambda age, lag: REACHES(age, lag + 1)),
    "a zero too few": ("eager", "layout", lambda age, gap: LAYOUT(age, gap - 1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mask_off_by_one_is_found(fault, monkeypatch):
    way, name, wrong = FAULTS[fault]
    monkeypatch.setattr(masked, "traced", lambda x: way == "traced")
    monkeypatch.setattr(masked, name, wrong)
    for check in (test_padded_packed_and_alone_have_the_same_losses,
                  test_documents_and_rows_are_blind_to_one_another_bit_for_bit):
        # A tap too few shows nothing of others.
        if fault == "a tap too few" and "blind" in check.__name__:
            continue
        arguments = ("afno", "rope") if "alone" in check.__name__ else ("afno", None)
        with pytest.raises(AssertionError):
            check(*arguments)


@pytest.mark.parametrize("row", MIXERS)
def test_the_loss_and_its_gradients_ignore_padding(row):
    """GPT's own mean, for any mixer: the padding is behind what counts."""
    gpt, docs = model(mixer=row, afno_num_blocks=2 if row == "afno" else 0), documents(20, 11)
    rows = torch.full((2, 33), -1)
    for r, doc in zip(rows, docs):
        r[:len(doc) + 1] = torch.from_numpy(np.append(doc, START))

    def gradients(width, junk):
        x, y = rows[:, :width], rows[:, 1:width + 1]
        gpt.zero_grad()
        loss = gpt(torch.where(x < 0, junk, x), y)
        loss.backward()
        return torch.cat([loss[None]] + [p.grad.flatten() for p in gpt.parameters()])
    reference = gradients(20, 0)
    for width, junk in ((20, 3), (24, 3), (32, START)):
        assert (gradients(width, junk) - reference).abs().max() < 1e-10 * reference.abs().max()
    by_hand = losses(gpt, rows).sum() / 31
    assert abs(reference[0] - by_hand) < 1e-12


@pytest.mark.parametrize("docs", [False, True])
@pytest.mark.parametrize("window", [0, 1, 5, 64, 200])
@pytest.mark.parametrize("heads", [4, 2])
def test_masks_against_a_dense_mask(window, docs, heads):
    """Values and gradients of the mixer against softmax(QK^T + mask) V, the mask written out pair
    by pair."""
    knobs = dict(mixer="attn", window=window, n_kv_head=heads, pos="none")
    m = awake(build("mixer", "attn", Config(**SIZES | knobs), 32, T)).double()
    starts = torch.tensor([[0] * 20 + [20] * 3 + [23] * (T - 23), [0] * T])
    allowed = torch.zeros(2, 1, T, T, dtype=torch.bool)
    for b in range(2):
        for q in range(T):
            for k in range(max(0, q - window + 1) if window else 0, q + 1):
                allowed[b, 0, q, k] = not docs or starts[b, q] == starts[b, k]

    def dense(x):
        q, k, v = m.heads(m.qkv(x), None, slice(T))
        k, v = (u.repeat_interleave(4 // heads, dim=1) for u in (k, v))
        z = (q @ k.mT / 8 ** 0.5).masked_fill(~allowed, -torch.inf)
        return m.proj((z.softmax(-1) @ v).transpose(1, 2).flatten(2))
    x = torch.randn(2, T, 32, dtype=torch.float64, requires_grad=True)
    ours, theirs = m(x, None, m.view(T, starts if docs else None, x.device)), dense(x)
    assert (ours - theirs).abs().max() < 1e-12
    dy, inputs = torch.randn_like(ours), [x, *m.parameters()]
    for a, b in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy)):
        assert (a - b).abs().max() < 1e-11


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_reads_the_same_rule():
    """What CUDA runs, uncompiled and forward only: its backward needs a GPU (tests/test_gpu.py)."""
    from torch.nn.attention.flex_attention import create_block_mask
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 100, 16), torch.randn(2, 2, 100, 16), torch.randn(2, 2, 100, 16)
    t, docs = torch.arange(100), torch.tensor([[0] * 33 + [33] * 67, [0] * 100])
    rule = visible(20, docs)
    dense = rule(torch.arange(2)[:, None, None, None], 0, t[:, None], t)
    with torch.no_grad():
        theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)
        ours = flex(q, k, v, create_block_mask(rule, 2, None, 100, 100, device="cpu"))
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("case", MASKING)
def test_decoding_forgets_at_a_new_document(case):
    """Step by step, rows whose documents begin at different places, against forward."""
    gpt = model(**MASKING[case], batches="packed", document_token=START)
    idx = torch.from_numpy(
        np.stack([np.concatenate(documents(9, 30, 25)), np.concatenate(documents(40, 24, seed=1))])
    )
    state, columns = gpt.init_state(2), []
    for t in range(T):
        logits, state = gpt.step(idx[:, t], state)
        columns.append(logits)
    assert (torch.stack(columns, 1) - gpt(idx)).abs().max() < 1e-10


def test_an_epoch_of_padded_batches_predicts_every_token_once():
    docs = documents(9, 30, 3, 200, 2, 64, 65, 1, 17)       # 200 and 65 are cut into pieces
    padded = rows_of(Padded, docs)
    text, steps, seen = np.concatenate(docs), len(padded.predictions), []
    for step in range(3 * steps):
        (rows, share), = padded.micro_batches(step)[0]
        assert share == 1 and (len(rows), rows.size(1) - 1) in padded.shapes()
        # no wider than the longest row asks for
        longest = (rows[:, 1:] >= 0).sum(1).max()
        assert rows.size(1) - 1 == min(w for w in padded.widths if w >= longest)
        seen += [tuple(r[r >= 0].tolist()) for r in rows if (r >= 0).any()]
    pieces = len(padded)
    for epoch in range(3):
        mine = seen[epoch * pieces:(epoch + 1) * pieces]
        assert sum(len(r) - 1 for r in mine) == len(text) - 1 == padded.targets(pieces)
        assert sorted(mine) == sorted(
            tuple(text[s : s + n + 1].tolist()) for s, n in zip(padded.start, padded.length)
        )
    assert seen[:pieces] != seen[pieces:2 * pieces] and padded.documents == len(docs)
    assert padded.first(len(text)) == pieces and padded.targets(padded.first(50)) <= 50


@pytest.mark.parametrize("lengths", [(64,), (3, 3, 9), range(1, 65), (1, 9, 9, 17, 30, 41, 64)])
@pytest.mark.parametrize("widths", [1, 2, 3, 6])
def test_widths_pad_as_little_as_any_so_many_can(lengths, widths, monkeypatch):
    monkeypatch.setattr("support.documents.WIDTHS", widths)
    lengths = np.array(lengths)

    def padded(chosen):
        return sum(min(w for w in chosen if w >= n) for n in lengths)

    found = best_widths(lengths, T).tolist()
    assert found == sorted(found) and len(found) <= widths and found[-1] <= T
    occurring = sorted({min(T, math.ceil(n / 8) * 8) for n in lengths})
    n = min(widths, len(occurring)) - 1
    best = min(padded((*some, occurring[-1])) for some in combinations(occurring[:-1], n))
    assert padded(found) == best


def test_padded_micro_batches_have_few_shapes_within_the_budget():
    """As many shapes as widths, epoch after epoch: each is compiled once, before the clock."""
    padded = rows_of(Padded, documents(*range(2, 150)))
    shapes = {tuple(rows.shape) for step in range(3 * len(padded.predictions))
              for rows, _ in padded.micro_batches(step)[0]}
    assert shapes == {(rows, width + 1) for rows, width in padded.shapes()}
    assert len(shapes) == 6
    assert all(2 * T - width < rows * width <= 2 * T for rows, width in padded.shapes())


def test_processes_share_padded_steps():
    docs = documents(*range(2, 40))
    def steps(rank, world):
        windows = rows_of(Padded, docs, grad_accumulation_steps=4)
        windows.rank, windows.world = rank, world
        return [windows.micro_batches(step) for step in range(6)]
    whole, parts = steps(0, 1), [steps(rank, 2) for rank in (0, 1)]
    for step, (batches, predictions) in enumerate(whole):
        assert sum((rows[:, 1:] >= 0).sum() for rows, _ in batches) == predictions
        assert all(
            abs(share - (rows[:, 1:] >= 0).sum() / predictions) < 1e-12 for rows, share in batches
        )
        shared = [parts[i % 2][step][0][i // 2] for i in range(4)]
        for (rows, share), (theirs, part) in zip(batches, shared):
            # the average halves it
            assert torch.equal(rows, theirs) and abs(part - 2 * share) < 1e-12


def test_packed_rows_are_windows_and_mark_no_padding():
    rows, _ = rows_of(Packed, documents(100, 60, 50)).micro_batches(0)
    assert rows[0][0].shape == (2, T + 1) and (rows[0][0] >= 0).all()


@pytest.mark.parametrize(
    "flags, why",
    [
        ("--batches packed", "no token of a vocabulary of 256 is known to start a document"),
        ("--batches padded --document_token 256", "no token of a vocabulary of 256"),
        ("--batches padded --document_token 0", "no document starts with token 0"),
        (
            "--batches packed --document_token 10 --mixer afno",
            "afno as set here cannot keep documents apart; .* --afno_taps 16: take these, or "
            "--batches padded",
        ),
        (
            "--batches packed --document_token 10 --mixer afno,attn --afno_taps 0,16",
            "afno as set here cannot keep documents apart",
        ),
        (
            "--batches packed --document_token 10 --mixer afno --afno_taps 33",
            "afno as set here cannot keep documents apart",
        ),
        (
            "--batches packed --document_token 10 --mixer afno --afno_taps 16 --afno_backend fft",
            "afno as set here cannot keep documents apart",
        ),
        (
            "--batches packed --document_token 10 --mixer attn,gdn",
            "gdn as set here cannot keep documents apart",
        ),
        (
            "--batches packed --document_token 10 --mixer fftnet",
            "fftnet as set here cannot keep documents apart",
        ),
        ("--document_token 10", "--document_token has no effect here"),
        ("--batches padded --no-shuffle", "--batches padded with --shuffle False"),
        ("--mixer ngpt --norm lns", "--mixer ngpt with --norm lns"),
        ("--mixer ngpt --residual gpas", "--mixer ngpt with --residual gpas"),
        ("--mixer afno --norm hybrid", "--norm hybrid with --head_norm qk"),
        ("--logit_scale 0", "--logit_scale 0.0 is out of range"),
        ("--batches padded --document_token 0 --estimate", "no document starts with token 0"),
        ("--mixer afno --window 8", "--window has no effect here"),
        ("--batches bags", "no such batches; choose from windows, packed, padded"),
    ],
)
def test_refusals(flags, why):
    with pytest.raises(SystemExit, match=why):
        main(parse(flags.split() + ["--output_dir", "/nonexistent"]))


def test_processes_need_micro_batches():
    docs = {"s": np.concatenate(documents(9, 30)).astype(np.uint16)}
    cfg = Config(**SIZES, batches="padded", document_token=START, grad_accumulation_steps=3)
    with pytest.raises(
        SystemExit, match="3 micro-batches of documents cannot be shared evenly by 2 processes"
    ):
        Padded(docs, cfg, 0, 2)


def test_the_vocabulary_of_the_shards_names_the_token():
    """Also under a model whose vocabulary is padded; an estimate for another vocabulary takes that
    one's."""
    shards = {"s": np.array([50256, 1, 2])}
    cfg = Config(**SIZES | dict(vocab_size=50304), batches="packed")
    assert document_token(cfg, shards, 50257) == 50256
    cfg = Config(**SIZES | dict(vocab_size=151665), batches="packed", estimate=True)
    assert document_token(cfg, shards, 256) == 151643


HYBRID = "afno,attn --afno_taps 16 --short_conv --output_conv --n_layer 2"


@pytest.mark.parametrize("batches, mixer",
                         [("padded", "attn"), ("packed", "attn"), ("packed", HYBRID)])
def test_a_run_learns_from_documents(tmp_path, batches, mixer, capsys):
    """Lines of Shakespeare as documents; the estimate counts them first."""
    flags = (
        f"--n_layer 1 --mixer {mixer} --batches {batches} --document_token 10 --n_head 2 "
        f"--n_embd 32 --sequence_length 64 --num_iterations 40 --val_tokens 4096 "
        f"--output_dir {tmp_path}"
    ).split()
    main(parse([*flags, "--estimate"]))
    assert ("documents of" in capsys.readouterr().out) == (batches == "padded")
    assert main(parse(flags)) < 3.6                         # from ln 256 = 5.5
    # padding is not counted
    assert ("tokens:20480 " in capsys.readouterr().out) == (batches == "packed")


def test_a_windows_flops_and_the_logits_scale():
    """Scores and mixing of the pairs that are seen; a factor on the logits."""
    pairs = sum(min(t + 1, 10) for t in range(T)) / T
    windowed, whole = (
        build("mixer", "attn", Config(**SIZES, mixer="attn", window=w), 32, T) for w in (10, 0)
    )
    assert (
        windowed.flops(T) == pytest.approx(4 * 32 * pairs, rel=0.02)
        and whole.flops(T) == 4 * 32 * T / 2
    )
    assert build("mixer", "attn", Config(**SIZES, mixer="attn", window=T + 9), 32, T).flops(
        T
    ) == whole.flops(T)
    idx = torch.from_numpy(documents(T)[0])[None]
    one, half = (model(mixer="attn", logit_scale=s, logit_softcap=0.0)(idx) for s in (1.0, 0.5))
    assert (one / 2 - half).abs().max() < 1e-12
