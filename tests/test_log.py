"""What a run leaves and shows: metrics.csv, test_metrics.txt, loss.png, trackers, the terminal,
and runs that end by the clock.
"""
import csv
import io
import math
import os
import shutil
import signal
import struct
import sys
import time
from itertools import pairwise

import pytest
import torch

from support import trackers
from support.log import METRICS, Log, short
from support.metrics import per_byte
from support.shards import bytes_a_token, open_shards
from tests.runs import checkpoint_loss, steps, train, weights
from train_gpt2 import GPT, Config, Watch, Windows, main, place, rate_share


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_metrics_are_the_log(shards, tmp_path):
    _, folder = train(tmp_path, **shards, grad_clip=0.1)
    rows = metrics(folder)
    assert tuple(rows[0]) == METRICS
    for kind in ("train", "val"):
        told = [float(row[f"{kind}_loss"]) for row in rows if row[f"{kind}_loss"]]
        assert told == pytest.approx(steps(folder, kind), abs=1e-4)
    training = [row for row in rows if row["train_loss"]]
    assert [int(row["step"]) for row in training] == [1, 2, 3, 4, 5]
    assert [int(row["tokens"]) for row in training] == [128, 256, 384, 512, 640]
    assert all(float(a["seconds"]) < float(b["seconds"]) for a, b in pairwise(training))
    # No warm-up and no warm-down; the norm is that before clipping.
    assert {float(row["learning_rate"]) for row in training} == {0.003}
    assert all(float(row["gradient_norm"]) > 0.1 for row in training)
    # 24 tokens that nobody counted the bytes of
    assert not any(row["bits_per_byte"] for row in rows)


def test_the_norm_is_that_of_all_gradients():
    model = torch.nn.Linear(3, 2)
    model(torch.randn(4, 3)).square().sum().backward()
    watch = Watch(model, 0, 0.0, print)
    watch.look(1, torch.tensor(1.0), torch.zeros(2))
    whole = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert watch.gradient_norm() == pytest.approx(float(whole), rel=1e-6)


def test_a_resumed_run_has_each_row_once(shards, tmp_path):
    settings = dict(**shards, run_name="it", save_every=2, keep=9)
    train(tmp_path, **settings)
    whole = metrics(tmp_path / "it")
    shutil.copy(tmp_path / "it" / "model_0000002.pt", tmp_path / "it" / "model.pt")
    train(tmp_path, **settings, resume=str(tmp_path / "it"))
    again = metrics(tmp_path / "it")
    assert [row["step"] for row in again] == [row["step"] for row in whole]
    assert [row["train_loss"] for row in again] == [row["train_loss"] for row in whole]


def test_files_that_were_cut_off_end_no_resume(shards, tmp_path):
    """As a full disk leaves them."""
    settings = dict(**shards, run_name="it", save_every=2, keep=9)
    _, folder = train(tmp_path, **settings)
    whole = metrics(folder)
    shutil.copy(folder / "model_0000004.pt", folder / "model.pt")
    sources = (folder / "sources.txt.gz").read_bytes()
    (folder / "sources.txt.gz").write_bytes(sources[:1000])
    table = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(table[:table.index("\n4,") + 5])
    train(tmp_path, **settings, resume=str(folder))
    again = metrics(folder)
    assert [row["step"] for row in again] == [row["step"] for row in whole if row["step"] != "4"
                                              or row["val_loss"]]
    # whole beside the torn ones
    assert [path.read_bytes() for path in folder.glob("sources_*.txt.gz")] == [sources]


def test_test_metrics(shards, tmp_path):
    loss, folder = train(tmp_path, **shards, val_tokens=10**6)
    said = dict(line.split() for line in (folder / "test_metrics.txt").read_text().splitlines())
    saved = weights(folder)
    cfg = Config(**saved["config"] | dict(shuffle=False))
    model = GPT(cfg)
    model.load_state_dict(saved["model"])
    windows = Windows(open_shards(cfg.input_val_bin)[0], cfg)
    rows = torch.from_numpy(windows.read(range(len(windows))))
    hits = model(rows[:, :-1]).argmax(-1) == rows[:, 1:]
    assert float(said["accuracy"]) == pytest.approx(hits.float().mean().item(), abs=1e-5)
    assert 0.04 < float(said["accuracy"]) < 1
    assert float(said["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(said["perplexity"]) == pytest.approx(math.exp(loss), rel=1e-5)
    assert "bits_per_byte" not in said


def test_bits_per_byte():
    counted = {"a": torch.zeros(8)}
    counted["a"].text_bytes = 32
    assert bytes_a_token(counted) == 4
    assert bytes_a_token({"a": torch.zeros(8)}) is None
    assert bytes_a_token(counted | {"b": torch.zeros(8)}) is None
    assert per_byte(math.log(2) * 6, 4) == {"bits_per_byte": pytest.approx(1.5)}
    assert per_byte(1.0, None) == {}


# --------------------------------------------------------------------------------------------------
# By the clock

def test_minutes(shards, tmp_path, capsys):
    # A hundredth of a minute is more than the four steps of num_iterations, on a busy machine too.
    main(Config(**shards, n_layer=1, n_embd=32, sequence_length=16, batch_size=2, val_tokens=64,
                num_iterations=4, minutes=0.01, train_loss_every=1, output_dir=str(tmp_path),
                device="cpu", run_name="it"))
    rows = metrics(tmp_path / "it")
    training = [row for row in rows if row["train_loss"]]
    seconds = float(rows[-1]["seconds"])
    assert 0.6 <= seconds < 0.6 + 5 * seconds / len(training)
    assert len(training) > 4
    assert float(training[-1]["learning_rate"]) < 0.4 * 0.003
    assert "0.01 minutes of" in capsys.readouterr().out
    assert weights(tmp_path / "it")["step"] == len(training)


def test_a_signal_ends_a_run_by_the_clock_at_any_step(shards, tmp_path, monkeypatch):
    def measure(it, step, **values):
        if step == 30:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Log, "measure", measure)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, **shards, num_iterations=20, val_loss_every=0, minutes=0.05)
    assert stop.value.code == 130 and 30 < weights(next(tmp_path.iterdir()))["step"] < 35


def test_a_schedule_in_time_is_that_in_steps():
    cfg = Config(num_iterations=100, minutes=10, warmup_iters=10, warmdown_iters=50)
    by_steps = Config(num_iterations=100, warmup_iters=10, warmdown_iters=50)
    for share in (0, 0.05, 0.3, 0.75, 0.99):
        where = place(7, 600 * share, cfg)
        assert where == pytest.approx(100 * share)
        assert rate_share(where, cfg) == pytest.approx(rate_share(100 * share, by_steps))
    assert place(7, 601, cfg) == 100
    assert place(7, 601, by_steps) == 7


# --------------------------------------------------------------------------------------------------
# The terminal

def quiet_log(tmp_path, **more):
    return Log(Config(output_dir=str(tmp_path), run_name="it", **more), {})


@pytest.mark.parametrize("columns, line", [
    (80, "250/1000 25% loss 1.73 9.6k tok/s eta 2.7 min"),
    (40, "250/1000 25% loss 1.73 eta 2.7 min"),
    (20, "25% eta 2.7 min"),
    (8, "eta 2.7"),
])
def test_progress_fits(tmp_path, monkeypatch, columns, line):
    it = quiet_log(tmp_path)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    it.progress(250, 1000, 1.734, 9600, 160)
    assert out.getvalue() == "\r\033[K" + line
    assert len(line) < columns


def test_short():
    assert [short(n) for n in (7, 987.6, 9600, 1.237e6, 2e9)] == ["7", "988", "9.6k", "1.24M",
                                                                 "2G"]


def test_no_escapes_where_there_is_no_terminal(shards, tmp_path, capsys):
    _, folder = train(tmp_path, **shards)
    assert "\033" not in capsys.readouterr().out + (folder / "log.txt").read_text()


# --------------------------------------------------------------------------------------------------
# Trackers and the picture

SETTINGS = dict(num_iterations=4, val_loss_every=2, run_name="it")


def test_tensorboard(shards, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(tmp_path, **shards, **SETTINGS, log="tensorboard")
    events = EventAccumulator(str(tmp_path / "it"))
    events.Reload()
    read = [event.value for event in events.Scalars("train_loss")]
    assert read == pytest.approx(steps(tmp_path / "it", "train"), abs=1e-4)
    assert [event.step for event in events.Scalars("val_loss")] == [0, 2, 4]


def wandb_records(path):
    """The messages in an offline run's file, which is LevelDB's log of blocks of 32 KiB.

    wandb's messages are read by wandb; its reader of this file is no Python any more.
    """
    data = path.read_bytes()
    assert data.startswith(b":W&B")
    at = 7
    parts = []
    while at + 7 <= len(data):
        room = 2**15 - at % 2**15
        size, kind = struct.unpack_from("<HB", data, at + 4)
        if room < 7 or kind == 0:
            at += room
            continue
        parts.append(data[at + 7:at + 7 + size])
        at += 7 + size
        # 1 is a whole message, 4 the end of one in parts.
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def test_wandb(shards, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path, **shards, **SETTINGS, log="wandb")
    told = steps(tmp_path / "it", "train")
    file = next((tmp_path / "it").glob("wandb/offline-run-*/*.wandb"))
    # Another process of wandb's writes, perhaps behind finish().
    for _ in range(100):
        losses = []
        for data in wandb_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            losses += [float(item.value_json) for item in record.history.item
                       if "train_loss" in (item.key, *item.nested_key)]
        if len(losses) == len(told):
            break
        time.sleep(0.1)
    assert losses == pytest.approx(told, abs=1e-4)


def test_trackio(shards, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage
    for module in ("trackio", "trackio.utils", "trackio.sqlite_storage"):
        if hasattr(sys.modules.get(module), "TRACKIO_DIR"):
            monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    assert utils.TRACKIO_DIR == tmp_path / "trackio"
    train(tmp_path / "logs", **shards, **SETTINGS, log="trackio")
    rows = SQLiteStorage.get_logs(trackers.PROJECT, "it")
    read = [row["train_loss"] for row in rows if "train_loss" in row]
    assert read == pytest.approx(steps(tmp_path / "logs" / "it", "train"), abs=1e-4)


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch, name):
    for module in [key for key in sys.modules if key.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(SystemExit, match=f"^--log {name}: not installed .*: pip install {name}$"):
        quiet_log(tmp_path, log=name)


def test_a_tracker_that_does_not_exist():
    with pytest.raises(ValueError, match="--log wandbb: no such log; did you mean wandb"):
        Config(log="tensorboard,wandbb")


def test_a_tracker_that_breaks_ends_no_run(shards, tmp_path, monkeypatch, capsys):
    class Broken:
        def __init__(self, *_):
            pass

        def put(self, step, values):
            raise ConnectionError("the network is gone")

        def close(self):
            raise AssertionError("closed")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Broken)
    loss, folder = train(tmp_path, **shards, log="wandb")
    told = capsys.readouterr().out
    assert told.count("note: nothing more is written to wandb (the network is gone)") == 1
    assert checkpoint_loss(folder) == pytest.approx(loss, abs=1e-5)


def test_picture(shards, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    _, folder = train(tmp_path, **shards)
    picture = folder / "loss.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in [key for key in sys.modules if key.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, module)
    _, folder = train(tmp_path / "without", **shards)
    assert not (folder / "loss.png").exists()
