"""Curves of validation loss from a folder's logs: by tokens, and by training seconds beside it.

    python records/plot.py records/2026-11-22_afno-vs-attention afno=AFNO attn=attention \\
        --mark 1.4697="nanoGPT's GPU recipe" --out curves.png

A line is the mean over a variant's seeds, a thin line one seed. Losses are in nats per byte if
the vocabulary is of bytes, else per token. The steep start of a run is cut off. The panel of
seconds is left out, and stderr says why, if machine or settings differ between the logs, or if
seeds of one variant took times more than 10% apart. Times of a busy machine do not compare: with
--ms VARIANT=MILLISECONDS of a step, for all variants, that panel rests on them instead.
The colours are close to Okabe and Ito's.
"""
import argparse
import json
import re
import sys
from itertools import cycle
from pathlib import Path
from statistics import mean

from table import logs, read, variant

VALIDATION = re.compile(r"^step:([1-9]\d*)/\d+ val_loss:(\S+) train_time:(\d+)ms", re.MULTILINE)
STEP = re.compile(r"steps of ([\d,]+) tokens")
ENV = re.compile(r"^=== env\n(.*)", re.MULTILINE)
COLOURS = "#0072B2", "#D55E00", "#00825F", "#B0568C", "#111111", "#A87500"
GREY = "#666666"


def curves(folder, names, step_ms):
    """Folder, {variant: label} -> ({label: [run]}, unit, why seconds do not compare or None).

    step_ms {variant: milliseconds of a step} stands in for the logs' times; it may be empty.
    A run is [(million tokens, training seconds, nats per unit)]. Raises SystemExit on a variant
    without a log, a log without validation, or bytes beside tokens.
    """
    runs, units, machines, why = {name: [] for name in names.values()}, set(), set(), None
    for path in logs(folder):
        text, config = read(path)
        key = variant(path, folder, config)
        name = names.get(key)
        if name is None:
            continue
        width = int(STEP.search(text)[1].replace(",", ""))
        run = []
        for step, loss, ms in VALIDATION.findall(text):
            if key in step_ms:
                ms = int(step) * step_ms[key]
            run.append((int(step) * width / 1e6, float(ms) / 1e3, float(loss)))
        runs[name].append(run)
        if not runs[name][-1]:
            raise SystemExit(f"{path}: no validation after the first step")
        units.add("byte" if config["vocab_size"] == 256 else "token")
        env = json.loads(ENV.findall(text)[-1])
        machines.add(tuple(env[key] for key in ("device", "processes", "threads", "torch")))
    for name, found in runs.items():
        if not found:
            raise SystemExit(f"{name}: no log of this variant in {folder}")
        times = [points[-1][1] for points in found]
        if max(times) > 1.1 * min(times):
            why = f"the seeds of {name} took {min(times):.0f} to {max(times):.0f} s"
    if len(units) > 1:
        raise SystemExit("some logs are of bytes and some of tokens: their losses do not compare")
    return runs, units.pop(), "machines or settings differ" if len(machines) > 1 else why


def draw(axes, runs, form, marks, axis, unit):
    """One panel, of million tokens (axis 0) or seconds (1). form is that of a line's label."""
    lines = [[tuple(map(mean, zip(*at))) for at in zip(*found)] for found in runs.values()]
    low = min([p[2] for found in runs.values() for run in found for p in run] + list(marks))
    high = max(line[len(line) // 5][2] for line in lines)
    axes.set(xlim=(0, 1.01 * max(line[-1][axis] for line in lines)),
             ylim=(low - 0.07 * (high - low), high + 0.03 * (high - low)),
             xlabel="training seconds" if axis else f"million training {unit}s")
    height = 0
    rows = zip(lines, runs, cycle(COLOURS))
    for line, label, colour in sorted(rows, key=lambda row: row[0][-1][2]):
        for run in [*runs[label], line]:
            axes.plot([p[axis] for p in run], [p[2] for p in run], color=colour,
                      linewidth=2.4 if run is line else 0.9, alpha=1 if run is line else 0.4,
                      marker="o" if run is line else "", markersize=5, markevery=[-1])
        # labels stand at the lines' ends, raised where they would touch
        height = max(line[-1][2], height + 0.055 * (high - low))
        axes.annotate(form.format(label, line[-1][2]), (1.02, height), color=colour, va="center",
                      xycoords=axes.get_yaxis_transform(), weight="bold")
    for loss, label in marks.items():
        axes.axhline(loss, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate("" if axis else f"{label}  {loss:g}", (0, loss), (5, -4), va="top",
                      textcoords="offset points", color=GREY, fontsize=9.5)


def mark(text):
    """LOSS=LABEL -> (loss, label). Raises ValueError, which argparse reports in one line."""
    loss, label = text.split("=", 1)
    return float(loss), label


def milliseconds(text):
    """VARIANT=MILLISECONDS -> (variant, milliseconds)."""
    name, ms = text.split("=", 1)
    return name, float(ms)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("variants", nargs="+", metavar="VARIANT[=LABEL]")
    parser.add_argument("--mark", action="append", default=[], metavar="LOSS=LABEL", type=mark)
    parser.add_argument("--ms", action="append", default=[], type=milliseconds,
                        metavar="VARIANT=MILLISECONDS")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    try:
        from matplotlib import pyplot as plt
        from PIL import Image
    except ImportError:
        raise SystemExit("matplotlib is not installed: pip install matplotlib") from None
    names = dict(text.split("=", 1) if "=" in text else (text, text) for text in args.variants)
    runs, unit, why = curves(args.folder, names, dict(args.ms))
    if why:
        print(f"no panel of seconds: {why}", file=sys.stderr)
    plt.rcParams |= {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e8e8e8"}
    figure, panels = plt.subplots(1, 1 if why else 2, figsize=(10, 4.6), squeeze=False, sharey=True)
    panels[0][0].set_ylabel(f"validation loss, nats per {unit}")
    for axis, form in enumerate(["{0}  {1:.3f}"] if why else ["{1:.3f}", "{0}"]):
        draw(panels[0][axis], runs, form, dict(args.mark), axis, unit)
    figure.tight_layout(w_pad=3)
    figure.savefig(args.out, dpi=150, facecolor="white")
    # 128 colours are enough, and a third of the bytes
    with Image.open(args.out) as image:
        image.convert("RGB").quantize(128).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
