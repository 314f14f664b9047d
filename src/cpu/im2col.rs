//! Twins of `shaders/im2col.wgsl`: the explicit im2col matrix and its transpose.

use super::{Float, add, batch};
use crate::model::Conv2d;
use rayon::prelude::*;

/// Calls `visit(position, pixel)` for every output position `oh·OW + ow` whose tap
/// `kh·KW + kw` meets the image and not its padding; `pixel = h·W + w` is what it meets.
///
/// This is the index arithmetic of convolution: `h = oh·SH + kh·DH − PH`, and along the width likewise.
#[inline(always)]
pub(super) fn for_each_position(g: &Conv2d, tap: usize, mut visit: impl FnMut(usize, usize)) {
    for oh in 0..g.output.height {
        let Some(h) = met(g, 0, oh, tap / g.kernel[1]) else {
            continue;
        };
        for ow in 0..g.output.width {
            if let Some(w) = met(g, 1, ow, tap % g.kernel[1]) {
                visit(oh * g.output.width + ow, h * g.input.width + w);
            }
        }
    }
}

/// What tap `kh·KW + kw` meets at output position `oh·OW + ow`: `h·W + w`, or nothing in the padding.
pub(super) fn pixel(g: &Conv2d, position: usize, tap: usize) -> Option<usize> {
    let h = met(g, 0, position / g.output.width, tap / g.kernel[1])?;
    let w = met(g, 1, position % g.output.width, tap % g.kernel[1])?;
    Some(h * g.input.width + w)
}

/// `o·S + k·D − P` along one axis, where that lies in the image.
#[inline(always)]
fn met(g: &Conv2d, axis: usize, o: usize, k: usize) -> Option<usize> {
    (o * g.stride[axis] + k * g.dilation[axis])
        .checked_sub(g.padding[axis])
        .filter(|&i| i < [g.input.height, g.input.width][axis])
}

/// `columns[(n,oh,ow), (kh,kw,c)] = x[n, oh·SH + kh·DH − PH, ow·SW + kw·DW − PW, c]`, 0 in the padding.
///
/// x `[N,H,W,C]`, returns `[N·OH·OW, KH·KW·C]`. Source: Chellapilla, Puri, Simard (2006),
/// "High Performance Convolutional Neural Networks for Document Processing".
pub fn im2col<T: Float>(g: &Conv2d, x: &[T]) -> Vec<T> {
    let (n, c, patch) = (batch(x.len(), g.input), g.input.channels, g.patch());
    let mut columns = vec![T::zero(); n * g.positions() * patch];
    columns
        .par_chunks_mut(g.positions() * patch)
        .zip(x.par_chunks(g.input.elements()))
        .for_each(|(columns, x)| {
            for tap in 0..g.kernel[0] * g.kernel[1] {
                for_each_position(g, tap, |position, pixel| {
                    columns[position * patch + tap * c..][..c]
                        .copy_from_slice(&x[pixel * c..][..c]);
                });
            }
        });
    columns
}

/// The transpose of [`im2col`]: every pixel receives the sum over its copies,
/// `dx[n,h,w,c] = Σ columns[(n,oh,ow), (kh,kw,c)]` over the (kh,kw) whose window reaches (h,w), in
/// the order of (kh,kw).
///
/// columns `[N·OH·OW, KH·KW·C]`, returns `[N,H,W,C]`.
pub fn col2im<T: Float>(g: &Conv2d, columns: &[T]) -> Vec<T> {
    let (c, patch) = (g.input.channels, g.patch());
    let sample = g.positions() * patch;
    assert!(columns.len().is_multiple_of(sample));
    let mut dx = vec![T::zero(); columns.len() / sample * g.input.elements()];
    dx.par_chunks_mut(g.input.elements())
        .zip(columns.par_chunks(sample))
        .for_each(|(dx, columns)| {
            for tap in 0..g.kernel[0] * g.kernel[1] {
                for_each_position(g, tap, |position, pixel| {
                    add(
                        &mut dx[pixel * c..][..c],
                        &columns[position * patch + tap * c..][..c],
                    );
                });
            }
        });
    dx
}
