"""Records: tables, pictures and pages agree with the logs, and a log reads well in a browser."""

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "records"))
import table  # noqa: E402

RECORDS = sorted(page.parent for page in ROOT.glob("records/*/README.md"))
LOGS = sorted(ROOT.glob("records/*/*.txt"))
HYBRID = "records/2026-11-24_hybrid"


def run(script, *arguments, root=ROOT):
    """`python records/SCRIPT.py ARGUMENT ...` -> (exit code, stdout, stderr)."""
    command = [sys.executable, root / f"records/{script}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def copy(tmp_path):
    """A repository of the records alone."""
    shutil.copytree(ROOT / "records", tmp_path / "records",
                    ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# ----------------------------------------------------------------- tables

def test_every_table_is_what_the_logs_say():
    assert run("table", "--check") == (0, "", "")


@pytest.mark.parametrize("page, old, new", [
    (f"{HYBRID}/README.md", "| 0.0031 |", "| 0.0032 |"),
    (f"{HYBRID}/README.md", "-5.86, 2.5, 0.016", "-5.86, 2.5, 0.015"),
    (f"{HYBRID}/hybrid_s0.txt", "final val_loss:1.4974", "final val_loss:1.4975"),
    ("records/README.md", "-0.0305 ± 0.0042", "-0.0305 ± 0.0043"),
    ("README.md", "| 2, 0.0013 |", "| 3, 0.0013 |"),
    ("README.md", "**-0.0212 ± 0.0063**", "**-0.0213 ± 0.0063**"),
], ids=lambda text: text[-12:])
def test_one_digit_more_or_less_is_found_and_repaired(copy, page, old, new):
    pages = {path: path.read_text() for path in copy.glob("**/README.md")}
    edit(copy / page, old, new)
    code, _, said = run("table", "--check", root=copy)
    assert code == 1
    assert (page if page.endswith(".md") else f"{HYBRID}/README.md") in said
    assert run("table", root=copy)[0] == 0
    assert run("table", "--check", root=copy) == (0, "", "")
    if page.endswith(".md"):
        assert all(path.read_text() == text for path, text in pages.items())


def test_what_cannot_be_rebuilt_is_one_line(copy):
    page, log = copy / HYBRID / "README.md", copy / HYBRID / "hybrid_s0.txt"
    for path, old, new, line in [
        (page, "table: attn_short_conv", "table: attn_shirt_conv", "no variant attn_shirt_conv"),
        (page, "<!-- end -->", "", "without an <!-- end -->"),
        (log, "final val_loss", "final loss", "did not finish"),
        (log, '"seed": 0', '"seed": 1', "a second log of seed 1"),
        (log, "=== config", "=== flags", "no === config section"),
    ]:
        text = path.read_text()
        edit(path, old, new)
        for arguments in [], ["--check"]:
            code, _, said = run("table", *arguments, root=copy)
            assert code == 1 and line in said and "hybrid" in said and said.count("\n") == 1
        path.write_text(text)
    for log in (copy / HYBRID).glob("*_s?.txt"):
        log.unlink()
    code, _, said = run("table", "--check", root=copy)
    assert code == 1 and f"{HYBRID}: no logs" in said and said.count("\n") == 1


def test_every_record_has_a_table():
    for folder in RECORDS:
        assert "<!-- table" in (folder / "README.md").read_text(), folder.name


def fake(folder, name, loss, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f'=== config\n{{"seed": {seed}, "mixer": "afno"}}\n=== env\n{{}}\n'
                               f"=== run\nfinal val_loss:{loss} params:5 tokens:7000 x\n")


def test_the_numbers_of_a_table(tmp_path):
    for seed, (a, b) in enumerate([(1.0, 2.0), (1.1, 2.3), (1.5, 2.2)]):
        fake(tmp_path, f"a_s{seed}.txt", a, seed)
        fake(tmp_path, f"b_s{seed}.txt", b, seed)
    fake(tmp_path, "c_s7.txt", 3.0, 7)
    fake(tmp_path, "d_s2.txt", 4.0, 2)
    code, printed, _ = run("table", tmp_path, "b")
    rows = {row.split(" | ")[0][2:]: row.rstrip(" |").split(" | ")[1:]
            for row in printed.splitlines()}
    # pairs -1, -1.2, -0.7: sd 0.2517. Welch by scipy.stats.ttest_ind: -5.4805, 3.2, 0.01007
    assert code == 0 and rows["a"] == [
        "5", "7,000", "1.2000", "0.2646", "3", "-0.9667 ± 0.1453", "-5.48, 3.2, 0.010",
        "1.0000, 1.1000, 1.5000"]
    assert rows["b"][5:7] == ["—", "—"]
    assert rows["c"][3:7] == ["—", "1", "—", "—"]             # no pair
    assert rows["d"][3:7] == ["—", "1", "+1.8000 (n=1)", "—"]
    assert [row.split()[1] for row in printed.splitlines()[2:]] == ["a", "b", "c", "d"]
    assert run("table", tmp_path, "b", "--only", "[ab]")[1].count("\n") == 4


def test_runs_of_the_trainer_are_read_as_they_lie(tmp_path):
    fake(tmp_path / "one", "log.txt", 1.0)
    fake(tmp_path / "many/wide/run", "log.txt", 2.0)
    fake(tmp_path / "failed", "afno_s0_failed.txt", 3.0)
    fake(tmp_path / "failed", "afno_s1.txt", 4.0, 1)
    assert list(table.runs(tmp_path)) == ["afno"]              # a mixer's name: FOLDER/RUN
    assert list(table.runs(tmp_path / "one")) == ["afno"]
    assert list(table.runs(tmp_path / "many")) == ["wide"]
    assert table.runs(tmp_path / "failed") == {"afno": {1: (4.0, 5, 7000)}}


# Two-sided critical values of Student's t, df: {p: t}, as any printed table has them.
CRITICAL = {1: {0.5: 1.000, 0.10: 6.314, 0.05: 12.706, 0.01: 63.657},
            2: {0.5: 0.816, 0.10: 2.920, 0.05: 4.303, 0.01: 9.925, 0.001: 31.599},
            4: {0.5: 0.741, 0.10: 2.132, 0.05: 2.776, 0.01: 4.604, 0.001: 8.610},
            10: {0.5: 0.700, 0.10: 1.812, 0.05: 2.228, 0.01: 3.169, 0.001: 4.587},
            120: {0.5: 0.677, 0.10: 1.658, 0.05: 1.980, 0.01: 2.617, 0.001: 3.373}}


@pytest.mark.parametrize("df", CRITICAL)
def test_p_is_that_of_printed_tables(df):
    for p, t in CRITICAL[df].items():
        assert table.incomplete_beta(df / 2, 0.5, df / (df + t * t)) == pytest.approx(p, rel=3e-3)


def test_incomplete_beta():
    for x in (0.0, 1e-9, 0.1, 0.5, 0.9, 1.0):
        # closed forms, and its reflection
        assert table.incomplete_beta(1, 1, x) == pytest.approx(x, abs=1e-14)
        assert table.incomplete_beta(2, 3, x) == pytest.approx(6 * x**2 - 8 * x**3 + 3 * x**4)
        assert table.incomplete_beta(1.4, 0.5, x) == pytest.approx(
            1 - table.incomplete_beta(0.5, 1.4, 1 - x))


WELCH = [
    ([1.49, 1.51, 1.5, 1.47], [1.52, 1.6, 1.55],
     (-2.58249711299, 2.5412005672, 0.0965580560833)),
    ([1.4838, 1.4801], [1.4778, 1.4885],
     (-0.211983036147, 1.23577641978, 0.861671317766)),
    ([0.1, 0.2, 0.4], [300.0, 100.0, -50.0, 7.0],
     (-1.15982551008, 3.00000792227, 0.330040458384)),
]


def test_welch():
    # Welch's test is Student's where both lists have one size and one variance
    t, df, p = table.welch([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert (t, df) == pytest.approx((-3.674235, 4))
    assert p == pytest.approx(0.0213, abs=5e-5)
    assert table.welch([1.0], [2.0, 3.0]) is None and table.welch([1, 1], [2, 2]) is None
    # scipy 1.17.1: ttest_ind(a, b, equal_var=False)
    for a, b, found in WELCH:
        assert table.welch(a, b) == pytest.approx(found, rel=1e-9)


# ----------------------------------------------------------------- pages

PAIR = re.compile(r"([+-]?\d\.(\d+))\s±\s(\d\.\d+)")
PAGES = [ROOT / "README.md", ROOT / "LOG.md", *sorted(ROOT.glob("records/**/README.md"))]


@cache
def differences(*names):
    """Records -> {absolute difference, standard error} of any two variants, 3 and 4 decimals."""
    known = set()
    rows = [seeds for name in names for seeds in table.runs(ROOT / "records" / name).values()]
    for a, b in itertools.permutations(rows, 2):
        if found := PAIR.match(table.difference(a, b)):
            # a tie of the last digit may be rounded either way
            known |= {(f"{abs(float(found[1])) + up:.{n}f}", f"{float(found[3]) + upper:.{n}f}")
                      for n in (3, 4) for up in (-1e-6, 1e-6) for upper in (-1e-6, 1e-6)}
    return known


def wrong(page, change=lambda pair: pair):
    """How many differences a page states, and which of them no record near to them has."""
    said, missing = 0, []
    names = [folder.name for folder in RECORDS]
    for block in page.read_text().split("\n\n"):
        near = [name for name in names if name in block or name == page.parent.name]
        known = differences(*near)
        for number, _, error in PAIR.findall(block):
            said += 1
            if change((number.lstrip("+-"), error)) not in known:
                missing.append(f"{number} ± {error}")
    return said, missing


def test_differences_in_the_text_are_those_of_logs():
    said = found = 0
    for page in PAGES:
        assert not wrong(page)[1], page
        n, missing = wrong(page, lambda pair: (f"{float(pair[0]) + 0.005:.{len(pair[0]) - 2}f}",
                                               pair[1]))
        said, found = said + n, found + len(missing)
    # a wrong number may be that of another pair, but seldom is
    assert said > 100 and found > 0.9 * said


def test_the_pages_speed_is_that_of_benches():
    ratio = re.compile(r"\[([^]]*)\]\((?:records/)?(\S+_speed/\S+\.txt)\)([^|\n]*)\|?([^|\n]*)")
    seen = 0
    for page in ROOT / "README.md", ROOT / "records/README.md":
        for inside, name, _, cell in ratio.findall(page.read_text()):
            rows = re.findall(r"(\d+\.\d\d) +(\d+\.\d\d)$",
                              (ROOT / "records" / name).read_text(), re.MULTILINE)
            known = {float(f"{float(number):.{digits}f}") for row in rows for number in row
                     for digits in (1, 2)}
            claims = re.findall(r"\d+\.\d+", cell if page.parent.name == "records" else inside)
            assert claims and {float(claim) for claim in claims} <= known, (name, claims)
            seen += len(claims)
    assert seen >= 6


# ----------------------------------------------------------------- logs

def test_a_record_can_be_run_again():
    for folder in RECORDS:
        assert os.access(folder / "run.sh", os.X_OK), folder.name


@pytest.mark.parametrize("folder", RECORDS, ids=lambda p: p.name)
def test_the_logs_of_a_record_name_their_sources(folder):
    logs = list(folder.glob("*.txt"))
    assert logs
    for path in logs:
        first, second, *_ = path.read_text().splitlines()
        _, _, name, _, checksum = first.split()
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == checksum, path
        assert second == "=== config"
