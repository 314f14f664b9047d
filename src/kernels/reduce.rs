//! `shaders/reduce.wgsl`: the sum over the parts of a weight gradient.

use super::dispatch;
use crate::error::Result;
use crate::gpu::{Buffer, Dispatch, Gpu};

const SOURCE: &str = include_str!("../../shaders/reduce.wgsl");

/// `result[n] = Σ_s partials[splits,n]` in order of s, with n the `splits`-th part of `partials`.
/// Writes `result`.
///
/// # Errors
/// [`crate::Error::Shape`] for buffers that are too short, [`crate::Error::Gpu`] from the device.
pub fn reduce_splits(
    gpu: &Gpu,
    splits: usize,
    partials: &Buffer,
    result: &Buffer,
) -> Result<Dispatch> {
    let n = partials.len() / splits.max(1);
    dispatch(
        gpu,
        "reduce_splits",
        SOURCE,
        &[("SPLITS", splits as f64), ("ELEMENTS", n as f64)],
        &[
            (0, "partials", partials, splits * n),
            (1, "result", result, n),
        ],
        n,
    )
}
