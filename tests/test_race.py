"""A race of two tiny arms end to end: order, numbers against hand values, going on, bad input."""
import argparse
import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

import bench
import race
import train_gpt2
from data.command import Stopped
from race import table, verdict
from scripts import gpu_check
from tests.runs import TINY

FLAGS = [word for name, value in TINY.items() if name not in ("mixer", "compile", "zero_init")
         for word in (f"--{name}", str(value))] + ["--mixer", "attn"]
ARMS = ["--control", "--mlp gelu", "--candidate", "--mlp=swiglu"]


def text(shards):
    return ["--input_bin", shards["input_bin"], "--input_val_bin", shards["input_val_bin"]]


@pytest.fixture
def inside(monkeypatch):
    """Runs in this process, which is quicker -> the flags of each, in order."""
    calls = []

    def call(flags):
        calls.append(flags)
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                train_gpt2.main(train_gpt2.parse(flags))
        except SystemExit as e:
            return 1, str(e)
        return 0, out.getvalue().strip()

    monkeypatch.setattr(race, "call", call)
    # Most of the time of such small runs.
    monkeypatch.setattr(train_gpt2.Log, "draw", lambda log: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    return calls


def names(calls):
    """The runs among calls, as VARIANT/sSEED."""
    return [f"{flags[flags.index('--output_dir') + 1].split('/')[-1]}/"
            f"{flags[flags.index('--run_name') + 1]}" for flags in calls if "--run_name" in flags]


# ---------------- numbers

def test_reach_is_linear_between_validations():
    points = [(1.0, 10.0, 4.0), (2.0, 30.0, 3.0), (4.0, 50.0, 2.0), (5.0, 60.0, 2.5)]
    assert verdict.reach(points, 3.5) == pytest.approx((1.5, 20.0))
    assert verdict.reach(points, 2.25) == pytest.approx((3.5, 45.0))
    assert verdict.reach(points, 3.0) == pytest.approx((2.0, 30.0))
    assert verdict.reach(points, 9.0) == (1.0, 10.0) and verdict.reach(points, 1.9) is None


def test_the_mean_curve_ends_where_the_runs_do():
    curves = [{10: (1, 5.0, 4.0), 20: (2, 10.0, 3.0), 25: (2.5, 12.0, 2.0)},
              {10: (1, 7.0, 5.0), 25: (2.5, 13.0, 4.0), 27: (2.7, 14.0, 3.0)}]
    assert verdict.mean_curve(curves) == [(1, 6.0, 4.5), (2.6, 13.0, 2.5)]


def test_seeds_to_settle():
    # d 0.1, sd 0.1. n = 17: 2 (2.0369 + 0.8530)^2 = 16.7; n = 16: 2 (2.0423 + 0.8538)^2 = 16.8
    assert verdict.seeds_to_settle([1.0, 1.1, 1.2], [1.1, 1.2, 1.3]) == 17
    # d 2, sd 0.1: n = 2: 2 (4.3027 + 1.0607)^2 / 400 = 0.14
    assert verdict.seeds_to_settle([1.0, 1.1, 1.2], [3.0, 3.1, 3.2]) == 2
    # d 0.2, sd 0.1: n = 5: 2 (2.3060 + 0.8889)^2 / 4 = 5.1, n = 6: 2 (2.2281 + 0.8791)^2 / 4 = 4.8
    assert verdict.seeds_to_settle([1.0, 1.1, 1.2], [1.2, 1.3, 1.4]) == 6
    # normal: 2 (1.9600 + 0.8416)^2 100 = 1569.8
    assert verdict.seeds_to_settle([1.0, 1.1, 1.2], [1.01, 1.11, 1.21]) == 1570
    assert verdict.seeds_to_settle([1.0, 1.2], [1.2, 1.0]) == float("inf")


def seeds(*losses):
    return {seed: verdict.Result(loss, 5, 7, {}, "", None, loss) for seed, loss in enumerate(losses)}


@pytest.mark.parametrize("losses, words", [
    ((1.4, 1.41, 1.42), "a ends 0.1000 below control: -0.1000 ± 0.0000, 3 seeds, p <0.001"),
    ((1.6, 1.61, 1.62), "a ends 0.1000 above control: +0.1000 ± 0.0000, 3 seeds, p <0.001"),
    ((1.5, 1.4, 1.45), "a ends level with control: -0.0600 ± 0.0321, 3 seeds, p 0.169"),
    ((1.52, 1.51, 1.5), "a ends level with control: +0.0000 ± 0.0115, 3 seeds, p 1.000"),
    ((1.0,), "a ends level with control: -0.5000 (n=1), 1 seed, p —; one seed settles nothing"),
])
def test_words_follow_the_numbers(losses, words):
    line = verdict.verdict("a", "control", dict(a=seeds(*losses), control=seeds(1.5, 1.51, 1.52)))
    assert line.startswith(words), line
    assert line.endswith("never at this difference") == (losses[0] == 1.52)


# ---------------- whole races

def test_rates_are_chosen_by_their_training_losses(monkeypatch):
    def run(arm, rate, seed, out, results, missing):
        found = verdict.Result(rate, 5, 7, {}, "", None, train=1 / rate)
        results.setdefault(arm.variant(rate), {})[seed] = found

    monkeypatch.setattr(race, "train", run)
    args = argparse.Namespace(seeds=2, rates=[0.1, 0.2, 0.05], out=None)
    best = race.race([race.read_arm("control", "--mlp gelu", FLAGS)], args)[2]
    assert best == {"control": "control_lr0.2"}


def test_a_race_with_rates_becomes_a_record(tmp_path, inside, monkeypatch, capsys):
    root = tmp_path / "repository"
    record = root / "records/2026-12-01_tiny"
    monkeypatch.setattr(table, "ROOT", root)
    command = [*ARMS, "--seeds", "2", "--rates", "0.003,0.03", *FLAGS, "--num_iterations", "20",
               "--val_loss_every", "10", "--out", str(tmp_path / "out")]
    race.main([*command, "--record", str(record)])
    said = capsys.readouterr().out
    # The grid is seed 0's, the best of it is another variant here: all seeds have it.
    order = ["control/s0", "candidate/s0", "control_lr0.03/s0", "candidate_lr0.03/s0"]
    order += ["control/s1", "candidate/s1", "control_lr0.03/s1", "candidate_lr0.03/s1"]
    assert names(inside) == order
    assert "warning: candidate has +" in said and "8 runs" in said
    page = (record / "README.md").read_text()
    results = {name: {seed: verdict.result(tmp_path / f"out/{name}/s{seed}") for seed in (0, 1)}
               for name in ("control", "candidate", "control_lr0.03", "candidate_lr0.03")}
    for pair in ("candidate", "control"), ("candidate_lr0.03", "control_lr0.03"):
        assert verdict.verdict(*pair, results) in said and verdict.verdict(*pair, results) in page
    assert page.startswith("# candidate ends ") and "<!-- table: control control_lr0.03 -->" in page
    # Five validations in the last quarter, where elsewhere is one in ten steps.
    assert list(results["control"][1].curve) == [10, 16, 18, 20]
    # Where the mean curve of control ends it has just reached the target.
    end = verdict.mean_curve([found.curve for found in results["control"].values()])[-1]
    assert f"| {end[0]:.4g} | {end[1]:.4g} |" in said
    assert re.search(r"\| control \|.*\| \d+MiB \| \d\.\d{4} \|", said)    # bits per byte
    assert os.access(record / "run.sh", os.X_OK)
    script = (record / "run.sh").read_text()
    assert '/../.."' in script and "--record" not in script and "'--mlp gelu'" in script
    check(monkeypatch, root)
    with pytest.raises(SystemExit, match="not what the logs say"):
        log = record / "control_s1.txt"
        log.write_text(log.read_text().replace("final val_loss:", "final val_loss:1"))
        check(monkeypatch, root)
    # All of it is there: nothing runs again.
    del inside[:]
    race.main(command)
    assert names(inside) == [] and verdict.verdict("candidate", "control", results) in \
        capsys.readouterr().out
    with pytest.raises(SystemExit, match="is of another race, --n_embd was 32, is 16"):
        race.main([*command, "--n_embd", "16"])
    with pytest.raises(SystemExit, match="is there already"):
        race.main([*command, "--record", str(record)])


def check(monkeypatch, root):
    (root / "README.md").touch()
    monkeypatch.setattr(sys, "argv", ["table.py", "--check"])
    table.runs.cache_clear()
    table.main()


def test_a_diverging_arm_is_one_line_and_the_others_run(shards, tmp_path, inside, capsys):
    record = tmp_path / "record"
    command = [*ARMS, "--more", "--learning_rate 1e38 --logit_softcap 0", "--seeds", "1",
               "--target", "0.5", *text(shards), *FLAGS,
               "--out", str(tmp_path / "out"), "--record", str(record)]
    with pytest.raises(SystemExit, match="missing: more1 s0: the same command with another"):
        race.main(command)
    said = capsys.readouterr().out
    assert names(inside) == ["control/s0", "candidate/s0", "more1/s0"]
    assert "Missing: more1 s0: step " in said and "lower the learning rates" in said
    assert "candidate ends level with control" in said and "more1 ends" not in said
    assert "No arm reaches the target, 0.5000." in said
    assert "Missing: more1 s0: step " in (record / "README.md").read_text()
    assert (record / "more1_s0_failed.txt").exists() and (record / "control_s0.txt").exists()


# The costs are left out: two processes less.
QUICK = ("import race; race.tell_cost = lambda *_: None; "
         "race.command.run(race.main, 'race.py', race.GOES_ON)")


def test_a_stopped_race_goes_on(shards, tmp_path, inside, capsys):
    command = [*ARMS, "--seeds", "1", *text(shards), *FLAGS, "--num_iterations", "150",
               "--val_loss_every", "150", "--save_every", "0",
               "--out", str(tmp_path)]
    first, second = (tmp_path / f"{name}/s0/log.txt" for name in ("control", "candidate"))
    process = subprocess.Popen([sys.executable, "-c", QUICK, *command], cwd=race.ROOT,
                               stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL,
                               env=os.environ | dict(OMP_NUM_THREADS="1"))
    deadline = time.monotonic() + 120
    while not (second.exists() and "step:5/" in second.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said.count("\n") == 1 and "the same command" in said
    kept = first.stat().st_mtime_ns
    assert verdict.result(first.parent) and not verdict.result(second.parent)
    race.main(command)
    assert names(inside) == ["candidate/s0"] and first.stat().st_mtime_ns == kept
    assert "goes on from step " in second.read_text() and verdict.result(second.parent)
    assert "candidate ends level with control" in capsys.readouterr().out


def test_a_run_killed_before_its_first_checkpoint_starts_again(shards, tmp_path, inside,
                                                              monkeypatch):
    command = [*ARMS, "--seeds", "1", *text(shards), *FLAGS, "--minutes", "0.005",
               "--out", str(tmp_path), "--record", str(tmp_path / "record")]
    real = race.call

    def stop(flags):
        if "candidate" in " ".join(flags):
            (tmp_path / "candidate/s0").mkdir(parents=True)
            (tmp_path / "candidate/s0/log.txt").write_text("=== con")
            raise Stopped(2)
        return real(flags)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(race, "call", stop)
        race.main(command)
    race.main(command)
    assert names(inside) == ["control/s0", "candidate/s0"]
    control, candidate = (verdict.result(tmp_path / f"{name}/s0").curve
                          for name in ("control", "candidate"))
    # Equal time, however many steps.
    assert max(control) > 5 and control[max(control)][1] == pytest.approx(0.3, abs=0.2)
    assert candidate[max(candidate)][1] == pytest.approx(0.3, abs=0.2)
    assert "| candidate |" in (tmp_path / "record/README.md").read_text()


# ---------------- the check of a GPU, whose steps do not run here

@pytest.mark.parametrize("tiny", [False, True])
def test_every_command_of_the_gpu_check_parses(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(gpu_check, "RECIPES", ("run_attn.sh", "run_neollm.sh", "run_fftnet.sh"))
    args = argparse.Namespace(device="cpu", tiny=tiny)
    steps = {step.name: step for step in gpu_check.plan(args, tmp_path / "text", tmp_path)}
    flags = {name: step.command[2:] for name, step in steps.items()}
    recipes = [train_gpt2.parse(flags[name]) for name in flags if name.startswith("recipe_")]
    assert [cfg.mixer for cfg in recipes] == ["attn", "gdn,gdn,gdn,fan", "fftnet"]
    assert {cfg.num_iterations for cfg in recipes} == {3 if tiny else 20}
    assert recipes[0].n_layer == (4 if tiny else 12) and recipes[0].sequence_length >= 32
    control, hybrid = (train_gpt2.parse(shlex.split(flags[name][0].removeprefix("--profile=")))
                       for name in ("profile_control", "profile_hybrid"))
    assert control.short_conv and hybrid.mixer == "afno,afno,afno,attn"
    assert control.vocab_size == 50257
    bench.parse(flags["bench"])
    arms = race.read_arms(*race.arguments(flags["race"]))
    assert [arm.cfg.mixer for arm in arms] == ["attn", "attn", "afno,afno,afno,attn"]
    assert [arm.cfg.optim for arm in arms] == [*["muon" if tiny else "adamw"], "muon", "muon"]
    assert {arm.cfg.grad_accumulation_steps for arm in arms} == {1}
    assert sum(step.seconds for step in steps.values() if "recipe" not in step.name) < 540


def test_a_step_that_fails_or_hangs_is_noted(tmp_path):
    ends = [gpu_check.take(gpu_check.Step("step", 1, [sys.executable, "-c", code]), 1, tmp_path)
            for code in ("print(1)", "raise SystemExit(3)", "import time; time.sleep(60)")]
    assert ends == ["ok", "failed, exit code 3", "ended after its 1 s"]


@pytest.mark.parametrize("flags, words", [
    (["--control", "", "--candidate", "--mixr fan"], "candidate '--mixr fan': unrecognized"),
    (["--control", "", "--candidate", "--mlp 'gelu"], "No closing quotation"),
    (["--control", "--mlp gelu", "--candidate", "--mlp=gelu"], "control and candidate are equal"),
    (["--control", ""], "required: --candidate"),
    ([*ARMS, "--seeds", "0"], "--seeds 0: at least 1"),
    ([*ARMS, "--target", "-1"], "--target -1.0"),
    ([*ARMS, "--rates", "0.1,x"], "--rates"),
    ([*ARMS, "--rates", "0.1,0"], "--rates"),
    ([*ARMS, "--rates", "0.1", "--train_loss_every", "90"], "lower --train_loss_every 90"),
    ([*ARMS, "--seed", "3"], "--seed is what the race sets"),
    ([*ARMS, "--more", "--val_tokens 4096"], "--val_tokens differs between control and more1"),
    ([*ARMS, "--data", "/nowhere"], "/nowhere"),
], ids=str)
def test_bad_input_is_one_line_before_anything_runs(flags, words, tmp_path, inside, monkeypatch):
    monkeypatch.setattr(race, "race", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as e:
        race.main([*flags, "--mixer", "attn", "--out", str(tmp_path / "out")])
    said = str(e.value)
    assert words in said and said.startswith("race.py: ") and "\n" not in said
    assert not (tmp_path / "out").exists() and names(inside) == []
