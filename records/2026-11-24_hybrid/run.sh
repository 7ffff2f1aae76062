#!/usr/bin/env bash
# Runs the hybrid again: 4 minutes a run on one core. The two others are those of
# 2026-11-22_afno-vs-attention, whose run.sh has them. PYTHON names a Python that has torch.
# Extra arguments go to every run: --estimate says what it costs and trains nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1
for seed in 0 1 2; do
    "${PYTHON:-python}" train_gpt2.py --device cpu --seed "$seed" \
        --output_dir logs/2026-11-24_hybrid/hybrid \
        --mixer afno,afno,afno,attn --mlp_ratio 4.0547 "$@"
done
