"""The table of a record, made from its logs: one row for all seeds of a variant.

    python records/table.py records/2026-11-22_afno-vs-attention      # logs are named VARIANT_sSEED.txt.gz
"""
import gzip
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

FINAL = re.compile(r"^final val_loss:(\S+) params:(\d+) tokens:(\d+)", re.MULTILINE)


def read(path):
    """Log -> (val loss in nats per token, parameters, tokens). Raises SystemExit if the run has no last line."""
    found = FINAL.findall(gzip.decompress(path.read_bytes()).decode())
    if not found:
        raise SystemExit(f"{path}: no final line, the run did not finish")
    loss, params, tokens = found[-1]
    return float(loss), int(params), int(tokens)


def table(folder):
    """Folder -> markdown, best variant first."""
    runs = defaultdict(list)
    for path in sorted(Path(folder).glob("*_s*.txt.gz")):
        runs[path.name.rsplit("_s", 1)[0]].append(read(path))
    rows = []
    for name, results in runs.items():
        losses = [loss for loss, _, _ in results]
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        rows.append((mean(losses), f"| {name} | {results[0][1]:,} | {results[0][2]:,} | {mean(losses):.4f}{spread} | "
                                   f"{', '.join(f'{loss:.4f}' for loss in losses)} |"))
    head = "| variant | parameters | tokens | val loss, mean ± sd | each seed |\n|---|---|---|---|---|\n"
    return head + "\n".join(row for _, row in sorted(rows))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit("usage: python records/table.py FOLDER")
    print(table(sys.argv[1]))
