//! Nodes as layers.

use super::attributes::*;
use super::constants::{BATCH, Constant};
use super::{Form, Found, Reader, Value, plain, printable};
use crate::error::Error;
use crate::export::proto::*;
use crate::model::{Conv2d, Model, Op, Pool2d, Shape};
use std::collections::HashSet;

/// Most layers of a model file.
const MAX_LAYERS: usize = 4096;

/// A node's operation as a layer.
impl<'a> Reader<'a> {
    pub(super) fn value(&self, name: &str) -> Found<Value> {
        if let Some(value) = self.values.get(name) {
            return match value.form {
                Form::Image => Err(
                    "expected uint8 images to be made float32 first (Cast), found them as they are"
                        .into(),
                ),
                _ => Ok(*value),
            };
        }
        Err(match self.constants.contains_key(name) {
            true => format!(
                "expected the input '{}' to depend on the image, found a constant",
                printable(name)
            ),
            false => format!(
                "expected the input '{}' to be computed before it, found it nowhere",
                printable(name)
            ),
        })
    }

    /// A map; what is a vector of one place each is none.
    fn map(&self, node: &NodeProto) -> Found<usize> {
        let value = self.value(input(node, 0)?)?;
        match value.form {
            Form::Map => Ok(value.index),
            other => Err(format!("expected an input of N×C×H×W, found {other:?}").to_lowercase()),
        }
    }

    /// A map, or a vector that is flattened in the model too.
    fn either(&mut self, name: &str) -> Found<Value> {
        let value = self.value(name)?;
        match value.form {
            Form::Map => Ok(value),
            Form::Vector => Ok(Value {
                index: self.flattened(value.index)?,
                ..value
            }),
            other => {
                Err(format!("expected an input of N×C×H×W or N×C, found {other:?}").to_lowercase())
            }
        }
    }

    /// A value as a vector of the model's.
    fn flattened(&mut self, index: usize) -> Found<usize> {
        match self.model.shape(index).positions() {
            1 => Ok(index),
            _ => self.push(None, Op::Flatten, &[index]),
        }
    }

    fn floats(&self, node: &NodeProto, at: usize) -> Found<Option<&Constant>> {
        let Some(name) = node.input.get(at).filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        match self.constants.get(name) {
            Some(constant) if constant.floats().is_some() => Ok(Some(constant)),
            Some(_) => Err(format!(
                "expected '{}' in float32, found integers",
                printable(name)
            )),
            None => Err(format!(
                "expected '{}' as a constant of float32, found none; export trained weights in float32, within the file",
                printable(name)
            )),
        }
    }

    fn required(&self, node: &NodeProto, at: usize) -> Found<&Constant> {
        let found = self.floats(node, at)?;
        found.ok_or_else(|| format!("expected input {at}, found none"))
    }

    /// One number for each channel.
    fn per_channel(&self, node: &NodeProto, at: usize, channels: usize) -> Found<Vec<f32>> {
        let constant = self.required(node, at)?;
        let values = constant.floats().unwrap_or_default();
        let one_axis = constant.dims.iter().filter(|n| **n != 1).count() <= 1;
        match one_axis && values.len() == channels {
            true => Ok(values.to_vec()),
            false => Err(format!(
                "expected {channels} numbers in input {at}, one for each channel, found {:?}",
                constant.dims
            )),
        }
    }

    fn integers(&self, node: &NodeProto, at: usize) -> Option<Vec<i64>> {
        let constant = self.constants.get(node.input.get(at)?)?;
        constant.integers().map(<[i64]>::to_vec)
    }

    /// Adds a layer, and says which value it gives. It is called as `name`, where that can be a layer's name.
    pub(super) fn push(&mut self, name: Option<&str>, op: Op, inputs: &[usize]) -> Found<usize> {
        if self.model.layers.len() == MAX_LAYERS {
            return Err(format!("expected at most {MAX_LAYERS} layers, found more"));
        }
        let taken = |model: &Model, name: &str| model.layers.iter().any(|l| l.name == name);
        let kind = match &op {
            Op::MeanPool2d(pool) if pool.is_global() => "global_average_pool2d",
            op => op.name(),
        };
        let mut own = name.map(|name| plain(name, "-_")).filter(|name| {
            let numbered = name.chars().all(|c| !c.is_ascii_alphabetic());
            !numbered && name != "input" && !taken(&self.model, name)
        });
        let same = self
            .model
            .layers
            .iter()
            .filter(|l| l.op.name() == op.name());
        let mut count = same.count();
        while own.is_none() {
            count += 1;
            own = Some(format!("{kind}{count}")).filter(|name| !taken(&self.model, name));
        }
        let pushed = self.model.push(own, op, None, None, inputs);
        pushed.map_err(|error| match error {
            Error::Shape { what, .. } => what,
            other => other.to_string(),
        })
    }

    /// Gives the last layer's parameters their values.
    fn fill(&mut self, tensors: &[(&str, Vec<f32>)]) {
        if let Some(layer) = self.model.layers.last() {
            let named = tensors
                .iter()
                .map(|(what, values)| (format!("{}.{what}", layer.name), values.clone()));
            self.tensors.extend(named);
        }
    }

    /// What a layer is called whose weight this is.
    fn layer_name(&self, node: &'a NodeProto, at: usize) -> Option<&'a str> {
        let name = node.input.get(at)?.strip_suffix(".weight")?;
        Some(name).filter(|name| !name.is_empty())
    }

    /// The value of a node's output, and the output's name: its own, or that of a later node that went into
    /// the same layer.
    pub(super) fn operation(&mut self, node: &'a NodeProto) -> Found<(Value, &'a str)> {
        let mut output = node.output[0].as_str();
        let op = node.op_type.as_str();
        let as_map = |index| Value {
            index,
            form: Form::Map,
        };
        let as_vector = |index| Value {
            index,
            form: Form::Vector,
        };
        let value = match op {
            "Conv" => as_map(self.convolution(node)?),
            "Gemm" | "MatMul" => {
                let index = self.dense(node, &mut output)?;
                as_vector(index)
            }
            "MaxPool" | "AveragePool" => as_map(self.pool(node)?),
            "GlobalAveragePool" | "GlobalMaxPool" => {
                known(node, &[])?;
                as_map(self.global(self.map(node)?, op == "GlobalMaxPool")?)
            }
            "ReduceMean" => {
                known(node, &["axes", "keepdims", "noop_with_empty_axes"])?;
                let map = self.map(node)?;
                let mut axes = ints(node, "axes")
                    .or_else(|| self.integers(node, 1))
                    .unwrap_or_default();
                axes.iter_mut()
                    .for_each(|axis| *axis += if *axis < 0 { 4 } else { 0 });
                axes.sort_unstable();
                if axes != [2, 3] {
                    return Err(format!(
                        "expected a mean over the axes 2 and 3, found {axes:?}"
                    ));
                }
                let index = self.global(map, false)?;
                match int(node, "keepdims").unwrap_or(1) {
                    0 => as_vector(index),
                    _ => as_map(index),
                }
            }
            "BatchNormalization" => {
                known(node, &["epsilon", "momentum", "spatial", "training_mode"])?;
                if int(node, "training_mode").unwrap_or(0) != 0
                    || int(node, "spatial").unwrap_or(1) != 1
                {
                    return Err("expected the inference form over channels, found another; export the network in evaluation mode".into());
                }
                let x = self.either(input(node, 0)?)?;
                let channels = self.model.shape(x.index).channels;
                let mut tensors = Vec::new();
                for (at, what) in ["weight", "bias", "running_mean", "running_var"]
                    .into_iter()
                    .enumerate()
                {
                    tensors.push((what, self.per_channel(node, at + 1, channels)?));
                }
                let op = Op::BatchNorm {
                    epsilon: epsilon(node)?,
                    momentum: within_one(1.0 - float(node, "momentum").unwrap_or(0.9)),
                };
                let index = self.push(self.layer_name(node, 1), op, &[x.index])?;
                self.fill(&tensors);
                Value { index, ..x }
            }
            "InstanceNormalization" | "GroupNormalization" => {
                let x = self.value(input(node, 0)?)?;
                self.group_norm(node, x, &mut output)?
            }
            "LayerNormalization" => {
                known(node, &["axis", "epsilon", "stash_type"])?;
                let x = self.value(input(node, 0)?)?;
                let (index, rank) = match x.form {
                    Form::ChannelsLast => (x.index, 4),
                    Form::Vector => (self.flattened(x.index)?, 2),
                    _ => return Err("expected N×H×W×C or N×C, found another layout; normalise over the channels alone".into()),
                };
                let axis = int(node, "axis").unwrap_or(-1);
                if axis != -1 && axis != rank - 1 {
                    return Err(format!(
                        "expected the last axis, found {axis}; normalise over the channels alone"
                    ));
                }
                let channels = self.model.shape(index).channels;
                let weight = self.per_channel(node, 1, channels)?;
                let bias = match node.input.len() {
                    0..=2 => vec![0.0; channels],
                    _ => self.per_channel(node, 2, channels)?,
                };
                let op = Op::LayerNorm {
                    epsilon: epsilon(node)?,
                };
                let index = self.push(self.layer_name(node, 1), op, &[index])?;
                self.fill(&[("weight", weight), ("bias", bias)]);
                Value { index, ..x }
            }
            "Transpose" => {
                known(node, &["perm"])?;
                let x = self.values.get(input(node, 0)?).copied();
                let x = x.ok_or("expected an input that depends on the image, found another")?;
                let perm = ints(node, "perm").unwrap_or_default();
                let form = match (x.form, &perm[..]) {
                    (Form::Map, [0, 2, 3, 1]) => Form::ChannelsLast,
                    (Form::ChannelsLast, [0, 3, 1, 2]) => Form::Map,
                    _ => {
                        return Err(format!(
                            "expected N×C×H×W to N×H×W×C or back, found perm {perm:?}"
                        ));
                    }
                };
                Value { form, ..x }
            }
            "Dropout" => {
                known(node, &["ratio", "seed"])?;
                let x = self.value(input(node, 0)?)?;
                let ratio = self
                    .floats(node, 1)?
                    .and_then(Constant::scalar)
                    .or(float(node, "ratio"))
                    .unwrap_or(0.5);
                match ratio > 0.0 && ratio < 1.0 {
                    true => Value {
                        index: self.push(None, Op::Dropout { probability: ratio }, &[x.index])?,
                        ..x
                    },
                    false => x,
                }
            }
            "Identity" => self.value(input(node, 0)?)?,
            "Cast" => {
                known(node, &["to", "saturate", "round_mode"])?;
                let x = self.values.get(input(node, 0)?).copied();
                let x = x.ok_or("expected an input that depends on the image, found another")?;
                if int(node, "to") != Some(i64::from(FLOAT)) {
                    return Err("expected a cast to float32, found another".into());
                }
                match x.form {
                    Form::Image => as_map(x.index),
                    _ => x,
                }
            }
            "Add" | "Sum" | "Mul" | "Sub" | "Div" => {
                known(node, &[])?;
                self.arithmetic(node)?
            }
            "Concat" => {
                known(node, &["axis"])?;
                let mut inputs = Vec::new();
                for name in &node.input {
                    inputs.push(self.either(name)?);
                }
                let form = inputs.first().map_or(Form::Map, |x| x.form);
                let axis = int(node, "axis").unwrap_or(0);
                let last = if form == Form::Map { -3 } else { -1 };
                if inputs.iter().any(|x| x.form != form) || (axis != 1 && axis != last) {
                    return Err(format!(
                        "expected maps or vectors side by side along axis 1, found axis {axis} or both"
                    ));
                }
                let index = match &inputs[..] {
                    [one] => one.index,
                    several => {
                        let several: Vec<usize> = several.iter().map(|x| x.index).collect();
                        self.push(None, Op::Concat, &several)?
                    }
                };
                Value { index, form }
            }
            "Flatten" => {
                known(node, &["axis"])?;
                let x = self.value(input(node, 0)?)?;
                match (x.form, int(node, "axis").unwrap_or(1)) {
                    (Form::Map, 1 | -3) | (Form::Vector, 1 | -1) => as_vector(x.index),
                    (_, axis) => {
                        return Err(format!(
                            "expected axis 1 of N×C×H×W, found axis {axis} or another input"
                        ));
                    }
                }
            }
            "Reshape" => self.reshape(node)?,
            "Unsqueeze" | "Squeeze" => {
                known(node, &["axes"])?;
                let x = self.value(input(node, 0)?)?;
                let axes = ints(node, "axes")
                    .or_else(|| self.integers(node, 1))
                    .unwrap_or_default();
                let one_place = self.model.shape(x.index).positions() == 1;
                let form = match (op, x.form, &axes[..]) {
                    ("Unsqueeze", Form::Vector, [2 | -1]) => Form::Column,
                    ("Unsqueeze", Form::Column, [2 | 3 | -1 | -2]) => Form::Map,
                    ("Unsqueeze", Form::Vector, [2, 3] | [-2, -1] | [-1, -2]) => Form::Map,
                    ("Squeeze", Form::Map, [2, 3] | [-2, -1] | [-1, -2]) if one_place => {
                        Form::Vector
                    }
                    ("Squeeze", Form::Map, [2 | 3 | -1 | -2]) if one_place => Form::Column,
                    ("Squeeze", Form::Column, [2 | -1]) => Form::Vector,
                    _ => {
                        return Err(format!(
                            "expected the axes 2 and 3 of N×C or N×C×1×1, found {axes:?}"
                        ));
                    }
                };
                let index = match x.form {
                    Form::Vector => self.flattened(x.index)?,
                    _ => x.index,
                };
                Value { index, form }
            }
            "Pad" => self.pad(node)?,
            "Softmax" | "LogSoftmax" => {
                known(node, &["axis"])?;
                let x = self.value(input(node, 0)?)?;
                let axis = int(node, "axis").unwrap_or(if self.opset < 13 { 1 } else { -1 });
                if self.graph.output[0].name != output
                    || x.form != Form::Vector
                    || (axis != 1 && axis != -1)
                {
                    return Err(
                        "expected it over the classes, at the end, found it elsewhere".into(),
                    );
                }
                self.notes.push(format!(
                    "the {} at the end is left out: wgrad's networks end in logits",
                    op.to_lowercase()
                ));
                x
            }
            _ => {
                return Err(format!(
                    "expected an operation that wgrad has, found {}; it has convolution, dense layers, pooling, normalisations, common activations, sums, concatenation, and scaling by channel",
                    printable(op)
                ));
            }
        };
        Ok((value, output))
    }

    fn convolution(&mut self, node: &'a NodeProto) -> Found<usize> {
        known(
            node,
            &[
                "auto_pad",
                "dilations",
                "group",
                "kernel_shape",
                "pads",
                "strides",
            ],
        )?;
        let value = self.value(input(node, 0)?)?;
        let (x, extra) = match value.form {
            Form::Map => (value.index, [[0; 2]; 2]),
            Form::Padded(sides) => (value.index, sides),
            _ => return Err("expected an input of N×C×H×W, found another".into()),
        };
        let weight = self.required(node, 1)?;
        let [outputs, per_group, height, width] = weight.dims[..] else {
            return Err(format!(
                "expected a weight of OC×C×KH×KW, found {:?}",
                weight.dims
            ));
        };
        let values = weight.floats().unwrap_or_default().to_vec();
        let kernel = [height, width];
        kernel_is(node, kernel)?;
        let groups = size(int(node, "group").unwrap_or(1))?;
        let shape = self.model.shape(x);
        if per_group.checked_mul(groups) != Some(shape.channels) {
            return Err(format!(
                "expected a weight for {} channels in {groups} groups, found {:?}",
                shape.channels, weight.dims
            ));
        }
        let stride = pair(node, "strides")?.unwrap_or([1, 1]);
        let dilation = pair(node, "dilations")?.unwrap_or([1, 1]);
        let mut sides = sides(node, shape, kernel, stride, dilation)?;
        for axis in [0, 1] {
            for side in [0, 1] {
                sides[axis][side] += extra[axis][side];
            }
        }
        let bias = match self.floats(node, 2)? {
            Some(_) => Some(self.per_channel(node, 2, outputs)?),
            None => None,
        };
        let made = Conv2d::dilated(shape, outputs, kernel, stride, sides, dilation);
        let made = made
            .and_then(|g| g.grouped(groups))
            .map_err(|error| match error {
                Error::Shape { what, .. } => what,
                other => other.to_string(),
            })?;
        let made = match bias {
            Some(_) => made,
            None => made.without_bias(),
        };
        let index = self.push(self.layer_name(node, 1), Op::Conv2d(made), &[x])?;
        self.fill(&[("weight", values)]);
        if let Some(bias) = bias {
            self.fill(&[("bias", bias)]);
        }
        Ok(index)
    }

    fn dense(&mut self, node: &'a NodeProto, output: &mut &'a str) -> Found<usize> {
        let gemm = node.op_type == "Gemm";
        known(
            node,
            if gemm {
                &["alpha", "beta", "transA", "transB"]
            } else {
                &[]
            },
        )?;
        let is = |key, expected| float(node, key).unwrap_or(expected) == expected;
        if !is("alpha", 1.0) || !is("beta", 1.0) || int(node, "transA").unwrap_or(0) != 0 {
            return Err(
                "expected x·W + b (alpha 1, beta 1, transA 0), found another product".into(),
            );
        }
        let x = self.value(input(node, 0)?)?;
        let weight = self.required(node, 1)?;
        let values = weight.floats().unwrap_or_default();
        let ([a, b], Form::Vector) = (&weight.dims[..], x.form) else {
            return Err(format!(
                "expected N×C times a matrix, found a weight of {:?} or another input; flatten it first",
                weight.dims
            ));
        };
        let transposed = int(node, "transB").unwrap_or(0) != 0;
        let (outputs, inputs) = if transposed { (*a, *b) } else { (*b, *a) };
        if inputs != self.model.shape(x.index).elements() || outputs == 0 {
            return Err(format!(
                "expected a weight for {} inputs, found {:?}",
                self.model.shape(x.index).elements(),
                weight.dims
            ));
        }
        let values = match transposed {
            true => values.to_vec(),
            false => (0..outputs)
                .flat_map(|o| (0..inputs).map(move |i| values[i * outputs + o]))
                .collect(),
        };
        let mut name = self.layer_name(node, 1);
        // In a product of its own the bias is the next node's.
        let mut bias = None;
        let next = self.sole_taker(output).map(|i| (i, &self.graph.node[i]));
        if let (false, Some((i, add))) = (gemm, next)
            && add.op_type == "Add"
            && let Some(at) = add
                .input
                .iter()
                .position(|name| self.constants.contains_key(name))
        {
            bias = Some(self.per_channel(add, at, outputs)?);
            name = name.or(add.input[at].strip_suffix(".bias"));
            self.done.insert(i);
            *output = add
                .output
                .first()
                .ok_or("expected a node with an output behind it, found none")?;
        } else if self.floats(node, 2)?.is_some() {
            let constant = self.required(node, 2)?;
            bias = Some(match constant.scalar() {
                Some(value) => vec![value; outputs],
                None => self.per_channel(node, 2, outputs)?,
            });
        }
        let geometry = Conv2d::dense(inputs, outputs);
        let geometry = match bias {
            Some(_) => geometry,
            None => geometry.without_bias(),
        };
        let index = self.push(name, Op::Dense(geometry), &[x.index])?;
        self.fill(&[("weight", values)]);
        if let Some(bias) = bias {
            self.fill(&[("bias", bias)]);
        }
        Ok(index)
    }

    fn pool(&mut self, node: &'a NodeProto) -> Found<usize> {
        known(
            node,
            &[
                "auto_pad",
                "ceil_mode",
                "count_include_pad",
                "dilations",
                "kernel_shape",
                "pads",
                "storage_order",
                "strides",
            ],
        )?;
        let is_max = node.op_type == "MaxPool";
        let value = self.value(input(node, 0)?)?;
        let (x, zeros) = match value.form {
            Form::Map => (value.index, None),
            // Zeros that count like the image's.
            Form::Padded(sides) if !is_max => (value.index, Some(sides)),
            _ => {
                return Err(
                    "expected an input of N×C×H×W without padding of its own, found another".into(),
                );
            }
        };
        let kernel = pair(node, "kernel_shape")?.ok_or("expected a kernel_shape, found none")?;
        let stride = pair(node, "strides")?.unwrap_or([1, 1]);
        if pair(node, "dilations")?.is_some_and(|dilation| dilation != [1, 1])
            || int(node, "storage_order").unwrap_or(0) != 0
        {
            return Err("expected dilations of 1 and storage_order 0, found others".into());
        }
        let shape = self.model.shape(x);
        let mut padding = sides(node, shape, kernel, stride, [1, 1])?;
        let mut ceil = int(node, "ceil_mode").unwrap_or(0) != 0;
        // Of a maximum it means nothing; as a model file has it where it says nothing.
        let mut counted = is_max || int(node, "count_include_pad").unwrap_or(0) != 0;
        if let Some(zeros) = zeros {
            // What a window reaches beyond them is no padding of ours.
            if padding.iter().any(|[before, _]| *before != 0) || (counted && padding != [[0; 2]; 2])
            {
                return Err(
                    "expected no padding beside that of the Pad before it, found some".into(),
                );
            }
            ceil |= padding != [[0; 2]; 2];
            let beyond = padding;
            (padding, counted) = (zeros, true);
            let pool = pool(shape, kernel, stride, padding, ceil, counted)?;
            let rest: [bool; 2] = [0, 1].map(|axis| {
                let padded = [shape.height, shape.width][axis]
                    + zeros[axis][0]
                    + zeros[axis][1]
                    + beyond[axis][1];
                let outputs = [pool.output.height, pool.output.width][axis];
                padded >= kernel[axis] && (padded - kernel[axis]) / stride[axis] + 1 == outputs
            });
            if rest != [true; 2] && int(node, "ceil_mode").unwrap_or(0) == 0 {
                return Err(
                    "expected windows that begin on the image, found some in the padding".into(),
                );
            }
        }
        if is_max && kernel[0].saturating_mul(kernel[1]) > 256 {
            return Err(format!(
                "expected a window of at most 256 places, found {}×{}",
                kernel[0], kernel[1]
            ));
        }
        let pool = pool(shape, kernel, stride, padding, ceil, counted)?;
        let op = if is_max {
            Op::MaxPool2d(pool)
        } else {
            Op::MeanPool2d(pool)
        };
        self.push(None, op, &[x])
    }

    fn global(&mut self, x: usize, is_max: bool) -> Found<usize> {
        let shape = self.model.shape(x);
        let kernel = [shape.height, shape.width];
        let pool = pool(shape, kernel, kernel, [[0; 2]; 2], false, false)?;
        match is_max {
            true if shape.positions() > 256 => Err(format!(
                "expected a window of at most 256 places, found {shape}"
            )),
            true => self.push(None, Op::MaxPool2d(pool), &[x]),
            // As the layer of that name has it.
            false => {
                let pool = Pool2d {
                    stride: [1, 1],
                    ..pool
                };
                self.push(None, Op::MeanPool2d(pool), &[x])
            }
        }
    }

    fn group_norm(&mut self, node: &'a NodeProto, x: Value, output: &mut &'a str) -> Found<Value> {
        known(node, &["epsilon", "num_groups", "stash_type"])?;
        let epsilon = epsilon(node)?;
        let shape = self.model.shape(x.index);
        let channels = shape.channels;
        let spread = |values: Vec<f32>, groups: usize| -> Vec<f32> {
            let each = channels / groups.max(1);
            values.into_iter().flat_map(|v| vec![v; each]).collect()
        };
        let (groups, weight, bias, form, name) = match (node.op_type.as_str(), x.form) {
            ("GroupNormalization", Form::Map) => {
                let groups = size(int(node, "num_groups").unwrap_or(0))?;
                let of = |at| match self.required(node, at)?.len() {
                    // A number for each group, before opset 21.
                    n if n == groups && n != channels => {
                        Ok(spread(self.per_channel(node, at, groups)?, groups))
                    }
                    _ => self.per_channel(node, at, channels),
                };
                (groups, of(1)?, of(2)?, Form::Map, self.layer_name(node, 1))
            }
            ("InstanceNormalization", Form::Map) => (
                channels,
                self.per_channel(node, 1, channels)?,
                self.per_channel(node, 2, channels)?,
                Form::Map,
                self.layer_name(node, 1),
            ),
            ("InstanceNormalization", Form::Grouped(groups)) => {
                let mut weight = spread(self.per_channel(node, 1, groups)?, groups);
                let mut bias = spread(self.per_channel(node, 2, groups)?, groups);
                // Back to the map, then perhaps a factor and a summand for each channel.
                let back = self
                    .next(output, "Reshape")
                    .ok_or("expected a Reshape back behind it, found none")?;
                *output = &back.output[0];
                let sizes = self.integers(back, 1).unwrap_or_default();
                let form = match sizes.len() {
                    4 => Form::Map,
                    2 if shape.positions() == 1 => Form::Vector,
                    _ => {
                        return Err(format!(
                            "expected a Reshape back to {shape} behind it, found {sizes:?}"
                        ));
                    }
                };
                let mut name = None;
                if let Some(mul) = self.next(output, "Mul") {
                    *output = &mul.output[0];
                    let at = self.constant_input(mul)?;
                    let factors = self.along_channels(mul, at, channels, form)?;
                    name = self.layer_name(mul, at);
                    for (c, factor) in factors.iter().enumerate() {
                        weight[c] *= factor;
                        bias[c] *= factor;
                    }
                }
                if let Some(add) = self.next(output, "Add") {
                    *output = &add.output[0];
                    let at = self.constant_input(add)?;
                    let summands = self.along_channels(add, at, channels, form)?;
                    bias.iter_mut().zip(summands).for_each(|(b, s)| *b += s);
                }
                (groups, weight, bias, form, name)
            }
            _ => return Err("expected an input of N×C×H×W, found another".into()),
        };
        let index = self.push(name, Op::GroupNorm { groups, epsilon }, &[x.index])?;
        self.fill(&[("weight", weight), ("bias", bias)]);
        Ok(Value { index, form })
    }

    /// The node of that kind that alone takes a value; with a constant, where it takes two. It is done then.
    fn next(&mut self, name: &str, op: &str) -> Option<&'a NodeProto> {
        let i = self.sole_taker(name)?;
        let node = &self.graph.node[i];
        if node.op_type == op {
            for input in node.input.iter().filter(|input| *input != name) {
                self.resolve(input, &mut HashSet::new()).ok()?;
            }
        }
        let constant = node
            .input
            .iter()
            .any(|name| self.constants.contains_key(name));
        let taken =
            node.op_type == op && constant && node.output.len() == 1 && node.input.len() == 2;
        (taken && self.done.insert(i)).then_some(node)
    }

    fn constant_input(&self, node: &NodeProto) -> Found<usize> {
        let at = node
            .input
            .iter()
            .position(|name| self.constants.contains_key(name));
        at.ok_or_else(|| "expected a constant among the inputs, found none".into())
    }

    /// A constant that has a number for each channel of a map or a vector.
    fn along_channels(
        &self,
        node: &NodeProto,
        at: usize,
        channels: usize,
        form: Form,
    ) -> Found<Vec<f32>> {
        let constant = self.required(node, at)?;
        let dims = match (form, &constant.dims[..]) {
            (_, []) => vec![],
            (Form::Vector, dims) => dims.to_vec(),
            (_, [dims @ .., 1, 1]) => dims.to_vec(),
            // One number for all, or one for each column: no channels.
            (_, dims) if dims.iter().all(|n| *n == 1) => vec![],
            (_, dims) => return Err(format!("expected a constant of C×1×1, found {dims:?}")),
        };
        let values = constant.floats().unwrap_or_default();
        match (values, &dims[..]) {
            ([one], _) => Ok(vec![*one; channels]),
            (_, [n] | [1, n]) if *n == channels => Ok(values.to_vec()),
            _ => Err(format!(
                "expected a constant for {channels} channels, found {:?}",
                constant.dims
            )),
        }
    }

    fn arithmetic(&mut self, node: &'a NodeProto) -> Found<Value> {
        let op = node.op_type.as_str();
        if node
            .input
            .iter()
            .any(|name| self.constants.contains_key(name))
        {
            return self.normalise(node);
        }
        let mut inputs = Vec::new();
        for name in &node.input {
            inputs.push(self.either(name)?);
        }
        let form = inputs.first().map_or(Form::Map, |x| x.form);
        let indices: Vec<usize> = inputs.iter().map(|x| x.index).collect();
        let same = inputs.iter().all(|x| x.form == form);
        let index = match (op, &indices[..]) {
            ("Sum", [one]) => *one,
            ("Add" | "Sum", _) if same => self.push(None, Op::Add, &indices)?,
            ("Mul", [a, b]) if same && form == Form::Map => {
                let one_place = |x: usize| self.model.shape(x).positions() == 1;
                match one_place(*b) {
                    true => self.push(None, Op::Scale, &[*a, *b])?,
                    false if one_place(*a) => self.push(None, Op::Scale, &[*b, *a])?,
                    false => {
                        return Err(
                            "expected a map times factors of N×C×1×1, found two maps".into()
                        );
                    }
                }
            }
            _ => return Err(
                "expected a sum of equal shapes, or a map times factors of N×C×1×1, found another"
                    .into(),
            ),
        };
        Ok(Value { index, form })
    }

    /// Arithmetic with constants: what is done to the images before the network.
    fn normalise(&mut self, node: &'a NodeProto) -> Found<Value> {
        let at = self.constant_input(node)?;
        let channels = self.model.input.channels;
        let [a, b] = &node.input[..] else {
            return Err("expected two inputs, found another number".into());
        };
        let x = self.value(if at == 0 { b } else { a })?;
        if x != (Value {
            index: 0,
            form: Form::Map,
        }) || (at == 0 && ["Sub", "Div"].contains(&&*node.op_type))
        {
            return Err("expected arithmetic with constants on the images alone, before the first layer, found it elsewhere".into());
        }
        let constant = self.along_channels(node, at, channels, Form::Map)?;
        let [mut scale, mut shift] = self
            .affine
            .take()
            .unwrap_or([vec![1.0; channels], vec![0.0; channels]]);
        for c in 0..channels {
            let value = f64::from(constant[c]);
            match node.op_type.as_str() {
                "Mul" => (scale[c], shift[c]) = (scale[c] * value, shift[c] * value),
                "Div" => (scale[c], shift[c]) = (scale[c] / value, shift[c] / value),
                "Add" | "Sum" => shift[c] += value,
                _ => shift[c] -= value,
            }
        }
        let both = scale.iter().chain(&shift).map(|v| *v as f32).collect();
        self.normalization = Some(both);
        self.affine = Some([scale, shift]);
        Ok(x)
    }

    fn reshape(&mut self, node: &'a NodeProto) -> Found<Value> {
        known(node, &["allowzero"])?;
        let x = self.value(input(node, 0)?)?;
        let Some(sizes) = self.integers(node, 1) else {
            return Err("expected a shape that is known, found one that is computed".into());
        };
        let shape = self.model.shape(x.index);
        let Shape {
            height,
            width,
            channels,
        } = shape;
        let wrong = || {
            format!("expected N×C×H×W, N×C or groups of channels, found {sizes:?}")
                .replace(&BATCH.to_string(), "N")
        };
        let [first, rest @ ..] = &sizes[..] else {
            return Err(wrong());
        };
        let batch = *first == BATCH
            || *first == 0
            || *first == -1
            || self.batch.is_some_and(|n| *first == n as i64);
        let is =
            |size: i64, expected: usize| size == expected as i64 || (size == -1 && *first != -1);
        let all = shape.elements();
        let form = match (x.form, rest) {
            _ if !batch => return Err(wrong()),
            (Form::Map | Form::Vector, [size]) if is(*size, all) => Form::Vector,
            (Form::Map | Form::Vector, [c, h, w])
                if [is(*c, channels), is(*h, height), is(*w, width)] == [true; 3] =>
            {
                Form::Map
            }
            (Form::Map, [c, h, w]) if *c == 0 && is(*h, height) && is(*w, width) => Form::Map,
            (Form::Vector, [c, 1, 1]) if is(*c, all) => {
                let index = self.flattened(x.index)?;
                return Ok(Value {
                    index,
                    form: Form::Map,
                });
            }
            (Form::Map | Form::Vector, [groups, size])
                if *groups > 0 && (x.form == Form::Map || shape.positions() == 1) =>
            {
                let groups = super::attributes::size(*groups)?;
                if !channels.is_multiple_of(groups) || !(is(*size, all / groups)) {
                    return Err(wrong());
                }
                Form::Grouped(groups)
            }
            _ => return Err(wrong()),
        };
        Ok(Value { form, ..x })
    }

    fn pad(&mut self, node: &'a NodeProto) -> Found<Value> {
        known(node, &["mode", "pads", "value"])?;
        let x = self.map(node)?;
        let zero = float(node, "value").unwrap_or(0.0) == 0.0
            && self
                .floats(node, 2)?
                .is_none_or(|constant| constant.scalar() == Some(0.0));
        let pads = ints(node, "pads")
            .or_else(|| self.integers(node, 1))
            .unwrap_or_default();
        let last = match self.integers(node, 3) {
            // Those of the named axes alone.
            Some(axes) if axes == [2, 3] && pads.len() == 4 => [
                vec![0, 0],
                pads[..2].to_vec(),
                vec![0, 0],
                pads[2..].to_vec(),
            ]
            .concat(),
            Some(_) => Vec::new(),
            None => pads,
        };
        match (&last[..], text(node, "mode").unwrap_or("constant")) {
            ([0, 0, top, left, 0, 0, bottom, right], "constant") if zero => {
                let sides = [
                    [at_least_zero(*top)?, at_least_zero(*bottom)?],
                    [at_least_zero(*left)?, at_least_zero(*right)?],
                ];
                Ok(Value {
                    index: x,
                    form: Form::Padded(sides),
                })
            }
            _ => Err("expected zeros around height and width, found another padding".into()),
        }
    }
}
