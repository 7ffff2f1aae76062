"""FANformer: attention that reads a Fourier Analysis layer (arXiv 2410.02675 and 2502.21309).

    FAN(x) = [ cos(W_p x + b_p) | sin(W_p x + b_p) | act(W_g x + b_g) ]
    ATF    : q, k, v = W_qkv FAN(x), then ordinary causal attention; act is the identity

A share `ratio` of the outputs is cosines, and as many are sines. The layer acts on channels, token
by token, so it cannot look ahead: "Fourier" means periodic features of a token here, not
frequencies over time. An independent study (arXiv 2512.14873) credits the sine alone: --fan_trig
sin tries that.

Source: Dong et al., github.com/YihongDong/FAN and FANformer. Letters: B batch, T time, C channels.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from attention import CausalSelfAttention
from parts import MLP, Linear

TRIG = {"both": (torch.cos, torch.sin), "sin": (torch.sin,)}


class FANLayer(nn.Module):
    """(..., d_in) -> (..., d_out): a share 2 * ratio of the outputs is periodic.

    One projection with a bias makes all of them; ratio 0 is a linear layer. Raises ValueError for a
    ratio outside [0, 0.5] or an unknown trig.
    """
    def __init__(self, d_in: int, d_out: int, *, ratio: float, trig: str = "both",
                 act=torch.positive, linear=Linear):
        super().__init__()
        if not 0 <= ratio <= 0.5 or trig not in TRIG:
            raise ValueError(f"FAN: --fan_ratio {ratio} must lie in [0, 0.5] and --fan_trig {trig} "
                             f"be one of {', '.join(TRIG)}")
        self.trig = TRIG[trig]
        self.act = act
        self.out_features = d_out
        # d_p, the inputs of the trigonometry: cosine and sine share them.
        self.periodic = int(2 * ratio * d_out / len(self.trig))
        shared = (len(self.trig) - 1) * self.periodic
        self.input = linear(d_in, d_out - shared, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.input(x)
        p, g = z.split((self.periodic, z.size(-1) - self.periodic), dim=-1)
        # Trigonometry in fp32. The angle's own rounding to bf16 stays: 0.0013 on average at angles
        # of deviation 1.
        p = p.to(torch.promote_types(p.dtype, torch.float32))
        periodic = [f(p).type_as(g) for f in self.trig]
        return torch.cat([*periodic, self.act(g)], dim=-1)


class FAN(CausalSelfAttention):
    """ATF, (B, T, C) -> (B, T, C): attention whose q, k and v are projected from one FAN layer."""
    def __init__(self, dim: int, seq_len: int, *, ratio: float = 0.125, trig: str = "both",
                 linear=Linear, **attention):
        super().__init__(dim, seq_len, linear=linear, **attention)
        self.fan = FANLayer(dim, dim, ratio=ratio, trig=trig, linear=linear)

    def qkv(self, x: Tensor) -> Tensor:
        return super().qkv(self.fan(x))

    def value(self, x: Tensor) -> Tensor:
        return self.v(self.fan(x))


class FANMLP(MLP):
    """proj(FAN(x)) with GELU on the part that is not periodic: the MLP of the FAN paper."""
    def __init__(self, dim: int, *, mlp_ratio: float, ratio: float = 0.125, trig: str = "both",
                 linear=Linear):
        super().__init__(dim, mlp_ratio=mlp_ratio, linear=linear)
        hidden = int(mlp_ratio * dim)
        self.fc = FANLayer(dim, hidden, ratio=ratio, trig=trig, act=F.gelu, linear=linear)

    def activation(self, x: Tensor) -> Tensor:
        return x


def fan_naive(m: FANLayer, x: Tensor) -> Tensor:
    """A FAN layer of dense projections, one output column after another, for tests."""
    W = m.input.weight
    b = m.input.bias
    rows = [(f, i) for f in m.trig for i in range(m.periodic)]
    rows += [(m.act, i) for i in range(m.periodic, len(W))]
    columns = [f((x * W[i]).sum(-1) + b[i]) for f, i in rows]
    return torch.stack(columns, dim=-1)
