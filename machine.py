"""The machine and what a run costs on it: devices, memory, --estimate, what a log says of both."""
import hashlib
import os
import platform
import subprocess
import sys
import time
import weakref
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def pick_device(name: str, local_rank: int, only_told: bool = False) -> torch.device:
    """--device -> a device. SystemExit with one line where it is not there.

    only_told: --estimate tells of a CUDA device from any machine.
    """
    if only_told and name == "cuda" and not is_available(name):
        return torch.device(name)
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


def first_line(e: BaseException) -> str:
    """What an error says, short enough for a line of ours."""
    return (str(e) or type(e).__name__).splitlines()[0][:120]


def process_numbers() -> tuple[int, int, int]:
    """rank, local rank, processes, as torchrun sets them. SystemExit with one line for nonsense."""
    numbers = []
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise SystemExit(f"{name}={text} in the environment is no number: unset it, or start "
                             "the run by torchrun")
        numbers.append(int(text))
    rank, _, world = numbers
    if rank >= world:
        raise SystemExit(f"RANK={rank} and WORLD_SIZE={world} in the environment do not fit: unset "
                         "them, or start the run by torchrun")
    return rank, numbers[1], world


# How long processes wait for one another.
JOIN = timedelta(minutes=10)


def join_processes(device: torch.device, rank: int, world: int):
    """SystemExit with one line where one of them does not come."""
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise SystemExit(f"WORLD_SIZE={world} in the environment, but no MASTER_ADDR and "
                         "MASTER_PORT: unset it, or start the run by torchrun")
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = {}
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # Behind a restart torchrun's store still has the addresses of those before.
            shared = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                                   world, is_master=False, timeout=JOIN)
            attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
            store = dict(store=dist.PrefixStore(f"attempt {attempt}", shared), rank=rank,
                         world_size=world)
        dist.init_process_group(backend, timeout=JOIN, **store)
    except RuntimeError as e:
        raise SystemExit(f"process {rank + 1} of {world}: the others did not come within "
                         f"{JOIN.seconds} s ({first_line(e)})") from None


def is_out_of_memory(e: BaseException) -> bool:
    """torch has no class of its own for a CPU's."""
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e)


def is_available(kind: str) -> bool:
    return getattr(torch, kind).is_available()


@cache
def has_bf16(device: torch.device) -> bool:
    """Of CUDA cards, those from Ampere on. One that is only told of is taken for such a card."""
    if device.type != "cuda":
        return False
    return not is_available("cuda") or torch.cuda.is_bf16_supported(including_emulation=False)


PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """--dtype -> what matrices are multiplied in. SystemExit with one line where there is none."""
    if name == "auto":
        name = "bf16" if has_bf16(device) else "fp32"
    if name not in PRECISIONS:
        raise SystemExit(f"--dtype {name}: choose from auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def graph_breaks() -> list[str]:
    """Why torch.compile broke a graph in this process, one line a reason; none is as it should be.
    """
    return [reason.splitlines()[0] for reason in torch._dynamo.utils.counters["graph_break"]]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def device_peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a torch device, or None where it is not known."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> str:
    """Of the GPU, or of this process: "386MiB"; "unknown" where the system keeps none (Windows)."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) >> 20}MiB"
    if resource is None:
        return "unknown"
    unit = 20 if sys.platform == "darwin" else 10            # bytes there, KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> unit}MiB"


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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations return and something still holds: now, and at most.

    Under FakeTensorMode nothing is computed or allocated, but autograd holds what it would hold.
    What `module` owns is not counted.
    """
    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.now = 0
        self.most = 0
        owned = [*module.parameters(), *module.buffers()]
        self.known = {tensor.untyped_storage()._cdata for tensor in owned}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor.untyped_storage())
        return result

    def hold(self, storage):
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


def count_activations(make_model, shape: tuple[int, int], precision: torch.dtype):
    """-> bytes that a forward pass leaves behind for backward, bytes in use at its peak.

    make_model() -> GPT; shape: rows and tokens a row of a micro-batch. Uncompiled, on fake tensors:
    torch.compile leaves less behind, since it fuses and recomputes.
    """
    with FakeTensorMode():
        model = make_model()
        idx = torch.zeros(shape, dtype=torch.long)
        live = LiveBytes(model)
        half = torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16)
        with half, live:
            loss = model(idx, idx)
        kept = live.now
        del loss
    return kept, live.most


def memory_estimate(count, state_per_weight, parts) -> str:
    """About how much training takes, MiB. count: {role: weights}; parts: {what else: bytes}."""
    params = sum(count.values())
    matrices = count.get("matrix", 0) + count.get("proj", 0)
    per_matrix, per_other = state_per_weight
    optimizer = per_matrix * matrices + per_other * (params - matrices)
    parts = {"weights and gradients": 8 * params, "optimizer": 4 * optimizer} | parts
    text = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
    return f"about {sum(parts.values()) / 2**20:,.0f} MiB ({text})"


def time_estimates(flops: float, device: torch.device) -> list[str]:
    """How long so many FLOPs take, here and on an RTX 4090; nothing for less than a second."""
    rates = {}
    # A CUDA device may be only told of: see pick_device.
    peak = device_peak_flops(device) if is_available(device.type) else None
    if peak:
        rates["this GPU at 50% MFU"] = 0.5 * peak
    elif device.type == "cpu":
        rates["this CPU at 30% of its fp32 peak"] = 0.3 * matmul_flops()
    # The public baseline has 62%.
    rates["an RTX 4090 at 60% MFU"] = 0.6 * PEAK_FLOPS[RTX_4090]
    return [f"about {duration(flops / rate)} on {where}" for where, rate in rates.items()
            if flops > rate]


def count_roles(roles) -> dict[str, int]:
    """{parameter: role} -> {role: weights}"""
    count = {}
    for p, role in roles.items():
        count[role] = count.get(role, 0) + p.numel()
    return count


def report(cfg, model, roles, memory: str, device: torch.device, data=None) -> str:
    """The text of --estimate. The model may live on the meta device: nothing is allocated.

    memory: what memory_estimate says; data: an object of BATCHES, whose steps may be smaller than
    they could be.
    """
    count = count_roles(roles)
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
    lines.append(("memory", memory))
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


def environment(device: torch.device, world: int, checksums, precision: torch.dtype,
                compiled: bool) -> dict:
    """What a reader needs to run it again besides sources and flags: plain values.

    "commit" and "dirty" are git_state's.
    """
    commit, dirty = git_state()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(device),
        "processes": world,
        "precision": str(precision).removeprefix("torch."),
        "compiled": compiled,
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": dirty,
        "command": sys.argv,
        "shards": checksums,
    }


def own_sources() -> list[Path]:
    """The files of this repository that this program has imported, itself included."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    paths = {Path(file).resolve() for file in files if file}
    return sorted(path for path in paths if path.parent in (ROOT, ROOT / "data") and path.is_file())
