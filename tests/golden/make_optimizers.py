"""Makes optimizers.json: what PyTorch makes of a small network in a few updates, for tests/optimizers.rs.

    pip install torch numpy && python tests/golden/make_optimizers.py

Two convolutions (of a weight that is higher than wide, and one that is wider than high), a batch-norm, a
depthwise convolution and a dense layer take four steps by each rule, with parameter groups, clipping and a
moving average. Lion is the pseudo-code of arXiv 2302.06675 (algorithm 2), Muon the code that goes with arXiv
2404.00498 (airbench94_muon.py) without its bfloat16; all else is torch.optim's. Everything is in float64.
Parameters, images and labels come from `mixed`, as in make_networks.py. A tensor is written as whole numbers
of a unit, 1/50,000 of its largest.
"""

import json
import pathlib

import numpy
import torch
from torch import nn
from torch.nn import functional as F

COUNTS, RATES, SHARES = [6, 6, 5, 6], [1.0, 2.0, 0.5, 1.0], [0.1, 0.5, 0.9, 0.8]
HEIGHT, WIDTH, CHANNELS, CLASSES = 6, 5, 2, 3


def mixed(first, count):
    x = (numpy.arange(count, dtype=numpy.uint64) + first) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return (x ^ (x >> 16)).astype(numpy.uint32)


def unit(first, count):
    return ((mixed(first, count) >> 8).astype(numpy.float32) / numpy.float32(1 << 23)) - numpy.float32(1)


def network():
    model = nn.Sequential(
        nn.Conv2d(CHANNELS, 4, 3, padding=1, bias=False), nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12), nn.GELU(),
        nn.Conv2d(12, 12, 3, groups=12, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, CLASSES)).double()
    for t, parameter in enumerate(model.parameters()):
        values = unit(1_000_003 * (t + 1), parameter.numel())
        if parameter.dim() > 1:
            values = values * numpy.float32(1 / numpy.sqrt(parameter[0].numel()))
        else:
            values = values * numpy.float32(0.25) + numpy.float32(1 if parameter is model[2].weight else 0)
        parameter.data = torch.from_numpy(values.reshape(parameter.shape)).double()
    return model


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = torch.sign(beta1 * m + (1 - beta1) * p.grad)
                self.state[p]["m"] = beta2 * m + (1 - beta2) * p.grad
                p -= group["lr"] * (update + group["weight_decay"] * p)


def zeropower_via_newtonschulz5(G, steps=3, eps=1e-7):
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G / (G.norm() + eps)
    if G.size(0) > G.size(1):
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    if G.size(0) > G.size(1):
        X = X.T
    return X


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buf = self.state[p].setdefault("buf", torch.zeros_like(p))
                buf.mul_(group["momentum"]).add_(p.grad)
                g = p.grad.add(buf, alpha=group["momentum"])
                p.mul_(len(p) ** 0.5 / p.norm())
                p.add_(zeropower_via_newtonschulz5(g.reshape(len(g), -1)).view(g.shape), alpha=-group["lr"])


def written(tensor):
    values = tensor.detach().flatten().numpy()
    step = float(f"{max(float(numpy.abs(values).max()) / 50_000, 1e-30):.6e}")
    return {"unit": step, "values": [int(v) for v in numpy.rint(values / step)]}


def golden(rule, lr, bias_lr=1.0, head_lr=1.0, bias_decay=1.0, freeze=False, clip=None):
    """`rule` makes optimizers of lists of (parameter, factor on the rate, on the decay)."""
    model = network()
    head, first = model[7], model[0]
    first.weight.requires_grad = not freeze
    norm = list(model[2].parameters())
    triples = []
    for p in model.parameters():
        is_bias = p.dim() == 1
        assert not any(p is n for n in norm) or is_bias
        factor = bias_lr if is_bias else head_lr if p is head.weight else 1.0
        if p.requires_grad:
            triples.append((p, factor, bias_decay if is_bias else 1.0))
    optimizers = rule(model, triples)
    base = [(group, group["lr"]) for o in optimizers for group in o.param_groups]
    n = sum(COUNTS)
    pixels = mixed(7, n * HEIGHT * WIDTH * CHANNELS).reshape(n, HEIGHT, WIDTH, CHANNELS) >> 24
    images = torch.from_numpy(pixels.astype(numpy.float64)).permute(0, 3, 1, 2) / 64 - 2
    labels = torch.from_numpy((mixed(11, n) % CLASSES).astype(numpy.int64))

    def held():
        running = [b for name, b in model.named_buffers() if not name.endswith("num_batches_tracked")]
        return [t.detach().clone() for t in [*model.parameters(), *running]]

    averages, losses, norms, at = held(), [], [], 0
    for count, rate, share in zip(COUNTS, RATES, SHARES):
        for group, own in base:
            group["lr"] = own * lr * rate
        model.zero_grad()
        loss = F.cross_entropy(model(images[at:at + count]), labels[at:at + count])
        loss.backward()
        if clip is not None:
            norms.append(float(nn.utils.clip_grad_norm_([p for p, _, _ in triples], clip)))
        for o in optimizers:
            o.step()
        averages = [share * a + (1 - share) * w for a, w in zip(averages, held())]
        losses.append(float(loss.detach()))
        at += count
    print(losses, norms)
    return {"losses": losses, "values": [written(t) for t in held()],
            "averages": [written(t) for t in averages] if clip else []}


def groups(triples, weight_decay):
    return [{"params": [p], "lr": factor, "weight_decay": weight_decay * decay}
            for p, factor, decay in triples]


def sgd(model, triples):
    return [torch.optim.SGD(groups(triples, 0.05), lr=1, momentum=0.9, nesterov=True)]


def adamw(model, triples):
    return [torch.optim.AdamW(groups(triples, 0.1), lr=1, betas=(0.7, 0.9), eps=1e-8)]


def lion(model, triples):
    return [Lion(groups(triples, 0.1), lr=1, betas=(0.9, 0.99), weight_decay=0)]


def muon(model, triples):
    """Rates of the others are half of Muon's."""
    filters = [p for p, _, _ in triples if p.dim() == 4 and p is not model[4].weight]
    others = [(p, 0.5 * factor, decay) for p, factor, decay in triples if not any(p is f for f in filters)]
    return [Muon(filters, lr=1, momentum=0.6),
            torch.optim.SGD(groups(others, 0.05), lr=1, momentum=0.85, nesterov=True)]


result = {
    "sgd": golden(sgd, 0.05, bias_lr=2.0, head_lr=0.5, bias_decay=0.0, freeze=True, clip=0.2),
    "adamw": golden(adamw, 0.01, bias_lr=0.5, head_lr=2.0, bias_decay=0.0),
    "lion": golden(lion, 0.01, bias_lr=2.0, head_lr=0.5, bias_decay=3.0),
    "muon": golden(muon, 0.1, bias_lr=2.0, bias_decay=0.25, clip=0.5),
}
path = pathlib.Path(__file__).with_name("optimizers.json")
path.write_text(json.dumps(result, separators=(",", ":")) + "\n")
print(path, path.stat().st_size, "bytes")
