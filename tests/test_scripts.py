"""The run scripts, as a user starts them; scripts rot where nothing runs them."""
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from train_gpt2 import parse

ROOT = Path(__file__).resolve().parent.parent


def run(script, *flags, python=sys.executable):
    env = os.environ | {"PYTHON": python, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", ROOT / script, *map(str, flags)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "script",
    [
        "run_afno.sh",
        "run_attn.sh",
        "run_fan.sh",
        "run_neollm.sh",
        "run_nanoformer.sh",
        "run_fftnet.sh",
    ],
)
def test_the_embedded_run_from_check_to_sample(script, tmp_path):
    if script == "run_neollm.sh":
        pytest.importorskip("pytorch_optimizer")
    done = run(script, "--num_iterations", 2, "--val_tokens", 1024, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("no CUDA device" in done.stdout) == (script != "run_fftnet.sh")     # which has no race
    assert "final val_loss:" in done.stdout and "a sample" in done.stdout
    assert len(list(tmp_path.glob("*/log.txt"))) == len(list(tmp_path.glob("*/model.pt"))) == 1


def test_the_baseline_is_the_public_one():
    done = run("run_attn.sh", "--estimate")
    assert done.returncode == 0, done.stderr
    for figure in ("123,532,032 ", " 524,288 ", " 2,499,805,184 in 4,768 steps"):
        assert figure in done.stdout


def test_the_control_of_the_afno_recipe_has_its_size():
    count = {}
    for mixer in ("afno,afno,afno,attn", "attn"):
        line = next(
            line
            for line in run("run_afno.sh", "--mixer", mixer, "--estimate").stdout.splitlines()
            if line.startswith("parameters")
        )
        count[mixer] = int(line.split()[1].replace(",", ""))
    assert abs(count["attn"] / count["afno,afno,afno,attn"] - 1) < 0.02


def test_neollm_has_the_size_of_its_card():
    C, V, ffn, kv, heads, layers = 512, 151_665, 1024, 2 * 64, 8, 12
    # q k v gate proj, a b, conv, A dt, gain
    gdn = 5 * C * C + 2 * heads * C + 4 * 3 * C + 2 * heads + C // heads
    periodic = C // 8
    # FAN layer, q and proj, k and v
    fan = (C + 1) * (C - periodic) + 2 * C * C + 2 * C * kv
    # gate, fc, proj; PolyNorm has 4
    mlp = 3 * C * ffn + 4
    others = layers // 4 * (3 * gdn + fan) + layers * (mlp + 1)                 # and GPAS's gate
    text = run("run_neollm.sh", "--estimate").stdout
    assert f"embed {C * V:,}" in text and C * V == 77_652_480 and 33e6 < others < 36e6
    assert (
        f"parameters     {C * V + others:,} " in text and " 2,027,520,000 in 61,875 steps" in text
    )


def test_fanformer_has_the_size_of_its_sum():
    C, V, ffn, kv, layers, D = 768, 50_304, 2048, 6 * 64, 12, 64
    def cola(d_in, d_out):
        return min(d_in, d_out) // 4 * (d_in + d_out)
    # FAN: cos and sin share their inputs
    features = C - int(0.15 * C)
    attention = cola(C, features) + features + 2 * cola(C, C) + 2 * cola(C, kv) + 3 * D
    # SwiGLU, the residual's gates
    layer = attention + 3 * cola(C, ffn) + 2 * C
    # HybridNorm*: no gain in the first
    count = C * V + layers * layer + (layers - 1) * C
    assert f"parameters     {count:,} " in run("run_fan.sh", "--estimate").stdout


def test_nanoformer_has_the_sizes_of_its_kinds():
    C, V, hidden, kv, layers = 256, 50_304, 682, 2 * 32, 8                      # hidden 2.6667 C
    tables, mlp = 2 * C * V, 3 * C * hidden
    # grouped queries, if no kind is said
    counts = {"": 2 * C * C + 2 * C * kv, "--mixer=diff": 4 * C * C + 6 * 32,
              # s_qk, two alphas, s_uv
              "--mixer=ngpt": 4 * C * C + 3 * C + 2 * hidden}
    for kind, mixer in counts.items():
        # and a factor a logit
        count = tables + layers * (mixer + mlp) + V * ("ngpt" in kind)
        assert (
            f"parameters     {count:,} "
            in run("run_nanoformer.sh", *kind.split(), "--estimate").stdout
        ), kind


def test_nanoformer_by_documents(tmp_path):
    """The harness at once: nGPT's rows, windows, cap and scale, recomputation; packed documents."""
    done = run(
        "run_nanoformer.sh",
        "--mixer",
        "ngpt",
        "--batches",
        "packed",
        "--document_token",
        10,
        "--window",
        30,
        "--logit_softcap",
        30,
        "--logit_scale",
        0.5,
        "--recompute",
        "block",
        "--num_iterations",
        2,
        "--val_tokens",
        1024,
        "--output_dir",
        tmp_path,
    )
    assert done.returncode == 0 and "final val_loss:" in done.stdout, done.stderr
    done = run("run_nanoformer.sh", "--mixer", "ngpt", "--weight_decay", 0.1)
    assert (
        done.returncode != 0
        and len(done.stderr.splitlines()) == 1
        and "normalised weights" in done.stderr
    )


def test_fftnet_has_the_size_of_its_sum():
    C, V, hidden, heads, layers = 128, 256, 512, 4, 4
    # M complex numbers a token's filter
    def layer(M, spectrum):
        # W_q, the MLP, base and threshold
        filter = 2 * M * C + hidden * (C + 2 * M) + 2 * M + M
        # v gate proj, conv; the MLP
        return filter + 3 * C * C + 4 * (2 * M + 2 * C) + spectrum + 2 * 4 * C * C
    # k and its conv, forget; theta, bias
    running = 2 * 64 * C + 4 * 2 * 64 + heads * C + 64 + heads
    # FourierKernel's
    bank = heads * (2 * 16 + 2 * 16 * 8 + 2 * 16 * 16 + 2 * 16 * 8 + 2 * 16 + 2 * 8) + 2 * 16
    for filter, count in (("running", layer(64, running)), ("bank", layer(16, bank))):
        # the embedding has no outer norm
        count = 2 * C * V + layers * count + (2 * layers - 1) * C
        text = run("run_fftnet.sh", "--fftnet_filter", filter, "--estimate").stdout
        assert f"parameters     {count:,} " in text and "vocabulary 256" in text


def test_fftnet_takes_the_embedded_text_on_any_device(tmp_path):
    # says yes to a GPU, fetches nothing
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *is_available*) exit 0;; *fineweb*) exit 9;; esac\n'
                      f'exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = run("run_fftnet.sh", "--fftnet_filter", "bank", "--num_iterations", 1, "--batch_size", 4,
               "--val_tokens", 128, "--output_dir", tmp_path / "logs", python=str(python))
    assert (
        done.returncode == 0 and "final val_loss:" in done.stdout and "a sample" in done.stdout
    ), done.stderr


def test_a_wrong_flag_is_one_line():
    done = run("run_attn.sh", "--mixer", "fourier")
    assert done.returncode != 0 and len(done.stderr.splitlines()) == 1 and "fourier" in done.stderr


def parsed(script, *flags):
    """The Config of the command that a script prints."""
    line = next(x for x in run(script, *flags, "--estimate").stderr.splitlines() if x[0] == "+")
    return parse(shlex.split(line)[3:])


@pytest.mark.parametrize("kind", ["diff", "diff_v2"])
def test_differential_attention_has_no_norm_of_queries_and_keys(kind):
    assert parsed("run_nanoformer.sh", "--mixer", kind).head_norm == "none"


def test_ngpt_has_the_official_rate_and_clipping():
    cfg = parsed("run_nanoformer.sh", "--mixer", "ngpt")
    assert (cfg.learning_rate, cfg.grad_clip, cfg.warmup_iters) == (0.0015, 1.0, 0)
    assert cfg.weight_decay == 0


@pytest.mark.parametrize("kind, batches", [("gqa", "packed"), ("ngpt", "packed"), ("fan", "packed"),
                                           ("afno", "padded"), ("gdn,attn", "padded")])
def test_nanoformer_asks_the_mixers_whether_they_mask(kind, batches):
    assert parsed("run_nanoformer.sh", "--mixer", kind).batches == batches


def test_layernorm_scaling_meets_no_scaled_initialisation():
    cfg = parsed("run_neollm.sh")
    assert cfg.norm == "lns" and not cfg.zero_init
