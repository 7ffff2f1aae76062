"""FFTNet, made strictly causal: every token filters the spectrum of its own past, by a filter that it chooses itself.

The published mixer (Fein-Ashley, arXiv 2502.18394, later SPECTRE; jacobfa/fft, mrorigo/pytorch-fftnet) takes the FFT of
the whole window, multiplies it by base + MLP(mean of all tokens), applies modReLU and goes back. All three look ahead,
and padding mends none: no threshold on a whole sequence's spectrum is holomorphic, hence none is causal. Here

    c_t = (x_1 + ... + x_t) / t                                          context: a running mean
    a_t = modReLU(rms_norm(base + W_q x_t + MLP(c_t)))                   token t's filter, a complex number per mode
    y_t = W_o (rms_norm(Re sum_m a_t[m] Z_t[m]) * W_g x_t)               Z_t: its past, by mode; of one of two kinds
    running   Z_t[m] = e^{g_t + i theta_m} Z_{t-1}[m] + conj(k_t[m]) v_t       g_t = -softplus(W_f x_t + b) <= 0
    bank      Z_t[m] = (conj(h_m) (*) v)_t                                     long causal kernels from AFNO's generator

with a short causal convolution on W_q x, W_g x, v = W_v x and k = W_k x (then of rms 1). Kept: Fourier modes, the
filter base + MLP(mean), modReLU, subquadratic time. Changed: modReLU acts on the filter, the mean ends at t, a token
has its own filter and a gate. bank is the faithful form, a linear filter of the whole past, with M learned anchors of
one-sided support for the paper's frequency bins. running is O(T): its window forgets, theta starts at the DFT's grid,
and k_t chooses the modes a token is written into; k = 1 and g = 0 would be the paper's spectrum. It is matrix products
in chunks of C tokens: c_i = g_1 + ... + g_i, D_ij = e^{c_i - c_j} for i >= j, Q and K are a, k turned by e^{i theta i},

    O = (Q K^T * D) V + e^c Q Z,      Z' = e^{-i theta C} (e^{c_C} Z + (e^{c_C - c} K)^T V)

Letters: B batch, T time, C channels or tokens a chunk, H heads, d channels and M modes a head (2M real numbers, real
parts first), N chunks.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from afno import FourierKernel
from kernels import BACKENDS, BLOCK, toeplitz_conv
from parts import Linear, ShortConv, norm

CHUNK = 64                                                           # tokens that are worked on as one matrix product


def rotate(z, angle, dim=-1):                                        # complex numbers along dim, times e^{i angle}
    (re, im), cos, sin = z.chunk(2, dim), angle.cos(), angle.sin()
    return torch.cat((re * cos - im * sin, re * sin + im * cos), dim)


def modrelu(z, bias):                                                # relu(|z| + b) z / |z| (arXiv 1511.06464)
    size = (sum(part.square() for part in z.chunk(2, dim=-1)) + 1e-6).sqrt()         # |z| itself: NaN gradient at 0
    return z * (F.relu(size + bias) / size).tile(2)


def running_mean(x):                                                 # (B, T, C): of x_1 ... x_t, summed in fp32
    total = x.to(torch.promote_types(x.dtype, torch.float32)).cumsum(1)
    return (total / torch.arange(1, x.size(1) + 1, device=x.device)[:, None]).type_as(x)


def running_spectrum(a, k, v, g, theta, chunk=CHUNK):
    """The filtered running spectrum, chunkwise: a, k (B, T, H, 2M), v (B, T, H, d), g (B, T, H), theta (H, M) -> v's.

    g <= 0 is the log of the decay, theta is in radians a token. Works in fp32 (fp64 stays), also under autocast. Angles
    start anew in every chunk, so they stay small in any context.
    """
    T, C, dtype = v.size(1), min(chunk, v.size(1)), torch.promote_types(v.dtype, torch.float32)
    def chunks(x):                                                   # (B, T, H, w) -> (N, B, H, C, w)
        return F.pad(x.to(dtype), (0, 0, 0, 0, 0, -T % C)).unflatten(1, (-1, C)).permute(1, 0, 3, 2, 4)
    with torch.autocast(v.device.type, enabled=False):
        a, k, V, c, theta = chunks(a), chunks(k), chunks(v), chunks(g[..., None]).cumsum(-2), theta.to(dtype)
        angle = theta[:, None] * torch.arange(C, device=v.device)[:, None]                       # (H, C, M)
        Q, K, end = rotate(a, angle), rotate(k, angle), c[..., -1:, :]
        A = (Q @ K.mT * (c - c.mT).tril().exp()).tril()              # above the diagonal exp could overflow
        writes, turn = ((end - c).exp() * K).mT @ V, -C * theta[..., None]
        Z, before = torch.zeros_like(writes[0]), []
        for write, decay in zip(writes.unbind(), end.exp().unbind()):                # all that must wait for its past
            before.append(Z)
            Z = rotate(decay * Z + write, turn, -2)
        y = torch.cat((c.exp() * Q, A), dim=-1) @ torch.cat((torch.stack(before), V), dim=-2)
        return y.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T].type_as(v)


class RunningSpectrum(nn.Module):
    """a (B, T, H, 2M), v (B, T, H, d), x (B, T, C) -> (B, T, H, d); step: the same without T. modes 0 means d / 2."""
    role = "kernel"                                                  # theta is no matrix: AdamW, no decay, own rate
    def __init__(self, dim, seq_len, n_head, modes, linear):
        super().__init__()
        self.n_head, self.d, self.modes = n_head, dim // n_head, modes or max(1, dim // n_head // 2)
        self.k, self.forget = linear(dim, 2 * n_head * self.modes), nn.Linear(dim, n_head, bias=False)
        self.short_conv = ShortConv(2 * n_head * self.modes)
        # The DFT's grid, as the paper's frequencies are; RoPE's would be log-spaced.
        self.theta = nn.Parameter(torch.linspace(0, math.pi, self.modes).repeat(n_head, 1))
        window = torch.logspace(math.log10(2), math.log10(max(2, seq_len)), n_head)  # tokens
        self.bias = nn.Parameter(torch.expm1(1 / window).log())      # softplus(bias) = 1 / window

    def flops(self, T):                                              # inside a chunk; reading and writing Z
        return 2 * self.n_head * (min(CHUNK, T) * (2 * self.modes + self.d) + 4 * self.modes * self.d)

    def writes(self, z, x):                                          # -> k (..., H, 2M), g (..., H)
        return norm(z.unflatten(-1, (self.n_head, -1))), -F.softplus(self.forget(x) + self.bias)

    def forward(self, a, v, x):
        k, g = self.writes(self.short_conv(self.k(x)), x)
        return running_spectrum(a, k, v, g, self.theta)

    def init_state(self, B):
        return self.short_conv.init_state(B), None

    def step(self, a, v, x, state):
        z, window = self.short_conv.step(self.k(x), state[0])
        k, g = self.writes(z, x)
        y, Z = running_spectrum_naive(*(u[:, None] for u in (a, k, v, g)), self.theta, state[1])
        return y[:, 0], (window, Z)


class FilterBank(nn.Module):
    """The same by 2M long convolutions, by GEMM or by FFT as in afno.py. modes 0 means 4. Decoding keeps all v."""
    def __init__(self, dim, seq_len, n_head, modes, linear):
        super().__init__()
        self.n_head, self.modes, self.past = n_head, modes or 4, (seq_len, n_head, dim // n_head)
        self.conv = BACKENDS["toeplitz" if seq_len <= 2048 else "fft"]
        self.kernel = FourierKernel(2 * n_head * self.modes, seq_len, num_blocks=n_head, poles=16, hidden=16,
                                    sparsity_threshold=0.01, kept_fraction=1.0)

    def flops(self, T):
        conv = T + BLOCK if self.conv is toeplitz_conv else 10 * math.log2(2 * T)
        return int(2 * self.modes * math.prod(self.past[1:]) * (conv + 2))

    def forward(self, a, v, x):
        h = self.kernel()[:, :v.size(1)].unflatten(0, (self.n_head, -1))             # (H, 2M, T)
        each = (w[..., None] * self.conv(v.flatten(2), taps).view_as(v) for w, taps in zip(a.unbind(-1), h.unbind(1)))
        return sum(each).type_as(v)

    def init_state(self, B):
        h = self.kernel().unflatten(0, (self.n_head, -1))
        return h.new_zeros(B, *self.past), h, 0

    def step(self, a, v, x, state):
        past, h, t = state
        past = past.index_copy(1, torch.tensor([t], device=v.device), v[:, None].type_as(past))
        own = torch.einsum("bhm,hmt->bth", a.type_as(h), h[..., :t + 1].flip(-1))    # this token's own kernel
        return (own[..., None] * past[:, :t + 1]).sum(1).type_as(v), (past, h, t + 1)


FILTERS = {"running": RunningSpectrum, "bank": FilterBank}


class FFTNet(nn.Module):
    """The causal FFTNet mixer, (B, T, C) -> (B, T, C) for any 1 <= T <= seq_len; equations at the top of the file.

    filter: a row of FILTERS; modes a head, 0: that row's own; hidden: of the MLP, 0: C / 8. ValueError if sizes misfit.
    """
    def __init__(self, dim, seq_len, *, n_head, filter="running", modes=0, hidden=0, linear=Linear):
        super().__init__()
        if dim % n_head or modes < 0 or filter not in FILTERS:
            raise ValueError(f"fftnet: {dim} channels in {n_head} heads, {modes} modes, filter {filter!r} (one of "
                             f"{', '.join(FILTERS)}): change --n_head, --fftnet_modes or --fftnet_filter")
        self.dim, self.n_head, self.spectrum = dim, n_head, FILTERS[filter](dim, seq_len, n_head, modes, linear)
        self.flops, M, inner = self.spectrum.flops, n_head * self.spectrum.modes, hidden or max(1, dim // 8)
        self.widths = (2 * M, dim, dim)
        self.q, self.v, self.gate, self.proj = (linear(dim, width) for width in (*self.widths, dim))
        self.short_conv = ShortConv(sum(self.widths))
        self.context = nn.Sequential(nn.Linear(dim, inner, bias=False), nn.GELU(), nn.Linear(inner, 2 * M, bias=False))
        self.base = nn.Parameter(torch.tensor([1.0, 0.0]).repeat_interleave(M // n_head).repeat(n_head))
        self.threshold = nn.Parameter(torch.full((M,), -0.1))        # both start as the paper's do

    def value(self, x):                                              # what a value residual hands on, (B, T, C)
        return self.v(x)

    def streams(self, x, v1=None):
        v = self.v(x)
        return torch.cat((self.q(x), v if v1 is None else v + v1, self.gate(x)), dim=-1)

    def split(self, z, mean):                                        # -> a (..., H, 2M), v (..., H, d), gate (..., C)
        q, v, gate = z.split(self.widths, dim=-1)
        a, v = (u.unflatten(-1, (self.n_head, -1)) for u in (q + self.context(mean) + self.base, v))
        return modrelu(norm(a), self.threshold.view(self.n_head, -1)), v, gate

    def out(self, y, gate):                                          # normalised: sums over the past have any size
        return self.proj(norm(y).flatten(-2).type_as(gate) * gate)

    def forward(self, x, v1=None):
        a, v, gate = self.split(self.short_conv(self.streams(x, v1)), running_mean(x))
        return self.out(self.spectrum(a, v, x), gate)

    def init_state(self, B):
        return self.short_conv.init_state(B), self.base.new_zeros(B, self.dim), 0, self.spectrum.init_state(B)

    def step(self, x, state, v1=None):                               # (B, C) -> (B, C)
        window, total, t, inner = state
        z, window = self.short_conv.step(self.streams(x, v1), window)
        total = total + x
        a, v, gate = self.split(z, (total / (t + 1)).type_as(x))
        y, inner = self.spectrum.step(a, v, x, inner)
        return self.out(y, gate), (window, total, t + 1, inner)


def running_spectrum_naive(a, k, v, g, theta, state=None):
    """running_spectrum's numbers by its recurrence, in complex numbers; also decodes: -> y, Z (B, H, M, d) complex."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    a, k = (torch.complex(*z.to(dtype).chunk(2, dim=-1)) for z in (a, k))
    turn, Z, y = torch.exp(1j * theta.to(dtype))[..., None], 0.0 if state is None else state, []
    for a_t, k_t, v_t, g_t in zip(*(z.unbind(1) for z in (a, k, v.to(dtype), g.to(dtype)))):
        Z = g_t.exp()[..., None, None] * turn * Z + k_t.conj()[..., None] * v_t[..., None, :]
        y.append((a_t[..., None] * Z).sum(-2).real)
    return torch.stack(y, dim=1).type_as(v), Z
