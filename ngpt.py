"""The normalised GPT: hidden states and rows of weights are unit vectors (Loshchilov et al., arXiv 2410.01131).

    h <- unit(h + |alpha| (unit(f(h)) - h))       f attention, then MLP; alpha a learned vector a branch, from 0.05
    attention: scores sqrt(D) (s q) . (s k)       of unit q and k, behind the rotary positions; s a head and channel
    MLP:       proj(u * silu(v)),                 u = s_u sqrt(C) W_u h, v = s_v sqrt(C) W_v h
    logits:    s_z W h                            --logit_gain, with s_z a vocabulary entry

After initialisation and every step each matrix is normalised along its C axis. The recipe: --mixer ngpt --mlp ngpt
--norm ngpt --residual ngpt --logit_gain --optim adamw --weight_decay 0 --warmup_iters 0 --schedule cosine
--logit_softcap 0 --no-zero_init --no-embed_norm. Each part is a row that works with others: any mixer and any MLP may
run inside (off the paper, as Muon is). Source: github.com/NVIDIA/ngpt; its rotary positions are not followed, they do
not rotate.
Letters: B batch, T time, C channels, H heads, D head width.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import CausalSelfAttention, NoHeadNorm
from parts import GatedMLP, PreNorm


def unit(x):
    """x / |x| over the last dimension, in fp32 or wider; a zero vector stays."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class Scale(nn.Module):
    """Learned scales that start at `init` and are stored as numbers that start at `scale`: () -> (*shape).

    The optimizer moves the stored ones, so a step of Adam on the scale is init / scale times the learning rate.
    """
    role = "vector"

    def __init__(self, *shape, init=1.0, scale=1.0):
        super().__init__()
        self.p, self.ratio = nn.Parameter(torch.full(shape, scale)), init / scale

    def forward(self):
        return self.ratio * self.p


class LogitGain(Scale):
    """A learned factor a row of the head, (V, C) -> same, which scales the logits of h.

    The paper's sqrt(C) between the scale and what is stored is the length of h behind the model's last RMSNorm, whose
    epsilon makes that shorter by the constant 1e-6 C / 2: 0.04% at 768 channels.
    """
    def __init__(self, rows, dim):
        super().__init__(rows, init=dim ** -0.5, scale=dim ** -0.5)

    def forward(self, weight):
        return super().forward()[:, None] * weight


class SphereResidual(nn.Module):
    """unit(x + |alpha| (unit(y) - x)): a step from the unit vector x towards y's direction, back onto the sphere.

    x (B, T, C) is a unit vector a token and so is the result; y may have any length. alpha = 0 is
    the identity. x is normalised again, as NVIDIA/ngpt does: the value stays, but without it the
    gradient of x, and so that of the embedding's rows, keeps a part along x, which only changes a
    length that the next step's normalisation restores.
    """
    needs = {"norm": (("ngpt",), "its steps start from unit vectors and unit weights")}

    def __init__(self, dim):
        super().__init__()
        self.alpha = Scale(2, dim, init=0.05, scale=dim ** -0.5)

    def forward(self, x: torch.Tensor, y: torch.Tensor, branch: int) -> torch.Tensor:
        alpha = self.alpha()[branch].abs()
        x = unit(x)
        return unit(x + alpha * (unit(y) - x))


@torch.no_grad()
def unit_weights(table, dim):
    """Give every matrix of a table of roles unit vectors along its axis of `dim` channels, in place.

    Rows of what reads the stream and of embedding and head, columns of what writes to it (role proj). Left alone: what
    has no such axis, vectors, kernels. Three passes over the weights a step.
    """
    for p, role in table.items():
        axis = -2 if role == "proj" else -1
        if role in ("embed", "head", "matrix", "proj") and p.size(axis) == dim:
            p.div_(torch.linalg.vector_norm(p, dim=axis, keepdim=True).clamp_min(1e-12))


class SphereNorm(PreNorm):
    """(x, sqrt(C) x): what RMSNorm would make of the unit vector x that the residual carries.

    With this length the MLP's factor sqrt(C) needs no place of its own, and mixers and MLPs that were not made for nGPT
    see inputs of the size they know. Attention does not notice: its output is normalised again.
    """
    needs = {                                               # settings that keep it true: {field: (values, why)}
        "residual": (("ngpt",), "only that keeps the stream's vectors at length 1"),
        "embed_norm": ((False,), "the embedding's rows are unit vectors already"),
        "embed_scale": ((False,), "the embedding's rows are to stay unit vectors"),
        "pos": (("rope", "none"), "a sum with positions is no unit vector"),
        "x0_shortcut": ((False,), "a sum with the embedding is no unit vector"),
        "unet_skips": ((False,), "a sum with an earlier layer is no unit vector"),
        "branch_scale": ((False,), "the branches are normalised, their scale is lost"),
        "linear": (("dense",), "the factors of a matrix have no axis of channels to normalise"),
        "zero_init": ((False,), "zeros cannot be normalised"),
        "weight_decay": ((0.0,), "normalised weights do not grow")}

    def __init__(self, dim, layer):
        super().__init__(dim, layer)
        self.dim = dim

    def forward(self, x):
        return x, self.dim ** 0.5 * x

    def constrain(self, table):
        unit_weights(table, self.dim)


class NGPTAttention(CausalSelfAttention):
    """Attention with unit queries and keys and a learned scale a head and channel, behind the rotary positions.

    q and k share the scale s, so q carries s^2: the same scores, and grouped keys need no scales of their own. It also
    carries D, which turns the kernel's 1 / sqrt(D) into the paper's sqrt(D). (B, T, C) -> (B, T, C).
    """
    needs = {"norm": (("ngpt", "pre", "pre_post"), "its scales take the place of what that norm does"),
             "residual": (("ngpt", "add", "gated"), "its scales take the place of what that residual does")}

    def __init__(self, dim, seq_len, **attention):
        super().__init__(dim, seq_len, head_norm=NoHeadNorm, **attention)
        self.s_qk = Scale(dim, scale=dim ** -0.5)

    def heads(self, z, v1, at):
        q, k, v = super().heads(z, v1, at)
        s = self.s_qk().square().view(-1, 1, self.head_dim)
        return (self.head_dim * s * unit(q)).type_as(v), unit(k).type_as(v), v


class NGPTMLP(GatedMLP):
    """SwiGLU with a learned scale a hidden channel on either side of the product: (B, T, C) -> (B, T, C)."""
    def __init__(self, dim, **knobs):
        super().__init__(dim, **knobs)
        self.s_uv = Scale(2 * self.fc.out_features)

    def forward(self, x):
        vu = self.fc.fused(x, (self.gate, self.fc))
        v, u = (self.s_uv().type_as(vu) * vu).chunk(2, dim=-1)
        return self.proj(F.silu(v) * u)
