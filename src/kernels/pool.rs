//! `shaders/pool.wgsl`: max- and mean-pooling.

use super::{dispatch, mask};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Dispatch, Gpu};
use crate::model::Pool2d;

const SOURCE: &str = include_str!("../../shaders/pool.wgsl");

/// The place of a maximum inside its window is stored as a byte.
const LARGEST_WINDOW: usize = 256;

fn constants(pool: &Pool2d, batch: usize, masked: bool) -> [(&'static str, f64); 11] {
    [
        ("N", batch as f64),
        ("H", pool.input.height as f64),
        ("W", pool.input.width as f64),
        ("C", pool.input.channels as f64),
        ("OH", pool.output.height as f64),
        ("OW", pool.output.width as f64),
        ("KH", pool.kernel[0] as f64),
        ("KW", pool.kernel[1] as f64),
        ("SH", pool.stride[0] as f64),
        ("SW", pool.stride[1] as f64),
        ("MASK", f64::from(masked)),
    ]
}

/// `y[N,OH,OW,C]` = the maximum of each window of `x[N,H,W,C]`, and `index`: its place kh·KW + kw
/// inside the window, one byte per element of `y`, four to a word; of equal values the first in
/// row-major order, and a NaN before every number. Writes `y` and `index`.
///
/// # Errors
/// [`Error::Shape`] for buffers that are too short or a window of more than 256 positions,
/// [`Error::Gpu`] from the device.
pub fn maxpool2d_forward(
    gpu: &Gpu,
    pool: &Pool2d,
    batch: usize,
    x: &Buffer,
    y: &Buffer,
    index: &Buffer,
) -> Result<Dispatch> {
    let [kh, kw] = pool.kernel;
    if kh * kw > LARGEST_WINDOW {
        return Err(Error::Shape {
            operation: "maxpool2d_forward",
            what: format!(
                "expected a window of at most {LARGEST_WINDOW} positions, found {kh}×{kw}; use a smaller one, or mean-pooling"
            ),
        });
    }
    let n = batch * pool.output.elements();
    dispatch(
        gpu,
        "maxpool2d_forward",
        SOURCE,
        &constants(pool, batch, false),
        &[
            (0, "x", x, batch * pool.input.elements()),
            (1, "y", y, n),
            (2, "index", index, n.div_ceil(4)),
        ],
        n.div_ceil(4),
    )
}

/// `dx[N,H,W,C]`: the gradient `dy[N,OH,OW,C]` of each window at the place that `index` recorded,
/// 0 elsewhere, for windows that do not overlap. With `activation` `[N,OH,OW,C]` (the pooled output
/// `y`) the gradient passes only where that is positive: the ReLU fused into the layer before.
/// Writes every element of `dx`.
///
/// # Errors
/// [`Error::Shape`] for buffers that are too short or windows that overlap, [`Error::Gpu`] from the
/// device.
pub fn maxpool2d_backward(
    gpu: &Gpu,
    pool: &Pool2d,
    batch: usize,
    dy: &Buffer,
    index: &Buffer,
    activation: Option<&Buffer>,
    dx: &Buffer,
) -> Result<Dispatch> {
    if pool.overlapping() {
        return Err(Error::Shape {
            operation: "maxpool2d_backward",
            what: format!(
                "expected a stride of at least the window {:?}, found {:?}; use maxpool2d_backward_overlapping",
                pool.kernel, pool.stride
            ),
        });
    }
    let n = batch * pool.output.elements();
    // Four channels an invocation where they come in fours.
    let (entry_point, [dy_at, activation_at, dx_at], invocations) =
        if pool.output.channels.is_multiple_of(4) {
            ("maxpool2d_backward4", [7, 8, 9], n / 4)
        } else {
            ("maxpool2d_backward", [3, 5, 6], n)
        };
    dispatch(
        gpu,
        entry_point,
        SOURCE,
        &constants(pool, batch, activation.is_some()),
        &[
            (dy_at, "dy", dy, n),
            (4, "index", index, n.div_ceil(4)),
            mask(activation_at, activation, n, dy),
            (dx_at, "dx", dx, batch * pool.input.elements()),
        ],
        invocations,
    )
}

/// As [`maxpool2d_backward`] for any stride: where windows overlap, a position gets the sum of the
/// gradients of all windows that it won. Writes every element of `dx`.
///
/// # Errors
/// [`Error::Shape`] for buffers that are too short, [`Error::Gpu`] from the device.
pub fn maxpool2d_backward_overlapping(
    gpu: &Gpu,
    pool: &Pool2d,
    batch: usize,
    dy: &Buffer,
    index: &Buffer,
    activation: Option<&Buffer>,
    dx: &Buffer,
) -> Result<Dispatch> {
    let n = batch * pool.output.elements();
    let inputs = batch * pool.input.elements();
    dispatch(
        gpu,
        "maxpool2d_backward_overlapping",
        SOURCE,
        &constants(pool, batch, activation.is_some()),
        &[
            (3, "dy", dy, n),
            (4, "index", index, n.div_ceil(4)),
            mask(5, activation, n, dy),
            (6, "dx", dx, inputs),
        ],
        inputs,
    )
}

/// `y[N,OH,OW,C]` = the mean of each window of `x[N,H,W,C]`. Writes `y`.
///
/// # Errors
/// As [`maxpool2d_backward_overlapping`].
pub fn meanpool2d_forward(
    gpu: &Gpu,
    pool: &Pool2d,
    batch: usize,
    x: &Buffer,
    y: &Buffer,
) -> Result<Dispatch> {
    let n = batch * pool.output.elements();
    dispatch(
        gpu,
        "meanpool2d_forward",
        SOURCE,
        &constants(pool, batch, false),
        &[(0, "x", x, batch * pool.input.elements()), (1, "y", y, n)],
        n,
    )
}

/// `dx[N,H,W,C]`: every position gets 1/(KH·KW) of the gradients `dy[N,OH,OW,C]` of all windows
/// that contain it. With `activation` `[N,H,W,C]` (the layer's input `x`) the gradient passes only
/// where that is positive. Writes every element of `dx`.
///
/// # Errors
/// As [`maxpool2d_backward_overlapping`].
pub fn meanpool2d_backward(
    gpu: &Gpu,
    pool: &Pool2d,
    batch: usize,
    dy: &Buffer,
    activation: Option<&Buffer>,
    dx: &Buffer,
) -> Result<Dispatch> {
    let n = batch * pool.input.elements();
    dispatch(
        gpu,
        "meanpool2d_backward",
        SOURCE,
        &constants(pool, batch, activation.is_some()),
        &[
            (3, "dy", dy, batch * pool.output.elements()),
            mask(5, activation, n, dy),
            (6, "dx", dx, n),
        ],
        n,
    )
}
