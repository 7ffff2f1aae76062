"""Optimizers: the rows of OPTIMS in train_gpt2.py.

A builder turns {parameter: role} into optimizers. Every parameter has one group in one of them.
Weight decay is decoupled and never meets vectors, lambdas, gates or kernels. Muon itself is in
kernels.py, as is Lookahead.
"""
from dataclasses import fields

import torch

from kernels import Lookahead, Muon
from support.flags import listed

MATRICES = ("matrix", "proj")                            # the roles inside blocks


# {role: the field that scales its learning rate}
RATES = {"embed": "embed_lr_scale", "head": "head_lr_scale", "vector": "vector_lr_scale",
         "kernel": "kernel_lr_scale", "lambda": "lambda_lr_scale"}


def check_rates(cfg, table):
    """Refuse a rate that was set for a role which no parameter of a table of roles has."""
    for role, name in RATES.items():
        if getattr(cfg, name) != getattr(type(cfg), name) and role not in table.values():
            raise ValueError(f"--{name} has no effect here, no parameter has the role {role}: "
                             "drop it")


def role_groups(cfg, table, lr: float, decayed=()) -> list[dict]:
    """Parameter groups, one a role, with the learning rate that the flags give it."""
    groups = []
    for role in sorted(set(table.values())):
        scale = getattr(cfg, RATES[role]) if role in RATES else 1.0
        groups.append(dict(params=[p for p in table if table[p] == role], lr=lr * scale,
                           weight_decay=cfg.weight_decay if role in decayed else 0.0))
    return groups


def adamw(cfg, table, decayed=()) -> torch.optim.Optimizer:
    groups = role_groups(cfg, table, cfg.learning_rate, decayed)
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=cfg.adam_eps, fused=True)


def split_matrices(table):
    """-> the matrices inside blocks, the table of all other parameters."""
    matrices = [p for p in table if table[p] in MATRICES]
    return matrices, {p: role for p, role in table.items() if role not in MATRICES}


def optional_optimizer(name: str):
    """A class of the optional package pytorch-optimizer, or SystemExit with one line."""
    try:
        import pytorch_optimizer
    except ImportError:
        raise SystemExit(f"--optim {name.lower()} needs an optional package: "
                         "pip install pytorch-optimizer") from None
    return getattr(pytorch_optimizer, name)


def keeps(matrix: int, other: int):
    """State an optimizer keeps, for --estimate: fp32 numbers a weight of a matrix, of another."""
    def mark(builder):
        builder.state_per_weight = (matrix, other)
        return builder
    return mark


@keeps(matrix=2, other=2)
def build_adamw(cfg, table):
    return [adamw(cfg, table, decayed=(*MATRICES, "embed", "head"))]


@keeps(matrix=1, other=2)
def build_muon(cfg, table):
    """Muon for the matrices, AdamW without weight decay for the rest."""
    matrices, rest = split_matrices(table)
    muon = Muon(matrices, cfg.muon_learning_rate, cfg.muon_momentum, cfg.weight_decay,
                cfg.muon_row_beta)
    return [muon, adamw(cfg, rest)]


@keeps(matrix=3, other=3)
def build_ademamix(cfg, table):
    """AdamW plus a slow second momentum, whose weight and decay grow over ademamix_warmup steps.

    The slow average forgets half in 0.69 / (1 - beta3) steps; keep that well below the length of
    the run. Source: arXiv 2409.03137.
    """
    AdEMAMix = optional_optimizer("AdEMAMix")
    groups = role_groups(cfg, table, cfg.learning_rate, decayed=(*MATRICES, "embed", "head"))
    betas = (cfg.adam_beta1, cfg.adam_beta2, cfg.ademamix_beta3)
    warmup = cfg.ademamix_warmup or cfg.num_iterations
    return [AdEMAMix(groups, betas=betas, alpha=cfg.ademamix_alpha, t_alpha_beta3=warmup,
                     weight_decouple=True)]


@keeps(matrix=10, other=2)
def build_soap(cfg, table):
    """Adam in the eigenbasis of Shampoo's preconditioner for the matrices, AdamW for the rest.

    Its first step only looks at the gradient. At 124M and 5100 steps it ended with Muon (3.2752 and
    3.2760), at twice the time a step (modded-nanogpt). Source: arXiv 2409.11321.
    """
    SOAP = optional_optimizer("SOAP")
    matrices, rest = split_matrices(table)
    soap = SOAP(matrices, lr=cfg.learning_rate, betas=(cfg.soap_beta, cfg.soap_beta),
                weight_decay=cfg.weight_decay, precondition_frequency=cfg.soap_frequency)
    return [soap, adamw(cfg, rest)]


def complete(optimizers, model, lookahead: float):
    """Their groups, with their peak rates, have each of the model's parameters once; Lookahead is
    behind them, unless its beta is 0."""
    groups = [group for opt in optimizers for group in opt.param_groups]
    owned = [p for group in groups for p in group["params"]]
    assert len(owned) == len(set(owned)), "a parameter with two optimizers"
    assert set(owned) == set(model.parameters()), "a parameter without an optimizer"
    if lookahead:
        optimizers = [*optimizers, Lookahead(model.parameters(), lookahead)]
    for opt in optimizers:
        for group in opt.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def ramp_notes(cfg) -> list[str]:
    """A line for each ramp that the run is too short for, and for a window that hides nothing."""
    lines = []
    if cfg.lr_start and not cfg.warmup_steps:
        lines.append("note: --lr_start has no effect: so short a run has no warm-up")
    if min(listed(cfg.window)) >= cfg.sequence_length:
        lines.append(f"note: --window {cfg.window} has no effect: no sequence is longer")
    for name in ("muon_momentum_warmup", "ademamix_warmup"):
        steps = getattr(cfg, name)
        if name in cfg.fields_read() and steps > cfg.num_iterations and not cfg.minutes:
            lines.append(f"note: --{name} {steps:,} is longer than the run, which ends in the "
                         "middle of that ramp")
    return lines


def change_of_rate(state, cfg, schedules) -> str:
    """What another num_iterations does to the rate at the step where the run goes on.

    schedules: the rows of SCHEDULES in train_gpt2.py.
    """
    step = state["step"]
    known = {f.name for f in fields(cfg)}
    before = type(cfg)(**{name: value for name, value in state["config"].items() if name in known})
    shares = [schedules[c.schedule][0](step, c) for c in (before, cfg)]
    if shares[0] == shares[1]:
        return ""
    return f"; the learning rate goes from {shares[0]:.3f} of its peak to {shares[1]:.3f}"
