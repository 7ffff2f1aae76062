"""Differential attention: the difference of two attention maps cancels what both attend to.

    V1:  a_h = attention(q1_h, k1, v) - lambda attention(q2_h, k2, v)
         y_h = (1 - lambda_0) gain * norm(a_h)
         lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_0
         lambda_0 = 0.8 - 0.6 exp(-0.3 layer)
    V2:  y_h = attention(q_2h, k, v) - sigmoid(x W_lambda)_h attention(q_2h+1, k, v)

Source: arXiv 2410.05258 (V1), github.com/microsoft/unilm, Diff-Transformer and its folder
Diff-Transformer-V2. Where the official files differ we follow their flash ones: with grouped keys
q1 meets k1, and q2 k2, of its own group.

Letters: B batch, T time, C channels, H heads, D head width.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from attention import CausalSelfAttention
from parts import Linear, ShortConv


class DiffAttention(CausalSelfAttention):
    """V1, (B, T, C) -> (B, T, C): n_head counts half-heads, so there are H / 2 heads.

    Half-heads 2h and 2h + 1 of queries, keys and values are the two sides of head h; its values are
    2 D wide. It has attention's weights and 6 D scalars. `layer` counts from 0. A head_norm acts on
    half-heads (the paper has none). Raises ValueError for odd numbers of heads.
    """
    def __init__(self, dim: int, seq_len: int, *, layer: int = 0, **attention):
        super().__init__(dim, seq_len, **attention)
        if self.n_head % 2 or self.n_kv_head % 2:
            raise ValueError(f"diff: a head is two half-heads, so --n_head {self.n_head} and "
                             f"--n_kv_head {self.n_kv_head} must be even")
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lq1 = nn.Parameter(0.1 * torch.randn(self.head_dim))
        self.lk1 = nn.Parameter(0.1 * torch.randn(self.head_dim))
        self.lq2 = nn.Parameter(0.1 * torch.randn(self.head_dim))
        self.lk2 = nn.Parameter(0.1 * torch.randn(self.head_dim))
        self.gain = nn.Parameter(torch.ones(2 * self.head_dim))

    def flops(self, T: int) -> int:
        """Twice attention's: the scores are computed once for either half of the values."""
        return 2 * super().flops(T)

    def lam(self) -> Tensor:
        """lambda, one scalar for all heads, from parameters in fp32: autocast leaves it alone."""
        first = (self.lq1 * self.lk1).sum().exp()
        second = (self.lq2 * self.lk2).sum().exp()
        return first - second + self.lambda_init

    def normalised(self, a: Tensor) -> Tensor:
        """(B, H / 2, T, 2 D) -> same; eps is the official one."""
        return (1 - self.lambda_init) * F.rms_norm(a, a.shape[-1:], self.gain.type_as(a), eps=1e-5)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, kernel) -> Tensor:
        """-> (B, H / 2, T, 2 D), by four calls: either map on either half of the values.

        Two calls on values of width 2 D would have a quarter less arithmetic, but no flash kernel
        takes widths that differ: on a CPU (always) and on CUDA (with grouped keys) torch would
        store the scores instead.
        """
        def one_map(side):
            halves = [kernel(q[:, side::2], k[:, side::2], v[:, half::2]) for half in (0, 1)]
            return torch.cat(halves, dim=-1)

        a1 = one_map(0)
        a2 = one_map(1)
        return self.normalised(a1 - self.lam().type_as(a2) * a2)


class DiffAttentionV2(CausalSelfAttention):
    """V2, (B, T, C) -> (B, T, C): twice the query heads, and a lambda a token and head.

    Neighbouring query heads share a key head and are subtracted. No norm stands behind, and lambda
    has no schedule of depth. Takes C^2 + C H weights more than attention.
    """
    def __init__(self, dim: int, seq_len: int, *, n_head: int, short_conv: bool = False,
                 linear=Linear, **attention):
        super().__init__(dim, seq_len, n_head=n_head, linear=linear, **attention)
        self.q = linear(dim, 2 * dim)
        self.lambda_proj = Linear(dim, n_head)
        self.short_conv = None
        if short_conv:
            width = self.q.out_features + self.k.out_features + self.v.out_features
            self.short_conv = ShortConv(width)

    def flops(self, T: int) -> int:
        """Twice attention's."""
        return 2 * super().flops(T)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, kernel) -> Tensor:
        a = kernel(q, k, v)                                            # (B, 2 H, T, D)
        lam = torch.sigmoid(self.lambda_proj(x)).transpose(1, 2)[..., None]    # (B, H, T, 1)
        return a[:, 0::2] - lam.type_as(a) * a[:, 1::2]


def diff_naive(m: DiffAttention, x: Tensor) -> Tensor:
    """V1 without head norm and positions, map by map with explicit masked softmaxes."""
    D = m.head_dim
    T = x.size(1)
    q, k, v = (F.linear(x, layer.weight) for layer in (m.q, m.k, m.v))
    mask = torch.full((T, T), -math.inf, dtype=x.dtype).triu(1)
    out = []
    for h in range(m.n_head // 2):
        group = h * m.n_kv_head // m.n_head          # the head of keys and values it uses
        maps = []
        for side in (0, 1):
            q_side = q[..., (2 * h + side) * D:][..., :D]
            k_side = k[..., (2 * group + side) * D:][..., :D]
            scores = q_side @ k_side.mT / math.sqrt(D) + mask
            maps.append(scores.softmax(-1))
        a = (maps[0] - m.lam() * maps[1]) @ v[..., 2 * group * D:][..., :2 * D]
        rms = (a.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        out.append((1 - m.lambda_init) * m.gain * a / rms)
    return F.linear(torch.cat(out, dim=-1), m.proj.weight)
