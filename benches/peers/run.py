#!/usr/bin/env python3
"""Runs wgrad and its peers on the same workloads, one after the other, and prints how many times as
fast wgrad is. Needs nothing beyond Python's standard library. README.md says what is measured."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORKLOADS = {"tutorial": 128, "lenet5": 128, "vgg-cifar": 64}
PEERS = ["burn", "candle", "pytorch"]
# The peers are built for this very processor, wgrad as it ships.
NATIVE = "-C target-cpu=native"
# Where drivers and libraries are told to keep what they compile and tune.
CACHES = [
    "XDG_CACHE_HOME",
    "MESA_SHADER_CACHE_DIR",
    "__GL_SHADER_DISK_CACHE_PATH",
    "CUDA_CACHE_PATH",
    "TORCHINDUCTOR_CACHE_DIR",
]


class Skipped(Exception):
    """Why something could not be built or run, in one line."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def complaint(stderr):
    """The line of a failed program's output that says most."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    others = [line for line in lines if not line.startswith("note:")]
    return (errors[:1] + others[-1:] + ["it says nothing"])[0]


def build(manifest, *options, flags=None):
    """Path of the program that `cargo build --release` makes of `manifest`."""
    say(f"building {manifest.relative_to(HERE.parents[1])}")
    command = ["cargo", "build", "--release", "--locked", "--manifest-path", str(manifest)]
    command += ["--message-format", "json-render-diagnostics", *options]
    env = dict(os.environ)
    if flags:
        env.setdefault("RUSTFLAGS", flags)
    try:
        result = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise Skipped("cargo is not installed") from None
    if result.returncode != 0:
        raise Skipped(f"does not build: `{' '.join(command[:6])}` failed")
    messages = map(json.loads, result.stdout.splitlines())
    return next(m["executable"] for m in reversed(list(messages)) if m.get("executable"))


def run(command, options):
    """The JSON object that a benchmark program prints."""
    # A folder of its own, so that no cache lands in the repository: Burn looks for a Cargo.toml
    # above the current folder and puts its cache beside it.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        env = dict(os.environ)
        if options.cold:
            env |= {name: tempfile.mkdtemp(dir=folder) for name in CACHES}
        try:
            result = subprocess.run(
                command, cwd=folder, env=env, capture_output=True, text=True, timeout=options.timeout
            )
        except subprocess.TimeoutExpired:
            raise Skipped(f"not done after {options.timeout} s") from None
        except OSError as error:
            raise Skipped(f"{command[0]}: {error.strerror}") from None
    if result.returncode != 0:
        raise Skipped(f"exit status {result.returncode}: {complaint(result.stderr)}")
    try:
        return json.loads(result.stdout)
    except ValueError:
        raise Skipped(f"printed no JSON: {result.stdout[:80]!r}") from None


def run_wgrad(program, workload, device, options):
    """wgrad's own figures in the shape of the peers'."""
    command = [program, "bench", "--model", workload, "--steps-only", "--json"]
    if device != "adapter":  # what `bench` takes unasked: the best one, software included
        command += ["--device", device]
    try:
        found = run(command, options)
    except Skipped as reason:
        if "unrecognized subcommand" in str(reason):
            raise Skipped("this wgrad has no `bench` command") from None
        raise
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    try:
        return {
            "peer": "wgrad",
            "version": version.split()[-1],
            "backend": device,
            "device": str(found.get("adapter", "")),
            "workload": workload,
            "batch": WORKLOADS[workload],
            "images_per_second": found["step"]["images_per_second"],
            "first_step_seconds": found["step"]["first_step_seconds"],
            "peak_rss_mb": found["peak_rss_mb"],
        }
    except KeyError as key:
        raise Skipped(f"`wgrad bench` printed no {key}") from None


def contestants(options):
    """(peer, backend, function from workload to figures) of everything that can be run, wgrad
    first; and what cannot, with the reason."""
    found, skipped = [], []

    def attempt(peer, prepare):
        try:
            found.extend((peer, *rest) for rest in prepare())
        except Skipped as reason:
            say(f"{peer}: skipped: {reason}")
            skipped.append({"peer": peer, "reason": str(reason)})

    def wgrad():
        program = options.wgrad or build(HERE.parents[1] / "Cargo.toml", "--bin", "wgrad")
        for device in ["adapter", "cpu"]:
            yield device, lambda w, d=device: run_wgrad(program, w, d, options)

    def burn():
        backends = options.burn_backends
        features = ["--features", "vulkan"] if "vulkan" in backends else []
        program = build(HERE / "burn/Cargo.toml", *features, flags=NATIVE)
        for backend in backends:
            yield backend, lambda w, b=backend: run([program, w, b], options)

    def candle():
        program = build(HERE / "candle/Cargo.toml", flags=NATIVE)
        yield "cpu", lambda w: run([program, w], options)

    def pytorch():
        probe = "import json, torch; print(json.dumps(torch.cuda.is_available()))"
        try:
            cuda = run([options.python, "-c", probe], options)
        except Skipped as reason:
            raise Skipped(f"{reason} (see README.md for how to install it)") from None
        for device in ["cpu", "cuda"] if cuda else ["cpu"]:
            for mode in ["eager", "channels_last", "compile"]:
                command = [options.python, str(HERE / "pytorch/bench.py")]
                flags = ["--device", device, "--mode", mode]
                yield f"{device} {mode}", lambda w, c=command, f=flags: run([*c, w, *f], options)

    attempt("wgrad", wgrad)
    for peer in options.peers:
        attempt(peer, {"burn": burn, "candle": candle, "pytorch": pytorch}[peer])
    return found, skipped


def ratios(runs):
    """For each peer's run, wgrad's median over its median, by wgrad's device."""
    medians = {}
    for r in runs:
        medians[r["peer"], r["backend"], r["workload"]] = r["images_per_second"]["median"]
    table = []
    for (peer, backend, workload), median in medians.items():
        if peer != "wgrad":
            row = {"peer": peer, "backend": backend, "workload": workload}
            for device in ["adapter", "cpu"]:
                own = medians.get(("wgrad", device, workload))
                row[device] = None if own is None else round(own / median, 3)
            table.append(row)
    return table


def print_tables(report, workloads):
    def number(value, form):
        return "–" if value is None else format(value, form)

    by_run = {(r["peer"], r["backend"], r["workload"]): r for r in report["ratios"]}
    for workload in workloads:
        rows = [("", "device", "images/s (min to max)", "first step", "peak RSS",
                 "wgrad/it", "wgrad on CPU/it")]
        for r in report["runs"]:
            if r["workload"] == workload:
                rate = r["images_per_second"]
                ratio = by_run.get((r["peer"], r["backend"], workload), {})
                rows.append((
                    f"{r['peer']} {r['version']} {r['backend']}",
                    r["device"],
                    f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})",
                    f"{number(r['first_step_seconds'], '.2f')} s",
                    f"{number(r['peak_rss_mb'], ',.0f')} MB",
                    number(ratio.get("adapter"), ".2f"),
                    number(ratio.get("cpu"), ".2f"),
                ))
        if len(rows) == 1:
            continue
        print(f"\n{workload}, batch {WORKLOADS[workload]}")
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            cells = [f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths))]
            print("  " + "  ".join(cells).rstrip())
    if report["skipped"]:
        print("\nskipped")
        for s in report["skipped"]:
            name = " ".join(s[key] for key in ["peer", "backend", "workload"] if key in s)
            print(f"  {name}: {s['reason']}")


def cpu_name():
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main():
    def some_of(known):
        def parse(text):
            names = text.split(",")
            for name in names:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, found '{name}'")
            return names
        return parse

    venv = HERE / "pytorch/venv/bin/python"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=some_of(PEERS), default=PEERS,
                        help="which, with commas between [default: burn,candle,pytorch]")
    parser.add_argument("--models", type=some_of(WORKLOADS), default=list(WORKLOADS),
                        help="which, with commas between [default: tutorial,lenet5,vgg-cifar]")
    parser.add_argument("--burn-backends", type=some_of(["wgpu", "vulkan", "flex"]),
                        default=["wgpu", "flex"], help="which, with commas between [default: wgpu,flex]")
    parser.add_argument("--wgrad", metavar="PROGRAM", type=os.path.abspath,
                        help="a wgrad to run [default: build this repository's]")
    parser.add_argument("--python", type=lambda p: os.path.abspath(p) if os.sep in p else p,
                        default=str(venv) if venv.exists() else sys.executable,
                        help="a Python with PyTorch [default: pytorch/venv's, else this one]")
    parser.add_argument("--cold", action="store_true",
                        help="start every program with empty shader, kernel and autotune caches")
    parser.add_argument("--timeout", metavar="SECONDS", type=int, default=600,
                        help="give a program up after this long [default: 600]")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args()

    found, skipped = contestants(options)
    runs = []
    # By workload first: what is compared is measured close together on a machine that may drift.
    for workload in options.models:
        for peer, backend, figures in found:
            say(f"running {peer} {backend} {workload}")
            try:
                runs.append(figures(workload))
            except Skipped as reason:
                say(f"  skipped: {reason}")
                skipped.append({"peer": peer, "backend": backend, "workload": workload,
                                "reason": str(reason)})
    report = {
        "machine": {"system": platform.platform(), "cpu": cpu_name(), "threads": os.cpu_count()},
        "cold": options.cold,
        "runs": runs,
        "ratios": ratios(runs),
        "skipped": skipped,
    }
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_tables(report, options.models)
    return 0 if runs else 1


sys.exit(main())
