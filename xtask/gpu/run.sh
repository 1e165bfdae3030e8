#!/bin/sh
# Checks, tunes and measures flora on this machine's GPU: `sh run.sh --help`. Needs the driver, CUDA's headers and NVRTC,
# Python 3.9 or later, and, for the comparison, a PyTorch that sees the GPU.
#
# This part only unpacks and picks the Python: the first that has PyTorch, else the first there is. PYTHON=/path/to/python3 names
# it. Beside an archive of its own name, as gpu.sh beside gpu.tar.xz, it unpacks that first; the results go into the folder that
# comes of it.
set -eu

# The time budget includes unpacking.
FLORA_STARTED=$(date +%s)
export FLORA_STARTED
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)

runs() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 9))' >/dev/null 2>&1
}

has_torch() {
    "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' >/dev/null 2>&1
}

chosen=
if [ -n "${PYTHON:-}" ]; then
    runs "$PYTHON" && chosen=$PYTHON
else
    for candidate in "${VIRTUAL_ENV:-/nowhere}/bin/python3" python3 python "${CONDA_PREFIX:-/nowhere}/bin/python3" \
        /opt/*/bin/python3 /opt/*/.venv/bin/python3 /usr/local/bin/python3 /usr/bin/python3; do
        runs "$candidate" || continue
        [ -n "$chosen" ] || chosen=$candidate
        if has_torch "$candidate"; then
            chosen=$candidate
            break
        fi
    done
fi
if [ -z "$chosen" ]; then
    echo "error: ${PYTHON:-no python3} is not a Python 3.9 or later; set PYTHON to one" >&2
    exit 2
fi
name=$(basename -- "$0" .sh)
if [ ! -d "$here/measure" ]; then
    # By Python's own libraries: a machine without xz may have a tar that needs it.
    "$chosen" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$here/$name.tar.xz" "$here" || {
        echo "error: can't unpack $here/$name.tar.xz; unpack it by hand and run $name/run.sh" >&2
        exit 2
    }
    here=$here/$name
fi
exec "$chosen" "$here/measure" "$@"
