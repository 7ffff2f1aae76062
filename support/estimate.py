"""What a run costs, without running it: parameters, FLOPs, memory and time, as --estimate says."""
import math
import time
import weakref
from dataclasses import replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attention import skips_masks
from kernels import BACKENDS, default_chunk, fastest_conv
from support.compile import compiles
from support.flags import listed
from support.machine import (PEAK_FLOPS, RTX_4090, device_name, device_peak_flops, duration,
                             is_available)
from support.optim import ramp_notes


def flops_per_token(roles, blocks, T: int) -> int:
    """Training FLOPs a token: 6 a weight that multiplies it, and 3 times each mixer's forward cost.

    roles {parameter: role} counts a tied embedding once, as the head. Kernel generation, which is
    once a step, is left out.
    """
    head = "head" if "head" in roles.values() else "embed"
    weights = sum(p.numel() for p, role in roles.items() if role in ("matrix", "proj", head))
    return 6 * weights + 3 * sum(block.mixer.flops(T) for block in blocks)


def utilisation(cfg, roles, model, device: torch.device, world: int):
    """-> the function of tokens a second that gives the MFU: a share, None for unknown devices."""
    flops = flops_per_token(roles, model.blocks, cfg.sequence_length)
    peak = device_peak_flops(device, cfg.peak_flops)
    return lambda rate: rate * flops / peak / world if peak else None


def matmul_flops(n: int = 1024, tries: int = 5) -> float:
    """FLOP/s of an fp32 product on this CPU, the best of a few: about 50 ms."""
    a = torch.randn(n, n)
    best = 0.0
    for _ in range(tries):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


CAST = torch.ops.aten._to_copy.default


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations return and something still holds: now, and at most.

    Under FakeTensorMode nothing is computed or allocated, but autograd holds what it would hold.
    What `module` owns is not counted.
    """
    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.now = 0
        self.most = 0
        self.wide = 0                                # of it, pointwise results in fp32
        owned = [*module.parameters(), *module.buffers()]
        self.known = {tensor.untyped_storage()._cdata for tensor in owned}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        pointwise = torch.Tag.pointwise in function.tags or function is CAST
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor.untyped_storage(), pointwise and tensor.dtype == torch.float32)
        return result

    def hold(self, storage, wide: bool):
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.wide += wide * storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, key, storage.nbytes(), wide)

    def forget(self, key, size, wide: bool):
        self.known.discard(key)
        self.now -= size
        self.wide -= wide * size


# Longer sequences are counted from three shorter ones: a loop over chunks takes many seconds.
LONG = 2**14
SHORTER = 2**11


def count_activations(make_model, shape: tuple[int, int], precision: torch.dtype):
    """-> bytes that a forward pass leaves behind for backward, bytes in use at its peak; of the
    first, what pointwise operations wrote in fp32.

    make_model() -> GPT; shape: rows and tokens a row of a micro-batch. Uncompiled, on fake tensors.
    What is left behind grows like T, and masks like T^2: three lengths tell the parabola. What the
    loss adds to it grows by steps, behind the first few like T at most.
    """
    rows, T = shape
    if T > LONG:
        counts = [count_activations(make_model, (rows, n * SHORTER), precision) for n in (1, 2, 3)]
        (a, _, wide_a), (b, peak_b, wide_b), (c, peak_c, wide_c) = counts
        u = T / SHORTER

        def parabola(a, b, c):
            return (u - 2) * (u - 3) / 2 * a + (u - 1) * (3 - u) * b + (u - 1) * (u - 2) / 2 * c

        kept = parabola(a, b, c)
        passing = (u - 2) * (peak_c - c) - (u - 3) * (peak_b - b)
        return round(kept), round(kept + passing), round(parabola(wide_a, wide_b, wide_c))
    with FakeTensorMode():
        model = make_model()
        idx = torch.zeros(shape, dtype=torch.long)
        live = LiveBytes(model)
        half = torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16)
        with half, live:
            loss = model(idx, idx)
        kept = live.now
        wide = live.wide
        del loss
    return kept, live.most, wide


def memory_estimate(cfg, model_of, shapes, roles, builder, precision: torch.dtype,
                    compiled: bool, device: torch.device) -> str:
    """About how much training takes, MiB.

    model_of(cfg) -> GPT; shapes: rows and tokens a row of micro-batches; roles {parameter: role};
    builder: a row of OPTIMS, which says what its optimizer keeps.
    """
    shape = max(shapes, key=math.prod)
    counted = cfg
    if compiled and skips_masks(device, cfg.n_embd // cfg.n_head):
        # Fake tensors run uncompiled, with masks, which each call of attention keeps anew.
        counted = replace(cfg, batches="windows", document_token=-1, window=0)
    if "afno" in cfg.mixers and cfg.afno_backend == "auto":
        # Fake tensors are of a CPU, for which it would choose another.
        T = cfg.sequence_length
        chosen = {fastest_conv(device.type, T, min(taps or T, T)) for taps in listed(cfg.afno_taps)}
        # Layers of several backends are counted as a CPU has them.
        if len(chosen) == 1:
            backend = next(name for name, conv in BACKENDS.items() if conv in chosen)
            counted = replace(counted, afno_backend=backend)
    kept, peak, wide = count_activations(partial(model_of, counted), shape, precision)
    parts = {"activations": kept, "logits": peak - kept}
    if compiled:
        # The loss keeps its gradients (kernels.py): of the head in fp32, of what is below it.
        M = math.prod(shape)
        head = cfg.vocab_rows * cfg.n_embd
        below = precision.itemsize * M * cfg.n_embd
        # And holds for a while, in the dtype of the GEMM: logits of a chunk and their gradient,
        # the head and what a chunk adds to its gradient.
        chunk = min(M, default_chunk(cfg.vocab_rows))
        passing = 2 * precision.itemsize * (chunk * cfg.vocab_rows + head)
        if precision != torch.float32:
            # Under autocast fusion recomputes what pointwise operations wrote in fp32, all but the
            # residual stream between branches (records/2026-11-28_memory/memory.txt).
            stream = 4 * M * cfg.n_embd * (2 * cfg.n_layer + 1)
            kept += min(stream, wide) - wide
        parts = {"activations": kept - below, "logits": 4 * head + below + passing}
    count = count_roles(roles)
    params = sum(count.values())
    matrices = count.get("matrix", 0) + count.get("proj", 0)
    per_matrix, per_other = builder.state_per_weight
    optimizer = per_matrix * matrices + per_other * (params - matrices)
    if cfg.lookahead:
        optimizer += 2 * params
    parts = {"weights and gradients": 8 * params, "optimizer": 4 * optimizer} | parts
    text = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
    return f"about {sum(parts.values()) / 2**20:,.0f} MiB ({text})"


def time_estimates(tokens: int, flops: int, device: torch.device, told: float) -> list[str]:
    """How long so many tokens of so many FLOPs take, here and on an RTX 4090: guesses.

    told: --peak_flops, TFLOP/s. Nothing for less than a second.
    """
    rates = {}
    # A CUDA device may be only told of: see pick_device.
    peak = device_peak_flops(device, told) if told or is_available(device.type) else None
    if peak:
        card = f"a GPU of {told:g} TFLOP/s" if told else "this GPU"
        rates[f"{card} at 50% MFU"] = 0.5 * peak
    elif device.type == "cpu":
        rates["this CPU at 30% of its fp32 peak"] = 0.3 * matmul_flops()
    # The public baseline has 62%.
    rates["an RTX 4090 at 60% MFU"] = 0.6 * PEAK_FLOPS[RTX_4090]
    return [f"about {duration(tokens * flops / rate)} on {where}, a guess: "
            f"{rate / flops:,.0f} tokens/s"
            for where, rate in rates.items() if tokens * flops > rate]


def count_roles(roles) -> dict[str, int]:
    """{parameter: role} -> {role: weights}"""
    count = {}
    for p, role in roles.items():
        count[role] = count.get(role, 0) + p.numel()
    return count


def report(cfg, model, roles, memory: str, device: torch.device, data, vocab: int) -> str:
    """The text of --estimate. The model may live on the meta device: nothing is allocated.

    memory: what memory_estimate says; data: an object of BATCHES, whose steps may be smaller than
    they could be; vocab: of its shards, which are left out where the model's is another.
    """
    if vocab != cfg.vocab_size:
        data = None
    count = count_roles(roles)
    by_role = ", ".join(f"{role} {count[role]:,}" for role in sorted(count))
    step = data.per_step if data else cfg.tokens_per_step
    tokens = step * cfg.num_iterations
    flops = flops_per_token(roles, model.blocks, cfg.sequence_length)
    product = (f"{cfg.tokens_per_step:,} = {cfg.batch_size} x {cfg.sequence_length} x "
               f"{cfg.grad_accumulation_steps}")
    if cfg.stages:
        product = f"{step:,} on average, behind --stages {product}"
    elif step != cfg.tokens_per_step:
        product = f"{step:,} of {product}"

    length = f"{tokens:,} in {cfg.num_iterations:,} steps"
    if cfg.minutes:
        length = f"as many as {cfg.minutes:g} minutes of training take"
        data = None

    lines = [
        ("model", f"{cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} channels, vocabulary "
                  f"{cfg.vocab_size:,}; mixer {cfg.mixer}, mlp {cfg.mlp}, optim {cfg.optim}"),
        ("parameters", f"{sum(count.values()):,} ({by_role})"),
        ("tokens a step", product),
        ("tokens", length),
    ]
    if is_available(device.type):
        lines.insert(0, ("device", device_name(device)))
    if data:
        epochs = tokens / data.targets(len(data))
        lines.append(("data", f"{data}: {epochs:.2f} epochs"))
    lines.append(("FLOPs a token", f"{flops:,} (training: forward and backward)"))
    lines.append(("memory", memory))
    if not cfg.minutes:
        lines += [("time", text) for text in time_estimates(tokens, flops, device, cfg.peak_flops)]
    return "\n".join(f"{key:14} {text}" for key, text in lines)


def estimate(cfg, model, roles, builder, data, device: torch.device, precision) -> str:
    """The text of --estimate, for a model on the meta device: nothing is computed or allocated.

    data: of open_batches; the rest as in memory_estimate.
    """
    memory = memory_estimate(cfg, type(model), data.batches.shapes(), roles, builder, precision,
                             compiles(cfg, device), device)
    lines = report(cfg, model, roles, memory, device, data.batches, data.vocab)
    return "\n".join([lines, *ramp_notes(cfg)])
