"""Makes augment.json: what NumPy and PyTorch make of some images and draws, for tests/augment.rs.

    pip install torch numpy && python tests/golden/make_augment.py

The random words are drawn by Python's whole numbers. Places are mapped one step after the other, with
the affine matrix of torchvision's RandomAffine, and looked up by grid_sample; colours are blended as
in torchvision's ColorJitter, but for the grey that contrast is about. NHWC.
"""

import json
import math
import pathlib

import numpy
import torch
from torch.nn import functional as F

MASK = 2**32 - 1
KEY, FLIP_KEY = 0x97A0D5AB, 0x5F1D36F1


def pcg4d(words):
    v = [(w * 1664525 + 1013904223) & MASK for w in words]

    def mix():
        for a, b, c in ((0, 1, 3), (1, 2, 0), (2, 0, 1), (3, 1, 2)):
            v[a] = (v[a] + v[b] * v[c]) & MASK

    mix()
    v = [w ^ (w >> 16) for w in v]
    mix()
    return v


def unit(word):
    return (word >> 8) / 2**24


def sides(word):
    return (word >> 8) / 2**23 - 1


def below(word, n):
    return word * n >> 32


def inverse_affine(angle, scale, shear):
    """torchvision.transforms.functional._get_inverse_affine_matrix without centre and shift."""
    rot, sx, sy = math.radians(angle), math.radians(shear), 0.0
    a = math.cos(rot - sy) / math.cos(sy)
    b = -math.cos(rot - sy) * math.tan(sx) / math.cos(sy) - math.sin(rot)
    c = math.sin(rot - sy) / math.cos(sy)
    d = -math.sin(rot - sy) * math.tan(sx) / math.cos(sy) + math.cos(rot)
    return numpy.array([[d, -b], [-c, a]]) / scale


def basis(x):
    """The cubic B-spline with knots −2 … 2, by the recursion of Cox and de Boor."""

    def b(i, k):
        if k == 0:
            return 1.0 if i <= x < i + 1 else 0.0
        return (x - i) / k * b(i, k - 1) + (i + k + 1 - x) / k * b(i + 1, k - 1)

    return b(-2, 3)


def case(name, shape, seed, epoch, position, sample, **augment):
    keys = dict(
        shift=0.0, rotate=0.0, scale=0.0, shear=0.0, border="zero", flip="none", crop=0, resized_crop=None,
        erase=0.0, erase_size=[0.02, 0.33], cut_out=0, brightness=0.0, contrast=0.0, saturation=0.0,
        elastic=0.0, elastic_grid=4,
    )  # fmt: skip
    keys.update(augment)
    k = type("Keys", (), keys)
    height, width, channels = shape
    rng = numpy.random.default_rng(len(name))
    image = rng.integers(0, 256, shape)
    scale = numpy.array([1 / 60.0, 1 / 70.0, 1 / 50.0])[:channels]
    mean = numpy.array([120.0, 90.0, 140.0])[:channels]
    stream = pcg4d([seed, epoch, position, KEY])

    def block(number):
        return pcg4d([(stream[0] + number) & MASK, *stream[1:]])

    turn, size, tilt, mirror = block(0)
    down, right, crop_down, crop_right = block(1)
    area, stretch, from_top, from_left = block(2)
    erase, erase_area, erase_high, _ = block(3)
    erase_top, erase_left, cut_top, cut_left = block(4)
    brightness, contrast, saturation, _ = block(5)

    y, x = numpy.mgrid[0:height, 0:width].astype(float)
    if k.elastic:
        grid = k.elastic_grid
        nodes = []
        for number in range(((grid + 3) ** 2 + 1) // 2):
            nodes += [k.elastic * sides(word) for word in block(16 + number)]
        nodes = numpy.array(nodes[: 2 * (grid + 3) ** 2]).reshape(grid + 3, grid + 3, 2)
        moved = numpy.zeros((2, height, width))
        for h in range(height):
            for w in range(width):
                v, u = (h + 0.5) * grid / height, (w + 0.5) * grid / width
                for i in range(grid + 3):
                    for j in range(grid + 3):
                        moved[:, h, w] += basis(v - (i - 1)) * basis(u - (j - 1)) * nodes[i, j]
        y, x = y + moved[0], x + moved[1]
    y += below(crop_down, 2 * k.crop + 1) - k.crop
    x += below(crop_right, 2 * k.crop + 1) - k.crop
    mirrored = k.flip == "random" and mirror >> 31
    if k.flip == "alternating":
        mirrored = ((pcg4d([seed, sample, 0, FLIP_KEY])[0] >> 31) + epoch) % 2
    if mirrored:
        x = width - 1 - x
    if k.resized_crop:
        least, most = k.resized_crop
        pixels = (least + (most - least) * unit(area)) * height * width
        aspect = math.exp(math.log(4 / 3) * sides(stretch))
        wide, high = min(math.sqrt(pixels * aspect), width), min(math.sqrt(pixels / aspect), height)
        y = unit(from_top) * (height - high) + (y + 0.5) * high / height - 0.5
        x = unit(from_left) * (width - wide) + (x + 0.5) * wide / width - 0.5
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    y -= k.shift * height * sides(down)
    x -= k.shift * width * sides(right)
    matrix = inverse_affine(k.rotate * sides(turn), 1 + k.scale * sides(size), k.shear * sides(tilt))
    x, y = matrix[0, 0] * x + matrix[0, 1] * y, matrix[1, 0] * x + matrix[1, 1] * y
    y, x = y + (height - 1) / 2, x + (width - 1) / 2

    places = torch.tensor(numpy.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1))
    value = F.grid_sample(
        torch.tensor(image).double().permute(2, 0, 1)[None],
        places[None],
        padding_mode={"zero": "zeros", "reflect": "reflection"}[k.border],
        align_corners=True,
    )[0].permute(1, 2, 0).numpy()

    def blend(a, b, ratio):
        return numpy.clip(ratio * a + (1 - ratio) * b, 0, 255)

    luma = numpy.array([0.299, 0.587, 0.114]) if channels == 3 else numpy.full(channels, 1 / channels)
    value = blend(value, 0, 1 + k.brightness * sides(brightness))
    value = blend(value, (luma * mean).sum(), 1 + k.contrast * sides(contrast))
    if channels == 3:
        value = blend(value, (value * luma).sum(-1, keepdims=True), 1 + k.saturation * sides(saturation))
    value = (value - mean) * scale
    if unit(erase) < k.erase:
        least, most = [max(1, round(share * height * width)) for share in k.erase_size]
        pixels = least + below(erase_area, most - least + 1)
        shortest = max(1, math.isqrt(pixels * 3 // 10))
        tallest = max(shortest, math.isqrt(pixels * 33 // 10))
        high = shortest + below(erase_high, tallest - shortest + 1)
        wide, high = min(max(1, pixels // high), width), min(high, height)
        top, left = below(erase_top, height - high + 1), below(erase_left, width - wide + 1)
        value[top : top + high, left : left + wide] = 0
    if k.cut_out:
        top, left = below(cut_top, height) - k.cut_out // 2, below(cut_left, width) - k.cut_out // 2
        value[max(top, 0) : max(top + k.cut_out, 0), max(left, 0) : max(left + k.cut_out, 0)] = 0
    return {
        "name": name,
        "shape": shape,
        "draw": [seed, epoch, position, sample],
        "augment": augment,
        "image": image.flatten().tolist(),
        "scale": [float(numpy.float32(v)) for v in scale],
        "shift": [float(numpy.float32(v)) for v in -mean * scale],
        "x": [round(float(v), 6) for v in value.flatten()],
    }


affine = dict(rotate=40.0, scale=0.3, shear=20.0, shift=0.2)
cases = [
    case("affine", [6, 5, 1], 1, 2, 3, 4, **affine),
    case("affine, reflected", [5, 7, 3], 5, 6, 7, 8, border="reflect", **affine),
    case("crop and flip", [4, 6, 1], 9, 1, 5, 6, border="reflect", crop=2, flip="random"),
    case("alternating flip", [4, 5, 1], 9, 1, 5, 7, flip="alternating"),
    case("resized crop", [8, 5, 1], 3, 1, 2, 7, resized_crop=[0.2, 0.6], flip="random"),
    case("elastic", [7, 6, 1], 2, 4, 6, 1, elastic=1.5, elastic_grid=3),
    case("colours", [3, 4, 3], 2, 5, 6, 1, brightness=0.9, contrast=0.8, saturation=0.9),
    case("erasing", [7, 6, 1], 2, 4, 8, 1, erase=1.0, erase_size=[0.2, 0.3], cut_out=2),
    case(
        "all", [6, 7, 3], 0xFFFFFFFF, 300, 59999, 12345, border="reflect", flip="alternating", crop=1,
        resized_crop=[0.3, 1.0], erase=0.9, cut_out=2, brightness=0.4, contrast=0.3, saturation=0.5,
        elastic=1.0, elastic_grid=2, **affine,
    ),
]  # fmt: skip
lines = ",\n".join(json.dumps(case) for case in cases)
pathlib.Path(__file__).with_name("augment.json").write_text(f"[\n{lines}\n]\n")
