"""sample.py as a user calls it: which checkpoint, what it refuses in one line, what it writes."""
import io
import os
import shutil
import select
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import sample
from support.checkpoint import write as write_checkpoint
from tests.checks import awake
from train_gpt2 import GPT, Config, main

CFG = Config(mixer="attn", n_layer=1, n_head=2, n_embd=16, sequence_length=8, vocab_size=256)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "model.pt"
    torch.manual_seed(0)
    write_checkpoint(path, dict(model=awake(GPT(CFG)).state_dict(), config=asdict(CFG), step=0))
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
    sample.main(["--max_new_tokens", "5", *map(str, argv)])
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
    assert len(text) > 4 and len(told) == 1 and told[0].endswith(f"{newest}, step 0")


def test_a_run_is_named_by_its_folder_or_its_file(place, capsys):
    place("logs/a/model.pt", "logs/b/model.pt")
    texts = [write(capsys, name) for name in ("logs/a", "logs/a/", "logs/a/model.pt")]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][1] == ["checkpoint: logs/a/model.pt, step 0"]


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
    ["--max_new_tokens", "-1"],
    ["--max_new_tokens", "1.5"],
    ["--min_new_tokens", "301"],
    ["--top_p", "0"],
    ["--top_p", "1.1"],
    ["--top_p", "nan"],
    ["--num_samples", "0"],
    ["--num_samples", "2", "--interactive"],
    ["--device", "tpu"],
    ["--tokens", "5"],
    ["--top_k", "-1"],
    ["--seed", "-1"],
    ["--seed", 2**63],
    ["--prompt", "--"],
    ["--max_new_tokens=--"],
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
    ["--max_new_tokens", "0"],
    ["--top_p", "1e-9"],
    ["--num_samples", "3"],
])
def test_odd_but_possible(place, capsys, argv):
    place("logs/a/model.pt")
    write(capsys, *argv)


@pytest.mark.parametrize("argv, hint", [
    (["--topp", "0.8"], "--topp: did you mean --top_p?"),
    (["logs/a", "--prompt", "To", "be"], "be: --prompt takes one value: quote it, --prompt 'To be'"),
    (["--prompt=--"], "-- is no value"),
])
def test_what_a_refusal_advises(place, capsys, argv, hint):
    place("logs/a/model.pt")
    assert hint in refused(capsys, *argv)


# ---------------------------------------------------------------- what it writes

def test_a_trained_checkpoint_suffices(tmp_path, monkeypatch, capsys):
    """It names its tokenizer, and the log beside it has its loss."""
    monkeypatch.chdir(tmp_path)
    main(Config(mixer="attn", n_layer=1, n_head=2, n_embd=16, sequence_length=8, num_iterations=2,
                val_tokens=64, run_name="run"))
    assert sample.read("logs/run")["tokenizer"] == "bytes"
    capsys.readouterr()
    _, (told,) = write(capsys)
    assert told.startswith("checkpoint: logs/run/model.pt, step 2, val_loss 5.")


@pytest.mark.parametrize("saved", [dict(tokenizer=None), dict(), dict(tokenizer="mine"),
                                   dict(tokenizer=["bytes"])])
def test_a_checkpoint_without_its_tokenizer(place, capsys, saved):
    cfg = Config(**asdict(CFG) | dict(vocab_size=300))
    path = place() / "model.pt"
    write_checkpoint(path, dict(model=GPT(cfg).state_dict(), config=asdict(cfg), step=0) | saved)
    assert "no tokenizer is known for this vocabulary of 300" in refused(capsys, path)


def test_samples_differ_and_each_has_its_own_seed(place, capsys):
    place("logs/a/model.pt")
    flags = ["--prompt", "ab", "--max_new_tokens", "12"]
    together, _ = write(capsys, "--num_samples", "3", "--seed", "5", *flags)
    assert together == write(capsys, "--num_samples", "3", "--seed", "5", *flags)[0]
    alone = [write(capsys, "--seed", seed, *flags)[0] for seed in (5, 6, 7)]
    assert len({*alone}) == 3 and all(text.startswith("ab") for text in alone)
    heads = [f"--- sample {i} of 3 ---\n" for i in (1, 2, 3)]
    assert together == "".join(head + text for head, text in zip(heads, alone))


def test_what_prompts_are_told_of(place, capsys):
    place("logs/a/model.pt")
    text, (_, note) = write(capsys, "--prompt", "")
    assert "an empty prompt" in note
    assert (text, 1) == ((again := write(capsys))[0], len(again[1]))
    text, (_, note) = write(capsys, "--prompt", "0123456789", "--temperature", "0")
    assert "10 tokens, the model sees the last 8" in note and text.startswith("0123456789")
    # and nothing more than those
    assert text[10:] == write(capsys, "--prompt", "23456789", "--temperature", "0")[0][8:]


def test_never_half_a_character(monkeypatch):
    """Two samples at once, one of which breaks off inside a character; the second one waits."""
    said = []
    monkeypatch.setattr(sample, "say", said.append)
    first, second = "a\u00e9\u20ac".encode(), "\U0001f600".encode() + b"\xe2\x82"
    longest = max(len(first), len(second))
    rows = [list(row) + [None] * (longest - len(row)) for row in (first, second)]
    sample.show(zip(*rows), bytes, ["1:", "2:"])
    assert [text for text in said if text] == ["1:", "a", "\u00e9", "\u20ac",
                                               "\n", "2:\U0001f600\ufffd\n"]


def test_lines_of_a_pipe_share_one_context(place, capsys, monkeypatch):
    place("logs/a/model.pt")
    seen = []
    generate = sample.generate

    def spy(context, *args, **choice):
        seen.append(bytes(context.ids[0].tolist()))
        return generate(context, *args, **choice)

    monkeypatch.setattr(sample, "generate", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo"))
    write(capsys, "--interactive", "--prompt", "zero")
    assert seen[0] == b"zero" and len(seen) == 4
    for before, after, line in zip(seen, seen[1:], (b"one", b"", b"two")):
        assert after.startswith(before) and after[len(before) + 5:] == b"\n" + line


SAMPLE = [sys.executable, str(Path(sample.__file__))]
# Nobody waits for as many tokens.
ENDLESS = ["logs/a", "--max_new_tokens", "100000000", "--device", "cpu"]


def test_a_terminal(place):
    """Ctrl-C stops a text, and only that; Ctrl-D leaves."""
    folder = place("logs/a/model.pt")
    ours, theirs = os.openpty()
    process = subprocess.Popen([*SAMPLE, *ENDLESS, "--interactive"], cwd=folder,
                               preexec_fn=lambda: os.login_tty(theirs))
    os.close(theirs)
    screen = b""

    def until(words, more=0):
        nonlocal screen
        while words not in screen or len(screen) < more:
            screen += os.read(ours, 1000)
        screen, before = b"", screen
        return before

    until(b"> ")
    for line in (b"hello", b"again"):
        os.write(ours, line + b"\n")
        until(line, 200)
        # Where the text is not stopped, this waits forever.
        os.write(ours, b"\x03")
        assert b"Traceback" not in until(b"\n> ")
    # Pressed just between a prompt and its read, Python hears it with the next key only.
    while not select.select([ours], [], [], 1)[0]:
        os.write(ours, b"\x03")
    until(b"\n> ")
    os.write(ours, b"\x04")
    assert process.wait(20) == 0
    os.close(ours)


def test_a_reader_that_has_had_enough(place):
    process = subprocess.Popen([*SAMPLE, *ENDLESS], cwd=place("logs/a/model.pt"),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read().count(b"\n") == 1 and process.wait(20) == 0
