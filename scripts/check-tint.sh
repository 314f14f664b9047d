#!/bin/sh
# Compiles every shader module with Tint, the WGSL compiler of Chromium, and makes every pipeline.
# Needs no GPU: Dawn's `null` back end does not run anything.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh

npm_package webgpu 0.6.2
dump_shaders
NODE_PATH=$npm_modules exec node scripts/tint.cjs "$target/shaders"
