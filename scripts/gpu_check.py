"""Everything that only a GPU shows, in one folder below records/: run by run_gpu_check.sh.

    ./run_gpu_check.sh                          # a CUDA machine, no network: 9 minutes at most
    ./run_gpu_check.sh --device cpu --tiny      # the same steps, small: does the check itself work?
    python scripts/gpu_check.py --profile "--mixer attn ..."      # one profile, the trainer's flags

The text is data/tinyshakespeare in GPT-2 tokens: so little that losses are no result. Recipes have
one micro-batch a step, warm-up and warm-down by default. What a step of this check prints is in
NAME.txt; one that fails or takes too long is noted, and the rest goes on.
"""
import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import command
from support.machine import device_name, pick_device
from tests.runs import RECIPES, recipe
from train_gpt2 import GPT, build_optimizers, parse

# Of all steps together, seconds: nine minutes less what starting and ending take.
TOTAL = 520
# Kept free for the race's three arms: estimates, compiling, 15 s of training each, validation.
RACE = 165
SMALL = ["--sequence_length", "32", "--batch_size", "2", "--val_batch_size", "2"]


class Step(NamedTuple):
    name: str
    seconds: float       # at most
    command: list
    reserve: float = RACE


def short(name: str, tiny: bool, *more: str) -> list[str]:
    """The flags of a recipe for a few steps; the embedded run's where it has no race."""
    flags = not tiny and recipe(name, "RACE") or recipe(name, "EMBEDDED")
    # Not every schedule has a warm-down.
    for ramp in "--warmup_iters", "--warmdown_iters":
        if ramp in flags:
            flags[flags.index(ramp) + 1] = "-1"
    return [*flags, *more, "--grad_accumulation_steps", "1", *(SMALL if tiny else [])]


def plan(args, text: Path, out: Path) -> list[Step]:
    """text: the folder of shards."""
    python = [sys.executable]
    device = ["--device", args.device]
    data = ["--data", str(text), "--val_tokens", "256" if args.tiny else "32768", *device]
    steps = [Step("tests", 100, [*python, "-m", "pytest", "-q", "tests/test_gpu.py"])]
    sizes = SMALL[:4] + ["--n_embd", "32", "--n_head", "2", "--repeats", "1"] if args.tiny else \
        ["--n_embd", "768", "--n_head", "12", "--batch_size", "16"]
    steps.append(Step("bench", 40, [*python, "bench.py", "mixers", *sizes, *device]))
    public = ("run_attn.sh",)
    control = "run_afno.sh", "--mixer", "attn", "--short_conv"
    hybrid = ("run_afno.sh", "--mixer", "afno,afno,afno,attn")
    for kind, (name, *more) in dict(control=control, hybrid=hybrid).items():
        flags = shlex.join([*short(name, args.tiny, *more), *device, "--vocab_size", "50257"])
        steps.append(Step(f"profile_{kind}", 40, [
            *python, "scripts/gpu_check.py", f"--profile={flags}", "--steps",
            "3" if args.tiny else "30"]))
    once = ["--num_iterations", "3" if args.tiny else "20", "--train_loss_every", "1",
            "--val_loss_every", "0", "--save_every", "0"]
    for name in RECIPES:
        slug = name.removeprefix("run_").replace(".sh", "").replace(" ", "_")
        steps.append(Step(f"recipe_{slug}", 60,
                          [*python, "train_gpt2.py", *short(name, args.tiny), *data, *once,
                           "--output_dir", str(text / "logs"), "--run_name", slug]))
    arms = [shlex.join(short(name, args.tiny, *more)) for name, *more in (public, control, hybrid)]
    return [*steps, Step("race", RACE, [
        *python, "race.py", f"--control={arms[0]}", f"--candidate={arms[1]}",
        f"--more={arms[2]}", "--seeds", "1", "--minutes", "0.02" if args.tiny else "0.25", *data,
        "--num_iterations", "200", "--val_loss_every", "50", "--val_tail_every", "10",
        "--train_loss_every", "5", "--save_every", "0", "--out", str(text / "race"), "--record",
        str(out / "race")], reserve=0)]


def take(step: Step, seconds: float, out: Path) -> str:
    """Run a step into NAME.txt -> how it ended."""
    with open(out / f"{step.name}.txt", "w") as file:
        print("+", shlex.join(["python", *step.command[1:]]), file=file, flush=True)
        process = subprocess.Popen(step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            code = process.wait(seconds)
            return "ok" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            return f"ended after its {seconds:.0f} s"
        finally:
            # race.py ends its own process first.
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def measured(text: str) -> str:
    """What a recipe's output says of its speed: cells of a table."""
    found = [re.findall(pattern, text)[-1:] or ["—"] for pattern in
             (r" tok/s:(\d+)", r" mfu:(\S+)", r"peak_memory:(\S+)", r"final val_loss:(\S+)")]
    return " | ".join(cell for cell, in found)


def summary(device: torch.device, ends: dict, out: Path) -> str:
    """ends {step: (how it ended, seconds)} -> README.md, for the steps up to now."""
    lines = [f"# GPU check on {device_name(device)}: "
             f"{sum(end == 'ok' for end, _ in ends.values())} of {len(ends)} steps end well", "",
             f"torch {torch.__version__}. Tiny Shakespeare in GPT-2 tokens, one micro-batch a",
             "step: losses are no result.", "",
             "| step | end | seconds | tokens/s | MFU | peak memory | loss |", "|---" * 7 + "|"]
    for name, (end, seconds) in ends.items():
        path = out / f"{name}.txt"
        text = path.read_text(errors="replace") if path.exists() else ""
        cells = measured(text) if name.startswith("recipe") else " | | | "
        lines.append(f"| {f'[{name}]({name}.txt)' if text else name} | {end} | {seconds:.0f} | "
                     f"{cells} |")
    if (out / "race/README.md").exists():
        lines += ["", "[The race](race/README.md)"]
    return "\n".join([*lines, "", "Run again: `./run_gpu_check.sh`", ""])


def make_text(folder: Path):
    """The embedded bytes as text, then as shards of GPT-2 tokens, in folder."""
    folder.mkdir()
    for part in "train", "val":
        tokens = np.fromfile(ROOT / f"data/tinyshakespeare/{part}.bin", "<u2", offset=1024)
        (folder / f"{part}.txt").write_bytes(tokens.astype(np.uint8).tobytes())
    subprocess.run([sys.executable, "data/text.py", folder / "train.txt", "--val",
                    folder / "val.txt", "--out", folder, "--prefix", "gpt2"], cwd=ROOT, check=True)


def check(args):
    device = pick_device(args.device, 0)
    card = re.sub(r"\W+", "-", device_name(device).split(",")[0]).strip("-").lower()
    out = args.out or ROOT / f"records/{time.strftime('%Y-%m-%d')}_gpu-check_{card}"
    if out.exists():
        raise SystemExit(f"{out}: is there already: move it away, or name another by --out")
    out = out.resolve()
    ends = {}
    start = time.monotonic()
    with command.unfinished(ROOT / "data") as folder:
        # Below the folder, which is locked: data/text.py locks its own.
        text = Path(folder).relative_to(ROOT) / "text"
        make_text(ROOT / text)
        out.mkdir(parents=True)
        for step in plan(args, text, out):
            begun = time.monotonic()
            left = TOTAL - step.reserve - (begun - start)
            end = take(step, min(step.seconds, left), out) if left > 5 else "no time was left"
            ends[step.name] = end, time.monotonic() - begun
            print(f"{step.name}: {end}, {ends[step.name][1]:.0f} s", flush=True)
            # Checkpoints, of up to 1.5 GB each.
            shutil.rmtree(ROOT / text / "logs", ignore_errors=True)
            (out / "README.md").write_text(summary(device, ends, out), encoding="utf-8")
    script = out / "race/run.sh"
    if script.exists():
        # Its text is gone; the command is in race.txt.
        script.write_text('#!/usr/bin/env bash\n# The check makes its text anew.\n'
                          'exec "$(dirname "${BASH_SOURCE[0]}")/../../../run_gpu_check.sh" "$@"\n')
    print(out)


class Parts:
    """Seconds of modules' forward and backward passes, each waited for, by kind of module."""
    def __init__(self, model: GPT, device: torch.device):
        self.seconds = defaultdict(float)
        self.device = device
        self.since = {}
        kinds = [(f"{kind}s", getattr(block, kind)) for block in model.blocks
                 for kind in ("mixer", "mlp")]
        for name, module in kinds:
            for way, before, after in (
                    ("forward", module.register_forward_pre_hook, module.register_forward_hook),
                    ("backward", module.register_full_backward_pre_hook,
                     module.register_full_backward_hook)):
                before(partial(self.begin, f"{way}, {name}"))
                after(partial(self.end, f"{way}, {name}"))

    def now(self) -> float:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def begin(self, name, *_):
        self.since[name] = self.now()

    def end(self, name, *_):
        self.seconds[name] += self.now() - self.since[name]


def profile(flags: list[str], steps: int):
    """Print where the time of a training step goes, uncompiled: by part, then by operation."""
    cfg = parse(flags)
    device = pick_device(cfg.device, 0)
    torch.manual_seed(0)
    model = GPT(cfg).to(device)
    optimizers = build_optimizers(cfg, model)
    idx = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.sequence_length + 1), device=device)

    def train(parts, steps):
        for _ in range(steps):
            parts.begin("forward")
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(idx[:, :-1], idx[:, 1:])
            parts.end("forward")
            parts.begin("backward")
            loss.backward()
            parts.end("backward")
            parts.begin("optimizer")
            for opt in optimizers:
                opt.step()
            model.zero_grad(set_to_none=True)
            parts.end("optimizer")

    parts = Parts(model, device)
    train(parts, 3)
    parts.seconds.clear()
    train(parts, steps)
    seconds = dict(parts.seconds)
    whole = sum(seconds[name] for name in ("forward", "backward", "optimizer"))
    print(f"{cfg.mixer}, {device_name(device)}, {steps} steps, uncompiled, every part waited for")
    for way in "forward", "backward":
        inner = sum(seconds.get(f"{way}, {kind}", 0) for kind in ("mixers", "mlps"))
        seconds[f"{way}, embedding, norms, head, loss"] = seconds.pop(way) - inner
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{name:42}{1e3 * spent / steps:10.2f} ms{spent / whole:8.1%}")
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        train(parts, steps)
    key = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=50))


def main():
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: p.exit(2, f"gpu_check.py: {message} (--help lists the flags)\n")
    p.add_argument("--device", default="cuda", help="default: %(default)s")
    p.add_argument("--tiny", action="store_true", help="small models, seconds a step")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="default: records/DATE_gpu-check_…")
    p.add_argument("--profile", metavar="FLAGS", help="only print a profile of these")
    p.add_argument("--steps", type=int, default=30, help="of the profile; default: %(default)s")
    args = p.parse_args()
    if args.profile is not None:
        profile(shlex.split(args.profile), args.steps)
    else:
        check(args)


if __name__ == "__main__":
    command.run(main, "gpu_check.py", "what it has is in the folder below records/")
