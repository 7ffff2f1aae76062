# Sourced by the run scripts: puts a Python with our dependencies in $python, making .venv if torch is missing. EXTRA names
# optional packages that a script needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
has() { "$python" -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))' "$@"; }
install() {
    "$python" -m pip install --quiet --disable-pip-version-check "$@" 1>&2 ||
        { echo "cannot install $*: check the network, then run this again" >&2; exit 1; }
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "Python 3.11 or later is needed: name one by PYTHON=..." >&2; exit 1; }
if ! has torch numpy; then
    if [ ! -x .venv/bin/python ]; then
        echo "torch is not installed: making a virtual environment in .venv" >&2
        "$python" -m venv .venv || { echo "cannot make .venv: install python3-venv, or set PYTHON to one that has torch" >&2; exit 1; }
    fi
    python=.venv/bin/python
    if ! cmp -s requirements.txt .venv/installed; then
        install -r requirements.txt
        cp requirements.txt .venv/installed
    fi
fi
for package in ${EXTRA[@]+"${EXTRA[@]}"}; do
    has "${package//-/_}" || { echo "installing $package" >&2; install "$package"; }
done
has_cuda() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }
