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
if ! command -v apt-get >/dev/null 2>&1; then
    echo "No $what was found: install your distribution's Mesa Vulkan drivers. On the CPU everything works without." >&2
    exit 0
fi
sudo=""
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null 2>&1; then
        echo "No $what was found, and there is no sudo to install mesa-vulkan-drivers with. On the CPU everything works without." >&2
        exit 0
    fi
    sudo=sudo
fi
echo "No $what was found: installing mesa-vulkan-drivers"
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq
$sudo apt-get install -y -qq --no-install-recommends mesa-vulkan-drivers libvulkan1 >/dev/null
