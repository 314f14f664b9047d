#!/bin/sh
# Runs `wgrad verify` on SwiftShader, a second software Vulkan driver, with subgroups of 4 and workgroups
# of 256. It is part of Debian's Chromium; only the driver is unpacked.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh

folder=$target/swiftshader
icd=$folder/usr/lib/chromium/vk_swiftshader_icd.json
if [ ! -f "$icd" ]; then
    command -v apt-get >/dev/null || skip "no apt-get here to download SwiftShader (chromium-common)"
    mkdir -p "$folder"
    as_root apt-get update -qq || true
    (cd "$folder" && rm -f ./*.deb && apt-get download -qq chromium-common 2>/dev/null) ||
        skip "apt-get could not download chromium-common"
    dpkg --fsys-tarfile "$folder"/chromium-common_*.deb |
        tar -x -C "$folder" ./usr/lib/chromium/libvk_swiftshader.so ./usr/lib/chromium/vk_swiftshader_icd.json ||
        skip "chromium-common has no SwiftShader any more"
    rm "$folder"/*.deb
fi
icd=$(cd "$(dirname "$icd")" && pwd)/$(basename "$icd")

# Old loaders know the second name only.
export VK_DRIVER_FILES="$icd" VK_ICD_FILENAMES="$icd"
cargo test --release --no-run --quiet
"$target/release/wgrad" devices | grep -q SwiftShader || {
    echo "the Vulkan loader does not list SwiftShader from $icd"
    exit 1
}
# Every 12th of a kernel's cases, because this driver takes a second and more to compile a product, and the fixed ones only: in one random geometry (seed 1, 16×8 sums a lane of the subgroup family) the driver
# passes or never comes back, as it likes, and takes all of the machine's memory. Hence the bounds, too; a driver
# that breaks them has computed nothing wrong, and nothing right.
code=0
(
    ulimit -v 12000000 # KiB
    exec timeout 300 "$target/release/wgrad" verify --random 0 --every 12
) || code=$?
[ "$code" -lt 124 ] || skip "SwiftShader broke its bounds of time or memory (exit code $code)"
exit "$code"
