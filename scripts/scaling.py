#!/usr/bin/env python3
"""The tables of docs/scaling.md: what share of N ranks' images per second is left beside the exchange of gradients.

    python3 scripts/scaling.py                      all tables
    python3 scripts/scaling.py STEP_MS MEGABYTES HOST_NS [0|1] GBIT MICROSECONDS RANKS
                                                    one number: of a step that takes so long with its gradients, host
                                                    time for a byte, whether that goes on beside the step, network
"""

import math
import sys

MESSAGE = 3e-6  # seconds of a processor for each message
SLABS, SLAB_BYTES = 8, 1 << 20  # as src/plan/mod.rs cuts the gradients
BEHIND = 0.5  # share of a step that is left when the first slab of gradients is whole
NETWORKS = {"1 Gbit/s": (1, 50e-6), "10 Gbit/s": (10, 25e-6), "100 Gbit/s": (100, 5e-6)}
RANKS = (2, 4, 8, 16, 64, 256)

# bytes of gradients, batch, images per second of an NVIDIA H200 (cifar-fast: H100; benches/RESULTS.md) and of two CPU
# cores (docs/scaling.md); None: not measured
MODELS = {
    "default": (615_016, 128, None, 7_234),
    "lenet5": (246_824, 128, 723_341, 12_087),
    "tutorial": (1_819_688, 128, 298_389, 2_091),
    "mlp-sigmoid": (318_040, 32, None, 78_602),
    "vgg-cifar": (8_787_240, 64, 30_119, 273),
    "cnn-bn": (1_152_680, 128, None, 2_149),
    "tiny": (39_656, 128, None, 3_032),
    "cifar-fast": (7_891_168, 500, 33_000, 146),
    "resnet9": (26_292_520, 128, None, 69),
    "resnet18-cifar": (44_695_848, 128, 8_307, None),
}
GPU_HOST, CPU_HOST = 0.6e-9, 3.4e-9


def slabs(size):
    return min(SLABS, max(1, math.ceil(size / SLAB_BYTES)))


def efficiency(step, size, host, beside, gbit, latency, ranks):
    """Of a step of so many seconds on each of the ranks, whose gradients have so many bytes."""
    cuts = slabs(size)
    swap = latency + (ranks - 1) * MESSAGE
    wire = cuts * 2 * swap + 2 * size * (ranks - 1) / ranks / (gbit * 1e9 / 8)
    work = size * host
    hidden = wire + (work if beside else 0)
    # The last slab has nothing to go on beside; the others have the rest of the backward pass.
    last = hidden / cuts
    waiting = last + max(0, hidden - last - BEHIND * step) + (0 if beside else work) + swap
    return step / (step + waiting)


def smallest(rate, size, gbit, latency, ranks):
    """Images for each rank and step at an efficiency of 80 %."""
    batch = 1
    while efficiency(batch / rate, size, GPU_HOST, True, gbit, latency, ranks) < 0.8:
        batch += 1
    return batch


def main():
    if len(sys.argv) > 1:
        step, size, host, beside, gbit, latency, ranks = map(float, sys.argv[1:])
        print(f"{efficiency(step / 1e3, size * 1e6, host / 1e9, beside, gbit, latency / 1e6, int(ranks)):.3f}")
        return
    print("| model | MB of gradients | images/s | " + " | ".join(NETWORKS) + " |\n|---|---|---|---|---|---|")
    for name, (size, _, gpu, _) in MODELS.items():
        if gpu:
            cells = [", ".join(f"{smallest(gpu, size, *net, n):,}" for n in (2, 16, 256)) for net in NETWORKS.values()]
            print(f"| `{name}` | {size / 1e6:.1f} | {gpu:,} | " + " | ".join(cells) + " |")
    print("\n| model | step | " + " | ".join(NETWORKS) + " |\n|---|---|---|---|---|")
    for name, (size, batch, _, cpu) in MODELS.items():
        if not cpu:
            continue
        step = batch / cpu
        cells = [
            ", ".join(f"{100 * efficiency(step, size, CPU_HOST, False, *net, n):.0f}" for n in RANKS)
            for net in NETWORKS.values()
        ]
        print(f"| `{name}` | {1e3 * step:.0f} ms | " + " | ".join(cells) + " |")


main()
