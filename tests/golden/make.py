"""Makes golden.json: what PyTorch computes, for tests/golden.rs to hold the CPU twins against.

    pip install torch numpy && python tests/golden/make.py

Inputs are exact in float32; PyTorch computes in float64 and the results are rounded to float32, so
the numbers are as good as the format holds. Activations are written NHWC, a layer's parameters as
the matrix [KH*KW*C + 1, OC] whose last row is the bias. NaN is written as null.
"""

import json
import math
import pathlib

import numpy
import torch
from torch.nn import functional as F

torch.manual_seed(20)


def f32(value):
    """The float64 that a float32 program would start from."""
    return float(numpy.float32(value))


def noise(*shape):
    return torch.randn(*shape).double()


def numbers(tensor):
    flat = tensor.detach().contiguous().flatten().numpy().astype(numpy.float32)
    return [None if math.isnan(v) else float(str(v)) for v in flat]


def nhwc(tensor):
    return numbers(tensor.permute(0, 2, 3, 1))


def matrix(weight, bias):
    """OIHW weight and bias as one [KH*KW*C + 1, OC] matrix."""
    rows = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
    return numbers(torch.cat([rows, bias[None]]))


def conv2d(n, c, h, w, oc, kernel, stride, padding, relu):
    x, weight, bias = noise(n, c, h, w), noise(oc, c, *kernel), noise(oc)
    for t in (x, weight, bias):
        t.requires_grad_()
    y = F.conv2d(x, weight, bias, stride=stride, padding=padding)
    y = F.relu(y) if relu else y
    dy = noise(*y.shape)
    y.backward(dy)
    return {
        "input": [h, w, c], "out_channels": oc, "kernel": kernel, "stride": stride,
        "padding": padding, "relu": relu, "x": nhwc(x), "parameters": matrix(weight, bias),
        "y": nhwc(y), "dy": nhwc(dy), "dx": nhwc(x.grad),
        "dparameters": matrix(weight.grad, bias.grad),
    }


def maxpool2d(x, kernel, stride):
    x.requires_grad_()
    y, flat = F.max_pool2d(x, kernel, stride, return_indices=True)
    dy = noise(*y.shape)
    y.backward(dy)
    # PyTorch counts h*W + w over the image; ours is the place kh*KW + kw inside the window.
    kh = flat // x.shape[3] - torch.arange(y.shape[2])[:, None] * stride[0]
    kw = flat % x.shape[3] - torch.arange(y.shape[3]) * stride[1]
    index = (kh * kernel[1] + kw).permute(0, 2, 3, 1).flatten().tolist()
    return {
        "input": [x.shape[2], x.shape[3], x.shape[1]], "kernel": kernel, "stride": stride,
        "x": nhwc(x), "y": nhwc(y), "index": index, "dy": nhwc(dy), "dx": nhwc(x.grad),
    }


def ties(*shape):
    """Few different values, so that most windows have several maxima."""
    return torch.randint(-2, 2, shape).double()


def with_nans(*shape):
    x = noise(*shape)
    x[torch.rand(*shape) < 0.3] = math.nan
    return x


def meanpool2d(x, kernel, stride):
    x.requires_grad_()
    y = F.avg_pool2d(x, kernel, stride)
    dy = noise(*y.shape)
    y.backward(dy)
    return {
        "input": [x.shape[2], x.shape[3], x.shape[1]], "kernel": kernel, "stride": stride,
        "x": nhwc(x), "y": nhwc(y), "dy": nhwc(dy), "dx": nhwc(x.grad),
    }


def loss(output, labels, function):
    output.requires_grad_()
    each = function(output, labels)
    each.mean().backward()
    return {
        "classes": output.shape[1], "output": numbers(output), "labels": labels.tolist(),
        "loss": numbers(each), "gradient": numbers(output.grad),
    }


def cross_entropy(output, labels):
    return F.cross_entropy(output, labels, reduction="none")


def squared_error(output, labels):
    onehot = F.one_hot(labels, output.shape[1])
    return 0.5 * (output - onehot).square().sum(1)


def optimizer(make, states, **constants):
    """Five updates with a learning rate that changes; the parameters and state after each."""
    w = noise(7).requires_grad_()
    start, rates = numbers(w), [f32(lr) for lr in (0.1, 0.1, 0.05, 0.02, 0.3)]
    rule, steps = make([w], lr=rates[0]), []
    for lr in rates:
        rule.param_groups[0]["lr"] = lr
        w.grad = noise(7)
        rule.step()
        state = [numbers(rule.state[w][name]) for name in states]
        steps.append({"lr": lr, "gradient": numbers(w.grad), "parameters": numbers(w), "state": state})
    return {**constants, "start": start, "steps": steps}


def sgd(momentum, weight_decay):
    c = {"momentum": f32(momentum), "weight_decay": f32(weight_decay)}
    return optimizer(lambda w, lr: torch.optim.SGD(w, lr=lr, **c), ["momentum_buffer"], **c)


def adamw(beta1, beta2, epsilon, weight_decay):
    b1, b2, eps, decay = map(f32, (beta1, beta2, epsilon, weight_decay))
    return optimizer(
        lambda w, lr: torch.optim.AdamW(w, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay),
        ["exp_avg", "exp_avg_sq"],
        beta1=b1, beta2=b2, epsilon=eps, weight_decay=decay,
    )


golden = {
    "made_by": f"tests/golden/make.py with PyTorch {torch.__version__.split('+')[0]}",
    "conv2d": [
        conv2d(2, 3, 7, 6, 5, [3, 2], [2, 1], [1, 0], relu=False),
        conv2d(2, 1, 6, 9, 3, [5, 4], [1, 3], [2, 3], relu=False),
        conv2d(3, 4, 5, 5, 6, [3, 3], [2, 2], [1, 1], relu=True),
        conv2d(4, 11, 1, 1, 7, [1, 1], [1, 1], [0, 0], relu=False),
    ],
    "maxpool2d": [
        maxpool2d(noise(2, 3, 7, 5), [2, 2], [2, 2]),
        maxpool2d(ties(2, 3, 6, 9), [2, 3], [2, 3]),
        maxpool2d(ties(2, 3, 7, 8), [3, 3], [2, 1]),
        maxpool2d(noise(2, 2, 8, 7), [2, 1], [3, 2]),
        maxpool2d(with_nans(1, 2, 8, 6), [2, 3], [2, 3]),
    ],
    "meanpool2d": [
        meanpool2d(noise(2, 3, 7, 5), [2, 2], [2, 2]),
        meanpool2d(noise(2, 3, 7, 5), [3, 2], [2, 1]),
    ],
    "softmax_cross_entropy": [
        loss(noise(6, 10) * 3, torch.tensor([3, 0, 9, 9, 4, 1]), cross_entropy),
        # A naive softmax overflows here.
        loss(noise(4, 3) * 500, torch.tensor([0, 1, 2, 2]), cross_entropy),
    ],
    "squared_error": [loss(noise(5, 4), torch.tensor([3, 0, 1, 1, 2]), squared_error)],
    "sgd": [sgd(0.9, 0.01), sgd(0.5, 0.0)],
    "adamw": [adamw(0.9, 0.999, 1e-8, 0.01), adamw(0.7, 0.9, 1e-3, 0.0)],
}

path = pathlib.Path(__file__).with_name("golden.json")
path.write_text(json.dumps(golden, separators=(",", ":")).replace('],"', '],\n"') + "\n")
