//! The model as a table.

use super::{Layer, Model, Op};
use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};

/// A rule under the header and nothing else.
const STYLE: TableStyle = TableStyle::new().header_separator(LineStyle::none().fill('─'));

/// Columns that the table takes at most.
const WIDTH: u16 = 80;

/// A table with one line per layer (what it does, output shape, parameters, multiply-adds of one
/// image's forward pass) between the input and the totals. No newline at the end.
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
    for layer in &model.layers {
        table.add_row(row(
            &layer.name,
            &what(layer),
            &layer.output.to_string(),
            layer.parameter_count() as u64,
            layer.multiply_adds(),
        ));
    }
    table.add_row(row(
        "total",
        "",
        "",
        model.parameter_count() as u64,
        model.multiply_adds(),
    ));
    for index in 2..5 {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
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
            text
        }
        Op::Dense(g) => g.output.channels.to_string(),
        Op::MaxPool2d(pool) | Op::MeanPool2d(pool) => {
            let mut text = pair(pool.kernel);
            if pool.stride != pool.kernel {
                text += &format!(", stride {}", size(pool.stride));
            }
            text
        }
        _ => String::new(),
    };
    if let Some(activation) = &layer.activation {
        text += &format!(" → {}", activation.name());
    }
    text
}

/// `1234567` → `1,234,567`.
fn thousands(n: u64) -> String {
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
}
