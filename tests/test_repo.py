"""The repository itself: it stays small, importing runs nothing, links resolve, four dependencies
are enough."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Lines.
CAPS = {"train_gpt2.py": 990, "parts.py": 500, "kernels.py": 870, "bench.py": 445,
        "race.py": 285, "export.py": 285, "support/flags.py": 345, "support/checkpoint.py": 290}
OTHERS = 280
SOURCES = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("support/*.py"))]
DEPENDENCIES = {"torch", "numpy", "tiktoken", "huggingface_hub"}
PAGES = [
    ROOT / "README.md",
    ROOT / "LOG.md",
    *(ROOT / "records").glob("**/*.md"),
    ROOT / "data/README.md",
]


def test_the_root_stays_small():
    """What one reads, edits or runs; what supports a run is in support/."""
    assert len([*ROOT.glob("*.py")]) <= 16


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_files_stay_small(path):
    name = path.relative_to(ROOT).as_posix()
    assert len(path.read_text().splitlines()) <= CAPS.get(name, OTHERS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_lines_are_short(path):
    assert max(map(len, path.read_text().splitlines())) <= 100


def test_importing_runs_nothing(tmp_path):
    code = "import train_gpt2, torch.distributed as dist; assert not dist.is_initialized()"
    env = os.environ | dict(
        PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1", RANK="x", WORLD_SIZE="x"
    )
    command = [sys.executable, "-c", code, "--nonsense"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(
        tmp_path.iterdir()
    )


def test_four_dependencies():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert {
        re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines
    } == DEPENDENCIES and len(lines) == 4
    # race.py reads the scripts of records/.
    files = [path for folder in (".", "data", "records") for path in ROOT.glob(f"{folder}/*.py")]
    local = {"tests", "data", "share", "support"} | {path.stem for path in files}
    files = [path for folder in (".", "data", "share", "support")
             for path in ROOT.glob(f"{folder}/*.py")]
    # It travels with an export, which transformers loads.
    for path in set(files) - {ROOT / "share/modeling.py"}:
        # what is optional is imported where it is used
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in (
                {name.split(".")[0] for name in names}
                - local
                - sys.stdlib_module_names
                - DEPENDENCIES
            ):
                assert name == "pytest" and path.name.startswith("test_"), (
                    f"{path.name} needs {name}"
                )


@pytest.mark.skipif(not importlib.util.find_spec("ruff"), reason="ruff is not installed")
def test_ruff():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# Holds no losses: its table rests on tests.
FAULTS = ROOT / "records/2026-11-28_faults/README.md"


def test_the_fault_table_names_tests_that_exist():
    there = {name for path in ROOT.glob("tests/test_*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    named = set(re.findall(r"`(test_\w+)`", FAULTS.read_text()))
    assert len(named) > 30 and not named - there, named - there


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page):
    if not page.exists():
        pytest.skip("not written yet")
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        target = "".join(link).split("#")[0]
        assert "://" in target or not target or (page.parent / target).exists(), target


def test_scripts_are_executable():
    assert all(os.access(path, os.X_OK) for path in ROOT.glob("run_*.sh") )


def test_no_large_file_is_tracked():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, done.stdout.split("\0")):
        path = ROOT / name
        # the embedded training shard
        assert not path.exists() or path.stat().st_size <= 2_100_000, name


def test_no_test_module_imports_another():
    """What several share is in tests/checks.py, tests/runs.py and tests/conftest.py."""
    modules = [ROOT / "test_causality.py", *ROOT.glob("tests/test_*.py")]
    names = {path.stem for path in modules}
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[-1] not in names, f"{path.name} reads {node.module}"
            elif isinstance(node, ast.Import):
                assert not {a.name.split(".")[-1] for a in node.names} & names, path.name
