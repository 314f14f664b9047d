//! The model as a table.

use super::{Layer, Model, Op};
use comfy_table::{
    CellAlignment, ColumnConstraint, ContentArrangement, LineStyle, Table, TableStyle,
};
use std::fmt::Display;

/// A rule under the header and nothing else.
const STYLE: TableStyle = TableStyle::new().header_separator(LineStyle::none().fill('─'));

/// Columns that the table takes at most.
const WIDTH: u16 = 80;

/// A table with one line per layer (what it does, output shape, parameters, multiply-adds of one
/// image's forward pass) between the input and the totals. The layers of a block stand indented under
/// its name, and a layer's inputs are named where they are not the layer before. No newline at the end.
pub fn summary(model: &Model) -> String {
    let mut table = Table::new();
    table
        .load_style(STYLE)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(WIDTH);
    table.set_header(["layer", "", "output", "parameters", "multiply-adds"]);
    let row = |name: &str, what: &str, output: &str, parameters: u64, multiply_adds: u64| {
        let count = |n| if n == 0 { String::new() } else { thousands(n) };
        [
            name.to_string(),
            what.to_string(),
            output.to_string(),
            count(parameters),
            count(multiply_adds),
        ]
    };
    table.add_row(row("input", "", &model.input.to_string(), 0, 0));
    let mut open: Vec<&str> = Vec::new();
    for (i, layer) in model.layers.iter().enumerate() {
        let (blocks, name) = path(&layer.name);
        let common = open.iter().zip(&blocks).take_while(|(a, b)| a == b).count();
        for (depth, block) in blocks.iter().enumerate().skip(common) {
            table.add_row(row(&indented(depth, block), "", "", 0, 0));
        }
        let mut what = what(layer);
        if layer.inputs != [i] {
            let names = layer
                .inputs
                .iter()
                .map(|value| relative(model, *value, &blocks));
            let between = match layer.op {
                Op::Add => " + ",
                Op::Scale => " × ",
                _ => ", ",
            };
            let gap = if what.is_empty() { "" } else { " " };
            let names = names.collect::<Vec<_>>().join(between);
            what = format!("{names}{gap}{what}");
        }
        table.add_row(row(
            &indented(blocks.len(), name),
            &what,
            &layer.output.to_string(),
            layer.parameter_count() as u64,
            layer.multiply_adds(),
        ));
        open = blocks;
    }
    table.add_row(row(
        "total",
        "",
        "",
        model.parameter_count() as u64,
        model.multiply_adds(),
    ));
    for index in [0, 2, 3, 4] {
        if let Some(column) = table.column_mut(index) {
            column.set_constraint(ColumnConstraint::ContentWidth);
        }
    }
    for index in 2..5 {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// The graph for Graphviz: layers with their settings and output shapes, blocks as boxes around them.
/// No newline at the end.
pub fn dot(model: &Model) -> String {
    let mut text = format!("digraph \"{}\" {{\n", model.name);
    text += "  node [shape=box, fontname=\"sans-serif\", fontsize=10];\n";
    text += "  edge [fontname=\"sans-serif\", fontsize=8];\n";
    text += &format!("  v0 [label=\"input\\n{}\", style=rounded];\n", model.input);
    let mut open: Vec<&str> = Vec::new();
    for (i, layer) in model.layers.iter().enumerate() {
        let (blocks, name) = path(&layer.name);
        let common = open.iter().zip(&blocks).take_while(|(a, b)| a == b).count();
        for depth in (common..open.len()).rev() {
            text += &format!("{}}}\n", "  ".repeat(depth + 1));
        }
        for (depth, block) in blocks.iter().enumerate().skip(common) {
            let indent = "  ".repeat(depth + 1);
            text += &format!(
                "{indent}subgraph \"cluster {}\" {{\n{indent}  label=\"{block}\"; fontname=\"sans-serif\"; fontsize=10; color=gray;\n",
                blocks[..=depth].join(".")
            );
        }
        let indent = "  ".repeat(blocks.len() + 1);
        let what = what(layer);
        let what = if what.is_empty() {
            what
        } else {
            format!("\\n{what}")
        };
        text += &format!("{indent}v{} [label=\"{name}{what}\"];\n", i + 1);
        open = blocks;
    }
    for depth in (0..open.len()).rev() {
        text += &format!("{}}}\n", "  ".repeat(depth + 1));
    }
    for (i, layer) in model.layers.iter().enumerate() {
        for value in &layer.inputs {
            let shape = model.shape(*value);
            text += &format!("  v{value} -> v{} [label=\"{shape}\"];\n", i + 1);
        }
    }
    let last = model.layers.len();
    text += &format!(
        "  output [label=\"{}\", style=rounded];\n  v{last} -> output [label=\"{}\"];\n}}",
        model.loss.name(),
        model.shape(last)
    );
    text
}

/// The blocks that a layer's name leads through, each repetition one of its own, and its own name.
fn path(name: &str) -> (Vec<&str>, &str) {
    let (mut blocks, mut start) = (Vec::new(), 0);
    for (dot, _) in name.match_indices('.') {
        let repetition = name[dot + 1..].starts_with(|c: char| c.is_ascii_digit());
        if !repetition {
            blocks.push(&name[start..dot]);
            start = dot + 1;
        }
    }
    (blocks, &name[start..])
}

fn indented(depth: usize, name: &str) -> String {
    format!("{}{name}", "  ".repeat(depth))
}

/// The name of what gives a value, as a layer within these blocks refers to it.
fn relative<'a>(model: &'a Model, value: usize, blocks: &[&str]) -> &'a str {
    // From outside a block only its input is seen, and of what is in it a nested block as one.
    let Some(i) = value.checked_sub(1) else {
        return "input";
    };
    let mut name = model.layers[i].name.as_str();
    for block in blocks {
        let inside = name.strip_prefix(block).and_then(|n| n.strip_prefix('.'));
        let Some(inside) = inside else {
            return "input";
        };
        name = inside;
    }
    name.split('.').next().unwrap_or(name)
}

/// The layer's settings: `5×5, 24 → relu`, `2×2`.
fn what(layer: &Layer) -> String {
    let pair = |[height, width]: [usize; 2]| format!("{height}×{width}");
    let size = |sizes: [usize; 2]| match sizes {
        [height, width] if height == width => height.to_string(),
        _ => pair(sizes),
    };
    let mut text = match &layer.op {
        Op::Conv2d(g) => {
            let mut text = format!("{}, {}", pair(g.kernel), g.output.channels);
            if g.stride != [1, 1] {
                text += &format!(", stride {}", size(g.stride));
            }
            if g.padding != [0, 0] {
                text += &format!(", pad {}", size(g.padding));
            }
            if g.dilation != [1, 1] {
                text += &format!(", dilation {}", size(g.dilation));
            }
            match g.groups {
                1 => {}
                groups if groups == g.input.channels => text += ", depthwise",
                groups => text += &format!(", {groups} groups"),
            }
            text
        }
        Op::Dense(g) => g.output.channels.to_string(),
        Op::MaxPool2d(pool) | Op::MeanPool2d(pool) => {
            let mut text = pair(pool.kernel);
            let global = pool.kernel == [pool.input.height, pool.input.width];
            if pool.stride != pool.kernel && !global {
                text += &format!(", stride {}", size(pool.stride));
            }
            text
        }
        Op::GroupNorm { groups, .. } => format!("{groups} groups"),
        Op::Dropout { probability } => probability.to_string(),
        _ => String::new(),
    };
    if let Some(activation) = &layer.activation {
        let gap = if text.is_empty() { "" } else { " " };
        text += &format!("{gap}→ {}", activation.name());
    }
    text
}

/// `1234567` → `1,234,567`, of any whole number.
pub(crate) fn thousands(n: impl Display) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Definition, load};

    #[test]
    fn digits_are_grouped_by_three() {
        for (n, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (123_456, "123,456"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(thousands(n), text);
        }
    }

    /// The text of the table's cells, line by line, without the rules.
    fn cells(name: &str, edit: impl Fn(String) -> String) -> Vec<Vec<String>> {
        let definition = Definition::parse(&edit(load(name).unwrap().text), name).unwrap();
        let model = definition
            .resolve(definition.input, definition.classes)
            .unwrap();
        let table = summary(&model);
        assert!(
            table.lines().all(|line| line.chars().count() <= 80),
            "wider than a terminal:\n{table}"
        );
        table
            .lines()
            .filter(|line| !line.starts_with('─'))
            .map(|line| {
                line.split("  ")
                    .map(str::trim)
                    .filter(|cell| !cell.is_empty())
                    .map(String::from)
                    .collect()
            })
            .collect()
    }

    #[test]
    fn the_table_of_lenet5_counts_by_hand() {
        let expected: [&[&str]; 10] = [
            &["layer", "output", "parameters", "multiply-adds"],
            &["input", "28×28×1"],
            // (5·5·1 + 1)·6 and 5·5·1·6·28·28
            &[
                "conv2d1",
                "5×5, 6, pad 2 → relu",
                "28×28×6",
                "156",
                "117,600",
            ],
            &["max_pool2d1", "2×2", "14×14×6"],
            // (5·5·6 + 1)·16 and 5·5·6·16·10·10
            &["conv2d2", "5×5, 16 → relu", "10×10×16", "2,416", "240,000"],
            &["max_pool2d2", "2×2", "5×5×16"],
            &["dense1", "120 → relu", "1×1×120", "48,120", "48,000"],
            &["dense2", "84 → relu", "1×1×84", "10,164", "10,080"],
            &["dense3", "10", "1×1×10", "850", "840"],
            &["total", "61,706", "416,520"],
        ];
        assert_eq!(cells("lenet5", |text| text), expected);
    }

    #[test]
    fn strides_and_layers_without_settings() {
        let rows = cells("lenet5", |text| {
            text.replacen("kernel = 2", "kernel = [2, 3]\nstride = [2, 1]", 1)
                .replacen("\"max_pool2d\"", "\"mean_pool2d\"", 1)
        });
        assert_eq!(rows[3], ["mean_pool2d1", "2×3, stride 2×1", "14×26×6"]);
        assert_eq!(
            cells("mlp-sigmoid", |text| text)[3],
            ["sigmoid1", "1×1×100"]
        );
    }

    /// Blocks are indented under their names, repeated ones under both, and inputs that are not the
    /// layer before are named.
    #[test]
    fn the_graph_of_mobilenet_small_is_seen() {
        let definition = load("mobilenet-small").unwrap();
        let model = definition.resolve(definition.input, 10).unwrap();
        let table = summary(&model);
        assert!(
            table.lines().all(|line| line.chars().count() <= 80),
            "{table}"
        );
        let expected = [
            " residual2.1",
            "   main",
            "     conv1",
            "       conv2d1               1×1, 120        8×8×120       4,800        307,200",
            "       batch_norm1           → hard_swish    8×8×120         240",
            "     conv2d1                 3×3, 120, pad   8×8×120       1,080         69,120",
        ];
        let rows: Vec<&str> = table.lines().map(str::trim_end).collect();
        assert!(
            rows.windows(expected.len()).any(|rows| rows == expected),
            "{table}"
        );
    }

    #[test]
    fn a_graph_for_graphviz_has_every_layer_edge_and_block() {
        for name in ["resnet9", "mobilenet-small", "lenet5"] {
            let definition = load(name).unwrap();
            let model = definition.resolve(definition.input, 10).unwrap();
            let dot = dot(&model);
            let lines: Vec<&str> = dot.lines().map(str::trim).collect();
            let edges: usize = model.layers.iter().map(|layer| layer.inputs.len()).sum();
            let found = |part: &str| lines.iter().filter(|line| line.contains(part)).count();
            assert_eq!(found(" -> "), edges + 1, "{name}");
            for i in 0..=model.layers.len() {
                let node = format!("v{i} [label=");
                let nodes = lines.iter().filter(|line| line.starts_with(&node));
                assert_eq!(nodes.count(), 1, "{name}: v{i}");
            }
            let opened = lines.iter().filter(|line| line.ends_with('{')).count();
            assert_eq!(
                opened,
                lines.iter().filter(|line| **line == "}").count(),
                "{name}"
            );
            let blocks = match name {
                "resnet9" => 1 + 3 * 2 + 2 * 3,
                "mobilenet-small" => 2 + 3 * 2 + 4 * 3,
                _ => 0,
            };
            assert_eq!(found("subgraph"), blocks, "{name}");
        }
    }
}
