#!/bin/sh
# Installs Mesa's Vulkan drivers on Debian and Ubuntu: where no Vulkan driver is found, or with the argument `lavapipe`
# where software Vulkan is not, which the tests use. Does nothing on other systems.
set -eu

[ "$(uname -s)" = Linux ] || exit 0
wanted="*.json"
what="Vulkan driver"
if [ "${1:-}" = lavapipe ]; then
    [ -z "${PCPO_TEST_DEVICE:-}" ] || exit 0
    wanted="lvp_icd*.json"
    what="software Vulkan (lavapipe)"
fi
for dir in /usr/share/vulkan/icd.d /etc/vulkan/icd.d "${HOME:-/root}/.local/share/vulkan/icd.d"; do
    for file in "$dir"/$wanted; do
        if [ -e "$file" ]; then exit 0; fi
    done
done
. "$(dirname "$0")/apt.sh"
install_with_apt "$what" "On the CPU everything works without." mesa-vulkan-drivers libvulkan1
