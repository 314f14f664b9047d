//! A training as TensorBoard shows it: `tensorboard --logdir runs`.
//!
//! | tags | | when |
//! |---|---|---|
//! | `step/loss`, `step/accuracy`, `step/learning_rate` | numbers, as in `steps.jsonl` | some fifty times an epoch |
//! | `loss/…`, `accuracy/…` by split, `learning_rate`, `images_per_second` | numbers, as in `metrics.jsonl` | after each epoch |
//! | `weight_norm/…`, `gradient_norm/…` by parameter | L2 norms | after each epoch |
//! | `weight/…`, `gradient/…` by parameter | histograms | after each epoch |
//! | `filters/…` | the first layer's weights as a picture, grey for 0 | after each epoch |
//! | `input` | training images as the first steps show them to the network | once |
//!
//! Every point is at its optimiser step, and an epoch's are written before its checkpoint is: what a training
//! that is resumed does again takes the place of what it did before.

use super::preview::{Excerpt, preview};
use super::sheet::{Tile, contact_sheet};
use crate::data::Dataset;
use crate::engine::{Engine, Split};
use crate::error::Result;
use crate::export::{EventFile, Summary, Tensor, to_pytorch};
use crate::model::{Model, Shape};
use crate::train::{EpochRecord, Observer, Run, StepRecord};
use std::path::{Path, PathBuf};

/// The folder in a run's.
const FOLDER: &str = "tensorboard";

/// Training images that are shown.
const IMAGES: usize = 32;
/// Filters of the first layer that are shown at most.
const FILTERS: usize = 64;

/// Writes what it hears of a training into event files in the run's folder, and hands it on.
pub struct TensorBoard<'a> {
    folder: PathBuf,
    model: Model,
    file: Option<EventFile>,
    /// Whether there are files of an earlier part of the training.
    goes_on: bool,
    /// What the run's folder knows of that part.
    steps: Vec<StepRecord>,
    epochs: Vec<EpochRecord>,
    /// Some training images, as a PNG.
    input: Option<Vec<u8>>,
    next: &'a mut dyn Observer,
}

impl<'a> TensorBoard<'a> {
    /// Whether an earlier part of the training in this run folder left event files.
    pub fn is_in(run: &Path) -> bool {
        run.join(FOLDER).is_dir()
    }

    /// Of a training of `run` that is to begin, or to go on, on the images in `data`; `next` hears everything
    /// too. Nothing is written before the first step.
    ///
    /// # Errors
    /// As [`preview`], and [`crate::Error::Io`] where the run's folder cannot be read.
    pub fn new(run: &Run, data: &Dataset, next: &'a mut dyn Observer) -> Result<TensorBoard<'a>> {
        let folder = run.folder().join(FOLDER);
        let goes_on = !EventFile::list(&folder)?.is_empty();
        let input = match goes_on {
            true => None,
            false => Some(training_images(run, data)?),
        };
        Ok(TensorBoard {
            folder,
            model: run.model().clone(),
            file: None,
            goes_on,
            steps: run.steps().to_vec(),
            epochs: run.metrics().to_vec(),
            input,
            next,
        })
    }

    /// The file, which begins at this step. Where there is none of an earlier part of the training, it begins with
    /// the numbers of that.
    fn file(&mut self, step: u64) -> Result<&mut EventFile> {
        if self.file.is_none() {
            let from = if self.goes_on { step } else { 0 };
            let mut file = EventFile::create(&self.folder, from)?;
            let input = std::mem::take(&mut self.input);
            if let Some(png) = input {
                let mut summary = Summary::default();
                summary.png("input", png)?;
                file.add(0, summary)?;
            }
            // At this step itself there is a record where the training was interrupted between the last step of an
            // epoch and its end.
            for record in self
                .steps
                .iter()
                .filter(|r| (from..=step).contains(&r.step))
            {
                file.add(record.step, of_step(record))?;
            }
            for record in self
                .epochs
                .iter()
                .filter(|r| (from..step).contains(&r.step))
            {
                file.add(record.step, of_epoch(record))?;
            }
            self.file = Some(file);
        }
        Ok(self.file.as_mut().expect("it is there by now"))
    }
}

impl Observer for TensorBoard<'_> {
    fn epoch_started(&mut self, epoch: usize, engine: &Engine) -> Result<()> {
        self.next.epoch_started(epoch, engine)
    }

    fn trained(&mut self, epoch: usize, images: usize, mean_loss: f64) {
        self.next.trained(epoch, images, mean_loss);
    }

    fn stepped(&mut self, record: &StepRecord) -> Result<()> {
        // It comes again.
        self.steps.retain(|earlier| earlier.step < record.step);
        self.file(record.step)?.add(record.step, of_step(record))?;
        self.next.stepped(record)
    }

    fn evaluated(&mut self, split: Split, images: usize) {
        self.next.evaluated(split, images);
    }

    fn epoch_measured(&mut self, record: &EpochRecord, engine: &Engine) -> Result<()> {
        let mut summary = of_epoch(record);
        for (what, flat) in [
            ("weight", engine.parameters()?),
            ("gradient", engine.gradients()?),
        ] {
            for parameter in self.model.layers.iter().flat_map(|layer| &layer.parameters) {
                let values = &flat[parameter.start..parameter.start + parameter.elements()];
                summary.histogram(&format!("{what}/{}", parameter.name), values);
            }
            if what == "weight" {
                let weights = to_pytorch(&self.model, &flat);
                if let Some(first) = weights.iter().find(|tensor| tensor.shape.len() == 4) {
                    summary.png(&format!("filters/{}", first.name), filters(first)?)?;
                }
            }
        }
        self.file(record.step)?.add(record.step, summary)?;
        self.next.epoch_measured(record, engine)
    }

    fn epoch_finished(&mut self, record: &EpochRecord, engine: &Engine) -> Result<()> {
        self.next.epoch_finished(record, engine)
    }

    fn note(&mut self, line: &str) -> Result<()> {
        self.next.note(line)
    }
}

fn of_step(record: &StepRecord) -> Summary {
    let mut summary = Summary::default();
    summary.scalar("step/loss", record.loss);
    summary.scalar("step/accuracy", record.accuracy);
    summary.scalar("step/learning_rate", record.lr);
    summary
}

/// The numbers of an epoch.
fn of_epoch(record: &EpochRecord) -> Summary {
    let mut summary = Summary::default();
    for (tag, value) in [
        ("loss/train", Some(record.train_loss)),
        ("loss/validation", record.validation_loss),
        ("loss/test", Some(record.test_loss)),
        ("loss/average_validation", record.average_validation_loss),
        ("loss/average_test", record.average_test_loss),
        ("loss/test_views", record.test_loss_views),
        ("loss/average_test_views", record.average_test_loss_views),
        ("accuracy/train", Some(record.train_accuracy)),
        ("accuracy/validation", record.validation_accuracy),
        ("accuracy/test", Some(record.test_accuracy)),
        (
            "accuracy/average_validation",
            record.average_validation_accuracy,
        ),
        ("accuracy/average_test", record.average_test_accuracy),
        ("accuracy/test_views", record.test_accuracy_views),
        (
            "accuracy/average_test_views",
            record.average_test_accuracy_views,
        ),
        ("learning_rate", Some(record.lr)),
        ("images_per_second", Some(record.images_per_second)),
        ("seconds", Some(record.seconds)),
    ] {
        if let Some(value) = value {
            summary.scalar(tag, value);
        }
    }
    for (what, norms) in [
        ("weight_norm", &record.weight_norms),
        ("gradient_norm", &record.gradient_norms),
    ] {
        for (name, norm) in norms {
            summary.scalar(&format!("{what}/{name}"), *norm);
        }
    }
    summary
}

/// The filters of a convolution, `[OC, C, KH, KW]`, as a PNG: in colours where they have three channels, else the
/// means over the channels in grey. The largest weight is white, or its opposite black.
fn filters(weight: &Tensor) -> Result<Vec<u8>> {
    let [_, channels, height, width] = weight.shape[..] else {
        unreachable!("the caller has looked");
    };
    let colours = if channels == 3 { 3 } else { 1 };
    let taps = height * width;
    let shown: Vec<Vec<f32>> = weight
        .values
        .chunks(channels * taps)
        .take(FILTERS)
        .map(|filter| {
            let pixel = |i: usize| {
                let (tap, colour) = (i / colours, i % colours);
                let of = colour..if colours == 3 { colour + 1 } else { channels };
                let count = of.len() as f32;
                of.map(|channel| filter[channel * taps + tap]).sum::<f32>() / count
            };
            (0..taps * colours).map(pixel).collect()
        })
        .collect();
    let largest = shown
        .iter()
        .flatten()
        .fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
    let pixels: Vec<Vec<u8>> = shown
        .iter()
        .map(|filter| {
            filter
                .iter()
                .map(|x| (127.5 + 127.5 * x / largest) as u8)
                .collect()
        })
        .collect();
    let tiles: Vec<Tile> = (0..)
        .zip(&pixels)
        .map(|(i, pixels)| Tile {
            pixels,
            shape: Shape::new(height, width, colours),
            caption: i.to_string(),
        })
        .collect();
    contact_sheet(&weight.name, 8, &tiles)
}

/// The first images of the first epoch as the network is given them, as a PNG.
fn training_images(run: &Run, data: &Dataset) -> Result<Vec<u8>> {
    let (config, model) = (run.config(), run.model());
    let excerpt = Excerpt {
        seed: config.seed,
        epoch: 1,
        count: IMAGES,
    };
    let normalization = config.scale_and_shift();
    let shown = preview(None, model, &config.recipe, data, &normalization, excerpt)?;
    let shape = model.input;
    // A picture has as many colours; of other channels the first is shown.
    let colours = if shape.channels == 3 { 3 } else { 1 };
    let pictures: Vec<Vec<u8>> = shown
        .after
        .chunks(shape.elements())
        .map(|image| {
            image
                .chunks(shape.channels)
                .flat_map(|pixel| &pixel[..colours])
                .copied()
                .collect()
        })
        .collect();
    let tiles: Vec<Tile> = pictures
        .iter()
        .zip(&shown.targets)
        .map(|(pixels, [(label, _), _])| Tile {
            pixels,
            shape: Shape::new(shape.height, shape.width, colours),
            caption: data.class_names[*label as usize].clone(),
        })
        .collect();
    contact_sheet("training images, as the network sees them", 8, &tiles)
}
