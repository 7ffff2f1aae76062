"""The share of the kernel's spectrum that soft-shrinkage zeroes before the first step.

    python records/2026-11-24_small-questions/shrinkage.py
"""
import sys
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from train_gpt2 import GPT, Config  # noqa: E402


def zeroed(threshold, seed):
    """Mean over the layers of the embedded run's model, real and imaginary parts alike."""
    torch.manual_seed(seed)
    model = GPT(Config(vocab_size=256, afno_sparsity_threshold=threshold))
    shares = []
    shrink = F.softshrink

    def spy(z, limit):
        shares.append((z.abs() <= limit).float().mean().item())
        return shrink(z, limit)

    F.softshrink = spy
    for block in model.blocks:
        block.mixer.kernel()
    F.softshrink = shrink
    return mean(shares)


if __name__ == "__main__":
    for threshold in (0.01, 0.12):
        share = mean(zeroed(threshold, seed) for seed in range(3))
        print(f"threshold {threshold}: {share:.4f}")
