//! `wgrad bench` and the profile of a step: the shape of what they say, and what they refuse. How
//! fast anything is they do not assert.

mod common;

use assert_cmd::cargo::cargo_bin;
use serde_json::Value;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};
use wgrad::engine::{Engine, Split};
use wgrad::gpu::{Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::kernels::peak::peak_copy;
use wgrad::kernels::{Dtype, Step, View};
use wgrad::model::{Definition, initial_parameters};
use wgrad::plan::Options;
use wgrad::report::bench::measure_peak;
use wgrad::report::profile::Profile;

fn gpu() -> Arc<Gpu> {
    let gpu = Gpu::open(&Choice::Best)
        .unwrap_or_else(|e| panic!("these tests need an adapter: {e}; {NO_ADAPTER_HINT}"));
    Arc::new(gpu)
}

/// `wgrad bench --model small.toml …` in a folder that holds the model.
fn bench(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(cargo_bin("wgrad"))
        .current_dir(folder)
        .env_remove("RUST_LOG")
        .args(["bench", "--model", "small.toml"])
        .args(arguments)
        .output()
        .unwrap()
}

fn good(folder: &Path, arguments: &[&str]) -> String {
    let output = bench(folder, arguments);
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{arguments:?}: {err}");
    // Where it takes long, it says what it is at.
    assert!(
        err.lines().all(|l| l.starts_with("wgrad: ")),
        "{arguments:?}: {err}"
    );
    String::from_utf8(output.stdout).unwrap()
}

fn json(folder: &Path, arguments: &[&str]) -> Value {
    serde_json::from_str(&good(folder, arguments)).unwrap()
}

/// Asserts exit code 2 and one line that contains `expected`, before anything is measured.
fn refused(folder: &Path, arguments: &[&str], expected: &str) {
    let output = bench(folder, arguments);
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {err}");
    assert_eq!(err.lines().count(), 1, "{arguments:?}: {err}");
    assert!(err.contains(expected), "{arguments:?}: {err}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("small.toml"), common::MODEL).unwrap();
    let path = folder.path().to_path_buf();
    (folder, path)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

fn assert_summary(summary: &Value) {
    let [min, median, max] = ["min", "median", "max"].map(|key| number(&summary[key]));
    assert!(0.0 < min && min <= median && median <= max, "{summary}");
}

#[test]
fn the_report_has_its_documented_shape_and_compares_with_itself() {
    let (_guard, folder) = folder();
    let report = json(&folder, &["--json"]);
    assert_eq!(report["adapter"], gpu().report().name);
    assert_eq!(report["model"], "small");
    assert_eq!(report["batch_size"], 20);
    for key in ["gflops", "gb_per_second"] {
        assert!(number(&report["peak"][key]) > 0.0, "{}", report["peak"]);
    }
    for key in ["multiply_add_ns", "load", "loads", "read"] {
        assert!(number(&report["prices"][key]) > 0.0, "{}", report["prices"]);
    }
    let kernels = report["kernels"].as_array().unwrap();
    for kernel in kernels {
        assert_summary(&kernel["seconds"]);
        assert!(number(&kernel["gb_per_second"]) > 0.0, "{kernel}");
        assert!(number(&kernel["percent_of_peak"]) > 0.0, "{kernel}");
        let product = kernel["kernel"].as_str().unwrap().starts_with("conv2d");
        assert_eq!(kernel["gflops"].is_number(), product, "{kernel}");
        assert_eq!(kernel["variant"] != "", product, "{kernel}");
        assert_eq!(kernel.get("ratio"), None);
    }
    // Both passes of every layer, but for the gradient of the images.
    let has = |layer: &str, name: &str| {
        let same = |k: &&Value| k["layer"] == layer && k["kernel"] == name;
        kernels.iter().any(|k| same(&k))
    };
    assert!(has("conv2d1", "conv2d_forward") && has("conv2d1", "conv2d_backward_weight"));
    assert!(!has("conv2d1", "conv2d_backward_input") && has("dense1", "conv2d_backward_input"));
    assert!(has("max_pool2d1", "maxpool2d_backward4"));
    assert!(has("step", "gather_batch") && has("step", "adamw_update"));
    assert_summary(&report["step"]["images_per_second"]);
    assert!(number(&report["step"]["first_step_seconds"]) > 0.0);
    let busy = &report["step"]["busy_percent"];
    assert!(
        busy.is_null() || (1.0..=100.0).contains(&number(busy)),
        "{busy}"
    );
    if cfg!(target_os = "linux") {
        assert!(number(&report["peak_rss_mb"]) > 1.0);
    }

    std::fs::write(folder.join("old.json"), report.to_string()).unwrap();
    let compared = json(&folder, &["--json", "--compare", "old.json"]);
    for kernel in compared["kernels"].as_array().unwrap() {
        assert!(number(&kernel["ratio"]) > 0.0, "{kernel}");
    }
    let rates = [&report, &compared].map(|r| number(&r["step"]["images_per_second"]["median"]));
    let ratio = number(&compared["step"]["ratio"]);
    assert!(
        (ratio - rates[1] / rates[0]).abs() < 1e-9 * ratio,
        "{ratio}"
    );

    let table = good(&folder, &["--compare", "old.json"]);
    for text in [
        "% of peak",
        "× earlier",
        "images/s",
        "max_pool2d1",
        "prices  load",
    ] {
        assert!(table.contains(text), "{text} in {table}");
    }

    let with = |key: &str, value: Value| {
        let mut other = report.clone();
        other[key] = value;
        other.to_string()
    };
    let whole = report.to_string();
    for (text, expected) in [
        (with("adapter", "another".into()), "same adapter"),
        (with("model", "another".into()), "same model"),
        (with("batch_size", 21.into()), "same batch size"),
        (with("kernels", "none".into()), "wgrad bench --json"),
        (whole[..whole.len() / 2].to_string(), "wgrad bench --json"),
        (String::new(), "wgrad bench --json"),
    ] {
        std::fs::write(folder.join("other.json"), text).unwrap();
        refused(&folder, &["--compare", "other.json"], expected);
    }
}

#[test]
fn steps_alone_can_be_measured_also_on_the_cpu() {
    let (_guard, folder) = folder();
    for device in ["1", "cpu"] {
        let report = json(&folder, &["--device", device, "--steps-only", "--json"]);
        assert_summary(&report["step"]["images_per_second"]);
        assert_eq!(report["peak"], Value::Null);
        assert_eq!(report["kernels"], Value::Array(Vec::new()));
    }
    refused(&folder, &["--batch-size", "0"], "--batch-size");
    let kernels = ["--device", "cpu", "--kernels", "plain"];
    refused(&folder, &kernels, "--kernels");
}

#[test]
fn the_peak_is_measured_with_kernels_that_are_right() {
    let peak = measure_peak(&gpu()).unwrap();
    assert!(peak.gflops > 0.0 && peak.gb_per_second > 0.0, "{peak:?}");
}

#[test]
fn a_profile_names_every_dispatch_and_its_trace_is_in_order() {
    let gpu = gpu();
    let definition = Definition::parse(common::MODEL, "small.toml").unwrap();
    let model = definition
        .resolve(definition.input, definition.classes)
        .unwrap();
    let optimizer = &definition.recipe.optimizer;
    let batch = 6;
    let options = Options::default();
    let mut network = Engine::new(Some(gpu.clone()), &model, batch, optimizer, &options).unwrap();
    network
        .set_parameters(&initial_parameters(&model, 1))
        .unwrap();
    let images: Vec<u8> = (0..batch * 48).map(|i| (i * 37 % 251) as u8).collect();
    let labels = [0, 1, 2, 3, 0, 1];
    network
        .upload_dataset(Split::Train, images, &labels, &[0.01, -1.0])
        .unwrap();
    let step = Step {
        lr: 1e-3,
        bias_correction1: 0.5,
        bias_correction2: 0.5,
        ..Step::new(0, batch)
    };
    network
        .train_epoch(&[0, 1, 2, 3, 4, 5], &[step], &mut |_| {
            Ok(ControlFlow::Continue(()))
        })
        .unwrap();
    let profile = Profile::of(network.on_gpu().unwrap());
    if !gpu.report().timestamp_query {
        let refusal = profile.unwrap_err();
        assert!(refusal.to_string().contains("timestamp queries"));
        return;
    }
    let profile = profile.unwrap();

    let names = |layer: &str| -> Vec<&str> {
        let of = profile.entries.iter().filter(|e| e.layer == layer);
        of.map(|e| e.kernel.as_str()).collect()
    };
    assert_eq!(names("")[..2], ["gather_batch", "softmax_cross_entropy"]);
    assert_eq!(names("max_pool2d1").last(), Some(&"maxpool2d_backward4"));
    assert_eq!(names("dense1")[0], "conv2d_forward");
    let layers = profile.entries.iter().map(|e| &e.layer);
    for layer in layers.filter(|l| !l.is_empty()) {
        assert!(model.layers.iter().any(|l| l.name == *layer), "{layer}");
    }
    let rows = profile.rows();
    assert_eq!(rows.len(), profile.entries.len() + 1);
    assert!(rows.iter().all(|row| row.len() == Profile::HEADER.len()));
    assert!(profile.entries.iter().all(|e| e.seconds >= 0.0));

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    profile.write_trace("an adapter", &path).unwrap();
    let trace: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let of = |phase: &str| -> Vec<&Value> { events.iter().filter(|e| e["ph"] == phase).collect() };
    assert_eq!(of("M")[0]["args"]["name"], "an adapter");
    let spans = of("X");
    assert_eq!(spans.len(), profile.entries.len());
    let mut end = 0.0;
    for span in spans {
        let (start, duration) = (number(&span["ts"]), number(&span["dur"]));
        assert!(duration >= 0.0, "{span}");
        // A thousandth of a microsecond for rounding.
        assert!(start >= end - 1e-3, "{span} begins before {end}");
        end = start + duration;
        assert_eq!((&span["pid"], &span["tid"]), (&1.into(), &1.into()));
    }
    assert!(end > 0.0);
    let missing = folder.path().join("none").join("trace.json");
    let refusal = profile.write_trace("an adapter", &missing).unwrap_err();
    assert_eq!(refusal.to_string().lines().count(), 1);
}

#[test]
fn a_host_that_keeps_the_gpu_waiting_shows_in_the_busy_share() {
    let gpu = gpu();
    if !gpu.report().timestamp_query {
        assert!(gpu.start_clock().is_err());
        println!("skipped: {} has no timestamp queries", gpu.report().name);
        return;
    }
    let src = gpu.upload("source", &vec![1.0f32; 1 << 16]).unwrap();
    let dst = gpu.buffer("destination", 1 << 16).unwrap();
    let view = |tensor| View::whole(tensor, Dtype::F32, 1 << 16);
    let copy = peak_copy(view(0), view(1));
    let copy = gpu.dispatch_on(&copy, &[&src, &dst]).unwrap();
    let share = |pause: Duration| {
        gpu.start_clock().unwrap();
        for _ in 0..4 {
            gpu.submit("copy", &[&copy], 8).unwrap();
            gpu.wait_all().unwrap();
            std::thread::sleep(pause);
        }
        gpu.stop_clock().unwrap()
    };
    let start = Instant::now();
    let all = share(Duration::ZERO);
    // Pauses that are many times as long as the work, compiling included.
    let paused = share(5 * start.elapsed());
    assert!(paused > 0.0 && paused < 0.5 && all <= 1.0, "{paused} {all}");
    // Nothing was timed.
    assert_eq!(gpu.stop_clock().unwrap(), 0.0);
}
