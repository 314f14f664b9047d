//! Twins of `shaders/grouped.wgsl`: convolution in groups, depthwise convolution among them.

use super::conv2d::split;
use super::im2col::{for_each_position, pixel};
use super::{Float, batch};
use crate::model::Conv2d;
use rayon::prelude::*;

/// `y[n,oh,ow,o] = b[o] + Σ_(kh,kw,c) x[n, oh·SH + kh·DH − PH, ow·SW + kw·DW − PW, group(o)·C/groups +
/// c] · W[kh,kw,c,o]`, and with `relu` the larger of that and 0; `group(o) = o / (OC/groups)`.
///
/// x `[N,H,W,C]`, parameters `[KH·KW·C/groups + 1, OC]` (without the last row where there is no bias),
/// returns `[N,OH,OW,OC]`.
pub fn grouped_forward<T: Float>(g: &Conv2d, relu: bool, x: &[T], parameters: &[T]) -> Vec<T> {
    let (c, oc) = (g.input.channels, g.output.channels);
    let [gc, goc] = g.group_channels();
    let (weight, bias) = split(g, parameters);
    let mut y = vec![T::zero(); batch(x.len(), g.input) * g.output.elements()];
    y.par_chunks_mut(g.output.elements())
        .zip(x.par_chunks(g.input.elements()))
        .for_each(|(y, x)| {
            for (tap, weight) in weight.chunks_exact(gc * oc).enumerate() {
                for_each_position(g, tap, |position, pixel| {
                    let (x, y) = (&x[pixel * c..][..c], &mut y[position * oc..][..oc]);
                    for (o, y) in y.iter_mut().enumerate() {
                        for (i, &x) in x[o / goc * gc..][..gc].iter().enumerate() {
                            *y += x * weight[i * oc + o];
                        }
                    }
                });
            }
            for y in y.chunks_exact_mut(oc) {
                for (o, y) in y.iter_mut().enumerate() {
                    if g.bias {
                        *y += bias[o];
                    }
                    if relu && *y <= T::zero() {
                        *y = T::zero();
                    }
                }
            }
        });
    y
}

/// `dW[kh,kw,c,o] = Σ_(n,oh,ow) x[n, oh·SH + kh·DH − PH, ow·SW + kw·DW − PW, group(o)·C/groups + c] ·
/// dy[n,oh,ow,o]`, and as the last row, where there is a bias, `db[o] = Σ_(n,oh,ow) dy[n,oh,ow,o]`; in
/// `chunks` partial sums, each over as many image rows (n,oh) but for the last ones.
///
/// x `[N,H,W,C]`, dy `[N,OH,OW,OC]` (of the values before a fused ReLU), returns `[chunks,
/// KH·KW·C/groups + 1, OC]`.
pub fn grouped_backward_weight<T: Float>(g: &Conv2d, chunks: usize, x: &[T], dy: &[T]) -> Vec<T> {
    let (c, oc) = (g.input.channels, g.output.channels);
    let [gc, goc] = g.group_channels();
    let n = batch(dy.len(), g.output);
    assert_eq!(batch(x.len(), g.input), n);
    let image_rows = n * g.output.height;
    let per_chunk = image_rows.div_ceil(chunks);
    let mut partials = vec![T::zero(); chunks * g.parameter_elements()];
    partials
        .par_chunks_mut(oc)
        .enumerate()
        .for_each(|(row, sums)| {
            // A row of the weight, or of the bias, in one of the chunks.
            let (chunk, row) = (row / g.parameter_rows(), row % g.parameter_rows());
            let (tap, channel) = (row / gc, row % gc);
            let first = (chunk * per_chunk).min(image_rows);
            for row in first..(first + per_chunk).min(image_rows) {
                let (n, oh) = (row / g.output.height, row % g.output.height);
                for ow in 0..g.output.width {
                    let position = oh * g.output.width + ow;
                    let dy = &dy[n * g.output.elements() + position * oc..][..oc];
                    if tap == g.kernel[0] * g.kernel[1] {
                        sums.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += *dy);
                    } else if let Some(pixel) = pixel(g, position, tap) {
                        let x = &x[n * g.input.elements() + pixel * c..][..c];
                        for (o, (sum, &dy)) in sums.iter_mut().zip(dy).enumerate() {
                            *sum += x[o / goc * gc + channel] * dy;
                        }
                    }
                }
            }
        });
    partials
}

/// `dx[n,h,w,group(o)·C/groups + c] = Σ dy[n,oh,ow,o] · W[kh,kw,c,o]` over the o of the group and all
/// (oh,ow), (kh,kw) with `h = oh·SH + kh·DH − PH` and `w = ow·SW + kw·DW − PW`.
///
/// dy `[N,OH,OW,OC]` (of the values before a fused ReLU), parameters as for [`grouped_forward`] (the
/// bias plays no part), returns `[N,H,W,C]`.
pub fn grouped_backward_input<T: Float>(g: &Conv2d, dy: &[T], parameters: &[T]) -> Vec<T> {
    let (c, oc) = (g.input.channels, g.output.channels);
    let [gc, goc] = g.group_channels();
    let (weight, _) = split(g, parameters);
    let mut dx = vec![T::zero(); batch(dy.len(), g.output) * g.input.elements()];
    dx.par_chunks_mut(g.input.elements())
        .zip(dy.par_chunks(g.output.elements()))
        .for_each(|(dx, dy)| {
            for (tap, weight) in weight.chunks_exact(gc * oc).enumerate() {
                for_each_position(g, tap, |position, pixel| {
                    let (dx, dy) = (&mut dx[pixel * c..][..c], &dy[position * oc..][..oc]);
                    for (i, dx) in dx.iter_mut().enumerate() {
                        let outputs = i / gc * goc..(i / gc + 1) * goc;
                        let weight = &weight[i % gc * oc..][..oc];
                        for (&dy, &w) in dy[outputs.clone()].iter().zip(&weight[outputs]) {
                            *dx += dy * w;
                        }
                    }
                });
            }
        });
    dx
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::check::noise;
    use crate::cpu::{
        conv2d_backward_input, conv2d_backward_weight, conv2d_forward, reduce_splits,
    };
    use crate::model::Shape;

    /// Groups of several channels, of one with two outputs, and of one with one.
    fn cases() -> Vec<Conv2d> {
        let conv = |channels, out, kernel, stride, padding, dilation, groups| {
            let input = Shape::new(6, 7, channels);
            Conv2d::dilated(input, out, kernel, stride, padding, dilation)
                .and_then(|g| g.grouped(groups))
                .unwrap()
        };
        vec![
            conv(6, 4, [3, 2], [2, 1], [[1, 0], [0, 1]], [1, 1], 2),
            conv(6, 9, [2, 3], [1, 2], [[0, 2], [2, 1]], [2, 3], 3).without_bias(),
            conv(3, 6, [3, 3], [1, 1], [[1, 1], [1, 1]], [1, 1], 3),
            conv(4, 4, [3, 3], [2, 2], [[0, 1], [0, 1]], [1, 1], 4),
            conv(4, 4, [3, 5], [1, 1], [[0, 0], [2, 2]], [2, 1], 4).without_bias(),
        ]
    }

    /// The weight `[KH·KW, C, OC]` of a convolution without groups that computes the same: 0 where the
    /// channels are of different groups.
    fn ungrouped(g: &Conv2d, parameters: &[f64]) -> (Conv2d, Vec<f64>) {
        let (c, oc) = (g.input.channels, g.output.channels);
        let [gc, goc] = g.group_channels();
        let whole = Conv2d { groups: 1, ..*g };
        let mut all = vec![0.0; whole.weight_elements()];
        for (at, all) in all.iter_mut().enumerate() {
            let (tap, channel, o) = (at / (c * oc), at / oc % c, at % oc);
            if channel / gc == o / goc {
                *all = parameters[(tap * gc + channel % gc) * oc + o];
            }
        }
        all.extend(&parameters[g.weight_elements()..]);
        (whole, all)
    }

    #[track_caller]
    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            let good = (found - expected).abs() <= 1e-12 * (1.0 + expected.abs());
            assert!(good, "{found} is not {expected}");
        }
    }

    #[test]
    fn groups_are_a_convolution_whose_other_weights_are_zero() {
        for g in cases() {
            let x = noise(1, 3 * g.input.elements());
            let parameters = noise(2, g.parameter_elements());
            let dy = noise(3, 3 * g.output.elements());
            let (whole, all) = ungrouped(&g, &parameters);
            for relu in [false, true] {
                assert_close(
                    &grouped_forward(&g, relu, &x, &parameters),
                    &conv2d_forward(&whole, relu, &x, &all),
                );
            }
            assert_close(
                &grouped_backward_input(&g, &dy, &parameters),
                &conv2d_backward_input(&whole, &dy, &all),
            );
            // What those other weights would get does not count.
            let gradient = conv2d_backward_weight(&whole, &x, &dy);
            let (c, oc) = (g.input.channels, g.output.channels);
            let [gc, goc] = g.group_channels();
            let own = |at: usize| {
                let (tap, i, o) = (at / (gc * oc), at / oc % gc, at % oc);
                (tap * c + o / goc * gc + i) * oc + o
            };
            let weights = (0..g.weight_elements()).map(own);
            let rest = whole.weight_elements()..whole.parameter_elements();
            let expected: Vec<f64> = weights.chain(rest).map(|at| gradient[at]).collect();
            for chunks in [1, 4, 100] {
                let partials = grouped_backward_weight(&g, chunks, &x, &dy);
                assert_close(&reduce_splits(&partials, chunks), &expected);
            }
        }
    }
}
