"""What other programs make of exported networks: see check-onnx.sh, which runs this three times.

    data FOLDER         makes the images
    onnxruntime FOLDER  trains every shipped model a little, exports it, runs it in onnxruntime
    pytorch FOLDER      runs the same in PyTorch, and has PyTorch's own exports imported

Outputs are held against those of `wgrad eval --logits`: for every image each within 1e-4 of the largest one of
the image by amount (or of 1, where that is larger), and the same class. Where two classes are as close as
that, either will do; it is counted.
"""

import importlib.util
import json
import os
import pathlib
import struct
import subprocess
import sys
import types

import numpy as np

TOLERANCE = 1e-4
IMAGES = 1000
# Training images, so many that something is learnt and so few that large networks are done in seconds.
LIMITS = {(28, 28, 1): 1000, (32, 32, 3): 64}
BATCH = 16
# What some need to tell one image from another.
MORE = {
    "mobilenet-small": ["--epochs", 20],
    "resnet18-cifar": ["--epochs", 6],
    "vgg-cifar": ["--epochs", 8, "--optimizer", "adamw", "--lr", 0.001],
    "tests/operations.toml": ["--epochs", 10, "--lr", 0.01],
}


def models():
    """Names of the shipped models and their images' sizes, as height, width, channels; and a model that has
    every operation."""
    for path in sorted(pathlib.Path("models").glob("*.toml")):
        line = next(line for line in path.read_text().splitlines() if line.startswith("input = "))
        yield path.stem, tuple(json.loads(line.split("=")[1].split("#")[0]))
    yield "tests/operations.toml", (32, 32, 3)


def data(folder):
    """MNIST's first images, and pictures of ten kinds of waves in three colours."""
    import zstandard

    def idx(name):
        with zstandard.open(f"data/mnist/{name}.zst", "rb") as file:
            raw = file.read()
        rank = raw[3]
        sizes = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(sizes)

    arrays = {}
    limit = LIMITS[28, 28, 1]
    for split, name, count in [("train", "train", limit), ("test", "t10k", IMAGES)]:
        arrays[f"x_{split}"] = idx(f"{name}-images-idx3-ubyte")[:count, :, :, None]
        arrays[f"y_{split}"] = idx(f"{name}-labels-idx1-ubyte")[:count]
    np.savez(folder / "28x28x1.npz", **arrays)

    random = np.random.default_rng(1)
    rows, columns = np.mgrid[0:32, 0:32] / 32
    for split, count in [("train", LIMITS[32, 32, 3]), ("test", IMAGES)]:
        labels = np.arange(count) % 10
        angles = labels * np.pi / 10 + random.normal(0, 0.1, count)
        along = np.cos(angles)[:, None, None] * rows + np.sin(angles)[:, None, None] * columns
        phases = random.uniform(0, 2 * np.pi, (count, 1, 1, 3))
        waves = np.sin(2 * np.pi * 4 * along[..., None] + phases)
        pictures = 128 + 60 * waves + random.normal(0, 30, waves.shape)
        arrays[f"x_{split}"] = pictures.clip(0, 255).astype(np.uint8)
        arrays[f"y_{split}"] = labels.astype(np.uint8)
    np.savez(folder / "32x32x3.npz", **arrays)


def wgrad(*arguments):
    command = [os.environ["WGRAD"], *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def images(folder, shape, run):
    """Test images as N×C×H×W bytes, the same normalised as the run has it, and their labels."""
    with np.load(folder / "{}x{}x{}.npz".format(*shape)) as arrays:
        bytes_, labels = arrays["x_test"].transpose(0, 3, 1, 2), arrays["y_test"]
    normalization = json.loads((run / "run.json").read_text())["normalization"]
    scale, shift = (np.float32(normalization[key]).reshape(1, -1, 1, 1) for key in ("scale", "shift"))
    bytes_ = np.ascontiguousarray(bytes_)
    return bytes_, bytes_.astype(np.float32) * scale + shift, labels


def compare(what, found, expected, labels):
    """Ends the check where the outputs differ; says by how much they do."""
    assert found.shape == expected.shape, f"{what}: {found.shape} for {expected.shape}"
    scale = np.abs(expected).max(1).clip(1)
    differences = np.abs(found - expected).max(1) / scale
    # Written so that NaN is refused.
    if not (differences <= TOLERANCE).all():
        sys.exit(f"{what}: expected a difference of at most {TOLERANCE}, found {differences.max():.1e}")
    others = found.argmax(1) != expected.argmax(1)
    top = np.sort(expected, 1)
    close = top[:, -1] - top[:, -2] <= 2 * TOLERANCE * scale
    if (others & ~close).any():
        sys.exit(f"{what}: expected the same classes, found {(others & ~close).sum()} others")
    ties = f", {others.sum()} ties" if others.any() else ""
    accuracy, own = ((z.argmax(1) == labels).mean() for z in (found, expected))
    if accuracy != own and not others.any():
        sys.exit(f"{what}: expected an accuracy of {own}, found {accuracy}")
    print(f"{what:44} {differences.max():.1e} of {TOLERANCE}, accuracy {accuracy:.3f}{ties}", flush=True)


def softmax(z):
    e = np.exp((z - z.max(1, keepdims=True)).astype(np.float64))
    return (e / e.sum(1, keepdims=True)).astype(np.float32)


def onnxruntime_half(folder):
    import onnx
    import onnxruntime

    def run(path, images):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        (opset,) = model.opset_import
        assert opset.version == 17, opset
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        properties = session.get_modelmeta().custom_metadata_map
        assert json.loads(properties["class_names"]) == [str(k) for k in range(10)], properties
        assert session.get_inputs()[0].shape[0] == "batch", session.get_inputs()[0].shape
        # Batches of different sizes.
        parts = [images[:1], *np.split(images[1:], range(99, len(images) - 1, 100))]
        return np.concatenate([session.run(None, {"input": part})[0] for part in parts])

    for name, shape in models():
        out = folder / pathlib.Path(name).stem
        source = folder / "{}x{}x{}.npz".format(*shape)
        steps = ["--batch-size", BATCH, "--limit", LIMITS[shape], *MORE.get(name, ["--epochs", 2])]
        wgrad("train", "--model", name, "--data", source, "--out", out, "--device", "cpu", *steps)
        wgrad("eval", out, "--data", source, "--device", "cpu", "--views", "one", "--logits", out / "logits.npy")
        expected = np.load(out / "logits.npy")
        # Other images, other answers.
        assert expected.shape == (IMAGES, 10) and len(set(expected.argmax(1))) > 1, expected
        bytes_, normalised, labels = images(folder, shape, out)

        path = out / "plain.onnx"
        wgrad("export", out, "--onnx", path, "--safetensors", out / "w.safetensors", "--pytorch", out / "net.py")
        compare(f"{name}: onnxruntime", run(path, normalised), expected, labels)
        path = out / "folded.onnx"
        wgrad("export", out, "--onnx", path, "--fold-batch-norm", "--with-normalization")
        compare(f"{name}: folded, bytes in", run(path, bytes_), expected, labels)
        if name != "mlp-sigmoid":
            path = out / "softmax.onnx"
            wgrad("export", out, "--onnx", path, "--with-softmax")
            few = run(path, normalised[:50])
            compare(f"{name}: probabilities", few, softmax(expected[:50]), labels[:50])


def pytorch_half(folder):
    import torch

    print(f"PyTorch {torch.__version__}")

    def module(path):
        spec = importlib.util.spec_from_file_location("net", path)
        net = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(net)
        return net

    def load_file(path):
        """What safetensors.torch does, for where it is not installed."""
        raw = pathlib.Path(path).read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            assert entry["dtype"] == "F32", entry
            start, end = (8 + size + at for at in entry["data_offsets"])
            values = np.frombuffer(raw[start:end], "<f4").reshape(entry["shape"])
            tensors[name] = torch.from_numpy(values.copy())
        return tensors

    if importlib.util.find_spec("safetensors") is None:
        sys.modules["safetensors"] = types.ModuleType("safetensors")
        sys.modules["safetensors.torch"] = types.ModuleType("safetensors.torch")
        sys.modules["safetensors.torch"].load_file = load_file

    def run(network, images):
        with torch.no_grad():
            return np.concatenate([network(part).numpy() for part in images.split(100)])

    for name, shape in models():
        out = folder / pathlib.Path(name).stem
        net = module(out / "net.py")
        bytes_, _, labels = images(folder, shape, out)
        normalised = net.normalize(torch.from_numpy(bytes_))
        found = run(net.load(out / "w.safetensors"), normalised)
        compare(f"{name}: PyTorch", found, np.load(out / "logits.npy"), labels)

    if importlib.util.find_spec("onnxscript") is None:
        print("skipped: files of PyTorch's exporter by torch.export, which needs onnxscript")
    for name, shape, make in foreign(torch):
        for exporter, export in exporters(torch):
            out = folder / f"{name}-{exporter}"
            out.mkdir()
            torch.manual_seed(1)
            network = make()
            # As after a training: outputs of some size, running statistics of some images.
            for parameter in network.parameters():
                parameter.data *= 2
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    buffer.data += torch.rand_like(buffer) * 0.5
            network.eval()
            height, width, channels = shape
            export(network, torch.zeros(2, channels, height, width), out / "net.onnx")
            wgrad("import", out / "net.onnx", "--out", out / "net")
            # A training that changes nothing, since a run is what is evaluated.
            text = (out / "net.toml").read_text()
            text = text.replace("momentum = 0.1", "momentum = 0.0")
            (out / "net.toml").write_text(text)
            source = folder / "{}x{}x{}.npz".format(*shape)
            still = ["--lr", "1e-30", "--epochs", 1, "--batch-size", BATCH, "--limit", 48, "--device", "cpu"]
            start = ["--model", out / "net.toml", "--init", out / "net.safetensors"]
            wgrad("train", *start, "--data", source, "--out", out / "run", *still)
            wgrad("eval", out / "run", "--data", source, "--device", "cpu", "--logits", out / "logits.npy")
            _, normalised, labels = images(folder, shape, out / "run")
            found = run(network, torch.from_numpy(normalised))
            compare(f"{name}: imported from {exporter}", np.load(out / "logits.npy"), found, labels)


def exporters(torch):
    """PyTorch's ways to write ONNX, as far as they are there."""
    names = {"input_names": ["x"], "output_names": ["y"]}

    def script(network, images, path):
        more = {"dynamo": False} if int(torch.__version__.split(".")[0]) >= 2 else {}
        axes = {"x": {0: "n"}, "y": {0: "n"}}
        # Otherwise it folds batch normalisations; that they come through is what we want to see.
        keep = torch.onnx.TrainingMode.PRESERVE
        more = {"training": keep, "do_constant_folding": False, "dynamic_axes": axes, **more}
        torch.onnx.export(network, images, str(path), opset_version=17, **names, **more)

    def dynamo(network, images, path):
        batch = ({0: torch.export.Dim("n")},)
        more = {"dynamic_shapes": batch, "verbose": False}
        torch.onnx.export(network, (images,), str(path), dynamo=True, **names, **more)

    yield "TorchScript", script
    if importlib.util.find_spec("onnxscript"):
        yield "torch.export", dynamo


def foreign(torch):
    """Networks as people write them in PyTorch."""
    nn = torch.nn

    def plain():
        return nn.Sequential(
            nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU(), nn.AvgPool2d(3, 2, padding=1),
            nn.Flatten(), nn.Linear(16 * 3 * 3, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10),
        )

    class Basic(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.downsample = nn.Sequential()
            if stride != 1 or inputs != outputs:
                self.downsample = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.layer1 = Basic(16, 16, 1)
            self.layer2 = Basic(16, 32, 2)
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(32, 10)

        def forward(self, x):
            x = self.pool(self.layer2(self.layer1(self.stem(x))))
            return self.fc(x.view(x.size(0), -1))

    class Modern(nn.Module):
        """Other normalisations, activations, squeeze and excite, branches."""

        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 4, stride=4)
            self.norm = nn.GroupNorm(4, 16)
            self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.squeeze = nn.Linear(16, 4)
            self.excite = nn.Linear(4, 16)
            self.wide = nn.Conv2d(16, 24, 1)
            self.last = nn.LayerNorm(40)
            self.head = nn.Linear(40, 10)

        def forward(self, x):
            x = nn.functional.silu(self.norm(self.stem(x)))
            y = nn.functional.hardswish(self.depthwise(x))
            factors = nn.functional.gelu(self.squeeze(y.mean((2, 3))))
            factors = torch.sigmoid(self.excite(factors))
            y = y * factors[:, :, None, None]
            y = torch.cat([nn.functional.leaky_relu(self.wide(y), 0.1), x], 1)
            y = nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)
            y = nn.functional.gelu(self.last(y), approximate="tanh")
            return self.head(torch.tanh(y))

    yield "plain", (28, 28, 1), plain
    yield "resnet", (32, 32, 3), ResNet
    yield "modern", (32, 32, 3), Modern


if __name__ == "__main__":
    command, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    {"data": data, "onnxruntime": onnxruntime_half, "pytorch": pytorch_half}[command](folder)
