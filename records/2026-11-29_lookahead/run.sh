#!/usr/bin/env bash
# Runs this race again. PYTHON names a Python that has torch; extra arguments go to every run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OMP_NUM_THREADS=1 "${PYTHON:-python}" race.py --data data/gutenberg_bytes --n_layer 4 --n_head 2 --n_embd 64 --sequence_length 512 --batch_size 8 --val_tokens 524288 --save_every 0 --num_iterations 480 --val_loss_every 160 --val_tail_every 160 --mixer afno,afno,attn,afno --short_conv --output_conv --mlp_ratio 3.75 --muon_row_beta 0.95 --seeds 2 --out logs/lookahead --control '' --candidate '--lookahead 0.6' --more '--stages 512x4@320 --num_iterations 640' --more '--stages 128x32@240' --more '--lookahead 0.6 --stages 512x4@320 --num_iterations 640' "$@"
