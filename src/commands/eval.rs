//! `wgrad eval`: a trained model on test images.

use super::device::Device;
use super::progress::Pulse;
use super::{load_data, percent, say, say_json, say_wrapped, standard_error, table};
use crate::cli::EvalArgs;
use indicatif::{HumanCount, ProgressBar};
use serde_json::json;
use std::ops::ControlFlow;
use wgrad::data::Request;
use wgrad::engine::Split;
use wgrad::plan::Options;
use wgrad::train::Run;
use wgrad::{Result, tune};

pub fn run(args: &EvalArgs) -> Result<()> {
    let run = Run::open(&args.run)?;
    let [parameters, running] = run.weights()?;
    let config = run.config();
    let source = args.data.as_ref().unwrap_or(&config.data.source);
    let request = Request {
        cache: tune::cache_folder(),
        ..config.data.request()
    };
    let mut test = load_data(source, &request)?.test;
    if args.data.is_none() && config.data.limit.is_some() {
        test.truncate(config.data.test_images)?;
    }
    run.expect_data(source, &test)?;

    let device = Device::open(&args.device)?;
    let mut engine = device.engine(run.model(), &config.recipe, &Options::default())?;
    engine.set_parameters(&parameters)?;
    engine.set_running(&running)?;
    let normalization = config.scale_and_shift();
    engine.upload_dataset(
        Split::Test,
        std::mem::take(&mut test.images),
        &test.labels,
        &normalization,
    )?;
    let bar = ProgressBar::new(test.len() as u64);
    let pulse = Pulse::start(&bar, || None);
    let evaluation = engine.evaluate(Split::Test, &mut |done| {
        bar.set_position(done as u64);
        ControlFlow::Continue(())
    })?;
    drop(pulse);
    bar.finish_and_clear();

    let n = test.len();
    let loss = evaluation.loss_sum / n as f64;
    let mut classes = vec![(0usize, 0usize); config.model.classes];
    for (label, prediction) in test.labels.iter().zip(&evaluation.predictions) {
        let (images, correct) = &mut classes[*label as usize];
        *images += 1;
        *correct += usize::from(label == prediction);
    }
    let accuracy = classes.iter().map(|c| c.1).sum::<usize>() as f64 / n as f64;
    // A class without images has no recall.
    let recall =
        |(images, correct): (usize, usize)| (images > 0).then(|| correct as f64 / images as f64);
    let named = config.model.class_names.iter().zip(&classes);
    if args.json {
        return say_json(&json!({
            "run": run.folder().display().to_string(),
            "data": source,
            "device": engine.description(),
            "images": n,
            "loss": loss,
            "accuracy": accuracy,
            "accuracy_standard_error": standard_error(accuracy, n),
            "classes": named
                .map(|(name, class)| json!({
                    "name": name,
                    "images": class.0,
                    "correct": class.1,
                    "recall": recall(*class),
                }))
                .collect::<Vec<_>>(),
        }));
    }
    if let Some(notice) = device.notice() {
        say_wrapped(notice)?;
    }
    say_wrapped(&format!("device    {}", engine.description()))?;
    say_wrapped(&format!(
        "images    {} test images of {source}",
        HumanCount(n as u64)
    ))?;
    say(&format!("loss      {loss:.4}"))?;
    say(&format!("accuracy  {}", percent(accuracy, n)))?;
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
