#!/bin/sh
# Reads what `train --tensorboard` writes with the real TensorBoard, of a training that was killed and resumed,
# and of several seeds.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh

python_packages tensorboard 'tensorboard==2.21.*' 'numpy>=2' 'pillow>=11'
cargo build --release --quiet
exec "$python" scripts/events.py "$target/release/wgrad"
