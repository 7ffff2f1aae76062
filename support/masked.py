"""Causal convolutions within documents, for packed rows: a token mixes its own document only.

    y_t = sum_i h_i u_{t - i} [age_t >= i]

age (B, T) counts the tokens of a token's own document before it: a tap that reaches further back
would cross its start. Uncompiled, documents are laid apart from one another and any convolution by
taps will do; a compiler, which cannot have shapes that depend on data, makes one kernel of masks.

Letters: B batch, T time, C channels, G kernels (each filters C/G channels), M taps.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kernels import DepthwiseCausalConv, auto_conv, banded_conv

# Taps that masks stop one by one; an FFT, or a GEMM over all of the past, mixes everything at once.
# A compiler unrolls them: for CUDA, Inductor takes 18 s over a backward of 16, and 102 s of 64.
MASKED_UP_TO = 32


def can_mask(conv, taps: int) -> bool:
    """Has a row of kernels.BACKENDS, with so many taps, the convolution below in its place?"""
    return taps <= MASKED_UP_TO and conv in (auto_conv, banded_conv)


def traced(x: Tensor) -> bool:
    """Is this for a compiler, or for a count of memory? Then there are no data to look at."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def document_conv(u: Tensor, h: Tensor, age: Tensor) -> Tensor:
    """A convolution by kernels of few taps: u (B, T, C), h (G, M), age (B, T) -> like u; M <= T."""
    if traced(u):
        w = h.flip(1).repeat_interleave(u.size(2) // len(h), dim=0).T
        return MaskedCausalConv.apply(u, w, age)
    return apart(partial(banded_conv, h=h), h.size(1), age, u)


def short_document_conv(x: Tensor, w: Tensor, more: Tensor | None, age: Tensor) -> Tensor:
    """DepthwiseCausalConv with masks: x (B, T, C), w (M, C), age (B, T) -> like x.

    more (B, T, c) or None is added to the last c channels of x.
    """
    if traced(x):
        if more is not None:
            x, last = x.tensor_split((x.size(2) - more.size(2),), dim=2)
            x = torch.cat((x, last + more), dim=2)
        return MaskedCausalConv.apply(x, w, age)
    streams = [x] if more is None else [x, more]
    return apart(lambda x, more=None: DepthwiseCausalConv.apply(x, w, more), len(w), age, *streams)


# --------------------------------------------------------------------------------------------------
# By masks

class MaskedCausalConv(torch.autograd.Function):
    """y_t = sum_i w_i x_{t - i} [age_t >= i]: x (B, T, C), w (M, C), whose last row is lag 0.

    Bit-exactly causal, and blind to other documents. Each pass is a sum of shifted loads, which a
    compiler makes one kernel of, in w's dtype where that is wider. Saves x, w and age.
    """
    @staticmethod
    def forward(ctx, x, w, age):
        ctx.save_for_backward(x, w, age)
        y = 0
        for lag in range(min(len(w), x.size(1))):
            earlier = F.pad(x, (0, 0, lag, -lag))
            y = y + torch.where(reaches(age, lag), earlier, 0) * w[-1 - lag]
        return y.type_as(x)

    @staticmethod
    def backward(ctx, dy):
        x, w, age = ctx.saved_tensors
        dx = 0
        dw = torch.zeros_like(w)
        for lag in range(min(len(w), x.size(1))):
            # What later tokens ask of this one. Of x as it is: of x shifted, as in forward, a
            # compiler would keep all the copies for here.
            asked = F.pad(torch.where(reaches(age, lag), dy, 0), (0, 0, -lag, lag))
            dx = dx + asked * w[-1 - lag]
            dw[-1 - lag] = (asked * x).sum((0, 1), dtype=w.dtype)
        return dx.type_as(x), dw, None


def reaches(age: Tensor, lag: int) -> Tensor:
    """Does a token's own document begin that many tokens earlier, or before? (B, T) -> (B, T, 1)"""
    return age[..., None] >= lag


# --------------------------------------------------------------------------------------------------
# By zeros in between

def layout(age: Tensor, gap: int) -> list[tuple[int, int]]:
    """(zeros before it, its tokens) of all documents, row by row; age (B, T).

    The rows get one length: zeros end a row that has fewer documents than another. So where a token
    comes to lie is told by its own row's past, and rounding is, too.
    """
    T = age.size(1)
    rows = [(row == 0).nonzero().flatten().tolist() for row in age]
    most = max(map(len, rows))
    pairs = []
    for starts in rows:
        pairs += [(gap, end - start) for start, end in zip(starts, [*starts[1:], T])]
        pairs.append((gap * (most - len(starts)), 0))
    return pairs


def apart(conv, taps: int, age: Tensor, *streams: Tensor) -> Tensor:
    """A causal convolution of so many taps, any, of streams (B, T, c), within documents.

    It is given taps - 1 zeros before each document, and so never meets two of them: a few more
    tokens, and a copy on either side.
    """
    pairs = layout(age, taps - 1)
    sizes = [size for pair in pairs for size in pair]
    spread = []
    for x in streams:
        nothing = x.new_zeros(max(sizes[::2]), x.size(2))
        documents = x.flatten(0, 1).split(sizes[1::2])
        pieces = [piece for zeros, document in zip(sizes[::2], documents)
                  for piece in (nothing[:zeros], document)]
        spread.append(torch.cat(pieces).view(len(x), -1, x.size(2)))
    y = conv(*spread)
    return torch.cat(y.flatten(0, 1).split(sizes)[1::2]).view_as(streams[0])
