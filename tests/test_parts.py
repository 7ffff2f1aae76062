"""The parts a block is assembled from: against other people's code where there is any, else against
the equations.

Oracles that are optional packages (tests/requirements.txt) are skipped where they are missing.
Sizes are tiny, most
numbers fp64; a tolerance of 1e-6 is rotary positions' fp32 table, 1e-10 is rounding.
"""
import itertools
import math
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt2
from attention import CausalSelfAttention
from parts import (GPAS, GatedResidual, HybridNorm, NoHeadNorm, PreNorm, QKNorm, QKVNorm,
                   hybrid_star)
from fan import FAN, FANMLP, FANLayer, fan_naive
from parts import CoLA, Linear
from kernels import linear_cross_entropy, softcap
from parts import GatedPolyNorm, PolyNorm, PolyNormMLP, SwiGLU
from tests.checks import apart, awake
from train_gpt2 import (
    GPT,
    RECOMPUTE,
    Block,
    Config,
    build_optimizers,
    clip_gradients,
    main,
    parse,
    roles,
    set_schedule,
)

T, C = 9, 32
BASE = dict(
    n_layer=3, n_head=4, n_embd=C, vocab_size=50, sequence_length=16, mixer="attn", mlp="swiglu"
)


def config(**knobs):
    return Config(**BASE | knobs)


def model(**knobs):
    torch.manual_seed(0)
    return awake(GPT(config(**knobs))).double()


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def tokens(B=2):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(1))


def count(m):
    return sum(p.numel() for p in m.parameters())


def same(ours, theirs, inputs, names=None, tolerance=1e-10):
    """Equal values and equal gradients of a random projection; every input must take part."""
    assert ours.shape == theirs.shape and apart(ours, theirs) < tolerance
    dy = torch.randn_like(ours)
    pairs = zip(*(torch.autograd.grad(y, inputs, dy, retain_graph=True) for y in (ours, theirs)))
    for name, (a, b) in zip(names or itertools.count(), pairs):
        assert b.any() and apart(a, b) < tolerance, name


def same_module(m, reference, *shape, tolerance=1e-10):
    """m(x) against reference(x, parameters by name)."""
    x, P = draw(*shape), dict(m.named_parameters())
    same(m(x), reference(x, P), [x, *P.values()], ["x", *P], tolerance)


# ---------------- the equations, once more and by other means

def rms(u):
    return u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotate(u):                                              # RoPE as complex numbers, (..., T, D)
    half = u.size(-1) // 2
    angle = torch.outer(
        torch.arange(u.size(-2)).double(), 10000.0 ** (-torch.arange(half).double() / half)
    )
    z = torch.complex(u[..., :half], u[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def attend(q, k, v, head_norm=lambda q, k, v: (rms(q), rms(k), v), n_head=4, rope=True):
    """(B, T, H D) each -> (B, T, C), one head after the other; query head h uses key head h //
    (n_head / n_kv_head)."""
    D, out = q.size(-1) // n_head, []
    for h in range(n_head):
        g = h * (k.size(-1) // D) // n_head
        qh, kh, vh = head_norm(
            q[..., h * D :][..., :D], k[..., g * D :][..., :D], v[..., g * D :][..., :D]
        )
        qh, kh = (rotate(qh), rotate(kh)) if rope else (qh, kh)
        scores = qh @ kh.mT / math.sqrt(D) + torch.full((q.size(1),) * 2, -math.inf).triu(1)
        out.append(scores.softmax(-1) @ vh)
    return torch.cat(out, -1)


class StraightThrough(torch.autograd.Function):             # GPAS's two rules, forward and backward
    @staticmethod
    def forward(ctx, h, a):
        ctx.save_for_backward(h, a)
        return (1 - a * torch.sigmoid(a)) * h

    @staticmethod
    def backward(ctx, dy):
        h, a = ctx.saved_tensors
        s = torch.sigmoid(a)
        return dy, -(s + a * s * (1 - s)) * (dy * h).sum()


def plain_block(cfg, layer, x, P):
    """A block of attention and SwiGLU in every norm and residual, from the papers' equations."""
    hybrid = cfg.norm == "hybrid" or cfg.norm == "hybrid_star" and layer > 0
    post = cfg.norm == "pre_post"
    scale = 1 / math.sqrt(layer + 1) if cfg.norm == "lns" else 1.0

    def head_norm(q, k, v):
        if cfg.head_norm == "qk":
            return rms(q), rms(k), v
        return tuple(rms(u) * P[f"mixer.head_norm.{name}"] for u, name in zip((q, k, v), "qkv"))

    def join(x, y, branch):
        if cfg.residual == "gated":
            return x + y / (1 + torch.exp(-P["residual.g"][branch]))
        return StraightThrough.apply(x + y, P["residual.a"]) if cfg.residual == "gpas" else x + y
    if post and layer:
        x = rms(x) * P["norm.gain"][1]
    h = x if hybrid else scale * rms(x)
    y = attend(*(h @ P[f"mixer.{w}.weight"].T for w in "qkv"), head_norm) @ P["mixer.proj.weight"].T
    x = join(x, y, 0)
    if hybrid:
        x = h = rms(x) * P["norm.gain"]
    else:
        x = rms(x) * P["norm.gain"][0] if post else x
        h = scale * rms(x)
    gate, up = h @ P["mlp.gate.weight"].T, h @ P["mlp.fc.weight"].T
    return join(x, (gate * torch.sigmoid(gate) * up) @ P["mlp.proj.weight"].T, 1)


KINDS = [(norm, residual) for norm in ("pre", "lns", "hybrid", "hybrid_star", "pre_post")
         # else refused
         for residual in ("add", "gated", "gpas") if residual != "gpas" or norm in ("pre", "lns")]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("norm, residual", KINDS)
def test_a_block_follows_the_equations(norm, residual, layer):
    hybrid = norm.startswith("hybrid")
    cfg = config(norm=norm, residual=residual, n_kv_head=2, head_norm="qkv" if hybrid else "qk")
    block = awake(Block(cfg, layer)).double()
    same_module(block, lambda x, P: plain_block(cfg, layer, x, P), 2, T, C, tolerance=1e-6)


# ---------------- attention and MLPs against transformers

def test_swiglu_equals_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    ours = awake(SwiGLU(C, mlp_ratio=2.75)).double()
    theirs = llama.LlamaMLP(llama.LlamaConfig(hidden_size=C, intermediate_size=88)).double()
    pairs = {"gate_proj": ours.gate, "up_proj": ours.fc, "down_proj": ours.proj}
    for name, layer in pairs.items():
        # shared: gradients of both land on one parameter
        getattr(theirs, name).weight = layer.weight
    x = draw(2, T, C)
    same(ours(x), theirs(x), [x, *ours.parameters()], tolerance=1e-12)
    assert count(ours) == count(theirs) == 3 * C * 88


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_attention_equals_transformers(n_kv_head):
    qwen = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    cfg = qwen.Qwen3Config(
        hidden_size=C,
        num_attention_heads=4,
        num_key_value_heads=n_kv_head,
        head_dim=C // 4,
        num_hidden_layers=1,
        attn_implementation="eager",
        rms_norm_eps=1e-6,
    )
    ours, theirs = (
        awake(CausalSelfAttention(C, T, n_head=4, n_kv_head=n_kv_head)),
        qwen.Qwen3Attention(cfg, 0),
    )
    for name, layer in dict(q_proj=ours.q, k_proj=ours.k, v_proj=ours.v, o_proj=ours.proj).items():
        getattr(theirs, name).weight = layer.weight
    x = torch.randn(2, T, C, requires_grad=True)
    angles = qwen.Qwen3RotaryEmbedding(cfg)(x, torch.arange(T)[None])
    y, _ = theirs(x, angles, torch.full((T, T), -math.inf).triu(1)[None, None])
    # fp32: theirs norms in it
    same(ours(x), y, [x, *ours.parameters()], tolerance=1e-5)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("head_norm", [NoHeadNorm, QKNorm, QKVNorm])
def test_attention_follows_the_equations(head_norm, n_kv_head, rope):
    m = awake(
        CausalSelfAttention(C, T, n_head=4, n_kv_head=n_kv_head, head_norm=head_norm, rope=rope)
    ).double()

    def norms(q, k, v):
        gains = list(m.head_norm.parameters()) or [1.0] * 3
        normed = {
            NoHeadNorm: (q, k, v),
            QKNorm: (rms(q), rms(k), v),
            QKVNorm: (rms(q), rms(k), rms(v)),
        }[head_norm]
        return tuple(u * gain for u, gain in zip(normed, gains))

    def reference(x, P):
        q, k, v = (x @ P[f"{w}.weight"].T for w in "qkv")
        return attend(q, k, v, norms, rope=rope) @ P["proj.weight"].T
    same_module(m, reference, 2, T, C, tolerance=1e-6 if rope else 1e-10)


def test_grouped_heads_are_repeated_heads():
    """Two key heads serve query heads 0, 1 and 2, 3: as four key heads of which neighbours are
    equal."""
    grouped, full = (
        awake(CausalSelfAttention(C, T, n_head=4, n_kv_head=n)).double() for n in (2, 4)
    )
    with torch.no_grad():
        full.q.weight[:], full.proj.weight[:] = grouped.q.weight, grouped.proj.weight
        for one, many in ((grouped.k, full.k), (grouped.v, full.v)):
            many.weight[:] = one.weight.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    x = draw(2, T, C)
    assert apart(grouped(x), full(x)) < 1e-12


# ---------------------------------------------------------------- norms and residuals

def test_layer_norm_scaling_numbers_blocks_from_one():
    m, x = model(norm="lns"), draw(2, T, C)
    # the equations are checked above; here, that GPT counts
    for number, block in enumerate(m.blocks, 1):
        for branch in (block.norm.mixer, block.norm.mlp):
            carried, read = branch(x)
            assert (
                carried is x
                and apart(read.square().mean(-1).sqrt() * number**0.5, torch.ones(2, T)) < 1e-5
            )


def test_hybrid_norm_is_blind_to_scales():
    block, x = (
        awake(Block(config(norm="hybrid", head_norm="qkv"), 1)).double(),
        30 * draw(2, T, C).detach(),
    )
    with torch.no_grad():
        before = block.mixer(x)
        for m, c in ((block.mixer.q, 7.0), (block.mixer.k, 0.3), (block.mixer.v, 20.0)):
            m.weight *= c
        assert apart(block.mixer(x), before) < 1e-5          # each of q, k, v is normalised
        block.mixer.v.weight *= -1
        assert apart(block.mixer(x), -before) < 1e-5
        block.mixer.proj.weight.zero_()                      # now Y is x itself
        assert apart(block(50 * x), block(x)) < 1e-5 and apart(block(x), x) > 0.1


def test_hybrid_star_differs_in_its_first_block_only():
    assert type(hybrid_star(C, 0)) is PreNorm and all(
        type(hybrid_star(C, i)) is HybridNorm for i in (1, 2)
    )
    m = model(norm="hybrid_star", head_norm="qkv")
    assert [type(b.norm) for b in m.blocks] == [PreNorm, HybridNorm, HybridNorm]
    assert all(type(b.mixer.head_norm) is QKVNorm for b in m.blocks)         # kept in the first


def test_pre_post_norms_stand_around_every_branch():
    """As the published FFTNet has it: x = E sqrt(C) + positions, then x = norm(x + f(norm x)) for
    every branch."""
    m, idx = (
        model(
            norm="pre_post", pos="sinusoidal", embed_norm=False, embed_scale=True, logit_softcap=0.0
        ),
        tokens(),
    )
    place = torch.arange(T)[:, None] / 10000.0 ** (torch.arange(0, C, 2).double() / C)
    x = m.wte(idx) * math.sqrt(C) + torch.cat((place.sin(), place.cos()), -1)
    for i, block in enumerate(m.blocks):
        x = rms(x + block.mixer(rms(x))) * block.norm.gain[0]
        x = rms(x + block.mlp(rms(x))) * (m.blocks[i + 1].norm.gain[1] if i < 2 else 1.0)
    assert apart(m(idx), x @ m.head.weight[:50].T) < 1e-6    # logits are fp32
    fresh, table = GPT(config(norm="pre_post")), roles(m)
    assert [tuple(b.norm.gain.shape) for b in m.blocks] == [(1, C), (2, C), (2, C)]
    assert all((b.norm.gain == 1).all() for b in fresh.blocks)
    assert all(table[b.norm.gain] == "vector" for b in m.blocks)


@pytest.mark.parametrize("a", [-1.3, 0.0, 0.7, 3.0])
def test_gpas_scales_forward_only(a):
    m = GPAS(C, clip=0.01).double()
    nn.init.constant_(m.a, a)
    x, y, dy = draw(2, T, C), draw(2, T, C), torch.randn(2, T, C, dtype=torch.float64)
    silu, s = a / (1 + math.exp(-a)), 1 / (1 + math.exp(-a))
    for branch in (0, 1):
        out = m(x, y, branch)
        assert apart(out, (1 - silu) * (x + y)) < 1e-14
        dx, dbranch, da = torch.autograd.grad(out, (x, y, m.a), dy)
        assert torch.equal(dx, dy) and torch.equal(dbranch, dy)
        assert math.isclose(
            da.item(), -(s + a * s * (1 - s)) * (dy * (x + y)).sum().item(), rel_tol=1e-12
        )


def test_gpas_has_one_gate_a_block_that_starts_open():
    m = GPT(config(residual="gpas"))
    table = roles(m)
    gates = [name for name, p in m.named_parameters() if table[p] == "gate"]
    assert gates == [f"blocks.{i}.residual.a" for i in range(3)]
    assert all(
        m.get_parameter(name).numel() == 1 and not m.get_parameter(name).any() for name in gates
    )
    for row in ("adamw", "muon"):
        owner = [
            g
            for opt in build_optimizers(config(residual="gpas", optim=row), m)
            for g in opt.param_groups
            if any(p is m.get_parameter(gates[0]) for p in g["params"])
        ]
        # AdamW's
        assert len(owner) == 1 and not owner[0]["weight_decay"] and "momentum" not in owner[0]


def test_gated_residual_starts_at_half():
    m, x, y = GatedResidual(C), torch.randn(2, T, C), torch.randn(2, T, C)
    assert torch.equal(m(x, y, 0), x + 0.5 * y) and torch.equal(m(x, y, 1), x + 0.5 * y)
    with torch.no_grad():
        m.g[1] = -100.0                                      # each branch has gates of its own
    assert torch.equal(m(x, y, 0), x + 0.5 * y) and torch.equal(m(x, y, 1), x)


# ---------------------------------------------------------------- PolyNorm

def poly_norm(z, a, b):
    terms = [(z ** n) / ((z ** n) ** 2).mean(-1, keepdim=True).add(1e-6).sqrt() for n in (3, 2, 1)]
    return a[0] * terms[0] + a[1] * terms[1] + a[2] * terms[2] + b


def test_poly_norm_follows_the_equation():
    same_module(awake(PolyNorm()).double(), lambda z, P: poly_norm(z, P["a"], P["b"]), 2, T, C)


@pytest.mark.parametrize("mlp", [PolyNormMLP, GatedPolyNorm])
def test_poly_norm_acts_in_the_mlp_or_on_its_gate(mlp):
    m, gated = awake(mlp(C, mlp_ratio=1.5)).double(), mlp is GatedPolyNorm

    def reference(x, P):
        z, a, b = x @ P["fc.weight"].T, P["activation.a"], P["activation.b"]
        h = poly_norm(x @ P["gate.weight"].T, a, b) * z if gated else poly_norm(z, a, b)
        return h @ P["proj.weight"].T
    same_module(m, reference, 2, T, C)
    assert count(m) == (3 if gated else 2) * C * 48 + 4
    table = roles(model(mlp="polynorm_gated" if gated else "polynorm"))
    assert all(table[p] == "vector" for p in table if p.numel() in (1, 3))


def test_poly_norm_starts_with_thirds_and_ignores_scale():
    m, z = PolyNorm(), torch.randn(5, 64)
    assert torch.equal(m.a, torch.full((3,), 1 / 3)) and m.b.tolist() == [0.0]
    assert apart(m(100 * z), m(10 * z)) < 1e-5
    half = m((20 * z).half())                                # its cube would overflow in it
    assert half.dtype == torch.float16 and apart(half.float(), m(20 * z)) < 5e-3


# ---------------------------------------------------------------- FAN

LAYERS = [(8, 16, 0.25, "both"), (5, 13, 0.125, "both"), (6, 11, 0.3, "sin"), (6, 11, 0.3, "both"),
          (4, 6, 0.5, "both"), (4, 7, 0.5, "sin"), (4, 7, 0.0, "both"), (4, 7, 0.0, "sin")]


@pytest.mark.parametrize("act", [torch.positive, F.gelu])
@pytest.mark.parametrize("d_in, d_out, ratio, trig", LAYERS)
def test_fan_layer(d_in, d_out, ratio, trig, act):
    m, x = awake(FANLayer(d_in, d_out, ratio=ratio, trig=trig, act=act)).double(), draw(2, 3, d_in)
    y, W, b = m(x), m.input.weight, m.input.bias
    d_p = math.floor(ratio * d_out) if trig == "both" else math.floor(2 * ratio * d_out)
    p, g = x @ W[:d_p].T + b[:d_p], x @ W[d_p:].T + b[d_p:]
    parts = [p.cos(), p.sin(), act(g)] if trig == "both" else [p.sin(), act(g)]
    for reference in (torch.cat(parts, -1), fan_naive(m, x)):
        same(y, reference, [x, W, b])
    assert y.size(-1) == d_out and m.periodic == d_p
    assert count(m) == (d_out - d_p if trig == "both" else d_out) * (d_in + 1)
    if trig == "both":
        assert (
            apart(y[..., :d_p] ** 2 + y[..., d_p : 2 * d_p] ** 2, torch.ones(2, 3, d_p)) < 1e-12
            if d_p
            else True
        )


def test_fan_without_periods_is_a_linear_layer():
    m, x = awake(FANLayer(6, 7, ratio=0.0)), torch.randn(3, 6)
    assert torch.equal(m(x), F.linear(x, m.input.weight, m.input.bias))
    fresh = FANLayer(6, 8, ratio=0.25)
    assert not fresh.input.bias.any() and torch.equal(
        fresh(torch.zeros(6)), torch.tensor([1, 1, 0, 0, 0, 0, 0, 0.0])
    )


def fan(x, P, name, width, ratio=0.125):
    z, d_p = x @ P[f"{name}.input.weight"].T + P[f"{name}.input.bias"], math.floor(ratio * width)
    return torch.cat((z[..., :d_p].cos(), z[..., :d_p].sin(), z[..., d_p:]), -1)


@pytest.mark.parametrize("n_kv_head", [2, 4])
def test_fan_attention_follows_the_equations(n_kv_head):
    m = awake(FAN(C, T, n_head=4, n_kv_head=n_kv_head)).double()

    def reference(x, P):
        f = fan(x, P, "fan", C)
        return attend(*(f @ P[f"{w}.weight"].T for w in "qkv")) @ P["proj.weight"].T
    same_module(m, reference, 2, T, C, tolerance=1e-6)
    d_p, kv = C // 8, n_kv_head * C // 4
    assert count(m) == (C - d_p) * (C + 1) + 2 * C * C + 2 * C * kv


@pytest.mark.parametrize("ratio", [0.0, 0.125, 0.25])
def test_fan_mlp_follows_the_equations(ratio):
    m = awake(FANMLP(C, mlp_ratio=2.0, ratio=ratio)).double()
    d_p = math.floor(ratio * 64)

    def reference(x, P):
        z = x @ P["fc.input.weight"].T + P["fc.input.bias"]
        g = z[..., d_p:] * torch.special.ndtr(z[..., d_p:])  # GELU
        return torch.cat((z[..., :d_p].cos(), z[..., :d_p].sin(), g), -1) @ P["proj.weight"].T
    same_module(m, reference, 2, T, C)
    assert count(m) == (64 - d_p) * (C + 1) + 64 * C


# ---------------------------------------------------------------- CoLA

@pytest.mark.parametrize("bias", [False, True])
def test_cola_is_two_linear_maps_around_silu(bias):
    m = awake(CoLA(12, 20, bias=bias, rank=3)).double()

    def reference(x, P):
        z = x @ P["a"].T
        return (z / (1 + torch.exp(-z))) @ P["b"].T + (P["bias.weight"] if bias else 0)
    same_module(m, reference, 2, T, 12)
    assert count(m) == 3 * (12 + 20) + 20 * bias and m.out_features == 20


def test_cola_without_its_activation_has_its_rank(monkeypatch):
    m = CoLA(24, 40, rank=5).double()
    monkeypatch.setattr(F, "silu", lambda z: z)
    W = m(torch.eye(24, dtype=torch.float64)).T
    assert torch.linalg.matrix_rank(W) == 5 and apart(W, m.b @ m.a) < 1e-14


def test_cola_starts_with_the_published_spread():
    torch.manual_seed(0)
    m = CoLA(512, 1376, rank=128)
    for w in (m.a, m.b):
        assert abs(w.std() * 128 ** 0.25 * 1888 ** 0.25 - 1) < 0.02 and abs(w.mean()) < 1e-3
    assert abs((m.b @ m.a).std() * 1888 ** 0.5 - 1) < 0.02
    # not zeroed, as a dense one is
    deep = GPT(config(linear="cola", zero_init=True)).blocks[0].mlp.proj
    assert abs(deep.b.std() * (8 * (C + 128)) ** 0.25 - 1) < 0.2


@pytest.mark.parametrize("linear", [Linear, CoLA])
def test_fused_layers_are_the_layers(linear):
    layers, x = [linear(C, d).double() for d in (C, 16, 24)], draw(2, T, C)
    weights = [p for m in layers for p in m.parameters()]
    same(
        linear.fused(x, layers),
        torch.cat([m(x) for m in layers], -1),
        [x, *weights],
        tolerance=1e-12,
    )


def test_cola_refuses_a_rank_that_saves_nothing():
    assert count(CoLA(12, 12, rank=6)) == 12 * 12
    with pytest.raises(ValueError, match="cola_rank") as e:
        CoLA(12, 12, rank=7)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="cola_rank"):
        GPT(config(linear="cola", cola_rank=31))


def test_cola_makes_every_projection_inside_blocks_and_no_other():
    m = GPT(config(linear="cola", cola_rank=4))
    assert not any(isinstance(part, nn.Linear) for part in m.blocks.modules())
    assert isinstance(m.head, nn.Linear) and isinstance(m.wte, nn.Embedding)
    assert count(m.blocks) == 3 * (4 * 4 * (C + C) + 3 * 4 * (C + 4 * C))
    assert all(
        len(part.a) == C // 4
        for part in GPT(config(linear="cola")).modules()
        if isinstance(part, CoLA)
    )


# ---------------------------------------------------------------- recomputation, dropout

class Watch(TorchDispatchMode):
    """Counts matrix products, and the bytes of results that are still alive."""
    def __init__(self, m):
        super().__init__()
        self.products, self.born, self.old = (
            0,
            {},
            {p.untyped_storage()._cdata for p in m.parameters()},
        )

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.products += op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        out = op(*args, **kwargs or {})
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.old:
                self.born[StorageWeakRef(t.untyped_storage())] = t.untyped_storage().nbytes()
        return out

    def alive(self):
        return sum(size for ref, size in self.born.items() if not ref.expired())


def run(row, **knobs):
    m, idx = model(recompute=row, **knobs), tokens()
    torch.manual_seed(3)                                     # of dropout
    with Watch(m) as watch:
        loss = m(idx, idx.roll(1, 1))
        kept = watch.alive()
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in m.named_parameters()}, kept, watch.products


PARTS = [dict(linear="cola"), dict(linear="cola", dropout=0.3),
         dict(linear="cola", mlp="polynorm", residual="gpas", dropout=0.2),
         dict(linear="cola", mixer="fan", norm="hybrid_star", head_norm="qkv", value_residual=True,
              unet_skips=True)]


@pytest.mark.parametrize("knobs", PARTS, ids=str)
@pytest.mark.parametrize("row", [row for row in RECOMPUTE if row != "none"])
def test_recomputation_changes_nothing(row, knobs):
    (loss, grads, *_), (plain_loss, plain, *_) = run(row, **knobs), run("none", **knobs)
    assert torch.equal(loss, plain_loss)
    for name, g in plain.items():
        assert g is not None and apart(grads[name], g) < 1e-10, name


@pytest.mark.parametrize("rank", [0, 3])
def test_recomputation_trades_memory_for_products(rank):
    _, _, kept, products = zip(
        *(run(row, linear="cola", cola_rank=rank) for row in ("none", "cola", "block"))
    )
    assert kept[0] > 1.5 * kept[1] and kept[1] > kept[2]
    assert products[0] < products[1] < products[2]
    # a block has 7 narrowing products, in 5 GEMMs: q, k, v share one, gate and fc another. They are
    # what is kept
    none, cola, block = products
    assert block - cola >= 3 * 4


def test_dropout_acts_in_training_only():
    plain, m, idx = model(), model(dropout=0.4), tokens()
    assert torch.equal(m.eval()(idx), plain(idx))
    m.train()
    assert not torch.equal(m(idx), m(idx)) and apart(m(idx), plain(idx)) > 1e-3


def test_dropout_keeps_the_expectation_of_both_branches():
    class Constant(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.c = c

        def forward(self, x, v1=None):
            return torch.full_like(x, self.c)
    block, x = Block(config(dropout=0.25, branch_scale=True), 0), torch.zeros(200, 16, C)
    block.mixer, block.mlp = Constant(1.0), Constant(10.0)
    torch.manual_seed(0)
    y, a = block(x), 1 / math.sqrt(2 * 3)
    assert abs(y.mean() - (10 + a)) < 0.1                    # 10 standard errors
    # the two are dropped apart
    values = [p + q for p in (0.0, a / 0.75) for q in (0.0, 10 / 0.75)]
    shares = [torch.isclose(y, torch.tensor(v)).float().mean().item() for v in values]
    assert all(abs(s - t) < 0.02 for s, t in zip(shares, (0.0625, 0.1875, 0.1875, 0.5625)))
    assert torch.equal(block.eval()(x), torch.full_like(x, a + 10))


def test_processes_share_weights_and_draw_dropout_apart(monkeypatch, tmp_path):
    class Stop(Exception):
        pass

    def look(cfg, m):
        seen.append(([p.clone() for p in m.parameters()], torch.rand(8)))
        raise Stop
    seen = []
    monkeypatch.setattr(train_gpt2, "build_optimizers", look)
    monkeypatch.setattr(train_gpt2, "join_processes", lambda *args: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(Stop):
            main(config(vocab_size=0, dropout=0.1, device="cpu", output_dir=str(tmp_path)))
    (weights, draws), (others, other_draws), (_, again) = seen
    assert all(torch.equal(a, b) for a, b in zip(weights, others))
    assert not torch.equal(draws, other_draws) and torch.equal(draws, again)


# ---------------------------------------------------------------- optimizers, schedules, clipping

def ademamix(theta, grads, lr, b1, b2, b3, alpha, warmup, decay, eps=1e-8):
    """The published update, arXiv 2409.03137: alpha grows linearly, and so does the half-life of
    the slow average."""
    m1, m2, v, theta = 0.0, 0.0, 0.0, theta.clone()

    def life(b):
        return math.log(0.5) / math.log(b) - 1
    for t, g in enumerate(grads, 1):
        s = min(1.0, t / warmup)
        b3_t = 0.5 ** (1 / ((1 - s) * life(b1) + s * life(b3) + 1))
        m1, m2, v = b1 * m1 + (1 - b1) * g, b3_t * m2 + (1 - b3_t) * g, b2 * v + (1 - b2) * g * g
        update = (m1 / (1 - b1 ** t) + s * alpha * m2) / ((v / (1 - b2 ** t)).sqrt() + eps)
        theta -= lr * (update + decay * theta)
    return theta


@pytest.mark.parametrize("warmup", [0, 7])
def test_ademamix_equals_the_published_update(warmup):
    pytest.importorskip("pytorch_optimizer")
    cfg = config(
        optim="ademamix",
        adam_beta1=0.8,
        adam_beta2=0.9,
        ademamix_beta3=0.99,
        ademamix_alpha=4.0,
        ademamix_warmup=warmup,
        num_iterations=15,
        learning_rate=0.01,
        weight_decay=0.3,
        embed_lr_scale=2.0,
        head_lr_scale=0.5,
        residual="gated",
    )
    m, steps = model(residual="gated"), 20
    start, table = {p: p.detach().clone() for p in m.parameters()}, roles(m)
    grads = {p: [torch.randn_like(p) for _ in range(steps)] for p in start}
    optimizer, = build_optimizers(cfg, m)
    for t in range(steps):
        for p in start:
            p.grad = grads[p][t].clone()
        optimizer.step()
    for p, role in table.items():
        lr = 0.01 * {"embed": 2.0, "head": 0.5}.get(role, 1.0)
        decay = 0.0 if role == "vector" else 0.3
        expected = ademamix(start[p], grads[p], lr, 0.8, 0.9, 0.99, 4.0, warmup or 15, decay)
        assert apart(p - start[p], expected - start[p]) < 1e-9, role


def soap(W, grads, lr, b1, b2, frequency, decay, eps=1e-8):
    """Adam in the eigenbasis of Shampoo's factors, arXiv 2409.11321; moments live in the rotated
    basis."""
    W, (L, R) = W.clone(), ((1 - b2) * grads[0] @ grads[0].T, (1 - b2) * grads[0].T @ grads[0])
    QL, QR = (torch.linalg.eigh(S).eigenvectors.flip(1) for S in (L, R))
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    # the first gradient only sets the basis
    for t, G in enumerate(grads[1:], 1):
        g = QL.T @ G @ QR
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g ** 2
        W -= lr * (1 - b2 ** t) ** 0.5 / (1 - b1 ** t) * QL @ (m / (v.sqrt() + eps)) @ QR.T
        W -= lr * decay * W
        L, R = b2 * L + (1 - b2) * G @ G.T, b2 * R + (1 - b2) * G.T @ G
        # one power iteration; columns by falling eigenvalue
        if t % frequency == 0:
            M, order = (
                QL @ m @ QR.T,
                [(Q * (S @ Q)).sum(0).argsort(descending=True) for S, Q in ((L, QL), (R, QR))],
            )
            v = v[order[0]][:, order[1]]
            QL, QR = (
                torch.linalg.qr((S @ Q)[:, i])[0]
                for S, Q, i in ((L, QL, order[0]), (R, QR, order[1]))
            )
            m = QL.T @ M @ QR
    return W


def test_soap_equals_the_published_update():
    pytest.importorskip("pytorch_optimizer")
    cfg = config(
        optim="soap", soap_beta=0.9, soap_frequency=4, learning_rate=0.02, weight_decay=0.2
    )
    torch.manual_seed(0)
    W = draw(6, 6)
    start, grads = W.detach().clone(), [torch.randn(6, 6, dtype=torch.float64) for _ in range(21)]
    optimizer, _ = train_gpt2.OPTIMS["soap"][0](
        cfg, {W: "matrix", nn.Parameter(torch.zeros(3)): "vector"}
    )
    for G in grads:
        W.grad = G.clone()
        optimizer.step()
    expected = soap(start, grads, 0.02, 0.9, 0.9, 4, 0.2)
    assert apart(W - start, expected - start) < 1e-6         # the package factorises in fp32
    assert apart(start, expected) > 0.1


@pytest.mark.parametrize("optim", ["ademamix", "soap"])
def test_optional_optimizers_learn(optim):
    pytest.importorskip("pytorch_optimizer")
    cfg = config(
        optim=optim, learning_rate=0.01, num_iterations=30, residual="gpas", mlp="polynorm"
    )
    torch.manual_seed(0)
    m, idx = GPT(cfg), tokens(4)
    optimizers, table, losses = build_optimizers(cfg, m), roles(m), []
    for step in range(30):
        set_schedule(optimizers, step, cfg)
        loss = m(idx[:, :-1], idx[:, 1:])
        loss.backward()
        before = {p: p.detach().clone() for p in table}
        for opt in optimizers:
            opt.step()
        if step == 0:                                        # SOAP only looks at the first gradient
            moved = {table[p] for p in table if not torch.equal(p, before[p])}
            assert (
                moved & {"matrix", "proj"} == (set() if optim == "soap" else {"matrix"})
                and "head" in moved
            )
        m.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("optim", ["ademamix", "soap"])
def test_a_missing_package_is_one_line(optim, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    cfg = config(optim=optim)
    with pytest.raises(SystemExit) as e:
        build_optimizers(cfg, GPT(cfg))
    assert f"--optim {optim}" in e.value.code and "pip install pytorch-optimizer" in e.value.code
    assert "\n" not in e.value.code


def rate(cfg, step):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.learning_rate)
    optimizer.param_groups[0]["peak_lr"] = cfg.learning_rate
    del optimizer.param_groups[0]["momentum"]
    set_schedule([optimizer], step, cfg)
    return optimizer.param_groups[0]["lr"]


def test_cosine_from_3e4_to_6e4_to_6e5():
    cfg = parse(
        "--schedule cosine --warmup_iters 5000 --lr_start 0.5 --lr_end 0.1 --learning_rate 6e-4 "
        "--num_iterations 61875".split()
    )
    for step in (0, 1, 1000, 2499, 4999, 5000, 5001, 20000, 33437, 61000, 61874):
        warm = 3e-4 + 3e-4 * (step + 1) / 5000
        cos = 6e-5 + 0.5 * (6e-4 - 6e-5) * (1 + math.cos(math.pi * (step - 5000) / (61875 - 5000)))
        assert math.isclose(rate(cfg, step), warm if step < 5000 else cos, rel_tol=1e-9), step
    assert math.isclose(rate(cfg, 2499), 4.5e-4) and math.isclose(rate(cfg, 4999), 6e-4)
    assert math.isclose(rate(cfg, 61875), 6e-5)


def test_cosine_may_warm_up_for_most_of_the_run():
    # no warm-down here
    cfg = config(schedule="cosine", num_iterations=100, warmup_iters=80, learning_rate=1.0)
    assert [round(rate(cfg, step), 6) for step in (39, 79, 80, 90, 100)] == [
        0.5,
        1.0,
        1.0,
        0.5,
        0.0,
    ]


def test_trapezoid_with_and_without_ends():
    cfg = config(num_iterations=100, warmup_iters=10, warmdown_iters=40, learning_rate=1.0)
    for step in range(100):
        assert math.isclose(rate(cfg, step), min((step + 1) / 10, 1.0, (100 - step) / 40))
    cfg = config(
        num_iterations=100,
        warmup_iters=10,
        warmdown_iters=40,
        learning_rate=1.0,
        lr_start=0.5,
        lr_end=0.1,
    )
    for step, share in [(0, 0.55), (4, 0.75), (9, 1.0), (60, 1.0), (80, 0.55), (99, 0.1225)]:
        assert math.isclose(rate(cfg, step), share)


@pytest.mark.parametrize("grad_clip", [0.0, 0.5])
def test_gates_are_clipped_apart(grad_clip):
    m = model(residual="gpas")
    table = roles(m)
    for p in table:
        p.grad = torch.full_like(p, 2.0)
    gates, others = (
        [p for p in table if table[p] == "gate"],
        [p for p in table if table[p] != "gate"],
    )
    clip_gradients(table, config(residual="gpas", gpas_clip=0.03, grad_clip=grad_clip))
    size = math.sqrt(sum(p.numel() for p in others))
    assert torch.allclose(
        torch.stack([p.grad.norm() for p in gates]).norm(), torch.tensor(0.03).double(), rtol=1e-3
    )
    for p in others:
        assert torch.allclose(
            p.grad, torch.full_like(p, grad_clip / size if grad_clip else 2.0), rtol=1e-5
        )


def test_small_gradients_are_not_clipped():
    m = model(residual="gpas")
    for p in (table := roles(m)):
        p.grad = torch.full_like(p, 1e-6)
    clip_gradients(table, config(residual="gpas", grad_clip=1.0))
    assert all(torch.equal(p.grad, torch.full_like(p, 1e-6)) for p in table)
    # no gates, nothing to clip, no gradients
    clip_gradients(roles(model()), config())


# ---------------------------------------------------------------- the loss at a large vocabulary

@pytest.mark.parametrize("cap", [0.0, 15.0])
@pytest.mark.parametrize("chunk", [2, None])
def test_linear_cross_entropy_at_151665_tokens(cap, chunk):
    vocab, rows, width = 151_665, 151_680, 16
    torch.manual_seed(0)
    h, W, y = (
        3 * torch.randn(5, width).double(),
        torch.randn(rows, width).double(),
        torch.randint(vocab, (5,)),
    )
    y[0] = vocab - 1                                         # the last row that is a token
    h.requires_grad_(), W.requires_grad_()
    reference = F.cross_entropy(softcap(h @ W[:vocab].T, cap), y)
    ours = linear_cross_entropy(h, W, y, cap, vocab, chunk)
    assert abs(ours - reference) < 1e-12 * reference
    for a, b in zip(*(torch.autograd.grad(loss, (h, W)) for loss in (ours, reference))):
        assert apart(a, b) < 1e-11
    assert not torch.autograd.grad(linear_cross_entropy(h, W, y, cap, vocab, chunk), W)[0][
        vocab:
    ].any()


# ---------------------------------------------------------------- what is refused

REFUSED = [  # (flags, what the line must name)
    ("--norm lns --branch_scale", "branch_scale"),
    ("--mixer attn --norm hybrid", "head_norm qkv"),
    ("--mixer attn --norm hybrid_star --head_norm none", "head_norm qkv"),
    ("--mixer afno,attn --norm hybrid", "head_norm qkv"),
    ("--mixer attn --norm hybrid --head_norm qkv --residual gpas", "gpas"),
    ("--fan_ratio 0.1", "fan_ratio"),
    ("--mixer attn --fan_trig sin", "fan_trig"),
    ("--cola_rank 8", "cola_rank"),
    ("--gpas_clip 1", "gpas_clip"),
    ("--optim adamw --ademamix_alpha 3", "ademamix_alpha"),
    ("--optim ademamix --ademamix_beta3 1", "ademamix_beta3"),
    ("--schedule cosine --warmdown_iters 10", "warmdown_iters"),
    ("--dropout 1", "dropout"),
    ("--lr_start 1.5", "lr_start"),
    ("--norm post", "post"),
    ("--residual none", "none"),
    ("--recompute all", "all"),
    ("--mixer fan --fan_ratio 0.6", "fan_ratio"),
    ("--mixer fan --p -0.1", "fan_ratio"),
    ("--mixer fan --fan_trig tan", "tan"),
    ("--linear cola --cola_rank 999", "cola_rank"),
]


@pytest.mark.parametrize("flags, word", REFUSED)
def test_what_contradicts_is_one_line(flags, word, tmp_path):
    with pytest.raises(SystemExit) as e:
        main(parse(f"--model tiny --device cpu --output_dir {tmp_path} {flags}".split()))
    line = e.value.code
    assert (
        isinstance(line, str) and word in line and "\n" not in line and not list(tmp_path.iterdir())
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--mixer attn --norm hybrid --head_norm qkv",
        "--norm lns --residual gpas",
        "--mixer fan --mlp fan --p 0.25",
        "--linear cola --cola_rank 16 --recompute cola",
    ],
)
def test_what_goes_together_is_built(flags):
    cfg = parse([*f"{flags} --vocab_size 50 --n_embd 64".split()])
    with torch.device("meta"):
        GPT(cfg)


def test_p_is_the_ratio_of_fan():
    assert parse("--mixer fan --p 0.15".split()) == parse("--mixer fan --fan_ratio 0.15".split())
    assert parse("--mixer fan --p 0.15".split()).fan_ratio == 0.15
