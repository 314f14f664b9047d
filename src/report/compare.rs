//! Several runs side by side: what was done differently, and what came of it.

use super::page::{accuracy, data_name, duration, inline, line, number, render};
use super::plain;
use super::plot::{self, Axes, COLORS, Line};
use crate::error::Result;
use crate::files::{replace, sha256};
use crate::model::summary::thousands;
use crate::train::{Config, EpochRecord, Run};
use serde::Serialize;
use serde_json::{Value, json};
use std::path::{Component, Path};

/// What is known of several runs, each list in their order.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// What came of each.
    pub runs: Vec<Outcome>,
    /// Of the settings that are not the same for all, by key.
    pub differences: Vec<Difference>,
    /// What there is to mind about them, a sentence each.
    pub notes: Vec<String>,
    /// Of the last test accuracies, where the runs differ by nothing but their seeds: mean, and standard
    /// deviation of the sample.
    pub mean: Option<[f64; 2]>,
}

/// One setting.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Its key in `run.json`, with dots.
    pub key: String,
    /// As text; `None` for a run that has no such setting.
    pub values: Vec<Option<String>>,
}

/// How a run came out: figures of its last epoch, `None` where there is none or it is no number.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// As much of its path as tells it from the others.
    pub name: String,
    /// Its path as it was given.
    pub folder: String,
    /// That are finished.
    pub epochs: usize,
    /// Of the recipe.
    pub planned_epochs: usize,
    /// It was tested on so many.
    pub test_images: usize,
    /// Share of the test images, 0 to 1.
    pub test_accuracy: Option<f64>,
    /// Likewise of the averaged weights.
    pub average_test_accuracy: Option<f64>,
    /// Mean of a test image.
    pub test_loss: Option<f64>,
    /// Share of the validation images, 0 to 1.
    pub validation_accuracy: Option<f64>,
    /// Mean over the last epoch.
    pub train_loss: Option<f64>,
    /// That are trained.
    pub parameters: usize,
    /// Of all epochs.
    pub seconds: Option<f64>,
    /// Mean over the epochs, weighted by their time.
    pub images_per_second: Option<f64>,
    /// In one line.
    pub device: String,
}

/// Puts runs side by side.
pub fn compare(runs: &[Run]) -> Comparison {
    let names = names(runs);
    let outcomes: Vec<Outcome> = runs.iter().zip(names).map(|(r, n)| outcome(r, n)).collect();
    let differences = differences(runs);
    let mut notes = Vec::new();
    let tested: Vec<&Option<String>> = runs.iter().map(|r| &r.config().data.test_sha256).collect();
    if tested.windows(2).any(|pair| pair[0] != pair[1]) {
        notes.push("The runs were not tested on the same images: their losses and accuracies say little about each other.".into());
    }
    if outcomes.iter().any(|run| run.epochs < run.planned_epochs) {
        notes.push("Not all runs have finished the epochs that they planned.".into());
    }
    let seeds_alone = matches!(&differences[..], [only] if only.key == "seed");
    let equal = outcomes
        .windows(2)
        .all(|pair| pair[0].epochs == pair[1].epochs);
    let accuracies: Option<Vec<f64>> = outcomes.iter().map(|run| run.test_accuracy).collect();
    let mean = accuracies.filter(|_| seeds_alone && equal).map(|all| {
        let n = all.len() as f64;
        let mean = all.iter().sum::<f64>() / n;
        let squares: f64 = all.iter().map(|x| (x - mean).powi(2)).sum();
        [mean, (squares / (n - 1.0)).sqrt()]
    });
    Comparison {
        runs: outcomes,
        differences,
        notes,
        mean,
    }
}

/// Writes a page with runs and what [`compare`] made of them.
///
/// # Errors
/// [`crate::Error::Io`].
pub fn write(path: &Path, runs: &[Run], comparison: &Comparison) -> Result<()> {
    let labels: Vec<String> = comparison
        .runs
        .iter()
        .enumerate()
        .map(|(i, run)| match runs.len() {
            n if n > COLORS.len() => format!("#{}", i + 1),
            _ => format!("#{} {}", i + 1, run.name),
        })
        .collect();
    let mut plots = Vec::new();
    let mut draw =
        |title: &str, x: &str, y: &str, of: &dyn Fn(&Run) -> Vec<[f64; 2]>| -> Result<()> {
            let lines: Vec<Line> = runs
                .iter()
                .zip(&labels)
                .map(|(run, label)| line(label, of(run)))
                .collect();
            let axes = Axes {
                title,
                x,
                y,
                whole: x == "epoch" || x == "step",
            };
            plots.extend(plot::lines(&axes, &lines)?.map(|svg| inline(&svg)));
            Ok(())
        };
    let by_epoch = |run: &Run, value: &dyn Fn(&EpochRecord) -> f64| -> Vec<[f64; 2]> {
        run.metrics()
            .iter()
            .map(|r| [r.epoch as f64, value(r)])
            .collect()
    };
    draw(
        "Test accuracy by epoch",
        "epoch",
        "test accuracy, %",
        &|run| by_epoch(run, &|r| 100.0 * r.test_accuracy),
    )?;
    draw(
        "Test accuracy by time",
        "time of training and evaluation, s",
        "test accuracy, %",
        &|run| {
            let mut seconds = 0.0;
            let at = |r: &EpochRecord| {
                seconds += r.seconds;
                [seconds, 100.0 * r.test_accuracy]
            };
            run.metrics().iter().map(at).collect()
        },
    )?;
    draw("Test loss by epoch", "epoch", "test loss", &|run| {
        by_epoch(run, &|r| r.test_loss)
    })?;
    draw(
        "Validation accuracy by epoch",
        "epoch",
        "validation accuracy, %",
        &|run| by_epoch(run, &|r| 100.0 * r.validation_accuracy.unwrap_or(f64::NAN)),
    )?;
    draw("Training loss by epoch", "epoch", "training loss", &|run| {
        by_epoch(run, &|r| r.train_loss)
    })?;
    draw("Training loss by step", "step", "training loss", &|run| {
        run.steps()
            .iter()
            .map(|s| [s.step as f64, s.loss])
            .collect()
    })?;
    // Columns of nothing but dashes are left out.
    let all: Vec<[String; 9]> = comparison.runs.iter().map(figures).collect();
    let kept: Vec<usize> = (0..HEADER.len())
        .filter(|column| all.iter().any(|row| row[*column] != "—"))
        .collect();
    let rows = comparison.runs.iter().zip(&all).enumerate();
    let rows = rows.map(|(i, (run, all))| {
        json!({
            "number": i + 1,
            "color": i % COLORS.len(),
            "name": plain(&run.name, 40),
            "folder": plain(&run.folder, 300),
            "figures": kept.iter().map(|column| &all[*column]).collect::<Vec<_>>(),
        })
    });
    let differences = comparison
        .differences
        .iter()
        .map(|Difference { key, values }| {
            let values: Vec<String> = values.iter().map(|v| cell(v, 200)).collect();
            json!({"key": key, "values": values})
        });
    let context = json!({
        "title": format!("{} runs compared", runs.len()),
        "header": kept.iter().map(|column| HEADER[*column]).collect::<Vec<_>>(),
        "runs": rows.collect::<Vec<_>>(),
        "differences": differences.collect::<Vec<_>>(),
        "plots": plots,
        "notes": comparison.notes,
        "mean": comparison.mean_line(),
        "repeated": runs.len() > COLORS.len(),
    });
    let page = render("compare.html", include_str!("compare.html"), context)?;
    replace(path, page.as_bytes())
}

/// What [`figures`] are.
pub const HEADER: [&str; 9] = [
    "epochs",
    "test accuracy",
    "test loss",
    "average",
    "validation",
    "training loss",
    "parameters",
    "time",
    "images/s",
];

/// A run's figures as text, a dash for what there is none of.
pub fn figures(run: &Outcome) -> [String; 9] {
    let or_dash = |value: Option<f64>, text: &dyn Fn(f64) -> String| value.map_or("—".into(), text);
    let percent = |value: Option<f64>| or_dash(value, &super::page::share);
    [
        match run.epochs == run.planned_epochs {
            true => run.epochs.to_string(),
            false => format!("{} of {}", run.epochs, run.planned_epochs),
        },
        or_dash(run.test_accuracy, &|p| accuracy(p, run.test_images)),
        or_dash(run.test_loss, &number),
        percent(run.average_test_accuracy),
        percent(run.validation_accuracy),
        or_dash(run.train_loss, &number),
        thousands(run.parameters),
        or_dash(run.seconds, &duration),
        or_dash(run.images_per_second, &|rate| {
            thousands(rate.round() as usize)
        }),
    ]
}

/// A setting in a table.
pub fn cell(value: &Option<String>, most: usize) -> String {
    value
        .as_ref()
        .map_or("—".into(), |value| plain(value, most))
}

impl Comparison {
    /// Mean and deviation in a line; empty where there are none.
    pub fn mean_line(&self) -> String {
        self.mean.map_or(String::new(), |[mean, deviation]| {
            format!(
                "{:.2} % ± {:.2}: mean and standard deviation of the test accuracy of {} runs that differ by their seeds alone",
                100.0 * mean,
                100.0 * deviation,
                self.runs.len()
            )
        })
    }
}

/// As many of the last parts of every run's path as tell them apart.
fn names(runs: &[Run]) -> Vec<String> {
    let parts: Vec<Vec<String>> = runs
        .iter()
        .map(|run| {
            let named = run.folder().components();
            let named = named.filter(|c| matches!(c, Component::Normal(_)));
            named
                .map(|c| c.as_os_str().to_string_lossy().into_owned())
                .collect()
        })
        .collect();
    let last = |count: usize| -> Vec<String> {
        let of = |p: &Vec<String>| p[p.len().saturating_sub(count)..].join("/");
        parts.iter().map(of).collect()
    };
    let apart = |names: &Vec<String>| {
        let mut sorted = names.clone();
        sorted.sort();
        sorted.windows(2).all(|pair| pair[0] != pair[1])
    };
    let most = parts.iter().map(Vec::len).max().unwrap_or(1);
    // A seed's folder says little without the one that it is in.
    let seeds = last(1).iter().any(|name| name.starts_with("seed-"));
    let least = if seeds { 2 } else { 1 };
    let names = (least..=most).map(last).find(apart);
    // The same run twice is the same by any name.
    let names = names.unwrap_or_else(|| last(1));
    let shown = names.iter().map(|name| match name.is_empty() {
        true => ".".into(),
        false => plain(name, 80),
    });
    shown.collect()
}

fn outcome(run: &Run, name: String) -> Outcome {
    let (config, metrics) = (run.config(), run.metrics());
    let last = metrics.last();
    let finite = |value: f64| Some(value).filter(|v| v.is_finite());
    let seconds = finite(metrics.iter().map(|r| r.seconds).sum()).filter(|_| last.is_some());
    // The mean rate of epochs of as many images each is harmonic.
    let rates = metrics.iter().map(|r| r.images_per_second);
    let rates: Vec<f64> = rates.filter(|rate| *rate > 0.0).collect();
    let harmonic = rates.len() as f64 / rates.iter().map(|rate| 1.0 / rate).sum::<f64>();
    Outcome {
        name,
        folder: run.folder().display().to_string(),
        epochs: last.map_or(0, |r| r.epoch),
        planned_epochs: config.recipe.epochs,
        test_images: config.data.test_images,
        test_accuracy: last.and_then(|r| finite(r.test_accuracy)),
        average_test_accuracy: last.and_then(|r| r.average_test_accuracy),
        test_loss: last.and_then(|r| finite(r.test_loss)),
        validation_accuracy: last.and_then(|r| r.validation_accuracy),
        train_loss: last.and_then(|r| finite(r.train_loss)),
        parameters: run.model().parameter_count(),
        seconds,
        images_per_second: finite(harmonic),
        device: config.device.description.clone(),
    }
}

/// The settings of each run, those first that decide most.
fn differences(runs: &[Run]) -> Vec<Difference> {
    let all: Vec<Vec<(String, String)>> = runs.iter().map(|r| settings(r.config())).collect();
    let mut keys: Vec<&String> = Vec::new();
    for (key, _) in all.iter().flatten() {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    let rows = keys.into_iter().map(|key| Difference {
        key: key.clone(),
        values: all
            .iter()
            .map(|settings| {
                let found = settings.iter().find(|(name, _)| name == key);
                found.map(|(_, value)| value.clone())
            })
            .collect(),
    });
    rows.filter(|row| row.values.windows(2).any(|pair| pair[0] != pair[1]))
        .collect()
}

fn settings(config: &Config) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = Vec::new();
    let mut set = |key: &str, value: Option<String>| all.extend(value.map(|v| (key.into(), v)));
    let short = |hash: &Option<String>| hash.as_ref().map(|hash| hash.chars().take(8).collect());
    let text = sha256([config.model.architecture.as_bytes()]);
    set("model", Some(config.model.name.clone()));
    set("model file", Some(text[..8].into()));
    set("image shape", Some(config.model.input.to_string()));
    set("classes", Some(config.model.classes.to_string()));
    let data = &config.data;
    set("data", Some(data_name(config)));
    set("training images", Some(thousands(data.training_images)));
    set("validation images", Some(thousands(data.validation_images)));
    set("test images", Some(thousands(data.test_images)));
    set("limit", data.limit.map(|n| n.to_string()));
    set(
        "image_size",
        data.image_size.map(|[h, w]| format!("{h}×{w}")),
    );
    set("split_seed", Some(data.split_seed.to_string()));
    set("training SHA-256", short(&data.training_sha256));
    set("test SHA-256", short(&data.test_sha256));
    for (key, value) in config.recipe.settings() {
        set(&key, Some(value.trim_matches('"').into()));
    }
    set("seed", Some(config.seed.to_string()));
    set(
        "first weights",
        config.init.as_ref().map(|init| init.source.clone()),
    );
    set("device", Some(config.device.description.clone()));
    set(
        "kernels",
        config.device.family.map(|family| family.to_string()),
    );
    set(
        "im2col matrix",
        config.device.explicit_conv.then(|| "stored".into()),
    );
    set("wgrad", Some(config.wgrad.clone()));
    all
}

/// As `--json` prints it.
impl From<&Comparison> for Value {
    fn from(comparison: &Comparison) -> Value {
        serde_json::to_value(comparison).unwrap_or_default()
    }
}
