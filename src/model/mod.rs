//! Architectures: what a network is made of, before any device is involved.
//!
//! An architecture file (`models/*.toml`) is read by [`load`] into a [`Definition`]; together with
//! the dataset's image shape and class count it becomes a [`Model`], in which every layer knows its
//! input and output shape and where its parameters lie in the flat parameter vector. This module
//! knows nothing of wgpu; the GPU path and the CPU oracle both build on it.

pub mod augment;
mod block;
mod file;
mod groups;
mod init;
mod keys;
mod op;
mod order;
mod parameters;
pub mod recipe;
pub mod recipe_file;
pub(crate) mod summary;
mod whiten;
mod write;

pub use file::{Definition, MAX_ELEMENTS, SHIPPED, default_for, load};
pub use groups::Factors;
pub use init::{initial_parameters, initial_running};
pub use op::Op;
pub use parameters::{Init, Parameter, Role};
pub use summary::{dot, summary};
pub use whiten::whiten;
pub use write::architecture;

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Parameters of every layer start at a multiple of this many elements (256 bytes), the largest
/// storage-buffer offset alignment that WebGPU allows an adapter to ask for.
pub const PARAMETER_ALIGNMENT: usize = 64;

/// Shape of one image or activation without the batch: height, width, channels (NHWC order).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Numbers at each place, which lie side by side.
    pub channels: usize,
}

impl Shape {
    /// `height`×`width`×`channels`.
    pub const fn new(height: usize, width: usize, channels: usize) -> Self {
        Shape {
            height,
            width,
            channels,
        }
    }

    /// Places of one channel.
    pub const fn positions(&self) -> usize {
        self.height * self.width
    }

    /// Elements of one sample.
    pub const fn elements(&self) -> usize {
        self.height * self.width * self.channels
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}×{}×{}", self.height, self.width, self.channels)
    }
}

/// Geometry of a 2-D convolution (cross-correlation, as in every deep-learning library):
/// `output = (input + padding before and behind − dilation·(kernel − 1) − 1) / stride + 1` per axis,
/// rounded down, zero padding.
///
/// A dense layer is the case of a 1×1 image under a 1×1 kernel, see [`Conv2d::dense`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Conv2d {
    /// Of a sample.
    pub input: Shape,
    /// Of what it becomes.
    pub output: Shape,
    /// `[height, width]`, like stride, padding and dilation.
    pub kernel: [usize; 2],
    /// From one window to the next.
    pub stride: [usize; 2],
    /// What lies before the first row and the first column; what lies behind the last ones follows
    /// from the output's size.
    pub padding: [usize; 2],
    /// From one tap of the kernel to the next; 1 where they lie side by side.
    #[serde(default = "undilated")]
    pub dilation: [usize; 2],
    /// The channels in and out fall into so many groups, and an output sees its own group alone.
    #[serde(default = "ungrouped")]
    pub groups: usize,
    /// Whether a number for each output channel is added.
    #[serde(default = "biased")]
    pub bias: bool,
}

// What a geometry has that was written down before there was a choice.

const fn undilated() -> [usize; 2] {
    [1, 1]
}

const fn ungrouped() -> usize {
    1
}

const fn biased() -> bool {
    true
}

impl Conv2d {
    /// Geometry for `out_channels` filters over `input`, with the same padding on both sides.
    ///
    /// # Errors
    /// As [`Conv2d::dilated`].
    pub fn new(
        input: Shape,
        out_channels: usize,
        kernel: [usize; 2],
        stride: [usize; 2],
        padding: [usize; 2],
    ) -> Result<Self> {
        let padding = padding.map(|p| [p, p]);
        Conv2d::dilated(input, out_channels, kernel, stride, padding, [1, 1])
    }

    /// Geometry for `out_channels` filters over `input` with `padding` `[[top, bottom], [left,
    /// right]]`, whose taps lie `dilation` apart.
    ///
    /// # Errors
    /// [`Error::Shape`] when a size is zero or the dilated kernel exceeds the padded input.
    pub fn dilated(
        input: Shape,
        out_channels: usize,
        kernel: [usize; 2],
        stride: [usize; 2],
        padding: [[usize; 2]; 2],
        dilation: [usize; 2],
    ) -> Result<Self> {
        let output = window_output("conv2d", input, kernel, stride, padding, dilation)?;
        if out_channels == 0 {
            return Err(Error::Shape {
                operation: "conv2d",
                what: "expected at least one output channel, found 0; set out_channels".into(),
            });
        }
        Ok(Conv2d {
            input,
            output: Shape::new(output[0], output[1], out_channels),
            kernel,
            stride,
            padding: padding.map(|[before, _]| before),
            dilation,
            groups: 1,
            bias: true,
        })
    }

    /// The same in `groups`: as many as channels for a depthwise convolution.
    ///
    /// # Errors
    /// [`Error::Shape`] when they do not divide the channels in and out.
    pub fn grouped(self, groups: usize) -> Result<Self> {
        let (c, oc) = (self.input.channels, self.output.channels);
        // (Nothing but 0 is a multiple of 0.)
        if !c.is_multiple_of(groups) || !oc.is_multiple_of(groups) {
            return Err(Error::Shape {
                operation: "conv2d",
                what: format!(
                    "expected groups that divide the {c} channels in and the {oc} channels out, found {groups}; change groups or out_channels"
                ),
            });
        }
        Ok(Conv2d { groups, ..self })
    }

    /// The same without a bias, as in front of a normalisation that has its own.
    pub const fn without_bias(self) -> Self {
        Conv2d {
            bias: false,
            ..self
        }
    }

    /// The dense layer `y[units] = x[inputs] · W[inputs, units] + b` as a 1×1 convolution over a
    /// 1×1 image.
    pub const fn dense(inputs: usize, units: usize) -> Self {
        Conv2d {
            input: Shape::new(1, 1, inputs),
            output: Shape::new(1, 1, units),
            kernel: [1, 1],
            stride: [1, 1],
            padding: [0, 0],
            dilation: [1, 1],
            groups: 1,
            bias: true,
        }
    }

    /// Channels that an output sees, and output channels that see the same: C/groups, OC/groups.
    pub const fn group_channels(&self) -> [usize; 2] {
        [
            self.input.channels / self.groups,
            self.output.channels / self.groups,
        ]
    }

    /// Rows of the weight matrix: KH·KW·C/groups, one column of the im2col matrix each.
    pub const fn patch(&self) -> usize {
        self.kernel[0] * self.kernel[1] * self.group_channels()[0]
    }

    /// Elements of the weight, layout `[KH][KW][C/groups][OC]`.
    pub const fn weight_elements(&self) -> usize {
        self.patch() * self.output.channels
    }

    /// Rows of the matrix that weight and bias are, `[KH·KW·C/groups + 1, OC]`, without the last one
    /// where there is no bias.
    pub const fn parameter_rows(&self) -> usize {
        self.patch() + self.bias as usize
    }

    /// Elements of the weight and of the bias behind it, where there is one.
    pub const fn parameter_elements(&self) -> usize {
        self.parameter_rows() * self.output.channels
    }

    /// Whether some taps lie in the padding.
    pub const fn padded(&self) -> bool {
        self.padding[0] > 0
            || self.padding[1] > 0
            || self.reach(0) > self.input.height
            || self.reach(1) > self.input.width
    }

    /// Rows (axis 0) or columns (axis 1) of the image up to the last that a tap reaches; more than there
    /// are where it lies in the padding.
    pub(crate) const fn reach(&self, axis: usize) -> usize {
        let last = [self.output.height, self.output.width][axis] - 1;
        last * self.stride[axis] + self.dilation[axis] * (self.kernel[axis] - 1) + 1
            - self.padding[axis]
    }

    /// Output positions of one sample: OH·OW.
    pub const fn positions(&self) -> usize {
        self.output.height * self.output.width
    }
}

/// Geometry of a 2-D pooling window. What of it lies beyond the image takes no part; positions that no
/// window covers are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pool2d {
    /// Of a sample.
    pub input: Shape,
    /// Of what it becomes.
    pub output: Shape,
    /// `[height, width]`, like all that follows.
    pub kernel: [usize; 2],
    /// From one window to the next.
    pub stride: [usize; 2],
    /// Rows above and columns left of the image, where the first windows begin.
    #[serde(default)]
    pub padding: [usize; 2],
    /// Rows below and columns right of it. The last windows may reach beyond these in ceil mode.
    #[serde(default)]
    pub padding_after: [usize; 2],
    /// Whether a mean is divided by the padding's places too, as in PyTorch unless told otherwise. What
    /// lies beyond the padding never counts.
    #[serde(default)]
    pub count_include_pad: bool,
}

impl Pool2d {
    /// # Errors
    /// [`Error::Shape`] when a size is zero or the window exceeds the input.
    pub fn new(input: Shape, kernel: [usize; 2], stride: [usize; 2]) -> Result<Self> {
        Pool2d::padded(input, kernel, stride, [[0; 2]; 2], false, false)
    }

    /// With `padding` `[[above, below], [left, right]]`; with `ceil` the output's size is rounded up
    /// instead of down, where the window that this adds begins on the image or above or left of it.
    /// All as PyTorch's `MaxPool2d` and `AvgPool2d` have it.
    ///
    /// # Errors
    /// [`Error::Shape`] when a size is zero, the window exceeds the padded input, or a padding is not
    /// smaller than the window.
    pub fn padded(
        input: Shape,
        kernel: [usize; 2],
        stride: [usize; 2],
        padding: [[usize; 2]; 2],
        ceil: bool,
        count_include_pad: bool,
    ) -> Result<Self> {
        let before = padding.map(|[before, _]| before);
        let after = padding.map(|[_, after]| after);
        let mut output = [0; 2];
        for (axis, size) in [input.height, input.width].into_iter().enumerate() {
            let name = ["height", "width"][axis];
            let (window, step) = (kernel[axis], stride[axis]);
            let fail = |what| {
                let operation = "pool2d";
                Err(Error::Shape { operation, what })
            };
            if window == 0 || step == 0 {
                return fail(format!(
                    "expected kernel and stride of at least 1 along the {name}, found kernel {window} and stride {step}"
                ));
            }
            // A padding as large as the window adds outputs that see nothing.
            let most = before[axis].max(after[axis]);
            if most >= window {
                return fail(format!(
                    "expected padding smaller than the kernel ({window}) along the {name}, found {most}"
                ));
            }
            let padded = before[axis] + size + after[axis];
            if window > padded {
                let padding = match padding[axis] {
                    [before, after] if before == after => before.to_string(),
                    [before, after] => format!("{before} and {after}"),
                };
                return fail(format!(
                    "expected a kernel no larger than the padded input, found kernel {window} over input {name} {size} with padding {padding}; use a smaller kernel or fewer pooling layers"
                ));
            }
            let rest = padded - window;
            output[axis] = rest / step + 1;
            let next = output[axis] * step;
            if ceil && !rest.is_multiple_of(step) && next < before[axis] + size {
                output[axis] += 1;
            }
        }
        Ok(Pool2d {
            input,
            output: Shape::new(output[0], output[1], input.channels),
            kernel,
            stride,
            padding: before,
            padding_after: after,
            // One geometry without padding, whatever was asked for.
            count_include_pad: count_include_pad && (before, after) != ([0; 2], [0; 2]),
        })
    }

    /// The places along `axis` of the window at output position `at` that lie on the image: never none.
    pub fn taps(&self, axis: usize, at: usize) -> Range<usize> {
        let first = self.padding[axis];
        self.places(axis, at, first..first + self.size(axis))
    }

    /// What the mean of the window at output position `[oh, ow]` is divided by.
    pub fn divisor(&self, at: [usize; 2]) -> usize {
        let places = |axis| self.places(axis, at[axis], self.counted(axis)).len();
        places(0) * places(1)
    }

    /// The same for all windows, if it is.
    pub fn common_divisor(&self) -> Option<usize> {
        let ends = |axis| {
            let first = self.places(axis, 0, self.counted(axis)).len();
            let last = self.places(axis, self.outputs(axis) - 1, self.counted(axis));
            first == self.kernel[axis] && last.len() == self.kernel[axis]
        };
        (ends(0) && ends(1)).then_some(self.kernel[0] * self.kernel[1])
    }

    /// The places along `axis` that a mean is divided by, counted from the first of the padding.
    pub fn counted(&self, axis: usize) -> Range<usize> {
        let (first, size) = (self.padding[axis], self.size(axis));
        if self.count_include_pad {
            0..first + size + self.padding_after[axis]
        } else {
            first..first + size
        }
    }

    /// Whether no window reaches beyond the image.
    pub fn inside(&self) -> bool {
        let inside = |axis| {
            let end = (self.outputs(axis) - 1) * self.stride[axis] + self.kernel[axis];
            self.padding[axis] == 0 && end <= self.size(axis)
        };
        inside(0) && inside(1)
    }

    fn size(&self, axis: usize) -> usize {
        [self.input.height, self.input.width][axis]
    }

    fn outputs(&self, axis: usize) -> usize {
        [self.output.height, self.output.width][axis]
    }

    /// The places of the window at `at` that are among `those`, which are counted from the first of
    /// the padding.
    fn places(&self, axis: usize, at: usize, those: Range<usize>) -> Range<usize> {
        let start = at * self.stride[axis];
        let end = (start + self.kernel[axis]).min(those.end);
        start.max(those.start) - start..end - start
    }

    /// Whether two windows can share an input position (stride < kernel on an axis).
    pub const fn overlapping(&self) -> bool {
        self.stride[0] < self.kernel[0] || self.stride[1] < self.kernel[1]
    }
}

/// Height and width of what windows see of `input`, with `padding` `[[top, bottom], [left, right]]`.
fn window_output(
    operation: &'static str,
    input: Shape,
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [[usize; 2]; 2],
    dilation: [usize; 2],
) -> Result<[usize; 2]> {
    let mut output = [0; 2];
    for (axis, size) in [input.height, input.width].into_iter().enumerate() {
        let name = ["height", "width"][axis];
        let fail = |what| Err(Error::Shape { operation, what });
        if kernel[axis] == 0 || stride[axis] == 0 {
            return fail(format!(
                "expected kernel and stride of at least 1 along the {name}, found kernel {} and stride {}",
                kernel[axis], stride[axis]
            ));
        }
        if dilation[axis] == 0 {
            return fail(format!(
                "expected a dilation of at least 1 along the {name}, found 0; 1 leaves no gaps"
            ));
        }
        let reach = dilation[axis]
            .checked_mul(kernel[axis] - 1)
            .and_then(|gaps| gaps.checked_add(1));
        let kernel = match dilation[axis] {
            1 => kernel[axis].to_string(),
            dilation => format!("{} dilated by {dilation}", kernel[axis]),
        };
        let Some(reach) = reach else {
            return fail(format!(
                "expected a kernel no larger than the padded input, found kernel {kernel} over input {name} {size}; use a smaller dilation"
            ));
        };
        // A padding as large as the kernel adds outputs that see nothing but zeros: a mistake.
        let [before, behind] = padding[axis];
        let most = before.max(behind);
        if most >= reach {
            return fail(format!(
                "expected padding smaller than the kernel ({kernel}) along the {name}, found {most}"
            ));
        }
        let padded = size.saturating_add(before).saturating_add(behind);
        if reach > padded {
            let padding = match before == behind {
                true => before.to_string(),
                false => format!("[{before}, {behind}]"),
            };
            return fail(format!(
                "expected a kernel no larger than the padded input, found kernel {kernel} over input {name} {size} with padding {padding}; use a smaller kernel or fewer pooling layers"
            ));
        }
        output[axis] = (padded - reach) / stride[axis] + 1;
    }
    Ok(output)
}

/// The padding `[[top, bottom], [left, right]]` for which an output is as large as its input divided by
/// the stride, rounded up; where it is odd, the larger part lies behind (TensorFlow's `SAME`, ONNX's
/// `SAME_UPPER`). Sizes of 0 are left to the constructors to refuse.
pub fn same_padding(
    input: Shape,
    kernel: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
) -> [[usize; 2]; 2] {
    [0, 1].map(|axis| {
        let size = [input.height, input.width][axis];
        let last = size.div_ceil(stride[axis].max(1)).saturating_sub(1);
        let reach = dilation[axis].saturating_mul(kernel[axis].saturating_sub(1));
        let needed = (last * stride[axis])
            .saturating_add(reach)
            .saturating_add(1);
        let total = needed.saturating_sub(size);
        [total / 2, total - total / 2]
    })
}

/// An elementwise function.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `1 / (1 + exp(−x))`.
    Sigmoid,
    /// `x` where it is positive, else `slope·x`.
    LeakyRelu {
        /// Of the negative side.
        slope: f32,
    },
    /// x·Φ(x) (Hendrycks and Gimpel, 2016), by the error function.
    Gelu,
    /// The same by the authors' formula with tanh.
    GeluTanh,
    /// `x·sigmoid(x)`.
    Silu,
    /// The hyperbolic tangent.
    Tanh,
    /// `x·min(max(x + 3, 0), 6)/6`.
    HardSwish,
}

impl Activation {
    /// Name as written in architecture files.
    pub fn name(&self) -> &'static str {
        match self {
            Activation::Relu => "relu",
            Activation::Sigmoid => "sigmoid",
            Activation::LeakyRelu { .. } => "leaky_relu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_tanh",
            Activation::Silu => "silu",
            Activation::Tanh => "tanh",
            Activation::HardSwish => "hard_swish",
        }
    }

    /// Whether its derivative is computed from its output; from its input otherwise.
    pub fn by_output(&self) -> bool {
        use Activation::*;
        match self {
            Relu | Sigmoid | Tanh => true,
            // Its output has the sign of its input.
            LeakyRelu { slope } => *slope >= 0.0,
            Gelu | GeluTanh | Silu | HardSwish => false,
        }
    }
}

/// One layer of a [`Model`]: a node of its graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Unique within the model: as the file says, or the op's name and its count, `conv2d1`, `dense2`, …
    pub name: String,
    /// What it does.
    pub op: Op,
    /// Applied to what the op gives.
    pub activation: Option<Activation>,
    /// The values that it takes: 0 is the network's input, i + 1 the output of layer i.
    pub inputs: Vec<usize>,
    /// Shape of the first input.
    pub input: Shape,
    /// Of a sample behind it.
    pub output: Shape,
    /// What is trained, one tensor right behind the other in the flat parameter vector, so that
    /// weight and bias of a product are one `[KH·KW·C + 1, OC]` matrix.
    pub parameters: Vec<Parameter>,
    /// What is kept without being trained: the running statistics, in a flat vector of their own.
    pub running: Vec<Parameter>,
}

impl Layer {
    /// Number of trained parameters (weight and bias).
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(Parameter::elements).sum()
    }

    /// Where its parameters lie in the flat parameter vector; empty without any.
    pub fn range(&self) -> Range<usize> {
        let start = self.parameters.first().map_or(0, |p| p.start);
        start..start + self.parameter_count()
    }

    /// Where its running statistics lie in their flat vector; empty without any.
    pub fn running_range(&self) -> Range<usize> {
        let start = self.running.first().map_or(0, |p| p.start);
        start..start + self.running.iter().map(Parameter::elements).sum::<usize>()
    }

    /// Multiply-adds of one sample's forward pass (products only, as usual in the literature).
    pub fn multiply_adds(&self) -> u64 {
        self.op.multiply_adds()
    }
}

/// What is minimised, averaged over the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// `−log softmax(logits)[label]`.
    SoftmaxCrossEntropy,
    /// `½ Σ_k (output_k − onehot_k)²`.
    SquaredError,
}

impl Loss {
    /// Name as written in architecture files.
    pub fn name(&self) -> &'static str {
        match self {
            Loss::SoftmaxCrossEntropy => "softmax_cross_entropy",
            Loss::SquaredError => "squared_error",
        }
    }
}

/// A network whose shapes are all known: a graph of layers, each behind those that it takes its inputs
/// from, ending in one value per class.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// As its file says.
    pub name: String,
    /// Of an image.
    pub input: Shape,
    /// Number of classes.
    pub classes: usize,
    /// What is minimised.
    pub loss: Loss,
    /// In the order in which they are computed.
    pub layers: Vec<Layer>,
    /// Length of the flat parameter vector in elements, alignment gaps (always zero) included.
    pub parameter_elements: usize,
    /// Length of the flat vector of running statistics, likewise.
    pub running_elements: usize,
}

impl Model {
    /// A network without layers yet, see [`Model::push`] and [`Model::finish`].
    pub fn new(name: &str, input: Shape, classes: usize, loss: Loss) -> Model {
        Model {
            name: name.into(),
            input,
            classes,
            loss,
            layers: Vec::new(),
            parameter_elements: 0,
            running_elements: 0,
        }
    }

    /// Shape of a value: 0 is the network's input, i + 1 the output of layer i.
    pub fn shape(&self, value: usize) -> Shape {
        value
            .checked_sub(1)
            .map_or(self.input, |i| self.layers[i].output)
    }

    /// Adds a layer that takes the values `inputs` (see [`Layer::inputs`]) and says which value it
    /// gives. Without a name it gets the op's and its count.
    ///
    /// # Errors
    /// [`Error::Shape`] when the inputs do not go together.
    pub fn push(
        &mut self,
        name: Option<String>,
        op: Op,
        activation: Option<Activation>,
        init: Option<Init>,
        inputs: &[usize],
    ) -> Result<usize> {
        let [least, most] = op.arity();
        if !(least..=most).contains(&inputs.len()) {
            return Err(Error::Shape {
                operation: op.name(),
                what: match (least, most) {
                    (1, 1) => format!("expected one input, found {}", inputs.len()),
                    (least, most) => format!(
                        "expected {}{least} inputs, found {}; name them: inputs = [\"a\", \"b\"]",
                        if least == most { "" } else { "at least " },
                        inputs.len()
                    ),
                },
            });
        }
        if init == Some(Init::Whitening)
            && (inputs != [0] || op.product().is_none_or(|g| g.groups > 1))
        {
            return Err(Error::Shape {
                operation: op.name(),
                what: "expected init = \"whitening\" in a convolution of the images themselves, in one group, found it elsewhere; use another init".into(),
            });
        }
        let shapes: Vec<Shape> = inputs.iter().map(|value| self.shape(*value)).collect();
        let output = op.output(&shapes)?;
        let name = name.unwrap_or_else(|| {
            let same = self.layers.iter().filter(|l| l.op.name() == op.name());
            format!("{}{}", op.name(), same.count() + 1)
        });
        let parameters = parameters::trained(&op, &name, shapes[0], init, self.parameter_elements);
        let running = parameters::running(&op, &name, shapes[0], self.running_elements);
        self.parameter_elements = parameters::end(&parameters, self.parameter_elements);
        self.running_elements = parameters::end(&running, self.running_elements);
        self.layers.push(Layer {
            name,
            op,
            activation,
            inputs: inputs.to_vec(),
            input: shapes[0],
            output,
            parameters,
            running,
        });
        Ok(self.layers.len())
    }

    /// The network, if it ends in one value per class.
    ///
    /// # Errors
    /// [`Error::Shape`] when it does not.
    pub fn finish(self) -> Result<Model> {
        let output = self.shape(self.layers.len());
        if output.elements() != self.classes || self.layers.is_empty() {
            return Err(Error::Shape {
                operation: "model",
                what: format!(
                    "expected the last layer to give one value for each of {} classes, found output {output}; end the model with type = \"dense\", units = \"classes\"",
                    self.classes
                ),
            });
        }
        Ok(self)
    }

    /// Chains layers from `input`: `build` turns each entry into an op, with its activation, for the
    /// input shape that it meets.
    ///
    /// # Errors
    /// The first error of `build`, or as [`Model::finish`].
    pub fn chain<T>(
        name: &str,
        input: Shape,
        classes: usize,
        loss: Loss,
        entries: &[T],
        mut build: impl FnMut(&T, Shape) -> Result<(Op, Option<Activation>)>,
    ) -> Result<Model> {
        let mut model = Model::new(name, input, classes, loss);
        let mut value = 0;
        for entry in entries {
            let (op, activation) = build(entry, model.shape(value))?;
            value = model.push(None, op, activation, None, &[value])?;
        }
        model.finish()
    }

    /// Number of trained parameters.
    pub fn parameter_count(&self) -> usize {
        self.layers.iter().map(Layer::parameter_count).sum()
    }

    /// Multiply-adds of one sample's forward pass.
    pub fn multiply_adds(&self) -> u64 {
        self.layers.iter().map(Layer::multiply_adds).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INPUT: Shape = Shape::new(7, 10, 6);

    fn message<T>(result: Result<T>) -> String {
        result.err().expect("an error").to_string()
    }

    #[test]
    fn a_dilated_convolution_has_the_size_that_pytorch_gives_it() {
        // torch.nn.functional.conv2d over F.pad.
        for (kernel, stride, padding, dilation, output) in [
            ([3, 3], [1, 1], [[2, 2], [2, 2]], [2, 2], [7, 10]),
            ([3, 2], [2, 3], [[1, 0], [0, 1]], [3, 4], [1, 3]),
            ([3, 3], [2, 2], [[0, 1], [0, 1]], [1, 1], [3, 5]),
            ([4, 1], [1, 1], [[0, 3], [0, 0]], [2, 9], [4, 10]),
        ] {
            let g = Conv2d::dilated(INPUT, 8, kernel, stride, padding, dilation).unwrap();
            assert_eq!([g.output.height, g.output.width], output, "{g:?}");
            assert_eq!(g.padding, [padding[0][0], padding[1][0]]);
        }
    }

    #[test]
    fn taps_in_the_padding_are_seen_on_every_side() {
        let of = |padding, stride| {
            Conv2d::dilated(INPUT, 8, [3, 3], stride, padding, [1, 1])
                .unwrap()
                .padded()
        };
        assert!(!of([[0, 0], [0, 0]], [1, 1]));
        for side in 0..4 {
            let mut padding = [[0, 0], [0, 0]];
            padding[side / 2][side % 2] = 1;
            assert!(of(padding, [1, 1]), "{padding:?}");
        }
        // No window gets as far as the last padded row.
        assert!(!of([[0, 1], [0, 0]], [3, 1]));
    }

    #[test]
    fn same_padding_keeps_the_size_and_puts_the_odd_part_behind() {
        let same = |kernel, stride, dilation| same_padding(INPUT, kernel, stride, dilation);
        assert_eq!(same([3, 3], [1, 1], [1, 1]), [[1, 1], [1, 1]]);
        assert_eq!(same([2, 4], [1, 1], [1, 1]), [[0, 1], [1, 2]]);
        assert_eq!(same([3, 3], [2, 2], [1, 1]), [[1, 1], [0, 1]]);
        assert_eq!(same([3, 3], [1, 1], [2, 4]), [[2, 2], [4, 4]]);
        assert_eq!(same([1, 2], [3, 3], [1, 1]), [[0, 0], [0, 1]]);
        for (kernel, stride, dilation) in [([3, 2], [2, 3], [2, 5]), ([5, 1], [1, 4], [1, 1])] {
            let padding = same(kernel, stride, dilation);
            let g = Conv2d::dilated(INPUT, 8, kernel, stride, padding, dilation).unwrap();
            let ceil = [7usize.div_ceil(stride[0]), 10usize.div_ceil(stride[1])];
            assert_eq!([g.output.height, g.output.width], ceil, "{g:?}");
        }
    }

    #[test]
    fn groups_and_bias_decide_the_parameters() {
        let g = Conv2d::new(INPUT, 12, [3, 2], [1, 1], [0, 0]).unwrap();
        assert_eq!((g.patch(), g.parameter_elements()), (36, 37 * 12));
        let depthwise = g.grouped(6).unwrap();
        assert_eq!(depthwise.group_channels(), [1, 2]);
        assert_eq!((depthwise.patch(), depthwise.weight_elements()), (6, 72));
        assert_eq!(depthwise.parameter_elements(), 72 + 12);
        assert_eq!(depthwise.without_bias().parameter_elements(), 72);
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_was_found() {
        let of = |padding, dilation| {
            message(Conv2d::dilated(INPUT, 8, [3, 3], [1, 1], padding, dilation))
        };
        let none = [[0, 0]; 2];
        for (found, parts) in [
            (
                of(none, [0, 1]),
                ["dilation of at least 1", "height, found 0"],
            ),
            (
                of(none, [1, 5]),
                ["kernel 3 dilated by 5", "width 10 with padding 0"],
            ),
            (
                of([[5, 1], [0, 0]], [2, 1]),
                ["smaller than the kernel (3 dilated by 2)", "found 5"],
            ),
            (
                of([[0, 1], [0, 0]], [4, 1]),
                ["kernel 3 dilated by 4", "padding [0, 1]"],
            ),
            (
                of(none, [usize::MAX, 1]),
                ["dilated by", "smaller dilation"],
            ),
        ] {
            for part in parts {
                assert!(found.contains(part), "{found} has no '{part}'");
            }
        }
        let g = Conv2d::new(INPUT, 8, [3, 3], [1, 1], [0, 0]).unwrap();
        for groups in [0, 4, 6] {
            let found = message(g.grouped(groups));
            let part = format!("6 channels in and the 8 channels out, found {groups}");
            assert!(found.contains(&part), "{found}");
        }
        assert_eq!(g.grouped(2).unwrap().groups, 2);
    }

    #[test]
    fn geometries_written_before_there_was_a_choice_still_read() {
        let g = Conv2d::new(INPUT, 8, [3, 3], [1, 2], [1, 0]).unwrap();
        let mut text = serde_json::to_value(g).unwrap();
        for key in ["dilation", "groups", "bias"] {
            assert!(text.as_object_mut().unwrap().remove(key).is_some());
        }
        assert_eq!(serde_json::from_value::<Conv2d>(text).unwrap(), g);
    }
}
