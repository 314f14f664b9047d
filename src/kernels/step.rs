//! `shaders/step.wgsl`: the end of a step.

use super::dispatch;
use crate::error::Result;
use crate::gpu::{Buffer, Dispatch, Gpu};

const SOURCE: &str = include_str!("../../shaders/step.wgsl");

/// Moves `counter[0]` on to the next row of the step table. Adds 1 to it.
///
/// # Errors
/// [`crate::Error::Shape`] for an empty buffer, [`crate::Error::Gpu`] from the device.
pub fn advance_step(gpu: &Gpu, counter: &Buffer) -> Result<Dispatch> {
    dispatch(
        gpu,
        "advance_step",
        SOURCE,
        &[],
        &[(0, "counter", counter, 1)],
        1,
    )
}
