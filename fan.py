"""FANformer: attention that reads a Fourier Analysis layer (Dong et al., arXiv 2410.02675 and 2502.21309).

    FAN(x) = [ cos(W_p x + b_p) | sin(W_p x + b_p) | act(W_g x + b_g) ]     ratio of the outputs each for cos and sin
    ATF    : q, k, v = W_qkv FAN(x), then ordinary causal attention; act is the identity

The layer acts on channels, token by token, so it cannot look ahead; "Fourier" here means periodic features of a token,
not frequencies over time. An independent study (arXiv 2512.14873) credits the sine alone: --fan_trig sin tries that.
Source: github.com/YihongDong/FAN and FANformer. Letters: B batch, T time, C channels.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import CausalSelfAttention
from parts import MLP, Linear

TRIG = {"both": (torch.cos, torch.sin), "sin": (torch.sin,)}


class FANLayer(nn.Module):
    """(..., d_in) -> (..., d_out): a share 2 * ratio of the outputs is periodic, all from one projection with a bias.

    ratio 0 is a linear layer. Raises ValueError for a ratio outside [0, 0.5] or an unknown trig.
    """
    def __init__(self, d_in, d_out, *, ratio, trig="both", act=torch.positive, linear=Linear):
        super().__init__()
        if not 0 <= ratio <= 0.5 or trig not in TRIG:
            raise ValueError(f"FAN: --fan_ratio {ratio} must lie in [0, 0.5] and --fan_trig {trig} be one of "
                             f"{', '.join(TRIG)}")
        self.trig, self.act, self.out_features = TRIG[trig], act, d_out
        self.periodic = int(2 * ratio * d_out / len(self.trig))                     # d_p, inputs of the trigonometry
        self.input = linear(d_in, d_out - (len(self.trig) - 1) * self.periodic, bias=True)

    def forward(self, x):
        z = self.input(x)
        p, g = z.split((self.periodic, z.size(-1) - self.periodic), dim=-1)
        # Trigonometry in fp32. The angle's own rounding to bf16 stays: 0.0013 on average at angles of deviation 1.
        p = p.to(torch.promote_types(p.dtype, torch.float32))
        return torch.cat([*(f(p).type_as(g) for f in self.trig), self.act(g)], dim=-1)


class FAN(CausalSelfAttention):
    """ATF, (B, T, C) -> (B, T, C): attention whose queries, keys and values are projected from one FAN layer."""
    def __init__(self, dim, seq_len, *, ratio=0.125, trig="both", linear=Linear, **attention):
        super().__init__(dim, seq_len, linear=linear, **attention)
        self.fan = FANLayer(dim, dim, ratio=ratio, trig=trig, linear=linear)

    def qkv(self, x):
        return super().qkv(self.fan(x))

    def value(self, x):
        return self.v(self.fan(x))


class FANMLP(MLP):
    """proj(FAN(x)) with GELU on the part that is not periodic: the MLP of the FAN paper."""
    def __init__(self, dim, *, mlp_ratio, ratio=0.125, trig="both", linear=Linear):
        super().__init__(dim, mlp_ratio=mlp_ratio, linear=linear)
        self.fc = FANLayer(dim, int(mlp_ratio * dim), ratio=ratio, trig=trig, act=F.gelu, linear=linear)

    def activation(self, x):
        return x


def fan_naive(m, x):
    """A FAN layer of dense projections, output column by output column, for tests: (..., d_in) -> (..., d_out)."""
    W, b, columns = m.input.weight, m.input.bias, []
    rows = [(f, i) for f in m.trig for i in range(m.periodic)] + [(m.act, i) for i in range(m.periodic, len(W))]
    for f, i in rows:
        columns.append(f((x * W[i]).sum(-1) + b[i]))
    return torch.stack(columns, dim=-1)
