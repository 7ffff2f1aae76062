"""What a block is held together by, norms and residuals, and added positions. Letters: B batch, T time, C channels."""
import torch
import torch.nn as nn
import torch.nn.functional as F


def norm(x):
    """RMSNorm over the last dimension, without a gain: the matrices behind it can learn one."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


# Norms. A row says, for each of a block's two branches, what the residual carries and what the branch reads: (x, h).

class PreNorm(nn.Module):
    """x + f(norm x), the usual."""
    def __init__(self, dim, layer):
        super().__init__()

    def forward(self, x):
        return x, norm(x)

    def mixer(self, x):
        return self(x)

    def mlp(self, x):
        return self(x)

    def constrain(self, table):
        """What the row demands of all weights, {parameter: role}: after initialisation and after every step."""


class LayerNormScaling(PreNorm):
    """x + f(norm(x) / sqrt(l)) in block l = 1, 2, ...: deep blocks stay useful (arXiv 2502.05795).

    Inert in front of what ignores scale: QK-norm (all but the values), PolyNorm, the keys of a delta rule.
    """
    def __init__(self, dim, layer):
        super().__init__(dim, layer)
        self.scale = (layer + 1) ** -0.5

    def forward(self, x):
        return x, self.scale * norm(x)


class HybridNorm(PreNorm):
    """y = x + attention(x), normalised inside its heads (head_norm qkv); then z + mlp(z) of z = gain * norm(y).

    The residual carries z, not y. Source: arXiv 2503.04598, github.com/BryceZhuo/HybridNorm.
    """
    needs = {"head_norm": (("qkv",), "HybridNorm normalises inside the heads: add --head_norm qkv")}

    def __init__(self, dim, layer):
        super().__init__(dim, layer)
        self.gain = nn.Parameter(torch.ones(dim))

    def mixer(self, x):
        return x, x

    def mlp(self, x):
        z = norm(x) * self.gain.type_as(x)
        return z, z


def hybrid_star(dim, layer):
    """HybridNorm*: as HybridNorm, but the first block is pre-norm in both branches."""
    return HybridNorm(dim, layer) if layer else PreNorm(dim, layer)


hybrid_star.needs = HybridNorm.needs


class PrePostNorm(PreNorm):
    """norm(x + f(norm x)), the outer norm with a gain; the residual carries what it gives.

    The outer norm of a branch is taken where the next branch begins, after the last block by the model. It comes after
    the sum, where Sandwich-LN has x + norm(f(norm x)). Source: the layer of github.com/mrorigo/pytorch-fftnet.
    """
    role = "vector"

    def __init__(self, dim, layer):
        super().__init__(dim, layer)
        self.gain = nn.Parameter(torch.ones(min(layer + 1, 2), dim))         # nothing precedes the first mixer

    def outer(self, x, gain):
        z = norm(x) * gain.type_as(x)
        return z, norm(z)

    def mixer(self, x):
        return self.outer(x, self.gain[1]) if len(self.gain) == 2 else self(x)

    def mlp(self, x):
        return self.outer(x, self.gain[0])


# Residuals: what a block makes of the stream x and the output y of branch 0 (mixer) or 1 (MLP).

class Add(nn.Module):
    def __init__(self, dim):
        super().__init__()

    def forward(self, x, y, branch):
        return x + y


class GatedResidual(nn.Module):
    """x + sigmoid(g) * y, a learned g a channel and branch; it starts at 0, the branch at half its strength."""
    role = "vector"

    def __init__(self, dim):
        super().__init__()
        self.g = nn.Parameter(torch.zeros(2, dim))

    def forward(self, x, y, branch):
        return x + torch.sigmoid(self.g[branch]).type_as(y) * y


class GPAS(nn.Module):
    """(1 - SiLU(a)) (x + y) forward, gradients as if nothing were scaled: a scalar a, shared by the block's branches.

    a starts at 0, the identity. Its gradient sums over all tokens and channels, so the trainer clips those of all
    blocks together to the norm `clip`, apart from the rest. Source: arXiv 2506.22049, github.com/dandingsky/GPAS.
    """
    role = "gate"

    def __init__(self, dim, *, clip):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1))

    def forward(self, x, y, branch):
        h = x + y
        return h - F.silu(self.a).type_as(h) * h.detach()


# Positions, added to the embedding, (B, T, C) -> (B, T, C), `at` a slice or (B, T). Rotary ones: see attention.py.

class NoPositions(nn.Module):
    def __init__(self, dim, seq_len):
        super().__init__()

    def forward(self, x, at):
        return x


class LearnedPositions(nn.Module):
    role = "embed"

    def __init__(self, dim, seq_len):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(seq_len, dim))

    def forward(self, x, at):
        return x + self.weight[at]


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines of log-spaced frequencies (Vaswani et al., arXiv 1706.03762)."""
    def __init__(self, dim, seq_len):
        super().__init__()
        angle = torch.arange(seq_len)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer("table", torch.cat((angle.sin(), angle.cos()), dim=1)[:, :dim], persistent=False)

    def forward(self, x, at):
        return x + self.table[at]
