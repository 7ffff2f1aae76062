"""What a log says of the machine: the commit, and memory where the system does not tell it."""
import platform
import subprocess
import sys

import pytest
import torch

from support import machine
from tests.runs import train

CPU = torch.device("cpu")


def git(folder, *arguments):
    """Run git in a folder -> what it prints. Skips the test where there is no git."""
    name = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    try:
        done = subprocess.run(["git", "-C", folder, *name, *arguments], capture_output=True,
                              text=True, check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, which the code takes for its own; git looks no further up."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    monkeypatch.setattr(machine, "ROOT", tmp_path.resolve())
    return tmp_path


def logged():
    env = machine.environment(CPU, 1, {}, torch.float32, False)
    return env["commit"], env["dirty"]


def test_the_commit_of_this_repository(repository):
    head = git(repository, "rev-parse", "HEAD")
    assert logged() == (head, False)
    (repository / "new.py").touch()
    assert logged() == (head, True)


def test_a_copy_inside_another_repository_has_no_commit(repository, monkeypatch):
    copy = repository / "copy"
    copy.mkdir()
    monkeypatch.setattr(machine, "ROOT", copy.resolve())
    assert logged() == ("unknown", None)


def test_without_a_repository_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(machine, "ROOT", tmp_path.resolve())
    assert logged() == ("unknown", None)
    monkeypatch.setenv("PATH", "")
    assert logged() == ("unknown", None)


def test_windows_has_no_resource_module():
    """Everything imports without it, and no wrong figure is printed."""
    code = ("import sys; sys.modules['resource'] = None\n"
            "import torch, train_gpt2\n"
            "print(train_gpt2.machine.peak_memory(torch.device('cpu')))")
    done = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True,
                          text=True)
    assert done.stdout == "unknown\n", done.stderr


def test_the_peak_memory_of_this_process():
    pytest.importorskip("resource")
    assert 50 < int(machine.peak_memory(CPU).removesuffix("MiB")) < 100_000


# ---------------- precision

@pytest.mark.parametrize("kind, in_hardware, dtype", [
    ("cpu", True, torch.float32), ("cuda", True, torch.bfloat16), ("cuda", False, torch.float32),
])
def test_the_card_is_asked_for_bf16(kind, in_hardware, dtype, monkeypatch):
    """A card from before Ampere emulates it: slower than fp32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: in_hardware or including_emulation)
    machine.has_bf16.cache_clear()
    device = torch.device(kind)
    assert machine.pick_precision("auto", device) == dtype
    assert machine.pick_precision("bf16", device) == torch.bfloat16
    assert machine.pick_precision("fp32", device) == torch.float32
    machine.has_bf16.cache_clear()


def test_a_run_in_bf16(shards, tmp_path):
    """On a CPU, by name: near the run in fp32, and not the same."""
    losses = [train(tmp_path, **shards, dtype=dtype)[0] for dtype in ("auto", "bf16")]
    assert losses[0] != losses[1] == pytest.approx(losses[0], abs=0.05)


KEPT = """
import resource, sys, torch
from support.machine import keep_memory
if sys.argv[1] == "keep":
    keep_memory(torch.device("cpu"))
for n in range(24):
    torch.ones(2**23)
    if n == 17:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_memory_that_was_freed_is_used_again():
    """Else six tensors of 32 MiB touch 8,192 pages each (fewer where pages are larger).

    The heap's layout is drawn anew in each process, and settles in a few tensors.
    """
    touched = {}
    for how in ("keep", "give back"):
        done = subprocess.run([sys.executable, "-c", KEPT, how], cwd=machine.ROOT, check=True,
                              capture_output=True, text=True)
        touched[how] = int(done.stdout)
    assert touched["keep"] < 0.1 * touched["give back"], touched
