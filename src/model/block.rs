//! From the tables of a model file to a list of layers: blocks become copies of their layers, names
//! become places in the list.

use super::file::Source;
use super::keys::{COMMON, Keys, Table, Value, Words, kind, reserved};
use super::op::Make;
use super::{Activation, Init};
use crate::error::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use toml::Spanned;

/// Most layers of a network, so that blocks within blocks end somewhere.
const MAX_LAYERS: usize = 4096;

/// The blocks of a file by name.
pub(super) type Blocks = BTreeMap<Spanned<String>, Spanned<Table>>;

/// A layer before it meets a shape.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// Of its table.
    pub line: usize,
    /// Where the outermost block that it belongs to is used.
    pub used: Option<usize>,
    pub name: String,
    /// As in the file.
    pub kind: &'static str,
    pub make: Make,
    pub activation: Option<Activation>,
    pub init: Option<Init>,
    /// As in [`super::Layer::inputs`].
    pub inputs: Vec<usize>,
}

/// The layers of a file, each behind those that it takes its inputs from.
///
/// # Errors
/// [`crate::Error::Model`] with the line of the first mistake.
pub(super) fn expand(
    source: &Source,
    layers: &[Spanned<Table>],
    blocks: &Blocks,
) -> Result<Vec<Node>> {
    let mut expansion = Expansion {
        source,
        blocks: read_blocks(source, blocks)?,
        nodes: Vec::new(),
        open: Vec::new(),
        used: BTreeSet::new(),
    };
    expansion.layers(layers, 0, "", &Words::default())?;
    for (name, table) in blocks {
        if !expansion.used.contains(name.get_ref().as_str()) {
            let what = format!("block '{}' is used nowhere; remove it", name.get_ref());
            return Err(source.error(&table.span(), what));
        }
    }
    let nodes = expansion.nodes;
    for (i, node) in nodes.iter().enumerate().rev().skip(1) {
        if !nodes[i + 1..]
            .iter()
            .any(|later| later.inputs.contains(&(i + 1)))
        {
            let what = format!(
                "nothing takes what layer '{}' gives; name it among the inputs of a later layer, or remove it",
                node.name
            );
            return Err(source.error_at(node.line, what));
        }
    }
    Ok(nodes)
}

struct Block<'a> {
    layers: Vec<Spanned<Table>>,
    /// Words and their values where a use does not give them.
    defaults: BTreeMap<String, Spanned<Value>>,
    /// Words that its layers' values may refer to.
    words: BTreeSet<&'a str>,
}

fn read_blocks<'a>(source: &Source, blocks: &'a Blocks) -> Result<BTreeMap<&'a str, Block<'a>>> {
    let mut read = BTreeMap::new();
    for (name, table) in blocks {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        let text = name.get_ref().as_str();
        if kind(text).is_some() || text.is_empty() || text.len() > 64 || !text.chars().all(plain) {
            let what = format!(
                "expected a block's name of 1 to 64 letters, digits, '-' or '_' that is no type of layer, found {text:?}"
            );
            return Err(source.error(&name.span(), what));
        }
        let mut block = Block {
            layers: Vec::new(),
            defaults: BTreeMap::new(),
            words: BTreeSet::new(),
        };
        for (key, value) in &table.get_ref().0 {
            if key.get_ref() != "layer" {
                not_reserved(source, key)?;
                block.defaults.insert(key.get_ref().clone(), value.clone());
                block.words.insert(key.get_ref());
                continue;
            }
            let Value::Array(layers) = value.get_ref() else {
                let what = format!(
                    "expected the layers of block '{text}' as [[block.{text}.layer]] or an array of tables"
                );
                return Err(source.error(&value.span(), what));
            };
            for layer in layers {
                let Value::Table(table) = layer.get_ref() else {
                    let what = "expected a layer as a table { type = … }";
                    return Err(source.error(&layer.span(), what));
                };
                for (key, value) in &table.0 {
                    if !COMMON.contains(&key.get_ref().as_str()) {
                        collect_words(value, &mut block.words);
                    }
                }
                block.layers.push(Spanned::new(layer.span(), table.clone()));
            }
        }
        if block.layers.is_empty() {
            let what = format!(
                "expected layers in block '{text}', found none; add [[block.{text}.layer]]"
            );
            return Err(source.error(&name.span(), what));
        }
        read.insert(text, block);
    }
    Ok(read)
}

/// Refuses a word of the format as a block's own.
fn not_reserved(source: &Source, key: &Spanned<String>) -> Result<()> {
    let word = key.get_ref();
    if reserved(word) || COMMON.contains(&word.as_str()) || ["repeat", "layer"].contains(&&**word) {
        let what = format!("`{word}` means something already; give the block's value another name");
        return Err(source.error(&key.span(), what));
    }
    Ok(())
}

fn collect_words<'a>(value: &'a Spanned<Value>, words: &mut BTreeSet<&'a str>) {
    match value.get_ref() {
        Value::Text(word) if !reserved(word) => {
            words.insert(word);
        }
        Value::Array(values) => values.iter().for_each(|value| collect_words(value, words)),
        Value::Table(table) => table
            .0
            .iter()
            .for_each(|(_, value)| collect_words(value, words)),
        _ => {}
    }
}

struct Expansion<'a> {
    source: &'a Source<'a>,
    blocks: BTreeMap<&'a str, Block<'a>>,
    nodes: Vec<Node>,
    /// The blocks being expanded, the outermost first, with the lines of their uses.
    open: Vec<(String, usize)>,
    used: BTreeSet<String>,
}

/// The names that can be referred to in one place: in the file's own layers, or in one block.
struct Scope<'a> {
    /// Name, value, line.
    names: Vec<(String, usize, usize)>,
    tables: &'a [Spanned<Table>],
}

impl Scope<'_> {
    fn find(&self, source: &Source, name: &str, place: &Range<usize>) -> Result<usize> {
        if let Some((_, value, _)) = self.names.iter().find(|(known, ..)| known == name) {
            return Ok(*value);
        }
        let named = |table: &&Spanned<Table>| matches!(table.get_ref().get("name").map(Spanned::get_ref), Some(Value::Text(n)) if n == name);
        let what = match self.tables.iter().find(named) {
            Some(later) => format!(
                "layer '{name}' (line {}) does not stand before this one, and only what does can be an input; move it up",
                source.line(later.span().start)
            ),
            None => {
                let known: Vec<_> = self.names.iter().map(|(name, ..)| name.as_str()).collect();
                format!(
                    "unknown layer '{name}', expected one of {}",
                    known.join(", ")
                )
            }
        };
        Err(source.error(place, what))
    }
}

impl Expansion<'_> {
    /// Adds the layers of a file or of a block whose input is the value `input`; says which value the
    /// last one gives.
    fn layers(
        &mut self,
        tables: &[Spanned<Table>],
        input: usize,
        prefix: &str,
        words: &Words,
    ) -> Result<usize> {
        let source = self.source;
        let mut scope = Scope {
            names: vec![("input".into(), input, 0)],
            tables,
        };
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        let mut previous = input;
        for table in tables {
            let line = source.line(table.span().start);
            let mut keys = Keys {
                source,
                table: table.get_ref(),
                span: table.span(),
                kind: "",
                words,
            };
            let kind_value = table.get_ref().get("type");
            keys.kind = match kind_value.map(Spanned::get_ref) {
                Some(Value::Text(name)) => name,
                Some(_) => return Err(keys.error("type", "expected the name of a type of layer")),
                None => return Err(source.error(&table.span(), "missing key `type`")),
            };
            let count = counts.entry(keys.kind).or_default();
            *count += 1;
            let name = keys.name()?.map(String::from);
            let name = name.unwrap_or_else(|| format!("{}{count}", keys.kind));
            if let Some((_, _, before)) = scope.names.iter().find(|(known, ..)| *known == name) {
                let what = format!(
                    "expected a name of its own for each layer, found '{name}' here and in line {before}; set `name`"
                );
                return Err(source.error(&table.span(), what));
            }
            let mut inputs = Vec::new();
            for (name, place) in keys.inputs()? {
                inputs.push(scope.find(source, name, &place)?);
            }
            if inputs.is_empty() {
                inputs.push(previous);
            }
            let full = format!("{prefix}{name}");
            previous = match kind(keys.kind) {
                Some(kind) => {
                    keys.known(kind.keys)?;
                    self.push(Node {
                        line,
                        used: self.open.first().map(|(_, line)| *line),
                        name: full,
                        kind: kind.name,
                        make: (kind.read)(&keys)?,
                        activation: keys.activation()?,
                        init: keys.init()?,
                        inputs,
                    })?
                }
                None => self.block(&keys, line, &full, &inputs)?,
            };
            scope.names.push((name, previous, line));
        }
        Ok(previous)
    }

    fn push(&mut self, node: Node) -> Result<usize> {
        if self.nodes.len() == MAX_LAYERS {
            let what = format!(
                "expected at most {MAX_LAYERS} layers, found more; use smaller numbers for `repeat`"
            );
            return Err(self.source.error_at(node.used.unwrap_or(node.line), what));
        }
        self.nodes.push(node);
        Ok(self.nodes.len())
    }

    /// Adds a block as often as its use says; says which value the last one gives.
    fn block(&mut self, keys: &Keys, line: usize, name: &str, inputs: &[usize]) -> Result<usize> {
        let source = self.source;
        let Some((&block_name, block)) = self.blocks.get_key_value(keys.kind) else {
            let kinds = super::op::KINDS.iter().map(|kind| kind.name);
            let known = kinds.chain(self.blocks.keys().copied());
            let known: Vec<_> = known.map(|name| format!("`{name}`")).collect();
            let what = format!(
                "unknown value `{}`, expected one of {}",
                keys.kind,
                known.join(", ")
            );
            return Err(keys.error("type", what));
        };
        if let Some((_, outer)) = self.open.iter().find(|(open, _)| open == block_name) {
            let what = format!(
                "block '{block_name}' is used within itself (from line {outer} on); a block can use others only"
            );
            return Err(keys.error("type", what));
        }
        let [input] = inputs else {
            let what = format!("expected one input for a block, found {}", inputs.len());
            return Err(keys.error("inputs", what));
        };
        let mut own: Vec<&str> = block.words.iter().copied().collect();
        own.push("repeat");
        keys.known(&own)?;
        let mut words = Words {
            values: block.defaults.clone(),
            block: Some((block_name.into(), line)),
        };
        for (key, value) in &keys.table.0 {
            let key_name = key.get_ref().as_str();
            if !COMMON.contains(&key_name) && key_name != "repeat" {
                not_reserved(source, key)?;
                let value = keys.meant(value).clone();
                words.values.insert(key_name.into(), value);
            }
        }
        let repeat = keys.whole("repeat", 1)?.unwrap_or(1);
        let layers = block.layers.clone();
        self.used.insert(block_name.into());
        self.open.push((block_name.into(), line));
        let mut value = *input;
        for i in 1..=repeat {
            let prefix = match repeat {
                1 => format!("{name}."),
                _ => format!("{name}.{i}."),
            };
            value = self.layers(&layers, value, &prefix, &words)?;
        }
        self.open.pop();
        Ok(value)
    }
}

/// Whether a layer has weights that the network cannot do without.
impl Node {
    pub fn has_weights(&self) -> bool {
        ["conv2d", "dense"].contains(&self.kind)
    }
}

#[cfg(test)]
mod tests {
    use crate::error::Result;
    use crate::model::{Activation, Definition, Model, Op, Shape};

    const HEAD: &str = r#"name = "graph"
input = [8, 8, 3]
classes = 4
loss = "softmax_cross_entropy"
[recipe]
optimizer = "sgd"
lr = 0.1
schedule = "constant"
epochs = 1
batch_size = 2
"#;

    /// From line 11 on.
    const GRAPH: &str = r#"
[[layer]]
type = "conv2d"
name = "stem"
out_channels = 6
kernel = 3
padding = "same"
bias = false

[[layer]]
type = "pair"
channels = 6
repeat = 2

[[layer]]
type = "half"
channels = 5

[[layer]]
type = "concat"
inputs = ["half1", "half1"]

[[layer]]
type = "dense"
units = "classes"

[block.pair]
activate = "silu"

[[block.pair.layer]]
type = "conv2d"
out_channels = "channels"
kernel = 3
padding = 1
activation = "activate"

[[block.pair.layer]]
type = "add"
inputs = ["conv2d1", "input"]

[block.half]
layer = [
  { type = "pair", channels = 6, activate = "leaky_relu", name = "first" },
  { type = "conv2d", out_channels = "channels", kernel = [1, 3], padding = [[0, 0], [2, 0]], stride = [2, 1], dilation = [1, 1] },
]
"#;

    fn resolve(text: &str) -> Result<Model> {
        let definition = Definition::parse(&format!("{HEAD}{text}"), "graph.toml")?;
        definition.resolve(definition.input, definition.classes)
    }

    #[test]
    fn blocks_become_copies_of_their_layers() {
        let model = resolve(GRAPH).unwrap();
        let found: Vec<(&str, &[usize])> = model
            .layers
            .iter()
            .map(|layer| (layer.name.as_str(), &layer.inputs[..]))
            .collect();
        let expected: [(&str, &[usize]); 10] = [
            ("stem", &[0]),
            ("pair1.1.conv2d1", &[1]),
            ("pair1.1.add1", &[2, 1]),
            ("pair1.2.conv2d1", &[3]),
            ("pair1.2.add1", &[4, 3]),
            ("half1.first.conv2d1", &[5]),
            ("half1.first.add1", &[6, 5]),
            ("half1.conv2d1", &[7]),
            ("concat1", &[8, 8]),
            ("dense1", &[9]),
        ];
        assert_eq!(found, expected);
        assert_eq!(model.layers[1].activation, Some(Activation::Silu));
        let leaky = Activation::LeakyRelu { slope: 0.01 };
        assert_eq!(model.layers[5].activation, Some(leaky));
        assert_eq!(model.layers[7].output, Shape::new(4, 8, 5));
        assert_eq!(model.layers[8].output, Shape::new(4, 8, 10));
        let Op::Conv2d(g) = model.layers[0].op else {
            panic!("{:?}", model.layers[0]);
        };
        assert_eq!((g.padding, g.bias), ([1, 1], false));
        let weights: Vec<_> = model.layers[..2]
            .iter()
            .flat_map(|layer| &layer.parameters)
            .map(|p| p.name.as_str())
            .collect();
        let expected = [
            "stem.weight",
            "pair1.1.conv2d1.weight",
            "pair1.1.conv2d1.bias",
        ];
        assert_eq!(weights, expected);
    }

    /// The same layers under other names start from other values and are otherwise the same, so a block
    /// is nothing but its layers.
    #[test]
    fn a_use_of_a_block_is_its_layers() {
        let plain = r#"
[[layer]]
type = "conv2d"
out_channels = 6
kernel = 3
padding = 1
[[layer]]
type = "conv2d"
out_channels = 6
kernel = 3
padding = 1
activation = "silu"
[[layer]]
type = "add"
inputs = ["conv2d2", "conv2d1"]
[[layer]]
type = "dense"
units = 4
"#;
        let block = r#"
[[layer]]
type = "conv2d"
out_channels = 6
kernel = 3
padding = 1
[[layer]]
type = "pair"
channels = 6
[[layer]]
type = "dense"
units = 4
[block.pair]
[[block.pair.layer]]
type = "conv2d"
out_channels = "channels"
kernel = 3
padding = 1
activation = "silu"
[[block.pair.layer]]
type = "add"
inputs = ["conv2d1", "input"]
"#;
        let (plain, block) = (resolve(plain).unwrap(), resolve(block).unwrap());
        assert_eq!(plain.layers.len(), block.layers.len());
        for (a, b) in plain.layers.iter().zip(&block.layers) {
            assert_eq!(a.op, b.op);
            assert_eq!(
                (&a.inputs, a.activation, a.range()),
                (&b.inputs, b.activation, b.range())
            );
        }
    }

    /// PyTorch flattens in another order, so there it would be another network.
    #[test]
    fn a_flattened_image_is_not_mixed_with_another_order() {
        let head = "[[layer]]\ntype = \"flatten\"\n";
        let dense = "[[layer]]\ntype = \"dense\"\nunits = 192\ninput = \"input\"\n";
        let end = "[[layer]]\ntype = \"dense\"\nunits = 4\n";
        let add = "[[layer]]\ntype = \"add\"\ninputs = [\"dense1\", \"flatten1\"]\n";
        let error = resolve(&format!("{head}{dense}{add}{end}")).unwrap_err();
        let error = error.to_string();
        assert!(
            error.starts_with("graph.toml:17: add1: expected inputs whose"),
            "{error}"
        );
        let groups = "[[layer]]\ntype = \"group_norm\"\ngroups = 2\n";
        let error = resolve(&format!("{head}{groups}{end}")).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("graph.toml:13: group_norm1: "),
            "{error}"
        );
        for good in ["type = \"group_norm\"\ngroups = 1", "type = \"relu\""] {
            resolve(&format!("{head}[[layer]]\n{good}\n{end}")).unwrap();
        }
    }

    #[test]
    fn mistakes_in_a_graph_are_reported_with_their_line() {
        #[rustfmt::skip]
        let cases: &[(&str, &str, usize, &[&str])] = &[
            // Names.
            ("\"half1\", \"half1\"", "\"half\", \"half1\"", 31, &["unknown layer 'half'", "input, stem, pair1, half1"]),
            ("\"half1\", \"half1\"", "\"half1\", \"concat1\"", 31, &["unknown layer 'concat1'"]),
            ("inputs = [\"half1\", \"half1\"]", "name = \"cat\"\ninputs = [\"half1\", \"cat\"]", 32, &["'cat' (line 29) does not stand before"]),
            ("type = \"pair\"\nchannels", "type = \"pair\"\ninput = \"end\"\nchannels", 22, &["'end'"]),
            ("units = \"classes\"", "units = \"classes\"\nname = \"stem\"", 33, &["'stem' here and in line 12"]),
            ("name = \"stem\"", "name = \"a.b\"", 14, &["letters, digits", "\"a.b\""]),
            ("name = \"stem\"", "name = \"input\"", 14, &["not \"input\""]),
            ("name = \"stem\"", "input = 3", 14, &["name of a layer, found 3"]),
            ("inputs = [\"half1\", \"half1\"]", "inputs = []", 31, &["array of layers' names"]),
            ("inputs = [\"half1\", \"half1\"]", "input = \"half1\"\ninputs = [\"half1\"]", 32, &["found both"]),
            ("inputs = [\"half1\", \"half1\"]", "", 29, &["concat1: expected at least 2 inputs, found 1"]),
            ("units = \"classes\"", "units = 4\ninputs = [\"concat1\", \"stem\"]", 33, &["dense1: expected one input, found 2"]),
            ("type = \"half\"\n", "type = \"half\"\ninputs = [\"pair1\", \"stem\"]\n", 27, &["one input for a block, found 2"]),
            ("inputs = [\"half1\", \"half1\"]", "inputs = [\"stem\", \"stem\"]", 54, &["nothing takes", "'half1.conv2d1'"]),
            // Shapes: the layer, where its block is used, both shapes.
            ("\"half1\", \"half1\"", "\"half1\", \"stem\"", 29, &["concat1: expected inputs of one height and width", "4×8×5 and 8×8×6"]),
            ("channels = 6\nrepeat", "channels = 7\nrepeat", 47, &["pair1.1.add1 (in a block used in line 20): expected inputs of one shape, found 8×8×7 and 8×8×6"]),
            ("type = \"concat\"\n", "type = \"scale\"\n", 29, &["scale1: expected a map H×W×5 and a vector 1×1×5, found 4×8×5 and 4×8×5"]),
            ("name = \"stem\"", "name = \"stem\"\ngroups = 2", 12, &["stem (conv2d): expected groups that divide the 3 channels"]),
            // Blocks.
            ("type = \"half\"", "type = \"halve\"", 26, &["unknown value `halve`", "`conv2d`", "`half`, `pair`"]),
            ("channels = 5\n", "", 53, &["found \"channels\"", "no `channels` where block 'half' is used (line 25)"]),
            ("channels = 5\n", "channels = 0\n", 27, &["whole number from 1", "found 0"]),
            ("channels = 5\n", "channels = 5\nchanels = 5\n", 28, &["unknown key `chanels` for half", "`channels`, `repeat`"]),
            ("repeat = 2", "repeat = 0", 23, &["whole number from 1", "found 0"]),
            ("repeat = 2", "repeat = 2000000", 20, &["at most 4096 layers"]),
            ("type = \"half\"\nchannels = 5", "type = \"conv2d\"\nname = \"half1\"\nout_channels = 5\nkernel = 1", 53, &["block 'half' is used nowhere"]),
            ("type = \"pair\", channels = 6, activate = \"leaky_relu\"", "type = \"half\", channels = 6", 53, &["used within itself"]),
            ("[block.half]", "[block.conv2d]", 51, &["no type of layer, found \"conv2d\""]),
            ("activate = \"silu\"", "silu = 3", 38, &["`silu` means something already"]),
            ("activate = \"silu\"", "activate = \"silo\"", 38, &["unknown value `silo`"]),
            ("activate = \"silu\"\n", "", 44, &["unknown value `activate`"]),
            ("[block.half]\nlayer = [", "[block.half]\nlayer = 3\nmore = [", 52, &["[[block.half.layer]]"]),
            // Keys.
            ("padding = \"same\"", "padding = \"some\"", 17, &["\"same\" or \"valid\"", "found \"some\""]),
            ("padding = \"same\"", "padding = [[1, 1], [1]]", 17, &["[[top, bottom], [left, right]]"]),
            ("bias = false", "bias = 0", 18, &["true or false, found 0"]),
            ("bias = false", "groups = \"deep\"", 18, &["\"depthwise\""]),
            ("bias = false", "slope = 0.1", 18, &["activation = \"leaky_relu\""]),
            ("bias = false", "activation = \"relu\"\nslope = 0.1", 19, &["`slope` belongs to leaky_relu"]),
            ("bias = false", "init = \"orthogonal\"", 18, &["\"kaiming_normal\"", "{ constant = NUMBER }, found \"orthogonal\""]),
            ("bias = false", "init = { constant = \"a\" }", 18, &["{ constant = NUMBER }"]),
            ("units = \"classes\"", "units = 4\ninit = \"dirac\"", 36, &["\"zeros\"", "found \"dirac\""]),
            ("type = \"concat\"\ninputs = [\"half1\", \"half1\"]", "type = \"batch_norm\"\ninit = \"kaiming_normal\"", 31, &["\"ones\" or { constant"]),
            ("type = \"concat\"\ninputs = [\"half1\", \"half1\"]", "type = \"batch_norm\"\nepsilon = 0", 31, &["above 0"]),
            ("type = \"concat\"\ninputs = [\"half1\", \"half1\"]", "type = \"batch_norm\"\nmomentum = 1.5", 31, &["from 0 to 1, found 1.5"]),
            ("type = \"concat\"\ninputs = [\"half1\", \"half1\"]", "type = \"dropout\"\nprobability = 1", 31, &["below 1, found 1"]),
            ("type = \"concat\"\ninputs = [\"half1\", \"half1\"]", "type = \"group_norm\"", 29, &["missing key `groups` for group_norm"]),
            ("type = \"concat\"\ninputs = [\"half1\", \"half1\"]", "type = \"group_norm\"\ngroups = 2", 29, &["divide the 5 channels, found 2"]),
        ];
        let mut failures = Vec::new();
        for (old, new, line, words) in cases {
            assert!(GRAPH.contains(old), "nothing to replace: {old}");
            let message = match resolve(&GRAPH.replacen(old, new, 1)) {
                Err(error) => error.to_string(),
                Ok(_) => "nothing wrong".into(),
            };
            let at = message.starts_with(&format!("graph.toml:{line}: "));
            if !at || message.contains('\n') || !words.iter().all(|word| message.contains(word)) {
                failures.push(format!(
                    "{new:?}: expected line {line} and {words:?}, found {message}"
                ));
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }
}
