"""Golden values of the normalisations, made by PyTorch in f64 and rounded to f32: batch-norm (two
training steps with their gradients and running statistics, then an evaluation), group-norm and
layer-norm. Laid out as make.py's: activations NHWC; affine is weight then bias, running is mean then
variance, and daffine the gradient of affine.

    python tests/golden/make_norm.py       writes norm.json beside itself
"""

import json
import pathlib

import numpy
import torch
from torch.nn import functional as F

torch.manual_seed(8)


def f32(value):
    """The float64 that a float32 program would start from."""
    return float(numpy.float32(value))


def noise(*shape):
    """What a float32 holds, as float64."""
    return torch.randn(*shape).double()


def numbers(*tensors):
    flat = torch.cat([t.detach().flatten() for t in tensors])
    return [float(str(v)) for v in flat.numpy().astype(numpy.float32)]


def nhwc(tensor):
    return numbers(tensor.permute(0, 2, 3, 1).contiguous())


def affine_of(c):
    weight, bias = 1 + 0.3 * noise(c), noise(c)
    weight, bias = weight.float().double(), bias.float().double()
    return weight.requires_grad_(), bias.requires_grad_()


def gradients(x, weight, bias, y):
    dy = noise(*y.shape)
    x.grad = weight.grad = bias.grad = None
    y.backward(dy)
    return {"dy": nhwc(dy), "dx": nhwc(x.grad), "daffine": numbers(weight.grad, bias.grad)}


def batch_norm(n, c, h, w, momentum, epsilon, mean=0.0, deviation=1.0):
    momentum, epsilon = f32(momentum), f32(epsilon)
    weight, bias = affine_of(c)
    running = [noise(c), noise(c).abs()]
    case = {
        "input": [h, w, c], "momentum": momentum, "epsilon": epsilon,
        "affine": numbers(weight, bias), "running": numbers(*running), "steps": [],
    }
    for _ in range(2):
        x = (mean + deviation * noise(n, c, h, w)).float().double().requires_grad_()
        y = F.batch_norm(x, *running, weight, bias, True, momentum, epsilon)
        case["steps"].append({
            "x": nhwc(x), "y": nhwc(y), **gradients(x, weight, bias, y),
            "running": numbers(*running),
        })
    # The running statistics that a program in float32 would go on with.
    running = [r.float().double() for r in running]
    case["evaluated"] = nhwc(F.batch_norm(x, *running, weight, bias, False, momentum, epsilon))
    return case


def group_norm(n, c, h, w, groups, epsilon, mean=0.0):
    epsilon = f32(epsilon)
    weight, bias = affine_of(c)
    x = (mean + noise(n, c, h, w)).float().double().requires_grad_()
    y = F.group_norm(x, groups, weight, bias, epsilon)
    return {
        "input": [h, w, c], "groups": groups, "epsilon": epsilon, "x": nhwc(x),
        "affine": numbers(weight, bias), "y": nhwc(y), **gradients(x, weight, bias, y),
    }


def layer_norm(n, c, h, w, epsilon):
    epsilon = f32(epsilon)
    weight, bias = affine_of(c)
    x = noise(n, c, h, w).requires_grad_()
    y = F.layer_norm(x.permute(0, 2, 3, 1), [c], weight, bias, epsilon).permute(0, 3, 1, 2)
    return {
        "input": [h, w, c], "epsilon": epsilon, "x": nhwc(x),
        "affine": numbers(weight, bias), "y": nhwc(y), **gradients(x, weight, bias, y),
    }


golden = {
    "made_by": f"tests/golden/make_norm.py with PyTorch {torch.__version__.split('+')[0]}",
    "batch_norm": [
        batch_norm(2, 5, 3, 2, momentum=0.1, epsilon=1e-5),
        # More rows than a chunk has, and a deviation that epsilon matters to.
        batch_norm(9, 4, 2, 2, momentum=0.3, epsilon=1e-3, deviation=0.05),
        batch_norm(7, 1, 1, 1, momentum=0.1, epsilon=1e-5, mean=3.0),
    ],
    "group_norm": [
        group_norm(2, 6, 2, 3, groups=3, epsilon=1e-5),
        group_norm(3, 8, 2, 3, groups=2, epsilon=1e-3, mean=2.0),
        group_norm(2, 3, 4, 3, groups=1, epsilon=1e-5),
        group_norm(2, 4, 3, 2, groups=4, epsilon=1e-5),
    ],
    "layer_norm": [layer_norm(2, 7, 2, 3, epsilon=1e-5), layer_norm(3, 8, 1, 1, epsilon=1e-3)],
}

path = pathlib.Path(__file__).with_name("norm.json")
path.write_text(json.dumps(golden, separators=(",", ":")).replace('],"', '],\n"') + "\n")
