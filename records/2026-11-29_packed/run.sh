#!/usr/bin/env bash
# Runs these runs again, those that are done excepted, then scores all their models in the same
# contexts. PYTHON names a Python that has torch; extra arguments go to every run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1
python="${PYTHON:-python}"

run() {  # VARIANT SEED FLAGS...
    local variant="$1" seed="$2"
    shift 2
    [[ -e "logs/packed/$variant/s$seed/test_metrics.txt" ]] && return
    "$python" train_gpt2.py --data data/paragraphs_bytes --n_layer 4 --n_head 2 --n_embd 64 --val_tokens 524288 --save_every 0 --num_iterations 480 --val_loss_every 240 --short_conv --output_conv --mlp_ratio 3.75 --muon_row_beta 0.95 --seed "$seed" --output_dir "logs/packed/$variant" --run_name "s$seed" "$@"
}

attention=(--mixer attn)
hybrid=(--mixer "afno,afno,attn,afno" --afno_taps 16)
windows=(--batches windows --sequence_length 512 --batch_size 8)
packed=(--batches packed --document_token 10 --sequence_length 512 --batch_size 8)
long=(--batches packed --document_token 10 --sequence_length 2048 --batch_size 2)
for seed in 0 1; do
    run attn_windows "$seed" "${attention[@]}" "${windows[@]}" "$@"
    run attn_packed "$seed" "${attention[@]}" "${packed[@]}" "$@"
    run hybrid_windows "$seed" "${hybrid[@]}" "${windows[@]}" "$@"
    run hybrid_packed "$seed" "${hybrid[@]}" "${packed[@]}" "$@"
    run hybrid_packed_2048 "$seed" "${hybrid[@]}" "${long[@]}" "$@"
done
for seed in 0 1; do
    run attn_packed_2048 "$seed" "${attention[@]}" "${long[@]}" "$@"
done
if [[ "$*" != *--estimate* ]]; then
    "$python" records/2026-11-29_packed/same_context.py logs/packed > logs/packed/same_context.csv
fi
