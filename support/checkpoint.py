"""Checkpoints: one file each, whole or not there, and all that a run needs to go on bit for bit.

A file holds plain types and tensors only. It is written beside its place, forced to the disk, then
renamed: a run that is killed while it saves still has the last one. Reading checks the checksums
that torch's zip format stores, since a flipped bit would load without a word, and executes nothing.
"""
import math
import os
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from support.machine import first_line

LAST = "model.pt"
BEST = "best.pt"

# Fields that may differ when a run goes on: where it runs, and what it tells. num_iterations may be
# another, and what the rate then does is said.
FREE = {"data", "input_bin", "input_val_bin", "output_dir", "run_name", "device", "compile",
        "val_batch_size", "val_loss_every", "val_tail_every", "train_loss_every", "save_every",
        "keep", "target_val_loss", "log", "peak_flops", "estimate", "init_from", "resume",
        "resume_anyway", "skip_bad_steps"}


# --------------------------------------------------------------------------------------------------
# Files

def write(path: Path, state: dict):
    """Raises OSError where it cannot; what stood at `path` is then still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp")
    try:
        with open(part, "wb") as f:
            reserve(f, state)
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        part.unlink(missing_ok=True)
        raise OSError(first_line(e)) from e
    sync_folder(path.parent)


def reserve(f, state: dict):
    """Fail on a full disk before anything is written, by the system's own words for it."""
    size = sum(t.numel() * t.element_size() for t in tensors_in(state))
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(f.fileno(), 0, size)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def sync_folder(folder: Path):
    """Force a rename to the disk, where the system lets folders be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def bad_weights(weights: dict) -> str:
    """{name: weights} -> what is not finite in them; nothing where all are."""
    bad = [name for name, p in weights.items() if not p.isfinite().all()]
    return f"the weights {bad[0]} are not finite ({len(bad)} are not)" if bad else ""


def bad_numbers(weights: dict, names, loss, sizes) -> str:
    """What was not finite in a step: weights, its loss, else gradients, by their names' norms."""
    if not loss.isfinite():
        return bad_weights(weights) or f"the training loss is {float(loss)}"
    bad = [name for name, size in zip(names, sizes) if not size.isfinite()]
    return f"the gradient of {' and '.join(bad[:2])} is not finite ({len(bad)} are not)"


def progress(state: dict | None, compile_seconds: float) -> dict:
    """Where a run stands: what a checkpoint holds besides weights, optimizers, random numbers.

    state: a checkpoint's content, of a run that goes on. best: the lowest validation loss; reached:
    when it was the target.
    """
    at = dict(tokens=0, seconds=0.0, compile_seconds=0.0, best=math.inf, reached=None)
    if state:
        at |= state["progress"]
    at["compile_seconds"] += compile_seconds
    return at


def check_loss(step: int, loss: float, saved: int | None):
    """End a run whose validation loss is not finite."""
    if not math.isfinite(loss):
        refuse_numbers(step, f"the validation loss is {loss}", saved)


def refuse_numbers(step: int, what: str, saved: int | None):
    last = "there is no checkpoint" if saved is None else f"the last good one is of step {saved}"
    raise SystemExit(f"step {step}: {what}: lower the learning rates. No checkpoint was "
                     f"overwritten, {last}")


def save(folder: Path, state: dict, watch, keep: int, best: bool, say):
    """model.pt and, of the best so far, best.pt. A failure is told, and the run goes on.

    watch: has the weights by name, and the step that was saved last. Bad weights end the run.
    """
    step = state["step"]
    if bad := bad_weights(watch.weights):
        refuse_numbers(step, bad, watch.saved)
    try:
        if watch.saved != step:
            keep_old(folder, watch.saved, keep)
            write(folder / LAST, state)
            watch.saved = step
        if best:
            link(folder / LAST, folder / BEST)
    except OSError as e:
        say(f"note: the checkpoint of step {step} could not be saved ({e}); the run goes on, "
            f"the last one is of step {watch.saved}")


def keep_old(folder: Path, step: int, keep: int):
    """Before model.pt is replaced: keep it by its step's name, and only keep - 1 of such."""
    last = folder / LAST
    if keep > 1 and last.is_file():
        link(last, folder / f"model_{step:07d}.pt")
    olds = sorted(folder.glob("model_*.pt"))
    for path in olds[:max(0, len(olds) - (keep - 1))]:
        path.unlink(missing_ok=True)


def link(source: Path, target: Path):
    """A second name for a checkpoint: no copy, as files are only ever replaced whole."""
    part = target.with_name(f"{target.name}.tmp")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        part.write_bytes(source.read_bytes())
    os.replace(part, target)


def sweep(folder: Path):
    """Remove what a killed run was writing."""
    for part in folder.glob("*.pt.tmp"):
        part.unlink(missing_ok=True)


def read(path, mmap: bool = False) -> dict:
    """A checkpoint's content, on the CPU. SystemExit with one line for anything else.

    mmap: without the checksums, and tensors stay on the disk until they are looked at.
    """
    path = Path(path)
    # Those of Path raise where a folder may not be looked into, or a name is too long.
    if os.path.isdir(path):
        path /= LAST
    if not os.path.isfile(path):
        raise SystemExit(f"{path}: no such file: name a run's folder, or a checkpoint in it")
    try:
        if not mmap:
            with zipfile.ZipFile(path) as f:
                damaged = f.testzip()
            if damaged:
                raise SystemExit(f"{path}: damaged, {damaged} is not what was saved: take another "
                                 "checkpoint")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:
        # Neither zipfile nor torch.load has one error for a cut, damaged, foreign or evil file.
        raise SystemExit(f"{path}: cut off, damaged or not a checkpoint of this code "
                         f"({first_line(e)})") from None
    missing = {"model", "config", "step"}.difference(state if isinstance(state, dict) else ())
    if missing:
        raise SystemExit(f"{path}: not a checkpoint of this code (it has no {min(missing)})")
    return state


# --------------------------------------------------------------------------------------------------
# Going on

def find(cfg, data) -> Path | None:
    """--resume -> the checkpoint to go on from. auto: the newest below output_dir that fits."""
    if cfg.resume != "auto":
        path = Path(cfg.resume)
        return path / LAST if os.path.isdir(path) else path
    saved = Path(cfg.output_dir).glob(f"{cfg.run_name or '*'}/{LAST}")
    for path in sorted(saved, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            state = read(path, mmap=True)
        except SystemExit:
            continue
        if "optimizers" in state and not differences(state, cfg, data):
            return path
    return None


def differences(state: dict, cfg, data) -> list[str]:
    """How a checkpoint's run is another than cfg's on this data; nothing: it can go on."""
    found = []
    there = state["config"]
    for name, here in asdict(cfg).items():
        if name in FREE:
            continue
        if name not in there:
            found.append(f"--{name} is {here}, the checkpoint has none")
        elif name == "num_iterations" and here >= state["step"]:
            continue
        elif there[name] != here:
            found.append(f"--{name} is {here}, was {there[name]}")
    for kind, checksums in data.items():
        if state.get("data", {}).get(kind) != checksums:
            found.append(f"the {kind} shards are others")
    return found


def by_first(compute, rank: int):
    """What the first process computes, in all of them."""
    if not dist.is_initialized():
        return compute()
    result = [compute() if rank == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]


def resumed(cfg, data, rank: int):
    """--resume -> (the checkpoint's content, its path), or twice None. SystemExit with one line."""
    path = by_first(lambda: find(cfg, data) if cfg.resume else None, rank)
    if path is None:
        return None, None
    state = read(path)
    if "optimizers" not in state:
        raise SystemExit(f"{path}: holds weights only, a run cannot go on from it")
    others = differences(state, cfg, data)
    if cfg.resume_anyway and state["config"].get("optim") != cfg.optim:
        raise SystemExit(f"{path}: holds another optimizer's state: --resume_anyway takes no other")
    if others and not cfg.resume_anyway:
        raise SystemExit(f"{path}: another run: {'; '.join(others[:4])}: give its own flags, or "
                         "--resume_anyway")
    if state["step"] > cfg.num_iterations and not cfg.minutes:
        raise SystemExit(f"{path}: is at step {state['step']} already: raise --num_iterations")
    if rank == 0:
        sweep(path.parent)
    return state, path


def random_state(device: torch.device) -> list:
    """States of the random numbers of all processes: [(of the CPU, of the device or None)]."""
    mine = (torch.get_rng_state(), None)
    if device.type == "cuda":
        mine = (mine[0], torch.cuda.get_rng_state(device))
    if not dist.is_initialized():
        return [mine]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def restore(state: dict, model, optimizers, device: torch.device, rank: int, world: int):
    """Weights, optimizers and random numbers as they were. The groups' rates are cfg's own."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise SystemExit("--resume_anyway takes no other model than the checkpoint's") from None
    for opt, saved in zip(optimizers, state["optimizers"], strict=True):
        own = [dict(group) for group in opt.param_groups]
        opt.load_state_dict(saved)
        for group, fresh in zip(opt.param_groups, own):
            # Some optimizers count their steps in the group.
            group.update({k: v for k, v in fresh.items() if k not in ("params", "step")})
    if len(state["random"]) == world:
        of_cpu, of_device = state["random"][rank]
        torch.set_rng_state(of_cpu)
        if device.type == "cuda" and of_device is not None:
            torch.cuda.set_rng_state(of_device, device)
