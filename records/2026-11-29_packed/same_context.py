"""The same validation text read in three ways, by every run below a folder: a CSV on stdout.

    python records/2026-11-29_packed/same_context.py logs/packed > same_context.csv

windows: rows of 512 bytes, all that lies before in the row is seen. packed: the same rows, a byte
sees its own document only. whole: a document alone in its row, from its first byte on. Nats per
byte, of a run's last weights.
"""
import csv
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from sample import build  # noqa: E402
from support.batches import open_batches  # noqa: E402
from support.checkpoint import read  # noqa: E402
from train_gpt2 import BATCHES, evaluate  # noqa: E402

WAYS = {"windows": ("windows", -1), "packed": ("packed", 10), "whole": ("padded", 10)}


def loss(path, batches, token):
    saved = read(path)
    saved["config"] |= {"batches": batches, "document_token": token}
    model = build(saved, path)
    cfg = replace(model.cfg, sequence_length=512)
    _, data = open_batches(cfg, BATCHES[batches], 0, 1)
    return evaluate(model, data.val_batches, data.val_n, torch.device("cpu"), 0, 1)


if __name__ == "__main__":
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["variant", "seed", *WAYS])
    for path in sorted(Path(sys.argv[1]).glob("*/s*/model.pt")):
        losses = [f"{loss(path, *way):.4f}" for way in WAYS.values()]
        rows.writerow([path.parts[-3], path.parts[-2][1:], *losses])
