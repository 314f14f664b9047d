#!/bin/sh
# Exports every shipped model and holds what other programs make of the files against what wgrad gives for
# 1,000 images: onnx's checker, onnxruntime, and PyTorch; then imports what PyTorch's exporter wrote. PyTorch
# is that of the Python named in WGRAD_PYTORCH, else Debian's.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh

python_packages onnx onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6 zstandard==0.25.0
wgrad=${WGRAD:-$target/release/wgrad}
[ -x "$wgrad" ] || cargo build --release --quiet
case $wgrad in
/*) ;;
*) wgrad=$PWD/$wgrad ;;
esac

# The first half needs no PyTorch; where there is none, the check says so in the end.
folder=$target/onnx
rm -rf "$folder"
mkdir -p "$folder"
"$python" scripts/onnx_check.py data "$folder"
WGRAD=$wgrad "$python" scripts/onnx_check.py onnxruntime "$folder"

torch=${WGRAD_PYTORCH:-python3}
if ! "$torch" -c 'import torch' 2>/dev/null; then
    # Debian's is for the CPU alone, 150 MB; PyPI's comes with several GB for CUDA.
    torch=/usr/bin/python3
    "$torch" -c 'import torch' 2>/dev/null || {
        command -v apt-get >/dev/null &&
            as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-torch python3-numpy >/dev/null
    } || skip "onnxruntime agrees, but there is no PyTorch to ask: apt-get could not install python3-torch"
fi
WGRAD=$wgrad "$torch" scripts/onnx_check.py pytorch "$folder"
