"""The lead over attention as a power of the width: a straight line through both logarithms.

    python records/2026-11-29_width/fit.py > records/2026-11-29_width/fit.csv

Leads are means over the seeds that both arms have, in nats per byte. Standard errors are those of a
least-squares line, all widths alike; they know nothing of a curve that bends.
"""
import math
import re
from pathlib import Path
from statistics import linear_regression, mean

HERE = Path(__file__).resolve().parent
FINAL = re.compile(r"^final val_loss:(\S+)", re.MULTILINE)
WIDTHS = 32, 48, 64, 96, 128


def losses(arm, width):
    """-> {seed: the loss at the end}, nats per byte."""
    return {log.stem[-1]: float(FINAL.search(log.read_text())[1])
            for log in HERE.glob(f"{arm}_{width}_s?.txt")}


def lead(width):
    attn, hybrid = losses("attn", width), losses("hybrid", width)
    return mean(attn[seed] - hybrid[seed] for seed in attn.keys() & hybrid.keys())


def fit(widths):
    x = [math.log(width) for width in widths]
    y = [math.log(lead(width)) for width in widths]
    slope, level = linear_regression(x, y)
    off = sum((b - level - slope * a) ** 2 for a, b in zip(x, y))
    error = math.sqrt(off / (len(x) - 2) / sum((a - mean(x)) ** 2 for a in x))
    at_768 = math.exp(level + slope * math.log(768))
    print(f"{widths[0]} to {widths[-1]},{slope:.2f},{error:.2f},{at_768:.4f}")


if __name__ == "__main__":
    print("channels,exponent,standard error,lead at 768")
    fit(WIDTHS)
    fit(WIDTHS[1:])
