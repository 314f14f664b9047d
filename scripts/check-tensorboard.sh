#!/bin/sh
# Reads what `train --tensorboard` writes with the real TensorBoard, of a training that was killed and resumed,
# and of several seeds.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh

python_packages tensorboard 'tensorboard==2.21.*' 'numpy>=2' 'pillow>=11'
wgrad=$target/release/wgrad
# What the tests built, where they have run: a build alone would compile wgpu again, without the features that they turn on.
[ -x "$wgrad" ] || cargo build --release --quiet
exec "$python" scripts/events.py "$wgrad"
