#!/usr/bin/env bash
# Runs this race again. PYTHON names a Python that has torch; extra arguments go to every run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OMP_NUM_THREADS=1 "${PYTHON:-python}" race.py --data data/gutenberg_bytes --n_layer 4 --n_head 2 --n_embd 64 --sequence_length 4096 --batch_size 1 --val_batch_size 2 --val_tokens 524288 --save_every 0 --num_iterations 480 --val_loss_every 160 --val_tail_every 160 --seeds 2 --out logs/long4k --control '--mixer attn --short_conv' --candidate '--mixer afno,afno,attn,afno --short_conv --mlp_ratio 3.75' "$@"
