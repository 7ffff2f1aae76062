#!/usr/bin/env bash
# Runs the control of this race again; the others left the code, the logs' sources have them and
# their flags: --afno_spectrum running, --afno_experts 4 [--afno_experts_used 2], --pos fourier,
# --output_conv_at 1,1,0,0 and 0,0,1,1. PYTHON names a Python that has torch; extra arguments go to
# every run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OMP_NUM_THREADS=1 "${PYTHON:-python}" race.py --data data/gutenberg_bytes --n_layer 4 --n_head 2 --n_embd 64 --sequence_length 512 --batch_size 8 --val_tokens 524288 --save_every 0 --num_iterations 480 --val_loss_every 160 --val_tail_every 160 --mixer afno,afno,attn,afno --short_conv --output_conv --mlp_ratio 3.75 --muon_row_beta 0.95 --seeds 2 --out logs/plan --control '' --candidate '--afno_taps 16' "$@"
