//! The run folder: what was asked for, how it went, and the trained weights.
//!
//! | file | |
//! |---|---|
//! | `run.json` | [`Config`] |
//! | `metrics.jsonl` | one [`EpochRecord`] per line |
//! | `checkpoint.safetensors` | parameters, optimiser state and epoch: what a resume starts from |
//! | `model.safetensors` | the parameters alone, in PyTorch's order, for everybody else |
//!
//! Every file is replaced in one go (see `replace`), and after each epoch in this order: metrics,
//! checkpoint, weights, configuration. The checkpoint alone decides how far a run is. A kill before
//! it leaves one line too many in the metrics, a kill after it weights and configuration of the
//! epoch before; [`Run::restore`] puts both right.

use super::checkpoint::{Checkpoint, parameter_hash, replace};
use crate::data::{Dataset, Normalization};
use crate::error::{Error, Result};
use crate::export::{read_safetensors, write_safetensors};
use crate::model::recipe::Recipe;
use crate::model::{Definition, Model, Shape};
use crate::network::{Family, Product};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Where run folders go when nothing else is said.
const RUNS: &str = "runs";

const WEIGHTS: &str = "model.safetensors";

/// `run.json`: everything that decides a run, and how far it has come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Version of wgrad that made the folder.
    pub wgrad: String,
    pub model: ModelRecord,
    pub data: DataRecord,
    pub normalization: Normalization,
    /// As used, flags included; `epochs` is the total.
    pub recipe: Recipe,
    pub seed: u64,
    pub device: DeviceRecord,
    pub finished_epochs: usize,
    /// SHA-256 of the flat parameters (little-endian f32) after the finished epochs.
    pub parameter_sha256: Option<String>,
}

impl Config {
    /// The normalisation as an engine takes it: scale per channel, then shift per channel.
    pub fn scale_and_shift(&self) -> Vec<f32> {
        let Normalization { scale, shift } = &self.normalization;
        [&scale[..], shift].concat()
    }
}

/// The architecture and what it was resolved for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelRecord {
    pub name: String,
    pub input: Shape,
    pub classes: usize,
    pub class_names: Vec<String>,
    pub parameters: usize,
    /// The whole text of the architecture file.
    pub architecture: String,
}

/// The data as it was used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataRecord {
    /// `mnist`, or the absolute path of a folder.
    pub source: String,
    /// The limit on training images that was asked for.
    pub limit: Option<usize>,
    pub training_images: usize,
    pub test_images: usize,
}

/// The device and how it is used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// As asked for: `auto`, `gpu`, `cpu` or part of a name.
    pub requested: String,
    /// What was found, in one line.
    pub description: String,
    /// The adapter's report, if there is an adapter.
    pub adapter: Option<serde_json::Value>,
    /// The kernel family that was forced.
    pub family: Option<Family>,
    /// Whether the im2col matrix is stored.
    pub explicit_conv: bool,
    /// Which kernel was chosen for which product of which layer, for people.
    pub kernels: Vec<String>,
    /// The same choices as a resumed run takes them over.
    pub products: Vec<Product>,
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// From 1.
    pub epoch: usize,
    /// Optimiser steps since the start of the training.
    pub step: u64,
    /// Means over the epoch, each batch before its update.
    pub train_loss: f64,
    pub train_accuracy: f64,
    /// Means over the test images after the epoch.
    pub test_loss: f64,
    pub test_accuracy: f64,
    /// Training images per second, the evaluation not counted.
    pub images_per_second: f64,
    /// Wall time of training and evaluation.
    pub seconds: f64,
    /// Learning rate of the last step.
    pub lr: f64,
}

/// Metadata of `model.safetensors`: what is needed to use the weights without the folder.
#[derive(Serialize)]
struct WeightsMetadata<'a> {
    wgrad: &'a str,
    epoch: usize,
    model: &'a ModelRecord,
    normalization: &'a Normalization,
}

/// A run folder on disk.
#[derive(Debug)]
pub struct Run {
    folder: PathBuf,
    config: Config,
    model: Model,
    metrics: Vec<EpochRecord>,
}

impl Run {
    /// Makes the folder of a new run, with `run.json` in it: `out`, which must be new or empty, or
    /// the first free one of `runs/<model>-<data>-1`, `-2`, ….
    ///
    /// # Errors
    /// [`Error::Usage`] when `out` has something in it, [`Error::Io`] when nothing can be written,
    /// and what the architecture text has wrong.
    pub fn create(out: Option<&Path>, config: Config) -> Result<Run> {
        let model = resolve(&config, Path::new(RUNS))?;
        let folder = match out {
            Some(folder) => {
                fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
                let mut entries = fs::read_dir(folder).map_err(|e| Error::io("read", folder, e))?;
                if entries.next().is_some() {
                    let folder = folder.display();
                    return Err(Error::Usage(format!(
                        "expected a new or empty folder for --out, found files in {folder}; choose another, or go on with it by --resume {folder}"
                    )));
                }
                folder.to_path_buf()
            }
            None => first_free(&config)?,
        };
        let run = Run {
            folder,
            config,
            model,
            metrics: Vec::new(),
        };
        run.write_config()?;
        Ok(run)
    }

    /// Opens the folder of an earlier run; nothing in it is changed.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when it is no run folder or its files are damaged.
    pub fn open(folder: &Path) -> Result<Run> {
        let path = folder.join("run.json");
        let text = read(&path)?.ok_or_else(|| {
            Error::checkpoint(
                folder,
                "expected a run folder with a run.json, found none; give the folder that `wgrad train` named",
            )
        })?;
        let config: Config = serde_json::from_str(&text).map_err(|e| {
            Error::checkpoint(
                &path,
                format!(
                    "expected the configuration of a run, found a damaged one ({e}); train again"
                ),
            )
        })?;
        let model = resolve(&config, &path)?;
        let path = folder.join("metrics.jsonl");
        let metrics = read(&path)?
            .unwrap_or_default()
            .lines()
            .enumerate()
            .map(|(i, line)| {
                serde_json::from_str(line).map_err(|e| {
                    Error::checkpoint(
                        &path,
                        format!("expected an epoch's metrics in line {}, found something else ({e}); remove the line", i + 1),
                    )
                })
            })
            .collect::<Result<_>>()?;
        Ok(Run {
            folder: folder.to_path_buf(),
            config,
            model,
            metrics,
        })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// For a resume that changes how (not what) is trained: total epochs, device. It is written
    /// with the next checkpoint.
    pub fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What the epochs so far gave.
    pub fn metrics(&self) -> &[EpochRecord] {
        &self.metrics
    }

    /// Reads the last checkpoint and makes the other files agree with it; `None` when no epoch is
    /// finished.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a damaged checkpoint, [`Error::Io`].
    pub fn restore(&mut self) -> Result<Option<Checkpoint>> {
        let optimizer = &self.config.recipe.optimizer;
        let checkpoint = Checkpoint::load(&self.checkpoint_path(), &self.model, optimizer)?;
        let finished = checkpoint.as_ref().map_or(0, |c| c.epoch);
        self.metrics.retain(|record| record.epoch <= finished);
        self.write_metrics()?;
        if let Some(checkpoint) = &checkpoint {
            self.publish(checkpoint)?;
        }
        Ok(checkpoint)
    }

    /// Adds an epoch to the folder.
    ///
    /// # Errors
    /// [`Error::Io`]; then a resume goes on from the last whole checkpoint.
    pub fn finish_epoch(&mut self, record: EpochRecord, checkpoint: &Checkpoint) -> Result<()> {
        self.metrics.push(record);
        self.write_metrics()?;
        let optimizer = &self.config.recipe.optimizer;
        checkpoint.save(&self.checkpoint_path(), &self.model, optimizer)?;
        self.publish(checkpoint)
    }

    /// Makes sure that images of `data` (called `source` in messages) fit the run's model.
    ///
    /// # Errors
    /// [`Error::Data`] for another image shape, or for classes that the model does not know.
    pub fn expect_data(&self, source: &str, data: &Dataset) -> Result<()> {
        let ModelRecord { input, classes, .. } = self.config.model;
        if data.shape == input && data.classes <= classes {
            return Ok(());
        }
        Err(Error::data(
            Path::new(source),
            format!(
                "expected images of {input} in {classes} classes, as the run in {} has, found {} in {}; use the run's own data ({})",
                self.folder.display(),
                data.shape,
                data.classes,
                self.config.data.source
            ),
        ))
    }

    /// The flat parameters in `model.safetensors`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when no epoch was finished, or for a damaged file.
    pub fn weights(&self) -> Result<Vec<f32>> {
        let path = self.folder.join(WEIGHTS);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(Error::checkpoint(
                    &path,
                    format!(
                        "expected trained weights, found none: no epoch was finished; go on with `wgrad train --resume {}`",
                        self.folder.display()
                    ),
                ));
            }
            Err(e) => return Err(Error::io("read", &path, e)),
        };
        let mut contents = read_safetensors(&self.model, &bytes, &[""], &path)?;
        Ok(contents.vectors.remove(0))
    }

    /// Weights and configuration of a checkpoint that is on disk.
    fn publish(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let path = self.folder.join(WEIGHTS);
        let metadata = serde_json::to_string(&WeightsMetadata {
            wgrad: env!("CARGO_PKG_VERSION"),
            epoch: checkpoint.epoch,
            model: &self.config.model,
            normalization: &self.config.normalization,
        })
        .map_err(|e| not_json(&path, e))?;
        let vectors = [("", &checkpoint.parameters[..])];
        let bytes = write_safetensors(&self.model, &vectors, &metadata)?;
        replace(&path, &bytes)?;
        self.config.finished_epochs = checkpoint.epoch;
        self.config.parameter_sha256 = Some(parameter_hash(&checkpoint.parameters));
        self.write_config()
    }

    fn checkpoint_path(&self) -> PathBuf {
        self.folder.join("checkpoint.safetensors")
    }

    fn write_config(&self) -> Result<()> {
        let path = self.folder.join("run.json");
        let text = serde_json::to_string_pretty(&self.config).map_err(|e| not_json(&path, e))?;
        replace(&path, (text + "\n").as_bytes())
    }

    fn write_metrics(&self) -> Result<()> {
        let path = self.folder.join("metrics.jsonl");
        let mut lines = String::new();
        for record in &self.metrics {
            lines += &serde_json::to_string(record).map_err(|e| not_json(&path, e))?;
            lines.push('\n');
        }
        replace(&path, lines.as_bytes())
    }
}

/// The model of a configuration; `origin` stands for the architecture text in messages.
fn resolve(config: &Config, origin: &Path) -> Result<Model> {
    let origin = format!("{} (architecture)", origin.display());
    Definition::parse(&config.model.architecture, &origin)?
        .resolve(config.model.input, config.model.classes)
}

/// Makes the first folder `runs/<model>-<data>-<N>` that is not there yet.
fn first_free(config: &Config) -> Result<PathBuf> {
    let runs = Path::new(RUNS);
    fs::create_dir_all(runs).map_err(|e| Error::io("create", runs, e))?;
    let data = Path::new(&config.data.source).file_name();
    let data = data.unwrap_or("data".as_ref()).to_string_lossy();
    let mut number = 1;
    loop {
        let folder = runs.join(format!("{}-{data}-{number}", config.model.name));
        match fs::create_dir(&folder) {
            Ok(()) => return Ok(folder),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => number += 1,
            Err(e) => return Err(Error::io("create", &folder, e)),
        }
    }
}

/// The text of a file; `None` where there is none.
fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read", path, e)),
    }
}

fn not_json(path: &Path, e: serde_json::Error) -> Error {
    Error::checkpoint(path, format!("cannot be written as JSON: {e}"))
}
