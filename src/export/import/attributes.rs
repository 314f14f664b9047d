//! What a node says about itself.

use super::{Found, printable};
use crate::error::Error;
use crate::export::proto::*;
use crate::model::{MAX_ELEMENTS, Pool2d, Shape, same_padding};

pub(super) fn describe(dims: Option<&[DimensionProto]>) -> String {
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
pub(super) fn name_of(node: &NodeProto) -> String {
    match (node.name.as_str(), node.output.first()) {
        ("", Some(output)) => printable(output),
        (name, _) => printable(name),
    }
}

pub(super) fn input(node: &NodeProto, at: usize) -> Found<&str> {
    let name = node.input.get(at).filter(|name| !name.is_empty());
    name.map(String::as_str)
        .ok_or_else(|| format!("expected input {at}, found none"))
}

/// Refuses attributes other than these.
pub(super) fn known(node: &NodeProto, keys: &[&str]) -> Found<()> {
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

pub(super) fn attribute<'n>(node: &'n NodeProto, key: &str) -> Option<&'n AttributeProto> {
    node.attribute.iter().find(|a| a.name == key)
}

pub(super) fn int(node: &NodeProto, key: &str) -> Option<i64> {
    attribute(node, key)?.i
}

pub(super) fn float(node: &NodeProto, key: &str) -> Option<f32> {
    attribute(node, key)?.f
}

pub(super) fn ints(node: &NodeProto, key: &str) -> Option<Vec<i64>> {
    Some(attribute(node, key)?.ints.clone())
}

pub(super) fn text<'n>(node: &'n NodeProto, key: &str) -> Option<&'n str> {
    str::from_utf8(attribute(node, key)?.s.as_deref()?).ok()
}

pub(super) fn epsilon(node: &NodeProto) -> Found<f32> {
    let epsilon = float(node, "epsilon").unwrap_or(1e-5);
    match epsilon > 0.0 && epsilon.is_finite() {
        true => Ok(epsilon),
        false => Err(format!("expected an epsilon above 0, found {epsilon}")),
    }
}

/// `1 − momentum` without what rounding adds to its decimals.
pub(super) fn within_one(momentum: f32) -> f32 {
    ((f64::from(momentum) * 1e6).round() / 1e6).clamp(0.0, 1.0) as f32
}

pub(super) fn at_least_zero(n: i64) -> Found<usize> {
    let found = usize::try_from(n)
        .ok()
        .filter(|n| (*n as u128) < MAX_ELEMENTS);
    found.ok_or_else(|| format!("expected a size from 0 to {MAX_ELEMENTS}, found {n}"))
}

pub(super) fn size(n: i64) -> Found<usize> {
    match at_least_zero(n)? {
        0 => Err("expected a size of at least 1, found 0".into()),
        n => Ok(n),
    }
}

/// A number for height and width each.
pub(super) fn pair(node: &NodeProto, key: &str) -> Found<Option<[usize; 2]>> {
    match ints(node, key).as_deref() {
        None => Ok(None),
        Some([a, b]) => Ok(Some([size(*a)?, size(*b)?])),
        Some(other) => Err(format!("expected two numbers for '{key}', found {other:?}")),
    }
}

pub(super) fn kernel_is(node: &NodeProto, kernel: [usize; 2]) -> Found<()> {
    match pair(node, "kernel_shape")? {
        Some(found) if found != kernel => Err(format!(
            "expected the weight's kernel {kernel:?}, found kernel_shape {found:?}"
        )),
        _ if kernel.contains(&0) => Err("expected a kernel of at least 1×1, found none".into()),
        _ => Ok(()),
    }
}

/// The padding `[[top, bottom], [left, right]]` that `pads` or `auto_pad` give.
pub(super) fn sides(
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

pub(super) fn pool(
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
