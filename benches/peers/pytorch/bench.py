"""PyTorch: times training steps of one workload and prints one line of JSON.

    python bench.py tutorial|lenet5|vgg-cifar [--device cpu|cuda] [--mode eager|channels_last|compile]

Workloads and protocol are those of ../measure.rs, where they are explained.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

# Convolutions as (input channels, output channels, kernel size, padding), images channels first.
WORKLOADS = {
    "tutorial": dict(
        batch=128,
        image=(1, 28, 28),
        convs=[(1, 32, 5, 2), (32, 64, 5, 2)],
        convs_per_pool=1,
        dense=[(64 * 7 * 7, 128), (128, 10)],
    ),
    "lenet5": dict(
        batch=128,
        image=(1, 28, 28),
        convs=[(1, 6, 5, 2), (6, 16, 5, 0)],
        convs_per_pool=1,
        dense=[(16 * 5 * 5, 120), (120, 84), (84, 10)],
    ),
    "vgg-cifar": dict(
        batch=64,
        image=(3, 32, 32),
        convs=[
            (3, 64, 3, 1), (64, 64, 3, 1),
            (64, 128, 3, 1), (128, 128, 3, 1),
            (128, 256, 3, 1), (256, 256, 3, 1),
        ],
        convs_per_pool=2,
        dense=[(256 * 4 * 4, 256), (256, 10)],
    ),
}
LEARNING_RATE = 0.005
MOMENTUM = 0.9
BATCHES = 16
WINDOWS = 5
WINDOW_SECONDS = 2.0


def network(convs, convs_per_pool, dense):
    layers = []
    for i, (c_in, c_out, kernel, padding) in enumerate(convs):
        layers += [nn.Conv2d(c_in, c_out, kernel, padding=padding), nn.ReLU()]
        if (i + 1) % convs_per_pool == 0:
            layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for inputs, outputs in dense:
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])  # no ReLU after the logits


def peak_rss_mb():
    """Largest resident memory of this process so far; only Linux tells."""
    try:
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
    return round(int(line.split()[1]) / 1024, 1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--mode", choices=["eager", "channels_last", "compile"], default="eager")
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    batch_size = workload["batch"]

    # f32 throughout, as in all the others: PyTorch lets convolutions on CUDA use TF32 otherwise.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(1)
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"{torch.get_num_threads()} CPU threads"

    layout = torch.channels_last if args.mode == "channels_last" else torch.contiguous_format
    batches = []
    for _ in range(BATCHES):
        images = torch.rand(batch_size, *workload["image"]) * 2 - 1
        labels = torch.randint(10, (batch_size,))
        batches.append((images.to(args.device, memory_format=layout), labels.to(args.device)))
    net = network(workload["convs"], workload["convs_per_pool"], workload["dense"])
    net = net.to(args.device, memory_format=layout)
    sgd = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    forward = torch.compile(net) if args.mode == "compile" else net

    batch = itertools.cycle(batches)
    loss = None

    def timed(steps):
        nonlocal loss
        start = time.perf_counter()
        for images, labels in itertools.islice(batch, steps):
            sgd.zero_grad(set_to_none=True)
            loss = F.cross_entropy(forward(images), labels)
            loss.backward()
            sgd.step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first_step = timed(1)
    warm_up = []
    while len(warm_up) < 6 or (sum(warm_up) < 4.0 and len(warm_up) < 30):
        warm_up.append(timed(1))
    step = statistics.median_high(warm_up[len(warm_up) // 2 :])
    steps = max(3, int(WINDOW_SECONDS / step))
    rates = [steps * batch_size / timed(steps) for _ in range(WINDOWS)]
    peak_rss = peak_rss_mb()
    if not math.isfinite(loss.item()):
        sys.exit(f"error: expected a finite loss at the end, found {loss.item()}")

    print(
        json.dumps(
            {
                "peer": "pytorch",
                "version": torch.__version__,
                "backend": f"{args.device} {args.mode}",
                "device": device,
                "workload": args.workload,
                "batch": batch_size,
                "images_per_second": {
                    "median": round(statistics.median(rates), 1),
                    "min": round(min(rates), 1),
                    "max": round(max(rates), 1),
                },
                "first_step_seconds": round(first_step, 3),
                "peak_rss_mb": peak_rss,
            }
        )
    )


main()
