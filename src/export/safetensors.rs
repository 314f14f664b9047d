//! safetensors files in PyTorch's order.
//!
//! The flat parameter vector holds `[KH][KW][C][OC]` weights and sees activations as NHWC. PyTorch
//! holds `[OC][C][KH][KW]` for a convolution, and `[out][in]` for a dense layer, with the inputs of a
//! flattened image in NCHW order. A dense layer over an H×W×C activation is a convolution whose
//! kernel covers all of it, so one permutation serves both. What comes after a flattened image without
//! changing its order (a normalisation, another dense layer) is permuted likewise.
//!
//! The metadata, a JSON object, holds under `sha256` the hash of the whole file as it is with zeros in
//! the hash's place: one bit that differs anywhere, in the header or in the tensors, and the file is
//! refused.

use crate::error::{Error, Result};
use crate::files::sha256;
use crate::model::{Layer, Model, Op, Parameter};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::Path;

/// The one key of the file's metadata. One key, because several would be written in an order that
/// changes from run to run, and equal runs shall give equal files.
const METADATA_KEY: &str = "wgrad";

/// What stands in the place of the hash while it is computed.
const NO_HASH: &[u8; 64] = &[b'0'; 64];

/// A weight, a bias or a running statistic as PyTorch holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// `conv2d1.weight`, `dense2.bias`, `batch_norm1.running_mean`, …
    pub name: String,
    /// `[OC, C/groups, KH, KW]` or `[out, in]` for a weight of a product, `[C]` for all else.
    pub shape: Vec<usize>,
    /// In row-major order.
    pub values: Vec<f32>,
}

/// What [`read_safetensors`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Contents {
    /// The flat vectors asked for, in that order.
    pub vectors: Vec<Vec<f32>>,
    /// The running statistics asked for, likewise.
    pub running: Vec<Vec<f32>>,
    /// What the writer had to say; null for files of other programs.
    pub metadata: Value,
    /// Whether the file carries its own hash, which then is right.
    pub hashed: bool,
}

/// Where a tensor lies, here and in PyTorch.
struct Layout {
    name: String,
    /// PyTorch's.
    shape: Vec<usize>,
    /// Of its first element in the flat vector.
    start: usize,
    /// `[height, width, channels, outputs]`.
    sizes: [usize; 4],
    /// For each channel in PyTorch's order the one here.
    order: Vec<usize>,
}

impl Layout {
    fn elements(&self) -> usize {
        self.sizes.iter().product()
    }

    /// For each element, in PyTorch's order, its place in the flat vector.
    fn places(&self) -> impl Iterator<Item = usize> {
        let (start, [height, width, channels, outputs]) = (self.start, self.sizes);
        (0..outputs).flat_map(move |o| {
            self.order.iter().flat_map(move |c| {
                (0..height * width).map(move |p| start + (p * channels + c) * outputs + o)
            })
        })
    }
}

/// Every trained tensor of a model, or every one of its running statistics.
fn layouts(model: &Model, running: bool) -> Vec<Layout> {
    let orders = model.channel_orders();
    let of = |layer: &Layer| -> Vec<Layout> {
        let order = &orders[layer.inputs[0]];
        let tensors = if running {
            &layer.running
        } else {
            &layer.parameters
        };
        tensors
            .iter()
            .map(|tensor| layout(layer, tensor, order))
            .collect()
    };
    model.layers.iter().flat_map(of).collect()
}

/// `order` is that of the layer's input.
fn layout(layer: &Layer, tensor: &Parameter, order: &[usize]) -> Layout {
    let image = layer.input;
    let (sizes, shape) = match (&tensor.shape[..], &layer.op) {
        (&[_, _, inputs, outputs], Op::Dense(_)) => (
            [image.height, image.width, image.channels, outputs],
            vec![outputs, inputs],
        ),
        (&[height, width, channels, outputs], _) => (
            [height, width, channels, outputs],
            vec![outputs, channels, height, width],
        ),
        (shape, Op::Conv2d(_) | Op::Dense(_)) => ([1, 1, 1, tensor.elements()], shape.to_vec()),
        (shape, _) => ([1, 1, tensor.elements(), 1], shape.to_vec()),
    };
    Layout {
        name: tensor.name.clone(),
        shape,
        start: tensor.start,
        sizes,
        // A filter of a convolution in groups counts its own group's channels, and a bias has none.
        order: match sizes[2] == order.len() {
            true => order.to_vec(),
            false => (0..sizes[2]).collect(),
        },
    }
}

/// The weights and biases of a flat parameter vector (or of anything laid out like it) as PyTorch
/// holds them.
pub fn to_pytorch(model: &Model, flat: &[f32]) -> Vec<Tensor> {
    tensors(layouts(model, false), flat)
}

/// The running statistics of their flat vector as PyTorch holds them.
pub fn running_to_pytorch(model: &Model, flat: &[f32]) -> Vec<Tensor> {
    tensors(layouts(model, true), flat)
}

fn tensors(layouts: Vec<Layout>, flat: &[f32]) -> Vec<Tensor> {
    let tensor = |layout: Layout| Tensor {
        name: layout.name.clone(),
        shape: layout.shape.clone(),
        values: layout.places().map(|place| flat[place]).collect(),
    };
    layouts.into_iter().map(tensor).collect()
}

/// The flat parameters and running statistics that these tensors are, given by name in PyTorch's order: the
/// other direction of [`to_pytorch`] and [`running_to_pytorch`].
///
/// # Errors
/// [`Error::Shape`] for one that is missing or has another number of elements.
pub(super) fn from_pytorch(model: &Model, tensors: &[(String, Vec<f32>)]) -> Result<[Vec<f32>; 2]> {
    let fill = |running: bool, elements: usize| {
        let mut flat = vec![0.0; elements];
        for layout in layouts(model, running) {
            let found = tensors.iter().find(|(name, _)| *name == layout.name);
            let values = found.map_or(&[][..], |(_, values)| values);
            if values.len() != layout.elements() {
                return Err(Error::Shape {
                    operation: "from_pytorch",
                    what: format!(
                        "expected '{}' of {:?}, found {} elements",
                        layout.name,
                        layout.shape,
                        values.len()
                    ),
                });
            }
            for (place, value) in layout.places().zip(values) {
                flat[place] = *value;
            }
        }
        Ok(flat)
    };
    Ok([
        fill(false, model.parameter_elements)?,
        fill(true, model.running_elements)?,
    ])
}

/// The bytes of a safetensors file with the tensors of `vectors`, pairs of a prefix for the tensors'
/// names and a flat vector laid out like the parameters, and likewise of `running`, vectors of running
/// statistics. The file's hash is added to the metadata. The same input gives the same bytes.
///
/// # Errors
/// [`Error::Shape`] for a vector that is not as long as the model's parameters or running statistics.
pub fn write_safetensors(
    model: &Model,
    vectors: &[(&str, &[f32])],
    running: &[(&str, &[f32])],
    metadata: Map<String, Value>,
) -> Result<Vec<u8>> {
    let mut named = Vec::new();
    let mut add = |prefix: &str, layouts: &[Layout], flat: &[f32], elements: usize| {
        if flat.len() != elements {
            let found = flat.len();
            let what = format!("expected a vector of {elements} elements, found {found}");
            return Err(shape_error(what));
        }
        for layout in layouts {
            let mut bytes = Vec::with_capacity(4 * layout.elements());
            for place in layout.places() {
                bytes.extend_from_slice(&flat[place].to_le_bytes());
            }
            named.push((
                format!("{prefix}{}", layout.name),
                layout.shape.clone(),
                bytes,
            ));
        }
        Ok(())
    };
    let trained = layouts(model, false);
    for (prefix, flat) in vectors {
        add(prefix, &trained, flat, model.parameter_elements)?;
    }
    let of_running = layouts(model, true);
    for (prefix, flat) in running {
        add(prefix, &of_running, flat, model.running_elements)?;
    }
    let views = named
        .iter()
        .map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
            Ok((name, view.map_err(|e| shape_error(format!("{name}: {e}")))?))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut metadata = metadata;
    let no_hash = String::from_utf8_lossy(NO_HASH).into_owned();
    metadata.insert("sha256".into(), Value::String(no_hash.clone()));
    let metadata = HashMap::from([(METADATA_KEY.into(), Value::Object(metadata).to_string())]);
    let mut bytes =
        safetensors::serialize(views, Some(metadata)).map_err(|e| shape_error(e.to_string()))?;
    if let Some(place) = hash_place(&bytes, &no_hash) {
        let hash = file_hash(&bytes, place);
        bytes[place..place + NO_HASH.len()].copy_from_slice(hash.as_bytes());
    }
    Ok(bytes)
}

/// Where in a file its hash stands, if it is this one.
fn hash_place(bytes: &[u8], hash: &str) -> Option<usize> {
    // The metadata is JSON within JSON, so its quotes are escaped, once; what it quotes itself, twice.
    let before = r#"\"sha256\":\""#;
    let found = format!("{before}{hash}");
    let place = bytes
        .windows(found.len())
        .position(|w| w == found.as_bytes())?;
    Some(place + before.len())
}

/// The hash of a file that has its hash at `place`.
fn file_hash(bytes: &[u8], place: usize) -> String {
    sha256([&bytes[..place], NO_HASH, &bytes[place + NO_HASH.len()..]])
}

/// A file whose header was read: what is in it, what the writer had to say, and whether it carries its own
/// hash, which then is right.
struct Opened<'a> {
    file: SafeTensors<'a>,
    metadata: Value,
    hashed: bool,
}

/// # Errors
/// [`Error::Checkpoint`] for a damaged file.
fn open<'a>(bytes: &'a [u8], path: &Path) -> Result<Opened<'a>> {
    let damaged = |e: safetensors::SafeTensorError| {
        let what = format!(
            "expected a whole safetensors file, found a damaged one ({e}); use another run or train again"
        );
        Error::checkpoint(path, what)
    };
    let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
    let metadata = header.metadata().as_ref().and_then(|m| m.get(METADATA_KEY));
    let metadata: Value = metadata
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default();
    let hash = metadata.get("sha256").and_then(Value::as_str);
    if let Some(hash) = hash {
        let found = hash_place(bytes, hash).map(|place| file_hash(bytes, place));
        if found.as_deref() != Some(hash) {
            return Err(Error::checkpoint(
                path,
                "expected the contents whose SHA-256 is in its header, found others: the file is damaged; use a copy of it, another run, or train again",
            ));
        }
    }
    Ok(Opened {
        file,
        hashed: hash.is_some(),
        metadata,
    })
}

/// Puts the tensor that is called `name` in a file where `layout` has it; else says what the file has.
fn take(
    file: &SafeTensors,
    name: &str,
    layout: &Layout,
    flat: &mut [f32],
) -> std::result::Result<(), String> {
    let tensor = file.tensor(name).map_err(|_| "no such tensor")?;
    if tensor.shape() != layout.shape || tensor.dtype() != Dtype::F32 {
        return Err(format!("{:?} {:?}", tensor.shape(), tensor.dtype()));
    }
    let (values, _) = tensor.data().as_chunks();
    for (place, value) in layout.places().zip(values) {
        flat[place] = f32::from_le_bytes(*value);
    }
    Ok(())
}

/// Reads flat vectors from the bytes of a safetensors file, one for each of `prefixes`, and running
/// statistics, one for each of `running_prefixes`: the other direction of [`write_safetensors`]. `path`
/// stands for the file in messages.
///
/// # Errors
/// [`Error::Checkpoint`] for a damaged file, and for one whose tensors are not those of `model`.
pub fn read_safetensors(
    model: &Model,
    bytes: &[u8],
    prefixes: &[&str],
    running_prefixes: &[&str],
    path: &Path,
) -> Result<Contents> {
    let Opened {
        file,
        metadata,
        hashed,
    } = open(bytes, path)?;
    let read = |prefixes: &[&str], layouts: &[Layout], elements: usize| {
        let mut vectors = Vec::new();
        for prefix in prefixes {
            let mut flat = vec![0.0; elements];
            for layout in layouts {
                let name = format!("{prefix}{}", layout.name);
                take(&file, &name, layout, &mut flat).map_err(|found| {
                    let (shape, model) = (&layout.shape, &model.name);
                    let what = format!(
                        "expected '{name}' of {shape:?} f32 for model '{model}', found {found}; use the model that the file was made with"
                    );
                    Error::checkpoint(path, what)
                })?;
            }
            vectors.push(flat);
        }
        Ok(vectors)
    };
    let (trained, running) = (layouts(model, false), layouts(model, true));
    let expected = prefixes.len() * trained.len() + running_prefixes.len() * running.len();
    let vectors = read(prefixes, &trained, model.parameter_elements)?;
    let running = read(running_prefixes, &running, model.running_elements)?;
    if file.len() != expected {
        return Err(Error::checkpoint(
            path,
            format!(
                "expected {expected} tensors for model '{}', found {}; use the model that the file was made with",
                model.name,
                file.len()
            ),
        ));
    }
    Ok(Contents {
        vectors,
        running,
        metadata,
        hashed,
    })
}

/// What [`read_fitting`] did with the tensors of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Fitting {
    /// Names of those that it took from the file.
    pub taken: Vec<String>,
    /// The others, each with what the file has instead.
    pub left: Vec<(String, String)>,
}

/// Reads into flat parameters and running statistics whatever tensors of a safetensors file have names and
/// shapes of `model`'s. The others stay as they are, and what else is in the file is passed over.
///
/// # Errors
/// [`Error::Checkpoint`] for a damaged file.
pub fn read_fitting(
    model: &Model,
    bytes: &[u8],
    parameters: &mut [f32],
    running: &mut [f32],
    path: &Path,
) -> Result<Fitting> {
    let Opened { file, .. } = open(bytes, path)?;
    let mut fitting = Fitting::default();
    for (of_running, flat) in [(false, parameters), (true, running)] {
        for layout in layouts(model, of_running) {
            match take(&file, &layout.name, &layout, flat) {
                Ok(()) => fitting.taken.push(layout.name),
                Err(found) => fitting.left.push((layout.name, found)),
            }
        }
    }
    Ok(fitting)
}

fn shape_error(what: String) -> Error {
    Error::Shape {
        operation: "write_safetensors",
        what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Conv2d, Loss, Pool2d, Shape};

    /// A 3×2 convolution to 2 channels, pooling to 2×1×2, and a dense layer to 3 classes.
    fn model() -> Model {
        Model::chain(
            "tiny",
            Shape::new(6, 3, 2),
            3,
            Loss::SoftmaxCrossEntropy,
            &["conv2d", "max_pool2d", "dense"],
            |kind, shape| {
                let op = match *kind {
                    "conv2d" => Op::Conv2d(Conv2d::new(shape, 2, [3, 2], [1, 1], [0, 0])?),
                    "max_pool2d" => Op::MaxPool2d(Pool2d::new(shape, [2, 2], [2, 2])?),
                    _ => Op::Dense(Conv2d::dense(shape.elements(), 3)),
                };
                Ok((op, None))
            },
        )
        .unwrap()
    }

    /// Parameter `i` is `i + 1`, gaps are 0.
    fn counted(model: &Model) -> Vec<f32> {
        let mut flat = vec![0.0; model.parameter_elements];
        for layer in &model.layers {
            for i in layer.range() {
                flat[i] = (i + 1) as f32;
            }
        }
        flat
    }

    #[test]
    fn a_convolution_becomes_oihw() {
        let model = model();
        let tensors = to_pytorch(&model, &counted(&model));
        assert_eq!(tensors[0].name, "conv2d1.weight");
        assert_eq!(tensors[0].shape, [2, 2, 3, 2]);
        // Ours is ((kh·2 + kw)·2 + c)·2 + o, so o = 0, c = 0 walks in steps of 4 from 0.
        let expected = [1.0, 5.0, 9.0, 13.0, 17.0, 21.0];
        assert_eq!(tensors[0].values[..6], expected);
        // o = 0, c = 1, then o = 1, c = 0.
        assert_eq!(tensors[0].values[6], 3.0);
        assert_eq!(tensors[0].values[12], 2.0);
        assert_eq!(tensors[1].name, "conv2d1.bias");
        assert_eq!(tensors[1].values, [25.0, 26.0]);
    }

    #[test]
    fn a_dense_layer_sees_its_image_flattened_as_nchw() {
        let model = model();
        assert_eq!(model.layers[2].input, Shape::new(2, 1, 2));
        let tensors = to_pytorch(&model, &counted(&model));
        assert_eq!(tensors[2].name, "dense1.weight");
        assert_eq!(tensors[2].shape, [3, 4]);
        // Our inputs are (h0,c0), (h0,c1), (h1,c0), (h1,c1); PyTorch's (c0,h0), (c0,h1), (c1,h0),
        // (c1,h1). The layer starts at 64; input i of output o is 64 + 3·i + o, plus 1.
        let expected = [
            [65.0, 71.0, 68.0, 74.0],
            [66.0, 72.0, 69.0, 75.0],
            [67.0, 73.0, 70.0, 76.0],
        ];
        assert_eq!(tensors[2].values, expected.concat());
        assert_eq!(tensors[3].values, [77.0, 78.0, 79.0]);
    }

    #[test]
    fn writing_and_reading_gives_the_same_bits() {
        let model = model();
        let mut weights = counted(&model);
        weights[0] = -0.0;
        weights[1] = f32::MIN_POSITIVE / 3.0;
        let moment: Vec<f32> = weights.iter().map(|w| w / 7.0).collect();
        let vectors: [(&str, &[f32]); 2] = [("", &weights), ("moment.", &moment)];
        let metadata = || Map::from_iter([("epoch".to_string(), Value::from(3))]);
        let bytes = write_safetensors(&model, &vectors, &[], metadata()).unwrap();
        assert_eq!(
            bytes,
            write_safetensors(&model, &vectors, &[], metadata()).unwrap()
        );
        let read = read_safetensors(&model, &bytes, &["", "moment."], &[], Path::new("x")).unwrap();
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&read.vectors[0]), bits(&weights));
        assert_eq!(bits(&read.vectors[1]), bits(&moment));
        assert_eq!(read.metadata["epoch"], 3);
        assert!(read.hashed);
    }

    /// All bits of a small file, those of the header's padding too. (What a caller does with a file
    /// that has no hash any more is its own affair, so that is what such a flip comes to.)
    #[test]
    fn a_flipped_bit_is_noticed_wherever_it_is() {
        let model = model();
        // What is quoted in the metadata may look like a hash itself.
        let text = format!("\"sha256\":\"{}\"", String::from_utf8_lossy(NO_HASH));
        let metadata = Map::from_iter([("architecture".to_string(), Value::from(text))]);
        let good = write_safetensors(&model, &[("", &counted(&model))], &[], metadata).unwrap();
        assert!(
            read_safetensors(&model, &good, &[""], &[], Path::new("x"))
                .unwrap()
                .hashed
        );
        for bit in 0..8 * good.len() {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let read = read_safetensors(&model, &bytes, &[""], &[], Path::new("x"));
            assert!(read.is_err() || !read.unwrap().hashed, "bit {bit}");
        }
    }

    #[test]
    fn damaged_and_foreign_files_are_refused() {
        let model = model();
        let flat = counted(&model);
        let bytes = write_safetensors(&model, &[("", &flat)], &[], Map::new()).unwrap();
        let message = |bytes: &[u8], prefixes: &[&str]| {
            let error = read_safetensors(&model, bytes, prefixes, &[], Path::new("a.safetensors"));
            error.unwrap_err().to_string()
        };
        for cut in [0, 5, 40, bytes.len() - 1] {
            assert!(message(&bytes[..cut], &[""]).contains("damaged"), "{cut}");
        }
        assert!(message(&bytes, &["velocity."]).contains("no such tensor"));
        assert!(message(&bytes, &[]).contains("expected 0 tensors"));
        assert!(write_safetensors(&model, &[("", &flat[1..])], &[], Map::new()).is_err());

        let narrow = Model::chain(
            "narrow",
            Shape::new(1, 1, 5),
            3,
            Loss::SoftmaxCrossEntropy,
            &[()],
            |(), shape| Ok((Op::Dense(Conv2d::dense(shape.elements(), 3)), None)),
        )
        .unwrap();
        let error = read_safetensors(&narrow, &bytes, &[""], &[], Path::new("a.safetensors"));
        let error = error.unwrap_err().to_string();
        assert_eq!(
            error,
            "a.safetensors: expected 'dense1.weight' of [3, 5] f32 for model 'narrow', found [3, 4] F32; use the model that the file was made with"
        );
    }

    /// A model file's layers for images of 2×3×2.
    fn file(layers: &str) -> Model {
        let text = format!(
            "name = \"x\"\ninput = [2, 3, 2]\nclasses = 2\nloss = \"softmax_cross_entropy\"\nlayer = [{layers}]\n[recipe]\noptimizer = \"sgd\"\nlr = 0.1\nschedule = \"constant\"\nepochs = 1\nbatch_size = 4\n"
        );
        let definition = crate::model::Definition::parse(&text, "x.toml").unwrap();
        definition.resolve(definition.input, 2).unwrap()
    }

    /// The places of a tensor's values in the flat vector, from the tensor's own start.
    fn places(model: &Model, name: &str) -> (Vec<usize>, Vec<usize>) {
        let count = |elements| (0..elements).map(|i| i as f32).collect::<Vec<_>>();
        let trained = to_pytorch(model, &count(model.parameter_elements));
        let running = running_to_pytorch(model, &count(model.running_elements));
        let mut found = trained
            .into_iter()
            .chain(running)
            .filter(|t| t.name == name);
        let tensor = found.next().unwrap_or_else(|| panic!("no {name}"));
        let start = tensor.values.iter().copied().fold(f32::INFINITY, f32::min);
        let places = tensor.values.iter().map(|v| (v - start) as usize).collect();
        (tensor.shape, places)
    }

    #[test]
    fn running_statistics_have_their_own_vector_and_pytorchs_names() {
        let model = file(
            "{ type = \"batch_norm\" }, { type = \"conv2d\", out_channels = 3, kernel = 1, bias = false }, { type = \"batch_norm\" }, { type = \"dense\", units = 2 }",
        );
        let parameters = counted(&model);
        let running: Vec<f32> = (0..model.running_elements).map(|i| i as f32).collect();
        let bytes = write_safetensors(
            &model,
            &[("", &parameters), ("velocity.", &parameters)],
            &[("", &running)],
            Map::new(),
        )
        .unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut names: Vec<&str> = file
            .names()
            .into_iter()
            .filter(|n| !n.starts_with("velocity"))
            .collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "batch_norm1.bias",
                "batch_norm1.running_mean",
                "batch_norm1.running_var",
                "batch_norm1.weight",
                "batch_norm2.bias",
                "batch_norm2.running_mean",
                "batch_norm2.running_var",
                "batch_norm2.weight",
                "conv2d1.weight",
                "dense1.bias",
                "dense1.weight",
            ]
        );
        assert_eq!(file.names().len(), 11 + 7);
        let variance = file.tensor("batch_norm2.running_var").unwrap();
        let expected: Vec<u8> = [67f32, 68.0, 69.0]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        assert_eq!(
            (variance.shape(), variance.data()),
            (&[3][..], &expected[..])
        );
        let read =
            read_safetensors(&model, &bytes, &["", "velocity."], &[""], Path::new("x")).unwrap();
        assert_eq!(read.vectors, [&parameters[..], &parameters[..]]);
        // Gaps come back as zeros.
        for layer in &model.layers {
            let range = layer.running_range();
            assert_eq!(read.running[0][range.clone()], running[range]);
        }
        let error = write_safetensors(&model, &[("", &parameters)], &[("", &[])], Map::new());
        assert!(error.is_err(), "statistics left out");

        // A model with another layer at its end takes what fits, to the same places.
        let other = self::file(
            "{ type = \"batch_norm\" }, { type = \"conv2d\", out_channels = 3, kernel = 1, bias = false }, { type = \"batch_norm\" }, { type = \"dense\", units = 4 }, { type = \"dense\", units = 2 }",
        );
        let mut taken = vec![-1.0; other.parameter_elements];
        let mut statistics = vec![-1.0; other.running_elements];
        let path = Path::new("x");
        let fitting = read_fitting(&other, &bytes, &mut taken, &mut statistics, path).unwrap();
        let left: Vec<&str> = fitting.left.iter().map(|(name, _)| &name[..]).collect();
        assert_eq!(
            left,
            [
                "dense1.weight",
                "dense1.bias",
                "dense2.weight",
                "dense2.bias"
            ]
        );
        assert_eq!(fitting.left[0].1, "[2, 18] F32");
        assert_eq!(fitting.left[2].1, "no such tensor");
        assert_eq!(fitting.taken.len(), 9);
        for layer in &model.layers[..3] {
            assert_eq!(taken[layer.range()], parameters[layer.range()]);
            let range = layer.running_range();
            assert_eq!(statistics[range.clone()], running[range]);
        }
        assert!(
            other.layers[3..]
                .iter()
                .all(|l| taken[l.range()].iter().all(|v| *v == -1.0))
        );
    }

    #[test]
    fn filters_in_groups_become_oihw() {
        let model = file(
            "{ type = \"conv2d\", out_channels = 4, kernel = [1, 2], groups = 2 }, { type = \"dense\", units = 2 }",
        );
        let (shape, places) = places(&model, "conv2d1.weight");
        assert_eq!(shape, [4, 1, 1, 2]);
        // Ours is [1][2][1][4].
        assert_eq!(places, [0, 4, 1, 5, 2, 6, 3, 7]);
    }

    /// What stands behind `flatten` counts its inputs as the dense layer over the image does, with
    /// layers in between too.
    #[test]
    fn a_flattened_image_is_seen_as_nchw() {
        let dense = "{ type = \"dense\", units = 2 }";
        let straight = places(&file(dense), "dense1.weight");
        assert_eq!(straight.0, [2, 12]);
        let between = "{ type = \"flatten\" }, { type = \"batch_norm\", activation = \"relu\" }, { type = \"dropout\" }";
        let flattened = file(&format!("{between}, {dense}"));
        assert_eq!(places(&flattened, "dense1.weight"), straight);
        // (h, w, c) of 2×3×2 in the order (c, h, w).
        let order = [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11];
        for name in ["weight", "bias", "running_mean", "running_var"] {
            let (shape, places) = places(&flattened, &format!("batch_norm1.{name}"));
            assert_eq!((shape, &places[..]), (vec![12], &order[..]), "{name}");
        }
        let joined = file(&format!(
            "{{ type = \"flatten\" }}, {{ type = \"dense\", units = 1, input = \"input\" }}, {{ type = \"concat\", inputs = [\"dense1\", \"flatten1\"] }}, {dense}"
        ));
        let (_, places) = places(&joined, "dense2.weight");
        let expected: Vec<usize> = std::iter::once(0)
            .chain(order.map(|i| i + 1))
            .map(|i| 2 * i)
            .collect();
        assert_eq!(places[..13], expected);
    }
}
