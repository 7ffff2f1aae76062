"""A run's folder: the log, which is enough to run it again, and the checkpoint."""
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch

from machine import device_name

ROOT = Path(__file__).resolve().parent


def checksum(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def git(*args):
    command = ["git", "-C", ROOT, *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment(device, world, paths):
    """What a reader needs to run it again besides sources and flags: a dict of plain values."""
    return dict(python=platform.python_version(), torch=torch.__version__, device=device_name(device), processes=world,
                threads=torch.get_num_threads(), commit=git("rev-parse", "HEAD") or "unknown",
                dirty=bool(git("status", "--porcelain")), command=sys.argv, shards={p: checksum(p) for p in paths})


class Log:
    """One run's folder. log.txt starts with all that is needed to run it again: sources, flags, machine, data."""
    def __init__(self, cfg, device, world, shards):
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        name = f"{stamp}_{cfg.mixer.replace(',', '-')}_s{cfg.seed}"
        self.dir = next(d for i in count() if not (d := Path(cfg.output_dir) / (f"{name}_{i}" if i else name)).exists())
        try:
            self.dir.mkdir(parents=True)
        except OSError as e:
            raise SystemExit(f"--output_dir {cfg.output_dir}: cannot write there ({e.strerror})") from None
        self.file, self.tty, self.shown = open(self.dir / "log.txt", "w", buffering=1), sys.stdout.isatty(), 0.0
        env = environment(device, world, shards)
        sources = {m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
        ours = {path for f in sources if (path := Path(f).resolve()).parent in (ROOT, ROOT / "data") and path.is_file()}
        for path in sorted(ours):
            print(f"=== source {path.name}\n{path.read_text()}", file=self.file)
        print(f"=== config\n{json.dumps(asdict(cfg))}\n=== env\n{json.dumps(env)}\n=== run", file=self.file)

    def __call__(self, line):
        print(line, file=self.file)
        print(("\r\033[K" if self.tty else "") + line, flush=True)

    def progress(self, line):                               # a line that overwrites itself, on a terminal only
        print("\r\033[K" + line[:shutil.get_terminal_size().columns - 1], end="", flush=True)      # never wraps
        self.shown = time.perf_counter()


def save(path, model, cfg, step):
    """Checkpoint for sampling: weights and config. Written aside and renamed, so a torn file never bears the name."""
    torch.save(dict(model=model.state_dict(), config=asdict(cfg), step=step), f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
