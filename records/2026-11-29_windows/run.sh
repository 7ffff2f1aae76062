#!/usr/bin/env bash
# Runs this race again. PYTHON names a Python that has torch; extra arguments go to every run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OMP_NUM_THREADS=1 "${PYTHON:-python}" race.py --data data/gutenberg_bytes --n_layer 4 --n_head 2 --n_embd 64 --sequence_length 512 --batch_size 8 --val_tokens 524288 --save_every 0 --num_iterations 480 --val_loss_every 160 --val_tail_every 160 --short_conv --output_conv --mlp_ratio 3.75 --muon_row_beta 0.95 --seeds 2 --out logs/windows --control '--mixer afno,afno,attn,afno' --candidate '--mixer afno,afno,attn,afno --window 64' --more '--mixer attn,attn,afno,afno --window 64' "$@"
