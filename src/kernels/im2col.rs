//! `shaders/im2col.wgsl`: the explicit im2col matrix and its transpose.

use super::{dispatch, mask};
use crate::error::Result;
use crate::gpu::{Buffer, Dispatch, Gpu};
use crate::model::Conv2d;

const SOURCE: &str = include_str!("../../shaders/im2col.wgsl");

fn constants(g: &Conv2d, batch: usize, mask: bool) -> [(&'static str, f64); 15] {
    [
        ("N", batch as f64),
        ("H", g.input.height as f64),
        ("W", g.input.width as f64),
        ("C", g.input.channels as f64),
        ("OH", g.output.height as f64),
        ("OW", g.output.width as f64),
        ("KH", g.kernel[0] as f64),
        ("KW", g.kernel[1] as f64),
        ("SH", g.stride[0] as f64),
        ("SW", g.stride[1] as f64),
        ("PH", g.padding[0] as f64),
        ("PW", g.padding[1] as f64),
        ("DH", g.dilation[0] as f64),
        ("DW", g.dilation[1] as f64),
        ("MASK", f64::from(mask)),
    ]
}

/// `columns[N·OH·OW, KH·KW·C]` from `x[N,H,W,C]`, zeros where a window hangs over the edge. Writes
/// `columns`.
///
/// # Errors
/// [`crate::Error::Shape`] for buffers that are too short, [`crate::Error::Gpu`] from the device.
pub fn im2col(
    gpu: &Gpu,
    geometry: &Conv2d,
    batch: usize,
    x: &Buffer,
    columns: &Buffer,
) -> Result<Dispatch> {
    let n = batch * geometry.positions() * geometry.patch();
    dispatch(
        gpu,
        "im2col",
        SOURCE,
        &constants(geometry, batch, false),
        &[
            (0, "x", x, batch * geometry.input.elements()),
            (1, "columns", columns, n),
        ],
        n,
    )
}

/// `dx[N,H,W,C]` from `dcolumns[N·OH·OW, KH·KW·C]`: every element is the sum over its copies. With
/// `activation` `[N,H,W,C]` (the layer's input) the gradient passes only where that is positive.
/// Writes `dx`.
///
/// # Errors
/// As [`im2col`].
pub fn col2im(
    gpu: &Gpu,
    geometry: &Conv2d,
    batch: usize,
    dcolumns: &Buffer,
    activation: Option<&Buffer>,
    dx: &Buffer,
) -> Result<Dispatch> {
    let n = batch * geometry.input.elements();
    let columns = batch * geometry.positions() * geometry.patch();
    dispatch(
        gpu,
        "col2im",
        SOURCE,
        &constants(geometry, batch, activation.is_some()),
        &[
            (2, "dcolumns", dcolumns, columns),
            mask(3, activation, n, dcolumns),
            (4, "dx", dx, n),
        ],
        n,
    )
}
