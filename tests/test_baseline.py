"""run_attn.sh is the public baseline: every hyperparameter it parses to, and a golden curve.

The curve changes only when the baseline's numerics are meant to:
python -m tests.test_baseline writes it anew.
"""
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from train_gpt2 import KNOBS, ROOT, Config, main, parse

GOLDEN = Path(__file__).with_name("golden_baseline.txt")

# BottleCapAI/NoCap-Test, train_gpt2.py and run.sh, in the terms of Config.
BASELINE = dict(
    n_layer=12, n_head=12, n_embd=768, vocab_size=50257, sequence_length=1024,
    mixer="attn", n_kv_head=0, head_norm="none", window=0, short_conv=False, output_conv=False,
    pos="rope",
    mlp="gelu", mlp_ratio=4.0, linear="dense", dropout=0.0,
    norm="pre", residual="add", branch_scale=True, value_residual=False, x0_shortcut=False,
    unet_skips=False, tie_embeddings=True, pad_vocab=False, embed_norm=False, embed_scale=False,
    logit_softcap=0.0, logit_scale=1.0, logit_gain=False, zero_init=False,
    optim="adamw", learning_rate=0.0018, embed_lr_scale=1.0, head_lr_scale=1.0,
    adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.1, grad_clip=0.0,
    schedule="trapezoid", warmup_iters=256, warmdown_iters=1024, lr_start=0.0, lr_end=0.0,
    batch_size=16, grad_accumulation_steps=32, num_iterations=4768, stages="", lookahead=0.0,
    batches="windows", shuffle=False, recompute="none", val_tokens=1_048_576, val_loss_every=128,
    target_val_loss=3.3821, seed=0, compile=None, dtype="auto",
)
# What no number of the baseline depends on: paths, machine, rates of roles it has not. Nor does any
# depend on what only parts read that are not in use.
FREE = {"data", "input_bin", "input_val_bin", "output_dir", "run_name", "model",
        "device", "peak_flops", "estimate", "log", "minutes", "val_tail_every", "save_every",
        "keep", "init_from", "resume", "resume_anyway", "skip_bad_steps", "train_loss_every",
        "val_batch_size",
        "kernel_lr_scale",
        "lambda_lr_scale", "vector_lr_scale"}

# Sizes for a CPU; all else is the recipe's.
SMALL = dict(n_layer=2, n_head=4, n_embd=64, sequence_length=64, batch_size=4, device="cpu",
             grad_accumulation_steps=2, num_iterations=20, warmup_iters=2, warmdown_iters=10,
             val_tokens=4096, val_loss_every=10, train_loss_every=1, vocab_size=256,
             input_bin="data/tinyshakespeare/train.bin",
             input_val_bin="data/tinyshakespeare/val.bin", compile=False)


def recipe() -> Config:
    """What the script's RACE=( ... ) parses to."""
    text = (ROOT / "run_attn.sh").read_text()
    flags = shlex.split(re.search(r"RACE=\((.*?)\n\)", text, re.DOTALL)[1])
    return parse([*flags, "--vocab_size", "50257"])


def curve(folder) -> list[float]:
    main(replace(recipe(), **SMALL, output_dir=str(folder)))
    log = next(Path(folder).glob("*/log.txt")).read_text().split("\n=== run\n")[1]
    return [float(x) for x in re.findall(r"^step:.*(?:train|val)_loss:(\S+)", log, re.MULTILINE)]


def test_every_hyperparameter_is_the_public_one():
    cfg = recipe()
    got = asdict(cfg)
    assert {name: got[name] for name in BASELINE} == BASELINE
    unused = KNOBS.keys() - cfg.fields_read()
    assert got.keys() - BASELINE.keys() - FREE == unused & got.keys()


def test_golden_curve_of_the_recipe(tmp_path):
    golden = [float(x) for x in GOLDEN.read_text().split()]
    assert curve(tmp_path) == pytest.approx(golden, rel=5e-4)


if __name__ == "__main__":
    import tempfile

    import torch
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        GOLDEN.write_text("\n".join(f"{x:.4f}" for x in curve(tmp)) + "\n")
