# For scripts that are sourced from here: packages of Debian and Ubuntu.

# install_with_apt WHAT HINT PACKAGE..: installs packages for WHAT, which was not found; where that cannot be done, says so with
# the HINT and ends the script, without an error.
install_with_apt() {
    what=$1
    hint=$2
    shift 2
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "No $what was found: install your distribution's. $hint" >&2
        exit 0
    fi
    sudo=""
    if [ "$(id -u)" != 0 ]; then
        if ! command -v sudo >/dev/null 2>&1; then
            echo "No $what was found, and there is no sudo to install $1 with. $hint" >&2
            exit 0
        fi
        sudo=sudo
    fi
    echo "No $what was found: installing $1"
    export DEBIAN_FRONTEND=noninteractive
    $sudo apt-get update -qq
    $sudo apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
