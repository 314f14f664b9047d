//! Real processes through the system's MPI library: `cargo test --features mpi --test mpi`.

#![cfg(all(feature = "mpi", target_os = "linux"))]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// With statistics and draws, in a batch that does not divide the 96 images.
const MODEL: &str = r#"name = "small"
input = [8, 6, 1]
classes = 4
loss = "softmax_cross_entropy"
recipe = { optimizer = "adamw", lr = 0.01, schedule = "cosine", epochs = 2, batch_size = 20 }
layer = [
    { type = "conv2d", out_channels = 4, kernel = 3, padding = 1, bias = false },
    { type = "batch_norm", activation = "relu" },
    { type = "max_pool2d", kernel = 2 },
    { type = "dropout", probability = 0.25 },
    { type = "dense", units = "classes" },
]
"#;

/// A folder with model and data; `None`, and why, where there is no mpirun.
fn bench() -> Option<tempfile::TempDir> {
    if Command::new("mpirun").arg("--version").output().is_err() {
        eprintln!("skipped: expected Open MPI's mpirun, found none; install openmpi-bin");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    common::write_model_and_data(folder.path());
    fs::write(folder.path().join("small.toml"), MODEL).unwrap();
    Some(folder)
}

/// `wgrad`, on so many ranks; 0: without mpirun.
fn wgrad(folder: &Path, ranks: usize) -> Command {
    let program = env!("CARGO_BIN_EXE_wgrad");
    let mut command = match ranks {
        0 => Command::new(program),
        _ => {
            let mut command = Command::new("mpirun");
            command.args([
                "--oversubscribe",
                "--allow-run-as-root",
                "--bind-to",
                "none",
            ]);
            command.args(["-n", &ranks.to_string(), program]);
            command
        }
    };
    // Several ranks share few processors.
    command.env("RAYON_NUM_THREADS", "1");
    command.current_dir(folder);
    command
}

const TRAIN: [&str; 6] = [
    "train",
    "--model",
    "small.toml",
    "--data",
    "shapes",
    "--no-check",
];

fn done(command: &mut Command) -> (String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let [stdout, stderr] = [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(status.success(), "{status}\n{stdout}\n{stderr}");
    (stdout, stderr)
}

fn hash(run: &Path) -> String {
    let text = fs::read_to_string(run.join("run.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["parameter_sha256"].as_str().unwrap().into()
}

/// What the epochs gave, without their times.
fn metrics(run: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        for time in ["seconds", "images_per_second"] {
            line.as_object_mut().unwrap().remove(time);
        }
        line
    });
    lines.collect()
}

fn ranks_give_the_same_weights(device: &str, flags: &[&str]) {
    let Some(bench) = bench() else { return };
    let folder = bench.path();
    let trained = |ranks: usize| -> PathBuf {
        let out = format!("run-{ranks}");
        let mut command = wgrad(folder, ranks);
        command
            .args(TRAIN)
            .args(["--shards", "4", "--device", device]);
        let (stdout, _) = done(command.args(flags).args(["--out", &out]));
        // One speaks for all, and every rank says where it is.
        assert_eq!(stdout.matches("weights  sha256").count(), 1, "{stdout}");
        let devices = stdout.lines().filter(|line| line.starts_with("rank "));
        assert_eq!(
            devices.count(),
            if ranks > 1 { ranks } else { 0 },
            "{stdout}"
        );
        folder.join(out)
    };
    let alone = trained(0);
    for ranks in 1..=4 {
        let run = trained(ranks);
        assert_eq!(hash(&run), hash(&alone), "{ranks} ranks");
        assert_eq!(metrics(&run), metrics(&alone), "{ranks} ranks");
    }
}

#[test]
fn ranks_give_the_same_weights_on_the_cpu() {
    let flags = [
        "--average",
        "0.9",
        "--set",
        "views=mirror",
        "--set",
        "clip_norm=1",
    ];
    ranks_give_the_same_weights("cpu", &flags);
}

#[test]
fn ranks_give_the_same_weights_on_the_software_adapter() {
    ranks_give_the_same_weights("software", &["--no-tune"]);
}

#[test]
fn ranks_give_the_same_weights_with_statistics_of_all() {
    ranks_give_the_same_weights("cpu", &["--sync-batch-norm"]);
}

/// Without shards in the recipe there are some all the same, and a run goes on with any number of ranks.
#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let Some(bench) = bench() else { return };
    let folder = bench.path();
    let train = |ranks: usize, flags: &[&str]| {
        let mut command = wgrad(folder, ranks);
        done(command.args(TRAIN).args(["--device", "cpu"]).args(flags))
    };
    let (whole, _) = train(2, &["--out", "whole"]);
    assert!(whole.contains("shards   8"), "{whole}");
    train(2, &["--out", "halves", "--stop-after", "1"]);
    let halves = folder.join("halves");
    let go_on = ["train", "--resume", "halves"];
    done(wgrad(folder, 3).args(go_on));
    assert_eq!(hash(&halves), hash(&folder.join("whole")));
    assert_eq!(metrics(&halves), metrics(&folder.join("whole")));
    done(wgrad(folder, 0).args(go_on).args(["--epochs", "3"]));
}

/// What cannot be is refused in one line, by one rank.
#[test]
fn what_cannot_be_is_refused_once() {
    let Some(bench) = bench() else { return };
    let folder = bench.path();
    let refused = |ranks: usize, flags: &[&str], words: &[&str]| {
        let mut command = wgrad(folder, ranks);
        let output = command.args(flags).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert_eq!(text.matches("error: ").count(), 1, "{text}");
        for word in words {
            assert!(text.contains(word), "no {word:?} in {text}");
        }
    };
    let train = |flags: &[&'static str]| [&TRAIN[..], &["--device", "cpu"], flags].concat();
    refused(
        3,
        &train(&["--shards", "2"]),
        &["3 ranks", "--shards 2", "--shards 4"],
    );
    refused(2, &train(&["--seeds", "1,2"]), &["--seeds"]);
    done(wgrad(folder, 0).args(train(&["--out", "plain", "--stop-after", "1"])));
    refused(
        2,
        &["train", "--resume", "plain"],
        &["shards", "without mpirun"],
    );
}

/// What one rank alone cannot do ends all of them, soon and with its line.
#[test]
fn a_rank_that_fails_ends_all() {
    let Some(bench) = bench() else { return };
    let folder = bench.path();
    // What is in its place keeps the leader, which alone makes it, from making a folder.
    fs::write(folder.join("file"), "").unwrap();
    let mut command = wgrad(folder, 2);
    command
        .args(TRAIN)
        .args(["--device", "cpu", "--out", "file/run"]);
    let begin = Instant::now();
    let output = command.output().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(text.matches("error: ").count(), 1, "{text}");
    assert!(text.contains("file/run"), "{text}");
}

/// The process of that rank below `mpirun`, which runs as process `parent`.
fn process_of(rank: usize, parent: u32) -> Option<u32> {
    let wanted = format!("OMPI_COMM_WORLD_RANK={rank}");
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut children = numbers.filter(|process: &u32| {
        let file = |name: &str| fs::read(format!("/proc/{process}/{name}")).unwrap_or_default();
        let stat = String::from_utf8_lossy(&file("stat")).into_owned();
        let fields = stat.rsplit(')').next().unwrap_or_default().to_string();
        let is_child = fields.split_whitespace().nth(1) == Some(&parent.to_string());
        let environment = file("environ");
        let mut variables = environment.split(|byte| *byte == 0);
        is_child && variables.any(|variable| variable == wanted.as_bytes())
    });
    children.next()
}

/// When a rank dies, the rest ends soon: with a checkpoint, and a line that says how to go on.
#[test]
fn a_rank_that_dies_ends_all_with_a_checkpoint() {
    let Some(bench) = bench() else { return };
    let folder = bench.path();
    let run = folder.join("run");
    let mut command = wgrad(folder, 3);
    command
        .args(TRAIN)
        .args(["--device", "cpu", "--out", "run"]);
    // More than anybody waits for, and no checkpoint but that of the end.
    command.args([
        "--epochs",
        "100000",
        "--checkpoint-every",
        "epoch",
        "--set",
        "batch_size=4",
    ]);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let begin = Instant::now();
    let lines =
        |file: &str| fs::read_to_string(run.join(file)).map_or(0, |text| text.lines().count());
    while lines("metrics.jsonl") == 0 {
        assert!(begin.elapsed() < Duration::from_secs(120), "no epoch");
        std::thread::sleep(Duration::from_millis(20));
    }
    let victim = process_of(2, child.id()).expect("a process of rank 2");
    let killed = Command::new("kill")
        .args(["-9", &victim.to_string()])
        .status();
    assert!(killed.unwrap().success());
    let begin = Instant::now();
    let output = child.wait_with_output().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(30));
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    let ours: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(ours.len(), 1, "{text}");
    assert!(ours[0].contains("wgrad train --resume run"), "{text}");
    let epochs = (lines("metrics.jsonl") + 1).to_string();
    done(wgrad(folder, 2).args(["train", "--resume", "run", "--stop-after", &epochs]));
}
