"""Our trainer and nanoGPT's on a CPU: steps in turn, and both small recipes to their ends.

    python scripts/versus_nanogpt.py steps             # pairs of whole steps, at four sizes
    python scripts/versus_nanogpt.py steps --pos learned       # ours with other flags
    python scripts/versus_nanogpt.py mixers            # AFNO against our attention, in turn, by T
    python scripts/versus_nanogpt.py face --threads 2  # nanoGPT's CPU recipe, then run_afno.sh's

Steps are those of train_gpt2.main itself, data, checks and log among them; only validation is
apart. Two trainers take turns step by step, so a busy machine slows both. nanoGPT is the twin in
tests/nanogpt.py. A ratio above 1: the first of the two is faster.
"""
import argparse
import contextlib
import io
import math
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt2
from scripts.gpu_check import short
from support.machine import keep_memory
from tests.nanogpt import NanoGPT, Trainer
from tests.runs import recipe

# Layers, heads, channels, vocabulary, tokens, rows, pairs
SIZES = {
    "0.8M, T 64": (4, 4, 128, 256, 64, 12, 300),
    "0.8M, T 256": (4, 4, 128, 256, 256, 12, 100),
    "30M, T 256": (6, 6, 384, 50304, 256, 4, 20),
    "67M, T 1024": (13, 8, 512, 50304, 1024, 1, 12),
}
TOKENS = 600_000
# Steps that start a run, and are not counted.
WARMING = 5


def in_turn(contenders, pairs: int) -> dict:
    """{name: run(turn)} -> {name: seconds of each step}. A run calls turn() as a step begins."""
    batons = [threading.Semaphore(0) for _ in contenders]
    seconds = {name: [] for name in contenders}
    failed = []

    def hold(i, name, run):
        began = None

        def turn():
            nonlocal began
            if began is not None:
                seconds[name].append(time.perf_counter() - began)
            batons[(i + 1) % len(batons)].release()
            batons[i].acquire()
            began = time.perf_counter()

        batons[i].acquire()
        try:
            run(turn)
        except BaseException as e:
            failed.append(e)
        for baton in batons:
            # Whoever is left goes on by itself.
            baton.release(WARMING + pairs + 2)

    threads = [threading.Thread(target=hold, args=(i, name, run))
               for i, (name, run) in enumerate(contenders.items())]
    for thread in threads:
        thread.start()
    batons[0].release()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return {name: times[WARMING:WARMING + pairs] for name, times in seconds.items()}


def ours(flags: list[str], folder: Path, steps: int):
    """train_gpt2's own loop as a contender: its steps begin with the schedule."""
    cfg = train_gpt2.parse([
        *flags, "--data", str(folder), "--output_dir", str(folder), "--num_iterations", str(steps),
        "--val_loss_every", "0", "--save_every", "0", "--val_tokens", "2048",
        "--val_batch_size", "1", "--train_loss_every", "10"])

    def run(turn):
        TURNS.turn = turn
        # Signals are the main thread's.
        train_gpt2.train(cfg, SimpleNamespace(caught=0, listen=lambda: None))

    return run


TURNS = threading.local()


def theirs(trainer: Trainer, steps: int):
    def run(turn):
        for number in range(steps):
            turn()
            trainer.step(number)

    return run


def wait_at_each_step():
    """From here on a step of train_gpt2 waits for its turn, in threads that have one."""
    schedule = train_gpt2.set_schedule

    def set_schedule(*args):
        if hasattr(TURNS, "turn"):
            TURNS.turn()
        return schedule(*args)

    train_gpt2.set_schedule = set_schedule


def compare(title: str, contenders, pairs: int):
    """Print the ratio of throughputs, first to second, and its error by pairs."""
    with contextlib.redirect_stdout(io.StringIO()):
        seconds = in_turn(contenders, pairs)
    (first, a), (second, b) = seconds.items()
    logs = [math.log(y / x) for x, y in zip(a, b)]
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    medians = statistics.median(b) / statistics.median(a)
    print(f"{title:14}{first} {1e3 * statistics.median(a):8.1f} ms   {second} "
          f"{1e3 * statistics.median(b):8.1f} ms   ratio of medians {medians:.3f}, of pairs "
          f"{math.exp(statistics.mean(logs)):.3f} ± {error:.3f}, n {len(logs)}", flush=True)


def random_shards(folder: Path, vocab: int):
    header = np.zeros(256, np.int32)
    header[:4] = 20240520, 1, TOKENS, vocab
    tokens = np.random.default_rng(0).integers(vocab, size=TOKENS).astype(np.uint16)
    for name, text in (("train", tokens), ("val", tokens[::-1])):
        (folder / f"{name}.bin").write_bytes(header.tobytes() + text.tobytes())
    return tokens


def steps(more):
    for title, (L, H, C, V, T, B, pairs) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            tokens = random_shards(Path(folder), V)
            n = WARMING + pairs + 1
            sizes = f"--n_layer {L} --n_head {H} --n_embd {C} --sequence_length {T} --batch_size {B}"
            flags = [*short("run_attn.sh", False, *sizes.split()), *more]
            model = NanoGPT(L, H, C, V, T)
            runs = {"ours": ours(flags, Path(folder), n),
                    "nanoGPT": theirs(Trainer(model, tokens, B, T), n)}
            compare(title, runs, pairs)


def mixers(more):
    for T in (256, 512, 1024):
        with tempfile.TemporaryDirectory() as folder:
            random_shards(Path(folder), 256)
            pairs = 60 * 256 // T
            n = WARMING + pairs + 1
            flags = [*more, "--sequence_length", str(T), "--batch_size", "8", "--mixer"]
            runs = {"afno": ours([*flags, "afno"], Path(folder), n),
                    "attention": ours([*flags, "attn", "--short_conv"], Path(folder), n)}
            compare(f"0.9M, T {T}", runs, pairs)


@torch.no_grad()
def loss_on(model: NanoGPT, tokens: np.ndarray, T: int) -> float:
    """Mean over all windows of T, nats per token."""
    n = (len(tokens) - 1) // T
    rows = torch.from_numpy(tokens[:n * T].astype(np.int64)).view(n, T)
    targets = torch.from_numpy(tokens[1:n * T + 1].astype(np.int64)).view(n, T)
    parts = [model(x, y) * len(x) for x, y in zip(rows.split(64), targets.split(64))]
    return float(sum(parts)) / n


def crossing(curve, target: float) -> float:
    """[(seconds, loss)] -> when the straight line between two validations meets the target.

    Loss falls ever more slowly, so this is late rather than early. inf if it never does.
    """
    for (s0, l0), (s1, l1) in zip(curve, curve[1:]):
        if l1 <= target:
            return s0 + (s1 - s0) * (l0 - target) / (l0 - l1)
    return math.inf


def face(more):
    """Seconds of training, validation apart, until 1.8857; nanoGPT's may end above it."""
    texts = [np.fromfile(train_gpt2.ROOT / f"data/tinyshakespeare/{name}.bin", np.uint16)[512:]
             for name in ("train", "val")]
    letters = np.unique(texts[0])
    train, val = (np.searchsorted(letters, text).astype(np.uint16) for text in texts)
    torch.manual_seed(1337)
    model = NanoGPT(4, 4, 128, len(letters), 64)
    trainer = Trainer(model, train, 12, 64)
    seconds = 0.0
    curve = []
    for number in range(2000):
        began = time.perf_counter()
        trainer.step(number)
        seconds += time.perf_counter() - began
        if number % 50 == 49 and number >= 999:
            curve.append((seconds, loss_on(model, val, 64)))
    theirs = crossing(curve, 1.8857)
    print(f"nanoGPT's CPU recipe: {curve[-1][1]:.4f} after {seconds:.1f} s; 1.8857 "
          + (f"after {theirs:.1f} s" if theirs < math.inf else "not reached"), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cfg = train_gpt2.parse([*recipe("run_afno.sh", "EMBEDDED"), "--output_dir", folder,
                                "--val_loss_every", "25", *more])
        with contextlib.redirect_stdout(io.StringIO()) as out:
            train_gpt2.main(cfg)
    lines = out.getvalue().splitlines()
    found = [re.search(r"val_loss:([\d.]+) train_time:(\d+)ms", line) for line in lines]
    ours = crossing([(int(m[2]) / 1000, float(m[1])) for m in found if m], 1.8857)
    final = [line for line in lines if line.startswith("final")][0]
    print(f"run_afno.sh: {final}\n1.8857 after {ours:.1f} s: "
          f"{min(theirs, seconds) / ours:.1f} times sooner")


MODES = {"steps": steps, "mixers": mixers, "face": face}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    # Other flags are train_gpt2.py's, for our side.
    args, more = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    # As train_gpt2.py does; nanoGPT is to have it from its first step, too.
    keep_memory(torch.device("cpu"))
    print(f"{args.mode}: {args.threads} threads, torch {torch.__version__}")
    wait_at_each_step()
    MODES[args.mode](more)
