"""Documents: padded, packed and alone they have the same losses; windows and document masks against
dense masks."""

import math
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attention import flex, visible
from support.documents import Padded, best_widths, document_token
from tests.checks import awake
from train_gpt2 import GPT, MIXERS, Config, Packed, build, main, parse

START, V, T = 7, 24, 64
MASKING = dict(attn=dict(mixer="attn"), gqa=dict(mixer="attn", n_kv_head=2), fan=dict(mixer="fan"),
               diff=dict(mixer="diff"), diff_v2=dict(mixer="diff_v2"),
               ngpt=dict(mixer="ngpt", head_norm="qk"), window=dict(mixer="attn", window=5))
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
    )
    vars(cfg).update(sizes)
    return cls({"s": np.concatenate(docs).astype(np.uint16)}, cfg)


@pytest.mark.parametrize("case", MASKING)
@pytest.mark.parametrize("pos", ["rope", "learned", "sinusoidal", "none"])
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
            "afno as set here cannot keep documents apart",
        ),
        (
            "--batches packed --document_token 10 --mixer attn --short_conv",
            "attn as set here cannot keep documents apart",
        ),
        (
            "--batches packed --document_token 10 --mixer attn,gdn",
            "gdn as set here cannot keep documents apart",
        ),
        (
            "--batches packed --document_token 10 --mixer attn --output_conv",
            "a convolution cannot keep documents apart",
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


@pytest.mark.parametrize("batches", ["padded", "packed"])
def test_a_run_learns_from_documents(tmp_path, batches, capsys):
    """Lines of Shakespeare as documents; the estimate counts them first."""
    flags = (
        f"--mixer attn --batches {batches} --document_token 10 --n_layer 1 --n_head 2 --n_embd 32 "
        f"--sequence_length 64 --num_iterations 40 --val_tokens 4096 --output_dir {tmp_path}"
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
