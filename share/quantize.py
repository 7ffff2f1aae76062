"""int8 weights for decoding on a CPU: a quarter of the size, and what that costs in loss.

A layer's weights are int8 with one scale an output; a token's activations are int8 while they are
multiplied, by torch's dynamic quantisation. It takes the scale of activations from all that it is
given, so it is given one token at a time: else a token would see, through that scale, those behind
it. Embeddings, norms, convolutions, kernels and CoLA's factors stay as they are.

Letters: B batch, T time, d_in and d_out widths.
"""
import time
import warnings
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from parts import Linear
from support.decode import Context, generate
from support.shards import open_data, tokenizer_of
from train_gpt2 import GPT, Windows, evaluate

# What the loss, and what the speed is measured on.
LOSS_TOKENS = 8192
SPEED_TOKENS = 64


class Int8(nn.Module):
    """A linear layer of int8 weights, (..., d_in) -> (..., d_out), from weights (d_out, d_in)."""
    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features = len(weight)
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        # A parameter, by which decoding knows a module's device and type.
        self.scale = nn.Parameter(scale, requires_grad=False)
        zero = torch.zeros_like(scale, dtype=torch.int64)
        with warnings.catch_warnings():
            # torch says that these functions will go some day.
            warnings.simplefilter("ignore")
            rounded = torch.quantize_per_channel(weight, scale.double(), zero, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = [torch.ops.quantized.linear_dynamic(row, self.packed, reduce_range=True)
                for row in x.reshape(-1, 1, x.size(-1))]
        return torch.cat(rows).unflatten(0, x.shape[:-1])

    @staticmethod
    def fused(x: Tensor, layers) -> Tensor:
        return torch.cat([layer(x) for layer in layers], dim=-1)


class Int8GPT(GPT):
    """A copy of a GPT whose linear layers and head have int8 weights. On the CPU; no training."""
    def __init__(self, model: GPT):
        super().__init__(model.cfg)
        self.load_state_dict(model.state_dict())
        head = self.head_gain(self.head.weight).detach()
        for module in [*self.modules()]:
            for name, child in module.named_children():
                if type(child) is Linear:
                    bias = None if child.bias is None else child.bias.detach()
                    setattr(module, name, Int8(child.weight.detach(), bias))
        self.head = Int8(head)
        self.eval()

    def unembed(self, h: Tensor) -> Tensor:
        return self.head(h)


def weight_bytes(model: GPT) -> int:
    """Of all weights, an int8 one is a byte."""
    layers = [m for m in model.modules() if isinstance(m, Int8)]
    int8 = sum(layer.packed.unpack()[0].numel() for layer in layers)
    return int8 + sum(p.nbytes for p in model.parameters())


def loss_of(model: GPT, windows, n: int) -> float:
    """Of n windows, in nats per token, from whole logits."""
    def forward(idx, targets):
        return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)

    return evaluate(forward, windows, n, torch.device("cpu"), 0, 1)


def speed_of(model: GPT, prompt: Tensor) -> float:
    """Tokens a second behind a prompt (1, T)."""
    context = Context(model, 1)
    context.add(prompt)
    tokens = generate(context, SPEED_TOKENS + 1, [torch.Generator()], temperature=0)
    # The first one waits for the prompt.
    next(tokens)
    start = time.perf_counter()
    n = len(list(tokens))
    return n / (time.perf_counter() - start)


def compare(model: GPT, small: GPT, data: str = "") -> str:
    """One line: size, loss and speed of a model and of its int8 copy.

    data: a folder whose validation text it is measured on; else the run's. SystemExit with one line
    where its tokens are another vocabulary's.
    """
    cfg = replace(model.cfg, val_batch_size=1, batches="windows", document_token=-1)
    if data:
        cfg = replace(cfg, data=data, input_bin="", input_val_bin="")
    shards, vocab = open_data(cfg)[1:]
    if tokenizer_of(vocab) != tokenizer_of(cfg.vocab_size):
        raise SystemExit(f"{next(iter(shards))}: made by another tokenizer than the model's: name "
                         "its shards with --data")
    windows = Windows(shards, cfg, shuffle=False)
    n = windows.first(LOSS_TOKENS)
    prompt = torch.from_numpy(windows.read([0]))[:, :cfg.sequence_length // 2 + 1]
    sizes, losses, speeds = zip(*((weight_bytes(m) / 1e6, loss_of(m, windows, n),
                                   speed_of(m, prompt)) for m in (model, small)))
    return (f"int8: {sizes[0]:.1f} -> {sizes[1]:.1f} MB, loss {losses[0]:.4f} -> {losses[1]:.4f} "
            f"({losses[1] - losses[0]:+.4f}) on {windows.targets(n):,} tokens, "
            f"{speeds[0]:.0f} -> {speeds[1]:.0f} tokens/s")


def quantized(model: GPT, device: torch.device, data: str) -> tuple[Int8GPT, str]:
    """--quantize int8 -> the copy that writes, what it costs. SystemExit where it cannot run."""
    if device.type != "cpu":
        raise SystemExit("--quantize int8 runs on a CPU: add --device cpu")
    small = Int8GPT(model)
    return small, compare(model, small, data)
