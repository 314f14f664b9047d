//! The memory of the machine itself.

use crate::error::{Error, Result};
use indicatif::BinaryBytes;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Bytes that a process may still take without anybody being stopped for it: what the system counts
/// as available, within the limit of the control group where there is one.
pub fn available_memory() -> u64 {
    let memory = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(memory);
    let group = system.cgroup_limits();
    let group = group.map_or(u64::MAX, |g| g.total_memory.saturating_sub(g.rss));
    system.available_memory().min(group)
}

/// The largest power of two below `batch_size` that `fits`.
///
/// # Errors
/// What `fits` reports.
pub fn fitting_batch(
    batch_size: usize,
    fits: impl Fn(usize) -> Result<bool>,
) -> Result<Option<usize>> {
    let mut batch = batch_size.next_power_of_two() / 2;
    while batch > 0 && !fits(batch)? {
        batch /= 2;
    }
    Ok(Some(batch).filter(|batch| *batch > 0))
}

/// What to do where only so many samples at a time fit: for steps on whole batches, and for `micro` ones.
pub fn batch_advice(batch: usize, micro: bool) -> String {
    match micro {
        true => format!("use --micro-batch {batch} or smaller"),
        false => format!(
            "train with --micro-batch {batch}, which computes the same batch in parts, or use --batch-size {batch} or smaller"
        ),
    }
}

/// Refuses to train on `batch_size` samples at a time, `micro` ones or whole batches, where less memory is `available` than `needed` says
/// for it, instead of being stopped in the middle; `advice` says what to do where so many fit.
///
/// # Errors
/// [`Error::Usage`] with both numbers and the largest power of two that fits; what `needed` reports.
pub fn expect_memory(
    batch_size: usize,
    micro: bool,
    available: u64,
    advice: impl Fn(usize) -> String,
    needed: impl Fn(usize) -> Result<u64>,
) -> Result<()> {
    let wanted = needed(batch_size)?;
    if wanted <= available {
        return Ok(());
    }
    let advice = match fitting_batch(batch_size, |batch| Ok(needed(batch)? <= available))? {
        Some(batch) => advice(batch),
        None => "use a smaller model".into(),
    };
    let what = if micro { "micro-batch" } else { "batch size" };
    Err(Error::Usage(format!(
        "expected {} of free memory for training at {what} {batch_size}, found {}; {advice}",
        BinaryBytes(wanted),
        BinaryBytes(available)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_batch_that_fits_is_the_largest_power_of_two_below() {
        let fits = |most| move |batch| Ok(batch <= most);
        assert_eq!(fitting_batch(128, fits(100)).unwrap(), Some(64));
        assert_eq!(fitting_batch(100, fits(64)).unwrap(), Some(64));
        assert_eq!(fitting_batch(100, fits(1)).unwrap(), Some(1));
        assert_eq!(fitting_batch(100, fits(0)).unwrap(), None);
        assert_eq!(fitting_batch(1, fits(1)).unwrap(), None);
    }

    #[test]
    fn a_refusal_names_both_numbers_and_what_helps() {
        let needed = |batch: usize| Ok((1 << 30) + ((batch as u64) << 20));
        expect_memory(1024, false, 2 << 30, |_| String::new(), needed).unwrap();
        let refusal = |micro, available| {
            let advice = |batch| batch_advice(batch, micro);
            let result = expect_memory(1025, micro, available, advice, needed);
            result.unwrap_err().to_string()
        };
        let message = refusal(false, 2 << 30);
        for word in [
            "2.00 GiB",
            "batch size 1025",
            "--batch-size 1024",
            "--micro-batch 1024, which",
        ] {
            assert!(message.contains(word), "no {word:?} in {message}");
        }
        // Who has parts already needs smaller ones.
        let message = refusal(true, 2 << 30);
        for word in ["micro-batch 1025", "use --micro-batch 1024 or"] {
            assert!(message.contains(word), "no {word:?} in {message}");
        }
        assert!(!message.contains("batch-size"), "{message}");
        let message = refusal(false, 1 << 30);
        assert!(message.contains("a smaller model"), "{message}");
        // This machine has some.
        assert!(available_memory() > 1 << 20);
    }
}
