#!/usr/bin/env bash
# Runs these again, into logs/token-scaling/VARIANT: hours. PYTHON names a Python that has torch;
# extra arguments go to every run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1

run() {                                  # VARIANT STEPS SEED flags...
    local name=$1 steps=$2 seed=$3
    shift 3
    "${PYTHON:-python}" train_gpt2.py --data data/gutenberg_bytes --n_layer 4 --n_head 2 \
        --n_embd 64 --sequence_length 512 --batch_size 8 --val_tokens 524288 --save_every 0 \
        --num_iterations "$steps" --val_loss_every $((steps <= 120 ? 60 : 240)) \
        --seed "$seed" --output_dir "logs/token-scaling/$name" --run_name "s$seed" "$@"
}

ATTN=(--mixer attn --short_conv)
HYBRID=(--mixer 'afno,afno,attn,afno' --short_conv)
for seed in 0 1; do
    run attn_2.5 120 $seed "${ATTN[@]}" "$@"
    run hybrid_2.5 120 $seed "${HYBRID[@]}" --mlp_ratio 3.75 "$@"
    run attn_lr0.03_2.5 120 $seed "${ATTN[@]}" --muon_learning_rate 0.03 "$@"
    run hybrid_lr0.03_2.5 120 $seed "${HYBRID[@]}" --mlp_ratio 3.75 --muon_learning_rate 0.03 "$@"
    run gdn_2.5 120 $seed --mixer 'gdn,gdn,attn,gdn' --short_conv --mlp_ratio 3.59375 "$@"
    run fftnet_2.5 120 $seed --mixer 'fftnet,fftnet,attn,fftnet' --short_conv \
        --mlp_ratio 3.484375 "$@"
done
run attn_20 960 0 "${ATTN[@]}" "$@"
run hybrid_20 960 0 "${HYBRID[@]}" --mlp_ratio 3.75 "$@"
run attn_lr0.03_20 960 0 "${ATTN[@]}" --muon_learning_rate 0.03 "$@"
run hybrid_lr0.03_20 960 0 "${HYBRID[@]}" --mlp_ratio 3.75 --muon_learning_rate 0.03 "$@"
run attn_output_conv_20 960 0 "${ATTN[@]}" --output_conv --mlp_ratio 3.9375 "$@"
run hybrid_output_conv_20 960 0 "${HYBRID[@]}" --output_conv --mlp_ratio 3.703125 "$@"
