"""Shards: what open_shard refuses. Windows: every token window once an epoch, whoever reads it."""
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support.machine import checksum
from support.shards import open_data, open_shard, open_shards
from train_gpt2 import Config, Windows, stream


def write(path, tokens, magic=20240520, version=1, vocab=50, count=None, dtype="<u2", extra=b""):
    head = np.zeros(256, "<i4")
    head[:4] = magic, version, len(tokens) if count is None else count, vocab
    path.write_bytes(head.tobytes() + np.asarray(tokens, dtype).tobytes() + extra)
    return str(path)


# ---------------------------------------------------------------- shards

def test_open_shard(tmp_path):
    tokens, vocab = open_shard(write(tmp_path / "a.bin", [1, 2, 49]))
    assert tokens.tolist() == [1, 2, 49] and vocab == 50 and isinstance(tokens, np.memmap)
    # no vocabulary: GPT-2's
    assert open_shard(write(tmp_path / "b.bin", [50256], vocab=0))[1] == 50257
    tokens, vocab = open_shard(
        write(tmp_path / "c.bin", [0, 99_999], 20240801, 7, 100_000, dtype="<u4")
    )
    assert tokens.tolist() == [0, 99_999] and vocab == 100_000


@pytest.mark.parametrize(
    "why, defect",
    [
        ("256 is outside", dict(tokens=[1, 256])),
        ("50257 is outside", dict(tokens=[50257], vocab=0)),
        ("version 2", dict(version=2)),
        ("version 1", dict(magic=20240801, dtype="<u4")),
        ("not a token shard", dict(magic=7)),
        ("truncated", dict(count=9)),
        ("truncated", dict(extra=b"\0\0")),
        ("truncated", dict(tokens=[])),
        ("truncated", dict(count=-3)),
        ("truncated", dict(dtype="<u4")),
    ],
)
def test_open_shard_refuses(tmp_path, why, defect):
    path = write(tmp_path / "x.bin", **dict(tokens=[1, 2, 3], vocab=256) | defect)
    with pytest.raises(SystemExit) as e:
        open_shard(path)
    assert why in str(e.value) and path in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("content", [None, b"", b"text" * 100, b"\x1f\x8b" * 2000])
def test_open_shard_refuses_what_is_no_shard(tmp_path, content):
    if content is not None:
        (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(
        SystemExit, match="no such file" if content is None else "not a token shard"
    ):
        open_shard(str(tmp_path / "x.bin"))


def test_open_shards(tmp_path):
    names = [write(tmp_path / f"{n}.bin", [1, 2]) for n in "ba"]
    shards, vocab = open_shards(str(tmp_path / "?.bin"))
    assert list(shards) == sorted(names) and vocab == 50
    write(tmp_path / "c.bin", [1], vocab=60)
    for pattern, why in (("?.bin", "different vocabularies"), ("none*", "no shard matches")):
        with pytest.raises(SystemExit, match=why):
            open_shards(str(tmp_path / pattern))


# ---------------------------------------------------------------- --data

def data(folder="", train="", val="", vocab_size=0):
    return open_data(SimpleNamespace(data=str(folder), input_bin=str(train), input_val_bin=str(val),
                                     vocab_size=vocab_size))


def test_the_end_of_a_name_says_what_a_shard_is_for(tmp_path):
    train = ["train.bin", "valhalla_train_000001.bin", "x-train-2.bin", "my.train.bin"]
    val = ["val.bin", "trainer_val_000000.bin"]
    others = ["interval.bin", "strain_1.bin", "train.bin.bak", "train_val_old.bin", "notes.txt"]
    for i, name in enumerate([*train, *val, *others]):
        write(tmp_path / name, [1, 2, i])
    shards, val_shards, vocab = data(tmp_path)
    assert list(shards) == sorted(str(tmp_path / name) for name in train) and vocab == 50
    assert list(val_shards) == sorted(str(tmp_path / name) for name in val)
    for name in val:
        (tmp_path / name).unlink()
    with pytest.raises(SystemExit, match=r"no shard there is called \*val.bin"):
        data(tmp_path)


def test_a_relative_folder_is_sought_here_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(data("data/tinyshakespeare")[0]) == 1
    (tmp_path / "data/tinyshakespeare").mkdir(parents=True)
    write(tmp_path / "data/tinyshakespeare/train.bin", [1, 2])
    write(tmp_path / "data/tinyshakespeare/val.bin", [1, 2, 3])
    assert list(data("data/tinyshakespeare")[1]) == ["data/tinyshakespeare/val.bin"]


def test_two_vocabularies_are_refused(tmp_path):
    train, val = write(tmp_path / "a.bin", [1, 2]), write(tmp_path / "b.bin", [1], vocab=60)
    for size in (0, 60):
        with pytest.raises(SystemExit) as e:
            data(train=train, val=val, vocab_size=size)
        assert all(word in str(e.value) for word in (train, "of 50", val, "of 60"))


def hard_link(new, old):
    new.hardlink_to(old)


def copy(new, old):
    new.write_bytes(old.read_bytes())


@pytest.mark.parametrize("again", [type(Path()).symlink_to, hard_link, copy])
@pytest.mark.parametrize("old, new, why", [("a_train", "a_val", "text it has seen"),
                                           ("a_train", "b_train", "twice for training"),
                                           ("a_val", "b_val", "twice for validation")])
def test_a_shard_is_used_once(tmp_path, again, old, new, why):
    for name in ("a_train", "a_val"):
        if name != new:
            write(tmp_path / f"{name}.bin", [len(name)] * 9)
    again(tmp_path / f"{new}.bin", tmp_path / f"{old}.bin")
    with pytest.raises(SystemExit) as e:
        data(tmp_path)
    assert why in str(e.value) and "\n" not in str(e.value)
    assert all(f"{name}.bin" in str(e.value) for name in (old, new))


def test_only_shards_that_begin_alike_are_read_whole(tmp_path, monkeypatch):
    sums = []
    monkeypatch.setattr("support.shards.checksum", lambda path: sums.append(path) or checksum(path))
    for i, name in enumerate(("a_train", "b_train", "a_val", "b_val")):
        write(tmp_path / f"{name}.bin", [i, *[1] * 40_000])
    data(tmp_path)
    assert not sums
    # The same 64 KiB, and another end.
    write(tmp_path / "c_val.bin", [3, *[1] * 39_999, 2])
    data(tmp_path)
    assert [path.rsplit("/", 1)[1] for path in sums] == ["b_val.bin", "c_val.bin"]


# ---------------------------------------------------------------- windows

T = 5
SHARDS = {"a": np.arange(3 * T + 2), "short": 900 + np.arange(3), "b": 1000 + np.arange(2 * T + 1),
          "c": 2000 + np.arange(4 * T)}


def windows(rank=0, world=1, shuffle=False, batch=4, accumulation=1, shards=SHARDS, T=T, **knobs):
    cfg = Config(sequence_length=T, batch_size=batch, grad_accumulation_steps=accumulation,
                 shuffle=shuffle, seed=3, **knobs)
    return Windows(shards, cfg, rank, world)


def rows(*args, steps, **kwargs):                           # all rows of some steps, in order
    return torch.cat([windows(*args, **kwargs).batch(step) for step in steps]).tolist()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_epoch_is_every_window_once(world, shuffle):
    n = len(windows(shuffle=shuffle))
    steps = range(n)  # n steps of 4 are four epochs
    seen = [
        r
        for step in steps
        for rank in range(world)
        for r in windows(rank, world, shuffle).batch(step).tolist()
    ]
    for epoch in range(4):
        starts = sorted(r[0] for r in seen[epoch * n:epoch * n + n])
        assert len(set(starts)) == n
        # a grid of T over each shard, from one common offset
        for shard in SHARDS.values():
            mine = [s for s in starts if shard[0] <= s <= shard[-1]]
            assert len(mine) >= (len(shard) - 1) // T - shuffle
            if mine:
                assert (
                    mine == list(range(mine[0], mine[0] + T * len(mine), T))
                    and mine[0] - shard[0] < T
                )
                assert shuffle or mine[0] == shard[0]
    # inside one shard: x, and y shifted by one
    for r in seen:
        assert r == list(range(r[0], r[0] + T + 1)) and any(
            r[0] in s and r[-1] in s for s in SHARDS.values()
        )


@pytest.mark.parametrize("shuffle", [False, True])
def test_processes_share_a_step(shuffle):
    # across the borders of shards and epochs
    for step in range(7):
        whole = windows(shuffle=shuffle).batch(step).tolist()
        for world in (2, 4):
            assert [
                r
                for rank in range(world)
                for r in windows(rank, world, shuffle).batch(step).tolist()
            ] == whole


def test_file_order():
    first = [r[0] for r in rows(steps=range(3))]
    assert first == [0, 5, 10, 1000, 1005, 2000, 2005, 2010, 0, 5, 10, 1000]


def test_shuffle_is_a_new_order_and_offset_every_epoch():
    shards = {"a": np.arange(1001)}
    w = windows(shuffle=True, shards=shards, batch=1)
    n = len(w)
    epochs = [[w.batch(e * n + i)[0, 0].item() for i in range(n)] for e in range(6)]
    assert n == 199 and len({tuple(e) for e in epochs}) == 6
    assert len({e[0] % T for e in epochs}) > 1 and all(len({s % T for s in e}) == 1 for e in epochs)
    assert all(e != sorted(e) for e in epochs)
    w.cfg = replace(w.cfg, seed=4)
    assert w.batch(0).tolist() != windows(shuffle=True, shards=shards, batch=1).batch(0).tolist()


def test_targets_are_the_inputs_shifted_by_one():
    ((x, y, share), (x2, y2, _)), predictions = next(
        stream(windows(batch=2, accumulation=2), torch.device("cpu"))
    )
    assert share == 0.5 and predictions == 4 * T
    assert x.shape == y.shape == (2, T) and x.dtype == torch.int64
    assert torch.equal(y, x + 1) and x[0, 0] == 0 and x2[0, 0] == 2 * T


def test_stream_is_batch_after_batch():
    w = windows(rank=1, world=2, shuffle=True, batch=2, accumulation=2)
    for start in (0, 5):
        steps = stream(w, torch.device("cpu"), start)
        for step, (micro_batches, _) in zip(range(start, start + 4), steps):
            ours = torch.cat([torch.cat((x, y[:, -1:]), dim=1) for x, y, _ in micro_batches])
            assert torch.equal(ours, w.batch(step))


@pytest.mark.parametrize("shuffle", [False, True])
def test_refusals(shuffle):
    with pytest.raises(SystemExit, match="a: shorter than a sequence of 20 tokens"):
        windows(shuffle=shuffle, shards={"a": np.arange(20), "b": np.arange(20)}, T=20)
    assert len(windows(shuffle=shuffle, shards={"a": np.arange(40)}, T=20)) == 1
    with pytest.raises(SystemExit, match="cannot be shared"):
        windows(world=3, shuffle=shuffle)


# ---------------------------------------------------------------- stages

# Steps of 2, of 3 and of 4 windows of 6 tokens; pieces of 2, of 3 and of 6.
STAGES = dict(T=6, accumulation=2, batch=2, stages="2x3@2,3x3@5", num_iterations=9,
              shards={"a": np.arange(200), "b": 1000 + np.arange(90)})


@pytest.mark.parametrize("shuffle", [False, True])
def test_stages_read_what_one_stage_would(shuffle):
    """The same tokens in the same order, across epochs; only the cuts differ."""
    staged = windows(shuffle=shuffle, **STAGES)
    parts = [staged.batch(step) for step in range(60)]
    assert [tuple(part.shape) for part in parts[::2]][:4] == [(6, 3), (6, 4), (6, 4), (4, 7)]
    found = torch.cat([part[:, :-1].flatten() for part in parts])
    one = windows(shuffle=shuffle, **STAGES | dict(stages="", batch=1, accumulation=1,
                                                   num_iterations=1000))
    assert torch.equal(found, torch.cat([one.batch(i)[0, :-1] for i in range(len(found) // 6)]))
    # A piece's targets are the tokens behind its inputs.
    for part in parts:
        assert torch.equal(part[:, 1:], part[:, :-1] + 1)


def test_processes_share_the_steps_of_stages():
    sizes = STAGES | dict(accumulation=4)
    for step in range(7):
        whole = windows(shuffle=True, **sizes).batch(step)
        shares = [windows(rank, 2, True, **sizes) for rank in range(2)]
        assert torch.equal(torch.cat([w.batch(step) for w in shares]), whole)
        (parts, predictions), (others, same) = (w.micro_batches(step) for w in shares)
        assert predictions == same == whole[:, 1:].numel() and len(parts) == len(others)
        assert sum(weight for _, weight in parts) == pytest.approx(1)
        assert {rows.shape for rows, _ in parts} <= {(B, T + 1) for B, T in shares[0].shapes()}


def test_a_run_of_stages_knows_its_shapes_and_its_average_step():
    w = windows(**STAGES)
    assert w.shapes() == [(3, 2), (3, 3), (2, 6)] and w.widths == [6]
    assert w.per_step == (2 * 12 + 3 * 18 + 4 * 24) // 9
