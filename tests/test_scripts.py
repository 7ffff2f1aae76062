"""The run scripts, as a user starts them; scripts rot where nothing runs them."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.runs import recipe
from train_gpt2 import main, parse

ROOT = Path(__file__).resolve().parent.parent
RACE = "the race, on a machine with a CUDA GPU:\n"


def run(script, *flags, cwd=ROOT, **env):
    """Run a script as a user without a GPU does, in the repository if nothing else is said."""
    env = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | env
    command = ["bash", ROOT / script, *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def refused(done, *words):
    """The script ended with one line, which holds the words."""
    assert done.returncode != 0 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def fake(folder, name, text):
    """An executable of that name, or a Python file, in a folder -> the folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def idle(tmp_path_factory):
    """An environment whose Python sees a GPU, but neither trains, nor samples, nor fetches."""
    folder = fake(tmp_path_factory.mktemp("idle"), "python",
                  '#!/bin/sh\ncase "$*" in *is_available*) echo 2.13.0 yes 13.0 yes;; '
                  '*train_gpt2.py* | *sample.py*) ;; *fineweb.py*) exit 9;; '
                  f'*) exec {sys.executable} "$@";; esac\n')
    return dict(PYTHON=str(folder / "python"))


@pytest.fixture
def parsed(idle):
    """(script, flags) -> the Config of its race, or of all that it has."""
    def parsed(script, *flags):
        done = run(script, *flags, "--estimate", **idle)
        line, = (line for line in done.stderr.splitlines() if line[0] == "+")
        return parse(shlex.split(line)[3:])
    return parsed


@pytest.fixture
def race(parsed, capsys):
    """(script, flags) -> what --estimate says of it"""
    def race(script, *flags):
        main(parsed(script, *flags))
        return capsys.readouterr().out
    return race


# One that has a race too, and the one that has none: what differs in the others is their flags.
@pytest.mark.parametrize("script", ["run_afno.sh", "run_fftnet.sh"])
def test_the_embedded_run_from_check_to_sample(script, tmp_path):
    # Another run saves a checkpoint later than this one, which must not be sampled.
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.pt").touch()
    os.utime(tmp_path / "other/model.pt", (2**32, 2**32))
    done = run(script, "--num_iterations", 2, "--val_tokens", 1024, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("no CUDA device" in done.stdout) == (script != "run_fftnet.sh")     # which has no race
    assert "final val_loss:" in done.stdout and "a sample" in done.stdout
    log, = tmp_path.glob("*/log.txt")
    # By what was built, as the trainer names it, and the script's process.
    mixers = json.loads(re.search(r"=== config\n(.*)\n", log.read_text())[1])["mixer"]
    assert re.fullmatch(rf"\d{{8}}T\d{{6}}_{mixers.replace(',', '-')}_s0_\d+", log.parent.name)
    assert f"\ncheckpoint: {log.parent}/model.pt, step 2, val_loss " in done.stderr


@pytest.mark.parametrize("name", ["run_attn.sh", "run_fan.sh", "run_neollm.sh", "run_nanoformer.sh"])
def test_the_embedded_run_of_the_others(name, tmp_path, capsys):
    if name == "run_neollm.sh":
        pytest.importorskip("pytorch_optimizer")
    flags = "--num_iterations 2 --val_tokens 512 --val_batch_size 2 --output_dir".split()
    main(parse([*recipe(name), *flags, str(tmp_path)]))
    assert "final val_loss:" in capsys.readouterr().out


def test_the_baseline_is_the_public_one(race):
    text = race("run_attn.sh")
    for figure in ("123,532,032 ", " 524,288 ", " 2,499,805,184 in 4,768 steps"):
        assert figure in text


def test_the_control_of_the_afno_recipe_has_its_size(race):
    count = {}
    for mixer in ("afno,afno,afno,attn", "attn"):
        line = next(
            line
            for line in race("run_afno.sh", "--mixer", mixer).splitlines()
            if line.startswith("parameters")
        )
        count[mixer] = int(line.split()[1].replace(",", ""))
    assert abs(count["attn"] / count["afno,afno,afno,attn"] - 1) < 0.02


def test_neollm_has_the_size_of_its_card(race):
    C, V, ffn, kv, heads, layers = 512, 151_665, 1024, 2 * 64, 8, 12
    # q k v gate proj, a b, conv, A dt, gain
    gdn = 5 * C * C + 2 * heads * C + 4 * 3 * C + 2 * heads + C // heads
    periodic = C // 8
    # FAN layer, q and proj, k and v
    fan = (C + 1) * (C - periodic) + 2 * C * C + 2 * C * kv
    # gate, fc, proj; PolyNorm has 4
    mlp = 3 * C * ffn + 4
    others = layers // 4 * (3 * gdn + fan) + layers * (mlp + 1)                 # and GPAS's gate
    text = race("run_neollm.sh")
    assert f"embed {C * V:,}" in text and C * V == 77_652_480 and 33e6 < others < 36e6
    assert (
        f"parameters     {C * V + others:,} " in text and " 2,027,520,000 in 61,875 steps" in text
    )


def test_fanformer_has_the_size_of_its_sum(race):
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
    assert f"parameters     {count:,} " in race("run_fan.sh")


def test_nanoformer_has_the_sizes_of_its_kinds(race):
    C, V, hidden, kv, layers = 256, 50_304, 682, 2 * 32, 8                      # hidden 2.6667 C
    tables, mlp = 2 * C * V, 3 * C * hidden
    # grouped queries, if no kind is said
    counts = {"": 2 * C * C + 2 * C * kv, "--mixer=diff": 4 * C * C + 6 * 32,
              # s_qk, two alphas, s_uv
              "--mixer=ngpt": 4 * C * C + 3 * C + 2 * hidden}
    for kind, mixer in counts.items():
        # and a factor a logit
        count = tables + layers * (mixer + mlp) + V * ("ngpt" in kind)
        assert f"parameters     {count:,} " in race("run_nanoformer.sh", *kind.split()), kind


def test_nanoformer_by_documents(tmp_path):
    """The harness at once: nGPT's rows, windows, cap and scale, recomputation; packed documents."""
    flags = recipe("run_nanoformer.sh ngpt")
    main(parse([*flags, *"--batches packed --document_token 10 --window 30 --logit_softcap 30 "
                "--logit_scale 0.5 --recompute block --num_iterations 2 --val_tokens 1024 "
                "--output_dir".split(), str(tmp_path)]))
    log, = tmp_path.glob("*/log.txt")
    assert "final val_loss:5." in log.read_text()
    with pytest.raises(SystemExit, match="normalised weights"):
        parse([*flags, "--weight_decay", "0.1"])


def test_fftnet_has_the_size_of_its_sum(race):
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
        text = race("run_fftnet.sh", "--fftnet_filter", filter)
        assert f"parameters     {count:,} " in text and "vocabulary 256" in text


def test_fftnet_takes_the_embedded_text_on_any_device(idle):
    done = run("run_fftnet.sh", **idle)
    assert done.returncode == 0 and "a sample" in done.stdout, done.stderr
    assert "--mixer fftnet" in done.stderr and "_bin" not in done.stderr


def test_a_wrong_flag_is_one_line():
    done = run("run_attn.sh", "--mixer", "fourier")
    assert done.returncode != 0 and len(done.stderr.splitlines()) == 1 and "fourier" in done.stderr
    refused(run("run_attn.sh", "--"), "--: leave it out")


@pytest.mark.parametrize("kind", ["diff", "diff_v2"])
def test_differential_attention_has_no_norm_of_queries_and_keys(kind, parsed):
    assert parsed("run_nanoformer.sh", "--mixer", kind).head_norm == "none"


def test_ngpt_has_the_official_rate_and_clipping(parsed):
    cfg = parsed("run_nanoformer.sh", "--mixer", "ngpt")
    assert (cfg.learning_rate, cfg.grad_clip, cfg.warmup_iters) == (0.0015, 1.0, 0)
    assert cfg.weight_decay == 0


@pytest.mark.parametrize("kind, batches", [("gqa", "packed"), ("ngpt", "packed"), ("fan", "packed"),
                                           ("afno", "padded"), ("gdn,attn", "padded")])
def test_nanoformer_asks_the_mixers_whether_they_mask(kind, batches, parsed):
    assert parsed("run_nanoformer.sh", "--mixer", kind).batches == batches


def test_layernorm_scaling_meets_no_scaled_initialisation(parsed):
    cfg = parsed("run_neollm.sh")
    assert cfg.norm == "lns" and not cfg.zero_init


# ---------------- flags that the scripts read

def test_help_is_all_that_is_done(tmp_path):
    done = run("run_afno.sh", "--seed=1", "-h", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: train_gpt2.py")
    assert done.stderr == "" and not list(tmp_path.iterdir())


def test_an_estimate_tells_first_what_runs_here():
    done = run("run_afno.sh", "--estimate", "--num_iterations", 3000)
    here, race = done.stdout.split(RACE)
    assert " in 3,000 steps" in here and "vocabulary 256;" in here
    assert " in 3,000 steps" in race and "vocabulary 50,257;" in race and "this CPU" not in race
    # What only the race refuses is no fault of the run here.
    done = run("run_afno.sh", "--estimate", "--num_iterations", 1000)
    assert done.returncode == 0 and " in 1,000 steps" in done.stdout
    assert done.stderr.splitlines()[-1].endswith("2300 steps of warm-up and warm-down "
                                                 "(--help lists the flags)")


def test_paths_are_the_callers(tmp_path):
    """From another folder, in which things are called as the packages that the scripts need."""
    shutil.copytree(ROOT / "data/tinyshakespeare", tmp_path / "my")
    (tmp_path / "torch").mkdir()
    (tmp_path / "numpy.py").touch()
    flags = ["--num_iterations", 1, "--val_tokens", 128, "--sequence_length", 128]
    done = run("run_nanoformer.sh", "--mixer=mha", *flags, "--estimate", "--no-estimate",
               "--output_dir=unused", "--output_dir", "out", "--run_name=unused", "--run_name=mine",
               "--input_bin", "my/tr*.bin", "--input_val_bin", "my/val.bin", cwd=tmp_path)
    assert done.returncode == 0 and "a sample:" in done.stdout, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"my", "numpy.py", "out", "torch"}
    assert {path.name for path in (tmp_path / "out/mine").glob("*.*t")} == {
        "best.pt", "log.txt", "model.pt", "test_metrics.txt"}
    assert "\ncheckpoint: out/mine/model.pt, step 1, val_loss " in done.stderr
    assert "=== config\n" in (text := (tmp_path / "out/mine/log.txt").read_text())
    assert '"my/train.bin"' in text and str(ROOT) in done.stderr


# ---------------- GPUs

# A Python that sees two GPUs, but has no network.
TWO_GPUS = """import os, sys, types
if any("train_gpt2" in word or "torch.cuda" in word for word in sys.orig_argv):
    import torch
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2
    torch.cuda.get_device_name = lambda device=None: "NVIDIA H200"
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        total_memory=140 * 2**30)
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
if any("fineweb.py" in word for word in sys.orig_argv):
    os._exit(9)
"""
# A torch of another version and build.
TORCH = """import types
__version__ = {version!r}
version = types.SimpleNamespace(cuda={cuda!r})
class cuda:
    is_available = lambda: False
    def init(): raise RuntimeError("torch says why")
"""
NVIDIA_SMI = """#!/bin/sh
case $1 in
    -L) echo "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-0)" ;;
    *) echo "| NVIDIA-SMI 550.54    Driver Version: 550.54    CUDA Version: {driver}    |" ;;
esac
"""


@pytest.fixture
def two_gpus(tmp_path):
    return dict(PYTHONPATH=str(fake(tmp_path / "two", "sitecustomize.py", TWO_GPUS)),
                CUDA_VISIBLE_DEVICES="0,1")


# The second of two machines.
SECOND = dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1")


@pytest.mark.parametrize("wrong", [
    "GPUS=two", "GPUS=0", "GPUS=" + 99 * "9", "NNODES=two", "NNODES=0", "NODE_RANK=2",
    "NODE_RANK=", "NODE_RANK=-1", "NODE_RANK=01", "MASTER_ADDR=", "MASTER_PORT=65536",
    "MASTER_PORT=http"])
def test_a_wrong_number_of_gpus_or_machines_is_one_line(idle, wrong):
    refused(run("run_fftnet.sh", **idle | SECOND | dict([wrong.split("=")])), wrong)


def test_processes_that_cannot_share_a_step_are_refused(tmp_path):
    """Those of all machines: one machine's alone could share it."""
    done = run("run_fftnet.sh", "--output_dir", tmp_path, **SECOND | dict(NNODES="3", GPUS="8"))
    refused(done, "cannot be shared evenly by 24 processes")
    assert not list(tmp_path.iterdir())


def test_more_processes_than_gpus_are_refused(two_gpus):
    """On each machine."""
    refused(run("run_afno.sh", **two_gpus, **SECOND, GPUS="4"), "process 4 has no GPU: there are 2")


@pytest.mark.parametrize("env, words", [
    (dict(GPUS="1", MASTER_ADDR="unread"), []),
    (dict(GPUS="2"), "--nproc_per_node=2 --standalone".split()),
    (SECOND | dict(GPUS="1"), "--nproc_per_node=1 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 "
                              "--master_port=29500".split()),
    (SECOND | dict(GPUS="4", NODE_RANK="0", MASTER_PORT="4000"),
     "--nproc_per_node=4 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 "
     "--master_port=4000".split()),
])
def test_what_torchrun_is_told(idle, env, words):
    """And the first machine writes the sample."""
    done = run("run_fftnet.sh", "--device=cpu", **idle, **env)
    assert done.returncode == 0, done.stderr
    train, *sample = (line.split() for line in done.stderr.splitlines() if line[0] == "+")
    start = ["-P", "-m", "torch.distributed.run"] if words else []
    assert train[2:train.index("train_gpt2.py")] == start + words
    assert len(sample) == (env.get("NODE_RANK", "0") == "0")


def test_with_a_gpu_the_race_is_all_that_is_told(two_gpus):
    done = run("run_afno.sh", "--estimate", **two_gpus)
    assert done.returncode == 0 and RACE not in done.stdout, done.stderr
    assert "vocabulary 50,257;" in done.stdout and "this GPU at 50% MFU" in done.stdout


def test_shards_are_fetched_into_the_repository(idle, tmp_path):
    done = run("run_afno.sh", **idle, cwd=tmp_path)
    assert done.returncode == 9 and done.stdout == ""
    line, = done.stderr.splitlines()
    assert line.endswith(f" {ROOT}/data/fineweb.py 9 --repo kjj0/fineweb10B-gpt2 --out "
                         f"{ROOT}/data/fineweb10B")
    for own in ("--input_bin=my.bin", "--data=mine"):
        done = run("run_afno.sh", own, **idle)
        assert done.returncode == 0 and "fineweb10B" not in done.stdout + done.stderr


def test_the_small_run_on_a_machine_with_a_gpu(idle):
    done = run("run_afno.sh", "--device=cpu", **idle)
    assert done.returncode == 0 and "--device cpu: this is the embedded run" in done.stdout
    assert "fineweb" not in done.stderr and "--model d12" not in done.stderr


@pytest.mark.parametrize("version, cuda, driver, words", [
    ("2.13.0", "13.0", "12.4", ["CUDA 13.0", "12.4", "pip install 'torch==2.10.0'"]),
    ("2.13.0", "13.0", "N/A", ["CUDA 13.0", "an older one", "pip install 'torch==2.10.0'"]),
    ("2.13.0+cpu", None, "13.0", ["built without CUDA", "--force-reinstall 'torch==2.13.0'"]),
    ("2.13.0+cpu", None, "12.4", ["built without CUDA", "--force-reinstall 'torch==2.10.0'"]),
    ("2.13.0", "13.0", "13.1", ["torch says why"]),
])
def test_a_gpu_that_torch_cannot_use_stops_the_script(version, cuda, driver, words, tmp_path):
    torch = TORCH.format(version=version, cuda=cuda)
    env = dict(PYTHONPATH=str(fake(tmp_path, "torch.py", torch)), CUDA_VISIBLE_DEVICES="0",
               PATH=f"{fake(tmp_path, 'nvidia-smi', NVIDIA_SMI.format(driver=driver))}:"
                    f"{os.environ['PATH']}")
    refused(run("run_afno.sh", **env), "--device cpu", *words)
    # Who hides the GPU, or asks for the CPU, gets as far as the trainer, which needs a real torch.
    assert "GPU" not in run("run_afno.sh", **env | {"CUDA_VISIBLE_DEVICES": ""}).stderr
    assert "GPU" not in run("run_afno.sh", "--device", "cpu", **env).stderr


# ---------------- the environment

def test_an_old_torch_is_one_line(tmp_path):
    torch = TORCH.format(version="2.4.1", cuda="12.1")
    done = run("run_afno.sh", PYTHONPATH=str(fake(tmp_path, "torch.py", torch)))
    refused(done, "torch 2.4.1 is too old", "2.10 or later", "pip install -r requirements.txt")


def test_no_python_is_one_line():
    refused(run("run_afno.sh", PYTHON="no_such_python"), "Python 3.11", "no_such_python", "PYTHON=")


def wheel(folder, name, version, text=""):
    """A wheel of one package, which pip installs without a network."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", text)
        archive.writestr(f"{info}/METADATA",
                         f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


class Copy:
    """A copy of what makes the environment, its requirements from a folder of small wheels.

    Its Python has no torch, until `python` is given.
    """
    def __init__(self, folder):
        self.root = folder / "repository"
        self.venv = self.root / ".venv"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        (self.root / "requirements.txt").write_text("torch==2.13.0\nnumpy\n")
        wheel(folder / "wheels", "torch", "2.13.0", TORCH.format(version="2.13.0", cuda=None))
        wheel(folder / "wheels", "numpy", "2.0")
        wheel(folder / "wheels", "small", "1.0")
        fake(folder / "without", "torch.py", "raise ImportError")
        fake(folder, "python", f"#!/bin/sh\nPYTHONPATH={folder}/without exec {sys.executable} "
                               '"$@"\n')
        self.env = os.environ | dict(PYTHON=str(folder / "python"), PIP_NO_INDEX="1",
                                     PIP_FIND_LINKS=str(folder / "wheels"))

    def start(self, before=""):
        """Source setup_env.sh -> what it prints, then the Python and the torch that it found."""
        script = f'{before}\nsource scripts/setup_env.sh\necho "$python $torch_version"'
        return subprocess.run(["bash", "-c", script], cwd=self.root, env=self.env,
                              capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("state", ["killed while made", "its Python is gone"])
def test_the_environment_is_made_or_mended(state, tmp_path):
    copy = Copy(tmp_path)
    if state == "its Python is gone":
        (copy.venv / "bin").mkdir(parents=True)
        (copy.venv / "bin/python").symlink_to("/no/such/python")
    else:
        # No pip, and half a torch
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", copy.venv], check=True)
        packages, = copy.venv.glob("lib/*/site-packages")
        fake(packages / "torch", "__init__.py", "import missing")
    done = copy.start()
    assert (done.returncode, done.stdout) == (0, ".venv/bin/python 2.13.0\n"), done.stderr
    assert (copy.venv / "installed").read_text() == "torch==2.13.0\nnumpy\n"


def test_pip_says_itself_what_is_wrong(tmp_path):
    copy = Copy(tmp_path)
    copy.env["PYTHON"] = sys.executable
    done = copy.start("EXTRA=(no-such-package)")
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.splitlines()[1:] == ["cannot install no-such-package: ERROR: No matching "
                                            "distribution found for no-such-package"]


MANAGED = """import sys, sysconfig
true = sysconfig.get_path
def get_path(name, *more, **named):
    return {folder!r} if name == "stdlib" else true(name, *more, **named)
sys.base_prefix = sys.prefix
sysconfig.get_path = get_path
"""


def test_a_managed_python_is_left_alone(tmp_path):
    """PEP 668: what is missing goes into .venv, which sees the packages of the system."""
    copy = Copy(tmp_path)
    fake(tmp_path / "stdlib", "EXTERNALLY-MANAGED", "")
    fake(tmp_path / "managed", "sitecustomize.py",
         MANAGED.format(folder=str(tmp_path / "stdlib")))
    fake(tmp_path, "python", f"#!/bin/sh\nPYTHONPATH={tmp_path}/managed exec {sys.executable} "
                             '"$@"\n')
    done = copy.start("EXTRA=(small)")
    assert done.returncode == 0 and done.stdout == ".venv/bin/python 2.13.0\n", done.stderr
    assert "system-site-packages = true" in (copy.venv / "pyvenv.cfg").read_text()
    assert list(copy.venv.glob("lib/*/site-packages/small/__init__.py"))


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = [*ROOT.glob("run_*.sh"), *ROOT.glob("scripts/*.sh"), *ROOT.glob(".ci/*")]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
