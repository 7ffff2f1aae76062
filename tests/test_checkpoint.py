"""Runs that are killed, stopped, poisoned or starved: nothing is lost, and what goes on is exact."""
import errno
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from support import checkpoint, log
from support.compile import compiled
from support.shards import open_shards
from support.signals import Signals
from tests.runs import TINY, knobs_of, steps, train, weights
import train_gpt2
from train_gpt2 import GPT, ROOT, Config, main

TRAIN = dict(TINY, num_iterations=8, val_loss_every=4, save_every=2, train_loss_every=1)


class Crash(Exception):
    pass


def crash_at(step, monkeypatch):
    """The run dies in its step of that number, counted from 0."""
    real = train_gpt2.set_schedule

    def set_schedule(optimizers, now, cfg):
        if now == step:
            raise Crash
        real(optimizers, now, cfg)

    monkeypatch.setattr(train_gpt2, "set_schedule", set_schedule)


def run(out, **knobs):
    return train(out, **TRAIN | knobs)


def told(folder):
    """The lines of a log, without the sources."""
    return (folder / "log.txt").read_text().split("\n=== run\n", 1)[1]


def same(a, b):
    """Two nested states, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def exact(one, other):
    """Weights, optimizers and random numbers of two runs' last checkpoints; their losses."""
    a, b = weights(one), weights(other)
    for part in ("model", "optimizers", "random", "step"):
        assert same(a[part], b[part]), part
    assert a["progress"]["tokens"] == b["progress"]["tokens"]
    assert steps(one, "train")[-2:] == steps(other, "train")[-2:]
    assert steps(one, "val")[-1] == steps(other, "val")[-1]


# ---------------- going on

DOCUMENTS = dict(document_token=3)
CASES = {
    "adamw": dict(), "muon": dict(optim="muon"), "ademamix": dict(optim="ademamix"),
    "soap": dict(optim="soap", soap_frequency=3),
    "dropout": dict(dropout=0.2), "accumulation": dict(grad_accumulation_steps=3, batch_size=2),
    "packed": dict(batches="packed", **DOCUMENTS), "padded": dict(batches="padded", **DOCUMENTS),
    "stages": dict(stages="4x16@2,8x8@5"), "lookahead": dict(optim="muon", lookahead=0.6),
    "in order": dict(shuffle=False),
    "epochs": dict(batch_size=40, num_iterations=24),
    "switches": dict(optim="muon", value_residual=True, x0_shortcut=True, residual="gpas"),
    "ngpt": dict(mixer="ngpt", norm="ngpt", residual="ngpt", mlp="ngpt", zero_init=False,
                 embed_norm=False, weight_decay=0.0),
}


@pytest.mark.parametrize("crash", [3, 6])
@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_bit_for_bit(shards, tmp_path, monkeypatch, case, crash):
    if case in ("ademamix", "soap"):
        pytest.importorskip("pytorch_optimizer")
    knobs = knobs_of("attn", **shards) | CASES[case]
    loss, whole = run(tmp_path / "whole", **knobs)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(crash, patch)
        run(tmp_path / "cut", **knobs)
    again, cut = run(tmp_path / "cut", **knobs, resume="auto")
    assert again == loss and len(list((tmp_path / "cut").iterdir())) == 1
    exact(whole, cut)
    assert f"\ngoes on from step {crash // 2 * 2} of " in (cut / "log.txt").read_text()


def test_a_run_may_become_longer(shards, tmp_path):
    """From before the warm-down nothing jumps; from within it, the log says by how much."""
    knobs = dict(shards, warmdown_iters=2)
    _, whole = run(tmp_path / "whole", **knobs, num_iterations=12)
    _, short = run(tmp_path / "short", **knobs, keep=9)
    assert "goes on from" not in told(short)
    middle = short / "model_0000006.pt"
    main(Config(**TRAIN | knobs | dict(num_iterations=12, resume=str(middle))))
    exact(whole, short)
    assert "the learning rate" not in told(short)
    main(Config(**TRAIN | knobs | dict(num_iterations=14, resume=str(short))))
    assert "the learning rate goes from 0.000 of its peak to 1.000" in told(short)


def test_what_differs_is_named(shards, tmp_path):
    _, folder = run(tmp_path / "a", **shards)
    other = tmp_path / "other.bin"
    data = bytearray(Path(shards["input_val_bin"]).read_bytes())
    data[1024:1026] = (5).to_bytes(2, "little")
    other.write_bytes(data)
    for knobs, words in ((dict(learning_rate=0.5), "--learning_rate is 0.5, was 0.003"),
                         (dict(input_val_bin=str(other)), "the validation shards are others"),
                         (dict(num_iterations=4), "--num_iterations is 4, was 8")):
        with pytest.raises(SystemExit, match=words):
            main(Config(**TRAIN | shards | knobs | dict(resume=str(folder))))
    knobs = dict(learning_rate=0.5, num_iterations=9, resume=str(folder), resume_anyway=True)
    main(Config(**TRAIN | shards | knobs))
    assert weights(folder)["optimizers"][0]["param_groups"][0]["peak_lr"] == 0.5
    # auto takes what fits, or starts anew and says so.
    _, fresh = train(tmp_path / "a", **TRAIN | shards | dict(seed=9, resume="auto"))
    assert fresh != folder and "nothing to go on from fits" in (fresh / "log.txt").read_text()


@pytest.mark.parametrize("knobs, words", [
    (dict(n_layer=3), "no other model"), (dict(n_embd=64), "no other model"),
    (dict(optim="muon"), "holds another optimizer's state"),
])
def test_another_model_or_optimizer_cannot_go_on_anyway(shards, tmp_path, knobs, words):
    _, folder = run(tmp_path, **shards)
    before = (folder / "model.pt").read_bytes()
    with pytest.raises(SystemExit, match=words) as e:
        main(Config(**TRAIN | shards | knobs | dict(resume=str(folder), resume_anyway=True)))
    assert "\n" not in e.value.code and (folder / "model.pt").read_bytes() == before


def test_a_field_that_the_checkpoint_lacks_is_named(shards, tmp_path):
    """What it was then is not known: today's default may be another."""
    _, folder = run(tmp_path, **shards)
    state = weights(folder)
    del state["config"]["logit_softcap"]
    torch.save(state, folder / "model.pt")
    with pytest.raises(SystemExit, match=r"--logit_softcap is \S+, the checkpoint has none"):
        main(Config(**TRAIN | shards | dict(resume=str(folder))))


def test_last_best_and_some_more_are_kept(shards, tmp_path, monkeypatch):
    # of each validation; the last one is the accuracy
    values = iter([4.0, 3.0, 2.0, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0, 0.5])
    monkeypatch.setattr(train_gpt2, "evaluate", lambda *args: next(values))
    _, folder = run(tmp_path, **shards, val_loss_every=1, save_every=1, keep=3)
    assert sorted(path.name for path in folder.glob("*.pt*")) == [
        "best.pt", "model.pt", "model_0000006.pt", "model_0000007.pt"]
    saved = {name: checkpoint.read(folder / name)["step"]
             for name in ("model.pt", "best.pt", "model_0000006.pt")}
    assert saved == {"model.pt": 8, "best.pt": 2, "model_0000006.pt": 6}


def test_a_checkpoint_is_there_before_the_validation(shards, tmp_path, monkeypatch):
    def evaluate(*args):
        seen.append(sorted(path.name for path in tmp_path.glob("*/*.pt")))
        return 1.0

    seen = []
    monkeypatch.setattr(train_gpt2, "evaluate", evaluate)
    run(tmp_path, **shards)
    assert seen[0] == [] and "model.pt" in seen[1]


# ---------------- kills and signals

def driven(tmp_path, runs):
    """[Config's fields, when to kill as faults.py has it, signal], a run each -> their exit codes,
    and what they say on stderr."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(runs))
    done = subprocess.run([sys.executable, ROOT / "tests/faults.py", plan], capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


LONG = dict(num_iterations=40, save_every=1, val_loss_every=10, optim="muon", dropout=0.1,
            train_loss_every=10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_thirty_kills_at_random_moments(shards, tmp_path):
    """Each run goes on from what the last left; half of the time is spent in saving.

    Together they take half as long as the whole run did, so that none gets to its end.
    """
    knobs = dict(shards, **LONG | dict(num_iterations=300))
    start = time.perf_counter()
    _, whole = run(tmp_path / "whole", **knobs)
    longest = (time.perf_counter() - start) / 30
    moments = random.Random(0)
    kills = [moments.uniform(0, longest) for _ in range(30)] + [None]
    config = TRAIN | knobs | dict(output_dir=str(tmp_path / "cut"), run_name="", resume="auto")
    codes, errors = driven(tmp_path, [[config, kill, signal.SIGKILL] for kill in kills])
    assert codes == 30 * [-signal.SIGKILL] + [0], errors
    # The last that trained. Earlier ones may have died before their first checkpoint.
    folder = max((path for path in (tmp_path / "cut").iterdir() if (path / "model.pt").exists()),
                 key=lambda path: (path / "model.pt").stat().st_mtime_ns)
    a, b = weights(whole), weights(folder)
    assert all(same(a[part], b[part]) for part in ("model", "optimizers", "random", "step"))
    assert not list(folder.glob("*.tmp"))
    # Most kills met a run that had gone on from the last.
    assert told(folder).count("\ngoes on from step ") > 15


UNSAVED = LONG | dict(save_every=0, val_loss_every=0, num_iterations=200)


@pytest.fixture(scope="module")
def never_stopped(shards, tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), **shards, **UNSAVED)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_signal_ends_the_run_saved(shards, tmp_path, never_stopped):
    names = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGXCPU"]
    runs = []
    for name in names:
        config = TRAIN | shards | UNSAVED | dict(output_dir=str(tmp_path / name), run_name="",
                                                 resume="auto")
        runs += [config, "\nstep:10/", getattr(signal, name)], [config, None, 0]
    codes, errors = driven(tmp_path, runs)
    for name, *ends in zip(names, codes[::2], codes[1::2]):
        assert ends == [128 + getattr(signal, name), 0], errors
        folder, = (tmp_path / name).iterdir()
        step, saved = re.search(rf"\nstopped by {name} after step (\d+), the last checkpoint is of "
                                rf"step (\d+): go on with --resume {folder}\n",
                                told(folder)).groups()
        assert step == saved and f"\ngoes on from step {step} of " in told(folder)
        exact(never_stopped, folder)


@pytest.fixture
def signals():
    """Listening, in this process; what it listens to has no handler of its own."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")
    if not all(hasattr(signal, name) for name in names):
        pytest.skip("needs the signals of POSIX")
    numbers = [getattr(signal, name) for name in names]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals() as signals:
        signals.listen()
        yield signals
    assert all(signal.getsignal(number) == signal.SIG_DFL for number in numbers
               if number != signal.SIGHUP)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_warning_may_come_again(signals):
    """A limit of CPU seconds warns every second, also while the run saves."""
    for number in (signal.SIGXCPU, signal.SIGXCPU, signal.SIGUSR1, signal.SIGTERM):
        signal.raise_signal(number)
        assert signals.caught == number
    # From now on at once.
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_what_nohup_ignores_stays_ignored(signals):
    signal.raise_signal(signal.SIGHUP)
    assert signals.caught == 0


@pytest.mark.parametrize("script", ["train_gpt2.py", "sample.py"])
def test_a_signal_during_imports_leaves_no_traceback(tmp_path, script):
    """They take seconds, in which Ctrl-C met a page of what torch was importing."""
    for name in ("torch", "numpy"):
        (tmp_path / f"{name}.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)")
    environment = os.environ | dict(PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def two_processes(knobs, *flags_of_torchrun):
    """torchrun on its way, with one restart."""
    flags = [f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
             for name, value in knobs.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=1", *flags_of_torchrun, "train_gpt2.py", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"),
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(condition, *args):
    """Until it holds, at most two minutes."""
    deadline = time.monotonic() + 120
    while not condition(*args) and time.monotonic() < deadline:
        time.sleep(0.02)


def has_told(folder, words):
    return (folder / "log.txt").exists() and words in (folder / "log.txt").read_text()


PAIR = LONG | dict(num_iterations=60, train_loss_every=1, run_name="run")


@pytest.fixture(scope="module")
def never_stopped_pair(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("pair")
    assert two_processes(TRAIN | shards | PAIR | dict(output_dir=out)).wait(timeout=120) == 0
    return out / "run"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs the signals of POSIX")
def test_a_signal_to_torchrun_ends_both_processes_saved(shards, tmp_path, never_stopped_pair):
    """SIGINT, then a warning to what goes on: as if nothing had been.

    torchrun hears SIGTERM and SIGINT by one handler. It dies of SIGUSR1 unless it is asked to pass
    it on, and leaves its processes.
    """
    folder = tmp_path / "run"
    knobs = TRAIN | shards | PAIR | dict(save_every=0, val_loss_every=0, resume="auto",
                                         output_dir=tmp_path)
    passed_on = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1"
    for name, step in (("SIGINT", 5), ("SIGUSR1", 25)):
        victim = two_processes(knobs, passed_on)
        wait_for(has_told, folder, f"\nstep:{step}/")
        victim.send_signal(getattr(signal, name))
        errors = victim.communicate(timeout=120)[1]
        # torchrun has a traceback of its own, and no other.
        assert victim.returncode == 1 and errors.count("Traceback") == 1, errors
        assert f"\nstopped by {name} after step {weights(folder)['step']}, " in told(folder)
    assert two_processes(knobs).wait(timeout=120) == 0
    assert told(folder).count("\ngoes on from step ") == 2
    exact(never_stopped_pair, folder)


@pytest.mark.skipif(not shutil.which("pgrep"), reason="needs pgrep")
def test_a_killed_process_of_two_is_replaced(shards, tmp_path, never_stopped_pair):
    """torchrun starts both anew, which go on from the last checkpoint by themselves."""
    folder = tmp_path / "run"
    victim = two_processes(TRAIN | shards | PAIR | dict(output_dir=tmp_path))
    wait_for((folder / "best.pt").exists)
    children = subprocess.run(["pgrep", "-P", str(victim.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    errors = victim.communicate(timeout=120)[1]
    assert victim.returncode == 0, errors
    assert "\ngoes on from step " in told(folder)
    exact(never_stopped_pair, folder)


# ---------------- files that are no checkpoints

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "model.pt"
    state = dict(model={"weight": torch.randn(300)}, config={}, step=3, optimizers=[])
    checkpoint.write(path, state)
    return path


def refused(path):
    with pytest.raises(SystemExit) as e:
        checkpoint.read(path)
    assert str(path) in e.value.code and "\n" not in e.value.code and len(e.value.code) < 400
    return e.value.code


def test_a_flipped_bit_is_seen_wherever_it_matters(saved, tmp_path):
    """In any record's bytes, names and checksums; elsewhere it may be refused or change nothing."""
    good = checkpoint.read(saved)
    content = saved.read_bytes()
    path = tmp_path / "flipped.pt"
    rng = random.Random(0)
    places = [len(content) - i for i in (1, 10, 30)] + [rng.randrange(len(content)) for _ in range(60)]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same(checkpoint.read(path), good), place
        except SystemExit as e:
            assert "\n" not in e.code
    # Inside the weights it is always refused.
    start = content.index(good["model"]["weight"].numpy().tobytes())
    for place in range(start, start + 1200, 60):
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        assert "damaged" in refused(path)


def test_a_cut_file_is_refused(saved, tmp_path):
    content = saved.read_bytes()
    path = tmp_path / "cut.pt"
    for share in range(20):
        path.write_bytes(content[:len(content) * share // 20])
        refused(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_foreign_and_evil_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    path.write_bytes(pickle.dumps(Evil()))
    refused(path)
    torch.save(dict(model=Evil(), config={}, step=0), path)
    refused(path)
    assert not (tmp_path / "evil").exists()
    torch.save([1, 2], path)
    refused(path)
    torch.save(dict(weights=torch.zeros(3)), path)
    assert "it has no config" in refused(path)
    with zipfile.ZipFile(path, "w") as f:
        f.writestr("hello", "world")
    refused(path)
    path.unlink()
    assert "no such file" in refused(path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)
        assert "no such file" in refused(path)


def test_weights_alone_are_not_enough_to_go_on(shards, tmp_path):
    _, folder = run(tmp_path, **shards)
    state = weights(folder)
    del state["optimizers"]
    torch.save(state, folder / "model.pt")
    with pytest.raises(SystemExit, match="holds weights only"):
        main(Config(**TRAIN | shards | dict(resume=str(folder))))


def test_weights_that_are_not_finite_write_no_text(shards, tmp_path):
    _, folder = run(tmp_path, **shards, num_iterations=1)
    state = weights(folder)
    state["model"]["wte.weight"][3, 5] = math.nan
    torch.save(state, folder / "model.pt")
    for temperature in ("0", "1"):
        with pytest.raises(SystemExit, match="weights are not finite"):
            sample.main([str(folder), "--temperature", temperature])


# ---------------- disks

def test_a_full_disk_does_not_end_the_run(shards, tmp_path, monkeypatch):
    """Saves of steps 4 and 6 fail: told, nothing torn is left, the last good one stays."""
    reserve = checkpoint.reserve

    def full(f, state):
        if state["step"] in (4, 6):
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(f, state)

    monkeypatch.setattr(checkpoint, "reserve", full)
    loss, folder = run(tmp_path, **shards)
    text = (folder / "log.txt").read_text()
    assert text.count("could not be saved ([Errno 28] No space left on device)") >= 2
    assert "the last one is of step 2" in text
    assert weights(folder)["step"] == 8 and not list(folder.glob("*.tmp"))


def test_a_disk_that_stays_full_is_an_error_at_the_end(shards, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "reserve", full)
    with pytest.raises(SystemExit, match="the trained weights could not be saved to "):
        run(tmp_path, **shards)
    text = next(tmp_path.glob("*/log.txt")).read_text()
    assert "final val_loss:" in text and not list(tmp_path.glob("*/*.pt*"))


def test_files_that_may_not_grow(shards, tmp_path):
    """A real limit, of the system's: the log fits below it, a checkpoint does not."""
    pytest.importorskip("resource")
    code = ("import resource, train_gpt2\n"
            "real = train_gpt2.evaluate\n"
            "def limited(*args):\n"
            "    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
            "    return real(*args)\n"
            "train_gpt2.evaluate = limited\n"
            "train_gpt2.main(train_gpt2.parse())")
    flags = ["--output_dir", str(tmp_path), "--num_iterations=2", "--val_tokens=256",
             "--save_every=1", "--sequence_length=32", "--device=cpu"]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "could not be saved" in done.stdout and "final val_loss" in done.stdout
    assert not list(tmp_path.glob("*/*.pt*"))


def test_a_folder_that_vanishes_comes_back(shards, tmp_path, monkeypatch):
    real = train_gpt2.set_schedule

    def set_schedule(optimizers, step, cfg):
        if step == 5:
            shutil.rmtree(next(tmp_path.iterdir()))
        real(optimizers, step, cfg)

    monkeypatch.setattr(train_gpt2, "set_schedule", set_schedule)
    _, folder = run(tmp_path, **shards)
    assert weights(folder)["step"] == 8


# ---------------- bad numbers

UNUSED_ROW = 127 * 32                                       # of the padded vocabulary of 24
# {what: (its part, a weight's name, a place in it, the step that tells, in which words)}. The fault
# is in step 5; a weight that nothing reads is seen when it is saved.
POISONS = {
    "loss": ("loss", "", 0, 5, "the training loss is (nan|inf)"),
    "gradient": ("grad", "blocks.0.mlp.fc.weight", 7, 5,
                 "the gradient of blocks.0.mlp.fc.weight is not finite .1 are not."),
    "gradient of an unused row": ("grad", "wte.weight", UNUSED_ROW, 5,
                                  "the gradient of wte.weight is not finite .1 are not."),
    "weight": ("weight", "blocks.0.mlp.fc.weight", 7, 5,
               "the weights blocks.0.mlp.fc.weight are not finite .1 are not."),
    "weight of an unused row": ("weight", "wte.weight", UNUSED_ROW, 6,
                                "the weights wte.weight are not finite .1 are not."),
}


def poison(monkeypatch, step, part, name, place, value):
    """Spoil the loss, a weight before the forward or a gradient behind the backward pass of a step.

    Steps count from 1.
    """
    real = train_gpt2.backward
    count = []

    def backward(forward, model, *args):
        count.append(0)
        if len(count) != step:
            return real(forward, model, *args)
        if part == "loss":
            return real(lambda x, y: value * forward(x, y), model, *args)
        weight = dict(model.named_parameters())[name]
        if part == "weight":
            weight.data.view(-1)[place] = value
        result = real(forward, model, *args)
        if part == "grad":
            weight.grad.view(-1)[place] = value
        return result

    monkeypatch.setattr(train_gpt2, "backward", backward)


def all_finite(out):
    """Of all checkpoints below a folder, as they are read."""
    return all(p.isfinite().all() for path in out.glob("*/*.pt")
               for p in checkpoint.read(path)["model"].values())


@pytest.mark.parametrize("every, value", [(5, math.nan), (25, math.inf), (1000, math.nan)])
@pytest.mark.parametrize("what", POISONS)
def test_bad_numbers_end_the_run(shards, tmp_path, monkeypatch, what, value, every):
    """Whether steps are logged or not; what was saved before is good, and nothing is after."""
    part, name, place, step, words = POISONS[what]
    poison(monkeypatch, 5, part, name, place, value)
    with pytest.raises(SystemExit) as e:
        run(tmp_path, **shards, train_loss_every=every, save_every=2)
    assert re.fullmatch(rf"step {step}: {words}: lower the learning rates. No checkpoint was "
                        "overwritten, the last good one is of step 4", e.value.code)
    assert all_finite(tmp_path) and weights(next(tmp_path.iterdir()))["step"] == 4


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("rate", [1e3, 1e10, 1e38])
def test_no_rate_is_too_high_for_good_checkpoints(shards, tmp_path, optim, rate):
    """The run may end in a line, or in finite nonsense."""
    try:
        run(tmp_path, **shards, optim=optim, learning_rate=rate, save_every=1,
            train_loss_every=1000)
    except SystemExit as e:
        assert "not finite" in e.code or "loss is" in e.code
    assert all_finite(tmp_path)


def test_bad_steps_may_be_passed_over(shards, tmp_path, monkeypatch):
    poison(monkeypatch, 3, "grad", "wte.weight", 0, math.nan)
    _, folder = run(tmp_path, **shards, skip_bad_steps=1)
    text = (folder / "log.txt").read_text()
    assert "note: step 3 had no gradient: the gradient of wte.weight is not finite (1 are not); " \
           "1 of at most 1 such steps" in text
    assert weights(folder)["step"] == 8


# ---------------- memory

@pytest.mark.parametrize("batches", ["windows", "padded"])
def test_out_of_memory_cuts_micro_batches(shards, tmp_path, monkeypatch, batches):
    """More than three rows do not fit: the same steps, in pieces."""
    knobs = dict(shards) | (dict(batches=batches, **DOCUMENTS) if batches == "padded" else {})
    loss, _ = run(tmp_path / "whole", **knobs)
    real = GPT.forward

    def forward(self, idx, targets=None):
        if self.training and len(idx) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(self, idx, targets)

    monkeypatch.setattr(GPT, "forward", forward)
    cut, folder = run(tmp_path / "cut", **knobs)
    assert cut == pytest.approx(loss, abs=1e-5)
    assert (folder / "log.txt").read_text().count("note: out of memory") >= 2


def test_a_model_larger_than_the_machine_is_refused_before_a_weight_is_drawn(shards, tmp_path,
                                                                             monkeypatch):
    """Linux hands out more than there is, and kills whoever fills it."""
    def __init__(self, cfg):
        assert torch.get_default_device().type == "meta"
        real(self, cfg)

    real = GPT.__init__
    monkeypatch.setattr(GPT, "__init__", __init__)
    monkeypatch.setattr("support.machine.host_memory", lambda: 200_000)
    with pytest.raises(SystemExit, match="does not fit into this machine's memory"):
        run(tmp_path, **shards)
    assert not list(tmp_path.iterdir())


def test_a_row_that_does_not_fit_is_one_line(shards, tmp_path, monkeypatch):
    def forward(self, idx, targets=None):
        if self.training:
            raise MemoryError
        return torch.tensor(3.0)

    monkeypatch.setattr(GPT, "forward", forward)
    with pytest.raises(SystemExit, match="a single row does not fit into memory"):
        run(tmp_path, **shards)


# ---------------- shards that change

def copied(shards, folder):
    folder.mkdir()
    paths = {}
    for name, kind in (("input_bin", "train_0.bin"), ("input_val_bin", "val.bin")):
        source = Path(shards[name]).with_name(kind)
        paths[name] = str(shutil.copy(source, folder / kind))
    return paths


@pytest.mark.parametrize("change", ["cut", "tokens"])
@pytest.mark.parametrize("kind", ["input_bin", "input_val_bin"])
def test_a_shard_that_changes_is_one_line(shards, tmp_path, monkeypatch, change, kind):
    """To read a cut one would end the process without a word (SIGBUS)."""
    paths = copied(shards, tmp_path / "data")
    real = train_gpt2.set_schedule

    def set_schedule(optimizers, step, cfg):
        if step == 3:
            with open(paths[kind], "r+b") as f:
                if change == "cut":
                    f.truncate(1100)
                else:
                    f.seek(1024)
                    f.write(np.full(200, 7, "<u2").tobytes())
            os.utime(paths[kind], (1, 1))
        real(optimizers, step, cfg)

    monkeypatch.setattr(train_gpt2, "set_schedule", set_schedule)
    with pytest.raises(SystemExit, match="has changed while the run read it"):
        run(tmp_path / "out", **paths)


@pytest.mark.parametrize("spare", [40, 41])
def test_more_shards_than_files_may_be_open_are_one_line(shards, tmp_path, spare):
    """Whether it is the header or the map that is one file too many."""
    resource = pytest.importorskip("resource")
    for i in range(60):
        shutil.copy(shards["input_val_bin"], tmp_path / f"{i}.bin")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The lowest free number is how many are open.
    with open(os.devnull) as f:
        free = f.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, hard))
    try:
        with pytest.raises(SystemExit, match="Too many open files.: with many shards, raise"):
            open_shards(str(tmp_path / "*.bin"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shard_that_vanishes_is_still_mapped(shards, tmp_path, monkeypatch):
    paths = copied(shards, tmp_path / "data")
    real = train_gpt2.set_schedule

    def set_schedule(optimizers, step, cfg):
        Path(paths["input_bin"]).unlink(missing_ok=True)
        real(optimizers, step, cfg)

    monkeypatch.setattr(train_gpt2, "set_schedule", set_schedule)
    run(tmp_path / "out", **paths)


# ---------------- terminals, environments, other processes

FLAGS = ["--num_iterations=3", "--val_tokens=256", "--train_loss_every=1", "--sequence_length=32",
         "--device=cpu", "--n_layer=1", "--n_embd=32"]


@pytest.mark.parametrize("shell", ["{} >&-", "{} >/dev/full", "{} | head -n 1",
                                   "{} <&- 2>/dev/full", "{} >&- 2>&- <&-"])
def test_a_closed_stdout_does_not_end_the_run(tmp_path, shell):
    if "/dev/full" in shell and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    command = f"{sys.executable} train_gpt2.py {' '.join(FLAGS)} --output_dir {tmp_path}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell.format(command)], cwd=ROOT,
                          capture_output=True, text=True)
    text = next(tmp_path.glob("*/log.txt")).read_text()
    assert "final val_loss:" in text and list(tmp_path.glob("*/model.pt"))
    assert "Traceback" not in done.stderr and done.returncode == 0, done.stderr


@pytest.mark.parametrize("shell", ["{} 2>/dev/full", "{} <&- >&- 2>&-"])
def test_a_refusal_needs_no_terminal(tmp_path, shell):
    """The exit code says it, whoever listens."""
    if "/dev/full" in shell and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    command = f"{sys.executable} train_gpt2.py --output_dir {tmp_path} --n_layer=-1"
    done = subprocess.run(["bash", "-c", shell.format(command)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode and "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.fixture
def user():
    """A folder of somebody whom permissions bind, unlike root, as whom the test then runs."""
    if not hasattr(os, "geteuid"):
        pytest.skip("needs the permissions of POSIX")
    nobody = 65534
    before = os.geteuid()
    if before == 0:
        os.seteuid(nobody)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    finally:
        os.seteuid(before)


def test_a_folder_that_may_not_be_written_is_one_line(user):
    (user / "full").mkdir(mode=0o555)
    (user / "hidden").mkdir(mode=0o600)
    for out in (user / "full", user / "hidden", user / "hidden/logs", user / (300 * "x"),
                user / "full/a/b"):
        for name in ("", "run"):
            with pytest.raises(SystemExit) as e:
                log.new_folder(Config(output_dir=str(out), run_name=name))
            assert re.search(r"cannot make this folder \((Permission denied|File name too long)\): "
                             "change --output_dir", e.value.code) and "\n" not in e.value.code


def test_a_checkpoint_that_may_not_be_looked_for_is_one_line(user):
    (user / "hidden").mkdir(mode=0o600)
    for resume in (user / "hidden/run", user / (300 * "x")):
        cfg = Config(output_dir=str(user), resume=str(resume))
        with pytest.raises(SystemExit, match="no such file"):
            checkpoint.resumed(cfg, {}, 0)
    assert checkpoint.find(Config(output_dir=str(user / "hidden"), resume="auto"), {}) is None


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *args: "now")
    with ThreadPoolExecutor(8) as pool:
        folders = [*pool.map(log.new_folder, 64 * [Config(output_dir=str(tmp_path))])]
    assert len(set(folders)) == 64


def test_two_runs_of_one_name_share_no_log(shards, tmp_path):
    """Both have found the folder empty: the second to write its log ends."""
    cfg = Config(output_dir=str(tmp_path), run_name="run")
    folders = [log.new_folder(cfg) for _ in range(2)]
    assert folders[0] == folders[1]
    (folders[0] / "log.txt").touch()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="File exists"):
        patch.setattr(log, "new_folder", lambda cfg: folders[1])
        train_gpt2.Log(cfg, {})


@pytest.mark.parametrize("env, words", [
    (dict(RANK="x"), "RANK=x in the environment is no number"),
    (dict(WORLD_SIZE="0"), "RANK=0 and WORLD_SIZE=0"),
    (dict(WORLD_SIZE="-1"), "WORLD_SIZE=-1 in the environment is no number"),
    (dict(RANK="2", WORLD_SIZE="2"), "RANK=2 and WORLD_SIZE=2"),
    (dict(WORLD_SIZE="2"), "no MASTER_ADDR"),
])
def test_an_odd_environment_is_one_line(shards, tmp_path, monkeypatch, env, words):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=re.escape(words)):
        run(tmp_path, **shards)
    assert not list(tmp_path.iterdir())


def test_a_process_that_never_comes_is_one_line():
    # Behind init_process_group torch._dynamo would leave threads: join_processes says more.
    code = ("import datetime, sys\n"
            "from support import processes\n"
            "processes.JOIN = datetime.timedelta(seconds=2)\n"
            "join = processes.dist.init_process_group\n"
            "def joins(*args, **more):\n"
            "    assert 'torch._dynamo' in sys.modules\n"
            "    join(*args, **more)\n"
            "processes.dist.init_process_group = joins\n"
            "import train_gpt2; train_gpt2.main(train_gpt2.parse(['--device=cpu']))")
    env = os.environ | dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29751")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "process 1 of 2: the others did not come within 2 s" in done.stderr.splitlines()[-1]


def test_what_was_being_written_is_swept(shards, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(5, patch)
        run(tmp_path, **shards)
    folder = next(tmp_path.iterdir())
    (folder / "model.pt.tmp").write_bytes(b"torn")
    run(tmp_path, **shards, resume="auto")
    assert not list(folder.glob("*.tmp"))


def test_a_weight_that_nothing_reads_is_no_fault(shards, tmp_path, monkeypatch):
    """It has no gradient. A mixer in the making may have such."""
    real = train_gpt2.GPT.__init__

    def __init__(self, cfg):
        real(self, cfg)
        self.spare = torch.nn.Parameter(torch.ones(3))

    monkeypatch.setattr(GPT, "__init__", __init__)
    _, folder = run(tmp_path, **shards)
    assert torch.equal(weights(folder)["model"]["spare"], torch.ones(3))


def test_a_shape_cut_late_is_compiled_from_the_first(shards, tmp_path, monkeypatch):
    """Where a later width needs pieces, the earlier ones are compiled in them, too."""
    seen = []

    def backward(forward, model, micro_batches, pieces, *rest):
        rows = len(micro_batches[0][0])
        seen.append((rows, pieces))
        return torch.zeros(()), max(pieces, 2 if rows == 4 else 1)

    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda x, y: None)
    _, pieces = compiled(GPT(Config(vocab_size=24)), backward, train_gpt2.shifted,
                         [(2, 8), (4, 8)], [], torch.device("cpu"), None, lambda line: None)
    assert pieces == 2 and {(2, 2), (4, 2)} <= set(seen)
