//! The twins' gradients against central finite differences in f64.
//!
//! For each function with a gradient, the scalar `L = Σ r·y` with fixed random r is differentiated
//! twice: by the backward function with `dy = r`, and as `(L(x + h) − L(x − h)) / 2h` for one
//! element of x after the other. Inputs keep clear of the kinks of ReLU and max-pooling, where
//! there is no derivative.

use super::*;
use crate::error::Result;
use crate::kernels::batch_norm::BatchNorm;
use crate::kernels::group_norm::GroupNorm;
use crate::kernels::{AdapterReport, Step};
use crate::model::augment::Augment;
use crate::model::recipe::Optimizer;
use crate::model::{Activation, Conv2d, Loss, Model, Op, Pool2d};
use crate::plan::{Mode, Options, Plan, Section, Target};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How far one gradient is from its finite differences.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FiniteDifference {
    /// The function whose gradient was checked.
    pub name: &'static str,
    /// Largest error over all elements, relative to the derivative (absolute in units of
    /// 0.01 for smaller derivatives); NaN when any derivative is.
    pub worst: f64,
    pub tolerance: f64,
}

impl FiniteDifference {
    /// Whether the error is within the tolerance; NaN is not.
    pub fn passes(&self) -> bool {
        self.worst <= self.tolerance
    }
}

/// Step of the central difference: its truncation error, of order h², is then about as large as
/// its rounding error, of order 10⁻¹⁶/h.
const STEP: f64 = 1e-5;

const TOLERANCE: f64 = 1e-6;

/// Derivatives below this are held to an absolute error, where rounding would drown a relative one.
const FLOOR: f64 = 1e-2;

/// What the constructors say yes to, as every geometry here is written out.
const VALID: &str = "a built-in geometry is valid";

/// Checks the gradient of every differentiable function, and of two small networks that between
/// them have every kind of layer and both losses.
pub fn finite_difference_checks() -> Vec<FiniteDifference> {
    let mut checks = Vec::new();
    let mut check = |name, worst| {
        checks.push(FiniteDifference {
            name,
            worst,
            tolerance: TOLERANCE,
        });
    };

    // Odd sizes, uneven kernel, stride and padding, and a last row that no window reaches.
    let g = Conv2d::new(Shape::new(7, 5, 3), 4, [3, 2], [2, 1], [1, 1]).expect(VALID);
    let x = noise(1, 2 * g.input.elements());
    let parameters = noise(2, g.parameter_elements());
    let r = noise(3, 2 * g.output.elements());
    check(
        "conv2d_backward_weight",
        worst_error(
            &parameters,
            &conv2d_backward_weight(&g, &x, &r),
            |parameters| dot(&r, &conv2d_forward(&g, false, &x, parameters)),
        ),
    );
    check(
        "conv2d_backward_input",
        worst_error(&x, &conv2d_backward_input(&g, &r, &parameters), |x| {
            dot(&r, &conv2d_forward(&g, false, x, &parameters))
        }),
    );
    let r = noise(4, 2 * g.positions() * g.patch());
    check(
        "col2im",
        worst_error(&x, &col2im(&g, &r), |x| dot(&r, &im2col(&g, x))),
    );

    convolution_checks(&mut check);

    let (m, n, k) = (4, 5, 3);
    let (a, b, r) = (noise(5, m * k), noise(6, k * n), noise(7, m * n));
    check(
        "matmul_nt",
        worst_error(&a, &matmul_nt(m, k, n, &r, &b), |a| {
            dot(&r, &matmul_nn(m, n, k, a, &b))
        }),
    );
    check(
        "matmul_tn",
        worst_error(&b, &matmul_tn(k, n, m, &a, &r), |b| {
            dot(&r, &matmul_nn(m, n, k, &a, b))
        }),
    );

    let (x, r) = (apart(8, 60), noise(9, 60));
    check(
        "relu_backward",
        worst_error(&x, &relu_backward(&relu_forward(&x), &r), |x| {
            dot(&r, &relu_forward(x))
        }),
    );
    check(
        "sigmoid_backward",
        worst_error(&x, &sigmoid_backward(&sigmoid_forward(&x), &r), |x| {
            dot(&r, &sigmoid_forward(x))
        }),
    );
    let bias = noise(10, 4);
    check(
        "bias_backward",
        worst_error(&bias, &bias_backward(4, &r), |bias| {
            dot(&r, &bias_forward(&x, bias))
        }),
    );

    let pool = Pool2d::new(Shape::new(7, 5, 3), [2, 2], [3, 2]).expect(VALID);
    let overlapping = Pool2d::new(Shape::new(7, 5, 3), [3, 2], [2, 1]).expect(VALID);
    let x = apart(11, 2 * pool.input.elements());
    let r = noise(12, 2 * pool.output.elements());
    let (_, index) = maxpool2d_forward(&pool, &x);
    check(
        "maxpool2d_backward",
        worst_error(&x, &maxpool2d_backward(&pool, &r, &index), |x| {
            dot(&r, &maxpool2d_forward(&pool, x).0)
        }),
    );
    let r = noise(13, 2 * overlapping.output.elements());
    let (_, index) = maxpool2d_forward(&overlapping, &x);
    check(
        "maxpool2d_backward_overlapping",
        worst_error(
            &x,
            &maxpool2d_backward_overlapping(&overlapping, &r, &index),
            |x| dot(&r, &maxpool2d_forward(&overlapping, x).0),
        ),
    );
    check(
        "meanpool2d_backward",
        worst_error(&x, &meanpool2d_backward(&overlapping, &r), |x| {
            dot(&r, &meanpool2d_forward(&overlapping, x))
        }),
    );

    normalisation_checks(&mut check);

    let (output, labels) = (noise(14, 4 * 5), [4, 0, 2, 2]);
    let mean = |loss: LossOutput<f64>| loss.loss.iter().sum::<f64>() / 4.0;
    check(
        "softmax_cross_entropy",
        worst_error(
            &output,
            &softmax_cross_entropy(&output, &labels, 5, 0.0, 4.0).gradient,
            |output| mean(softmax_cross_entropy(output, &labels, 5, 0.0, 4.0)),
        ),
    );
    check(
        "squared_error",
        worst_error(
            &output,
            &squared_error(&output, &labels, 5, 4.0).gradient,
            |output| mean(squared_error(output, &labels, 5, 4.0)),
        ),
    );

    elementwise_checks(&mut check);

    check(
        "network, softmax_cross_entropy",
        network_error(&small_network(Loss::SoftmaxCrossEntropy, true)),
    );
    check(
        "network, squared_error",
        network_error(&small_network(Loss::SquaredError, false)),
    );
    check(
        "network with normalisations",
        network_error(&normalised_network()),
    );
    check(
        "network, convolutions",
        network_error(&convolution_network()),
    );
    let joined = joined_network();
    check("network, joined", network_error(&joined));
    let options = Options {
        label_smoothing: 0.1,
        class_weights: Some(vec![0.5, 2.0, 1.25]),
        ..Options::default()
    };
    let name = "network, smoothed and weighted";
    check(name, network_error_with(&joined, &options));
    let options = Options {
        augment: Augment {
            cut_mix: 1.0,
            ..Augment::default()
        },
        ..options
    };
    let name = "network, smoothed, weighted and mixed";
    check(name, network_error_with(&joined, &options));
    checks
}

/// Convolutions whose taps lie apart, with padding that differs from side to side, without a bias; in
/// groups; and depthwise.
fn convolution_checks(check: &mut impl FnMut(&'static str, f64)) {
    let padding = [[2, 1], [0, 2]];
    let g = Conv2d::dilated(Shape::new(6, 7, 4), 6, [3, 2], [2, 1], padding, [2, 3]);
    let g = g.expect(VALID);
    let operands = |g: &Conv2d| {
        let lengths = [g.input.elements(), g.output.elements()].map(|n| 2 * n);
        let x = noise(30, lengths[0]);
        (x, noise(31, g.parameter_elements()), noise(32, lengths[1]))
    };

    let dilated = g.without_bias();
    let (x, parameters, r) = operands(&dilated);
    check(
        "conv2d_backward_weight, dilated",
        worst_error(
            &parameters,
            &conv2d_backward_weight(&dilated, &x, &r),
            |parameters| dot(&r, &conv2d_forward(&dilated, false, &x, parameters)),
        ),
    );
    check(
        "conv2d_backward_input, dilated",
        worst_error(&x, &conv2d_backward_input(&dilated, &r, &parameters), |x| {
            dot(&r, &conv2d_forward(&dilated, false, x, &parameters))
        }),
    );
    let r = noise(33, 2 * g.positions() * g.patch());
    check(
        "col2im, dilated",
        worst_error(&x, &col2im(&g, &r), |x| dot(&r, &im2col(&g, x))),
    );

    let depthwise = Conv2d::dilated(g.input, 4, [3, 3], [2, 2], [[0, 1]; 2], [1, 1]);
    let depthwise = depthwise.and_then(|g| g.grouped(4)).expect(VALID);
    for (g, names) in [
        (
            g.grouped(2).expect(VALID),
            ["grouped_backward_weight", "grouped_backward_input"],
        ),
        (
            depthwise,
            [
                "grouped_backward_weight, depthwise",
                "grouped_backward_input, depthwise",
            ],
        ),
    ] {
        let (x, parameters, r) = operands(&g);
        let partials = grouped_backward_weight(&g, 3, &x, &r);
        check(
            names[0],
            worst_error(&parameters, &reduce_splits(&partials, 3), |parameters| {
                dot(&r, &grouped_forward(&g, false, &x, parameters))
            }),
        );
        check(
            names[1],
            worst_error(&x, &grouped_backward_input(&g, &r, &parameters), |x| {
                dot(&r, &grouped_forward(&g, false, x, &parameters))
            }),
        );
    }
}

/// A dilated convolution without a bias, a depthwise one, one in groups and a dense layer.
pub(super) fn convolution_network() -> Model {
    type Build = fn(Shape) -> Result<Conv2d>;
    let dilated: Build = |input| {
        let padding = [[2, 1], [2, 3]];
        let g = Conv2d::dilated(input, 8, [3, 3], [1, 1], padding, [2, 2])?;
        Ok(g.without_bias())
    };
    let depthwise: Build =
        |input| Conv2d::new(input, 8, [3, 3], [2, 1], [1, 1]).and_then(|g| g.grouped(8));
    let grouped: Build = |input| {
        let padding = [[0, 1], [1, 0]];
        let g = Conv2d::dilated(input, 4, [2, 2], [1, 2], padding, [1, 1])?;
        g.grouped(2)
    };
    let dense: Build = |input| Ok(Conv2d::dense(input.elements(), 3));
    let relu = Some(Activation::Relu);
    let layers = [
        (dilated, relu),
        (depthwise, relu),
        (grouped, relu),
        (dense, None),
    ];
    let (input, loss) = (Shape::new(7, 6, 2), Loss::SoftmaxCrossEntropy);
    Model::chain("convolutions", input, 3, loss, &layers, |layer, input| {
        Ok((Op::Conv2d(layer.0(input)?), layer.1))
    })
    .expect(VALID)
}

/// Batch- and group-norm, through their mean and variance, over more rows and positions than a chunk
/// has. Of the batch's samples the last does not count.
fn normalisation_checks(check: &mut impl FnMut(&'static str, f64)) {
    let epsilon = 1e-3;
    let (batch, positions, channels) = (4, 15, 3);
    let g = BatchNorm {
        batch,
        positions,
        channels,
    };
    let count = batch - 1;
    let x = noise(20, g.rows() * channels);
    let mut r = noise(21, x.len());
    r[count * positions * channels..].fill(0.0);
    let affine = noise(22, 2 * channels);
    let statistics = |x: &[f64]| {
        let partials = batch_norm_moments(&g, x, count);
        let mut running = vec![0.0; 2 * channels];
        batch_norm_statistics(&g, [0.1, epsilon], x, &partials, count, &mut running)
    };
    let forward = |x: &[f64], affine: &[f64]| {
        let mut y = vec![0.0; x.len()];
        batch_norm_forward(false, x, &statistics(x), affine, &mut y);
        y
    };
    let of = statistics(&x);
    let partials = batch_norm_backward_sums(&g, &x, &r, &of, count);
    let gradient = reduce_chunks(&partials, g.chunks().count());
    check(
        "batch_norm_backward_sums",
        worst_error(&affine, &gradient, |affine| dot(&r, &forward(&x, affine))),
    );
    let mut dx = vec![9.0; x.len()];
    batch_norm_backward_input(&g, false, &x, &r, &of, &affine, &gradient, count, &mut dx);
    check(
        "batch_norm_backward_input",
        worst_error(&x, &dx, |x| dot(&r, &forward(x, &affine))),
    );

    let g = GroupNorm {
        batch: 2,
        positions: 130,
        channels: 6,
        groups: 3,
    };
    let x = noise(23, g.rows() * g.channels);
    let (r, affine) = (noise(24, x.len()), noise(25, 2 * g.channels));
    let statistics = |x: &[f64]| group_norm_statistics(&g, epsilon, x, &group_norm_moments(&g, x));
    let forward = |x: &[f64], affine: &[f64]| {
        let mut y = vec![0.0; x.len()];
        group_norm_forward(&g, x, &statistics(x), affine, &mut y);
        y
    };
    let of = statistics(&x);
    let partials = group_norm_backward_affine(&g, &x, &r, &of);
    let gradient = reduce_chunks(&partials, g.row_chunks().count());
    check(
        "group_norm_backward_affine",
        worst_error(&affine, &gradient, |affine| dot(&r, &forward(&x, affine))),
    );
    let partials = group_norm_backward_sums(&g, &x, &r, &of, &affine);
    let sums = reduce_splits(&partials, g.chunks().count());
    let mut dx = vec![9.0; x.len()];
    group_norm_backward_input(&g, &x, &r, &of, &affine, &sums, &mut dx);
    check(
        "group_norm_backward_input",
        worst_error(&x, &dx, |x| dot(&r, &forward(x, &affine))),
    );
}

/// The activations, what joins two values, pooling beyond the image, and the loss with smoothing and
/// weights.
fn elementwise_checks(check: &mut impl FnMut(&'static str, f64)) {
    type Function = fn(&[f64]) -> Vec<f64>;
    type Gradient = fn(&[f64], &[f64]) -> Vec<f64>;
    let from_input: [(&str, Function, Gradient); 4] = [
        ("gelu_backward", gelu_forward, gelu_backward),
        ("gelu_tanh_backward", gelu_tanh_forward, gelu_tanh_backward),
        ("silu_backward", silu_forward, silu_backward),
        (
            "hard_swish_backward",
            hard_swish_forward,
            hard_swish_backward,
        ),
    ];
    let from_output: [(&str, Function, Gradient); 2] = [
        ("tanh_backward", tanh_forward, tanh_backward),
        (
            "leaky_relu_backward",
            |x| leaky_relu_forward(0.125, x),
            |y, dy| leaky_relu_backward(0.125, y, dy),
        ),
    ];
    let r = noise(21, 60);
    // Up to ±6, beyond the kinks of hard_swish and close to none.
    let x: Vec<f64> = apart(20, 60).iter().map(|x| 10.0 * x).collect();
    for (name, forward, backward) in from_input {
        check(
            name,
            worst_error(&x, &backward(&x, &r), |x| dot(&r, &forward(x))),
        );
    }
    for (name, forward, backward) in from_output {
        let y = forward(&x);
        check(
            name,
            worst_error(&x, &backward(&y, &r), |x| dot(&r, &forward(x))),
        );
    }

    // Three samples of five positions and four channels.
    let (map, factors) = (noise(22, 60), noise(23, 12));
    let by_map = join::scale_forward(4, &r, &factors);
    check(
        "scale_forward",
        worst_error(&map, &by_map, |map| {
            dot(&r, &join::scale_forward(4, map, &factors))
        }),
    );
    let by_factors = join::scale_backward_factors(5, 4, &map, &r);
    check(
        "scale_backward_factors",
        worst_error(&factors, &by_factors, |factors| {
            dot(&r, &join::scale_forward(4, &map, factors))
        }),
    );
    let (a, b) = (noise(24, 24), noise(25, 36));
    let by_b = join::slice_channels(12, 2, 3, &r);
    check(
        "slice_channels",
        worst_error(&b, &by_b, |b| dot(&r, &join::concat(12, &a, b))),
    );
    let draw = |x: &[f64]| dropout::dropout(0.3, 7, [1, 2], &[4, 0, 9], x);
    check("dropout", worst_error(&x, &draw(&r), |x| dot(&r, &draw(x))));

    // Padding all around, more of it behind, a last window beyond that, and divisors that differ.
    let image = Shape::new(6, 5, 3);
    for (padding, counted) in [([[1, 1], [1, 1]], true), ([[0, 2], [1, 0]], false)] {
        let pool = |stride| Pool2d::padded(image, [3, 3], stride, padding, true, counted);
        let (apart_from, side_by_side) = (pool([2, 2]).expect(VALID), pool([4, 3]).expect(VALID));
        let x = apart(26, 2 * image.elements());
        for pool in [apart_from, side_by_side] {
            let r = noise(27, 2 * pool.output.elements());
            let (_, index) = maxpool2d_forward(&pool, &x);
            let dx = if pool.overlapping() {
                maxpool2d_backward_overlapping(&pool, &r, &index)
            } else {
                maxpool2d_backward(&pool, &r, &index)
            };
            check(
                "maxpool2d_backward, padded",
                worst_error(&x, &dx, |x| dot(&r, &maxpool2d_forward(&pool, x).0)),
            );
            check(
                "meanpool2d_backward, padded",
                worst_error(&x, &meanpool2d_backward(&pool, &r), |x| {
                    dot(&r, &meanpool2d_forward(&pool, x))
                }),
            );
        }
    }

    let (logits, labels, weights) = (noise(28, 4 * 5), [4, 0, 2, 2], [0.5, 3.0, 1.0, 2.0, 0.25]);
    let smoothed = |z: &[f64]| softmax_cross_entropy(z, &labels, 5, 0.1, 4.0);
    check(
        "softmax_cross_entropy, smoothed",
        worst_error(&logits, &smoothed(&logits).gradient, |z| {
            smoothed(z).loss.iter().sum::<f64>() / 4.0
        }),
    );
    let mixes = [[1, 3, 4], [0, 2, 3], [4, 1, 2], [2, 7, 8]];
    let mixes = mixes.map(|[second, kept, of]| [second, kept, of, 0, 0, 0, 0, 0, 0]);
    for weights in [None, Some(&weights[..])] {
        for smoothing in [0.0, 0.1] {
            let mixes = mixes.as_flattened();
            let mixed = |z: &[f64]| {
                mixed_softmax_cross_entropy(z, &labels, 5, mixes, weights, smoothing, 2.5)
            };
            check(
                "mixed_softmax_cross_entropy",
                worst_error(&logits, &mixed(&logits).gradient, |z| {
                    mixed(z).loss.iter().sum::<f64>() / 2.5
                }),
            );
        }
    }
    // The weights of the labels.
    let total = 0.25 + 0.5 + 1.0 + 1.0;
    for smoothing in [0.0, 0.1] {
        let weighted =
            |z: &[f64]| weighted_softmax_cross_entropy(z, &labels, &weights, smoothing, total);
        check(
            "weighted_softmax_cross_entropy",
            worst_error(&logits, &weighted(&logits).gradient, |z| {
                weighted(z).loss.iter().sum::<f64>() / f64::from(total)
            }),
        );
    }
}

/// Two convolutions, a pool and two dense layers over images of 9×7×2, in two ways: fused ReLU,
/// overlapping max-pool; or sigmoid, ReLU as its own layer, mean-pool and a plain max-pool.
pub(super) fn small_network(loss: Loss, fused: bool) -> Model {
    let then = |relu: bool| relu.then_some(Activation::Relu);
    let conv = |channels, kernel, stride, padding, relu| {
        move |input| {
            let geometry = Conv2d::new(input, channels, kernel, stride, padding)?;
            Ok((Op::Conv2d(geometry), then(relu)))
        }
    };
    let dense = |units, relu| {
        move |input: Shape| {
            let geometry = Conv2d::dense(input.elements(), units);
            Ok((Op::Dense(geometry), then(relu)))
        }
    };
    let conv1 = conv(4, [3, 3], [1, 1], [1, 1], fused);
    let conv2 = conv(5, [3, 2], [2, 1], [1, 0], false);
    let (dense1, dense2) = (dense(6, fused), dense(3, false));
    let overlapping = |input| Ok((Op::MaxPool2d(Pool2d::new(input, [3, 2], [2, 1])?), None));
    let mean_pool = |input| Ok((Op::MeanPool2d(Pool2d::new(input, [2, 2], [2, 1])?), None));
    let max_pool = |input| Ok((Op::MaxPool2d(Pool2d::new(input, [2, 2], [2, 2])?), None));
    let sigmoid = |_| Ok((Op::Activation(Activation::Sigmoid), None));
    let relu = |_| Ok((Op::Activation(Activation::Relu), None));
    type Build<'a> = &'a dyn Fn(Shape) -> Result<(Op, Option<Activation>)>;
    let fused_layers: [Build; 5] = [&conv1, &overlapping, &conv2, &dense1, &dense2];
    let plain_layers: [Build; 8] = [
        &conv1, &relu, &mean_pool, &conv2, &max_pool, &dense1, &sigmoid, &dense2,
    ];
    let layers = if fused {
        &fused_layers[..]
    } else {
        &plain_layers[..]
    };
    let input = Shape::new(9, 7, 2);
    Model::chain("small", input, 3, loss, layers, |op, input| op(input)).expect(VALID)
}

/// Convolutions and dense layers with a normalisation of each kind behind them.
fn normalised_network() -> Model {
    let (epsilon, momentum) = (1e-2, 0.1);
    let conv = |channels| {
        move |input| {
            let geometry = Conv2d::new(input, channels, [3, 2], [1, 1], [1, 0])?;
            Ok((Op::Conv2d(geometry), None))
        }
    };
    let dense =
        |units| move |input: Shape| Ok((Op::Dense(Conv2d::dense(input.elements(), units)), None));
    let (conv1, conv2, dense1, dense2) = (conv(4), conv(6), dense(5), dense(3));
    let batch_norm = |_| {
        Ok((
            Op::BatchNorm { epsilon, momentum },
            Some(Activation::Sigmoid),
        ))
    };
    let group_norm = |_| Ok((Op::GroupNorm { groups: 3, epsilon }, None));
    let layer_norm = |_| Ok((Op::LayerNorm { epsilon }, None));
    type Build<'a> = &'a dyn Fn(Shape) -> Result<(Op, Option<Activation>)>;
    let layers: [Build; 9] = [
        &batch_norm,
        &conv1,
        &batch_norm,
        &conv2,
        &group_norm,
        &dense1,
        &layer_norm,
        &batch_norm,
        &dense2,
    ];
    let (input, loss) = (Shape::new(5, 6, 2), Loss::SoftmaxCrossEntropy);
    Model::chain("normalised", input, 3, loss, &layers, |op, input| op(input)).expect(VALID)
}

/// Values that are used more than once and joined in every way, the activations, dropout, and pooling
/// beyond the image, over images of 6×5×2.
fn joined_network() -> Model {
    let (input, loss) = (Shape::new(6, 5, 2), Loss::SoftmaxCrossEntropy);
    let mut model = Model::new("joined", input, 3, loss);
    let mut push = |op: &dyn Fn(Shape) -> Result<Op>, activation, inputs: &[usize]| {
        let op = op(model.shape(inputs[0])).expect(VALID);
        model.push(None, op, activation, None, inputs).expect(VALID)
    };
    let conv = |channels, kernel, padding| {
        move |input| Conv2d::new(input, channels, [kernel; 2], [1; 2], [padding; 2]).map(Op::Conv2d)
    };
    let dense = |units| move |input: Shape| Ok(Op::Dense(Conv2d::dense(input.elements(), units)));
    let mean = |kernel: fn(Shape) -> [usize; 2], padding| {
        move |input| {
            let (kernel, padding) = (kernel(input), [[padding; 2]; 2]);
            Pool2d::padded(input, kernel, kernel, padding, true, false).map(Op::MeanPool2d)
        }
    };
    let max = |input| {
        let padding = [[1, 1], [0, 2]];
        Pool2d::padded(input, [3, 3], [2, 2], padding, true, true).map(Op::MaxPool2d)
    };
    let always = |op: Op| move |_| Ok(op);
    let leaky = Activation::LeakyRelu { slope: 0.1 };
    let first = push(&conv(3, 3, 1), Some(leaky), &[0]);
    let second = push(&conv(3, 1, 0), Some(Activation::Gelu), &[first]);
    let sum = push(
        &always(Op::Add),
        Some(Activation::Silu),
        &[first, second, first],
    );
    let squeezed = push(&mean(|input| [input.height, input.width], 0), None, &[sum]);
    let squeezed = push(&dense(4), Some(Activation::HardSwish), &[squeezed]);
    let factors = push(&dense(3), Some(Activation::Sigmoid), &[squeezed]);
    let falling = Activation::LeakyRelu { slope: -0.3 };
    let scaled = push(&always(Op::Scale), Some(falling), &[sum, factors]);
    let joined = push(&always(Op::Concat), None, &[scaled, second, 0, first]);
    let pooled = push(&max, Some(Activation::GeluTanh), &[joined]);
    let dropped = push(&always(Op::Dropout { probability: 0.3 }), None, &[pooled]);
    let pooled = push(&mean(|_| [2, 3], 1), Some(Activation::Tanh), &[dropped]);
    push(&dense(3), None, &[pooled]);
    model.finish().expect(VALID)
}

/// [`worst_error`] over all parameters of a network, on a batch of four samples, planned as for a GPU.
pub(super) fn network_error(model: &Model) -> f64 {
    network_error_with(model, &Options::default())
}

/// The same with options.
fn network_error_with(model: &Model, options: &Options) -> f64 {
    let mode = Mode::Train(Optimizer::Sgd {
        momentum: 0.0,
        nesterov: false,
        weight_decay: 0.0,
    });
    let adapter = AdapterReport::imagined(true);
    let labels = [2u32, 0, 1, 1];
    let apart = Options {
        unshared: true,
        ..options.clone()
    };
    let plan = Plan::new(model, labels.len(), mode, &apart, Target::Gpu(&adapter));
    let mut twins = Twins::<f64>::new(plan.expect(VALID), labels.len());
    let weights = options.class_weights.clone().unwrap_or(vec![1.0; 3]);
    if options.class_weights.is_some() {
        *twins.floats("class_weights") = weights.iter().copied().map(f64::from).collect();
    }
    let counted: f32 = labels.iter().map(|label| weights[*label as usize]).sum();
    if options.augment.mixes() {
        let mix = |second, kept, of| [second, kept, of, 0, 0, 0, 0, 0, 0];
        let mixes = [mix(0, 3, 4), mix(0, 1, 2), mix(2, 7, 8), mix(0, 2, 3)];
        *twins.words("mixes") = mixes.concat();
    }
    *twins.words("order") = vec![5, 2, 9, 7];
    let x = noise(16, labels.len() * model.input.elements());
    let step = Step {
        total: counted,
        ..Step::new(0, labels.len())
    };
    *twins.words("steps") = bytemuck::cast_slice(&[step]).to_vec();
    let parameters = noise(15, model.parameter_elements);
    let mut run = |parameters: &[f64], sections: &[Section]| {
        twins.floats("parameters").copy_from_slice(parameters);
        twins.floats("input")[..x.len()].copy_from_slice(&x);
        twins.words("batch_labels")[..labels.len()].copy_from_slice(&labels);
        twins.run(sections);
        let loss: f64 = twins.floats("losses")[..labels.len()].iter().sum();
        (loss / f64::from(counted), twins.floats("gradients").clone())
    };
    let forward = [Section::Forward, Section::Loss];
    let (_, analytic) = run(
        &parameters,
        &[Section::Forward, Section::Loss, Section::Backward],
    );
    worst_error(&parameters, &analytic, |parameters| {
        run(parameters, &forward).0
    })
}

/// Largest difference between `analytic` and the central differences of `f` around `x`.
fn worst_error(x: &[f64], analytic: &[f64], mut f: impl FnMut(&[f64]) -> f64) -> f64 {
    assert_eq!(x.len(), analytic.len());
    let mut x = x.to_vec();
    let mut worst = 0.0;
    for (i, &analytic) in analytic.iter().enumerate() {
        let center = x[i];
        x[i] = center + STEP;
        let above = f(&x);
        x[i] = center - STEP;
        let below = f(&x);
        x[i] = center;
        let numeric = (above - below) / (2.0 * STEP);
        let error = (numeric - analytic).abs() / numeric.abs().max(analytic.abs()).max(FLOOR);
        if error.is_nan() {
            return error;
        }
        worst = error.max(worst);
    }
    worst
}

/// Values between −1 and 1.
pub(super) fn noise(seed: u64, len: usize) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Values of either sign in random order, all at least 0.01 from 0 and from each other.
fn apart(seed: u64, len: usize) -> Vec<f64> {
    let mut values: Vec<f64> = (0..len)
        .map(|i| (i as f64 - len as f64 / 2.0) * 0.02 + 0.01)
        .collect();
    values.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    values
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_gradient_agrees_with_finite_differences() {
        let checks = finite_difference_checks();
        assert_eq!(checks.len(), 56);
        for check in checks {
            println!("{check:?}");
            assert!(check.passes(), "{check:?}");
        }
    }

    #[test]
    fn the_networks_contain_every_kind_of_layer() {
        let mut names: Vec<_> = [true, false]
            .into_iter()
            .flat_map(|fused| small_network(Loss::SquaredError, fused).layers)
            .map(|layer| layer.op.name())
            .collect();
        names.sort();
        names.dedup();
        assert_eq!(
            names,
            [
                "conv2d",
                "dense",
                "max_pool2d",
                "mean_pool2d",
                "relu",
                "sigmoid"
            ]
        );
    }

    #[test]
    fn a_wrong_gradient_is_caught() {
        let (x, r) = (noise(1, 30), noise(2, 30));
        let f = |x: &[f64]| dot(&r, &sigmoid_forward(x));
        let right = sigmoid_backward(&sigmoid_forward(&x), &r);
        let passes = |gradient: &[f64]| {
            FiniteDifference {
                name: "sigmoid_backward",
                worst: worst_error(&x, gradient, f),
                tolerance: TOLERANCE,
            }
            .passes()
        };
        assert!(passes(&right));
        // One element off by a hundred-thousandth, a forgotten factor, one NaN in the middle.
        let mut off = right.clone();
        off[17] *= 1.0 + 1e-5;
        assert!(!passes(&off));
        assert!(!passes(&r));
        let mut nan = right.clone();
        nan[17] = f64::NAN;
        assert!(!passes(&nan));
    }
}
