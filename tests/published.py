"""What was published, and sees the future: positive controls of test_causality.py. Maps (B, T, C)
-> (B, T, C)."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import CausalSelfAttention
from diff import DiffAttention


class ZeroPaddedAFNO(nn.Module):
    """AFNO as planned for language: it thresholds the data's own spectrum, and padding to 2T does
    not make that causal.

    Source: NVlabs/AFNO-transformer, and the padding of michaltakac/nocap-test-research.
    """
    def __init__(self, dim=32, blocks=4):
        super().__init__()
        self.w1, self.w2 = (
            nn.Parameter(torch.randn(blocks, dim // blocks, dim // blocks, 2) / 4) for _ in range(2)
        )
        self.proj = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x, v1=None):
        n = 2 * x.size(1)
        z = torch.fft.rfft(x, n=n, dim=1, norm="ortho").unflatten(2, (len(self.w1), -1))
        z = torch.einsum("btni,nio->btno", z, torch.view_as_complex(self.w1))
        z = torch.einsum(
            "btni,nio->btno",
            torch.complex(z.real.relu(), z.imag.relu()),
            torch.view_as_complex(self.w2),
        )
        z = torch.complex(F.softshrink(z.real, 0.01), F.softshrink(z.imag, 0.01)).flatten(2)
        return self.proj(torch.fft.irfft(z, n=n, dim=1, norm="ortho")[:, :x.size(1)])


class WholeWindowFFTNet(nn.Module):
    """FFTNet: FFT of the window, times base + MLP(mean of all tokens), modReLU, inverse FFT, real
    part.

    With its own start of the modReLU bias, 0, it is a gate per channel and no more. Source:
    mrorigo/pytorch-fftnet.
    """
    def __init__(self, dim=32, bias=-0.5):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.base, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.full((dim,), bias))

    def forward(self, x, v1=None):
        mean = F.layer_norm(x, x.shape[-1:]).mean(1, keepdim=True)
        z = torch.fft.fft(x, dim=1, norm="ortho") * (self.base + self.mlp(mean))
        z = F.relu(z.abs() + self.bias) * z / (z.abs() + 1e-10)
        return torch.fft.ifft(z, dim=1, norm="ortho").real


def masked(hidden):
    """A kernel of dense softmaxes whose mask hides what `hidden` says: (T, T) of ones -> bool."""
    def kernel(q, k, v):
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
        scores = q @ k.mT / math.sqrt(q.size(-1))
        return scores.masked_fill(hidden(torch.ones(scores.shape[-2:])), -1e9).softmax(-1) @ v
    return kernel


class InvertedMask(CausalSelfAttention):
    """NanoFormer's attention: its mask hides the past and the token itself. Source:
    Datta0/nanoformer."""

    def __init__(self, dim=32, seq_len=160):
        super().__init__(dim, seq_len, n_head=4, n_kv_head=2)

    def attend(self, x, q, k, v, kernel):
        return super().attend(x, q, k, v, masked(lambda ones: ones.triu(1) == 0))


class UnmaskedDiff(DiffAttention):
    """NanoFormer's differential attention: it has no mask."""
    def __init__(self, dim=32, seq_len=160):
        super().__init__(dim, seq_len, n_head=4, n_kv_head=2)

    def attend(self, x, q, k, v, kernel):
        return super().attend(x, q, k, v, masked(lambda ones: ones > 1))


PUBLISHED = {"zero-padded AFNO": ZeroPaddedAFNO, "whole-window FFTNet": WholeWindowFFTNet,
             "inverted mask": InvertedMask, "unmasked diff": UnmaskedDiff}
