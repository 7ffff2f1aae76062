"""Differential attention: against transformers' V1, explicit softmaxes and what it is without its
second map.

transformers is optional (tests/requirements.txt). Sizes are tiny; a tolerance of 1e-6 is rotary
positions' fp32 table.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from attention import CausalSelfAttention
from diff import DiffAttention, DiffAttentionV2, diff_naive
from parts import CoLA, NoHeadNorm
from tests.published import masked
from tests.checks import C, apart, awake, batch, jacobian, noise, prefix, pure
from train_gpt2 import GPT, Config, roles

PLAIN = dict(head_norm=NoHeadNorm, rope=False)


def mixer(cls, n_head=4, **knobs):
    torch.manual_seed(0)
    return awake(cls(C, 160, n_head=n_head, **knobs)).double()


def same(ours, theirs, inputs, tolerance):
    """Equal values, and equal gradients of a random projection in which every input takes part."""
    assert ours.shape == theirs.shape and apart(ours, theirs) < tolerance
    dy = torch.randn_like(ours)
    for a, b in zip(
        *(torch.autograd.grad(y, inputs, dy, retain_graph=True) for y in (ours, theirs))
    ):
        assert b.any() and apart(a, b) < 10 * tolerance


# ---------------- against others, and against plain forms

@pytest.mark.parametrize("n_head, n_kv_head, layer", [(4, 4, 0), (8, 4, 3), (8, 2, 1)])
def test_v1_equals_transformers(n_head, n_kv_head, layer):
    """Theirs pairs half-heads h and h + H / 2 where ours are neighbours, and has no gain."""
    theirs = pytest.importorskip("transformers.models.diffllama.modeling_diffllama")
    m, T, D = (
        mixer(DiffAttention, n_head, n_kv_head=n_kv_head, layer=layer, head_norm=NoHeadNorm),
        21,
        C // n_head,
    )
    with torch.no_grad():
        m.gain.fill_(1.0)
    cfg = theirs.DiffLlamaConfig(
        hidden_size=C,
        num_attention_heads=n_head,
        num_key_value_heads=n_kv_head,
        attention_dropout=0.0,
        attention_bias=False,
        rms_norm_eps=1e-5,
        use_cache=False,
    )
    cfg._attn_implementation = "eager"
    reference = theirs.DiffLlamaAttention(cfg, layer_idx=layer).double()

    # neighbours (h, side) -> all first sides, all second
    def regroup(weight):
        return weight.view(-1, 2, D, C).transpose(0, 1).reshape(-1, C)
    with torch.no_grad():
        for ours, name in ((m.q, "q_proj"), (m.k, "k_proj"), (m.v, "v_proj")):
            getattr(reference, name).weight.copy_(regroup(ours.weight))
        reference.o_proj.weight.copy_(m.proj.weight)
        for ours, name in ((m.lq1, "q1"), (m.lk1, "k1"), (m.lq2, "q2"), (m.lk2, "k2")):
            getattr(reference, f"lambda_{name}").copy_(ours)
    angle = torch.cat((torch.arange(T)[:, None] * 1e4 ** (-torch.arange(0, D, 2) / D),) * 2, -1)[
        None
    ]
    mask = torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)
    x = noise(2, T).requires_grad_()
    y = reference(x, (angle.cos().double(), angle.sin().double()), mask[None, None])[0]
    same(m(x), y, [x], 1e-6)                                # their lambda is rounded to fp32


@pytest.mark.parametrize("n_head, n_kv_head, layer", [(2, 2, 0), (4, 4, 5), (8, 4, 2), (8, 2, 1)])
def test_v1_equals_naive(n_head, n_kv_head, layer):
    m, x = (
        mixer(DiffAttention, n_head, n_kv_head=n_kv_head, layer=layer, **PLAIN),
        noise(2, 13).requires_grad_(),
    )
    same(m(x), diff_naive(m, x), [x, *m.parameters()], 1e-12)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_v2_equals_two_explicit_attentions(n_kv_head):
    m, x, T, D = (
        mixer(DiffAttentionV2, n_kv_head=n_kv_head, **PLAIN),
        noise(2, 13).requires_grad_(),
        13,
        C // 4,
    )
    q, k, v = (F.linear(x, w.weight).unflatten(-1, (-1, D)) for w in (m.q, m.k, m.v))
    mask, out = torch.full((T, T), -math.inf, dtype=x.dtype).triu(1), []
    # both maps of head h read the same keys and values
    for h in range(4):
        g = h * n_kv_head // 4
        a1, a2 = (
            (q[:, :, 2 * h + i] @ k[:, :, g].mT / math.sqrt(D) + mask).softmax(-1) @ v[:, :, g]
            for i in (0, 1)
        )
        out.append(a1 - a2 / (1 + torch.exp(-x @ m.lambda_proj.weight[h]))[..., None])
    same(m(x), F.linear(torch.cat(out, -1), m.proj.weight), [x, *m.parameters()], 1e-12)


# ordinary attention with these rows as its weights
def inner_attention(q, k, v, **knobs):
    m = CausalSelfAttention(C, 160, n_head=4, **knobs).double()
    with torch.no_grad():
        for ours, weight in ((m.q, q), (m.k, k), (m.v, v)):
            ours.weight.copy_(weight)
        m.proj.weight.copy_(torch.eye(C))
    return m


@pytest.mark.parametrize("n_kv_head", [2, 4])
def test_v1_without_lambda_and_norm_is_attention(n_kv_head, monkeypatch):
    """Half the values at a time, first sides only: (q1, k1, v)."""
    m, x = mixer(DiffAttention, n_kv_head=n_kv_head), noise(2, 40)
    monkeypatch.setattr(m, "lam", lambda: torch.zeros(()))
    monkeypatch.setattr(m, "normalised", lambda a: a)
    with torch.no_grad():
        m.proj.weight.copy_(torch.eye(C))
    D, y = C // 4, m(x).unflatten(-1, (2, 2, -1))           # heads, halves of the values, D

    def side(weight, i):
        return weight.view(-1, 2, D, C)[:, i].repeat_interleave(2, 0).flatten(0, 1)
    for j in (0, 1):
        plain = inner_attention(
            side(m.q.weight, 0), side(m.k.weight, 0), side(m.v.weight, j), n_kv_head=n_kv_head
        )
        assert apart(y[..., j, :], plain(x).unflatten(-1, (2, 2, -1))[..., 0, :]) < 1e-12


def test_v2_without_lambda_is_attention():
    m, x, D = mixer(DiffAttentionV2, n_kv_head=2), noise(2, 40), C // 4
    with torch.no_grad():
        m.proj.weight.copy_(torch.eye(C))
        first = m.q.weight.view(4, 2, D, C)[:, 0].flatten(0, 1)
    plain = inner_attention(first, m.k.weight, m.v.weight, n_kv_head=2)
    del m.lambda_proj
    m.lambda_proj = lambda x: torch.full((*x.shape[:2], 4), -math.inf)
    assert apart(m(x), plain(x)) < 1e-12


# ---------------------------------------------------------------- lambda, sizes, roles

def test_lambda():
    for layer, init in ((0, 0.2), (1, 0.8 - 0.6 * math.exp(-0.3)), (50, 0.8)):
        m = DiffAttention(C, 8, n_head=4, layer=layer)
        assert m.lambda_init == pytest.approx(init) and abs(m.lam().item() - init) < 0.3
        with torch.no_grad():
            for p in (m.lq1, m.lk1, m.lq2):
                p.fill_(0.5)
            m.lk2.zero_()
        assert (
            m.lam().item() == pytest.approx(math.exp(2.0) - 1 + init)
            and m.lam().dtype == torch.float32
        )
    draws = torch.cat(
        [
            p
            for _ in range(50)
            for p in DiffAttention(256, 8, n_head=4).parameters()
            if p.ndim == 1 and len(p) == 64
        ]
    )
    assert abs(draws.std() - 0.1) < 0.01
    with torch.autocast("cpu", torch.bfloat16):
        assert m.lam().dtype == torch.float32


def config(mixer, **knobs):
    return Config(
        **dict(mixer=mixer, n_layer=4, n_head=4, n_embd=C, vocab_size=20, sequence_length=16)
        | knobs
    )


def test_a_block_tells_its_mixer_the_layer():
    blocks = GPT(config("attn,diff")).blocks
    assert [getattr(b.mixer, "lambda_init", None) for b in blocks] == [
        None, 0.8 - 0.6 * math.exp(-0.3), None, 0.8 - 0.6 * math.exp(-0.9)]


@pytest.mark.parametrize("row", ["diff", "diff_v2"])
def test_roles(row):
    m = GPT(config(row))
    table = {name.removeprefix("blocks.0.mixer."): roles(m)[p] for name, p in m.named_parameters()}
    for name in ("lq1", "lk1", "lq2", "lk2", "gain") if row == "diff" else ():
        assert table[name] == "vector"                      # never Muon, never decayed
    assert table["q.weight"] == "matrix" and table["proj.weight"] == "proj"
    assert row == "diff" or table["lambda_proj.weight"] == "matrix"


def test_sizes_and_flops():
    def count(cls, **knobs):
        return sum(p.numel() for p in cls(64, 9, n_head=4, **knobs).parameters())
    plain = CausalSelfAttention(64, 9, n_head=4)
    assert (
        count(DiffAttention) == 4 * 64**2 + 6 * 16 and count(DiffAttentionV2) == 5 * 64**2 + 4 * 64
    )
    assert count(DiffAttention, n_kv_head=2) == 3 * 64**2 + 6 * 16
    assert (
        DiffAttention(64, 9, n_head=4).flops(9)
        == DiffAttentionV2(64, 9, n_head=4).flops(9)
        == 2 * plain.flops(9)
    )


@pytest.mark.parametrize("sizes", [dict(n_head=5, n_embd=40), dict(n_head=4, n_kv_head=1)])
def test_odd_heads_are_refused(sizes):
    with pytest.raises(ValueError, match="must be even"):
        GPT(config("diff", **sizes))
    GPT(config("diff_v2", **sizes))


KNOBS = [
    dict(short_conv=True),
    dict(rope=False),
    dict(head_norm=NoHeadNorm),
    dict(n_kv_head=2),
    dict(linear=CoLA),
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("cls", [DiffAttention, DiffAttentionV2])
def test_knobs_and_decoding(cls, knobs):
    m, x = mixer(cls, **knobs), noise(2, 12)
    v1, (state, columns) = torch.randn_like(m.value(x)), (m.init_state(2), [])
    for t in range(12):
        y, state = m.step(x[:, t], state, v1[:, t])
        columns.append(y)
    assert apart(torch.stack(columns, 1), m(x, v1)) < 1e-10 and apart(m(x, v1), m(x)) > 1e-2
    # those that keep the matrices: they matter
    if knobs in KNOBS[:3]:
        plain = mixer(cls)
        plain.load_state_dict(m.state_dict(), strict=False)
        assert apart(m(x), plain(x)) > 1e-3


def test_no_kernel_stores_the_scores():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            sizes.append(f(*args, **kwargs or {}))
            return sizes[-1]
    for cls in (DiffAttention, DiffAttentionV2):
        sizes, m, x = [], cls(C, 160, n_head=4, n_kv_head=2), torch.randn(1, 160, C)
        with Seen():
            m(x)
        shapes = [tuple(t.shape) for t in sizes if isinstance(t, torch.Tensor)]
        assert shapes and not any(shape[-2:] == (160, 160) for shape in shapes)


# ---------------- positive controls: the checks see what leaks

def leaky(cls, mask):
    """cls with another mask."""
    class Leaky(cls):
        def attend(self, x, q, k, v, kernel):
            return super().attend(x, q, k, v, masked(lambda ones: mask(len(ones))))
    return Leaky


# a public differential attention: no mask
MASKS = {"none": lambda T: torch.zeros(T, T).bool(),
         # and its neighbour, which sees the future only
         "inverted": lambda T: torch.ones(T, T).triu(1) == 0,
         "causal": lambda T: torch.ones(T, T).triu(1).bool()}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cls", [DiffAttention, DiffAttentionV2, CausalSelfAttention])
def test_leaks_are_caught(cls, mask):
    m = mixer(leaky(cls, MASKS[mask]))
    for measured, allowed in (check(m) for check in (prefix, jacobian)):
        assert measured <= allowed if mask == "causal" else measured > 5 * allowed + 1e-3
    assert all(check(m)[0] <= check(m)[1] for check in (batch, pure))


def test_a_norm_over_time_is_caught():
    """GroupNorm on a view whose last dimension is time: the second leak of that public
    implementation."""
    m = mixer(DiffAttention)
    m.normalised = lambda a: F.group_norm(a.transpose(2, 3), 2).transpose(2, 3)
    assert prefix(m)[0] > 1e-3
