"""nanoGPT's model and training step, written anew from its description, to be timed against.

Source: github.com/karpathy/nanoGPT, as its configurations have it: no biases, no dropout, learned
positions, tied embeddings, whole logits. Letters: B batch, T time, C channels, V vocabulary.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Block(nn.Module):
    """LayerNorms in front of causal attention and of a GELU MLP four times as wide."""
    def __init__(self, C: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.norm1 = nn.LayerNorm(C, bias=False)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.proj1 = nn.Linear(C, C, bias=False)
        self.norm2 = nn.LayerNorm(C, bias=False)
        self.fc = nn.Linear(C, 4 * C, bias=False)
        self.proj2 = nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (u.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for u in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj1(y.transpose(1, 2).flatten(2))
        return x + self.proj2(F.gelu(self.fc(self.norm2(x))))


class NanoGPT(nn.Module):
    """idx and targets, (B, T) -> mean cross-entropy in nats."""
    def __init__(self, n_layer: int, n_head: int, C: int, vocab: int, T: int):
        super().__init__()
        self.wte = nn.Embedding(vocab, C)
        self.wpe = nn.Embedding(T, C)
        self.blocks = nn.ModuleList(Block(C, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(C, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = ".proj" in name
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer if residual else 1))

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class Trainer:
    """The loop's step: warm-up and cosine, AdamW, clipping, a batch of random windows."""
    def __init__(self, model: NanoGPT, tokens: np.ndarray, B: int, T: int, *, peak=1e-3, low=1e-4,
                 warmup=100, steps=2000, beta2=0.99):
        self.model = model
        self.tokens = tokens
        self.B = B
        self.T = T
        self.ramp = peak, low, warmup, steps
        groups = [dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=0.1),
                  dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, beta2))
        self.next = self.batch()

    def batch(self):
        starts = torch.randint(len(self.tokens) - self.T, (self.B,))
        rows = [torch.from_numpy(self.tokens[s:s + self.T + 1].astype(np.int64)) for s in starts]
        rows = torch.stack(rows)
        return rows[:, :-1], rows[:, 1:]

    def rate(self, step: int) -> float:
        peak, low, warmup, steps = self.ramp
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        share = min(1, (step - warmup) / (steps - warmup))
        return low + (1 + math.cos(math.pi * share)) / 2 * (peak - low)

    def step(self, number: int) -> float:
        """One step -> its training loss, which the loop reads every step of its CPU recipe."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(number)
        loss = self.model(*self.next)
        self.next = self.batch()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()
