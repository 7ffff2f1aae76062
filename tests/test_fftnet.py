"""The causal FFTNet: both spectra against recurrences and sums, decoding, precision."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from kernels import fft_conv, toeplitz_conv
from fftnet import (
    CHUNK,
    FFTNet,
    FilterBank,
    modrelu,
    rotate,
    running_spectrum,
    running_spectrum_naive,
)
from parts import CoLA, running_mean
from tests.checks import C as WIDTH
from tests.checks import apart, awake, batch, jacobian, prefix
from train_gpt2 import GPT, Config, roles

CASES = [dict(), dict(modes=3), dict(filter="bank"), dict(filter="bank", modes=2)]
# -g: a token forgets 5%, or all but 2e-9
MILD, STRONG = 0.05, 20.0


def inputs(T, decay=MILD, dtype=torch.float64, B=2, H=3, M=4, d=5):
    """a, k, v, g, theta that need gradients; g in [-1.5, -0.5] * decay."""
    torch.manual_seed(T)
    x = [torch.randn(B, T, H, 2 * M), torch.randn(B, T, H, 2 * M), torch.randn(B, T, H, d),
         -decay * (0.5 + torch.rand(B, T, H)), math.pi * torch.rand(H, M)]
    return [u.to(dtype).requires_grad_() for u in x]


def with_gradients(rule, x, *more, **knobs):
    """The output and the gradient of a fixed random function of it by each input, by name."""
    y, weights = rule(*x, *more, **knobs), torch.Generator().manual_seed(0)
    y = y[0] if isinstance(y, tuple) else y
    dy = torch.randn(y.shape, generator=weights, dtype=torch.float64).to(y.dtype)
    return dict(enumerate((y, *torch.autograd.grad(y, x, dy))))


def same(a, b, allowed):
    for i in b:
        assert a[i].shape == b[i].shape and (a[i] - b[i]).abs().max() <= allowed * (
            1 + b[i].abs().max()
        ), i


def layer(dim=16, seq_len=150, n_head=4, **knobs):
    torch.manual_seed(0)
    return awake(FFTNet(dim, seq_len, n_head=n_head, **knobs)).double()


def noise(B=2, T=150, dim=16):
    return torch.randn(B, T, dim, dtype=torch.float64)


# ---------------------------------------------------------------- the running spectrum

@pytest.mark.parametrize("decay", [MILD, STRONG])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 150])
def test_chunks_equal_the_recurrence_in_values_and_gradients(T, decay):
    x = inputs(T, decay)
    same(with_gradients(running_spectrum, x), with_gradients(running_spectrum_naive, x), 1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 16, 100, 1000])
def test_any_chunk_gives_the_same(chunk):
    x = inputs(70)
    same(
        with_gradients(running_spectrum, x, chunk=chunk),
        with_gradients(running_spectrum_naive, x),
        1e-12,
    )


@pytest.mark.parametrize("rule", [running_spectrum, running_spectrum_naive])
def test_the_equation(rule):
    """The sum over the past: Re sum_s sum_m a_t conj(k_s) e^{i theta (t - s)} e^{g_{s+1} + ... +
    g_t} v_s."""
    x = a, k, v, g, theta = [u.detach() for u in inputs(5, B=1, H=1)]
    y = rule(*x)
    y = (y[0] if isinstance(y, tuple) else y)[0, :, 0]
    a, k = (torch.complex(u[0, :, 0, :4], u[0, :, 0, 4:]) for u in (a, k))
    for t in range(5):
        expected = sum((a[t] * k[s].conj() * torch.exp(1j * theta[0] * (t - s))).sum().real
                       * g[0, s + 1:t + 1, 0].sum().exp() * v[0, s, 0] for s in range(t + 1))
        assert torch.allclose(y[t], expected, rtol=1e-12, atol=1e-13)


def test_a_spectrum_is_one():
    """With constant keys and no decay, mode m holds the DFT of the past at theta_m, in the present
    token's frame."""
    a, k, v, g, _ = [u.detach() for u in inputs(64, B=1, H=1, M=33)]
    theta = torch.linspace(0, math.pi, 33, dtype=torch.float64)[None]
    ones = torch.cat((torch.ones(33), torch.zeros(33))).double().expand_as(a)
    y = running_spectrum(a, ones, v, 0 * g, theta)[0]
    Z = torch.fft.rfft(v[0, :, 0], dim=0) * torch.exp(1j * theta.T * 63)
    expected = (torch.complex(*a[0, -1, 0].chunk(2))[:, None] * Z).sum(0).real
    assert torch.allclose(y[0, -1, 0], expected, rtol=1e-10)


@pytest.mark.parametrize("g", [0.0, -30.0, -1e4])
def test_extreme_gates_stay_finite(g):
    x = inputs(130, dtype=torch.float32)
    x[3] = torch.full_like(x[3], g).requires_grad_()
    result = with_gradients(running_spectrum, x)
    assert all(u.isfinite().all() for u in result.values())
    # theta's gradient: a sum that cancels to 0
    same(result, with_gradients(running_spectrum_naive, x), 1e-3)


def test_angles_stay_exact_in_a_long_context():
    x = [u.detach() for u in inputs(6000, decay=1e-3, B=1, H=2, M=2, d=1)]
    exact, _ = running_spectrum_naive(*x)
    assert apart(running_spectrum(*(u.float() for u in x))[0].double(), exact) < 2e-5


def test_the_rule_is_an_island_of_single_precision():
    a, k, v, g, theta = (u.detach() for u in inputs(70, dtype=torch.float32))
    exact, _ = running_spectrum_naive(*(u.double() for u in (a, k, v.bfloat16(), g, theta)))
    with torch.autocast("cpu", torch.bfloat16):
        y = running_spectrum(a, k, v.bfloat16(), g, theta)[0]
    assert y.dtype == torch.bfloat16 and apart(y.double(), exact) < 1e-2


def test_the_future_does_not_move_a_bit():
    x = [u.detach() for u in inputs(150, dtype=torch.float32)]
    y = running_spectrum(*x)[0]
    for cut in (1, 63, 64, 100, 149):
        other = [torch.cat((u[:, :cut], 1e3 * torch.randn_like(u[:, cut:]).abs() * sign), 1)
                 for u, sign in zip(x, (1, 1, 1, -1))]
        assert torch.equal(running_spectrum(*other, x[4])[0][:, :cut], y[:, :cut])


# ---------------- the filter bank, the filter, its context

def filter_bank_naive(a, v, h):
    """FilterBank's numbers by two loops, in complex numbers: a (B, T, H, 2M), v (B, T, H, d), h (H,
    2M, T) -> v's."""
    a, h = torch.complex(*a.chunk(2, dim=-1)), torch.complex(*h.chunk(2, dim=1))
    return torch.stack(
        [
            sum(
                (a[:, t] * h[..., t - s].conj()).sum(-1).real[..., None] * v[:, s]
                for s in range(t + 1)
            )
            for t in range(v.size(1))
        ],
        dim=1,
    )


@pytest.mark.parametrize("conv", [fft_conv, toeplitz_conv])
@pytest.mark.parametrize("T", [1, 7, 40])
def test_the_bank_equals_two_loops_in_values_and_gradients(T, conv):
    a, _, v, *_ = inputs(T)
    m = awake(FilterBank(15, 40, 3, 4, nn.Linear)).double()
    m.conv, kernel = conv, list(m.kernel.parameters())
    def loops(a, v, *kernel):
        return filter_bank_naive(a, v, m.kernel().unflatten(0, (3, 8)))
    same(with_gradients(lambda a, v, *kernel: m(a, v, None), [a, v, *kernel]),
         with_gradients(loops, [a, v, *kernel]), 1e-11)


def test_the_backend_of_the_bank_follows_the_length():
    assert FilterBank(8, 2048, 2, 2, nn.Linear).conv is toeplitz_conv
    assert FilterBank(8, 2049, 2, 2, nn.Linear).conv is fft_conv


def test_modrelu():
    z, b = noise(2, 9, 12), torch.linspace(-1.5, 0.5, 6).double()
    c = torch.complex(*z.chunk(2, -1))
    expected = F.relu(c.abs() + b) * torch.exp(1j * c.angle())
    assert (
        apart(
            torch.view_as_real(torch.complex(*modrelu(z, b).chunk(2, -1))),
            torch.view_as_real(expected),
        )
        < 1e-4
    )
    # a threshold, and an exact one
    assert 10 < (modrelu(z, b) == 0).sum() < z.numel() // 2
    zero = torch.zeros(12).requires_grad_()
    modrelu(zero, b).sum().backward()
    assert zero.grad.isfinite().all()


def test_rotate_multiplies_complex_numbers():
    z, angle = noise(2, 9, 12), torch.linspace(-9, 9, 6).double()
    expected = torch.complex(*z.chunk(2, -1)) * torch.exp(1j * angle)
    assert apart(rotate(z, angle), torch.cat((expected.real, expected.imag), -1)) < 1e-14


def test_the_mean_is_of_the_past():
    x = noise()
    mean = running_mean(x)
    for t in range(150):
        assert apart(mean[:, t], x[:, :t + 1].mean(1)) < 1e-12
    assert all(torch.equal(running_mean(x[:, :t]), mean[:, :t]) for t in (1, 2, 64, 149))
    # bf16 would stop counting at 256
    assert running_mean(torch.ones(1, 4000, 1).bfloat16()).eq(1).all()


@pytest.mark.parametrize("filter", ["running", "bank"])
def test_the_context_reaches_the_filter_and_only_forwards(filter):
    """A token that is silent in every stream still moves later outputs by the mean, and no earlier
    one."""
    m, x = layer(filter=filter), noise()
    with torch.no_grad():
        for p in (m.q.weight, m.v.weight, m.gate.weight, getattr(m.spectrum, "k", m.q).weight):
            p[:, 0] = 0                                     # channel 0 is read by the context only
        if filter == "running":
            m.spectrum.forget.weight[:, 0] = 0
    other = x.clone()
    other[:, 20, 0] += 5
    moved = (m(x) - m(other)).abs().amax((0, 2))
    assert moved[:20].max() == 0 and moved[20:].min() > 1e-6


# ---------------------------------------------------------------- the layer

@pytest.mark.parametrize("knobs", CASES, ids=str)
def test_strictly_causal_and_one_row_at_a_time(knobs):
    m = layer(WIDTH, 151, **knobs)
    for check in (prefix, jacobian, batch):
        measured, allowed = check(m)
        assert measured <= allowed, check


def copied(u):
    return u.clone() if isinstance(u, torch.Tensor) else u


@pytest.mark.parametrize("knobs", CASES, ids=str)
def test_step_equals_forward_in_values_and_gradients(knobs):
    """Decoding uses other code, loops and direct sums: with it, all of the layer is computed
    twice."""
    m, x = layer(**knobs), noise(2, 70).requires_grad_()
    v1 = torch.randn_like(m.value(x))
    def decode(x):
        state, columns = m.init_state(2), []
        for t in range(70):
            # A step writes into its state, which backward still needs.
            y, state = m.step(x[:, t], tree_map(copied, state), v1[:, t])
            columns.append(y)
        return torch.stack(columns, 1)
    P = list(m.parameters())
    same(
        with_gradients(lambda x, *P: decode(x), [x, *P]),
        with_gradients(lambda x, *P: m(x, v1), [x, *P]),
        1e-10,
    )


@pytest.mark.parametrize("knobs", CASES, ids=str)
def test_a_value_residual_is_added_to_the_projected_values(knobs):
    m, x, v1 = layer(**knobs), noise(2, 9), noise(2, 9)
    y = m(x, v1)
    assert not torch.allclose(m(x), y) and m(x, -m.value(x)).abs().max() == 0
    m.v.register_forward_hook(lambda module, inputs, v: v + v1)
    assert torch.equal(m(x), y)


def test_parameters_by_hand():
    def count(m):
        return sum(p.numel() for p in m.parameters())
    # q, k, v, gate, proj; forget; context; convolutions
    dim, H = 512, 8
    # theta, bias; base, threshold: M = 32 a head
    running = FFTNet(dim, 64, n_head=H)
    assert (
        count(running)
        == 5 * dim**2 + H * dim + 2 * 64 * dim + 4 * 4 * dim + H * 32 + H + 3 * H * 32
    )
    assert count(FFTNet(dim, 64, n_head=H, hidden=100)) == count(running) + (100 - 64) * 2 * dim
    few = FFTNet(dim, 64, n_head=H, modes=4)
    assert count(few) == (
        3 * dim**2
        + 2 * 64 * dim
        + H * dim
        + 64 * (dim + 64)
        + 4 * (2 * dim + 2 * 64)
        + H * 4
        + H
        + 3 * H * 4
    )
    # 4 anchors a head: 8 kernels from 16 poles, 16 hidden
    bank = FFTNet(dim, 64, n_head=H, filter="bank")
    kernel = H * (2 * 16 + 2 * 16 * 8 + 2 * 16 * 16 + 2 * 16 * 8 + 2 * 16 + 2 * 8) + 64
    assert (
        count(bank)
        == 3 * dim**2 + 64 * dim + 64 * (dim + 64) + 4 * (2 * dim + 64) + 3 * H * 4 + kernel
    )


@pytest.mark.parametrize("filter", ["running", "bank"])
def test_what_muon_must_not_meet(filter):
    m = FFTNet(64, 100, n_head=4, filter=filter)
    m.head = None                                           # roles() asks a GPT for it
    table = roles(m)
    for name, p in m.named_parameters():
        kernel = name.startswith("spectrum.kernel") or name in ("spectrum.theta", "spectrum.bias")
        vector = "conv" in name or name in ("base", "threshold")
        assert table[p] == ("kernel" if kernel else "vector" if vector else "matrix"), name


def test_how_it_starts():
    """The DFT's frequencies, windows from 2 tokens to the sequence, and the paper's base filter and
    modReLU bias."""
    m = FFTNet(64, 512, n_head=4)
    assert torch.allclose(
        m.spectrum.theta, torch.fft.rfftfreq(14, 1 / (2 * math.pi)).expand(4, 8), atol=1e-6
    )
    assert torch.allclose(
        1 / F.softplus(m.spectrum.bias), torch.tensor([2.0, 12.7, 80.6, 512.0]), rtol=1e-2
    )
    assert torch.equal(torch.complex(*m.base.view(4, 16).chunk(2, -1)), torch.ones(4, 8) + 0j)
    assert m.threshold.unique().tolist() == pytest.approx([-0.1])


def test_cost_does_not_grow_with_the_context():
    m, T = FFTNet(64, 8192, n_head=2), 2 * CHUNK
    with FlopCounterMode(display=False) as counter:
        m(torch.randn(1, T, 64))
    weights = 2 * sum(
        p.numel()
        for name, p in m.named_parameters()
        if p.ndim == 2 and name.endswith("weight") and "conv" not in name
    )
    assert counter.get_total_flops() / T == weights + m.flops(T) and m.flops(T) == m.flops(8192)
    bank = FFTNet(64, 1024, n_head=2, filter="bank")
    assert bank.flops(1024) == 8 * 64 * (1024 + 128 + 2)


@pytest.mark.parametrize("knobs", CASES, ids=str)
def test_bf16_autocast_is_finite_and_near(knobs):
    m = layer(**knobs).float()
    x = noise().float()
    exact = m(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
        y.float().sum().backward()
    assert apart(y.float(), exact) < 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


def test_compiles_without_a_graph_break():
    m, x = layer().float(), noise(1, 70).float()
    assert apart(torch.compile(m, backend="aot_eager", fullgraph=True)(x), m(x)) < 1e-4


def test_the_factory_makes_the_large_projections():
    made = []
    def factory(d_in, d_out, bias=False):
        made.append((d_in, d_out, bias))
        return CoLA(d_in, d_out, bias)
    m = FFTNet(32, 20, n_head=4, linear=factory)
    assert made == 5 * [(32, 32, False)] and m(torch.randn(1, 3, 32)).shape == (1, 3, 32)


@pytest.mark.parametrize("knobs", [dict(n_head=3), dict(modes=-1), dict(filter="window")], ids=str)
def test_sizes_that_do_not_fit(knobs):
    with pytest.raises(ValueError, match="fftnet: .*running, bank.*--fftnet_filter"):
        layer(**knobs)


@pytest.mark.parametrize("filter", ["running", "bank"])
def test_the_model_of_the_recipe_is_causal_and_decodes(filter):
    cfg = Config(
        mixer="fftnet",
        fftnet_filter=filter,
        fftnet_hidden=48,
        mlp="gelu",
        norm="pre_post",
        pos="sinusoidal",
        embed_scale=True,
        embed_norm=False,
        logit_softcap=0.0,
        zero_init=False,
        dropout=0.1,
        n_layer=3,
        n_head=4,
        n_embd=32,
        sequence_length=70,
        vocab_size=50,
    )
    m, idx = awake(GPT(cfg)).eval(), torch.randint(50, (2, 70))
    state, columns = m.init_state(2), []
    for t in range(70):
        y, state = m.step(idx[:, t], state)
        columns.append(y)
    assert apart(torch.stack(columns, 1), m(idx)) < 1e-4
    for cut in (1, 23, 64, 69):                             # bit for bit: no FFT of the data
        other = torch.cat((idx[:, :cut], torch.randint(50, (2, 70 - cut))), 1)
        assert torch.equal(m(other)[:, :cut], m(idx)[:, :cut])
