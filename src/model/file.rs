//! Architecture files: TOML in, [`Definition`] out, every mistake with its line.
//!
//! ```toml
//! name = "lenet5"
//! input = [28, 28, 1]            # height, width, channels
//! classes = 10
//! loss = "softmax_cross_entropy" # or "squared_error"
//!
//! [recipe]
//! optimizer = "sgd"              # sgd: momentum, weight_decay
//! lr = 0.05                      # adamw: beta1, beta2, epsilon, weight_decay
//! momentum = 0.9
//! schedule = "constant"          # or "cosine", "onecycle"
//! epochs = 3
//! batch_size = 128
//!
//! [[layer]]
//! type = "conv2d"                # out_channels, kernel, stride = 1, padding = 0, activation
//! out_channels = 6
//! kernel = 5                     # or [height, width], like stride and padding
//! activation = "relu"            # fused into the layer; `type = "relu"` is a layer of its own
//!
//! [[layer]]
//! type = "max_pool2d"            # or mean_pool2d: kernel, stride = kernel
//! kernel = 2
//!
//! [[layer]]
//! type = "dense"                 # units, activation; also the layers relu and sigmoid
//! units = "classes"              # or a number
//! ```

use super::block::{Blocks, Node, expand};
use super::keys::Table;
use super::recipe::Recipe;
use super::recipe_file::Settings;
use super::{Loss, Model, Op, Shape};
use crate::error::{Error, Result};
use serde::Deserialize;
use std::ops::Range;
use std::path::Path;
use toml::Spanned;

/// The architectures that come with the binary: name and text of the file in `models/`.
pub const SHIPPED: &[(&str, &str)] = &[
    ("default", include_str!("../../models/default.toml")),
    ("lenet5", include_str!("../../models/lenet5.toml")),
    ("tutorial", include_str!("../../models/tutorial.toml")),
    ("mlp-sigmoid", include_str!("../../models/mlp-sigmoid.toml")),
    ("vgg-cifar", include_str!("../../models/vgg-cifar.toml")),
    ("cnn-bn", include_str!("../../models/cnn-bn.toml")),
    ("tiny", include_str!("../../models/tiny.toml")),
    ("cifar-fast", include_str!("../../models/cifar-fast.toml")),
    ("resnet9", include_str!("../../models/resnet9.toml")),
    (
        "resnet18-cifar",
        include_str!("../../models/resnet18-cifar.toml"),
    ),
    (
        "mobilenet-small",
        include_str!("../../models/mobilenet-small.toml"),
    ),
];

/// Most elements that a tensor may have, a batch's activation and all parameters alike; the kernels
/// index with 32 bits.
pub const MAX_ELEMENTS: u128 = 1 << 31;

/// Most multiply-adds of one layer for one image (ResNet-50 as a whole takes 4·10⁹), so that sums
/// over layers and passes stay far from the end of 64 bits.
const MAX_MULTIPLY_ADDS: u128 = 1 << 40;

/// What a number of a recipe must be besides.
pub(super) const FINITE: &str = " that 32 bits hold (1.2e-38 to 3.4e38)";

/// Reads an architecture: one of [`SHIPPED`] by name, or a file whose path ends in `.toml`.
///
/// # Errors
/// [`Error::Usage`] for an unknown name, [`Error::Io`] for an unreadable file, and what
/// [`Definition::parse`] finds.
pub fn load(spec: &str) -> Result<Definition> {
    if let Some((name, text)) = SHIPPED.iter().find(|(name, _)| *name == spec) {
        return Definition::parse(text, &format!("models/{name}.toml"));
    }
    if !spec.ends_with(".toml") {
        let names: Vec<&str> = SHIPPED.iter().map(|(name, _)| *name).collect();
        return Err(Error::Usage(format!(
            "unknown model '{spec}': expected one of {} or the path of a file that ends in .toml",
            names.join(", ")
        )));
    }
    let text = std::fs::read_to_string(spec).map_err(|e| Error::io("read", Path::new(spec), e))?;
    Definition::parse(&text, spec)
}

/// The name of the shipped model for images of this shape when none is asked for: `default` for grey
/// ones up to 32×32, `mobilenet-small`, which pools over whatever size is left, for all others.
pub fn default_for(input: Shape) -> &'static str {
    let is_small = input.height.max(input.width) <= 32;
    match input.channels == 1 && is_small {
        true => "default",
        false => "mobilenet-small",
    }
}

/// An architecture as its file gives it, before it meets a dataset.
#[derive(Clone, Debug)]
pub struct Definition {
    /// ASCII letters, digits, `-`, `_` and `.`, so that it can be part of a file name.
    pub name: String,
    /// Image shape when there is no dataset to take it from.
    pub input: Shape,
    /// Number of classes when there is no dataset to take it from.
    pub classes: usize,
    /// What is minimised.
    pub loss: Loss,
    /// How it is trained unless something else is said.
    pub recipe: Recipe,
    /// What [`Self::recipe`] was read from.
    settings: Settings,
    /// The whole text of the file, for the run folder.
    pub text: String,
    origin: String,
    nodes: Vec<Node>,
}

impl Definition {
    /// Reads the text of an architecture file; `origin` stands for the file in messages.
    ///
    /// # Errors
    /// [`Error::Model`] with the line of the first mistake: TOML syntax, unknown or missing keys,
    /// values of the wrong type or out of range. What depends on shapes is [`Self::resolve`]'s.
    pub fn parse(text: &str, origin: &str) -> Result<Definition> {
        let source = Source { text, origin };
        let file: FileTable = source.toml()?;

        let name = file.name.get_ref();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(plain) {
            return Err(source.error(
                &file.name.span(),
                format!(
                    "expected a name of 1 to 64 letters, digits, '-', '_' or '.' that does not start with '.', found {name:?}"
                ),
            ));
        }
        let [height, width, channels] = file.input.get_ref().map(|Whole(size)| size);
        let input = Shape::new(height, width, channels);
        if let Some(what) = too_large("input", [height, width, channels]) {
            return Err(source.error(&file.input.span(), what));
        }

        let table = file.recipe.get_ref();
        let settings = Settings::of_table(&source, table, &[])?;
        for key in ["optimizer", "lr", "schedule", "epochs", "batch_size"] {
            if table.get(key).is_none() {
                let what = format!("missing key `{key}` for [recipe]");
                return Err(source.error(&file.recipe.span(), what));
            }
        }

        let nodes = expand(&source, &file.layer, &file.block)?;
        if !nodes.iter().any(Node::has_weights) {
            let line = nodes.first().map_or(1, |node| node.line);
            return Err(source.error_at(line, "expected at least one [[layer]] with weights (conv2d or dense), found none; end the model with type = \"dense\", units = \"classes\""));
        }
        Ok(Definition {
            name: name.clone(),
            input,
            classes: file.classes.0,
            loss: file.loss,
            recipe: settings.recipe(file.loss)?,
            settings,
            text: text.into(),
            origin: origin.into(),
            nodes,
        })
    }

    /// Trains by the settings of these layers, the last one first, and as before where they say nothing.
    ///
    /// # Errors
    /// As [`Settings::recipe`].
    pub fn lay_over(&mut self, layers: &[&Settings]) -> Result<()> {
        for layer in layers {
            self.settings.lay_over(layer);
        }
        self.recipe = self.settings.recipe(self.loss)?;
        Ok(())
    }

    /// The model for images of shape `input` in `classes` classes.
    ///
    /// # Errors
    /// [`Error::Model`] with the line of the layer that does not fit what it is given, that is
    /// larger than the kernels can index (2³¹ elements per tensor), or that ends the model without
    /// one value per class; [`Error::Shape`] for an empty or oversized `input` or no classes.
    pub fn resolve(&self, input: Shape, classes: usize) -> Result<Model> {
        let error = |operation, what| Error::Shape { operation, what };
        let sizes = [input.height, input.width, input.channels];
        if sizes.contains(&0) || classes == 0 {
            let what = format!(
                "expected an input of at least 1×1×1 and at least one class, found {input} and {classes}"
            );
            return Err(error("model", what));
        }
        if let Some(what) = too_large("input", sizes) {
            return Err(error("model", what));
        }

        self.settings.expect_classes(classes)?;
        let mut model = Model::new(&self.name, input, classes, self.loss);
        for node in &self.nodes {
            self.push(&mut model, node).map_err(|error| match error {
                Error::Shape { operation, what } => self.layer_error(node, operation, &what),
                other => other,
            })?;
        }
        if let Some((i, what)) = model.mixed_orders() {
            let operation = model.layers[i].op.name();
            return Err(self.layer_error(&self.nodes[i], operation, what));
        }
        model.finish().map_err(|error| match error {
            Error::Shape { what, .. } => {
                let last = self
                    .nodes
                    .last()
                    .map_or(1, |node| node.used.unwrap_or(node.line));
                self.error(last, format!("model: {what}"))
            }
            other => other,
        })
    }

    /// With the layer's name, its type where the name does not say it, and where its block is used.
    fn layer_error(&self, node: &Node, operation: &str, what: &str) -> Error {
        let mut place = node.name.clone();
        let own = node.name.rsplit('.').next().unwrap_or_default();
        if !own.starts_with(node.kind) {
            place += &format!(" ({operation})");
        }
        if let Some(line) = node.used {
            place += &format!(" (in a block used in line {line})");
        }
        self.error(node.line, format!("{place}: {what}"))
    }

    fn error(&self, line: usize, what: String) -> Error {
        Error::Model {
            file: self.origin.clone(),
            line,
            what,
        }
    }

    /// Adds a layer to the model, within the bounds of what the kernels can index.
    fn push(&self, model: &mut Model, node: &Node) -> Result<()> {
        let shapes: Vec<Shape> = node
            .inputs
            .iter()
            .map(|value| model.shape(*value))
            .collect();
        let op = node.make.op(shapes[0], model.classes)?;
        let bounded = |found: Option<String>| match found {
            Some(what) => Err(Error::Shape {
                operation: op.name(),
                what,
            }),
            None => Ok(()),
        };
        let output = op.output(&shapes)?;
        bounded(too_large(
            "output",
            [output.height, output.width, output.channels],
        ))?;
        bounded(too_costly(&op))?;
        let name = Some(node.name.clone());
        model.push(name, op, node.activation, node.init, &node.inputs)?;
        bounded(too_large(
            "all parameters so far",
            [model.parameter_elements],
        ))
    }
}

/// What is out of bounds about a layer's weight or its cost.
fn too_costly(op: &Op) -> Option<String> {
    let g = op.product()?;
    let [height, width] = g.kernel;
    let [channels, _] = g.group_channels();
    let weight = [height, width, channels, g.output.channels];
    if let Some(what) = too_large("weight", weight) {
        return Some(what);
    }
    let multiply_adds = g.weight_elements() as u128 * g.positions() as u128;
    (multiply_adds > MAX_MULTIPLY_ADDS).then(|| {
        format!(
            "expected at most {MAX_MULTIPLY_ADDS} multiply-adds per image, found {multiply_adds}; make the layer or its input smaller"
        )
    })
}

/// Says so when a tensor of these sizes has more elements than the kernels can index.
fn too_large<const N: usize>(tensor: &str, sizes: [usize; N]) -> Option<String> {
    let elements = sizes
        .iter()
        .fold(1u128, |product, &size| product.saturating_mul(size as u128));
    (elements > MAX_ELEMENTS).then(|| {
        format!(
            "expected at most {MAX_ELEMENTS} elements in a tensor, found {elements} ({tensor}, {}); make the layer or its input smaller",
            sizes.map(|size| size.to_string()).join("×")
        )
    })
}

/// The text being read, for turning byte ranges into lines.
pub(super) struct Source<'a> {
    pub text: &'a str,
    pub origin: &'a str,
}

impl Source<'_> {
    /// The text as TOML.
    pub fn toml<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        toml::from_str(self.text).map_err(|e| self.toml_error(&e))
    }

    /// Line of byte `at`, from 1; the end of the text belongs to its last line.
    pub fn line(&self, at: usize) -> usize {
        let last = self.text.trim_end_matches(['\n', '\r']).len();
        let before = &self.text.as_bytes()[..at.min(last)];
        1 + before.iter().filter(|&&byte| byte == b'\n').count()
    }

    pub fn error(&self, span: &Range<usize>, what: impl Into<String>) -> Error {
        self.error_at(self.line(span.start), what)
    }

    pub fn error_at(&self, line: usize, what: impl Into<String>) -> Error {
        Error::Model {
            file: self.origin.into(),
            line,
            what: what.into(),
        }
    }

    /// A complaint of the TOML reader or of serde in the words of a TOML file, on one line.
    fn toml_error(&self, error: &toml::de::Error) -> Error {
        let span = error.span().unwrap_or(0..0);
        let mut what = error
            .message()
            .lines()
            .collect::<Vec<_>>()
            .join(", ")
            .replace("unknown field", "unknown key")
            .replace("missing field", "missing key")
            .replace("unknown variant", "unknown value")
            .replace("expected i64", "expected a whole number")
            .replace("expected f64", "expected a number");
        // Our own messages (see `Whole`) are given before the value is in sight.
        if what.starts_with("expected")
            && let Some(found) = self.text.get(span.clone())
            && !found.contains('\n')
        {
            what += &format!(", found {found}");
        }
        self.error(&span, what)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileTable {
    name: Spanned<String>,
    input: Spanned<[Whole<1>; 3]>,
    classes: Whole<2>,
    loss: Loss,
    recipe: Spanned<Table>,
    #[serde(default)]
    layer: Vec<Spanned<Table>>,
    #[serde(default)]
    block: Blocks,
}

/// A whole number from `MIN` to 2³¹: what sizes and counts are made of.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "i64")]
struct Whole<const MIN: i64>(usize);

impl<const MIN: i64> TryFrom<i64> for Whole<MIN> {
    type Error = String;

    fn try_from(value: i64) -> std::result::Result<Self, String> {
        if (MIN..=MAX_ELEMENTS as i64).contains(&value) {
            return Ok(Whole(value as usize));
        }
        Err(format!(
            "expected a whole number from {MIN} to {MAX_ELEMENTS}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Activation;
    use crate::model::recipe::{ClassWeights, Optimizer, Schedule};

    const SMALL: &str = r#"name = "small"
input = [9, 8, 2]
classes = 3
loss = "softmax_cross_entropy"

[recipe]
optimizer = "sgd"
lr = 1
schedule = "cosine"
epochs = 2
batch_size = 4

[[layer]]
type = "conv2d"
out_channels = 5
kernel = [3, 2]
stride = [2, 1]
padding = [0, 1]

[[layer]]
type = "relu"

[[layer]]
type = "mean_pool2d"
kernel = 2
stride = 1

[[layer]]
type = "dense"
units = "classes"
"#;

    fn resolve(text: &str) -> Result<Model> {
        let definition = Definition::parse(text, "small.toml")?;
        definition.resolve(definition.input, definition.classes)
    }

    #[test]
    fn every_key_arrives() {
        let definition = Definition::parse(SMALL, "small.toml").unwrap();
        assert_eq!(definition.text, SMALL);
        let model = definition.resolve(definition.input, 3).unwrap();
        let Op::Conv2d(geometry) = model.layers[0].op else {
            panic!("{:?}", model.layers[0]);
        };
        assert_eq!(model.layers[0].activation, None);
        assert_eq!(geometry.kernel, [3, 2]);
        assert_eq!(geometry.stride, [2, 1]);
        assert_eq!(geometry.padding, [0, 1]);
        assert_eq!(geometry.output, Shape::new(4, 9, 5));
        assert_eq!(model.layers[1].op, Op::Activation(Activation::Relu));
        assert_eq!(model.layers[2].output, Shape::new(3, 8, 5));
        assert_eq!(model.layers[3].parameter_count(), (3 * 8 * 5 + 1) * 3);
        assert_eq!(
            definition.recipe,
            Recipe {
                optimizer: Optimizer::Sgd {
                    momentum: 0.0,
                    nesterov: false,
                    weight_decay: 0.0
                },
                lr: 1.0,
                schedule: Schedule::Cosine,
                epochs: 2,
                batch_size: 4,
                ..Recipe::default()
            }
        );
    }

    #[test]
    fn a_recipe_can_smooth_labels_and_weigh_classes() {
        let more = "epochs = 2\nlabel_smoothing = 0.1\nclass_weights = [0.5, 1, 2.5]";
        let text = SMALL.replace("epochs = 2", more);
        let definition = Definition::parse(&text, "small.toml").unwrap();
        assert_eq!(definition.recipe.label_smoothing, 0.1);
        assert_eq!(
            definition.recipe.class_weights,
            Some(ClassWeights::Given(vec![0.5, 1.0, 2.5]))
        );
        definition.resolve(definition.input, 3).unwrap();
        let error = definition.resolve(definition.input, 4).unwrap_err();
        assert!(error.to_string().starts_with("small.toml:12: "), "{error}");
    }

    #[test]
    fn adamw_has_the_defaults_of_pytorch() {
        let text = SMALL.replace("\"sgd\"", "\"adamw\"\nbeta2 = 0.5");
        let recipe = Definition::parse(&text, "small.toml").unwrap().recipe;
        let expected = Optimizer::Adamw {
            beta1: 0.9,
            beta2: 0.5,
            epsilon: 1e-8,
            weight_decay: 0.01,
        };
        assert_eq!(recipe.optimizer, expected);
    }

    #[test]
    fn a_fused_relu_and_a_default_pool_stride() {
        let text = SMALL
            .replace("kernel = 2\nstride = 1", "kernel = 2")
            .replace("\"classes\"", "3\nactivation = \"relu\"");
        let model = resolve(&text).unwrap();
        assert_eq!(model.layers[2].output, Shape::new(2, 4, 5));
        assert_eq!(model.layers[3].activation, Some(Activation::Relu));
    }

    /// Each mistake: what to replace in [`SMALL`], by what, the line it is reported at, and words
    /// that the message must hold.
    #[test]
    fn mistakes_are_reported_with_their_line() {
        #[rustfmt::skip]
        let cases: &[(&str, &str, usize, &[&str])] = &[
            // Syntax.
            ("classes = 3", "classes = ", 3, &["value"]),
            ("[recipe]", "[recipe", 6, &["]"]),
            ("\"relu\"", "\"relu", 21, &["string"]),
            ("units = \"classes\"\n", "units = \"classes\"\nunits", 31, &["key with no value"]),
            ("classes = 3", "classes = 3\nclasses = 4", 4, &["duplicate key"]),
            // Keys.
            ("classes = 3", "clases = 3", 3, &["unknown key `clases`", "`classes`"]),
            ("epochs", "epoch", 10, &["unknown key `epoch`", "`epochs`"]),
            ("padding", "pading", 18, &["unknown key `pading`", "`padding`"]),
            ("epochs = 2\n", "", 6, &["missing key `epochs` for [recipe]"]),
            ("type = \"relu\"\n", "", 20, &["missing key `type`"]),
            ("kernel = [3, 2]\n", "", 13, &["missing key `kernel` for conv2d"]),
            ("out_channels = 5\n", "", 13, &["missing key `out_channels`"]),
            ("kernel = 2\n", "", 23, &["missing key `kernel` for mean_pool2d"]),
            ("units = \"classes\"\n", "", 28, &["missing key `units` for dense"]),
            ("\"relu\"", "\"relu\"\nkernel = 2", 22, &["unknown key `kernel` for relu", "`type`"]),
            ("stride = 1", "dilation = 1", 26, &["`dilation` for mean_pool2d", "`kernel`, `stride`"]),
            // Types and values.
            ("classes = 3", "classes = \"3\"", 3, &["string \"3\"", "expected a whole number"]),
            ("classes = 3", "classes = 1", 3, &["from 2 to 2147483648, found 1"]),
            ("classes = 3", "classes = 2147483649", 3, &["found 2147483649"]),
            ("[9, 8, 2]", "[9, 8]", 2, &["length 2"]),
            ("[9, 8, 2]", "[9, 0, 2]", 2, &["whole number from 1", "found [9, 0, 2]"]),
            ("[9, 8, 2]", "[65536, 65536, 2]", 2, &["2147483648 elements", "65536×65536×2"]),
            ("\"softmax_cross_entropy\"", "\"hinge\"", 4, &["unknown value `hinge`", "`squared_error`"]),
            ("\"small\"", "\"../small\"", 1, &["\"../small\""]),
            ("\"small\"", "\"\"", 1, &["1 to 64"]),
            ("\"sgd\"", "\"adam\"", 7, &["unknown value `adam`", "`adamw`"]),
            ("lr = 1", "lr = true", 8, &["expected a number"]),
            ("lr = 1", "lr = 0", 8, &["above 0", "found 0"]),
            ("lr = 1", "lr = nan", 8, &["found nan"]),
            ("lr = 1", "lr = 1e39", 8, &["3.4e38", "found 1e39"]),
            ("lr = 1", "lr = 1\nweight_decay = 1e39", 9, &["3.4e38", "found 1e39"]),
            ("lr = 1", "lr = 1\nmomentum = 1.0", 9, &["below 1, found 1"]),
            ("lr = 1", "lr = 1\nweight_decay = -0.1", 9, &["at least 0", "found -0.1"]),
            ("lr = 1", "lr = 1\nbeta1 = 0.9", 9, &["`beta1` belongs to the optimizer adamw and lion, not to sgd"]),
            ("\"sgd\"", "\"adamw\"\nmomentum = 0.9", 8, &["`momentum` belongs to the optimizer sgd"]),
            ("\"sgd\"", "\"adamw\"\nepsilon = 1e-60", 8, &["above 0"]),
            ("\"cosine\"", "\"poly\"", 9, &["unknown value `poly`", "`onecycle`"]),
            ("epochs = 2", "epochs = 0", 10, &["whole number from 1", "found 0"]),
            ("batch_size = 4", "batch_size = 0", 11, &["whole number from 1", "found 0"]),
            ("batch_size = 4", "batch_size = 4.5", 11, &["4.5", "whole number"]),
            ("\"conv2d\"", "\"conv\"", 14, &["unknown value `conv`", "`conv2d`"]),
            ("out_channels = 5", "out_channels = 0", 15, &["whole number from 1"]),
            ("kernel = 2", "kernel = 0", 25, &["expected a whole number", "found 0"]),
            ("kernel = 2", "kernel = [2, 2, 2]", 25, &["[height, width], found [2, 2, 2]"]),
            ("stride = 1", "stride = [1, 0]", 26, &["expected a whole number", "[1, 0]"]),
            ("padding = [0, 1]", "padding = -1", 18, &["found -1"]),
            ("padding = [0, 1]", "activation = \"tan\"", 18, &["unknown value `tan`", "`relu`", "`tanh`"]),
            ("\"classes\"", "\"class\"", 30, &["\"classes\", found \"class\""]),
            ("\"mean_pool2d\"\nkernel = 2", "\"max_pool2d\"\nkernel = [16, 17]", 25, &["256", "16×17"]),
            ("lr = 1", "lr = 1\nlabel_smoothing = 1.0", 9, &["below 1, found 1"]),
            ("lr = 1", "lr = 1\nclass_weights = [1, 2]", 9, &["each of 3 classes, found 2"]),
            ("lr = 1", "lr = 1\nclass_weights = [1,\n0, 2]", 10, &["above 0", "found 0"]),
            ("\"softmax_cross_entropy\"\n\n[recipe]\n", "\"squared_error\"\n[recipe]\nlabel_smoothing = 0.1\n", 6, &["belongs to the loss softmax_cross_entropy"]),
            // What is in a table of its own.
            ("\n\n[[layer]]", "\n[recipe.augment]\nrotate = 181\n[[layer]]", 13, &["`rotate` from 0 to 180, found 181"]),
            ("\n\n[[layer]]", "\n[recipe.augment]\nflip = 'random'\nscale = -0.5\n[[layer]]", 14, &["`scale` from 0 to 0.9, found -0.5"]),
            ("\n\n[[layer]]", "\n[recipe.augment]\nerase = nan\n[[layer]]", 13, &["`erase` from 0 to 1, found NaN"]),
            ("\n\n[[layer]]", "\n[recipe.augment]\nflip = 'vertical'\n[[layer]]", 13, &["unknown value `vertical`", "`alternating`"]),
            ("\n\n[[layer]]", "\n[recipe.augment]\ncrop = 2\nrotat = 5\n[[layer]]", 14, &["unknown key `rotat`", "`rotate`"]),
            ("\n\n[[layer]]", "\n[recipe.augment]\ncrop = 257\n[[layer]]", 13, &["`crop`", "from 0 to 256, found 257"]),
            ("\n\n[[layer]]", "\n[recipe.augment]\ncrop = -1\n[[layer]]", 13, &["-1"]),
            ("\n\n[[layer]]", "\n[recipe.augment]\ncrop = 1.5\n[[layer]]", 13, &["1.5"]),
            ("\n\n[[layer]]", "\n[recipe.augment]\nshift = '3'\n[[layer]]", 13, &["expected"]),
            ("\n\n[[layer]]", "\n[recipe.augment]\nresized_crop = [0.5, 0.4]\n[[layer]]", 13, &["[smallest, largest]", "found [0.5, 0.4]"]),
            ("\n\n[[layer]]", "\n[recipe.augment]\nerase_size = [0, 0.4]\n[[layer]]", 13, &["`erase_size`", "found [0, 0.4]"]),
            ("lr = 1", "lr = 1\naugment = 3", 9, &["expected"]),
            // Shapes.
            ("kernel = [3, 2]", "kernel = [10, 2]", 13, &["conv2d", "kernel 10 over input height 9"]),
            ("padding = [0, 1]", "padding = [0, 2]", 13, &["padding smaller than the kernel"]),
            ("kernel = 2\n", "kernel = [2, 10]\n", 23, &["pool2d", "kernel 10 over input width 9"]),
            ("\"classes\"", "4", 28, &["each of 3 classes", "1×1×4"]),
            // Sizes.
            ("out_channels = 5", "out_channels = 2147483648", 13, &["2147483648 elements", "output, 4×9×"]),
            ("out_channels = 5", "out_channels = 30000000", 28, &["found 2160000000 (weight"]),
            ("\"classes\"", "1000000000", 28, &["found 120000000000 (weight, 1×1×120×1000000000)"]),
        ];
        let mut failures = Vec::new();
        for (old, new, expected, words) in cases {
            assert!(SMALL.contains(old), "nothing to replace: {old}");
            let text = SMALL.replacen(old, new, 1);
            match resolve(&text) {
                Err(Error::Model { file, line, what }) => {
                    let good = file == "small.toml"
                        && line == *expected
                        && !what.contains('\n')
                        && words.iter().all(|word| what.contains(word));
                    if !good {
                        failures.push(format!("{new:?}: expected line {expected} and {words:?}, found {file}:{line}: {what}"));
                    }
                }
                other => failures.push(format!("{new:?}: {other:?}")),
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn models_without_weights_or_layers_are_refused() {
        let (head, _) = SMALL.split_once("[[layer]]").unwrap();
        for (text, expected) in [
            (head.to_string(), 1),
            (format!("{head}[[layer]]\ntype = \"relu\"\n"), 13),
        ] {
            match resolve(&text) {
                Err(Error::Model { line, what, .. }) => {
                    assert_eq!(line, expected, "{what}");
                    assert!(what.contains("with weights"), "{what}");
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn cost_and_total_size_are_bounded() {
        // 2³⁰ weights twice: each fits, the parameter vector does not; and it costs too much.
        let dense = |units: usize| format!("[[layer]]\ntype = \"dense\"\nunits = {units}\n");
        let (head, _) = SMALL.split_once("[[layer]]").unwrap();
        let head = head.replace("[9, 8, 2]", "[1, 1, 32768]");
        let text = format!("{head}{}{}{}", dense(32768), dense(32768), dense(3));
        let error = resolve(&text).unwrap_err().to_string();
        assert!(error.starts_with("small.toml:16: dense2: "), "{error}");
        assert!(error.contains("all parameters so far"), "{error}");

        let text = SMALL
            .replace("[9, 8, 2]", "[4000, 4000, 64]")
            .replace("out_channels = 5", "out_channels = 128")
            .replace("[3, 2]", "[63, 63]")
            .replace("stride = [2, 1]", "stride = 1")
            .replace("[0, 1]", "31");
        let error = resolve(&text).unwrap_err().to_string();
        assert!(error.starts_with("small.toml:13: conv2d1: "), "{error}");
        assert!(error.contains("multiply-adds"), "{error}");
    }

    /// In one group this convolution would have 2³² weights.
    #[test]
    fn groups_count_what_they_have() {
        let (head, _) = SMALL.split_once("[[layer]]").unwrap();
        let head = head.replace("[9, 8, 2]", "[64, 64, 65536]");
        let conv = |groups: &str| {
            format!(
                "{head}[[layer]]\ntype = \"conv2d\"\nout_channels = 65536\nkernel = 1\nstride = 64\ngroups = {groups}\n[[layer]]\ntype = \"dense\"\nunits = 3\n"
            )
        };
        let model = resolve(&conv("\"depthwise\"")).unwrap();
        assert_eq!(model.layers[0].parameter_count(), 2 * 65536);
        assert_eq!(model.layers[0].multiply_adds(), 65536);
        let error = resolve(&conv("1")).unwrap_err().to_string();
        assert!(
            error.contains("4294967296 (weight, 1×1×65536×65536)"),
            "{error}"
        );
        let error = resolve(&conv("3")).unwrap_err().to_string();
        assert!(
            error.contains("groups that divide the 65536 channels"),
            "{error}"
        );
    }

    #[test]
    fn the_dataset_decides_shape_and_classes() {
        let definition = Definition::parse(SMALL, "small.toml").unwrap();
        let model = definition.resolve(Shape::new(12, 12, 1), 7).unwrap();
        assert_eq!(model.input, Shape::new(12, 12, 1));
        assert_eq!(model.layers[3].output, Shape::new(1, 1, 7));
        for shape in [Shape::new(0, 1, 1), Shape::new(1 << 20, 1 << 20, 3)] {
            let error = definition.resolve(shape, 7).unwrap_err();
            assert!(matches!(error, Error::Shape { .. }), "{error}");
        }
        let error = definition.resolve(definition.input, 0).unwrap_err();
        assert!(matches!(error, Error::Shape { .. }), "{error}");
    }

    #[test]
    fn every_shipped_file_resolves_under_its_own_name() {
        let sizes: Vec<(&str, usize)> = SHIPPED
            .iter()
            .map(|(name, _)| {
                let definition = load(name).unwrap();
                assert_eq!(definition.name, *name);
                let model = definition
                    .resolve(definition.input, definition.classes)
                    .unwrap();
                (*name, model.parameter_count())
            })
            .collect();
        assert_eq!(
            sizes,
            [
                ("default", 624 + 19_232 + 131_328 + 2_570),
                ("lenet5", 61_706),
                ("tutorial", 832 + 51_264 + 401_536 + 1_290),
                ("mlp-sigmoid", 79_510),
                // Six convolutions, then 4096 → 256 → 10.
                ("vgg-cifar", 1_145_408 + 1_048_832 + 2_570),
                // As tests/golden/make_networks.py counts them in PyTorch.
                ("cnn-bn", 288_170),
                ("tiny", 9_914),
                // 312 of the whitening, 1,967,616 of the convolutions, 2,304 of the normalisations, 2,560.
                ("cifar-fast", 1_972_792),
                ("resnet9", 6_573_130),
                ("resnet18-cifar", 11_173_962),
                ("mobilenet-small", 153_092),
            ]
        );
    }

    #[test]
    fn the_docs_examples_are_models_and_they_name_every_layer() {
        let docs = include_str!("../../docs/models.md");
        for (file, text) in [
            ("README.md", include_str!("../../README.md")),
            ("models.md", docs),
        ] {
            let mut examples = 0;
            for block in text.split("```toml\n").skip(1) {
                let (example, _) = block.split_once("```").unwrap();
                resolve(example).unwrap_or_else(|e| panic!("{file}: {e}"));
                examples += 1;
            }
            assert!(examples > 0, "{file}");
        }
        for kind in crate::model::op::KINDS {
            assert!(docs.contains(&format!("`{}`", kind.name)), "{}", kind.name);
            for key in kind.keys {
                assert!(docs.contains(&format!("`{key}`")), "{key} of {}", kind.name);
            }
        }
        for (name, _) in SHIPPED {
            assert!(docs.contains(&format!("`{name}`")), "{name}");
        }
    }

    #[test]
    fn a_name_or_a_path() {
        let error = load("resnet").unwrap_err();
        assert!(matches!(error, Error::Usage(_)));
        let error = error.to_string();
        assert!(
            error.contains("default, lenet5, tutorial, mlp-sigmoid, vgg-cifar"),
            "{error}"
        );

        assert!(matches!(
            load("missing.toml").unwrap_err(),
            Error::Io { .. }
        ));

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.toml");
        std::fs::write(&path, SMALL.replace("small", "mine")).unwrap();
        let path = path.to_str().unwrap();
        assert_eq!(load(path).unwrap().name, "mine");
        std::fs::write(path, "name = 3").unwrap();
        let error = load(path).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{path}:1: ")), "{error}");
    }
}
