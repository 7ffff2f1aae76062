#!/usr/bin/env bash
# Runs this race again. PYTHON names a Python that has torch; extra arguments go to every run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OMP_NUM_THREADS=1 "${PYTHON:-python}" race.py --val_tail_every 25 --target_val_loss 1.8857 --seeds 3 --out logs/face --control '--mixer afno' --candidate '--mixer afno --output_conv' "$@"
