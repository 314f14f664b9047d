//! `shaders/reduce.wgsl`: the sum over the parts of a weight gradient.

use super::dispatch;
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Dispatch, Gpu};

const SOURCE: &str = include_str!("../../shaders/reduce.wgsl");

/// `result[n] = Σ_s partials[splits,n]` in order of s, with n the `splits`-th part of `partials`.
/// Writes `result`.
///
/// # Errors
/// [`Error::Shape`] for a result that is too short or partial sums that `splits` does not divide,
/// [`Error::Gpu`] from the device.
pub fn reduce_splits(
    gpu: &Gpu,
    splits: usize,
    partials: &Buffer,
    result: &Buffer,
) -> Result<Dispatch> {
    if splits == 0 || !partials.len().is_multiple_of(splits) {
        return Err(Error::Shape {
            operation: "reduce_splits",
            what: format!(
                "expected partial sums in {splits} equal parts, found {} elements; allocate them for the same number of splits",
                partials.len()
            ),
        });
    }
    let n = partials.len() / splits;
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
