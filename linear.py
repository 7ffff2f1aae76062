"""How the decoder's projections are made: dense, or CoLA's low-rank layers; and what is recomputed in backward.

Letters: r rank, d_in and d_out widths.
"""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


class Linear(nn.Linear):
    """(..., d_in) -> (..., d_out); weights start as torch's, U(-1, 1) / sqrt(d_in), a bias at 0."""
    def __init__(self, d_in, d_out, bias=False):
        super().__init__(d_in, d_out, bias=bias)
        if bias:
            nn.init.zeros_(self.bias)

    @staticmethod
    def together(x, layers):
        """Several layers on one input, outputs side by side: one GEMM, though Muon sees a matrix a layer."""
        return F.linear(x, torch.cat([m.weight for m in layers]))


class CoLA(nn.Module):
    """Low-rank linear layer with SiLU inside, b(silu(a(x))): (..., d_in) -> (..., d_out), d_in r + r d_out weights.

    rank 0 means a quarter of the smaller side; weights start as N(0, 1 / sqrt(r (d_in + d_out))), so that entries of
    their product have variance 1 / (d_in + d_out). A zero-initialised last factor would be off-paper: --zero_init does
    not reach it. Raises ValueError where the rank is so high that nothing is saved.
    Source: arXiv 2502.10940, github.com/alvin-zyl/CoLA.
    """
    role = "matrix"

    def __init__(self, d_in, d_out, bias=False, *, rank=0):
        super().__init__()
        rank = rank or max(1, min(d_in, d_out) // 4)
        if rank * (d_in + d_out) > d_in * d_out:
            raise ValueError(f"CoLA: rank {rank} makes a {d_in} x {d_out} layer larger, not smaller: lower --cola_rank")
        self.out_features, std = d_out, (rank * (d_in + d_out)) ** -0.25
        self.a, self.b = nn.Parameter(std * torch.randn(rank, d_in)), nn.Parameter(std * torch.randn(d_out, rank))
        self.bias = Bias(d_out) if bias else nn.Identity()

    def forward(self, x):
        return self.bias(F.linear(F.silu(F.linear(x, self.a)), self.b))

    @staticmethod
    def together(x, layers):
        """Several layers on one input, outputs side by side: one GEMM for the inner factors."""
        z = F.silu(F.linear(x, torch.cat([m.a for m in layers]))).split([len(m.a) for m in layers], dim=-1)
        return torch.cat([F.linear(part, m.b) for part, m in zip(z, layers)], dim=-1)


class Bias(nn.Module):                                      # a module of its own, so that its role is "vector"
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return x + self.weight.type_as(x)


# Recomputation: each runs a block and decides which of its activations live until backward.

def keep_all(block, *inputs):
    return block(*inputs)


def recompute_block(block, *inputs):
    """Keep the block's input only: least memory, one more forward of time (Chen et al., arXiv 1604.06174)."""
    return checkpoint(block, *inputs, use_reentrant=False)


def recompute_high_rank(block, *inputs):
    """CoLA-M: keep the results of narrowing GEMMs (CoLA's inner ones) and of attention, recompute what lies between."""
    return checkpoint(block, *inputs, use_reentrant=False,
                      context_fn=partial(create_selective_checkpoint_contexts, narrow_or_attention))


def narrow_or_attention(ctx, op, *args, **kwargs):
    narrow = op is torch.ops.aten.mm.default and args[1].size(1) <= args[1].size(0)     # q, k, v together: 3 r <= C
    keep = narrow or "scaled_dot_product" in str(op)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
