//! Faster functions for the kernels that decide the speed of training without a GPU; all others are
//! carried out by their twins, and these are held against theirs.
//!
//! A layer with weights is a product with an im2col matrix that is not stored (`product`): forward
//! times the weight, for its gradient transposed times dy, and for that of the input, where the stride is
//! 1, dy's with the weight turned around. The zeros of the padding make a NaN of an infinite or
//! NaN factor that they meet, where a term should contribute nothing: what comes out NaN is redone
//! term by term. Convolutions of 3×3 with many channels take fewer multiplications (`winograd`). Max-pooling
//! without overlap is written for vector instructions.
//!
//! The batch is cut by its size and the layer's geometry alone, never by the number of threads, and
//! partial sums are joined in order, so the bits do not depend on how many threads there are.

mod grouped;
mod product;
mod winograd;

use super::half::round_to_halves;
use super::im2col::pixel;
use super::{Memory, add, batch, fast_activation};
use crate::kernels::conv2d::{Pass, Product};
use crate::kernels::{KernelSpec, Work};
use crate::model::{Activation, Conv2d, Pool2d};
use grouped::by_channels;
use product::{Gathered, Panels, product, product_transposed};
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
    run_in_floats(spec, memory, scratch);
    memory.round_halves(spec, |values| {
        values
            .par_chunks_mut(ELEMENTS_PER_SUM)
            .for_each(round_to_halves);
    });
}

fn run_in_floats(spec: &KernelSpec, memory: &mut Memory<f32>, scratch: &Scratch) {
    let view = |name| spec.view(name);
    match &spec.work {
        Work::Product(product) => run_product(spec, product, memory, scratch),
        Work::GroupedForward { geometry, relu } => {
            memory.change_floats(view("y"), |memory, y| {
                let (x, parameters) = (memory.floats(view("x")), memory.floats(view("parameters")));
                grouped::grouped_forward(geometry, *relu, x, parameters, y, scratch);
            });
        }
        // All sums in one piece, as a plan for the CPU has them.
        Work::GroupedBackwardWeight {
            geometry,
            chunks: 1,
        } => memory.change_floats(view("partials"), |memory, gradient| {
            let (x, dy) = (memory.floats(view("x")), memory.floats(view("dy")));
            grouped::grouped_backward_weight(geometry, x, dy, gradient, scratch);
        }),
        Work::GroupedBackwardInput { geometry, masked } => {
            memory.change_floats(view("dx"), |memory, dx| {
                let (dy, parameters) =
                    (memory.floats(view("dy")), memory.floats(view("parameters")));
                let activation = masked.then(|| memory.floats(view("activation")));
                grouped::grouped_backward_input(geometry, dy, parameters, activation, dx, scratch);
            });
        }
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
        Work::ActivationForward(activation) => match fast_activation::forward(*activation) {
            Some(forward) => memory.change_floats(view("y"), |memory, y| {
                y.par_chunks_mut(ELEMENTS_PER_SUM)
                    .zip(memory.floats(view("x")).par_chunks(ELEMENTS_PER_SUM))
                    .for_each(|(y, x)| forward(x, y));
            }),
            None => super::run(spec, memory),
        },
        Work::ActivationBackward(activation) => match fast_activation::backward(*activation) {
            Some(backward) => memory.change_floats(view("dx"), |memory, dx| {
                let (x, dy) = (memory.floats(view("saved")), memory.floats(view("dy")));
                dx.par_chunks_mut(ELEMENTS_PER_SUM)
                    .zip(x.par_chunks(ELEMENTS_PER_SUM))
                    .zip(dy.par_chunks(ELEMENTS_PER_SUM))
                    .for_each(|((dx, x), dy)| backward(x, dy, dx));
            }),
            None => super::run(spec, memory),
        },
        Work::Add => memory.change_floats(view("y"), |memory, y| {
            let (a, b) = (memory.floats(view("a")), memory.floats(view("b")));
            elementwise2(y, a, b, |a, b| a + b);
        }),
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
        Work::Product(p) if by_winograd(&p.geometry, p.pass) => {
            winograd::scratch_bytes(&p.geometry, p.pass, p.batch)
        }
        Work::Product(p) if p.pass == Pass::BackwardWeight => {
            let tasks = p.batch.div_ceil(Cut::new(&p.geometry, p.batch).task.max(1));
            4 * (tasks * p.result_elements()) as u64
        }
        Work::GroupedForward { geometry, .. } => {
            grouped::copied_bytes(geometry, spec.view("y").len)
        }
        Work::GroupedBackwardInput { geometry, .. } => {
            grouped::copied_bytes(geometry, spec.view("dy").len)
        }
        Work::GroupedBackwardWeight {
            geometry,
            chunks: 1,
        } => grouped::weight_bytes(geometry, spec.view("dy").len),
        _ => 0,
    }
}

/// Whether a pass of a layer is [`winograd`]'s.
fn by_winograd(g: &Conv2d, pass: Pass) -> bool {
    match pass {
        Pass::Forward | Pass::BackwardWeight => winograd::suits(g),
        Pass::BackwardInput => turned(g).is_some_and(|turned| winograd::suits(&turned)),
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

/// `y = f(a, b)`.
fn elementwise2(y: &mut [f32], a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) {
    let operands = a.par_chunks(ELEMENTS_PER_SUM);
    y.par_chunks_mut(ELEMENTS_PER_SUM)
        .zip(operands.zip(b.par_chunks(ELEMENTS_PER_SUM)))
        .for_each(|(y, (a, b))| {
            for (y, (&a, &b)) in y.iter_mut().zip(a.iter().zip(b)) {
                *y = f(a, b);
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
    let (weight, bias) = parameters.split_at(g.weight_elements());
    let bias = g.bias.then_some(bias);
    scratch.panels.lend(|panels| {
        let weight = Panels::pack(weight, g.output.channels, panels);
        convolve(g, x, weight, bias, y, scratch, |_, y| {
            if relu {
                for y in y {
                    *y = if *y <= 0.0 { 0.0 } else { *y };
                }
            }
        });
    });
}

/// The convolution of x into y, of which `finish` is given each block and where it begins.
fn convolve(
    g: &Conv2d,
    x: &[f32],
    weight: Panels,
    bias: Option<&[f32]>,
    y: &mut [f32],
    scratch: &Scratch,
    finish: impl Fn(usize, &mut [f32]) + Sync,
) {
    let (input, output) = (g.input.elements(), g.output.elements());
    let cut = Cut::new(g, batch(x.len(), g.input));
    let columns = Columns::new(g, cut.block);
    let winograd = winograd::suits(g);
    scratch.panels.lend(|panels| {
        let transformed = winograd.then(|| winograd::transform_weight(weight, panels));
        y.par_chunks_mut(cut.block * output)
            .zip(x.par_chunks(cut.block * input))
            .with_min_len(cut.task / cut.block)
            .enumerate()
            .for_each(|(block, (y, x))| {
                match transformed {
                    Some(weight) => winograd::convolve(g, x, weight, bias, y, scratch),
                    None => scratch.columns.lend(|padded| {
                        product(columns.of(x, padded), weight, bias, y);
                    }),
                }
                let element = |i| forward_element(g, x, weight, bias, i);
                if winograd {
                    redo(y, 0, |y| !y.is_finite(), element);
                } else if g.padded() {
                    redo(y, 0, f32::is_nan, element);
                }
                finish(block * cut.block * output, y);
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
    if winograd::suits(g) {
        winograd::backward_weight(g, x, dy, gradient, scratch);
        let chunks = gradient.par_chunks_mut(ELEMENTS_PER_SUM).enumerate();
        return chunks.for_each(|(chunk, values)| {
            let element = |i| weight_element(g, x, dy, i);
            redo(
                values,
                chunk * ELEMENTS_PER_SUM,
                |v| !v.is_finite(),
                element,
            );
        });
    }
    let (input, output) = (g.input.elements(), g.output.elements());
    let samples = batch(x.len(), g.input);
    let cut = Cut::new(g, samples);
    let columns = Columns::new(g, cut.block);
    let elements = gradient.len();
    scratch.partials.lend(|partials| {
        partials.resize(samples.div_ceil(cut.task) * elements, 0.0);
        partials
            .par_chunks_mut(elements)
            .zip(x.par_chunks(cut.task * input))
            .zip(dy.par_chunks(cut.task * output))
            .for_each(|((partial, x), dy)| {
                let (weight, bias) = partial.split_at_mut(g.weight_elements());
                bias.fill(0.0);
                let blocks = x
                    .chunks(cut.block * input)
                    .zip(dy.chunks(cut.block * output));
                for (block, (x, dy)) in blocks.enumerate() {
                    scratch.columns.lend(|padded| {
                        scratch.panels.lend(|panels| {
                            let packed = Panels::pack(dy, g.output.channels, panels);
                            let columns = columns.of(x, padded);
                            product_transposed(columns, packed, block > 0, weight);
                        });
                    });
                    if g.bias {
                        for dy in dy.chunks_exact(g.output.channels) {
                            add(bias, dy);
                        }
                    }
                }
            });
        gradient
            .par_chunks_mut(ELEMENTS_PER_SUM)
            .enumerate()
            .for_each(|(chunk, sum)| {
                sum.fill(0.0);
                for partial in partials.chunks_exact(elements) {
                    add(sum, &partial[chunk * ELEMENTS_PER_SUM..]);
                }
                if g.padded() {
                    redo(sum, chunk * ELEMENTS_PER_SUM, f32::is_nan, |i| {
                        weight_element(g, x, dy, i)
                    });
                }
            });
    });
}

/// The im2col matrix of some samples `[N·OH·OW, KH·KW·C]`, as a layer's geometry says it is to be read.
struct Columns<'a> {
    g: &'a Conv2d,
    /// The size of an image, with its padding where it has any.
    size: [usize; 2],
    rows: Vec<usize>,
    runs: Vec<usize>,
}

impl<'a> Columns<'a> {
    /// For at most so many samples.
    fn new(g: &'a Conv2d, samples: usize) -> Self {
        let size = if g.padded() {
            [0, 1].map(|axis| g.padding[axis] + g.reach(axis))
        } else {
            [g.input.height, g.input.width]
        };
        let c = g.input.channels;
        let place = |n: usize, h: usize, w: usize| ((n * size[0] + h) * size[1] + w) * c;
        let mut rows = Vec::with_capacity(samples * g.positions());
        for n in 0..samples {
            for oh in 0..g.output.height {
                let columns = 0..g.output.width;
                rows.extend(columns.map(|ow| place(n, oh * g.stride[0], ow * g.stride[1])));
            }
        }
        let taps = (0..g.kernel[1]).step_by(taps_of_a_run(g));
        let runs = (0..g.kernel[0])
            .flat_map(|kh| taps.clone().map(move |kw| [kh, kw]))
            .map(|[kh, kw]| place(0, kh * g.dilation[0], kw * g.dilation[1]));
        let runs = runs.collect();
        Columns {
            g,
            size,
            rows,
            runs,
        }
    }

    /// Those of x, which is copied into `padded` where there is padding.
    fn of<'b>(&'b self, x: &'b [f32], padded: &'b mut Vec<f32>) -> Gathered<'b> {
        let g = self.g;
        let values = if g.padded() {
            self.pad(x, padded);
            padded
        } else {
            x
        };
        Gathered {
            values,
            rows: &self.rows[..batch(x.len(), g.input) * g.positions()],
            runs: &self.runs,
            run: taps_of_a_run(g) * g.input.channels,
        }
    }

    fn pad(&self, x: &[f32], padded: &mut Vec<f32>) {
        let (g, [height, width]) = (self.g, self.size);
        let c = g.input.channels;
        padded.clear();
        padded.resize(batch(x.len(), g.input) * height * width * c, 0.0);
        let [rows, columns] = [
            g.input.height.min(height - g.padding[0]),
            g.input.width.min(width - g.padding[1]),
        ];
        for (padded, x) in padded
            .chunks_exact_mut(height * width * c)
            .zip(x.chunks_exact(g.input.elements()))
        {
            for (padded, x) in padded[g.padding[0] * width * c..]
                .chunks_exact_mut(width * c)
                .zip(x.chunks_exact(g.input.width * c).take(rows))
            {
                padded[g.padding[1] * c..][..columns * c].copy_from_slice(&x[..columns * c]);
            }
        }
    }
}

/// Values that [`redo`] looks at in one go.
const FEW: usize = 64;

/// Computes those of `values` anew that are in `doubt`; `element` is given their place, the first value's
/// being `first`.
fn redo(
    values: &mut [f32],
    first: usize,
    doubt: impl Fn(f32) -> bool,
    element: impl Fn(usize) -> f32,
) {
    // Looking at a few at a time takes no branch for each, and so vector instructions.
    for (chunk, values) in values.chunks_mut(FEW).enumerate() {
        if values.iter().fold(false, |any, value| any | doubt(*value)) {
            for (i, value) in values.iter_mut().enumerate() {
                if doubt(*value) {
                    *value = element(first + chunk * FEW + i);
                }
            }
        }
    }
}

/// Element i of [`convolve`]'s y, term by term.
#[cold]
fn forward_element(g: &Conv2d, x: &[f32], weight: Panels, bias: Option<&[f32]>, i: usize) -> f32 {
    let (c, oc) = (g.input.channels, g.output.channels);
    let x = &x[i / g.output.elements() * g.input.elements()..];
    let position = i % g.output.elements() / oc;
    let mut sum = bias.map_or(0.0, |bias| bias[i % oc]);
    for tap in 0..g.kernel[0] * g.kernel[1] {
        let Some(pixel) = pixel(g, position, tap) else {
            continue;
        };
        for channel in 0..c {
            sum += x[pixel * c + channel] * weight.at(tap * c + channel, i % oc);
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

/// [`conv2d_backward_input`](super::conv2d_backward_input) into dx, 0 where the `activation` is not
/// positive.
fn conv2d_backward_input(
    g: &Conv2d,
    dy: &[f32],
    parameters: &[f32],
    activation: Option<&[f32]>,
    dx: &mut [f32],
    scratch: &Scratch,
) {
    let finish = |first: usize, dx: &mut [f32]| {
        if let Some(activation) = activation {
            mask(&activation[first..], dx);
        }
    };
    let weight = &parameters[..g.weight_elements()];
    if let Some(turned) = turned(g) {
        return scratch.panels.lend(|panels| {
            let shape = [g.input.channels, g.output.channels];
            let weight = Panels::pack_turned(weight, shape, panels);
            convolve(&turned, dy, weight, None, dx, scratch, finish);
        });
    }
    // `col2im(dy·Wᵀ)`, where dy is the im2col matrix of one that sees a pixel.
    let (input, output) = (g.input.elements(), g.output.elements());
    let cut = Cut::new(g, batch(dy.len(), g.output));
    let pixels = Conv2d::dense(g.output.channels, g.patch()).without_bias();
    let all = Columns::new(&pixels, cut.block * g.positions());
    scratch.panels.lend(|panels| {
        let weight = Panels::pack_turned(weight, [g.patch(), g.output.channels], panels);
        dx.par_chunks_mut(cut.block * input)
            .zip(dy.par_chunks(cut.block * output))
            .with_min_len(cut.task / cut.block)
            .enumerate()
            .for_each(|(block, (dx, dy))| {
                scratch.columns.lend(|columns| {
                    columns.resize(dy.len() / g.output.channels * g.patch(), 0.0);
                    product(all.of(dy, &mut Vec::new()), weight, None, columns);
                    col2im(g, columns, dx);
                });
                finish(block * cut.block * input, dx);
            });
    });
}

/// The convolution of dy that gives dx, with the weight `[KH][KW][OC][C]` and the taps in the opposite
/// order, where there is one that takes hardly more multiplications than the transposed product does,
/// filling whole vectors with channels, or far fewer.
fn turned(g: &Conv2d) -> Option<Conv2d> {
    let c = g.input.channels;
    let many = 4 * g.input.positions() * c.next_multiple_of(16) > 5 * g.positions() * c;
    let before = [0, 1].map(|axis| {
        let reach = (g.kernel[axis] - 1) * g.dilation[axis];
        reach.checked_sub(g.padding[axis])
    });
    let ([Some(top), Some(left)], [1, 1]) = (before, g.stride) else {
        return None;
    };
    let turned = Conv2d {
        input: g.output,
        output: g.input,
        padding: [top, left],
        bias: false,
        ..*g
    };
    (!many || winograd::suits(&turned)).then_some(turned)
}

/// [`col2im`](super::col2im) into dx.
fn col2im(g: &Conv2d, columns: &[f32], dx: &mut [f32]) {
    let (patch, run) = (g.patch(), taps_of_a_run(g) * g.input.channels);
    dx.fill(0.0);
    for (columns, dx) in columns
        .chunks_exact(g.positions() * patch)
        .zip(dx.chunks_exact_mut(g.input.elements()))
    {
        for_each_run(g, |position, at, skipped, pixels| {
            let columns = &columns[position * patch + at..][..run];
            add(&mut dx[pixels], &columns[skipped..]);
        });
    }
}

/// Taps of a window that lie side by side in the image: a row of it, or one where it is dilated.
fn taps_of_a_run(g: &Conv2d) -> usize {
    if g.dilation[1] == 1 { g.kernel[1] } else { 1 }
}

/// Calls `visit(position, at, skipped, pixels)` for every run of a window: what lies from `at` on in its
/// row of the im2col matrix lies side by side in the image too, at `pixels`, but for the first `skipped`
/// and those beyond, which are padding.
#[inline(always)]
fn for_each_run(g: &Conv2d, mut visit: impl FnMut(usize, usize, usize, Range<usize>)) {
    let (c, taps) = (g.input.channels, taps_of_a_run(g));
    for oh in 0..g.output.height {
        for ow in 0..g.output.width {
            for kw in (0..g.kernel[1]).step_by(taps) {
                // Columns of the image with its padding, and those of the run's taps that lie in it.
                let left = ow * g.stride[1] + kw * g.dilation[1];
                let first = g.padding[1].saturating_sub(left).min(taps);
                let last = (g.input.width + g.padding[1])
                    .saturating_sub(left)
                    .clamp(first, taps);
                for kh in 0..g.kernel[0] {
                    let h = (oh * g.stride[0] + kh * g.dilation[0]).wrapping_sub(g.padding[0]);
                    let pixels = if h < g.input.height && first < last {
                        let start = h * g.input.width + left + first - g.padding[1];
                        start * c..(start + last - first) * c
                    } else {
                        0..0
                    };
                    let at = (kh * g.kernel[1] + kw) * c;
                    visit(oh * g.output.width + ow, at, first * c, pixels);
                }
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
            vectorized(|| {
                let windows = y.chunks_exact_mut(c).zip(index.chunks_exact_mut(c));
                for ((y, index), corner) in windows.zip(corners(p)) {
                    by_channels!(c, window_maxima(p, &x[corner..], y, index));
                }
            });
        });
}

/// The maxima of N channels of the window that begins with x, and which of its places hold them.
#[inline(always)]
fn window_maxima<const N: usize>(
    first: usize,
    p: &Pool2d,
    x: &[f32],
    y: &mut [f32],
    index: &mut [u8],
) -> usize {
    let (mut most, mut winners) = ([f32::NEG_INFINITY; N], [0_u32; N]);
    for (tap, offset) in (0..).zip(taps(p)) {
        let x: &[f32; N] = x[offset + first..]
            .first_chunk()
            .expect("a pixel has all channels");
        for ((most, winner), &x) in most.iter_mut().zip(&mut winners).zip(x) {
            let wins = (x > *most) | x.is_nan() | (tap == 0);
            *most = if wins { x } else { *most };
            *winner = if wins { tap } else { *winner };
        }
    }
    y[first..][..N].copy_from_slice(&most);
    index[first..][..N].copy_from_slice(&winners.map(|winner| winner as u8));
    N
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
            let mut passed = Vec::new();
            let dy = match y {
                None => dy,
                Some(y) => {
                    passed.extend_from_slice(dy);
                    mask(&y[sample * output..], &mut passed);
                    &passed
                }
            };
            vectorized(|| {
                let windows = dy.chunks_exact(c).zip(index.chunks_exact(c));
                for ((dy, index), corner) in windows.zip(corners(p)) {
                    for (tap, offset) in taps(p).enumerate() {
                        let dx = &mut dx[corner + offset..][..c];
                        for ((dx, &dy), &index) in dx.iter_mut().zip(dy).zip(index) {
                            *dx = if index == tap as u8 { dy } else { 0.0 };
                        }
                    }
                }
            });
        });
}

/// Runs `work` compiled for the longest vectors that the processor has: its bits are the same with any.
#[inline(always)]
fn vectorized(work: impl FnOnce()) {
    pulp::Arch::new().dispatch(work);
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

/// What the functions need for themselves, kept from step to step.
#[derive(Debug, Default)]
pub struct Scratch {
    columns: Buffers,
    panels: Buffers,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::check::{convolution_network, noise, small_network};
    use crate::cpu::{self, Float, Twins, Values, relu_backward};
    use crate::kernels::{Access, Dtype, Step};
    use crate::model::recipe::Optimizer;
    use crate::model::{Loss, Model, Shape};
    use crate::plan::{Mode, Options, Plan, Target};

    /// Largest error of f32 sums of up to some thousand terms, relative to the largest value of the
    /// same kind.
    const TOLERANCE: f64 = 1e-5;

    /// Every kind of layer between them.
    fn models() -> [Model; 3] {
        [
            small_network(Loss::SoftmaxCrossEntropy, true),
            small_network(Loss::SquaredError, false),
            convolution_network(),
        ]
    }

    const RULES: [Optimizer; 3] = [
        Optimizer::Sgd {
            momentum: 0.9,
            nesterov: false,
            weight_decay: 0.01,
        },
        Optimizer::Adamw {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
        },
        Optimizer::Sgd {
            momentum: 0.0,
            nesterov: false,
            weight_decay: 0.0,
        },
    ];

    fn noise_f32(seed: u64, len: usize) -> Vec<f32> {
        noise(seed, len).into_iter().map(|v| v as f32).collect()
    }

    fn wide(values: &[f32]) -> Vec<f64> {
        values.iter().copied().map(f64::from).collect()
    }

    #[track_caller]
    fn assert_close(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        let scale = expected.iter().fold(0.0, |m: f64, e| m.max(e.abs()));
        for (i, (&found, expected)) in found.iter().zip(expected).enumerate() {
            let good = (f64::from(found) - expected).abs() <= TOLERANCE * scale;
            assert!(good, "element {i}: {found} is not {expected}");
        }
    }

    /// A training step on `count` samples, ready to run.
    fn step<T: Float>(model: &Model, rule: Optimizer, count: usize) -> Twins<T> {
        let options = Options::default();
        let plan = Plan::new(model, count, Mode::Train(rule), &options, Target::Cpu).unwrap();
        let mut step = Twins::<T>::new(plan, count);
        let scalars = rule.step_scalars(0.01, 1);
        *step.words("steps") = bytemuck::cast_slice(&[Step {
            lr: scalars.lr,
            bias_correction1: scalars.bias_correction1,
            bias_correction2: scalars.bias_correction2,
            ..Step::new(0, count)
        }])
        .to_vec();
        let images = noise(1, count * model.input.elements());
        let images = images.iter().map(|v| (127.0 * v + 127.0) as u8).collect();
        *step.values("images") = Values::Bytes(images);
        *step.words("labels") = (0..count as u32).map(|i| i * i % 3).collect();
        *step.words("order") = (0..count as u32).rev().collect();
        let channels = model.input.channels;
        let normalization = [vec![1.0 / 64.0; channels], vec![-2.0; channels]].concat();
        *step.floats("normalization") = normalization.into_iter().map(Into::into).collect();
        let parameters = noise_f32(2, model.parameter_elements);
        *step.floats("parameters") = parameters.into_iter().map(Into::into).collect();
        step
    }

    #[test]
    fn every_kernel_of_a_step_agrees_with_its_twin_in_f64() {
        // 300 samples: tasks of several blocks, the last of each cut short; 1: less than a block.
        let rules = RULES.into_iter().cycle();
        let mut all: Vec<_> = models()
            .into_iter()
            .zip(rules)
            .map(|(m, r)| (m, r, 300))
            .collect();
        all.extend(models().map(|model| (model, RULES[0], 1)));
        for name in ["cnn-bn", "mobilenet-small", "resnet9"] {
            let definition = crate::model::load(name).unwrap();
            let model = definition.resolve(Shape::new(32, 32, 3), 3).unwrap();
            all.push((model, RULES[0], 2));
        }
        for (model, rule, count) in &all {
            let (rule, count) = (*rule, *count);
            {
                let (mut fast, scratch) = (step::<f32>(model, rule, count), Scratch::default());
                let mut twins = step::<f64>(model, rule, count);
                let plan = fast.plan.clone();
                for spec in plan.specs() {
                    println!("{} {} of {}", model.name, spec.entry, spec.layer);
                    run(spec, &mut fast.memory, &scratch);
                    cpu::run(spec, &mut twins.memory);
                    for written in spec.arguments.iter().filter(|a| a.access != Access::Read) {
                        let view = written.view;
                        match view.dtype {
                            Dtype::F32 | Dtype::F16 => {
                                let found = fast.memory.floats(view).to_vec();
                                assert_close(&found, twins.memory.floats(view));
                                // Each kernel is judged on its own.
                                twins.memory.put(view, wide(&found));
                            }
                            Dtype::U32 if written.name != "metrics" => {
                                assert_eq!(fast.memory.words(view), twins.memory.words(view));
                            }
                            Dtype::U32 => {}
                            Dtype::U8 => {
                                assert_eq!(fast.memory.bytes(view), twins.memory.bytes(view));
                            }
                        }
                    }
                }
            }
        }
    }

    /// 3×3 over 8×9×3.
    fn dilated(padding: [[usize; 2]; 2], stride: [usize; 2], dilation: [usize; 2]) -> Conv2d {
        let input = Shape::new(8, 9, 3);
        Conv2d::dilated(input, 4, [3, 3], stride, padding, dilation).unwrap()
    }

    /// Some that Winograd's convolution suits in every pass: odd sizes, rest of a vector, padding of all kinds.
    fn by_tiles() -> Vec<Conv2d> {
        let conv = |[h, w]: [usize; 2], c, oc, padding| {
            let input = Shape::new(h, w, c);
            Conv2d::dilated(input, oc, [3, 3], [1, 1], padding, [1, 1]).unwrap()
        };
        let all = vec![
            conv([6, 8], 40, 32, [[1, 1], [1, 1]]),
            conv([7, 9], 72, 48, [[1, 1], [1, 1]]).without_bias(),
            conv([8, 14], 24, 64, [[0, 0], [0, 0]]),
            conv([9, 11], 48, 72, [[0, 2], [2, 1]]),
            conv([6, 6], 33, 47, [[2, 2], [2, 2]]).without_bias(),
        ];
        for pass in [Pass::Forward, Pass::BackwardWeight, Pass::BackwardInput] {
            assert!(all.iter().all(|g| by_winograd(g, pass)));
        }
        all
    }

    #[test]
    fn convolutions_of_any_geometry_agree_with_the_oracle_in_f64() {
        let (scratch, count) = (Scratch::default(), 70);
        for g in [
            Conv2d::new(Shape::new(7, 5, 3), 4, [3, 2], [2, 1], [1, 0]).unwrap(),
            Conv2d::new(Shape::new(5, 9, 1), 6, [5, 4], [1, 3], [3, 3]).unwrap(),
            Conv2d::new(Shape::new(30, 21, 2), 5, [3, 3], [1, 1], [1, 1]).unwrap(),
            Conv2d::new(Shape::new(2, 1, 2), 3, [4, 5], [1, 1], [3, 4]).unwrap(),
            Conv2d::new(Shape::new(9, 8, 2), 3, [2, 1], [3, 4], [0, 0]).unwrap(),
            Conv2d::dense(80, 11),
            dilated([[2, 2], [2, 2]], [1, 1], [2, 2]),
            dilated([[0, 1], [0, 1]], [2, 2], [1, 1]),
            dilated([[3, 0], [1, 4]], [2, 1], [2, 3]).without_bias(),
            dilated([[5, 0], [0, 5]], [1, 3], [3, 3]).without_bias(),
            Conv2d::dense(80, 11).without_bias(),
            Conv2d::new(Shape::new(9, 8, 16), 37, [3, 3], [1, 1], [1, 1]).unwrap(),
            Conv2d::new(Shape::new(3, 4, 33), 16, [3, 5], [1, 1], [1, 3]).unwrap(),
            Conv2d::new(Shape::new(4, 5, 40), 70, [3, 2], [1, 1], [1, 0]).unwrap(),
        ]
        .into_iter()
        .chain(by_tiles())
        {
            let x = noise_f32(1, count * g.input.elements());
            let parameters = noise_f32(2, g.parameter_elements());
            let dy = noise_f32(3, count * g.output.elements());
            let (wide_x, wide_parameters, wide_dy) = (wide(&x), wide(&parameters), wide(&dy));
            // What a buffer held before must not matter.
            let mut y = vec![f32::NAN; dy.len()];
            for relu in [false, true] {
                conv2d_forward(&g, relu, &x, &parameters, &mut y, &scratch);
                let expected = cpu::conv2d_forward(&g, relu, &wide_x, &wide_parameters);
                assert_close(&y, &expected);
            }
            let mut gradient = vec![f32::NAN; parameters.len()];
            conv2d_backward_weight(&g, &x, &dy, &mut gradient, &scratch);
            let expected = cpu::conv2d_backward_weight(&g, &wide_x, &wide_dy);
            assert_close(&gradient, &expected);
            let mut dx = vec![f32::NAN; x.len()];
            for masked in [false, true] {
                let mask = masked.then_some(x.as_slice());
                conv2d_backward_input(&g, &dy, &parameters, mask, &mut dx, &scratch);
                let mut expected = cpu::conv2d_backward_input(&g, &wide_dy, &wide_parameters);
                if masked {
                    expected = relu_backward(&wide_x, &expected);
                }
                assert_close(&dx, &expected);
            }
        }
    }

    /// NaN where NaN is, the same infinities, and elsewhere close.
    #[track_caller]
    fn assert_like(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            let found = f64::from(found);
            let good = match (found.is_nan(), expected.is_nan()) {
                (false, false) => found == expected || (found - expected).abs() <= 1e-4,
                (found, expected) => found && expected,
            };
            assert!(good, "element {i}: {found} is not {expected}");
        }
    }

    #[test]
    fn nan_and_infinity_spread_as_far_as_in_the_oracle() {
        let (scratch, count) = (Scratch::default(), 5);
        for g in [
            Conv2d::new(Shape::new(7, 6, 3), 4, [3, 5], [1, 1], [1, 2]).unwrap(),
            Conv2d::new(Shape::new(5, 9, 1), 6, [5, 4], [1, 3], [3, 3]).unwrap(),
            Conv2d::new(Shape::new(9, 8, 2), 3, [2, 1], [3, 4], [0, 0]).unwrap(),
            Conv2d::dense(20, 11),
            dilated([[0, 1], [0, 1]], [2, 2], [1, 1]),
            dilated([[3, 0], [1, 4]], [2, 1], [2, 3]).without_bias(),
            Conv2d::new(Shape::new(5, 4, 16), 7, [3, 3], [1, 1], [1, 1]).unwrap(),
            Conv2d::new(Shape::new(4, 3, 40), 70, [2, 3], [1, 1], [0, 1]).unwrap(),
        ]
        .into_iter()
        .chain(by_tiles())
        {
            let x = noise_f32(1, count * g.input.elements());
            let parameters = noise_f32(2, g.parameter_elements());
            let dy = noise_f32(3, count * g.output.elements());
            let bias = g.parameter_elements() - g.output.channels + 1;
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let with = |values: &[f32], at: usize| {
                    let mut values = values.to_vec();
                    values[at] = bad;
                    values
                };
                for (x, parameters) in [
                    (with(&x, 1), parameters.clone()),
                    (x.clone(), with(&parameters, 0)),
                    (x.clone(), with(&parameters, bias)),
                ] {
                    for relu in [false, true] {
                        let mut y = vec![0.0; dy.len()];
                        conv2d_forward(&g, relu, &x, &parameters, &mut y, &scratch);
                        let expected = cpu::conv2d_forward(&g, relu, &wide(&x), &wide(&parameters));
                        assert_like(&y, &expected);
                    }
                    let mut dx = vec![0.0; x.len()];
                    conv2d_backward_input(&g, &dy, &parameters, None, &mut dx, &scratch);
                    let expected = cpu::conv2d_backward_input(&g, &wide(&dy), &wide(&parameters));
                    assert_like(&dx, &expected);
                }
                let last = x.len() - 1;
                for (x, dy) in [(with(&x, last), dy.clone()), (x.clone(), with(&dy, 0))] {
                    let mut gradient = vec![0.0; parameters.len()];
                    conv2d_backward_weight(&g, &x, &dy, &mut gradient, &scratch);
                    assert_like(
                        &gradient,
                        &cpu::conv2d_backward_weight(&g, &wide(&x), &wide(&dy)),
                    );
                    let mut dx = vec![0.0; x.len()];
                    conv2d_backward_input(&g, &dy, &parameters, None, &mut dx, &scratch);
                    let expected = cpu::conv2d_backward_input(&g, &wide(&dy), &wide(&parameters));
                    assert_like(&dx, &expected);
                }
            }
        }
    }

    #[test]
    fn sums_are_finite_where_only_the_transforms_overflow() {
        let scratch = Scratch::default();
        // Neighbours of opposite sign: no sum of them is too large, but differences across two pixels are.
        let huge = |shape: Shape| {
            let signs = (0..2 * shape.elements()).map(|i| i / shape.channels % 4 < 2);
            let values: Vec<f32> = signs.map(|s| if s { 3e38 } else { -3e38 }).collect();
            values
        };
        for g in by_tiles() {
            let small = |seed, len| -> Vec<f32> {
                let values = noise_f32(seed, len).into_iter();
                values.map(|v| 1e-6 * v).collect()
            };
            let parameters = small(2, g.parameter_elements());
            let (x, dy) = (huge(g.input), small(3, 2 * g.output.elements()));
            let mut y = vec![0.0; dy.len()];
            conv2d_forward(&g, false, &x, &parameters, &mut y, &scratch);
            let expected = cpu::conv2d_forward(&g, false, &wide(&x), &wide(&parameters));
            assert_close(&y, &expected);
            let mut gradient = vec![0.0; parameters.len()];
            conv2d_backward_weight(&g, &x, &dy, &mut gradient, &scratch);
            assert_close(
                &gradient,
                &cpu::conv2d_backward_weight(&g, &wide(&x), &wide(&dy)),
            );
            let (dy, mut dx) = (huge(g.output), vec![0.0; x.len()]);
            conv2d_backward_input(&g, &dy, &parameters, None, &mut dx, &scratch);
            let expected = cpu::conv2d_backward_input(&g, &wide(&dy), &wide(&parameters));
            assert_close(&dx, &expected);
        }
    }

    #[test]
    fn pooling_and_the_mask_give_the_bits_of_the_oracle() {
        for (kernel, stride) in [([2, 2], [2, 2]), ([3, 2], [3, 4]), ([1, 3], [2, 3])] {
            let p = Pool2d::new(Shape::new(9, 7, 21), kernel, stride).unwrap();
            // Rounded, so that there are ties; and some windows with one NaN or several.
            let mut x: Vec<f32> = noise_f32(1, 3 * p.input.elements());
            x.iter_mut().for_each(|x| *x = (3.0 * *x).round());
            x.iter_mut().step_by(11).for_each(|x| *x = f32::NAN);
            let dy = noise_f32(2, 3 * p.output.elements());
            let (mut y, mut index) = (vec![f32::NAN; dy.len()], vec![9; dy.len()]);
            maxpool2d_forward(&p, &x, &mut y, &mut index);
            let (expected, expected_index) = cpu::maxpool2d_forward(&p, &x);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&y), bits(&expected));
            assert_eq!(index, expected_index);
            let mut dx = vec![f32::NAN; x.len()];
            maxpool2d_backward(&p, &dy, &index, None, &mut dx);
            assert_eq!(dx, cpu::maxpool2d_backward(&p, &dy, &index));
            let masked = relu_backward(&y, &dy);
            maxpool2d_backward(&p, &dy, &index, Some(&y), &mut dx);
            assert_eq!(dx, cpu::maxpool2d_backward(&p, &masked, &index));
            let passed = masked.iter().zip(&y).filter(|(_, y)| y.is_nan());
            assert!(passed.clone().count() > 0 && passed.clone().all(|(dy, _)| *dy != 0.0));
        }
    }

    /// Everything that a step leaves behind, as bits.
    fn bits(model: &Model, rule: Optimizer) -> Vec<u32> {
        let (mut fast, scratch) = (step::<f32>(model, rule, 300), Scratch::default());
        let plan = fast.plan.clone();
        plan.specs()
            .for_each(|spec| run(spec, &mut fast.memory, &scratch));
        let floats = fast.memory.values.iter().filter_map(|values| match values {
            Values::Floats(values) => Some(values),
            _ => None,
        });
        floats.flatten().map(|v| v.to_bits()).collect()
    }

    /// Runs on so many threads.
    fn on<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(work)
    }

    #[test]
    fn the_bits_do_not_depend_on_the_number_of_threads() {
        for (model, rule) in models().iter().zip(RULES) {
            let with_threads = |threads| on(threads, || bits(model, rule));
            assert_eq!(with_threads(1), with_threads(3));
        }
        // Samples enough for several tasks of Winograd's.
        for g in by_tiles() {
            let x = noise_f32(1, 90 * g.input.elements());
            let parameters = noise_f32(2, g.parameter_elements());
            let dy = noise_f32(3, 90 * g.output.elements());
            let with_threads = |threads| {
                on(threads, || {
                    let scratch = Scratch::default();
                    let (mut y, mut dx) = (dy.clone(), x.clone());
                    let mut gradient = parameters.clone();
                    conv2d_forward(&g, true, &x, &parameters, &mut y, &scratch);
                    conv2d_backward_weight(&g, &x, &dy, &mut gradient, &scratch);
                    conv2d_backward_input(&g, &dy, &parameters, Some(&x), &mut dx, &scratch);
                    let all = [y, gradient, dx].concat();
                    all.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
                })
            };
            assert_eq!(with_threads(1), with_threads(3));
        }
    }

    #[test]
    fn winograd_takes_no_more_memory_than_is_said() {
        for g in by_tiles() {
            let x = noise_f32(1, 90 * g.input.elements());
            let parameters = noise_f32(2, g.parameter_elements());
            let dy = noise_f32(3, 90 * g.output.elements());
            for pass in [Pass::Forward, Pass::BackwardWeight, Pass::BackwardInput] {
                on(1, || {
                    let (scratch, mut y, mut dx) = (Scratch::default(), dy.clone(), x.clone());
                    let mut gradient = parameters.clone();
                    match pass {
                        Pass::Forward => {
                            conv2d_forward(&g, true, &x, &parameters, &mut y, &scratch)
                        }
                        Pass::BackwardWeight => {
                            conv2d_backward_weight(&g, &x, &dy, &mut gradient, &scratch)
                        }
                        Pass::BackwardInput => {
                            conv2d_backward_input(&g, &dy, &parameters, None, &mut dx, &scratch)
                        }
                    }
                    let buffers = [&scratch.columns, &scratch.panels, &scratch.partials];
                    let floats: usize = buffers
                        .iter()
                        .flat_map(|buffers| {
                            let buffers = buffers.0.lock().unwrap();
                            buffers.iter().map(Vec::len).collect::<Vec<_>>()
                        })
                        .sum();
                    let (taken, said) = (4 * floats as u64, winograd::scratch_bytes(&g, pass, 90));
                    assert!(
                        taken <= said && said <= 2 * taken,
                        "{g:?}: {taken} of {said}"
                    );
                });
            }
        }
    }
}
