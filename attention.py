"""Causal self-attention, the mixer that the others are measured against and some are built on.

Letters: B batch, T time, C channels, H heads, D head width.
"""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from parts import Linear, ShortConv, norm


class Rotary(nn.Module):
    """Rotary positions (Su et al., arXiv 2104.09864), pairing the two halves of a head: (B, H, T, D) -> same.

    `at` is the tokens' positions: a slice, or a row of the batch at a time, (B, T).
    """
    def __init__(self, dim, seq_len, base=10000.0):
        super().__init__()
        if dim % 2:
            raise ValueError(f"rotary positions need heads of an even width, not {dim}: change --n_head or --pos")
        angle = torch.arange(seq_len)[:, None] * base ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x, at):
        cos, sin = self.cos[at].unsqueeze(-3), self.sin[at].unsqueeze(-3)            # the same for all heads
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


# What a token sees of the keys, and the kernels that know it: (q, k, v), each (B, H, T, D) -> (B, H, T, D)

def sdpa(q, k, v, **mask):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=k.size(1) < q.size(1), **mask)


def flex(q, k, v, block_mask):                              # takes one dtype only; norms under autocast may give fp32
    return flex_attention(q.type_as(v), k.type_as(v), v, block_mask=block_mask, enable_gqa=k.size(1) < q.size(1))


def visible(window, docs):
    """The rule (b, h, q, k) -> does query q see key k: the past, `window` tokens of it (0: all), its own document."""
    def rule(b, h, q, k):
        seen = q >= k
        if window:
            seen = seen & (q - k < window)
        return seen if docs is None else seen & (docs[b, q] == docs[b, k])
    return rule


def causal_kernel(window, docs, T, D, device):
    """FlexAttention skips what a mask hides, but only compiled, from D = 16 on, and with no backward on a CPU."""
    if not window and docs is None:
        return partial(sdpa, is_causal=True)
    rule, B, t = visible(window, docs), 1 if docs is None else len(docs), torch.arange(T, device=device)
    if device.type == "cuda" and D >= 16 and torch.compiler.is_compiling():
        return partial(flex, block_mask=create_block_mask(rule, B, None, T, T, device=device))
    return partial(sdpa, attn_mask=rule(torch.arange(B, device=device)[:, None, None, None], 0, t[:, None], t))


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention with grouped keys and values, (B, T, C) -> (B, T, C). No residual, no input norm.

    window: how many tokens a token sees, itself counted (0: all). docs (B, T): the place in its row where each token's
    document starts; tokens then see, and count positions in, their own document only. In a step docs is (B,).
    """
    def __init__(self, dim, seq_len, *, n_head, n_kv_head=0, head_norm=QKNorm, rope=True, short_conv=False, window=0,
                 linear=Linear):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim, self.seq_len = n_head, n_kv_head or n_head, dim // n_head, seq_len
        kv_dim = self.n_kv_head * self.head_dim
        self.q, self.k, self.v = (linear(dim, d) for d in (dim, kv_dim, kv_dim))
        self.short_conv = ShortConv(dim + 2 * kv_dim) if short_conv else None
        self.head_norm, self.window = head_norm(self.head_dim), window
        self.rotary = Rotary(self.head_dim, seq_len) if rope else lambda x, at: x
        self.proj = linear(dim, dim)

    @property
    def masks_documents(self):
        """May forward be given docs? A convolution knows no documents."""
        return self.short_conv is None

    def flops(self, T):
        """Forward FLOPs a token besides the weight matrices: scores and mixing with the tokens that it sees."""
        W = min(self.window or T, T)
        return int(4 * self.n_head * self.head_dim * (W - W * W / (2 * T)))

    def qkv(self, x):                                       # -> (..., q and k and v side by side)
        return self.q.fused(x, (self.q, self.k, self.v))

    def value(self, x):
        """The values a value residual hands to later layers, (B, T, n_kv_head * D)."""
        return self.v(x)

    def heads(self, z, v1, at):                             # -> q, k, v, each (B, H, T, D)
        q, k, v = z.split([m.out_features for m in (self.q, self.k, self.v)], dim=-1)
        v = v if v1 is None else v + v1
        q, k, v = self.head_norm(*(t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v)))
        return self.rotary(q, at), self.rotary(k, at), v

    def attend(self, x, q, k, v, kernel):                   # -> (B, H, T, D); x is what q, k and v were made from
        return kernel(q, k, v)

    def forward(self, x, v1=None, docs=None):
        z, T = self.qkv(x), x.size(1)
        at = slice(T) if docs is None else torch.arange(T, device=x.device) - docs
        q, k, v = self.heads(z if self.short_conv is None else self.short_conv(z), v1, at)
        kernel = causal_kernel(self.window, docs, T, self.head_dim, x.device)
        return self.proj(self.attend(x, q, k, v, kernel).transpose(1, 2).flatten(2))

    def init_state(self, B):
        cache = next(self.parameters()).new_zeros(2, B, self.n_kv_head, self.seq_len, self.head_dim)
        return self.short_conv and self.short_conv.init_state(B), cache, 0

    def step(self, x, state, v1=None, docs=None):           # (B, C) -> (B, C)
        conv, cache, t = state
        z = self.qkv(x)
        if self.short_conv is not None:
            z, conv = self.short_conv.step(z, conv)
        at = slice(t, t + 1) if docs is None else t - docs[:, None]
        q, k, v = self.heads(z[:, None], v1 if v1 is None else v1[:, None], at)
        cache = cache.index_copy(3, torch.tensor([t], device=x.device), torch.stack((k, v)).type_as(cache))
        first = max(0, t + 1 - self.window) if self.window else 0
        k, v = cache[:, :, :, first:t + 1].type_as(q)
        own = None if docs is None else (torch.arange(first, t + 1, device=x.device) >= docs[:, None])[:, None, None]
        y = self.attend(x[:, None], q, k, v, partial(sdpa, attn_mask=own))
        return self.proj(y.flatten(1)), (conv, cache, t + 1)
