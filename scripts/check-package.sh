#!/bin/sh
# Packs the crate as it would be published: at most 10 MiB, which is what crates.io takes.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh

limit=$((10 * 1024 * 1024))
cargo package --no-verify --allow-dirty --offline --quiet
crate=$(ls -t "$target"/package/wgrad-*.crate | head -n 1)
size=$(wc -c <"$crate")
printf '%s: %d bytes of at most %d\n' "$(basename "$crate")" "$size" "$limit"
[ "$size" -le "$limit" ]
