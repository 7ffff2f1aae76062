#!/usr/bin/env bash
# The whole test suite, in an environment made for it. Extra arguments go to pytest.
source "$(dirname "$0")/scripts/setup_env.sh"
if ! has tiktoken huggingface_hub pytest xdist ruff pytorch_optimizer transformers safetensors; then
    # torch stays at the version that is there: a test's dependency must not replace it.
    install tiktoken huggingface-hub -r "${here}tests/requirements.txt" "torch==${torch_version%+*}"
fi
# fla's plain reference of the delta rule; its kernels need triton
has fla || install --no-deps fla-core einops
export OMP_NUM_THREADS=1                 # two processes of one thread: half the time of one of two
python=$("$python" -c 'import sys; print(sys.executable)')
cd "$root"                               # pytest looks for its settings here
exec "$python" -m pytest -q -n 2 "$@"
