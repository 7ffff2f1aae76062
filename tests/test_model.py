"""The model: clever forms against plain ones, initialisation and roles, what every switch does."""
import math

import pytest
import torch
import torch._functorch.config
import torch.nn as nn
import torch.nn.functional as F

from afno import AFNO, afno_naive
from attention import CausalSelfAttention, GatedAttention, Rotary
from kernels import (BACKENDS, BANDED_UP_TO, FFT_FROM, BandedConv, DepthwiseCausalConv, FFTConv,
                     Muon, NormedProduct, RMSNorm, ToeplitzConv, auto_conv, banded_conv,
                     fastest_conv, fft_conv, has_depthwise, has_products, linear, toeplitz_conv)
from parts import NoHeadNorm, ShortConv, norm
from tests.checks import apart, awake, small
from train_gpt2 import (GPT, MIXERS, MLPS, OPTIMS, POSITIONS, Block, Config, build, build_optimizers,
                        roles)

PLAIN = dict(
    n_layer=2,
    n_head=4,
    n_embd=32,
    vocab_size=50,
    sequence_length=16,
    mixer="attn",
    mlp="gelu",
    pos="rope",
    zero_init=True,
    tie_embeddings=False,
    pad_vocab=True,
    embed_norm=False,
    logit_softcap=0.0,
    value_residual=False,
    x0_shortcut=False,
    unet_skips=False,
    branch_scale=False,
)
SWITCHES = [
    dict(embed_norm=True),
    dict(embed_scale=True),
    dict(logit_softcap=5.0),
    dict(value_residual=True),
    dict(x0_shortcut=True),
    dict(unet_skips=True),
    dict(branch_scale=True),
    dict(output_conv=True),
    dict(head_norm="none"),
    dict(short_conv=True),
    dict(mlp="relu2"),
    *(dict(pos=row) for row in POSITIONS if row != "rope"),
]
ALL_ON = dict(
    mixer="afno,attn",
    n_layer=5,
    embed_norm=True,
    logit_softcap=15.0,
    value_residual=True,
    x0_shortcut=True,
    unet_skips=True,
    branch_scale=True,
    output_conv=True,
    short_conv=True,
)


def config(**knobs):
    cfg = PLAIN | knobs
    return Config(**small(cfg["mixer"]) | cfg)


def model(**knobs):
    torch.manual_seed(0)
    return GPT(config(**knobs))


def tokens(B=2, T=16):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(1))


def small_afno(backend="auto", **knobs):
    knobs = (
        dict(num_blocks=2, poles=4, group_size=2, hidden_size_factor=0.75, sparsity_threshold=0.1)
        | knobs
    )
    torch.manual_seed(0)
    return awake(AFNO(8, 9, backend=backend, **knobs)).double()


# ---------------------------------------------------------------- clever against plain

@pytest.mark.parametrize("T", [1, 3, 7, 9])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_afno_equals_naive_in_values_and_gradients(backend, fraction, T):
    m, x = (
        small_afno(backend, hard_thresholding_fraction=fraction),
        torch.randn(2, T, 8, dtype=torch.float64),
    )
    x.requires_grad_()
    results = []
    for y in (m(x), afno_naive(m, x)):
        grads = torch.autograd.grad(y.square().sum(), [x, *m.parameters()])
        results.append((y, *grads))
    for name, fast, plain in zip(["y", "x", *dict(m.named_parameters())], *results):
        assert torch.allclose(fast, plain, rtol=1e-9, atol=1e-11), name
    assert all(g.any() for g in results[0]) or T < 3         # every parameter takes part


@pytest.mark.parametrize("knob", [dict(poles=3), dict(poles=5), dict(taps=1), dict(taps=4)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_afno_with_odd_poles_or_few_taps_equals_naive(knob, backend):
    m, x = small_afno(backend, **knob), torch.randn(2, 9, 8, dtype=torch.float64)
    assert torch.allclose(m(x), afno_naive(m, x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("f", [norm, lambda u: fft_conv(u, draw(1, 4)),
                               lambda u: BandedConv.apply(u, draw(1, 2))])
def test_what_is_differentiable_once_says_so(f):
    u = draw(1, 4, 2)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(f(u).sum(), u, create_graph=True)


def test_norm_is_torchs_rms_norm():
    x = draw(2, 3, 8)
    with torch.no_grad():
        x[0, 0] = 0
    twin = F.rms_norm(x, (8,), eps=1e-6)
    dy = torch.randn_like(x)
    assert torch.allclose(norm(x), twin, rtol=1e-12)
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in (norm(x), twin)]
    assert torch.allclose(*gradients, rtol=1e-12)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def inputs_of_linear(shape, N, strided):
    x = torch.randn(*shape)
    if strided:
        x = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    return x.requires_grad_(), torch.randn(N, shape[-1], requires_grad=True)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape, N", [((2, 3, 8), 5), ((129, 130), 1), ((4, 77, 128), 51),
                                      ((2, 64, 256), 256), ((1, 16384), 3), ((16384, 1), 2)])
def test_linear_is_torchs_linear(shape, N, strided):
    """In values, gradients and second gradients; without gradients bit for bit."""
    x, W = inputs_of_linear(shape, N, strided)
    dy = torch.randn(*shape[:-1], N)
    results = []
    for function, at in ((linear, (x, W)), (F.linear, (x.double(), W.double()))):
        y = function(*at)
        gradients = torch.autograd.grad(y, at, dy.to(y), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), at)
        results.append([y, *gradients, *second])
    assert max(map(apart, *results)) < 1e-5
    with torch.no_grad():
        assert torch.equal(linear(x, W), F.linear(x, W))


@pytest.mark.skipif(not has_products(), reason="needs oneDNN")
def test_linear_takes_onednn_where_it_pays(monkeypatch):
    """For fp32 on a CPU, with many numbers; neither compiled nor under autocast."""
    calls = []

    def seen(x, W):
        calls.append(x.dtype)
        return F.linear(x, W)

    monkeypatch.setattr("kernels.onednn_product", seen)
    x, W = inputs_of_linear((2, 64, 128), 4, False)
    linear(x, W).sum().backward()
    assert calls == 2 * [torch.float32]
    assert linear(x.double(), W.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, W).dtype == torch.bfloat16
    linear(x[:1], W)
    torch.compile(linear, backend="eager")(x, W)
    assert len(calls) == 2


@pytest.mark.parametrize("conv", [*BACKENDS.values(), BandedConv.apply])
@pytest.mark.parametrize("T, M", [(1, 1), (7, 7), (128, 128), (129, 129), (300, 300), (300, 1),
                                  (300, 17), (33, 18), (65, 64)])
def test_convolution_equals_its_matrix(conv, T, M):
    u, h, dy = draw(2, T, 12), draw(3, M), torch.randn(2, T, 12, dtype=torch.float64)
    lag = torch.arange(T)[:, None] - torch.arange(T)
    seen = (lag >= 0) & (lag < M)
    matrix = torch.where(seen, h[:, lag.clamp(0, M - 1)], 0.0)
    plain = torch.einsum("gts,bsgw->btgw", matrix, u.unflatten(2, (3, 4))).flatten(2)
    ours = conv(u, h)
    assert apart(ours, plain) < 1e-12
    for a, b in zip(torch.autograd.grad(ours, (u, h), dy), torch.autograd.grad(plain, (u, h), dy)):
        assert apart(a, b) < 1e-12


@pytest.mark.skipif(not has_depthwise(), reason="oneDNN has no depthwise convolution here")
@pytest.mark.parametrize("T, M, C", [(5, 16, 12), (70, 4, 24), (200, 16, 64), (333, 33, 768)])
def test_a_row_and_its_prefixes_are_convolved_to_the_same_bits(T, M, C, monkeypatch):
    """By oneDNN, in fp32; and its gradients are those of the GEMMs that other devices take."""
    u = torch.randn(2, T, C, requires_grad=True)
    h = torch.randn(C // 4, M, requires_grad=True)
    dy = torch.randn(2, T, C)
    y = banded_conv(u, h)
    for t in (1, T // 3, T // 2, T - 1):
        assert torch.equal(banded_conv(u[:, :t], h), y[:, :t])
        future = torch.cat((u[:, :t], torch.full_like(u[:, t:], math.nan)), 1)
        assert torch.equal(banded_conv(future, h)[:, :t], y[:, :t])
    ours = torch.autograd.grad(y, (u, h), dy)
    monkeypatch.setattr("kernels.has_depthwise", lambda: False)
    for a, b in zip(ours, torch.autograd.grad(banded_conv(u, h), (u, h), dy)):
        assert apart(a, b) < 1e-5


def test_auto_takes_the_fastest_backend(monkeypatch):
    """By the device, the length and the taps of what comes in; its FLOPs are those of that backend.
    """
    T = FFT_FROM["cpu"]
    M = BANDED_UP_TO["cpu"]
    assert fastest_conv("cpu", T - 1, T - 1) is toeplitz_conv
    assert fastest_conv("cpu", T, T) is fastest_conv("cpu", T, M + 1) is fft_conv
    assert fastest_conv("cpu", T, M) is fastest_conv("cuda", 4096, 500) is banded_conv
    assert fastest_conv("cuda", 2048, 2048) is toeplitz_conv
    assert fastest_conv("cuda", 4096, 4096) is fft_conv
    monkeypatch.setitem(FFT_FROM, "cpu", 5)
    for length, taps, conv in ((4, 4, toeplitz_conv), (80, 80, fft_conv), (5, 3, banded_conv)):
        u, h = torch.randn(1, length, 4), torch.randn(2, taps)
        assert torch.equal(auto_conv(u, h), conv(u, h))
    auto, toeplitz, fft = (small_afno(row) for row in ("auto", "toeplitz", "fft"))
    assert auto.flops(4) == toeplitz.flops(4) and auto.flops(5) == fft.flops(5)
    assert auto.to("meta").flops(9) == toeplitz.flops(9) != fft.flops(9)
    few, banded = (small_afno(row, taps=3) for row in ("auto", "banded"))
    assert few.flops(9) == banded.flops(9) == 4 * 16 * 8


def test_v1_inside_the_short_convolution():
    """As added to the values before it, in values and gradients."""
    x, v1, w, dy = draw(2, 7, 12), draw(2, 7, 4), draw(4, 12), torch.randn(2, 7, 12).double()
    inside = DepthwiseCausalConv.apply(x, w, v1)
    before = DepthwiseCausalConv.apply(x + F.pad(v1, (8, 0)), w)
    assert apart(inside, before) < 1e-12
    for a, b in zip(*(torch.autograd.grad(y, (x, w, v1), dy) for y in (inside, before))):
        assert apart(a, b) < 1e-12


@pytest.mark.parametrize("knobs", [dict(mixer="afno"), dict(mixer="attn"), ALL_ON], ids=str)
def test_the_stream_is_as_narrow_as_products(knobs):
    m, idx, seen = awake(model(**knobs)), tokens(), []
    m.blocks[-1].register_forward_hook(lambda block, inputs, x: seen.append(x.dtype))
    m(idx)
    with torch.autocast("cpu", torch.bfloat16):
        m(idx)
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("T", [1, 2, 5, 8])
def test_gradcheck_of_the_handwritten_backwards(T, monkeypatch):
    torch.autograd.gradcheck(FFTConv.apply, (draw(2, 3, 2, T), draw(3, T)))
    monkeypatch.setattr("kernels.BLOCK", 3)               # several blocks at these lengths
    torch.autograd.gradcheck(ToeplitzConv.apply, (draw(3, T, 4), draw(3, T)))
    monkeypatch.setattr("kernels.CHUNK", 64)              # and several chunks
    torch.autograd.gradcheck(BandedConv.apply, (draw(2, 9 * T, 4), draw(2, 1 + T)))
    torch.autograd.gradcheck(DepthwiseCausalConv.apply, (draw(2, T, 3), draw(4, 3)))
    torch.autograd.gradcheck(DepthwiseCausalConv.apply, (draw(2, T, 3), draw(4, 3), draw(2, T, 2)))
    torch.autograd.gradcheck(NormedProduct.apply, (draw(2, T, 3), draw(2, T, 3), 0.1))
    torch.autograd.gradcheck(RMSNorm.apply, (draw(2, T, 3), 0.1))
    for row in MLPS:
        torch.autograd.gradcheck(build("mlp", row, config(mlp=row), 4).double(), draw(2, T, 4))


def test_short_conv_equals_conv1d():
    m, x = ShortConv(6), torch.randn(2, 9, 6)
    y = F.conv1d(F.pad(x.mT, (3, 0)), m.weight.T[:, None], groups=6).mT
    assert apart(m(x), y) < 1e-6


def test_kernel_does_not_depend_on_the_length():
    m, taps = small_afno(), []
    m.conv = lambda u, h: taps.append(h) or u
    for T in (9, 4, 1):
        m(torch.randn(1, T, 8, dtype=torch.float64))
        assert torch.equal(taps[-1], taps[0][:, :T])


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_attention_equals_naive(n_kv_head):
    m = awake(
        CausalSelfAttention(32, 16, n_head=4, n_kv_head=n_kv_head, head_norm=NoHeadNorm, rope=False)
    )
    x = torch.randn(2, 11, 32)
    q, k, v = (part(x).unflatten(2, (-1, 8)).transpose(1, 2) for part in (m.q, m.k, m.v))
    k, v = (t.repeat_interleave(4 // n_kv_head, dim=1) for t in (k, v))
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(11, 11).triu(1).bool(), -math.inf)
    assert apart(m(x), m.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))) < 1e-5


def test_rotary_is_a_rotation_and_relative():
    rotary, (q, k) = Rotary(8, 64), torch.randn(2, 8, dtype=torch.float64)
    Q, K = (t[0, 0] for t in rotary(*(t.expand(1, 1, 64, 8) for t in (q, k)), slice(64)))
    assert apart(Q.norm(dim=1), q.norm().expand(64)) < 1e-6
    scores = Q @ K.T
    for lag in (-20, 0, 1, 33):
        assert apart(scores.diagonal(lag), scores.diagonal(lag)[:1]) < 1e-4
    for at in (slice(5, 6), torch.tensor([[5]])):
        one = q.expand(1, 1, 1, 8)
        assert torch.equal(rotary(one, one, at)[0][0, 0, 0], Q[5])


@pytest.mark.parametrize("at", [slice(5), torch.tensor([[3, 4, 0, 1, 2], [0, 1, 0, 1, 2]])])
def test_rotary_against_its_formula(at):
    """Compiled code has the formula, else there is a backward by hand: values and gradients."""
    rotary = Rotary(8, 16).double()
    # Side by side, as one product gives them; of queries there are more heads.
    z = torch.randn(2, 5, 4 * 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 2, 5, 8, dtype=torch.float64)

    def plain(x):
        cos, sin = (table[at].unsqueeze(-3) for table in (rotary.cos, rotary.sin))
        return x * cos + x.roll(4, -1) * sin

    def both(turn):
        q, k = (u.unflatten(-1, (-1, 8)).transpose(1, 2) for u in z.split((24, 8), -1))
        q, k = turn(q, k)
        return torch.cat((q, k), 1)

    found = both(lambda q, k: rotary(q, k, at))
    expected = both(lambda q, k: (plain(q), plain(k)))
    assert apart(found, expected) < 1e-14
    grads = [torch.autograd.grad((y.transpose(0, 1) * weights).sum(), z)[0]
             for y in (found, expected)]
    assert apart(*grads) < 1e-14
    assert torch.autograd.gradgradcheck(lambda z: rotary(z, z, slice(5)),
                                        z.unflatten(-1, (-1, 8)).transpose(1, 2))


def test_rotary_of_bf16_is_rounded_once():
    rotary = Rotary(64, 16)
    x = torch.randn(1, 2, 16, 64).bfloat16()
    found, _ = rotary(x, x, slice(16))
    wide, _ = rotary(x.float(), x.float(), slice(16))
    assert found.dtype == torch.bfloat16 and torch.equal(found, wide.bfloat16())


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_step_equals_forward_with_all_switches_on(pos, tied):
    m, idx = awake(model(**ALL_ON, pos=pos, tie_embeddings=tied)), tokens()
    state, columns = m.init_state(2), []
    for t in range(16):
        y, state = m.step(idx[:, t], state)
        columns.append(y)
    assert apart(torch.stack(columns, 1), m(idx)) < 1e-4
    y, _ = m.step(idx[:, 0], m.init_state(2))               # a fresh state is fresh
    assert torch.equal(y, columns[0])


# ---------------------------------------------------------------- initialisation, roles, sizes

@pytest.mark.parametrize(
    "knobs",
    [
        *(dict(mixer=row) for row in MIXERS),
        *(dict(pos=row) for row in POSITIONS),
        ALL_ON,
        dict(tie_embeddings=True, pad_vocab=False),
        dict(n_kv_head=1, zero_init=False),
    ],
)
def test_every_parameter_has_one_initialiser_one_role_one_optimizer(knobs):
    # torch.empty gives NaN: what nobody initialises shows
    torch.use_deterministic_algorithms(True)
    try:
        m = model(**knobs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(p.isfinite().all() for p in m.parameters())
    table = roles(m)
    assert table.keys() == set(m.parameters())
    assert set(table.values()) <= {"embed", "head", "proj", "matrix", "vector", "kernel", "lambda"}
    for row in OPTIMS:
        optimizers = build_optimizers(config(**knobs, optim=row), m)
        owned = [p for opt in optimizers for g in opt.param_groups for p in g["params"]]
        assert len(owned) == len(set(owned)) and set(owned) == set(m.parameters())
        for opt in optimizers:
            if isinstance(opt, Muon):
                assert {table[p] for g in opt.param_groups for p in g["params"]} <= {
                    "matrix",
                    "proj",
                }
            for g in opt.param_groups:  # vectors and kernels never decay
                assert not g["weight_decay"] or {table[p] for p in g["params"]} <= {
                    "matrix",
                    "proj",
                    "embed",
                    "head",
                }


@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("row", MIXERS)
def test_zero_init_makes_every_block_the_identity(row, mlp):
    m, idx = model(mixer=row, mlp=mlp), tokens()
    x = torch.randn(2, 16, 32)
    assert all(torch.equal(block(x), x) for block in m.blocks)
    # and the head starts at uniform predictions
    assert abs(m(idx, idx).item() - math.log(50)) < 1e-6
    other = model(mixer=row, mlp=mlp, zero_init=False)
    assert not any(torch.equal(block(x), x) for block in other.blocks)


def test_parameter_counts():
    def count(m):
        return sum(p.numel() for p in m.parameters())
    assert count(CausalSelfAttention(64, 9, n_head=4)) == 4 * 64**2
    assert count(CausalSelfAttention(64, 9, n_head=4, n_kv_head=2)) == 3 * 64**2
    N, P, d, hidden, G = 2, 4, 8, 6, 16
    m = AFNO(64, 9, num_blocks=N, poles=P, group_size=4, hidden_size_factor=1.5)
    kernel = 2 * N * P + 2 * N * (P * d + P * hidden + hidden * d + hidden + d) + G
    assert count(m.kernel) == kernel and count(m) == 4 * 64**2 + 4 * 3 * 64 + 64 + kernel
    with torch.device("meta"):
        cfg = config(
            model="d12",
            n_layer=0,
            n_head=0,
            n_embd=0,
            vocab_size=50257,
            sequence_length=1024,
            tie_embeddings=True,
            pad_vocab=False,
            pos="rope",
        )
        # GPT-2 small without biases, gains and positions
        assert count(GPT(cfg)) == 123_532_032


def test_roles_of_the_parts():
    m = model(**ALL_ON, pos="learned")
    table = {name: roles(m)[p] for name, p in m.named_parameters()}
    # never Muon, never decayed
    assert {role for name, role in table.items() if ".kernel." in name} == {"kernel"}
    assert {role for name, role in table.items() if name.endswith("proj.weight")} == {"proj"}
    assert (
        table["wte.weight"] == table["positions.weight"] == "embed"
        and table["head.weight"] == "head"
    )
    for name in ("blocks.0.mixer.D", "blocks.0.mixer.short_conv.weight"):
        assert table[name] == "vector"
    for name in ("v_lambda", "x0_lambda", "skip_lambda"):
        assert table[name] == "lambda"
    assert {table[f"blocks.1.mixer.{w}.weight"] for w in "qkv"} | {
        table["blocks.1.mlp.fc.weight"]
    } == {"matrix"}


class Valueless(nn.Module):
    """A mixer without values."""
    def __init__(self, dim, seq_len):
        super().__init__()
        self.proj = nn.Linear(dim, dim, bias=False)


def test_a_value_residual_says_who_has_no_values_or_other_widths(monkeypatch):
    monkeypatch.setitem(MIXERS, "valueless", (Valueless, {}))
    with pytest.raises(ValueError, match="--value_residual: valueless has no values .* --mixer"):
        model(mixer="attn,valueless", value_residual=True)
    with pytest.raises(ValueError, match="differ: 8 in attn, 32 in afno: leave out --n_kv_head"):
        model(mixer="attn,afno", n_kv_head=1, value_residual=True)
    for row, (cls, _) in MIXERS.items():
        if hasattr(cls, "value"):
            model(mixer=row, value_residual=True)
    model(mixer="attn,diff_v2", n_kv_head=2, value_residual=True)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_part_without_entries_is_named(monkeypatch):
    monkeypatch.setitem(MIXERS, "empty", (lambda dim, seq_len: nn.Linear(dim, 0), {}))
    with pytest.raises(ValueError, match="blocks.0.mixer.weight would have no entries"):
        model(mixer="empty")


def test_tied_head_is_the_embedding():
    m = model(tie_embeddings=True)
    assert m.head.weight is m.wte.weight and roles(m)[m.head.weight] == "embed"
    free = model(tie_embeddings=False)
    assert free.head.weight is not free.wte.weight and roles(free)[free.head.weight] == "head"


def test_padding_the_vocabulary_changes_nothing():
    bare, padded, idx = awake(model(pad_vocab=False)), awake(model()), tokens()
    assert padded.wte.weight.shape == (128, 32) and bare.wte.weight.shape == (50, 32)
    with torch.no_grad():
        for p, q in zip(padded.parameters(), bare.parameters()):
            p[:len(q)] = q
        padded.head.weight[50:] = 1e3                       # would win every softmax
    assert torch.allclose(padded(idx), bare(idx), atol=1e-5) and padded(idx).shape == (2, 16, 50)
    losses = [m(idx, idx.roll(1, 1)) for m in (padded, bare)]
    assert torch.allclose(*losses)
    losses[0].backward()
    assert not padded.head.weight.grad[50:].any() and padded.head.weight.grad[:50].any()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("row", MIXERS)
def test_loss_is_the_cross_entropy_of_the_logits(row, softcap):
    m, idx = awake(model(mixer=row, logit_softcap=softcap)), tokens()
    loss = F.cross_entropy(m(idx).flatten(0, 1), idx.roll(1, 1).flatten())
    assert torch.allclose(m(idx, idx.roll(1, 1)), loss) and m(idx).abs().max() < (softcap or 1e9)


# ---------------------------------------------------------------- switches, precision

# the same weights, wherever a model has them
def output(**knobs):
    m = awake(model(**knobs))
    m.load_state_dict(awake(model()).state_dict(), strict=False)
    return m(tokens())


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_switch_changes_the_output(switch):
    assert apart(output(**switch), output()) > 1e-3


def test_every_afno_knob_changes_the_output():
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    for knob in (dict(sparsity_threshold=0.3), dict(hard_thresholding_fraction=0.5), dict(taps=3)):
        assert apart(small_afno(**knob)(x), small_afno()(x)) > 1e-3


@pytest.mark.parametrize(
    "knobs", [*({"mixer": row} for row in MIXERS), dict(mixer="afno", afno_backend="fft"), ALL_ON]
)
def test_bfloat16_autocast_is_finite_and_near(knobs):
    m, idx = awake(model(**knobs)), tokens()
    exact = m(idx, idx.roll(1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = m(idx, idx.roll(1, 1))
    loss.backward()
    assert abs(loss - exact) < 0.05 * exact and loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize("knobs", [dict(mixer="afno"), dict(mixer="gdn", gdn_chunk=5)])
# as main() has it
@torch._functorch.config.patch(backward_pass_autocast="off")
def test_compiled_backward_of_fp32_islands_stays_fp32(knobs):
    m, idx, grads = awake(model(**knobs)), tokens(), []
    for forward in (m, torch.compile(m, backend="aot_eager", fullgraph=True)):
        m.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(idx, idx.roll(1, 1))
        loss.backward()
        grads.append([p.grad.clone() for p in m.parameters()])
    assert max(apart(a, b) for a, b in zip(*grads)) < 1e-4


def test_the_gate_multiplies_what_attention_gives():
    gated = awake(GatedAttention(32, 16, n_head=4))
    plain = CausalSelfAttention(32, 16, n_head=4)
    plain.load_state_dict(gated.state_dict(), strict=False)
    plain.proj = gated.proj = nn.Identity()
    x = torch.randn(2, 16, 32)
    assert apart(gated(x), gated.gate(x) * plain(x)) < 1e-6


def test_block_adds_its_parts():
    class One(nn.Module):
        def forward(self, x, v1=None):
            return torch.ones_like(x)
    block, x = Block(config(branch_scale=True), 0), torch.randn(2, 5, 32)
    block.mixer = block.mlp = One()
    # 1 / sqrt(2 * 2 layers), and the MLP's branch as it is
    assert torch.allclose(block(x), x + 0.5 + 1.0)


@pytest.mark.parametrize("row", MIXERS)
def test_the_contract_of_a_mixer(row):
    m, x = awake(model(mixer=row)).blocks[0].mixer, torch.randn(3, 5, 32)
    assert (
        hasattr(m, "step") == hasattr(m, "init_state")
        and isinstance(m.proj, nn.Linear)
        and m.flops(16) > 0
    )
    assert type(m).__doc__ and m(x).shape == x.shape
    # v1 is added to the values: their negative silences all
    if hasattr(m, "value"):
        m, x = m.double(), x.double()
        assert m(x, -m.value(x)).abs().max() < 1e-5 and m(x).abs().max() > 0.1
