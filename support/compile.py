"""torch.compile: whether, and everything that it makes, before the clock runs."""
import torch
import torch._functorch.config

from support.processes import compiler


def compiles(cfg, device: torch.device) -> bool:
    return device.type == "cuda" if cfg.compile is None else cfg.compile


def compiled(model, backward, shifted, shapes, val_shapes, device: torch.device, autocast, say):
    """-> the model compiled for these shapes (rows, tokens a row), forward and backward; pieces.

    Nothing compiles later, inside the clock: a shape has a graph of its own in training and in
    validation. Two passes each, for the first runs in another state of torch's dispatcher, which
    the loss's inner graph is compiled for, too. Where memory is short, micro-batches are cut into
    pieces. backward and shifted are train_gpt2.py's.
    """
    say(f"compiles for {len(shapes) + len(val_shapes)} shapes, outside the clock")

    def batch(rows, width):
        return shifted(torch.zeros(rows, width + 1, dtype=torch.long, device=device))

    if hasattr(torch._functorch.config, "backward_pass_autocast"):
        # Else the backward of an fp32 island that is compiled under autocast runs in bf16.
        torch._functorch.config.backward_pass_autocast = "off"
    # Graphs of one function: from torch's eighth on it would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    forward = torch.compile(model, dynamic=False, backend=compiler())
    before = 0
    pieces = 1
    # Again from the first shape where a later one had to be cut.
    while pieces != before:
        before = pieces
        for shape in shapes:
            for _ in range(2):
                _, pieces = backward(forward, model, [(*batch(*shape), 1.0)], pieces, autocast, say)
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        for shape in val_shapes:
            for _ in range(2):
                forward(*batch(*shape))
    model.train()
    for reason in graph_breaks():
        say(f"note: not compiled as a whole: {reason}")
    return forward, pieces


def graph_breaks() -> list[str]:
    """Why torch.compile broke a graph in this process, one line a reason; none is as it should be.
    """
    return [reason.splitlines()[0] for reason in torch._dynamo.utils.counters["graph_break"]]
