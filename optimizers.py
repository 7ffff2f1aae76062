"""Optimizers: each builder turns {parameter: role} into optimizers in which every parameter has exactly one group.

Matrices inside blocks are role "matrix" or "proj". Weight decay is decoupled and never meets vectors, gates or kernels.
"""
import math

import torch
import torch.nn as nn

from muon import Muon

INNER = ("matrix", "proj")


def groups(cfg, roles, lr, decayed):
    """Parameter groups, one a role, with the learning rate that the flags give it."""
    scale = {"embed": cfg.embed_lr_scale, "head": cfg.head_lr_scale, "kernel": cfg.kernel_lr_scale}
    return [dict(params=[p for p in roles if roles[p] == role], lr=lr * scale.get(role, 1.0),
                 weight_decay=cfg.weight_decay if role in decayed else 0.0) for role in sorted(set(roles.values()))]


def adamw(cfg, roles, decayed=()):
    return torch.optim.AdamW(groups(cfg, roles, cfg.learning_rate, decayed), betas=(cfg.adam_beta1, cfg.adam_beta2),
                             fused=True)


def split(roles):                                           # -> the matrices inside blocks, and the rest
    return [p for p in roles if roles[p] in INNER], {p: role for p, role in roles.items() if role not in INNER}


def build_adamw(cfg, roles):
    return [adamw(cfg, roles, decayed=(*INNER, "embed", "head"))]


def build_muon(cfg, roles):
    """Muon for the matrices, AdamW without weight decay for the rest."""
    matrices, rest = split(roles)
    return [Muon(matrices, cfg.muon_learning_rate, cfg.muon_momentum, cfg.weight_decay), adamw(cfg, rest)]


def optional(name):
    """A class of the optional package pytorch-optimizer. Raises SystemExit with one line if it is not installed."""
    try:
        import pytorch_optimizer
    except ImportError:
        raise SystemExit(f"--optim {name.lower()} needs an optional package: pip install pytorch-optimizer") from None
    return getattr(pytorch_optimizer, name)


def build_ademamix(cfg, roles):
    """AdamW plus a slow second momentum (arXiv 2409.03137): alpha and beta3 grow over the first ademamix_warmup steps.

    The slow average forgets half in 0.69 / (1 - beta3) steps; keep that well below the length of the run.
    """
    return [optional("AdEMAMix")(
        groups(cfg, roles, cfg.learning_rate, decayed=(*INNER, "embed", "head")),
        betas=(cfg.adam_beta1, cfg.adam_beta2, cfg.ademamix_beta3), alpha=cfg.ademamix_alpha,
        t_alpha_beta3=cfg.ademamix_warmup or cfg.num_iterations, weight_decouple=True)]


def build_soap(cfg, roles):
    """Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321) for the matrices, AdamW for the rest.

    Its first step only looks at the gradient. At 124M and 5100 steps it ended with Muon (3.2752 and 3.2760), at twice
    the time a step.
    """
    matrices, rest = split(roles)
    return [optional("SOAP")(matrices, lr=cfg.learning_rate, betas=(cfg.soap_beta, cfg.soap_beta),
                             weight_decay=cfg.weight_decay, precondition_frequency=cfg.soap_frequency),
            adamw(cfg, rest)]


def clip_gradients(table, cfg):
    """Clip GPAS's gates to their own norm, and all other gradients to grad_clip. table is that of roles."""
    gates, others = [p for p in table if table[p] == "gate"], [p for p in table if table[p] != "gate"]
    for params, limit in ((gates, cfg.gpas_clip), (others, cfg.grad_clip)):
        if params and limit:
            nn.utils.clip_grad_norm_(params, limit)


# Schedules: step -> share of the peak learning rate, once warm-up is over

def trapezoid(step, cfg):
    """Flat, then linear from 1 to lr_end."""
    return cfg.lr_end + (1 - cfg.lr_end) * min(1.0, (cfg.num_iterations - step) / max(1, cfg.ramps[1]))


def cosine(step, cfg):
    """Half a period of the cosine, from 1 at the end of warm-up to lr_end."""
    done = max(0, step - cfg.ramps[0]) / max(1, cfg.num_iterations - cfg.ramps[0])
    return cfg.lr_end + (1 - cfg.lr_end) * (1 + math.cos(math.pi * done)) / 2
