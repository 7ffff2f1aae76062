"""The leak lab: five planted leaks of five kinds are found, five causal modules pass, and whatever
is wrong with a stranger is one line."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from share import leaks, strangers

ROOT = Path(__file__).resolve().parent.parent
# A stranger's file: nothing of ours is imported, though its neighbour has a name of ours.
STRANGERS = '''
import math
import torch
import torch.nn as nn
import torch.nn.functional as F
from attention import masked


class Conv(nn.Module):
    def __init__(self, dim, left=3):
        super().__init__()
        self.left = left
        self.conv = nn.Conv1d(dim, dim, 4)

    def forward(self, x):
        return self.conv(F.pad(x.mT, (self.left, 3 - self.left))).mT


class BatchNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x):
        return self.norm(x.mT).mT


class Mean(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x):
        return self.proj(x + x.mean(1, keepdim=True))


class LSTM(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.rnn = nn.LSTM(dim, dim // 2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.rnn(x)


class GRU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.rnn = nn.GRU(dim, dim, batch_first=True)

    def forward(self, x):
        return self.rnn(x)


class Attention(nn.Module):
    def __init__(self, dim, diagonal=0):
        super().__init__()
        self.diagonal = diagonal
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x):
        return masked(*self.qkv(x).chunk(3, -1), self.diagonal)


class CumulativeMean(nn.Module):
    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.size(1) + 1)[:, None]


class Remembers(nn.Module):
    last = 0.0

    def forward(self, x):
        y = x.cumsum(1) + self.last
        self.last = x.mean().detach()
        return y


class Grid(nn.Module):
    def forward(self, x):
        return x.cumsum(1) * torch.linspace(1, 2, x.size(1))[:, None]


class Rows(nn.Module):
    def forward(self, x):
        return x.cumsum(1) + x.mean(0)


class Half(nn.Module):
    def forward(self, x):
        return x.bfloat16().cumsum(1) + 1e-3 * x.bfloat16().mean(1, keepdim=True)


class Spectrum(nn.Module):
    """A causal convolution by an FFT in fp32."""
    def forward(self, x):
        n = 2 * x.size(1)
        kernel = torch.exp(-torch.arange(x.size(1)) / 9)[:, None]
        z = torch.fft.rfft(x.float(), n=n, dim=1) * torch.fft.rfft(kernel, n=n, dim=0)
        return torch.fft.irfft(z, n=n, dim=1)[:, :x.size(1)]


class Dropout(nn.Module):
    def forward(self, x):
        return F.dropout(x.cumsum(1), 0.3, self.training)


class Routed(nn.Module):
    """Dropout over as many tokens as are chosen: a token's draw depends on the others."""
    def forward(self, x):
        y = x.cumsum(1)
        chosen = y[..., 0] > 0
        return y.masked_scatter(chosen[..., None], F.dropout(y[chosen], 0.3, self.training))


class Tokens(nn.Module):
    """A language model, (B, T) -> (logits, None)."""
    def __init__(self, vocab_size=40, ahead=0):
        super().__init__()
        self.ahead = ahead
        self.wte = nn.Embedding(vocab_size, 16)
        self.rnn = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, vocab_size)

    def forward(self, idx, targets=None):
        x = self.wte(idx)
        return self.head(self.rnn(x + self.ahead * x.roll(-1, 1))[0]), None


def make(dim):
    """A factory."""
    return nn.Sequential(Conv(dim), nn.Tanh(), GRU(dim))


class Crashes(nn.Module):
    def forward(self, x):
        raise RuntimeError("it is\\nbroken")


class Shrinks(nn.Module):
    def forward(self, x):
        return x.mean(1)


class Nan(nn.Module):
    def forward(self, x):
        return x / 0


built = Conv(8)
'''
NEIGHBOUR = '''
import math
import torch


def masked(q, k, v, diagonal):
    hidden = torch.ones(q.size(1), q.size(1)).tril(diagonal) == 0
    return (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(hidden, -math.inf).softmax(-1) @ v
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the stranger's files; what the lab imports is forgotten."""
    (tmp_path / "mine.py").write_text(STRANGERS)
    (tmp_path / "attention.py").write_text(NEIGHBOUR)
    modules, path = dict(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    # Enough for the leaks that it is to find.
    monkeypatch.setattr(leaks, "STEPS", 60)
    yield tmp_path
    sys.path[:] = path
    for name in "stranger", "attention":
        sys.modules.pop(name, None)
    sys.modules.update(modules)


@pytest.fixture
def lab(folder, capsys):
    """Words of a command -> (exit code, the report of --json, or what is said on stderr)."""
    def call(*words):
        code = leaks.main([*words, "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else err
    return call


def failing(report):
    return {check for check, row in report["checks"].items() if row["failed"]}


DIM = '{"dim": 16}'
LEAKY = [("Conv", '{"dim": 16, "left": 2}', {"future", "prefix", "gradient", "train", "learn"}, 1),
         ("BatchNorm", DIM, {"train"}, 0),
         ("Mean", DIM, {"future", "prefix", "gradient", "train"}, 150),
         ("LSTM", DIM, {"future", "prefix", "gradient", "train", "learn"}, None),
         ("Attention", '{"dim": 16, "diagonal": 1}', {"future", "prefix", "gradient", "train"}, 1)]


@pytest.mark.parametrize("name, kwargs, checks, ahead", LEAKY, ids=[row[0] for row in LEAKY])
def test_five_leaks_are_found(lab, name, kwargs, checks, ahead):
    code, report = lab(f"mine.py:{name}", "--kwargs", kwargs)
    assert code == 1 and report["leaks"] and "leaks. It " in report["verdict"]
    assert checks <= failing(report) and not {"batch", "state"} & failing(report)
    assert ahead in (None, report["steps_ahead"])


@pytest.mark.parametrize("name, kwargs", [("Conv", DIM), ("GRU", DIM), ("Attention", DIM),
                                          ("CumulativeMean", "{}"), ("make", DIM)])
def test_causal_modules_pass(lab, name, kwargs):
    code, report = lab(f"mine.py:{name}", "--kwargs", kwargs)
    assert code == 0 and not failing(report) and not report["not_done"]
    assert "down to 1e-11 of the largest output" in report["verdict"]
    assert report["steps_ahead"] == 0 and report["steps_back"] >= 3


def test_from_another_folder_by_the_command_line(folder):
    command = [sys.executable, ROOT / "test_causality.py", "mine.py:Conv", "--kwargs",
               '{"dim": 16, "left": 2}']
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr
    lines = done.stdout.splitlines()
    assert re.match(r"mine\.py:Conv: floats \(2, 151, 16\), 1,040 parameters", lines[0])
    assert [line.split()[2] for line in lines if line.startswith(("future", "state"))] == [
        "LEAK", "ok"]
    assert "leaks. It sees the future one step ahead" in done.stdout


def test_a_hidden_leak_is_found_only_with_weights_drawn_anew(lab):
    code, report = lab("mine.py:Mean", "--kwargs", DIM, "--as_is")
    assert failing(report) <= {"learn"} and report["weights"] == "as they are"
    assert lab("mine.py:Mean", "--kwargs", DIM)[0] == 1


@pytest.mark.parametrize("name, checks, words", [
    ("Remembers", {"state"}, "keeps a state"),
    ("Grid", {"prefix"}, "how long the text is"),
    ("Rows", {"batch", "train"}, "mixes the rows of a batch"),
])
def test_other_leaks_are_told_apart(lab, name, checks, words):
    code, report = lab(f"mine.py:{name}")
    assert code == 1 and failing(report) == checks and words in report["verdict"]


@pytest.mark.parametrize("name", ["Dropout", "Routed"])
def test_dropout_is_a_note(lab, name):
    code, report = lab(f"mine.py:{name}")
    assert code == 0 and failing(report) == {"training"}
    assert "training and evaluation differ" in report["notes"][0]


def test_what_mixes_nothing_is_told(lab):
    code, report = lab("torch.nn:Linear", "--kwargs", '{"in_features": 8, "out_features": 5}')
    assert code == 0 and "mixes no tokens" in report["notes"][0]


@pytest.mark.parametrize("name, precision, seen", [("Half", "bfloat16", 0.1),
                                                   ("Spectrum", "float32", 1e-4)])
def test_low_precision_says_what_it_could_have_seen(lab, name, precision, seen):
    # Half leaks 1e-3 of a mean: less than that.
    code, report = lab(f"mine.py:{name}")
    assert code == 0 and (report["precision"], report["seen_down_to"]) == (precision, seen)
    assert f"down to {seen:g} of the largest output" in report["verdict"]


def test_a_language_model_and_its_vocabulary(lab):
    code, report = lab("mine.py:Tokens")
    assert code == 0 and report["input"] == "ids (2, 151) below 40" and not failing(report)
    code, report = lab("mine.py:Tokens", "--kwargs", "{'ahead': 1}", "--T", "20")
    assert code == 1 and report["input"] == "ids (2, 20) below 40"
    assert {"future", "gradient", "learn"} <= failing(report)


def test_a_module_that_is_there_already(lab):
    assert lab("mine.py:built")[0] == 0
    assert lab("mine.py:built", "--kwargs", DIM) == (
        2, "mine.py:built: is built already: drop --kwargs\n")


@pytest.mark.parametrize("words, line", [
    (["mine.py:Crashes"], "mine.py:Crashes: given floats: RuntimeError: it is"),
    (["mine.py:Shrinks"], "gives (2, 64) for (2, 151, 64): it must give (B, T, width)"),
    (["mine.py:Nan"], "gives NaN or Inf"),
    (["mine.py:Nobody"], "has no Nobody"),
    (["mine.py:math"], "is a module, no class"),
    (["mine.py"], "say which: mine.py:NAME, one of Conv, BatchNorm"),
    (["mine.py:Conv"], "missing 1 required positional argument: 'dim'"),
    (["mine.py:Conv", "--kwargs", '{"dmi": 3}'], "unexpected keyword argument 'dmi'"),
    (["mine.py:Conv", "--kwargs", "dim=3"], "must be an object as JSON has it"),
    (["mine.py:Conv", "--kwargs", '{"dim": 8}', "--dim", "9"], "channels"),
    (["yours.py:Conv"], "yours.py: no such file"),
    (["no_such_package:Conv"], "No module named 'no_such_package'"),
    (["bad.py:Conv"], "SyntaxError"),
    (["exits.py:Conv"], "cannot be imported: SystemExit: 3"),
    (["--hf", "llama", "mine.py:Conv"], "name one model"),
    (["mine.py:Conv", "--T", "2"], "--T 2: at least 4"),
    (["mine.py:Conv", "--dim", "8", "--vocab", "8"], "drop one"),
    (["mine.py:Conv", "--kwarg", "{}"], "did you mean --kwargs?"),
], ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "")
def test_what_is_wrong_is_one_line(lab, folder, words, line):
    (folder / "bad.py").write_text("x = = 3\n")
    (folder / "exits.py").write_text("import sys\nsys.exit(3)\n")
    code, said = lab(*words)
    assert code == 2 and line in said and said.count("\n") == 1


# ----------------------------------------------------------------- transformers

@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def test_a_kind_of_transformers(lab, transformers):
    code, report = lab("--hf", "gpt2", "--T", "40")
    assert code == 0 and failing(report) == {"training"} and not report["not_done"]
    for check in "cache", "padding", "gradient", "learn":
        assert report["checks"][check]["measured"] is not None


def test_fnet_sees_the_future(lab, transformers):
    code, report = lab("--hf", "fnet", "--T", "40")
    assert code == 1 and {"future", "prefix", "gradient", "learn"} <= failing(report)


def test_trained_weights_are_kept(lab, transformers, folder):
    config = transformers.LlamaConfig(vocab_size=48, hidden_size=32, intermediate_size=48,
                                      num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained("saved")
    code, report = lab("--hf", "saved", "--T", "40")
    assert code == 0 and not failing(report) and report["weights"] == "as they are"
    for path in (folder / "saved").glob("*.safetensors"):
        path.unlink()
    assert strangers.from_transformers("saved", {}).trained is False


@pytest.mark.parametrize("name, line", [("t5", "has no language model"),
                                        ("nowhere/none", "no such kind, folder or model")])
def test_what_is_no_causal_model_is_one_line(lab, transformers, monkeypatch, name, line):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, said = lab("--hf", name)
    assert code == 2 and line in said and said.count("\n") == 1


def test_without_transformers_one_line_names_the_command(lab, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert lab("--hf", "llama") == (2, "--hf needs transformers: pip install transformers\n")


# ----------------------------------------------------------------- the record

RECORD = ROOT / "records/2026-11-29_who-leaks"
ROW = re.compile(r"\| \[[^]]*\]\(([\w-]+)\.json\) \|(.*)\|")
# The columns of its tables behind the name.
COLUMNS = "future", "prefix", "learn", "padding", "cache"


def said_of(report, check):
    """What the record says of a check: — where it was not done, ok, or the number."""
    row = report["checks"][check]
    if row["measured"] is None:
        return "—"
    if not row["failed"]:
        return "ok"
    return f"{row['measured']:.0f}" if check == "learn" else f"{row['measured']:.2g}"


def test_the_record_says_what_the_lab_found():
    rows = ROW.findall((RECORD / "README.md").read_text())
    reports = {path.stem: json.loads(path.read_text()) for path in RECORD.glob("*.json")}
    assert {name for name, _ in rows} == reports.keys() and len(rows) > 30
    for name, cells in rows:
        said = [cell.strip() for cell in cells.split("|")]
        assert said[-len(COLUMNS):] == [said_of(reports[name], check) for check in COLUMNS], name
