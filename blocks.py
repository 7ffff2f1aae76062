"""The small parts that mixers and the trainer share: norm, positions, MLPs.

Letters: B batch, T time, C channels, H heads, D head width.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


def norm(x):
    """RMSNorm over the last dimension, without a gain: the matrices behind it can learn one."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


# Positions. `added` ones give (B, T, C) -> (B, T, C) at the embedding; rotary acts on heads, inside attention.

class NoPositions(nn.Module):
    def __init__(self, dim, seq_len):
        super().__init__()

    def forward(self, x, start=0):
        return x


class LearnedPositions(nn.Module):
    role = "embed"

    def __init__(self, dim, seq_len):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(seq_len, dim))

    def forward(self, x, start=0):
        return x + self.weight[start:start + x.size(1)]


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines of log-spaced frequencies (Vaswani et al., arXiv 1706.03762)."""
    def __init__(self, dim, seq_len):
        super().__init__()
        angle = torch.arange(seq_len)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer("table", torch.cat((angle.sin(), angle.cos()), dim=1)[:, :dim], persistent=False)

    def forward(self, x, start=0):
        return x + self.table[start:start + x.size(1)]


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


# MLPs, (B, T, C) -> (B, T, C), no biases

class MLP(nn.Module):
    """proj(activation(fc x))."""
    def __init__(self, dim, *, mlp_ratio):
        super().__init__()
        self.fc = nn.Linear(dim, int(mlp_ratio * dim), bias=False)
        self.proj = nn.Linear(int(mlp_ratio * dim), dim, bias=False)

    def forward(self, x):
        return self.proj(self.activation(self.fc(x)))


class GELU(MLP):
    def activation(self, x):
        return F.gelu(x)


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2 (So et al., arXiv 2109.08668). Its own backward makes two passes, autograd's makes six."""
    @staticmethod
    def forward(ctx, x):
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx, dy):
        r, = ctx.saved_tensors
        return (dy * r).mul_(2)


class ReLU2(MLP):
    def activation(self, x):
        return SquaredReLU.apply(x)
