#!/bin/sh
# Puts TensorBoard into target/python, which the test of its event files reads them with. Does nothing where it is there,
# or where there is no Python.
set -eu

cd "$(dirname "$0")/.."
if [ -x target/python/bin/python ] && target/python/bin/python -c "import tensorboard" 2>/dev/null; then exit 0; fi
if ! python3 -c "import venv, ensurepip" 2>/dev/null; then
    echo "There is no Python with venv: the test of TensorBoard's event files will be skipped." >&2
    exit 0
fi
echo "Installing TensorBoard into target/python"
python3 -m venv target/python
target/python/bin/pip install --quiet --disable-pip-version-check "tensorboard==2.21.0" "pillow==13.0.0" "setuptools<81"
