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
//! Summed over channels, each of the 16 places of ⊙ is a product of matrices, `[tiles, C]·[C, OC]`. The weight's
//! gradient is that of this formula, `Gᵀ·[Σ (Bᵀ·d·B) ⊙ (A·dy·Aᵀ)]·G` with products `[C, tiles]·[tiles, OC]`;
//! the input's is a convolution of dy.
//!
//! Tiles are transformed a block at a time into 16 matrices `[tiles, channels]`, which a core's cache holds. What
//! a tile sees beyond the image is 0, and what it has too many is not written. An infinity, or a sum that
//! overflows, spoils a whole tile: the caller sums anew what is not finite.

mod transform;

use super::product::{Gathered, Panels, product, product_transposed};
use super::{ELEMENTS_PER_SUM, Scratch, TASKS};
use crate::cpu::{add, batch};
use crate::kernels::conv2d::Pass;
use crate::model::Conv2d;
use rayon::prelude::*;
use std::array::from_fn;
use std::ops::Range;
use transform::{Gradients, Outputs, Pixels, Stacked, Taps, Weight, outputs, pixels, transform};

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
    let [c, oc] = [g.input, g.output].map(|shape| shape.channels.next_multiple_of(LINE));
    let (kept, tasks, tiles) = match pass {
        // The weight in panels, and its transform.
        Pass::Forward | Pass::BackwardInput => ((9 + 16) * c * oc, samples, TILES),
        Pass::BackwardWeight => {
            let tasks = samples.div_ceil(samples_of_a_task(g, samples));
            (tasks * sums(g), tasks, TERMS)
        }
    };
    let blocks = rayon::current_num_threads().min(tasks) * 16 * (tiles + 1) * (c + oc);
    4 * (kept + blocks + 2 * LINE) as u64
}

/// The 16 matrices `G·g·Gᵀ` of a weight, both in panels.
pub(super) fn transform_weight<'a>(weight: Panels, values: &'a mut Vec<f32>) -> Panels<'a> {
    weight.map([9, 16], values, |from, to| {
        let len = from.len() / 9;
        let (from, to) = (
            (from, Stacked::new(len, 0, 0)),
            (to, Stacked::new(len, 0, 0)),
        );
        transform::<Weight, 3, 4>(0..1, len, from, to);
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
            let from = Stacked::new(pitch, first, oc);
            transform::<Outputs, 4, 2>(block, oc, (m, from), (y, outputs(g)));
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
                let to = (&mut *panel, Stacked::new(pitch, first, width));
                transform::<Gradients, 2, 4>(block.clone(), columns.len(), from, to);
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
            let (from, to) = (
                (&*sums, Stacked::new(len, 0, 0)),
                (&mut *weight, Stacked::new(len, 0, 0)),
            );
            transform::<Taps, 4, 3>(0..1, len, from, to);
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
            let to = (&mut *v, Stacked::new(pitch, first, c));
            transform::<Pixels, 4, 4>(block.clone(), c, from, to);
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
