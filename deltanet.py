"""Gated DeltaNet: linear attention whose state forgets by a gate and overwrites by the delta rule. O(T), O(1) decoding.

A head keeps one matrix S, dk x dv, an associative memory from keys to values. Token t first lets it decay, then moves
what it holds at key k_t towards v_t, by the share beta_t, then reads it at q_t:

    S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,      o_t = S_t^T q_t / sqrt(dk),      S_0 = 0
    g_t = -e^{A_log} softplus(W_a x_t + dt_bias) <= 0,                    beta_t = sigmoid(W_b x_t), twice that at will
    q, k, v = silu(short causal convolution of W x),  q and k then of unit length per head
    y = W_o (rms_norm(o) * gain * silu(W_g x))

Token by token that is T small steps. In chunks of C tokens it is matrix products: with c_i = g_1 + ... + g_i, the decay
since the chunk began, D_ij = e^{c_i - c_j} for i >= j, Kb = beta K, the errors E = v - held solve a triangular system:

    (I + A) E = R = V - e^c K S,            A = strictly lower part of K Kb^T * D,          P = Q Kb^T * D
    O = (e^c Q S + P E) / sqrt(dk),         S' = e^{c_C} S + (e^{c_C - c} Kb)^T E

of which only E and S' must wait for the chunk before. Causal as published: D is lower triangular and S is the past.

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464); NVlabs/GatedDeltaNet;
fla-org/flash-linear-attention, whose CUDA kernel is used where it runs and agrees (pip install flash-linear-attention).
Letters: B batch, T time, C channels or tokens a chunk, H value heads, N chunks, dk and dv the widths of key and value.
"""
import math
import sys
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts import ShortConv


class ChunkwiseRule(torch.autograd.Function):
    """Q / sqrt(dk), K (N H, C, dk), V, beta, c (N H, C, 1), S (H, dk, dv), H counting the heads of all rows -> O, S.

        dE = P^T dO + e^{c_C - c} Kb dS',       dR = (I + A)^-T dE = dV,       dA = -dR E^T,       dP = dO E^T
        dS = e^{c_C} dS' + (e^c Q)^T dO - (e^c K)^T dR,     dc_i = q_i dq_i + k_i dk_i - kb_i dkb_i (+ <S', dS'>: i = C)

    the last as q_i and k_i come with e^{c_i}, kb_j with e^{-c_j}, S' with e^{c_C}.
    """
    @staticmethod
    def forward(ctx, Q, K, V, b, c, S):
        D, since, left = (c - c.mT).tril_().exp_().tril_(), c.exp(), (c[:, -1:] - c).exp_()    # above, exp may overflow
        Kb, eye = b * K, torch.eye(K.size(1), dtype=K.dtype, device=K.device)
        A, P = (K @ Kb.mT).mul_(D), (Q @ Kb.mT).mul_(D)
        # By a triangular solve: a product of powers of A is off by 1e10 in fp32 where keys repeat.
        M = torch.linalg.solve_triangular(A, eye.expand_as(A), upper=False, unitriangular=True)
        H = len(S)
        N = len(V) // H
        E = torch.empty_like(V)
        S = torch.cat((S, S.new_empty(len(V), *S.shape[1:])))
        k_in = since * K
        k_out = left * Kb
        decay = since[:, -1:]
        # What must wait for the chunk before: its errors, then the state that they leave. In place,
        # as rows `own` of E and rows `after` of S.
        for n in range(N):
            own = slice(n * H, (n + 1) * H)
            after = slice((n + 1) * H, (n + 2) * H)
            residual = torch.baddbmm(V[own], k_in[own], S[own], alpha=-1)
            torch.bmm(M[own], residual, out=E[own])
            torch.mul(decay[own], S[own], out=S[after]).baddbmm_(k_out[own].mT, E[own])
        ctx.save_for_backward(Q, K, b, D, since, left, P, M, S, E)
        return (since * Q @ S[:-H]).baddbmm_(P, E), S[-H:].clone()

    @staticmethod
    def backward(ctx, dO, dS):
        if torch.is_grad_enabled():                                  # once_differentiable would miss a constant dO
            raise RuntimeError("the chunkwise gated delta rule is differentiable once: not with create_graph=True")
        Q, K, b, D, since, left, P, M, S, E = ctx.saved_tensors
        with torch.autocast(dO.device.type, enabled=False):
            dO, dR, H, Kb = dO.contiguous(), torch.empty_like(E), len(dS), b * K
            dS = torch.cat(((since * Q).mT @ dO, dS))                          # what O asks of S, then all that S gets
            N = len(E) // H
            dE = P.mT @ dO
            k_in = since * K
            k_out = left * Kb
            decay = since[:, -1:]
            # The last chunk comes first: its dS is complete.
            for n in reversed(range(N)):
                own = slice(n * H, (n + 1) * H)
                after = slice((n + 1) * H, (n + 2) * H)
                dE[own].baddbmm_(k_out[own], dS[after])
                torch.bmm(M[own].mT, dE[own], out=dR[own])
                dS[own].baddbmm_(k_in[own].mT, dR[own], alpha=-1).addcmul_(decay[own], dS[after])
            first, dS, before = dS[:H].clone(), dS[H:], S[:-H].mT
            minus_dA, dP = (dR @ E.mT).mul_(D).tril_(-1), (dO @ E.mT).mul_(D)
            dQ = (dO @ before).mul_(since).baddbmm_(dP, Kb)
            dK = (dR @ before).mul_(since).baddbmm_(minus_dA, Kb).neg_()
            dKb = (E @ dS.mT).mul_(left).baddbmm_(dP.mT, Q).baddbmm_(minus_dA.mT, K, alpha=-1)
            dc = (Q * dQ).addcmul_(K, dK).addcmul_(Kb, dKb, value=-1).sum(-1, keepdim=True)
            dc[:, -1, 0] += (S[H:] * dS).sum((1, 2))
            return dQ, dK.addcmul_(b, dKb), dR, (K * dKb).sum(-1, keepdim=True), dc, first


def gated_delta_rule(q, k, v, g, beta, chunk=32, state=None):
    """The rule, chunkwise: q, k (B, T, H, dk), v (B, T, H, dv), g, beta (B, T, H) -> o (B, T, H, dv), final state.

    g <= 0 is the log of the decay; q is divided by sqrt(dk) here. A state is (B, H, dk, dv); None is zeros. Works in
    fp32 (fp64 stays), also under autocast; o has v's dtype, the state that of the work. Differentiable once.
    """
    (B, T, H, dk), dtype, C, o = k.shape, torch.promote_types(v.dtype, torch.float32), min(chunk, k.size(1)), []
    x = [u.to(dtype) for u in (q, k, v, beta[..., None], g[..., None])]
    x = [F.pad(u, (0, 0, 0, 0, 0, -T % C)) for u in x] if T % C else x         # zeros leave the state alone
    # On a CPU one stretch of time after another, half a MB a tensor: what is in work stays in the cache.
    span = C * max(1, 2 ** 17 // (B * H * dk * C)) if v.device.type == "cpu" else x[0].size(1)
    S = x[2].new_zeros(B * H, dk, v.size(-1)) if state is None else state.to(dtype).flatten(0, 1)
    with torch.autocast(v.device.type, enabled=False):
        for stretch in zip(*(u.split(span, dim=1) for u in x)):      # (B, span, H, d) -> (N B H, C, d), and back
            Q, K, V, b, c = (u.unflatten(1, (-1, C)).permute(1, 0, 3, 2, 4).flatten(0, 2) for u in stretch)
            y, S = ChunkwiseRule.apply(Q * dk ** -0.5, K, V, b, c.cumsum(1), S)
            o.append(y.unflatten(0, (-1, B, H)).permute(1, 0, 3, 2, 4).flatten(1, 2))
        return torch.cat(o, dim=1)[:, :T].type_as(v), S.unflatten(0, (B, H))


def with_kernel(kernel, q, k, v, g, beta, chunk=32, state=None):
    """The rule by fla's kernel where it applies, in bf16 or fp16 on a GPU (its chunks are its own); else ours."""
    if not v.is_cuda or v.dtype not in (torch.bfloat16, torch.float16) or k.size(-1) > 256:
        return gated_delta_rule(q, k, v, g, beta, chunk, state)
    return kernel(q.type_as(v), k.type_as(v), v, g, beta, initial_state=state, output_final_state=True)


@cache
def best_rule(device="cuda"):
    """gated_delta_rule, or the same with fla's kernel inside where there is a GPU and, tried once, they agree."""
    if torch.cuda.is_available():
        try:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule as kernel
            u = torch.rand(5, 1, 100, 2, 64, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
            x = [y.requires_grad_() for y in (*F.normalize(u[:3] - .5, dim=-1).bfloat16(), -u[3, ..., 0], u[4, ..., 0])]
            with torch.enable_grad():
                ours, its = ((o, S, *torch.autograd.grad(o.float().sum() + S.sum(), x)) for o, S in (
                    gated_delta_rule(*x), kernel(*x, output_final_state=True)))
            if not all((a - b).abs().max() <= 0.05 * a.abs().max() for a, b in zip(ours, its)):
                raise ValueError("its results are not ours")
            return partial(with_kernel, kernel)
        except Exception as e:                                       # no fla, Triton, a driver: it is optional
            print("gdn: without fla's kernel:", repr(e)[:200], file=sys.stderr)
    return gated_delta_rule


class GatedDeltaNet(nn.Module):
    """The mixer, (B, T, C) -> (B, T, C) for any T >= 1; equations at the top of the file.

    n_head value heads; k_heads (0: n_head) heads of q and k, each of which serves n_head / k_heads consecutive value
    heads; dk is head_dim (0: dim / n_head), dv expand_v * dk. neg_eigval lets beta reach 2: states can flip sign (arXiv
    2411.12537). Positions are in the decay: no rotary. Decoding keeps S and three tokens. ValueError: sizes misfit.
    """
    def __init__(self, dim, seq_len, *, n_head, k_heads=0, head_dim=0, expand_v=1.0, chunk=32, linear=nn.Linear,
                 neg_eigval=False):
        super().__init__()
        k_heads, dk = k_heads or n_head, head_dim or dim // n_head
        dv = int(expand_v * dk)
        if n_head % k_heads or not head_dim and dim % n_head or dv < 1 or chunk < 1:
            raise ValueError(f"gdn: {dim} channels, {n_head} and {k_heads} heads, {dk} and {dv} wide, chunk {chunk}: "
                             "no fit: change --n_head, --gdn_k_heads, --gdn_head_dim, --gdn_expand_v or --gdn_chunk")
        self.n_head, self.dk, self.dv, self.share = n_head, dk, dv, n_head // k_heads
        self.chunk, self.beta_max, self.rule = chunk, 2.0 if neg_eigval else 1.0, best_rule()
        self.widths = (k_heads * dk, k_heads * dk, n_head * dv)
        self.q, self.k, self.v, self.gate = (linear(dim, w, bias=False) for w in (*self.widths, n_head * dv))
        self.a, self.b = (nn.Linear(dim, n_head, bias=False) for _ in range(2))
        self.short_conv = ShortConv(sum(self.widths))
        # Mamba-2's start: decays from e^-1.6 a token to almost none, all heads different.
        self.A_log = nn.Parameter(torch.empty(n_head).uniform_(0.01, 16).log())
        dt = torch.empty(n_head).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))              # softplus(dt_bias) = dt
        self.gain, self.proj = nn.Parameter(torch.ones(dv)), linear(n_head * dv, dim, bias=False)

    def flops(self, T):
        """Forward FLOPs a token besides the weight matrices: the matrix products of the chunkwise rule."""
        C, dk, dv = min(self.chunk, T), self.dk, self.dv
        return self.n_head * (4 * C * (dk + dv) + C * C + 6 * dk * dv)               # in a chunk, inverse, with S

    def value(self, x):                                              # of a value residual, (B, T, n_head * dv)
        return self.v(x)

    def qkv(self, x, v1):
        return torch.cat((self.q(x), self.k(x), self.v(x) + (0 if v1 is None else v1)), dim=-1)

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
        return self.out(self.rule(*self.heads(self.short_conv(self.qkv(x, v1)), x), self.chunk)[0], x)

    def init_state(self, B):
        return self.short_conv.init_state(B), self.gain.new_zeros(B, self.n_head, self.dk, self.dv)

    def step(self, x, state, v1=None):                               # (B, C) -> (B, C)
        z, window = self.short_conv.step(self.qkv(x, v1), state[0])
        o, S = gated_delta_rule_naive(*(u[:, None] for u in self.heads(z, x)), state[1])
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
