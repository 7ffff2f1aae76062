#!/usr/bin/env bash
# Runs this record again: 25 runs, 2 to 6 minutes each on one core. PYTHON names a Python that has
# torch. Extra arguments go to every run: --estimate says what it costs and trains nothing.
# Afterwards: python records/table.py logs/2026-11-22_mixers-at-equal-size attn_short_conv attn
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=logs/2026-11-22_mixers-at-equal-size
export OMP_NUM_THREADS=1
train() {
    "${PYTHON:-python}" train_gpt2.py --device cpu \
        --num_iterations 300 --val_loss_every 100 --train_loss_every 50 "$@"
}

for seed in 0 1 2; do
    train --seed "$seed" --output_dir "$out/afno" --mixer afno "$@"
    train --seed "$seed" --output_dir "$out/attn" --mixer attn --mlp_ratio 4.2109375 "$@"
    train --seed "$seed" --output_dir "$out/attn_short_conv" \
        --mixer attn --short_conv --mlp_ratio 4.1640625 "$@"
    train --seed "$seed" --output_dir "$out/fftnet" --mixer fftnet --mlp_ratio 3.5 "$@"
    train --seed "$seed" --output_dir "$out/fftnet_bank" \
        --mixer fftnet --fftnet_filter bank --mlp_ratio 4.3359375 "$@"
    train --seed "$seed" --output_dir "$out/diff" --mixer diff --mlp_ratio 4.203125 "$@"
    train --seed "$seed" --output_dir "$out/diff_v2" --mixer diff_v2 --mlp_ratio 3.6953125 "$@"
    train --seed "$seed" --output_dir "$out/ngpt" \
        --mixer ngpt --mlp ngpt --norm ngpt --residual ngpt --logit_gain --weight_decay 0 \
        --warmup_iters 0 --logit_softcap 0 --no-zero_init --no-embed_norm --mlp_ratio 2.78125 "$@"
done
train --seed 0 --output_dir "$out/attn_muon0.03" \
    --mixer attn --mlp_ratio 4.2109375 --muon_learning_rate 0.03 "$@"
