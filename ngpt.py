"""The normalised GPT: hidden states and rows of weights are unit vectors (arXiv 2410.01131).

    h <- unit(h + |alpha| (unit(f(h)) - h))
    attention: scores sqrt(D) (s q) . (s k)
    MLP:       proj(u * silu(v)),  u = s_u sqrt(C) W_u h,  v = s_v sqrt(C) W_v h
    logits:    s_z W h

f is attention, then the MLP. alpha is a learned vector a branch, from 0.05. q and k are unit
vectors behind the rotary positions, s is learned, a head and channel. s_z is a factor a vocabulary
entry (--logit_gain). After initialisation and every step each matrix is normalised along its C
axis.

run_nanoformer.sh --mixer ngpt is the recipe. Each part is a row that works with others: any mixer
and any MLP may run inside (off the paper, as Muon is). Source: Loshchilov et al.,
github.com/NVIDIA/ngpt; its rotary positions are not followed, they do not rotate.

Letters: B batch, T time, C channels, H heads, D head width.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from attention import CausalSelfAttention
from parts import GatedMLP, NoHeadNorm, PreNorm


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, in fp32 or wider; a zero vector stays."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class Scale(nn.Module):
    """Learned scales that start at `init`, stored as numbers that start at `scale`: () -> (*shape).

    The optimizer moves the stored ones, so a step of Adam on the scale is init / scale times the
    learning rate.
    """
    role = "vector"

    def __init__(self, *shape: int, init: float = 1.0, scale: float = 1.0):
        super().__init__()
        self.p = nn.Parameter(torch.full(shape, scale))
        self.ratio = init / scale

    def forward(self) -> Tensor:
        return self.ratio * self.p


class LogitGain(Scale):
    """A learned factor a row of the head, (V, C) -> same, which scales the logits of h.

    The paper's sqrt(C) between the scale and what is stored is the length of h behind the model's
    last RMSNorm, whose epsilon makes that shorter by the constant 1e-6 C / 2: 0.04% at 768
    channels.
    """
    def __init__(self, rows: int, dim: int):
        super().__init__(rows, init=dim ** -0.5, scale=dim ** -0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return super().forward()[:, None] * weight


class SphereResidual(nn.Module):
    """unit(x + |alpha| (unit(y) - x)): a step from x towards y's direction, back onto the sphere.

    x (B, T, C) is a unit vector a token and so is the result; y may have any length. alpha = 0 is
    the identity. x is normalised again, as NVIDIA/ngpt does: the value stays, but without it the
    gradient of x, and so that of the embedding's rows, keeps a part along x, which only changes a
    length that the next step's normalisation restores.
    """
    needs = {"norm": (("ngpt",), "its steps start from unit vectors and unit weights")}

    def __init__(self, dim: int):
        super().__init__()
        self.alpha = Scale(2, dim, init=0.05, scale=dim ** -0.5)

    def forward(self, x: Tensor, y: Tensor, branch: int) -> Tensor:
        alpha = self.alpha()[branch].abs()
        x = unit(x)
        return unit(x + alpha * (unit(y) - x))


@torch.no_grad()
def unit_weights(table, dim: int):
    """Give every matrix of a table of roles unit vectors along its axis of `dim` channels.

    In place: rows of what reads the stream and of embedding and head, columns of what writes to it
    (role proj). Left alone: what has no such axis, vectors, kernels. Three passes over the weights
    a step.
    """
    for p, role in table.items():
        axis = -2 if role == "proj" else -1
        if role in ("embed", "head", "matrix", "proj") and p.size(axis) == dim:
            length = torch.linalg.vector_norm(p, dim=axis, keepdim=True)
            p.div_(length.clamp_min(1e-12))


class SphereNorm(PreNorm):
    """(x, sqrt(C) x): what RMSNorm would make of the unit vector x that the residual carries.

    With this length the MLP's factor sqrt(C) needs no place of its own, and mixers and MLPs that
    were not made for nGPT see inputs of the size they know. Attention does not notice: its output
    is normalised again.
    """
    # The settings that keep it true: {field: (values, why)}
    needs = {
        "residual": (("ngpt",), "only that keeps the stream's vectors at length 1"),
        "embed_norm": ((False,), "the embedding's rows are unit vectors already"),
        "embed_scale": ((False,), "the embedding's rows are to stay unit vectors"),
        "pos": (("rope", "none"), "a sum with positions is no unit vector"),
        "x0_shortcut": ((False,), "a sum with the embedding is no unit vector"),
        "unet_skips": ((False,), "a sum with an earlier layer is no unit vector"),
        "branch_scale": ((False,), "the branches are normalised, their scale is lost"),
        "linear": (("dense",), "the factors of a matrix have no axis of channels to normalise"),
        "zero_init": ((False,), "zeros cannot be normalised"),
        "weight_decay": ((0.0,), "normalised weights do not grow"),
    }

    def __init__(self, dim: int, layer: int):
        super().__init__(dim, layer)
        self.dim = dim

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.dim ** 0.5 * x

    def constrain(self, table):
        unit_weights(table, self.dim)


class NGPTAttention(CausalSelfAttention):
    """Attention with unit queries and keys, scaled a head and channel: (B, T, C) -> (B, T, C).

    Both come behind the rotary positions. q and k share the scale s, so q carries s^2: the same
    scores, and grouped keys need no scales of their own. It also carries D, which turns the
    kernel's 1 / sqrt(D) into the paper's sqrt(D).
    """
    needs = {
        "norm": (("ngpt", "pre", "pre_post"), "its scales take the place of what that norm does"),
        "residual": (("ngpt", "add", "gated"),
                     "its scales take the place of what that residual does"),
    }

    def __init__(self, dim: int, seq_len: int, **attention):
        super().__init__(dim, seq_len, head_norm=NoHeadNorm, **attention)
        self.s_qk = Scale(dim, scale=dim ** -0.5)

    def heads(self, z: Tensor, v1: Tensor | None, at):
        q, k, v = super().heads(z, v1, at)
        s = self.s_qk().square().view(-1, 1, self.head_dim)
        q = (self.head_dim * s * unit(q)).type_as(v)
        k = unit(k).type_as(v)
        return q, k, v


class NGPTMLP(GatedMLP):
    """SwiGLU with a learned scale a hidden channel on either side of the product.

    (B, T, C) -> (B, T, C).
    """
    def __init__(self, dim: int, **knobs):
        super().__init__(dim, **knobs)
        self.s_uv = Scale(2 * self.fc.out_features)

    def forward(self, x: Tensor) -> Tensor:
        vu = self.fc.fused(x, (self.gate, self.fc))
        v, u = (self.s_uv().type_as(vu) * vu).chunk(2, dim=-1)
        return self.proj(F.silu(v) * u)
