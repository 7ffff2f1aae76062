# Sourced by the run scripts: goes to the repository's root and puts a Python with our dependencies
# in $python, making .venv if torch is missing. EXTRA names optional packages that a script needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

fail() {
    echo "$*" >&2
    exit 1
}

has() {                                  # are all these modules installed?
    "$python" -c 'import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, sys.argv[1:])))' "$@"
}

has_cuda() {
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
}

install() {
    "$python" -m pip install --quiet --disable-pip-version-check "$@" 1>&2 ||
        fail "cannot install $*: check the network, then run this again"
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or later is needed: name one by PYTHON=..."
if ! has torch numpy; then
    if [ ! -x .venv/bin/python ]; then
        echo "torch is not installed: making a virtual environment in .venv" >&2
        "$python" -m venv .venv ||
            fail "cannot make .venv: install python3-venv, or set PYTHON to one that has torch"
    fi
    python=.venv/bin/python
    if ! cmp -s requirements.txt .venv/installed; then
        install -r requirements.txt
        cp requirements.txt .venv/installed
    fi
fi
for package in ${EXTRA[@]+"${EXTRA[@]}"}; do
    if ! has "${package//-/_}"; then
        echo "installing $package" >&2
        install "$package"
    fi
done
