//! `report.html`: a run in one page without scripts or links to elsewhere, and each of its plots and
//! pictures as a file beside it.
//!
//! What is missing (a run that is not finished, data that are gone, a format from before something was
//! recorded) is left out, with a sentence that says so. The page is well-formed XML too.

use super::picture::{Filters, data_uri, filters, maps, mosaic, of_bytes, png};
use super::plain;
use super::plot::{self, Axes, Line};
use super::repeat::repeat;
use super::results::{BINS, Results};
use super::sheet::{Tile, contact_sheet};
use crate::engine::{Activation, activations};
use crate::error::{Error, Result};
use crate::files::{remove, replace};
use crate::model::summary::thousands;
use crate::model::{Loss, Shape};
use crate::train::{Config, EpochRecord, Run};
use image::{DynamicImage, RgbaImage};
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, absolute};

/// The page.
pub const PAGE: &str = "report.html";
/// The folder of the files beside it.
pub const FOLDER: &str = "report";

/// Classes of a confusion matrix that are shown one by one, and how many are where there are more.
const MOST_CLASSES: usize = 25;
const SHOWN_CLASSES: usize = 20;
const MISTAKES: usize = 24;
const PAIRS: usize = 10;
/// Lines of a plot, and layers of a picture's activations, at most.
const LINES: usize = 8;
const LAYERS: usize = 18;
/// Multiply-adds from which on the CPU shows the activations of one picture only, and of none.
const LARGE: u64 = 500_000_000;
const TOO_LARGE: u64 = 10_000_000_000;

/// The test images of a run, and what its last weights say of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Tested {
    /// `[N][H][W][C]`
    pub images: Vec<u8>,
    /// `[N]`
    pub labels: Vec<u32>,
    /// `[N]`
    pub predictions: Vec<u32>,
    /// `[N, classes]`, see [`crate::train::class_shares`].
    pub shares: Vec<f64>,
    /// `[N]`, the files of the images; empty where they have none of their own.
    pub files: Vec<String>,
    /// What there is to say about the images: that they are not the run's own.
    pub note: Option<String>,
}

/// Writes the page of a run and the files beside it into `folder`, in place of those that are there.
/// Without test images it says why there are none: the `Err` of `tested`.
///
/// # Errors
/// [`Error::Io`], and [`Error::Shape`] for test images that are not of the run's shape and classes.
pub fn write(run: &Run, tested: std::result::Result<&Tested, &str>, folder: &Path) -> Result<()> {
    let mut page = Page::default();
    let context = page.context(run, tested, folder)?;
    let html = render("report.html", include_str!("report.html"), context)?;
    let beside = folder.join(FOLDER);
    fs::create_dir_all(&beside).map_err(|e| Error::io("create", &beside, e))?;
    // Files of an earlier report that this one has none of.
    let entries = fs::read_dir(&beside).map_err(|e| Error::io("read", &beside, e))?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let own = NAMES.contains(&name.as_str()) && !page.files.iter().any(|(n, _)| *n == name);
        if own {
            remove(&entry.path())?;
        }
    }
    for (name, bytes) in &page.files {
        replace(&beside.join(name), bytes)?;
    }
    replace(&folder.join(PAGE), html.as_bytes())
}

/// A page of this template; every text in it is escaped but for plots and style sheet.
pub(super) fn render(name: &str, template: &str, mut context: Value) -> Result<String> {
    context["style"] = json!(include_str!("page.css").trim());
    context["version"] = json!(env!("CARGO_PKG_VERSION"));
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment
        .render_named_str(name, template, minijinja::Value::from(Serde(&context)))
        .map_err(|e| Error::io("fill in", name.as_ref(), std::io::Error::other(e)))
}

/// Everything that a report writes beside the page.
const NAMES: [&str; 16] = [
    "loss-by-step.svg",
    "loss.svg",
    "accuracy.svg",
    "learning-rate.svg",
    "confusion.svg",
    "reliability.svg",
    "weight-norms.svg",
    "gradient-norms.svg",
    "mistakes.png",
    "filters.png",
    "activations-1.png",
    "activations-2.png",
    "activations-3.png",
    "model.toml",
    "time-by-layer.svg",
    "time-by-kernel.svg",
];

#[derive(Default)]
struct Page {
    /// Beside the page.
    files: Vec<(String, Vec<u8>)>,
}

impl Page {
    fn context(
        &mut self,
        run: &Run,
        tested: std::result::Result<&Tested, &str>,
        folder: &Path,
    ) -> Result<Value> {
        let config = run.config();
        let mut notes: Vec<String> = Vec::new();
        let metrics = run.metrics();
        let planned = config.recipe.epochs;
        let progress = match metrics.last() {
            None => format!("no epoch of {planned} is finished"),
            Some(last) if last.epoch >= planned => match planned {
                1 => "1 epoch, finished".into(),
                _ => format!("{planned} epochs, all finished"),
            },
            Some(last) if run.out_of_patience() => format!(
                "ended after epoch {} of {planned}, since none was better by validation for {} epochs",
                last.epoch,
                config.recipe.patience.unwrap_or(0)
            ),
            Some(last) => format!("{} of {planned} epochs finished", last.epoch),
        };
        if metrics
            .last()
            .is_some_and(|last| !last.test_accuracy.is_finite())
        {
            notes.push("The run has no test accuracy of its last epoch on record.".into());
        }
        let mut context = json!({
            "title": format!("{} on {}", config.model.name, data_name(config)),
            "folder": plain(&run.folder().display().to_string(), 300),
            "progress": progress,
            "figures": figures(run),
            "curves": self.curves(run)?,
            "tables": tables(config),
            "architecture": lines_of(&config.model.architecture),
            "json": lines_of(&serde_json::to_string_pretty(config).unwrap_or_default()),
            "hash": config.parameter_sha256,
        });
        let model_file = folder.join(FOLDER).join("model.toml");
        let model_file = absolute(&model_file).unwrap_or(model_file);
        let again = repeat(config, metrics, &model_file);
        if again.words.iter().any(|word| Path::new(word) == model_file) {
            let text = config.model.architecture.clone();
            self.files.push(("model.toml".into(), text.into_bytes()));
        }
        context["command"] = json!(lines_of(&again.line()));
        context["doubts"] = json!(again.doubts);
        let results = match tested {
            Ok(tested) => {
                notes.extend(tested.note.clone());
                Some(self.results(config, tested, &mut context)?)
            }
            Err(why) => {
                notes.push(why.into());
                None
            }
        };
        self.inside(run, tested.ok().zip(results.as_ref()), &mut context)?;
        context["profile"] = self.profile(run.folder())?;
        context["notes"] = json!(notes);
        Ok(context)
    }

    /// A plot for the page, which is kept as a file too.
    fn plot(&mut self, file: &str, note: &str, svg: String) -> Value {
        self.files.push((file.into(), svg.clone().into_bytes()));
        json!({"svg": inline(&svg), "note": note})
    }

    fn plot_lines(
        &mut self,
        file: &str,
        note: &str,
        axes: Axes,
        lines: &[Line],
        into: &mut Vec<Value>,
    ) -> Result<()> {
        if let Some(svg) = plot::lines(&axes, lines)? {
            let plot = self.plot(file, note, svg);
            into.push(plot);
        }
        Ok(())
    }

    fn curves(&mut self, run: &Run) -> Result<Vec<Value>> {
        let (metrics, recipe) = (run.metrics(), &run.config().recipe);
        let mut plots = Vec::new();
        let loss = loss_in_words(run.model().loss);
        let y = format!("loss, {loss} per image");
        let steps: Vec<[f64; 2]> = run
            .steps()
            .iter()
            .map(|s| [s.step as f64, s.loss])
            .collect();
        let x = format!("step (of {} images)", recipe.batch_size);
        let axes = Axes {
            title: "Training loss by step",
            x: &x,
            y: &y,
            whole: true,
        };
        self.plot_lines(
            "loss-by-step.svg",
            "Means of the steps up to each point, every batch before its update.",
            axes,
            &[line("", steps)],
            &mut plots,
        )?;
        let [losses, accuracies] = epoch_lines(metrics);
        let axes = Axes {
            title: "Loss by epoch",
            x: "epoch",
            y: &y,
            whole: true,
        };
        let note = match recipe.label_smoothing > 0.0 || !recipe.augment.is_none() {
            true => {
                "The training loss is of what the network is trained on, with augmentation and label smoothing where the recipe has them; the others are plain."
            }
            false => {
                "The training loss is a mean over the epoch while the weights move; the others are of its end."
            }
        };
        self.plot_lines("loss.svg", note, axes, &losses, &mut plots)?;
        let axes = Axes {
            title: "Accuracy by epoch",
            y: "accuracy, %",
            ..axes
        };
        self.plot_lines("accuracy.svg", "", axes, &accuracies, &mut plots)?;
        let rates: Vec<[f64; 2]> = match run.steps() {
            [] => metrics.iter().map(|r| [r.epoch as f64, r.lr]).collect(),
            steps => steps.iter().map(|s| [s.step as f64, s.lr]).collect(),
        };
        let axes = Axes {
            title: "Learning rate",
            x: if run.steps().is_empty() { "epoch" } else { &x },
            y: "learning rate per step",
            whole: true,
        };
        self.plot_lines(
            "learning-rate.svg",
            "",
            axes,
            &[line("", rates)],
            &mut plots,
        )?;
        Ok(plots)
    }

    /// Everything that the test images show.
    fn results(
        &mut self,
        config: &Config,
        tested: &Tested,
        context: &mut Value,
    ) -> Result<Results> {
        let classes = config.model.classes;
        let names: Vec<String> = (0..classes)
            .map(|class| class_name(config, class))
            .collect();
        let results = Results::of(&tested.labels, &tested.predictions, &tested.shares, classes)?;
        let n = results.len();
        context["results"] = json!({
            "of": format!(
                "By the weights after the last epoch, on {} test images; {} right.",
                thousands(n),
                share(results.accuracy())
            )
        });
        let (shown, counts, note) = limited(&names, &results);
        let rows = counts.iter().enumerate().map(|(t, row)| {
            let images = row.iter().sum::<usize>().max(1) as f64;
            let cells = row.iter().enumerate().map(|(p, count)| {
                let rest = counts.len() > 1 && note.is_some() && t + 1 == counts.len();
                let kind = match (t == p, rest) {
                    (true, true) => "rest",
                    (true, false) => "right",
                    (false, _) => "wrong",
                };
                let share = (*count as f64 / images).sqrt();
                json!({
                    "count": if *count > 0 { count.to_string() } else { String::new() },
                    "kind": kind,
                    "share": format!("{share:.3}"),
                })
            });
            json!({"name": shown[t], "cells": cells.collect::<Vec<_>>()})
        });
        context["matrix"] = json!({
            "turned": shown.iter().any(|name| name.chars().count() > 3),
            "names": shown,
            "rows": rows.collect::<Vec<_>>(),
            "note": note,
        });
        let svg = plot::confusion(&shown, &counts)?;
        self.files.push(("confusion.svg".into(), svg.into_bytes()));
        let scores = names.iter().zip(results.classes()).map(|(name, scores)| {
            let or_dash = |value: Option<f64>| value.map_or("—".into(), share);
            json!({
                "name": name,
                "images": thousands(scores.images),
                "precision": or_dash(scores.precision),
                "recall": or_dash(scores.recall),
                "f1": or_dash(scores.f1),
            })
        });
        context["scores"] = scores.collect();
        let confused = results
            .most_confused(PAIRS)
            .into_iter()
            .map(|[t, p, count]| {
                let images: usize = results.confusion[t].iter().sum();
                json!({
                    "true": names[t],
                    "said": names[p],
                    "count": thousands(count),
                    "share": share(count as f64 / images as f64),
                })
            });
        context["confused"] = confused.collect();
        self.mistakes(config, tested, &results, &names, context)?;
        self.calibration(config, &results, context)?;
        Ok(results)
    }

    fn mistakes(
        &mut self,
        config: &Config,
        tested: &Tested,
        results: &Results,
        names: &[String],
        context: &mut Value,
    ) -> Result<()> {
        let mut shown = Vec::new();
        let mut tiles = Vec::new();
        for i in results.worst(MISTAKES) {
            let Some(picture) = image_of(config, tested, i) else {
                continue;
            };
            let [t, p] = results.pairs[i].map(|class| names[class].clone());
            let sure = share(results.confidence[i]);
            let caption = format!("is {t}\nsaid {p}\n{sure}");
            shown.push(json!({
                "src": data_uri(&png(&picture)?),
                "width": picture.width(),
                "height": picture.height(),
                "number": i,
                "true": plain(&t, 40),
                "said": plain(&p, 40),
                "sure": sure,
                "file": tested.files.get(i).map(|file| plain(file, 80)),
            }));
            tiles.push((picture, caption));
        }
        self.sheet(
            "mistakes.png",
            "worst mistakes: what it is, what was said, how sure",
            6,
            &tiles,
        )?;
        context["mistakes"] = json!(shown);
        Ok(())
    }

    /// A contact sheet beside the page; none without pictures.
    fn sheet(
        &mut self,
        file: &str,
        title: &str,
        columns: usize,
        pictures: &[(RgbaImage, String)],
    ) -> Result<()> {
        if pictures.is_empty() {
            return Ok(());
        }
        let opaque = |(picture, caption): &(RgbaImage, String)| {
            let picture = DynamicImage::from(picture.clone()).into_rgb8();
            (picture, caption.clone())
        };
        let pictures: Vec<_> = pictures.iter().map(opaque).collect();
        let tiles: Vec<Tile> = pictures
            .iter()
            .map(|(picture, caption)| Tile {
                pixels: picture.as_raw(),
                shape: Shape::new(picture.height() as usize, picture.width() as usize, 3),
                caption: caption.clone(),
            })
            .collect();
        let sheet = contact_sheet(title, columns, &tiles)?;
        self.files.push((file.into(), sheet));
        Ok(())
    }

    fn calibration(
        &mut self,
        config: &Config,
        results: &Results,
        context: &mut Value,
    ) -> Result<()> {
        let calibration = results.calibration();
        let n = results.len().max(1) as f64;
        let confidence = results.confidence.iter().sum::<f64>() / n;
        let accuracy = results.accuracy();
        let verdict = match confidence - accuracy {
            gap if gap > 0.01 => "the network is surer than it ought to be",
            gap if gap < -0.01 => "the network is less sure than it could be",
            _ => "on the whole it is as sure as it is right",
        };
        let width = 100.0 / BINS as f64;
        let rows = calibration.bins.iter().enumerate().map(|(i, bin)| {
            let or_dash = |value: f64| match bin.images {
                0 => "—".into(),
                _ => share(value),
            };
            json!({
                "range": format!("{:.0}–{:.0} %", width * i as f64, width * (i + 1) as f64),
                "images": thousands(bin.images),
                "confidence": or_dash(bin.confidence),
                "accuracy": or_dash(bin.accuracy),
            })
        });
        let squared = config.model.architecture.contains("squared_error");
        let note = "The network learned by squared error: its outputs stand for probabilities, those beyond 0 and 1 for the nearer one.";
        context["calibration"] = json!({
            "error": share(calibration.error),
            "bins": BINS,
            "confidence": share(confidence),
            "accuracy": share(accuracy),
            "verdict": verdict,
            "note": if squared { note } else { "" },
            "rows": rows.collect::<Vec<_>>(),
            "svg": inline(&plot::reliability(&calibration)?),
        });
        let svg = plot::reliability(&calibration)?;
        self.files
            .push(("reliability.svg".into(), svg.into_bytes()));
        Ok(())
    }

    /// Filters, activations, norms.
    fn inside(
        &mut self,
        run: &Run,
        tested: Option<(&Tested, &Results)>,
        context: &mut Value,
    ) -> Result<()> {
        let mut missing = Vec::new();
        match run.weights() {
            Ok([parameters, running]) => {
                if let Some(Filters { layer, tiles, note }) = filters(run.model(), &parameters) {
                    let picture = mosaic(&tiles, 8);
                    let bytes = png(&picture)?;
                    context["filters"] = json!({
                        "layer": layer,
                        "src": data_uri(&bytes),
                        "width": picture.width(),
                        "height": picture.height(),
                        "note": note,
                    });
                    self.files.push(("filters.png".into(), bytes));
                }
                match tested {
                    Some((tested, results)) => {
                        self.activations(run, [&parameters, &running], tested, results, context)?;
                        if run.model().multiply_adds() > TOO_LARGE {
                            missing.push(format!("Activations are left out: {} multiply-adds for an image are too many to wait for.", thousands(run.model().multiply_adds())));
                        }
                    }
                    None => missing.push("Activations need test images to show.".into()),
                }
            }
            Err(e) => missing.push(format!("There are no weights to show: {e}.")),
        }
        let metrics = run.metrics();
        let mut norms = Vec::new();
        for (file, title, of) in [
            (
                "weight-norms.svg",
                "Norms of the weights",
                (|r| &r.weight_norms) as fn(&EpochRecord) -> &BTreeMap<String, f64>,
            ),
            ("gradient-norms.svg", "Norms of the gradients", |r| {
                &r.gradient_norms
            }),
        ] {
            let (lines, note) = norm_lines(run, of);
            let axes = Axes {
                title,
                x: "epoch",
                y: "L2 norm",
                whole: true,
            };
            self.plot_lines(file, &note, axes, &lines, &mut norms)?;
        }
        if norms.is_empty() && !metrics.is_empty() {
            missing.push("Norms of weights and gradients were not recorded by the version of wgrad that trained this run.".into());
        }
        context["norms"] = json!(norms);
        if let Some(last) = metrics.last() {
            let digits = |value: Option<&f64>| value.map_or("—".into(), |v| format!("{v:.4e}"));
            let rows = last.weight_norms.iter().map(|(name, norm)| {
                json!({
                    "name": name,
                    "weight": digits(Some(norm)),
                    "gradient": digits(last.gradient_norms.get(name)),
                })
            });
            context["last_norms"] = rows.collect();
        }
        context["inside_note"] = json!(missing.join(" "));
        Ok(())
    }

    /// What the layers give for a few test images: two that the network is right about and the worst
    /// mistake, as far as there are any.
    fn activations(
        &mut self,
        run: &Run,
        [parameters, running]: [&Vec<f32>; 2],
        tested: &Tested,
        results: &Results,
        context: &mut Value,
    ) -> Result<()> {
        let (config, model) = (run.config(), run.model());
        let pairs = results.pairs.iter().enumerate();
        let mut right: Vec<usize> = Vec::new();
        for (i, [t, p]) in pairs {
            let new = right.iter().all(|other| results.pairs[*other][0] != *t);
            if t == p && new && right.len() < 2 {
                right.push(i);
            }
        }
        right.extend(results.worst(1));
        right.truncate(match model.multiply_adds() {
            n if n > TOO_LARGE => 0,
            n if n > LARGE => 1,
            _ => 3,
        });
        let normalization = config.scale_and_shift();
        let mut pictures = Vec::new();
        for (number, i) in right.into_iter().enumerate() {
            let elements = model.input.elements();
            let Some(image) = tested.images.get(i * elements..(i + 1) * elements) else {
                continue;
            };
            let all = activations(model, parameters, running, &normalization, image)?;
            let kept = evenly(all.len(), LAYERS);
            if kept.len() < all.len() {
                context["layers_note"] = json!(format!(
                    "{} of {} layers are shown, evenly over the network.",
                    kept.len(),
                    all.len()
                ));
            }
            let mut shown = Vec::new();
            let mut tiles = Vec::new();
            for Activation {
                layer,
                shape,
                values,
            } in kept.into_iter().map(|at| &all[at])
            {
                // The image is best seen as it is.
                let own = image_of(config, tested, i).filter(|_| layer == "input");
                let own = own.map(|picture| (picture, shape.channels));
                let Some((picture, channels)) = own.or_else(|| maps(*shape, values)) else {
                    continue;
                };
                let note = match channels < shape.channels {
                    true => format!("the first {channels}"),
                    false => String::new(),
                };
                let layer = plain(layer, 60);
                shown.push(json!({
                    "src": data_uri(&png(&picture)?),
                    "width": picture.width(),
                    "height": picture.height(),
                    "layer": layer,
                    "shape": shape.to_string(),
                    "note": note,
                }));
                tiles.push((picture, format!("{layer} {shape}")));
            }
            let class = plain(&class_name(config, results.pairs[i][0]), 60);
            let classes = config.model.classes;
            let shares = tested.shares.get(i * classes..(i + 1) * classes);
            let file = tested.files.get(i).map(|file| plain(file, 120));
            let named: Vec<&str> = [Some(&class), file.as_ref()]
                .into_iter()
                .flatten()
                .map(String::as_str)
                .collect();
            let title = format!("Test image {i}: {}", named.join(", "));
            let sheet = format!("activations-{}.png", number + 1);
            self.sheet(&sheet, &title, 6, &tiles)?;
            pictures.push(json!({
                "number": i,
                "named": named,
                "said": most_likely(config, shares.unwrap_or(&[])),
                "maps": shown,
            }));
        }
        context["activations"] = json!(pictures);
        Ok(())
    }

    /// The time of a step by layer and by kernel, from `profile.json`; null where there is none that can be
    /// read.
    fn profile(&mut self, folder: &Path) -> Result<Value> {
        let text = fs::read_to_string(folder.join("profile.json")).unwrap_or_default();
        let trace: Value = serde_json::from_str(&text).unwrap_or_default();
        let Some(events) = trace["traceEvents"].as_array() else {
            return Ok(Value::Null);
        };
        let mut layers: Vec<(String, f64)> = Vec::new();
        let mut kernels: Vec<(String, f64)> = Vec::new();
        for event in events {
            let (Some(name), Some(kernel), Some(micros)) = (
                event["name"].as_str(),
                event["cat"].as_str(),
                event["dur"].as_f64(),
            ) else {
                continue;
            };
            let layer = name.strip_suffix(kernel).unwrap_or(name).trim();
            for (list, name) in [(&mut layers, layer), (&mut kernels, kernel)] {
                match list.iter_mut().find(|(known, _)| known == name) {
                    Some((_, time)) => *time += micros,
                    None => list.push((name.into(), micros)),
                }
            }
        }
        let total: f64 = layers.iter().map(|(_, micros)| micros).sum();
        if total <= 0.0 {
            return Ok(Value::Null);
        }
        kernels.sort_by(|a, b| b.1.total_cmp(&a.1));
        let rows = |list: &[(String, f64)]| -> Vec<Value> {
            let largest = list.iter().map(|(_, micros)| *micros).fold(0.0, f64::max);
            let row = |(name, micros): &(String, f64)| {
                json!({
                    "name": plain(name, 80),
                    "ms": format!("{:.3}", micros / 1e3),
                    "percent": format!("{:.1}", 100.0 * micros / total),
                    "width": format!("{:.1}", 100.0 * micros / largest.max(f64::MIN_POSITIVE)),
                })
            };
            list.iter().map(row).collect()
        };
        for (file, title, list) in [
            (
                "time-by-layer.svg",
                "Time of a training step by layer",
                &layers,
            ),
            (
                "time-by-kernel.svg",
                "Time of a training step by kernel",
                &kernels,
            ),
        ] {
            let parts = list
                .iter()
                .map(|(name, micros)| (name.clone(), micros / 1e3));
            let svg = plot::times(title, &parts.collect::<Vec<_>>())?;
            self.files.push((file.into(), svg.into_bytes()));
        }
        Ok(json!({
            "total": format!("{:.3} ms", total / 1e3),
            "layers": rows(&layers),
            "kernels": rows(&kernels),
        }))
    }
}

/// The three classes with the largest probabilities, and these.
fn most_likely(config: &Config, shares: &[f64]) -> Vec<[String; 2]> {
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_by(|a, b| shares[*b].total_cmp(&shares[*a]));
    let first = order.iter().take(3).map(|class| {
        let name = plain(&class_name(config, *class), 40);
        [name, share(shares[*class])]
    });
    first.collect()
}

/// At most `most` of so many things, the first and the last among them.
fn evenly(count: usize, most: usize) -> Vec<usize> {
    match count <= most {
        true => (0..count).collect(),
        false => (0..most).map(|i| i * (count - 1) / (most - 1)).collect(),
    }
}

/// A plot as it stands in a page: in the page's colours, and without the name space that is a file's.
pub(super) fn inline(svg: &str) -> String {
    svg.replacen(" xmlns=\"http://www.w3.org/2000/svg\"", "", 1)
}

pub(super) fn line(name: &str, points: Vec<[f64; 2]>) -> Line {
    Line {
        name: name.into(),
        points,
    }
}

/// The lines of the losses, and of the accuracies in per cent, of those splits that there are.
fn epoch_lines(metrics: &[EpochRecord]) -> [Vec<Line>; 2] {
    let of = |name: &str, factor: f64, value: &dyn Fn(&EpochRecord) -> Option<f64>| {
        let points = metrics
            .iter()
            .filter_map(|r| Some([r.epoch as f64, factor * value(r)?]));
        line(name, points.collect())
    };
    let losses = vec![
        of("training", 1.0, &|r| Some(r.train_loss)),
        of("validation", 1.0, &|r| r.validation_loss),
        of("test", 1.0, &|r| Some(r.test_loss)),
        of("test, average", 1.0, &|r| r.average_test_loss),
    ];
    let accuracies = vec![
        of("training", 100.0, &|r| Some(r.train_accuracy)),
        of("validation", 100.0, &|r| r.validation_accuracy),
        of("test", 100.0, &|r| Some(r.test_accuracy)),
        of("test, average", 100.0, &|r| r.average_test_accuracy),
    ];
    [losses, accuracies]
}

/// A line for the weight of each convolution and dense layer, in the network's order; of some of them where
/// there are many, with a sentence about that.
fn norm_lines(run: &Run, of: fn(&EpochRecord) -> &BTreeMap<String, f64>) -> (Vec<Line>, String) {
    let metrics = run.metrics();
    let layers = run.model().layers.iter();
    let names: Vec<String> = layers
        .filter(|layer| layer.op.product().is_some())
        .map(|layer| layer.name.clone())
        .collect();
    let kept = evenly(names.len(), LINES);
    let note = match kept.len() < names.len() {
        true => format!(
            "{} of {} layers, evenly over the network; all are in the table below.",
            kept.len(),
            names.len()
        ),
        false => String::new(),
    };
    let lines = kept.into_iter().map(|at| {
        let weight = format!("{}.weight", names[at]);
        let points = metrics
            .iter()
            .filter_map(|r| Some([r.epoch as f64, *of(r).get(&weight)?]));
        line(&names[at], points.collect())
    });
    (lines.collect(), note)
}

/// The names and counts of a confusion matrix; where there are many classes, of those that are mixed up
/// most, with all others as one, and a sentence about that. The counts add up to all images.
fn limited(names: &[String], results: &Results) -> (Vec<String>, Vec<Vec<usize>>, Option<String>) {
    let classes = names.len();
    let counts = &results.confusion;
    if classes <= MOST_CLASSES {
        return (names.to_vec(), counts.clone(), None);
    }
    let wrong = |class: usize| -> usize {
        let others = (0..classes).filter(|other| *other != class);
        others.map(|o| counts[class][o] + counts[o][class]).sum()
    };
    let mut order: Vec<usize> = (0..classes).collect();
    order.sort_by_key(|class| (std::cmp::Reverse(wrong(*class)), *class));
    order.truncate(SHOWN_CLASSES);
    order.sort_unstable();
    let rest = classes - order.len();
    let place = |class: usize| order.binary_search(&class).unwrap_or(order.len());
    let mut grouped = vec![vec![0; order.len() + 1]; order.len() + 1];
    for (t, row) in counts.iter().enumerate() {
        for (p, count) in row.iter().enumerate() {
            grouped[place(t)][place(p)] += count;
        }
    }
    let mut shown: Vec<String> = order.iter().map(|class| names[*class].clone()).collect();
    shown.push(format!("{rest} others"));
    let note = format!(
        "{classes} classes are too many to show one by one: these are the {} that are mixed up most often; the other {rest} are one row and one column, where what they are taken for among themselves, right or wrong, is in the last field.",
        order.len()
    );
    (shown, grouped, Some(note))
}

/// The name of a class, or its number where there is none.
fn class_name(config: &Config, class: usize) -> String {
    match config.model.class_names.get(class) {
        Some(name) => plain(name, 200),
        None => class.to_string(),
    }
}

fn image_of(config: &Config, tested: &Tested, i: usize) -> Option<RgbaImage> {
    let elements = config.model.input.elements();
    let bytes = tested.images.get(i * elements..(i + 1) * elements)?;
    of_bytes(bytes, config.model.input)
}

/// The data's name: `mnist`, or the last part of a path.
pub(super) fn data_name(config: &Config) -> String {
    let source = Path::new(&config.data.source);
    let name = source.file_name().unwrap_or(source.as_os_str());
    plain(&name.to_string_lossy(), 80)
}

fn loss_in_words(loss: Loss) -> &'static str {
    match loss {
        Loss::SoftmaxCrossEntropy => "nats (cross-entropy)",
        Loss::SquaredError => "½ squared error",
    }
}

/// The most important figures, each with what it is of.
fn figures(run: &Run) -> Vec<Value> {
    let (config, metrics) = (run.config(), run.metrics());
    let mut figures = Vec::new();
    let mut add = |name: &str, value: String, note: String| {
        // What is short stays on one line.
        let value = match value.chars().count() < 18 {
            true => value.replace(' ', "\u{a0}"),
            false => value,
        };
        figures.push(json!({"name": name, "value": value, "note": note}));
    };
    let images = config.data.test_images;
    if let Some(last) = metrics.last() {
        add(
            "Test accuracy",
            accuracy(last.test_accuracy, images),
            format!(
                "epoch {}, {} images; ± one binomial standard error",
                last.epoch,
                thousands(images)
            ),
        );
        for (name, value) in [
            ("In several views", last.test_accuracy_views),
            ("Of the averaged weights", last.average_test_accuracy),
            (
                "Averaged, in several views",
                last.average_test_accuracy_views,
            ),
        ] {
            if let Some(value) = value {
                add(name, accuracy(value, images), "test accuracy".into());
            }
        }
        if let Some(best) = run.best() {
            let value = best.validation_accuracy.unwrap_or(f64::NAN);
            add(
                "Best by validation",
                format!("epoch {}", best.epoch),
                format!(
                    "validation {}, test {}",
                    accuracy(value, config.data.validation_images),
                    accuracy(best.test_accuracy, images)
                ),
            );
        }
        add(
            "Test loss",
            number(last.test_loss),
            loss_in_words(run.model().loss).into(),
        );
        if let Some(scale) = last.loss_scale {
            let skipped = match last.skipped_steps.unwrap_or(0) {
                0 => "no step skipped".into(),
                n => format!(
                    "{} of {} steps skipped, whose gradients overflowed",
                    thousands(n as usize),
                    thousands(last.step as usize)
                ),
            };
            let value = match scale >= 1.0 {
                true => thousands(scale as usize),
                false => number(scale),
            };
            add("Loss scale", value, format!("mixed precision; {skipped}"));
        }
    }
    add(
        "Parameters",
        thousands(run.model().parameter_count()),
        format!(
            "{} multiply-adds for an image",
            thousands(run.model().multiply_adds())
        ),
    );
    if !metrics.is_empty() {
        let seconds: f64 = metrics.iter().map(|r| r.seconds).sum();
        add(
            "Time",
            duration(seconds),
            match metrics.len() {
                1 => "training and evaluation, 1 epoch".into(),
                n => format!("training and evaluation, {n} epochs"),
            },
        );
        let mut rates: Vec<f64> = metrics.iter().map(|r| r.images_per_second).collect();
        rates.retain(|rate| rate.is_finite());
        rates.sort_by(f64::total_cmp);
        if let Some(rate) = rates.get(rates.len() / 2) {
            let note = "while training, median of the epochs";
            add(
                "Images per second",
                thousands(rate.round() as usize),
                note.into(),
            );
        }
    }
    if !config.device.description.is_empty() {
        let all = plain(&config.device.description, 200);
        let (name, rest) = name_and_rest(&all);
        add("Device", name.into(), rest.into());
    }
    figures
}

/// The configuration, table by table.
fn tables(config: &Config) -> Vec<Value> {
    let table = |name: &str, rows: Vec<[String; 2]>| json!({"name": name, "rows": rows});
    let row = |key: &str, value: &dyn ToString| [key.to_string(), plain(&value.to_string(), 2000)];
    let some = |key: &str, value: Option<String>| value.map(|value| row(key, &value));
    let recipe = config.recipe.settings();
    let (augment, recipe): (Vec<_>, Vec<_>) = recipe
        .into_iter()
        .map(|(key, value)| [key, plain(value.trim_matches('"'), 2000)])
        .partition(|[key, _]| key.starts_with("augment."));
    let data = &config.data;
    let counts = [
        ("training images", data.training_images),
        ("validation images", data.validation_images),
        ("test images", data.test_images),
    ];
    let mut rows = vec![row("source", &data.source)];
    rows.extend(counts.map(|(key, count)| row(key, &thousands(count))));
    rows.push(row("shape", &config.model.input));
    rows.push(row("classes", &config.model.classes));
    rows.extend(
        [
            some("limit", data.limit.map(|n| n.to_string())),
            some(
                "image_size",
                data.image_size.map(|[h, w]| format!("{h}×{w}")),
            ),
            some("validation", data.validation.map(|x| x.to_string())),
            some("test", data.test.map(|x| x.to_string())),
            some("split_seed", Some(data.split_seed.to_string())),
            some("training SHA-256", data.training_sha256.clone()),
            some("validation SHA-256", data.validation_sha256.clone()),
            some("test SHA-256", data.test_sha256.clone()),
        ]
        .into_iter()
        .flatten(),
    );
    rows.push(row(
        "scale per channel",
        &format!("{:?}", config.normalization.scale),
    ));
    rows.push(row(
        "shift per channel",
        &format!("{:?}", config.normalization.shift),
    ));
    let device = &config.device;
    let mut hardware = vec![
        row("asked for", &device.requested),
        row("found", &device.description),
    ];
    for (rank, description) in device.ranks.iter().enumerate() {
        hardware.push(row(&format!("rank {rank}"), description));
    }
    hardware.extend(some("exchange", device.exchange.clone()));
    if let Some(Value::Object(adapter)) = &device.adapter {
        for (key, value) in adapter.iter().filter(|(_, value)| !value.is_null()) {
            let text = match value {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            hardware.push(row(key, &text));
        }
    }
    hardware.extend(some(
        "kernels",
        device.family.map(|family| family.to_string()),
    ));
    hardware.push(row(
        "im2col matrix",
        &if device.explicit_conv {
            "stored"
        } else {
            "implicit"
        },
    ));
    let mut program = vec![
        row("wgrad", &config.wgrad),
        row("format of the run folder", &config.format),
        row("seed", &config.seed),
        row("finished epochs", &config.finished_epochs),
    ];
    program.extend(some("run id", config.id.clone()));
    program.extend(some("weights SHA-256", config.parameter_sha256.clone()));
    if let Some(init) = &config.init {
        program.push(row("first weights", &init.source));
        program.push(row("their SHA-256", &init.sha256));
    }
    let mut tables = vec![
        table("Recipe", recipe.into_iter().collect()),
        table("Augmentation", augment),
        table("Data", rows),
        table("Device", hardware),
        table("Run", program),
    ];
    tables.retain(|table| {
        table["rows"]
            .as_array()
            .is_some_and(|rows| !rows.is_empty())
    });
    tables
}

/// A text of several lines, each as [`plain`].
fn lines_of(text: &str) -> String {
    let lines = text
        .lines()
        .map(|line| plain(&line.replace('\t', "    "), 20_000));
    lines.collect::<Vec<_>>().join("\n")
}

/// `98.51 %`; a dash for what is no number.
pub(super) fn share(p: f64) -> String {
    match p.is_finite() {
        true => format!("{:.2} %", 100.0 * p),
        false => "—".into(),
    }
}

/// A device's description in two: its name, which may end in parentheses of its own, and what stands in the others.
fn name_and_rest(description: &str) -> (&str, &str) {
    let own = description.find(") (").map(|place| place + 1);
    let Some(place) = own.or_else(|| description.find(" (")) else {
        return (description, "");
    };
    let (name, rest) = description.split_at(place);
    (name, rest[2..].strip_suffix(')').unwrap_or(&rest[2..]))
}

/// `98.51 % ± 0.12`: with the standard error of a share of `n` independent images, `√(p(1 − p)/n)`.
pub(super) fn accuracy(p: f64, n: usize) -> String {
    let error = 100.0 * (p * (1.0 - p) / n as f64).sqrt();
    match p.is_finite() && error.is_finite() {
        true => format!("{} ± {error:.2}", share(p)),
        false => share(p),
    }
}

/// A loss; a dash for what is no number.
pub(super) fn number(value: f64) -> String {
    match value.is_finite() {
        true if value.abs() < 1e5 => format!("{value:.4}"),
        true => format!("{value:.3e}"),
        false => "—".into(),
    }
}

/// `12.3 s`, `4 min 10 s`, `2 h 5 min`; a dash for what is no number.
pub(super) fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "—".into();
    }
    let whole = seconds.round() as u64;
    match whole {
        0..120 => format!("{seconds:.1} s"),
        120..7200 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(accuracy(0.5, 10_000), "50.00 % ± 0.50");
        assert_eq!(name_and_rest("CPU"), ("CPU", ""));
        assert_eq!(name_and_rest("CPU (2 threads)"), ("CPU", "2 threads"));
        let adapter = "llvmpipe (256 bits) (Vulkan, Mesa 22 (LLVM 15))";
        let expected = ("llvmpipe (256 bits)", "Vulkan, Mesa 22 (LLVM 15)");
        assert_eq!(name_and_rest(adapter), expected);
        assert_eq!(accuracy(0.5, 0), "50.00 %");
        assert_eq!(accuracy(f64::NAN, 10), "—");
        let times = [0.0, 119.4, 125.0, 7500.0, f64::NAN].map(duration);
        assert_eq!(times, ["0.0 s", "119.4 s", "2 min 5 s", "2 h 5 min", "—"]);
        assert_eq!(evenly(3, 8), [0, 1, 2]);
        assert_eq!(evenly(100, 5), [0, 24, 49, 74, 99]);
    }

    #[test]
    fn what_a_page_is_filled_with_is_text() {
        let page = render("a.html", "{{ name }}", json!({"name": "<b>\"'&"}));
        assert_eq!(page.unwrap(), "&lt;b&gt;&quot;&#x27;&amp;");
    }

    /// All images are somewhere in the matrix, and those of the classes that are mixed up have rows.
    #[test]
    fn a_matrix_of_many_classes_is_limited_to_those_mixed_up() {
        let names: Vec<String> = (0..100).map(|class| format!("c{class}")).collect();
        let labels: Vec<u32> = (0..1000).map(|i| i % 100).collect();
        let confused = |label: u32| if label > 70 && label < 80 { 5 } else { label };
        let predictions: Vec<u32> = labels.iter().map(|l| confused(*l)).collect();
        let shares = vec![0.01; 100_000];
        let results = Results::of(&labels, &predictions, &shares, 100).unwrap();
        let (shown, counts, note) = limited(&names, &results);
        assert_eq!((shown.len(), counts.len()), (21, 21));
        assert_eq!(counts.iter().flatten().sum::<usize>(), 1000);
        let [five, class] = ["c5", "c75"].map(|name| shown.iter().position(|n| n == name).unwrap());
        assert_eq!((counts[class][five], counts[class][class]), (10, 0));
        assert!(shown[20] == "80 others" && counts[20][20] == 800);
        assert!(note.unwrap().contains("100 classes"));
        let (shown, _, note) = limited(&names[..25], &Results::of(&[], &[], &[], 25).unwrap());
        assert!(shown.len() == 25 && note.is_none());
    }
}
