//! Bad days of a device, injected: it is lost, hangs, has no memory or computes nothing. Each ends in
//! one line, and with a checkpoint to go on from.

mod common;

use assert_cmd::cargo::cargo_bin;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use wgrad::Error;
use wgrad::gpu::{Choice, Fault, Gpu};
use wgrad::model::recipe::Precision;
use wgrad::verify;

fn wgrad(folder: &Path, inject: &str, arguments: &str) -> Output {
    Command::new(cargo_bin("wgrad"))
        .current_dir(folder)
        .env_remove("RUST_LOG")
        .env("WGRAD_INJECT", inject)
        .args(arguments.split_whitespace())
        .output()
        .unwrap()
}

/// On the best adapter, whatever it is.
const SMALL: &str = "train --model small.toml --data shapes --device 1";

/// What a command printed that must succeed.
fn good(folder: &Path, arguments: &str) -> String {
    let output = wgrad(folder, "", arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// The one line that a command fails with, with exit code 1.
fn bad(folder: &Path, inject: &str, arguments: &str) -> String {
    failure(inject, wgrad(folder, inject, arguments))
}

fn failure(inject: &str, output: Output) -> String {
    let error = String::from_utf8(output.stderr).unwrap();
    // A slow machine says what it is at.
    let mut lines: Vec<&str> = error.lines().collect();
    lines.retain(|line| !line.starts_with("wgrad: "));
    let error = lines.join("\n");
    assert_eq!(output.status.code(), Some(1), "{inject}: {error}");
    assert_eq!(error.lines().count(), 1, "{inject}: {error}");
    error
}

fn hash(output: &str) -> &str {
    let line = output.lines().find_map(|l| l.strip_prefix("weights "));
    line.unwrap_or_else(|| panic!("no hash in {output}")).trim()
}

fn epochs(run: &Path) -> usize {
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    metrics.lines().count()
}

/// Whatever strikes, and when: the run goes on from its checkpoint to the bits of a run that nothing
/// happened to.
#[test]
fn a_run_that_the_device_ends_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    common::write_model_and_data(folder);
    let whole = good(folder, &format!("{SMALL} --epochs 3 --out whole"));
    let mut struck = [false; 2];
    for (fault, says) in [
        ("lost", "the device was lost"),
        ("hang", "the driver or the GPU hangs"),
        ("unmapped", "the driver or the GPU hangs"),
    ] {
        // From the first turn to behind the last one: before, in and after the first epoch.
        for after in [0, 3, 30, 34, 38, 42, 50] {
            let out = format!("{fault}-{after}");
            let run = folder.join(&out);
            let inject = format!("{fault}:{after}");
            let train = format!("{SMALL} --epochs 3 --out {out} --no-check");
            let output = wgrad(folder, &inject, &train);
            if output.status.success() {
                continue;
            }
            let error = failure(&inject, output);
            assert!(error.contains(says), "{inject}: {error}");
            let kept = run.join("checkpoint.safetensors").exists();
            struck[usize::from(kept)] = true;
            let resume = format!("wgrad train --resume {out}");
            assert_eq!(error.contains(&resume), kept, "{inject}: {error}");
            if kept {
                let rest = good(folder, &format!("train --resume {out}"));
                assert_eq!(hash(&rest), hash(&whole), "{inject}");
                assert_eq!(epochs(&run), 3, "{inject}");
            }
        }
    }
    assert_eq!(struck, [true; 2], "before and after the first checkpoint");
}

#[test]
fn a_lack_of_memory_names_the_batch_size_that_fits() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    common::write_model_and_data(folder);
    // Nothing was given yet, or less than a smaller batch takes.
    let error = bad(folder, "out-of-memory:0", &format!("{SMALL} --no-check"));
    assert!(error.contains("out of GPU memory"), "{error}");
    let advice = |error: &str| {
        let at = error.split("use --batch-size ").nth(1);
        let digits = at.unwrap_or_else(|| panic!("{error}")).split(' ').next();
        digits.unwrap().parse::<usize>().unwrap()
    };
    let mut advised = Vec::new();
    for after in 6..12 {
        let inject = format!("out-of-memory:{after}");
        let train = format!("{SMALL} --no-check --batch-size 96");
        let error = bad(folder, &inject, &train);
        assert!(error.contains("out of GPU memory at '"), "{error}");
        advised.push(advice(&error));
    }
    assert!(advised.iter().all(|b| b.is_power_of_two() && *b < 96));
    assert!(advised.is_sorted(), "more memory, more images: {advised:?}");
    // The datasets come last; where there is no room for a part of one either, smaller steps leave some.
    let mut refused = 0;
    for after in 12..40 {
        let inject = format!("out-of-memory:{after}");
        let output = wgrad(folder, &inject, &format!("{SMALL} --no-check --epochs 1"));
        let error = String::from_utf8(output.stderr).unwrap();
        if error.contains("'dataset slab'") {
            for word in ["after", "--micro-batch 10, which", "--batch-size 10 or"] {
                assert!(error.contains(word), "no {word:?} in {error}");
            }
            refused += 1;
        }
    }
    assert!(refused >= 2, "for training and for testing");
}

#[test]
fn a_driver_that_computes_nothing_is_noticed_before_the_training() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    common::write_model_and_data(folder);
    let train = format!("{SMALL} --epochs 1 --out run");
    let error = bad(folder, "idle:0", &train);
    for word in ["CPU twin", "never written", "--no-check", "wgrad verify"] {
        assert!(error.contains(word), "no {word:?} in {error}");
    }
    assert!(!folder.join("run").exists());
    let bench = "bench --model small.toml --steps-only";
    assert!(bad(folder, "idle:0", bench).contains("CPU twin"));
    // Whoever knows better goes on.
    let output = wgrad(folder, "idle:0", &format!("{train} --no-check"));
    assert!(output.status.success());
    assert!(
        wgrad(folder, "idle:0", &format!("{bench} --no-check"))
            .status
            .success()
    );
}

#[test]
fn the_check_passes_where_nothing_is_wrong_and_sees_every_kind_of_kernel() {
    let gpu = Gpu::open(&Choice::Best).expect("an adapter; sh scripts/test.sh installs one");
    verify::quick(&gpu, None, Precision::F32).unwrap();
    // From whichever submission on nothing is written, it shows.
    let mut submissions = 0;
    loop {
        gpu.inject(Fault::Idle, submissions);
        match verify::quick(&gpu, None, Precision::F32) {
            Ok(()) => break,
            Err(Error::Verify(_)) => submissions += 1,
            Err(other) => panic!("{submissions}: {other}"),
        }
    }
    assert!(
        submissions >= 6,
        "one for each kind of kernel, found {submissions}"
    );
}
