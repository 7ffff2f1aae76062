"""The machine and what a run costs on it: devices, memory, --estimate, what a log says of both."""
import hashlib
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

try:
    import resource
except ImportError:                                          # Windows has none
    resource = None

ROOT = Path(__file__).resolve().parent

RTX_4090 = "NVIDIA GeForce RTX 4090"

# Dense bf16 tensor-core peak with fp32 accumulation, FLOP/s, from NVIDIA's data sheets, by whole
# names: a laptop's chip is another. A device that is not listed has no MFU: a missing figure is
# better than a wrong one.
PEAK_FLOPS = {
    "NVIDIA GeForce RTX 3090": 71e12,
    RTX_4090: 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def pick_device(name: str, local_rank: int) -> torch.device:
    """--device -> a device. SystemExit with one line where it is not there."""
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if is_available(kind))
    if name not in ("cuda", "mps", "cpu") or not is_available(name):
        raise SystemExit(f"--device {name}: not available here (auto, cpu, cuda or mps)")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise SystemExit(f"process {local_rank + 1} has no GPU: there are "
                         f"{torch.cuda.device_count()}")
    return torch.device(name, local_rank)


def is_available(kind: str) -> bool:
    return getattr(torch, kind).is_available()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def device_peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a torch device, or None where it is not known."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int | str:
    """MiB: of the GPU, or of this process; "unknown" where the system does not say (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    if resource is None:
        return "unknown"
    unit = 20 if sys.platform == "darwin" else 10            # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> unit


def duration(seconds: float) -> str:
    """Seconds -> "45 s", "3.2 min", "5.4 h", "12 days"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


def flops_per_token(roles, blocks, T: int) -> int:
    """Training FLOPs a token: 6 a weight that multiplies it, and 3 times each mixer's forward cost.

    roles {parameter: role} counts a tied embedding once, as the head. Kernel generation, which is
    once a step, is left out.
    """
    head = "head" if "head" in roles.values() else "embed"
    weights = sum(p.numel() for p, role in roles.items() if role in ("matrix", "proj", head))
    return 6 * weights + 3 * sum(block.mixer.flops(T) for block in blocks)


def matmul_flops(n: int = 1024, tries: int = 5) -> float:
    """FLOP/s of an fp32 product on this CPU, the best of a few: about 50 ms."""
    a = torch.randn(n, n)
    best = 0.0
    for _ in range(tries):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def memory_estimate(cfg, count, state_per_weight, device: torch.device) -> str:
    """About how much training takes, MiB. count: {role: weights}."""
    params = sum(count.values())
    matrices = count.get("matrix", 0) + count.get("proj", 0)
    per_matrix, per_other = state_per_weight
    numbers = 2 * params                                     # weights and gradients
    numbers += per_matrix * matrices + per_other * (params - matrices)
    state = 4 * numbers
    tokens = cfg.batch_size * cfg.sequence_length
    width = 2 if device.type == "cuda" else 4                # bytes of an activation
    kept = 16 if cfg.recompute == "none" else 2              # of width C a layer, about
    activations = tokens * cfg.n_layer * cfg.n_embd * width * kept
    logits = 3 * 4 * min(2**27, tokens * cfg.vocab_size)
    total = state + activations + logits
    return (f"about {total / 2**20:,.0f} MiB (state {state / 2**20:,.0f}, activations "
            f"{activations / 2**20:,.0f}, logits {logits / 2**20:,.0f})")


def time_estimates(flops: float, device: torch.device) -> list[str]:
    """How long so many FLOPs take, here and on an RTX 4090; nothing for less than a second."""
    rates = {}
    peak = device_peak_flops(device)
    if peak:
        rates["this GPU at 50% MFU"] = 0.5 * peak
    elif device.type == "cpu":
        rates["this CPU at 30% of its fp32 peak"] = 0.3 * matmul_flops()
    # The public baseline has 62%.
    rates["an RTX 4090 at 60% MFU"] = 0.6 * PEAK_FLOPS[RTX_4090]
    return [f"about {duration(flops / rate)} on {where}" for where, rate in rates.items()
            if flops > rate]


def report(cfg, model, roles, state_per_weight, device: torch.device, data=None) -> str:
    """The text of --estimate. The model may live on the meta device: nothing is allocated.

    state_per_weight: fp32 numbers the optimizer keeps a weight of a matrix and of another; data: an
    object of BATCHES, whose steps may be smaller than they could be.
    """
    count = {}
    for p, role in roles.items():
        count[role] = count.get(role, 0) + p.numel()
    by_role = ", ".join(f"{role} {count[role]:,}" for role in sorted(count))
    step = data.per_step if data else cfg.tokens_per_step
    tokens = step * cfg.num_iterations
    flops = flops_per_token(roles, model.blocks, cfg.sequence_length)
    product = (f"{cfg.tokens_per_step:,} = {cfg.batch_size} x {cfg.sequence_length} x "
               f"{cfg.grad_accumulation_steps}")

    lines = [
        ("model", f"{cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} channels, vocabulary "
                  f"{cfg.vocab_size:,}; mixer {cfg.mixer}, mlp {cfg.mlp}, optim {cfg.optim}"),
        ("parameters", f"{sum(count.values()):,} ({by_role})"),
        ("tokens a step", product if step == cfg.tokens_per_step else f"{step:,} of {product}"),
        ("tokens", f"{tokens:,} in {cfg.num_iterations:,} steps"),
    ]
    if data:
        epochs = tokens / data.targets(len(data))
        lines.append(("data", f"{data}: {epochs:.2f} epochs"))
    lines.append(("FLOPs a token", f"{flops:,} (training: forward and backward)"))
    lines.append(("memory", memory_estimate(cfg, count, state_per_weight, device)))
    lines += [("time", text) for text in time_estimates(flops * tokens, device)]
    return "\n".join(f"{key:14} {text}" for key, text in lines)


def checksum(path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def git(*arguments: str) -> str | None:
    """What git prints about this folder, or None where it fails: no git, or no repository."""
    command = ["git", "-C", ROOT, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def git_state() -> tuple[str, bool | None]:
    """-> the commit that is checked out, and whether files differ from it.

    ("unknown", None) without git, and for a copy inside another repository: its commit is not ours.
    """
    top = git("rev-parse", "--show-toplevel")
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain")
    if not top or not commit or changes is None or Path(top).resolve() != ROOT:
        return "unknown", None
    return commit, bool(changes)


def environment(device: torch.device, world: int, paths) -> dict:
    """What a reader needs to run it again besides sources and flags: plain values.

    "commit" and "dirty" are git_state's.
    """
    commit, dirty = git_state()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(device),
        "processes": world,
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": dirty,
        "command": sys.argv,
        "shards": {path: checksum(path) for path in paths},
    }


def own_sources() -> list[Path]:
    """The files of this repository that this program has imported, itself included."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    paths = {Path(file).resolve() for file in files if file}
    return sorted(path for path in paths if path.parent in (ROOT, ROOT / "data") and path.is_file())
