//! `shaders/fingerprint.wgsl`: how a device calculates.

use super::dispatch;
use crate::error::Result;
use crate::gpu::{Buffer, Dispatch, Gpu};

const SOURCE: &str = include_str!("../../shaders/fingerprint.wgsl");

/// Operations that [`arithmetic`] knows, numbered from 0.
pub const OPERATIONS: usize = 12;

/// `y[i]` = operation number `operation` of `a[i]`, `b[i]`, `c[i]`, for every element of `a`; the
/// numbers are explained in the shader. Writes `y`.
///
/// # Errors
/// [`crate::Error::Shape`] for buffers that are too short, [`crate::Error::Gpu`] from the device.
pub fn arithmetic(
    gpu: &Gpu,
    operation: usize,
    a: &Buffer,
    b: &Buffer,
    c: &Buffer,
    y: &Buffer,
) -> Result<Dispatch> {
    let n = a.len();
    dispatch(
        gpu,
        "arithmetic",
        SOURCE,
        &[("ELEMENTS", n as f64), ("OPERATION", operation as f64)],
        &[
            (0, "a", a, n),
            (1, "b", b, n),
            (2, "c", c, n),
            (3, "y", y, n),
        ],
        n,
    )
}
