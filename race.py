"""A race of settings over the same text: arms in turn, seed by seed, and what the numbers say.

    python race.py --control "--mixer attn --short_conv" --candidate "--mixer afno"
    python race.py --control "--mixer attn" --candidate "" --rates 0.01,0.02,0.035 --minutes 10
    python race.py --control "" --candidate "--mlp gelu" --record records/2026-12-01_gelu

Other flags are train_gpt2.py's, for all arms: --minutes M is a race over equal time. Arms run
alternately, control s0, candidate s0, control s1, ..., each run in a process of its own, in
OUT/VARIANT/sSEED. The same command goes on where it was stopped: finished runs are kept.

--rates: on seed 0 alone every arm also runs at each of these rates, Muon's where it has Muon, else
AdamW's. The best, its own rate counts, then runs with all seeds: ARM_lrRATE. It is chosen by the
mean training loss of the last quarter, for to choose by the validation tokens would flatter it.

Losses are in nats per token. Tokens and seconds to the target are linear between validations of
the seeds' mean curve, which ends where the runs do; in the last quarter these are five times as
many. An arm is below or above the control where Welch's test has p <= 0.05, else level with it.
"""
import argparse
import math
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from data import command
from support.checkpoint import FREE, LAST
from support.machine import duration
from train_gpt2 import ROOT, Config, parse

# Scripts, which import one another by their names.
sys.path.append(str(ROOT / "records"))
import table
import verdict

# What the race sets itself, what arms must have in common, and what goes on as it is.
OWN = "seed", "output_dir", "run_name", "resume", "estimate"
COMMON = "data", "input_bin", "input_val_bin", "batches", "val_tokens", "minutes"
ANY = FREE - set(COMMON)
# Read from the shards where they have these values.
FROM_SHARDS = {"vocab_size": 0, "document_token": -1}
GOES_ON = "the same command goes on, finished runs are kept"


class Arm(NamedTuple):
    name: str
    text: str            # its own flags, as they were given
    flags: list          # all, those of every arm first
    cfg: Config

    @property
    def knob(self) -> str:
        """The field that --rates is about."""
        return "muon_learning_rate" if self.cfg.optim == "muon" else "learning_rate"

    @property
    def rate(self) -> float:
        return getattr(self.cfg, self.knob)

    def variant(self, rate: float) -> str:
        return self.name if rate == self.rate else f"{self.name}_lr{rate:g}"

    def at(self, rate: float, seed: int, out: Path) -> list:
        """The trainer's flags of one run."""
        own = [] if rate == self.rate else [f"--{self.knob}", f"{rate:g}"]
        return [*self.flags, *own, "--seed", str(seed), "--output_dir",
                str(out / self.variant(rate)), "--run_name", f"s{seed}"]


def fail(message: str):
    raise SystemExit(f"race.py: {message}")


# --------------------------------------------------------------------------------------------------
# What is asked for

def numbers(text: str) -> list[float]:
    found = [float(word) for word in text.split(",")]
    if not all(0 < rate < math.inf for rate in found):
        raise ValueError
    return found


def arguments(argv: list[str]):
    """-> (what the race is told, the flags of all arms)"""
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message} (--help lists the flags)")
    p.add_argument("--control", required=True, metavar="FLAGS", help="quoted, '' for none")
    p.add_argument("--candidate", required=True, metavar="FLAGS")
    p.add_argument("--more", action="append", default=[], metavar="FLAGS", help="a further arm")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="default: 3")
    p.add_argument("--rates", type=numbers, default=[], metavar="X,Y,...")
    p.add_argument("--target", type=float, metavar="LOSS", help="default: the control's mean loss")
    p.add_argument("--out", type=Path, default=Path("logs/race"), help="default: %(default)s")
    p.add_argument("--record", type=Path, metavar="FOLDER", help="write a record there at the end")
    joined = []
    for word in argv:
        # argparse takes no value that begins with a dash.
        if joined and joined[-1] in ("--control", "--candidate", "--more"):
            word = f"{joined.pop()}={word}"
        joined.append(word)
    args, shared = p.parse_known_args(joined)
    if args.seeds < 1:
        fail(f"--seeds {args.seeds}: at least 1, and 3 for a claim")
    if args.target is not None and not 0 < args.target < math.inf:
        fail(f"--target {args.target}: a loss in nats per token is above 0")
    if args.record and args.record.exists():
        fail(f"--record {args.record}: is there already: name another")
    return args, shared


def read_arm(name: str, text: str, shared: list[str]) -> Arm:
    """SystemExit with one line for flags that the trainer refuses."""
    try:
        flags = [*shared, *shlex.split(text)]
        cfg = parse(flags)
        every = max(1, (cfg.val_loss_every or cfg.num_iterations // 20) // 5)
        if not cfg.val_tail_every:
            flags += ["--val_tail_every", str(every)]
    except (SystemExit, ValueError) as e:
        fail(f"{name} {text!r}: {str(e).split('error: ')[-1]}")
    for field in OWN:
        if getattr(cfg, field) != getattr(Config, field):
            fail(f"{name}: --{field} is what the race sets: drop it (--out says where runs are)")
    return Arm(name, text, flags, cfg)


def read_arms(args, shared: list[str]) -> list[Arm]:
    texts = {"control": args.control, "candidate": args.candidate}
    texts |= {f"more{i}": text for i, text in enumerate(args.more, 1)}
    arms = [read_arm(name, text, shared) for name, text in texts.items()]
    for i, arm in enumerate(arms):
        for other in arms[:i]:
            if arm.cfg == other.cfg:
                fail(f"{other.name} and {arm.name} are equal: nothing would be compared")
        for field in COMMON:
            if getattr(arm.cfg, field) != getattr(arms[0].cfg, field):
                fail(f"--{field} differs between control and {arm.name}, their losses would not "
                     "compare: give it once, outside the quotes")
        lines = arm.cfg.num_iterations // arm.cfg.train_loss_every
        if args.rates and not arm.cfg.minutes and lines < 16:
            fail("--rates compares training losses of the last quarter, at least four lines: lower "
                 f"--train_loss_every {arm.cfg.train_loss_every}")
        for rate in {arm.rate, *args.rates}:
            for seed in range(args.seeds):
                refuse_other(arm, rate, seed, args.out)
    return arms


def refuse_other(arm: Arm, rate: float, seed: int, out: Path):
    """SystemExit where the folder of a run holds one of other flags."""
    folder = out / arm.variant(rate) / f"s{seed}"
    if not (folder / LAST).exists() and not verdict.result(folder):
        return
    there = table.read(folder / "log.txt")[1]
    for name, value in asdict(parse(arm.at(rate, seed, out))).items():
        as_read = name in FROM_SHARDS and value == FROM_SHARDS[name]
        if name not in ANY and not as_read and there.get(name) != value:
            fail(f"{folder} is of another race, --{name} was {there.get(name)}, is {value}: "
                 "remove it, or choose another --out")


def tell_cost(arms: list[Arm], args):
    """Print what the race costs. SystemExit where an arm could not start."""
    params, seconds = {}, {}
    for arm in arms:
        code, said = call([*arm.flags, "--estimate"])
        if code:
            fail(f"{arm.name}: {said.splitlines()[-1]}")
        # Of two lines of one name the first.
        facts = {line[:14].strip(): line[15:] for line in reversed(said.splitlines())}
        params[arm.name] = int(facts["parameters"].split()[0].replace(",", ""))
        if arm.cfg.minutes:
            seconds[arm.name] = 60 * arm.cfg.minutes
            length = f"{arm.cfg.minutes:g} minutes"
        else:
            tokens = int(facts["tokens"].split()[0].replace(",", ""))
            rate = re.search(r"([\d,]+) tokens/s", facts.get("time", ""))
            seconds[arm.name] = tokens / int(rate[1].replace(",", "")) if rate else 0
            length = f"{tokens:,} tokens"
        print(f"{arm.name:10} {params[arm.name]:,} parameters, {length}, {facts['memory']}")
    for arm in arms:
        apart = params[arm.name] / params["control"] - 1
        if abs(apart) > 0.02:
            print(f"warning: {arm.name} has {apart:+.1%} parameters against control")
    others = {arm.name: len({*args.rates} - {arm.rate}) for arm in arms}
    runs = {name: args.seeds + n + (args.seeds - 1) * bool(n) for name, n in others.items()}
    total = sum(runs[name] * seconds[name] for name in runs)
    print(f"{'at most ' if args.rates else ''}{sum(runs.values())} runs, about {duration(total)} "
          "of training, a guess, and validation and compiling besides", flush=True)


# --------------------------------------------------------------------------------------------------
# The runs

def call(flags: list[str]) -> tuple[int, str]:
    """train_gpt2.py as a process -> its exit code, and what it said last: stderr if it failed.

    It is asked to save and end where we are stopped; a terminal's signals reach us alone.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([sys.executable, str(ROOT / "train_gpt2.py"), *flags],
                                   stdout=out, stderr=errors, start_new_session=True)
        try:
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        told = errors if process.returncode else out
        told.seek(0)
        text = told.read().decode(errors="replace").strip()
    return process.returncode, text or f"exit code {process.returncode}"


def train(arm: Arm, rate: float, seed: int, out: Path, results: dict, missing: dict):
    """One run, or the rest of it, into results {variant: {seed: Result}} or missing {run: why}."""
    name = arm.variant(rate)
    run = f"{name} s{seed}"
    folder = out / name / f"s{seed}"
    if seed in results.get(name, ()) or run in missing:
        return
    if not verdict.result(folder):
        flags = arm.at(rate, seed, out)
        if (folder / LAST).exists():
            flags += ["--resume", str(folder)]
        elif folder.exists():
            # Killed before its first checkpoint.
            shutil.rmtree(folder)
        print(f"{run}: {folder / 'log.txt'}", flush=True)
        code, said = call(flags)
        if code:
            missing[run] = said.splitlines()[-1]
            print(f"{run}: failed: {missing[run]}", flush=True)
            return
    found = verdict.result(folder)
    results.setdefault(name, {})[seed] = found
    print(f"{run}: {found.loss:.4f}", flush=True)


def race(arms: list[Arm], args):
    """-> results {variant: {seed: Result}}, missing {run: why}, best {arm: its best variant}"""
    results, missing = {}, {}
    best = {arm.name: arm.rate for arm in arms}
    for seed in range(args.seeds):
        for rate_of in ({arm.name: arm.rate for arm in arms}, best):
            for arm in arms:
                train(arm, rate_of[arm.name], seed, args.out, results, missing)
        if seed:
            continue
        for rate in args.rates:
            for arm in arms:
                train(arm, rate, seed, args.out, results, missing)
        for arm in arms:
            ran = [rate for rate in (arm.rate, *args.rates) if arm.variant(rate) in results]
            best[arm.name] = min(ran, default=arm.rate,
                                 key=lambda rate: results[arm.variant(rate)][seed].train)
    return results, missing, {arm.name: arm.variant(best[arm.name]) for arm in arms}


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    args, shared = arguments(argv)
    arms = read_arms(args, shared)
    tell_cost(arms, args)
    results, missing, best = race(arms, args)
    said = verdict.verdicts(arms, results, best)
    rest = verdict.report(args, results, missing, best)
    print("\n".join(["", *said, "", rest]))
    if args.record and results:
        verdict.write(args, argv, arms, results, missing, best, said, rest)
        print(args.record)
    if missing:
        again = "the same command with another --record" if args.record else "the same command"
        fail(f"missing: {', '.join(missing)}: {again} tries them again")


if __name__ == "__main__":
    command.run(main, "race.py", GOES_ON)
