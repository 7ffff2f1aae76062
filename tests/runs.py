"""Whole small runs of main(), in this process or in several, and what their folders say."""
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from support import processes
from support.shards import open_shards
from tests.checks import small
from train_gpt2 import GPT, ROOT, Config, Windows, evaluate, main

TINY = dict(n_layer=2, n_head=2, n_embd=32, sequence_length=16, batch_size=8, val_batch_size=3,
            val_tokens=7 * 16, num_iterations=5, warmup_iters=0, warmdown_iters=0,
            train_loss_every=1, val_loss_every=2, mixer="attn", optim="adamw", learning_rate=0.003,
            embed_lr_scale=1.0, head_lr_scale=1.0, zero_init=True, device="cpu", compile=False)
STEP = re.compile(r"step:(\d+)/(\d+) (train|val)_loss:(\d+\.\d{4}) train_time:(\d+)ms "
                  r"step_avg:(\d+\.\d\d)ms( tok/s:\d+ grad_norm:\d+\.\d+)?( mfu:0\.\d+)?( bits_per_byte:.*)?")


def knobs_of(row, **knobs):
    return dict(mixer=row) | small(row) | knobs


def train(out, **knobs):
    """-> (final validation loss, the run's folder)"""
    loss = main(Config(**TINY | dict(output_dir=str(out)) | knobs))
    return loss, max(out.iterdir(), key=lambda d: d.stat().st_mtime_ns)


def _process(rank, n, port, config, fault):
    """One of n that torchrun would start."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                       MASTER_ADDR="localhost", MASTER_PORT=str(port))
    fault()
    _train(config)


def _train(config):
    torch.set_num_threads(1)
    processes.BUCKET = 8192                                  # so that a tiny model has several
    main(Config(**config))
    # A thread of gloo's that outlives main may abort the process, when Python is gone beneath it.
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in names if "gloo" in name], names


def _node(node, nodes, n, port, config):
    """What `torchrun --nnodes` does on one of the machines, with forks for its new Pythons."""
    launch = LaunchConfig(min_nodes=nodes, max_nodes=nodes, nproc_per_node=n, run_id="none",
                          rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{port}",
                          rdzv_configs={"rank": node}, start_method="fork", max_restarts=0)
    elastic_launch(launch, _train)(config)


def nothing():
    pass


def train_in_processes(n, out, nodes=1, fault=nothing, **knobs):
    """The same by n processes on each of so many machines -> the run's folder.

    Forked from a server that has imported torch once and trained nothing: a fifth of the time that
    torchrun takes, which other tests start. fault: what each of them does first, on one machine.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.runs", "torch._dynamo"])
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    config = TINY | dict(output_dir=str(out)) | knobs
    function, count, arguments = _process, n, (n, port, config, fault)
    if nodes > 1:
        function, count, arguments = _node, nodes, (nodes, n, port, config)
    torch.multiprocessing.start_processes(function, arguments, count, start_method="forkserver")
    return next(out.iterdir())


def steps(folder, kind):
    """The train or validation losses of a log."""
    lines = (folder / "log.txt").read_text().split("\n=== run\n", 1)[1].splitlines()
    return [float(m[4]) for m in map(STEP.fullmatch, lines) if m and m[3] == kind]


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def same_run(a, b, tolerance):
    """Two runs that should differ in rounding only; losses are printed with four decimals."""
    for kind in ("train", "val"):
        assert steps(a, kind) == pytest.approx(steps(b, kind), abs=1.01e-4)
    for (name, p), q in zip(weights(a)["model"].items(), weights(b)["model"].values()):
        assert torch.allclose(p, q, atol=tolerance), name


def checkpoint_loss(folder, batch=3):
    """The validation loss of a saved model, read as another program would."""
    saved = weights(folder)
    cfg = Config(**saved["config"] | dict(shuffle=False, val_batch_size=batch))
    model = GPT(cfg)
    model.load_state_dict(saved["model"])
    windows = Windows(open_shards(cfg.input_val_bin)[0], cfg)
    return evaluate(model, windows, 7, torch.device("cpu"), 0, 1)


RECIPES = ("run_afno.sh", "run_attn.sh", "run_fan.sh", "run_neollm.sh", "run_fftnet.sh",
           "run_nanoformer.sh", "run_nanoformer.sh diff", "run_nanoformer.sh diff_v2",
           "run_nanoformer.sh ngpt")


def recipe(name, kind="EMBEDDED"):
    """"SCRIPT [--mixer of it]" -> the flags in the script's RACE or EMBEDDED, without running it."""
    script, *mixer = name.split()
    read = f"""
        python={sys.executable}
        source() {{ [[ $1 == */run_race.sh ]] && printf '%s\\n' "${{{kind}[@]}}"; :; }}
        . ./{script} {"--mixer" if mixer else ""} {"".join(mixer)}
    """
    done = subprocess.run(["bash", "-c", read], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()
