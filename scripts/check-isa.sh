#!/bin/sh
# Compiles the kernels of four models for three AMD chips with Mesa's RADV, which needs none of them, and holds
# what they become against examples/isa/bounds.rs: nothing spills, and products are multiply-adds.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh

[ "$(uname -s)" = Linux ] || skip "Mesa's RADV is for Linux"
if ! ls /usr/share/vulkan/icd.d/radeon_icd* >/dev/null 2>&1; then
    command -v apt-get >/dev/null || skip "no Mesa here and no apt-get to install mesa-vulkan-drivers"
    as_root apt-get update -qq || true
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libvulkan1 mesa-vulkan-drivers >/dev/null ||
        skip "apt-get could not install mesa-vulkan-drivers"
fi
cargo test --release --quiet --example isa
cargo build --release --quiet --example isa
isa=$target/release/examples/isa
for chip in vega10 navi21 gfx1100; do
    # Where RADV does not know the chip, it ends the program.
    "$isa" tiny --only nothing --check --chip "$chip" >/dev/null 2>&1 ||
        skip "no Mesa here whose RADV compiles for $chip; 22.3 or newer does"
done
"$isa" default tutorial lenet5 vgg-cifar --check
# vega10 has no subgroups of 32.
"$isa" default tutorial lenet5 vgg-cifar --check --family subgroup --chip navi21 --chip gfx1100
