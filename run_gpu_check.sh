#!/usr/bin/env bash
# Everything that only a GPU shows, in at most nine minutes and, where torch and pytest are there,
# without a network: its tests, every recipe, a bench, profiles, a short race, each into a text file
# in a folder below records/. `--device cpu --tiny` tries the check itself; scripts/gpu_check.py says
# more.
source "$(dirname "$0")/scripts/setup_env.sh"
has pytest || install pytest
exec "$python" -P "${here}scripts/gpu_check.py" "$@"
