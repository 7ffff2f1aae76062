#!/usr/bin/env bash
# Runs what is still in the code of this race again; tables of values and cautious decay are not, the
# logs' sources have them. PYTHON names a Python that has torch; extra arguments go to every run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OMP_NUM_THREADS=1 "${PYTHON:-python}" race.py --data data/gutenberg_bytes --n_layer 4 --n_head 2 --n_embd 64 --sequence_length 512 --batch_size 8 --val_tokens 524288 --save_every 0 --num_iterations 480 --val_loss_every 160 --val_tail_every 160 --mixer afno,afno,attn,afno --short_conv --output_conv --mlp_ratio 3.75 --seeds 2 --out logs/gains --control '' --candidate '--muon_row_beta 0.95' --more '--weight_decay 0.1' --more '--afno_taps 16' "$@"
