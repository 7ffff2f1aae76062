"""What a run leaves behind and shows: its folder, log.txt, metrics.csv, loss.png, the terminal.

    logs/RUN/log.txt          flags, machine, then a line for each step that was asked for
    logs/RUN/sources.txt.gz   every source file that ran: with log.txt, all to run it again
    logs/RUN/metrics.csv      the same numbers, one row a train line or a validation
    logs/RUN/loss.png         drawn at each validation, where matplotlib is installed
    logs/RUN/test_metrics.txt the last validation: loss, perplexity, accuracy, bits per byte

Losses are in nats per token. A place that takes no more lines never ends a run.
"""
import csv
import gzip
import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

from support.machine import ROOT, device_name, duration, first_line, own_sources
from support.optim import ramp_notes
from support.trackers import open_tracker

METRICS = ("step", "tokens", "seconds", "train_loss", "val_loss", "bits_per_byte", "learning_rate",
           "gradient_norm", "tokens_per_second")


def new_folder(cfg, tries: int = 0) -> Path:
    """Make the folder of a run below output_dir: run_name, or a name that a number makes unique.

    SystemExit with one line where it cannot be made, or run_name is taken.
    """
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    number = f"_{tries}" if tries else ""
    name = cfg.run_name or f"{stamp}_{cfg.mixer.replace(',', '-')}_s{cfg.seed}{number}"
    folder = Path(cfg.output_dir) / name
    try:
        folder.mkdir(parents=True, exist_ok=bool(cfg.run_name))
        if any(folder.iterdir()):
            raise SystemExit(f"--run_name {name}: {folder} is not empty: choose another name")
    except OSError as e:
        if isinstance(e, FileExistsError) and not cfg.run_name:
            # Another run has started in the same second.
            return new_folder(cfg, tries + 1)
        raise SystemExit(f"{folder}: cannot make this folder ({e.strerror}): change --output_dir "
                         "or --run_name") from None
    if not os.access(folder, os.W_OK):
        raise SystemExit(f"{folder}: may not be written: change --output_dir or --run_name")
    return folder


class Log:
    """One run's folder and the terminal; with a folder, that of a run that goes on from `step`.

    log.txt starts with flags, machine, versions and checksums of the data. SystemExit with one line
    where nothing can be written, or a tracker of --log is not installed.
    """
    def __init__(self, cfg, facts: dict, folder: Path | None = None, step: int = 0):
        self.dir = folder or new_folder(cfg)
        self.tty = bool(sys.stdout) and sys.stdout.isatty()
        self.shown = 0.0                             # when progress was last shown
        self.deaf = set()                            # places that take no more lines
        self.rows = []                               # of metrics.csv
        self.trackers = {name: open_tracker(name, self.dir, cfg) for name in cfg.rows("log")}
        start = f"=== config\n{json.dumps(asdict(cfg))}\n=== env\n{json.dumps(facts)}\n=== run"
        try:
            self.file = open(self.dir / "log.txt", "a" if folder else "x", buffering=1)
            self.keep_sources()
            print(start, file=self.file)
            self.metrics = self.open_metrics(step)
        except OSError as e:
            raise SystemExit(f"{self.dir}: cannot write a log there ({e.strerror})") from None

    def keep_sources(self):
        """Beside those of the run's start where a run goes on with others."""
        sources = "".join(f"=== source {path.relative_to(ROOT).as_posix()}\n{path.read_text()}\n"
                          for path in own_sources()).encode()
        packed = gzip.compress(sources, mtime=0)
        kept = sorted(self.dir.glob("sources*.txt.gz"))
        # Not unpacked: one that a full disk or a kill has cut off is no reason to stop.
        if any(path.read_bytes() == packed for path in kept):
            return
        name = time.strftime("sources_%Y%m%dT%H%M%S.txt.gz", time.gmtime())
        path = self.dir / (name if kept else "sources.txt.gz")
        path.write_bytes(packed)

    def open_metrics(self, step: int):
        """metrics.csv with the rows up to a step: later ones, and its validation, come again."""
        path = self.dir / "metrics.csv"
        if path.is_file():
            with open(path, newline="") as f:
                # A full disk may have cut off the last one.
                whole = [line for line in f if line.endswith("\n")]
            self.rows = [row for row in csv.DictReader(whole)
                         if int(row["step"]) < step + (not row["val_loss"])]
        # Beside its place: a kill between two rows would lose the rest.
        part = self.dir / "metrics.csv.tmp"
        lines = METRICS, *(row.values() for row in self.rows)
        part.write_text("".join(",".join(line) + "\n" for line in lines))
        os.replace(part, path)
        return open(path, "a", buffering=1, newline="")

    def put(self, line: str, file, name: str):
        """A full disk, a closed pipe or a terminal that is gone end what is told, not the run."""
        self.attempt(name, print, line, file=file, flush=True)

    def attempt(self, name: str, action, *args, **more):
        """action(*args, **more), until it fails once: the failure is told, then `name` is deaf."""
        if name in self.deaf:
            return
        try:
            action(*args, **more)
        except Exception as e:
            self.deaf.add(name)
            self(f"note: nothing more is written to {name} ({first_line(e)})")

    def __call__(self, line: str):
        self.put(line, self.file, "log.txt")
        if sys.stdout:
            self.put(("\r\033[K" if self.tty else "") + line, sys.stdout, "stdout")

    def training(self, step: int, steps: int, tokens: int, seconds: float, loss: float,
                 gradient_norm: float, learning_rate: float, mfu: float | None):
        """The line behind a step out of `steps`. mfu: share of the device's FLOP/s; None: unknown.
        """
        rate = tokens / seconds
        text = f" tok/s:{rate:.0f} grad_norm:{gradient_norm:.3f}"
        if mfu is not None:
            text += f" mfu:{mfu:.3f}"
        self.step(steps, text, step=step, tokens=tokens, seconds=seconds, train_loss=loss,
                  gradient_norm=gradient_norm, tokens_per_second=rate, learning_rate=learning_rate)

    def validation(self, step: int, steps: int, tokens: int, seconds: float, loss: float, bits):
        """The line of a validation before a step, and the picture anew. bits: of per_byte."""
        text = "".join(f" {name}:{value:.4f}" for name, value in bits.items())
        self.step(steps, text, step=step, tokens=tokens, seconds=seconds, val_loss=loss, **bits)
        self.draw()

    def step(self, steps: int, end: str, **values):
        """The line of a step out of `steps`, which ends in `end`, and its row of metrics.csv.

        values: some of METRICS, one loss among them.
        """
        step = values["step"]
        name = "val_loss" if "val_loss" in values else "train_loss"
        ms = 1e3 * values["seconds"]
        self(f"step:{step}/{steps} {name}:{values[name]:.4f} train_time:{ms:.0f}ms "
             f"step_avg:{ms / max(1, step):.2f}ms{end}")
        self.measure(**values)

    def measure(self, **values):
        """One row of metrics.csv, and the same for the trackers."""
        texts = {name: f"{value:.7g}" if isinstance(value, float) else str(value)
                 for name, value in values.items()}
        row = {name: texts.get(name, "") for name in METRICS}
        self.rows.append(row)
        self.put(",".join(row.values()), self.metrics, "metrics.csv")
        for name, tracker in self.trackers.items():
            self.attempt(name, tracker.put, values["step"], values)

    def draw(self):
        """loss.png, where matplotlib is installed and there is something to draw."""
        if len(self.rows) > 1:
            self.attempt("loss.png", draw, self.rows, self.dir)

    def close(self, results: dict):
        """test_metrics.txt, a result a line; the last words of trackers and terminal."""
        text = "".join(f"{name} {value:.6g}\n" for name, value in results.items())
        self.attempt("test_metrics.txt", (self.dir / "test_metrics.txt").write_text, text)
        for name, tracker in self.trackers.items():
            self.attempt(name, tracker.close)
        if sys.stdout:
            self.put(f"log and checkpoint: {self.dir}", sys.stdout, "stdout")

    def progress(self, step: int, steps: int, loss: float, rate: float, left: float):
        """A line that overwrites itself, on a terminal. rate: tokens a second; left: seconds."""
        # They are left out in this order where the terminal is narrow.
        parts = {
            "rate": f"{short(rate)} tok/s",
            "loss": f"loss {loss:.2f}",
            "steps": f"{step}/{steps}",
            "share": f"{100 * step // max(1, steps)}%",
            "eta": f"eta {duration(left)}",
        }
        order = "steps", "share", "loss", "rate", "eta"
        width = shutil.get_terminal_size().columns - 1
        for gone in parts:
            line = " ".join(parts[name] for name in order if name in parts)
            if len(line) <= width:
                break
            parts = {name: text for name, text in parts.items() if name != gone}
        try:
            print("\r\033[K" + line[:width], end="", flush=True)
        except OSError:
            self.tty = False
        self.shown = time.perf_counter()


class NoLog:
    """In the place of a Log in all processes but the first: nothing is told."""
    dir = None
    tty = False

    def __call__(self, *line, **values):
        pass

    validation = close = __call__


def opening(cfg, data, model, device, world: int, started: str, path) -> list[str]:
    """A run's first lines.

    data: of open_batches; started: whose weights it starts from; path: the checkpoint it goes on
    from, or None.
    """
    length = f"{cfg.minutes:g} minutes of steps" if cfg.minutes else f"{cfg.num_iterations:,} steps"
    n_params = sum(p.numel() for p in model.parameters())
    lines = [f"{n_params:,} parameters, {cfg.mixer}, {device_name(device)} x {world}, {length} of "
             f"{data.batches.per_step:,} tokens, validated on "
             f"{data.val_batches.targets(data.val_n):,} tokens", started, *ramp_notes(cfg)]
    if cfg.resume and not path:
        lines.append("note: nothing to go on from fits these flags and these data: a new run")
    return [line for line in lines if line]


def summary(cfg, loss: float, model, at: dict, seconds: float, memory: str) -> str:
    """A run's last line. at: where it stands, as a checkpoint has it; seconds: of training."""
    target = ""
    if cfg.target_val_loss:
        when = "never" if at["reached"] is None else f"{at['reached']:.1f}s"
        target = f"time_to_{cfg.target_val_loss}:{when} "
    n_params = sum(p.numel() for p in model.parameters())
    return (f"final val_loss:{loss:.4f} params:{n_params} tokens:{at['tokens']} "
            f"train_time:{seconds:.1f}s with_compile:{seconds + at['compile_seconds']:.1f}s "
            f"{target}peak_memory:{memory}")


def short(number: float) -> str:
    """Three digits and a letter: 9.6k, 1.24M, 2G."""
    for unit in ("", "k", "M", "G"):
        if number < 1000 or unit == "G":
            return f"{number:.3g}{unit}"
        number /= 1000


def draw(rows: list[dict], folder: Path):
    """Losses by tokens, of metrics.csv's rows, into loss.png."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4.2), layout="tight")
    axes = figure.subplots()
    lowest = []
    for name, label, style in (("train_loss", "training", dict(color="#999999", linewidth=1)),
                               ("val_loss", "validation", dict(color="#0072B2", marker="."))):
        points = [(int(row["tokens"]) / 1e6, float(row[name])) for row in rows if row[name]]
        if points:
            axes.plot(*zip(*points), label=f"{label} {points[-1][1]:.4f}", **style)
            lowest.append(min(y for _, y in points))
    # An untrained model's loss would leave no room for the rest.
    later = [float(row[name]) for row in rows[len(rows) // 5:]
             for name in ("train_loss", "val_loss") if row[name]]
    room = 0.05 + 0.1 * (max(later) - min(lowest))
    axes.set(xlabel="million tokens", ylabel="nats per token", title=folder.name,
             ylim=(min(lowest) - room, max(later) + room))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e8e8e8")
    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(folder / "loss.png")
