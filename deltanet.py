"""Gated DeltaNet: linear attention whose state forgets by a gate and overwrites by the delta rule. O(T), O(1) decoding.

A head keeps one matrix S, dk x dv, an associative memory from keys to values. Token t first lets it decay, then moves
what it holds at key k_t towards v_t, by the share beta_t, then reads it at q_t:

    S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,      o_t = S_t^T q_t / sqrt(dk),      S_0 = 0
    g_t = -e^{A_log} softplus(W_a x_t + dt_bias) <= 0,                    beta_t = sigmoid(W_b x_t), twice that at will
    q, k, v = silu(short causal convolution of W x),  q and k then of unit length per head
    y = W_o (rms_norm(o) * gain * silu(W_g x))

Token by token that is T small steps. In chunks of C tokens it is matrix products: with the decay since the chunk began,
c_i = g_1 + ... + g_i, and D_ij = e^{c_i - c_j} for i >= j, the writes X of a chunk solve one triangular system,

    (I + A) [U | W] = beta [V | e^c K],   A = strictly lower part of beta K K^T * D,   X = U - W S
    O = e^c Q S + (Q K^T * D) X,          S' = e^{c_C} S + (e^{c_C - c} K)^T X

of which only X and S' must wait for the chunk before. Causal as published: D is lower triangular and S is the past.

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464); NVlabs/GatedDeltaNet;
fla-org/flash-linear-attention, whose CUDA kernel is used where it is installed (pip install flash-linear-attention).
Letters: B batch, T time, C channels (in the layer) or tokens a chunk (in the rule), H value heads, N chunks, dk and dv
the widths of a key and of a value.
"""
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from conv import ShortConv


class UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 of (..., C, C) matrices, A read strictly below its diagonal.

    By a triangular solve: the product (I - A)(I + A^2)(I + A^4)..., GEMMs only, takes 1.8x the time (forward, backward
    and the product with [V | K], CPU, T = 1024; 4.1x with autograd's own backward) and is off by 1e10 in fp32 where
    keys repeat, as its terms grow like binomials. Autograd through one solve for [U | W] takes 1.6x the time.
    """
    @staticmethod
    def forward(ctx, A):
        eye = torch.eye(A.size(-1), dtype=A.dtype, device=A.device).expand_as(A)
        inverse = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        return (inverse.mT @ grad @ inverse.mT).tril(-1).neg_()


def gated_delta_rule(q, k, v, g, beta, chunk=32, state=None):
    """The rule, chunkwise: q, k (B, T, H, dk), v (B, T, H, dv), g, beta (B, T, H) -> o (B, T, H, dv), final state.

    g <= 0 is the log of the decay; q is divided by sqrt(dk) here. A state is (B, H, dk, dv); None is zeros. Works in
    fp32 (fp64 stays), also under autocast; o has v's dtype, the state that of the work.
    """
    (B, T, H, dk), dv, C = k.shape, v.size(-1), min(chunk, k.size(1))
    dtype, scale = torch.promote_types(v.dtype, torch.float32), dk ** -0.5

    def chunks(x):                                                   # (B, T, H, d) -> (N, B H, C, d)
        x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, -T % C))              # a token of zeros leaves the state alone
        return x.unflatten(1, (-1, C)).permute(1, 0, 3, 2, 4).flatten(1, 2)

    with torch.autocast(v.device.type, enabled=False):
        Q, K, V, b, c = (chunks(x) for x in (q, k, v, beta[..., None], g[..., None]))
        c = c.cumsum(-2)
        # Above the diagonal the difference is positive and its exp may overflow: it is masked before.
        future = torch.ones(C, C, dtype=torch.bool, device=v.device).triu(1)
        D, since = (c - c.mT).masked_fill_(future, -math.inf).exp_(), c.exp()
        solve = UnitLowerInverse.apply(K @ K.mT * (D * b)) * b.mT
        U, W, K_left = solve @ V, solve @ (since * K), ((c[..., -1:, :] - c).exp() * K).mT
        S = V.new_zeros(B * H, dk, dv) if state is None else state.to(dtype).flatten(0, 1)
        before, writes = [], []
        for u, w, k_left, decay in zip(*(x.unbind() for x in (U, W, K_left, since[..., -1:, :]))):   # not U[n]: its
            before.append(S)                                         # backward would fill N tensors of U's size
            writes.append(torch.baddbmm(u, w, S, alpha=-1))
            S = torch.baddbmm(decay * S, k_left, writes[-1])
        o = (since * scale * Q @ torch.stack(before)).flatten(0, 1)
        o = o.baddbmm((Q @ K.mT * D).flatten(0, 1), torch.cat(writes), alpha=scale).unflatten(0, (-1, B, H))
        return o.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T].type_as(v), S.unflatten(0, (B, H))


def with_kernel(kernel, q, k, v, g, beta, chunk=32, state=None):
    """The rule by fla's kernel where it applies, in bf16 or fp16 on a GPU (its chunks are its own); else ours."""
    if not v.is_cuda or v.dtype not in (torch.bfloat16, torch.float16) or k.size(-1) > 256:
        return gated_delta_rule(q, k, v, g, beta, chunk, state)
    return kernel(q.type_as(v), k.type_as(v), v, g, beta, initial_state=state, output_final_state=True)


def best_rule():
    """gated_delta_rule, or the same with fla's kernel inside where that can be imported and there is a GPU."""
    if torch.cuda.is_available():
        try:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule
            return partial(with_kernel, chunk_gated_delta_rule)
        except ImportError:                                          # optional: ours needs no more than torch
            pass
    return gated_delta_rule


class GatedDeltaNet(nn.Module):
    """The mixer, (B, T, C) -> (B, T, C) for any T >= 1; equations at the top of the file.

    n_head value heads; k_heads heads of q and k (0: n_head), each of which serves n_head / k_heads consecutive value
    heads. dk is head_dim (0: dim / n_head), dv is expand_v * dk. neg_eigval lets beta reach 2, so that a state can
    flip sign (arXiv 2411.12537). Positions are in the decay: no rotary. Decoding keeps S and three tokens.
    Raises ValueError where the sizes do not fit.
    """
    def __init__(self, dim, seq_len, *, n_head, k_heads=0, head_dim=0, expand_v=1.0, chunk=32, linear=nn.Linear,
                 neg_eigval=False):
        super().__init__()
        k_heads, dk = k_heads or n_head, head_dim or dim // n_head
        dv = int(expand_v * dk)
        if n_head % k_heads or not head_dim and dim % n_head or dv < 1 or chunk < 1:
            raise ValueError(f"gdn: {dim} channels, {n_head} heads, {k_heads} key heads, {dk} wide, values {dv} wide, "
                             f"chunks of {chunk}: heads must divide, widths be 1 or more: change --n_head, "
                             "--gdn_k_heads, --gdn_head_dim, --gdn_expand_v or --gdn_chunk")
        self.n_head, self.dk, self.dv, self.share = n_head, dk, dv, n_head // k_heads
        self.chunk, self.beta_max, self.rule = chunk, 2.0 if neg_eigval else 1.0, best_rule()
        self.widths = (k_heads * dk, k_heads * dk, n_head * dv)
        self.q, self.k, self.v = (linear(dim, width, bias=False) for width in self.widths)
        self.gate = linear(dim, n_head * dv, bias=False)
        self.a, self.b = (nn.Linear(dim, n_head, bias=False) for _ in range(2))
        self.short_conv = ShortConv(sum(self.widths))
        # Mamba-2's start: decays from e^-1.6 a token to almost none, all heads different.
        self.A_log = nn.Parameter(torch.empty(n_head).uniform_(0.01, 16).log())
        dt = torch.empty(n_head).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))              # softplus(dt_bias) = dt
        self.gain = nn.Parameter(torch.ones(dv))
        self.proj = linear(n_head * dv, dim, bias=False)

    def flops(self, T):
        """Forward FLOPs a token besides the weight matrices: the matrix products of the chunkwise rule."""
        C, dk, dv = min(self.chunk, T), self.dk, self.dv
        return self.n_head * (2 * C * (3 * dk + 2 * dv) + C * C + 6 * dk * dv)       # in a chunk, inverse, with S

    def value(self, x):
        """The values a value residual hands to later layers, (B, T, n_head * dv)."""
        return self.v(x)

    def qkv(self, x, v1=None):
        v = self.v(x)
        return torch.cat((self.q(x), self.k(x), v if v1 is None else v + v1), dim=-1)

    def heads(self, z, x):                                           # -> q, k, v (..., H, d), g and beta (..., H)
        q, k, v = F.silu(z).split(self.widths, dim=-1)
        dtype = torch.promote_types(z.dtype, torch.float32)
        def unit(u):
            u = u.unflatten(-1, (-1, self.dk)).to(dtype)
            u = u * torch.rsqrt(u.square().sum(-1, keepdim=True) + 1e-6)
            return u.repeat_interleave(self.share, dim=-2) if self.share > 1 else u
        g = -self.A_log.exp() * F.softplus(self.a(x).to(dtype) + self.dt_bias)
        return unit(q), unit(k), v.unflatten(-1, (-1, self.dv)), g, self.beta_max * self.b(x).to(dtype).sigmoid()

    def out(self, o, x):                                             # (..., H, dv), (..., C) -> (..., C)
        o = F.rms_norm(o, (self.dv,), self.gain.type_as(o), eps=1e-5).flatten(-2)
        return self.proj(o * F.silu(self.gate(x)))

    def forward(self, x, v1=None):
        q, k, v, g, beta = self.heads(self.short_conv(self.qkv(x, v1)), x)
        return self.out(self.rule(q, k, v, g, beta, self.chunk)[0], x)

    def init_state(self, B):
        return self.short_conv.init_state(B), self.gain.new_zeros(B, self.n_head, self.dk, self.dv)

    def step(self, x, state, v1=None):                               # (B, C) -> (B, C)
        window, S = state
        z, window = self.short_conv.step(self.qkv(x, v1), window)
        o, S = gated_delta_rule_naive(*(u[:, None] for u in self.heads(z, x)), S)
        return self.out(o[:, 0], x), (window, S)


def gated_delta_rule_naive(q, k, v, g, beta, state=None):
    """gated_delta_rule's numbers by its recurrence, one token after another; same layout, same result. Also decodes."""
    dtype, scale = torch.promote_types(v.dtype, torch.float32), k.size(-1) ** -0.5
    S = v.new_zeros(v.size(0), *k.shape[2:], v.size(-1), dtype=dtype) if state is None else state.to(dtype)
    with torch.autocast(v.device.type, enabled=False):
        o = []
        for q_t, k_t, v_t, g_t, b_t in zip(*(x.to(dtype).unbind(1) for x in (q, k, v, g, beta))):
            S = g_t.exp()[..., None, None] * S                       # forget, before anything is read
            held = (S * k_t[..., None]).sum(-2)
            S = S + k_t[..., None] * (b_t[..., None] * (v_t - held))[..., None, :]
            o.append((S * q_t[..., None]).sum(-2) * scale)
        return torch.stack(o, dim=1).type_as(v), S
