#!/bin/sh
# Install the Debian packages that the demo and the tests use, where this user may; else say which they are.
#   sh scripts/system_packages.sh          the demo's
#   sh scripts/system_packages.sh slurm    also those of the tests that start a real SLURM (a database among them)
#   sh scripts/system_packages.sh ffcv     also those that the extra ffcv is compiled with; slurm ffcv: both
#   sh scripts/system_packages.sh browser  also the browser in which tests look at pages
set -eu

packages="dataset-fashion-mnist fonts-dejavu fonts-freefont-ttf fonts-aenigma"
for part; do
    case $part in
    slurm) packages="$packages slurm-wlm munge slurmdbd mariadb-server" ;;
    ffcv) packages="$packages g++ pkg-config libopencv-dev libturbojpeg0-dev" ;;
    browser) packages="$packages chromium chromium-driver" ;;
    *) echo "unknown: $part (slurm, ffcv, browser)" && exit 2 ;;
    esac
done
# Debian's python3 comes without the means to make a virtual environment; other builds of Python have them.
"${PYTHON:-python3}" -c "import ensurepip" 2>/dev/null || packages="$packages python3-venv"
case $packages in *opencv*)
    "${PYTHON:-python3}" -c "import os, sysconfig as s; os.stat(s.get_path('include') + '/Python.h')" 2>/dev/null ||
        packages="$packages python3-dev" ;;
esac

command -v dpkg-query >/dev/null || {
    echo "not a Debian system: Fashion-MNIST will be downloaded instead, and the data set characters needs fonts of your own"
    exit 0
}

missing=""
for package in $packages; do
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ]; then
    sudo=""
elif sudo -n true 2>/dev/null; then
    sudo="sudo"
else
    echo "please install:$missing   (sudo apt-get install$missing)"
    exit 0
fi
# A mirror that is away must not stop those who can do without: the demo falls back on other data.
$sudo apt-get update && $sudo apt-get install --yes --no-install-recommends $missing ||
    echo "could not install:$missing"
