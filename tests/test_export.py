"""Exports: what transformers makes of them, what reads them back, --init_from, int8 weights."""
import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, fields

import pytest
import torch

import export
import sample
from sample import make_tokenizer
from share.quantize import Int8GPT, compare, weight_bytes
from support import exported
from support.checkpoint import write
from support.decode import Context, generate
from tests.checks import awake, small
from tests.runs import steps, train
from train_gpt2 import GPT, Config, parse

pytest.importorskip("safetensors")

V = 256
T = 40
LLAMA = dict(mixer="attn", logit_softcap=0.0)
OWN = "SpectralForCausalLM"
# {case: (class, knobs)}
CASES = {
    "attention": ("NanoChatForCausalLM", dict(mixer="attn")),
    "tied, gelu": ("NanoChatForCausalLM", dict(mixer="attn", mlp="gelu", tie_embeddings=True)),
    "baseline": ("ArceeForCausalLM", LLAMA | dict(
        mlp="gelu", head_norm="none", branch_scale=True, tie_embeddings=True, pad_vocab=False,
        embed_norm=False)),
    "scaled norms": ("LlamaForCausalLM", LLAMA | dict(
        mlp="swiglu", head_norm="none", n_kv_head=1, norm="lns")),
    "folded": ("Qwen3ForCausalLM", LLAMA | dict(
        mlp="swiglu", residual="gated", logit_scale=0.7, logit_gain=True, embed_norm=False,
        embed_scale=True)),
    "no cap": ("ApertusForCausalLM", LLAMA | dict(tie_embeddings=True)),
    "afno": (OWN, dict(mixer="afno", output_conv=True)),
    "hybrid": (OWN, dict(mixer="afno,attn", value_residual=True, x0_shortcut=True, unet_skips=True,
                         short_conv=True, window=(0, 9))),
    "packed": (OWN, dict(mixer="afno,attn", afno_taps=16, short_conv=True, output_conv=True,
                         batches="packed", document_token=7)),
    "fan": (OWN, dict(mixer="fan", head_norm="qkv", linear="cola", norm="hybrid_star", mlp="swiglu",
                      residual="gated", tie_embeddings=True, n_kv_head=1)),
    "gdn hybrid": (OWN, dict(mixer="gdn,fan", n_kv_head=1, mlp="polynorm_gated", norm="lns",
                             residual="gpas", tie_embeddings=True, logit_softcap=0.0)),
    "fftnet": (OWN, dict(mixer="fftnet", mlp="gelu", norm="pre_post", pos="sinusoidal",
                         embed_scale=True, embed_norm=False, logit_softcap=0.0)),
}


def gpt(**knobs):
    cfg = Config(**dict(n_layer=2, n_head=2, n_embd=32, sequence_length=T, vocab_size=V)
                 | small(knobs["mixer"]) | knobs)
    return awake(GPT(cfg)).eval()


def checkpoint_of(model, folder, **more):
    """-> the folder of a run that has this model."""
    write(folder / "model.pt", dict(model=model.state_dict(), config=asdict(model.cfg), step=7)
          | more)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """case -> (the model, its run's folder, its export), made once."""
    made = {}

    def make(case):
        if case not in made:
            place = tmp_path_factory.mktemp("export")
            model = gpt(**CASES[case][1])
            run = checkpoint_of(model, place / "run")
            export.main([str(run), "--out", str(place / "out")])
            made[case] = model, run, place / "out"
        return made[case]

    return make


@pytest.fixture
def auto(tmp_path, monkeypatch):
    """folder -> its model, by transformers."""
    transformers = pytest.importorskip("transformers")
    modules = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def load(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

    return load


def tokens(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


def greedy(model, idx, n):
    context = Context(model, len(idx))
    context.add(idx)
    columns = generate(context, n, [torch.Generator() for _ in idx], temperature=0)
    return torch.tensor([*columns]).T


# --------------------------------------------------------------------------------------------------
# transformers

@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_transformers_computes_the_same(exports, auto, case):
    model, _, folder = exports(case)
    theirs = auto(folder)
    assert type(theirs).__name__ == CASES[case][0]
    idx = tokens(2, T)
    logits = model(idx)
    assert logits.std() > 0.1
    tolerance = 0 if CASES[case][0] == OWN else 1e-5
    assert (theirs(idx).logits - logits).abs().max() <= tolerance
    # A class of transformers knows no end of its context: ours moves on by half of it.
    n = T + 9 if CASES[case][0] == OWN else T - 5
    written = theirs.generate(idx[:, :5], max_new_tokens=n, do_sample=False)
    assert torch.equal(written[:, 5:], greedy(model, idx[:, :5], n))


@torch.no_grad()
def test_another_program_loads_them(exports, tmp_path):
    """A fresh process, without this repository and what only it needs."""
    pytest.importorskip("transformers")
    cases = ["hybrid", "folded"]
    idx = tokens(1, T)
    code = f"""
import json, sys
sys.modules["tiktoken"] = None
from transformers import AutoModelForCausalLM
import torch
idx = torch.tensor({idx.tolist()})
for folder in {[str(exports(case)[2]) for case in cases]}:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    written = model.generate(idx[:, :5], max_new_tokens=20, do_sample=False)[:, 5:]
    print(json.dumps([model(idx).logits.tolist(), written.tolist()]))
assert "train_gpt2" not in sys.modules
"""
    env = os.environ | dict(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for case, line in zip(cases, done.stdout.splitlines(), strict=True):
        model = exports(case)[0]
        logits, written = json.loads(line)
        assert (torch.tensor(logits) - model(idx)).abs().max() < 1e-5
        assert torch.equal(torch.tensor(written), greedy(model, idx[:, :5], 20))


@torch.no_grad()
def test_beams_loss_and_padding(exports, auto):
    model, _, folder = exports("hybrid")
    theirs = auto(folder)
    idx = tokens(2, 9)
    beams = [theirs.generate(idx, max_new_tokens=12, num_beams=3, do_sample=False, use_cache=cache)
             for cache in (True, False)]
    assert torch.equal(*beams)
    labels = idx.clone()
    labels[0, 3] = -100
    targets = labels[:, 1:].masked_fill(labels[:, 1:] < 0, -1)
    assert float(theirs(idx, labels=labels).loss) == pytest.approx(float(model(idx[:, :-1],
                                                                              targets)), abs=1e-6)
    mask = torch.ones_like(idx)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="padding in front"):
        theirs(idx, attention_mask=mask)
    with pytest.raises(ValueError, match="rows of one length"):
        theirs.generate(idx, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match="at most 40"):
        theirs(tokens(1, T + 1))


def test_the_sources_need_torch_and_transformers_only():
    for file, text in export.sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                name = name.split(".")[0]
                # fla: optional, and its absence is caught.
                known = sys.stdlib_module_names | {"torch", "transformers", "fla"}
                assert name in known, f"{file} needs {name}"
    assert "Muon" not in text and "Windows" not in export.model_source()


@pytest.mark.parametrize("name, vocab", [("bytes", 256), ("gpt2", 50257)])
def test_the_tokenizer_is_ours(tmp_path, name, vocab):
    transformers = pytest.importorskip("transformers")
    ours = make_tokenizer(name, vocab)
    for file, content in export.tokenizer_files(name, ours, T).items():
        (tmp_path / file).write_text(json.dumps(content))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("To be, or not\n\n  to be: it's 1234567!", "naïve  日本語 \x00\t e\u0301 \U0001f600",
                 "  \n \n", "I'LL we'll"):
        ids = theirs(text).input_ids
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.stop


def test_the_card_says_what_is_known(tmp_path):
    run = checkpoint_of(gpt(mixer="attn", window=9, zero_init=False), tmp_path / "run",
                        progress=dict(tokens=1234567), tokenizer="bytes")
    (run / "log.txt").write_text("step:7/9 val_loss:1.2345 train_time:1ms\n")
    export.main([str(run), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/README.md").read_text()
    for part in ("license: mit", "1,234,567 tokens", "7 steps", "1.2345", "(log.txt)", "window 9",
                 "--no-zero_init", "trust_remote_code", "tokenizer: bytes"):
        assert part in text, part
    assert (tmp_path / "out/log.txt").is_file() and (tmp_path / "out/LICENSE").is_file()


# --------------------------------------------------------------------------------------------------
# Read back

@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_an_export_is_read_back(exports, case):
    model, _, folder = exports(case)
    back = sample.build(exported.read(folder, Config), folder)
    idx = tokens(2, T)
    tolerance = 0 if CASES[case][0] == OWN else 1e-5
    assert (back(idx) - model(idx)).abs().max() <= tolerance


def test_sample_writes_the_same(exports, capsys):
    _, run, folder = exports("hybrid")
    texts = []
    for source in ([str(run)], ["--load", str(folder)]):
        sample.main([*source, "--temperature", "0", "--max_new_tokens", "20", "--prompt", "To"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 5


def refusal(main, *argv):
    with pytest.raises(SystemExit) as e:
        main([*map(str, argv)])
    line = e.value.code
    assert isinstance(line, str) and "\n" not in line
    return line


def test_what_is_refused(exports, tmp_path, monkeypatch):
    _, run, folder = exports("attention")
    assert "no empty folder" in refusal(export.main, run, "--out", folder)
    (tmp_path / "file").touch()
    assert "no empty folder" in refusal(export.main, run, "--out", tmp_path / "file")
    assert "cannot be written" in refusal(export.main, run, "--out", tmp_path / "file/below")
    assert "no such file" in refusal(export.main, tmp_path / "none", "--out", tmp_path / "out")
    assert "required: --out" in refusal(export.main, run)
    assert "two models" in refusal(sample.main, run, "--load", folder)
    assert "no such file" in refusal(sample.main, "--load", run)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refusal(export.main, run, "--out", tmp_path / "out")
    assert "pip install safetensors" in refusal(sample.main, "--load", folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["attention", "afno"])
def test_a_damaged_export_is_refused(exports, tmp_path, case):
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(exports(case)[2], tmp_path / "copy")
    path = folder / "model.safetensors"
    good = path.read_bytes()
    settings = (folder / "config.json").read_text()

    for place in (9, 300, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1:])
        assert "damaged" in refusal(sample.main, "--load", folder)
    path.write_bytes(good[:-100])
    assert "cut off" in refusal(sample.main, "--load", folder)

    # As transformers writes it anew: there is no checksum.
    path.write_bytes(good)
    weights = load_file(path)
    first = next(iter(weights))
    save_file({k: w for k, w in weights.items() if k != first}, path)
    assert first.split(".")[-2] in refusal(sample.main, "--load", folder)
    gain = next((k for k in weights if "layernorm" in k), None)
    if gain:
        save_file(weights | {gain: 2 * weights[gain]}, path)
        assert "was trained" in refusal(sample.main, "--load", folder)
    path.write_bytes(good)
    for text in (settings[:-20], "{}", settings.replace('"n_layer": 2', '"n_layer": "x"'),
                 settings.replace('"n_layer": 2', '"n_layer": 3')):
        (folder / "config.json").write_text(text)
        assert str(folder) in refusal(sample.main, "--load", folder)


# --------------------------------------------------------------------------------------------------
# --init_from

def test_how_a_run_trains_is_its_own():
    """None of the fields below "Optimization" is a setting of the model."""
    names = [f.name for f in fields(Config)]
    assert not {*names[names.index("optim"):]} - exported.OF_TRAINING


@pytest.mark.parametrize("mixer, exported", [("attn", False), ("attn", True), ("afno", True)])
def test_training_starts_from_weights(tmp_path, shards, mixer, exported):
    # What the export of attention has folded into its weights is told by its own flags.
    knobs = shards | small(mixer) | dict(mixer=mixer, pad_vocab=False)
    loss, source = train(tmp_path / "a", **knobs)
    if exported:
        export.main([str(source), "--out", str(tmp_path / "out")])
        source = tmp_path / "out"
    start = dict(init_from=str(source), seed=3, learning_rate=0.001)
    _, run = train(tmp_path / "b", **knobs | start)
    assert steps(run, "val")[0] == pytest.approx(loss, abs=1e-4)
    assert "starts from the weights of step 5" in (run / "log.txt").read_text()
    # It goes on as any run does: from its own weights.
    _, again = train(tmp_path / "b", **knobs | start | dict(resume="auto", num_iterations=6))
    assert again == run and "goes on from step 5" in (run / "log.txt").read_text()
    assert (run / "log.txt").read_text().count("starts from") == 1


def test_other_weights_are_refused_by_name(tmp_path, shards):
    _, run = train(tmp_path / "a", **shards)
    knobs = shards | dict(init_from=str(run), output_dir=str(tmp_path / "b"))

    def line(**other):
        with pytest.raises(SystemExit) as e:
            train(tmp_path / "b", **knobs | other)
        assert "\n" not in e.value.code
        return e.value.code

    assert "--mlp is gelu, was relu2" in line(mlp="gelu")
    assert "--n_embd is 64, was 32" in line(n_embd=64)
    assert "--logit_softcap is 0.0, was 15.0" in line(logit_softcap=0.0)
    assert "--vocab_size is 25, was 24" in line(vocab_size=25)
    assert "no such file" in line(init_from=str(tmp_path / "none"))
    state = torch.load(run / "model.pt", weights_only=True)
    name = "blocks.0.mlp.fc.weight"
    weights = state["model"]
    for bad, why in ((weights[name][:5], f"{name} is (5, 32) there, (128, 32) here"),
                     (weights[name] * torch.nan, f"{name} are not finite")):
        write(tmp_path / "bad/model.pt", state | dict(model=weights | {name: bad}))
        assert why in line(init_from=str(tmp_path / "bad"))
    del weights[name]
    write(tmp_path / "bad/model.pt", state)
    assert f"{name} is missing there" in line(init_from=str(tmp_path / "bad"))
    assert not (tmp_path / "b").exists()
    assert "drop one" in refusal(parse, "--init_from", run, "--resume", "auto")


# --------------------------------------------------------------------------------------------------
# int8

@pytest.mark.parametrize("case", ["folded", "hybrid", "gdn hybrid", "fftnet"])
@torch.no_grad()
def test_int8_is_near_and_causal(case):
    model = gpt(**CASES[case][1])
    small = Int8GPT(model)
    idx = tokens(2, T)
    logits = model(idx)
    there = small(idx)
    assert 0 < (there - logits).std() < 0.1 * logits.std()
    # Each token is rounded by itself: neither those behind it nor other rows matter.
    assert torch.allclose(small(idx[:1, :7]), there[:1, :7], atol=2e-5)
    c = Context(small, 2)
    c.add(idx[:, :-1])
    c.logits()
    c.add(idx[:, -1:])
    assert torch.allclose(c.logits().float(), there[:, -1], atol=2e-5)


def test_int8_says_what_it_costs(tmp_path, shards):
    loss, run = train(tmp_path, **shards, val_tokens=384)
    model = sample.load(run / "model.pt")
    assert weight_bytes(Int8GPT(model)) < 0.5 * weight_bytes(model)
    line = compare(model, Int8GPT(model))
    assert f"loss {loss:.4f} -> " in line and "tokens/s" in line
    with pytest.raises(SystemExit, match="nowhere"):
        compare(model, model, "nowhere")
    # The embedded text is bytes.
    with pytest.raises(SystemExit, match="another tokenizer"):
        compare(gpt(mixer="attn", vocab_size=50257), model)
    assert "drop it" in refusal(sample.main, run, "--data", "nowhere")
