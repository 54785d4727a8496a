#!/bin/sh
# Installs Open MPI with its headers, and libclang, which the bindings are made by, on Debian and Ubuntu. Does nothing on
# other systems, or where both are there.
set -eu

[ "$(uname -s)" = Linux ] || exit 0
if command -v mpicc >/dev/null 2>&1 && command -v mpirun >/dev/null 2>&1 &&
    ls /usr/lib/llvm-*/lib/libclang*.so* >/dev/null 2>&1; then
    exit 0
fi
. "$(dirname "$0")/apt.sh"
install_with_apt "MPI" "Without it one process trains." libopenmpi-dev openmpi-bin libclang-dev
