"""Newton-Schulz against the SVD, Muon against torch.optim.Muon, the schedule against its
definition."""

import math

import pytest
import torch

from kernels import NS_COEFFICIENTS, Lookahead, Muon, newton_schulz
from train_gpt2 import GPT, Config, build_optimizers, roles, set_schedule


@pytest.mark.parametrize("shape", [(32, 32), (64, 24), (24, 64), (3, 40, 24), (2, 3, 24, 40)])
def test_newton_schulz_is_near_the_orthogonal_factor(shape):
    torch.manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    # five steps do not lift much smaller shares all the way
    S = torch.linspace(1e-4, 1e-3, S.size(-1))
    D = U.mT @ newton_schulz(U * S @ Vh) @ Vh.mT             # diagonal where the directions stay
    diagonal = D.diagonal(dim1=-2, dim2=-1)
    assert (
        (D - torch.diag_embed(diagonal)).abs().max() < 1e-3
        and 0.6 < diagonal.min()
        and diagonal.max() < 1.3
    )
    assert newton_schulz(torch.zeros(shape)).abs().max() == 0


def test_muon_equals_torch(monkeypatch):
    """The public implementation works in bf16: patched to ours, the rest of the two must agree to
    rounding."""
    module = torch.optim._muon
    monkeypatch.setattr(
        module, "_zeropower_via_newtonschulz", lambda g, *args, **kwargs: newton_schulz(g)
    )
    torch.manual_seed(0)
    shapes = [(24, 16), (16, 24), (24, 24), (16, 24)]
    start = [torch.randn(s) for s in shapes]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    opts = (Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1), torch.optim.Muon(
        theirs, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True, adjust_lr_fn="original"))
    for _ in range(30):
        grads = [torch.randn(s) for s in shapes]
        for params, opt in zip((ours, theirs), opts):
            for p, g in zip(params, grads):
                p.grad = g.clone()
            opt.step()
    for a, b, w in zip(ours, theirs, start):
        assert torch.allclose(a, b, atol=1e-6) and not torch.allclose(a, w, atol=0.1)


def steps_of(muon, w, grads):
    for grad in grads:
        w.grad = grad.clone()
        muon.step()
    return w.data


def test_normuon_by_hand():
    """Momentum 0, so that the orthogonal factor is that of the gradient."""
    torch.manual_seed(0)
    start = torch.randn(24, 16)
    grads = torch.randn(5, 24, 16)
    ours = steps_of(Muon([w := torch.nn.Parameter(start.clone())], 0.1, 0.0, 0.0, row_beta=0.9), w,
                    grads)
    expected = start.clone()
    running = torch.zeros(24)
    for grad in grads:
        factor = newton_schulz(grad)
        running = 0.9 * running + 0.1 * (factor**2).mean(1)
        scaled = factor / running.sqrt()[:, None]
        expected -= 0.1 * 1.5**0.5 * scaled * factor.norm() / scaled.norm()
    assert torch.allclose(ours, expected, atol=1e-5)
    plain = steps_of(Muon([w := torch.nn.Parameter(start.clone())], 0.1, 0.0, 0.0), w, grads)
    assert not torch.allclose(ours, plain, atol=1e-2)


def test_our_coefficients_are_the_public_ones():
    assert (
        torch.optim.Muon([torch.zeros(2, 2, requires_grad=True)]).defaults["ns_coefficients"]
        == NS_COEFFICIENTS
    )


def test_a_stack_is_its_matrices():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 10, 6))
    apart = [torch.nn.Parameter(w.clone()) for w in stack.data]
    opts = [Muon(params, lr=0.1, momentum=0.9, weight_decay=0.1) for params in ([stack], apart)]
    for _ in range(3):
        stack.grad = torch.randn(3, 10, 6)
        for p, g in zip(apart, stack.grad):
            p.grad = g.clone()
        for opt in opts:
            opt.step()
    assert torch.allclose(stack, torch.stack(list(apart)), atol=1e-6)


def config(**knobs):
    base = dict(
        mixer="attn",
        n_layer=2,
        n_head=2,
        n_embd=16,
        vocab_size=20,
        sequence_length=8,
        num_iterations=1000,
        warmup_iters=100,
        warmdown_iters=400,
        optim="muon",
        muon_learning_rate=0.02,
        muon_momentum=0.95,
        muon_momentum_warmup=300,
        learning_rate=0.004,
        embed_lr_scale=2.0,
        head_lr_scale=0.5,
    )
    return Config(**base | knobs)


def test_rates_and_epsilon_reach_their_groups():
    """--vector_lr_scale: short convolutions have role vector; --adam_eps is AdamW's alone."""
    cfg = config(vector_lr_scale=7.5, adam_eps=1e-10)
    model = GPT(cfg)
    muon, adamw = build_optimizers(cfg, model)
    table = roles(model)
    for group in adamw.param_groups:
        scale = {"vector": 7.5, "embed": 2.0, "head": 0.5, "kernel": 3.0}[table[group["params"][0]]]
        assert group["lr"] == pytest.approx(0.004 * scale) and group["eps"] == 1e-10
    assert "eps" not in muon.param_groups[0]


def test_schedule():
    cfg = config()
    optimizers = build_optimizers(cfg, GPT(cfg))
    groups = [g for opt in optimizers for g in opt.param_groups]
    peaks = [g["lr"] for g in groups]
    assert {0.02, 0.008, 0.002} <= set(peaks)  # matrices, embedding, head
    for step, share in [
        (0, 0.01),
        (49, 0.5),
        (99, 1.0),
        (100, 1.0),
        (600, 1.0),
        (800, 0.5),
        (999, 1 / 400),
    ]:
        set_schedule(optimizers, step, cfg)
        assert all(math.isclose(g["lr"], share * peak) for g, peak in zip(groups, peaks)), step
    for step, momentum in [(0, 0.85), (150, 0.9), (300, 0.95), (999, 0.95)]:
        set_schedule(optimizers, step, cfg)
        assert math.isclose(groups[0]["momentum"], momentum)


def test_schedule_without_ramps():
    cfg = config(warmup_iters=0, warmdown_iters=0, muon_momentum_warmup=0)
    optimizers = build_optimizers(cfg, GPT(cfg))
    for step in (0, 999):
        set_schedule(optimizers, step, cfg)
        assert (
            optimizers[0].param_groups[0]["lr"] == 0.02
            and optimizers[0].param_groups[0]["momentum"] == 0.95
        )


def test_ramps_by_share():
    cfg = config(warmup_iters=-1, warmdown_iters=-1, num_iterations=500)
    assert (cfg.warmup_steps, cfg.warmdown_steps) == (10, 300)


def test_lookahead_is_its_equations():
    """Around SGD, over a run whose rates fall: x' = A(x + beta m), m' = 0.99 m + 0.01 (x' - x)."""
    torch.manual_seed(0)
    start = torch.randn(5, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([p], lr=0.1)
    ahead = Lookahead([p], 0.6)
    x = start.clone()
    m = torch.zeros_like(x)
    apart = []
    for step in range(50):
        beta = 0.6 * (1 - step / 50)
        ahead.param_groups[0]["lr"] = beta
        ahead.look(step / 50)
        p.grad = p.detach()**3
        sgd.step()
        ahead.step()
        # By hand.
        y = x + (beta * m if 8 <= step < 38 else 0)
        after = y - 0.1 * y**3
        m = 0.99 * m + 0.01 * (after - x)
        apart.append((y - x).abs().max())
        x = after
        assert torch.allclose(p, x, rtol=0, atol=1e-14)
    assert [a > 0 for a in apart] == [8 <= step < 38 for step in range(50)]


def test_lookahead_comes_last_and_follows_the_rates():
    cfg = Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, mixer="attn", num_iterations=100,
                 lookahead=0.5)
    model = GPT(cfg)
    optimizers = build_optimizers(cfg, model)
    set_schedule(optimizers, 70, cfg)
    assert isinstance(optimizers[-1], Lookahead)
    assert optimizers[-1].param_groups[0]["lr"] == pytest.approx(0.25)
    assert set(optimizers[-1].param_groups[0]["params"]) == set(model.parameters())
