//! The program as its users meet it: what it prints and leaves behind, and above all what it says
//! about bad input: one line on standard error, the right exit code, nothing damaged.

mod common;

use assert_cmd::cargo::cargo_bin;
use common::{contents, idx};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// A folder with a model, a dataset and nothing else, in which commands run.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        common::write_model_and_data(folder.path());
        Bench { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The command of a line of arguments.
    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(cargo_bin("wgrad"));
        command
            .current_dir(self.folder.path())
            .env_remove("RUST_LOG")
            .env_remove("COLUMNS")
            .args(arguments.split_whitespace());
        command
    }

    fn run(&self, arguments: &str) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Standard output of a command that must succeed, and be silent on standard error but for lines
    /// of progress where the machine is slow.
    fn good(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        let (out, err) = text(&output);
        assert!(output.status.success(), "{arguments}: {out}{err}");
        let progress = err.lines().all(|l| l.starts_with("wgrad: "));
        assert!(progress, "{arguments}: {err}");
        out
    }

    /// Asserts that a command fails with `code` and one line that contains each of `expected`.
    fn bad(&self, arguments: &str, code: i32, expected: &[&str]) {
        let output = self.run(arguments);
        let (_, err) = text(&output);
        let mut lines: Vec<&str> = err.lines().collect();
        lines.retain(|line| !line.starts_with("wgrad: "));
        let err = lines.join("\n");
        assert_eq!(output.status.code(), Some(code), "{arguments}: {err}");
        assert!(err.starts_with("error: "), "{arguments}: {err}");
        assert_eq!(err.lines().count(), 1, "{arguments}: {err}");
        for expected in expected {
            assert!(
                err.contains(expected),
                "{arguments}: no {expected:?} in {err}"
            );
        }
    }
}

fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}

/// The text with every break of a line between words undone.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The flags of a small training on the CPU.
const SMALL: &str = "--model small.toml --data shapes --device cpu";

/// The hash of the weights in a training's output.
fn hash(output: &str) -> String {
    let line = output.lines().find(|l| l.starts_with("weights  sha256 "));
    line.unwrap_or_else(|| panic!("no hash in {output}"))[16..].to_string()
}

/// Waits until the program, which must not end before, has made a file.
fn wait_for(child: &mut Child, file: &Path) {
    while !file.exists() {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "no {}: {ended:?}", file.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn train_reports_and_leaves_a_run_folder() {
    let bench = Bench::new();
    let out = bench.good(&format!("train {SMALL} --epochs 2 --seed 7"));
    assert!(out.contains("conv2d1"), "{out}");
    assert!(out.contains("device   CPU ("), "{out}");
    assert!(
        words(&out).contains("96 training and 40 test images of 8×6×1 in 4 classes"),
        "{out}"
    );
    let epochs: Vec<&str> = out.lines().filter(|l| l.starts_with("epoch ")).collect();
    assert_eq!(epochs.len(), 2, "{out}");
    for word in [
        "epoch 1/2",
        "  loss ",
        "  test ",
        " % ± ",
        " s  ",
        "images/s",
    ] {
        assert!(epochs[0].contains(word), "no {word:?} in {}", epochs[0]);
    }
    // Where it goes and how to go on is said first.
    let start = "run      runs/small-shapes-1\nresume   wgrad train --resume runs/small-shapes-1\n";
    assert!(out.starts_with(start), "{out}");
    // And last what to do with it.
    let end = "run      runs/small-shapes-1
report   runs/small-shapes-1/report.html
predict  wgrad predict runs/small-shapes-1 picture.png
serve    wgrad serve runs/small-shapes-1
export   wgrad export runs/small-shapes-1 --onnx model.onnx
";
    assert!(out.ends_with(end), "{out}");

    let run = bench.path("runs/small-shapes-1");
    let config = json(&fs::read_to_string(run.join("run.json")).unwrap());
    assert_eq!(config["parameter_sha256"], hash(&out));
    assert_eq!(config["seed"], 7);
    assert_eq!(config["finished_epochs"], 2);
    assert_eq!(config["recipe"]["epochs"], 2);
    assert_eq!(config["model"]["architecture"], common::MODEL);
    assert_eq!(config["wgrad"], env!("CARGO_PKG_VERSION"));
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines: Vec<_> = metrics.lines().map(json).collect();
    assert_eq!(lines.len(), 2);
    for key in [
        "epoch",
        "step",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "images_per_second",
        "seconds",
        "lr",
    ] {
        assert!(lines[1][key].is_number(), "{key} in {metrics}");
    }
    assert_eq!(
        (&lines[1]["epoch"], &lines[1]["step"]),
        (&2.into(), &10.into())
    );

    // The next run gets the next number, and the same seed the same weights.
    let again = bench.good(&format!("train {SMALL} --epochs 2 --seed 7"));
    assert!(
        again.contains("\nrun      runs/small-shapes-2\n"),
        "{again}"
    );
    assert_eq!(hash(&out), hash(&again));
}

/// Several processes that know nothing of each other would train the same, and write into one folder.
#[cfg(not(feature = "mpi"))]
#[test]
fn without_mpi_several_processes_are_refused_by_the_first() {
    let bench = Bench::new();
    let started = |rank: &str, ranks: &str| {
        let mut command = bench.command(&format!("train {SMALL} --epochs 1 --out run"));
        command.env("OMPI_COMM_WORLD_RANK", rank);
        command.env("OMPI_COMM_WORLD_SIZE", ranks);
        command.output().unwrap()
    };
    let first = started("0", "2");
    let (_, err) = text(&first);
    assert_eq!(first.status.code(), Some(2), "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
    for word in ["2 ranks", "--features mpi", "without mpirun"] {
        assert!(err.contains(word), "no {word:?} in {err}");
    }
    let second = started("1", "2");
    assert_eq!(text(&second), (String::new(), String::new()));
    assert!(!bench.path("run").exists());
    // One process is no company.
    assert!(started("0", "1").status.success());
}

#[test]
fn shards_are_part_of_the_recipe() {
    let bench = Bench::new();
    let out = bench.good(&format!("train {SMALL} --epochs 2 --shards 3 --out whole"));
    assert!(out.contains("shards 3"), "{out}");
    let plain = bench.good(&format!("train {SMALL} --epochs 2 --out plain"));
    assert_ne!(hash(&out), hash(&plain));
    bench.good(&format!(
        "train {SMALL} --epochs 2 --shards 3 --stop-after 1 --out halves"
    ));
    let halves = bench.good("train --resume halves");
    assert_eq!(hash(&halves), hash(&out));
    bench.bad(
        "train --resume whole --epochs 3 --shards 4",
        2,
        &["--shards 3", "found 4"],
    );
    bench.bad(
        &format!("train {SMALL} --shards 3 --micro-batch 4"),
        2,
        &["--micro-batch", "shards"],
    );
}

#[test]
fn batch_norms_are_synced_over_shards() {
    let bench = Bench::new();
    let small = fs::read_to_string(bench.path("small.toml")).unwrap();
    let (head, layers) = small.split_once("[[layer]]").unwrap();
    let normed = format!("{head}[[layer]]\ntype = \"batch_norm\"\n\n[[layer]]{layers}");
    fs::write(bench.path("small.toml"), normed).unwrap();
    let train = |flags: &str| bench.good(&format!("train {SMALL} --epochs 2 --shards 3 {flags}"));
    let out = train("--sync-batch-norm --out whole");
    assert!(out.contains("sync_batch_norm true"), "{out}");
    assert_ne!(hash(&train("--out apart")), hash(&out));
    train("--set sync_batch_norm=true --stop-after 1 --out halves");
    let halves = bench.good("train --resume halves");
    assert_eq!(hash(&halves), hash(&out));
    bench.bad(
        &format!("train {SMALL} --sync-batch-norm --micro-batch 4"),
        2,
        &["--micro-batch", "sync_batch_norm", "by `shards`"],
    );
}

#[test]
fn flags_override_the_recipe() {
    let bench = Bench::new();
    bench.good(&format!(
        "train {SMALL} --out run --epochs 1 --batch-size 13 --optimizer sgd --lr 0.02 --momentum 0.5 --weight-decay 0.001 --schedule cosine --limit 50"
    ));
    let config = json(&fs::read_to_string(bench.path("run/run.json")).unwrap());
    let expected = json(
        r#"{"optimizer": {"name": "sgd", "momentum": 0.5, "nesterov": false, "weight_decay": 0.001},
            "lr": 0.02, "schedule": "cosine", "epochs": 1, "batch_size": 13, "label_smoothing": 0.0}"#,
    );
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&config["recipe"][key], value, "{key}");
    }
    assert_eq!(config["data"]["training_images"], 50);
    assert_eq!(config["data"]["limit"], 50);
    assert_eq!(config["data"]["test_images"], 40);
    let metrics = json(&fs::read_to_string(bench.path("run/metrics.jsonl")).unwrap());
    assert_eq!(metrics["step"], 4);
}

/// Model file, recipe file, `--set`, flags: each has the last word over those before it.
#[test]
fn a_recipe_is_laid_over_a_model() {
    let bench = Bench::new();
    let recipe = "model = \"small.toml\"\nepochs = 1\nlr = 0.02\nbeta2 = 0.9\nlabel_smoothing = 0.1\nschedule = \"step\"\nstep_epochs = [1]\n";
    fs::create_dir(bench.path("recipes")).unwrap();
    fs::write(bench.path("recipes/mine.toml"), recipe).unwrap();
    fs::copy(bench.path("small.toml"), bench.path("recipes/small.toml")).unwrap();
    let config = |flags: &str| {
        let mine = "--recipe recipes/mine.toml --data shapes --device cpu --out run";
        let out = bench.good(&format!("train {mine} {flags}"));
        let config = json(&fs::read_to_string(bench.path("run/run.json")).unwrap());
        fs::remove_dir_all(bench.path("run")).unwrap();
        (out, config)
    };
    let (out, used) = config("");
    assert_eq!(used["model"]["name"], "small");
    let used = &used["recipe"];
    assert_eq!(used["lr"], 0.02);
    assert_eq!(
        used["schedule"],
        json(r#"{"step": {"epochs": [1], "factor": 0.1}}"#)
    );
    // What the recipe leaves out is the model's.
    assert_eq!(used["batch_size"], 20);
    let optimizer =
        r#"{"name": "adamw", "beta1": 0.9, "beta2": 0.9, "epsilon": 1e-8, "weight_decay": 0.01}"#;
    assert_eq!(used["optimizer"], json(optimizer));
    let described = "recipe adamw, step learning rate 0.02, batch size 20, epochs 1, label_smoothing 0.1, seed 1";
    assert!(words(&out).contains(described), "{out}");

    let (_, used) = config("--set lr=0.03 --set warm_up=0.5");
    assert_eq!(used["recipe"]["lr"], 0.03);
    assert_eq!(used["recipe"]["warm_up"], 0.5);
    let (_, used) = config("--lr 0.04 --set lr=0.03 --schedule linear --set clip_norm=2");
    assert_eq!(used["recipe"]["lr"], 0.04);
    assert_eq!(used["recipe"]["schedule"], "linear");
    assert_eq!(used["recipe"]["clip_norm"], 2.0);
    // Another optimiser takes nothing over from the one before.
    let (_, used) = config("--optimizer sgd --nesterov=false --freeze conv2d1 --freeze *.bias");
    let sgd = r#"{"name": "sgd", "momentum": 0.9, "nesterov": false, "weight_decay": 0.0}"#;
    assert_eq!(used["recipe"]["optimizer"], json(sgd));
    assert_eq!(used["recipe"]["lr"], 0.05);
    assert_eq!(
        used["recipe"]["groups"]["freeze"],
        json(r#"["conv2d1", "*.bias"]"#)
    );

    let mistake = format!("{recipe}momentum = 0.9\n");
    fs::write(bench.path("recipes/mine.toml"), mistake).unwrap();
    let arguments = "train --recipe recipes/mine.toml --data shapes --device cpu";
    let place = format!("{}:8: `momentum` belongs to", "recipes/mine.toml");
    bench.bad(arguments, 2, &[&place, "sgd", "adamw"]);
    assert!(!bench.path("runs").exists());
}

#[test]
fn recipes_are_listed_and_printed() {
    let bench = Bench::new();
    let out = bench.good("recipes");
    assert!(
        words(&out).contains("cifar-fast cifar-fast CIFAR-10"),
        "{out}"
    );
    assert!(out.contains("wgrad recipes NAME > mine.toml"), "{out}");
    let text = bench.good("recipes cifar-fast");
    assert!(text.contains("optimizer = \"muon\""), "{text}");
    bench.bad("recipes best-of-all", 2, &["'best-of-all'", "cifar-fast"]);
}

/// The test is deterministic, ends where the loss rises, and leaves a picture that can be read.
#[test]
fn a_learning_rate_is_found() {
    let bench = Bench::new();
    let other = format!("lr-find {SMALL} --out lr.png");
    bench.bad(&other, 2, &["SVG", "lr.png", ".svg"]);
    let test = format!("lr-find {SMALL} --steps 60 --out lr.svg");
    let out = bench.good(&test);
    for word in [
        "tested   ",
        "steepest ",
        "lowest   ",
        "suggest  ",
        "wgrad train --model small.toml --data shapes --device cpu --lr ",
        "plot     lr.svg",
    ] {
        assert!(words(&out).contains(&words(word)), "no {word:?} in {out}");
    }
    // The command that is suggested trains what was tested.
    let flags = "--limit 80 --sampler balanced --set clip_norm=5";
    let out = bench.good(&format!("{test} {flags} --set lr=1"));
    let command = format!("wgrad train {SMALL} {flags} --lr ");
    assert!(words(&out).contains(&command), "{out}");
    let svg = fs::read_to_string(bench.path("lr.svg")).unwrap();
    assert!(
        svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"),
        "{svg}"
    );
    for word in [
        "small on shapes: learning rates of adamw, batch size 20",
        "learning rate per step",
        "suggested: ",
    ] {
        assert!(svg.contains(word), "no {word:?} in the plot");
    }
    let first = json(&bench.good(&format!("{test} --json")));
    assert_eq!(first, json(&bench.good(&format!("{test} --json"))));
    let points = first["points"].as_array().unwrap();
    assert!((10..=60).contains(&points.len()), "{}", points.len());
    assert_eq!(points[0]["lr"], 1e-7);
    let suggested = first["suggested"].as_f64().unwrap();
    assert!((1e-5..1.0).contains(&suggested), "{suggested}");
    // The loss before the first update is that of no knowledge, about ln 4.
    let loss = points[0]["loss"].as_f64().unwrap();
    assert!((1.0..2.0).contains(&loss), "{loss}");
    // A step is what a training's step is: the first epoch's batches, 20 of 96 images each.
    let steps = |flags: &str| {
        json(&bench.good(&format!("lr-find {SMALL} --json {flags}")))["points"].clone()
    };
    let flat = steps("--optimizer sgd --from 1e-30 --to 1e-25 --steps 20");
    let losses: Vec<f64> = flat
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["loss"].as_f64().unwrap())
        .collect();
    assert_eq!(losses.len(), 20);
    // Rates that move nothing: the next epochs bring the same images in another order.
    let mean = |epoch: &[f64]| (20.0 * epoch[..4].iter().sum::<f64>() + 16.0 * epoch[4]) / 96.0;
    for epoch in losses.chunks(5) {
        assert!(
            (mean(epoch) - mean(&losses[..5])).abs() < 1e-5,
            "{losses:?}"
        );
    }
    for (flags, expected) in [
        ("--from 0", "found 0e0"),
        ("--from 1 --to 0.1", "found 1e0 and 1e-1"),
        ("--steps 5", "found 5"),
        ("--lr x", "--lr"),
    ] {
        bench.bad(&format!("lr-find {SMALL} {flags}"), 2, &[expected]);
    }
}

#[test]
fn several_seeds_have_a_mean_and_a_deviation() {
    let bench = Bench::new();
    let out = bench.good(&format!(
        "train {SMALL} --epochs 2 --lr 0.002 --seeds 1..3 --out all"
    ));
    let record =
        |folder: &str| json(&fs::read_to_string(bench.path(folder).join("seeds.json")).unwrap());
    let all = record("all");
    assert_eq!(all["seeds"], json("[1, 2, 3]"));
    let accuracies: Vec<f64> = all["runs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|run| run["test_accuracy"].as_f64().unwrap())
        .collect();
    let metrics = |seed: u64| {
        let text =
            fs::read_to_string(bench.path(&format!("all/seed-{seed}/metrics.jsonl"))).unwrap();
        json(text.lines().last().unwrap())["test_accuracy"]
            .as_f64()
            .unwrap()
    };
    assert_eq!(accuracies, [1, 2, 3].map(metrics));
    let mean = accuracies.iter().sum::<f64>() / 3.0;
    let squares: f64 = accuracies.iter().map(|a| (a - mean).powi(2)).sum();
    let close = |key: &str, expected: f64| {
        let found = all[key].as_f64().unwrap();
        assert!(
            (found - expected).abs() < 1e-12,
            "{key}: {found}, not {expected}"
        );
    };
    assert!(squares > 0.0, "{accuracies:?}");
    close("mean", mean);
    close("standard_deviation", (squares / 2.0).sqrt());
    let line = format!(
        "mean {:.2} % ± {:.2} (standard deviation) after the last epoch of 3 runs",
        100.0 * mean,
        100.0 * (squares / 2.0).sqrt()
    );
    assert!(words(&out).contains(&line), "no {line:?} in {out}");

    // Each is what it is by itself.
    let alone = bench.good(&format!(
        "train {SMALL} --epochs 2 --lr 0.002 --seed 2 --out alone"
    ));
    let of = |folder: &str| {
        json(&fs::read_to_string(bench.path(folder).join("run.json")).unwrap())["parameter_sha256"]
            .clone()
    };
    assert_eq!(of("all/seed-2"), of("alone"));
    assert!(out.contains(&hash(&alone)), "{out}");

    // Stopped and gone on with, and with one that was never begun.
    let part = bench.good(&format!(
        "train {SMALL} --epochs 2 --lr 0.002 --seeds 3,1,2 --stop-after 1 --out parts"
    ));
    assert!(
        part.contains("resume   wgrad train --resume parts\n"),
        "{part}"
    );
    assert!(record("parts")["mean"].is_number());
    fs::remove_dir_all(bench.path("parts/seed-2")).unwrap();
    let rest = bench.good("train --resume parts");
    let first = bench.path("parts/seed-1/metrics.jsonl");
    assert_eq!(fs::read_to_string(first).unwrap().lines().count(), 2);
    let mut expected = all.clone();
    let mut found = record("parts");
    for record in [&mut expected, &mut found] {
        for run in record["runs"].as_array_mut().unwrap() {
            run["seconds"] = 0.into();
        }
    }
    assert_eq!(found, expected, "{rest}");
    // Nothing is left to do.
    let again = bench.good("train --resume parts");
    let trained = again.lines().any(|l| l.starts_with("epoch "));
    assert!(!trained && words(&again).contains(&line), "{again}");
    bench.bad("train --resume parts --seed 4", 2, &["--seed", "found 4"]);
    // Not even of finished runs is anything asked for in silence.
    bench.bad("train --resume parts --lr 0.3", 2, &["--lr", "found 0.3"]);
    bench.bad(
        &format!("train {SMALL} --seeds 1,2 --out parts"),
        2,
        &["parts", "--out"],
    );
    // Averages of the weights have a mean of their own.
    let out = bench.good(&format!(
        "train {SMALL} --epochs 1 --average 0.9 --seeds 1,2 --out averaged"
    ));
    assert!(
        words(&out).contains("of 2 runs, of the average of the weights"),
        "{out}"
    );
    let averaged = record("averaged");
    let of = |run: usize| {
        averaged["runs"][run]["average_test_accuracy"]
            .as_f64()
            .unwrap()
    };
    let found = averaged["average_mean"].as_f64().unwrap();
    assert!((found - (of(0) + of(1)) / 2.0).abs() < 1e-12, "{averaged}");
    // One that diverges does not keep the others from their turn.
    let wild = format!("train {SMALL} --epochs 1 --lr 1e30 --seeds 1,2 --out wild");
    bench.bad(&wild, 1, &["diverged"]);
    let begun = [1, 2].map(|seed| bench.path(&format!("wild/seed-{seed}/run.json")).exists());
    assert_eq!(begun, [true; 2]);
    bench.bad("eval wild", 1, &["several seeds", "wild/seed-1"]);
    let page = fs::read_to_string(bench.path("wild/seed-2/report.html")).unwrap();
    assert!(page.contains("ended early: training diverged"), "{page}");
    assert!(record("wild")["mean"].is_null());
    bench.bad("train --resume wild", 1, &["diverged"]);
    // A run that cannot begin leaves nothing.
    bench.bad(
        &format!("train {SMALL} --seeds 1,2 --batch-size 97"),
        2,
        &["--batch-size"],
    );
    assert!(!bench.path("runs").exists());
}

#[test]
fn resume_goes_on_to_the_same_weights() {
    let bench = Bench::new();
    let whole = bench.good(&format!("train {SMALL} --epochs 3 --out whole"));
    bench.good(&format!("train {SMALL} --epochs 2 --out parts"));
    let rest = bench.good("train --resume parts --epochs 3");
    assert_eq!(
        rest.lines().filter(|l| l.starts_with("epoch ")).count(),
        1,
        "{rest}"
    );
    assert_eq!(hash(&whole), hash(&rest));
    let done = bench.good("train --resume parts");
    assert!(
        done.contains("nothing to train: all 3 epochs are finished"),
        "{done}"
    );
    assert_eq!(hash(&whole), hash(&done));
}

#[test]
fn killed_trainings_go_on_where_they_were() {
    let bench = Bench::new();
    let whole = bench.good(&format!("train {SMALL} --epochs 30 --out whole"));
    let mut command = bench.command(&format!("train {SMALL} --epochs 30 --out killed"));
    for milliseconds in [0, 7, 31, 59] {
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        wait_for(&mut child, &bench.path("killed/run.json"));
        std::thread::sleep(Duration::from_millis(milliseconds));
        child.kill().unwrap();
        child.wait().unwrap();
        command = bench.command("train --resume killed");
    }
    assert_eq!(hash(&whole), hash(&bench.good("train --resume killed")));
    let lines = |run: &str| {
        let metrics = fs::read_to_string(bench.path(run).join("metrics.jsonl")).unwrap();
        metrics.lines().count()
    };
    assert_eq!(lines("whole"), 30);
    assert_eq!(lines("killed"), 30);
}

#[test]
fn eval_gives_what_training_measured() {
    let bench = Bench::new();
    bench.good(&format!("train {SMALL} --epochs 4 --out run"));
    let metrics = fs::read_to_string(bench.path("run/metrics.jsonl")).unwrap();
    let last = json(metrics.lines().last().unwrap());
    let eval = json(&bench.good("eval run --device cpu --json"));
    assert_eq!(eval["accuracy"], last["test_accuracy"]);
    assert_eq!(eval["loss"], last["test_loss"]);
    assert_eq!(eval["images"], 40);
    let p = eval["accuracy"].as_f64().unwrap();
    let error = eval["accuracy_standard_error"].as_f64().unwrap();
    assert!((error - (p * (1.0 - p) / 40.0).sqrt()).abs() < 1e-12);
    let classes = eval["classes"].as_array().unwrap();
    let sum = |key: &str| {
        classes
            .iter()
            .map(|c| c[key].as_f64().unwrap())
            .sum::<f64>()
    };
    assert_eq!(sum("images"), 40.0);
    assert_eq!(sum("correct"), 40.0 * p);
    assert_eq!(sum("recall"), 4.0 * p, "the classes are equally many");
    // In one view unless the run or somebody says otherwise.
    assert_eq!(eval["views"], "one");
    let one = json(&bench.good("eval run --device cpu --json --views one"));
    assert_eq!(one, eval);
    let six = json(&bench.good("eval run --device cpu --json --views six"));
    assert_eq!(six["views"], "six");
    assert_ne!(six["loss"], eval["loss"]);
    let table = bench.good("eval run --device cpu --views mirror");
    assert!(table.contains("views     mirror"), "{table}");
    bench.bad(
        "eval run --device cpu --views 6",
        2,
        &["one, mirror or six", "'6'"],
    );
    let table = bench.good("eval run --data shapes --device cpu");
    assert!(
        table.contains("recall") && table.contains("40 test images"),
        "{table}"
    );
}

#[test]
#[cfg(target_os = "linux")]
fn inspect_needs_no_gpu() {
    let bench = Bench::new();
    let output = without_adapters(bench.command("inspect lenet5 --batch-size 64"));
    let (out, err) = text(&output);
    assert_eq!(err, "");
    for word in [
        "conv2d2",
        "61,706",
        "parameters",
        "activations",
        "total",
        "batch size 64",
    ] {
        assert!(out.contains(word), "no {word:?} in {out}");
    }
    let small = bench.good("inspect small.toml");
    assert!(
        small.contains("8×6×4") && small.contains("batch size 20"),
        "{small}"
    );
    let graph = bench.good("inspect resnet9 --dot");
    assert!(
        graph.starts_with("digraph \"resnet9\" {\n") && graph.ends_with("}\n"),
        "{graph}"
    );
    assert!(graph.contains("v0 -> v1 [label=\"32×32×3\"]"), "{graph}");
    bench.bad(
        "inspect lenet5 --batch-size 0",
        2,
        &["--batch-size", "found 0"],
    );
    bench.bad("inspect no-such-model", 2, &["no-such-model", "lenet5"]);
}

/// Runs a command where the Vulkan loader finds no driver.
#[cfg(target_os = "linux")]
fn without_adapters(mut command: Command) -> Output {
    command
        .env("VK_DRIVER_FILES", "/nonexistent.json")
        .env("VK_ICD_FILENAMES", "/nonexistent.json")
        .output()
        .unwrap()
}

#[test]
#[cfg(target_os = "linux")]
fn without_an_adapter_the_cpu_trains_and_says_so() {
    let bench = Bench::new();
    let output = without_adapters(
        bench.command("train --model small.toml --data shapes --epochs 1 --out run"),
    );
    let (out, err) = text(&output);
    assert_eq!((output.status.code(), err.as_str()), (Some(0), ""), "{out}");
    assert_eq!(out.matches("adapter found").count(), 1, "{out}");
    assert!(words(&out).contains("mesa-vulkan-drivers"), "{out}");
    for arguments in [
        "train --device gpu --data shapes --model small.toml",
        "devices",
        "verify",
    ] {
        let output = without_adapters(bench.command(arguments));
        let (_, err) = text(&output);
        assert_eq!(output.status.code(), Some(1), "{err}");
        assert!(
            err.contains("expected ") && err.contains("mesa-vulkan-drivers"),
            "{err}"
        );
        assert_eq!(err.lines().count(), 1, "{err}");
    }
}

#[test]
fn devices_and_verify_speak_json() {
    let bench = Bench::new();
    let devices = json(&bench.good("devices --json"));
    let devices = devices.as_array().unwrap();
    let auto: Vec<_> = devices.iter().filter(|d| d["auto"] == true).collect();
    assert_eq!(auto.len(), 1, "{devices:?}");
    assert_ne!(auto[0]["software"], true, "{devices:?}");
    assert_eq!(devices[devices.len() - 1]["kind"], "CPU");
    for (i, adapter) in devices[..devices.len() - 1].iter().enumerate() {
        assert_eq!(adapter["number"], i + 1);
        let arithmetic = &adapter["arithmetic"];
        let error = adapter["arithmetic_error"].as_str();
        assert_eq!(arithmetic.is_null(), error.is_some(), "{adapter}");
        if !arithmetic.is_null() {
            assert_eq!(arithmetic["sha256"].as_str().unwrap().len(), 64);
            assert!(arithmetic["division"]["exact"].as_f64().unwrap() > 0.0);
        }
    }
    assert!(devices[0]["max_storage_binding_bytes"].as_u64().unwrap() > 0);
    let name = devices[0]["name"].as_str().unwrap();
    assert!(bench.good("devices").contains(name));
    // The twins alone; every kernel on the GPU is what tests/kernels.rs is for.
    let verify = json(&bench.good("verify --device cpu --json"));
    assert_eq!(verify["passed"], true);
    assert!(verify["cases"].as_array().unwrap().len() > 5);
    for case in verify["cases"].as_array().unwrap() {
        assert!(
            case["worst_error"].as_f64() <= case["tolerance"].as_f64(),
            "{case}"
        );
    }
    assert!(
        verify["left_out"][0]
            .as_str()
            .unwrap()
            .contains("no adapter")
    );
}

#[test]
fn auto_leaves_a_software_adapter_alone() {
    let bench = Bench::new();
    let devices = json(&bench.good("devices --json"));
    let adapters = &devices.as_array().unwrap()[..];
    let found = adapters.iter().position(|d| d["software"] == true);
    let Some(found) = found else {
        println!("skipped: no software adapter here");
        return;
    };
    let small = "train --model small.toml --data shapes --epochs 1";
    let software = adapters[found]["name"].as_str().unwrap();
    let hardware = adapters.iter().any(|d| d["software"] == false);
    let auto = bench.good(small);
    assert_eq!(auto.contains("device   CPU ("), !hardware, "{auto}");
    let words = words(&auto);
    for word in ["so the CPU does the work", software, "--device software"] {
        assert_eq!(words.contains(word), !hardware, "{word}: {auto}");
    }
    if !hardware {
        bench.bad(
            &format!("{small} --device gpu"),
            1,
            &["a hardware adapter", software],
        );
        bench.bad("verify --device auto", 1, &["a hardware adapter"]);
    }
    // By kind, by number and by name.
    let first_word = software.split(' ').next().unwrap();
    for device in ["software", &format!("{}", found + 1), first_word] {
        let out = bench.good(&format!("{small} --device {device}"));
        let line = self::words(&out);
        assert!(
            line.contains(&format!("device {software}")),
            "{device}: {line}"
        );
        assert!(!out.contains("the CPU does the work"), "{out}");
    }
    let beyond = adapters.len();
    bench.bad(
        &format!("{small} --device {beyond}"),
        2,
        &["number", &format!("found {beyond}"), software],
    );
}

#[test]
fn wgpu_backend_is_honoured_or_refused() {
    let bench = Bench::new();
    for command in ["devices", "train --data shapes --model small.toml"] {
        for nonsense in ["cuda", "gl", ""] {
            let output = bench
                .command(command)
                .env("WGPU_BACKEND", nonsense)
                .output()
                .unwrap();
            let (_, err) = text(&output);
            assert_eq!(output.status.code(), Some(2), "{err}");
            assert_eq!(err.lines().count(), 1, "{err}");
            assert!(err.contains("WGPU_BACKEND"), "{err}");
        }
    }
    if !cfg!(target_os = "macos") {
        let output = bench
            .command("train --data shapes --model small.toml --device gpu")
            .env("WGPU_BACKEND", "metal")
            .output()
            .unwrap();
        let (_, err) = text(&output);
        assert_eq!(output.status.code(), Some(1), "{err}");
        assert!(err.contains("WGPU_BACKEND=metal"), "{err}");
    }
    // Each system has one of these two at most.
    for backend in ["metal", "vulkan"] {
        let output = bench
            .command("devices --json")
            .env("WGPU_BACKEND", backend)
            .output()
            .unwrap();
        let devices = json(&text(&output).0);
        let adapters = devices.as_array().unwrap().iter();
        for adapter in adapters.filter(|d| d["kind"] != "CPU") {
            let found = adapter["backend"].as_str().unwrap().to_lowercase();
            assert_eq!(found, backend);
        }
        if backend == "metal" && !cfg!(target_os = "macos") {
            assert_eq!(output.status.code(), Some(1));
        }
    }
}

#[test]
fn everything_fits_80_columns() {
    let bench = Bench::new();
    // A name that asks for more, and numbers of every length.
    let wide = common::MODEL.replace("out_channels = 4", "out_channels = 123456");
    fs::write(bench.path("wide.toml"), wide).unwrap();
    for arguments in [
        &format!("train {SMALL} --epochs 11 --out run"),
        "train --resume run --epochs 12",
        "train --model small.toml --data shapes --epochs 1 --device 1 --trace-transfers",
        "train --model small.toml --data shapes --epochs 1",
        "eval run --device cpu",
        "export run --onnx net.onnx --safetensors w.safetensors --pytorch net.py",
        "import net.onnx",
        "inspect default",
        "inspect vgg-cifar",
        "inspect lenet5",
        "inspect wide.toml --batch-size 256",
        "devices",
        "verify --device cpu",
        "bench --model small.toml --no-tune",
        "bench --model small.toml --device cpu --steps-only",
        "--help",
        "recipes",
        "lr-find --model small.toml --data shapes --device cpu",
        "train --help",
        "lr-find --help",
        "export --help",
        "import --help",
        "bench --help",
        "verify --help",
    ] {
        let output = bench.run(arguments);
        let (out, err) = text(&output);
        assert!(output.status.success(), "{arguments}: {err}");
        assert!(!out.is_empty(), "{arguments}");
        for line in out.lines() {
            // What is one word, a path say, is not broken.
            let one_word = !line.trim().contains(' ');
            let columns = line.chars().count();
            assert!(columns <= 80 || one_word, "{arguments}: {columns}: {line}");
        }
    }
    // Whoever has more columns sees more.
    let wide = bench
        .command("verify --device cpu")
        .env("COLUMNS", "160")
        .output()
        .unwrap();
    assert!(text(&wide).0.contains("worst case"), "{wide:?}");
}

#[test]
fn a_pipe_hears_of_the_training_every_ten_seconds() {
    let bench = Bench::new();
    let mut child = bench
        .command(&format!("train {SMALL} --epochs 1000000 --out run"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut error = std::io::BufReader::new(child.stderr.take().unwrap());
    let start = std::time::Instant::now();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut error, &mut line).unwrap();
    let elapsed = start.elapsed();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(elapsed < Duration::from_secs(20), "{elapsed:?}");
    assert!(line.starts_with("wgrad: "), "{line}");
    for word in ["epoch ", "/1000000"] {
        assert!(
            line.contains(word) || line.contains("evaluating, "),
            "{line}"
        );
    }
}

#[test]
fn transfers_stay_small() {
    let bench = Bench::new();
    let out =
        // The best adapter, whatever it is.
        bench.good("train --model small.toml --data shapes --epochs 2 --out run --trace-transfers --device 1");
    let second = out
        .split("transfers in epoch 2: ")
        .nth(1)
        .unwrap_or_else(|| panic!("{out}"));
    // 96 numbers of the order, five rows of the step table, a few counters, 40 predictions.
    let total = second.split(" without checkpoint").next().unwrap();
    assert!(total.ends_with("B") && !total.contains("MiB"), "{total}");
    assert!(
        second.contains("order") && second.contains("metrics"),
        "{second}"
    );
    assert!(!second.contains("images"), "{second}");
}

#[test]
fn flags_out_of_range_are_refused_before_any_work() {
    let bench = Bench::new();
    let found = |value: &str| format!("found {value}");
    for (flag, value) in [
        ("--batch-size", "0"),
        ("--batch-size", "97"),
        ("--epochs", "0"),
        ("--stop-after", "0"),
        ("--stop-after", "4"),
        ("--limit", "0"),
        ("--lr", "0"),
        ("--lr", "-0.1"),
        ("--lr", "NaN"),
        ("--lr", "inf"),
        ("--lr", "1e-60"),
        ("--momentum", "1"),
        ("--momentum", "-0.1"),
        ("--weight-decay", "-1"),
    ] {
        let sgd = if flag == "--momentum" {
            "--optimizer sgd"
        } else {
            ""
        };
        bench.bad(
            &format!("train {SMALL} {sgd} {flag} {value}"),
            2,
            &[flag, &found(value)],
        );
    }
    bench.bad(
        &format!("train {SMALL} --momentum 0.5"),
        2,
        &["--momentum", "sgd", "adamw"],
    );
    bench.bad(
        &format!("train {SMALL} --limit 5 --batch-size 6"),
        2,
        &["5 training images", "found 6"],
    );
    for (flag, value) in [
        ("--batch-size", "many"),
        ("--batch-size", "-1"),
        ("--stop-after", "-1"),
        ("--checkpoint-every", "0"),
        ("--checkpoint-every", "10d"),
        ("--seed", "1.5"),
        ("--optimizer", "adam"),
        ("--schedule", "poly"),
        ("--micro-batch", "0"),
        ("--nesterov=1", ""),
        ("--bias-lr", "-1"),
        ("--head-lr", "x"),
        ("--warm-up", "3"),
        ("--clip-norm", "0"),
        ("--average", "1"),
        ("--label-smoothing", "1"),
        ("--views", "two"),
        ("--patience", "0"),
        ("--set", "lr"),
        ("--set lr=", "0"),
        ("--set augment.rotate=", "181"),
        ("--set rate=", "1"),
        ("--seeds", "5..1"),
        ("--conv", "fast"),
        ("--kernels", "best"),
    ] {
        // Behind an =, the value is a part of the flag's argument.
        let arguments = format!("train {SMALL} {flag} {value}").replace("= ", "=");
        bench.bad(
            &arguments,
            2,
            &[flag.trim_end_matches("=1").trim_end_matches('='), value],
        );
    }
    bench.bad(
        &format!("train {SMALL} --seeds 1,2 --seed 1"),
        2,
        &["--seeds", "--seed"],
    );
    bench.bad(
        &format!("train {SMALL} --conv explicit"),
        2,
        &["--conv", "CPU"],
    );
    bench.bad(
        &format!("train {SMALL} --profile"),
        2,
        &["--profile", "CPU"],
    );
    bench.bad(
        "train --model small.toml --data shapes --device no-such-gpu",
        2,
        &["no-such-gpu", "there is 1 '"],
    );
    bench.bad(
        "train --recipe best-of-all",
        2,
        &["'best-of-all'", "cifar-fast"],
    );
    bench.bad(
        "train --model no-such-model",
        2,
        &["no-such-model", "lenet5"],
    );
    bench.bad("train --model no-such.toml", 1, &["no-such.toml"]);
    bench.bad("train --bogus", 2, &["--bogus"]);
    bench.bad("", 2, &["train", "verify"]);
    assert!(!bench.path("runs").exists());
}

#[test]
fn bad_data_is_refused() {
    let bench = Bench::new();
    let train = |damage: &dyn Fn(&Path), code: i32, expected: &[&str]| {
        let data = bench.path("shapes");
        let good = contents(&data);
        damage(&data);
        bench.bad(&format!("train {SMALL}"), code, expected);
        for (name, bytes) in &good {
            fs::write(data.join(name), bytes).unwrap();
        }
    };
    let images = "train-images-idx3-ubyte";
    let labels = "train-labels-idx1-ubyte";
    let (pixels, classes) = common::images(96, 1);
    let write = |name: &'static str, bytes: Vec<u8>| {
        move |data: &Path| fs::write(data.join(name), &bytes).unwrap()
    };

    let whole = idx(&[96, 8, 6], &pixels);
    let cut = whole[..whole.len() - 1].to_vec();
    train(
        &write(images, cut),
        2,
        &[images, "expected 4608 bytes", "found 4607"],
    );
    let longer = [&whole[..], &[0]].concat();
    train(
        &write(images, longer),
        2,
        &[images, "expected 4608 bytes", "more"],
    );
    let mut magic = whole.clone();
    magic[3] = 9;
    train(&write(images, magic), 2, &[images, "00000803", "00000809"]);
    train(&write(images, vec![]), 2, &[images, "found nothing"]);
    train(&write(images, idx(&[0, 8, 6], &[])), 2, &[images, "0×8×6"]);
    train(&write(images, idx(&[u32::MAX; 3], &pixels)), 2, &[images]);
    train(
        &write(labels, idx(&[95], &classes[..95])),
        2,
        &[labels, "96 images", "found 95"],
    );
    let gzip = [&[0x1f, 0x8b, 8, 0][..], &whole].concat();
    train(&write(images, gzip), 2, &[images, "gzip"]);
    let other_size = idx(&[40, 6, 8], &common::images(40, 2).0);
    train(
        &write("t10k-images-idx3-ubyte", other_size),
        2,
        &["8×6×1", "6×8×1"],
    );
    train(
        &|data| fs::remove_file(data.join(labels)).unwrap(),
        2,
        &["shapes", labels],
    );

    bench.bad("train --data no-such-folder", 2, &["no-such-folder"]);
    bench.bad("train --data small.toml", 2, &["small.toml", "folder"]);
    // Good after all.
    assert!(!bench.path("runs").exists());
    bench.good(&format!("train {SMALL} --epochs 1"));
}

#[test]
fn a_label_that_invents_classes_is_warned_about() {
    let bench = Bench::new();
    let labels = bench.path("shapes/train-labels-idx1-ubyte");
    let mut bytes = fs::read(&labels).unwrap();
    *bytes.last_mut().unwrap() = 11;
    fs::write(&labels, bytes).unwrap();
    let out = bench.good(&format!("train {SMALL} --epochs 1 --out run"));
    assert!(
        words(&out).contains("warning: no training image in classes 4–10 of 12"),
        "{out}"
    );
}

#[test]
#[cfg(target_os = "linux")]
fn a_folder_whose_name_is_no_unicode_is_a_folder() {
    use std::os::unix::ffi::OsStrExt;
    let bench = Bench::new();
    let name = std::ffi::OsStr::from_bytes(b"run-\xff");
    let train = bench
        .command(&format!("train {SMALL} --epochs 1 --out"))
        .arg(name)
        .output()
        .unwrap();
    assert!(train.status.success(), "{train:?}");
    for arguments in [
        "eval --device cpu --json",
        "eval --device cpu",
        "train --resume",
    ] {
        let output = bench.command(arguments).arg(name).output().unwrap();
        assert!(output.status.success(), "{arguments}: {output:?}");
    }
}

#[test]
fn what_takes_more_memory_than_there_is_is_refused() {
    let bench = Bench::new();
    // 8·6 inputs and 20 million units twice: more parameters than the kernels index, or than fit.
    let units = |n: usize| {
        let layers = format!("type = \"dense\"\nunits = {n}\n\n[[layer]]\ntype = \"dense\"\n");
        common::MODEL.replace("type = \"dense\"\n", &layers)
    };
    fs::write(bench.path("huge.toml"), units(15_000_000)).unwrap();
    let train = "train --model huge.toml --data shapes --device cpu --batch-size 96";
    // 12·15·10⁶ + 5·15·10⁶ parameters: 4 GB, and three times that with optimiser and gradient; and a
    // partial gradient for each of 32 tasks: 90 GB more.
    bench.bad(train, 2, &["free memory", "batch size 96", "GiB"]);
    for command in [
        "inspect small.toml",
        "bench --model small.toml --device cpu --steps-only",
    ] {
        let batch = format!("{command} --batch-size 18446744073709551615");
        bench.bad(&batch, 2, &["--batch-size", "found 18446744073709551615"]);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn the_host_holds_the_images_once() {
    let bench = Bench::new();
    let data = bench.path("shapes");
    let count = 10_000;
    let images = vec![0; count * 100 * 100];
    let file = idx(&[count as u32, 100, 100], &images);
    fs::write(data.join("train-images-idx3-ubyte"), file).unwrap();
    let labels: Vec<u8> = (0..count).map(|i| (i % 4) as u8).collect();
    let file = idx(&[count as u32], &labels);
    fs::write(data.join("train-labels-idx1-ubyte"), file).unwrap();
    let file = idx(&[40, 100, 100], &images[..40 * 100 * 100]);
    fs::write(data.join("t10k-images-idx3-ubyte"), file).unwrap();
    drop(images);

    let mut child = bench
        .command(&format!("train {SMALL} --epochs 1 --out run"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let id = child.id();
    let peak = || {
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<usize>().ok());
        kib.unwrap_or(0) << 10
    };
    // The folder is made when the images are read, just before the engine takes them.
    wait_for(&mut child, &bench.path("run/run.json"));
    std::thread::sleep(Duration::from_secs(1));
    let peak = peak();
    child.kill().unwrap();
    child.wait().unwrap();
    let set = count * 100 * 100;
    assert!(peak > set && peak < set + set / 2, "{peak} bytes for {set}");
}

#[test]
fn bad_models_are_refused_with_their_line() {
    let bench = Bench::new();
    let line = |text: &str| {
        let before = common::MODEL.split(text).next().unwrap();
        before.matches('\n').count() + 1
    };
    for (old, new, expected) in [
        ("padding = 1", "paddign = 1", "paddign"),
        ("kernel = 3", "kernel = \"3\"", "found \"3\""),
        ("type = \"max_pool2d\"", "type = \"maxpool\"", "maxpool"),
        ("lr = 0.01", "lr = -1.0", "-1"),
        ("optimizer = \"adamw\"", "optimizer = \"adam\"", "adam"),
    ] {
        fs::write(bench.path("bad.toml"), common::MODEL.replace(old, new)).unwrap();
        let place = format!("bad.toml:{}: ", line(old));
        bench.bad(
            "train --model bad.toml --data shapes --device cpu",
            2,
            &[&place, expected],
        );
        bench.bad("inspect bad.toml", 2, &[&place, expected]);
    }
    // A kernel that is larger than what it gets, and an end without one value per class.
    fs::write(
        bench.path("bad.toml"),
        common::MODEL.replace("kernel = 3", "kernel = 11"),
    )
    .unwrap();
    bench.bad(
        "train --model bad.toml --data shapes --device cpu",
        2,
        &["bad.toml:13: ", "11"],
    );
    let units = common::MODEL.replace("\"classes\"", "3");
    fs::write(bench.path("bad.toml"), units).unwrap();
    bench.bad(
        "train --model bad.toml --data shapes --device cpu",
        2,
        &["bad.toml:", "4 classes"],
    );
    assert!(!bench.path("runs").exists());
}

#[test]
fn folders_are_never_overwritten() {
    let bench = Bench::new();
    fs::create_dir(bench.path("full")).unwrap();
    fs::write(bench.path("full/thesis.txt"), "years of work").unwrap();
    bench.bad(
        &format!("train {SMALL} --out full"),
        2,
        &["full", "--out", "--resume"],
    );
    assert_eq!(contents(&bench.path("full")).len(), 1);
    // An empty one is fine.
    fs::create_dir(bench.path("empty")).unwrap();
    bench.good(&format!("train {SMALL} --epochs 1 --out empty"));
    // Places where nothing can be written.
    bench.bad(
        &format!("train {SMALL} --out small.toml"),
        1,
        &["cannot create small.toml"],
    );
    bench.bad(
        &format!("train {SMALL} --out small.toml/run"),
        1,
        &["cannot create small.toml/run"],
    );
    if cfg!(target_os = "linux") {
        bench.bad(
            &format!("train {SMALL} --out /proc/run"),
            1,
            &["cannot create /proc/run"],
        );
    }
    assert_eq!(
        fs::read_to_string(bench.path("small.toml")).unwrap(),
        common::MODEL
    );
}

#[test]
fn a_resume_of_something_else_is_refused() {
    let bench = Bench::new();
    bench.good(&format!("train {SMALL} --epochs 2 --out run"));
    let before = contents(&bench.path("run"));
    let wider = common::MODEL.replace("out_channels = 4", "out_channels = 5");
    fs::write(bench.path("wider.toml"), wider).unwrap();
    for (flag, run, given) in [
        ("--model", "'small'", "wider.toml"),
        ("--batch-size", "20", "21"),
        ("--optimizer", "adamw", "sgd"),
        ("--lr", "0.01", "0.02"),
        ("--weight-decay", "0.01", "0.5"),
        ("--schedule", "constant", "cosine"),
        ("--seed", "1", "2"),
        ("--limit", "none", "50"),
    ] {
        let arguments = format!("train --resume run --epochs 3 {flag} {given}");
        bench.bad(&arguments, 2, &[flag, run, given, "in run was started"]);
    }
    bench.bad("train --resume run --data mnist", 2, &["8×6×1", "28×28×1"]);
    bench.bad(
        "eval run --data mnist --device cpu",
        2,
        &["8×6×1", "28×28×1"],
    );
    bench.bad(
        "train --resume run --epochs 1",
        2,
        &["--epochs", "2", "found 1"],
    );
    bench.bad("train --resume run --out other", 2, &["--resume", "--out"]);
    bench.bad("train --resume nowhere", 1, &["nowhere", "run.json"]);
    bench.bad("train --resume shapes", 1, &["shapes", "run.json"]);
    bench.bad("eval nowhere", 1, &["nowhere", "run.json"]);
    assert!(contents(&bench.path("run")) == before);
    // Repeating what the run has is no contradiction.
    bench.good(
        "train --resume run --epochs 3 --model small.toml --data shapes --batch-size 20 --optimizer adamw --lr 0.01 --seed 1",
    );
}

#[test]
fn damaged_run_folders_are_refused() {
    let bench = Bench::new();
    bench.good(&format!("train {SMALL} --epochs 1 --out run"));
    let run = bench.path("run");
    for (file, command) in [
        ("run.json", "train --resume run --epochs 2"),
        ("checkpoint.safetensors", "train --resume run --epochs 2"),
        ("metrics.jsonl", "train --resume run --epochs 2"),
        ("model.safetensors", "eval run --device cpu"),
    ] {
        let good = fs::read(run.join(file)).unwrap();
        fs::write(run.join(file), &good[..good.len() / 2]).unwrap();
        let before = contents(&run);
        bench.bad(command, 1, &[file]);
        assert!(contents(&run) == before, "{file}");
        fs::write(run.join(file), good).unwrap();
    }
    let checkpoint = fs::read(run.join("checkpoint.safetensors")).unwrap();
    fs::remove_file(run.join("checkpoint.safetensors")).unwrap();
    let before = contents(&run);
    bench.bad(
        "train --resume run --epochs 2",
        1,
        &["checkpoint.safetensors", "1 finished epochs", "found none"],
    );
    assert!(contents(&run) == before);
    fs::write(run.join("checkpoint.safetensors"), checkpoint).unwrap();
    fs::remove_file(run.join("model.safetensors")).unwrap();
    bench.bad(
        "eval run --device cpu",
        1,
        &["model.safetensors", "--resume"],
    );
    bench.good("train --resume run --epochs 2");
    bench.good("eval run --device cpu");
    // From the second checkpoint on there is one to fall back on, and a line that says so.
    fs::write(run.join("checkpoint.safetensors"), b"damaged").unwrap();
    let out = bench.good("train --resume run --epochs 3");
    let lines: Vec<_> = out.lines().filter(|l| l.contains("damaged")).collect();
    assert_eq!(lines.len(), 1, "{out}");
    assert!(lines[0].contains("after epoch 1"), "{out}");
    let whole = bench.good(&format!("train {SMALL} --epochs 3 --out whole"));
    assert_eq!(hash(&out), hash(&whole));
}

#[test]
fn a_resume_on_changed_data_is_refused() {
    let bench = Bench::new();
    bench.good(&format!("train {SMALL} --epochs 1 --out run"));
    let before = contents(&bench.path("run"));
    let file = bench.path("shapes/train-images-idx3-ubyte");
    let good = fs::read(&file).unwrap();
    let mut other = good.clone();
    other[1000] ^= 1;
    fs::write(&file, other).unwrap();
    bench.bad(
        "train --resume run --epochs 2",
        2,
        &["shapes", "training images", "SHA-256", "start a new run"],
    );
    assert!(contents(&bench.path("run")) == before);
    // Other data is what --data of eval is for.
    bench.good("eval run --device cpu --data shapes");
    // The same data may lie elsewhere by now.
    fs::write(&file, good).unwrap();
    fs::rename(bench.path("shapes"), bench.path("moved")).unwrap();
    bench.good("train --resume run --epochs 2 --data moved");
    bench.good("train --resume run --epochs 3");
}

#[test]
fn the_batches_of_what_ships_suit_a_small_folder() {
    let bench = Bench::new();
    let used = |flags: &str| {
        let out = bench.good(&format!(
            "train --data shapes --device cpu --epochs 1 --out run {flags}"
        ));
        let config = json(&fs::read_to_string(bench.path("run/run.json")).unwrap());
        fs::remove_dir_all(bench.path("run")).unwrap();
        let recipe = &config["recipe"];
        (
            words(&out),
            recipe["batch_size"].clone(),
            recipe["lr"].clone(),
        )
    };
    // SGD's rate follows, that of a flag does not, and what the user has written is left alone.
    let (out, batch, lr) = used("--model mlp-sigmoid");
    assert_eq!(batch, 8);
    let text = fs::read_to_string("models/mlp-sigmoid.toml").unwrap();
    let own: f64 = text
        .lines()
        .find_map(|l| l.strip_prefix("lr = ")?.split(' ').next()?.parse().ok())
        .unwrap();
    assert!(
        (lr.as_f64().unwrap() / own - 0.5).abs() < 0.01,
        "{lr} of {own}"
    );
    assert!(
        out.contains("batch size 8 instead of the model's 32, and learning rate"),
        "{out}"
    );
    let (out, batch, lr) = used("--model mlp-sigmoid --lr 0.25");
    assert_eq!((batch, lr), (8.into(), 0.25.into()));
    assert!(!out.contains("and learning rate"), "{out}");
    fs::write(bench.path("mine.toml"), "batch_size = 48\nlr = 0.5").unwrap();
    let (_, batch, lr) = used("--model mlp-sigmoid --recipe mine.toml");
    assert_eq!((batch, lr), (48.into(), 0.5.into()));
    let (out, batch, lr) = used("--model small.toml");
    assert_eq!((batch, lr), (20.into(), 0.01.into()));
    assert!(!out.contains("instead of"), "{out}");
}

#[test]
fn quick_trials_are_quick() {
    let bench = Bench::new();
    let out = bench.good(&format!("train {SMALL} --epochs 2 --limit 12 --out run"));
    assert!(out.contains("12 training and 12 test images"), "{out}");
    let line = "batch size 12 instead of the model's 20: there are 12 training images";
    assert!(out.contains(line), "{out}");
    let config = json(&fs::read_to_string(bench.path("run/run.json")).unwrap());
    assert_eq!(config["recipe"]["batch_size"], 12);
    bench.good("train --resume run --epochs 3");
    // What was tested in training, or all there is where the data is named.
    let images = |arguments: &str| json(&bench.good(arguments))["images"].clone();
    assert_eq!(images("eval run --device cpu --json"), 12);
    assert_eq!(images("eval run --device cpu --json --data shapes"), 40);
}

/// The default recipe's schedule, which spans the planned epochs.
const ONECYCLE: &str = "--model small.toml --data shapes --device cpu --schedule onecycle";

#[test]
fn a_run_knows_its_plan() {
    let bench = Bench::new();
    let whole = bench.good(&format!("train {ONECYCLE} --epochs 3 --out whole"));
    let part = bench.good(&format!(
        "train {ONECYCLE} --epochs 3 --stop-after 2 --out parts"
    ));
    let stopped = "stopped  after epoch 2 of 3, as asked\nresume   wgrad train --resume parts\n";
    assert!(part.contains(stopped), "{part}");
    for (flags, found) in [("--stop-after 2", "found 2"), ("--stop-after 4", "found 4")] {
        let arguments = format!("train --resume parts {flags}");
        bench.bad(&arguments, 2, &["--stop-after", "from 3 to the 3", found]);
    }
    let rest = bench.good("train --resume parts");
    assert!(
        rest.contains("epoch 3/3") && !rest.contains("spans"),
        "{rest}"
    );
    assert_eq!(hash(&whole), hash(&rest));
    // Another plan is another schedule, and says what that means.
    let more = bench.good("train --resume parts --epochs 5 --stop-after 4");
    let line = "schedule onecycle now spans 5 epochs, not 3, lr goes from 1.60e-8 to ";
    let said = more.lines().filter(|l| l.contains("spans"));
    let said: Vec<_> = said.collect();
    assert!(said.len() == 1 && said[0].contains(&line[..50]), "{more}");
    assert!(said[0].chars().count() <= 80, "{more}");
    // From then on it is the plan.
    let config = json(&fs::read_to_string(bench.path("parts/run.json")).unwrap());
    assert_eq!(config["recipe"]["epochs"], 5);
    let last = bench.good("train --resume parts");
    assert!(
        last.contains("epoch 5/5") && !last.contains("spans"),
        "{last}"
    );
}

/// A run in the middle of an epoch, and what it has printed when it ended.
#[cfg(unix)]
fn interrupt(bench: &Bench, arguments: &str, signal: &str, wait: &dyn Fn() -> bool) -> Output {
    let mut child = bench
        .command(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while !wait() {
        assert!(
            child.try_wait().unwrap().is_none(),
            "{arguments}: ended by itself"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    let id = child.id().to_string();
    let sent = Command::new("kill").args([signal, &id]).status().unwrap();
    assert!(sent.success());
    child.wait_with_output().unwrap()
}

/// Epochs of many steps, so that a signal meets the middle of one.
#[cfg(unix)]
fn long_epochs(bench: &Bench, count: u32) {
    let (pixels, labels) = common::images(count as usize, 1);
    let data = bench.path("shapes");
    fs::write(
        data.join("train-images-idx3-ubyte"),
        idx(&[count, 8, 6], &pixels),
    )
    .unwrap();
    fs::write(data.join("train-labels-idx1-ubyte"), idx(&[count], &labels)).unwrap();
}

/// Signals as a terminal or a batch system sends them, on the CPU and on the best adapter; and
/// kills, which leave what the last of many checkpoints holds.
#[test]
#[cfg(unix)]
fn signals_write_a_checkpoint_and_the_next_start_goes_on() {
    let bench = Bench::new();
    let devices = json(&bench.good("devices --json"));
    let adapter = devices[0]["name"].as_str().unwrap();
    let adapter = adapter.split_whitespace().next().unwrap();
    for (device, count) in [("cpu", 20_000), (adapter, 4_000)] {
        long_epochs(&bench, count);
        let flags = format!(
            "train --model small.toml --data shapes --device {device} --epochs 2 --schedule onecycle --batch-size 4"
        );
        let whole = bench.good(&format!("{flags} --out whole-{device}"));
        let run = format!("run-{device}");
        let checkpoint = bench.path(&run).join("checkpoint.safetensors");
        let modified = || fs::metadata(&checkpoint).and_then(|m| m.modified()).ok();
        let mut arguments = format!("{flags} --out {run} --checkpoint-every 50");
        for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-KILL", -1)] {
            let before = modified();
            let output = interrupt(&bench, &arguments, signal, &|| modified() != before);
            let (out, err) = text(&output);
            assert_eq!(err, "", "{out}");
            assert_eq!(output.status.code().unwrap_or(-1), code, "{out}");
            if code > 0 {
                let resume =
                    format!("; the checkpoint is written\nresume   wgrad train --resume {run}\n");
                assert!(out.ends_with(&resume), "{out}");
                assert!(out.contains("interrupted in epoch 1 after step "), "{out}");
                // As far as it came.
                let page = fs::read_to_string(bench.path(&run).join("report.html")).unwrap();
                assert!(page.contains("ended early: it was interrupted"), "{page}");
            }
            arguments = format!("train --resume {run} --checkpoint-every 50");
        }
        let rest = bench.good(&format!("train --resume {run}"));
        assert_eq!(hash(&whole), hash(&rest), "{device}");
        let metrics = |run: &str| -> Vec<serde_json::Value> {
            let text = fs::read_to_string(bench.path(run).join("metrics.jsonl")).unwrap();
            let mut lines: Vec<_> = text.lines().map(json).collect();
            for line in &mut lines {
                line["seconds"] = 0.into();
                line["images_per_second"] = 0.into();
            }
            lines
        };
        assert_eq!(metrics(&run), metrics(&format!("whole-{device}")));
    }
}

#[test]
#[cfg(unix)]
fn a_second_signal_ends_the_process_at_once() {
    let bench = Bench::new();
    // Steps of many seconds, in little memory: the first signal waits for one, the second does not.
    let second = "[[layer]]\ntype = \"conv2d\"\nout_channels = 512\nkernel = 3\npadding = 1\n\n[[layer]]\ntype = \"max_pool2d\"";
    let wide = common::MODEL
        .replace("out_channels = 4", "out_channels = 512")
        .replace("[[layer]]\ntype = \"max_pool2d\"", second);
    fs::write(bench.path("wide.toml"), wide).unwrap();
    long_epochs(&bench, 2_000);
    let mut child = bench
        .command("train --model wide.toml --data shapes --device cpu --batch-size 2000 --out run")
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_for(&mut child, &bench.path("run/metrics.jsonl"));
    std::thread::sleep(Duration::from_millis(500));
    let id = child.id().to_string();
    let kill = || Command::new("kill").args(["-INT", &id]).status().unwrap();
    kill();
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "it waits for the step");
    kill();
    let start = std::time::Instant::now();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert!(start.elapsed() < Duration::from_secs(3));
    assert!(!bench.path("run/checkpoint.safetensors").exists());
    // Nothing is damaged: it is a run of no steps.
    assert!(fs::read_to_string(bench.path("run/run.json")).is_ok());
}

#[test]
fn two_trainings_of_one_folder_do_not_meet() {
    let bench = Bench::new();
    let mut child = bench
        .command(&format!("train {SMALL} --epochs 100000 --out run"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_for(&mut child, &bench.path("run/model.safetensors"));
    bench.bad(
        "train --resume run",
        1,
        &["run: expected", "is being trained"],
    );
    // Reading goes on meanwhile.
    bench.good("eval run --device cpu");
    child.kill().unwrap();
    child.wait().unwrap();
    // A kill leaves no lock behind.
    let done = json(&fs::read_to_string(bench.path("run/run.json")).unwrap());
    let epochs = done["finished_epochs"].as_u64().unwrap() + 2;
    bench.good(&format!("train --resume run --stop-after {epochs}"));
}

#[test]
fn out_is_refused_before_any_other_work() {
    let bench = Bench::new();
    fs::create_dir(bench.path("full")).unwrap();
    fs::write(bench.path("full/thesis.txt"), "years of work").unwrap();
    // Even before the model is looked for.
    bench.bad(
        "train --model no-such-model --out full",
        2,
        &["full", "--out"],
    );
    assert_eq!(contents(&bench.path("full")).len(), 1);
}

#[test]
fn a_loss_that_is_no_number_ends_the_training() {
    let bench = Bench::new();
    bench.bad(
        &format!("train {SMALL} --lr 1e30 --out run"),
        1,
        &["diverged", "epoch 1", "lower --lr"],
    );
    assert!(!bench.path("run/checkpoint.safetensors").exists());
}

#[test]
fn a_reader_that_leaves_is_no_reason_to_panic() {
    let bench = Bench::new();
    for arguments in [
        "inspect default",
        "--help",
        &format!("train {SMALL} --epochs 2 --out run"),
    ] {
        let mut child = bench
            .command(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(text(&output).1, "", "{arguments}");
        assert!(output.status.success(), "{arguments}");
    }
    // The training went on to its end.
    assert!(
        bench
            .good("train --resume run")
            .contains("nothing to train")
    );
}

#[test]
fn several_runs_are_evaluated_as_one() {
    let bench = Bench::new();
    for seed in [1, 2, 3] {
        bench.good(&format!(
            "train {SMALL} --epochs 1 --seed {seed} --out r{seed}"
        ));
    }
    let single = |name: &str| json(&bench.good(&format!("eval {name} --device cpu --json")));
    let report = json(&bench.good("eval r1 r2 r3 --device cpu --json"));
    let runs = report["runs"].as_array().unwrap();
    for (run, name) in runs.iter().zip(["r1", "r2", "r3"]) {
        let alone = single(name);
        assert_eq!(run["run"], name);
        assert_eq!(
            (&run["weights"], &run["epoch"]),
            (&"last".into(), &1.into())
        );
        for key in ["loss", "accuracy", "accuracy_standard_error"] {
            assert_eq!(run[key], alone[key], "{key} of {name}");
        }
    }
    assert_eq!(report["images"], 40);
    // The mean of one and the same network is that network.
    let twice = json(&bench.good("eval r1 r1 --device cpu --json"));
    assert_eq!(twice["classes"], single("r1")["classes"]);
    let accuracy = report["accuracy"].as_f64().unwrap();
    let correct: u64 = report["classes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["correct"].as_u64().unwrap())
        .sum();
    assert_eq!(accuracy, correct as f64 / 40.0);
    let out = bench.good("eval r1 r2 r3 --device cpu");
    let mean = out.lines().find(|line| line.contains("mean of 3")).unwrap();
    assert!(
        mean.contains(&format!("{:.2} % ± ", 100.0 * accuracy)),
        "{out}"
    );
    assert!(out.lines().all(|line| line.chars().count() <= 80), "{out}");

    // Other classes, another size of the images, or other test images do not go together.
    bench.good(&format!("train {SMALL} --epochs 1 --limit 30 --out few"));
    bench.good("train --model tiny --epochs 1 --limit 20 --device cpu --out digits");
    bench.bad(
        "eval r1 few --device cpu",
        2,
        &["the same images", "found other", "in few", "--data"],
    );
    bench.bad(
        "eval r1 digits --device cpu",
        2,
        &["8×6×1 in 4 classes", "28×28×1 in 10 classes in digits"],
    );
    bench.good("eval r1 few --data shapes --device cpu");
    for which in ["best", "average"] {
        bench.bad(
            &format!("eval r1 --weights {which} --device cpu"),
            2,
            &["none in r1", "--weights last"],
        );
    }
    bench.bad(
        "eval r1 --weights first",
        2,
        &["expected last, best or average"],
    );
    bench.bad("eval", 2, &["RUN"]);
}

#[test]
fn a_run_starts_from_the_weights_of_another() {
    let bench = Bench::new();
    bench.good(&format!("train {SMALL} --epochs 1 --out first"));
    let out = words(&bench.good(&format!(
        "train {SMALL} --epochs 1 --seed 2 --init first --out second"
    )));
    assert!(out.contains("init 4 of 4 tensors from "), "{out}");
    assert!(
        out.contains("first/model.safetensors: conv2d1, dense1 "),
        "{out}"
    );
    let config = json(&fs::read_to_string(bench.path("second/run.json")).unwrap());
    assert_eq!(config["init"]["taken"].as_array().unwrap().len(), 4);
    assert_eq!(config["init"]["sha256"].as_str().unwrap().len(), 64);
    let wider = common::MODEL.replace("kernel = 2", "kernel = 4");
    fs::write(bench.path("wider.toml"), wider).unwrap();
    let flags = "--data shapes --device cpu --epochs 1";
    let out = words(&bench.good(&format!(
        "train --model wider.toml {flags} --init first/model.safetensors"
    )));
    assert!(out.contains("init 3 of 4 tensors"), "{out}");
    assert!(
        out.contains("by the seed, for what is in the file: dense1.weight ([4, 48] F32)"),
        "{out}"
    );
    bench.bad(
        &format!("train --model mlp-sigmoid {flags} --init nowhere"),
        2,
        &["found no nowhere"],
    );
    bench.bad("train --resume first --init second", 2, &["--init"]);
    assert!(!bench.path("runs/mlp-sigmoid-shapes-1").exists());
}

/// At a rate of nothing no epoch is better than the first.
#[test]
fn patience_ends_a_training_by_the_validation_split() {
    let bench = Bench::new();
    let flags = format!("{SMALL} --epochs 9 --lr 1e-30 --patience 1");
    let out = bench.good(&format!("train {flags} --validation 0.25 --out run"));
    let said = words(&out);
    for part in [
        "72 training, 24 validation and 40 test images",
        "ended after epoch 2 of 9: none was better by validation than epoch 1",
        "result last epoch: test ",
        "; best by validation: epoch 1, test ",
    ] {
        assert!(said.contains(part), "no {part:?} in {out}");
    }
    assert_eq!(said.matches(" validation 1.").count(), 2, "{out}");
    assert!(out.lines().all(|line| line.chars().count() <= 80), "{out}");
    let metrics = fs::read_to_string(bench.path("run/metrics.jsonl")).unwrap();
    assert!(json(metrics.lines().next().unwrap())["validation_accuracy"].is_number());
    let before = contents(&bench.path("run"));
    let again = words(&bench.good("train --resume run"));
    assert!(
        again.contains("nothing to train: ended after epoch 2 of 9"),
        "{again}"
    );
    let after = contents(&bench.path("run"));
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        assert!(name == "run.json" || before == after, "{name}");
    }
    let best = json(&bench.good("eval run --weights best --device cpu --json"));
    assert_eq!(
        (&best["weights"], &best["epoch"]),
        (&"best".into(), &1.into())
    );
    let more = words(&bench.good("train --resume run --patience 2"));
    assert!(more.contains("ended after epoch 3 of 9"), "{more}");

    bench.bad(
        &format!("train {flags} --out none"),
        2,
        &["--validation", "patience of 1"],
    );
    assert!(!bench.path("none").exists());
}

/// What is in them is checked by TensorBoard itself, in scripts/check-tensorboard.sh.
#[test]
fn event_files_are_written_when_asked_for() {
    let bench = Bench::new();
    let plain = bench.good(&format!("train {SMALL} --epochs 3 --out plain"));
    assert!(!bench.path("plain/tensorboard").exists());
    bench.good(&format!(
        "train {SMALL} --epochs 3 --stop-after 1 --out run --tensorboard"
    ));
    // A resume goes on by itself.
    let told = bench.good("train --resume run");
    assert_eq!(hash(&plain), hash(&told));
    let watch = "\nwatch    tensorboard --logdir run\n";
    assert!(
        told.contains(watch) && !plain.contains("tensorboard"),
        "{told}"
    );
    let files = contents(&bench.path("run/tensorboard"));
    assert_eq!(files.len(), 2, "one a process");
    for (name, bytes) in &files {
        assert!(name.starts_with("events.out.tfevents."), "{name}");
        let text = String::from_utf8_lossy(bytes);
        for tag in ["step/loss", "loss/test", "weight_norm/conv2d1.weight"] {
            assert!(text.contains(tag), "no {tag} in {name}");
        }
    }
    let input = |i: usize| String::from_utf8_lossy(&files[i].1).contains("input");
    assert!(input(0) && !input(1), "the pictures come once");
}
