"""AFNO, made strictly causal: a gated long convolution whose kernel comes from an AFNO block.

The published AFNO (Guibas et al., arXiv 2111.13587; NVlabs/AFNO-transformer) runs a block-diagonal
complex MLP with ReLU and soft-shrinkage over the spectrum of the whole sequence. A non-linearity
on that spectrum is causal only if it is holomorphic, and no thresholding is, so with any padding
half of that operator looks ahead. Here the same block acts on the spectrum of the *kernel*, and
the causal part of what comes out filters the data:

    phi_p(w) = sqrt(1 - rho_p^2) / (1 - rho_p e^{i(theta_p - w)})     decaying oscillations
    H(w)     = shrink(W2 relu(W1 phi + b1) + b2 + R phi)              block-diagonal, complex
    h(t)     = 1[t >= 0] e^{-t / tau} irfft(H)(t)                     t < 0 is dropped
    y        = W_o (q * (h (*) u + D * u)),   u = norm(k) * norm(v)

where q, k, v are short causal convolutions of projections of x. The phi_p are the spectra of
decaying oscillations (poles), and to drop t < 0 makes H satisfy the Kramers-Kronig relations.

Kept from AFNO: Fourier operator, weights shared over frequencies, block-diagonal complex MLP,
soft-shrinkage, hard mode cut. With R = 0 the block is the published operator exactly.
Added by us: the linear path R phi inside the shrinkage, which is not published. Shrinkage itself
does not pay here (records/2026-11-24_small-questions); it is kept as a part of the operator.
Changed: the block reads frequency features instead of the data, and adaptivity enters by the
gates q, k, v.

Letters: B batch, T time, C channels, G kernels (each filters W = C/G channels), N blocks, d = G/N
kernels a block, P poles, F frequencies.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels import BACKENDS, NormedProduct, conv_flops
from parts import Linear, ShortConv, norm
from support.masked import can_mask, document_conv


class FourierKernel(nn.Module):
    """`groups` causal kernels of M = `taps` taps (0: seq_len) from an AFNO block: () -> (G, M).

    The frequency grid is fixed by seq_len, never by the current input: a kernel that depended on T
    would let a token feel how many tokens follow it.
    """
    # AdamW, no weight decay, own learning rate.
    role = "kernel"

    def __init__(self, groups: int, seq_len: int, num_blocks: int, poles: int, hidden: int,
                 sparsity_threshold: float, kept_fraction: float, taps: int = 0):
        super().__init__()
        d = groups // num_blocks
        self.seq_len = seq_len
        self.taps = min(taps or seq_len, seq_len)
        self.sparsity_threshold = sparsity_threshold
        self.kept_modes = max(1, int((seq_len + 1) * kept_fraction))

        # Time constants, in tokens, are log-spaced up to seq_len. Two poles share each of them:
        # one is a pure decay (theta = 0), the other oscillates. Of an odd number the last, a decay,
        # stays alone.
        tau = torch.logspace(0, math.log10(seq_len), (poles + 1) // 2 + 1)[1:]
        tau = tau.repeat_interleave(2)[:poles]
        jitter = 0.1 * torch.randn(num_blocks, poles)
        # rho = exp(-exp(log_decay)) stays inside the unit circle whatever the optimizer does.
        self.log_decay = nn.Parameter(-tau.log() + jitter)
        oscillates = torch.arange(poles) % 2
        self.theta = nn.Parameter(math.pi * torch.rand(num_blocks, poles) * oscillates)

        def complex_normal(fan_in, *shape):
            # Real and imaginary parts lie on the first dimension.
            return nn.Parameter(torch.randn(2, num_blocks, *shape) / math.sqrt(2 * fan_in))

        self.R = complex_normal(poles, poles, d)
        self.w1 = complex_normal(poles, poles, hidden)
        # A fan-in of 4 * hidden halves the start of the MLP against the linear path.
        self.w2 = complex_normal(4 * hidden, hidden, d)
        self.b1 = nn.Parameter(torch.zeros(2, num_blocks, hidden))
        self.b2 = nn.Parameter(torch.zeros(2, num_blocks, d))
        # The window's time constant is seq_len / exp(log_window) tokens.
        self.log_window = nn.Parameter(torch.linspace(-3, 1.5, groups))

    def poles(self) -> Tensor:
        """The features phi, (2, F, N, P), real parts first."""
        theta = self.theta
        omega = torch.linspace(0, math.pi, self.seq_len + 1, device=theta.device, dtype=theta.dtype)
        log_rho = -self.log_decay.exp()
        rho = log_rho.exp()
        angle = theta - omega[:, None, None]  # (F, N, P)

        # The denominator is 1 - rho e^{i angle}; to divide is to multiply by its conjugate.
        re = 1 - rho * angle.cos()
        im = -rho * angle.sin()
        gain = (-torch.expm1(2 * log_rho)).sqrt() / (re * re + im * im)
        return torch.stack((re * gain, -im * gain))

    def forward(self) -> Tensor:
        # An fp32 island: FFT, trigonometry and small sums lose too much in half precision.
        with torch.autocast(self.theta.device.type, enabled=False):
            phi = self.poles()
            hidden = F.relu(complex_matmul(phi, self.w1) + self.b1[:, None])
            linear_path = complex_matmul(phi, self.R)
            H = linear_path + complex_matmul(hidden, self.w2) + self.b2[:, None]
            H = F.softshrink(H, self.sparsity_threshold).flatten(2)  # (2, F, G)

            # The hard mode cut zeroes the high frequencies.
            cut = self.seq_len + 1 - self.kept_modes
            H = F.pad(H[:, :self.kept_modes], (0, 0, 0, cut))

            # Of the 2 seq_len points only t >= 0 is kept: that makes the kernel causal.
            h = torch.fft.irfft(torch.complex(H[0], H[1]), n=2 * self.seq_len, dim=0)
            h = h[:self.seq_len]
            t = torch.arange(self.seq_len, device=h.device, dtype=h.dtype)[:, None] / self.seq_len
            window = torch.exp(-t * self.log_window.exp())
            return (h * window)[:self.taps].T.contiguous()  # (G, M)


def complex_matmul(z: Tensor, w: Tensor) -> Tensor:
    """Block-diagonal complex product in reals: z (2, F, N, i), w (2, N, i, o) -> (2, F, N, o)."""
    re, im = w
    from_re = torch.stack((re, im))
    from_im = torch.stack((-im, re))
    w = torch.stack((from_re, from_im))  # (2 in, 2 out, N, i, o)
    return torch.einsum("afni,abnio->bfno", z, w)


class AFNO(nn.Module):
    """The causal AFNO mixer, (B, T, C) -> (B, T, C) for any 1 <= T <= seq_len.

    The equations are at the top of the file. group_size 0 means 16 channels a kernel, num_blocks 0
    means 8 blocks, or the largest divisors below that fit; taps 0 means seq_len. Decoding keeps
    the last M u, at most half the memory of a KV cache, and reads them once a token: 2 M C FLOPs.
    age (B, T), in a step (B,): how many tokens of its own document a token has before it; it then
    mixes no others. Raises ValueError where the sizes do not divide or the backend is unknown.
    """
    def __init__(self, dim: int, seq_len: int, *, num_blocks: int = 0,
                 sparsity_threshold: float = 0.01, hard_thresholding_fraction: float = 1.0,
                 hidden_size_factor: float = 1.0, poles: int = 16, group_size: int = 0,
                 taps: int = 0, backend: str = "auto", linear: type[nn.Module] = Linear):
        super().__init__()
        group_size = group_size or math.gcd(16, dim)
        num_blocks = num_blocks or math.gcd(8, dim // group_size)
        if dim % (group_size * num_blocks):
            raise ValueError(
                f"afno: {dim} channels do not split into {num_blocks} blocks of kernels of "
                f"{group_size} channels: change --afno_num_blocks or --afno_group_size")
        if backend not in BACKENDS:
            raise ValueError(f"afno: no backend {backend!r}: choose from {', '.join(BACKENDS)}")
        self.dim = dim
        self.seq_len = seq_len
        self.conv = BACKENDS[backend]

        self.q = linear(dim, dim)
        self.k = linear(dim, dim)
        self.v = linear(dim, dim)
        self.short_conv = ShortConv(3 * dim)
        self.kernel = FourierKernel(dim // group_size, seq_len, num_blocks, poles,
                                    hidden=int(poles * hidden_size_factor),
                                    sparsity_threshold=sparsity_threshold,
                                    kept_fraction=hard_thresholding_fraction,
                                    taps=taps)
        self.masks_documents = can_mask(self.conv, self.kernel.taps)
        self.D = nn.Parameter(torch.ones(dim))
        self.proj = linear(dim, dim)

    def flops(self, T: int) -> int:
        """Forward FLOPs a token besides the weight matrices: of the convolution of T tokens.

        Where backend auto chooses: on the device of the weights; for "meta" a GPU's.
        """
        taps = min(self.kernel.taps, T)
        return int(conv_flops(self.conv, self.D.device.type, T, taps) * self.dim)

    def qkv(self, x: Tensor, v1: Tensor | None = None) -> Tensor:
        """q, k and v side by side, (..., 3 C); v1 is added to the values."""
        z = self.q.fused(x, (self.q, self.k, self.v))
        if v1 is None:
            return z
        qk, v = z.split((2 * self.dim, self.dim), dim=-1)
        return torch.cat((qk, v + v1), dim=-1)

    def value(self, x: Tensor) -> Tensor:
        """The values a value residual hands to later layers, (B, T, C)."""
        return self.v(x)

    def gate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., 3 C) -> the gate q and the convolution's input u, both (..., C)."""
        q, k, v = z.chunk(3, dim=-1)
        # Normalised, as a product of raw streams can explode.
        return q, NormedProduct.apply(k, v, 1e-6)

    def forward(self, x: Tensor, v1: Tensor | None = None, age: Tensor | None = None) -> Tensor:
        q, u = self.gate(self.short_conv(self.qkv(x), v1, age))
        return self.out(q, u, self.kernel(), age)

    def out(self, q: Tensor, u: Tensor, h: Tensor, age: Tensor | None) -> Tensor:
        """The gate and the convolution's input, (B, T, C), the kernel (G, M) -> (B, T, C)."""
        h = h[:, :u.size(1)]
        y = self.conv(u, h) if age is None else document_conv(u, h, age)
        return self.proj(q * torch.addcmul(y, self.D.type_as(u), u))

    def init_state(self, B: int) -> tuple:
        """The state before the first token: short window, the last M u, kernel, token count.

        u of token t is in place t mod M, (B, G, M, W), and a step writes it there: its old state is
        used up. The kernel's first tap is its last, as it meets the newest u.
        """
        taps = self.kernel().flip(1)
        past = taps.new_zeros(B, *taps.shape, self.dim // len(taps))
        return self.short_conv.init_state(B), past, taps, 0

    def prefill(self, x: Tensor, v1: Tensor | None = None, age: Tensor | None = None):
        """A prompt: forward's output, and the state behind it."""
        T = x.size(1)
        z = self.qkv(x, v1)
        q, u = self.gate(self.short_conv(z, age=age))
        _, past, taps, _ = self.init_state(len(x))
        M = taps.size(1)
        last = torch.arange(max(0, T - M), T, device=x.device)
        newest = u[:, last].unflatten(2, (len(taps), -1)).type_as(past)
        past[:, :, last % M] = newest.transpose(1, 2)
        return self.out(q, u, taps.flip(1), age), (self.short_conv.state_behind(z), past, taps, T)

    def step(self, x: Tensor, state: tuple, v1: Tensor | None = None, age: Tensor | None = None):
        """One token, (B, C) -> (B, C), and the next state."""
        window, past, taps, t = state
        z, window = self.short_conv.step(self.qkv(x, v1), window, age)
        q, u = self.gate(z)
        place = t % taps.size(1)
        past[:, :, place] = u.unflatten(1, (len(taps), -1))
        # The newest u meets the last tap.
        by_place = taps.roll(place + 1, 1)[:, None, :t + 1]  # (G, 1, min(t + 1, M))
        if age is not None:
            lags = (place - torch.arange(by_place.size(2), device=x.device)) % taps.size(1)
            by_place = torch.where(age[:, None, None, None] >= lags, by_place, 0)
        y = by_place @ past[:, :, :t + 1]  # (B, G, 1, W)
        y = y.flatten(1).type_as(u) + self.D * u
        return self.proj(q * y), (window, past, taps, t + 1)


def afno_naive(m: AFNO, x: Tensor) -> Tensor:
    """The same numbers by loops and an explicit complex DFT, for tests: (B, T, C) -> (B, T, C)."""
    kernel = m.kernel
    n = kernel.seq_len
    _, T, C = x.shape
    weights = kernel.w1, kernel.w2, kernel.b1, kernel.b2, kernel.R
    w1, w2, b1, b2, R = (torch.complex(re, im) for re, im in weights)
    rho = torch.exp(-kernel.log_decay.exp())

    H = []
    for f in range(n + 1):
        omega = math.pi * f / n
        pole = rho * torch.exp(1j * (kernel.theta - omega))
        phi = (1 - rho**2).sqrt() / (1 - pole)  # (N, P)
        z = torch.einsum("np,nph->nh", phi, w1) + b1
        hidden = torch.complex(z.real.relu(), z.imag.relu())
        z = torch.einsum("nh,nhd->nd", hidden, w2) + b2
        z = z + torch.einsum("np,npd->nd", phi, R)
        re = F.softshrink(z.real, kernel.sparsity_threshold)
        im = F.softshrink(z.imag, kernel.sparsity_threshold)
        H.append(torch.complex(re, im).flatten() * (f < kernel.kept_modes))

    # The inverse real DFT, one t >= 0 at a time.
    taps = []
    for t in range(T):
        h = H[0].real + H[n].real * (-1)**t
        for f in range(1, n):
            angle = math.pi * f * t / n
            h = h + 2 * (H[f] * complex(math.cos(angle), math.sin(angle))).real
        # One tap a kernel becomes one a channel.
        h = h / (2 * n) * torch.exp(-t / n * kernel.log_window.exp()) * (t < kernel.taps)
        taps.append(h.repeat_interleave(C // len(h)))

    z = F.linear(x, torch.cat((m.q.weight, m.k.weight, m.v.weight)))
    w = m.short_conv.weight
    z = F.pad(z, (0, 0, len(w) - 1, 0))
    q, k, v = sum(z[:, i:i + T] * w[i] for i in range(len(w))).chunk(3, dim=-1)
    u = norm(k) * norm(v)

    y = torch.stack([sum(taps[t - s] * u[:, s] for s in range(t + 1)) for t in range(T)], dim=1)
    return F.linear(q * (y + m.D * u), m.proj.weight)
