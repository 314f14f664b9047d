"""Makes conv2d.json: what PyTorch computes, for tests/golden_conv2d.rs to hold the CPU twins against.

    pip install torch numpy && python tests/golden/make_conv2d.py

Laid out as make.py says; weights in groups are the matrix [KH*KW*C/groups + 1, OC], without the last
row where there is no bias. padding is [[top, bottom], [left, right]], or null for PyTorch's "same".
"""

import json
import pathlib

import numpy
import torch
from torch.nn import functional as F

torch.manual_seed(8)


def noise(*shape):
    """Sixteenths, which are short to write."""
    return torch.randn(*shape).double().mul(16).round().div(16).requires_grad_()


def numbers(tensor):
    flat = tensor.detach().contiguous().flatten().numpy().astype(numpy.float32)
    return [int(v) if v == int(v) else float(str(v)) for v in flat]


def nhwc(tensor):
    return numbers(tensor.permute(0, 2, 3, 1))


def matrix(weight, bias):
    """OIHW weight and bias as one matrix."""
    rows = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
    return numbers(rows if bias is None else torch.cat([rows, bias[None]]))


def conv2d(shape, out, kernel, stride, padding, dilation, groups, with_bias, relu=False):
    n, h, w, c = shape
    x, weight = noise(n, c, h, w), noise(out, c // groups, *kernel)
    bias = noise(out) if with_bias else None
    options = {"stride": stride, "dilation": dilation, "groups": groups}
    if padding is None:
        y = F.conv2d(x, weight, bias, padding="same", **options)
    else:
        (top, bottom), (left, right) = padding
        y = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, **options)
    y = F.relu(y) if relu else y
    dy = noise(*y.shape).detach()
    y.backward(dy)
    return {
        "input": [h, w, c], "output": [y.shape[2], y.shape[3], out], "kernel": kernel,
        **options, "padding": padding, "bias": with_bias, "relu": relu,
        "x": nhwc(x), "parameters": matrix(weight, bias), "y": nhwc(y), "dy": nhwc(dy),
        "dx": nhwc(x.grad), "dparameters": matrix(weight.grad, bias.grad if with_bias else None),
    }


EVEN = [[1, 1], [1, 1]]
golden = {
    "made_by": f"tests/golden/make_conv2d.py with PyTorch {torch.__version__.split('+')[0]}",
    "conv2d": [
        conv2d([1, 7, 6, 2], 3, [3, 2], [1, 1], [[2, 2], [3, 3]], [2, 3], 1, True),
        conv2d([2, 6, 7, 2], 3, [3, 3], [2, 2], [[0, 1], [0, 1]], [1, 1], 1, False, True),
        conv2d([1, 6, 8, 3], 2, [2, 3], [1, 3], [[2, 0], [1, 4]], [3, 2], 1, False),
        conv2d([1, 5, 6, 2], 2, [2, 4], [1, 1], None, [3, 1], 1, True),
        conv2d([3, 1, 1, 7], 4, [1, 1], [1, 1], [[0, 0], [0, 0]], [1, 1], 1, False),
        conv2d([2, 5, 4, 4], 6, [3, 2], [1, 1], [[1, 0], [0, 1]], [1, 1], 2, True),
        conv2d([1, 6, 5, 6], 3, [2, 2], [2, 1], [[0, 2], [1, 0]], [3, 2], 3, False, True),
        conv2d([2, 5, 5, 4], 4, [3, 3], [1, 1], EVEN, [1, 1], 4, True, True),
        conv2d([2, 6, 5, 4], 4, [3, 3], [2, 2], [[0, 1], [1, 1]], [1, 1], 4, False),
        conv2d([1, 6, 5, 3], 6, [3, 2], [1, 2], [[2, 2], [0, 2]], [2, 2], 3, True),
    ],
}

path = pathlib.Path(__file__).with_name("conv2d.json")
path.write_text(json.dumps(golden, separators=(",", ":")).replace('],"', '],\n"') + "\n")
