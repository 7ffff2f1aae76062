"""The machine: devices, precision, memory, and what a log says of all."""
import ctypes
import hashlib
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from kernels import has_bf16
from support.flags import choices

try:
    import resource
except ImportError:                                          # Windows has none
    resource = None

ROOT = Path(__file__).resolve().parent.parent

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


# Of --device; auto is the first of the others that is there.
DEVICES = ("auto", "cuda", "mps", "cpu")


def pick_device(name: str, local_rank: int, only_told: bool = False) -> torch.device:
    """--device -> a device. SystemExit with one line where it is not there.

    only_told: --estimate tells of a CUDA device from any machine.
    """
    if only_told and name == "cuda" and not is_available(name):
        return torch.device(name)
    if name == "auto":
        name = next(kind for kind in DEVICES[1:] if is_available(kind))
    if name not in DEVICES or not is_available(name):
        raise SystemExit(f"--device {name}: not available here; {choices(name, DEVICES)}")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise SystemExit(f"process {local_rank + 1} has no GPU: there are "
                         f"{torch.cuda.device_count()}")
    return torch.device(name, local_rank)


# Numbers of glibc's mallopt, and what keep_memory sets them to.
MALLOPT = {
    -1: -1,                                          # M_TRIM_THRESHOLD: nothing is given back
    -4: 0,                                           # M_MMAP_MAX: no block is a mapping of its own
    -8: 1,                                           # M_ARENA_MAX: all threads share what is free
}


def keep_memory(device: torch.device):
    """On a CPU under glibc, let this process keep what it frees, from here on.

    glibc gives large blocks back to the system, and each step would touch new pages, which costs
    more than many a pass over memory. Elsewhere it does nothing.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for number, value in MALLOPT.items():
        mallopt(number, value)


def first_line(e: BaseException) -> str:
    """What an error says, short enough for a line of ours."""
    # torch lists below such a line which weights do not fit.
    text = (str(e) or type(e).__name__).replace(":\n\t", ": ")
    return text.splitlines()[0][:120]


def is_out_of_memory(e: BaseException) -> bool:
    """torch has no class of its own for a CPU's."""
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e)


def refuse_smaller(e: BaseException, pieces: int, rows: int):
    """Raises e again where it is no lack of memory, SystemExit where no smaller piece is left."""
    if not is_out_of_memory(e):
        raise e
    if pieces >= rows:
        raise SystemExit("a single row does not fit into memory: lower --sequence_length, "
                         "take a smaller model, or --recompute block") from None


def is_available(kind: str) -> bool:
    return getattr(torch, kind).is_available()


PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """--dtype -> what matrices are multiplied in."""
    if name == "auto":
        name = "bf16" if has_bf16(device) else "fp32"
    return PRECISIONS[name]


def device_name(device: torch.device) -> str:
    """"NVIDIA GeForce RTX 4090, 24 GiB", "cpu (x86_64)"."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)}, {memory / 2**30:.0f} GiB"
    return f"{device.type} ({platform.machine()})"


def device_peak_flops(device: torch.device, told: float = 0.0) -> float | None:
    """Peak FLOP/s of a torch device, or None where it is not known. told: --peak_flops, TFLOP/s."""
    if told:
        return 1e12 * told
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def host_memory() -> float:
    """Bytes that the machine has; inf where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def new_model(make, cfg, device: torch.device, check):
    """make(cfg) on a device, weights drawn on the CPU: a seed means the same everywhere.

    On the meta device it has no weights. check(model) may raise ValueError, as make may: then this
    is SystemExit with one line. So it is for sizes that the machine cannot hold, where it would
    otherwise fill up until the system kills.
    """
    try:
        with torch.device("meta"):
            model = make(cfg)
        check(model)
        if device.type == "meta":
            return model
        # Gradients, too, where they are in the same memory.
        copies = 1 if device.type == "cuda" else 2
        if copies * sum(p.nbytes for p in model.parameters()) > host_memory():
            raise MemoryError
        with torch.device("cpu"):
            return make(cfg).to(device)
    except ValueError as e:
        raise SystemExit(str(e)) from None
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        raise SystemExit("the model does not fit into this machine's memory: make it smaller "
                         "(--estimate says what it takes)") from None


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
    folders = ROOT, ROOT / "data", ROOT / "support"
    return sorted(path for path in paths if path.parent in folders and path.is_file())


class Clock:
    """Training seconds. Waits for the device's queue before it stops; validation is outside."""
    def __init__(self, device: torch.device, total: float = 0.0):
        self.total = total
        self.device = device
        self.start()

    def start(self):
        self.since = time.perf_counter()

    def stop(self) -> float:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        self.total += time.perf_counter() - self.since
        return self.total
