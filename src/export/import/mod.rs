//! Networks from ONNX files.
//!
//! What is read is what [`super::write_onnx`] writes and what PyTorch's exporters make of plain convolutional
//! networks. The graph is walked once, in its order; every node becomes a layer, or a part of one: an
//! activation goes into the layer before it, the nodes of a GELU are one activation. What cannot be a
//! layer of ours is refused with the node's name.

mod attributes;
mod constants;
mod layers;
mod trees;

use self::attributes::{describe, name_of};
use self::constants::{Constant, constant, fetch};
use super::onnx::MAX_BYTES;
use super::proto::*;
use super::safetensors::from_pytorch;
use crate::error::{Error, Result};
use crate::model::{Activation, Definition, Loss, MAX_ELEMENTS, Model, Op, Shape, architecture};
use prost::Message;
use serde_json::Value as Json;
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// What an ONNX file holds.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The network.
    pub model: Model,
    /// The text of an architecture file for it.
    pub architecture: String,
    /// The flat vectors.
    pub parameters: Vec<f32>,
    /// Its flat vector of running statistics.
    pub running: Vec<f32>,
    /// Where the file names them, as many as there are classes.
    pub class_names: Option<Vec<String>>,
    /// What the graph or the metadata say about the images, if anything: scale per channel, then shift per
    /// channel; the network's input is byte · scale + shift.
    pub normalization: Option<Vec<f32>>,
    /// What was left out, a line each.
    pub notes: Vec<String>,
}

/// Reads an ONNX file of opset 9 or later. `path` stands for it in messages, gives a model that has no name
/// its name, and tells where weights are that it has in another file.
///
/// # Errors
/// [`Error::Data`], with the node where there is one, for what is no ONNX file, damaged, or no network of our
/// operations.
pub fn read_onnx(bytes: &[u8], path: &Path) -> Result<Imported> {
    let error = |what: String| Error::data(path, what);
    let mut file = ModelProto::decode(bytes).map_err(|e| {
        error(format!(
            "expected an ONNX file, found another or a damaged one ({e}); use a copy of it"
        ))
    })?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let tensors = file
        .graph
        .iter_mut()
        .flat_map(|graph| &mut graph.initializer);
    let mut all = 0;
    for tensor in tensors {
        fetch(tensor, folder).map_err(error)?;
        all += tensor.raw_data.len() as u64;
        if all > MAX_BYTES {
            return Err(error(format!(
                "expected at most {MAX_BYTES} bytes of weights, found more"
            )));
        }
    }
    let graph = file.graph.as_ref().filter(|graph| !graph.node.is_empty());
    let Some(graph) = graph else {
        return Err(error("expected an ONNX file with a graph of nodes, found none; use a file that an exporter wrote".into()));
    };
    let opset = opset(&file);
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
    let definition = Definition::parse(&text, &format!("{}.toml", model.name)).map_err(|e| {
        error(format!(
            "expected what a model file can say, found otherwise: {e}"
        ))
    })?;
    let resolved = definition
        .resolve(model.input, model.classes)
        .map_err(|e| {
            error(format!(
                "expected what a model file can say, found otherwise: {e}"
            ))
        })?;
    if resolved != model {
        let pairs = resolved.layers.iter().zip(&model.layers);
        let other = pairs.into_iter().find(|(a, b)| a != b);
        return Err(error(format!(
            "expected a network that a model file can describe, found another (layer '{}'); please report this, with the file",
            other.map_or("", |(_, layer)| layer.name.as_str())
        )));
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

/// The version of ONNX's own operations that a file is written in; 0 where it names none.
fn opset(file: &ModelProto) -> i64 {
    let own = |id: &&OperatorSetIdProto| ["", "ai.onnx"].contains(&id.domain.as_str());
    let found = file.opset_import.iter().find(own);
    found.map_or(0, |id| id.version)
}

impl<'a> Reader<'a> {
    fn new(file: &ModelProto, graph: &'a GraphProto) -> Found<Reader<'a>> {
        let opset = opset(file);
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
                let name = node.output.first().map_or("", String::as_str);
                self.resolve(name, &mut HashSet::new())?;
            }
        }
        self.find_trees();
        for (i, node) in graph.node.iter().enumerate() {
            if self.done.contains(&i) {
                continue;
            }
            let at = |what: String| format!("node '{}' ({}): {what}", name_of(node), node.op_type);
            self.node(i, node).map_err(at)?;
            let bytes = 4 * self.model.parameter_elements as u64;
            if bytes > MAX_BYTES {
                return Err(at(format!(
                    "expected at most {MAX_BYTES} bytes of weights, found {bytes}"
                )));
            }
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

    /// The only node that takes a value, if there is one.
    fn sole_taker(&self, name: &str) -> Option<usize> {
        match self.takers.get(name).map(|takers| &takers[..]) {
            Some([one]) if self.graph.output[0].name != name => Some(*one),
            _ => None,
        }
    }
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

    /// The first weights in another file; the tests run beside `Cargo.toml`.
    fn elsewhere(file: &mut ModelProto, entries: &[(&str, &str)]) {
        let tensor = &mut graph(file).initializer[0];
        tensor.data_location = 1;
        let entry = |(key, value): &(&str, &str)| StringStringEntryProto {
            key: key.to_string(),
            value: value.to_string(),
        };
        tensor.external_data = entries.iter().map(entry).collect();
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
            (|f| node(f, "conv2d1").output.clear(), &["node 'batch_norm1' (BatchNormalization)", "computed before it"]),
            (|f| node(f, "conv2d1").input[0] = "logits".into(), &["node 'conv2d1' (Conv)", "'logits'", "before it"]),
            (|f| node(f, "conv2d1").input[1] = "input".into(), &["node 'conv2d1' (Conv)", "'input' as a constant"]),
            (|f| graph(f).initializer[0].raw_data.truncate(7), &["'conv2d1.weight'", "36 values", "found 1"]),
            (|f| graph(f).initializer[0].dims = vec![-4, 1, 3, 3], &["'conv2d1.weight'", "at least 0"]),
            (|f| graph(f).initializer[0].dims = vec![6, 6], &["node 'conv2d1' (Conv)", "OC×C×KH×KW, found [6, 6]"]),
            (|f| graph(f).initializer[0].data_type = 10, &["node 'conv2d1' (Conv)", "float32"]),
            (|f| graph(f).initializer[0].data_location = 1, &["'conv2d1.weight' in a file beside", "external_data=False"]),
            (|f| elsewhere(f, &[("location", "../Cargo.toml")]), &["no such file '../Cargo.toml'"]),
            (|f| elsewhere(f, &[("location", "/etc/hostname")]), &["no such file '/etc/hostname'"]),
            (|f| elsewhere(f, &[("location", "src")]), &["no such file 'src'"]),
            (|f| elsewhere(f, &[("location", "Cargo.toml"), ("offset", "99999999")]), &["'Cargo.toml', found it too short"]),
            (|f| elsewhere(f, &[("location", "Cargo.toml"), ("length", "-1")]), &["'Cargo.toml', found it too short"]),
            (|f| elsewhere(f, &[("location", "Cargo.toml"), ("length", "144")]), &[]),
            (|f| elsewhere(f, &[("location", "Cargo.toml"), ("length", "140")]), &["'conv2d1.weight'", "36 values", "found 35"]),
            (|f| graph(f).initializer[1].dims = vec![2, 2], &["node 'batch_norm1' (BatchNormalization)", "4 numbers in input 1", "[2, 2]"]),
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
