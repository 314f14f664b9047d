//! `wgrad predict`: the answers that an evaluation gives, for pictures of all kinds, and what it says about
//! those that it cannot read.

mod common;

use assert_cmd::cargo::cargo_bin;
use image::{DynamicImage, GrayImage, ImageFormat, Luma};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use wgrad::engine::{Engine, Split};
use wgrad::kernels::Step;
use wgrad::plan::Options;
use wgrad::predict::Predictor;
use wgrad::train::{Run, Weights};

struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    /// With a run of the small model.
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        common::write_model_and_data(folder.path());
        let bench = Bench { folder };
        bench.good(&[
            "train",
            "--model",
            "small.toml",
            "--data",
            "shapes",
            "--device",
            "cpu",
            "--out",
            "run",
        ]);
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        command(self.folder.path(), arguments)
    }

    fn good(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Standard output and the one line on standard error of a command that ends with `code`.
    fn bad(&self, arguments: &[&str], code: i32) -> (String, String) {
        bad(&self.command(arguments).output().unwrap(), code)
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.good(arguments)).unwrap()
    }

    /// The test images as PNG files, with their labels.
    fn exported(&self) -> Vec<(PathBuf, u8)> {
        let (pixels, labels) = common::images(common::TEST_IMAGES, 2);
        fs::create_dir(self.path("pictures")).unwrap();
        let both = pixels.chunks(8 * 6).zip(labels).enumerate();
        both.map(|(i, (pixels, label))| {
            let folder = self.path("pictures").join(label.to_string());
            fs::create_dir_all(&folder).unwrap();
            let path = folder.join(format!("{i:03}.png"));
            fs::write(&path, encoded(&small(pixels), ImageFormat::Png)).unwrap();
            (path, label)
        })
        .collect()
    }
}

fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(cargo_bin("wgrad"));
    command
        .current_dir(folder)
        .env_remove("RUST_LOG")
        .env_remove("COLUMNS")
        .args(arguments);
    command
}

fn bad(output: &Output, code: i32) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    let err: Vec<&str> = err.lines().filter(|l| !l.starts_with("wgrad: ")).collect();
    assert_eq!(output.status.code(), Some(code), "{err:?}");
    assert_eq!(err.len(), 1, "{err:?}");
    assert!(err[0].starts_with("error: "), "{err:?}");
    (out, err[0].to_string())
}

fn small(pixels: &[u8]) -> DynamicImage {
    GrayImage::from_raw(6, 8, pixels.to_vec()).unwrap().into()
}

fn encoded(picture: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    // GIF and JPEG are written in colour.
    let picture = match format {
        ImageFormat::Gif => picture.to_rgba8().into(),
        ImageFormat::WebP => picture.to_rgb8().into(),
        _ => picture.clone(),
    };
    picture.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn csv(text: &str) -> Vec<BTreeMap<String, String>> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    reader.deserialize().collect::<Result<_, _>>().unwrap()
}

fn files(report: &Value) -> Vec<&str> {
    let pictures = report["pictures"].as_array().unwrap();
    pictures
        .iter()
        .map(|p| p["file"].as_str().unwrap())
        .collect()
}

#[test]
fn answers_are_those_of_an_evaluation() {
    let bench = Bench::new();
    let exported = bench.exported();
    let eval = bench.json(&["eval", "run", "--device", "cpu", "--json"]);
    let rows = csv(&bench.good(&[
        "predict", "run", "pictures", "--csv", "--top", "4", "--device", "cpu",
    ]));
    assert_eq!(rows.len(), exported.len());
    let mut correct = 0;
    for row in &rows {
        let file = Path::new(&row["file"]);
        let label = file
            .parent()
            .unwrap()
            .file_name()
            .unwrap()
            .to_str()
            .unwrap();
        correct += usize::from(row["class_1"] == label);
        assert_eq!(
            (&row["inverted"][..], &row["centred"][..]),
            ("false", "false")
        );
        let shares: Vec<f64> = (1..=4)
            .map(|k| row[&format!("share_{k}")].parse().unwrap())
            .collect();
        assert!(shares.is_sorted_by(|a, b| a >= b), "{shares:?}");
        assert!(
            (shares.iter().sum::<f64>() - 1.0).abs() < 1e-9,
            "{shares:?}"
        );
    }
    let accuracy = correct as f64 / rows.len() as f64;
    assert_eq!(eval["accuracy"], accuracy);
    assert!(accuracy > 0.5, "{accuracy}");

    // The same in JSON and as a table, and whatever the batch.
    let report = bench.json(&["predict", "run", "pictures", "--json", "--device", "cpu"]);
    assert_eq!(report["epoch"], 3);
    let pictures = report["pictures"].as_array().unwrap();
    let table = bench.good(&[
        "predict", "run", "pictures", "--top", "1", "--device", "cpu",
    ]);
    for (row, picture) in rows.iter().zip(pictures) {
        assert_eq!(picture["file"], row["file"]);
        let first = &picture["classes"][0];
        assert_eq!(first["name"], row["class_1"]);
        let share = first["share"].as_f64().unwrap();
        assert_eq!(share, row["share_1"].parse::<f64>().unwrap());
        assert_eq!(picture["classes"].as_array().unwrap().len(), 3);
        let line = table
            .lines()
            .find(|line| line.starts_with(&row["file"]))
            .unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(
            words[1..],
            [&row["class_1"], &format!("{:.2}", 100.0 * share)[..], "%"]
        );
    }
    let alone = bench.json(&[
        "predict",
        "run",
        &rows[7]["file"],
        "--json",
        "--device",
        "cpu",
    ]);
    assert_eq!(alone["pictures"][0], pictures[7]);
}

/// Running statistics and views, on the CPU and by the shaders.
#[test]
fn every_device_answers_as_its_evaluation_does() {
    let bench = Bench::new();
    let model = common::MODEL.replace(
        "[[layer]]\ntype = \"max_pool2d\"",
        "[[layer]]\ntype = \"batch_norm\"\n\n[[layer]]\ntype = \"max_pool2d\"",
    );
    assert_ne!(model, common::MODEL);
    fs::write(bench.path("norm.toml"), model).unwrap();
    bench.good(&[
        "train",
        "--model",
        "norm.toml",
        "--data",
        "shapes",
        "--device",
        "cpu",
        "--out",
        "norm",
    ]);
    bench.exported();
    for views in ["one", "mirror"] {
        let eval = bench.json(&[
            "eval", "norm", "--device", "cpu", "--json", "--views", views,
        ]);
        let answers = ["cpu", "software"].map(|device| {
            let arguments = [
                "predict", "norm", "pictures", "--csv", "--views", views, "--device", device,
            ];
            csv(&bench.good(&arguments))
        });
        for rows in &answers {
            let correct = rows
                .iter()
                .filter(|row| row["file"].contains(&format!("/{}/", row["class_1"])));
            assert_eq!(
                eval["accuracy"],
                correct.count() as f64 / rows.len() as f64,
                "{views}"
            );
        }
        for (cpu, gpu) in answers[0].iter().zip(&answers[1]) {
            let [cpu, gpu]: [f64; 2] = [cpu, gpu].map(|row| row["share_1"].parse().unwrap());
            assert!((cpu - gpu).abs() < 1e-4, "{cpu} {gpu}");
        }
    }
}

#[test]
fn a_predictor_does_not_train() {
    let bench = Bench::new();
    let run = Run::open(&bench.path("run")).unwrap();
    let mut predictor = Predictor::new(&run, Weights::Last, None, None, 2).unwrap();
    assert!(predictor.predict(vec![]).unwrap().is_empty());
    let shares = predictor.predict(vec![9; 5 * 8 * 6]).unwrap();
    assert_eq!(shares.len(), 5 * 4);
    assert_eq!(shares[..4], shares[16..]);
    let why = predictor.predict(vec![9; 47]).unwrap_err().to_string();
    assert!(why.contains("whole images of 8×6×1"), "{why}");
    let options = Options {
        evaluates_only: true,
        ..Options::default()
    };
    let optimizer = run.config().recipe.optimizer;
    let mut engine = Engine::new(None, run.model(), 2, &optimizer, &options).unwrap();
    let labels = [0, 1];
    let scale = run.config().scale_and_shift();
    engine
        .upload_dataset(Split::Train, vec![0; 96], &labels, &scale)
        .unwrap();
    let steps = [Step::new(0, 2)];
    let trained = engine.train_epoch(&[0, 1], &steps, &mut |_| Ok(ControlFlow::Continue(())));
    let why = trained.unwrap_err().to_string();
    assert!(why.contains("only evaluates"), "{why}");
}

#[test]
fn every_format_size_and_standard_input_are_read() {
    let bench = Bench::new();
    let (pixels, _) = common::images(4, 9);
    let picture = small(&pixels[..8 * 6]);
    let formats = [
        ("a.png", ImageFormat::Png),
        ("b.bmp", ImageFormat::Bmp),
        ("c.tiff", ImageFormat::Tiff),
        ("d.gif", ImageFormat::Gif),
        ("e.webp", ImageFormat::WebP),
        // What it is, the contents tell.
        ("f.jpg", ImageFormat::Png),
    ];
    for (name, format) in formats {
        fs::write(bench.path(name), encoded(&picture, format)).unwrap();
    }
    let larger = picture.resize_exact(60, 80, image::imageops::FilterType::Nearest);
    fs::write(bench.path("g.png"), encoded(&larger, ImageFormat::Png)).unwrap();
    fs::write(bench.path("h.jpg"), encoded(&larger, ImageFormat::Jpeg)).unwrap();
    let mut arguments = vec!["predict", "run", "--json", "--device", "cpu"];
    arguments.extend(formats.map(|(name, _)| name));
    arguments.extend(["g.png", "h.jpg", "-"]);
    let mut child = bench
        .command(&arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let input = encoded(&picture, ImageFormat::Png);
    child.stdin.take().unwrap().write_all(&input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut expected: Vec<&str> = arguments[5..].to_vec();
    assert_eq!(files(&report), expected);
    expected.clear();
    let pictures = report["pictures"].as_array().unwrap();
    for (i, other) in pictures.iter().enumerate() {
        match i {
            // Scaled back, they are not the same to the last bit.
            6 | 7 => assert_eq!(
                other["classes"][0]["name"],
                pictures[0]["classes"][0]["name"]
            ),
            _ => assert_eq!(other["classes"], pictures[0]["classes"], "{other}"),
        }
    }
}

#[test]
fn what_cannot_be_read_is_listed_at_the_end() {
    let bench = Bench::new();
    let exported = bench.exported();
    let whole = fs::read(&exported[0].0).unwrap();
    fs::write(bench.path("cut.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(bench.path("notes.txt"), "no picture").unwrap();
    let arguments = [
        "predict",
        "run",
        "gone.png",
        "cut.png",
        "pictures",
        "notes.txt",
        "--device",
        "cpu",
    ];
    let (out, err) = bench.bad(&arguments, 1);
    assert_eq!(
        out.lines()
            .filter(|line| line.starts_with("pictures/"))
            .count(),
        exported.len()
    );
    for expected in [
        "3 of 43 pictures cannot be read",
        "gone.png (",
        "cut.png (",
        "notes.txt (not a picture",
    ] {
        assert!(err.contains(expected), "no {expected:?} in {err}");
    }
    let (out, _) = bench.bad(&[&arguments[..], &["--json"]].concat(), 1);
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(files(&report).len(), exported.len());
    let unread = report["unread"].as_array().unwrap();
    let names: Vec<&Value> = unread.iter().map(|u| &u["file"]).collect();
    assert_eq!(names, ["gone.png", "cut.png", "notes.txt"]);
    let (out, _) = bench.bad(&[&arguments[..], &["--csv"]].concat(), 1);
    assert_eq!(csv(&out).len(), exported.len());

    // In a folder, what is no picture is passed over, and said; what should be one is not.
    fs::write(bench.path("pictures/notes.txt"), "no picture").unwrap();
    fs::write(bench.path("pictures/.hidden.png"), "no picture").unwrap();
    let out = bench.good(&["predict", "run", "pictures", "--device", "cpu"]);
    assert!(
        out.contains("skipped   1 file that is no picture\n"),
        "{out}"
    );
    fs::write(bench.path("pictures/x.png"), "no picture").unwrap();
    let (_, err) = bench.bad(&["predict", "run", "pictures", "--device", "cpu"], 1);
    assert!(
        err.contains("1 of 41 pictures") && err.contains("x.png ("),
        "{err}"
    );

    fs::create_dir(bench.path("empty")).unwrap();
    let (_, err) = bench.bad(&["predict", "run", "empty"], 2);
    assert!(err.contains("found no file"), "{err}");
    fs::write(bench.path("empty/notes.txt"), "no picture").unwrap();
    let (_, err) = bench.bad(&["predict", "run", "empty", "--device", "cpu"], 2);
    assert!(err.contains("found none among 1 files"), "{err}");
}

#[test]
fn misuse_is_refused() {
    let bench = Bench::new();
    for (arguments, expected) in [
        (&["predict", "run"][..], "FILE"),
        (
            &["predict", "run", "a.png", "--top", "0"],
            "--top of at least 1",
        ),
        (
            &["predict", "run", "a.png", "--json", "--csv"],
            "cannot be used with",
        ),
        (&["predict", "run", "-", "-"], "found it twice"),
        (
            &["predict", "run", "a.png", "--invert", "maybe"],
            "auto, always or never",
        ),
        (
            &["predict", "run", "a.png", "--weights", "best"],
            "validation split",
        ),
    ] {
        let (_, err) = bench.bad(arguments, 2);
        assert!(err.contains(expected), "{arguments:?}: {err}");
    }
    let (_, err) = bench.bad(&["predict", "shapes", "a.png"], 1);
    assert!(err.contains("run.json"), "{err}");
}

#[test]
fn many_pictures_come_in_their_order() {
    let bench = Bench::new();
    let (pixels, _) = common::images(600, 5);
    fs::create_dir(bench.path("many")).unwrap();
    let name = |i: usize| format!("many/{i:04}.png");
    for (i, pixels) in pixels.chunks(8 * 6).enumerate() {
        let bytes = match i % 97 {
            96 => b"damaged".to_vec(),
            _ => encoded(&small(pixels), ImageFormat::Png),
        };
        fs::write(bench.path(&name(i)), bytes).unwrap();
    }
    let (out, err) = bench.bad(&["predict", "run", "many", "--csv", "--device", "cpu"], 1);
    assert!(err.contains("6 of 600 pictures"), "{err}");
    let rows = csv(&out);
    let expected: Vec<String> = (0..600).filter(|i| i % 97 != 96).map(name).collect();
    let found: Vec<&String> = rows.iter().map(|row| &row["file"]).collect();
    assert_eq!(found, expected.iter().collect::<Vec<_>>());
    // Across the batches, behind a gap, and at the end.
    for i in [0, 97, 301, 599] {
        let alone = csv(&bench.good(&["predict", "run", &name(i), "--csv", "--device", "cpu"]));
        let row = rows.iter().find(|row| row["file"] == name(i)).unwrap();
        assert_eq!(alone[0], *row);
    }
    // 261 of them: what is left for the network in the end is less than a batch of it.
    for i in 261..600 {
        fs::remove_file(bench.path(&name(i))).unwrap();
    }
    let few = ["predict", "run", "many", "--csv", "--device", "software"];
    let shaders = csv(&bench.bad(&few, 1).0);
    assert_eq!(shaders.len(), 259);
    for (shaders, cpu) in shaders.iter().zip(&rows) {
        assert_eq!(shaders["file"], cpu["file"]);
        let [a, b]: [f64; 2] = [shaders, cpu].map(|row| row["share_1"].parse().unwrap());
        assert!((a - b).abs() < 1e-4, "{shaders:?} {cpu:?}");
    }
}

/// A short training on handwritten digits, made once.
fn digits() -> &'static Path {
    static RUN: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = RUN.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let arguments = "train --data mnist --model tiny --limit 3000 --epochs 4 --batch-size 50 --device cpu --out run";
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let output = command(folder.path(), &arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        folder
    });
    folder.path()
}

/// Test images of handwritten digits with their labels.
fn handwritten(count: usize) -> Vec<(GrayImage, u32)> {
    let splits =
        wgrad::data::load("mnist", &wgrad::data::Request::default(), &mut |_, _| {}).unwrap();
    let images = splits.test.images.chunks(28 * 28).zip(splits.test.labels);
    let images = images.take(count);
    images
        .map(|(pixels, label)| (GrayImage::from_raw(28, 28, pixels.to_vec()).unwrap(), label))
        .collect()
}

#[test]
fn dark_ink_on_paper_is_recognised_and_centred() {
    let folder = tempfile::tempdir().unwrap();
    let run = digits().join("run");
    let run = run.to_str().unwrap();
    let predict = |arguments: &[&str]| {
        let arguments = [&["predict", run][..], arguments, &["--device", "cpu"]].concat();
        let output = command(folder.path(), &arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for kind in ["own", "negative", "paper"] {
        fs::create_dir(folder.path().join(kind)).unwrap();
    }
    let digits = handwritten(200);
    for (i, (digit, label)) in digits.iter().enumerate() {
        let save = |kind: &str, picture: &GrayImage| {
            let path = folder.path().join(format!("{kind}/{i:03}-{label}.png"));
            fs::write(path, encoded(&picture.clone().into(), ImageFormat::Png)).unwrap();
        };
        save("own", digit);
        let negative = GrayImage::from_fn(28, 28, |x, y| Luma([255 - digit.get_pixel(x, y)[0]]));
        save("negative", &negative);
        // Four times as large, in a corner of a grey sheet, in grey ink.
        let sheet = GrayImage::from_fn(200, 150, |x, y| {
            let (x, y) = (x.wrapping_sub(80) / 4, y.wrapping_sub(10) / 4);
            let ink = if x < 28 && y < 28 {
                digit.get_pixel(x, y)[0]
            } else {
                0
            };
            Luma([200 - (u32::from(ink) * 150 / 255) as u8])
        });
        save("paper", &sheet);
    }
    let accuracy = |rows: &[BTreeMap<String, String>]| {
        let correct = rows
            .iter()
            .filter(|row| row["file"].ends_with(&format!("-{}.png", row["class_1"])));
        correct.count() as f64 / rows.len() as f64
    };
    let own = csv(&predict(&["own", "--csv"]));
    assert!(accuracy(&own) > 0.8, "{}", accuracy(&own));
    assert!(
        own.iter()
            .all(|row| row["inverted"] == "false" && row["centred"] == "false")
    );
    // The negative is the same picture for the network.
    let negative = csv(&predict(&["negative", "--csv"]));
    assert!(
        negative
            .iter()
            .all(|row| row["inverted"] == "true" && row["centred"] == "false")
    );
    for (own, negative) in own.iter().zip(&negative) {
        assert_eq!(own["share_1"], negative["share_1"], "{own:?}");
    }
    let paper = csv(&predict(&["paper", "--csv"]));
    assert!(
        paper
            .iter()
            .all(|row| row["inverted"] == "true" && row["centred"] == "true")
    );
    assert!(
        accuracy(&paper) > accuracy(&own) - 0.08,
        "{} {}",
        accuracy(&paper),
        accuracy(&own)
    );
    let cropped = csv(&predict(&["paper", "--csv", "--no-centre"]));
    assert!(accuracy(&cropped) < 0.6, "{}", accuracy(&cropped));
    // It is said.
    let text = predict(&["negative", "own/000-7.png"]);
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        words.contains("inverted 200 of 201 pictures are dark ink on light paper"),
        "{text}"
    );
    assert!(
        text.lines()
            .any(|line| line.starts_with("negative/000-7.png") && line.ends_with("inverted")),
        "{text}"
    );
    assert!(!predict(&["own/000-7.png"]).contains("inverted"));
    let never = csv(&predict(&["negative", "--csv", "--invert", "never"]));
    assert!(never.iter().all(|row| row["inverted"] == "false"));
    assert!(accuracy(&never) < 0.6, "{}", accuracy(&never));
    let always = csv(&predict(&["own/000-7.png", "--csv", "--invert", "always"]));
    assert_eq!(always[0]["inverted"], "true");
}

/// A network that learned from pictures that are no ink takes every picture as it is.
#[test]
fn photographs_are_never_inverted() {
    let bench = Bench::new();
    let light = GrayImage::from_fn(60, 80, |x, y| {
        let dark = (20..40).contains(&x) && (20..60).contains(&y);
        Luma([if dark { 10 } else { 250 }])
    });
    fs::write(
        bench.path("light.png"),
        encoded(&light.into(), ImageFormat::Png),
    )
    .unwrap();
    let rows = csv(&bench.good(&["predict", "run", "light.png", "--csv", "--device", "cpu"]));
    assert_eq!(
        (&rows[0]["inverted"][..], &rows[0]["centred"][..]),
        ("false", "false")
    );
    let always = csv(&bench.good(&[
        "predict",
        "run",
        "light.png",
        "--csv",
        "--invert",
        "always",
        "--device",
        "cpu",
    ]));
    assert_eq!(always[0]["inverted"], "true");
    assert_ne!(always[0]["share_1"], rows[0]["share_1"]);
}
