# Sourced by the run scripts: puts a Python with our dependencies first on the PATH, making .venv if torch is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python3}
if ! "$python" -c 'import torch, numpy' 2>/dev/null; then
    if [ ! -x .venv/bin/python ]; then
        echo "torch is not installed: making a virtual environment in .venv" >&2
        "$python" -m venv .venv || { echo "cannot make .venv: install python3-venv, or set PYTHON to one that has torch" >&2; exit 1; }
    fi
    if ! cmp -s requirements.txt .venv/installed; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt 1>&2 ||
            { echo "cannot install requirements.txt: check the network, then run this again" >&2; exit 1; }
        cp requirements.txt .venv/installed
    fi
    python=.venv/bin/python
fi
has_cuda() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }
