#!/usr/bin/env bash
# Measures again what the .txt files here hold: about half an hour. PYTHON names a Python that has
# torch and matplotlib.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1
python=${PYTHON:-python}
here=records/2026-11-29_speed

"$python" bench.py cores --repeats 5 --plot $here/cores.png > $here/cores.txt
"$python" bench.py cores --tokens 32768 --shortest 1024 --sequence_length 32768 \
    --repeats 4 --plot $here/cores_32k.png > $here/cores_32k.txt
"$python" bench.py parts > $here/parts.txt
"$python" bench.py products --batch_size 2 --sequence_length 1024 --n_embd 768 > $here/products.txt
"$python" bench.py models --mixer "attn;afno;afno,afno,afno,attn" --n_embd 128 --n_head 4 \
    --batch_size 8 --repeats 40 --sequence_length 256 > $here/models.txt
"$python" scripts/versus_nanogpt.py steps > $here/steps.txt
"$python" scripts/versus_nanogpt.py mixers > $here/mixers.txt
"$python" scripts/versus_nanogpt.py face --threads 2 > $here/face.txt
