//! What a run needs to go on: parameters, optimiser state, and how far it is, in one file that is
//! replaced in one go, so that they always belong together.

use crate::error::{Error, Result};
use crate::export::{Contents, read_safetensors, write_safetensors};
use crate::files::{replace, sha256};
use crate::model::Model;
use crate::model::recipe::{Optimizer, Recipe};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

/// The state of a training between two steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Whole epochs trained.
    pub epoch: usize,
    /// What was done of the epoch after them.
    pub partial: Partial,
    /// The flat parameter vector.
    pub parameters: Vec<f32>,
    /// The flat vector of running statistics; empty for a model without any.
    pub running: Vec<f32>,
    /// The optimiser's state vectors, each laid out like the parameters.
    pub optimizer_state: Vec<Vec<f32>>,
    /// The moving averages of parameters and running statistics, where the recipe has them kept.
    pub average: Option<[Vec<f32>; 2]>,
    /// In mixed precision [`crate::engine::Engine::loss_scale`].
    pub loss_scale: Option<[f32; 3]>,
}

/// The trained part of an epoch: what its metrics are made of. All zero before the first step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Partial {
    /// Steps of the epoch that are done.
    pub step: usize,
    /// Images in them.
    pub images: usize,
    /// Sum of their losses, each batch before its update.
    pub loss_sum: f64,
    /// How many of them were classified correctly.
    pub correct: u64,
    /// Seconds that the steps took.
    pub seconds: f64,
    /// Of the steps since the last [`super::StepRecord`]: images, sum of their losses, correct ones.
    pub since: (usize, f64, u64),
    /// [`super::EpochRecord::gradient_norms`], when all steps are done.
    pub gradient_norms: BTreeMap<String, f64>,
}

/// What stands in the file beside the tensors.
#[derive(Serialize, Deserialize)]
struct Metadata {
    /// [`super::Config::id`].
    run: String,
    epoch: usize,
    partial: Partial,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    loss_scale: Option<[f32; 3]>,
}

/// A checkpoint as it was read.
pub(super) struct Loaded {
    /// What the file holds.
    pub checkpoint: Checkpoint,
    /// [`super::Config::id`] of the run that it belongs to; `None` for a file of format 0, which
    /// carries no hash either.
    pub run: Option<String>,
}

/// What the names of the averages' tensors begin with.
const AVERAGE: &str = "average.";

/// What the names of a checkpoint's tensors begin with: nothing for the parameters, then the names
/// of the optimiser's state vectors.
fn prefixes(optimizer: &Optimizer) -> &'static [&'static str] {
    match optimizer {
        Optimizer::Sgd { .. } | Optimizer::Muon { .. } => &["", "velocity."],
        Optimizer::Lion { .. } => &["", "first_moment."],
        Optimizer::Adamw { .. } => &["", "first_moment.", "second_moment."],
    }
}

impl Checkpoint {
    /// Writes the checkpoint of the run with this id to `path`, in place of the one that may be
    /// there.
    ///
    /// # Errors
    /// [`Error::Io`]; then the previous file is as it was.
    pub(super) fn save(
        &self,
        path: &Path,
        model: &Model,
        optimizer: &Optimizer,
        run: &str,
    ) -> Result<()> {
        replace(path, &self.to_bytes(path, model, optimizer, run)?)
    }

    /// The file's bytes; `path` is for messages.
    pub(super) fn to_bytes(
        &self,
        path: &Path,
        model: &Model,
        optimizer: &Optimizer,
        run: &str,
    ) -> Result<Vec<u8>> {
        let vectors = std::iter::once(&self.parameters).chain(&self.optimizer_state);
        let mut named: Vec<(&str, &[f32])> = prefixes(optimizer)
            .iter()
            .copied()
            .zip(vectors.map(Vec::as_slice))
            .collect();
        let mut running = vec![("", &self.running[..])];
        if let Some([parameters, statistics]) = &self.average {
            named.push((AVERAGE, parameters));
            running.push((AVERAGE, statistics));
        }
        let metadata = Metadata {
            run: run.into(),
            epoch: self.epoch,
            partial: self.partial.clone(),
            loss_scale: self.loss_scale,
        };
        write_safetensors(model, &named, &running, object(path, &metadata)?)
    }

    /// Reads the checkpoint at `path`; `None` where there is no such file.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a file that is damaged or belongs to another model or recipe.
    pub(super) fn load(path: &Path, model: &Model, recipe: &Recipe) -> Result<Option<Loaded>> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("read", path, e)),
        };
        let (mut prefixes, mut of_running) = (prefixes(&recipe.optimizer).to_vec(), vec![""]);
        if recipe.average.is_some() {
            prefixes.push(AVERAGE);
            of_running.push(AVERAGE);
        }
        let Contents {
            mut vectors,
            mut running,
            metadata,
            hashed,
        } = read_safetensors(model, &bytes, &prefixes, &of_running, path)?;
        let average = recipe
            .average
            .and_then(|_| vectors.pop().zip(running.pop()));
        let wrong = |expected: &str| {
            let what = format!(
                "expected {expected} in the metadata, found {metadata}; use a copy of it, or train again"
            );
            Error::checkpoint(path, what)
        };
        let (run, epoch, partial, loss_scale) = if hashed {
            let Metadata {
                run,
                epoch,
                partial,
                loss_scale,
            } = serde_json::from_value(metadata.clone())
                .map_err(|_| wrong("a checkpoint's epoch and step"))?;
            (Some(run), epoch, partial, loss_scale)
        } else {
            let epoch = metadata.as_u64().and_then(|n| usize::try_from(n).ok());
            let epoch = epoch.ok_or_else(|| wrong("a hash, or the number of trained epochs,"))?;
            (None, epoch, Partial::default(), None)
        };
        let mut vectors = vectors.into_iter();
        Ok(Some(Loaded {
            checkpoint: Checkpoint {
                epoch,
                partial,
                parameters: vectors.next().unwrap_or_default(),
                running: running.pop().unwrap_or_default(),
                optimizer_state: vectors.collect(),
                average: average.map(<[Vec<f32>; 2]>::from),
                loss_scale,
            },
            run,
        }))
    }
}

/// A struct as the JSON object of a file's metadata.
pub(super) fn object(path: &Path, value: &impl Serialize) -> Result<Map<String, Value>> {
    match serde_json::to_value(value) {
        Ok(Value::Object(object)) => Ok(object),
        other => Err(Error::checkpoint(
            path,
            format!("cannot be written as JSON: {other:?}"),
        )),
    }
}

/// SHA-256 of the parameters' little-endian bytes, in hexadecimal: equal for equal bits.
pub fn parameter_hash(parameters: &[f32]) -> String {
    let bytes: Vec<u8> = parameters.iter().flat_map(|p| p.to_le_bytes()).collect();
    sha256([&bytes[..]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_that_of_the_bytes() {
        // printf '\0\0\200\77\0\0\0\300' | sha256sum
        assert_eq!(
            parameter_hash(&[1.0, -2.0]),
            "ee4ac73c2bd27756ab82780f27c73a7bc4d3f0bb6acb37e008bc27eccd7e588b"
        );
        assert_ne!(parameter_hash(&[0.0]), parameter_hash(&[-0.0]));
    }
}
