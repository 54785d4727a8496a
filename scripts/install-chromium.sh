#!/bin/sh
# Installs Chromium and one font on Debian and Ubuntu, for the test that looks at a run's page. Does nothing where a
# Chromium is found, on other systems, and where packages cannot be installed: the test is skipped there.
set -eu

[ "$(uname -s)" = Linux ] || exit 0
[ -z "${PCPO_CHROMIUM:-}" ] || exit 0
for name in chromium chromium-browser google-chrome chrome; do
    if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
. "$(dirname "$0")/apt.sh"
install_with_apt Chromium "Or set PCPO_CHROMIUM. The test that needs it is skipped without." chromium fonts-dejavu-core
