"""The machine and what a run costs on it: device, clock, memory, --estimate."""
import platform
import resource
import sys
import time

import torch

# Dense bf16 tensor-core peak with fp32 accumulation, FLOP/s, from NVIDIA's data sheets. A device that is not listed has
# no MFU: a missing figure is better than a wrong one.
PEAK_FLOPS = {
    "NVIDIA GeForce RTX 3090": 71e12, "NVIDIA GeForce RTX 4090": 165.2e12, "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA L40S": 362e12, "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}                         # whole names: a laptop's is another


def device_peak_flops(device):
    """Peak FLOP/s of a torch device, or None where it is not known."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def flops_per_token(roles, blocks, T):
    """Training FLOPs a token: 6 for every weight that multiplies it, and three times each mixer's own forward cost.

    roles {parameter: role} counts a tied embedding once, as the head; kernel generation (per step) is left out.
    """
    head = "head" if "head" in roles.values() else "embed"
    weights = sum(p.numel() for p, role in roles.items() if role in ("matrix", "proj", head))
    return 6 * weights + 3 * sum(block.mixer.flops(T) for block in blocks)


def matmul_flops(n=1024, tries=5):
    """FLOP/s of an fp32 product on this CPU, the best of a few: about 50 ms."""
    a, best = torch.randn(n, n), 0.0
    for _ in range(tries):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def report(cfg, model, roles, device, data=None):
    """The text of --estimate; the model may live on the meta device, nothing is allocated. data: as in BATCHES."""
    count = {role: sum(p.numel() for p in roles if roles[p] == role) for role in sorted(set(roles.values()))}
    step, params = data.per_step if data else cfg.tokens_per_step, sum(count.values())
    tokens, flops = step * cfg.num_iterations, flops_per_token(roles, model.blocks, cfg.sequence_length)
    width = 2 if device.type == "cuda" else 4                        # bytes of an activation
    inner, other = {"muon": (1, 2), "ademamix": (3, 3), "soap": (10, 2)}.get(cfg.optim, (2, 2))
    matrices = count.get("matrix", 0) + count.get("proj", 0)         # inner, other: an optimizer's numbers a weight
    state = 4 * (2 * params + inner * matrices + other * (params - matrices))
    kept = 16 if cfg.recompute == "none" else 2                      # activations of width C a layer, about
    activations = cfg.batch_size * cfg.sequence_length * cfg.n_layer * cfg.n_embd * width * kept
    logits = 3 * 4 * min(2**27, cfg.batch_size * cfg.sequence_length * cfg.vocab_size)
    lines = [
        ("model", f"{cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} channels, vocabulary {cfg.vocab_size:,}; "
                  f"mixer {cfg.mixer}, mlp {cfg.mlp}, optim {cfg.optim}"),
        ("parameters", f"{params:,} ({', '.join(f'{role} {n:,}' for role, n in count.items())})"),
        ("tokens a step", f"{step:,} of {cfg.tokens_per_step:,} = {cfg.batch_size} x {cfg.sequence_length} x "
                          f"{cfg.grad_accumulation_steps}".removeprefix(f"{cfg.tokens_per_step:,} of ")),
        ("tokens", f"{tokens:,} in {cfg.num_iterations:,} steps"),
        *([("data", f"{data}: {tokens / data.targets(len(data)):.2f} epochs")] if data else []),
        ("FLOPs a token", f"{flops:,} (training: forward and backward)"),
        ("memory", f"about {(state + activations + logits) / 2**20:,.0f} MiB (state {state / 2**20:,.0f}, activations "
                   f"{activations / 2**20:,.0f}, logits {logits / 2**20:,.0f})"),
    ]
    rates = [(0.6 * PEAK_FLOPS["NVIDIA GeForce RTX 4090"], "an RTX 4090 at 60% MFU")]      # the public baseline has 62%
    if peak := device_peak_flops(device):
        rates.insert(0, (0.5 * peak, "this GPU at 50% MFU"))
    elif device.type == "cpu":
        rates.insert(0, (0.3 * matmul_flops(), "this CPU at 30% of its fp32 peak"))
    lines += [("time", f"about {duration(flops * tokens / rate)} on {where}") for rate, where in rates
              if flops * tokens > rate]                              # a second or more
    return "\n".join(f"{key:14} {text}" for key, text in lines)


def duration(seconds):
    """Seconds -> "45 s", "3.2 min", "5.4 h", "12 days"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


def pick_device(name, local_rank):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name not in ("cuda", "cpu", "mps") or name != "cpu" and not getattr(torch, name).is_available():
        raise SystemExit(f"--device {name}: not available here (auto, cpu, cuda or mps)")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise SystemExit(f"process {local_rank + 1} has no GPU: there are {torch.cuda.device_count()}")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def peak_memory(device):                                    # MiB: of the GPU, or of this process
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


class Clock:
    """Training seconds. Empties the device's queue before it stops; validation and compilation stay outside."""
    def __init__(self, device):
        self.total, self.device = 0.0, device
        self.start()

    def start(self):
        self.since = time.perf_counter()

    def stop(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        self.total += time.perf_counter() - self.since
        return self.total
