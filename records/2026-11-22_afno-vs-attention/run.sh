#!/usr/bin/env bash
# Runs this record again: eleven runs, 3 to 20 minutes each on one core. PYTHON names a Python that
# has torch. Extra arguments go to every run: --estimate says what it costs and trains nothing.
# Afterwards: python records/table.py logs/2026-11-22_afno-vs-attention attn_short_conv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=logs/2026-11-22_afno-vs-attention
export OMP_NUM_THREADS=1
train() { "${PYTHON:-python}" train_gpt2.py --device cpu --target_val_loss 1.8857 "$@"; }

for seed in 0 1 2; do
    train --seed "$seed" --output_dir "$out/afno" --mixer afno "$@"
    train --seed "$seed" --output_dir "$out/attn" --mixer attn --mlp_ratio 4.2 "$@"
    train --seed "$seed" --output_dir "$out/attn_short_conv" \
        --mixer attn --short_conv --mlp_ratio 4.16 "$@"
done
train --seed 0 --output_dir "$out/attn_short_conv_muon0.03" \
    --mixer attn --short_conv --mlp_ratio 4.16 --muon_learning_rate 0.03 "$@"

# run_afno.txt: what ./run_afno.sh runs without a GPU, on two cores.
OMP_NUM_THREADS=2 train --output_dir logs/2026-11-22_run_afno "$@"
