"""Trackers of --log: packages that show runs in a browser, each of them optional."""
import importlib
from dataclasses import asdict
from pathlib import Path

from support.machine import first_line

# What wandb and trackio group runs by
PROJECT = "spectral-nanogpt"


class TensorBoard:
    """Event files in the run's folder: tensorboard --logdir logs."""
    def __init__(self, folder: Path, cfg):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(folder)

    def put(self, step: int, values: dict):
        for name, value in values.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self):
        self.writer.close()


class Board:
    """wandb, and trackio, which has its interface. WANDB_MODE=offline needs no account."""
    def __init__(self, package: str, folder: Path, cfg, **more):
        self.package = importlib.import_module(package)
        self.package.init(project=PROJECT, name=folder.name, config=asdict(cfg), **more)

    def put(self, step: int, values: dict):
        self.package.log({k: v for k, v in values.items() if k != "step"}, step=step)

    def close(self):
        self.package.finish()


def wandb(folder: Path, cfg):
    return Board("wandb", folder, cfg, dir=folder)


def trackio(folder: Path, cfg):
    return Board("trackio", folder, cfg)


TRACKERS = {"tensorboard": TensorBoard, "wandb": wandb, "trackio": trackio}


def open_tracker(name: str, folder: Path, cfg):
    try:
        return TRACKERS[name](folder, cfg)
    except ImportError as e:
        raise SystemExit(f"--log {name}: not installed ({first_line(e)}): pip install {name}"
                         ) from None
