//! The pages of runs: that they are whole by themselves, say what is so, and take whatever a run folder
//! holds.

mod common;

use assert_cmd::cargo::cargo_bin;
use common::{TEST_IMAGES, idx, images};
use roxmltree::{Document, Node, ParsingOptions};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use wgrad::report::page::{PAGE, Tested, write};
use wgrad::train::Run;

/// A folder with the model and the data of `common`, in which commands run.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        common::write_model_and_data(folder.path());
        Bench(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn try_run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = Command::new(cargo_bin("wgrad"))
            .current_dir(self.0.path())
            .env_remove("RUST_LOG")
            .env_remove("COLUMNS")
            .args(arguments)
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    }

    fn run(&self, arguments: &str) -> String {
        let arguments: Vec<&str> = arguments.split_whitespace().collect();
        let (code, text) = self.try_run(&arguments);
        assert_eq!(code, Some(0), "{arguments:?}: {text}");
        text
    }

    /// The page of a run, which has to be whole.
    fn page(&self, folder: &str) -> String {
        let text = fs::read_to_string(self.path(folder).join(PAGE)).unwrap();
        expect_whole(&text);
        text
    }
}

const SMALL: &str = "--model small.toml --data shapes --device cpu";

fn parse(page: &str) -> Document<'_> {
    let options = ParsingOptions {
        allow_dtd: true,
        ..ParsingOptions::default()
    };
    Document::parse_with_options(page, options).unwrap_or_else(|e| panic!("{e}"))
}

/// The text of an element and of what is in it.
fn text(node: Node) -> String {
    let all = node.descendants().filter(Node::is_text);
    all.filter_map(|n| n.text()).collect::<String>()
}

/// The words of a page, without what only its code has.
fn words(page: &str) -> String {
    let document = parse(page);
    let all = document.descendants().filter(Node::is_text);
    let all: Vec<&str> = all.filter_map(|n| n.text()).collect();
    all.join(" ")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// The cells of the table with this id, row by row, its head left out.
fn cells(page: &str, id: &str) -> Vec<Vec<String>> {
    let document = parse(page);
    let table = document
        .descendants()
        .find(|n| n.attribute("id") == Some(id));
    let body = table.unwrap().children().find(|n| n.has_tag_name("tbody"));
    let rows = body.unwrap().children().filter(Node::is_element);
    rows.map(|row| row.children().filter(Node::is_element).map(text).collect())
        .collect()
}

/// Well-formed, and nothing in it is run or fetched from anywhere.
fn expect_whole(page: &str) {
    let document = parse(page);
    for node in document.descendants().filter(Node::is_element) {
        let name = node.tag_name().name();
        for forbidden in [
            "script", "link", "iframe", "object", "embed", "base", "form",
        ] {
            assert_ne!(name, forbidden);
        }
        for attribute in node.attributes() {
            let (key, value) = (attribute.name(), attribute.value());
            assert!(!key.starts_with("on"), "{key}={value}");
            match key {
                "src" => assert!(value.starts_with("data:image/png;base64,"), "{value}"),
                "href" => assert!(value.starts_with('#'), "{value}"),
                _ => assert!(!value.contains("url("), "{key}={value}"),
            }
        }
    }
    let style = document.descendants().find(|n| n.has_tag_name("style"));
    let style = style.unwrap().text().unwrap();
    assert!(!style.contains("url(") && !style.contains("@import"));
    assert!(!page.contains("http:") && !page.contains("https:"));
    // What a page refers to within itself is there.
    let ids: Vec<_> = document
        .descendants()
        .filter_map(|n| n.attribute("id"))
        .collect();
    for node in document.descendants().filter(|n| n.has_tag_name("a")) {
        let target = node.attribute("href").unwrap().trim_start_matches('#');
        assert!(ids.contains(&target), "{target}");
    }
}

/// Names of the files beside a page; each SVG is well-formed, each PNG a picture.
fn beside(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for (name, bytes) in common::contents(&folder.join("report")) {
        match name.rsplit_once('.').unwrap().1 {
            "svg" => {
                let text = String::from_utf8(bytes).unwrap();
                let document = parse(&text);
                assert!(
                    document
                        .root_element()
                        .has_tag_name(("http://www.w3.org/2000/svg", "svg"))
                );
            }
            "png" => assert!(bytes.starts_with(b"\x89PNG\r\n"), "{name}"),
            other => assert_eq!(other, "toml", "{name}"),
        }
        names.push(name);
    }
    names
}

#[test]
fn a_training_leaves_a_report() {
    let bench = Bench::new();
    let out = bench.run(&format!("train {SMALL} --epochs 2 --out run"));
    assert!(out.contains("\nreport   run/report.html\n"), "{out}");
    let page = bench.page("run");
    let said = words(&page);
    let config: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(bench.path("run/run.json")).unwrap()).unwrap();
    for expected in [
        "small on shapes",
        "Test accuracy",
        "2 epochs, all finished",
        "Expected calibration error",
        "Guo, Pleiss, Sun and Weinberger, 2017",
        "Filters of conv2d1",
        "Norms of the weights",
        "CPU (",
        config["parameter_sha256"].as_str().unwrap(),
    ] {
        assert!(said.contains(expected), "no {expected:?} in {said}");
    }
    // All test images are in the matrix, and those that are right on its diagonal.
    let matrix = cells(&page, "confusion");
    let count = |text: &String| text.parse::<usize>().unwrap_or(0);
    let all: usize = matrix.iter().flat_map(|row| &row[1..]).map(count).sum();
    assert_eq!(all, TEST_IMAGES);
    let right: usize = (0..4).map(|i| count(&matrix[i][i + 1])).sum();
    let metrics = fs::read_to_string(bench.path("run/metrics.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    let accuracy = last["test_accuracy"].as_f64().unwrap();
    assert_eq!(right as f64 / TEST_IMAGES as f64, accuracy);
    // The scores are those of the matrix.
    for (class, row) in cells(&page, "scores").iter().enumerate() {
        let said: usize = matrix.iter().map(|row| count(&row[class + 1])).sum();
        let images: usize = matrix[class][1..].iter().map(count).sum();
        let right = count(&matrix[class][class + 1]);
        let percent = |part: usize, of: usize| match of {
            0 => "—".into(),
            _ => format!("{:.2} %", 100.0 * part as f64 / of as f64),
        };
        let expected = [
            class.to_string(),
            images.to_string(),
            percent(right, said),
            percent(right, images),
            percent(2 * right, images + said),
        ];
        assert_eq!(row[..], expected);
    }
    let files = beside(&bench.path("run"));
    for file in [
        "accuracy.svg",
        "activations-1.png",
        "confusion.svg",
        "filters.png",
        "gradient-norms.svg",
        "learning-rate.svg",
        "loss-by-step.svg",
        "loss.svg",
        "model.toml",
        "reliability.svg",
        "weight-norms.svg",
    ] {
        assert!(
            files.iter().any(|name| name == file),
            "no {file} in {files:?}"
        );
    }
    // Written anew it is the same, to the last letter.
    bench.run("report run --device cpu");
    assert_eq!(page, bench.page("run"));
    // Elsewhere the run is left alone.
    fs::remove_file(bench.path("run/report.html")).unwrap();
    bench.run("report run --device cpu --out elsewhere");
    assert!(!bench.path("run/report.html").exists());
    bench.page("elsewhere");
}

/// The weights of a run by the command in its page are the run's, whatever flags it was trained with.
#[test]
fn the_command_in_a_page_repeats_the_run() {
    let bench = Bench::new();
    let flags = [
        "--epochs 2",
        "--epochs 3 --stop-after 1 --seed 5 --limit 50 --validation 0.2 --split-seed 3",
        "--epochs 2 --optimizer sgd --nesterov=true --schedule step --set step_epochs=[1] --freeze conv2d1.* --average 0.9 --set augment.rotate=10",
        "--epochs 1 --batch-size 20 --optimizer lion --class-weights balanced --warm-up 0.5 --clip-norm 1 --views mirror",
    ];
    for (i, flags) in flags.into_iter().enumerate() {
        let out = bench.run(&format!("train {SMALL} {flags} --out run-{i}"));
        // Also where the test images were last shown in several views.
        let report = format!("\nreport   run-{i}/report.html\n");
        assert!(out.contains(&report), "{out}");
        let page = bench.page(&format!("run-{i}"));
        let document = parse(&page);
        let command = document
            .descendants()
            .find(|n| n.attribute("id") == Some("command"));
        let command = command.unwrap().text().unwrap();
        let again = bench.path(&format!("again-{i}"));
        let rest = command.strip_prefix("wgrad train ").unwrap();
        let status = Command::new("sh")
            .current_dir(bench.0.path())
            .args(["-c", &format!("\"$0\" train {rest} --out \"$1\"")])
            .arg(cargo_bin("wgrad"))
            .arg(&again)
            .output()
            .unwrap();
        let error = String::from_utf8(status.stderr).unwrap();
        assert!(status.status.success(), "{command}: {error}");
        let hash = |folder: &Path| {
            let run = Run::open(folder).unwrap();
            assert!(run.config().parameter_sha256.is_some());
            run.config().parameter_sha256.clone()
        };
        let run = bench.path(&format!("run-{i}"));
        assert_eq!(hash(&run), hash(&again), "{command}");
        assert!(!words(&page).contains("does not lead"), "{command}");
    }
}

/// Names that would end an element, an attribute or a text, and characters that would turn or break lines.
#[test]
fn names_are_text() {
    let bench = Bench::new();
    bench.run(&format!("train {SMALL} --epochs 1 --out run"));
    let path = bench.path("run/run.json");
    let mut config: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let evil = "</td><script>alert(1)</script>\"'&\u{0}\u{1b}[31m\u{202e}\n{{ 7 * 7 }}";
    let long = "Straßenbahnhaltestelle №7 ".repeat(40);
    config["model"]["class_names"] = serde_json::json!([evil, long, "<img src=x onerror=y>", "猫"]);
    config["device"]["description"] = serde_json::json!(evil);
    config["data"]["source"] = serde_json::json!(format!("/{evil}"));
    fs::write(&path, config.to_string()).unwrap();
    let out = bench.run("report run --device cpu --data shapes");
    assert!(out.contains("report.html"), "{out}");
    let page = bench.page("run");
    assert!(!page.contains("<script") && !page.contains("<img src=x"));
    assert!(!page.contains(['\u{0}', '\u{1b}', '\u{202e}']));
    assert!(page.contains("{{ 7 * 7 }}"));
    // A name that is written from right to left turns nothing but itself.
    assert_eq!(page.matches("猫").count(), {
        let [isolated, titles, json] = ["<bdi>猫</bdi>", "title=\"猫\"", "&quot;猫&quot;"];
        [isolated, titles, json]
            .map(|of| page.matches(of).count())
            .iter()
            .sum::<usize>()
    });
    let header = &cells(&page, "scores")[0][0];
    assert!(
        header.starts_with("</td><script>alert(1)</script>\"'&"),
        "{header}"
    );
    beside(&bench.path("run"));
    bench.run("compare run run");
    let page = fs::read_to_string(bench.path("compare.html")).unwrap();
    assert!(!page.contains("differ by their seeds alone"));
    expect_whole(&page);
}

/// Without data, without weights, of old formats: what there is is shown, and what is missing is said.
#[test]
fn a_report_is_made_of_what_there_is() {
    let bench = Bench::new();
    bench.run(&format!("train {SMALL} --epochs 1 --out run"));
    let full = beside(&bench.path("run"));
    assert!(full.iter().any(|name| name == "reliability.svg"));
    fs::rename(bench.path("shapes"), bench.path("moved")).unwrap();
    let out = bench.run("report run --device cpu");
    let said = out.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(said.contains("wgrad report run --data DIR"), "{out}");
    let page = bench.page("run");
    assert!(words(&page).contains("What the test images show is left out"));
    assert!(!page.contains("id=\"confusion\""));
    let files = beside(&bench.path("run"));
    // What the earlier report had of the images is not left to be taken for this one's.
    assert!(!files.iter().any(|n| n == "reliability.svg"), "{files:?}");
    assert!(files.iter().any(|n| n == "loss.svg"), "{files:?}");
    bench.run("report run --device cpu --data moved");
    assert!(bench.page("run").contains("id=\"confusion\""));
    assert!(!words(&bench.page("run")).contains("not the ones"));
    // Other images are measured where they are asked for, and it is said.
    let (pixels, labels) = images(8, 9);
    fs::create_dir(bench.path("other")).unwrap();
    for split in ["train", "t10k"] {
        let file = |what: &str| bench.path("other").join(format!("{split}-{what}-ubyte"));
        fs::write(file("images-idx3"), idx(&[8, 8, 6], &pixels)).unwrap();
        fs::write(file("labels-idx1"), idx(&[8], &labels)).unwrap();
    }
    bench.run("report run --device cpu --data other");
    assert!(words(&bench.page("run")).contains("not the ones that the run was tested on"));
    let (code, text) = bench.try_run(&["report", "run", "--device", "cpu", "--data", "nowhere"]);
    assert!(code == Some(2) && text.contains("nowhere"), "{text}");
    let (code, text) = bench.try_run(&["report", "moved"]);
    assert!(code == Some(1) && text.contains("run.json"), "{text}");
    // A run that never finished an epoch has neither weights nor curves.
    for file in ["metrics.jsonl", "steps.jsonl", "model.safetensors"] {
        fs::remove_file(bench.path("run").join(file)).unwrap();
    }
    bench.run("report run --device cpu --data moved");
    let said = words(&bench.page("run"));
    assert!(said.contains("No epoch is finished yet"), "{said}");
    for old in ["format-0-adapter", "format-0-cpu", "format-1-cpu"] {
        let from = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/runs")
            .join(old);
        let to = bench.path(old);
        fs::create_dir(&to).unwrap();
        for (name, bytes) in common::contents(&from) {
            fs::write(to.join(name), bytes).unwrap();
        }
        bench.run(&format!("report {old} --device cpu --data moved"));
        let said = words(&bench.page(old));
        assert!(
            said.contains("Norms of weights and gradients were not recorded"),
            "{said}"
        );
        bench.run(&format!("report {old} --device cpu"));
        beside(&to);
    }
}

/// Squared error, a loss that is no number, an empty class, no accuracy on record, weights of NaN.
#[test]
fn odd_runs_have_reports() {
    let bench = Bench::new();
    let model = fs::read_to_string(bench.path("small.toml")).unwrap();
    let squared = model.replace("softmax_cross_entropy", "squared_error");
    fs::write(bench.path("squared.toml"), squared).unwrap();
    bench.run("train --model squared.toml --data shapes --device cpu --epochs 1 --out squared");
    assert!(words(&bench.page("squared")).contains("learned by squared error"));
    let path = bench.path("squared/metrics.jsonl");
    for line in [
        r#"{"epoch": 1, "step": 5}"#,
        r#"{"epoch": 1, "step": 5, "train_loss": 1e300, "test_loss": null, "test_accuracy": 1.0, "lr": 0}"#,
    ] {
        fs::write(&path, line).unwrap();
        bench.run("report squared --device cpu");
        bench.page("squared");
    }
    // What mixed precision had to skip.
    let line = |skipped: u64| {
        format!(r#"{{"epoch": 1, "step": 5, "loss_scale": 32768.0, "skipped_steps": {skipped}}}"#)
    };
    for (skipped, expected) in [
        (0, "mixed precision; no step skipped"),
        (2, "mixed precision; 2 of 5 steps skipped"),
    ] {
        fs::write(&path, line(skipped)).unwrap();
        bench.run("report squared --device cpu");
        let said = words(&bench.page("squared"));
        assert!(
            said.contains("Loss scale") && said.contains("32,768"),
            "{said}"
        );
        assert!(said.contains(expected), "{said}");
    }
    // Where the time goes, in a run that was profiled; a damaged file is none.
    let profile = r#"{"traceEvents": [
        {"ph": "M", "name": "process_name"},
        {"ph": "X", "name": "conv2d1 conv2d_forward", "cat": "conv2d_forward", "ts": 0, "dur": 2000},
        {"ph": "X", "name": "conv2d1 relu_forward", "cat": "relu_forward", "ts": 0, "dur": 1000},
        {"ph": "X", "name": "step gather_batch", "cat": "gather_batch", "ts": 0, "dur": 1000}]}"#;
    fs::write(bench.path("squared/profile.json"), profile).unwrap();
    bench.run("report squared --device cpu");
    let said = words(&bench.page("squared"));
    for expected in [
        "4.000 ms a step",
        "conv2d1 3.000 75.0",
        "step 1.000 25.0",
        "relu_forward 1.000 25.0",
    ] {
        assert!(
            said.replace("  ", " ").contains(expected),
            "no {expected} in {said}"
        );
    }
    let files = beside(&bench.path("squared"));
    assert!(
        files.iter().any(|name| name == "time-by-layer.svg"),
        "{files:?}"
    );
    fs::write(bench.path("squared/profile.json"), &profile[..50]).unwrap();
    bench.run("report squared --device cpu");
    assert!(!words(&bench.page("squared")).contains("Where the time"));
    let run = Run::open(&bench.path("squared")).unwrap();
    for (labels, share) in [
        (vec![0u32, 0, 2], f64::NAN),
        (vec![], 0.0),
        (vec![3; 5], 7.0),
    ] {
        let n = labels.len();
        let tested = Tested {
            images: vec![200; 48 * n],
            predictions: vec![1; n],
            shares: vec![share; 4 * n],
            labels,
            files: Vec::new(),
            note: None,
        };
        let out = bench.path("odd");
        write(&run, Ok(&tested), &out).unwrap();
        let page = bench.page("odd");
        let matrix = cells(&page, "confusion");
        let all = matrix.iter().flat_map(|row| &row[1..]);
        let all: usize = all.map(|text| text.parse().unwrap_or(0)).sum();
        assert_eq!(all, n);
        beside(&out);
    }
}

#[test]
fn runs_are_compared_by_what_differs_first() {
    let bench = Bench::new();
    bench.run(&format!("train {SMALL} --epochs 1 --out a"));
    bench.run(&format!(
        "train {SMALL} --epochs 2 --lr 0.02 --average 0.9 --out b"
    ));
    let out = bench.run("compare a b");
    assert!(
        out.contains(" lr       0.01  0.02") || out.contains("lr "),
        "{out}"
    );
    assert!(out.find("setting") < out.find("test accuracy"), "{out}");
    assert!(out.ends_with("page     compare.html\n"), "{out}");
    assert!(out.lines().all(|line| line.chars().count() <= 80), "{out}");
    let page = fs::read_to_string(bench.path("compare.html")).unwrap();
    expect_whole(&page);
    let settings = cells(&page, "settings");
    let expected = [
        ["lr", "0.01", "0.02"],
        ["epochs", "1", "2"],
        ["average", "—", "0.9"],
    ];
    assert_eq!(settings, expected.map(|row| row.map(String::from).to_vec()));
    assert_eq!(cells(&page, "outcomes").len(), 2);
    assert!(page.find("id=\"settings\"") < page.find("id=\"outcomes\""));
    // Nothing is replaced unless that is asked for.
    fs::write(bench.path("compare.html"), "mine").unwrap();
    let (code, text) = bench.try_run(&["compare", "a", "b"]);
    assert!(code == Some(2) && text.contains("--overwrite"), "{text}");
    assert_eq!(fs::read(bench.path("compare.html")).unwrap(), b"mine");
    bench.run("compare a b --overwrite");
    bench.run("compare b a --out other.html");
    let (code, text) = bench.try_run(&["compare", "a", "--out", "c.html"]);
    assert!(
        code == Some(2) && text.contains("at least two runs"),
        "{text}"
    );
    // A folder of several seeds stands for its runs, which differ by these alone.
    bench.run(&format!(
        "train {SMALL} --epochs 1 --seeds 1..3 --out seeds"
    ));
    let json = bench.run("compare seeds --json --out seeds.html");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["runs"].as_array().unwrap().len(), 3);
    assert_eq!(json["differences"].as_array().unwrap().len(), 1);
    assert_eq!(json["differences"][0]["key"], "seed");
    let seeds: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(bench.path("seeds/seeds.json")).unwrap()).unwrap();
    for (i, key) in ["mean", "standard_deviation"].into_iter().enumerate() {
        let [expected, found] = [&seeds[key], &json["mean"][i]].map(|v| v.as_f64().unwrap());
        assert!(
            (expected - found).abs() < 1e-12,
            "{key}: {found}, not {expected}"
        );
    }
    // A run that has not begun is one too.
    fs::create_dir(bench.path("new")).unwrap();
    fs::copy(bench.path("a/run.json"), bench.path("new/run.json")).unwrap();
    bench.run("compare new a seeds --out new.html");
    expect_whole(&fs::read_to_string(bench.path("new.html")).unwrap());
}
