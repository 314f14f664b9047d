//! `shaders/im2col.wgsl`: the explicit im2col matrix and its transpose.

use super::{KernelSpec, View, Work, mask, read, write};
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
pub fn im2col(geometry: &Conv2d, batch: usize, x: View, columns: View) -> KernelSpec {
    let n = batch * geometry.positions() * geometry.patch();
    KernelSpec::new(
        "im2col",
        SOURCE,
        Work::Im2col(*geometry),
        &constants(geometry, batch, false),
        vec![
            read(0, "x", x, batch * geometry.input.elements()),
            write(1, "columns", columns, n),
        ],
        n,
    )
}

/// `dx[N,H,W,C]` from `dcolumns[N·OH·OW, KH·KW·C]`: every element is the sum over its copies. With
/// `activation` `[N,H,W,C]` (the layer's input) the gradient passes only where that is positive.
/// Writes `dx`.
pub fn col2im(
    geometry: &Conv2d,
    batch: usize,
    dcolumns: View,
    activation: Option<View>,
    dx: View,
) -> KernelSpec {
    let n = batch * geometry.input.elements();
    let columns = batch * geometry.positions() * geometry.patch();
    KernelSpec::new(
        "col2im",
        SOURCE,
        Work::Col2im {
            geometry: *geometry,
            masked: activation.is_some(),
        },
        &constants(geometry, batch, activation.is_some()),
        vec![
            read(2, "dcolumns", dcolumns, columns),
            mask(3, activation, n, dcolumns),
            write(4, "dx", dx, n),
        ],
        n,
    )
}
