#!/usr/bin/env bash
# Runs this record again: eighteen runs of one to two minutes on one core. PYTHON names a Python that
# has torch. Extra arguments go to every run: --estimate says what it costs and trains nothing.
# Afterwards: python records/table.py logs/2026-11-24_small-questions
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=logs/2026-11-24_small-questions
export OMP_NUM_THREADS=1
train() {
    "${PYTHON:-python}" train_gpt2.py --device cpu --train_loss_every 50 "$@"
}

for seed in 0 1 2; do
    for norm in lns pre; do
        train --seed "$seed" --output_dir "$out/${norm}_no_zero_init" --num_iterations 150 \
            --val_loss_every 0 --mixer attn --norm "$norm" --no-zero_init "$@"
    done
    for threshold in 0 0.12; do
        train --seed "$seed" --output_dir "$out/shrink$threshold" --num_iterations 300 \
            --val_loss_every 100 --afno_sparsity_threshold "$threshold" "$@"
    done
    for scale in 1 10; do
        train --seed "$seed" --output_dir "$out/lambda_x$scale" --num_iterations 300 \
            --val_loss_every 100 --mixer afno,afno,afno,attn --value_residual --x0_shortcut \
            --unet_skips --learning_rate 0.002 --lambda_lr_scale "$scale" "$@"
    done
done
