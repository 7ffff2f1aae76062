"""Whole runs of main(): losses fall, the log is complete, and the split of a step does not matter.

The golden curve changes only when the baseline's numbers are meant to: python -m tests.test_train
"""
import gzip
import hashlib
import json
import math
import re
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch

import train_gpt2
from support import checkpoint
from tests.runs import STEP, TINY, checkpoint_loss, knobs_of, same_run, steps, train, weights
from train_gpt2 import GPT, MIXERS, OPTIMS, ROOT, Config

GOLDEN = Path(__file__).with_name("golden_attn.txt")
FINAL = re.compile(
    r"final val_loss:(\d+\.\d{4}) params:(\d+) tokens:(\d+) train_time:(\d+\.\d)s .*peak_memory:\d+MiB"
)


@pytest.mark.parametrize("row", MIXERS)
def test_loss_falls(shards, tmp_path, row):
    loss, folder = train(
        tmp_path,
        **shards,
        **knobs_of(row),
        num_iterations=30,
        val_loss_every=30,
        learning_rate=0.01,
    )
    first, last = steps(folder, "val")
    assert abs(first - math.log(24)) < 1e-3 and last < first - 0.8 and abs(loss - last) < 1e-4
    assert len(steps(folder, "train")) == 30


@pytest.mark.parametrize("batches", [dict(), dict(batches="packed", document_token=3)], ids=str)
def test_a_run_of_stages(shards, tmp_path, batches):
    """Tokens add up, and what it trained sees no future at any stage's length."""
    mixer = "attn" if batches else "afno,attn"
    loss, folder = train(tmp_path, **shards, mixer=mixer, stages="4x16@2,8x8@4", **batches)
    tokens = re.findall(r" tokens:(\d+) ", (folder / "log.txt").read_text())
    assert tokens == [str(4 * 64 + 128)] and checkpoint_loss(folder) == pytest.approx(loss, abs=1e-4)
    saved = weights(folder)
    model = GPT(Config(**saved["config"])).double().eval()
    model.load_state_dict(saved["model"])
    idx = torch.randint(4, 24, (2, 16))
    whole = model(idx)
    for T in (4, 8, 15):
        other = idx.clone()
        other[:, T] = (idx[:, T] + 1) % 24
        apart = (model(other) - whole).abs()
        assert apart[:, :T].max() < 1e-12 and apart[:, T:].max() > 1e-6
        assert (model(idx[:, :T]) - whole[:, :T]).abs().max() < 1e-12


def test_log_is_complete(shards, tmp_path):
    loss, folder = train(tmp_path, **shards, **knobs_of("afno"), target_val_loss=9.0)
    text = (folder / "log.txt").read_text()
    parts = (
        "train_gpt2 attention afno fan deltanet diff fftnet ngpt parts kernels support/batches "
        "support/flags support/machine support/masked support/processes support/shards "
        "support/stages support/log support/checkpoint"
    )
    sources = gzip.decompress((folder / "sources.txt.gz").read_bytes()).decode()
    assert len(text) < 10_000 and text.startswith("=== config\n")
    for name in (f"{part}.py" for part in parts.split()):
        assert f"=== source {name}\n{(ROOT / name).read_text()}\n" in sources, name
    config, env = (
        json.loads(re.search(rf"(?m)^=== {part}\n(.*)\n", text)[1]) for part in ("config", "env")
    )
    assert Config(**config) == Config(
        **TINY | shards | knobs_of("afno"),
        output_dir=str(tmp_path),
        vocab_size=24,
        target_val_loss=9.0,
    )
    assert (
        env["torch"] == torch.__version__ and env["processes"] == 1 and env["command"] == sys.argv
    )
    assert len(env["shards"]) == 3
    for path, digest in env["shards"].items():
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest

    lines = text.split("\n=== run\n")[1].splitlines()
    parsed = [STEP.fullmatch(line) for line in lines[1:]]
    assert [m[1] + m[3][0] for m in parsed if m] == [
        "0v",
        "1t",
        "2t",
        "2v",
        "3t",
        "4t",
        "4v",
        "5t",
        "5v",
    ]
    final = FINAL.fullmatch(lines[-1])
    assert (
        final and float(final[1]) == pytest.approx(loss, abs=1e-4) and int(final[3]) == 5 * 8 * 16
    )
    assert int(final[2]) == sum(p.numel() for p in weights(folder)["model"].values())
    assert "time_to_9.0:0.0s" in lines[-1] and lines[0].startswith(
        f"{int(final[2]):,} parameters, afno"
    )
    # 400 tokens are not 10 x 112
    assert "val_loss on" not in text.split("\n=== run\n")[1]


@pytest.mark.parametrize("every, tail, validated", [
    (8, 2, [0, 8, 12, 14, 16]),
    (0, 2, [12, 14, 16]),
    (6, 0, [0, 6, 12, 16]),
    (2, 4, [0, 2, 4, 6, 8, 10, 12, 16]),
])
def test_the_last_quarter_is_validated_at_its_own_pace(shards, tmp_path, every, tail, validated):
    _, folder = train(tmp_path, **shards, num_iterations=16, val_loss_every=every,
                      val_tail_every=tail)
    lines = map(STEP.fullmatch, (folder / "log.txt").read_text().splitlines())
    assert [int(m[1]) for m in lines if m and m[3] == "val"] == validated


def test_longer_validation_at_the_end(shards, tmp_path):
    _, folder = train(tmp_path, **shards, num_iterations=1, val_tokens=2 * 16)
    assert re.search(
        r"^val_loss on 320 tokens:\d\.\d{4}$", (folder / "log.txt").read_text(), re.MULTILINE
    )


def test_two_runs_never_share_a_folder(shards, tmp_path):
    for _ in range(3):
        train(tmp_path, **shards, num_iterations=1)
    assert len(list(tmp_path.iterdir())) == 3


def test_same_seed_same_numbers(shards, tmp_path):
    results = [
        train(tmp_path / str(i), **shards, seed=seed, zero_init=False)
        for i, seed in enumerate((1, 1, 2))
    ]
    assert results[0][0] == results[1][0] != results[2][0]


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("row", ["afno", "attn", "gdn"])
def test_same_seed_same_bits(shards, tmp_path, row, optim):
    if optim in ("ademamix", "soap"):
        pytest.importorskip("pytorch_optimizer")
    knobs = knobs_of(row, **shards, optim=optim, num_iterations=3)
    (loss, one), (again, two) = [train(tmp_path / out, **knobs) for out in ("one", "two")]
    assert loss == again
    assert all(map(torch.equal, weights(one)["model"].values(), weights(two)["model"].values()))


def test_checkpoint_reproduces_the_loss(shards, tmp_path):
    loss, folder = train(tmp_path, **shards, **knobs_of("afno"), save_every=2)
    # 7 windows: the last batch of 3 is short, and weighs less
    for batch in (3, 7, 1):
        assert checkpoint_loss(folder, batch) == pytest.approx(loss, abs=1e-6)
    assert weights(folder)["step"] == 5 and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("optim", OPTIMS)
def test_gradient_accumulation(shards, tmp_path, optim):
    runs = [
        train(
            tmp_path / f"{b}", **shards, optim=optim, batch_size=b, grad_accumulation_steps=8 // b
        )
        for b in (8, 4, 1)
    ]
    for loss, folder in runs[1:]:
        assert loss == pytest.approx(runs[0][0], abs=1e-5)
        same_run(folder, runs[0][1], 1e-4)


def test_clipped_gradients_move_little(shards, tmp_path):
    loss, _ = train(tmp_path, **shards, grad_clip=1e-10)    # far below AdamW's epsilon
    assert loss == pytest.approx(math.log(24), abs=1e-3)


DIVERGES = dict(learning_rate=1e38, optim="adamw", logit_softcap=0.0)


@pytest.mark.parametrize("train_loss_every", [1, 25])
def test_a_loss_that_is_not_finite_stops_the_run(shards, tmp_path, train_loss_every):
    """Also where no step of it is logged; and no file is overwritten by what followed."""
    with pytest.raises(SystemExit) as e:
        train(tmp_path, **shards, **DIVERGES, train_loss_every=train_loss_every, val_loss_every=0,
              save_every=1)
    assert re.match(r"step \d: (the training loss is|the gradient of|the weights) ", str(e.value))
    for path in tmp_path.glob("*/model.pt"):
        assert all(p.isfinite().all() for p in weights(path.parent)["model"].values())


def test_a_validation_loss_that_is_not_finite_stops_the_run(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("train_gpt2.evaluate", lambda *args: math.nan)
    with pytest.raises(SystemExit, match="step 0: the validation loss is nan"):
        train(tmp_path, **shards)
    assert not list(tmp_path.glob("*/model.pt"))


def test_one_bad_loss_between_logged_steps_is_seen(shards, tmp_path, monkeypatch):
    """The loss of step 2 is NaN, that of later ones is not."""
    forward = GPT.forward
    calls = []

    def once_bad(self, idx, targets=None):
        calls.append(self.training)
        return forward(self, idx, targets) * (math.nan if sum(calls) == 2 else 1.0)

    monkeypatch.setattr(GPT, "forward", once_bad)
    with pytest.raises(SystemExit, match="step 2: the training loss is nan"):
        train(tmp_path, **shards, train_loss_every=25, val_loss_every=0)
    assert not list(tmp_path.glob("*/model.pt"))


def test_the_clock_stands_still_while_a_checkpoint_is_saved(shards, tmp_path, monkeypatch):
    write = checkpoint.write

    def slow(*args):
        time.sleep(0.5)
        write(*args)

    monkeypatch.setattr(checkpoint, "write", slow)
    _, folder = train(tmp_path, **shards, save_every=1)
    seconds = FINAL.search((folder / "log.txt").read_text())[4]
    assert float(seconds) < 1.0                             # of the five savings' 2.5


def test_a_step_enters_four_files(tmp_path, monkeypatch):
    """Of the default run: trainer, mixer, parts and kernels, so a step is read in these.

    In the main thread. A second one prepares the tokens of the next step in support/, and a step
    that validates, saves or tells goes there, too.
    """
    entered = set()
    starts = count()
    set_schedule = train_gpt2.set_schedule

    def look(frame, event, arg):
        path = Path(frame.f_code.co_filename)
        # An environment may lie in the repository, as .venv does.
        ours = path.is_relative_to(ROOT) and not path.is_relative_to(sys.prefix)
        if event == "call" and ours and path != Path(__file__):
            entered.add(path.relative_to(ROOT).as_posix())

    def watched(*args):
        """A step starts here."""
        sys.setprofile(look if next(starts) == 3 else None)
        return set_schedule(*args)

    monkeypatch.setattr(train_gpt2, "set_schedule", watched)
    train_gpt2.main(Config(device="cpu", num_iterations=6, val_tokens=256, val_loss_every=0,
                           output_dir=str(tmp_path)))
    assert next(starts) == 6
    assert entered == {"train_gpt2.py", "afno.py", "parts.py", "kernels.py"}


# ---------------- the attention baseline does not move

def golden_curve(out):
    """Every value that the numbers depend on is written out: a default may change without moving
    the curve."""
    cfg = dict(
        input_bin="data/tinyshakespeare/train.bin",
        input_val_bin="data/tinyshakespeare/val.bin",
        seed=0,
        shuffle=True,
        sequence_length=64,
        batch_size=4,
        grad_accumulation_steps=2,
        val_tokens=4096,
        val_loss_every=10,
        val_batch_size=16,
        mixer="attn",
        n_layer=2,
        n_head=4,
        n_embd=64,
        n_kv_head=0,
        head_norm="qk",
        short_conv=False,
        pos="rope",
        mlp="relu2",
        mlp_ratio=4.0,
        zero_init=True,
        tie_embeddings=False,
        pad_vocab=True,
        embed_norm=True,
        logit_softcap=15.0,
        value_residual=False,
        x0_shortcut=False,
        unet_skips=False,
        branch_scale=False,
        optim="muon",
        muon_learning_rate=0.03,
        muon_momentum=0.95,
        muon_momentum_warmup=300,
        learning_rate=0.003,
        embed_lr_scale=1.0,
        head_lr_scale=1.0,
        weight_decay=0.01,
        adam_beta1=0.9,
        adam_beta2=0.95,
        device="cpu",
        compile=False,
        grad_clip=0.0,
        num_iterations=20,
        warmup_iters=2,
        warmdown_iters=10,
    )
    _, folder = train(out, **cfg)
    return [*steps(folder, "train"), *steps(folder, "val")]


def test_golden_curve(tmp_path):
    assert golden_curve(tmp_path) == pytest.approx(
        [float(x) for x in GOLDEN.read_text().split()], rel=2e-3
    )


if __name__ == "__main__":
    import tempfile
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        curve = golden_curve(Path(tmp))
    GOLDEN.write_text("\n".join(f"{x:.4f}" for x in curve) + "\n")
