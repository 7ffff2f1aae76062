"""bench.py and scripts/versus_nanogpt.py: what they print, and what they count."""
import time

import pytest
import torch

import bench
from scripts import versus_nanogpt
from tests.nanogpt import NanoGPT, Trainer


def test_cores_go_by_length_and_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "cores.png"
    bench.main(["cores", "--n_embd", "64", "--shortest", "16", "--sequence_length", "32",
                "--repeats", "1", "--plot", str(path)])
    rows = [line.replace(" of 16 taps", "_16").split()
            for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [[name, "T", T] for T in ("16", "32")
                                         for name in ("attention,", "afno,", "afno_16,")]
    # min ms, median ms, two ratios, tokens a second, MiB
    for row in rows:
        least, _, ratio, _, rate, _ = map(float, row[3:])
        assert row[0] != "attention," or ratio == 1
        assert rate == pytest.approx(1e3 * int(row[2]) / least, rel=0.5)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_calls_of_as_many_tokens(capsys):
    bench.main(["cores", "--n_embd", "64", "--shortest", "16", "--sequence_length", "64",
                "--repeats", "1", "--tokens", "128"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cores: 128 tokens a call, T 64")
    for row in (line.replace(" of 16 taps", "").split() for line in lines[2:]):
        assert float(row[7]) == pytest.approx(1e3 * 128 / float(row[3]), rel=0.5)
    args = bench.parse(["cores", "--tokens", "32768", "--sequence_length", "4096"])[1]
    assert [bench.rows_of(args, T) for T in bench.lengths(args)] == [128, 64, 32, 16, 8]


def test_what_is_slow_runs_once(monkeypatch):
    monkeypatch.setattr(bench, "SLOW", 0.05)
    calls = []

    def slow():
        calls.append("slow")
        time.sleep(0.06)

    times = bench.measure({"slow": slow, "fast": lambda: calls.append("fast")}, 3,
                          torch.device("cpu"))
    assert [calls.count(name) for name in times] == [1, 6]
    assert [len(ms) for ms in times.values()] == [1, 3] and min(times["slow"]) >= 60


@pytest.mark.parametrize("name, rows", [("parts", 12), ("mixers", 9), ("scaling", 4)])
def test_a_bench_has_its_rows(name, rows, capsys):
    bench.main([name, "--n_embd", "32", "--n_head", "2", "--sequence_length", "16",
                "--batch_size", "1", "--repeats", "1"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + rows


def test_parts_count_the_gradients_of_their_weights():
    args = bench.parse(["parts", "--n_embd", "32", "--n_head", "2", "--sequence_length", "8"])[1]
    found = bench.parts(args, torch.device("cpu"))
    sizes = {name: sum(grad.numel() for grad in run()) for name, run in found.items()}
    for row in "attn", "afno":
        parts = [run for name, run in found.items() if name.startswith(row + ":")]
        inputs = sum(x.numel() for run in parts for x in run.args[1])
        weights = sum(sizes[name] for name in sizes if name.startswith(row + ":")) - inputs
        assert weights == sizes[row] - 2 * 8 * 32    # all of the layer's, and once

@pytest.mark.parametrize("flags, words", [
    (["parts", "--plot", "parts.png"], "--plot draws cores and mixers, not parts"),
    (["mixers", "--shortest", "2048"], "--shortest 2048 is not between 0 and"),
    (["mixers", "--shortest", "-1"], "--shortest -1 is not between 0 and"),
    (["parts", "--tokens", "1024"], "--tokens is for cores and mixers, not parts"),
    (["cores", "--tokens", "1024"], "--tokens 1024 is no multiple of 16384, the longest row"),
], ids=str)
def test_bad_input_is_one_line(flags, words, capsys):
    with pytest.raises(SystemExit):
        bench.main(flags)
    assert words in capsys.readouterr().err


def test_the_peak_is_what_was_live_at_once():
    def run():
        for _ in range(3):
            a = torch.ones(2**20)
            b = a + 1
            del a
        return b

    assert 8 * 2**20 <= bench.peak(run, torch.device("cpu")) < 13 * 2**20


def test_contenders_take_turns():
    order = []

    def run(name):
        def steps(turn):
            for _ in range(versus_nanogpt.WARMING + 4):
                turn()
                order.append(name)
        return steps

    seconds = versus_nanogpt.in_turn({"a": run("a"), "b": run("b")}, 3)
    assert order == ["a", "b"] * (versus_nanogpt.WARMING + 4)
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_the_twin_of_nanogpt_has_its_size_and_learns():
    torch.manual_seed(0)
    model = NanoGPT(4, 4, 128, 65, 64)
    # Its log says 0.80M, positions not counted.
    assert sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel() == 795_904
    text = torch.arange(2000).remainder(5).numpy().astype("uint16")
    trainer = Trainer(model, text, 4, 16, warmup=5, steps=60)
    losses = [trainer.step(number) for number in range(60)]
    assert losses[0] > 4 and losses[-1] < 0.1
    assert trainer.rate(0) == pytest.approx(1e-3 / 6) and trainer.rate(60) == pytest.approx(1e-4)
