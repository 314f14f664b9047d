//! Parameters that another training has left, for one that starts from them.

use super::run::{InitRecord, WEIGHTS};
use crate::error::{Error, Result};
use crate::export::read_fitting;
use crate::files::sha256;
use crate::model::{Model, initial_parameters, initial_running};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, absolute};

/// What a training starts from.
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    /// The flat parameters and running statistics.
    pub parameters: Vec<f32>,
    /// The running statistics, flat.
    pub running: Vec<f32>,
    /// Where they are from, for `run.json`.
    pub record: InitRecord,
}

/// The same weights again.
///
/// # Errors
/// As [`start_from`], and [`Error::Usage`] when they are others by now.
pub(super) fn start_again(init: &InitRecord, model: &Model, seed: u64) -> Result<Start> {
    let start = start_from(Path::new(&init.source), model, seed)?;
    if start.record.sha256 != init.sha256 {
        return Err(Error::Usage(format!(
            "expected weights with the SHA-256 {} in {}, found others ({}): they were replaced meanwhile; start from a copy of them",
            init.sha256, init.source, start.record.sha256
        )));
    }
    Ok(start)
}

/// The weights that `model` starts from: those of `source`, a safetensors file or a run folder, whose last
/// weights are meant, as far as their names and shapes are the model's own; the others are those of
/// `seed`, as without a source.
///
/// # Errors
/// [`Error::Usage`] where nothing fits, or a folder has no weights; [`Error::Checkpoint`] for a damaged
/// file; [`Error::Io`].
pub fn start_from(source: &Path, model: &Model, seed: u64) -> Result<Start> {
    let path = match source.is_dir() {
        true => source.join(WEIGHTS),
        false => source.to_path_buf(),
    };
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            return Err(Error::Usage(format!(
                "expected a run folder or a safetensors file to start from, found no {}; give one that `wgrad train` left, or leave --init out",
                path.display()
            )));
        }
        Err(e) => return Err(Error::io("read", &path, e)),
    };
    let mut parameters = initial_parameters(model, seed);
    let mut running = initial_running(model);
    let fitting = read_fitting(model, &bytes, &mut parameters, &mut running, &path)?;
    if fitting.taken.is_empty() {
        let first = fitting.left.first();
        let (name, found) = first.map_or(("", ""), |(name, found)| (name, found));
        return Err(Error::Usage(format!(
            "expected weights for model '{}' in {}, found none that has the name and the shape of one of its tensors ({name}: {found}); use weights of a similar model, or leave --init out",
            model.name,
            path.display()
        )));
    }
    let source = absolute(&path).map_err(|e| Error::io("find", &path, e))?;
    Ok(Start {
        parameters,
        running,
        record: InitRecord {
            source: source.display().to_string(),
            sha256: sha256([&bytes[..]]),
            fitting,
        },
    })
}
