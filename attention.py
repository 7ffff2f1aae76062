"""Causal self-attention, the mixer that the others are measured against and some are built on.

Letters: B batch, T time, C channels, H heads, D head width.
"""
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from parts import Linear, QKNorm, ShortConv

# --------------------------------------------------------------------------------------------------
# Positions inside the heads

class Rotation(torch.autograd.Function):
    """q and k, (B, H, T, D), turned by angles: cos (1 or B, 1, T, D), sin half as wide.

    Their gradients are turned back (way is -1): half of autograd's passes, and neither is kept.
    """
    @staticmethod
    def forward(ctx, q, k, cos, sin, way):
        ctx.save_for_backward(cos, sin)
        ctx.way = way
        return turned(q, cos, sin, way), turned(k, cos, sin, way)

    @staticmethod
    def backward(ctx, dq, dk):
        return *Rotation.apply(dq, dk, *ctx.saved_tensors, -ctx.way), None, None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    half = x.size(-1) // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin, value=-way)
    y[..., half:].addcmul_(x[..., :half], sin, value=way)
    return y


class Rotary(nn.Module):
    """Rotary positions (Su et al., arXiv 2104.09864), pairing the two halves of a head.

    q and k, (B, H, T, D) -> same. `at` is the tokens' positions: a slice, or a row of the batch at
    a time, (B, T). Raises ValueError for heads of an odd width.
    """
    def __init__(self, dim: int, seq_len: int, base: float = 10000.0):
        super().__init__()
        if dim % 2:
            raise ValueError(f"rotary positions need heads of an even width, not {dim}: change "
                             "--n_head or --pos")
        angle = torch.arange(seq_len)[:, None] * base ** (-torch.arange(0, dim, 2) / dim)
        # For both halves: the first takes minus the second's sine.
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", torch.cat((-angle.sin(), angle.sin()), 1), persistent=False)

    def forward(self, q: Tensor, k: Tensor, at) -> tuple[Tensor, Tensor]:
        # The same for all heads: a dimension of size 1 in their place.
        cos, sin = (table[at].unsqueeze(-3) for table in (self.cos, self.sin))
        half = sin.size(-1) // 2
        # A compiler fuses the formula with its neighbours, and has a backward as good.
        if torch.compiler.is_compiling():
            turns = (torch.addcmul(x * cos, x.roll(half, -1), sin) for x in (q, k))
        else:
            turns = Rotation.apply(q, k, cos, sin[..., half:], 1)
        return tuple(y.type_as(x) for y, x in zip(turns, (q, k)))


class NoRotary(nn.Module):
    """In the place of Rotary where positions come from elsewhere, or from nowhere."""
    def forward(self, q: Tensor, k: Tensor, at) -> tuple[Tensor, Tensor]:
        return q, k


# --------------------------------------------------------------------------------------------------
# What a token sees of the keys, and the kernels that know it: q, k, v (B, H, T, D) -> (B, H, T, D)

def sdpa(q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:
    share = q.size(1) // k.size(1)                   # query heads to a head of keys and values
    if share > 1 and q.is_cuda and q.dtype == torch.float32:
        # No fused kernel of CUDA's takes grouped keys in fp32: torch would store all scores.
        k = k.repeat_interleave(share, dim=1)
        v = v.repeat_interleave(share, dim=1)
        share = 1
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=share > 1, **mask)


def flex(q: Tensor, k: Tensor, v: Tensor, block_mask) -> Tensor:
    # One dtype only, and norms under autocast may give fp32.
    q = q.type_as(v)
    k = k.type_as(v)
    grouped = k.size(1) < q.size(1)
    return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=grouped)


def visible(window: int, docs: Tensor | None):
    """The rule (b, h, q, k) -> does query q see key k, in row b?

    A query sees the past, itself included: `window` tokens of it (0: all), and of its own document.
    """
    def rule(b, h, q, k):
        seen = q >= k
        if window:
            seen = seen & (q - k < window)
        if docs is not None:
            seen = seen & (docs[b, q] == docs[b, k])
        return seen

    return rule


class View(NamedTuple):
    """What the tokens of a batch see of one another, the same in all layers."""
    at: slice | Tensor                               # their positions: of all rows, or (B, T)
    kernel: Callable                                 # q, k, v -> what they take from whom they see
    age: Tensor | None = None                        # (B, T): at, where it is by documents


# Where FlexAttention has a backward.
FLEX_DEVICES = ("cuda",)


def skips_masks(device: torch.device, D: int) -> bool:
    """Whether compiled code has FlexAttention, which keeps no (T, T) mask."""
    return device.type in FLEX_DEVICES and D >= 16


def view(window: int, docs: Tensor | None, T: int, D: int, device: torch.device) -> View:
    """The view of T tokens, where the rule of `visible` masks; docs (B, T) or None.

    FlexAttention skips what a mask hides, but only compiled and from D = 16 on. Elsewhere the mask
    is dense.
    """
    if not window and docs is None:
        return View(slice(T), partial(sdpa, is_causal=True))
    t = torch.arange(T, device=device)
    age = None if docs is None else t - docs
    at = slice(T) if docs is None else age
    B = 1 if docs is None else len(docs)
    rule = visible(window, docs)
    if torch.compiler.is_compiling() and skips_masks(device, D):
        block_mask = create_block_mask(rule, B, None, T, T, device=device)
        return View(at, partial(flex, block_mask=block_mask), age)
    rows = torch.arange(B, device=device)[:, None, None, None]
    return View(at, partial(sdpa, attn_mask=rule(rows, 0, t[:, None], t)), age)  # (B, 1, T, T)


# --------------------------------------------------------------------------------------------------
# The mixer

class CausalSelfAttention(nn.Module):
    """Multi-head causal attention with grouped keys and values, (B, T, C) -> (B, T, C).

    No residual, no input norm. window: how many tokens a token sees, itself counted (0: all).
    docs (B, T): the place in its row where each token's document starts; tokens then see, and count
    positions in, their own document only. forward takes their view, which a model makes once for
    all its layers; a step takes age (B,), how many tokens of the document came before. v1: what is
    added to the values.
    """
    masks_documents = True

    def __init__(self, dim: int, seq_len: int, *, n_head: int, n_kv_head: int = 0,
                 head_norm=QKNorm, rope: bool = True, short_conv: bool = False, window: int = 0,
                 linear=Linear):
        super().__init__()
        self.n_head = n_head
        self.n_kv_head = n_kv_head or n_head
        self.head_dim = dim // n_head
        self.seq_len = seq_len
        self.window = window
        kv_dim = self.n_kv_head * self.head_dim
        self.q = linear(dim, dim)
        self.k = linear(dim, kv_dim)
        self.v = linear(dim, kv_dim)
        self.short_conv = ShortConv(dim + 2 * kv_dim) if short_conv else None
        self.head_norm = head_norm(self.head_dim)
        self.rotary = Rotary(self.head_dim, seq_len) if rope else NoRotary()
        self.proj = linear(dim, dim)

    def view(self, T: int, docs: Tensor | None, device: torch.device) -> View:
        return view(self.window, docs, T, self.head_dim, device)

    def flops(self, T: int) -> int:
        """Forward FLOPs a token besides the weight matrices: scores and mixing of what it sees."""
        W = min(self.window or T, T)
        return int(4 * self.n_head * self.head_dim * (W - W * W / (2 * T)))

    def qkv(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., q and k and v side by side)."""
        return self.q.fused(x, (self.q, self.k, self.v))

    def value(self, x: Tensor) -> Tensor:
        """The values a value residual hands to later layers, (B, T, n_kv_head * D)."""
        return self.v(x)

    def heads(self, z: Tensor, v1: Tensor | None, at):
        """What qkv gave (B, T, ...) -> q, k, v, each (B, H, T, D), normed and rotated."""
        widths = [layer.out_features for layer in (self.q, self.k, self.v)]
        q, k, v = z.split(widths, dim=-1)
        if v1 is not None:
            v = v + v1
        q, k, v = (u.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for u in (q, k, v))
        q, k, v = self.head_norm(q, k, v)
        return *self.rotary(q, k, at), v

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, kernel) -> Tensor:
        """-> (B, H, T, D); x is what q, k and v were made from, for variants that need it."""
        return kernel(q, k, v)

    def forward(self, x: Tensor, v1: Tensor | None = None, view: View | None = None) -> Tensor:
        return self.mix(x, v1, view)[0]

    def mix(self, x: Tensor, v1: Tensor | None, view: View | None):
        """-> the output, and what decoding has to remember: qkv of x; keys, values (B, H, T, D)."""
        if view is None:
            view = self.view(x.size(1), None, x.device)
        z = qkv = self.qkv(x)
        if self.short_conv is not None:
            z = self.short_conv(qkv, age=view.age)
        q, k, v = self.heads(z, v1, view.at)
        y = self.attend(x, q, k, v, view.kernel)
        return self.proj(y.transpose(1, 2).flatten(2)), qkv, k, v

    def prefill(self, x: Tensor, v1: Tensor | None = None, view: View | None = None):
        """A prompt: forward's output, and the state behind it."""
        y, qkv, k, v = self.mix(x, v1, view)
        conv, cache, _ = self.init_state(len(x))
        if self.short_conv is not None:
            conv = self.short_conv.state_behind(qkv)
        cache[:, :, :, :x.size(1)] = torch.stack((k, v))
        return y, (conv, cache, x.size(1))

    def init_state(self, B: int):
        """The short convolution's inputs, a cache for seq_len keys and values, the time: 0.

        The cache has the grouped heads only, and a step writes into it: its old state is used up.
        """
        cache = next(self.parameters()).new_zeros(2, B, self.n_kv_head, self.seq_len, self.head_dim)
        conv = None
        if self.short_conv is not None:
            conv = self.short_conv.init_state(B)
        return conv, cache, 0

    def step(self, x: Tensor, state, v1: Tensor | None = None, age: Tensor | None = None):
        """One token, (B, C) and the state -> (B, C), the next state."""
        conv, cache, t = state
        z = self.qkv(x)
        if self.short_conv is not None:
            z, conv = self.short_conv.step(z, conv, age)
        at = slice(t, t + 1) if age is None else age[:, None]
        if v1 is not None:
            v1 = v1[:, None]
        q, k, v = self.heads(z[:, None], v1, at)

        cache[:, :, :, t:t + 1] = torch.stack((k, v))
        first = max(0, t + 1 - self.window) if self.window else 0
        k, v = cache[:, :, :, first:t + 1].type_as(q)
        mask = None
        if age is not None:
            times = torch.arange(first, t + 1, device=x.device)
            mask = (times >= t - age[:, None])[:, None, None]          # (B, 1, 1, times)
        y = self.attend(x[:, None], q, k, v, partial(sdpa, attn_mask=mask))
        return self.proj(y.flatten(1)), (conv, cache, t + 1)


class GatedAttention(CausalSelfAttention):
    """Attention times a linear gate of its input, as AFNO's q: (B, T, C) -> (B, T, C).

    Takes C^2 weights more than attention. The published gates are sigmoids (arXiv 2505.06708).
    """
    def __init__(self, dim: int, seq_len: int, *, linear=Linear, **attention):
        super().__init__(dim, seq_len, linear=linear, **attention)
        self.gate = linear(dim, dim)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, kernel) -> Tensor:
        gate = self.gate(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        return gate * kernel(q, k, v)                                  # (B, H, T, D)
