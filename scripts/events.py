"""Checks TensorBoard's event files of wgrad against the run folder they are in, by TensorBoard's own reader.

    python scripts/events.py WGRAD
"""

import glob
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EVERYTHING = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}


def safetensors(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    header.pop("__metadata__", None)
    dtypes = {"F32": np.float32}
    return {
        name: np.frombuffer(data[slice(*t["data_offsets"])], dtypes[t["dtype"]]).reshape(t["shape"])
        for name, t in header.items()
    }


def lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def expect(found, expected, what):
    assert found == expected, f"{what}: expected {expected}, found {found}"


def expect_points(events, tag, expected):
    """All points of a tag: each step once, in order, with these values as 32-bit floats."""
    points = events.Scalars(tag)
    expect([p.step for p in points], [step for step, _ in expected], f"steps of {tag}")
    for point, (step, value) in zip(points, expected):
        assert abs(point.value - value) <= 1e-6 * abs(value), (tag, step, point.value, value)


def check(run):
    folder = os.path.join(run, "tensorboard")
    events = EventAccumulator(folder, size_guidance=EVERYTHING).Reload()
    tags = events.Tags()
    scalars = set(tags["scalars"])

    steps = lines(os.path.join(run, "steps.jsonl"))
    for key in ["loss", "accuracy"]:
        expect_points(events, f"step/{key}", [(s["step"], s[key]) for s in steps])
    expect_points(events, "step/learning_rate", [(s["step"], s["lr"]) for s in steps])
    checked = {"step/loss", "step/accuracy", "step/learning_rate"}

    epochs = lines(os.path.join(run, "metrics.jsonl"))
    tag_of = {"lr": "learning_rate", "images_per_second": "images_per_second", "seconds": "seconds"}
    for split in ["train", "validation", "test", "average_validation", "average_test"]:
        for what in ["loss", "accuracy"]:
            tag_of[f"{split}_{what}"] = f"{what}/{split}"
    for key, tag in tag_of.items():
        if key in epochs[0]:
            expect_points(events, tag, [(e["step"], e[key]) for e in epochs])
            checked.add(tag)
    for key in ["weight_norms", "gradient_norms"]:
        for name in epochs[0][key]:
            tag = f"{key[:-1]}/{name}"
            expect_points(events, tag, [(e["step"], e[key][name]) for e in epochs])
            checked.add(tag)
    expect(scalars, checked, "tags of scalars")

    weights = safetensors(os.path.join(run, "model.safetensors"))
    trained = {name for name in weights if not name.split(".")[-1].startswith("running_")}
    names = {f"{what}/{name}" for what in ["weight", "gradient"] for name in trained}
    expect(set(tags["histograms"]), names, "tags of histograms")
    for tag in names:
        histograms = events.Histograms(tag)
        expect([h.step for h in histograms], [e["step"] for e in epochs], f"steps of {tag}")
        for histogram, epoch in zip(histograms, epochs):
            what, name = tag.split("/")
            h = histogram.histogram_value
            expect(h.num, weights[name].size, f"values of {tag}")
            expect(sum(h.bucket), h.num, f"values in the buckets of {tag}")
            norm = epoch[f"{what}_norms"][name]
            assert abs(np.sqrt(h.sum_squares) - norm) <= 1e-6 * norm, (tag, h.sum_squares, norm)
    for name in trained:
        h = events.Histograms(f"weight/{name}")[-1].histogram_value
        values = weights[name].astype(np.float64)
        expect((h.min, h.max), (values.min(), values.max()), f"range of {name}")
        assert abs(h.sum - values.sum()) <= 1e-6 * np.abs(values).sum(), name
        # The buckets, counted anew.
        edges = np.array([h.min, *h.bucket_limit])
        counts, _ = np.histogram(values, edges)
        assert np.abs(counts - np.array(h.bucket)).sum() <= 2, (name, counts, h.bucket)

    first = next(name for name in weights if weights[name].ndim == 4)
    expect(set(tags["images"]), {"input", f"filters/{first}"}, "tags of images")
    for tag, expected in [("input", [0]), (f"filters/{first}", [e["step"] for e in epochs])]:
        images = events.Images(tag)
        expect([image.step for image in images], expected, f"steps of {tag}")
        for image in images:
            picture = Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")
            expect(picture.size, (image.width, image.height), f"size of {tag}")
            assert np.unique(np.asarray(picture)).size > 2, f"{tag} shows nothing"
    return len(steps), len(epochs)


def train(wgrad, where, *arguments, kill_after=None):
    command = [wgrad, "train", "--device", "cpu", *arguments]
    process = subprocess.Popen(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if kill_after is not None:
        while process.poll() is None and not kill_after():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    out, err = process.communicate()
    if kill_after is None:
        assert process.returncode == 0, out + err
    else:
        expect(process.returncode, -signal.SIGKILL, "exit code of what was killed")
    return out


def main():
    wgrad = os.path.abspath(sys.argv[1])
    with tempfile.TemporaryDirectory() as where:
        run = os.path.join(where, "run")
        small = ["--model", "tutorial", "--limit", "600", "--batch-size", "20", "--epochs", "4"]
        small += ["--validation", "0.2", "--set", "average=0.9", "--tensorboard"]

        def count(n, name="steps.jsonl"):
            """Whether a file has so many lines."""
            path = os.path.join(run, name)
            return os.path.exists(path) and len(open(path).read().splitlines()) >= n

        # Killed between two checkpoints in the second epoch (24 steps each), which leaves points that come again.
        train(wgrad, where, *small, "--out", "run", "--checkpoint-every", "20", kill_after=lambda: count(34))
        before = [e for e in lines(os.path.join(run, "steps.jsonl"))][-1]["step"]
        train(wgrad, where, "--resume", "run", "--stop-after", "3")
        # A resume goes on with the files by itself, as it just did, or with the flag.
        train(wgrad, where, "--resume", "run", "--tensorboard")
        files = glob.glob(os.path.join(run, "tensorboard", "*"))
        expect(len(files), 3, "event files")
        steps, epochs = check(run)
        expect(epochs, 4, "epochs")
        print(f"killed after step {before} and resumed twice: {steps} steps and {epochs} epochs, each once")

        # What was trained without the flag is told when it comes.
        run = os.path.join(where, "late")
        train(wgrad, where, *small[:-1], "--out", "late", "--stop-after", "1")
        train(wgrad, where, "--resume", "late", "--tensorboard", "--stop-after", "2")
        events = EventAccumulator(os.path.join(run, "tensorboard"), size_guidance=EVERYTHING).Reload()
        epochs = lines(os.path.join(run, "metrics.jsonl"))
        expect_points(events, "loss/test", [(e["step"], e["test_loss"]) for e in epochs])
        expect(len(epochs), 2, "epochs")
        steps = lines(os.path.join(run, "steps.jsonl"))
        expect_points(events, "step/loss", [(s["step"], s["loss"]) for s in steps])
        print("begun without --tensorboard: its numbers are there too")

        small[small.index("--epochs") + 1] = "1"
        train(wgrad, where, *small, "--out", "seeds", "--seeds", "1,2")
        for seed in [1, 2]:
            check(os.path.join(where, "seeds", f"seed-{seed}"))
        print("of two seeds each has its own")


main()
