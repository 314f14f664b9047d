//! What a run needs to go on: parameters, optimiser state and epoch, in one file that is replaced
//! in one go, so that the three always belong together.

use crate::error::{Error, Result};
use crate::export::{Contents, read_safetensors, write_safetensors};
use crate::model::Model;
use crate::model::recipe::Optimizer;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::Path;

/// The state of a training after a whole number of epochs.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Epochs trained.
    pub epoch: usize,
    /// The flat parameter vector.
    pub parameters: Vec<f32>,
    /// The optimiser's state vectors, each laid out like the parameters.
    pub optimizer_state: Vec<Vec<f32>>,
}

/// What the names of a checkpoint's tensors begin with: nothing for the parameters, then the names
/// of the optimiser's state vectors.
fn prefixes(optimizer: &Optimizer) -> &'static [&'static str] {
    match optimizer {
        Optimizer::Sgd { .. } => &["", "velocity."],
        Optimizer::Adamw { .. } => &["", "first_moment.", "second_moment."],
    }
}

impl Checkpoint {
    /// Writes the checkpoint to `path`, in place of the one that may be there.
    ///
    /// # Errors
    /// [`Error::Io`]; then the previous file is as it was.
    pub fn save(&self, path: &Path, model: &Model, optimizer: &Optimizer) -> Result<()> {
        let vectors = std::iter::once(&self.parameters).chain(&self.optimizer_state);
        let named: Vec<(&str, &[f32])> = prefixes(optimizer)
            .iter()
            .copied()
            .zip(vectors.map(Vec::as_slice))
            .collect();
        let bytes = write_safetensors(model, &named, &self.epoch.to_string())?;
        replace(path, &bytes)
    }

    /// Reads the checkpoint at `path`; `None` where there is no such file.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a file that is damaged or belongs to another model or optimiser.
    pub fn load(path: &Path, model: &Model, optimizer: &Optimizer) -> Result<Option<Checkpoint>> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("read", path, e)),
        };
        let Contents { vectors, metadata } =
            read_safetensors(model, &bytes, prefixes(optimizer), path)?;
        let epoch = metadata.parse().map_err(|_| {
            Error::checkpoint(
                path,
                format!("expected the number of trained epochs in the metadata, found {metadata:?}; train again"),
            )
        })?;
        let mut vectors = vectors.into_iter();
        Ok(Some(Checkpoint {
            epoch,
            parameters: vectors.next().unwrap_or_default(),
            optimizer_state: vectors.collect(),
        }))
    }
}

/// SHA-256 of the parameters' little-endian bytes, in hexadecimal: equal for equal bits.
pub fn parameter_hash(parameters: &[f32]) -> String {
    let mut hash = Sha256::new();
    for parameter in parameters {
        hash.update(parameter.to_le_bytes());
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Replaces the file at `path` by one with these bytes: they are written beside it, synced, and
/// renamed, and the folder is synced. Whenever the machine stops, the old file is there or the new
/// one, whole. A half-written neighbour (`….tmp`) that a kill leaves is overwritten next time.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut scratch = path.as_os_str().to_owned();
    scratch.push(".tmp");
    let scratch = Path::new(&scratch);
    let failed = |e| Error::io("write", path, e);
    let mut file = File::create(scratch).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    fs::rename(scratch, path).map_err(failed)?;
    // Other systems cannot open a folder, and make a rename last by themselves.
    #[cfg(unix)]
    if let Some(folder) = path.parent() {
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(failed)?;
    }
    Ok(())
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

    #[test]
    fn replacing_survives_a_neighbour_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        replace(&path, b"first").unwrap();
        fs::write(folder.path().join("a.bin.tmp"), b"half of someth").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
        replace(&path, b"2nd").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"2nd");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_replacement_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("missing").join("a.bin");
        let message = replace(&path, b"x").unwrap_err().to_string();
        assert!(
            message.starts_with("cannot write ") && message.contains("a.bin"),
            "{message}"
        );
    }
}
