#!/bin/sh
# Runs `wgrad verify` on the newest Mesa: sh scripts/verify-mesa.sh [SUITE [ARGUMENTS OF WGRAD]]
#
# Its software adapter has cooperative matrices (Mesa 26), so it is where the kernel family `matrix` runs without a
# GPU. Installs a small Debian (sid unless SUITE says otherwise) into a folder of its own and runs the program
# there with chroot, so it needs root; 1 GB and about 3 minutes, and half an hour of `verify`, since that adapter takes
# 1 to 8 seconds to compile a kernel with matrices. Run before a release and after a change of that family, not in CI.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh

suite=${1:-sid}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- verify
[ "$(id -u)" -eq 0 ] || skip "chroot needs root"
need debootstrap debootstrap
cargo build --release --quiet

root=$target/debian-$suite
if [ ! -f "$root/complete" ]; then
    rm -rf "$root"
    debootstrap --variant=minbase --include=libvulkan1,mesa-vulkan-drivers "$suite" "$root" >"$target/debootstrap.log" ||
        skip "debootstrap failed, see $target/debootstrap.log"
    touch "$root/complete"
fi
cp "$target/release/wgrad" "$root/usr/local/bin/wgrad"
chroot "$root" dpkg-query -W -f '${Package} ${Version}\n' mesa-vulkan-drivers
exec chroot "$root" env XDG_CACHE_HOME=/tmp VK_LOADER_LAYERS_DISABLE='*' wgrad "$@"
