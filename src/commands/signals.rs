//! Ctrl-C and SIGTERM: while a training runs, the first one ends it in good order. A second one, or
//! one at any other time, ends the process at once. The exit code is 128 and the signal's number, as
//! a shell reports a process that a signal ended: 130 or 143.

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use wgrad::{Error, Result};

pub(super) struct Signals {
    /// Whether the next signal ends the process.
    at_once: Arc<AtomicBool>,
    /// Whether there was a signal that did not.
    caught: Arc<AtomicBool>,
    number: Arc<AtomicUsize>,
}

impl Signals {
    /// Catches signals from now on, to end the process at once.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses.
    pub fn catch() -> Result<Signals> {
        let signals = Signals {
            at_once: Arc::new(AtomicBool::new(true)),
            caught: Arc::default(),
            number: Arc::default(),
        };
        for signal in [SIGINT, SIGTERM] {
            // They act in the order in which they are registered.
            flag::register_conditional_shutdown(signal, 128 + signal, signals.at_once.clone())
                .and_then(|_| flag::register(signal, signals.at_once.clone()))
                .and_then(|_| flag::register_usize(signal, signals.number.clone(), signal as usize))
                .and_then(|_| flag::register(signal, signals.caught.clone()))
                .map_err(|e| Error::io("install", Path::new("a signal handler"), e))?;
        }
        Ok(signals)
    }

    /// What becomes true on the first signal after this call, which then does nothing else.
    pub fn hold(&self) -> &AtomicBool {
        self.at_once.store(false, Ordering::SeqCst);
        &self.caught
    }

    /// The end of what [`Signals::hold`] began.
    pub fn release(&self) {
        self.at_once.store(true, Ordering::SeqCst);
    }

    /// What becomes true on the first signal, for those who wait meanwhile.
    #[cfg(feature = "mpi")]
    pub fn flag(&self) -> Arc<AtomicBool> {
        self.caught.clone()
    }

    /// The exit code for the signal that was held.
    pub fn exit_code(&self) -> i32 {
        128 + self.number.load(Ordering::SeqCst) as i32
    }
}
