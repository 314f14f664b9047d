//! The other direction: a model as the text of an architecture file, without blocks.

use super::{Activation, Conv2d, Layer, Model, Op, Pool2d, Shape};

/// How [`architecture`]s are trained that nobody has a recipe for: as carefully as suits weights that were
/// trained before.
const RECIPE: &str = "[recipe]
optimizer = \"adamw\"
weight_decay = 0.01
lr = 0.001                     # the peak of the one-cycle schedule
schedule = \"onecycle\"
epochs = 10
batch_size = 128
";

impl Conv2d {
    /// The padding `[[top, bottom], [left, right]]`: the same on both sides where that gives the same output.
    pub fn sides(&self) -> [[usize; 2]; 2] {
        let reach = [0, 1].map(|axis| self.dilation[axis] * (self.kernel[axis] - 1) + 1);
        sides(self.input, self.output, reach, self.stride, self.padding)
    }
}

impl Pool2d {
    /// Places along each axis by which the last window reaches beyond the padding.
    pub fn overhang(&self) -> [usize; 2] {
        let (sizes, outputs) = (lengths(self.input), lengths(self.output));
        [0, 1].map(|axis| {
            let end = (outputs[axis] - 1) * self.stride[axis] + self.kernel[axis];
            end.saturating_sub(self.padding[axis] + sizes[axis] + self.padding_after[axis])
        })
    }

    /// Whether one window covers the image and nothing else.
    pub fn is_global(&self) -> bool {
        let padding = (self.padding, self.padding_after);
        self.kernel == lengths(self.input) && padding == ([0; 2], [0; 2])
    }

    /// The padding `[[top, bottom], [left, right]]` that gives the same windows where outputs are rounded
    /// down, what they reach beyond this one's included.
    pub fn sides(&self) -> [[usize; 2]; 2] {
        sides(
            self.input,
            self.output,
            self.kernel,
            self.stride,
            self.padding,
        )
    }
}

fn lengths(shape: Shape) -> [usize; 2] {
    [shape.height, shape.width]
}

fn sides(
    input: Shape,
    output: Shape,
    reach: [usize; 2],
    stride: [usize; 2],
    before: [usize; 2],
) -> [[usize; 2]; 2] {
    let (sizes, outputs) = (lengths(input), lengths(output));
    [0, 1].map(|axis| {
        let (size, before) = (sizes[axis], before[axis]);
        let rest = (2 * before + size).checked_sub(reach[axis]);
        let last = (outputs[axis] - 1) * stride[axis];
        match rest.is_some_and(|rest| rest / stride[axis] + 1 == outputs[axis]) {
            true => [before, before],
            false => [before, (last + reach[axis]).saturating_sub(before + size)],
        }
    })
}

/// The text of an architecture file that [`super::Definition::parse`] makes the same model of. A layer with
/// the classes' number of outputs that nothing but pooling and the like stands behind follows the number of
/// classes; `comment` goes before everything, as comments. How it is trained stands in it too, by a recipe
/// that suits weights that were trained before.
pub fn architecture(model: &Model, comment: &str) -> String {
    let mut text: String = comment.lines().map(|line| format!("# {line}\n")).collect();
    let Shape {
        height,
        width,
        channels,
    } = model.input;
    text += &format!(
        "name = \"{}\"\ninput = [{height}, {width}, {channels}]\nclasses = {}\nloss = \"{}\"\n\nlayer = [\n",
        model.name,
        model.classes,
        model.loss.name()
    );
    let head = head(model);
    for (i, layer) in model.layers.iter().enumerate() {
        let keys = keys(model, i, layer, Some(i) == head);
        let keys: Vec<String> = keys
            .iter()
            .map(|(key, value)| format!("{key} = {value}"))
            .collect();
        text += &format!("  {{ {} }},\n", keys.join(", "));
    }
    text + "]\n\n" + RECIPE
}

/// The layer whose outputs are the classes.
fn head(model: &Model) -> Option<usize> {
    let last = model
        .layers
        .iter()
        .rposition(|l| l.op.product().is_some())?;
    let chained = model.layers[last + 1..].iter().enumerate().all(|(i, l)| {
        let passes = matches!(
            l.op,
            Op::MaxPool2d(_)
                | Op::MeanPool2d(_)
                | Op::Activation(_)
                | Op::Dropout { .. }
                | Op::Flatten
        );
        passes && l.inputs == [last + 1 + i]
    });
    (chained && model.layers[last].output.channels == model.classes).then_some(last)
}

/// Keys and values of layer `i`.
fn keys(model: &Model, i: usize, layer: &Layer, head: bool) -> Vec<(&'static str, String)> {
    let quoted = |text: &str| format!("\"{text}\"");
    let kind = match &layer.op {
        Op::MeanPool2d(pool) if pool.is_global() => "global_average_pool2d",
        op => op.name(),
    };
    let mut keys = vec![("type", quoted(kind)), ("name", quoted(&layer.name))];
    let name = |value: usize| match value {
        0 => quoted("input"),
        _ => quoted(&model.layers[value - 1].name),
    };
    match &layer.inputs[..] {
        [one] if *one == i => {}
        [one] => keys.push(("input", name(*one))),
        several => {
            let names: Vec<String> = several.iter().map(|value| name(*value)).collect();
            keys.push(("inputs", format!("[{}]", names.join(", "))));
        }
    }
    let pair = |[height, width]: [usize; 2]| match height == width {
        true => height.to_string(),
        false => format!("[{height}, {width}]"),
    };
    let sides =
        |[[top, bottom], [left, right]]: [[usize; 2]; 2]| match (top, left) == (bottom, right) {
            true => pair([top, left]),
            false => format!("[[{top}, {bottom}], [{left}, {right}]]"),
        };
    let count = |count: usize| match head {
        true => quoted("classes"),
        false => count.to_string(),
    };
    let bias = |keys: &mut Vec<_>, bias: bool| {
        if !bias {
            keys.push(("bias", "false".into()));
        }
    };
    match &layer.op {
        Op::Conv2d(g) => {
            keys.push(("out_channels", count(g.output.channels)));
            keys.push(("kernel", pair(g.kernel)));
            for (key, value, default) in [
                ("stride", g.stride, [1, 1]),
                ("dilation", g.dilation, [1, 1]),
            ] {
                if value != default {
                    keys.push((key, pair(value)));
                }
            }
            if g.sides() != [[0; 2]; 2] {
                keys.push(("padding", sides(g.sides())));
            }
            if g.groups != 1 {
                keys.push(("groups", g.groups.to_string()));
            }
            bias(&mut keys, g.bias);
        }
        Op::Dense(g) => {
            keys.push(("units", count(g.output.channels)));
            bias(&mut keys, g.bias);
        }
        Op::MeanPool2d(pool) if pool.is_global() => {}
        Op::MaxPool2d(pool) | Op::MeanPool2d(pool) => {
            keys.push(("kernel", pair(pool.kernel)));
            if pool.stride != pool.kernel {
                keys.push(("stride", pair(pool.stride)));
            }
            let [[top, left], [bottom, right]] = [pool.padding, pool.padding_after];
            let padding = [[top, bottom], [left, right]];
            if padding != [[0; 2]; 2] {
                keys.push(("padding", sides(padding)));
            }
            if pool.overhang() != [0, 0] {
                keys.push(("ceil_mode", "true".into()));
            }
            // By default it counts, which is the same without padding.
            if matches!(layer.op, Op::MeanPool2d(_))
                && padding != [[0; 2]; 2]
                && !pool.count_include_pad
            {
                keys.push(("count_include_pad", "false".into()));
            }
        }
        Op::BatchNorm { epsilon, momentum } => {
            keys.push(("epsilon", format!("{epsilon:?}")));
            keys.push(("momentum", format!("{momentum:?}")));
        }
        Op::GroupNorm { groups, epsilon } => {
            keys.push(("groups", groups.to_string()));
            keys.push(("epsilon", format!("{epsilon:?}")));
        }
        Op::LayerNorm { epsilon } => keys.push(("epsilon", format!("{epsilon:?}"))),
        Op::Dropout { probability } => keys.push(("probability", format!("{probability:?}"))),
        Op::Activation(Activation::LeakyRelu { slope }) => {
            keys.push(("slope", format!("{slope:?}")));
        }
        Op::Activation(_) | Op::Add | Op::Concat | Op::Scale | Op::Flatten => {}
    }
    if let Some(activation) = &layer.activation {
        keys.push(("activation", quoted(activation.name())));
        if let Activation::LeakyRelu { slope } = activation {
            keys.push(("slope", format!("{slope:?}")));
        }
    }
    keys
}
