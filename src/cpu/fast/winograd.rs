//! Convolutions of 3×3 with stride 1 by Winograd's F(2×2, 3×3): for a pair of channels and 2×2 outputs it takes 16
//! multiplications, where sums term by term take 36. Source: Lavin and Gray (2016), "Fast Algorithms for
//! Convolutional Neural Networks", arXiv 1509.09308.
//!
//! A tile of 2×2 outputs y sees 4×4 pixels d. With the kernel g of 3×3
//!
//! ```text
//! y = Aᵀ·[(G·g·Gᵀ) ⊙ (Bᵀ·d·B)]·A
//!
//!      1  0 −1  0        1  0  0
//! Bᵀ = 0  1  1  0    G = ½  ½  ½    Aᵀ = 1  1  1  0
//!      0 −1  1  0        ½ −½  ½         0  1 −1 −1
//!      0  1  0 −1        0  0  1
//! ```
//!
//! Summed over channels each of the 16 places of ⊙ is a product of matrices, `[tiles, C]·[C, OC]`. The weight's
//! gradient is that of this formula, `Gᵀ·[Σ (Bᵀ·d·B) ⊙ (A·dy·Aᵀ)]·G` with products `[C, tiles]·[tiles, OC]`;
//! the input's is a convolution of dy.
//!
//! Tiles are transformed a block at a time into `[16][tiles][channels]`, which a core's cache holds, in vectors
//! of channels. What a tile sees beyond the image is 0, and what it has too many is not written. An
//! infinity, or a sum that overflows, spoils a whole tile: the caller sums anew what is not finite.

use super::product::{Gathered, Panels, product, product_transposed};
use super::{ELEMENTS_PER_SUM, Scratch, TASKS};
use crate::cpu::{add, batch};
use crate::kernels::conv2d::Pass;
use crate::model::{Conv2d, Shape};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::array::from_fn;
use std::ops::Range;

/// Tiles of a block.
const TILES: usize = 64;

/// Those of one for the weight's gradient: the terms of its products.
const TERMS: usize = 128;

/// Tiles that a task sums for the weight's gradient, about. Its sums are 16 matrices: were there more tasks,
/// adding them up would take as long as the products.
const TILES_PER_TASK: usize = 512;

/// Multiplications that transforming one of a tile's 16 numbers is worth.
const TRANSFORM: usize = 8;

/// Floats of a line of the cache. Matrices lie a line more apart than they are long: from one to the next a power
/// of two, they would push each other out.
const LINE: usize = 16;

/// The place of ⊙ whose number counts once in each output of a tile, [1, 1].
const MIDDLE: usize = 5;

/// Whether a layer is convolved so: where that takes at most three quarters of the multiplications, counting
/// the transforms and the outputs that tiles have too many.
pub(super) fn suits(g: &Conv2d) -> bool {
    let (c, oc) = (g.input.channels, g.output.channels);
    let multiplications = tiles(g) * 16 * (c * oc + TRANSFORM * (c + oc));
    (g.kernel, g.stride, g.dilation, g.groups) == ([3, 3], [1, 1], [1, 1], 1)
        && 4 * multiplications <= 3 * g.positions() * 9 * c * oc
}

/// Tiles of a sample.
fn tiles(g: &Conv2d) -> usize {
    g.output.height.div_ceil(2) * g.output.width.div_ceil(2)
}

/// Bytes that a pass takes for itself at most.
pub(super) fn scratch_bytes(g: &Conv2d, pass: Pass, samples: usize) -> u64 {
    let (c, oc) = (g.input.channels, g.output.channels);
    let (kept, tasks, tiles) = match pass {
        Pass::BackwardWeight => {
            let tasks = samples.div_ceil(samples_of_a_task(g, samples));
            (tasks * sums(g), tasks, TERMS)
        }
        Pass::Forward | Pass::BackwardInput => (16 * c * oc, samples, TILES),
    };
    let blocks = rayon::current_num_threads().min(tasks);
    4 * (kept + blocks * 16 * tiles * (c + oc)) as u64
}

/// The 16 matrices `G·g·Gᵀ` of a weight, both in panels.
pub(super) fn transform_weight<'a>(weight: Panels, values: &'a mut Vec<f32>) -> Panels<'a> {
    weight.map([9, 16], values, |from, to| {
        let len = from.len() / 9;
        let (from, to) = ((from, flat(len)), (to, flat(len)));
        transform(Weight, 0..1, len, from, to);
    })
}

/// The convolution of some samples, plus the bias.
pub(super) fn convolve(
    g: &Conv2d,
    x: &[f32],
    weight: Panels,
    bias: Option<&[f32]>,
    y: &mut [f32],
    scratch: &Scratch,
) {
    let (c, oc) = (g.input.channels, g.output.channels);
    let pitch = TILES * oc + LINE;
    scratch.columns.lend(|buffer| {
        let m = aligned(buffer, 16 * pitch);
        for_each_block(g, x, TILES, scratch, |block, v| {
            for (k, (v, m)) in v.iter().zip(m.chunks_exact_mut(pitch)).enumerate() {
                let bias = bias.filter(|_| k == MIDDLE);
                let m = &mut m[..block.len() * oc];
                product(*v, weight.part(k * c, c), bias, m);
            }
            let first = block.start;
            let from = Stacked {
                pitch,
                first,
                step: oc,
            };
            transform(Outputs, block, oc, (m, from), (y, outputs(g)));
        });
    });
}

/// [`conv2d_backward_weight`](crate::cpu::conv2d_backward_weight) into `gradient`.
pub(super) fn backward_weight(
    g: &Conv2d,
    x: &[f32],
    dy: &[f32],
    gradient: &mut [f32],
    scratch: &Scratch,
) {
    let samples = batch(x.len(), g.input);
    let task = samples_of_a_task(g, samples);
    scratch.partials.lend(|partials| {
        partials.resize(samples.div_ceil(task) * sums(g), 0.0);
        partials
            .par_chunks_mut(sums(g))
            .zip(x.par_chunks(task * g.input.elements()))
            .zip(dy.par_chunks(task * g.output.elements()))
            .for_each(|((sums, x), dy)| sum_tiles(g, x, dy, sums, scratch));
        join(g, partials, gradient, scratch);
    });
}

fn samples_of_a_task(g: &Conv2d, samples: usize) -> usize {
    let tasks = samples * tiles(g) / TILES_PER_TASK;
    samples.div_ceil(tasks.clamp(1, TASKS))
}

/// Elements that a task sums for the weight's gradient.
fn sums(g: &Conv2d) -> usize {
    (16 * g.input.channels + 1) * g.output.channels
}

/// The 16 products `[C, OC]` of some samples, and behind them the sums of dy.
fn sum_tiles(g: &Conv2d, x: &[f32], dy: &[f32], sums: &mut [f32], scratch: &Scratch) {
    let (c, oc) = (g.input.channels, g.output.channels);
    let (sums, bias) = sums.split_at_mut(16 * c * oc);
    bias.fill(0.0);
    // A panel's matrices lie apart by a row.
    let height = TERMS + 1;
    scratch.panels.lend(|panels| {
        for_each_block(g, x, TERMS, scratch, |block, v| {
            let (first, some) = (block.start, block.len());
            let m = Panels::fill([16 * height, oc], panels, |columns, panel| {
                let pitch = panel.len() / 16;
                let width = pitch / height;
                let from = (&dy[columns.start..], outputs(g));
                let to = (
                    &mut *panel,
                    Stacked {
                        pitch,
                        first,
                        step: width,
                    },
                );
                transform(Gradients, block.clone(), columns.len(), from, to);
                // In the middle lies what the four of a tile add up to.
                let rows = panel[MIDDLE * pitch..][..some * width].chunks_exact(width);
                rows.for_each(|row| add(&mut bias[columns.clone()], row));
            });
            sums.par_chunks_exact_mut(c * oc)
                .zip(v)
                .enumerate()
                .for_each(|(k, (sums, v))| {
                    product_transposed(*v, m.part(k * height, some), first > 0, sums);
                });
        });
    });
}

/// Adds up what all tasks summed and transforms that into the gradient.
fn join(g: &Conv2d, partials: &[f32], gradient: &mut [f32], scratch: &Scratch) {
    let matrix = g.input.channels * g.output.channels;
    let partials = || partials.chunks_exact(sums(g));
    let (weight, bias) = gradient.split_at_mut(9 * matrix);
    if g.bias {
        bias.fill(0.0);
        partials().for_each(|partial| add(bias, &partial[16 * matrix..]));
    }
    // The same part of each of the nine taps, and so on.
    let size = ELEMENTS_PER_SUM / 16;
    let taps = weight.chunks_exact_mut(matrix);
    let mut taps: Vec<_> = taps.map(|tap| tap.chunks_mut(size)).collect();
    let parts = (0..matrix).step_by(size);
    let parts: Vec<(usize, Vec<&mut [f32]>)> = parts
        .map(|first| (first, taps.iter_mut().filter_map(Iterator::next).collect()))
        .collect();
    parts.into_par_iter().for_each(|(first, taps)| {
        let len = taps[0].len();
        scratch.columns.lend(|buffer| {
            let (sums, weight) = aligned(buffer, 25 * len).split_at_mut(16 * len);
            sums.fill(0.0);
            for (k, sums) in sums.chunks_exact_mut(len).enumerate() {
                partials().for_each(|partial| add(sums, &partial[k * matrix + first..]));
            }
            let (from, to) = ((&*sums, flat(len)), (&mut *weight, flat(len)));
            transform(Taps, 0..1, len, from, to);
            for (tap, weight) in taps.into_iter().zip(weight.chunks_exact(len)) {
                tap.copy_from_slice(weight);
            }
        });
    });
}

/// Calls `work` with block after block of so many tiles, and the 16 matrices `[tiles, C]` of `Bᵀ·d·B`.
fn for_each_block(
    g: &Conv2d,
    x: &[f32],
    size: usize,
    scratch: &Scratch,
    mut work: impl FnMut(Range<usize>, &[Gathered; 16]),
) {
    let (c, all) = (g.input.channels, batch(x.len(), g.input) * tiles(g));
    let (rows, pitch) = ((0..size).map(|row| row * c), size * c + LINE);
    let rows: Vec<usize> = rows.collect();
    scratch.columns.lend(|buffer| {
        let v = aligned(buffer, 16 * pitch);
        for first in (0..all).step_by(size) {
            let block = first..all.min(first + size);
            let from = (x, pixels(g));
            let to = (
                &mut *v,
                Stacked {
                    pitch,
                    first,
                    step: c,
                },
            );
            transform(Pixels, block.clone(), c, from, to);
            let matrices = from_fn(|k| Gathered {
                values: &v[k * pitch..],
                rows: &rows[..block.len()],
                runs: &[0],
                run: c,
            });
            work(block, &matrices);
        }
    });
}

/// So many floats that begin with a line of the cache.
fn aligned(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len + LINE, 0.0);
    let first = buffer.as_ptr().align_offset(size_of::<[f32; LINE]>());
    &mut buffer[first.min(LINE)..][..len]
}

/// Where the A×A rows of channels begin that belong to a tile; those outside the image do not.
trait Places {
    fn of<const A: usize>(&self, tile: usize) -> [[Option<usize>; A]; A];
}

/// Rows of matrices that begin a `pitch` apart, of which the `first` tile has the first ones.
struct Stacked {
    pitch: usize,
    first: usize,
    step: usize,
}

impl Places for Stacked {
    #[inline(always)]
    fn of<const A: usize>(&self, tile: usize) -> [[Option<usize>; A]; A] {
        let mut places = [[None; A]; A];
        for i in 0..A {
            for j in 0..A {
                places[i][j] = Some((i * A + j) * self.pitch + (tile - self.first) * self.step);
            }
        }
        places
    }
}

/// Pixels of images, from so many rows and columns before the outputs of a tile.
struct Image {
    shape: Shape,
    before: [usize; 2],
    tiles: [usize; 2],
}

impl Places for Image {
    #[inline(always)]
    fn of<const A: usize>(&self, tile: usize) -> [[Option<usize>; A]; A] {
        let (shape, [_, across]) = (self.shape, self.tiles);
        let all = self.tiles[0] * across;
        let (n, tile) = (tile / all, tile % all);
        let top = (2 * (tile / across)).wrapping_sub(self.before[0]);
        let left = (2 * (tile % across)).wrapping_sub(self.before[1]);
        let mut places = [[None; A]; A];
        for i in 0..A {
            for j in 0..A {
                let (h, w) = (top.wrapping_add(i), left.wrapping_add(j));
                if h < shape.height && w < shape.width {
                    let pixel = (n * shape.height + h) * shape.width + w;
                    places[i][j] = Some(pixel * shape.channels);
                }
            }
        }
        places
    }
}

fn pixels(g: &Conv2d) -> Image {
    Image {
        shape: g.input,
        before: g.padding,
        tiles: [g.output.height, g.output.width].map(|n| n.div_ceil(2)),
    }
}

fn outputs(g: &Conv2d) -> Image {
    Image {
        shape: g.output,
        before: [0, 0],
        ..pixels(g)
    }
}

fn flat(pitch: usize) -> Stacked {
    Stacked {
        pitch,
        first: 0,
        step: 0,
    }
}

/// A matrix that A numbers are multiplied with.
trait Matrix<const A: usize, const B: usize> {
    fn times<S: Simd>(simd: S, x: [S::f32s; A]) -> [S::f32s; B];
}

/// `Bᵀ`, `G`, `Aᵀ`, `A` and `Gᵀ`.
struct Pixels;
struct Weight;
struct Outputs;
struct Gradients;
struct Taps;

impl Matrix<4, 4> for Pixels {
    #[inline(always)]
    fn times<S: Simd>(simd: S, [d0, d1, d2, d3]: [S::f32s; 4]) -> [S::f32s; 4] {
        let (outer, sum) = (simd.sub_f32s(d0, d2), simd.add_f32s(d1, d2));
        [outer, sum, simd.sub_f32s(d2, d1), simd.sub_f32s(d1, d3)]
    }
}

impl Matrix<3, 4> for Weight {
    #[inline(always)]
    fn times<S: Simd>(simd: S, [g0, g1, g2]: [S::f32s; 3]) -> [S::f32s; 4] {
        let (half, outer) = (simd.splat_f32s(0.5), simd.add_f32s(g0, g2));
        let [sum, difference] = [simd.add_f32s(outer, g1), simd.sub_f32s(outer, g1)];
        [
            g0,
            simd.mul_f32s(half, sum),
            simd.mul_f32s(half, difference),
            g2,
        ]
    }
}

impl Matrix<4, 2> for Outputs {
    #[inline(always)]
    fn times<S: Simd>(simd: S, [m0, m1, m2, m3]: [S::f32s; 4]) -> [S::f32s; 2] {
        let (sum, difference) = (simd.add_f32s(m1, m2), simd.sub_f32s(m1, m2));
        [simd.add_f32s(m0, sum), simd.sub_f32s(difference, m3)]
    }
}

impl Matrix<2, 4> for Gradients {
    #[inline(always)]
    fn times<S: Simd>(simd: S, [dy0, dy1]: [S::f32s; 2]) -> [S::f32s; 4] {
        let (sum, difference) = (simd.add_f32s(dy0, dy1), simd.sub_f32s(dy0, dy1));
        [dy0, sum, difference, simd.neg_f32s(dy1)]
    }
}

impl Matrix<4, 3> for Taps {
    #[inline(always)]
    fn times<S: Simd>(simd: S, [u0, u1, u2, u3]: [S::f32s; 4]) -> [S::f32s; 3] {
        let half = simd.splat_f32s(0.5);
        let sum = simd.mul_f32s(half, simd.add_f32s(u1, u2));
        let difference = simd.mul_f32s(half, simd.sub_f32s(u1, u2));
        [simd.add_f32s(u0, sum), difference, simd.add_f32s(sum, u3)]
    }
}

/// `X·d·Xᵀ` for each of the tiles and so many channels, from where its rows are in one tensor to where
/// they are in the other.
fn transform<X: Matrix<A, B>, const A: usize, const B: usize>(
    matrix: X,
    tiles: Range<usize>,
    channels: usize,
    (source, from): (&[f32], impl Places),
    (target, to): (&mut [f32], impl Places),
) {
    Arch::new().dispatch(Transform {
        matrix,
        tiles,
        zeros: vec![0.0; channels],
        source,
        from,
        target,
        to,
    });
}

struct Transform<'a, const A: usize, const B: usize, X, F, T> {
    #[expect(dead_code)]
    matrix: X,
    tiles: Range<usize>,
    /// A row outside the image.
    zeros: Vec<f32>,
    source: &'a [f32],
    from: F,
    target: &'a mut [f32],
    to: T,
}

impl<const A: usize, const B: usize, X, F, T> WithSimd for Transform<'_, A, B, X, F, T>
where
    X: Matrix<A, B>,
    F: Places,
    T: Places,
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (channels, zero) = (self.zeros.len(), simd.splat_f32s(0.0));
        for tile in self.tiles {
            let (from, to) = (self.from.of::<A>(tile), self.to.of::<B>(tile));
            let mut rows = [[&*self.zeros; A]; A];
            for i in 0..A {
                for j in 0..A {
                    if let Some(first) = from[i][j] {
                        rows[i][j] = &self.source[first..][..channels];
                    }
                }
            }
            for first in (0..channels).step_by(S::F32_LANES) {
                let some = S::F32_LANES.min(channels - first);
                // Each with its axes exchanged, so that a column is at hand.
                let (mut d, mut xd, mut y) = ([[zero; A]; A], [[zero; A]; B], [[zero; B]; B]);
                for i in 0..A {
                    for j in 0..A {
                        d[j][i] = load(simd, &rows[i][j][first..][..some]);
                    }
                }
                for j in 0..A {
                    let column = X::times(simd, d[j]);
                    for i in 0..B {
                        xd[i][j] = column[i];
                    }
                }
                for i in 0..B {
                    y[i] = X::times(simd, xd[i]);
                }
                for i in 0..B {
                    for j in 0..B {
                        if let Some(at) = to[i][j] {
                            store(simd, &mut self.target[at + first..][..some], y[i][j]);
                        }
                    }
                }
            }
        }
    }
}

/// A vector, or what is left of a row.
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
