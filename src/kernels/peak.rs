//! `shaders/peak.wgsl`: what an adapter can do at most.

use super::dispatch;
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Dispatch, Gpu};

const SOURCE: &str = include_str!("../../shaders/peak.wgsl");

/// Multiply-adds of one invocation in one round: 16 numbers, 8 times.
pub const MULTIPLY_ADDS_PER_ROUND: usize = 128;

/// `rounds` · 8 times `a = a · scale + shift` for 16 numbers in each of `invocations` invocations;
/// `y[invocations]` receives their sums. `factors` is `[scale, shift]`. Writes `y`.
///
/// # Errors
/// [`Error::Shape`] for buffers that are too short, [`Error::Gpu`] from the device.
pub fn peak_multiply_add(
    gpu: &Gpu,
    invocations: usize,
    rounds: usize,
    factors: &Buffer,
    y: &Buffer,
) -> Result<Dispatch> {
    dispatch(
        gpu,
        "peak_multiply_add",
        SOURCE,
        &[
            ("INVOCATIONS", invocations as f64),
            ("ROUNDS", rounds as f64),
            // Every override wants a value.
            ("ELEMENTS_4", 0.0),
        ],
        &[(0, "factors", factors, 2), (1, "y", y, invocations)],
        invocations,
    )
}

/// `dst = src`, four elements an invocation. Writes as many elements of `dst` as `src` has.
///
/// # Errors
/// [`Error::Shape`] for a length of `src` that is no multiple of 4 and a `dst` that is shorter,
/// [`Error::Gpu`] from the device.
pub fn peak_copy(gpu: &Gpu, src: &Buffer, dst: &Buffer) -> Result<Dispatch> {
    let n = src.len();
    if !n.is_multiple_of(4) {
        return Err(Error::Shape {
            operation: "peak_copy",
            what: format!("expected a multiple of 4 elements, found {n}; round it down"),
        });
    }
    dispatch(
        gpu,
        "peak_copy",
        SOURCE,
        &[
            ("INVOCATIONS", 0.0),
            ("ROUNDS", 0.0),
            ("ELEMENTS_4", (n / 4) as f64),
        ],
        &[(2, "src", src, n), (3, "dst", dst, n)],
        n / 4,
    )
}
