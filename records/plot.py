"""Curves of validation loss from logs: by tokens, and by training seconds beside it.

    python records/plot.py                                    # rebuilds every record's picture
    python records/plot.py logs/RUN logs/OTHER                # overlays runs
    python records/plot.py records/2026-11-24_hybrid hybrid="3 AFNO : 1 attention" afno=AFNO

A PATH is a log, a metrics.csv, a run's folder or a folder as records/table.py reads it, which
names the variants, too. Runs of one mixer that differ by more than their seed bear their folders'
names. Every argument that is no path picks a VARIANT and may label it; without any, all are drawn.

A line is the mean over a variant's seeds at the steps that all of them have, its band goes from
the least to the largest. Losses are in nats per byte if the vocabulary is of bytes, else per token.
The steep start of a run is cut off. The panel of seconds is left out, and stderr says why, if
machine or settings differ between the logs, or if seeds of one variant took times more than 10%
apart; --seconds draws it all the same. Times of a busy machine do not compare: with
--ms VARIANT=MILLISECONDS of a step, for all variants, that panel rests on them instead.

A record's README.md has the arguments of its picture after PATH in <!-- picture: … -->. One file
serves light and dark pages: nothing is painted behind the curves, and every colour has the same
contrast, 4.3 to 1, to white as to GitHub's dark #0d1117. The labels say what the colours say.
"""
import argparse
import csv
import json
import os
import re
import shlex
import sys
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from table import ENV, ROOT, SEED, logs, read, variant

VALIDATION = re.compile(r"^step:([1-9]\d*)/\d+ val_loss:(\S+) train_time:(\d+)ms", re.MULTILINE)
STEP = re.compile(r"(?:steps|minutes) of ([\d,]+) tokens")
PICTURE = re.compile(r"<!-- picture: (.*?) -->")
COLOURS = "#1279DF", "#D7480B", "#078B5A", "#CA4793", "#A46F04", "#915FD7"
GREY = "#727A84"
MARKERS = "os^DvP"
# matplotlib's settings of every picture.
STYLE = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color",
                       "ytick.color", "grid.color"), GREY)
STYLE |= {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
          "axes.grid": True, "axes.grid.axis": "y", "grid.alpha": 0.25}


class Run(NamedTuple):
    variant: str
    settings: dict       # every flag but those that tell runs of one variant apart
    seed: int
    machine: tuple       # what times depend on
    unit: str            # "byte" or "token"
    points: dict         # {step: (million tokens, training seconds, nats per unit)}, validations


def log_points(text):
    """A log's text -> Run.points. A step that was run twice counts as it was the last time."""
    width = int(STEP.search(text)[1].replace(",", ""))
    return {int(step): (int(step) * width / 1e6, float(ms) / 1e3, float(loss))
            for step, loss, ms in VALIDATION.findall(text)}


def csv_points(path):
    """metrics.csv -> Run.points. Raises SystemExit if it is no such table."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return {int(row["step"]): (int(row["tokens"]) / 1e6, float(row["seconds"]),
                                   float(row["val_loss"]))
                for row in rows if row["val_loss"] and int(row["step"])}
    except (KeyError, TypeError, ValueError) as e:
        raise SystemExit(f"{path}: this is no metrics.csv of a run ({e!r})") from None


def load(path, folder):
    """A log or metrics.csv, the folder that names its variant -> Run.

    Raises SystemExit without a validation after the first step.
    """
    log = path.with_name("log.txt") if path.suffix == ".csv" else path
    config, machine, name, seed, unit = {}, (), path.parent.name, None, "token"
    if log.exists():
        text, config = read(log)
        env = json.loads(ENV.findall(text)[-1])
        machine = tuple(env[key] for key in ("device", "processes", "threads", "torch"))
        named = log.name == "log.txt" or SEED.fullmatch(log.name)
        name, seed = variant(log, folder, config) if named else log.stem, config["seed"]
        unit = "byte" if config["vocab_size"] == 256 else "token"
    points = csv_points(path) if path.suffix == ".csv" else log_points(text)
    if not points:
        raise SystemExit(f"{path}: no validation after the first step")
    own = "seed", "output_dir", "run_name"
    settings = {key: value for key, value in config.items() if key not in own}
    return Run(name, settings, seed, machine, unit, points)


def find(paths):
    """Paths -> runs. Raises SystemExit if a path holds none."""
    found = []
    for path in paths:
        folder = path if path.is_dir() else path.parent
        files = [path] if path.is_file() else logs(path) or sorted(path.glob("**/metrics.csv"))
        if not files:
            raise SystemExit(f"{path}: no logs, neither VARIANT_sSEED.txt, log.txt nor metrics.csv")
        found += [(file, load(file, folder)) for file in files]
    runs = []
    for file, run in found:
        alike = [other for _, other in found if other.variant == run.variant]
        seeds = [other.seed for other in alike]
        apart = any(other.settings != run.settings for other in alike)
        if file.name in ("log.txt", "metrics.csv") and (apart or len(set(seeds)) < len(seeds)):
            run = run._replace(variant=file.parent.name)
        runs.append(run)
    return runs


def curves(paths, names=None, step_ms=None):
    """Paths, {variant: label} or all -> ({label: [points]}, unit, why seconds do not compare).

    step_ms {variant: milliseconds of a step} stands in for the logs' times. Raises SystemExit on a
    variant without a log, on seeds that share no step, or bytes beside tokens.
    """
    runs, step_ms = find(paths), step_ms or {}
    names = names or {run.variant: run.variant for run in runs}
    for name in [*names, *step_ms]:
        if name not in {run.variant for run in runs}:
            raise SystemExit(f"{name}: neither a path nor a variant of "
                             f"{', '.join(map(str, paths)) or 'no path'}; there are "
                             f"{', '.join(sorted({run.variant for run in runs})) or 'none'}")
    runs = [run for run in runs if run.variant in names]
    if len({run.unit for run in runs}) > 1:
        raise SystemExit("some logs are of bytes and some of tokens: their losses do not compare")
    why = "machines or settings differ" if len({run.machine for run in runs}) > 1 else None
    lines = {}
    for name, label in names.items():
        seeds = [run.points for run in runs if run.variant == name]
        steps = sorted(set.intersection(*map(set, seeds)))
        if not steps:
            raise SystemExit(f"{name}: its seeds were validated at no step in common")
        if name in step_ms:
            seeds = [{step: (tokens, step * step_ms[name] / 1e3, loss)
                      for step, (tokens, _, loss) in points.items()} for points in seeds]
        lines[label] = [[points[step] for step in steps] for points in seeds]
        times = [points[-1][1] for points in lines[label]]
        if max(times) > 1.1 * min(times):
            why = f"the seeds of {label} took {min(times):.0f} to {max(times):.0f} s"
    return lines, runs[0].unit, why


def draw(axes, runs, form, marks, axis, unit):
    """One panel, of million tokens (axis 0) or seconds (1). form is that of a line's label."""
    lines = [[tuple(map(mean, zip(*at))) for at in zip(*found)] for found in runs.values()]
    low = min([p[2] for found in runs.values() for run in found for p in run] + list(marks))
    high = max(line[len(line) // 5][2] for line in lines)
    room = high - low or 1.0
    axes.set(xlim=(0, 1.02 * max(line[-1][axis] for line in lines)),
             ylim=(low - 0.07 * room, high + 0.03 * room),
             xlabel="training seconds" if axis else f"million training {unit}s")
    height = -float("inf")
    rows = zip(lines, runs, cycle(COLOURS), cycle(MARKERS))
    for line, label, colour, marker in sorted(rows, key=lambda row: row[0][-1][2]):
        x = [p[axis] for p in line]
        seeds = [[p[2] for p in at] for at in zip(*runs[label])]
        axes.fill_between(x, list(map(min, seeds)), list(map(max, seeds)), color=colour,
                          alpha=0.25, linewidth=0)
        axes.plot(x, [p[2] for p in line], color=colour, linewidth=2.2, marker=marker,
                  markersize=6, markevery=[-1], clip_on=len(line) > 1)
        # labels stand at the lines' ends, raised where they would touch
        height = max(line[-1][2], height + 0.055 * room)
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


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="PATH ... | VARIANT[=LABEL]",
                        help="none: every record's picture")
    parser.add_argument("--mark", action="append", default=[], metavar="LOSS=LABEL", type=mark)
    parser.add_argument("--ms", action="append", default=[], type=milliseconds,
                        metavar="VARIANT=MILLISECONDS")
    parser.add_argument("--seconds", action="store_true", help="draw seconds in any case")
    parser.add_argument("--out", default="curves.png")
    return parser


def chosen(args):
    """Parsed arguments -> curves(...) of them."""
    paths = [Path(text) for text in args.what if Path(text).exists()]
    names = dict(text.split("=", 1) if "=" in text else (text, text)
                 for text in args.what if not Path(text).exists())
    return curves(paths, names, dict(args.ms))


def save(figure, out):
    """The figure as a transparent picture, in 256 colours if it is a PNG: a quarter of the bytes."""
    from matplotlib import pyplot as plt
    from PIL import Image
    figure.savefig(out, dpi=150, transparent=True)
    plt.close(figure)
    if Path(out).suffix == ".png":
        with Image.open(out) as image:
            image.quantize(256, Image.Quantize.FASTOCTREE).save(out, optimize=True)


def picture(args):
    """Draws args.out. Raises SystemExit if matplotlib is missing, or as curves()."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        raise SystemExit("matplotlib is not installed: pip install matplotlib") from None
    runs, unit, why = chosen(args)
    if why and not args.seconds:
        print(f"{args.out}: no panel of seconds: {why}", file=sys.stderr)
    panels = ["{0}  {1:.3f}"] if why and not args.seconds else ["{1:.3f}", "{0}"]
    with plt.rc_context(STYLE):
        figure, row = plt.subplots(1, len(panels), figsize=(10, 4.6), squeeze=False, sharey=True)
        row[0][0].set_ylabel(f"validation loss, nats per {unit}")
        for axis, form in enumerate(panels):
            draw(row[0][axis], runs, form, dict(args.mark), axis, unit)
        figure.tight_layout(w_pad=3)
        save(figure, args.out)
    print(args.out)


def pictures():
    """-> the parsed arguments of every record's picture."""
    return [arguments().parse_args([os.path.relpath(page.parent), *shlex.split(found)])
            for page in sorted(ROOT.glob("records/**/README.md"))
            for found in PICTURE.findall(page.read_text(encoding="utf-8"))]


def main():
    args = arguments().parse_args()
    if args.what:
        picture(args)
    else:
        for args in pictures():
            args.out = str(Path(args.what[0], args.out))
            picture(args)


if __name__ == "__main__":
    main()
