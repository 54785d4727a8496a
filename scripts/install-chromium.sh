#!/bin/sh
# Installs Chromium and one font on Debian and Ubuntu, for the test that looks at a run's page. Does nothing where a
# Chromium is found, on other systems, and where packages cannot be installed: the test is skipped there.
set -eu

[ "$(uname -s)" = Linux ] || exit 0
[ -z "${PCPO_CHROMIUM:-}" ] || exit 0
for name in chromium chromium-browser google-chrome chrome; do
    if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
if ! command -v apt-get >/dev/null 2>&1; then
    echo "No Chromium was found: install your distribution's, or set PCPO_CHROMIUM. The test that needs it is skipped." >&2
    exit 0
fi
sudo=""
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null 2>&1; then
        echo "No Chromium was found, and there is no sudo to install it with. The test that needs it is skipped." >&2
        exit 0
    fi
    sudo=sudo
fi
echo "No Chromium was found: installing chromium"
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq
$sudo apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
