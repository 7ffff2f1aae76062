"""Causal convolutions over time: short and depthwise, or as long as the sequence, by FFT or by Toeplitz GEMMs.

Letters: B batch, T time, C channels, G kernels (each filters C/G channels), K columns of a GEMM.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class DepthwiseCausalConv(torch.autograd.Function):
    """y_t = sum_i w_i x_{t - i}: x (B, T, C), w (width, C), last row for lag 0. Half the passes of autograd's own."""
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        y = x * w[-1]
        for lag in range(1, min(len(w), x.size(1))):
            y[:, lag:].addcmul_(x[:, :-lag], w[-1 - lag])
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dx, dw = dy * w[-1], torch.zeros_like(w)
        dw[-1] = (dy * x).sum((0, 1))
        for lag in range(1, min(len(w), x.size(1))):
            dx[:, :-lag].addcmul_(dy[:, lag:], w[-1 - lag])
            dw[-1 - lag] = (dy[:, lag:] * x[:, :-lag]).sum((0, 1))
        return dx, dw


class ShortConv(nn.Module):
    """Depthwise causal convolution over the last `width` tokens, (B, T, C) -> (B, T, C). Starts near the identity.

    Cheap local mixing in front of a gate or of attention (H3, arXiv 2212.14052; Hyena, arXiv 2302.10866).
    """
    role = "vector"

    def __init__(self, dim, width=4):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(width, dim))
        with torch.no_grad():
            self.weight[-1] += 1.0

    def forward(self, x):
        return DepthwiseCausalConv.apply(x, self.weight.type_as(x))

    def init_state(self, B):
        return self.weight.new_zeros(B, self.weight.size(0) - 1, self.weight.size(1))

    def step(self, x, state):                               # (B, C) and the last inputs (B, width - 1, C)
        window = torch.cat((state, x[:, None]), dim=1)
        return (window * self.weight.type_as(x)).sum(1), window[:, 1:]


def fft_conv(u, h):
    """Causal convolution u (B, T, C), h (G, T) by FFT in fp32 (fp64 stays): O(T log T), causal up to rounding."""
    B, T, C = u.shape
    with torch.autocast(u.device.type, enabled=False):
        x = u.transpose(1, 2).unflatten(1, (h.size(0), -1)).to(torch.promote_types(u.dtype, torch.float32))
        H = torch.fft.rfft(h.to(x.dtype), n=2 * T)                   # 2T points: shorter ones wrap the future around
        y = torch.fft.irfft(torch.fft.rfft(x, n=2 * T) * H[:, None], n=2 * T)[..., :T]
        return y.flatten(1, 2).transpose(1, 2).type_as(u)


BLOCK = 128                                                          # rows of the Toeplitz matrix that are built


def toeplitz_rows(h, rows):
    """h (G, T) -> the last `rows` rows of its lower-triangular Toeplitz matrix M[i, j] = h[i - j], (G, rows, T).

    They hold every other block of rows, too: M[a:b, :b] is their lower right corner of that size.
    """
    return F.pad(h.flip(1), (0, rows - 1)).unfold(1, h.size(1), 1).flip(1)


def diagonal_sums(dR):
    """The transpose of toeplitz_rows: dR (G, rows, T) -> dh (G, T). Row after row shifts by one, and all are added."""
    G, rows, T = dR.shape
    shifted = F.pad(dR.flip(1), (0, rows)).flatten(1)[:, :rows * (T + rows - 1)].view(G, rows, T + rows - 1)
    return shifted.sum(1)[:, :T].flip(1)


class ToeplitzConv(torch.autograd.Function):
    """Causal convolution by GEMMs, u (G, T, K), h (G, T) -> (G, T, K) in u's dtype, one block of rows at a time.

    Bit-exactly causal: a block never reads past its own last row, and inside it the future meets zeros. Half the FLOPs
    of the dense T x T product, and G BLOCK T numbers of memory instead of G T^2; saves u and h only.
    """
    @staticmethod
    def forward(ctx, u, h):
        ctx.save_for_backward(u, h)
        T, L = h.size(1), min(BLOCK, h.size(1))
        R = toeplitz_rows(h, L)
        return torch.cat([R[:, max(0, L - b):, T - b:] @ u[:, :b] for b in block_ends(T, L)], dim=1)

    @staticmethod
    def backward(ctx, dy):
        u, h = ctx.saved_tensors
        T, L = h.size(1), min(BLOCK, h.size(1))
        columns = toeplitz_rows(h, L).flip(1, 2)                     # the first L columns of M, transposed
        dR = torch.zeros_like(columns, dtype=torch.promote_types(h.dtype, torch.float32))
        du = []
        for b in block_ends(T, L):
            a = max(0, b - L)
            dR[:, L - (b - a):, T - b:] += dy[:, a:b] @ u[:, :b].mT
            du.append(columns[:, :b - a, :T - a] @ dy[:, a:])
        return torch.cat(du, dim=1), diagonal_sums(dR).type_as(h)


def block_ends(T, L):                                                # the first block may be short, others have L rows
    return range((T - 1) % L + 1, T + 1, L)


def toeplitz_conv(u, h):                                             # (B, T, C), (G, T) -> (B, T, C)
    B, T, C = u.shape
    G = h.size(0)
    x = u.view(B, T, G, C // G).permute(2, 1, 0, 3).reshape(G, T, B * C // G)
    y = ToeplitzConv.apply(x, h.type_as(u))
    return y.view(G, T, B, C // G).permute(2, 1, 0, 3).reshape(B, T, C)


BACKENDS = {"fft": fft_conv, "toeplitz": toeplitz_conv}
