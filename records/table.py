"""Tables of the records, made from their logs: one row for all seeds of a variant, the best first.

    python records/table.py                                   # rebuilds every table, in place
    python records/table.py --check                           # names the pages that need it: exit 1
    python records/table.py records/2026-11-24_hybrid         # prints one, no control
    python records/table.py logs/2026-11-24_hybrid attn_short_conv        # against it, after run.sh

FOLDER holds a record's logs, VARIANT_sSEED.txt, or log.txt as a run leaves it: FOLDER/log.txt,
FOLDER/RUN/log.txt (the variant is the mixer) or FOLDER/VARIANT/RUN/log.txt. Losses and
differences are in nats per token; in a byte-level run a token is a byte. sd is over seeds.

Every further argument names a control and adds two columns. The first is paired by seed: mean
difference ± standard error, over the seeds that both variants have; the standard error is
sd(paired differences) / sqrt(n), and n is printed where it is less than the variant's seeds. The
second does not know of pairs: Welch's t, its degrees of freedom and the two-sided p. A dash stands
where there are too few seeds. --only PATTERN leaves the other variants out.

In a record's README.md a table stands between <!-- table: CONTROL ... --> and <!-- end -->; the
marker has the arguments after FOLDER. In any other table a row's <!-- RECORD VARIANT CONTROL -->
fills its cells below the headings of CELLS. The control may be missing.
"""
import argparse
import json
import math
import re
import shlex
from collections import defaultdict
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from statistics import mean, stdev, variance

ROOT = Path(__file__).resolve().parent.parent
ENV = re.compile(r"^=== env\n(.*)", re.MULTILINE)
FINAL = re.compile(r"^final val_loss:(\S+) params:(\d+) tokens:(\d+)", re.MULTILINE)
CONFIG = re.compile(r"^=== config\n(.*)", re.MULTILINE)
SEED = re.compile(r"(.+)_s\d+\.txt")
MARKER = re.compile(r"(<!-- table(?:: (.*?))? -->\n).*?(<!-- end -->)", re.DOTALL)
ROW = re.compile(r"<!-- (\d{4}-\d\d-\d\d_\S+) (\S+)(?: (\S+))? -->")


def logs(folder):
    """Folder -> paths of its logs. A log whose name ends in no seed (run_afno.txt) is left out."""
    named = [path for path in folder.glob("*.txt") if SEED.fullmatch(path.name)]
    patterns = "log.txt", "*/log.txt", "*/*/log.txt"
    return sorted([*named, *(path for pattern in patterns for path in folder.glob(pattern))])


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
        return SEED.fullmatch(path.name)[1]
    inner = path.relative_to(folder).parts
    return inner[0] if len(inner) == 3 else config["mixer"]


@cache
def runs(folder):
    """Folder -> {variant: {seed: (val loss in nats per token, parameters, tokens)}}.

    Raises SystemExit if there is no log, a run did not finish, or two are of one variant and seed.
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
    if not found:
        raise SystemExit(f"{folder}: no logs, neither VARIANT_sSEED.txt nor log.txt")
    return found


def pick(found, name, folder):
    """The seeds of a variant. Raises SystemExit if it has no log."""
    if name not in found:
        raise SystemExit(f"{folder}: no variant {name}; there are {', '.join(sorted(found))}")
    return found[name]


def losses(seeds):
    return [seeds[seed][0] for seed in sorted(seeds)]


def spread(seeds):
    """The text of the standard deviation over seeds. One seed has none."""
    return f"{stdev(losses(seeds)):.4f}" if len(seeds) > 1 else "—"


def difference(seeds, control):
    """Two {seed: (loss, ...)} -> mean ± standard error, paired by seed, as text."""
    shared = sorted(seeds.keys() & control.keys())
    pairs = [seeds[seed][0] - control[seed][0] for seed in shared]
    if seeds is control or not pairs:
        return "—"
    n = f" (n={len(pairs)})" if len(pairs) == 1 or len(pairs) < len(seeds) else ""
    error = f" ± {stdev(pairs) / math.sqrt(len(pairs)):.4f}" if len(pairs) > 1 else ""
    return f"{mean(pairs):+.4f}{error}{n}"


def incomplete_beta(a, b, x):
    """The regularised incomplete beta function I_x(a, b), 0 <= x <= 1.

    Its continued fraction (DLMF 8.17.22), from the innermost term out. 200 terms are exact to
    double precision for the a and b of a few seeds, on the side of the mean that it is taken.
    """
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    fraction = 1.0
    for m in range(200, 0, -1):
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + odd / (1 + even / fraction)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return x**a * (1 - x)**b / (a * math.exp(log_beta) * fraction)


def welch(a, b):
    """Two lists of losses -> (t, degrees of freedom, two-sided p) of Welch's t-test.

    None if a list has fewer than two, or neither varies. https://doi.org/10.1093/biomet/34.1-2.28
    """
    if min(len(a), len(b)) < 2 or not variance(a) + variance(b):
        return None
    u, v = variance(a) / len(a), variance(b) / len(b)
    t = (mean(a) - mean(b)) / math.sqrt(u + v)
    df = (u + v)**2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))
    return t, df, incomplete_beta(df / 2, 0.5, df / (df + t * t))


def significance(seeds, control):
    """Two {seed: (loss, ...)} -> Welch's t, degrees of freedom and p, as text."""
    found = welch(losses(seeds), losses(control))
    if seeds is control or not found:
        return "—"
    t, df, p = found
    return f"{t:+.2f}, {df:.1f}, {'<0.001' if p < 0.001 else f'{p:.3f}'}"


def table(folder, controls=(), only="*"):
    """Folder, names of controls, pattern of variants -> markdown. Raises SystemExit as runs()."""
    found, rows = runs(folder), []
    against = [pick(found, name, folder) for name in controls]
    for name, seeds in found.items():
        if not fnmatch(name, only):
            continue
        _, params, tokens = seeds[min(seeds)]
        loss = mean(losses(seeds))
        cells = [name, f"{params:,}", f"{tokens:,}", f"{loss:.4f}", spread(seeds), str(len(seeds))]
        for control in against:
            cells += [difference(seeds, control), significance(seeds, control)]
        cells.append(", ".join(f"{loss:.4f}" for loss in losses(seeds)))
        rows.append((loss, f"| {' | '.join(cells)} |"))
    head = ["variant", "parameters", "tokens", "val loss", "sd", "n"]
    for name in controls:
        head += [f"difference to {name} ± SE", "Welch's t, df, p"]
    lines = [f"| {' | '.join([*head, 'each seed'])} |", "|---" * (len(head) + 1) + "|"]
    return "\n".join([*lines, *(row for _, row in sorted(rows))])


# What a marked row has below a heading. Its arguments are the seeds and the control's, or None.
CELLS = {
    "loss": lambda seeds, control: f"{mean(losses(seeds)):.4f}",
    "sd": lambda seeds, control: spread(seeds),
    "n": lambda seeds, control: str(len(seeds)),
    "n, sd": lambda seeds, control: f"{len(seeds)}, {spread(seeds)}",
    "difference": lambda seeds, control: difference(seeds, control) if control else "",
}


def filled(line, head, folder, name, control):
    """A marked row of markdown, its heading -> the row with its numbers. Bold stays bold."""
    found = runs(folder)
    seeds, control = pick(found, name, folder), control and pick(found, control, folder)
    cells = line.split("|")
    for column, heading in enumerate(head.split("|")):
        if value := CELLS.get(heading.strip()):
            bold = "**" if "**" in cells[column] else ""
            text = value(seeds, control)
            cells[column] = f" {bold}{text}{bold} " if text else " "
    return "|".join(cells)


def rebuilt(page):
    """A page of markdown -> its text with every marked table made anew.

    Raises SystemExit if a marker has no end, or its record no logs.
    """
    text = page.read_text(encoding="utf-8")
    if text.count("<!-- table") != text.count("<!-- end -->"):
        raise SystemExit(f"{page}: a <!-- table --> without an <!-- end -->, or the reverse")

    def between(marker):
        args = arguments().parse_args([str(page.parent), *shlex.split(marker[2] or "")])
        return f"{marker[1]}\n{table(args.folder, args.controls, args.only)}\n\n{marker[3]}"

    lines, head = MARKER.sub(between, text).split("\n"), ""
    for i, line in enumerate(lines):
        if line.startswith("|") and not lines[i - 1].startswith("|"):
            head = line
        if found := ROW.search(line):
            record, *names = found.groups()
            lines[i] = filled(line, head, ROOT / "records" / record, *names)
    return "\n".join(lines)


def pages():
    return [ROOT / "README.md", *sorted(ROOT.glob("records/**/README.md"))]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="none: every table of every record")
    parser.add_argument("controls", nargs="*", metavar="CONTROL")
    parser.add_argument("--only", default="*", metavar="PATTERN")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if one differs")
    return parser


def main():
    args = arguments().parse_args()
    if args.folder:
        if not args.folder.is_dir():
            raise SystemExit(f"{args.folder}: no such folder")
        print(table(args.folder, args.controls, args.only))
        return
    stale = {}
    for page in pages():
        text = rebuilt(page)
        if text != page.read_text(encoding="utf-8"):
            stale[page] = text
    if args.check and stale:
        raise SystemExit("\n".join(f"{page.relative_to(ROOT)}: not what the logs say: "
                                   "run python records/table.py" for page in stale))
    for page, text in stale.items():
        page.write_text(text, encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: rebuilt")


if __name__ == "__main__":
    main()
