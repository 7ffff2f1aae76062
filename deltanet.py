"""Gated DeltaNet: linear attention whose state forgets by a gate and overwrites by the delta rule.

O(T), and O(1) a token in decoding. A head keeps one matrix S, dk x dv, an associative memory from
keys to values. Token t first lets it decay, then moves what it holds at key k_t towards v_t by the
share beta_t, then reads it at q_t:

    S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,        S_0 = 0
    o_t = S_t^T q_t / sqrt(dk)
    g_t = -e^{A_log} softplus(W_a x_t + dt_bias) <= 0
    beta_t = sigmoid(W_b x_t), twice that at will
    q, k, v = silu(short causal convolution of W x),  q and k then of unit length per head
    y = W_o (rms_norm(o) * gain * silu(W_g x))

Token by token that is T small steps. In chunks of C tokens it is matrix products: with
c_i = g_1 + ... + g_i, the decay since the chunk began, D_ij = e^{c_i - c_j} for i >= j, and
Kb = beta K, the errors E = v - held solve a triangular system:

    (I + A) E = R = V - e^c K S,        A = strictly lower part of K Kb^T * D
    O = (e^c Q S + P E) / sqrt(dk),     P = Q Kb^T * D
    S' = e^{c_C} S + (e^{c_C - c} Kb)^T E

of which only E and S' must wait for the chunk before. Causal as published: D is lower triangular
and S is the past.

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464); NVlabs/GatedDeltaNet;
fla-org/flash-linear-attention, whose CUDA kernel is used where it runs and agrees (pip install
flash-linear-attention).

Letters: B batch, T time, C channels or tokens a chunk, H value heads, N chunks, dk and dv the
widths of key and value.
"""
import math
import sys
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels import ChunkwiseRule
from parts import Linear, ShortConv


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk: int = 32,
                     state: Tensor | None = None):
    """The rule, chunkwise -> o (B, T, H, dv), the final state (B, H, dk, dv).

    q, k (B, T, H, dk), v (B, T, H, dv), g, beta (B, T, H). g <= 0 is the log of the decay; q is
    divided by sqrt(dk) here. A state of None is zeros. Works in fp32 (fp64 stays), also under
    autocast; o has v's dtype, the state that of the work. Differentiable once.
    """
    B, T, H, dk = k.shape
    # Compiled, whole chunks and all of the time at once: one graph for every T.
    compiling = torch.compiler.is_compiling()
    C = chunk if compiling else min(chunk, T)
    dtype = torch.promote_types(v.dtype, torch.float32)
    inputs = [u.to(dtype) for u in (q, k, v, beta[..., None], g[..., None])]
    padding = -(-T // C) * C - T
    uneven = compiling or padding > 0
    if uneven:
        # Zeros leave the state alone.
        inputs = [F.pad(u, (0, 0, 0, 0, 0, padding)) for u in inputs]
    span = inputs[0].size(1)
    if v.device.type == "cpu" and not compiling:
        # One stretch of time after another, half a MB a tensor: what is in work stays in the cache.
        span = C * max(1, 2**17 // (B * H * dk * C))
    if state is None:
        S = inputs[2].new_zeros(B * H, dk, v.size(-1))
    else:
        S = state.to(dtype).flatten(0, 1)

    def chunks(u):                                   # (B, span, H, d) -> (N B H, C, d)
        return u.unflatten(1, (-1, C)).permute(1, 0, 3, 2, 4).flatten(0, 2)

    o = []
    with torch.autocast(v.device.type, enabled=False):
        for stretch in zip(*(u.split(span, dim=1) for u in inputs)):
            Q, K, V, b, c = map(chunks, stretch)
            y, S = ChunkwiseRule.apply(Q * dk**-0.5, K, V, b, c.cumsum(1), S)
            y = y.unflatten(0, (-1, B, H))           # (N, B, H, C, dv)
            o.append(y.permute(1, 0, 3, 2, 4).flatten(1, 2))
        o = torch.cat(o, dim=1)
        if uneven:
            o = F.pad(o, (0, 0, 0, 0, 0, -padding))
        return o.type_as(v), S.unflatten(0, (B, H))


def with_kernel(kernel, q, k, v, g, beta, chunk=32, state=None):
    """The rule by fla's kernel where it applies, in bf16 or fp16 on a GPU; else ours.

    The kernel has chunks of its own.
    """
    if not v.is_cuda or v.dtype not in (torch.bfloat16, torch.float16) or k.size(-1) > 256:
        return gated_delta_rule(q, k, v, g, beta, chunk, state)
    q = q.type_as(v)
    k = k.type_as(v)
    return kernel(q, k, v, g, beta, initial_state=state, output_final_state=True)


def agrees(kernel, device) -> bool:
    """Does the kernel, tried once in bf16, give our outputs, states and gradients within 5%?"""
    u = torch.rand(5, 1, 100, 2, 64, generator=torch.Generator().manual_seed(0), device="cpu")
    u = u.to(device)
    q, k, v = F.normalize(u[:3] - 0.5, dim=-1).bfloat16()
    inputs = [x.requires_grad_() for x in (q, k, v, -u[3, ..., 0], u[4, ..., 0])]

    def results(o, S):
        return o, S, *torch.autograd.grad(o.float().sum() + S.sum(), inputs)

    with torch.enable_grad():
        ours = results(*gated_delta_rule(*inputs))
        its = results(*kernel(*inputs, output_final_state=True))
    return all((a - b).abs().max() <= 0.05 * a.abs().max() for a, b in zip(ours, its))


@cache
def best_rule(device="cuda"):
    """gated_delta_rule, or fla's kernel inside it where there is a GPU and the two agree."""
    if torch.cuda.is_available():
        try:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule as kernel
            if not agrees(kernel, device):
                raise ValueError("its results are not ours")
            return partial(with_kernel, kernel)
        except Exception as e:
            # It is optional: fla, Triton or a driver may be missing.
            print("gdn: without fla's kernel:", repr(e)[:200], file=sys.stderr)
    return gated_delta_rule


class GatedDeltaNet(nn.Module):
    """The mixer, (B, T, C) -> (B, T, C) for any T >= 1; equations at the top of the file.

    n_head value heads; k_heads (0: n_head) heads of q and k, each of which serves n_head / k_heads
    consecutive value heads; dk is head_dim (0: dim / n_head), dv expand_v * dk. neg_eigval lets
    beta reach 2: states can flip sign (arXiv 2411.12537). Positions are in the decay: no rotary.
    Decoding keeps S and three tokens. Raises ValueError where the sizes do not fit.
    """
    def __init__(self, dim: int, seq_len: int, *, n_head: int, k_heads: int = 0, head_dim: int = 0,
                 expand_v: float = 1.0, chunk: int = 32, linear=Linear, neg_eigval: bool = False):
        super().__init__()
        k_heads = k_heads or n_head
        dk = head_dim or dim // n_head
        dv = int(expand_v * dk)
        splits = head_dim or dim % n_head == 0
        if n_head % k_heads or not splits or dv < 1 or chunk < 1:
            raise ValueError(f"gdn: {dim} channels, {n_head} and {k_heads} heads, {dk} and {dv} "
                             f"wide, chunk {chunk}: no fit: change --n_head or --gdn_chunk")
        self.n_head = n_head
        self.dk = dk
        self.dv = dv
        self.share = n_head // k_heads
        self.chunk = chunk
        self.beta_max = 2.0 if neg_eigval else 1.0
        self.rule = best_rule()
        self.widths = (k_heads * dk, k_heads * dk, n_head * dv)        # of q, k, v
        self.q = linear(dim, k_heads * dk, bias=False)
        self.k = linear(dim, k_heads * dk, bias=False)
        self.v = linear(dim, n_head * dv, bias=False)
        self.gate = linear(dim, n_head * dv, bias=False)
        self.a = nn.Linear(dim, n_head, bias=False)
        self.b = nn.Linear(dim, n_head, bias=False)
        self.short_conv = ShortConv(sum(self.widths))
        # Mamba-2's start: decays from e^-1.6 a token to almost none, all heads different.
        self.A_log = nn.Parameter(torch.empty(n_head).uniform_(0.01, 16).log())
        dt = torch.empty(n_head).uniform_(math.log(1e-3), math.log(0.1)).exp()
        # softplus(dt_bias) = dt
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.gain = nn.Parameter(torch.ones(dv))
        self.proj = linear(n_head * dv, dim, bias=False)

    def flops(self, T: int) -> int:
        """Forward FLOPs a token besides the weight matrices: the chunkwise rule's products."""
        C = min(self.chunk, T)
        in_chunk = 4 * C * (self.dk + self.dv)
        inverse = C * C
        with_state = 6 * self.dk * self.dv
        return self.n_head * (in_chunk + inverse + with_state)

    def value(self, x: Tensor) -> Tensor:
        """The values a value residual hands to later layers, (B, T, n_head * dv)."""
        return self.v(x)

    def qkv(self, x: Tensor, v1: Tensor | None) -> Tensor:
        q = self.q(x)
        k = self.k(x)
        v = self.v(x)
        if v1 is not None:
            v = v + v1
        return torch.cat((q, k, v), dim=-1)

    def unit_heads(self, u: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., k_heads * dk) -> (..., H, dk) of unit length, one copy a value head that shares."""
        u = u.unflatten(-1, (-1, self.dk)).to(dtype)
        u = u * torch.rsqrt(u.square().sum(-1, keepdim=True) + 1e-6)
        return u.repeat_interleave(self.share, dim=-2) if self.share > 1 else u

    def heads(self, z: Tensor, x: Tensor):
        """-> q, k, v (..., H, d), g and beta (..., H); z is qkv behind the convolution."""
        q, k, v = F.silu(z).split(self.widths, dim=-1)
        dtype = torch.promote_types(z.dtype, torch.float32)
        q = self.unit_heads(q, dtype)
        k = self.unit_heads(k, dtype)
        v = v.unflatten(-1, (-1, self.dv))
        g = -self.A_log.exp() * F.softplus(self.a(x).to(dtype) + self.dt_bias)
        beta = self.beta_max * self.b(x).to(dtype).sigmoid()
        return q, k, v, g, beta

    def out(self, o: Tensor, x: Tensor) -> Tensor:
        """(..., H, dv), (..., C) -> (..., C)"""
        o = F.rms_norm(o, (self.dv,), self.gain.type_as(o), eps=1e-5).flatten(-2)
        return self.proj(o * F.silu(self.gate(x)))

    def forward(self, x: Tensor, v1: Tensor | None = None) -> Tensor:
        z = self.short_conv(self.qkv(x, v1))
        o, _ = self.rule(*self.heads(z, x), self.chunk)
        return self.out(o, x)

    def prefill(self, x: Tensor, v1: Tensor | None = None):
        """A prompt: forward's output, and the state behind it."""
        z = self.qkv(x, v1)
        o, S = self.rule(*self.heads(self.short_conv(z), x), self.chunk)
        return self.out(o, x), (self.short_conv.state_behind(z), S)

    def init_state(self, B: int):
        S = self.gain.new_zeros(B, self.n_head, self.dk, self.dv)
        return self.short_conv.init_state(B), S

    def step(self, x: Tensor, state, v1: Tensor | None = None):
        """One token, (B, C) and the state -> (B, C), the next state."""
        window, S = state
        z, window = self.short_conv.step(self.qkv(x, v1), window)
        token = [u[:, None] for u in self.heads(z, x)]
        o, S = gated_delta_rule_naive(*token, S)
        return self.out(o[:, 0], x), (window, S)


def gated_delta_rule_naive(q, k, v, g, beta, state=None):
    """gated_delta_rule's numbers by its recurrence, one token after another. Also decodes."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    scale = k.size(-1) ** -0.5
    if state is None:
        S = v.new_zeros(v.size(0), *k.shape[2:], v.size(-1), dtype=dtype)
    else:
        S = state.to(dtype)
    o = []
    with torch.autocast(v.device.type, enabled=False):
        tokens = zip(*(x.to(dtype).unbind(1) for x in (q, k, v, g, beta)))
        for q_t, k_t, v_t, g_t, b_t in tokens:
            S = g_t.exp()[..., None, None] * S       # forget, before anything is read
            held = (S * k_t[..., None]).sum(-2)
            error = b_t[..., None] * (v_t - held)
            S = S + k_t[..., None] * error[..., None, :]
            o.append((S * q_t[..., None]).sum(-2) * scale)
        return torch.stack(o, dim=1).type_as(v), S
