#!/bin/sh
# Installs Mesa's Vulkan drivers on Debian and Ubuntu, where no Vulkan driver is found. Does nothing on other systems.
set -eu

[ "$(uname -s)" = Linux ] || exit 0
for dir in /usr/share/vulkan/icd.d /etc/vulkan/icd.d "$HOME/.local/share/vulkan/icd.d"; do
    if ls "$dir"/*.json >/dev/null 2>&1; then exit 0; fi
done
if ! command -v apt-get >/dev/null 2>&1; then
    echo "No Vulkan driver was found. Install your distribution's (Mesa: vulkan drivers); on the CPU everything works without." >&2
    exit 0
fi
echo "No Vulkan driver was found: installing mesa-vulkan-drivers"
sudo=""
[ "$(id -u)" = 0 ] || sudo=sudo
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq
$sudo apt-get install -y -qq --no-install-recommends mesa-vulkan-drivers libvulkan1 >/dev/null
