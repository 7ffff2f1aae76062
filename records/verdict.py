"""What a race's numbers say, and its record: read by race.py, which runs it.

Losses are in nats per token. Tokens and seconds to a target are linear between validations, on the
mean curve of a variant's seeds. A variant is below or above the control where Welch's test of two
seeds or more has p <= 0.05, else level with it.
"""
import csv
import math
import os
import re
import shlex
from pathlib import Path
from statistics import NormalDist, mean, variance
from typing import NamedTuple

import add
import plot
import table

MEMORY = re.compile(r"^final .*peak_memory:(\S+)", re.MULTILINE)
SCRIPT = """#!/usr/bin/env bash
# Runs this race again. PYTHON names a Python that has torch; extra arguments go to every run.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")/{up}"
{threads}"${{PYTHON:-python}}" race.py {command} "$@"
"""


class Result(NamedTuple):
    loss: float          # the first three as records/table.py has them
    params: int
    tokens: int
    curve: dict          # {step: (million tokens, seconds, loss)}
    memory: str
    bits: float | None   # per byte, where the shards say how many bytes they are of
    train: float         # mean training loss of the last quarter's lines


def result(folder: Path) -> Result | None:
    """A run's folder -> what it measured; None where it did not finish."""
    log = folder / "log.txt"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    final = table.FINAL.findall(text)
    if not final:
        return None
    loss, params, tokens = final[-1]
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    bits = [row["bits_per_byte"] for row in rows if row["val_loss"]][-1]
    late = [float(row["train_loss"]) for row in rows
            if row["train_loss"] and int(row["tokens"]) > 0.75 * int(tokens)]
    return Result(float(loss), int(params), int(tokens), plot.csv_points(folder / "metrics.csv"),
                  MEMORY.findall(text)[-1], float(bits) if bits else None,
                  mean(late) if late else math.inf)


def mean_curve(curves: list[dict]) -> list[tuple]:
    """{step: point} of each seed -> mean points, at the steps that all have, then at the ends."""
    shared = set.intersection(*map(set, curves)) - {max(curve) for curve in curves}
    rows = [[curve[step] for curve in curves] for step in sorted(shared)]
    rows.append([curve[max(curve)] for curve in curves])
    return [tuple(map(mean, zip(*row))) for row in rows]


def reach(points: list[tuple], target: float):
    """Points (million tokens, seconds, loss) -> (million tokens, seconds) at the target, or None.

    The first point itself where it is at the target already.
    """
    before = points[0]
    for point in points:
        if point[2] <= target:
            share = (before[2] - target) / (before[2] - point[2]) if before is not point else 0
            return tuple(a + share * (b - a) for a, b in zip(before[:2], point[:2]))
        before = point
    return None


def student(p: float, df: int) -> float:
    """The t that Student's distribution exceeds, on both sides together, with probability p."""
    low, high = 0.0, 1e4
    for _ in range(100):
        t = (low + high) / 2
        above = table.incomplete_beta(df / 2, 0.5, df / (df + t * t)) > p
        low, high = (t, high) if above else (low, t)
    return high


def seeds_to_settle(a: list[float], b: list[float]) -> float:
    """Losses of two variants -> seeds of each that show their difference d; infinite where it is 0.

    The least n >= 2 with n >= 2 ((t_0.975 + t_0.8) sd / d)^2: two-sided at 5%, 80% power, sd
    pooled, quantiles of Student's t with 2 n - 2 degrees of freedom, beyond 100 seeds normal ones.
    Source: Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988, chapter 2.
    """
    apart = mean(a) - mean(b)
    if not apart:
        return math.inf
    pooled = ((len(a) - 1) * variance(a) + (len(b) - 1) * variance(b)) / (len(a) + len(b) - 2)
    quantiles = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    n = max(2, math.ceil(2 * quantiles**2 * pooled / apart**2))
    while n <= 100:
        quantiles = student(0.05, 2 * n - 2) + student(0.4, 2 * n - 2)
        if n >= 2 * quantiles**2 * pooled / apart**2:
            break
        n += 1
    return n


def verdict(name: str, against: str, results: dict) -> str:
    """One line: who ends lower, by how much, how sure that is, and how many seeds would settle it.

    results: {variant: {seed: Result}}.
    """
    a, b = results[name], results[against]
    both = table.losses(a), table.losses(b)
    n = min(map(len, both))
    test = table.welch(*both)
    side = "level with"
    if test and test[2] <= 0.05:
        side = f"{abs(mean(both[0]) - mean(both[1])):.4f} {'below' if test[0] < 0 else 'above'}"
    tested = table.significance(a, b)
    text = (f"{name} ends {side} {against}: {table.difference(a, b)}, {n} seed{'s' * (n > 1)}, "
            f"p {tested.split(', ')[-1]}")
    if n < 2:
        return f"{text}; one seed settles nothing"
    needed = seeds_to_settle(*both)
    more = "never at this difference" if needed == math.inf else f"{max(0, needed - n)} each"
    return f"{text} (Welch's t, df, p: {tested}); more seeds to settle it: {more}"


def verdicts(arms: list, results: dict, best: dict) -> list[str]:
    """Every arm against the control: at the recipe's rates, then each at its best of --rates."""
    pairs = [(arm.name, "control") for arm in arms[1:]]
    pairs += [(best[arm.name], best["control"]) for arm in arms[1:]]
    found = [verdict(*pair, results) for pair in dict.fromkeys(pairs) if results.keys() >= {*pair}]
    return found or ["Nothing to compare: too few runs finished"]


def race_table(results: dict, target: float | None) -> str:
    """Markdown, a row a variant: its loss, and what it took to the target."""
    lines = ["| variant | loss | sd | n | tokens to target, millions | seconds to target | "
             "seeds there | ms a step | peak memory | bits per byte |", "|---" * 10 + "|"]
    for name, seeds in results.items():
        curves = [found.curve for found in seeds.values()]
        there = reach(mean_curve(curves), target) if target else None
        cells = [f"{there[0]:.4g}", f"{there[1]:.4g}"] if there else ["never", "never"]
        count = sum(bool(target and reach(list(curve.values()), target)) for curve in curves)
        step = mean(1e3 * curve[max(curve)][1] / max(curve) for curve in curves)
        memory = max((found.memory for found in seeds.values()), key=megabytes)
        bits = [found.bits for found in seeds.values() if found.bits]
        cells += [f"{count} of {len(seeds)}", f"{step:.2f}", memory,
                  f"{mean(bits):.4f}" if bits else "—"]
        lines.append(f"| {name} | {mean(table.losses(seeds)):.4f} | {table.spread(seeds)} | "
                     f"{len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def megabytes(memory: str) -> int:
    """"386MiB" -> 386; "unknown" -> 0."""
    return int(re.match(r"\d*", memory)[0] or 0)


def report(args, results: dict, missing: dict, best: dict) -> str:
    """The table, its target, how rates were chosen, what is missing and why: paragraphs."""
    target = args.target
    if target is None and "control" in results:
        target = mean_curve([found.curve for found in results["control"].values()])[-1][2]
    parts = [race_table(results, target)]
    if target is None:
        parts.append("There is no target: control has not finished.")
    elif not any(reach(mean_curve([found.curve for found in seeds.values()]), target)
                 for seeds in results.values()):
        parts.append(f"No arm reaches the target, {target:.4f}.")
    else:
        parts.append(f"The target is {target:.4f}" + (
            "." if args.target else ", where control's mean curve ends."))
    if args.rates:
        parts.append(f"Rates {', '.join(f'{rate:g}' for rate in args.rates)} and the recipe's own "
                     "were tried on seed 0 alone and chosen by its training losses in the last "
                     f"quarter. Best: {', '.join(best.values())}.")
    parts += [f"Missing: {run}: {why}" for run, why in missing.items()]
    return "\n\n".join(parts)


def write_script(folder: Path, argv: list[str]):
    """run.sh: the command that ran, but for the record, which is there now."""
    words = list(argv)
    if "--record" in words:
        at = words.index("--record")
        del words[at:at + 2]
    command = shlex.join(word for word in words if not word.startswith("--record="))
    threads = os.environ.get("OMP_NUM_THREADS")
    inside = folder.resolve().is_relative_to(table.ROOT)
    depth = len(folder.resolve().relative_to(table.ROOT).parts) if inside else 0
    up = "/".join([".."] * depth)
    script = folder / "run.sh"
    script.write_text(SCRIPT.format(up=up, command=command,
                                    threads=f"OMP_NUM_THREADS={threads} " if threads else ""))
    script.chmod(0o755)


def draw(folder: Path, shown: list[str]) -> str:
    """curves.png of these variants -> its markdown; nothing where matplotlib is missing."""
    labels = [f"{name}={name}" for name in shown]
    try:
        plot.picture(plot.arguments().parse_args(
            [str(folder), *labels, "--out", str(folder / "curves.png")]))
    except SystemExit as e:
        print(f"no picture: {e}")
        return ""
    return (f"<!-- picture: {' '.join(labels)} -->\n\n"
            "![Validation loss by tokens and by seconds](curves.png)\n\n")


def write(args, argv: list[str], arms: list, results: dict, missing: dict, best: dict,
          said: list[str], rest: str):
    """args.record: logs, run.sh, curves.png, and README.md with the claim first.

    SystemExit where records/add.py refuses a log; nothing is written then.
    """
    folder, new = args.record, {}
    for name in dict.fromkeys([*results, *(run.rsplit(" ", 1)[0] for run in missing)]):
        if table.logs(args.out / name):
            add.collect(args.out / name, name, folder, new)
    folder.mkdir(parents=True)
    for path, data in new.items():
        path.write_bytes(data)
    write_script(folder, argv)
    shown = dict.fromkeys(name for arm in arms for name in (arm.name, best[arm.name]))
    picture = draw(folder, [name for name in shown if name in results])
    against = [name for name in dict.fromkeys(["control", best["control"]]) if name in results]
    claims = "".join(f"{line}\n\n" for line in said[1:])
    flags = "\n".join(f"* {arm.name}: `{arm.text or 'no flags of its own'}`" for arm in arms)
    page = folder / "README.md"
    page.write_text(f"# {said[0]}\n\n{claims}{flags}\n\n<!-- table: {' '.join(against)} -->\n"
                    f"<!-- end -->\n\n{picture}{rest}\n\n## Reproduce\n\n    ./run.sh\n\n"
                    "Logs are VARIANT_sSEED.txt, each with its flags and machine.\n",
                    encoding="utf-8")
    page.write_text(table.rebuilt(page), encoding="utf-8")
