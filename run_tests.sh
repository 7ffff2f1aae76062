#!/usr/bin/env bash
# The whole test suite, in an environment made for it. Extra arguments go to pytest.
source "$(dirname "$0")/setup_env.sh"
has pytest ruff pytorch_optimizer transformers || install -r requirements.txt -r tests/requirements.txt
has fla || install --no-deps fla-core einops          # its plain reference of the delta rule; its kernels need triton
exec "$python" -m pytest -q "$@"
