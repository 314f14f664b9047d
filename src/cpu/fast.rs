//! The network that trains where there is no GPU: what [`Network`](super::Network) computes, in f32
//! and as fast as matrix products make it.
//!
//! A layer with weights is im2col and a product of the `matrixmultiply` crate: with a column of ones
//! behind it (where the layer has a bias), `columns` times the parameters `[KH·KW·C + 1, OC]` has the bias in it, and `columnsᵀ·dy`
//! is the gradient of weight and bias at once. The zeros of the padding make a NaN of an infinite or
//! NaN factor that they meet, where a term should contribute nothing: what comes out NaN is redone
//! term by term. Max-pooling without overlap is written for vector instructions; everything rarer is
//! the oracle's.
//!
//! The batch is cut by its size and the layer's geometry alone, never by the number of threads, and
//! partial sums are joined in order, so the bits do not depend on how many threads there are. Buffers
//! are kept from step to step.

mod grouped;

use super::im2col::pixel;
use super::loss::argmax;
use super::network::{Activation, StepMetrics, model_loss, range};
use super::optimizer::update;
use super::{
    LossOutput, add, batch, maxpool2d_backward_overlapping, meanpool2d_backward,
    meanpool2d_forward, relu_backward, relu_forward, sigmoid_backward, sigmoid_forward,
    sum_metrics,
};
use crate::model::recipe::{Optimizer, StepScalars};
use crate::model::{Conv2d, Model, Op, Pool2d};
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

/// A model with its parameters, the optimiser's state and the buffers of a step.
#[derive(Debug)]
pub struct FastNetwork {
    model: Model,
    parameters: Vec<f32>,
    state: Vec<Vec<f32>>,
    gradients: Vec<f32>,
    activations: Vec<Activation<f32>>,
    /// Gradient by the output of the layer at hand, and by its input.
    dy: Vec<f32>,
    dx: Vec<f32>,
    /// One partial gradient of a layer's parameters for each task.
    partials: Vec<f32>,
    columns: Scratch,
}

impl FastNetwork {
    /// A network with the flat `parameters` of [`Model::parameter_elements`] and no optimiser
    /// state yet.
    pub fn new(model: &Model, parameters: Vec<f32>) -> Self {
        assert_eq!(parameters.len(), model.parameter_elements);
        let empty = Activation {
            output: Vec::new(),
            index: Vec::new(),
        };
        FastNetwork {
            model: model.clone(),
            gradients: vec![0.0; parameters.len()],
            parameters,
            state: Vec::new(),
            activations: vec![empty; model.layers.len()],
            dy: Vec::new(),
            dx: Vec::new(),
            partials: Vec::new(),
            columns: Scratch::default(),
        }
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The flat parameter vector, laid out as [`Model::layers`] says.
    pub fn parameters(&self) -> &[f32] {
        &self.parameters
    }

    /// The optimiser's state vectors, as [`Network::state`](super::Network::state).
    pub fn state(&self) -> &[Vec<f32>] {
        &self.state
    }

    /// Puts back the state of a checkpoint.
    pub fn set_state(&mut self, state: Vec<Vec<f32>>) {
        assert!(state.iter().all(|s| s.len() == self.parameters.len()));
        self.state = state;
    }

    /// One training step on x `[N,H,W,C]` and N labels, at least one: gradients, then the
    /// optimiser's update.
    pub fn train_step(
        &mut self,
        x: &[f32],
        labels: &[u32],
        optimizer: &Optimizer,
        scalars: StepScalars,
    ) -> StepMetrics {
        let metrics = self.gradients(x, labels);
        update(
            optimizer,
            scalars,
            &mut self.parameters,
            &self.gradients,
            &mut self.state,
        );
        metrics
    }

    /// Sum of the losses, and the predicted class of every sample.
    pub fn evaluate(&mut self, x: &[f32], labels: &[u32]) -> (f64, Vec<u32>) {
        self.forward(x);
        let output = self.output();
        let loss = model_loss(&self.model, output, labels);
        let predictions = output
            .chunks_exact(self.model.classes)
            .map(|output| argmax(output) as u32);
        let (loss_sum, _) = sum_metrics(&loss.loss, &loss.correct);
        (loss_sum.into(), predictions.collect())
    }

    /// Fills the activations.
    fn forward(&mut self, x: &[f32]) {
        let samples = batch(x.len(), self.model.input);
        for (i, layer) in self.model.layers.iter().enumerate() {
            let (below, rest) = self.activations.split_at_mut(i);
            let x = below.last().map_or(x, |a| &a.output);
            let Activation { output: y, index } = &mut rest[0];
            y.resize(samples * layer.output.elements(), 0.0);
            match &layer.op {
                Op::Conv2d { geometry, relu } | Op::Dense { geometry, relu } => {
                    let parameters = &self.parameters[range(layer)];
                    conv2d_forward(geometry, *relu, x, parameters, y, &self.columns);
                }
                Op::MaxPool2d(pool) => {
                    index.resize(y.len(), 0);
                    maxpool2d_forward(pool, x, y, index);
                }
                Op::MeanPool2d(pool) => *y = meanpool2d_forward(pool, x),
                Op::Relu => *y = relu_forward(x),
                Op::Sigmoid => *y = sigmoid_forward(x),
            }
        }
    }

    /// Fills the activations and the gradients of the mean loss.
    fn gradients(&mut self, x: &[f32], labels: &[u32]) -> StepMetrics {
        self.forward(x);
        let LossOutput {
            loss,
            gradient,
            correct,
        } = model_loss(&self.model, self.output(), labels);
        self.dy = gradient;
        // Below the first layer with weights nothing wants a gradient.
        let layers = &self.model.layers;
        let first = layers.iter().position(|l| l.parameters.is_some());
        for i in (first.unwrap_or(layers.len())..layers.len()).rev() {
            let layer = &layers[i];
            let Activation { output: y, index } = &self.activations[i];
            let (dy, dx) = (&mut self.dy, &mut self.dx);
            dx.resize(labels.len() * layer.input.elements(), 0.0);
            match &layer.op {
                Op::Conv2d { geometry, relu } | Op::Dense { geometry, relu } => {
                    let x = i.checked_sub(1).map_or(x, |i| &self.activations[i].output);
                    if *relu {
                        relu_mask(y, dy);
                    }
                    let gradient = &mut self.gradients[range(layer)];
                    let (partials, columns) = (&mut self.partials, &self.columns);
                    conv2d_backward_weight(geometry, x, dy, gradient, partials, columns);
                    if Some(i) == first {
                        break;
                    }
                    let parameters = &self.parameters[range(layer)];
                    conv2d_backward_input(geometry, dy, parameters, dx, columns);
                }
                Op::MaxPool2d(pool) if pool.overlapping() => {
                    *dx = maxpool2d_backward_overlapping(pool, dy, index);
                }
                Op::MaxPool2d(pool) => maxpool2d_backward(pool, dy, index, dx),
                Op::MeanPool2d(pool) => *dx = meanpool2d_backward(pool, dy),
                Op::Relu => *dx = relu_backward(y, dy),
                Op::Sigmoid => *dx = sigmoid_backward(y, dy),
            }
            std::mem::swap(dy, dx);
        }
        let (loss_sum, correct) = sum_metrics(&loss, &correct);
        StepMetrics {
            loss_sum: loss_sum.into(),
            correct,
        }
    }
    fn output(&self) -> &[f32] {
        &self.activations[self.model.layers.len() - 1].output
    }
}

/// Bytes that training `model` on the CPU takes at most, the dataset aside: what a [`FastNetwork`] keeps
/// from step to step, the batch, and the copies that a checkpoint is written from.
pub fn memory(model: &Model, samples: usize, optimizer: &Optimizer) -> u64 {
    let parameters = model.parameter_elements as u128;
    let kept = 1 + optimizer.state_vectors() as u128;
    let batch = |elements: usize| samples as u128 * elements as u128;
    let (mut activations, mut gradient, mut partials) = (batch(model.input.elements()), 0, 0);
    for layer in &model.layers {
        activations += batch(layer.output.elements());
        gradient = gradient.max(batch(layer.output.elements().max(layer.input.elements())));
        if matches!(layer.op, Op::MaxPool2d(_)) {
            activations += batch(layer.output.elements());
        }
        if let Some((g, _)) = layer.op.product() {
            let tasks = samples.div_ceil(Cut::new(g, samples).task.max(1));
            partials = partials.max(tasks as u128 * layer.parameter_count() as u128);
        }
    }
    // A checkpoint: a copy of what is kept, and its bytes as they are written.
    let elements = parameters * (kept + 1) + 2 * parameters * kept + activations + 2 * gradient;
    u64::try_from(4 * (elements + partials)).unwrap_or(u64::MAX)
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
    columns: &Scratch,
) {
    if g.groups > 1 {
        return grouped::grouped_forward(g, relu, x, parameters, y, columns);
    }
    let (input, output) = (g.input.elements(), g.output.elements());
    let cut = Cut::new(g, batch(x.len(), g.input));
    let parameters = Matrix::new(parameters, g.output.channels);
    y.par_chunks_mut(cut.task * output)
        .zip(x.par_chunks(cut.task * input))
        .for_each(|(y, x)| {
            columns.lend(|columns| {
                for (y, x) in y
                    .chunks_mut(cut.block * output)
                    .zip(x.chunks(cut.block * input))
                {
                    im2col_with_ones(g, x, columns);
                    product(Matrix::new(columns, g.parameter_rows()), parameters, 0.0, y);
                    if g.padded() {
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
    partials: &mut Vec<f32>,
    columns: &Scratch,
) {
    if g.groups > 1 {
        return grouped::grouped_backward_weight(g, x, dy, gradient, partials, columns);
    }
    let (input, output) = (g.input.elements(), g.output.elements());
    let samples = batch(x.len(), g.input);
    let cut = Cut::new(g, samples);
    let elements = gradient.len();
    partials.resize(samples.div_ceil(cut.task) * elements, 0.0);
    partials
        .par_chunks_mut(elements)
        .zip(x.par_chunks(cut.task * input))
        .zip(dy.par_chunks(cut.task * output))
        .for_each(|((partial, x), dy)| {
            columns.lend(|columns| {
                let blocks = x
                    .chunks(cut.block * input)
                    .zip(dy.chunks(cut.block * output));
                for (block, (x, dy)) in blocks.enumerate() {
                    im2col_with_ones(g, x, columns);
                    let columns = Matrix::new(columns, g.parameter_rows()).transposed();
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
            if g.padded() {
                redo_nan(sum, chunk * ELEMENTS_PER_SUM, |i| {
                    weight_element(g, x, dy, i)
                });
            }
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
    let mut sum = match g.bias {
        true => parameters[g.weight_elements() + i % oc],
        false => 0.0,
    };
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

/// [`conv2d_backward_input`](super::conv2d_backward_input) into dx: `col2im(dy·Wᵀ)`.
fn conv2d_backward_input(
    g: &Conv2d,
    dy: &[f32],
    parameters: &[f32],
    dx: &mut [f32],
    columns: &Scratch,
) {
    if g.groups > 1 {
        return grouped::grouped_backward_input(g, dy, parameters, dx, columns);
    }
    let (input, output) = (g.input.elements(), g.output.elements());
    let cut = Cut::new(g, batch(dy.len(), g.output));
    let weight = Matrix::new(&parameters[..g.weight_elements()], g.output.channels).transposed();
    dx.par_chunks_mut(cut.task * input)
        .zip(dy.par_chunks(cut.task * output))
        .for_each(|(dx, dy)| {
            columns.lend(|columns| {
                for (dx, dy) in dx
                    .chunks_mut(cut.block * input)
                    .zip(dy.chunks(cut.block * output))
                {
                    let dy = Matrix::new(dy, g.output.channels);
                    columns.resize(dy.rows * g.patch(), 0.0);
                    product(dy, weight, 0.0, columns);
                    col2im(g, columns, dx);
                }
            });
        });
}

/// [`im2col`](super::im2col) with a column of ones behind it where there is a bias: x `[N,H,W,C]` to
/// columns `[N·OH·OW, KH·KW·C + 1]`.
fn im2col_with_ones(g: &Conv2d, x: &[f32], columns: &mut Vec<f32>) {
    let rows = g.parameter_rows();
    let sample = g.positions() * rows;
    columns.resize(batch(x.len(), g.input) * sample, 0.0);
    for (columns, x) in columns
        .chunks_exact_mut(sample)
        .zip(x.chunks_exact(g.input.elements()))
    {
        for_each_run(g, |position, run, skipped, pixels| {
            let columns = &mut columns[position * rows..][run];
            let last = skipped + pixels.len();
            columns[..skipped].fill(0.0);
            columns[skipped..last].copy_from_slice(&x[pixels]);
            columns[last..].fill(0.0);
        });
        if g.bias {
            for row in columns.chunks_exact_mut(rows) {
                row[rows - 1] = 1.0;
            }
        }
    }
}

/// [`col2im`](super::col2im) into dx.
fn col2im(g: &Conv2d, columns: &[f32], dx: &mut [f32]) {
    let patch = g.patch();
    dx.fill(0.0);
    for (columns, dx) in columns
        .chunks_exact(g.positions() * patch)
        .zip(dx.chunks_exact_mut(g.input.elements()))
    {
        for_each_run(g, |position, run, skipped, pixels| {
            let columns = &columns[position * patch..][run];
            add(&mut dx[pixels], &columns[skipped..]);
        });
    }
}

/// Calls `visit(position, run, skipped, pixels)` for every run of a window: elements of its row of the
/// im2col matrix that lie side by side in the image too, at `pixels`, but for the first `skipped` and
/// those beyond, which are padding. A row kh of the window is one run, or KW where it is dilated.
#[inline(always)]
fn for_each_run(g: &Conv2d, mut visit: impl FnMut(usize, Range<usize>, usize, Range<usize>)) {
    let c = g.input.channels;
    let taps = if g.dilation[1] == 1 { g.kernel[1] } else { 1 };
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
                    let run = (kh * g.kernel[1] + kw) * c;
                    let run = run..run + taps * c;
                    visit(oh * g.output.width + ow, run, first * c, pixels);
                }
            }
        }
    }
}

/// [`maxpool2d_forward`](super::maxpool2d_forward) into y and index.
fn maxpool2d_forward(p: &Pool2d, x: &[f32], y: &mut [f32], index: &mut [u32]) {
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
                        *index = if wins { tap as u32 } else { *index };
                    }
                }
            }
        });
}

/// [`maxpool2d_backward`](super::maxpool2d_backward) into dx.
fn maxpool2d_backward(p: &Pool2d, dy: &[f32], index: &[u32], dx: &mut [f32]) {
    let (c, output) = (p.input.channels, p.output.elements());
    dx.par_chunks_mut(p.input.elements())
        .zip(dy.par_chunks(output))
        .zip(index.par_chunks(output))
        .for_each(|((dx, dy), index)| {
            dx.fill(0.0);
            let windows = dy.chunks_exact(c).zip(index.chunks_exact(c));
            for ((dy, index), corner) in windows.zip(corners(p)) {
                for (tap, offset) in taps(p).enumerate() {
                    let dx = &mut dx[corner + offset..][..c];
                    for ((dx, &dy), &index) in dx.iter_mut().zip(dy).zip(index) {
                        *dx = if index == tap as u32 { dy } else { 0.0 };
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

/// `dy = 0 where y ≤ 0`: [`relu_backward`] in place.
fn relu_mask(y: &[f32], dy: &mut [f32]) {
    dy.par_chunks_mut(ELEMENTS_PER_SUM)
        .zip(y.par_chunks(ELEMENTS_PER_SUM))
        .for_each(|(dy, y)| {
            for (dy, &y) in dy.iter_mut().zip(y) {
                *dy = if y <= 0.0 { 0.0 } else { *dy };
            }
        });
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

/// Buffers for the tasks that run at the same time: one for each thread in the end.
#[derive(Debug, Default)]
struct Scratch(Mutex<Vec<Vec<f32>>>);

impl Scratch {
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
    use crate::cpu::check::{noise, small_network};
    use crate::cpu::{self, Network};
    use crate::model::{Loss, Shape};

    /// Largest error of f32 sums, relative to the largest value of the same kind.
    const TOLERANCE: f64 = 3e-6;

    /// Every kind of layer between them.
    fn models() -> [Model; 2] {
        [
            small_network(Loss::SoftmaxCrossEntropy, true),
            small_network(Loss::SquaredError, false),
        ]
    }

    const RULES: [Optimizer; 2] = [
        Optimizer::Sgd {
            momentum: 0.9,
            weight_decay: 0.01,
        },
        Optimizer::Adamw {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
        },
    ];

    fn noise_f32(seed: u64, len: usize) -> Vec<f32> {
        noise(seed, len).into_iter().map(|v| v as f32).collect()
    }

    fn wide(values: &[f32]) -> Vec<f64> {
        values.iter().copied().map(f64::from).collect()
    }

    fn network(model: &Model) -> FastNetwork {
        FastNetwork::new(model, noise_f32(2, model.parameter_elements))
    }

    fn samples(model: &Model, count: usize) -> (Vec<f32>, Vec<u32>) {
        let labels = (0..count as u32).map(|i| i * i % 3).collect();
        (noise_f32(1, count * model.input.elements()), labels)
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

    #[test]
    fn a_step_agrees_with_the_oracle_in_f64() {
        // 300 samples: tasks of several blocks, the last of each cut short; 1: less than a block.
        for (model, count) in models().iter().flat_map(|m| [(m, 300), (m, 1)]) {
            let (x, labels) = samples(model, count);
            let mut fast = network(model);
            let oracle = Network::new(model, wide(fast.parameters()));
            let expected = oracle.gradients(&wide(&x), &labels);
            let metrics = fast.gradients(&x, &labels);
            assert_eq!(metrics.correct, expected.correct);
            assert_close(&[metrics.loss_sum as f32], &[expected.loss_sum]);
            for layer in &model.layers {
                let range = range(layer);
                assert_close(&fast.gradients[range.clone()], &expected.gradients[range]);
            }
            for (fast, oracle) in fast.activations.iter().zip(oracle.forward(&wide(&x))) {
                assert_close(&fast.output, &oracle.output);
                assert_eq!(fast.index, oracle.index);
            }
            let (loss_sum, predictions) = oracle.evaluate(&wide(&x), &labels);
            let found = fast.evaluate(&x, &labels);
            assert_close(&[found.0 as f32], &[loss_sum]);
            assert_eq!(found.1, predictions);
        }
    }

    /// 3×3 over 8×9×3.
    fn dilated(padding: [[usize; 2]; 2], stride: [usize; 2], dilation: [usize; 2]) -> Conv2d {
        let input = Shape::new(8, 9, 3);
        Conv2d::dilated(input, 4, [3, 3], stride, padding, dilation).unwrap()
    }

    #[test]
    fn convolutions_of_any_geometry_agree_with_the_oracle_in_f64() {
        let (columns, count) = (Scratch::default(), 70);
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
        ] {
            let x = noise_f32(1, count * g.input.elements());
            let parameters = noise_f32(2, g.parameter_elements());
            let dy = noise_f32(3, count * g.output.elements());
            let (wide_x, wide_parameters, wide_dy) = (wide(&x), wide(&parameters), wide(&dy));
            // What a buffer held before must not matter.
            let mut y = vec![f32::NAN; dy.len()];
            for relu in [false, true] {
                conv2d_forward(&g, relu, &x, &parameters, &mut y, &columns);
                let expected = cpu::conv2d_forward(&g, relu, &wide_x, &wide_parameters);
                assert_close(&y, &expected);
            }
            let mut gradient = vec![f32::NAN; parameters.len()];
            let mut partials = vec![f32::NAN; 3];
            conv2d_backward_weight(&g, &x, &dy, &mut gradient, &mut partials, &columns);
            let expected = cpu::conv2d_backward_weight(&g, &wide_x, &wide_dy);
            assert_close(&gradient, &expected);
            let mut dx = vec![f32::NAN; x.len()];
            conv2d_backward_input(&g, &dy, &parameters, &mut dx, &columns);
            let expected = cpu::conv2d_backward_input(&g, &wide_dy, &wide_parameters);
            assert_close(&dx, &expected);
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
        let (columns, count) = (Scratch::default(), 5);
        for g in [
            Conv2d::new(Shape::new(7, 6, 3), 4, [3, 5], [1, 1], [1, 2]).unwrap(),
            Conv2d::new(Shape::new(5, 9, 1), 6, [5, 4], [1, 3], [3, 3]).unwrap(),
            Conv2d::new(Shape::new(9, 8, 2), 3, [2, 1], [3, 4], [0, 0]).unwrap(),
            Conv2d::dense(20, 11),
            dilated([[0, 1], [0, 1]], [2, 2], [1, 1]),
            dilated([[3, 0], [1, 4]], [2, 1], [2, 3]).without_bias(),
        ] {
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
                        conv2d_forward(&g, relu, &x, &parameters, &mut y, &columns);
                        let expected = cpu::conv2d_forward(&g, relu, &wide(&x), &wide(&parameters));
                        assert_like(&y, &expected);
                    }
                    let mut dx = vec![0.0; x.len()];
                    conv2d_backward_input(&g, &dy, &parameters, &mut dx, &columns);
                    let expected = cpu::conv2d_backward_input(&g, &wide(&dy), &wide(&parameters));
                    assert_like(&dx, &expected);
                }
                let last = x.len() - 1;
                for (x, dy) in [(with(&x, last), dy.clone()), (x.clone(), with(&dy, 0))] {
                    let (mut gradient, mut partials) = (vec![0.0; parameters.len()], Vec::new());
                    conv2d_backward_weight(&g, &x, &dy, &mut gradient, &mut partials, &columns);
                    assert_like(
                        &gradient,
                        &cpu::conv2d_backward_weight(&g, &wide(&x), &wide(&dy)),
                    );
                    let mut dx = vec![0.0; x.len()];
                    conv2d_backward_input(&g, &dy, &parameters, &mut dx, &columns);
                    let expected = cpu::conv2d_backward_input(&g, &wide(&dy), &wide(&parameters));
                    assert_like(&dx, &expected);
                }
            }
        }
    }

    #[test]
    fn pooling_and_the_mask_give_the_bits_of_the_oracle() {
        for (kernel, stride) in [([2, 2], [2, 2]), ([3, 2], [3, 4]), ([1, 3], [2, 3])] {
            let p = Pool2d::new(Shape::new(9, 7, 5), kernel, stride).unwrap();
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
            maxpool2d_backward(&p, &dy, &index, &mut dx);
            assert_eq!(dx, cpu::maxpool2d_backward(&p, &dy, &index));
            let mut masked = dy.clone();
            relu_mask(&y, &mut masked);
            assert_eq!(masked, relu_backward(&y, &dy));
            let passed = masked.iter().zip(&y).filter(|(_, y)| y.is_nan());
            assert!(passed.clone().count() > 0 && passed.clone().all(|(dy, _)| *dy != 0.0));
        }
    }

    /// Everything that some steps of training leave behind, as bits.
    fn trained(network: &mut FastNetwork, count: usize, rule: &Optimizer) -> Vec<u32> {
        let (x, labels) = samples(network.model(), count);
        let mut bits = Vec::new();
        for step in 1..=3 {
            let metrics = network.train_step(&x, &labels, rule, rule.step_scalars(0.01, step));
            bits.extend([(metrics.loss_sum as f32).to_bits(), metrics.correct]);
        }
        let values = network.state.iter().flatten().chain(&network.parameters);
        bits.extend(values.map(|v| v.to_bits()));
        bits
    }

    #[test]
    fn the_bits_do_not_depend_on_the_number_of_threads() {
        for (model, rule) in models().iter().zip(&RULES) {
            let with_threads = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                let train = || trained(&mut network(model), 300, rule);
                pool.build().unwrap().install(train)
            };
            assert_eq!(with_threads(1), with_threads(3));
        }
    }

    #[test]
    fn training_is_that_of_the_oracle() {
        for (model, rule) in models().iter().zip(&RULES) {
            let (x, labels) = samples(model, 50);
            let mut fast = network(model);
            let mut oracle = Network::new(model, wide(fast.parameters()));
            let mut losses = Vec::new();
            for step in 1..=60 {
                let scalars = rule.step_scalars(0.01, step);
                let (loss_sum, predictions) = fast.evaluate(&x, &labels);
                let hits = predictions.iter().zip(&labels).filter(|(p, l)| p == l);
                let correct = hits.count() as u32;
                let metrics = fast.train_step(&x, &labels, rule, scalars);
                assert_eq!(metrics, StepMetrics { loss_sum, correct });
                losses.push(loss_sum);
                let expected = oracle.train_step(&wide(&x), &labels, rule, scalars);
                let error = (loss_sum - expected.loss_sum).abs();
                assert!(error <= 1e-3 * expected.loss_sum, "step {step}: {error}");
            }
            assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
        }
    }

    #[test]
    fn only_parameters_and_state_are_remembered() {
        for (model, rule) in models().iter().zip(&RULES) {
            let mut used = network(model);
            for count in [300, 7] {
                trained(&mut used, count, rule);
                let mut resumed = FastNetwork::new(model, used.parameters().to_vec());
                resumed.set_state(used.state().to_vec());
                assert_eq!(
                    trained(&mut resumed, 50, rule),
                    trained(&mut used, 50, rule)
                );
            }
        }
    }
}
