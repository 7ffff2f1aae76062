"""sample.py as a user calls it: which checkpoint it takes, and what it refuses, in one line."""
import os
import shutil
from dataclasses import asdict

import pytest
import torch

import sample
from checkpoint import write as write_checkpoint
from train_gpt2 import GPT, Config

CFG = Config(mixer="attn", n_layer=1, n_head=2, n_embd=16, sequence_length=8, vocab_size=256)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "model.pt"
    torch.manual_seed(0)
    write_checkpoint(path, dict(model=GPT(CFG).state_dict(), config=asdict(CFG), step=0))
    return path


@pytest.fixture
def place(checkpoint, tmp_path, monkeypatch):
    """Put copies of the checkpoint at paths below a folder, each older than the next -> it.

    The folder is the working directory; the repository is its subfolder `repo`.
    """
    def copy(*names):
        for age, name in enumerate(reversed(names)):
            path = tmp_path / name
            path.parent.mkdir(parents=True)
            shutil.copy(checkpoint, path)
            os.utime(path, (10**9 - age, 10**9 - age))
        return tmp_path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "ROOT", tmp_path / "repo")
    return copy


def write(capsys, *argv):
    """-> the text of stdout, the lines of stderr"""
    sample.main(["--tokens", "5", *map(str, argv)])
    out, err = capsys.readouterr()
    return out, err.splitlines()


def refused(capsys, *argv):
    """The one line of a refusal, which says nothing on stdout."""
    with pytest.raises(SystemExit) as e:
        sample.main([*map(str, argv)])
    out, err = capsys.readouterr()
    # argparse prints its message itself and exits with a number.
    line = e.value.code if isinstance(e.value.code, str) else err.removesuffix("\n")
    assert e.value.code and line and "\n" not in line and not out
    return line


@pytest.mark.parametrize("names, newest", [
    (["logs/a/model.pt", "logs/b/model.pt"], "logs/b/model.pt"),
    (["logs/b/model.pt", "logs/a/model.pt"], "logs/a/model.pt"),
    # The working directory comes first, however old its runs are.
    (["logs/a/model.pt", "repo/logs/b/model.pt"], "logs/a/model.pt"),
    (["repo/logs/a/model.pt", "repo/logs/b/model.pt"], "repo/logs/b/model.pt"),
])
def test_the_newest_checkpoint_and_its_name(place, capsys, names, newest):
    place(*names)
    text, told = write(capsys)
    assert len(text) > 4 and len(told) == 1 and told[0].endswith(newest)


def test_a_run_is_named_by_its_folder_or_its_file(place, capsys):
    place("logs/a/model.pt", "logs/b/model.pt")
    texts = [write(capsys, name) for name in ("logs/a", "logs/a/", "logs/a/model.pt")]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][1] == ["checkpoint: logs/a/model.pt"]


def test_no_checkpoint_at_all(place, capsys):
    folder = place()
    assert "no checkpoint below logs/" in refused(capsys)
    (folder / "logs/killed").mkdir(parents=True)
    assert "no checkpoint below logs/" in refused(capsys)
    assert "logs/killed/model.pt: no such file" in refused(capsys, "logs/killed")
    assert "missing: no such file" in refused(capsys, "missing")
    assert "no such file" in refused(capsys, 5000 * "a")


def test_a_file_that_is_no_checkpoint(place, capsys):
    folder = place()
    torch.save([1, 2], folder / "list.pt")
    torch.save(dict(config={"lstm": 1}), folder / "other.pt")
    (folder / "text.pt").write_text("hello")
    (folder / "empty.pt").touch()
    for name in ("list.pt", "other.pt", "text.pt", "empty.pt"):
        assert f"{name}: " in (line := refused(capsys, name)) and "not a checkpoint of this" in line


@pytest.mark.parametrize("argv", [
    ["--temperature", "nan"],
    ["--temperature", "inf"],
    ["--temperature=-1"],
    ["--temperature", "1e-320"],
    ["--temperature", "warm"],
    ["--tokens", "-1"],
    ["--tokens", "1.5"],
    ["--top_k", "-1"],
    ["--seed", "-1"],
    ["--seed", 2**63],
    ["--prompt", "--"],
    ["--tokens=--"],
    ["--prompt"],
    ["--nonsense"],
    ["-x"],
    ["a", "b"],
    ["--", "--"],
    ["--", "-h"],
])
def test_what_is_wrong_is_one_line(place, capsys, argv):
    place("logs/a/model.pt")
    refused(capsys, *argv)


@pytest.mark.parametrize("argv", [
    ["--"],
    ["--prompt", ""],
    ["--prompt", "longer than the window of the model"],
    # What a shell passes on that is not UTF-8
    ["--prompt", "caf\udce9"],
    ["--temperature", "0"],
    ["--temperature", "0.001"],
    ["--temperature", "1000"],
    ["--top_k", 10**9],
    ["--seed", 2**63 - 1],
    ["--tokens", "0"],
])
def test_odd_but_possible(place, capsys, argv):
    place("logs/a/model.pt")
    write(capsys, *argv)


def test_two_dashes_as_a_prompt(place, capsys):
    """Text since Python 3.13; argparse takes them away before."""
    place("logs/a/model.pt")
    try:
        write(capsys, "--prompt=--")
    except SystemExit:
        assert capsys.readouterr().err == "sample.py: -- is no value\n"
