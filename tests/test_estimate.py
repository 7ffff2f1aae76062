"""What --estimate rests on, and the rates of groups: held against optimizers that have stepped."""
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support import estimate
from support.estimate import count_activations
from support.optim import MATRICES
from tests.checks import small
from tests.runs import RECIPES, recipe
from train_gpt2 import GPT, MIXERS, OPTIMS, Config, build_optimizers, main, parse, roles

SIZES = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=50, sequence_length=16, mixer="attn")


def stepped(optim):
    """A model and its optimizers, two steps after their start."""
    torch.manual_seed(0)
    cfg = Config(**SIZES, optim=optim)
    model = GPT(cfg)
    optimizers = build_optimizers(cfg, model)
    for _ in range(2):
        idx = torch.randint(50, (2, 16))
        model(idx, idx).backward()
        for opt in optimizers:
            opt.step()
    return model, optimizers


def numbers(value):
    """How many numbers a state holds, in whatever lists; single ones, such as steps, not
    counted."""
    if isinstance(value, torch.Tensor):
        return value.numel() if value.numel() > 1 else 0
    if isinstance(value, dict):
        return sum(map(numbers, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(numbers, value))
    return 0


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_builder_says_what_its_optimizer_keeps(optim):
    if optim in ("ademamix", "soap"):
        pytest.importorskip("pytorch_optimizer")
    model, optimizers = stepped(optim)
    table = roles(model)
    kept = {"matrix": 0, "other": 0}
    weights = {"matrix": 0, "other": 0}
    for opt in optimizers:
        for group in opt.param_groups:
            for p in group["params"]:
                kind = "matrix" if table[p] in MATRICES else "other"
                kept[kind] += numbers(opt.state[p])
                weights[kind] += p.numel()
    matrix, other = OPTIMS[optim][0].state_per_weight
    # SOAP's preconditioners depend on the shapes.
    tolerance = 0.5 if optim == "soap" else 0.01
    assert kept["matrix"] / weights["matrix"] == pytest.approx(matrix, rel=tolerance)
    assert kept["other"] / weights["other"] == pytest.approx(other, rel=0.01)


def test_lambdas_have_a_rate_of_their_own():
    cfg = Config(**SIZES, value_residual=True, x0_shortcut=True, unet_skips=True,
                 learning_rate=0.002, lambda_lr_scale=7.0)
    model = GPT(cfg)
    groups = [group for opt in build_optimizers(cfg, model) for group in opt.param_groups]
    for p in (model.v_lambda, model.x0_lambda, model.skip_lambda):
        group = next(g for g in groups if any(p is q for q in g["params"]))
        assert group["peak_lr"] == pytest.approx(0.014)
        assert group["weight_decay"] == 0
    assert any(g["peak_lr"] == 0.002 for g in groups)


# --------------------------------------------------------------------------------------------------
# Memory, counted apart: by what autograd packs away, and by optimizers that step on fake tensors

def saved_bytes(model, shape, half):
    """Bytes of distinct storages that autograd saves in a forward pass, weights left out."""
    weights = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    idx = torch.zeros(shape, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(idx, idx)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def state_bytes(cfg, model):
    """Bytes of weights, gradients and optimizers' states after a step."""
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    total = 2 * sum(4 * p.numel() for p in model.parameters())
    for opt in build_optimizers(cfg, model):
        if hasattr(opt, "look"):
            opt.look(0.5)
            total += 4 * numbers(opt.begun)
        opt.step()
        total += 4 * sum(numbers(state) for state in opt.state.values())
    return total


@pytest.mark.parametrize("kind", ["EMBEDDED", "RACE"])
@pytest.mark.parametrize("name", RECIPES[:6])
def test_the_estimate_is_near_a_count(name, kind, tmp_path, capsys):
    if "neollm" in name:
        pytest.importorskip("pytorch_optimizer")
    flags = recipe(name, kind)
    if not flags:
        pytest.skip("it has no race")
    flags += ["--n_layer", "4", "--output_dir", str(tmp_path)]
    if kind == "RACE":
        flags += ["--vocab_size", "50257", "--device", "cuda"]
    cfg = parse(flags)
    assert main(replace(cfg, estimate=True)) is None
    line = re.search(r"^memory +about ([\d,]+) MiB \(weights and gradients ([\d,]+), optimizer "
                     r"([\d,]+), activations ([\d,]+), logits ([\d,]+)\)$",
                     capsys.readouterr().out, re.MULTILINE)
    told, weights, optimizer, activations, logits = (
        int(figure.replace(",", "")) for figure in line.groups())
    assert told == pytest.approx(weights + optimizer + activations + logits, abs=3)

    cfg = replace(cfg, vocab_size=cfg.vocab_size or 256)
    if cfg.batches == "packed":
        cfg = replace(cfg, document_token=50256)
    shape = (cfg.batch_size, cfg.sequence_length)
    with FakeTensorMode():
        model = GPT(cfg)
        saved = saved_bytes(model, shape, kind == "RACE") / 2**20
        state = state_bytes(cfg, model) / 2**20
    assert weights + optimizer == pytest.approx(state, rel=0.15, abs=2)
    if kind == "EMBEDDED":
        assert activations == pytest.approx(saved, rel=0.15)
    else:
        # Compiled: fusion leaves less than eager mode saves, never much less than half of it.
        assert 0.4 * saved < activations < saved
    assert not list(tmp_path.iterdir())


@pytest.fixture
def activations(capsys):
    """MiB of activations that --estimate tells for a Config."""
    def told(**knobs):
        main(Config(estimate=True, **knobs))
        figure = re.search(r"activations (\d[\d,]*),", capsys.readouterr().out)[1]
        return int(figure.replace(",", ""))
    return told


def test_mixers_differ_in_memory(activations):
    """Once all had the same figure."""
    figures = [activations(mixer=mixer) for mixer in ("attn", "afno", "gdn", "fftnet")]
    assert len(set(figures)) == 4
    assert activations(mixer="attn", recompute="block") < 0.5 * min(figures)


def test_masks_count_where_they_are_kept(activations):
    """Compiled for CUDA, attention skips what they hide; else every call keeps (T, T) numbers."""
    sizes = dict(mixer="diff", n_layer=2, n_head=4, n_embd=64, batch_size=1, sequence_length=1024)
    free = activations(**sizes, device="cuda")
    assert activations(**sizes, device="cuda", window=64) == free
    for dense in (dict(device="cuda", compile=False), dict(device="cpu", compile=True)):
        free = activations(**sizes, **dense)
        # Eight calls of attention, 2 MiB each in bf16, 4 in fp32.
        assert activations(**sizes, **dense, window=64) > free + 8 * 1.5


# --------------------------------------------------------------------------------------------------
# What is counted on fake tensors, against what a run on real ones saves

@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_fake_tensors_tell_what_a_real_pass_saves(mixer, half):
    cfg = Config(**SIZES | dict(mixer=mixer, sequence_length=64) | small(mixer))
    precision = torch.bfloat16 if half else torch.float32
    told, peak, wide = count_activations(partial(GPT, cfg), (4, 64), precision)
    saved = saved_bytes(GPT(cfg), (4, 64), half)
    assert told == pytest.approx(saved, rel=0.15) and peak > told > wide > 0


@pytest.mark.parametrize("knobs", [dict(mixer="afno,attn", afno_backend="fft"),
                                   dict(mixer="gdn"), dict(mixer="attn", window=64)], ids=str)
def test_a_long_sequence_is_counted_from_shorter_ones(knobs, monkeypatch):
    cfg = Config(**SIZES | dict(sequence_length=1024, n_embd=16) | knobs | small(knobs["mixer"]))
    direct = count_activations(partial(GPT, cfg), (2, 1024), torch.float32)
    monkeypatch.setattr(estimate, "LONG", 1000)
    monkeypatch.setattr(estimate, "SHORTER", 128)
    told = count_activations(partial(GPT, cfg), (2, 1024), torch.float32)
    assert told == pytest.approx(direct, rel=0.05) and told[0] == pytest.approx(direct[0], rel=0.01)


def test_a_run_by_the_clock_has_no_number_of_tokens(capsys):
    main(Config(minutes=5, estimate=True))
    told = capsys.readouterr().out
    assert "as many as 5 minutes of training take" in told
    assert " steps" not in told and "\ntime" not in told


def test_the_convolution_that_is_counted_is_the_devices(capsys):
    """On a GPU auto is toeplitz at this length; on the CPU that counts it would be fft."""
    told = {}
    for backend in ("auto", "toeplitz", "fft"):
        main(Config(afno_backend=backend, sequence_length=1024, device="cuda", estimate=True))
        told[backend] = re.search(r"activations ([\d,]+)", capsys.readouterr().out)[1]
    assert told["auto"] == told["toeplitz"] != told["fft"]
