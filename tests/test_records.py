"""Records: tables, pictures and pages agree with the logs, and a log reads well in a browser."""

import csv
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "records"))
import add  # noqa: E402
import plot  # noqa: E402
import table  # noqa: E402

# Of runs: those of speed, memory and faults hold no losses.
RECORDS = sorted({path.parent for path in ROOT.glob("records/**/*_s[0-9]*.txt")})
LOGS = sorted(ROOT.glob("records/*/*.txt"))
HYBRID = "records/2026-11-24_hybrid"


def run(script, *arguments, root=ROOT):
    """`python records/SCRIPT.py ARGUMENT ...` -> (exit code, stdout, stderr)."""
    command = [sys.executable, root / f"records/{script}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A repository of the records alone."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "records", folder / "records")
    shutil.copy(ROOT / "README.md", folder)
    return folder


@contextmanager
def edited(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    try:
        yield
    finally:
        path.write_text(text)


@pytest.fixture
def tables(copy, monkeypatch, capsys):
    """table.main() in the copy: arguments -> what it dies of, or None."""
    def call(*arguments):
        monkeypatch.setattr(table, "ROOT", copy)
        monkeypatch.setattr(sys, "argv", ["table.py", *arguments])
        table.runs.cache_clear()
        try:
            table.main()
        except SystemExit as e:
            return str(e)
    return call


# ----------------------------------------------------------------- tables

def test_every_table_is_what_the_logs_say():
    assert run("table", "--check") == (0, "", "")


@pytest.mark.parametrize("path, old, new, page", [
    (f"{HYBRID}/README.md", "| 0.0031 |", "| 0.0032 |", f"{HYBRID}/README.md"),
    (f"{HYBRID}/README.md", "-5.86, 2.5, 0.016", "-5.86, 2.5, 0.015", f"{HYBRID}/README.md"),
    (f"{HYBRID}/hybrid_s0.txt", "final val_loss:1.4974", "final val_loss:1.4975",
     f"{HYBRID}/README.md"),
    ("records/README.md", "-0.0305 ± 0.0042", "-0.0305 ± 0.0043", "records/README.md"),
    ("README.md", "| 2, 0.0013 |", "| 3, 0.0013 |", "README.md"),
    ("README.md", "**-0.0212 ± 0.0063**", "**-0.0213 ± 0.0063**", "README.md"),
], ids=range(6))
def test_one_digit_off_is_found_and_repaired(copy, tables, path, old, new, page):
    before = {each: each.read_text() for each in copy.glob("**/README.md")}
    with edited(copy / path, old, new):
        assert f"{page}: not what the logs say" in tables("--check")
        assert tables() is None and tables("--check") is None
        same = all(each.read_text() == text for each, text in before.items())
        assert same == path.endswith(".md")
    assert tables() is None
    assert all(each.read_text() == text for each, text in before.items())


def test_check_says_so_by_its_exit_code_and_writes_nothing(copy):
    with edited(copy / "README.md", "| 2, 0.0013 |", "| 3, 0.0013 |"):
        text = (copy / "README.md").read_text()
        assert run("table", "--check", root=copy) == (
            1, "", "README.md: not what the logs say: run python records/table.py\n")
        assert (copy / "README.md").read_text() == text


@pytest.mark.parametrize("name, old, new, line", [
    ("README.md", "table: attn_short_conv", "table: attn_shirt_conv", "no variant attn_shirt_conv"),
    ("README.md", "<!-- end -->", "", "without an <!-- end -->"),
    ("hybrid_s0.txt", "final val_loss", "final loss", "did not finish"),
    ("hybrid_s0.txt", '"seed": 0', '"seed": 1', "a second log of seed 1"),
    ("hybrid_s0.txt", "=== config", "=== flags", "no === config section"),
], ids=range(5))
def test_what_cannot_be_rebuilt_is_one_line(copy, tables, name, old, new, line):
    with edited(copy / HYBRID / name, old, new):
        for arguments in [], ["--check"]:
            said = tables(*arguments)
            assert line in said and "2026-11-24_hybrid" in said and "\n" not in said


def test_a_table_without_logs_is_refused(copy, tables, tmp_path):
    moved = shutil.move(copy / HYBRID, tmp_path)
    (copy / HYBRID).mkdir()
    shutil.copy(Path(moved) / "README.md", copy / HYBRID)
    for arguments in [], ["--check"]:
        assert f"{HYBRID}: no logs" in tables(*arguments)
    shutil.rmtree(copy / HYBRID)
    shutil.move(moved, copy / HYBRID)


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


def columns(folder):
    """Of a record's CSVs whose first columns are variant, seed: each other one, [{seed: (loss,)}].
    """
    for path in folder.glob("*.csv"):
        head, *rows = csv.reader(path.read_text().splitlines())
        if head[:2] != ["variant", "seed"]:
            continue
        for column in range(2, len(head)):
            found = defaultdict(dict)
            for row in rows:
                found[row[0]][int(row[1])] = (float(row[column]),)
            yield [*found.values()]


@cache
def differences(*names):
    """Records -> {absolute difference, standard error} of any two variants, 3 and 4 decimals."""
    known = set()
    folders = [ROOT / "records" / name for name in names]
    groups = [[seeds for folder in folders for seeds in table.runs(folder).values()]]
    groups += [column for folder in folders for column in columns(folder)]
    for a, b in itertools.chain(*(itertools.permutations(group, 2) for group in groups)):
        if found := PAIR.match(table.difference(a, b)):
            # a tie of the last digit may be rounded either way
            known |= {(f"{abs(float(found[1])) + up:.{n}f}", f"{float(found[3]) + upper:.{n}f}")
                      for n in (3, 4) for up in (-1e-6, 1e-6) for upper in (-1e-6, 1e-6)}
    return known


def wrong(page, change=lambda pair: pair):
    """How many differences a page states, and which of them no record near to them has."""
    said, missing = 0, []
    # Below records/: a race may be a part of a record.
    names = [folder.relative_to(ROOT / "records").as_posix() for folder in RECORDS]
    own = page.parent.as_posix()
    for block in page.read_text().split("\n\n"):
        near = [name for name in names if name in block or own.endswith(f"records/{name}")]
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
    link = r"\[([^]]*)\]\((?:records/)?(\S+_speed/\S+\.txt)\)"
    ratio = re.compile(link + r"[^|\n]*\|?([^|\n]*)")
    seen = 0
    for page in ROOT / "README.md", ROOT / "records/README.md":
        for inside, name, cell in ratio.findall(page.read_text()):
            # Behind the two ratios newer tables have tokens a second and MiB.
            text = (ROOT / "records" / name).read_text()
            rows = re.findall(r"(\d+\.\d\d) +(\d+\.\d\d)(?: +\d+ +\d+)?$", text, re.MULTILINE)
            # What is no table has them in sentences.
            rows = rows or [re.findall(r"\d+\.\d+", text)]
            known = {float(f"{float(number):.{digits}f}") for row in rows for number in row
                     for digits in (1, 2, 4)}
            claims = re.findall(r"\d+\.\d+", cell if page.parent.name == "records" else inside)
            assert claims and {float(claim) for claim in claims} <= known, (name, claims)
            seen += len(claims)
    assert seen >= 6


# ----------------------------------------------------------------- logs

def test_a_record_can_be_run_again():
    for folder in RECORDS:
        assert os.access(folder / "run.sh", os.X_OK), folder.name


@pytest.mark.parametrize("folder", RECORDS, ids=lambda p: p.name)
def test_the_logs_of_a_record_name_their_sources_and_read_in_a_browser(folder):
    logs = list(folder.glob("*.txt"))
    assert logs
    for path in logs:
        text = path.read_text(encoding="utf-8")
        first, second, *_ = text.splitlines()
        _, _, name, _, checksum = first.split()
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == checksum, path
        assert second == "=== config" and not add.unreadable(text), path
        assert not add.ABSOLUTE.search(text), path


def test_what_does_not_read_in_a_browser_is_found():
    text = (ROOT / HYBRID / "hybrid_s0.txt").read_text()
    for bad, why in [(text.replace("step:25/", "\33[Kstep:25/"), "control character '\\x1b'"),
                     (text.replace("\nstep:25/", "\rstep:25/"), "control character '\\r'"),
                     (text.replace("=== config", "import json\n" * 9 + "=== config"), "first six"),
                     (text.replace("tok/s", "tok/s" * 99, 1), "a line of")]:
        assert bad != text and why in add.unreadable(bad)


# ----------------------------------------------------------------- pictures

PICTURES = plot.pictures()


def test_a_picture_is_named_where_it_is_shown():
    assert len(PICTURES) >= 3
    for args in PICTURES:
        page = (Path(args.what[0]) / "README.md").read_text()
        assert f"]({args.out})" in page and (Path(args.what[0]) / args.out).exists()
    shown = [path for page in PAGES
             for path in re.findall(r"!\[[^]]*\]\((\S+)\)", page.read_text())]
    assert len(shown) == len(PICTURES) + 1          # the README shows one of them again


@pytest.mark.parametrize("args", PICTURES, ids=lambda args: Path(args.what[0]).name)
def test_what_a_picture_shows_is_what_the_logs_say(args):
    runs, unit, _ = plot.chosen(args)
    assert len(runs) == len(args.what) - 1
    for text in args.what[1:]:
        name, label = text.split("=")
        files = sorted(Path(args.what[0]).glob(f"{name}_s?.txt"))
        assert len(files) == len(runs[label]) >= 1
        for file, points in zip(files, runs[label]):
            text = file.read_text()
            width = int(re.search(r"steps of ([\d,]+) tokens", text)[1].replace(",", ""))
            assert (unit == "byte") == ('"vocab_size": 256,' in text)
            lines = [line.split() for line in text.splitlines() if " val_loss:" in line]
            want = []
            for step, loss, ms in [line[:3] for line in lines if line[0][:7] != "step:0/"
                                   and line[0] != "final"]:
                n = int(step[5:].split("/")[0])
                seconds = int(ms[11:-2]) / 1e3
                if args.ms:
                    seconds = n * dict(args.ms)[name] / 1e3
                want.append((n * width / 1e6, seconds, float(loss[9:])))
            assert points == want != []


def test_a_picture_draws_its_means_and_its_band():
    figures = pytest.importorskip("matplotlib.figure")
    runs = {"a": [[(1, 10, 4.0), (2, 20, 3.0)], [(1, 14, 4.4), (2, 24, 3.2)]],
            "b": [[(1, 5, 9.0)]]}
    for axis, x in enumerate([[1, 2], [12, 22]]):
        axes = figures.Figure().add_subplot()
        plot.draw(axes, runs, "{0} {1:.2f}", {2.5: "goal"}, axis, "byte")
        a, b = axes.lines[:2]
        assert list(a.get_xdata()) == x and list(a.get_ydata()) == pytest.approx([4.2, 3.1])
        assert list(b.get_ydata()) == [9.0]
        band = axes.collections[0].get_paths()[0].vertices.tolist()
        for corner in [x[0], 4.0], [x[0], 4.4], [x[1], 3.0], [x[1], 3.2]:
            assert corner in band
        assert {text.get_text() for text in axes.texts} >= {"a 3.10", "b 9.00"}


def luminance(colour):
    """Of #RRGGBB: https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    R, G, B = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * R + 0.7152 * G + 0.0722 * B


def test_every_colour_reads_on_light_and_on_dark_pages():
    light, dark = luminance("#ffffff") + 0.05, luminance("#0d1117") + 0.05
    assert light / dark == pytest.approx(18.9, abs=0.1)
    for colour in [*plot.COLOURS, plot.GREY]:
        own = luminance(colour) + 0.05
        assert light / own > 4.3 and own / dark > 4.3, colour


def test_pictures_rebuild_and_have_no_background(copy):
    pytest.importorskip("matplotlib")
    from PIL import Image
    paths = sorted(copy.glob("records/**/curves.png"))
    for path in paths:
        path.unlink()
    code, printed, said = run("plot", root=copy)
    assert code == 0 and printed.split() == [str(path.relative_to(copy)) for path in paths]
    assert "hybrid/curves.png: no panel of seconds: the seeds of AFNO took 395 to 820 s" in said
    for path in paths:
        with Image.open(path) as image:
            alpha = image.convert("RGBA").getchannel("A")
        assert alpha.getpixel((0, 0)) == 0
        assert 0.5 < alpha.histogram()[0] / (alpha.width * alpha.height) < 0.99


def trained(folder, seed, mixer="afno", rate=0.1, losses=(3.0, 2.0), **env):
    """A run's folder with log.txt and metrics.csv."""
    folder.mkdir(parents=True)
    config = dict(mixer=mixer, seed=seed, learning_rate=rate, vocab_size=50257,
                  output_dir=str(folder.parent), run_name=folder.name)
    env = dict(device="cpu", processes=1, threads=1, torch="2.13.0") | env
    log = [f"=== config\n{json.dumps(config)}\n=== env\n{json.dumps(env)}\n=== run",
           "5 parameters, afno, cpu x 1, 20 steps of 1,000 tokens, validated on 7 tokens",
           "step:0/20 val_loss:9.0000 train_time:0ms step_avg:0.00ms"]
    table = ["step,tokens,seconds,train_loss,val_loss,learning_rate,gradient_norm,"
             "tokens_per_second", "0,0,0.0,,9.0,,,"]
    for i, loss in enumerate(losses, 1):
        log += [f"step:{i * 10}/20 val_loss:{loss:.4f} train_time:{i * 500}ms step_avg:50.00ms"]
        table += [f"{i * 10},{i * 10000},{i / 2},{loss - 0.1},,0.1,1.5,20000",
                  f"{i * 10},{i * 10000},{i / 2},,{loss},,,"]
    (folder / "log.txt").write_text("\n".join(log) + "\n")
    (folder / "metrics.csv").write_text("\n".join(table) + "\n")
    return folder


def test_runs_are_overlaid_by_variant(tmp_path):
    a, b = trained(tmp_path / "a", 0), trained(tmp_path / "b", 1, losses=(3.2, 2.2, 1.0))
    runs, unit, why = plot.curves([a, b])
    assert (unit, why) == ("token", None)
    # seeds of one variant, at the steps that both have
    assert runs == {"afno": [[(0.01, 0.5, 3.0), (0.02, 1.0, 2.0)],
                             [(0.01, 0.5, 3.2), (0.02, 1.0, 2.2)]]}
    # another rate is another variant, and so is the same seed again
    c = trained(tmp_path / "c", 1, rate=0.2)
    assert list(plot.curves([a, c])[0]) == ["a", "c"]
    assert list(plot.curves([a, trained(tmp_path / "d", 0)])[0]) == ["a", "d"]
    e = trained(tmp_path / "e", 1, mixer="attn")
    assert list(plot.curves([a, c, e])[0]) == ["a", "c", "attn"]
    assert list(plot.curves([a, c], {"c": "twice"})[0]) == ["twice"]
    # a log, its metrics.csv, and that alone say the same
    assert plot.curves([a / "log.txt"]) == plot.curves([a]) == plot.curves([a / "metrics.csv"])
    (b / "log.txt").unlink()
    assert plot.curves([b])[0] == {"b": [[(0.01, 0.5, 3.2), (0.02, 1.0, 2.2), (0.03, 1.5, 1.0)]]}
    # times of another machine do not compare
    assert "machines" in plot.curves([a, trained(tmp_path / "f", 1, device="other")])[2]


def test_what_cannot_be_drawn_is_one_line(tmp_path):
    a = trained(tmp_path / "a", 0)
    never, other = trained(tmp_path / "never", 1, losses=()), tmp_path / "other/metrics.csv"
    other.parent.mkdir()
    other.write_text("step,loss\n1,2\n")
    (tmp_path / "empty").mkdir()
    bytewise = ROOT / HYBRID / "afno_s0.txt"
    for arguments, line in [((tmp_path / "empty",), "no logs"),
                            ((never,), "no validation"),
                            ((other,), "no metrics.csv"),
                            ((a, "wide=Wide"), "wide: neither a path"),
                            (("typo",), "typo: neither a path"),
                            ((a, bytewise), "bytes and some of tokens")]:
        with pytest.raises(SystemExit, match=line) as raised:
            plot.chosen(plot.arguments().parse_args(list(map(str, arguments))))
        assert "\n" not in str(raised.value)


# ----------------------------------------------------------------- new records

SOURCES = "=== source afno.py\nx = 1\n\n=== source train_gpt2.py\ny = 2\n\n"


def finished(folder, seed, sources=SOURCES, packed=False, end=True, note=""):
    """A run's folder as the trainer leaves it, its sources in log.txt or packed beside it."""
    folder.mkdir(parents=True)
    config = dict(input_bin="/big/web/*_train_*.bin", input_val_bin="/big/val.bin",
                  output_dir=str(folder.parent), mixer="afno", seed=seed)
    env = dict(command=["/home/me/repository/train_gpt2.py", f"--output_dir={folder.parent}"],
               shards={"/big/web/x_train_0.bin": "12ab", "/big/val.bin": "34cd"})
    text = (f"=== config\n{json.dumps(config)}\n=== env\n{json.dumps(env)}\n=== run\n"
            f"step:5/5 val_loss:2.{seed}000 train_time:90ms step_avg:18.00ms\n{note}")
    if end:
        text += f"final val_loss:2.{seed}000 params:5 tokens:7000 train_time:0.1s\n"
    (folder / "log.txt").write_text(text if packed else sources + text)
    if packed:
        (folder / "sources.txt.gz").write_bytes(gzip.compress(sources.encode()))


def test_runs_become_a_record(tmp_path):
    logs, record = tmp_path / "logs", tmp_path / "record"
    finished(logs / "plain/a", 0)
    finished(logs / "plain/b", 1, packed=True)
    finished(logs / "wide/c", 0, sources=SOURCES + "z = 3\n")
    finished(logs / "wide/d", 1, packed=True, end=False)
    code, printed, said = run("add", logs, "--to", record)
    assert (code, said) == (0, "") and len(printed.splitlines()) == 6
    assert sorted(path.name for path in record.iterdir()) == [
        "plain_s0.txt", "plain_s1.txt", "sources.txt.gz", "sources_2.txt.gz", "wide_s0.txt",
        "wide_s1_failed.txt"]
    held = [(record / f"sources{n}.txt.gz").read_bytes() for n in ("", "_2")]
    assert list(map(gzip.decompress, held)) == [SOURCES.encode(), SOURCES.encode() + b"z = 3\n"]
    assert all(data[4:8] == bytes(4) for data in held)         # no time: the same file every time
    text = (record / "wide_s0.txt").read_text()
    checksum = hashlib.sha256((record / "sources_2.txt.gz").read_bytes()).hexdigest()
    assert text.startswith(f"=== sources sources_2.txt.gz sha256 {checksum}\n=== config\n")
    assert (record / "plain_s1.txt").read_text().split()[2] == "sources.txt.gz"
    config, env = table.read(record / "plain_s1.txt")[1], json.loads(table.ENV.search(text)[1])
    assert config["input_bin"] == "data/web/*_train_*.bin" and config["output_dir"] == "logs"
    assert env["command"] == ["train_gpt2.py", "--output_dir=logs"]
    assert list(env["shards"]) == ["data/web/x_train_0.bin", "data/big/val.bin"]
    # what the run said is kept to the letter, and read as it was from logs
    assert text.split("=== run")[1] == (logs / "wide/c/log.txt").read_text().split("=== run")[1]
    assert table.runs(record) == {"plain": {0: (2.0, 5, 7000), 1: (2.1, 5, 7000)},
                                  "wide": {0: (2.0, 5, 7000)}}
    # a run that went on with other sources has both, in their order
    finished(logs / "on", 3, packed=True)
    other = b"=== source afno.py\nx = 2\n\n"
    (logs / "on/sources_20261201T120000.txt.gz").write_bytes(gzip.compress(other))
    assert run("add", f"{logs}/on=plain", "--to", record)[0] == 0
    held = gzip.decompress((record / "sources_3.txt.gz").read_bytes())
    assert held == SOURCES.encode() + other
    # more runs of the same sources add their logs alone
    finished(logs / "more", 2)
    code, printed, _ = run("add", f"{logs}/more=plain", "--to", record)
    assert code == 0 and printed.split() == [str(record / "plain_s2.txt")]
    code, _, said = run("add", f"{logs}/more=plain", "--to", record)
    assert code == 1 and "is there already" in said


def test_a_run_that_cannot_be_added_leaves_nothing(tmp_path):
    record = tmp_path / "record"
    finished(tmp_path / "good", 0)
    finished(tmp_path / "again", 0)
    finished(tmp_path / "bare", 1, packed=True)
    (tmp_path / "bare/sources.txt.gz").unlink()
    finished(tmp_path / "torn", 1, packed=True)
    edit_bytes = (tmp_path / "torn/sources.txt.gz").read_bytes()[:-9]
    (tmp_path / "torn/sources.txt.gz").write_bytes(edit_bytes)
    finished(tmp_path / "escape", 1, note="\33[Kstep\n")
    finished(tmp_path / "secret", 1, note="note: saved in /home/me/private/model.pt\n")
    (tmp_path / "empty").mkdir()
    for bad, why in dict(again="is there already", bare="cannot be read", torn="cannot be read",
                         escape="control character", secret="/home/me/private/model.pt",
                         empty="no log.txt").items():
        code, _, said = run("add", tmp_path / "good", tmp_path / bad, "--to", record)
        assert code == 1 and why in said and bad in said and said.count("\n") == 1
        assert not record.exists()
