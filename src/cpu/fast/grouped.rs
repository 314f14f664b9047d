//! Convolution in groups on the CPU. A depthwise one is a sum over few taps, memory-bound: channels lie
//! side by side and are summed in registers, some at a time. Other groups are products of their own.

use super::{ELEMENTS_PER_SUM, Scratch, TASKS, mask};
use crate::cpu::{add, batch};
use crate::model::Conv2d;
use rayon::prelude::*;

/// [`grouped_forward`](crate::cpu::grouped_forward) into y.
pub(super) fn grouped_forward(
    g: &Conv2d,
    relu: bool,
    x: &[f32],
    parameters: &[f32],
    y: &mut [f32],
    scratch: &Scratch,
) {
    if !is_depthwise(g) {
        for group in 0..g.groups {
            let (alone, parameters) = alone(g, group, parameters);
            let x = take(g.input.channels, g.groups, group, x);
            let mut part = vec![0.0; y.len() / g.groups];
            super::conv2d_forward(&alone, relu, &x, &parameters, &mut part, scratch);
            put(g.output.channels, g.groups, group, &part, y);
        }
        return;
    }
    let (weight, bias) = parameters.split_at(g.weight_elements());
    let taps = [0, 1].map(|axis| by_output(g, axis));
    y.par_chunks_mut(g.output.elements())
        .zip(x.par_chunks(g.input.elements()))
        .for_each(|(y, x)| {
            correlate(g, &taps, g.input.width, x, weight, y, |channel, sum| {
                let value = if g.bias { sum + bias[channel] } else { sum };
                if relu && value <= 0.0 { 0.0 } else { value }
            });
        });
}

/// [`grouped_backward_weight`](crate::cpu::grouped_backward_weight) into `gradient`, all chunks added up.
pub(super) fn grouped_backward_weight(
    g: &Conv2d,
    x: &[f32],
    dy: &[f32],
    gradient: &mut [f32],
    scratch: &Scratch,
) {
    if !is_depthwise(g) {
        for group in 0..g.groups {
            let (alone, mut part) = alone(g, group, gradient);
            let x = take(g.input.channels, g.groups, group, x);
            let dy = take(g.output.channels, g.groups, group, dy);
            super::conv2d_backward_weight(&alone, &x, &dy, &mut part, scratch);
            put(g.output.channels, g.groups, group, &part, gradient);
        }
        return;
    }
    let (input, output) = (g.input.elements(), g.output.elements());
    let task = batch(x.len(), g.input).div_ceil(TASKS);
    let elements = gradient.len();
    let taps = [0, 1].map(|axis| by_tap(g, axis));
    scratch.partials.lend(|partials| {
        partials.resize(x.len().div_ceil(task * input) * elements, 0.0);
        partials
            .par_chunks_mut(elements)
            .zip(x.par_chunks(task * input))
            .zip(dy.par_chunks(task * output))
            .for_each(|((partial, x), dy)| {
                partial.fill(0.0);
                for (x, dy) in x.chunks_exact(input).zip(dy.chunks_exact(output)) {
                    weight_gradient(g, &taps, x, dy, partial);
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
            });
    });
}

/// Bytes of the copies of a group, where it takes them, for outputs of so many elements.
pub(super) fn copied_bytes(g: &Conv2d, outputs: usize) -> u64 {
    if is_depthwise(g) {
        return 0;
    }
    let samples = outputs / g.output.elements();
    // The mask is as large as the input.
    4 * (samples * (2 * g.input.elements() + g.output.elements()) / g.groups) as u64
}

/// Bytes that [`grouped_backward_weight`] takes for itself, for a dy of so many elements.
pub(super) fn weight_bytes(g: &Conv2d, dy: usize) -> u64 {
    let tasks = TASKS.min(dy / g.output.elements());
    copied_bytes(g, dy) + 4 * (tasks * g.parameter_elements()) as u64
}

/// [`grouped_backward_input`](crate::cpu::grouped_backward_input) into dx, 0 where the `activation` is not
/// positive.
pub(super) fn grouped_backward_input(
    g: &Conv2d,
    dy: &[f32],
    parameters: &[f32],
    activation: Option<&[f32]>,
    dx: &mut [f32],
    scratch: &Scratch,
) {
    if !is_depthwise(g) {
        for group in 0..g.groups {
            let (alone, parameters) = alone(g, group, parameters);
            let dy = take(g.output.channels, g.groups, group, dy);
            let mut part = vec![0.0; dx.len() / g.groups];
            let activation = activation.map(|a| take(g.input.channels, g.groups, group, a));
            let activation = activation.as_deref();
            super::conv2d_backward_input(&alone, &dy, &parameters, activation, &mut part, scratch);
            put(g.input.channels, g.groups, group, &part, dx);
        }
        return;
    }
    let weight = &parameters[..g.weight_elements()];
    let taps = [0, 1].map(|axis| by_input(g, axis));
    let input = g.input.elements();
    dx.par_chunks_mut(input)
        .zip(dy.par_chunks(g.output.elements()))
        .enumerate()
        .for_each(|(n, (dx, dy))| {
            correlate(g, &taps, g.output.width, dy, weight, dx, |_, sum| sum);
            if let Some(activation) = activation {
                mask(&activation[n * input..], dx);
            }
        });
}

fn is_depthwise(g: &Conv2d) -> bool {
    g.group_channels() == [1, 1]
}

/// The convolution that one group is, and its parameters among those of all.
fn alone(g: &Conv2d, group: usize, parameters: &[f32]) -> (Conv2d, Vec<f32>) {
    let mut alone = Conv2d { groups: 1, ..*g };
    [alone.input.channels, alone.output.channels] = g.group_channels();
    let parameters = take(g.output.channels, g.groups, group, parameters);
    (alone, parameters)
}

/// The columns of one group, of a matrix of so many `columns`.
fn take(columns: usize, groups: usize, group: usize, values: &[f32]) -> Vec<f32> {
    let width = columns / groups;
    let rows = values.chunks_exact(columns);
    rows.flat_map(|row| &row[group * width..][..width])
        .copied()
        .collect()
}

/// Puts the columns of one group where they were taken from.
fn put(columns: usize, groups: usize, group: usize, part: &[f32], values: &mut [f32]) {
    let width = columns / groups;
    let rows = values.chunks_exact_mut(columns);
    for (row, part) in rows.zip(part.chunks_exact(width)) {
        row[group * width..][..width].copy_from_slice(part);
    }
}

/// For every place along an axis the taps that count there, each with the place that it meets.
type Taps = Vec<Vec<(usize, usize)>>;

/// All (o, k, i) along an axis with `i = o·S + k·D − P` in the image.
fn meetings(g: &Conv2d, axis: usize) -> impl Iterator<Item = [usize; 3]> {
    let [input, output] = [g.input, g.output].map(|s| [s.height, s.width][axis]);
    let (stride, dilation, padding) = (g.stride[axis], g.dilation[axis], g.padding[axis]);
    (0..g.kernel[axis]).flat_map(move |k| {
        (0..output).filter_map(move |o| {
            let i = (o * stride + k * dilation).checked_sub(padding)?;
            (i < input).then_some([o, k, i])
        })
    })
}

fn by_output(g: &Conv2d, axis: usize) -> Taps {
    let mut taps = vec![Vec::new(); [g.output.height, g.output.width][axis]];
    meetings(g, axis).for_each(|[o, k, i]| taps[o].push((k, i)));
    taps
}

fn by_input(g: &Conv2d, axis: usize) -> Taps {
    let mut taps = vec![Vec::new(); [g.input.height, g.input.width][axis]];
    meetings(g, axis).for_each(|[o, k, i]| taps[i].push((k, o)));
    taps
}

/// For every tap along an axis the outputs that count, each with the place that it meets.
fn by_tap(g: &Conv2d, axis: usize) -> Taps {
    let mut taps = vec![Vec::new(); g.kernel[axis]];
    meetings(g, axis).for_each(|[o, k, i]| taps[k].push((o, i)));
    taps
}

/// Calls `$function` for all channels, some of them at a time: their number is a constant, so what it
/// holds of each of them stays in vector registers.
macro_rules! by_channels {
    ($channels:expr, $function:ident($($argument:expr),*)) => {
        let mut first = 0;
        while first < $channels {
            first += match $channels - first {
                16.. => $function::<16>(first, $($argument),*),
                4.. => $function::<4>(first, $($argument),*),
                _ => $function::<1>(first, $($argument),*),
            };
        }
    };
}
pub(super) use by_channels;

/// `result[place] = finish(channel, Σ source[met by a tap] · weight[tap])` for the places and taps of
/// one sample, in the order of the taps; `width` is the source's.
fn correlate(
    g: &Conv2d,
    [rows, columns]: &[Taps; 2],
    width: usize,
    source: &[f32],
    weight: &[f32],
    result: &mut [f32],
    finish: impl Fn(usize, f32) -> f32 + Copy,
) {
    let c = g.input.channels;
    let places = rows
        .iter()
        .flat_map(|row| columns.iter().map(move |column| (row, column)));
    // Where the factors of a place begin.
    let mut factors = Vec::with_capacity(g.kernel[0] * g.kernel[1]);
    for ((row, column), result) in places.zip(result.chunks_exact_mut(c)) {
        factors.clear();
        for (kh, h) in row {
            let taps = column.iter();
            factors.extend(taps.map(|(kw, w)| ((h * width + w) * c, (kh * g.kernel[1] + kw) * c)));
        }
        by_channels!(
            c,
            correlate_channels(&factors, source, weight, result, finish)
        );
    }
}

#[inline(always)]
fn correlate_channels<const N: usize>(
    first: usize,
    factors: &[(usize, usize)],
    source: &[f32],
    weight: &[f32],
    result: &mut [f32],
    finish: impl Fn(usize, f32) -> f32,
) -> usize {
    let mut sums = [0.0; N];
    for (pixel, tap) in factors {
        let source: &[f32; N] = at(source, pixel + first);
        let weight: &[f32; N] = at(weight, tap + first);
        for i in 0..N {
            sums[i] += source[i] * weight[i];
        }
    }
    for (i, result) in result[first..][..N].iter_mut().enumerate() {
        *result = finish(first + i, sums[i]);
    }
    N
}

/// Adds the gradient of one sample to `gradient`.
fn weight_gradient(g: &Conv2d, taps: &[Taps; 2], x: &[f32], dy: &[f32], gradient: &mut [f32]) {
    by_channels!(
        g.input.channels,
        weight_gradient_channels(g, taps, x, dy, gradient)
    );
}

#[inline]
fn weight_gradient_channels<const N: usize>(
    first: usize,
    g: &Conv2d,
    [rows, columns]: &[Taps; 2],
    x: &[f32],
    dy: &[f32],
    gradient: &mut [f32],
) -> usize {
    let c = g.input.channels;
    let taps = rows
        .iter()
        .flat_map(|row| columns.iter().map(move |column| (row, column)));
    for (tap, (row, column)) in taps.enumerate() {
        let mut sums = [0.0; N];
        for (oh, h) in row {
            for (ow, w) in column {
                let x: &[f32; N] = at(x, (h * g.input.width + w) * c + first);
                let dy: &[f32; N] = at(dy, (oh * g.output.width + ow) * c + first);
                for i in 0..N {
                    sums[i] += x[i] * dy[i];
                }
            }
        }
        add(&mut gradient[tap * c + first..], &sums);
    }
    if g.bias {
        let mut sums = [0.0; N];
        for dy in dy.chunks_exact(c) {
            add(&mut sums, &dy[first..]);
        }
        add(&mut gradient[g.weight_elements() + first..], &sums);
    }
    N
}

/// The N values from `start` on.
#[inline(always)]
fn at<const N: usize>(values: &[f32], start: usize) -> &[f32; N] {
    values[start..]
        .first_chunk()
        .expect("a pixel has all channels")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu;
    use crate::cpu::check::noise;
    use crate::model::Shape;

    /// Samples: more than there are tasks, the last of which is cut short.
    const SAMPLES: usize = 70;

    /// Channels of every remainder, multipliers, groups of several channels; strides, dilation, padding
    /// on some sides alone; with a bias and without.
    fn geometries() -> Vec<Conv2d> {
        let conv = |channels, out, kernel, stride, padding, dilation, groups| {
            let input = Shape::new(6, 7, channels);
            Conv2d::dilated(input, out, kernel, stride, padding, dilation)
                .and_then(|g| g.grouped(groups))
                .unwrap()
        };
        vec![
            conv(23, 23, [3, 3], [1, 1], [[1, 1], [1, 1]], [1, 1], 23),
            conv(16, 16, [3, 2], [2, 1], [[0, 1], [1, 0]], [1, 1], 16).without_bias(),
            conv(6, 6, [2, 3], [1, 3], [[0, 2], [3, 1]], [3, 2], 6),
            conv(5, 10, [3, 3], [1, 2], [[1, 1], [0, 1]], [1, 1], 5),
            conv(6, 4, [3, 3], [2, 1], [[2, 1], [0, 2]], [2, 1], 2),
            conv(6, 9, [2, 2], [1, 1], [[0, 0], [0, 0]], [1, 1], 3).without_bias(),
        ]
    }

    struct Results {
        y: Vec<f32>,
        gradient: Vec<f32>,
        dx: Vec<f32>,
    }

    /// Into buffers whose content must not matter.
    fn run(g: &Conv2d, x: &[f32], parameters: &[f32], dy: &[f32]) -> Results {
        let scratch = Scratch::default();
        let mut y = vec![f32::NAN; dy.len()];
        let mut gradient = vec![f32::NAN; parameters.len()];
        let mut dx = vec![f32::NAN; x.len()];
        grouped_forward(g, true, x, parameters, &mut y, &scratch);
        grouped_backward_weight(g, x, dy, &mut gradient, &scratch);
        grouped_backward_input(g, dy, parameters, Some(x), &mut dx, &scratch);
        Results { y, gradient, dx }
    }

    fn operands(g: &Conv2d) -> [Vec<f32>; 3] {
        let lengths = [
            SAMPLES * g.input.elements(),
            g.parameter_elements(),
            SAMPLES * g.output.elements(),
        ];
        let mut seed = 0;
        lengths.map(|len| {
            seed += 1;
            noise(seed, len).into_iter().map(|v| v as f32).collect()
        })
    }

    /// NaN where NaN is, the same infinities, and elsewhere close.
    #[track_caller]
    fn assert_like(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        let finite = expected.iter().filter(|e| e.is_finite());
        let scale = finite.fold(0.0, |most: f64, e| most.max(e.abs()));
        for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            let found = f64::from(found);
            let good = match (found.is_nan(), expected.is_nan()) {
                (false, false) => found == expected || (found - expected).abs() <= 3e-6 * scale,
                (found, expected) => found && expected,
            };
            assert!(good, "element {i}: {found} is not {expected}");
        }
    }

    #[test]
    fn groups_of_any_geometry_agree_with_the_twins_in_f64() {
        for g in geometries() {
            let finite = operands(&g);
            // All finite, and then with a NaN or an infinity at either end of each operand.
            let mut spoiled = vec![finite.clone()];
            for (which, bad) in [(0, f32::NAN), (1, f32::INFINITY), (2, f32::NEG_INFINITY)] {
                for last in [false, true] {
                    let mut operands = finite.clone();
                    let at = if last { operands[which].len() - 1 } else { 0 };
                    operands[which][at] = bad;
                    spoiled.push(operands);
                }
            }
            for operands in spoiled {
                let found = run(&g, &operands[0], &operands[1], &operands[2]);
                let [x, parameters, dy] =
                    operands.map(|v| v.into_iter().map(f64::from).collect::<Vec<_>>());
                assert_like(&found.y, &cpu::grouped_forward(&g, true, &x, &parameters));
                assert_like(
                    &found.gradient,
                    &cpu::grouped_backward_weight(&g, 1, &x, &dy),
                );
                // As if the layer before ended in ReLU.
                let dx = cpu::grouped_backward_input(&g, &dy, &parameters);
                assert_like(&found.dx, &cpu::relu_backward(&x, &dx));
            }
        }
    }

    #[test]
    fn the_bits_do_not_depend_on_the_number_of_threads() {
        for g in geometries() {
            let [x, parameters, dy] = operands(&g);
            let bits = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                let found = pool
                    .build()
                    .unwrap()
                    .install(|| run(&g, &x, &parameters, &dy));
                let all = [found.y, found.gradient, found.dx].concat();
                all.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            };
            assert_eq!(bits(1), bits(3));
        }
    }
}
