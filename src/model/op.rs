//! The table of operations: what each is called in a model file, which keys it takes there, what it
//! makes of its inputs' shapes, its parameters, and what it costs. An operation is added here, and in
//! `plan/` and `kernels/`, which say how it is computed.

use super::keys::{Groups, Keys};
use super::{Activation, Conv2d, Init, Pool2d, Role, Shape};
use crate::error::{Error, Result};
use std::sync::Arc;

/// What a layer computes, with its resolved geometry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    /// Convolution; in groups where the geometry has more than one.
    Conv2d(Conv2d),
    /// Dense layer over the flattened (NHWC) input; the geometry is the 1×1 case.
    Dense(Conv2d),
    /// The largest number of each window.
    MaxPool2d(Pool2d),
    /// The mean of each window.
    MeanPool2d(Pool2d),
    /// An activation as a layer of its own.
    Activation(Activation),
    /// Batch normalisation per channel (Ioffe and Szegedy, 2015); `momentum` is the weight of the
    /// new statistics in the running ones, as in PyTorch.
    BatchNorm {
        /// Added to the variance.
        epsilon: f32,
        /// Of the running statistics.
        momentum: f32,
    },
    /// Group normalisation (Wu and He, 2018): each sample's channels in `groups`, over all positions.
    GroupNorm {
        /// Number of groups, which divides the channels.
        groups: usize,
        /// Added to the variance.
        epsilon: f32,
    },
    /// Layer normalisation (Ba, Kiros, Hinton, 2016) over the channels of each position.
    LayerNorm {
        /// Added to the variance.
        epsilon: f32,
    },
    /// Zeros with this probability while training, the others divided by 1 − p (Srivastava et al., 2014).
    Dropout {
        /// From 0 to below 1.
        probability: f32,
    },
    /// The sum of all inputs, which have one shape.
    Add,
    /// The inputs' channels one behind the other.
    Concat,
    /// A map times a vector that has a factor for every channel (Hu et al., 2018: squeeze and excite).
    Scale,
    /// One position that holds all elements in NHWC order.
    Flatten,
}

/// Makes the operation for a first input of that shape and that many classes.
#[derive(Clone)]
pub(super) struct Make(Arc<dyn Fn(Shape, usize) -> Result<Op> + Send + Sync>);

impl Make {
    fn new(make: impl Fn(Shape, usize) -> Result<Op> + Send + Sync + 'static) -> Result<Make> {
        Ok(Make(Arc::new(make)))
    }

    pub fn op(&self, input: Shape, classes: usize) -> Result<Op> {
        (self.0)(input, classes)
    }
}

impl std::fmt::Debug for Make {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("Make")
    }
}

/// A type of layer in a model file.
pub(super) struct Kind {
    /// What stands behind `type =`.
    pub name: &'static str,
    /// The keys that go with it, besides those of every layer.
    pub keys: &'static [&'static str],
    /// Reads them.
    pub read: fn(&Keys) -> Result<Make>,
}

/// Most positions in a max-pool window: the winner's index within it is kept in a byte.
const MAX_WINDOW: usize = 256;

#[rustfmt::skip]
pub(super) const KINDS: &[Kind] = &[
    Kind { name: "conv2d", read: conv2d, keys: &["out_channels", "kernel", "stride", "padding", "dilation", "groups", "bias", "init", "activation", "slope"] },
    Kind { name: "dense", read: dense, keys: &["units", "bias", "init", "activation", "slope"] },
    Kind { name: "max_pool2d", read: max_pool2d, keys: &["kernel", "stride", "padding", "ceil_mode"] },
    Kind { name: "mean_pool2d", read: mean_pool2d, keys: &["kernel", "stride", "padding", "ceil_mode", "count_include_pad"] },
    Kind { name: "global_average_pool2d", read: |_| of_shape(|x| Ok(Op::MeanPool2d(Pool2d::new(x, [x.height, x.width], [1, 1])?))), keys: &[] },
    Kind { name: "batch_norm", read: batch_norm, keys: &["epsilon", "momentum", "init", "activation", "slope"] },
    Kind { name: "group_norm", read: group_norm, keys: &["groups", "epsilon", "init", "activation", "slope"] },
    Kind { name: "layer_norm", read: |k| fixed(Op::LayerNorm { epsilon: epsilon(k)? }), keys: &["epsilon", "init", "activation", "slope"] },
    Kind { name: "dropout", read: |k| fixed(Op::Dropout { probability: k.fraction("probability")?.unwrap_or(0.5) }), keys: &["probability"] },
    Kind { name: "add", read: |_| fixed(Op::Add), keys: &["activation", "slope"] },
    Kind { name: "concat", read: |_| fixed(Op::Concat), keys: &["activation", "slope"] },
    Kind { name: "scale", read: |_| fixed(Op::Scale), keys: &["activation", "slope"] },
    Kind { name: "flatten", read: |_| fixed(Op::Flatten), keys: &[] },
    Kind { name: "relu", read: activation, keys: &[] },
    Kind { name: "leaky_relu", read: activation, keys: &["slope"] },
    Kind { name: "gelu", read: activation, keys: &[] },
    Kind { name: "gelu_tanh", read: activation, keys: &[] },
    Kind { name: "silu", read: activation, keys: &[] },
    Kind { name: "sigmoid", read: activation, keys: &[] },
    Kind { name: "tanh", read: activation, keys: &[] },
    Kind { name: "hard_swish", read: activation, keys: &[] },
];

fn of_shape(make: impl Fn(Shape) -> Result<Op> + Send + Sync + 'static) -> Result<Make> {
    Make::new(move |shape, _| make(shape))
}

fn fixed(op: Op) -> Result<Make> {
    of_shape(move |_| Ok(op))
}

fn conv2d(keys: &Keys) -> Result<Make> {
    let kernel = keys.required("kernel", keys.pair("kernel", 1)?)?;
    let stride = keys.pair("stride", 1)?.unwrap_or([1, 1]);
    let dilation = keys.pair("dilation", 1)?.unwrap_or([1, 1]);
    let padding = keys.padding()?;
    let groups = keys.groups()?;
    let out_channels = keys.count("out_channels")?;
    // A depthwise convolution has as many channels out as in unless it says otherwise.
    if !matches!(groups, Groups::Depthwise) {
        keys.required("out_channels", out_channels)?;
    }
    let bias = keys.flag("bias")?.unwrap_or(true);
    Make::new(move |x, classes| {
        let channels = out_channels.map_or(x.channels, |count| count.of(classes));
        let padding = padding.sides(x, kernel, stride, dilation);
        let geometry = Conv2d::dilated(x, channels, kernel, stride, padding, dilation)?;
        let geometry = geometry.grouped(match groups {
            Groups::Number(groups) => groups,
            Groups::Depthwise => x.channels,
        })?;
        Ok(Op::Conv2d(if bias {
            geometry
        } else {
            geometry.without_bias()
        }))
    })
}

fn dense(keys: &Keys) -> Result<Make> {
    let units = keys.required("units", keys.count("units")?)?;
    let bias = keys.flag("bias")?.unwrap_or(true);
    Make::new(move |x, classes| {
        let geometry = Conv2d::dense(x.elements(), units.of(classes));
        Ok(Op::Dense(if bias {
            geometry
        } else {
            geometry.without_bias()
        }))
    })
}

fn max_pool2d(keys: &Keys) -> Result<Make> {
    let pool = pool2d(keys)?;
    let [height, width] = keys.pair("kernel", 1)?.unwrap_or([1, 1]);
    if height.saturating_mul(width) > MAX_WINDOW {
        let what = format!(
            "expected a max_pool2d window of at most {MAX_WINDOW} positions, found {height}×{width}; use a smaller kernel"
        );
        return Err(keys.error("kernel", what));
    }
    of_shape(move |x| Ok(Op::MaxPool2d(pool(x)?)))
}

fn mean_pool2d(keys: &Keys) -> Result<Make> {
    let pool = pool2d(keys)?;
    of_shape(move |x| Ok(Op::MeanPool2d(pool(x)?)))
}

fn pool2d(keys: &Keys) -> Result<impl Fn(Shape) -> Result<Pool2d> + use<>> {
    let kernel = keys.required("kernel", keys.pair("kernel", 1)?)?;
    let stride = keys.pair("stride", 1)?.unwrap_or(kernel);
    let padding = keys.padding()?;
    let ceil = keys.flag("ceil_mode")?.unwrap_or(false);
    let counted = keys.flag("count_include_pad")?.unwrap_or(true);
    Ok(move |x| {
        let padding = padding.sides(x, kernel, stride, [1, 1]);
        Pool2d::padded(x, kernel, stride, padding, ceil, counted)
    })
}

fn epsilon(keys: &Keys) -> Result<f32> {
    Ok(keys.above_zero("epsilon")?.unwrap_or(1e-5))
}

fn batch_norm(keys: &Keys) -> Result<Make> {
    fixed(Op::BatchNorm {
        epsilon: epsilon(keys)?,
        momentum: keys.share("momentum")?.unwrap_or(0.1),
    })
}

fn group_norm(keys: &Keys) -> Result<Make> {
    fixed(Op::GroupNorm {
        groups: keys.required("groups", keys.whole("groups", 1)?)?,
        epsilon: epsilon(keys)?,
    })
}

/// An activation that is a layer of its own.
fn activation(keys: &Keys) -> Result<Make> {
    fixed(Op::Activation(keys.activation_named(keys.kind)?))
}

impl Activation {
    /// All of them, leaky ReLU with PyTorch's slope.
    pub(super) const ALL: [Activation; 8] = [
        Activation::Relu,
        Activation::LeakyRelu { slope: 0.01 },
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Silu,
        Activation::Sigmoid,
        Activation::Tanh,
        Activation::HardSwish,
    ];
}

impl Op {
    /// Name as written in architecture files.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Conv2d(_) => "conv2d",
            Op::Dense(_) => "dense",
            Op::MaxPool2d(_) => "max_pool2d",
            Op::MeanPool2d(_) => "mean_pool2d",
            Op::Activation(activation) => activation.name(),
            Op::BatchNorm { .. } => "batch_norm",
            Op::GroupNorm { .. } => "group_norm",
            Op::LayerNorm { .. } => "layer_norm",
            Op::Dropout { .. } => "dropout",
            Op::Add => "add",
            Op::Concat => "concat",
            Op::Scale => "scale",
            Op::Flatten => "flatten",
        }
    }

    /// Geometry of the layers that have weights.
    pub fn product(&self) -> Option<&Conv2d> {
        match self {
            Op::Conv2d(geometry) | Op::Dense(geometry) => Some(geometry),
            _ => None,
        }
    }

    /// Inputs that it takes, at least and at most.
    pub fn arity(&self) -> [usize; 2] {
        match self {
            Op::Add | Op::Concat => [2, usize::MAX],
            Op::Scale => [2, 2],
            _ => [1, 1],
        }
    }

    /// The output's shape for inputs of these shapes, at least one.
    ///
    /// # Errors
    /// [`Error::Shape`] when they do not go together.
    pub fn output(&self, inputs: &[Shape]) -> Result<Shape> {
        let input = inputs[0];
        let fail = |what: String| {
            let operation = self.name();
            Err(Error::Shape { operation, what })
        };
        Ok(match self {
            Op::Conv2d(g) | Op::Dense(g) => g.output,
            Op::MaxPool2d(pool) | Op::MeanPool2d(pool) => pool.output,
            Op::Flatten => Shape::new(1, 1, input.elements()),
            Op::Add => {
                if let Some(other) = inputs.iter().find(|other| **other != input) {
                    return fail(format!(
                        "expected inputs of one shape, found {input} and {other}; give one of them a conv2d with kernel = 1 and the stride and out_channels that it lacks"
                    ));
                }
                input
            }
            Op::Concat => {
                let place = |s: &Shape| (s.height, s.width);
                if let Some(other) = inputs.iter().find(|other| place(other) != place(&input)) {
                    return fail(format!(
                        "expected inputs of one height and width, found {input} and {other}; pool or pad one of them"
                    ));
                }
                let channels = inputs.iter().map(|s| s.channels).sum();
                Shape::new(input.height, input.width, channels)
            }
            Op::Scale => match inputs {
                [_, factors] if *factors == Shape::new(1, 1, input.channels) => input,
                _ => {
                    let found: Vec<_> = inputs.iter().map(Shape::to_string).collect();
                    return fail(format!(
                        "expected a map H×W×{0} and a vector 1×1×{0}, found {1}; end the branch of the factors in a dense layer of {0} units",
                        input.channels,
                        found.join(" and ")
                    ));
                }
            },
            Op::GroupNorm { groups, .. } if !input.channels.is_multiple_of(*groups) => {
                return fail(format!(
                    "expected groups that divide the {} channels, found {groups}",
                    input.channels
                ));
            }
            _ => input,
        })
    }

    /// Multiply-adds of one sample's forward pass (products only, as usual in the literature).
    pub fn multiply_adds(&self) -> u64 {
        self.product()
            .map_or(0, |g| g.weight_elements() as u64 * g.positions() as u64)
    }

    /// What is trained, for an input of that shape: role, shape in this program's layout, and how it
    /// starts.
    pub(super) fn parameters(&self, input: Shape) -> Vec<(Role, Vec<usize>, Init)> {
        match self {
            Op::Conv2d(g) | Op::Dense(g) => {
                let [height, width] = g.kernel;
                let weight = vec![height, width, g.group_channels()[0], g.output.channels];
                let bias = (Role::Bias, vec![g.output.channels], Init::FanIn);
                let mut layout = vec![(Role::Weight, weight, Init::FanIn)];
                layout.extend(g.bias.then_some(bias));
                layout
            }
            Op::BatchNorm { .. } | Op::GroupNorm { .. } | Op::LayerNorm { .. } => vec![
                (Role::Weight, vec![input.channels], Init::Constant(1.0)),
                (Role::Bias, vec![input.channels], Init::Constant(0.0)),
            ],
            _ => Vec::new(),
        }
    }

    /// What is kept without being trained, likewise.
    pub(super) fn running(&self, input: Shape) -> Vec<(Role, Vec<usize>, Init)> {
        match self {
            Op::BatchNorm { .. } => vec![
                (Role::RunningMean, vec![input.channels], Init::Constant(0.0)),
                (
                    Role::RunningVariance,
                    vec![input.channels],
                    Init::Constant(1.0),
                ),
            ],
            _ => Vec::new(),
        }
    }
}
