//! Convolutions of 3×3 by Winograd's F(2×2, 3×3).

use super::product::{Gathered, Panels, product, product_transposed};
use super::{ELEMENTS_PER_SUM, Scratch};
use crate::cpu::{add, batch};
use crate::model::{Conv2d, Shape};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::array::from_fn;

/// Tiles that are transformed in one go.
const TILES: usize = 64;

/// Elements between the matrices of a block that are not used: were a power of two from one to the next,
/// they would be in each other's way in the cache.
const GAP: usize = 16;

/// Whether a layer is computed so.
pub(super) fn suits(g: &Conv2d) -> bool {
    let [c, oc] = [g.input.channels, g.output.channels];
    g.kernel == [3, 3]
        && g.stride == [1, 1]
        && g.dilation == [1, 1]
        && g.groups == 1
        && c.min(oc) >= 16
        && g.output.height.min(g.output.width) >= 4
}

/// One axis of a transform: A numbers become B.
trait Axis<const A: usize, const B: usize> {
    fn along<S: Simd>(simd: S, from: [S::f32s; A]) -> [S::f32s; B];
}

/// `Bᵀ`.
struct Pixels;

impl Axis<4, 4> for Pixels {
    #[inline(always)]
    fn along<S: Simd>(simd: S, d: [S::f32s; 4]) -> [S::f32s; 4] {
        [
            simd.sub_f32s(d[0], d[2]),
            simd.add_f32s(d[1], d[2]),
            simd.sub_f32s(d[2], d[1]),
            simd.sub_f32s(d[1], d[3]),
        ]
    }
}

/// `G`.
struct Kernel;

impl Axis<3, 4> for Kernel {
    #[inline(always)]
    fn along<S: Simd>(simd: S, g: [S::f32s; 3]) -> [S::f32s; 4] {
        let half = simd.splat_f32s(0.5);
        let [even, odd] = [simd.add_f32s(g[0], g[2]), g[1]];
        let sum = simd.mul_f32s(half, simd.add_f32s(even, odd));
        let difference = simd.mul_f32s(half, simd.sub_f32s(even, odd));
        [g[0], sum, difference, g[2]]
    }
}

/// `Aᵀ`.
struct Outputs;

impl Axis<4, 2> for Outputs {
    #[inline(always)]
    fn along<S: Simd>(simd: S, m: [S::f32s; 4]) -> [S::f32s; 2] {
        [
            simd.add_f32s(simd.add_f32s(m[0], m[1]), m[2]),
            simd.sub_f32s(simd.sub_f32s(m[1], m[2]), m[3]),
        ]
    }
}

/// `A`.
struct Gradients;

impl Axis<2, 4> for Gradients {
    #[inline(always)]
    fn along<S: Simd>(simd: S, dy: [S::f32s; 2]) -> [S::f32s; 4] {
        [
            dy[0],
            simd.add_f32s(dy[0], dy[1]),
            simd.sub_f32s(dy[0], dy[1]),
            simd.neg_f32s(dy[1]),
        ]
    }
}

/// `Gᵀ`.
struct Taps;

impl Axis<4, 3> for Taps {
    #[inline(always)]
    fn along<S: Simd>(simd: S, u: [S::f32s; 4]) -> [S::f32s; 3] {
        let half = simd.splat_f32s(0.5);
        let sum = simd.mul_f32s(half, simd.add_f32s(u[1], u[2]));
        let difference = simd.mul_f32s(half, simd.sub_f32s(u[1], u[2]));
        [
            simd.add_f32s(u[0], sum),
            difference,
            simd.add_f32s(sum, u[3]),
        ]
    }
}

/// Where the A×A numbers of a tile begin, each for so many channels; those outside the image do not.
type Places<const A: usize> = [[Option<usize>; A]; A];

/// Applies the transform of an axis along both.
struct Transform<'a, const A: usize, const B: usize, X, F, T> {
    axis: X,
    source: &'a [f32],
    target: &'a mut [f32],
    tiles: usize,
    channels: usize,
    from: F,
    to: T,
}

impl<const A: usize, const B: usize, X, F, T> WithSimd for Transform<'_, A, B, X, F, T>
where
    X: Axis<A, B>,
    F: Fn(usize) -> Places<A>,
    T: Fn(usize) -> Places<B>,
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for tile in 0..self.tiles {
            let (from, to) = ((self.from)(tile), (self.to)(tile));
            for first in (0..self.channels).step_by(S::F32_LANES) {
                let len = S::F32_LANES.min(self.channels - first);
                let zero = simd.splat_f32s(0.0);
                let mut columns = [[zero; B]; A];
                for j in 0..A {
                    let mut column = [zero; A];
                    for i in 0..A {
                        if let Some(at) = from[i][j] {
                            column[i] = load(simd, &self.source[at + first..][..len]);
                        }
                    }
                    columns[j] = X::along(simd, column);
                }
                for i in 0..B {
                    let mut row = [zero; A];
                    for j in 0..A {
                        row[j] = columns[j][i];
                    }
                    let row = X::along(simd, row);
                    for j in 0..B {
                        if let Some(at) = to[i][j] {
                            store(simd, &mut self.target[at + first..][..len], row[j]);
                        }
                    }
                }
            }
        }
    }
}

/// A vector, or a part of one.
#[inline(always)]
fn load<S: Simd>(simd: S, part: &[f32]) -> S::f32s {
    match S::as_simd_f32s(part) {
        ([whole], _) => *whole,
        (_, part) => simd.partial_load_f32s(part),
    }
}

#[inline(always)]
fn store<S: Simd>(simd: S, part: &mut [f32], value: S::f32s) {
    match S::as_mut_simd_f32s(part) {
        ([whole], _) => *whole = value,
        (_, part) => simd.partial_store_f32s(part, value),
    }
}

/// Places of an A×A window in a batch of images, whose corner is pixel `[top, left]`; less than 0 wraps around.
#[inline(always)]
fn window<const A: usize>(shape: Shape, n: usize, [top, left]: [usize; 2]) -> Places<A> {
    from_fn(|i| {
        from_fn(|j| {
            let (h, w) = (top.wrapping_add(i), left.wrapping_add(j));
            (h < shape.height && w < shape.width)
                .then(|| ((n * shape.height + h) * shape.width + w) * shape.channels)
        })
    })
}

/// Places of A×A matrices, one `stride` apart.
#[inline(always)]
fn matrices<const A: usize>(stride: usize, at: usize) -> Places<A> {
    from_fn(|i| from_fn(|j| Some((i * A + j) * stride + at)))
}

/// The tiles of a batch.
struct Tiles<'a> {
    g: &'a Conv2d,
    /// Of an image.
    size: [usize; 2],
}

impl<'a> Tiles<'a> {
    fn new(g: &'a Conv2d) -> Self {
        let size = [g.output.height, g.output.width].map(|n| n.div_ceil(2));
        Tiles { g, size }
    }

    fn of_a_sample(&self) -> usize {
        self.size[0] * self.size[1]
    }

    /// Image and corner of a tile's outputs.
    #[inline(always)]
    fn corner(&self, tile: usize) -> (usize, [usize; 2]) {
        let (n, tile) = (tile / self.of_a_sample(), tile % self.of_a_sample());
        (n, [2 * (tile / self.size[1]), 2 * (tile % self.size[1])])
    }

    #[inline(always)]
    fn pixels(&self, tile: usize) -> Places<4> {
        let (n, [top, left]) = self.corner(tile);
        let [above, before] = self.g.padding;
        window(
            self.g.input,
            n,
            [top.wrapping_sub(above), left.wrapping_sub(before)],
        )
    }

    #[inline(always)]
    fn outputs(&self, tile: usize) -> Places<2> {
        let (n, corner) = self.corner(tile);
        window(self.g.output, n, corner)
    }
}

/// The transforms `[16·C, OC]` of a weight.
pub(super) fn transform_weight<'a>(weight: Panels, c: usize, values: &'a mut Vec<f32>) -> Panels<'a> {
    weight.map(16 * c, values, |source, target| {
        let channels = source.len() / 9;
        Arch::new().dispatch(Transform {
            axis: Kernel,
            source,
            target,
            tiles: 1,
            channels,
            from: |_| matrices::<3>(channels, 0),
            to: |_| matrices::<4>(channels, 0),
        });
    })
}

/// The convolution of some samples.
pub(super) fn convolve(
    g: &Conv2d,
    x: &[f32],
    weight: Panels,
    bias: Option<&[f32]>,
    y: &mut [f32],
    scratch: &Scratch,
) {
    let (tiles, c, oc) = (Tiles::new(g), g.input.channels, g.output.channels);
    let all = batch(x.len(), g.input) * tiles.of_a_sample();
    let rows: [usize; TILES] = from_fn(|row| row * c);
    let strides = [c, oc].map(|channels| TILES * channels + GAP);
    scratch.columns.lend(|buffer| {
        buffer.resize(16 * (strides[0] + strides[1]), 0.0);
        let (v, m) = buffer.split_at_mut(16 * strides[0]);
        for first in (0..all).step_by(TILES) {
            let some = TILES.min(all - first);
            Arch::new().dispatch(Transform {
                axis: Pixels,
                source: x,
                target: &mut *v,
                tiles: some,
                channels: c,
                from: |tile| tiles.pixels(first + tile),
                to: |tile| matrices::<4>(strides[0], tile * c),
            });
            for (k, (v, m)) in v
                .chunks_exact(strides[0])
                .zip(m.chunks_exact_mut(strides[1]))
                .enumerate()
            {
                let v = Gathered {
                    values: v,
                    rows: &rows[..some],
                    runs: &[0],
                    run: c,
                };
                // What is in the middle counts in all outputs of a tile.
                let bias = bias.filter(|_| k == 5);
                product(v, weight.part(k * c, c), bias, &mut m[..some * oc]);
            }
            Arch::new().dispatch(Transform {
                axis: Outputs,
                source: m,
                target: &mut *y,
                tiles: some,
                channels: oc,
                from: |tile| matrices::<4>(strides[1], tile * oc),
                to: |tile| tiles.outputs(first + tile),
            });
        }
    });
}

/// The sums `[16·C, OC]` of some samples.
pub(super) fn sum_gradients(g: &Conv2d, x: &[f32], dy: &[f32], sums: &mut [f32], scratch: &Scratch) {
    let (tiles, c, oc) = (Tiles::new(g), g.input.channels, g.output.channels);
    let all = batch(x.len(), g.input) * tiles.of_a_sample();
    let rows: [usize; TILES] = from_fn(|row| row * c);
    let strides = [c, oc].map(|channels| TILES * channels + GAP);
    scratch.columns.lend(|buffer| {
        buffer.resize(16 * (strides[0] + strides[1]), 0.0);
        let (v, m) = buffer.split_at_mut(16 * strides[0]);
        for first in (0..all).step_by(TILES) {
            let some = TILES.min(all - first);
            Arch::new().dispatch(Transform {
                axis: Pixels,
                source: x,
                target: &mut *v,
                tiles: some,
                channels: c,
                from: |tile| tiles.pixels(first + tile),
                to: |tile| matrices::<4>(strides[0], tile * c),
            });
            Arch::new().dispatch(Transform {
                axis: Gradients,
                source: dy,
                target: &mut *m,
                tiles: some,
                channels: oc,
                from: |tile| tiles.outputs(first + tile),
                to: |tile| matrices::<4>(strides[1], tile * oc),
            });
            for ((v, m), sums) in v
                .chunks_exact(strides[0])
                .zip(m.chunks_exact(strides[1]))
                .zip(sums.chunks_exact_mut(c * oc))
            {
                let v = Gathered {
                    values: v,
                    rows: &rows[..some],
                    runs: &[0],
                    run: c,
                };
                scratch.panels.lend(|panels| {
                    let m = Panels::pack(&m[..some * oc], oc, panels);
                    product_transposed(v, m, first > 0, sums);
                });
            }
        }
    });
}

/// The gradient of the weight from its sums.
pub(super) fn gradient(g: &Conv2d, sums: &[f32], gradient: &mut [f32]) {
    let _ = (ELEMENTS_PER_SUM, add);
    let n = g.input.channels * g.output.channels;
    Arch::new().dispatch(Transform {
        axis: Taps,
        source: sums,
        target: gradient,
        tiles: 1,
        channels: n,
        from: |_| matrices::<4>(n, 0),
        to: |_| matrices::<3>(n, 0),
    });
}
