"""Makes networks.json: what PyTorch computes for whole networks, for tests/golden_networks.rs.

    pip install torch numpy && python tests/golden/make_networks.py

resnet9 and mobilenet-small, narrow and on small images (the test edits models/*.toml likewise), take
three steps of SGD on 17 images in batches of 6, 6 and 5: the losses, the gradients of the last step and
the running statistics after it. Parameters, images and labels come from `mixed`, which the test computes
too. PyTorch computes in float64. A tensor is written as whole numbers of a unit, 1/50,000 of its largest.

Also counts the parameters of the shipped models at full size.
"""

import json
import pathlib

import numpy
import torch
from torch import nn
from torch.nn import functional as F

STEPS, LR, MOMENTUM, WEIGHT_DECAY = [6, 6, 5], 0.05, 0.9, 5e-4


def mixed(first, count):
    """32 well-mixed bits (Chris Wellons' lowbias32) for each of `count` numbers from `first` on."""
    x = (numpy.arange(count, dtype=numpy.uint64) + first) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return (x ^ (x >> 16)).astype(numpy.uint32)


def unit(first, count):
    """Numbers in [-1, 1), exact in float32."""
    return ((mixed(first, count) >> 8).astype(numpy.float32) / numpy.float32(1 << 23)) - numpy.float32(1)


def conv(c, oc, kernel, stride=1, groups=1, activation=nn.Identity):
    pad = kernel // 2
    return nn.Sequential(
        nn.Conv2d(c, oc, kernel, stride, pad, groups=groups, bias=False), nn.BatchNorm2d(oc), activation())


class Residual(nn.Module):
    def __init__(self, main, shortcut=None, activation=None):
        super().__init__()
        self.main, self.shortcut = main, shortcut or nn.Identity()
        self.activation = activation or nn.Identity()

    def forward(self, x):
        return self.activation(self.main(x) + self.shortcut(x))


class SqueezeExcite(nn.Module):
    def __init__(self, channels, squeeze):
        super().__init__()
        self.fall, self.rise = nn.Linear(channels, squeeze), nn.Linear(squeeze, channels)

    def forward(self, x):
        factors = torch.sigmoid(self.rise(F.relu(self.fall(x.mean((2, 3))))))
        return x * factors[:, :, None, None]


def resnet9(a=64, b=128, c=256, d=512, last_pool=4):
    def step(i, o):
        return conv(i, o, 3, activation=nn.ReLU)

    def residual(n):
        return Residual(nn.Sequential(step(n, n), step(n, n)))

    return nn.Sequential(
        step(3, a), step(a, b), nn.MaxPool2d(2), residual(b), step(b, c), nn.MaxPool2d(2),
        step(c, d), nn.MaxPool2d(2), residual(d), nn.MaxPool2d(last_pool), nn.Flatten(), nn.Linear(d, 10))


def mobilenet_small(stem=16, blocks=((48, 12, 24), (72, 18, 24), (96, 24, 40), (120, 30, 40),
                                     (160, 40, 64), (192, 48, 64)), last=192):
    def bottleneck(c, wide, squeeze, oc, stride):
        return nn.Sequential(
            conv(c, wide, 1, activation=nn.Hardswish),
            conv(wide, wide, 3, stride, groups=wide, activation=nn.Hardswish),
            SqueezeExcite(wide, squeeze), conv(wide, oc, 1))

    layers, c = [conv(3, stem, 3, activation=nn.Hardswish)], stem
    for i, (wide, squeeze, oc) in enumerate(blocks):
        if i % 2 == 0:
            layers.append(bottleneck(c, wide, squeeze, oc, 2))
        else:
            repeat = 2 if i == 3 else 1
            layers += [Residual(bottleneck(c, wide, squeeze, oc, 1)) for _ in range(repeat)]
        c = oc
    layers += [conv(c, last, 1, activation=nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10)]
    return nn.Sequential(*layers)


def resnet18_cifar():
    def block(c, oc):
        main = nn.Sequential(conv(c, oc, 3, 1 if c == oc else 2, activation=nn.ReLU), conv(oc, oc, 3))
        return Residual(main, None if c == oc else conv(c, oc, 1, 2), nn.ReLU())

    sizes = [(64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
    return nn.Sequential(conv(3, 64, 3, activation=nn.ReLU), *[block(*s) for s in sizes],
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def plain(sizes):
    return nn.Sequential(*[conv(*s, 3, activation=nn.ReLU) for s in zip([1, *sizes], sizes)], nn.Linear(sizes[-1], 10))


def written(tensor):
    values = tensor.detach().flatten().numpy()
    step = max(float(numpy.abs(values).max()) / 50_000, 1e-30)
    return {"shape": list(tensor.shape), "unit": float(f"{step:.6e}"),
            "values": [int(v) for v in numpy.rint(values / float(f"{step:.6e}"))]}


def golden(model, height, width):
    model = model.double()
    for t, parameter in enumerate(model.parameters()):
        values = unit(1_000_003 * (t + 1), parameter.numel())
        if parameter.dim() > 1:
            values = values * numpy.float32(1 / numpy.sqrt(parameter[0].numel()))
        else:
            # A bias starts around 0, a normalisation's weight around 1.
            normal = any(parameter is m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d))
            values = values * numpy.float32(0.25) + numpy.float32(1 if normal else 0)
        parameter.data = torch.from_numpy(values.reshape(parameter.shape)).double()
    n = sum(STEPS)
    pixels = mixed(7, n * height * width * 3).reshape(n, height, width, 3) >> 24
    images = torch.from_numpy(pixels.astype(numpy.float64)).permute(0, 3, 1, 2) / 64 - 2
    labels = torch.from_numpy((mixed(11, n) % 10).astype(numpy.int64))
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    losses, first = [], 0
    for count in STEPS:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[first:first + count]), labels[first:first + count])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        first += count
    running = [b for name, b in model.named_buffers() if not name.endswith("num_batches_tracked")]
    return {"input": [height, width, 3], "losses": losses,
            "gradients": [written(p.grad) for p in model.parameters()],
            "running": [written(b) for b in running]}


def count(model):
    return sum(p.numel() for p in model.parameters())


narrow = ((8, 4, 4), (12, 4, 4), (12, 4, 8), (16, 6, 8), (20, 6, 8), (24, 6, 8))
result = {
    "parameters": {
        "cnn-bn": count(plain([32, 32, 64, 64, 128, 128])), "tiny": count(plain([8, 12, 16, 16, 16, 16])), "resnet9": count(resnet9()),
        "resnet18-cifar": count(resnet18_cifar()), "mobilenet-small": count(mobilenet_small()),
    },
    "resnet9": golden(resnet9(4, 8, 12, 16, 2), 16, 16),
    "mobilenet-small": golden(mobilenet_small(4, narrow, 24), 16, 16),
}
path = pathlib.Path(__file__).with_name("networks.json")
path.write_text(json.dumps(result, separators=(",", ":")) + "\n")
print(path, path.stat().st_size, "bytes", result["parameters"], result["resnet9"]["losses"], result["mobilenet-small"]["losses"])
