"""The run scripts, as a user starts them; scripts rot where nothing runs them."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(script, *flags):
    env = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", ROOT / script, *map(str, flags)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_the_embedded_run_from_check_to_sample(tmp_path):
    done = run("run_afno.sh", "--num_iterations", 2, "--val_tokens", 1024, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout and "final val_loss:" in done.stdout and "a sample" in done.stdout
    assert len(list(tmp_path.glob("*/log.txt"))) == len(list(tmp_path.glob("*/model.pt"))) == 1


def test_the_baseline_is_the_public_one():
    done = run("run_attn.sh", "--estimate")
    assert done.returncode == 0, done.stderr
    for figure in ("123,532,032 ", " 524,288 ", " 2,499,805,184 in 4,768 steps"):
        assert figure in done.stdout


def test_the_control_of_the_afno_recipe_has_its_size():
    count = {}
    for mixer in ("afno,afno,afno,attn", "attn"):
        line = next(line for line in run("run_afno.sh", "--mixer", mixer, "--estimate").stdout.splitlines()
                    if line.startswith("parameters"))
        count[mixer] = int(line.split()[1].replace(",", ""))
    assert abs(count["attn"] / count["afno,afno,afno,attn"] - 1) < 0.02


def test_a_wrong_flag_is_one_line():
    done = run("run_attn.sh", "--mixer", "fourier")
    assert done.returncode != 0 and len(done.stderr.splitlines()) == 1 and "fourier" in done.stderr
