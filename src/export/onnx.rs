//! ONNX files of trained networks.
//!
//! Opset 17, IR version 8: what onnxruntime reads since 1.12, and what every other reader of note does.
//! Later opsets have GELU (20) and group normalisation (21) in one node; here they are the nodes that
//! PyTorch writes for them. Maps are N×C×H×W, vectors N×C; a flattened map is in PyTorch's order, as are
//! the weights, so that the graph needs no transposition but for a layer normalisation of maps.

use super::proto::*;
use super::safetensors::{Tensor, running_to_pytorch, to_pytorch};
use crate::error::{Error, Result};
use crate::model::{Activation, Conv2d, Layer, Loss, Model, Op, Pool2d};
use prost::Message;
use serde_json::json;
use std::collections::HashMap;

/// The opset that is written.
pub const OPSET: i64 = 17;
/// The IR version that goes with it.
const IR_VERSION: i64 = 8;
/// Most bytes that a protobuf message may have.
pub(super) const MAX_BYTES: u64 = (1 << 31) - 1;

/// What goes into an ONNX file beside the network.
#[derive(Clone, Debug, Default)]
pub struct OnnxOptions<'a> {
    /// In the order of the outputs.
    pub class_names: &'a [String],
    /// Scale per channel, then shift per channel: the network's input is byte · scale + shift.
    pub normalization: &'a [f32],
    /// Whether the graph does that itself: then it takes uint8 images, else float32 that are normalised.
    pub with_normalization: bool,
    /// Whether the graph ends in probabilities instead of logits.
    pub with_softmax: bool,
    /// Further keys and values of the metadata.
    pub metadata: &'a [(String, String)],
}

/// The bytes of an ONNX file: from `input`, `[batch, C, H, W]`, to `logits` (or `probabilities`),
/// `[batch, classes]`, for any batch. The metadata have `class_names` (a JSON array), `normalization` (JSON,
/// scale and shift per channel, and whether the graph applies them) and `loss`. The same input gives the
/// same bytes.
///
/// # Errors
/// [`Error::Usage`] for a network above 2 GiB, which is all that an ONNX file holds, and for probabilities of
/// a network that was not trained to give any; [`Error::Shape`] for vectors that are not as long as the
/// model's.
pub fn write_onnx(
    model: &Model,
    parameters: &[f32],
    running: &[f32],
    options: &OnnxOptions,
) -> Result<Vec<u8>> {
    let too_large = |bytes: u64| {
        Err(Error::Usage(format!(
            "expected at most {MAX_BYTES} bytes in an ONNX file, found {bytes} for model '{}'; export it with --safetensors",
            model.name
        )))
    };
    let bytes = 4 * (model.parameter_count() as u64);
    if bytes > MAX_BYTES {
        return too_large(bytes);
    }
    if options.with_softmax && model.loss != Loss::SoftmaxCrossEntropy {
        return Err(Error::Usage(format!(
            "expected a network trained by softmax_cross_entropy for probabilities, found {}; its outputs are used as they are: leave --with-softmax out",
            model.loss.name()
        )));
    }
    let channels = model.input.channels;
    for (what, found, expected) in [
        ("parameters", parameters.len(), model.parameter_elements),
        ("running statistics", running.len(), model.running_elements),
        (
            "scales and shifts",
            options.normalization.len(),
            2 * channels,
        ),
    ] {
        if found != expected {
            return Err(Error::Shape {
                operation: "write_onnx",
                what: format!("expected {expected} {what}, found {found}"),
            });
        }
    }

    let mut tensors = to_pytorch(model, parameters);
    tensors.extend(running_to_pytorch(model, running));
    let tensors = tensors.into_iter().map(|t| (t.name.clone(), t)).collect();
    let mut graph = Graph {
        tensors,
        nodes: Vec::new(),
        initializers: Vec::new(),
        values: Vec::new(),
    };
    graph.network(model, options);
    let output = match options.with_softmax {
        true => "probabilities",
        false => "logits",
    };
    graph.end(model, options, output);

    let (scale, shift) = options.normalization.split_at(channels);
    let normalization = json!({
        "formula": "input = byte * scale + shift, per channel",
        "scale": scale,
        "shift": shift,
        "in_graph": options.with_normalization,
    });
    let entries = [
        ("class_names", json!(options.class_names).to_string()),
        ("normalization", normalization.to_string()),
        ("loss", model.loss.name().to_string()),
    ];
    let entries = entries.map(|(key, value)| (key.to_string(), value));
    let metadata = entries.iter().chain(options.metadata);
    let shape = model.input;
    let element = match options.with_normalization {
        true => UINT8,
        false => FLOAT,
    };
    let file = ModelProto {
        ir_version: IR_VERSION,
        opset_import: vec![OperatorSetIdProto {
            domain: String::new(),
            version: OPSET,
        }],
        producer_name: "wgrad".into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        graph: Some(GraphProto {
            node: graph.nodes,
            name: model.name.clone(),
            initializer: graph.initializers,
            input: vec![value(
                "input",
                element,
                &[shape.channels, shape.height, shape.width],
            )],
            output: vec![value(output, FLOAT, &[model.classes])],
        }),
        metadata_props: metadata
            .map(|(key, value)| StringStringEntryProto {
                key: key.clone(),
                value: value.clone(),
            })
            .collect(),
    };
    let bytes = file.encoded_len() as u64;
    if bytes > MAX_BYTES {
        return too_large(bytes);
    }
    Ok(file.encode_to_vec())
}

/// A value of these sizes behind the batch.
fn value(name: &str, elem_type: i32, sizes: &[usize]) -> ValueInfoProto {
    let batch = DimensionProto {
        dim_value: None,
        dim_param: Some("batch".into()),
    };
    let sizes = sizes.iter().map(|size| DimensionProto {
        dim_value: Some(*size as i64),
        dim_param: None,
    });
    let dim = std::iter::once(batch).chain(sizes).collect();
    ValueInfoProto {
        name: name.into(),
        r#type: Some(TypeProto {
            tensor_type: Some(TensorTypeProto {
                elem_type,
                shape: Some(TensorShapeProto { dim }),
            }),
        }),
    }
}

/// A function of one value as a tree of nodes, for functions that no node of the opset computes.
#[derive(Clone, Debug)]
pub(super) enum Tree {
    X,
    Constant(f32),
    Node(&'static str, Vec<Tree>),
}

impl Activation {
    /// As the nodes that PyTorch writes, where there is no single one.
    pub(super) fn tree(&self) -> Option<Tree> {
        use Tree::{Constant, X};
        let node = |op, inputs: [Tree; 2]| Tree::Node(op, inputs.into());
        let of = |op, input| Tree::Node(op, vec![input]);
        Some(match self {
            Activation::Silu => node("Mul", [X, of("Sigmoid", X)]),
            Activation::Gelu => {
                let erf = of("Erf", node("Div", [X, Constant(std::f32::consts::SQRT_2)]));
                let sum = node("Add", [erf, Constant(1.0)]);
                node("Mul", [node("Mul", [X, sum]), Constant(0.5)])
            }
            Activation::GeluTanh => {
                let cube = node("Pow", [X, Constant(3.0)]);
                let sum = node("Add", [X, node("Mul", [cube, Constant(0.044715)])]);
                // √(2/π).
                let tanh = of("Tanh", node("Mul", [sum, Constant(0.797_884_6)]));
                let sum = node("Add", [tanh, Constant(1.0)]);
                node("Mul", [node("Mul", [X, sum]), Constant(0.5)])
            }
            _ => return None,
        })
    }
}

/// For each output of the model its place among those of the last value flattened in PyTorch's order, where
/// these differ: a map with several places, or one that was flattened.
pub(super) fn output_order(model: &Model) -> Option<Vec<usize>> {
    let last = model.layers.len();
    let shape = model.shape(last);
    let orders = model.channel_orders();
    let places = |channel: &usize| {
        let channel = *channel;
        (0..shape.positions()).map(move |p| p * shape.channels + channel)
    };
    let here: Vec<usize> = orders[last].iter().flat_map(places).collect();
    let mut there = vec![0; here.len()];
    for (i, place) in here.iter().enumerate() {
        there[*place] = i;
    }
    (!there.iter().copied().eq(0..there.len())).then_some(there)
}

/// A value of the network in the graph.
#[derive(Clone)]
struct Emitted {
    name: String,
    /// `[N, C, H, W]`; `[N, C]` otherwise.
    is_map: bool,
}

#[derive(Default)]
struct Graph {
    tensors: HashMap<String, Tensor>,
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
    /// See [`Layer::inputs`].
    values: Vec<Emitted>,
}

impl Graph {
    fn network(&mut self, model: &Model, options: &OnnxOptions) {
        let mut name = "input".to_string();
        if options.with_normalization {
            let to = vec![int("to", i64::from(FLOAT))];
            name = self.node("Cast", "normalization/float", &[&name], to);
            let channels = model.input.channels;
            let halves = options.normalization.split_at(channels);
            for (op, what, values) in [("Mul", "scale", halves.0), ("Add", "shift", halves.1)] {
                let constant = format!("normalization/{what}s");
                self.floats(&constant, &[1, channels, 1, 1], values);
                let node = format!("normalization/{what}");
                name = self.node(op, &node, &[&name, &constant], Vec::new());
            }
        }
        self.values.push(Emitted { name, is_map: true });
        for layer in &model.layers {
            let mut value = self.operation(model, layer);
            if let Some(activation) = &layer.activation {
                let node = format!("{}/{}", layer.name, activation.name());
                value.name = self.activation(activation, &node, &value.name);
            }
            self.values.push(value);
        }
    }

    /// Gives the last value the classes' order and its name.
    fn end(&mut self, model: &Model, options: &OnnxOptions, output: &str) {
        let last = model.layers.len();
        let mut name = self.vector(last, "output");
        if let Some(order) = output_order(model) {
            let order: Vec<i64> = order.iter().map(|place| *place as i64).collect();
            self.integers("output/order", &order);
            let axis = vec![int("axis", 1)];
            name = self.node("Gather", "output/gather", &[&name, "output/order"], axis);
        }
        if options.with_softmax {
            let axis = vec![int("axis", 1)];
            name = self.node("Softmax", "output/softmax", &[&name], axis);
        }
        // What nobody else takes gets the name; a model whose last layers are no nodes has none of its own.
        let by_itself = self.nodes.last().is_some_and(|n| n.output[0] == name)
            && !self.nodes.iter().any(|n| n.input.contains(&name));
        match self.nodes.last_mut() {
            Some(node) if by_itself => node.output[0] = output.into(),
            _ => {
                self.node("Identity", "output", &[&name], Vec::new());
                if let Some(node) = self.nodes.last_mut() {
                    node.output[0] = output.into();
                }
            }
        }
    }

    /// Adds a node, and says what its output is called.
    fn node(
        &mut self,
        op: &str,
        name: &str,
        inputs: &[&str],
        attribute: Vec<AttributeProto>,
    ) -> String {
        // Names of layers have no slash, so that no value is called as another.
        let output = format!("{name}/output");
        self.nodes.push(NodeProto {
            input: inputs.iter().map(|name| name.to_string()).collect(),
            output: vec![output.clone()],
            name: name.into(),
            op_type: op.into(),
            attribute,
            domain: String::new(),
        });
        output
    }

    fn floats(&mut self, name: &str, sizes: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.initializer(name, sizes, FLOAT, bytes);
    }

    fn integers(&mut self, name: &str, values: &[i64]) {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.initializer(name, &[values.len()], INT64, bytes);
    }

    fn initializer(&mut self, name: &str, sizes: &[usize], data_type: i32, raw_data: Vec<u8>) {
        self.initializers.push(TensorProto {
            dims: sizes.iter().map(|size| *size as i64).collect(),
            data_type,
            name: name.into(),
            raw_data,
            ..TensorProto::default()
        });
    }

    /// Adds a layer's parameters, and says what they are called. Of a vector with `sizes` sizes behind its
    /// own, where there are any.
    fn parameters(&mut self, layer: &Layer, trailing: usize) -> Vec<String> {
        let mut names = Vec::new();
        for parameter in layer.parameters.iter().chain(&layer.running) {
            if let Some(tensor) = self.tensors.remove(&parameter.name) {
                let mut sizes = tensor.shape;
                sizes.extend(vec![1; trailing]);
                self.floats(&tensor.name, &sizes, &tensor.values);
                names.push(tensor.name);
            }
        }
        names
    }

    /// A value as `[N, C, H, W]`.
    fn map(&mut self, value: usize, layer: &str) -> String {
        let Emitted { name, is_map } = self.values[value].clone();
        if is_map {
            return name;
        }
        let axes = format!("{layer}/axes{value}");
        if !self.initializers.iter().any(|t| t.name == axes) {
            self.integers(&axes, &[2, 3]);
        }
        let node = format!("{layer}/map{value}");
        self.node("Unsqueeze", &node, &[&name, &axes], Vec::new())
    }

    /// A value as `[N, C]`, a map flattened in PyTorch's order.
    fn vector(&mut self, value: usize, layer: &str) -> String {
        let Emitted { name, is_map } = self.values[value].clone();
        match is_map {
            true => {
                let node = format!("{layer}/flatten");
                self.node("Flatten", &node, &[&name], vec![int("axis", 1)])
            }
            false => name,
        }
    }

    fn operation(&mut self, model: &Model, layer: &Layer) -> Emitted {
        let (first, name) = (layer.inputs[0], layer.name.as_str());
        let x = self.values[first].clone();
        match &layer.op {
            Op::Conv2d(g) => {
                let x = self.map(first, name);
                let inputs = [vec![x], self.parameters(layer, 0)].concat();
                self.emit("Conv", name, &inputs, convolution(g), true)
            }
            Op::Dense(_) => {
                let x = self.vector(first, name);
                let inputs = [vec![x], self.parameters(layer, 0)].concat();
                self.emit("Gemm", name, &inputs, vec![int("transB", 1)], false)
            }
            Op::MaxPool2d(pool) => {
                let x = self.map(first, name);
                self.emit("MaxPool", name, &[x], window(pool, pool.sides()), true)
            }
            Op::MeanPool2d(pool) => {
                let x = self.map(first, name);
                self.mean_pool(pool, name, x)
            }
            Op::Activation(activation) => Emitted {
                name: self.activation(activation, name, &x.name),
                is_map: x.is_map,
            },
            Op::BatchNorm { epsilon, momentum } => {
                let inputs = [vec![x.name], self.parameters(layer, 0)].concat();
                let attributes = vec![
                    float("epsilon", *epsilon),
                    float("momentum", 1.0 - momentum),
                ];
                self.emit("BatchNormalization", name, &inputs, attributes, x.is_map)
            }
            Op::GroupNorm { groups, epsilon } => self.group_norm(layer, *groups, *epsilon, x),
            Op::LayerNorm { epsilon } => {
                let mut inputs = vec![x.name];
                if x.is_map {
                    let (node, perm) = (format!("{name}/nhwc"), ints("perm", &[0, 2, 3, 1]));
                    inputs[0] = self.node("Transpose", &node, &[&inputs[0]], vec![perm]);
                }
                inputs.extend(self.parameters(layer, 0));
                let attributes = vec![int("axis", -1), float("epsilon", *epsilon)];
                let y = self.emit("LayerNormalization", name, &inputs, attributes, x.is_map);
                match x.is_map {
                    true => {
                        let (node, perm) = (format!("{name}/nchw"), ints("perm", &[0, 3, 1, 2]));
                        self.emit("Transpose", &node, &[y.name], vec![perm], true)
                    }
                    false => y,
                }
            }
            // It does nothing but in training.
            Op::Dropout { .. } => x,
            Op::Add | Op::Concat => {
                let inputs = layer.inputs.iter();
                let (inputs, is_map) = match inputs.clone().any(|v| self.values[*v].is_map) {
                    true => (inputs.map(|v| self.map(*v, name)).collect::<Vec<_>>(), true),
                    false => (
                        inputs.map(|v| self.values[*v].name.clone()).collect(),
                        false,
                    ),
                };
                if layer.op == Op::Concat {
                    return self.emit("Concat", name, &inputs, vec![int("axis", 1)], is_map);
                }
                let mut sum = inputs[0].clone();
                for (i, input) in inputs.iter().enumerate().skip(1) {
                    let node = match i + 1 == inputs.len() {
                        true => name.to_string(),
                        false => format!("{name}/{i}"),
                    };
                    sum = self.node("Add", &node, &[&sum, input], Vec::new());
                }
                Emitted { name: sum, is_map }
            }
            Op::Scale => {
                let inputs = [self.map(first, name), self.map(layer.inputs[1], name)];
                self.emit("Mul", name, &inputs, Vec::new(), true)
            }
            Op::Flatten => {
                debug_assert_eq!(model.shape(first), layer.input);
                Emitted {
                    name: self.vector(first, name),
                    is_map: false,
                }
            }
        }
    }

    fn emit(
        &mut self,
        op: &str,
        name: &str,
        inputs: &[String],
        attributes: Vec<AttributeProto>,
        is_map: bool,
    ) -> Emitted {
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        Emitted {
            name: self.node(op, name, &inputs, attributes),
            is_map,
        }
    }

    fn mean_pool(&mut self, pool: &Pool2d, name: &str, x: String) -> Emitted {
        if pool.is_global() {
            return self.emit("GlobalAveragePool", name, &[x], Vec::new(), true);
        }
        let over = pool.overhang();
        // What lies beyond the padding never counts, of which readers think differently: zeros that count
        // as if they were the image's, and padding that does not.
        if pool.count_include_pad && over != [0, 0] {
            let [top, left] = pool.padding.map(|p| p as i64);
            let [bottom, right] = pool.padding_after.map(|p| p as i64);
            let pads = format!("{name}/pads");
            self.integers(&pads, &[0, 0, top, left, 0, 0, bottom, right]);
            let x = self.node("Pad", &format!("{name}/pad"), &[&x, &pads], Vec::new());
            let pads = [[0, over[0]], [0, over[1]]];
            return self.emit("AveragePool", name, &[x], window(pool, pads), true);
        }
        let mut attributes = window(pool, pool.sides());
        attributes.push(int("count_include_pad", i64::from(pool.count_include_pad)));
        self.emit("AveragePool", name, &[x], attributes, true)
    }

    /// As PyTorch writes it: each group as one channel, then a factor and a summand for each channel.
    fn group_norm(&mut self, layer: &Layer, groups: usize, epsilon: f32, x: Emitted) -> Emitted {
        let name = layer.name.as_str();
        let [grouped, ones, zeros, shape] =
            ["grouped", "ones", "zeros", "shape"].map(|what| format!("{name}/{what}"));
        self.integers(&grouped, &[0, groups as i64, -1]);
        self.floats(&ones, &[groups], &vec![1.0; groups]);
        self.floats(&zeros, &[groups], &vec![0.0; groups]);
        let image = layer.input;
        let sizes = [image.channels, image.height, image.width].map(|size| size as i64);
        let rank = if x.is_map { 3 } else { 1 };
        self.integers(&shape, &[&[0], &sizes[..rank]].concat());
        let parameters = self.parameters(layer, rank - 1);

        let at = |what: &str| format!("{name}/{what}");
        let y = self.node("Reshape", &at("group"), &[&x.name, &grouped], Vec::new());
        let attributes = vec![float("epsilon", epsilon)];
        let inputs = [&*y, &*ones, &*zeros];
        let y = self.node("InstanceNormalization", &at("normal"), &inputs, attributes);
        let y = self.node("Reshape", &at("ungroup"), &[&y, &shape], Vec::new());
        let y = self.node("Mul", &at("weight"), &[&y, &parameters[0]], Vec::new());
        let y = self.node("Add", name, &[&y, &parameters[1]], Vec::new());
        Emitted {
            name: y,
            is_map: x.is_map,
        }
    }

    fn activation(&mut self, activation: &Activation, name: &str, x: &str) -> String {
        if let Some(tree) = activation.tree() {
            return self.tree(&tree, name, x, &mut 0);
        }
        let (op, attributes) = match activation {
            Activation::LeakyRelu { slope } => ("LeakyRelu", vec![float("alpha", *slope)]),
            Activation::Sigmoid => ("Sigmoid", Vec::new()),
            Activation::Tanh => ("Tanh", Vec::new()),
            Activation::HardSwish => ("HardSwish", Vec::new()),
            // The others have a tree.
            _ => ("Relu", Vec::new()),
        };
        self.node(op, name, &[x], attributes)
    }

    /// Adds the nodes of a tree, the last one called `name`.
    fn tree(&mut self, tree: &Tree, name: &str, x: &str, count: &mut usize) -> String {
        match tree {
            Tree::X => x.into(),
            Tree::Constant(value) => {
                *count += 1;
                let constant = format!("{name}/constant{count}");
                self.floats(&constant, &[], &[*value]);
                constant
            }
            Tree::Node(op, inputs) => {
                let node = match *count {
                    0 => name.to_string(),
                    n => format!("{name}/{n}"),
                };
                *count += 1;
                let inputs: Vec<String> = inputs
                    .iter()
                    .map(|input| self.tree(input, name, x, count))
                    .collect();
                let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
                self.node(op, &node, &inputs, Vec::new())
            }
        }
    }
}

fn attribute(name: &str, r#type: i32) -> AttributeProto {
    AttributeProto {
        name: name.into(),
        r#type,
        ..AttributeProto::default()
    }
}

fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto {
        f: Some(value),
        ..attribute(name, 1)
    }
}

fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        i: Some(value),
        ..attribute(name, 2)
    }
}

fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        ints: values.to_vec(),
        ..attribute(name, 7)
    }
}

fn pair(name: &str, values: [usize; 2]) -> AttributeProto {
    ints(name, &values.map(|value| value as i64))
}

/// `pads` of `[[top, bottom], [left, right]]`.
fn pads([[top, bottom], [left, right]]: [[usize; 2]; 2]) -> AttributeProto {
    ints("pads", &[top, left, bottom, right].map(|p| p as i64))
}

fn convolution(g: &Conv2d) -> Vec<AttributeProto> {
    vec![
        pair("kernel_shape", g.kernel),
        pair("strides", g.stride),
        pads(g.sides()),
        pair("dilations", g.dilation),
        int("group", g.groups as i64),
    ]
}

fn window(pool: &Pool2d, sides: [[usize; 2]; 2]) -> Vec<AttributeProto> {
    vec![
        pair("kernel_shape", pool.kernel),
        pair("strides", pool.stride),
        pads(sides),
    ]
}
