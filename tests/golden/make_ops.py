"""Makes ops.json: what PyTorch computes, for tests/golden_ops.rs to hold the CPU twins against.

    pip install torch numpy && python tests/golden/make_ops.py

Numbers and layouts as in make.py. An infinity is written as 3e38.
"""

import json
import math
import pathlib

import numpy
import torch
from torch.nn import functional as F

torch.manual_seed(8)


def noise(*shape):
    return torch.randn(*shape).double()


def numbers(tensor):
    flat = tensor.detach().contiguous().flatten().numpy().astype(numpy.float32)
    word = {math.inf: 3e38, -math.inf: -3e38}
    return [None if math.isnan(v) else word.get(float(v), float(str(v))) for v in flat]


def nhwc(tensor):
    return numbers(tensor.permute(0, 2, 3, 1))


def activation(name, function):
    ends = [-math.inf, -1e30, -90.0, -13.5, -6.0, -3.0, -0.7, -1e-4, 0.0, 1e-4, 0.62, 3.0, 9.0, 1e30, math.inf, math.nan]
    x = torch.cat([torch.tensor(ends), torch.randn(16) * 2]).double().requires_grad_()
    y = function(x)
    dy = noise(*x.shape)
    y.backward(dy)
    return {"name": name, "x": numbers(x), "y": numbers(y), "dy": numbers(dy), "dx": numbers(x.grad)}


def maxpool2d(x, kernel, stride, padding, ceil):
    x.requires_grad_()
    y, flat = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil, return_indices=True)
    dy = noise(*y.shape)
    y.backward(dy)
    # PyTorch counts h*W + w over the image; ours is the place kh*KW + kw inside the window.
    kh = flat // x.shape[3] + padding[0] - torch.arange(y.shape[2])[:, None] * stride[0]
    kw = flat % x.shape[3] + padding[1] - torch.arange(y.shape[3]) * stride[1]
    return {
        **geometry(x, y, kernel, stride, padding, ceil), "count_include_pad": True, "x": nhwc(x), "y": nhwc(y),
        "index": (kh * kernel[1] + kw).permute(0, 2, 3, 1).flatten().tolist(), "dy": nhwc(dy), "dx": nhwc(x.grad),
    }


def meanpool2d(x, kernel, stride, padding, ceil, count):
    x.requires_grad_()
    y = F.avg_pool2d(x, kernel, stride, padding, ceil_mode=ceil, count_include_pad=count)
    dy = noise(*y.shape)
    y.backward(dy)
    return {
        **geometry(x, y, kernel, stride, padding, ceil), "count_include_pad": count,
        "x": nhwc(x), "y": nhwc(y), "dy": nhwc(dy), "dx": nhwc(x.grad),
    }


def geometry(x, y, kernel, stride, padding, ceil):
    return {
        "input": [x.shape[2], x.shape[3], x.shape[1]], "output": [y.shape[2], y.shape[3]],
        "kernel": kernel, "stride": stride, "padding": padding, "ceil": ceil,
    }


def ties(*shape):
    return torch.randint(-2, 2, shape).double()


def with_nans(*shape):
    x = noise(*shape)
    x[torch.rand(*shape) < 0.3] = math.nan
    return x


def loss(logits, labels, weights, smoothing):
    # The float64 that a float32 program starts from.
    smoothing = float(numpy.float32(smoothing))
    logits.requires_grad_()
    arguments = {"weight": weights, "label_smoothing": smoothing}
    each = F.cross_entropy(logits, labels, reduction="none", **arguments)
    F.cross_entropy(logits, labels, **arguments).backward()
    return {
        "classes": logits.shape[1], "weights": None if weights is None else numbers(weights), "smoothing": smoothing,
        "logits": numbers(logits), "labels": labels.tolist(), "loss": numbers(each), "gradient": numbers(logits.grad),
    }


def mixed_loss(logits, labels, weights, smoothing):
    smoothing = float(numpy.float32(smoothing))
    logits.requires_grad_()
    second, of = torch.tensor([1, 4, 4, 3, 0, 3]), 32
    kept = torch.tensor([16, 17, 23, 31, 32, 20])
    share = (kept / of).double()[:, None]
    one_hot = lambda label: F.one_hot(label, logits.shape[1]).double()
    target = share * one_hot(labels) + (1 - share) * one_hot(second)
    arguments = {"weight": weights, "label_smoothing": smoothing}
    each = F.cross_entropy(logits, target, reduction="none", **arguments)
    F.cross_entropy(logits, target, **arguments).backward()
    return {
        "classes": logits.shape[1], "weights": None if weights is None else numbers(weights), "smoothing": smoothing,
        "logits": numbers(logits), "labels": labels.tolist(), "second": second.tolist(), "kept": kept.tolist(), "of": of,
        "loss": numbers(each), "gradient": numbers(logits.grad),
    }


def scale():
    x, factors = noise(2, 5, 3, 4).requires_grad_(), noise(2, 5).requires_grad_()
    y = x * factors[:, :, None, None]
    dy = noise(*y.shape)
    y.backward(dy)
    return {
        "positions": 12, "channels": 5, "x": nhwc(x), "factors": numbers(factors), "y": nhwc(y), "dy": nhwc(dy),
        "dx": nhwc(x.grad), "dfactors": numbers(factors.grad),
    }


labels = torch.tensor([3, 0, 4, 4, 1, 2])
weights = torch.rand(5).float().double() + 0.25
infinite = noise(6, 5)
infinite[1, 2], infinite[3, 4], infinite[5, 0] = -math.inf, math.inf, math.nan
golden = {
    "made_by": f"tests/golden/make_ops.py with PyTorch {torch.__version__.split('+')[0]}",
    "activation": [
        activation("leaky_relu", lambda x: F.leaky_relu(x, 0.125)),
        activation("gelu", F.gelu),
        activation("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        activation("silu", F.silu),
        activation("tanh", torch.tanh),
        activation("hard_swish", F.hardswish),
    ],
    "maxpool2d": [
        maxpool2d(noise(1, 2, 7, 6), [3, 3], [2, 2], [1, 1], False),
        maxpool2d(ties(2, 1, 6, 7), [3, 2], [3, 2], [1, 0], True),
        maxpool2d(-noise(1, 3, 5, 5).abs(), [2, 3], [2, 3], [1, 1], True),
        maxpool2d(with_nans(1, 2, 7, 5), [3, 3], [2, 1], [1, 1], True),
    ],
    "meanpool2d": [
        meanpool2d(noise(1, 2, 7, 6), [3, 3], [2, 2], [1, 1], False, True),
        meanpool2d(noise(1, 2, 7, 6), [3, 3], [2, 2], [1, 1], False, False),
        meanpool2d(noise(2, 1, 6, 8), [3, 4], [3, 3], [1, 2], True, True),
        meanpool2d(noise(2, 1, 6, 8), [3, 4], [3, 3], [1, 2], True, False),
        meanpool2d(noise(1, 3, 5, 6), [2, 2], [2, 2], [0, 0], True, True),
        meanpool2d(noise(2, 5, 4, 6), [4, 6], [4, 6], [0, 0], False, True),
    ],
    "softmax_cross_entropy": [
        loss(noise(6, 5) * 3, labels, None, 0.1),
        loss(noise(6, 5) * 300, labels, None, 0.25),
        loss(noise(6, 5) * 3, labels, weights, 0.0),
        loss(noise(6, 5) * 3, labels, weights, 0.1),
        loss(infinite.clone(), labels, None, 0.1),
        loss(infinite.clone(), labels, weights, 0.0),
    ],
    "scale": scale(),
    "mixed_softmax_cross_entropy": [
        mixed_loss(noise(6, 5) * 3, labels, None, 0.0),
        mixed_loss(noise(6, 5) * 3, labels, None, 0.1),
        mixed_loss(noise(6, 5) * 300, labels, weights, 0.0),
        mixed_loss(noise(6, 5) * 3, labels, weights, 0.1),
    ],
}

path = pathlib.Path(__file__).with_name("ops.json")
path.write_text(json.dumps(golden, separators=(",", ":")).replace('],"', '],\n"') + "\n")
