"""FFTNet, made strictly causal: every token filters the spectrum of its own past as it chooses.

The published mixer (Fein-Ashley, arXiv 2502.18394, later SPECTRE; jacobfa/fft,
mrorigo/pytorch-fftnet) takes the FFT of the whole window, multiplies it by base + MLP(mean of all
tokens), applies modReLU and goes back. All three look ahead, and padding mends none (afno.py). Here

    c_t = (x_1 + ... + x_t) / t                               context: a running mean
    a_t = modReLU(rms_norm(base + W_q x_t + MLP(c_t)))        token t's filter, complex, by mode
    y_t = W_o (rms_norm(Re sum_m a_t[m] Z_t[m]) * W_g x_t)    Z_t: its past, by mode, of two kinds

    running   Z_t[m] = e^{g_t + i theta_m} Z_{t-1}[m] + conj(k_t[m]) v_t
              g_t = -softplus(W_f x_t + b) <= 0
    bank      Z_t[m] = (conj(h_m) (*) v)_t                    long kernels from AFNO's generator

with a short causal convolution on W_q x, W_g x, v = W_v x and k = W_k x (then of rms 1).

Kept: Fourier modes, the filter base + MLP(mean), modReLU, subquadratic time. Changed: modReLU acts
on the filter, the mean ends at t, a token has its own filter and a gate. bank is the faithful form,
a linear filter of the whole past, with M learned anchors of one-sided support for the paper's
frequency bins. running is O(T): its window forgets, and k_t chooses the modes a token is written
into; k = 1 and g = 0 would be the paper's spectrum. It is matrix products in chunks of C tokens:
c_i = g_1 + ... + g_i, D_ij = e^{c_i - c_j} for i >= j, Q and K are a, k turned by e^{i theta i},

    O = (Q K^T * D) V + e^c Q Z
    Z' = e^{-i theta C} (e^{c_C} Z + (e^{c_C - c} K)^T V)

Letters: B batch, T time, C channels or tokens a chunk, H heads, d channels and M modes a head (2M
real numbers, real parts first), N chunks.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from afno import FourierKernel
from kernels import BACKENDS, BLOCK, toeplitz_conv
from parts import Linear, ShortConv, norm, running_mean

CHUNK = 64                                           # tokens that are one matrix product


def rotate(z: Tensor, angle: Tensor, dim: int = -1) -> Tensor:
    """Complex numbers along dim, times e^{i angle}."""
    re, im = z.chunk(2, dim)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((re * cos - im * sin, re * sin + im * cos), dim)


def modrelu(z: Tensor, bias: Tensor) -> Tensor:
    """relu(|z| + b) z / |z| (arXiv 1511.06464)."""
    # The root of |z|^2 alone has a NaN gradient at 0.
    size = (sum(part.square() for part in z.chunk(2, dim=-1)) + 1e-6).sqrt()
    return z * (F.relu(size + bias) / size).tile(2)


def running_spectrum(a: Tensor, k: Tensor, v: Tensor, g: Tensor, theta: Tensor,
                     chunk: int = CHUNK):
    """The filtered running spectrum, chunkwise, in v's shape; Z behind it, complex (B, H, M, d).

    a, k (B, T, H, 2M), v (B, T, H, d), g (B, T, H), theta (H, M). g <= 0 is the log of the decay,
    theta is in radians a token. Works in fp32 (fp64 stays), also under autocast. Angles start anew
    in every chunk, so they stay small in any context.
    """
    T = v.size(1)
    C = min(chunk, T)
    dtype = torch.promote_types(v.dtype, torch.float32)

    def chunks(x):                                   # (B, T, H, w) -> (N, B, H, C, w)
        x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, -T % C))
        return x.unflatten(1, (-1, C)).permute(1, 0, 3, 2, 4)

    with torch.autocast(v.device.type, enabled=False):
        a, k, V = map(chunks, (a, k, v))
        c = chunks(g[..., None]).cumsum(-2)
        theta = theta.to(dtype)
        angle = theta[:, None] * torch.arange(C, device=v.device)[:, None]     # (H, C, M)
        Q = rotate(a, angle)
        K = rotate(k, angle)
        end = c[..., -1:, :]
        # Above the diagonal exp could overflow, so it is cut before and after.
        A = (Q @ K.mT * (c - c.mT).tril().exp()).tril()
        writes = ((end - c).exp() * K).mT @ V
        turn = -C * theta[..., None]

        # All that must wait for its past: the spectrum before each chunk.
        Z = torch.zeros_like(writes[0])
        before = []
        for write, decay in zip(writes.unbind(), end.exp().unbind()):
            before.append(Z)
            Z = rotate(decay * Z + write, turn, -2)
        y = torch.cat((c.exp() * Q, A), dim=-1) @ torch.cat((torch.stack(before), V), dim=-2)
        # Z has been turned to where the next chunk begins: back to the last token.
        re, im = rotate(Z, (1 + -T % C) * theta[..., None], -2).chunk(2, dim=-2)
        y = y.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]
        return y.type_as(v), torch.complex(re, -im)


class RunningSpectrum(nn.Module):
    """a (B, T, H, 2M), v (B, T, H, d), x (B, T, C) -> y like v, the state; modes 0 means d / 2."""
    # theta is no matrix: AdamW, no decay, its own rate.
    role = "kernel"

    def __init__(self, dim: int, seq_len: int, n_head: int, modes: int, linear):
        super().__init__()
        self.n_head = n_head
        self.d = dim // n_head
        self.modes = modes or max(1, self.d // 2)
        self.k = linear(dim, 2 * n_head * self.modes)
        self.forget = nn.Linear(dim, n_head, bias=False)
        self.short_conv = ShortConv(2 * n_head * self.modes)
        # The DFT's grid, as the paper's frequencies are; RoPE's would be log-spaced.
        self.theta = nn.Parameter(torch.linspace(0, math.pi, self.modes).repeat(n_head, 1))
        window = torch.logspace(math.log10(2), math.log10(max(2, seq_len)), n_head)   # tokens
        # softplus(bias) = 1 / window
        self.bias = nn.Parameter(torch.expm1(1 / window).log())

    def flops(self, T: int) -> int:
        """Forward FLOPs a token: inside a chunk, and reading and writing Z."""
        in_chunk = min(CHUNK, T) * (2 * self.modes + self.d)
        return 2 * self.n_head * (in_chunk + 4 * self.modes * self.d)

    def writes(self, z: Tensor, x: Tensor):
        """-> k (..., H, 2M), g (..., H); z is W_k x behind the convolution."""
        return norm(z.unflatten(-1, (self.n_head, -1))), -F.softplus(self.forget(x) + self.bias)

    def forward(self, a: Tensor, v: Tensor, x: Tensor):
        z = self.k(x)
        k, g = self.writes(self.short_conv(z), x)
        y, Z = running_spectrum(a, k, v, g, self.theta)
        return y, (self.short_conv.state_behind(z), Z)

    def init_state(self, B: int):
        return self.short_conv.init_state(B), None

    def step(self, a: Tensor, v: Tensor, x: Tensor, state):
        window, Z = state
        z, window = self.short_conv.step(self.k(x), window)
        k, g = self.writes(z, x)
        token = [u[:, None] for u in (a, k, v, g)]
        y, Z = running_spectrum_naive(*token, self.theta, Z)
        return y[:, 0], (window, Z)


class FilterBank(nn.Module):
    """The same by 2M long convolutions as in afno.py; modes 0 means 4. Decoding keeps all v."""
    def __init__(self, dim: int, seq_len: int, n_head: int, modes: int, linear):
        super().__init__()
        self.n_head = n_head
        self.modes = modes or 4
        self.seq_len = seq_len
        self.d = dim // n_head
        self.conv = BACKENDS["toeplitz" if seq_len <= 2048 else "fft"]
        self.kernel = FourierKernel(2 * n_head * self.modes, seq_len, num_blocks=n_head, poles=16,
                                    hidden=16, sparsity_threshold=0.01, kept_fraction=1.0)

    def flops(self, T: int) -> int:
        conv = T + BLOCK if self.conv is toeplitz_conv else 10 * math.log2(2 * T)
        return int(2 * self.modes * self.n_head * self.d * (conv + 2))

    def forward(self, a: Tensor, v: Tensor, x: Tensor):
        T = v.size(1)
        kernel = self.kernel().unflatten(0, (self.n_head, -1))         # (H, 2M, seq_len)
        y = 0
        for weight, taps in zip(a.unbind(-1), kernel[..., :T].unbind(1)):
            y = y + weight[..., None] * self.conv(v.flatten(2), taps).view_as(v)
        return y.type_as(v), (v.transpose(1, 2), kernel, T)

    def init_state(self, B: int):
        h = self.kernel().unflatten(0, (self.n_head, -1))
        return h.new_zeros(B, self.n_head, 0, self.d), h, 0

    def step(self, a: Tensor, v: Tensor, x: Tensor, state):
        past, h, t = state
        if past.size(2) == t:
            # Memory for all tokens there can be, written in place from here on.
            past = F.pad(past.type_as(h), (0, 0, 0, self.seq_len - t))
        past[:, :, t] = v
        # This token's own kernel, the newest tap last.
        taps = torch.einsum("bhm,hmt->bht", a.type_as(h), h[..., :t + 1]).flip(-1)
        return (taps[:, :, None] @ past[:, :, :t + 1])[:, :, 0].type_as(v), (past, h, t + 1)


FILTERS = {"running": RunningSpectrum, "bank": FilterBank}


class FFTNet(nn.Module):
    """The causal FFTNet mixer, (B, T, C) -> (B, T, C) for any 1 <= T <= seq_len; equations on top.

    filter: a row of FILTERS; modes a head, 0: that row's own; hidden: of the MLP, 0: C / 8.
    Raises ValueError where the sizes do not fit.
    """
    def __init__(self, dim: int, seq_len: int, *, n_head: int, filter: str = "running",
                 modes: int = 0, hidden: int = 0, linear=Linear):
        super().__init__()
        if dim % n_head or modes < 0 or filter not in FILTERS:
            raise ValueError(f"fftnet: {dim} channels in {n_head} heads, {modes} modes, filter "
                             f"{filter!r} (one of {', '.join(FILTERS)}): change --n_head or "
                             "--fftnet_filter")
        self.dim = dim
        self.n_head = n_head
        self.spectrum = FILTERS[filter](dim, seq_len, n_head, modes, linear)
        self.flops = self.spectrum.flops
        M = n_head * self.spectrum.modes                               # modes of all heads
        hidden = hidden or max(1, dim // 8)
        self.widths = (2 * M, dim, dim)                                # of q, v, gate
        self.q = linear(dim, 2 * M)
        self.v = linear(dim, dim)
        self.gate = linear(dim, dim)
        self.proj = linear(dim, dim)
        self.short_conv = ShortConv(sum(self.widths))
        self.context = nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.GELU(),
                                     nn.Linear(hidden, 2 * M, bias=False))
        # Both start as the paper's do: a filter of ones, a threshold of 0.1.
        ones = torch.tensor([1.0, 0.0]).repeat_interleave(M // n_head)
        self.base = nn.Parameter(ones.repeat(n_head))
        self.threshold = nn.Parameter(torch.full((M,), -0.1))

    def value(self, x: Tensor) -> Tensor:
        """The values a value residual hands to later layers, (B, T, C)."""
        return self.v(x)

    def streams(self, x: Tensor, v1: Tensor | None = None) -> Tensor:
        """(..., C) -> (..., q and v and gate side by side); v1 is added to the values."""
        v = self.v(x)
        if v1 is not None:
            v = v + v1
        return torch.cat((self.q(x), v, self.gate(x)), dim=-1)

    def split(self, z: Tensor, mean: Tensor):
        """-> a (..., H, 2M), v (..., H, d), gate (..., C); z is streams behind the convolution."""
        q, v, gate = z.split(self.widths, dim=-1)
        a = (q + self.context(mean) + self.base).unflatten(-1, (self.n_head, -1))
        v = v.unflatten(-1, (self.n_head, -1))
        return modrelu(norm(a), self.threshold.view(self.n_head, -1)), v, gate

    def out(self, y: Tensor, gate: Tensor) -> Tensor:
        """Normalised, since sums over the past have any size: (..., H, d), (..., C) -> (..., C)."""
        return self.proj(norm(y).flatten(-2).type_as(gate) * gate)

    def forward(self, x: Tensor, v1: Tensor | None = None) -> Tensor:
        return self.prefill(x, v1)[0]

    def prefill(self, x: Tensor, v1: Tensor | None = None):
        """A prompt: forward's output, and the state behind it."""
        T = x.size(1)
        z = self.streams(x, v1)
        mean = running_mean(x)
        a, v, gate = self.split(self.short_conv(z), mean)
        y, inner = self.spectrum(a, v, x)
        return self.out(y, gate), (self.short_conv.state_behind(z), T * mean[:, -1], T, inner)

    def init_state(self, B: int):
        total = self.base.new_zeros(B, self.dim)
        return self.short_conv.init_state(B), total, 0, self.spectrum.init_state(B)

    def step(self, x: Tensor, state, v1: Tensor | None = None):
        """One token, (B, C) and the state -> (B, C), the next state."""
        window, total, t, inner = state
        z, window = self.short_conv.step(self.streams(x, v1), window)
        total = total + x
        a, v, gate = self.split(z, (total / (t + 1)).type_as(x))
        y, inner = self.spectrum.step(a, v, x, inner)
        return self.out(y, gate), (window, total, t + 1, inner)


def running_spectrum_naive(a, k, v, g, theta, state=None):
    """running_spectrum's numbers by its recurrence, complex -> y, Z (B, H, M, d); also decodes."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    a = torch.complex(*a.to(dtype).chunk(2, dim=-1))
    k = torch.complex(*k.to(dtype).chunk(2, dim=-1))
    turn = torch.exp(1j * theta.to(dtype))[..., None]
    Z = 0.0 if state is None else state
    y = []
    tokens = zip(a.unbind(1), k.unbind(1), v.to(dtype).unbind(1), g.to(dtype).unbind(1))
    for a_t, k_t, v_t, g_t in tokens:
        Z = g_t.exp()[..., None, None] * turn * Z + k_t.conj()[..., None] * v_t[..., None, :]
        y.append((a_t[..., None] * Z).sum(-2).real)
    return torch.stack(y, dim=1).type_as(v), Z
