#!/bin/sh
# Opens the page of `wgrad serve` in Chromium without a window: draws a digit with the mouse, by touch and by
# keyboard, drops a picture, takes a (fake) camera, and reads the answers from the page.
#
#     sh scripts/check-serve.sh [FOLDER]    with FOLDER: also leaves pictures of the page there
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh

need chromium chromium
npm_package ws 8.23.0
wgrad=${WGRAD:-$target/release/wgrad}
[ -x "$wgrad" ] || cargo build --release
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$wgrad" train --model tiny --limit 6000 --epochs 4 --device cpu --out "$work/run" >/dev/null
NODE_PATH=$npm_modules node scripts/serve.cjs "$wgrad" "$work/run" "$@"
