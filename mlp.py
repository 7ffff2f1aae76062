"""MLPs, (B, T, C) -> (B, T, C), no biases. Their last projection is called proj, as a mixer's is."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from blocks import norm
from linear import Linear


class MLP(nn.Module):
    """proj(activation(fc x))."""
    def __init__(self, dim, *, mlp_ratio, linear=Linear):
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.fc, self.proj = linear(dim, hidden), linear(hidden, dim)

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


class GatedMLP(MLP):
    """proj(activation(gate x) * fc x): three matrices, so ratio 8/3 has the size of 4."""
    def __init__(self, dim, *, mlp_ratio, linear=Linear):
        super().__init__(dim, mlp_ratio=mlp_ratio, linear=linear)
        self.gate = linear(dim, self.fc.out_features)

    def forward(self, x):
        gate, z = self.fc.together(x, (self.gate, self.fc)).chunk(2, dim=-1)
        return self.proj(self.activation(gate) * z)


class SwiGLU(GatedMLP):
    """Shazeer, arXiv 2002.05202."""
    def activation(self, x):
        return F.silu(x)


class PolyNorm(nn.Module):
    """a0 n(z^3) + a1 n(z^2) + a2 n(z) + b, n RMSNorm over the hidden width (arXiv 2411.03884): (..., hidden) -> same.

    In fp32: z^6 overflows fp16 at |z| = 6.4. Source: github.com/BryceZhuo/PolyCom.
    """
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.full((3,), 1 / 3)), nn.Parameter(torch.zeros(1))

    def forward(self, z):
        x = z.to(torch.promote_types(z.dtype, torch.float32))
        return (self.a[0] * norm(x**3) + self.a[1] * norm(x**2) + self.a[2] * norm(x) + self.b).type_as(z)


class PolyNormMLP(MLP):
    """PolyNorm as its paper has it, without a gate."""
    def __init__(self, dim, *, mlp_ratio, linear=Linear):
        super().__init__(dim, mlp_ratio=mlp_ratio, linear=linear)
        self.activation = PolyNorm()


class GatedPolyNorm(GatedMLP):
    """PolyNorm on a gate, as NeoLLM has it: the size its card states needs the third matrix."""
    def __init__(self, dim, *, mlp_ratio, linear=Linear):
        super().__init__(dim, mlp_ratio=mlp_ratio, linear=linear)
        self.activation = PolyNorm()
