//! A network as the text of a PyTorch module.

use super::onnx::output_order;
use crate::model::{Activation, Layer, Model, Op, Pool2d};
use std::fmt::Write;

/// A Python file with a class `Network`, whose parameters and buffers have the names and shapes of the
/// safetensors files, and a function `load` that reads one. It takes `[N, C, H, W]`, normalised, and gives
/// the network's outputs, `[N, classes]`.
pub fn pytorch_module(model: &Model, normalization: &[f32]) -> String {
    let mut modules = String::new();
    let mut forward = String::new();
    // For each value whether it is a map, [N, C, H, W], or a vector, [N, C].
    let mut maps = vec![true];
    for (i, layer) in model.layers.iter().enumerate() {
        let is_map = is_map(layer, &maps);
        if let Some(module) = module(layer, &maps) {
            // Infallible for a String.
            let _ = writeln!(modules, "        add(self, \"{}\", {module})", layer.name);
        }
        let mut y = expression(layer, &maps);
        if let Some(activation) = &layer.activation {
            y = function(activation, &y);
        }
        let inputs: Vec<String> = layer.inputs.iter().map(|v| format!("x{v}")).collect();
        let _ = writeln!(
            forward,
            "        x{} = {y}  # {}: {} of {}",
            i + 1,
            layer.name,
            layer.op.name(),
            inputs.join(", ")
        );
        maps.push(is_map);
    }
    let last = model.layers.len();
    let mut output = format!("x{last}");
    if maps[last] {
        output += ".flatten(1)";
    }
    if let Some(order) = output_order(model) {
        output += &format!("[:, {order:?}]");
    }
    let (scale, shift) = normalization.split_at(normalization.len() / 2);
    let shape = model.input;
    format!(
        r#""""{name}, as wgrad trained it.

    network = load("model.safetensors")
    outputs = network(normalize(images))  # images: uint8 [N, {channels}, {height}, {width}]
"""

import torch
import torch.nn.functional as F
from torch import nn

# input = byte * scale + shift, per channel
SCALE = {scale:?}
SHIFT = {shift:?}


def normalize(images):
    """float32 of uint8 images, [N, {channels}, {height}, {width}]."""
    scale, shift = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (SCALE, SHIFT))
    return images.float() * scale + shift


def add(root, path, module):
    *groups, name = path.split(".")
    for group in groups:
        root = root._modules.setdefault(group, nn.Module())
    root._modules[name] = module


class Network(nn.Module):
    """[N, {channels}, {height}, {width}] to [N, {classes}]."""

    def __init__(self):
        super().__init__()
{modules}
    def forward(self, x0):
        of = dict(self.named_modules())
{forward}        return {output}


def load(path):
    """The network with the weights of a safetensors file, for inference."""
    from safetensors.torch import load_file

    network = Network()
    # PyTorch counts the batches that a normalisation has seen; wgrad does not.
    found = network.load_state_dict(load_file(path), strict=False)
    missing = [key for key in found.missing_keys if not key.endswith(".num_batches_tracked")]
    if missing or found.unexpected_keys:
        raise ValueError(f"{{path}}: missing {{missing}}, unexpected {{found.unexpected_keys}}")
    return network.eval()
"#,
        name = model.name,
        channels = shape.channels,
        height = shape.height,
        width = shape.width,
        classes = model.classes,
    )
}

fn is_map(layer: &Layer, maps: &[bool]) -> bool {
    match layer.op {
        Op::Dense(_) | Op::Flatten => false,
        Op::Add | Op::Concat => layer.inputs.iter().any(|v| maps[*v]),
        Op::Activation(_)
        | Op::BatchNorm { .. }
        | Op::GroupNorm { .. }
        | Op::LayerNorm { .. }
        | Op::Dropout { .. } => maps[layer.inputs[0]],
        Op::Conv2d(_) | Op::MaxPool2d(_) | Op::MeanPool2d(_) | Op::Scale => true,
    }
}

/// The module of a layer that has parameters.
fn module(layer: &Layer, maps: &[bool]) -> Option<String> {
    let bias = |bias: bool| if bias { "True" } else { "False" };
    let channels = layer.input.channels;
    Some(match &layer.op {
        Op::Conv2d(g) => {
            let [[top, bottom], [left, right]] = g.sides();
            let padding = match (top, left) == (bottom, right) {
                true => [top, left],
                false => [0, 0],
            };
            format!(
                "nn.Conv2d({channels}, {}, {}, stride={}, padding={}, dilation={}, groups={}, bias={})",
                g.output.channels,
                pair(g.kernel),
                pair(g.stride),
                pair(padding),
                pair(g.dilation),
                g.groups,
                bias(g.bias)
            )
        }
        Op::Dense(g) => format!(
            "nn.Linear({}, {}, bias={})",
            g.input.channels,
            g.output.channels,
            bias(g.bias)
        ),
        Op::BatchNorm { epsilon, momentum } => {
            let rank = if maps[layer.inputs[0]] { 2 } else { 1 };
            format!("nn.BatchNorm{rank}d({channels}, eps={epsilon:?}, momentum={momentum:?})")
        }
        Op::GroupNorm { groups, epsilon } => {
            format!("nn.GroupNorm({groups}, {channels}, eps={epsilon:?})")
        }
        Op::LayerNorm { epsilon } => format!("nn.LayerNorm({channels}, eps={epsilon:?})"),
        _ => return None,
    })
}

/// What the layer gives, of `x0`, `x1`, …, without its activation.
fn expression(layer: &Layer, maps: &[bool]) -> String {
    let value = layer.inputs[0];
    let x = format!("x{value}");
    let of = |x: &str| format!("of[\"{}\"]({x})", layer.name);
    let as_map = |value: usize| match maps[value] {
        true => format!("x{value}"),
        false => format!("x{value}[:, :, None, None]"),
    };
    match &layer.op {
        Op::Conv2d(g) => {
            let sides = g.sides();
            let [[top, bottom], [left, right]] = sides;
            match (top, left) == (bottom, right) {
                true => of(&as_map(value)),
                false => of(&padded(&as_map(value), sides, "0.0")),
            }
        }
        Op::Dense(_) if maps[value] => of(&format!("{x}.flatten(1)")),
        Op::LayerNorm { .. } if maps[value] => {
            let last = of(&format!("{x}.permute(0, 2, 3, 1)"));
            format!("{last}.permute(0, 3, 1, 2)")
        }
        Op::Dense(_) | Op::BatchNorm { .. } | Op::GroupNorm { .. } | Op::LayerNorm { .. } => of(&x),
        Op::MaxPool2d(pool) => {
            let sides = pool.sides();
            let x = match sides == [[0; 2]; 2] {
                true => as_map(value),
                false => padded(&as_map(value), sides, "float(\"-inf\")"),
            };
            format!(
                "F.max_pool2d({x}, {}, {})",
                pair(pool.kernel),
                pair(pool.stride)
            )
        }
        Op::MeanPool2d(pool) => mean_pool(pool, &as_map(value)),
        Op::Activation(activation) => function(activation, &x),
        Op::Dropout { probability } => format!("F.dropout({x}, {probability:?}, self.training)"),
        Op::Add | Op::Concat => {
            let any = layer.inputs.iter().any(|v| maps[*v]);
            let inputs = layer.inputs.iter().map(|v| match any {
                true => as_map(*v),
                false => format!("x{v}"),
            });
            let inputs: Vec<String> = inputs.collect();
            match layer.op {
                Op::Concat => format!("torch.cat([{}], 1)", inputs.join(", ")),
                _ if layer.activation.is_some() => format!("({})", inputs.join(" + ")),
                _ => inputs.join(" + "),
            }
        }
        Op::Scale => format!("{} * {}", as_map(value), as_map(layer.inputs[1])),
        Op::Flatten => format!("{x}.flatten(1)"),
    }
}

fn mean_pool(pool: &Pool2d, x: &str) -> String {
    if pool.is_global() {
        return format!("F.adaptive_avg_pool2d({x}, 1)");
    }
    let window = format!("{}, {}", pair(pool.kernel), pair(pool.stride));
    let [[top, left], [bottom, right]] = [pool.padding, pool.padding_after];
    let sides = [[top, bottom], [left, right]];
    // What a window reaches beyond the padding never counts.
    let over = pool.overhang() != [0, 0];
    let ceil = if over { ", ceil_mode=True" } else { "" };
    if sides == [[0; 2]; 2] {
        return format!("F.avg_pool2d({x}, {window}{ceil})");
    }
    // Nor does a window count that begins in the padding.
    let size = match over {
        true => format!("[:, :, :{}, :{}]", pool.output.height, pool.output.width),
        false => String::new(),
    };
    let mean = |x: &str| {
        let padded = padded(x, sides, "0.0");
        format!("F.avg_pool2d({padded}, {window}{ceil}){size}")
    };
    match pool.count_include_pad {
        true => mean(x),
        // The mean over the image's places alone.
        false => format!("{} / {}", mean(x), mean(&format!("torch.ones_like({x})"))),
    }
}

fn padded(x: &str, [[top, bottom], [left, right]]: [[usize; 2]; 2], value: &str) -> String {
    format!("F.pad({x}, ({left}, {right}, {top}, {bottom}), value={value})")
}

fn pair([height, width]: [usize; 2]) -> String {
    format!("({height}, {width})")
}

fn function(activation: &Activation, x: &str) -> String {
    match activation {
        Activation::Relu => format!("F.relu({x})"),
        Activation::LeakyRelu { slope } => format!("F.leaky_relu({x}, {slope:?})"),
        Activation::Gelu => format!("F.gelu({x})"),
        Activation::GeluTanh => format!("F.gelu({x}, approximate=\"tanh\")"),
        Activation::Silu => format!("F.silu({x})"),
        Activation::Sigmoid => format!("torch.sigmoid({x})"),
        Activation::Tanh => format!("torch.tanh({x})"),
        Activation::HardSwish => format!("F.hardswish({x})"),
    }
}
