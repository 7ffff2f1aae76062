#!/usr/bin/env bash
# Measures again what gdn.txt and scaling.txt hold: a few minutes. PYTHON names a Python that has
# torch, and transformers for the last two rows of gdn. Extra arguments go to every call.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bench() { "${PYTHON:-python}" bench.py "$@"; }

# gdn.txt
bench gdn --repeats 9 "$@"
bench gdn --repeats 9 --threads 2 "$@"
bench gdn --repeats 9 --batch_size 1 --n_embd 256 --n_head 4 "$@"
# scaling.txt
bench scaling --repeats 7 --batch_size 1 --n_embd 256 --n_head 4 "$@"
