#!/usr/bin/env bash
# Runs these again, those that are done excepted, into logs/width/VARIANT: 90 minutes on one thread.
# PYTHON names a Python that has torch; WIDTHS, SEEDS and ARMS choose among the runs but the last
# two; arguments go to every run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1

run() {                                  # ARM WIDTH SEED flags...
    local name=${1}_$2 width=$2 seed=$3
    shift 3
    [[ -e logs/width/$name/s$seed/test_metrics.txt ]] && return
    "${PYTHON:-python}" train_gpt2.py --data data/gutenberg_bytes --n_layer 4 \
        --n_head $((width > 32 ? width / 32 : 1)) --n_embd "$width" --sequence_length 512 \
        --batch_size 8 --short_conv --output_conv --muon_row_beta 0.95 --val_tokens 524288 \
        --save_every 0 --val_loss_every 0 --num_iterations "${STEPS[$width]}" \
        --seed "$seed" --output_dir "logs/width/$name" --run_name "s$seed" "$@"
}

# 8.45 bytes a parameter, and the MLPs that give attention as many parameters as the hybrid has.
declare -A STEPS=([32]=144 [48]=282 [64]=483 [96]=1002 [128]=1744)
declare -A RATIO=([32]=4.21875 [48]=3.875 [64]=3.984375 [96]=3.8125 [128]=3.875)
for seed in ${SEEDS:-0 1}; do
    for width in ${WIDTHS:-32 48 64 96 128}; do
        for arm in ${ARMS:-attn hybrid}; do
            case $arm in
                attn) run attn "$width" "$seed" --mixer attn --mlp_ratio "${RATIO[$width]}" "$@" ;;
                hybrid) run hybrid "$width" "$seed" --mixer 'afno,afno,attn,afno' \
                    --mlp_ratio 3.75 "$@" ;;
            esac
        done
    done
done
run attn_lr0.03 64 0 --mixer attn --mlp_ratio "${RATIO[64]}" --muon_learning_rate 0.03 "$@"
run hybrid_lr0.03 64 0 --mixer 'afno,afno,attn,afno' --mlp_ratio 3.75 --muon_learning_rate 0.03 "$@"
