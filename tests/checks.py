"""What several test files share: weights that are awake, and the checks of a map (B, T, C).

A check takes a map and returns (what was measured, what is allowed). test_causality.py runs all of
them on every mixer; a planted leak must fail them.
"""
import math

import torch

# Longer than a block of 128, and a multiple of nothing; channels.
T = 151
C = 32
# The outputs whose gradients are looked at.
PROBES = (0, 1, 2, 6, 22, 23, 64, 99, 127, 128, T - 1)
# What a row of MIXERS needs at such sizes.
SMALL = {"afno": dict(afno_num_blocks=2, afno_group_size=4)}


def small(mixer):
    """The knobs that the rows of --mixer need at these sizes."""
    return {knob: value for row in mixer.split(",") for knob, value in SMALL.get(row, {}).items()}


def awake(module):
    """Draw all weights anew: behind a projection that starts at zero, any leak is invisible."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point() or p.is_complex():
                width = p.size(-1) if p.dim() else 1
                p.add_(torch.randn_like(p) * width ** -0.5)
    return module


def noise(B=2, steps=T):
    return torch.randn(B, steps, C, dtype=torch.float64)


def apart(a, b):
    """The largest difference, relative to the largest of b."""
    return ((a - b).abs().max() / (b.abs().max() + 1e-99)).item()


def prefix(m):
    """A token's output does not depend on how many tokens follow it. Decoding rests on it, too."""
    x = noise()
    y = m(x)
    worst = max(apart(m(x[:, :t]), y[:, :t]) for t in (1, 2, 7, 16, 100, 128, 129, T - 1))
    return worst, 1e-11


def influence(m):
    """{t: |dy_t / dx_s|, (T,)}, along a random direction of y_t."""
    x = noise(1).requires_grad_()
    y = m(x)[0]
    sizes = {}
    for t in PROBES:
        along = (y[t] * torch.randn_like(y[t])).sum()
        grad = torch.autograd.grad(along, x, retain_graph=True)[0]
        sizes[t] = grad[0].abs().amax(-1)
    return sizes


def jacobian(m):
    """No gradient from a token to an earlier output, relative to the largest to a later one."""
    J = influence(m)
    future = max(J[t][t + 1:].max() for t in PROBES[:-1])
    past = max(J[t][:t + 1].max() for t in PROBES)
    return future.item() / past.item(), 1e-12


def alive(m):
    """The past does matter, at each of these lags: what mixes nothing would pass everything else.

    In decades below the strongest influence.
    """
    J = influence(m)
    by_lag = [max(J[t][t - lag] for t in PROBES if t >= lag) for lag in (1, 2, 5, 11, 20, 90)]
    return -math.log10(min(by_lag) / max(J[t].max() for t in PROBES) + 1e-99), 9.0


def batch(m):
    """A row alone gives what it gives in a batch."""
    x = noise(3)
    return apart(m(x[1:2]), m(x)[1:2]), 1e-11


def pure(m):
    """A call leaves nothing behind."""
    x = noise()
    y = m(x)
    m(noise(3, 20))
    return apart(m(x), y), 0.0


def decode(m):
    """Token by token with a state, the same numbers. A mixer may leave this out: None."""
    if not hasattr(m, "step"):
        return None
    x = noise()
    state = m.init_state(2)
    columns = []
    for t in range(T):
        y, state = m.step(x[:, t], state)
        columns.append(y)
    return apart(torch.stack(columns, 1), m(x)), 1e-10
