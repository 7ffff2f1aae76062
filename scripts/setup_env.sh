# shellcheck shell=bash disable=SC2034  # what is set here is read in the scripts that source it
# Sourced by the run scripts: puts a Python with our dependencies in $python, making .venv where
# torch is missing. EXTRA names optional packages that a script needs.
# Paths that the user gives are relative to where he stands, so nothing here changes the directory.
# The repository's own files are "$here"NAME, which is short where he stands in the repository.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
here=$root/
[[ . -ef $root ]] && here=
python=${PYTHON:-python3}
OLDEST_TORCH=2.10                        # the oldest that was tried

fail() {
    echo "$*" >&2
    exit 1
}

# Python's -P: what lies in the user's folder and is called torch is not torch.
has() {                                  # are all these modules installed?
    "$python" -P -c 'import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, sys.argv[1:])))' "$@"
}

# Sets torch_version, torch_fits (yes; no: too old), torch_cuda (of its build; none) and cuda_works
# (yes, no). Fails where torch or numpy cannot be imported.
probe() {
    local found
    found=$("$python" -P -c 'import sys, numpy, torch
def number(version): return [int(part) for part in version.split(".")[:2]]
print(torch.__version__, "yes" if number(torch.__version__) >= number(sys.argv[1]) else "no",
      torch.version.cuda or "none", "yes" if torch.cuda.is_available() else "no")' \
        "$OLDEST_TORCH" 2>/dev/null) || return
    read -r torch_version torch_fits torch_cuda cuda_works <<<"$found"
}

# Does pip refuse to install into this Python, since the operating system manages it (PEP 668)?
is_managed() {
    "$python" -P -c 'import os, sys, sysconfig
marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
sys.exit(sys.prefix != sys.base_prefix or not os.path.exists(marker))'
}

install() {                              # arguments of pip install; for a managed Python, in .venv
    local output errors
    if is_managed; then
        use_venv --system-site-packages
    fi
    if ! output=$("$python" -P -m pip install --quiet --disable-pip-version-check "$@" 2>&1); then
        errors=$(grep '^ERROR' <<<"$output" || echo "$output")
        fail "cannot install $*: $(tail -n 1 <<<"$errors")"
    fi
}

# Makes .venv, or mends what a killed installation has left of it; $python is then its Python.
use_venv() {                             # options of python -m venv
    local output
    local made_of=$python
    local venv=${here}.venv
    python=$venv/bin/python
    # There is none, or the Python that it was made of is gone.
    if ! "$python" -c '' 2>/dev/null; then
        echo "making a virtual environment in $venv" >&2
        output=$("$made_of" -P -m venv --clear "$@" "$venv" 2>&1) || [[ -x $python ]] ||
            fail "cannot make $venv: $(tail -n 1 <<<"$output")"
    fi
    if ! "$python" -P -m pip --version >/dev/null 2>&1; then
        output=$("$python" -P -m ensurepip 2>&1) ||
            fail "there is no pip in $venv ($(tail -n 1 <<<"$output")): install python3-venv, or" \
                "set PYTHON to one that has torch"
    fi
    if ! probe || is_outdated; then
        echo "installing torch and what else is in requirements.txt into $venv" >&2
        install -r "${here}requirements.txt"
        cp "${here}requirements.txt" "$venv/installed"
        probe || fail "torch does not work in $venv: remove that folder, then run this again"
    fi
}

is_outdated() {                          # did we make .venv for other requirements?
    [[ -e ${here}.venv/installed ]] && ! cmp -s "${here}requirements.txt" "${here}.venv/installed"
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "Python 3.11 or later is needed, $python is not: name one by PYTHON=..."
probe || use_venv
if [[ $torch_fits == no ]] && is_managed; then
    use_venv
fi
[[ $torch_fits == yes ]] || fail "torch $torch_version is too old, $OLDEST_TORCH or later is" \
    "needed: $python -m pip install -r ${here}requirements.txt"
for package in ${EXTRA[@]+"${EXTRA[@]}"}; do
    if ! has "${package//-/_}"; then
        echo "installing $package" >&2
        install "$package"
    fi
done
