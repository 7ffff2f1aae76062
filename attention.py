"""Causal self-attention, the mixer that the others are measured against and some are built on.

Letters: B batch, T time, C channels, H heads, D head width.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from blocks import norm
from conv import ShortConv
from linear import Linear


class Rotary(nn.Module):
    """Rotary positions (Su et al., arXiv 2104.09864), pairing the two halves of a head: (B, H, T, D) -> same."""
    def __init__(self, dim, seq_len, base=10000.0):
        super().__init__()
        if dim % 2:
            raise ValueError(f"rotary positions need heads of an even width, not {dim}: change --n_head or --pos")
        angle = torch.arange(seq_len)[:, None] * base ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x, start=0):
        cos, sin = self.cos[start:start + x.size(2)], self.sin[start:start + x.size(2)]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


# Norms inside the heads: q, k, v -> the same, each (B, H, T, D)

class NoHeadNorm(nn.Module):
    def __init__(self, head_dim):
        super().__init__()

    def forward(self, q, k, v):
        return q, k, v


class QKNorm(NoHeadNorm):
    """RMSNorm of queries and keys, head by head, without gains (arXiv 2010.04245, as the speedruns have it)."""
    def forward(self, q, k, v):
        return norm(q), norm(k), v


class QKVNorm(nn.Module):
    """RMSNorm of queries, keys and values, head by head; one gain of width D each, shared by the heads.

    HybridNorm's attention half (arXiv 2503.04598, github.com/BryceZhuo/HybridNorm).
    """
    def __init__(self, head_dim):
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.ones(head_dim)) for _ in range(3))

    def forward(self, q, k, v):
        return norm(q) * self.q.type_as(q), norm(k) * self.k.type_as(k), norm(v) * self.v.type_as(v)


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention with grouped keys and values, (B, T, C) -> (B, T, C). No residual, no input norm."""
    def __init__(self, dim, seq_len, *, n_head, n_kv_head=0, head_norm=QKNorm, rope=True, short_conv=False,
                 linear=Linear):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim, self.seq_len = n_head, n_kv_head or n_head, dim // n_head, seq_len
        kv_dim = self.n_kv_head * self.head_dim
        self.q, self.k, self.v = (linear(dim, d) for d in (dim, kv_dim, kv_dim))
        self.short_conv = ShortConv(dim + 2 * kv_dim) if short_conv else None
        self.head_norm = head_norm(self.head_dim)
        self.rotary = Rotary(self.head_dim, seq_len) if rope else lambda x, start=0: x
        self.proj = linear(dim, dim)

    def flops(self, T):
        """Forward FLOPs a token besides the weight matrices: scores and mixing, the causal half."""
        return 2 * T * self.n_head * self.head_dim

    def qkv(self, x):                                       # -> (..., q and k and v side by side)
        return self.q.together(x, (self.q, self.k, self.v))

    def value(self, x):
        """The values a value residual hands to later layers, (B, T, n_kv_head * D)."""
        return self.v(x)

    def heads(self, z, v1, start=0):                        # -> q, k, v, each (B, H, T, D)
        q, k, v = z.split([m.out_features for m in (self.q, self.k, self.v)], dim=-1)
        v = v if v1 is None else v + v1
        q, k, v = self.head_norm(*(t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v)))
        return self.rotary(q, start), self.rotary(k, start), v

    def attend(self, x, q, k, v, causal):                   # -> (B, H, T, D); x is what q, k and v were made from
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=k.size(1) < q.size(1))

    def forward(self, x, v1=None):
        z = self.qkv(x)
        q, k, v = self.heads(z if self.short_conv is None else self.short_conv(z), v1)
        return self.proj(self.attend(x, q, k, v, True).transpose(1, 2).flatten(2))

    def init_state(self, B):
        cache = next(self.parameters()).new_zeros(2, B, self.n_kv_head, self.seq_len, self.head_dim)
        return self.short_conv and self.short_conv.init_state(B), cache, 0

    def step(self, x, state, v1=None):                      # (B, C) -> (B, C)
        window, cache, t = state
        z = self.qkv(x)
        if self.short_conv is not None:
            z, window = self.short_conv.step(z, window)
        q, k, v = self.heads(z[:, None], v1 if v1 is None else v1[:, None], t)
        cache = cache.index_copy(3, torch.tensor([t], device=x.device), torch.stack((k, v)).type_as(cache))
        k, v = cache[:, :, :, :t + 1].type_as(q)
        return self.proj(self.attend(x[:, None], q, k, v, False).flatten(1)), (window, cache, t + 1)
