//! The one error type of the library.
//!
//! Every message is one line that says what was expected, what was found and what to do next.
//! The library never prints and never exits; `main.rs` turns an [`Error`] into a line on standard
//! error and an exit code.

use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong, by what the user can do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request itself cannot be carried out as asked (exit code 2).
    #[error("{0}")]
    Usage(String),

    /// A data file or folder that is not what it should be (exit code 2).
    #[error("{}: {what}", path.display())]
    Data {
        /// The file or folder.
        path: PathBuf,
        /// What was expected, what was found, and what to do next.
        what: String,
    },

    /// An architecture file with a mistake at a known line (exit code 2).
    #[error("{file}:{line}: {what}")]
    Model {
        /// The file, or what stands for one.
        file: String,
        /// From 1.
        line: usize,
        /// What was expected, what was found, and what to do next.
        what: String,
    },

    /// Shapes that do not fit together (exit code 2).
    #[error("shape mismatch in {operation}: {what}")]
    Shape {
        /// What refused them.
        operation: &'static str,
        /// What was expected, what was found, and what to do next.
        what: String,
    },

    /// The operating system refused a file operation (exit code 1).
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What could not be done, as a verb: read, write, create.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },

    /// A run folder or checkpoint that cannot be used (exit code 1).
    #[error("{}: {what}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What was expected, what was found, and what to do next.
        what: String,
    },

    /// No adapter fits the request (exit code 1).
    #[error("{0}")]
    NoAdapter(String),

    /// The GPU ran out of memory while making or running what the label names; `allocated` bytes it
    /// had given before (exit code 1).
    #[error("out of GPU memory at '{label}': {what}")]
    OutOfMemory {
        /// What was to be made.
        label: String,
        /// What helps.
        what: String,
        /// Bytes that were in use.
        allocated: u64,
    },

    /// The device refused an operation or was lost (exit code 1).
    #[error("GPU error at '{label}': {what}")]
    Gpu {
        /// What was being done.
        label: String,
        /// What the device says.
        what: String,
    },

    /// A training that the device, or another process of it, failed in the middle of; the run folder holds a checkpoint (exit
    /// code 1).
    #[error("{source}; go on from the last checkpoint with: wgrad train --resume {}", folder.display())]
    Interrupted {
        /// What the device or the process did.
        source: Box<Error>,
        /// The run's.
        folder: PathBuf,
    },

    /// Another process of a training is gone (exit code 1).
    #[error("{0}")]
    Cluster(String),

    /// The loss stopped being a number (exit code 1).
    #[error(
        "training diverged: expected a finite loss, found {loss} at epoch {epoch}, step {step}; lower --lr (it was {lr}) or choose another --schedule"
    )]
    Diverged {
        /// The loss that was found.
        loss: f64,
        /// From 1.
        epoch: usize,
        /// From 1, counted from the start of the training.
        step: u64,
        /// The recipe's learning rate.
        lr: f64,
    },

    /// Pictures that could not be read, where the others got their answers (exit code 1).
    #[error("{0}")]
    Unread(String),

    /// A kernel or gradient is out of its tolerance (exit code 1).
    #[error("{0}")]
    Verify(String),
}

impl Error {
    /// Exit code for the command line: 2 for misuse (including unusable input), 1 for failure.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) | Error::Data { .. } | Error::Model { .. } | Error::Shape { .. } => 2,
            _ => 1,
        }
    }

    /// Whether a device failed, and may be in any state.
    pub fn is_device_failure(&self) -> bool {
        matches!(
            self,
            Error::Gpu { .. } | Error::OutOfMemory { .. } | Error::Interrupted { .. }
        )
    }

    /// The error of a training whose folder is `folder`: says how to go on where the device failed and
    /// there is a checkpoint.
    pub fn in_run(self, folder: &Path) -> Self {
        let lost = self.is_device_failure() || matches!(self, Error::Cluster(_));
        if lost && folder.join("checkpoint.safetensors").exists() {
            return Error::Interrupted {
                source: Box::new(self),
                folder: folder.to_path_buf(),
            };
        }
        self
    }

    /// An I/O error with the action ("read", "write", "create", …) and the path it concerned.
    pub fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Error::Io {
            action,
            path: path.to_path_buf(),
            source,
        }
    }

    /// A [`Error::Data`] for `path`.
    pub fn data(path: &Path, what: impl Into<String>) -> Self {
        Error::Data {
            path: path.to_path_buf(),
            what: what.into(),
        }
    }

    /// A [`Error::Checkpoint`] for `path`.
    pub fn checkpoint(path: &Path, what: impl Into<String>) -> Self {
        Error::Checkpoint {
            path: path.to_path_buf(),
            what: what.into(),
        }
    }
}
