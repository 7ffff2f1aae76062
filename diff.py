"""Differential attention: the difference of two attention maps, so that what both attend to by mistake cancels.

    V1:  a_h = attention(q1_h, k1, v) - lambda attention(q2_h, k2, v),     y_h = (1 - lambda_0) gain * norm(a_h)
         lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_0,              lambda_0 = 0.8 - 0.6 exp(-0.3 layer)
    V2:  y_h = attention(q_2h, k, v) - sigmoid(x W_lambda)_h attention(q_2h+1, k, v)

Source: arXiv 2410.05258 (V1), github.com/microsoft/unilm, Diff-Transformer and its folder Diff-Transformer-V2. Where
the official files differ we follow their flash ones: with grouped keys q1 meets k1, and q2 k2, of its own group.
Letters: B batch, T time, C channels, H heads, D head width.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import CausalSelfAttention
from parts import Linear, ShortConv


class DiffAttention(CausalSelfAttention):
    """V1, (B, T, C) -> (B, T, C): n_head counts half-heads, so H / 2 heads; weights as attention's, and 6 D scalars.

    Half-heads 2h and 2h + 1 of queries, keys and values are the two sides of head h; its values are 2 D wide. `layer`
    counts from 0. A head_norm acts on half-heads (the paper has none). Raises ValueError for odd numbers of heads.
    """
    def __init__(self, dim, seq_len, *, layer=0, **attention):
        super().__init__(dim, seq_len, **attention)
        if self.n_head % 2 or self.n_kv_head % 2:
            raise ValueError(f"diff: a head is two half-heads, so --n_head {self.n_head} and --n_kv_head "
                             f"{self.n_kv_head} must be even")
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lq1, self.lk1, self.lq2, self.lk2 = (nn.Parameter(0.1 * torch.randn(self.head_dim)) for _ in range(4))
        self.gain = nn.Parameter(torch.ones(2 * self.head_dim))

    def flops(self, T):
        """Twice attention's: the scores are computed once for either half of the values."""
        return 2 * super().flops(T)

    def lam(self):
        """lambda, a scalar, one for all heads; from parameters in fp32, which autocast leaves alone."""
        return (self.lq1 * self.lk1).sum().exp() - (self.lq2 * self.lk2).sum().exp() + self.lambda_init

    def normalised(self, a):                                # (B, H / 2, T, 2 D) -> same; eps is the official one
        return (1 - self.lambda_init) * F.rms_norm(a, a.shape[-1:], self.gain.type_as(a), eps=1e-5)

    def attend(self, x, q, k, v, kernel):
        """-> (B, H / 2, T, 2 D), by four calls: either map on either half of the values.

        Two calls on values of width 2 D would have a quarter less arithmetic, but no flash kernel takes widths that
        differ: on a CPU (always) and on CUDA (with grouped keys) torch would store the scores instead.
        """
        v_left = v[:, 0::2]
        v_right = v[:, 1::2]

        q1 = q[:, 0::2]
        k1 = k[:, 0::2]
        a1 = torch.cat([kernel(q1, k1, v_left), kernel(q1, k1, v_right)], dim=-1)

        q2 = q[:, 1::2]
        k2 = k[:, 1::2]
        a2 = torch.cat([kernel(q2, k2, v_left), kernel(q2, k2, v_right)], dim=-1)

        return self.normalised(a1 - self.lam().type_as(a2) * a2)


class DiffAttentionV2(CausalSelfAttention):
    """V2, (B, T, C) -> (B, T, C): twice the query heads on attention's keys and values, and a lambda a token and head.

    Neighbouring query heads share a key head and are subtracted; no norm behind, lambda has no schedule of depth.
    Takes C^2 + C H weights more than attention.
    """
    def __init__(self, dim, seq_len, *, n_head, short_conv=False, linear=Linear, **attention):
        super().__init__(dim, seq_len, n_head=n_head, linear=linear, **attention)
        self.q, self.lambda_proj = linear(dim, 2 * dim), Linear(dim, n_head)
        self.short_conv = ShortConv(sum(m.out_features for m in (self.q, self.k, self.v))) if short_conv else None

    def flops(self, T):
        """Twice attention's."""
        return 2 * super().flops(T)

    def attend(self, x, q, k, v, kernel):
        a = kernel(q, k, v)
        lam = torch.sigmoid(self.lambda_proj(x)).transpose(1, 2)[..., None]              # (B, H, T, 1)
        return a[:, 0::2] - lam.type_as(a) * a[:, 1::2]


def diff_naive(m, x):
    """V1 without head norm and positions, map by map with explicit masked softmaxes: (B, T, C) -> (B, T, C)."""
    D, T, out = m.head_dim, x.size(1), []
    q, k, v = (F.linear(x, w.weight) for w in (m.q, m.k, m.v))
    mask = torch.full((T, T), -math.inf, dtype=x.dtype).triu(1)
    for h in range(m.n_head // 2):
        g = h * m.n_kv_head // m.n_head                     # the head of keys and values it uses
        maps = [(q[..., (2 * h + i) * D:][..., :D] @ k[..., (2 * g + i) * D:][..., :D].mT / math.sqrt(D) + mask)
                .softmax(-1) for i in (0, 1)]
        a = (maps[0] - m.lam() * maps[1]) @ v[..., 2 * g * D:][..., :2 * D]
        out.append((1 - m.lambda_init) * m.gain * a / (a.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    return F.linear(torch.cat(out, dim=-1), m.proj.weight)
