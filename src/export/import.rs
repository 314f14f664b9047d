//! Networks from ONNX files.
//!
//! What is read is what [`super::write_onnx`] writes and what PyTorch's exporters make of plain convolutional
//! networks. The graph is walked once, in its order; every node becomes a layer, or a part of one: an
//! activation goes into the layer before it, the nodes of a GELU are one activation. What cannot be a
//! layer of ours is refused with the node's name.

use super::onnx::Tree;
use super::proto::*;
use super::safetensors::from_pytorch;
use crate::error::{Error, Result};
use crate::model::{
    Activation, Conv2d, Definition, Loss, MAX_ELEMENTS, Model, Op, Pool2d, Shape, architecture,
    same_padding,
};
use prost::Message;
use serde_json::Value as Json;
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// What an ONNX file holds.
#[derive(Clone, Debug)]
pub struct Imported {
    pub model: Model,
    /// The text of an architecture file for it.
    pub architecture: String,
    /// The flat vectors.
    pub parameters: Vec<f32>,
    pub running: Vec<f32>,
    /// Where the file names them, as many as there are classes.
    pub class_names: Option<Vec<String>>,
    /// What the graph or the metadata say about the images, if anything: scale per channel, then shift per
    /// channel; the network's input is byte · scale + shift.
    pub normalization: Option<Vec<f32>>,
    /// What was left out, a line each.
    pub notes: Vec<String>,
}

/// Reads an ONNX file of opset 9 or later. `path` stands for it in messages and gives a model that has no
/// name its name.
///
/// # Errors
/// [`Error::Data`], with the node where there is one, for what is no ONNX file, damaged, or no network of our
/// operations.
pub fn read_onnx(bytes: &[u8], path: &Path) -> Result<Imported> {
    let error = |what: String| Error::data(path, what);
    let file = ModelProto::decode(bytes).map_err(|e| {
        error(format!(
            "expected an ONNX file, found another or a damaged one ({e}); use a copy of it"
        ))
    })?;
    let graph = file.graph.as_ref().filter(|graph| !graph.node.is_empty());
    let Some(graph) = graph else {
        return Err(error("expected an ONNX file with a graph of nodes, found none; use a file that an exporter wrote".into()));
    };
    let own = |id: &&OperatorSetIdProto| ["", "ai.onnx"].contains(&id.domain.as_str());
    let opset = file
        .opset_import
        .iter()
        .find(own)
        .map_or(0, |id| id.version);
    if opset < 9 {
        return Err(error(format!(
            "expected opset 9 or later, found {opset}; export it with a later one, such as 17"
        )));
    }
    let reader = Reader::new(&file, graph).and_then(Reader::read);
    let Reader {
        model,
        tensors,
        normalization,
        notes,
        ..
    } = reader.map_err(error)?;

    let properties = file.metadata_props.iter();
    let properties: HashMap<&str, &str> = properties
        .map(|entry| (entry.key.as_str(), entry.value.as_str()))
        .collect();
    let json = |key: &str| -> Option<Json> { serde_json::from_str(properties.get(key)?).ok() };
    let class_names = json("class_names")
        .and_then(|names| serde_json::from_value::<Vec<String>>(names).ok())
        .filter(|names| names.len() == model.classes);
    let normalization = normalization.or_else(|| {
        let found = json("normalization")?;
        let of = |key: &str| serde_json::from_value::<Vec<f32>>(found.get(key)?.clone()).ok();
        Some([of("scale")?, of("shift")?].concat())
            .filter(|both| both.len() == 2 * model.input.channels)
    });
    let mut model = model;
    if properties.get("loss") == Some(&Loss::SquaredError.name()) {
        model.loss = Loss::SquaredError;
    }
    model.name = model_name(&graph.name, path);
    let [parameters, running] = from_pytorch(&model, &tensors)?;
    let producer = [&*file.producer_name, &*file.producer_version].join(" ");
    let comment = format!(
        "Imported from an ONNX file that {} wrote.",
        printable(producer.trim())
    );
    let text = architecture(&model, &comment);
    // What the text means is what the rest of the program goes by.
    let definition = Definition::parse(&text, &format!("{}.toml", model.name))
        .map_err(|e| error(format!("expected what a model file can say, found otherwise: {e}")))?;
    let resolved = definition
        .resolve(model.input, model.classes)
        .map_err(|e| error(format!("expected what a model file can say, found otherwise: {e}")))?;
    if resolved != model {
        return Err(error("expected a network that a model file can describe, found another; please report this, with the file".into()));
    }
    Ok(Imported {
        model,
        architecture: text,
        parameters,
        running,
        class_names,
        normalization,
        notes,
    })
}

/// Without what would end a comment or colour a terminal.
fn printable(text: &str) -> String {
    let text: String = text.chars().filter(|c| !c.is_control()).take(80).collect();
    match text.is_empty() {
        true => "nobody named".into(),
        false => text,
    }
}

/// A name for the model: the graph's, unless it is one that exporters give to all, else the file's.
fn model_name(graph: &str, path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let common = [
        "main_graph",
        "main",
        "torch_jit",
        "torch-jit-export",
        "graph",
    ];
    let name = match common.contains(&graph) || graph.is_empty() {
        true => &*stem,
        false => graph,
    };
    let plain = plain(name, "-_.");
    match plain.trim_start_matches('.') {
        "" => "imported".into(),
        name => name.to_string(),
    }
}

/// At most 64 letters, digits and `others`; what is none becomes `_`.
fn plain(name: &str, others: &str) -> String {
    let allowed = |c: char| c.is_ascii_alphanumeric() || others.contains(c);
    let name = name.chars().map(|c| if allowed(c) { c } else { '_' });
    name.take(64).collect()
}

/// What an error says, without the file.
type Found<T> = std::result::Result<T, String>;

/// How a value of the model lies in the graph's tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    /// `[N, C, H, W]`.
    Map,
    /// `[N, C·H·W]`, flattened in PyTorch's order.
    Vector,
    /// `[N, C, 1]`, half-way from a vector to a map.
    Column,
    /// `[N, H, W, C]`.
    ChannelsLast,
    /// `[N, groups, C/groups·H·W]`.
    Grouped(usize),
    /// A map in zeros: `[[top, bottom], [left, right]]`.
    Padded([[usize; 2]; 2]),
    /// The graph's input as it comes, where the network does not see it like that yet.
    Image,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Value {
    /// See [`crate::model::Layer::inputs`].
    index: usize,
    form: Form,
}

/// A tensor that does not depend on the input.
#[derive(Clone, Debug)]
struct Constant {
    dims: Vec<usize>,
    data: Data,
}

#[derive(Clone, Debug)]
enum Data {
    Floats(Vec<f32>),
    Integers(Vec<i64>),
}

/// Stands for the number of images in what is computed of shapes.
const BATCH: i64 = i64::MIN;

struct Reader<'a> {
    graph: &'a GraphProto,
    opset: i64,
    constants: HashMap<String, Constant>,
    /// The node that makes a value.
    makers: HashMap<&'a str, usize>,
    /// The nodes that take a value.
    takers: HashMap<&'a str, Vec<usize>>,
    values: HashMap<String, Value>,
    /// Nodes that the output does not depend on, or that went into another node's layer.
    done: HashSet<usize>,
    /// By the last node: the activation, what it is of, and its nodes.
    trees: HashMap<usize, (Activation, &'a str, Vec<usize>)>,
    batch: Option<usize>,
    /// What the graph does with its input before the network, so far: scale and shift per channel.
    affine: Option<[Vec<f64>; 2]>,
    model: Model,
    tensors: Vec<(String, Vec<f32>)>,
    normalization: Option<Vec<f32>>,
    notes: Vec<String>,
}

impl<'a> Reader<'a> {
    fn new(file: &ModelProto, graph: &'a GraphProto) -> Found<Reader<'a>> {
        let own = |id: &&OperatorSetIdProto| ["", "ai.onnx"].contains(&id.domain.as_str());
        let opset = file
            .opset_import
            .iter()
            .find(own)
            .map_or(0, |id| id.version);
        let mut constants = HashMap::new();
        for tensor in &graph.initializer {
            // What nobody understands may be what nobody takes.
            if let Some(constant) = constant(tensor)? {
                constants.insert(tensor.name.clone(), constant);
            }
        }
        let inputs = graph.input.iter().filter(|input| {
            let initial = graph.initializer.iter();
            !initial.clone().any(|tensor| tensor.name == input.name)
        });
        let inputs: Vec<&ValueInfoProto> = inputs.collect();
        let ([input], [_]) = (&inputs[..], &graph.output[..]) else {
            return Err(format!(
                "expected one input and one output, found {} and {}; export the classifier alone",
                inputs.len(),
                graph.output.len()
            ));
        };
        let tensor = input.r#type.as_ref().and_then(|t| t.tensor_type.as_ref());
        let dims = tensor.and_then(|t| t.shape.as_ref()).map(|s| &s.dim[..]);
        let sizes: Option<Vec<Option<usize>>> = dims.map(|dims| {
            let size = |dim: &DimensionProto| dim.dim_value.and_then(|n| usize::try_from(n).ok());
            dims.iter()
                .map(|dim| size(dim).filter(|n| *n > 0))
                .collect()
        });
        let Some([batch, Some(channels), Some(height), Some(width)]) = sizes.as_deref() else {
            return Err(format!(
                "expected an input '{}' of N×C×H×W with C, H and W known, found {}; export the network with a fixed image size",
                input.name,
                describe(dims)
            ));
        };
        let shape = Shape::new(*height, *width, *channels);
        let all = [*height, *width, *channels].map(|n| n as u128);
        if all.iter().product::<u128>() > MAX_ELEMENTS {
            return Err(format!(
                "expected at most {MAX_ELEMENTS} elements of an image, found {shape}"
            ));
        }
        let form = match tensor.map_or(0, |t| t.elem_type) {
            FLOAT => Form::Map,
            UINT8 => Form::Image,
            other => {
                return Err(format!(
                    "expected an input '{}' of float32 or uint8, found data type {other}",
                    input.name
                ));
            }
        };
        let mut takers: HashMap<&str, Vec<usize>> = HashMap::new();
        for (i, node) in graph.node.iter().enumerate() {
            for input in &node.input {
                takers.entry(input).or_default().push(i);
            }
        }
        let outputs = graph.node.iter().enumerate();
        let makers = outputs
            .flat_map(|(i, node)| node.output.iter().map(move |name| (name.as_str(), i)))
            .collect();
        let value = Value { index: 0, form };
        Ok(Reader {
            graph,
            opset,
            constants,
            makers,
            takers,
            values: HashMap::from([(input.name.clone(), value)]),
            done: HashSet::new(),
            trees: HashMap::new(),
            batch: *batch,
            affine: None,
            // The classes are known in the end.
            model: Model::new("", shape, 0, Loss::SoftmaxCrossEntropy),
            tensors: Vec::new(),
            normalization: None,
            notes: Vec::new(),
        })
    }

    fn read(mut self) -> Found<Reader<'a>> {
        let graph = self.graph;
        self.skip_unused();
        for node in &graph.node {
            if node.op_type == "Constant" {
                self.resolve(node.output.first().map_or("", String::as_str), 0)?;
            }
        }
        self.find_trees();
        for (i, node) in graph.node.iter().enumerate() {
            if self.done.contains(&i) {
                continue;
            }
            let at = |what: String| format!("node '{}' ({}): {what}", name_of(node), node.op_type);
            self.node(i, node).map_err(at)?;
            let sizes = self.model.shape(self.model.layers.len());
            let sizes = [sizes.height, sizes.width, sizes.channels].map(|n| n as u128);
            if sizes.iter().product::<u128>() > MAX_ELEMENTS {
                return Err(at(format!(
                    "expected at most {MAX_ELEMENTS} elements of an image's tensor, found more"
                )));
            }
        }
        let output = &graph.output[0].name;
        let last = self.model.layers.len();
        let value = self.values.get(output).copied();
        let order = self.model.channel_orders();
        let shape = self.model.shape(last);
        let is_vector = shape.positions() == 1 && order[last].iter().copied().eq(0..shape.channels);
        if last == 0 || value.is_none_or(|v| v.index != last) || !is_vector {
            return Err(format!(
                "expected an output '{output}' of one value for each class, found {}; export the classifier with its last layer",
                match value {
                    Some(value) => self.model.shape(value.index).to_string(),
                    None => "another".into(),
                }
            ));
        }
        self.model.classes = shape.channels;
        if shape.channels < 2 {
            return Err(format!(
                "expected at least two classes, found {}; wgrad trains classifiers",
                shape.channels
            ));
        }
        Ok(self)
    }

    /// Nodes that the output does not depend on are none of ours.
    fn skip_unused(&mut self) {
        let graph = self.graph;
        let mut needed = HashSet::new();
        let mut open = vec![graph.output[0].name.as_str()];
        while let Some(name) = open.pop() {
            if let Some(i) = self.makers.get(name)
                && needed.insert(*i)
            {
                open.extend(graph.node[*i].input.iter().map(String::as_str));
            }
        }
        self.done = (0..graph.node.len())
            .filter(|i| !needed.contains(i))
            .collect();
        for takers in self.takers.values_mut() {
            // Who asks for the shape alone takes nothing.
            takers.retain(|i| needed.contains(i) && graph.node[*i].op_type != "Shape");
        }
    }

    fn node(&mut self, i: usize, node: &'a NodeProto) -> Found<()> {
        if !["", "ai.onnx"].contains(&node.domain.as_str()) {
            return Err(format!(
                "expected an operation of ONNX's own, found one of '{}'",
                printable(&node.domain)
            ));
        }
        if node.output.iter().skip(1).any(|name| {
            self.takers
                .get(name.as_str())
                .is_some_and(|t| !t.is_empty())
        }) {
            return Err("expected a node of which the first output alone is used, found that others are too".into());
        }
        let [output, ..] = &node.output[..] else {
            return Err("expected a node with an output, found none".into());
        };
        if let Some(constant) = self.computed(node)? {
            self.constants.insert(output.clone(), constant);
            return Ok(());
        }
        if let Some((activation, input, nodes)) = self.activation(i)? {
            let x = self.value(input)?;
            if matches!(x.form, Form::Padded(_)) {
                return Err("expected an activation before the padding, found it behind".into());
            }
            let index = self.activate(activation, x.index, input, &nodes)?;
            self.values.insert(output.clone(), Value { index, ..x });
            return Ok(());
        }
        let (value, output) = self.operation(node)?;
        self.values.insert(output.into(), value);
        Ok(())
    }

    /// The value of an activation by `nodes`: in the layer before where nothing else takes what that gives.
    fn activate(
        &mut self,
        activation: Activation,
        index: usize,
        input: &str,
        nodes: &[usize],
    ) -> Found<usize> {
        let takes = |op: &Op| {
            let normalises = matches!(
                op,
                Op::BatchNorm { .. } | Op::GroupNorm { .. } | Op::LayerNorm { .. }
            );
            op.product().is_some() || normalises || matches!(op, Op::Add | Op::Concat | Op::Scale)
        };
        let last = self.model.layers.len();
        let takers = self.takers.get(input);
        let alone = takers.is_some_and(|takers| takers.iter().all(|i| nodes.contains(i)))
            && self.graph.output[0].name != input;
        if let (true, Some(layer)) = (alone && index == last, self.model.layers.last_mut())
            && takes(&layer.op)
            && layer.activation.is_none()
        {
            layer.activation = Some(activation);
            return Ok(last);
        }
        self.push(None, Op::Activation(activation), &[index])
    }

    /// Computes a constant that lies ahead, if it is one.
    fn resolve(&mut self, name: &str, depth: usize) -> Found<()> {
        // As deep as shapes are computed, and no deeper.
        if depth > 8 || self.constants.contains_key(name) || self.values.contains_key(name) {
            return Ok(());
        }
        if let Some(i) = self.makers.get(name) {
            let node = &self.graph.node[*i];
            for input in &node.input {
                self.resolve(input, depth + 1)?;
            }
            let at = |what: String| format!("node '{}' ({}): {what}", name_of(node), node.op_type);
            if let Some(constant) = self.computed(node).map_err(at)? {
                self.constants.insert(name.into(), constant);
            }
        }
        Ok(())
    }

    /// The only node that takes a value, if there is one.
    fn sole_taker(&self, name: &str) -> Option<usize> {
        match self.takers.get(name).map(|takers| &takers[..]) {
            Some([one]) if self.graph.output[0].name != name => Some(*one),
            _ => None,
        }
    }

    /// What a node computes of constants and shapes.
    fn computed(&self, node: &NodeProto) -> Found<Option<Constant>> {
        let constants = || -> Option<Vec<&Constant>> {
            let inputs = node.input.iter().filter(|name| !name.is_empty());
            inputs.map(|name| self.constants.get(name)).collect()
        };
        let integers = |data: Vec<i64>, scalar: bool| {
            Some(Constant {
                dims: if scalar { Vec::new() } else { vec![data.len()] },
                data: Data::Integers(data),
            })
        };
        Ok(match node.op_type.as_str() {
            "Constant" => {
                let [attribute] = &node.attribute[..] else {
                    return Err("expected one attribute, found another number".into());
                };
                match (attribute.name.as_str(), &attribute.t) {
                    ("value", Some(tensor)) => {
                        let found = constant(tensor)?;
                        Some(found.ok_or_else(|| {
                            format!(
                                "expected float32 or integers, found data type {}",
                                tensor.data_type
                            )
                        })?)
                    }
                    ("value_float", _) => Some(Constant {
                        dims: Vec::new(),
                        data: Data::Floats(attribute.f.into_iter().collect()),
                    }),
                    ("value_int", _) => integers(attribute.i.into_iter().collect(), true),
                    ("value_ints", _) => integers(attribute.ints.clone(), false),
                    ("value_floats", _) => Some(Constant {
                        dims: vec![attribute.floats.len()],
                        data: Data::Floats(attribute.floats.clone()),
                    }),
                    (name, _) => return Err(format!("unknown attribute '{}'", printable(name))),
                }
            }
            "Shape" => match node.input.first().and_then(|name| self.values.get(name)) {
                Some(value) => {
                    let Shape {
                        height,
                        width,
                        channels,
                    } = self.model.shape(value.index);
                    let all = [channels, height, width].map(|n| n as i64);
                    let sizes = match value.form {
                        Form::Map => [&[BATCH], &all[..]].concat(),
                        Form::Vector => vec![BATCH, all.iter().product()],
                        _ => return Ok(None),
                    };
                    let rank = sizes.len() as i64;
                    let at = |name: &str, default: i64| {
                        let found = node.attribute.iter().find(|a| a.name == name);
                        let at = found.and_then(|a| a.i).unwrap_or(default);
                        (if at < 0 { at + rank } else { at }).clamp(0, rank) as usize
                    };
                    let (start, end) = (at("start", 0), at("end", rank));
                    integers(sizes.get(start..end).unwrap_or(&[]).to_vec(), false)
                }
                None => None,
            },
            // Of constants only; a network's own are operations.
            "Gather" | "Concat" | "Unsqueeze" | "Squeeze" | "Cast" | "Identity" => {
                let Some(inputs) = constants().filter(|inputs| !inputs.is_empty()) else {
                    return Ok(None);
                };
                if let ("Identity", [one]) = (node.op_type.as_str(), &inputs[..]) {
                    return Ok(Some((*one).clone()));
                }
                if let ("Unsqueeze", Some(values)) = (node.op_type.as_str(), inputs[0].floats()) {
                    let axes = match inputs.get(1) {
                        Some(axes) => axes.integers().map(<[i64]>::to_vec),
                        None => ints(node, "axes"),
                    };
                    let mut axes = axes.unwrap_or_default();
                    let rank = (inputs[0].dims.len() + axes.len()) as i64;
                    axes.iter_mut()
                        .for_each(|axis| *axis += if *axis < 0 { rank } else { 0 });
                    axes.sort_unstable();
                    let mut dims = inputs[0].dims.clone();
                    for axis in axes {
                        let at = usize::try_from(axis).ok().filter(|at| *at <= dims.len());
                        dims.insert(at.ok_or("expected axes within the shape, found others")?, 1);
                    }
                    let data = Data::Floats(values.to_vec());
                    return Ok(Some(Constant { dims, data }));
                }
                let numbers: Option<Vec<&[i64]>> = inputs.iter().map(|c| c.integers()).collect();
                let Some(numbers) = numbers else {
                    return Ok(None);
                };
                match (node.op_type.as_str(), &numbers[..]) {
                    ("Gather", [of, at]) => {
                        let pick = |i: &i64| {
                            let i = if *i < 0 { i + of.len() as i64 } else { *i };
                            usize::try_from(i).ok().and_then(|i| of.get(i)).copied()
                        };
                        let found: Option<Vec<i64>> = at.iter().map(pick).collect();
                        let found =
                            found.ok_or("expected indices within the shape, found others")?;
                        integers(found, inputs[1].dims.is_empty())
                    }
                    ("Concat", all) => integers(all.concat(), false),
                    ("Unsqueeze", [of, ..]) if inputs[0].dims.is_empty() => {
                        integers(of.to_vec(), false)
                    }
                    ("Squeeze", [of, ..]) if of.len() == 1 => integers(of.to_vec(), true),
                    ("Cast", [of]) => integers(of.to_vec(), inputs[0].dims.is_empty()),
                    _ => None,
                }
            }
            _ => None,
        })
    }

    /// The activation that a node is, or the last node of, what it is of, and its nodes.
    fn activation(&mut self, i: usize) -> Found<Option<(Activation, &'a str, Vec<usize>)>> {
        if let Some(found) = self.trees.remove(&i) {
            return Ok(Some(found));
        }
        let node = &self.graph.node[i];
        let activation = match node.op_type.as_str() {
            "Relu" => Activation::Relu,
            "Tanh" => Activation::Tanh,
            "HardSwish" => Activation::HardSwish,
            "Sigmoid" => Activation::Sigmoid,
            "LeakyRelu" => Activation::LeakyRelu {
                slope: float(node, "alpha").unwrap_or(0.01),
            },
            "Swish" if float(node, "alpha").unwrap_or(1.0) == 1.0 => Activation::Silu,
            "Gelu" => match text(node, "approximate").unwrap_or("none") {
                "none" => Activation::Gelu,
                "tanh" => Activation::GeluTanh,
                other => {
                    return Err(format!(
                        "expected approximate 'none' or 'tanh', found '{}'",
                        printable(other)
                    ));
                }
            },
            _ => return Ok(None),
        };
        known(node, &["alpha", "approximate"])?;
        match &node.input[..] {
            [x] => Ok(Some((activation, x, vec![i]))),
            _ => Err("expected one input, found another number".into()),
        }
    }

    /// Finds the activations that are several nodes, the largest first.
    fn find_trees(&mut self) {
        let graph = self.graph;
        for (i, node) in graph.node.iter().enumerate().rev() {
            if self.done.contains(&i) || !["Mul", "Div"].contains(&node.op_type.as_str()) {
                continue;
            }
            for (activation, tree) in trees() {
                let mut found = Match {
                    reader: self,
                    x: None,
                    nodes: Vec::new(),
                };
                let Some(output) = node.output.first() else {
                    continue;
                };
                if !found.tree(output, &tree) {
                    continue;
                }
                let Match {
                    x: Some(x), nodes, ..
                } = found
                else {
                    continue;
                };
                // What lies within is nobody else's.
                let inner = || nodes.iter().filter(|n| **n != i);
                let own = inner().all(|n| {
                    let takers = self.takers.get(graph.node[*n].output[0].as_str());
                    takers.is_some_and(|takers| takers.iter().all(|t| nodes.contains(t)))
                });
                if own {
                    self.done.extend(inner());
                    self.trees.insert(i, (activation, x, nodes));
                    break;
                }
            }
        }
    }
}

/// The activations of several nodes, as exporters write them.
fn trees() -> Vec<(Activation, Tree)> {
    use Tree::{Constant, X};
    let node = |op, inputs: [Tree; 2]| Tree::Node(op, inputs.into());
    let of = |op, input| Tree::Node(op, vec![input]);
    let half = |activation: Activation| match activation.tree() {
        // x/2 first.
        Some(Tree::Node(_, mut inputs)) => match inputs.swap_remove(0) {
            Tree::Node(op, mut inputs) => {
                let sum = inputs.swap_remove(1);
                (activation, node(op, [node("Mul", [X, Constant(0.5)]), sum]))
            }
            other => (activation, other),
        },
        _ => (activation, X),
    };
    let written = [Activation::Gelu, Activation::GeluTanh, Activation::Silu];
    let mut trees: Vec<(Activation, Tree)> = written
        .into_iter()
        .filter_map(|activation| Some((activation, activation.tree()?)))
        .collect();
    trees.extend([half(Activation::Gelu), half(Activation::GeluTanh)]);
    // The cube as a product.
    let cube = node("Mul", [X, node("Mul", [X, X])]);
    let sum = node("Add", [X, node("Mul", [cube, Constant(0.044715)])]);
    let tanh = of("Tanh", node("Mul", [sum, Constant(0.797_884_6)]));
    let product = node("Mul", [X, node("Add", [tanh, Constant(1.0)])]);
    trees.push((Activation::GeluTanh, node("Mul", [product, Constant(0.5)])));
    trees.push((
        Activation::HardSwish,
        node("Mul", [X, of("HardSigmoid", X)]),
    ));
    let clip = Tree::Node(
        "Clip",
        vec![
            node("Add", [X, Constant(3.0)]),
            Constant(0.0),
            Constant(6.0),
        ],
    );
    trees.push((
        Activation::HardSwish,
        node("Div", [node("Mul", [X, clip.clone()]), Constant(6.0)]),
    ));
    trees.push((
        Activation::HardSwish,
        node("Mul", [X, node("Div", [clip, Constant(6.0)])]),
    ));
    trees
}

/// A comparison of a part of the graph with a tree.
struct Match<'r, 'a> {
    reader: &'r Reader<'a>,
    x: Option<&'a str>,
    nodes: Vec<usize>,
}

impl<'a> Match<'_, 'a> {
    fn tree(&mut self, name: &'a str, tree: &Tree) -> bool {
        match tree {
            Tree::X => {
                let free = !self.reader.constants.contains_key(name);
                free && *self.x.get_or_insert(name) == name
            }
            Tree::Constant(expected) => {
                let found = self.reader.constants.get(name).and_then(Constant::scalar);
                found.is_some_and(|found| (found - expected).abs() <= 1e-6 * expected.abs())
            }
            Tree::Node(op, inputs) => {
                let Some(&i) = self.reader.makers.get(name) else {
                    return false;
                };
                let node = &self.reader.graph.node[i];
                let sixth =
                    |key| float(node, key).is_none_or(|alpha| (alpha - 1.0 / 6.0).abs() < 1e-6);
                if node.op_type != *op
                    || node.input.len() != inputs.len()
                    // The default is 0.2.
                    || (*op == "HardSigmoid" && (float(node, "alpha").is_none() || !sixth("alpha")))
                    || float(node, "beta").is_some_and(|beta| beta != 0.5)
                {
                    return false;
                }
                let before = (self.x, self.nodes.len());
                let mut orders = vec![[0, 1]];
                if ["Add", "Mul"].contains(op) {
                    orders.push([1, 0]);
                }
                for order in orders {
                    (self.x, _) = before;
                    self.nodes.truncate(before.1);
                    let places = match inputs.len() {
                        2 => order.to_vec(),
                        n => (0..n).collect(),
                    };
                    let mut pairs = places.iter().zip(inputs);
                    if pairs.all(|(at, input)| self.tree(&node.input[*at], input)) {
                        self.nodes.push(i);
                        return true;
                    }
                }
                false
            }
        }
    }
}

/// A node's operation as a layer.
impl<'a> Reader<'a> {
    fn value(&self, name: &str) -> Found<Value> {
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
        match values.len() == channels {
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
    fn push(&mut self, name: Option<&str>, op: Op, inputs: &[usize]) -> Found<usize> {
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
    fn operation(&mut self, node: &'a NodeProto) -> Found<(Value, &'a str)> {
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
        let mut counted = int(node, "count_include_pad").unwrap_or(0) != 0;
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
                self.resolve(input, 0).ok()?;
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
                        return Err("expected a map times factors of N×C×1×1, found two maps".into());
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
                let groups = super::import::size(*groups)?;
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

impl Constant {
    fn floats(&self) -> Option<&[f32]> {
        match &self.data {
            Data::Floats(values) => Some(values),
            Data::Integers(_) => None,
        }
    }

    fn integers(&self) -> Option<&[i64]> {
        match &self.data {
            Data::Integers(values) => Some(values),
            Data::Floats(_) => None,
        }
    }

    fn len(&self) -> usize {
        match &self.data {
            Data::Floats(values) => values.len(),
            Data::Integers(values) => values.len(),
        }
    }

    fn scalar(&self) -> Option<f32> {
        match &self.data {
            Data::Floats(values) if values.len() == 1 => Some(values[0]),
            Data::Integers(values) if values.len() == 1 => Some(values[0] as f32),
            _ => None,
        }
    }
}

/// A tensor's values; none for a type that no layer of ours has.
fn constant(tensor: &TensorProto) -> Found<Option<Constant>> {
    let name = printable(&tensor.name);
    if tensor.data_location != 0 {
        return Err(format!(
            "expected all weights within the file, found '{name}' in another; write it as one file (PyTorch: external_data=False; onnx: save_as_external_data=False)"
        ));
    }
    let dims: Option<Vec<usize>> = tensor
        .dims
        .iter()
        .map(|n| usize::try_from(*n).ok())
        .collect();
    let dims = dims.ok_or_else(|| {
        format!(
            "expected sizes of at least 0 of '{name}', found {:?}",
            tensor.dims
        )
    })?;
    let elements = dims
        .iter()
        .fold(1u128, |all, n| all.saturating_mul(*n as u128));
    let raw = &tensor.raw_data;
    let data = match tensor.data_type {
        FLOAT if raw.is_empty() => Data::Floats(tensor.float_data.clone()),
        FLOAT => Data::Floats(
            raw.as_chunks()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
        ),
        INT64 if raw.is_empty() => Data::Integers(tensor.int64_data.clone()),
        INT64 => Data::Integers(
            raw.as_chunks()
                .0
                .iter()
                .map(|b| i64::from_le_bytes(*b))
                .collect(),
        ),
        INT32 if raw.is_empty() => {
            Data::Integers(tensor.int32_data.iter().map(|n| i64::from(*n)).collect())
        }
        INT32 => Data::Integers(
            raw.as_chunks()
                .0
                .iter()
                .map(|b| i64::from(i32::from_le_bytes(*b)))
                .collect(),
        ),
        _ => return Ok(None),
    };
    let constant = Constant { dims, data };
    if constant.len() as u128 != elements {
        return Err(format!(
            "expected {elements} values of '{name}', as its sizes say, found {}; the file is damaged",
            constant.len()
        ));
    }
    Ok(Some(constant))
}

fn describe(dims: Option<&[DimensionProto]>) -> String {
    let Some(dims) = dims else {
        return "no shape".into();
    };
    let size = |dim: &DimensionProto| match (dim.dim_value, &dim.dim_param) {
        (Some(n), _) => n.to_string(),
        (None, Some(name)) if !name.is_empty() => printable(name),
        _ => "?".into(),
    };
    let sizes: Vec<String> = dims.iter().map(size).collect();
    sizes.join("×")
}

/// What a node is called in messages.
fn name_of(node: &NodeProto) -> String {
    match (node.name.as_str(), node.output.first()) {
        ("", Some(output)) => printable(output),
        (name, _) => printable(name),
    }
}

fn input(node: &NodeProto, at: usize) -> Found<&str> {
    let name = node.input.get(at).filter(|name| !name.is_empty());
    name.map(String::as_str)
        .ok_or_else(|| format!("expected input {at}, found none"))
}

/// Refuses attributes other than these.
fn known(node: &NodeProto, keys: &[&str]) -> Found<()> {
    match node
        .attribute
        .iter()
        .find(|a| !keys.contains(&a.name.as_str()))
    {
        Some(other) => Err(format!(
            "expected no attribute '{}', found it; export with an earlier opset, such as 17",
            printable(&other.name)
        )),
        None => Ok(()),
    }
}

fn attribute<'n>(node: &'n NodeProto, key: &str) -> Option<&'n AttributeProto> {
    node.attribute.iter().find(|a| a.name == key)
}

fn int(node: &NodeProto, key: &str) -> Option<i64> {
    attribute(node, key)?.i
}

fn float(node: &NodeProto, key: &str) -> Option<f32> {
    attribute(node, key)?.f
}

fn ints(node: &NodeProto, key: &str) -> Option<Vec<i64>> {
    Some(attribute(node, key)?.ints.clone())
}

fn text<'n>(node: &'n NodeProto, key: &str) -> Option<&'n str> {
    str::from_utf8(attribute(node, key)?.s.as_deref()?).ok()
}

fn epsilon(node: &NodeProto) -> Found<f32> {
    let epsilon = float(node, "epsilon").unwrap_or(1e-5);
    match epsilon > 0.0 && epsilon.is_finite() {
        true => Ok(epsilon),
        false => Err(format!("expected an epsilon above 0, found {epsilon}")),
    }
}

/// `1 − momentum` without what rounding adds to its decimals.
fn within_one(momentum: f32) -> f32 {
    ((f64::from(momentum) * 1e6).round() / 1e6).clamp(0.0, 1.0) as f32
}

fn at_least_zero(n: i64) -> Found<usize> {
    let found = usize::try_from(n)
        .ok()
        .filter(|n| (*n as u128) < MAX_ELEMENTS);
    found.ok_or_else(|| format!("expected a size from 0 to {MAX_ELEMENTS}, found {n}"))
}

fn size(n: i64) -> Found<usize> {
    match at_least_zero(n)? {
        0 => Err("expected a size of at least 1, found 0".into()),
        n => Ok(n),
    }
}

/// A number for height and width each.
fn pair(node: &NodeProto, key: &str) -> Found<Option<[usize; 2]>> {
    match ints(node, key).as_deref() {
        None => Ok(None),
        Some([a, b]) => Ok(Some([size(*a)?, size(*b)?])),
        Some(other) => Err(format!("expected two numbers for '{key}', found {other:?}")),
    }
}

fn kernel_is(node: &NodeProto, kernel: [usize; 2]) -> Found<()> {
    match pair(node, "kernel_shape")? {
        Some(found) if found != kernel => Err(format!(
            "expected the weight's kernel {kernel:?}, found kernel_shape {found:?}"
        )),
        _ if kernel.contains(&0) => Err("expected a kernel of at least 1×1, found none".into()),
        _ => Ok(()),
    }
}

/// The padding `[[top, bottom], [left, right]]` that `pads` or `auto_pad` give.
fn sides(
    node: &NodeProto,
    shape: Shape,
    kernel: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
) -> Found<[[usize; 2]; 2]> {
    let same = || same_padding(shape, kernel, stride, dilation);
    match text(node, "auto_pad").unwrap_or("NOTSET") {
        "SAME_UPPER" => return Ok(same()),
        "SAME_LOWER" => return Ok(same().map(|[less, more]| [more, less])),
        "VALID" => return Ok([[0; 2]; 2]),
        "NOTSET" => {}
        other => {
            return Err(format!(
                "expected NOTSET, VALID, SAME_UPPER or SAME_LOWER for auto_pad, found '{}'",
                printable(other)
            ));
        }
    }
    match ints(node, "pads").as_deref() {
        None => Ok([[0; 2]; 2]),
        Some([top, left, bottom, right]) => Ok([
            [at_least_zero(*top)?, at_least_zero(*bottom)?],
            [at_least_zero(*left)?, at_least_zero(*right)?],
        ]),
        Some(other) => Err(format!("expected four numbers for 'pads', found {other:?}")),
    }
}

fn pool(
    shape: Shape,
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [[usize; 2]; 2],
    ceil: bool,
    counted: bool,
) -> Found<Pool2d> {
    let made = Pool2d::padded(shape, kernel, stride, padding, ceil, counted);
    made.map_err(|error| match error {
        Error::Shape { what, .. } => what,
        other => other.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::{OnnxOptions, write_onnx};
    use crate::model::{initial_parameters, initial_running};

    const MODEL: &str = r#"name = "small"
input = [8, 6, 1]
classes = 4
loss = "softmax_cross_entropy"
layer = [
  { type = "conv2d", out_channels = 4, kernel = 3, padding = 1, bias = false },
  { type = "batch_norm", activation = "relu" },
  { type = "max_pool2d", kernel = 2 },
  { type = "dense", units = "classes" },
]
[recipe]
optimizer = "sgd"
lr = 0.1
schedule = "constant"
epochs = 1
batch_size = 2
"#;

    fn file() -> ModelProto {
        let definition = Definition::parse(MODEL, "small.toml").unwrap();
        let model = definition.resolve(definition.input, 4).unwrap();
        let options = OnnxOptions {
            normalization: &[1.0, 0.0],
            ..OnnxOptions::default()
        };
        let (parameters, running) = (initial_parameters(&model, 1), initial_running(&model));
        let bytes = write_onnx(&model, &parameters, &running, &options).unwrap();
        ModelProto::decode(&*bytes).unwrap()
    }

    fn read(file: &ModelProto) -> Result<Imported> {
        read_onnx(&file.encode_to_vec(), Path::new("small.onnx"))
    }

    fn graph(file: &mut ModelProto) -> &mut GraphProto {
        file.graph.as_mut().unwrap()
    }

    fn node<'f>(file: &'f mut ModelProto, name: &str) -> &'f mut NodeProto {
        let nodes = graph(file).node.iter_mut();
        nodes.into_iter().find(|node| node.name == name).unwrap()
    }

    fn set(node: &mut NodeProto, key: &str, ints: &[i64]) {
        node.attribute.retain(|a| a.name != key);
        node.attribute.push(AttributeProto {
            name: key.into(),
            i: ints.first().copied(),
            ints: ints.to_vec(),
            ..AttributeProto::default()
        });
    }

    #[test]
    fn what_is_no_network_of_ours_is_refused_in_one_line() {
        type Change = fn(&mut ModelProto);
        #[rustfmt::skip]
        let cases: &[(Change, &[&str])] = &[
            (|f| f.graph = None, &["graph of nodes", "found none"]),
            (|f| f.opset_import[0].version = 8, &["opset 9 or later, found 8"]),
            (|f| node(f, "batch_norm1/relu").op_type = "Celu".into(), &["node 'batch_norm1/relu' (Celu)", "wgrad has"]),
            (|f| node(f, "conv2d1").domain = "com.example".into(), &["node 'conv2d1' (Conv)", "com.example"]),
            (|f| set(node(f, "conv2d1"), "mystery", &[1]), &["node 'conv2d1' (Conv)", "attribute 'mystery'"]),
            (|f| set(node(f, "conv2d1"), "group", &[0]), &["node 'conv2d1' (Conv)", "found 0"]),
            (|f| set(node(f, "conv2d1"), "group", &[3]), &["node 'conv2d1' (Conv)", "1 channels in 3 groups"]),
            (|f| set(node(f, "conv2d1"), "pads", &[1, 1]), &["node 'conv2d1' (Conv)", "four numbers for 'pads'"]),
            (|f| set(node(f, "conv2d1"), "pads", &[-1, 0, 0, 0]), &["node 'conv2d1' (Conv)", "found -1"]),
            (|f| set(node(f, "conv2d1"), "strides", &[1, i64::MAX]), &["node 'conv2d1' (Conv)", "9223372036854775807"]),
            (|f| set(node(f, "conv2d1"), "kernel_shape", &[5, 5]), &["node 'conv2d1' (Conv)", "kernel_shape [5, 5]"]),
            (|f| set(node(f, "max_pool2d1"), "dilations", &[2, 2]), &["node 'max_pool2d1' (MaxPool)", "dilations"]),
            (|f| set(node(f, "max_pool2d1"), "kernel_shape", &[9, 9]), &["node 'max_pool2d1' (MaxPool)", "9 over input height 8"]),
            (|f| set(node(f, "max_pool2d1"), "kernel_shape", &[1 << 31, 1]), &["node 'max_pool2d1' (MaxPool)"]),
            (|f| set(node(f, "batch_norm1"), "training_mode", &[1]), &["node 'batch_norm1' (BatchNormalization)", "evaluation mode"]),
            (|f| set(node(f, "dense1"), "transA", &[1]), &["node 'dense1' (Gemm)", "transA"]),
            (|f| set(node(f, "dense1"), "transB", &[0]), &["node 'dense1' (Gemm)", "48 inputs, found [4, 48]"]),
            (|f| set(node(f, "dense1/flatten"), "axis", &[2]), &["node 'dense1/flatten' (Flatten)", "axis 2"]),
            (|f| node(f, "dense1").input.truncate(1), &["node 'dense1' (Gemm)", "expected input 1"]),
            (|f| node(f, "conv2d1").input.clear(), &["node 'conv2d1' (Conv)", "expected input 0"]),
            (|f| node(f, "conv2d1").output.clear(), &["not", "computed"]),
            (|f| node(f, "conv2d1").input[0] = "logits".into(), &["node 'conv2d1' (Conv)", "'logits'", "before it"]),
            (|f| node(f, "conv2d1").input[1] = "input".into(), &["node 'conv2d1' (Conv)", "'input' as a constant"]),
            (|f| graph(f).initializer[0].raw_data.truncate(7), &["'conv2d1.weight'", "36 values", "found 1"]),
            (|f| graph(f).initializer[0].dims = vec![-4, 1, 3, 3], &["'conv2d1.weight'", "at least 0"]),
            (|f| graph(f).initializer[0].dims = vec![6, 6], &["node 'conv2d1' (Conv)", "OC×C×KH×KW, found [6, 6]"]),
            (|f| graph(f).initializer[0].data_type = 10, &["node 'conv2d1' (Conv)", "float32"]),
            (|f| graph(f).initializer[0].data_location = 1, &["'conv2d1.weight' in another", "external_data=False"]),
            (|f| graph(f).initializer[1].dims = vec![2, 2], &[]),
            (|f| graph(f).input.clear(), &["one input and one output, found 0 and 1"]),
            (|f| graph(f).input[0].r#type = None, &["N×C×H×W", "no shape"]),
            (|f| shape(f)[2].dim_value = None, &["N×C×H×W", "batch×1×?×6", "fixed image size"]),
            (|f| shape(f)[2].dim_value = Some(i64::MAX), &["at most", "elements"]),
            (|f| graph(f).output[0].name = "conv2d1/output".into(), &["'conv2d1/output'", "each class, found 8×6×4"]),
            (|f| graph(f).output[0].name = "nothing".into(), &["'nothing'"]),
        ];
        let mut failures = Vec::new();
        for (i, (change, words)) in cases.iter().enumerate() {
            let mut file = file();
            change(&mut file);
            match (read(&file), words.is_empty()) {
                (Ok(_), true) => {}
                (Ok(_), false) => failures.push(format!("{i}: nothing wrong, expected {words:?}")),
                (Err(error), _) => {
                    let line = error.to_string();
                    let fits = words.iter().all(|word| line.contains(word)) && !words.is_empty();
                    if !fits
                        || line.contains('\n')
                        || error.exit_code() != 2
                        || !line.starts_with("small.onnx: ")
                    {
                        failures.push(format!("{i}: expected {words:?}, found {line}"));
                    }
                }
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    fn shape(file: &mut ModelProto) -> &mut Vec<DimensionProto> {
        let tensor = graph(file).input[0].r#type.as_mut().unwrap();
        &mut tensor
            .tensor_type
            .as_mut()
            .unwrap()
            .shape
            .as_mut()
            .unwrap()
            .dim
    }

    /// Whatever byte is missing or another, there is a network or an error, never a panic.
    #[test]
    fn damaged_files_are_errors() {
        let bytes = file().encode_to_vec();
        for end in 0..bytes.len() {
            if let Err(error) = read_onnx(&bytes[..end], Path::new("a.onnx")) {
                assert!(!error.to_string().contains('\n'), "{error}");
            }
        }
        for at in 0..bytes.len() {
            for change in [0x01, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] ^= change;
                if let Err(error) = read_onnx(&bytes, Path::new("a.onnx")) {
                    assert!(!error.to_string().contains('\n'), "{error}");
                }
            }
        }
        let text = read_onnx(b"name = \"small\"", Path::new("a.onnx")).unwrap_err();
        assert!(text.to_string().contains("expected an ONNX file"), "{text}");
    }

    /// What exporters write in other ways.
    #[test]
    fn other_ways_to_write_the_same_are_understood() {
        let expected = read(&file()).unwrap();
        type Change = fn(&mut ModelProto);
        let changes: &[Change] = &[
            // A flattening by shape, the batch left open.
            |f| {
                graph(f).initializer.push(TensorProto {
                    dims: vec![2],
                    data_type: INT64,
                    name: "shape".into(),
                    int64_data: vec![-1, 48],
                    ..TensorProto::default()
                });
                let flatten = node(f, "dense1/flatten");
                flatten.op_type = "Reshape".into();
                flatten.attribute.clear();
                flatten.input.push("shape".into());
            },
            // Weights as numbers instead of bytes.
            |f| {
                for tensor in &mut graph(f).initializer {
                    if tensor.data_type == FLOAT {
                        let bytes = std::mem::take(&mut tensor.raw_data);
                        let (values, _) = bytes.as_chunks();
                        tensor.float_data = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
                    }
                }
            },
            // Initial values among the inputs, as before IR version 4, and names of nobody.
            |f| {
                let graph = graph(f);
                graph
                    .input
                    .extend(graph.initializer.iter().map(|tensor| ValueInfoProto {
                        name: tensor.name.clone(),
                        r#type: None,
                    }));
                graph.node.iter_mut().for_each(|node| node.name.clear());
            },
            // A product and a sum for a dense layer.
            |f| {
                let dense = node(f, "dense1");
                let bias = dense.input.remove(2);
                dense.op_type = "MatMul".into();
                dense.attribute.clear();
                dense.output[0] = "product".into();
                let graph = graph(f);
                let weight = graph
                    .initializer
                    .iter_mut()
                    .find(|t| t.name == "dense1.weight")
                    .unwrap();
                let old: Vec<[u8; 4]> = weight.raw_data.as_chunks().0.to_vec();
                weight.dims = vec![48, 4];
                weight.raw_data = (0..48)
                    .flat_map(|i| (0..4).flat_map(move |o| [i, o]))
                    .collect::<Vec<usize>>()
                    .chunks(2)
                    .flat_map(|at| old[at[1] * 48 + at[0]])
                    .collect();
                graph.node.push(NodeProto {
                    input: vec![bias, "product".into()],
                    output: vec!["logits".into()],
                    op_type: "Add".into(),
                    ..NodeProto::default()
                });
            },
        ];
        for (i, change) in changes.iter().enumerate() {
            let mut file = file();
            change(&mut file);
            let found = read(&file).unwrap_or_else(|e| panic!("{i}: {e}"));
            assert_eq!(found.model, expected.model, "{i}");
            assert_eq!(found.parameters, expected.parameters, "{i}");
            assert_eq!(found.running, expected.running, "{i}");
        }
    }
}
