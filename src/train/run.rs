//! The run folder: what was asked for, how it went, and the trained weights.
//!
//! | file | |
//! |---|---|
//! | `run.json` | [`Config`] |
//! | `metrics.jsonl` | one [`EpochRecord`] per line |
//! | `steps.jsonl` | one [`StepRecord`] per line, some fifty an epoch |
//! | `checkpoint.safetensors` | [`Checkpoint`]: what a resume starts from |
//! | `checkpoint.previous.safetensors` | the one before it, for when it is damaged |
//! | `model.safetensors` | the parameters alone, in PyTorch's order, for everybody else |
//! | `best.safetensors` | likewise those of the epoch that the validation split likes best |
//! | `average.safetensors` | likewise the moving average of the parameters, where the recipe has one |
//! | `.lock` | empty; locked by the process that trains |
//!
//! Every file but `steps.jsonl`, which grows line by line, is replaced in one go (see `files::replace`), and after
//! each epoch in this order:
//! metrics, checkpoint, the files with weights, configuration. In the middle of an epoch the checkpoint alone is
//! written. When a new checkpoint is on disk, the old one takes the name of the previous one and
//! then the new one takes its place. So the checkpoint alone decides how far a run is. A kill before
//! it leaves one line too many in the metrics, a kill after it weights and configuration of the
//! epoch before, and a kill between the two names the previous checkpoint alone; [`Run::restore`]
//! puts all that right, and drops the steps behind the checkpoint, which come again.
//!
//! Which epoch is the best one, and whether the patience is at an end, follows from the metrics alone.
//!
//! All safetensors files carry a hash of themselves and the [`Config::id`] of their run, so neither
//! a damaged one nor another run's is ever taken.

use super::checkpoint::{Checkpoint, Loaded, Partial, object, parameter_hash};
use super::init::{Start, start_again};
use super::seeds::SeedsRecord;
use crate::data::{Dataset, Normalization, Request, Splits, balanced_weights};
use crate::error::{Error, Result};
use crate::export::{Contents, Fitting, read_safetensors, write_safetensors};
use crate::files::{remove, rename, replace, replace_keeping, sha256, sweep};
use crate::kernels::conv2d::{Family, Product};
use crate::model::recipe::{ClassWeights, Recipe};
use crate::model::{Definition, Model, Shape};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where run folders go when nothing else is said.
const RUNS: &str = "runs";

const CONFIG: &str = "run.json";
const METRICS: &str = "metrics.jsonl";
const STEPS: &str = "steps.jsonl";
const CHECKPOINT: &str = "checkpoint.safetensors";
const PREVIOUS: &str = "checkpoint.previous.safetensors";
pub(super) const WEIGHTS: &str = "model.safetensors";
const BEST: &str = "best.safetensors";
const AVERAGE: &str = "average.safetensors";
const LOCK: &str = ".lock";

/// What the folder's files mean. Raised when an older wgrad would misread them; a field that it may
/// leave out of account is no reason.
///
/// 0: no `format`, no hashes, a checkpoint after each epoch only. 1: hashes and ids in both
/// safetensors files, hashes of the data, checkpoints in the middle of an epoch. 2: recipes with more than
/// the rule, its rate, the number of epochs, the batch and the smoothing, which older versions would leave
/// out; an average of the weights in the checkpoint.
pub const FORMAT: u32 = 2;

/// `run.json`: everything that decides a run, and how far it has come. What is not known to this
/// version is passed over when it is read; what only hints or reports may be missing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// [`FORMAT`] of the folder.
    #[serde(default)]
    pub format: u32,
    /// Version of wgrad that trained it last.
    #[serde(default)]
    pub wgrad: String,
    /// What its safetensors files name as their run: SHA-256 of model, recipe (but for the number of
    /// epochs), normalisation, seed and [`Config::init`] as they were at the start. Set by [`Run::create`].
    pub id: Option<String>,
    /// The architecture.
    pub model: ModelRecord,
    /// The images.
    pub data: DataRecord,
    /// Of the training images, as the network is given them.
    pub normalization: Normalization,
    /// As used, flags included; `epochs` is the total that is planned, which the schedule of the
    /// learning rate spans.
    pub recipe: Recipe,
    /// Of the first parameters, of the order of the images and of all draws.
    pub seed: u64,
    /// The weights that it started from, where these are not the seed's alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<InitRecord>,
    /// The device that trained last.
    #[serde(default)]
    pub device: DeviceRecord,
    /// Epochs that are over, since the start of the training.
    #[serde(default)]
    pub finished_epochs: usize,
    /// SHA-256 of the flat parameters (little-endian f32) after the finished epochs.
    pub parameter_sha256: Option<String>,
}

impl Config {
    /// A training of `definition`, by its recipe, on `data`, of which `record` says what they are
    /// ([`DataRecord::of`]). What a recipe leaves to the data, weights that balance the classes, is settled here.
    ///
    /// # Errors
    /// What the architecture has wrong for images of that shape and so many classes.
    pub fn new(
        definition: &Definition,
        data: &Splits,
        record: DataRecord,
        seed: u64,
    ) -> Result<Config> {
        let train = &data.train;
        let model = definition.resolve(train.shape, train.classes)?;
        let mut recipe = definition.recipe.clone();
        if recipe.class_weights == Some(ClassWeights::Balanced) {
            recipe.class_weights = Some(ClassWeights::Given(balanced_weights(train)));
        }
        Ok(Config {
            format: FORMAT,
            wgrad: env!("CARGO_PKG_VERSION").into(),
            id: None,
            model: ModelRecord {
                name: model.name.clone(),
                input: model.input,
                classes: model.classes,
                class_names: train.class_names.clone(),
                parameters: model.parameter_count(),
                architecture: definition.text.clone(),
            },
            data: record,
            normalization: Normalization::of(train),
            recipe,
            seed,
            init: None,
            device: DeviceRecord::default(),
            finished_epochs: 0,
            parameter_sha256: None,
        })
    }

    /// The normalisation as an engine takes it: scale per channel, then shift per channel.
    pub fn scale_and_shift(&self) -> Vec<f32> {
        let Normalization { scale, shift } = &self.normalization;
        [&scale[..], shift].concat()
    }

    /// The run's id, or what it would be.
    fn id_or_new(&self) -> String {
        self.id.clone().unwrap_or_else(|| {
            // The number of epochs may change.
            let recipe = Recipe {
                epochs: 0,
                ..self.recipe.clone()
            };
            let ModelRecord {
                input,
                classes,
                architecture,
                ..
            } = &self.model;
            let decides = json!([
                architecture,
                input,
                classes,
                self.normalization,
                recipe,
                self.seed,
                self.init
            ]);
            sha256([decides.to_string().as_bytes()])
        })
    }
}

/// The architecture and what it was resolved for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// The model's name.
    pub name: String,
    /// Of an image.
    pub input: Shape,
    /// Number of classes.
    pub classes: usize,
    /// A name for each class.
    #[serde(default)]
    pub class_names: Vec<String>,
    /// Numbers that are trained.
    #[serde(default)]
    pub parameters: usize,
    /// The whole text of the architecture file.
    pub architecture: String,
}

/// The weights that a training started from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InitRecord {
    /// The absolute path of the file, which nothing needs any more.
    pub source: String,
    /// Of the file.
    pub sha256: String,
    /// Which tensors were taken from it.
    #[serde(flatten)]
    pub fitting: Fitting,
}

/// The data as it was used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataRecord {
    /// `mnist`, or the absolute path of a folder.
    pub source: String,
    /// The limit on the images of each split that was asked for.
    pub limit: Option<usize>,
    /// As asked for, see [`Request`].
    #[serde(default)]
    pub image_size: Option<[usize; 2]>,
    /// See [`Request::validation`].
    #[serde(default)]
    pub validation: Option<f64>,
    /// See [`Request::test`].
    #[serde(default)]
    pub test: Option<f64>,
    /// See [`Request::split_seed`].
    #[serde(default)]
    pub split_seed: u64,
    /// Images that are trained on.
    pub training_images: usize,
    /// Images that decisions are made by; 0 without any.
    #[serde(default)]
    pub validation_images: usize,
    /// Images that the result is measured on.
    pub test_images: usize,
    /// [`Dataset::sha256`] of the images that are trained on; `None` in folders of format 0.
    pub training_sha256: Option<String>,
    /// Likewise of the validation images, where there are any.
    #[serde(default)]
    pub validation_sha256: Option<String>,
    /// Likewise of the test images.
    pub test_sha256: Option<String>,
}

impl DataRecord {
    /// The record of the images in `data`, which `request` led to, with its hashes.
    pub fn of(
        source: String,
        limit: Option<usize>,
        request: &Request,
        data: &Splits,
    ) -> DataRecord {
        DataRecord {
            source,
            limit,
            image_size: request.image_size,
            validation: request.validation,
            test: request.test,
            split_seed: request.split_seed,
            training_images: data.train.len(),
            validation_images: data.validation.as_ref().map_or(0, Dataset::len),
            test_images: data.test.len(),
            training_sha256: Some(data.train.sha256()),
            validation_sha256: data.validation.as_ref().map(Dataset::sha256),
            test_sha256: Some(data.test.sha256()),
        }
    }

    /// What leads to the same images again.
    pub fn request(&self) -> Request {
        Request {
            image_size: self.image_size,
            validation: self.validation,
            test: self.test,
            split_seed: self.split_seed,
            cache: None,
        }
    }
}

/// The device and how it is used.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceRecord {
    /// As asked for: `auto`, `gpu`, `cpu` or part of a name.
    pub requested: String,
    /// What was found, in one line.
    pub description: String,
    /// The adapter's report, if there is an adapter.
    pub adapter: Option<Value>,
    /// What each rank found, where there are several.
    pub ranks: Vec<String>,
    /// What their exchanges took, in one line.
    pub exchange: Option<String>,
    /// The kernel family that was forced.
    #[serde(deserialize_with = "if_known")]
    pub family: Option<Family>,
    /// Whether the im2col matrix is stored.
    pub explicit_conv: bool,
    /// Which kernel was chosen for which product of which layer, for people.
    pub kernels: Vec<String>,
    /// The same choices as a resumed run takes them over; what another version chose and this one
    /// does not know is left out.
    #[serde(deserialize_with = "those_known")]
    pub products: Vec<Product>,
}

fn if_known<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    from: D,
) -> std::result::Result<Option<T>, D::Error> {
    Ok(serde_json::from_value(Value::deserialize(from)?).unwrap_or(None))
}

fn those_known<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    from: D,
) -> std::result::Result<Vec<T>, D::Error> {
    let all = match Value::deserialize(from)? {
        Value::Array(all) => all,
        _ => Vec::new(),
    };
    let known = all.into_iter().map(serde_json::from_value);
    Ok(known.filter_map(std::result::Result::ok).collect())
}

/// One line of `metrics.jsonl`. A number that is not finite is written as null, and null or a
/// missing one reads as NaN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// From 1.
    pub epoch: usize,
    /// Optimiser steps since the start of the training.
    pub step: u64,
    /// Means over the epoch, each batch before its update.
    #[serde(default = "nan", deserialize_with = "number_or_null")]
    pub train_loss: f64,
    /// From 0 to 1, like every accuracy.
    #[serde(default = "nan", deserialize_with = "number_or_null")]
    pub train_accuracy: f64,
    /// Means over the validation images after the epoch, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// Likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_accuracy: Option<f64>,
    /// Likewise over the test images.
    #[serde(default = "nan", deserialize_with = "number_or_null")]
    pub test_loss: f64,
    /// Likewise.
    #[serde(default = "nan", deserialize_with = "number_or_null")]
    pub test_accuracy: f64,
    /// The same of the averaged weights, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average_validation_loss: Option<f64>,
    /// Likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average_validation_accuracy: Option<f64>,
    /// Likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average_test_loss: Option<f64>,
    /// Likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average_test_accuracy: Option<f64>,
    /// Over the test images in the recipe's views, after the epoch that a training ended with; of the
    /// weights and of their average.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_loss_views: Option<f64>,
    /// Likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_accuracy_views: Option<f64>,
    /// Likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average_test_loss_views: Option<f64>,
    /// Likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average_test_accuracy_views: Option<f64>,
    /// Training images per second, evaluation and checkpoints not counted; NaN where no time passed
    /// by the clock.
    #[serde(default = "nan", deserialize_with = "number_or_null")]
    pub images_per_second: f64,
    /// Time of training and evaluation.
    #[serde(default = "nan", deserialize_with = "number_or_null")]
    pub seconds: f64,
    /// Learning rate of the last step.
    #[serde(default = "nan", deserialize_with = "number_or_null")]
    pub lr: f64,
    /// L2 norm of each parameter after the epoch, by its name in the safetensors files; none in older folders,
    /// and none for what is not finite.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub weight_norms: BTreeMap<String, f64>,
    /// L2 norm of the gradient of each that the last batch of the epoch gave; as clipped, and 0 for what is frozen.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gradient_norms: BTreeMap<String, f64>,
    /// In mixed precision what the loss is scaled by after the epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// In mixed precision how many steps were skipped since the start of the training, because gradients
    /// overflowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped_steps: Option<u64>,
}

/// One line of `steps.jsonl`: the means over the training images since the line before it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimiser steps since the start of the training.
    pub step: u64,
    /// Epochs since the start of the training, in parts.
    pub epoch: f64,
    /// Each batch before its update.
    pub loss: f64,
    /// From 0 to 1.
    pub accuracy: f64,
    /// Learning rate of the step.
    pub lr: f64,
}

/// The epoch that the validation split likes best: of the highest accuracy, where that is equal of the
/// lowest loss, and where that is equal too, the first.
fn best(metrics: &[EpochRecord]) -> Option<&EpochRecord> {
    let measured = metrics.iter().filter(|r| r.validation_accuracy.is_some());
    let rank = |r: &EpochRecord| (r.validation_accuracy, r.validation_loss.map(|loss| -loss));
    measured.reduce(|best, r| if rank(r) > rank(best) { r } else { best })
}

/// Whether no epoch was better than the best one for so many.
fn out_of_patience(patience: Option<usize>, metrics: &[EpochRecord]) -> bool {
    match (patience, best(metrics), metrics.last()) {
        (Some(patience), Some(best), Some(last)) => last.epoch - best.epoch >= patience,
        _ => false,
    }
}

fn nan() -> f64 {
    f64::NAN
}

fn number_or_null<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

/// Which of the weights that a run folder holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weights {
    /// `model.safetensors`: those after the last epoch.
    #[default]
    Last,
    /// `best.safetensors`: those of the epoch that the validation split likes best.
    Best,
    /// `average.safetensors`: the moving average of all steps so far.
    Average,
}

impl Weights {
    /// Name of their file in a run folder.
    pub fn file(self) -> &'static str {
        match self {
            Weights::Last => WEIGHTS,
            Weights::Best => BEST,
            Weights::Average => AVERAGE,
        }
    }
}

impl std::fmt::Display for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Weights::Last => "last",
            Weights::Best => "best",
            Weights::Average => "average",
        })
    }
}

/// `last`, `best` or `average`.
impl FromStr for Weights {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "last" => Ok(Weights::Last),
            "best" => Ok(Weights::Best),
            "average" => Ok(Weights::Average),
            _ => Err(format!("expected last, best or average, found '{text}'")),
        }
    }
}

/// Metadata of a file with weights: what is needed to use them without the folder.
#[derive(Serialize)]
struct WeightsMetadata<'a> {
    wgrad: &'a str,
    run: &'a str,
    epoch: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    validation_accuracy: Option<f64>,
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
    steps: Vec<StepRecord>,
    /// The lock on the folder, held until this is dropped or the process ends.
    lock: Option<File>,
    /// Whether another process has the folder, so that nothing is written here.
    follows: bool,
}

/// What [`Run::restore`] found.
#[derive(Debug)]
pub struct Restored {
    /// `None` where no step is done.
    pub checkpoint: Option<Checkpoint>,
    /// What there is to say about a checkpoint that is not the one expected, in one line.
    pub note: Option<String>,
}

impl Restored {
    /// No checkpoint, and nothing to say about it.
    pub(super) fn nothing() -> Restored {
        Restored {
            checkpoint: None,
            note: None,
        }
    }
}

impl Run {
    /// Makes sure that a new run may have `out` as its folder, without making it.
    ///
    /// # Errors
    /// As [`Run::create`], where that can be known.
    pub fn expect_free(out: &Path) -> Result<()> {
        let entries = match fs::read_dir(out) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io("create", out, e)),
        };
        for entry in entries {
            let entry = entry.map_err(|e| Error::io("read", out, e))?;
            if entry.file_name() != LOCK {
                let folder = out.display();
                return Err(Error::Usage(format!(
                    "expected a new or empty folder for --out, found files in {folder}; choose another, or go on with it by --resume {folder}"
                )));
            }
        }
        Ok(())
    }

    /// Makes the folder of a new run, with `run.json` in it (and where it starts from other weights, a
    /// checkpoint with them), and locks it: `out`, which must be new
    /// or empty, or the first free one of `runs/<model>-<data>-1`, `-2`, ….
    ///
    /// # Errors
    /// [`Error::Usage`] when `out` has something in it, [`Error::Io`] when nothing can be written,
    /// and what the architecture text has wrong.
    pub fn create(out: Option<&Path>, mut config: Config) -> Result<Run> {
        let model = resolve(&config, Path::new(RUNS))?;
        let start = match &config.init {
            Some(init) => Some(start_again(init, &model, config.seed)?),
            None => None,
        };
        config.format = FORMAT;
        config.id = Some(config.id_or_new());
        let folder = match out {
            Some(folder) => {
                Run::expect_free(folder)?;
                fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
                folder.to_path_buf()
            }
            None => Run::free_folder(&config)?,
        };
        let lock = lock(&folder)?;
        // Another process may have been faster.
        Run::expect_free(&folder)?;
        let run = Run {
            folder,
            config,
            model,
            metrics: Vec::new(),
            steps: Vec::new(),
            lock: Some(lock),
            follows: false,
        };
        if let Some(start) = start {
            run.begin(start)?;
        }
        run.write_config()?;
        Ok(run)
    }

    /// A new run whose folder another process makes and has: here it is known, but nothing is written.
    ///
    /// # Errors
    /// What the architecture text has wrong.
    pub fn follow(config: Config) -> Result<Run> {
        Ok(Run {
            folder: PathBuf::new(),
            model: resolve(&config, Path::new(RUNS))?,
            config,
            metrics: Vec::new(),
            steps: Vec::new(),
            lock: None,
            follows: true,
        })
    }

    /// The same of an earlier run, which another process goes on with.
    ///
    /// # Errors
    /// As [`Run::open`].
    pub fn follow_earlier(folder: &Path) -> Result<Run> {
        Ok(Run {
            follows: true,
            ..Run::open(folder)?
        })
    }

    /// Whether another process has the folder.
    pub fn follows(&self) -> bool {
        self.follows
    }

    /// Makes the first folder `runs/<model>-<data>-<N>` that is not there yet.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn free_folder(config: &Config) -> Result<PathBuf> {
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

    /// Takes back a run that came to nothing before its first step: its files and its folder go.
    pub fn discard(mut self) {
        if self.follows {
            return;
        }
        self.lock = None;
        for file in [CHECKPOINT, STEPS, CONFIG, LOCK] {
            // What cannot be removed does no harm: it is a run of 0 epochs.
            let _ = fs::remove_file(self.folder.join(file));
        }
        let _ = fs::remove_dir(&self.folder);
    }

    /// Opens the folder of an earlier run to read from it; nothing in it is changed, and another
    /// process may train it meanwhile.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when it is no run folder or its files are damaged.
    pub fn open(folder: &Path) -> Result<Run> {
        let path = folder.join(CONFIG);
        let text = read(&path)?.ok_or_else(|| {
            let seeds = SeedsRecord::read(folder).ok().flatten();
            let first = seeds.and_then(|record| record.seeds.first().copied());
            Error::checkpoint(
                folder,
                match first {
                    Some(seed) => format!(
                        "expected one run, found those of several seeds; name one of them, such as {}",
                        SeedsRecord::folder(folder, seed).display()
                    ),
                    None => "expected a run folder with a run.json, found none; give the folder that `wgrad train` named".into(),
                },
            )
        })?;
        let config = parse(&text, &path)?;
        let model = resolve(&config, &path)?;
        let path = folder.join(METRICS);
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
        // Another process may be in the middle of a line.
        let steps = read(&folder.join(STEPS))?.unwrap_or_default();
        let steps = steps
            .lines()
            .map_while(|line| serde_json::from_str(line).ok());
        Ok(Run {
            folder: folder.to_path_buf(),
            config,
            model,
            metrics,
            steps: steps.collect(),
            lock: None,
            follows: false,
        })
    }

    /// Whether a process trains it at this moment, as far as the file system knows locks.
    pub fn is_being_trained(&self) -> bool {
        let lock = File::open(self.path(LOCK));
        // Shared, and given back at once.
        lock.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// Opens the folder of an earlier run to train on, and locks it.
    ///
    /// # Errors
    /// As [`Run::open`], and [`Error::Checkpoint`] while another process trains it.
    pub fn resume(folder: &Path) -> Result<Run> {
        // Nothing is left behind in a folder that is none of a run.
        Run::open(folder)?;
        let lock = lock(folder)?;
        Ok(Run {
            lock: Some(lock),
            ..Run::open(folder)?
        })
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What it was asked for, and how far it is.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// For a resume that changes how (not what) is trained: total epochs, device. It is written
    /// with the next checkpoint.
    pub fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }

    /// The network, resolved for its images and classes.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What the epochs so far gave.
    pub fn metrics(&self) -> &[EpochRecord] {
        &self.metrics
    }

    /// Of a run that [`Run::follows`], as the process has them that does not.
    pub(super) fn take_metrics(&mut self, metrics: Vec<EpochRecord>) {
        self.metrics = metrics;
    }

    /// The course of the training within its epochs; empty in folders of older versions.
    pub fn steps(&self) -> &[StepRecord] {
        &self.steps
    }

    /// What the epoch gave that the validation split likes best; `None` without such a split.
    pub fn best(&self) -> Option<&EpochRecord> {
        best(&self.metrics)
    }

    /// Whether the validation split has seen no better epoch for as many as the recipe has patience.
    pub fn out_of_patience(&self) -> bool {
        out_of_patience(self.config.recipe.patience, &self.metrics)
    }

    /// Whether training ends with this epoch, the next one to be recorded.
    pub(super) fn ends_with(&self, record: &EpochRecord) -> bool {
        let recipe = &self.config.recipe;
        let metrics = [&self.metrics[..], std::slice::from_ref(record)].concat();
        record.epoch >= recipe.epochs || out_of_patience(recipe.patience, &metrics)
    }

    /// Reads the last whole checkpoint and makes the other files agree with it.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when neither of the two checkpoints can be used, or both are gone
    /// though epochs were finished; [`Error::Usage`] for a run that is not locked; [`Error::Io`].
    /// Then nothing was changed.
    pub fn restore(&mut self) -> Result<Restored> {
        if self.lock.is_none() {
            return Err(Error::Usage(format!(
                "expected a run that is locked for training, found {} open for reading; open it with Run::resume",
                self.folder.display()
            )));
        }
        let newest = self.load(CHECKPOINT);
        let (loaded, mut note) = match newest {
            Ok(Some(loaded)) => (Some(loaded), None),
            Ok(None) | Err(Error::Checkpoint { .. }) => match (self.load(PREVIOUS), newest) {
                (Ok(Some(loaded)), newest) => {
                    let why = match newest {
                        // Without its advice.
                        Err(e) => e.to_string().split("; ").take(1).collect(),
                        Ok(_) => format!("{}: not there", self.path(CHECKPOINT).display()),
                    };
                    let place = describe(&loaded.checkpoint);
                    let note = format!("{why}; going on from the checkpoint before it, {place}");
                    rename(&self.path(PREVIOUS), &self.path(CHECKPOINT))?;
                    (Some(loaded), Some(note))
                }
                (_, Err(e)) | (Err(e), Ok(_)) => return Err(e),
                (Ok(None), Ok(_)) => (None, None),
            },
            Err(e) => return Err(e),
        };
        let finished = self.config.finished_epochs;
        let Some(Loaded { checkpoint, run }) = loaded else {
            // After the metrics of the first epoch comes its checkpoint, so a kill leaves one line.
            // What started from other weights has one from its beginning.
            let begun = self.config.init.is_some() || self.path(WEIGHTS).exists();
            if finished > 0 || self.metrics.len() > 1 || begun {
                return Err(Error::checkpoint(
                    &self.path(CHECKPOINT),
                    format!(
                        "expected the checkpoint of a run with {} finished epochs, found none; put it back, or start a new run",
                        finished.max(self.metrics.len())
                    ),
                ));
            }
            self.upgrade();
            self.settle(0, 0)?;
            self.write_config()?;
            return Ok(Restored {
                checkpoint: None,
                note: None,
            });
        };
        if note.is_none() && checkpoint.epoch < finished {
            let place = describe(&checkpoint);
            note = Some(format!(
                "{}: expected the checkpoint of {finished} finished epochs, found an earlier one; going on from it, {place}",
                self.path(CHECKPOINT).display()
            ));
        }
        self.upgrade();
        self.settle(checkpoint.epoch, checkpoint.partial.step)?;
        if run.is_none() {
            // Of format 0; from now on it is proof against damage.
            let (path, optimizer) = (self.path(CHECKPOINT), &self.config.recipe.optimizer);
            checkpoint.save(&path, &self.model, optimizer, &self.config.id_or_new())?;
        }
        if checkpoint.partial.step == 0 && checkpoint.epoch > 0 {
            self.publish(&checkpoint)?;
        } else {
            if checkpoint.epoch != finished {
                self.config.finished_epochs = checkpoint.epoch;
                self.config.parameter_sha256 = None;
            }
            self.write_config()?;
        }
        Ok(Restored {
            checkpoint: Some(checkpoint),
            note,
        })
    }

    /// From here on the folder is one of this version.
    fn upgrade(&mut self) {
        self.config.id = Some(self.config.id_or_new());
        self.config.format = FORMAT;
        self.config.wgrad = env!("CARGO_PKG_VERSION").into();
    }

    /// Removes what kills left behind: scratch files, metrics after `finished` epochs, and what is known of steps
    /// after so many of the next one.
    fn settle(&mut self, finished: usize, partial: usize) -> Result<()> {
        let names = [
            CONFIG, METRICS, STEPS, CHECKPOINT, PREVIOUS, WEIGHTS, BEST, AVERAGE,
        ];
        sweep(&self.folder, &names)?;
        // Of an epoch that is trained anew, which may go differently on another device.
        if matches!(self.weights_of(Weights::Best), Ok((Some(epoch), _)) if epoch > finished) {
            remove(&self.path(BEST))?;
        }
        self.metrics.retain(|record| record.epoch <= finished);
        let whole = self.metrics.last().map_or(0, |record| record.step);
        let done = whole + partial as u64;
        self.steps.retain(|record| record.step <= done);
        self.write_metrics()?;
        let path = self.path(STEPS);
        // Folders of older versions have none.
        match path.exists() {
            true => replace(&path, &lines(&path, &self.steps)?),
            false => Ok(()),
        }
    }

    /// Reads a checkpoint and makes sure that it is one of this run.
    fn load(&self, file: &str) -> Result<Option<Loaded>> {
        let (path, config) = (self.path(file), &self.config);
        let Some(loaded) = Checkpoint::load(&path, &self.model, &config.recipe)? else {
            return Ok(None);
        };
        let Checkpoint {
            epoch,
            partial,
            parameters,
            ..
        } = &loaded.checkpoint;
        let recorded = partial.step == 0;
        self.expect_own(
            &path,
            loaded.run.as_deref(),
            recorded.then_some((*epoch, parameters)),
        )?;
        // Nothing else would notice a number that is wrong in a file without a hash.
        let plausible = *epoch == 0 || self.metrics.iter().any(|r| r.epoch == *epoch);
        if loaded.run.is_none() && !plausible {
            return Err(Error::checkpoint(
                &path,
                format!(
                    "expected an epoch that metrics.jsonl knows, found {epoch}; use a copy of it, or train again"
                ),
            ));
        }
        Ok(Some(loaded))
    }

    /// Makes sure that a file with weights, which says that it is of the run with id `run`, is of
    /// this one, and that it holds what `run.json` says, if it is about the same epoch.
    fn expect_own(
        &self,
        path: &Path,
        run: Option<&str>,
        recorded: Option<(usize, &Vec<f32>)>,
    ) -> Result<()> {
        let config = &self.config;
        let next = "use a copy of it, or train again";
        match run {
            Some(run) if run != config.id_or_new() => {
                return Err(Error::checkpoint(
                    path,
                    format!("expected a file of this run, found one of another; {next}"),
                ));
            }
            None if config.format > 0 => {
                return Err(Error::checkpoint(
                    path,
                    format!("expected a SHA-256 in the header, found none; {next}"),
                ));
            }
            _ => {}
        }
        let Some((epoch, parameters)) = recorded else {
            return Ok(());
        };
        let finished = config.finished_epochs;
        // Without an id there is the hash alone, which a kill leaves one epoch behind.
        if run.is_none() && epoch != finished && epoch != finished + 1 {
            return Err(Error::checkpoint(
                path,
                format!(
                    "expected {finished} finished epochs, as run.json says, found {epoch}; {next}"
                ),
            ));
        }
        match &config.parameter_sha256 {
            Some(hash) if epoch == finished && *hash != parameter_hash(parameters) => {
                Err(Error::checkpoint(
                    path,
                    format!(
                        "expected weights with the SHA-256 in run.json, {hash}, found others; {next}"
                    ),
                ))
            }
            _ => Ok(()),
        }
    }

    /// Lets a new run start from other weights than its seed's, by a checkpoint before the first step.
    fn begin(&self, start: Start) -> Result<()> {
        let recipe = &self.config.recipe;
        let Start {
            parameters,
            running,
            ..
        } = start;
        let zeros = vec![0.0; self.model.parameter_elements];
        self.write_checkpoint(&Checkpoint {
            epoch: 0,
            partial: Partial::default(),
            optimizer_state: vec![zeros; recipe.optimizer.state_vectors()],
            average: recipe
                .average
                .map(|_| [parameters.clone(), running.clone()]),
            parameters,
            running,
            loss_scale: None,
        })
    }

    /// Adds a line to the steps.
    ///
    /// # Errors
    /// [`Error::Io`]; then a resume goes on from the last whole checkpoint.
    pub(super) fn add_step(&mut self, record: StepRecord) -> Result<()> {
        self.steps.push(record);
        if self.follows {
            return Ok(());
        }
        let path = self.path(STEPS);
        let line = lines(&path, &[record])?;
        let file = File::options().append(true).create(true).open(&path);
        file.and_then(|mut file| file.write_all(&line))
            .map_err(|e| Error::io("write", &path, e))
    }

    /// Adds an epoch to the folder.
    ///
    /// # Errors
    /// [`Error::Io`]; then a resume goes on from the last whole checkpoint.
    pub fn finish_epoch(&mut self, record: EpochRecord, checkpoint: &Checkpoint) -> Result<()> {
        self.metrics.push(record);
        self.write_metrics()?;
        self.write_checkpoint(checkpoint)?;
        self.publish(checkpoint)
    }

    /// Replaces the checkpoint; the one that was there becomes the previous one.
    ///
    /// # Errors
    /// [`Error::Io`]; then a resume goes on from the last whole checkpoint.
    pub fn write_checkpoint(&self, checkpoint: &Checkpoint) -> Result<()> {
        if self.follows {
            return Ok(());
        }
        let (path, optimizer) = (self.path(CHECKPOINT), &self.config.recipe.optimizer);
        let id = self.config.id_or_new();
        let bytes = checkpoint.to_bytes(&path, &self.model, optimizer, &id)?;
        replace_keeping(&path, &self.path(PREVIOUS), &bytes)
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

    /// Makes sure that `data` (called `source` in messages) is what the run was started with.
    ///
    /// # Errors
    /// [`Error::Data`] for other images or labels, in training, validation or test images.
    pub fn expect_own_data(&self, source: &str, data: &Splits) -> Result<()> {
        self.expect_data(source, &data.train)?;
        let record = &self.config.data;
        for (which, split, images, hash) in [
            (
                "training",
                Some(&data.train),
                record.training_images,
                &record.training_sha256,
            ),
            (
                "validation",
                data.validation.as_ref(),
                record.validation_images,
                &record.validation_sha256,
            ),
            (
                "test",
                Some(&data.test),
                record.test_images,
                &record.test_sha256,
            ),
        ] {
            let len = split.map_or(0, Dataset::len);
            let found = split.map(Dataset::sha256);
            let (expected, found) = match (hash, found) {
                _ if len != images => (images.to_string(), len.to_string()),
                (Some(hash), Some(found)) if *hash != found => (
                    format!("those with SHA-256 {hash}"),
                    format!("others ({found})"),
                ),
                _ => continue,
            };
            return Err(Error::data(
                Path::new(source),
                format!(
                    "expected the {which} images that the run in {} was started with, {expected}, found {found}; use the run's own data ({}), or start a new run",
                    self.folder.display(),
                    record.source
                ),
            ));
        }
        Ok(())
    }

    /// The flat parameters and running statistics after the last epoch.
    ///
    /// # Errors
    /// As [`Run::weights_of`].
    pub fn weights(&self) -> Result<[Vec<f32>; 2]> {
        self.weights_of(Weights::Last).map(|(_, weights)| weights)
    }

    /// The flat parameters and running statistics of `which` weights, and the epoch that they are of.
    ///
    /// # Errors
    /// [`Error::Usage`] for weights that a run like this has none of, [`Error::Checkpoint`] when there
    /// are none yet, or for a damaged file.
    pub fn weights_of(&self, which: Weights) -> Result<(Option<usize>, [Vec<f32>; 2])> {
        let path = self.path(which.file());
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let folder = self.folder.display();
                let what = match which {
                    Weights::Best if self.best().is_none() && !self.metrics.is_empty() => {
                        return Err(Error::Usage(format!(
                            "expected a run with a validation split for the best weights by it, found none in {folder}; use --weights last, or train with --validation 0.1"
                        )));
                    }
                    Weights::Average if self.config.recipe.average.is_none() => {
                        return Err(Error::Usage(format!(
                            "expected a run that averages its weights, found none in {folder}; use --weights last, or train with a recipe that has an average"
                        )));
                    }
                    Weights::Best if self.best().is_some() => "expected the weights that the validation split likes best, found none: the file is gone; use a copy of it, or other --weights".into(),
                    _ => format!(
                        "expected trained weights, found none: no epoch was finished, or the file is gone; go on with `wgrad train --resume {folder}`"
                    ),
                };
                return Err(Error::checkpoint(&path, what));
            }
            Err(e) => return Err(Error::io("read", &path, e)),
        };
        let Contents {
            mut vectors,
            mut running,
            metadata,
            hashed,
        } = read_safetensors(&self.model, &bytes, &[""], &[""], &path)?;
        let (weights, running) = (vectors.remove(0), running.remove(0));
        let run = metadata.get("run").and_then(Value::as_str);
        let epoch = metadata.get("epoch").and_then(Value::as_u64);
        let epoch = epoch.and_then(|n| usize::try_from(n).ok());
        // A process that trains may have replaced this file since run.json was read.
        let recorded = Some((epoch.unwrap_or(usize::MAX), &weights)).filter(|_| !hashed);
        self.expect_own(&path, run.filter(|_| hashed), recorded)?;
        Ok((epoch, [weights, running]))
    }

    /// Weights and configuration of a checkpoint that is on disk.
    fn publish(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let record = self.metrics.iter().find(|r| r.epoch == checkpoint.epoch);
        let validation_accuracy = record.and_then(|record| record.validation_accuracy);
        let weights = [&checkpoint.parameters, &checkpoint.running];
        let is_best = self.best().is_some_and(|r| r.epoch == checkpoint.epoch);
        let average = checkpoint.average.as_ref().map(|[p, r]| [p, r]);
        let averaged = record.and_then(|record| record.average_validation_accuracy);
        for (which, weights, accuracy) in [
            (
                Weights::Best,
                Some(weights).filter(|_| is_best),
                validation_accuracy,
            ),
            (Weights::Average, average, averaged),
            (Weights::Last, Some(weights), validation_accuracy),
        ] {
            if let Some(weights) = weights {
                self.write_weights(which, checkpoint.epoch, accuracy, weights)?;
            }
        }
        self.config.finished_epochs = checkpoint.epoch;
        self.config.parameter_sha256 = Some(parameter_hash(&checkpoint.parameters));
        self.write_config()
    }

    fn write_weights(
        &self,
        which: Weights,
        epoch: usize,
        validation_accuracy: Option<f64>,
        [parameters, running]: [&Vec<f32>; 2],
    ) -> Result<()> {
        if self.follows {
            return Ok(());
        }
        let path = self.path(which.file());
        let metadata = WeightsMetadata {
            wgrad: env!("CARGO_PKG_VERSION"),
            run: &self.config.id_or_new(),
            epoch,
            validation_accuracy,
            model: &self.config.model,
            normalization: &self.config.normalization,
        };
        let vectors = [("", &parameters[..])];
        let metadata = object(&path, &metadata)?;
        let bytes = write_safetensors(&self.model, &vectors, &[("", &running[..])], metadata)?;
        replace(&path, &bytes)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    /// Writes `run.json`, for a change by [`Run::config_mut`] that shall not wait for the next
    /// checkpoint.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_config(&self) -> Result<()> {
        if self.follows {
            return Ok(());
        }
        let path = self.path(CONFIG);
        let text = serde_json::to_string_pretty(&self.config).map_err(|e| not_json(&path, e))?;
        replace(&path, (text + "\n").as_bytes())
    }

    fn write_metrics(&self) -> Result<()> {
        if self.follows {
            return Ok(());
        }
        let path = self.path(METRICS);
        replace(&path, &lines(&path, &self.metrics)?)
    }
}

/// A line of JSON for each record.
fn lines<T: Serialize>(path: &Path, records: &[T]) -> Result<Vec<u8>> {
    let mut lines = Vec::new();
    for record in records {
        serde_json::to_writer(&mut lines, record).map_err(|e| not_json(path, e))?;
        lines.push(b'\n');
    }
    Ok(lines)
}

/// Where a checkpoint is, for people.
fn describe(checkpoint: &Checkpoint) -> String {
    match checkpoint.partial.step {
        0 => format!("after epoch {}", checkpoint.epoch),
        step => format!("in epoch {}, after step {step}", checkpoint.epoch + 1),
    }
}

/// Locks a run folder for training, until the file is closed.
///
/// # Errors
/// [`Error::Checkpoint`] while another process has it.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let file = File::options()
        .create(true)
        .write(true)
        .truncate(false)
        .open(&path)
        .map_err(|e| Error::io("create", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::checkpoint(
            folder,
            "expected a run that no other process trains, found one that is being trained; wait until it ends, or stop it",
        )),
        // A file system without locks (some network shares) is no reason not to train.
        Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(e)) => Err(Error::io("lock", &path, e)),
    }
}

/// The text of `run.json` as a configuration.
fn parse(text: &str, path: &Path) -> Result<Config> {
    let damaged = |e: serde_json::Error| {
        Error::checkpoint(
            path,
            format!("expected the configuration of a run, found a damaged one ({e}); train again"),
        )
    };
    // The number first: of a newer format nothing else may be as it is known here.
    let value: Value = serde_json::from_str(text).map_err(damaged)?;
    let format = value.get("format").and_then(Value::as_u64).unwrap_or(0);
    if format > u64::from(FORMAT) {
        let by = value.get("wgrad").and_then(Value::as_str);
        return Err(Error::checkpoint(
            path,
            format!(
                "expected a run of format {FORMAT} or older, found {format}, written by wgrad {}; use that version or a newer one",
                by.unwrap_or("of a later version")
            ),
        ));
    }
    serde_json::from_str(text).map_err(damaged)
}

/// The model of a configuration; `origin` stands for the architecture text in messages.
fn resolve(config: &Config, origin: &Path) -> Result<Model> {
    let origin = format!("{} (architecture)", origin.display());
    Definition::parse(&config.model.architecture, &origin)?
        .resolve(config.model.input, config.model.classes)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_epoch_is_the_first_of_the_lowest_loss_of_the_highest_accuracy() {
        let record = |(i, measured): (usize, &Option<(f64, f64)>)| EpochRecord {
            epoch: i + 1,
            step: 0,
            train_loss: 0.0,
            train_accuracy: 0.0,
            validation_loss: measured.map(|(_, loss)| loss),
            validation_accuracy: measured.map(|(accuracy, _)| accuracy),
            // The test split has no say.
            test_loss: 0.0,
            test_accuracy: i as f64,
            average_validation_loss: None,
            average_validation_accuracy: None,
            average_test_loss: None,
            average_test_accuracy: None,
            test_loss_views: None,
            test_accuracy_views: None,
            average_test_loss_views: None,
            average_test_accuracy_views: None,
            images_per_second: 0.0,
            seconds: 0.0,
            lr: 0.0,
            weight_norms: BTreeMap::new(),
            gradient_norms: BTreeMap::new(),
            loss_scale: None,
            skipped_steps: None,
        };
        let best_of = |measured: &[Option<(f64, f64)>]| {
            let metrics: Vec<_> = measured.iter().enumerate().map(record).collect();
            best(&metrics).map(|record| record.epoch)
        };
        assert_eq!(best_of(&[]), None);
        assert_eq!(best_of(&[None, None]), None);
        assert_eq!(
            best_of(&[Some((0.5, 1.0)), Some((0.75, 9.0)), None]),
            Some(2)
        );
        let ties = [
            (0.5, 0.1),
            (0.75, 3.0),
            (0.75, 2.0),
            (0.75, 2.0),
            (0.7, 0.1),
        ];
        assert_eq!(best_of(&ties.map(Some)), Some(3));
    }
}
