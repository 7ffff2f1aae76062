"""What --estimate rests on, and the rates of groups: held against optimizers that have stepped."""
import pytest
import torch

from train_gpt2 import GPT, MATRICES, OPTIMS, Config, build_optimizers, roles

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
