"""What a block is made of besides its mixer: norms, residuals, positions, MLPs, linear layers.

Also what several mixers have inside: norms of heads, the short convolution in front of gates. Each
class is a row of one of the dicts in train_gpt2.py ("The axes"), or is built by such a row. At the
end: which parts fit together.

Letters: B batch, T time, C channels, H heads, D head width, r rank, d_in and d_out widths.
"""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import (CheckpointPolicy, checkpoint,
                                    create_selective_checkpoint_contexts)

from kernels import DepthwiseCausalConv, RMSNorm, SquaredReLU, linear
from support.masked import short_document_conv

WIDE = (torch.float32, torch.float64)


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without a gain: the matrices behind it can learn one."""
    # Elsewhere torch's is one kernel, or becomes one.
    if x.device.type == "cpu" and x.dtype in WIDE and not torch.compiler.is_compiling():
        return RMSNorm.apply(x, 1e-6)
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def scaled(x: Tensor, factor: float) -> Tensor:
    """Times 1 would be passes over memory, forward and backward, compiled, too."""
    return x if factor == 1 else factor * x


def running_mean(x: Tensor) -> Tensor:
    """(B, T, C) -> means of x_1 ... x_t, summed in fp32."""
    total = x.to(torch.promote_types(x.dtype, torch.float32)).cumsum(1)
    t = torch.arange(1, x.size(1) + 1, device=x.device)[:, None]
    return (total / t).type_as(x)


# --------------------------------------------------------------------------------------------------
# Linear layers: how the projections inside a block are made

class Linear(nn.Linear):
    """(..., d_in) -> (..., d_out). Weights start as torch's, U(-1, 1) / sqrt(d_in), a bias at 0."""
    def __init__(self, d_in: int, d_out: int, bias: bool = False):
        super().__init__(d_in, d_out, bias=bias)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight) if self.bias is None else super().forward(x)

    @staticmethod
    def fused(x: Tensor, layers) -> Tensor:
        """Several layers on one input, outputs side by side: one GEMM, though Muon sees each."""
        # Weights side by side are a copy of them all: for the few tokens of decoding, too dear.
        if x.numel() < x.size(-1)**2:
            return torch.cat([layer(x) for layer in layers], dim=-1)
        return linear(x, torch.cat([layer.weight for layer in layers]))


class CoLA(nn.Module):
    """Low-rank linear layer with SiLU inside, b(silu(a(x))): (..., d_in) -> (..., d_out).

    It has r (d_in + d_out) weights; rank 0 means a quarter of the smaller side. Weights start as
    N(0, 1 / sqrt(r (d_in + d_out))), so that entries of their product have variance
    1 / (d_in + d_out). A zero-initialised last factor would be off-paper: --zero_init leaves it.
    Raises ValueError where the rank is so high that nothing is saved.
    Source: arXiv 2502.10940, github.com/alvin-zyl/CoLA.
    """
    role = "matrix"

    def __init__(self, d_in: int, d_out: int, bias: bool = False, *, rank: int = 0):
        super().__init__()
        rank = rank or max(1, min(d_in, d_out) // 4)
        if rank * (d_in + d_out) > d_in * d_out:
            raise ValueError(f"CoLA: rank {rank} makes a {d_in} x {d_out} layer larger, not "
                             "smaller: lower --cola_rank")
        self.out_features = d_out
        std = (rank * (d_in + d_out)) ** -0.25
        self.a = nn.Parameter(std * torch.randn(rank, d_in))
        self.b = nn.Parameter(std * torch.randn(d_out, rank))
        self.bias = Bias(d_out) if bias else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.bias(F.linear(F.silu(F.linear(x, self.a)), self.b))

    @staticmethod
    def fused(x: Tensor, layers) -> Tensor:
        """Several layers on one input, outputs side by side: one GEMM for the inner factors."""
        z = F.silu(F.linear(x, torch.cat([layer.a for layer in layers])))
        z = z.split([len(layer.a) for layer in layers], dim=-1)
        return torch.cat([F.linear(part, layer.b) for part, layer in zip(z, layers)], dim=-1)


class Bias(nn.Module):
    """A bias by itself: a module of its own, so that its role is "vector"."""
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.type_as(x)


class ShortConv(nn.Module):
    """Depthwise causal convolution over the last `width` tokens, (B, T, C) -> (B, T, C).

    Cheap local mixing in front of a gate or of attention (H3, arXiv 2212.14052; Hyena, arXiv
    2302.10866). It starts near the identity.
    """
    role = "vector"

    def __init__(self, dim: int, width: int = 4):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(width, dim))
        with torch.no_grad():
            self.weight[-1] += 1.0

    def forward(self, x: Tensor, more: Tensor | None = None, age: Tensor | None = None) -> Tensor:
        """more (B, T, c) is added to x's last c channels; age (B, T): see support/masked.py."""
        conv = DepthwiseCausalConv.apply if age is None else partial(short_document_conv, age=age)
        return conv(x, self.weight.type_as(x), more)

    def init_state(self, B: int) -> Tensor:
        width, C = self.weight.shape
        return self.weight.new_zeros(B, width - 1, C)

    def state_behind(self, x: Tensor) -> Tensor:
        """The state behind the inputs (B, T, C): the last width - 1 of them."""
        width = len(self.weight)
        return F.pad(x[:, 1 - width:], (0, 0, max(0, width - 1 - x.size(1)), 0))

    def step(self, x: Tensor, state: Tensor, age: Tensor | None = None):
        """(B, C), the last inputs (B, width - 1, C), age (B,) -> (B, C), the next state."""
        own = window = torch.cat((state, x[:, None]), dim=1)
        if age is not None:
            lags = torch.arange(len(self.weight) - 1, -1, -1, device=x.device)[:, None]
            own = torch.where(age[:, None, None] >= lags, window, 0)
        return (own * self.weight.type_as(x)).sum(1), window[:, 1:]


class NoConv(nn.Module):
    """In the place of a ShortConv where there is none."""
    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor, more=None, age=None) -> Tensor:
        return x

    def init_state(self, B: int):
        return None

    def state_behind(self, x: Tensor):
        return None

    def step(self, x: Tensor, state, age=None):
        return x, state


# --------------------------------------------------------------------------------------------------
# Norms. For each of a block's two branches: what the residual carries, and what the branch reads.

class PreNorm(nn.Module):
    """x + f(norm x), the usual. mixer(x) and mlp(x) -> (x for the residual, h for the branch)."""
    def __init__(self, dim: int, layer: int):
        super().__init__()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, norm(x)

    def mixer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x)

    def mlp(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x)

    def constrain(self, table):
        """What the row demands of all weights, {parameter: role}, after init and every step."""


class LayerNormScaling(PreNorm):
    """x + f(norm(x) / sqrt(l)) in block l = 1, 2, ...: deep blocks stay useful (arXiv 2502.05795).

    Inert in front of what ignores scale: QK-norm (all but the values), PolyNorm, the keys of a
    delta rule.
    """
    def __init__(self, dim: int, layer: int):
        super().__init__(dim, layer)
        self.scale = (layer + 1) ** -0.5

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.scale * norm(x)


class HybridNorm(PreNorm):
    """y = x + attention(x), normalised inside its heads (head_norm qkv); then z + mlp(z).

    z = gain * norm(y), and the residual carries z, not y. Source: arXiv 2503.04598,
    github.com/BryceZhuo/HybridNorm.
    """
    needs = {"head_norm": (("qkv",), "HybridNorm normalises inside the heads: add --head_norm qkv")}

    def __init__(self, dim: int, layer: int):
        super().__init__(dim, layer)
        self.gain = nn.Parameter(torch.ones(dim))

    def mixer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def mlp(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = norm(x) * self.gain.type_as(x)
        return z, z


def hybrid_star(dim: int, layer: int) -> PreNorm:
    """HybridNorm*: as HybridNorm, but the first block is pre-norm in both branches."""
    return HybridNorm(dim, layer) if layer else PreNorm(dim, layer)


hybrid_star.needs = HybridNorm.needs


class PrePostNorm(PreNorm):
    """norm(x + f(norm x)), the outer norm with a gain; the residual carries what it gives.

    The outer norm of a branch is taken where the next branch begins, after the last block by the
    model. It comes after the sum, where Sandwich-LN has x + norm(f(norm x)). Source: the layer of
    github.com/mrorigo/pytorch-fftnet.
    """
    role = "vector"

    def __init__(self, dim: int, layer: int):
        super().__init__(dim, layer)
        # Nothing precedes the first mixer: the first block has one outer norm, the others two.
        self.gain = nn.Parameter(torch.ones(min(layer + 1, 2), dim))

    def outer(self, x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        z = norm(x) * gain.type_as(x)
        return z, norm(z)

    def mixer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.outer(x, self.gain[1]) if len(self.gain) == 2 else self(x)

    def mlp(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.outer(x, self.gain[0])


# --------------------------------------------------------------------------------------------------
# Norms inside the heads: q, k, v -> the same, each (B, H, T, D)

class NoHeadNorm(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor):
        return q, k, v


class QKNorm(NoHeadNorm):
    """RMSNorm of queries and keys, head by head, without gains (arXiv 2010.04245)."""
    def forward(self, q: Tensor, k: Tensor, v: Tensor):
        return norm(q), norm(k), v


class QKVNorm(nn.Module):
    """RMSNorm of queries, keys and values, head by head; one gain of width D each, for all heads.

    HybridNorm's attention half (arXiv 2503.04598, github.com/BryceZhuo/HybridNorm).
    """
    def __init__(self, head_dim: int):
        super().__init__()
        self.q = nn.Parameter(torch.ones(head_dim))
        self.k = nn.Parameter(torch.ones(head_dim))
        self.v = nn.Parameter(torch.ones(head_dim))

    def forward(self, q: Tensor, k: Tensor, v: Tensor):
        q = norm(q) * self.q.type_as(q)
        k = norm(k) * self.k.type_as(k)
        v = norm(v) * self.v.type_as(v)
        return q, k, v


# --------------------------------------------------------------------------------------------------
# Residuals: what a block makes of the stream x and the output y of branch 0 (mixer) or 1 (MLP)

class Add(nn.Module):
    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor, y: Tensor, branch: int) -> Tensor:
        return x + y


class GatedResidual(nn.Module):
    """x + sigmoid(g) * y, a learned g a channel and branch; g starts at 0, y at half strength."""
    role = "vector"

    def __init__(self, dim: int):
        super().__init__()
        self.g = nn.Parameter(torch.zeros(2, dim))

    def forward(self, x: Tensor, y: Tensor, branch: int) -> Tensor:
        return x + torch.sigmoid(self.g[branch]).type_as(y) * y


class GPAS(nn.Module):
    """(1 - SiLU(a)) (x + y) forward, gradients as if nothing were scaled; one scalar a a block.

    a starts at 0, the identity. Its gradient sums over all tokens and channels, so the trainer
    clips those of all blocks together to the norm `clip`, apart from the rest.
    Source: arXiv 2506.22049, github.com/dandingsky/GPAS.
    """
    role = "gate"

    def __init__(self, dim: int, *, clip: float):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, y: Tensor, branch: int) -> Tensor:
        h = x + y
        return h - F.silu(self.a).type_as(h) * h.detach()


# --------------------------------------------------------------------------------------------------
# Positions that are added to the embedding, (B, T, C) -> (B, T, C). Rotary ones: attention.py.
# `at` is where the tokens stand: a slice, or a row of the batch at a time, (B, T).

class NoPositions(nn.Module):
    def __init__(self, dim: int, seq_len: int):
        super().__init__()

    def forward(self, x: Tensor, at) -> Tensor:
        return x


class LearnedPositions(nn.Module):
    role = "embed"

    def __init__(self, dim: int, seq_len: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(seq_len, dim))

    def forward(self, x: Tensor, at) -> Tensor:
        return x + self.weight[at]


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines of log-spaced frequencies (Vaswani et al., arXiv 1706.03762)."""
    def __init__(self, dim: int, seq_len: int):
        super().__init__()
        frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        angle = torch.arange(seq_len)[:, None] * frequency
        table = torch.cat((angle.sin(), angle.cos()), dim=1)[:, :dim]
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor, at) -> Tensor:
        return x + self.table[at]


# --------------------------------------------------------------------------------------------------
# MLPs, (B, T, C) -> (B, T, C), no biases. The last projection is called proj, as a mixer's is.

class MLP(nn.Module):
    """proj(activation(fc x))."""
    def __init__(self, dim: int, *, mlp_ratio: float, linear=Linear):
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.fc = linear(dim, hidden)
        self.proj = linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.activation(self.fc(x)))


class GELU(MLP):
    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class ReLU2(MLP):
    def activation(self, x: Tensor) -> Tensor:
        return SquaredReLU.apply(x)


class GatedMLP(MLP):
    """proj(activation(gate x) * fc x): three matrices, so ratio 8/3 has the size of 4."""
    def __init__(self, dim: int, *, mlp_ratio: float, linear=Linear):
        super().__init__(dim, mlp_ratio=mlp_ratio, linear=linear)
        self.gate = linear(dim, self.fc.out_features)

    def forward(self, x: Tensor) -> Tensor:
        gate, z = self.fc.fused(x, (self.gate, self.fc)).chunk(2, dim=-1)
        return self.proj(self.activation(gate) * z)


class SwiGLU(GatedMLP):
    """Shazeer, arXiv 2002.05202."""
    def activation(self, x: Tensor) -> Tensor:
        return F.silu(x)


class PolyNorm(nn.Module):
    """a0 n(z^3) + a1 n(z^2) + a2 n(z) + b, n RMSNorm over the hidden width: (..., hidden) -> same.

    In fp32: z^6 overflows fp16 at |z| = 6.4.
    Source: arXiv 2411.03884, github.com/BryceZhuo/PolyCom.
    """
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.full((3,), 1 / 3))
        self.b = nn.Parameter(torch.zeros(1))

    def forward(self, z: Tensor) -> Tensor:
        x = z.to(torch.promote_types(z.dtype, torch.float32))
        y = self.a[0] * norm(x**3) + self.a[1] * norm(x**2) + self.a[2] * norm(x) + self.b
        return y.type_as(z)


class PolyNormMLP(MLP):
    """PolyNorm as its paper has it, without a gate."""
    def __init__(self, dim: int, *, mlp_ratio: float, linear=Linear):
        super().__init__(dim, mlp_ratio=mlp_ratio, linear=linear)
        self.activation = PolyNorm()


class GatedPolyNorm(GatedMLP):
    """PolyNorm on a gate, as NeoLLM has it: the size its card states needs the third matrix."""
    def __init__(self, dim: int, *, mlp_ratio: float, linear=Linear):
        super().__init__(dim, mlp_ratio=mlp_ratio, linear=linear)
        self.activation = PolyNorm()


# --------------------------------------------------------------------------------------------------
# Recomputation: each runs a block and decides which of its activations live until backward

def keep_all(block, *inputs):
    return block(*inputs)


def recompute_block(block, *inputs):
    """Keep the block's input only: least memory, one more forward (arXiv 1604.06174)."""
    return checkpoint(block, *inputs, use_reentrant=False)


def recompute_high_rank(block, *inputs):
    """CoLA-M: keep the results of narrowing GEMMs (CoLA's inner ones) and of attention only."""
    contexts = partial(create_selective_checkpoint_contexts, narrow_or_attention)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def narrow_or_attention(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    # The GEMM that q, k and v share is narrowing, too: 3 r <= C.
    narrow = op is torch.ops.aten.mm.default and args[1].size(1) <= args[1].size(0)
    if narrow or "scaled_dot_product" in str(op) or "flex_attention" in str(op):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# --------------------------------------------------------------------------------------------------
# Which parts fit together

def check_values(mixers):
    """{row: mixer}: ValueError where a value residual has nothing to add, or other widths."""
    for name, mixer in mixers.items():
        if not hasattr(mixer, "v") or not hasattr(mixer, "value"):
            raise ValueError(f"--value_residual: {name} has no values to add to: leave it out, or "
                             "change --mixer")
    widths = {name: mixer.v.out_features for name, mixer in mixers.items()}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{width} in {name}" for name, width in widths.items())
        raise ValueError(f"--value_residual adds layer 1's values, but their widths differ: "
                         f"{listed}: leave out --n_kv_head or --value_residual")


def check_parts(model):
    """ValueError where the parts of a GPT do not fit together."""
    cfg = model.cfg
    mixers = [block.mixer for block in model.blocks]
    for name, p in model.named_parameters():
        if not p.numel():
            raise ValueError(f"{name} would have no entries: one of its sizes is 0: raise it")
    if cfg.value_residual:
        check_values(dict(zip(cfg.mixers, mixers)))
    if model.mask_documents and cfg.document_token < 0:
        raise ValueError("GPT needs a document_token to mask documents; main() takes the "
                         "vocabulary's")
    for name, mixer in zip(cfg.mixers, mixers):
        if model.mask_documents and not getattr(mixer, "masks_documents", False):
            raise ValueError(f"--batches {cfg.batches}: {name} as set here cannot keep "
                             "documents apart; attention can, and afno of backend auto with "
                             "--afno_taps 16: take these, or --batches padded")
