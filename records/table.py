"""The table of a record, made from its logs: one row for all seeds of a variant, the best first.

    python records/table.py records/2026-11-22_afno-vs-attention                   # no control
    python records/table.py records/2026-11-22_afno-vs-attention attn_short_conv   # against it
    python records/table.py logs/2026-11-22_afno-vs-attention attn_short_conv      # after run.sh

FOLDER holds a record's logs, VARIANT_sSEED.txt, or log.txt as a run leaves it: FOLDER/log.txt,
FOLDER/RUN/log.txt (the variant is the mixer) or FOLDER/VARIANT/RUN/log.txt. Losses and
differences are in nats per token; in a byte-level run a token is a byte.

Every further argument names a control and adds a column: mean difference ± standard error.
Runs are paired by seed. The mean is over the seeds that both variants have; the standard error
is sd(paired differences) / sqrt(n). If n is less than the variant's seeds, it is printed. One
pair has no standard error: -0.0132 (n=1). No pair: a dash.
"""
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

FINAL = re.compile(r"^final val_loss:(\S+) params:(\d+) tokens:(\d+)", re.MULTILINE)
CONFIG = re.compile(r"^=== config\n(.*)", re.MULTILINE)


def logs(folder):
    """Folder -> paths of its logs. A log whose name has no seed (run_afno.txt) is left out."""
    patterns = "*_s*.txt", "log.txt", "*/log.txt", "*/*/log.txt"
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def read(path):
    """Log -> (text, config). Raises SystemExit if it has no config."""
    text = path.read_text(encoding="utf-8")
    found = CONFIG.findall(text)
    if not found:
        raise SystemExit(f"{path}: no === config section, this is no log")
    return text, json.loads(found[-1])


def variant(path, folder, config):
    """The name of a log's row: the file's, that of the folder above the run's, or the mixer."""
    if path.name != "log.txt":
        return path.stem.rsplit("_s", 1)[0]
    inner = path.relative_to(folder).parts
    return inner[0] if len(inner) == 3 else config["mixer"]


def runs(folder):
    """Folder -> {variant: {seed: (val loss in nats per token, parameters, tokens)}}.

    Raises SystemExit if a run did not finish, or two logs are of one variant and seed.
    """
    found = defaultdict(dict)
    for path in logs(folder):
        text, config = read(path)
        final = FINAL.findall(text)
        if not final:
            raise SystemExit(f"{path}: no final line, the run did not finish")
        seeds = found[variant(path, folder, config)]
        if config["seed"] in seeds:
            raise SystemExit(f"{path}: a second log of seed {config['seed']}")
        loss, params, tokens = final[-1]
        seeds[config["seed"]] = float(loss), int(params), int(tokens)
    return found


def difference(seeds, control):
    """Two {seed: (loss, ...)} -> the text of a cell, as the docstring of this file says."""
    shared = sorted(seeds.keys() & control.keys())
    pairs = [seeds[seed][0] - control[seed][0] for seed in shared]
    if seeds is control or not pairs:
        return "—"
    n = f" (n={len(pairs)})" if len(pairs) == 1 or len(pairs) < len(seeds) else ""
    error = f" ± {stdev(pairs) / math.sqrt(len(pairs)):.4f}" if len(pairs) > 1 else ""
    return f"{mean(pairs):+.4f}{error}{n}"


def table(folder, controls=()):
    """Folder, names of controls -> markdown. Raises SystemExit if a control has no log."""
    found, rows = runs(folder), []
    for name in controls:
        if name not in found:
            raise SystemExit(f"{name}: no such variant; there are {', '.join(found) or 'no logs'}")
    for name, seeds in found.items():
        ordered = [seeds[seed] for seed in sorted(seeds)]
        losses = [loss for loss, _, _ in ordered]
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        cells = [name, f"{ordered[0][1]:,}", f"{ordered[0][2]:,}", f"{mean(losses):.4f}{spread}",
                 *(difference(seeds, found[control]) for control in controls),
                 ", ".join(f"{loss:.4f}" for loss in losses)]
        rows.append((mean(losses), f"| {' | '.join(cells)} |"))
    head = ["variant", "parameters", "tokens", "val loss, mean ± sd",
            *(f"difference to {name} ± SE" for name in controls), "each seed"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(row for _, row in sorted(rows))])


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit("usage: python records/table.py FOLDER [CONTROL ...]")
    print(table(Path(sys.argv[1]), sys.argv[2:]))
