//! What a device does on a bad day, for tests: no driver fails on request.

use super::Gpu;
use std::sync::Mutex;
use std::time::Duration;

/// A way in which a device fails, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is lost at a submission.
    Lost,
    /// It has no memory for a buffer.
    OutOfMemory,
    /// It has no memory for one buffer, and has some for those after it.
    Full,
    /// What was submitted never ends.
    Hang,
    /// A read-back is never mapped.
    Unmapped,
    /// Submissions run no kernel, and nobody says so.
    Idle,
}

impl Fault {
    /// A fault and after how many good turns it strikes, from `lost:12` and the like.
    pub fn parse(text: &str) -> Option<(Fault, usize)> {
        let (name, after) = text.split_once(':')?;
        let fault = match name {
            "lost" => Fault::Lost,
            "out-of-memory" => Fault::OutOfMemory,
            "full" => Fault::Full,
            "hang" => Fault::Hang,
            "unmapped" => Fault::Unmapped,
            "idle" => Fault::Idle,
            _ => return None,
        };
        Some((fault, after.parse().ok()?))
    }
}

/// The fault that is to come, and how many turns remain.
#[derive(Default)]
pub(super) struct Faults(Mutex<Option<(Fault, usize)>>);

impl Faults {
    /// Whether `fault` strikes at this turn (and, but for [`Fault::Full`], at every one from then on).
    pub(super) fn strikes(&self, fault: Fault) -> bool {
        let mut injected = self.0.lock().unwrap_or_else(|p| p.into_inner());
        match &mut *injected {
            Some((Fault::Full, 0)) if fault == Fault::Full => {
                *injected = None;
                true
            }
            Some((expected, 0)) => *expected == fault,
            Some((expected, left)) if *expected == fault => {
                *left -= 1;
                false
            }
            _ => false,
        }
    }
}

impl Gpu {
    /// Makes the device fail with `fault` after `after` more good turns, for tests.
    #[doc(hidden)]
    pub fn inject(&self, fault: Fault, after: usize) {
        *self.faults.0.lock().unwrap_or_else(|p| p.into_inner()) = Some((fault, after));
    }

    /// How long a wait may take before it is taken for a hang. On hardware a submission takes 0.1 s,
    /// and kernels are compiled before they are submitted; what lasts longer than some seconds is
    /// reset by the system. A software adapter compiles at the first submission and may take minutes
    /// for an honest step of a large model.
    pub(super) fn patience(&self) -> Duration {
        match self.report().software {
            true => Duration::from_secs(30 * 60),
            false => Duration::from_secs(2 * 60),
        }
    }
}
