//! What a graph computes without looking at the image: weights, and shapes.

use super::attributes::{ints, name_of};
use super::{Form, Found, Reader, printable};
use crate::export::onnx::MAX_BYTES;
use crate::export::proto::*;
use crate::model::Shape;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path};
use std::rc::Rc;

/// Most numbers of a shape.
const MOST: usize = 64;

/// A tensor that does not depend on the input.
#[derive(Clone, Debug)]
pub(super) struct Constant {
    pub dims: Vec<usize>,
    pub data: Data,
}

#[derive(Clone, Debug)]
pub(super) enum Data {
    Floats(Rc<Vec<f32>>),
    Integers(Vec<i64>),
}

/// Stands for the number of images in what is computed of shapes.
pub(super) const BATCH: i64 = i64::MIN;

impl<'a> Reader<'a> {
    /// Computes a constant that lies ahead, if it is one. `tried` are the names that were looked at.
    pub(super) fn resolve(&mut self, name: &'a str, tried: &mut HashSet<&'a str>) -> Found<()> {
        let known = self.constants.contains_key(name) || self.values.contains_key(name);
        // As many as a shape takes to be computed.
        if known || tried.len() > 32 || !tried.insert(name) {
            return Ok(());
        }
        if let Some(i) = self.makers.get(name) {
            let node = &self.graph.node[*i];
            for input in &node.input {
                self.resolve(input, tried)?;
            }
            let at = |what: String| format!("node '{}' ({}): {what}", name_of(node), node.op_type);
            if let Some(constant) = self.computed(node).map_err(at)? {
                self.constants.insert(name.into(), constant);
            }
        }
        Ok(())
    }

    /// What a node computes of constants and shapes.
    pub(super) fn computed(&self, node: &NodeProto) -> Found<Option<Constant>> {
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
                        data: Data::Floats(Rc::new(attribute.f.into_iter().collect())),
                    }),
                    ("value_int", _) => integers(attribute.i.into_iter().collect(), true),
                    ("value_ints", _) => integers(attribute.ints.clone(), false),
                    ("value_floats", _) => Some(Constant {
                        dims: vec![attribute.floats.len()],
                        data: Data::Floats(Rc::new(attribute.floats.clone())),
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
                if let ("Identity", [one]) = (node.op_type.as_str(), &inputs[..])
                    && (one.floats().is_some() || one.len() <= MOST)
                {
                    return Ok(Some((*one).clone()));
                }
                if let ("Unsqueeze", Data::Floats(values)) =
                    (node.op_type.as_str(), &inputs[0].data)
                {
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
                    let data = Data::Floats(values.clone());
                    return Ok(Some(Constant { dims, data }));
                }
                let numbers: Option<Vec<&[i64]>> = inputs.iter().map(|c| c.integers()).collect();
                let few =
                    |numbers: &Vec<&[i64]>| numbers.iter().map(|n| n.len()).sum::<usize>() <= MOST;
                let Some(numbers) = numbers.filter(few) else {
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
}

impl Constant {
    pub fn floats(&self) -> Option<&[f32]> {
        match &self.data {
            Data::Floats(values) => Some(values),
            Data::Integers(_) => None,
        }
    }

    pub fn integers(&self) -> Option<&[i64]> {
        match &self.data {
            Data::Integers(values) => Some(values),
            Data::Floats(_) => None,
        }
    }

    pub fn len(&self) -> usize {
        match &self.data {
            Data::Floats(values) => values.len(),
            Data::Integers(values) => values.len(),
        }
    }

    pub fn scalar(&self) -> Option<f32> {
        match &self.data {
            Data::Floats(values) if values.len() == 1 => Some(values[0]),
            Data::Integers(values) if values.len() == 1 => Some(values[0] as f32),
            _ => None,
        }
    }
}

/// Reads the data of a tensor that are in a file beside this one, as PyTorch writes large ones.
pub(super) fn fetch(tensor: &mut TensorProto, folder: &Path) -> Found<()> {
    if tensor.data_location == 0 {
        return Ok(());
    }
    let entry = |key: &str| {
        let mut entries = tensor.external_data.iter();
        let found = entries.find(|entry| entry.key == key)?;
        Some(found.value.as_str())
    };
    let (name, location) = (
        printable(&tensor.name),
        entry("location").unwrap_or_default(),
    );
    // Nothing but a file of that folder: whoever wrote this may have wished for another.
    let mut parts = Path::new(location).components();
    let plain = matches!(
        (parts.next(), parts.next()),
        (Some(Component::Normal(_)), None)
    );
    let path = folder.join(location);
    let is_file = || fs::symlink_metadata(&path).is_ok_and(|found| found.is_file());
    if !plain || !is_file() {
        return Err(format!(
            "expected the weights '{name}' in a file beside this one, found no such file '{}'; copy it here, or write all in one (PyTorch: external_data=False)",
            printable(location)
        ));
    }
    let number = |key: &str, default: Option<u64>| match entry(key) {
        Some(text) => text.parse().ok(),
        None => default,
    };
    let read = || -> std::io::Result<Option<Vec<u8>>> {
        let mut file = File::open(&path)?;
        let all = file.metadata()?.len();
        let offset = number("offset", Some(0)).filter(|offset| *offset <= all);
        let Some(offset) = offset else {
            return Ok(None);
        };
        let length = number("length", Some(all - offset));
        let Some(length) = length.filter(|n| *n <= (all - offset).min(MAX_BYTES)) else {
            return Ok(None);
        };
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = Vec::new();
        file.take(length).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    };
    match read() {
        Ok(Some(bytes)) => {
            tensor.raw_data = bytes;
            Ok(())
        }
        Ok(None) => Err(format!(
            "expected the weights '{name}' in '{}', found it too short; it is damaged or another's",
            printable(location)
        )),
        Err(e) => Err(format!("cannot read '{}': {e}", printable(location))),
    }
}

/// A tensor's values; none for a type that no layer of ours has.
pub(super) fn constant(tensor: &TensorProto) -> Found<Option<Constant>> {
    let name = printable(&tensor.name);
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
        FLOAT if raw.is_empty() => Data::Floats(Rc::new(tensor.float_data.clone())),
        FLOAT => {
            let values = raw.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
            Data::Floats(Rc::new(values.collect()))
        }
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
