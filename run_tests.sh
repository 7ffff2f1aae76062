#!/usr/bin/env bash
# The whole test suite, in an environment made for it. Extra arguments go to pytest.
source "$(dirname "$0")/setup_env.sh"
"$python" -c 'import pytest, ruff' 2>/dev/null || "$python" -m pip install --quiet --disable-pip-version-check pytest ruff
exec "$python" -m pytest -q "$@"
