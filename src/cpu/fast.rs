//! Faster functions for the kernels that decide the speed of training without a GPU; all others are
//! carried out by their twins, and these are held against theirs.
//!
//! A layer with weights is im2col and a product of the `matrixmultiply` crate: with a column of ones
//! behind it, `columns` times the parameters `[KH·KW·C + 1, OC]` has the bias in it, and `columnsᵀ·dy`
//! is the gradient of weight and bias at once. The zeros of the padding make a NaN of an infinite or
//! NaN factor that they meet, where a term should contribute nothing: what comes out NaN is redone
//! term by term. Max-pooling without overlap is written for vector instructions.
//!
//! The batch is cut by its size and the layer's geometry alone, never by the number of threads, and
//! partial sums are joined in order, so the bits do not depend on how many threads there are.

use super::im2col::pixel;
use super::{Memory, add, batch};
use crate::kernels::conv2d::{Pass, Product};
use crate::kernels::{KernelSpec, Work};
use crate::model::{Activation, Conv2d, Pool2d};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Rows of im2col that one product takes, about: enough to be worth packing the weight for, few
/// enough that the columns stay in a core's cache.
const ROWS_PER_BLOCK: usize = 512;

/// Samples that one product takes at most, which leaves a dense layer some blocks to spread.
const SAMPLES_PER_BLOCK: usize = 32;

/// Tasks that a batch is cut into at most; it bounds the memory of the partial gradients.
const TASKS: usize = 32;

/// Elements of a gradient that one task sums.
const ELEMENTS_PER_SUM: usize = 8192;

/// Carries out one kernel of a plan for the CPU: by a faster function where there is one, else by its
/// twin.
pub fn run(spec: &KernelSpec, memory: &mut Memory<f32>, scratch: &Scratch) {
    let view = |name| spec.view(name);
    match &spec.work {
        Work::Product(product) => run_product(spec, product, memory, scratch),
        Work::MaxPoolForward(pool) if pool.inside() => {
            memory.change_both(view("y"), view("index"), |memory, y, index| {
                maxpool2d_forward(pool, memory.floats(view("x")), y, index);
            });
        }
        Work::MaxPoolBackward { pool, masked } if pool.inside() && !pool.overlapping() => {
            memory.change_floats(view("dx"), |memory, dx| {
                let (dy, index) = (memory.floats(view("dy")), memory.bytes(view("index")));
                let y = masked.then(|| memory.floats(view("activation")));
                maxpool2d_backward(pool, dy, index, y, dx);
            });
        }
        Work::ActivationForward(Activation::Relu) => {
            memory.change_floats(view("y"), |memory, y| {
                elementwise(
                    y,
                    memory.floats(view("x")),
                    |x| if x <= 0.0 { 0.0 } else { x },
                );
            })
        }
        Work::ActivationBackward(Activation::Relu) => {
            memory.change_floats(view("dx"), |memory, dx| {
                let (y, dy) = (memory.floats(view("saved")), memory.floats(view("dy")));
                dx.par_chunks_mut(ELEMENTS_PER_SUM)
                    .zip(
                        y.par_chunks(ELEMENTS_PER_SUM)
                            .zip(dy.par_chunks(ELEMENTS_PER_SUM)),
                    )
                    .for_each(|(dx, (y, dy))| {
                        dx.copy_from_slice(dy);
                        mask(y, dx);
                    });
            });
        }
        _ => super::run(spec, memory),
    }
}

fn run_product(spec: &KernelSpec, product: &Product, memory: &mut Memory<f32>, scratch: &Scratch) {
    let view = |name| spec.view(name);
    let g = &product.geometry;
    match product.pass {
        Pass::Forward => memory.change_floats(view("y"), |memory, y| {
            let (x, parameters) = (memory.floats(view("x")), memory.floats(view("parameters")));
            conv2d_forward(g, product.relu, x, parameters, y, scratch);
        }),
        Pass::BackwardWeight => memory.change_floats(view("partials"), |memory, gradient| {
            let (x, dy) = (memory.floats(view("x")), memory.floats(view("dy")));
            conv2d_backward_weight(g, x, dy, gradient, scratch);
        }),
        Pass::BackwardInput => memory.change_floats(view("dx"), |memory, dx| {
            let (dy, parameters) = (memory.floats(view("dy")), memory.floats(view("parameters")));
            let activation = product.relu.then(|| memory.floats(view("activation")));
            conv2d_backward_input(g, dy, parameters, activation, dx, scratch);
        }),
    }
}

/// Bytes that a kernel's faster function takes for itself at most.
pub fn scratch_bytes(spec: &KernelSpec) -> u64 {
    match &spec.work {
        Work::Product(p) if p.pass == Pass::BackwardWeight => {
            let tasks = p.batch.div_ceil(Cut::new(&p.geometry, p.batch).task.max(1));
            4 * (tasks * p.result_elements()) as u64
        }
        _ => 0,
    }
}

/// `y = f(x)`.
fn elementwise(y: &mut [f32], x: &[f32], f: impl Fn(f32) -> f32 + Sync) {
    y.par_chunks_mut(ELEMENTS_PER_SUM)
        .zip(x.par_chunks(ELEMENTS_PER_SUM))
        .for_each(|(y, x)| {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = f(x);
            }
        });
}

/// How a batch is cut for the products of a layer, in samples.
struct Cut {
    /// What one product takes.
    block: usize,
    /// What one task takes, some blocks one after the other.
    task: usize,
}

impl Cut {
    fn new(g: &Conv2d, samples: usize) -> Cut {
        let block = (ROWS_PER_BLOCK / g.positions()).clamp(1, SAMPLES_PER_BLOCK);
        let task = samples.div_ceil(TASKS).next_multiple_of(block);
        Cut { block, task }
    }
}

/// [`conv2d_forward`](super::conv2d_forward) into y.
fn conv2d_forward(
    g: &Conv2d,
    relu: bool,
    x: &[f32],
    parameters: &[f32],
    y: &mut [f32],
    scratch: &Scratch,
) {
    let (input, output) = (g.input.elements(), g.output.elements());
    let cut = Cut::new(g, batch(x.len(), g.input));
    let parameters = Matrix::new(parameters, g.output.channels);
    y.par_chunks_mut(cut.task * output)
        .zip(x.par_chunks(cut.task * input))
        .for_each(|(y, x)| {
            scratch.columns.lend(|columns| {
                for (y, x) in y
                    .chunks_mut(cut.block * output)
                    .zip(x.chunks(cut.block * input))
                {
                    im2col_with_ones(g, x, columns);
                    product(Matrix::new(columns, g.patch() + 1), parameters, 0.0, y);
                    if g.padding != [0, 0] {
                        redo_nan(y, 0, |i| forward_element(g, x, parameters.values, i));
                    }
                    if relu {
                        for y in y {
                            *y = if *y <= 0.0 { 0.0 } else { *y };
                        }
                    }
                }
            });
        });
}

/// [`conv2d_backward_weight`](super::conv2d_backward_weight) into `gradient`.
fn conv2d_backward_weight(
    g: &Conv2d,
    x: &[f32],
    dy: &[f32],
    gradient: &mut [f32],
    scratch: &Scratch,
) {
    let (input, output) = (g.input.elements(), g.output.elements());
    let samples = batch(x.len(), g.input);
    let cut = Cut::new(g, samples);
    let elements = gradient.len();
    scratch.partials.lend(|partials| {
        partials.resize(samples.div_ceil(cut.task) * elements, 0.0);
        partials
            .par_chunks_mut(elements)
            .zip(x.par_chunks(cut.task * input))
            .zip(dy.par_chunks(cut.task * output))
            .for_each(|((partial, x), dy)| {
                scratch.columns.lend(|columns| {
                    let blocks = x
                        .chunks(cut.block * input)
                        .zip(dy.chunks(cut.block * output));
                    for (block, (x, dy)) in blocks.enumerate() {
                        im2col_with_ones(g, x, columns);
                        let columns = Matrix::new(columns, g.patch() + 1).transposed();
                        let keep = if block == 0 { 0.0 } else { 1.0 };
                        product(columns, Matrix::new(dy, g.output.channels), keep, partial);
                    }
                });
            });
        gradient
            .par_chunks_mut(ELEMENTS_PER_SUM)
            .enumerate()
            .for_each(|(chunk, sum)| {
                sum.fill(0.0);
                for partial in partials.chunks_exact(elements) {
                    add(sum, &partial[chunk * ELEMENTS_PER_SUM..]);
                }
                if g.padding != [0, 0] {
                    redo_nan(sum, chunk * ELEMENTS_PER_SUM, |i| {
                        weight_element(g, x, dy, i)
                    });
                }
            });
    });
}

/// Values that [`redo_nan`] looks at in one go.
const FEW: usize = 64;

/// Computes the NaNs of `values` anew; `element` is given their place, the first value's being `first`.
fn redo_nan(values: &mut [f32], first: usize, element: impl Fn(usize) -> f32) {
    // Looking at a few at a time takes no branch for each, and so vector instructions.
    for (chunk, values) in values.chunks_mut(FEW).enumerate() {
        if values.iter().fold(false, |nan, value| nan | value.is_nan()) {
            for (i, value) in values.iter_mut().enumerate() {
                if value.is_nan() {
                    *value = element(first + chunk * FEW + i);
                }
            }
        }
    }
}

/// Element i of [`conv2d_forward`](super::conv2d_forward), term by term.
#[cold]
fn forward_element(g: &Conv2d, x: &[f32], parameters: &[f32], i: usize) -> f32 {
    let (c, oc) = (g.input.channels, g.output.channels);
    let x = &x[i / g.output.elements() * g.input.elements()..];
    let position = i % g.output.elements() / oc;
    let mut sum = parameters[g.weight_elements() + i % oc];
    for tap in 0..g.kernel[0] * g.kernel[1] {
        let Some(pixel) = pixel(g, position, tap) else {
            continue;
        };
        for channel in 0..c {
            sum += x[pixel * c + channel] * parameters[(tap * c + channel) * oc + i % oc];
        }
        if sum.is_nan() {
            break;
        }
    }
    sum
}

/// Element i of [`conv2d_backward_weight`](super::conv2d_backward_weight), term by term.
#[cold]
fn weight_element(g: &Conv2d, x: &[f32], dy: &[f32], i: usize) -> f32 {
    let (c, oc) = (g.input.channels, g.output.channels);
    let (row, o) = (i / oc, i % oc);
    let samples = x
        .chunks_exact(g.input.elements())
        .zip(dy.chunks_exact(g.output.elements()));
    let mut sum = 0.0;
    for (x, dy) in samples {
        for position in 0..g.positions() {
            let dy = dy[position * oc + o];
            if row == g.patch() {
                sum += dy; // the bias
            } else if let Some(pixel) = pixel(g, position, row / c) {
                sum += x[pixel * c + row % c] * dy;
            }
        }
        if sum.is_nan() {
            break;
        }
    }
    sum
}

/// [`conv2d_backward_input`](super::conv2d_backward_input) into dx: `col2im(dy·Wᵀ)`, 0 where the
/// `activation` is not positive.
fn conv2d_backward_input(
    g: &Conv2d,
    dy: &[f32],
    parameters: &[f32],
    activation: Option<&[f32]>,
    dx: &mut [f32],
    scratch: &Scratch,
) {
    let (input, output) = (g.input.elements(), g.output.elements());
    let cut = Cut::new(g, batch(dy.len(), g.output));
    let weight = Matrix::new(&parameters[..g.weight_elements()], g.output.channels).transposed();
    dx.par_chunks_mut(cut.task * input)
        .zip(dy.par_chunks(cut.task * output))
        .enumerate()
        .for_each(|(task, (dx, dy))| {
            scratch.columns.lend(|columns| {
                let mut first = task * cut.task * input;
                for (dx, dy) in dx
                    .chunks_mut(cut.block * input)
                    .zip(dy.chunks(cut.block * output))
                {
                    let dy = Matrix::new(dy, g.output.channels);
                    columns.resize(dy.rows * g.patch(), 0.0);
                    product(dy, weight, 0.0, columns);
                    col2im(g, columns, dx);
                    if let Some(activation) = activation {
                        mask(&activation[first..], dx);
                    }
                    first += dx.len();
                }
            });
        });
}

/// [`im2col`](super::im2col) with a column of ones behind it: x `[N,H,W,C]` to columns
/// `[N·OH·OW, KH·KW·C + 1]`.
fn im2col_with_ones(g: &Conv2d, x: &[f32], columns: &mut Vec<f32>) {
    let (patch, run) = (g.patch(), g.kernel[1] * g.input.channels);
    let sample = g.positions() * (patch + 1);
    columns.resize(batch(x.len(), g.input) * sample, 0.0);
    for (columns, x) in columns
        .chunks_exact_mut(sample)
        .zip(x.chunks_exact(g.input.elements()))
    {
        for_each_run(g, |position, kh, skipped, pixels| {
            let columns = &mut columns[position * (patch + 1) + kh * run..][..run];
            let last = skipped + pixels.len();
            columns[..skipped].fill(0.0);
            columns[skipped..last].copy_from_slice(&x[pixels]);
            columns[last..].fill(0.0);
        });
        for row in columns.chunks_exact_mut(patch + 1) {
            row[patch] = 1.0;
        }
    }
}

/// [`col2im`](super::col2im) into dx.
fn col2im(g: &Conv2d, columns: &[f32], dx: &mut [f32]) {
    let (patch, run) = (g.patch(), g.kernel[1] * g.input.channels);
    dx.fill(0.0);
    for (columns, dx) in columns
        .chunks_exact(g.positions() * patch)
        .zip(dx.chunks_exact_mut(g.input.elements()))
    {
        for_each_run(g, |position, kh, skipped, pixels| {
            let columns = &columns[position * patch + kh * run..][..run];
            add(&mut dx[pixels], &columns[skipped..]);
        });
    }
}

/// Calls `visit(position, kh, skipped, pixels)` for every row kh of every window: its KW·C elements
/// lie side by side in the image, at `pixels`, but for the first `skipped` and those beyond, which
/// are padding.
#[inline(always)]
fn for_each_run(g: &Conv2d, mut visit: impl FnMut(usize, usize, usize, Range<usize>)) {
    let c = g.input.channels;
    for oh in 0..g.output.height {
        for ow in 0..g.output.width {
            let left = ow * g.stride[1];
            let first = g.padding[1].saturating_sub(left);
            let last = g.kernel[1].min(g.input.width + g.padding[1] - left);
            for kh in 0..g.kernel[0] {
                let h = (oh * g.stride[0] + kh).wrapping_sub(g.padding[0]);
                let pixels = if h < g.input.height {
                    let start = h * g.input.width + left + first - g.padding[1];
                    start * c..(start + last - first) * c
                } else {
                    0..0
                };
                visit(oh * g.output.width + ow, kh, first * c, pixels);
            }
        }
    }
}

/// [`maxpool2d_forward`](super::maxpool2d_forward) into y and index.
fn maxpool2d_forward(p: &Pool2d, x: &[f32], y: &mut [f32], index: &mut [u8]) {
    let (c, output) = (p.input.channels, p.output.elements());
    y.par_chunks_mut(output)
        .zip(index.par_chunks_mut(output))
        .zip(x.par_chunks(p.input.elements()))
        .for_each(|((y, index), x)| {
            let windows = y.chunks_exact_mut(c).zip(index.chunks_exact_mut(c));
            for ((y, index), corner) in windows.zip(corners(p)) {
                y.copy_from_slice(&x[corner..][..c]);
                index.fill(0);
                for (tap, offset) in taps(p).enumerate().skip(1) {
                    let x = &x[corner + offset..][..c];
                    for ((y, index), &x) in y.iter_mut().zip(index.iter_mut()).zip(x) {
                        let wins = x > *y || x.is_nan();
                        *y = if wins { x } else { *y };
                        *index = if wins { tap as u8 } else { *index };
                    }
                }
            }
        });
}

/// [`maxpool2d_backward`](super::maxpool2d_backward) into dx; with the pooled output y, 0 where that is
/// not positive.
fn maxpool2d_backward(p: &Pool2d, dy: &[f32], index: &[u8], y: Option<&[f32]>, dx: &mut [f32]) {
    let (c, output) = (p.input.channels, p.output.elements());
    dx.par_chunks_mut(p.input.elements())
        .zip(dy.par_chunks(output))
        .zip(index.par_chunks(output))
        .enumerate()
        .for_each(|(sample, ((dx, dy), index))| {
            dx.fill(0.0);
            let y = y.map(|y| &y[sample * output..][..output]);
            let windows = dy.chunks_exact(c).zip(index.chunks_exact(c));
            let mut passed = vec![0.0; c];
            for (window, ((dy, index), corner)) in windows.zip(corners(p)).enumerate() {
                passed.copy_from_slice(dy);
                if let Some(y) = y {
                    mask(&y[window * c..], &mut passed);
                }
                for (tap, offset) in taps(p).enumerate() {
                    let dx = &mut dx[corner + offset..][..c];
                    for ((dx, &dy), &index) in dx.iter_mut().zip(&passed).zip(index) {
                        *dx = if index == tap as u8 { dy } else { 0.0 };
                    }
                }
            }
        });
}

/// Where the windows of an image begin, in row-major order of the outputs.
fn corners(p: &Pool2d) -> impl Iterator<Item = usize> {
    let [sh, sw] = p.stride;
    let (width, c) = (p.input.width, p.input.channels);
    let columns = p.output.width;
    (0..p.output.height)
        .flat_map(move |oh| (0..columns).map(move |ow| (oh * sh * width + ow * sw) * c))
}

/// Where the places of a window lie behind its corner, in row-major order.
fn taps(p: &Pool2d) -> impl Iterator<Item = usize> {
    let (width, c, columns) = (p.input.width, p.input.channels, p.kernel[1]);
    (0..p.kernel[0]).flat_map(move |kh| (0..columns).map(move |kw| (kh * width + kw) * c))
}

/// `dy = 0 where y ≤ 0`: [`relu_backward`](super::relu_backward) in place.
fn mask(y: &[f32], dy: &mut [f32]) {
    for (dy, &y) in dy.iter_mut().zip(y) {
        *dy = if y <= 0.0 { 0.0 } else { *dy };
    }
}

/// A matrix in a slice; element (i, j) is `values[i·strides[0] + j·strides[1]]`.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    strides: [isize; 2],
}

impl<'a> Matrix<'a> {
    /// The row-major matrix of that many columns.
    fn new(values: &'a [f32], columns: usize) -> Self {
        assert!(values.len().is_multiple_of(columns));
        Matrix {
            values,
            rows: values.len() / columns,
            columns,
            strides: [columns as isize, 1],
        }
    }

    fn transposed(self) -> Self {
        Matrix {
            rows: self.columns,
            columns: self.rows,
            strides: [self.strides[1], self.strides[0]],
            ..self
        }
    }
}

/// `c = a·b + keep·c` with c row-major, on one thread; with `keep` 0 the old c is not looked at.
fn product(a: Matrix, b: Matrix, keep: f32, c: &mut [f32]) {
    assert_eq!(a.columns, b.rows);
    assert_eq!(c.len(), a.rows * b.columns);
    // SAFETY: a matrix's strides reach every one of its `rows × columns` values once and nothing
    // else, and so do c's; c is borrowed mutably and overlaps neither.
    unsafe {
        matrixmultiply::sgemm(
            a.rows,
            a.columns,
            b.columns,
            1.0,
            a.values.as_ptr(),
            a.strides[0],
            a.strides[1],
            b.values.as_ptr(),
            b.strides[0],
            b.strides[1],
            keep,
            c.as_mut_ptr(),
            b.columns as isize,
            1,
        );
    }
}

/// What the functions need for themselves, kept from step to step.
#[derive(Debug, Default)]
pub struct Scratch {
    columns: Buffers,
    /// One partial gradient of a layer's parameters for each task.
    partials: Buffers,
}

/// Buffers for the tasks that run at the same time: one for each thread in the end.
#[derive(Debug, Default)]
struct Buffers(Mutex<Vec<Vec<f32>>>);

impl Buffers {
    /// Runs `work` with the buffer given back last, which a cache still holds, or with a new one.
    fn lend(&self, work: impl FnOnce(&mut Vec<f32>)) {
        let buffers = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = buffers().pop().unwrap_or_default();
        work(&mut buffer);
        buffers().push(buffer);
    }
}
