//! `wgrad eval`: a trained model, or the mean of several, on test images.

use super::device::Device;
use super::progress::{self, Pulse};
use super::{load_test_data, note, percent, say, say_json, say_wrapped, standard_error, table};
use crate::cli::EvalArgs;
use indicatif::HumanCount;
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::path::Path;
use wgrad::data::Dataset;
use wgrad::engine::{Engine, Split};
use wgrad::model::recipe::Views;
use wgrad::plan::Options;
use wgrad::train::{Run, Weights, class_shares, expect_alike, mean_shares};
use wgrad::{Error, Result, tune};

/// What one run gives for the test images.
pub(super) struct Member {
    pub epoch: Option<usize>,
    pub views: Views,
    pub loss: f64,
    pub predictions: Vec<u32>,
    /// `[images, classes]`; empty where nobody asks for them.
    pub logits: Vec<f32>,
    /// See [`class_shares`]; empty where nobody asks for them.
    pub shares: Vec<f64>,
}

pub fn run(args: &EvalArgs) -> Result<()> {
    if let (Some(path), true) = (&args.logits, args.runs.len() > 1) {
        return Err(Error::Usage(format!(
            "expected one run for --logits {}, found {}; write those of each run",
            path.display(),
            args.runs.len()
        )));
    }
    let runs = args.runs.iter().map(|folder| Run::open(folder));
    let runs: Vec<Run> = runs.collect::<Result<_>>()?;
    // The command line asks for one at least.
    let [first, others @ ..] = &runs[..] else {
        return Err(Error::Usage("expected a run, found none".into()));
    };
    for other in others {
        expect_alike(first, other, args.data.is_none())?;
    }
    let config = first.config();
    let source = args.data.as_ref().unwrap_or(&config.data.source);
    let cache = tune::cache_folder().filter(|_| !args.no_cache);
    let (mut test, mut notes) = load_test_data(args.data.as_deref(), config, cache)?;
    for run in &runs {
        run.expect_data(source, &test)?;
        notes.extend(doubt(run, args.data.as_deref(), &test));
    }

    let device = Device::open(args.device.requested())?;
    let several = runs.len() > 1;
    let mut members = Vec::with_capacity(runs.len());
    let mut description = String::new();
    let mut images = std::mem::take(&mut test.images);
    for (i, run) in runs.iter().enumerate() {
        let which = args.weights.which;
        let options = Options {
            views: args.views.unwrap_or(run.config().recipe.views),
            keep_logits: several || args.logits.is_some(),
            ..Options::default()
        };
        let (member, mut engine) = evaluate(run, which, &device, images, &test.labels, &options)?;
        members.push(member);
        description = engine.description();
        images = match i + 1 < runs.len() {
            true => engine.take_images(Split::Test)?,
            false => Vec::new(),
        };
    }

    let (n, classes) = (test.len(), config.model.classes);
    if let Some(path) = &args.logits {
        let bytes = npy([n, classes], &members[0].logits);
        std::fs::write(path, bytes).map_err(|e| Error::io("write", path, e))?;
    }
    let accuracy = |predictions: &[u32]| {
        let both = predictions.iter().zip(&test.labels);
        both.filter(|(prediction, label)| prediction == label)
            .count() as f64
            / n as f64
    };
    let predictions = match several {
        true => mean_shares(members.iter().map(|m| &m.shares[..]), classes),
        false => members[0].predictions.clone(),
    };
    let mut counts = vec![(0usize, 0usize); classes];
    for (label, prediction) in test.labels.iter().zip(&predictions) {
        let (images, correct) = &mut counts[*label as usize];
        *images += 1;
        *correct += usize::from(label == prediction);
    }
    // A class without images has no recall.
    let recall =
        |(images, correct): (usize, usize)| (images > 0).then(|| correct as f64 / images as f64);
    let named = config.model.class_names.iter().zip(&counts);
    let rows = runs.iter().zip(&members);
    if args.json {
        let members = rows.map(|(run, member)| {
            let accuracy = accuracy(&member.predictions);
            json!({
                "run": run.folder().display().to_string(),
                "weights": args.weights.which.to_string(),
                "epoch": member.epoch,
                "views": member.views,
                "loss": member.loss,
                "accuracy": accuracy,
                "accuracy_standard_error": standard_error(accuracy, n),
            })
        });
        let mut members: Vec<Value> = members.collect();
        let accuracy = accuracy(&predictions);
        // Of one run what it gives, of several the list of them, and of both what comes out.
        let mut report = match several {
            true => json!({ "runs": members }),
            false => members.remove(0),
        };
        report["data"] = json!(source);
        report["notes"] = json!(notes);
        report["device"] = json!(description);
        report["images"] = json!(n);
        report["accuracy"] = json!(accuracy);
        report["accuracy_standard_error"] = json!(standard_error(accuracy, n));
        report["classes"] = named
            .map(|(name, class)| {
                json!({
                    "name": name,
                    "images": class.0,
                    "correct": class.1,
                    "recall": recall(*class),
                })
            })
            .collect();
        return say_json(&report);
    }
    // They say what the result is worth.
    notes.iter().try_for_each(|line| say_wrapped(line))?;
    if let Some(notice) = device.notice() {
        note(notice)?;
    }
    note(&format!("device    {description}"))?;
    note(&format!(
        "images    {} test images of {source}",
        HumanCount(n as u64)
    ))?;
    if several {
        let rows = rows.map(|(run, member)| {
            vec![
                run.folder().display().to_string(),
                member.epoch.map_or("—".into(), |epoch| epoch.to_string()),
                format!("{:.4}", member.loss),
                percent(accuracy(&member.predictions), n),
            ]
        });
        let title = format!("mean of {}", runs.len());
        let mean = vec![
            title,
            "".into(),
            "".into(),
            percent(accuracy(&predictions), n),
        ];
        let rows = rows.chain([mean]);
        say(&table(&["run", "epoch", "loss", "accuracy"], rows, 1))?;
    } else {
        let Member { epoch, loss, .. } = members[0];
        if let (true, Some(epoch)) = (args.weights.which != Weights::Last, epoch) {
            say(&format!("weights   {}, epoch {epoch}", args.weights.which))?;
        }
        if members[0].views != Views::One {
            say(&format!("views     {}", members[0].views))?;
        }
        say(&format!("loss      {loss:.4}"))?;
        say(&format!("accuracy  {}", percent(accuracy(&predictions), n)))?;
    }
    let rows = named.map(|(name, class)| {
        let recall = recall(*class);
        vec![
            name.clone(),
            class.0.to_string(),
            class.1.to_string(),
            recall.map_or("—".into(), |recall| percent(recall, class.0)),
        ]
    });
    say(&table(&["class", "images", "correct", "recall"], rows, 1))
}

/// A NumPy file, format 1.0, of float32 in rows.
fn npy([rows, columns]: [usize; 2], values: &[f32]) -> Vec<u8> {
    let header =
        format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    // Padded so that what follows begins at a multiple of 64 bytes.
    let length = (10 + header.len() + 1).next_multiple_of(64) - 10;
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((length as u16).to_le_bytes());
    bytes.extend(format!("{header:<width$}\n", width = length - 1).bytes());
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

/// Why a run may be better on these images than on others, where it is: it may have been trained on them.
/// `named` is what a flag takes them from, in place of the run's own data.
fn doubt(run: &Run, named: Option<&str>, test: &Dataset) -> Option<String> {
    let (folder, record) = (run.folder().display(), &run.config().data);
    let Some(named) = named else {
        let hash = record.test_sha256.as_ref()?;
        return (*hash != test.sha256()).then(|| {
            format!(
                "warning: {} is not as it was when the run in {folder} was trained: these are not the images that it was tested on, and some may be of those that it was trained on",
                record.source
            )
        });
    };
    let place = |path: &str| Path::new(path).canonicalize().ok();
    let same = place(named).is_some_and(|at| place(&record.source) == Some(at));
    // What has test images of its own gives these alone.
    (same && record.limit.is_none() && test.len() > record.test_images).then(|| {
        format!(
            "warning: the run in {folder} was trained on images of {named}, which are all taken here; leave --data out for its {} test images",
            record.test_images
        )
    })
}

/// Runs the test images through a run's network; the engine has them then.
pub(super) fn evaluate(
    run: &Run,
    which: Weights,
    device: &Device,
    images: Vec<u8>,
    labels: &[u32],
    options: &Options,
) -> Result<(Member, Engine)> {
    let (config, model) = (run.config(), run.model());
    let (epoch, [parameters, running]) = run.weights_of(which)?;
    let mut engine = device.engine(model, &config.recipe, options)?;
    engine.set_parameters(&parameters)?;
    engine.set_running(&running)?;
    engine.upload_dataset(Split::Test, images, labels, &config.scale_and_shift())?;
    let bar = progress::bar(labels.len() as u64, "evaluating", "{pos}/{len}");
    // What a pipe is told of.
    bar.set_message("test images");
    let pulse = Pulse::start(&bar, || None);
    let evaluation = engine.evaluate(Split::Test, &mut |done| {
        bar.set_position(done as u64);
        ControlFlow::Continue(())
    })?;
    drop(pulse);
    bar.finish_and_clear();
    let logits = evaluation.logits.unwrap_or_default();
    let member = Member {
        epoch,
        views: options.views,
        loss: evaluation.loss_sum / labels.len() as f64,
        predictions: evaluation.predictions,
        shares: class_shares(model.loss, &logits, model.classes),
        logits,
    };
    Ok((member, engine))
}
