#!/usr/bin/env bash
# Runs this record again: 9 to 15 minutes a run on one core. TEXT names shards of Gutenberg prose in
# bytes (README.md says how to make them). PYTHON names a Python that has torch. Extra arguments go
# to every run: --estimate says what it costs and trains nothing.
# Afterwards: python records/table.py logs/2026-11-24_more-text attn_short_conv_muon0.03
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
TEXT=${TEXT:-data/gutenberg_bytes}
out=logs/2026-11-24_more-text
export OMP_NUM_THREADS=1
train() {
    "${PYTHON:-python}" train_gpt2.py --device cpu --num_iterations 2441 --val_loss_every 610 \
        --input_bin "$TEXT/*_train_*.bin" --input_val_bin "$TEXT/*_val_*.bin" "$@"
}

for seed in ${SEEDS:-0 1}; do
    train --seed "$seed" --output_dir "$out/afno" --mixer afno "$@"
    train --seed "$seed" --output_dir "$out/attn_short_conv_muon0.03" \
        --mixer attn --short_conv --mlp_ratio 4.16 --muon_learning_rate 0.03 "$@"
    train --seed "$seed" --output_dir "$out/hybrid" \
        --mixer afno,afno,afno,attn --mlp_ratio 4.0547 "$@"
done
