#!/bin/sh
# Packs the crate as it would be published: at most 10 MiB, which is what crates.io takes.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh

limit=$((10 * 1024 * 1024))
rm -f "$target"/package/wgrad-*.crate
cargo fetch --locked --quiet
cargo package --no-verify --allow-dirty --offline --quiet
size=$(cat "$target"/package/wgrad-*.crate | wc -c)
printf 'the crate has %d bytes of at most %d\n' "$size" "$limit"
[ "$size" -le "$limit" ]
