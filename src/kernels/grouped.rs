//! `shaders/grouped.wgsl`: convolution in groups, depthwise convolution among them.

use super::{Argument, KernelSpec, View, Work, mask, read, write};
use crate::model::Conv2d;

const SOURCE: &str = include_str!("../../shaders/grouped.wgsl");

/// A weight gradient's sums are cut into chunks until there are so many partial sums, but into chunks of
/// no fewer positions, and no more chunks, than these. They decide the order of the additions, so they
/// follow from the shape alone.
const WANTED_SUMS: usize = 1 << 18;
const FEWEST_POSITIONS: usize = 256;
const MOST_CHUNKS: usize = 256;

/// Chunks into which [`grouped_backward_weight`] cuts the sums on a GPU.
pub fn chunks(g: &Conv2d, batch: usize) -> usize {
    (WANTED_SUMS / g.parameter_elements())
        .min(batch * g.positions() / FEWEST_POSITIONS)
        .min(batch * g.output.height)
        .clamp(1, MOST_CHUNKS)
}

/// Whether every channel has a filter of its own and four of them make a vector.
fn in_fours(g: &Conv2d) -> bool {
    g.group_channels() == [1, 1] && g.input.channels.is_multiple_of(4)
}

/// Elements that lie side by side in a row of so many and are computed in one go.
fn fours(width: usize) -> usize {
    width.div_ceil(4)
}

/// `y[N,OH,OW,OC]` from `x[N,H,W,C]` and the parameters `[KH·KW·C/groups + 1, OC]`, without the last row
/// where there is no bias; with `relu` the larger of that and 0. Writes `y`.
pub fn grouped_forward(
    g: &Conv2d,
    batch: usize,
    relu: bool,
    x: View,
    parameters: View,
    y: View,
) -> KernelSpec {
    let results = batch * g.output.elements();
    let rows = batch * g.output.height;
    let (entry, [x_at, parameters_at, y_at], invocations) = match in_fours(g) {
        true => (
            "grouped_forward4",
            [7, 8, 9],
            rows * fours(g.output.width) * (g.output.channels / 4),
        ),
        false => ("grouped_forward", [0, 1, 2], results),
    };
    spec(
        entry,
        Work::GroupedForward { geometry: *g, relu },
        g,
        batch,
        &[("RELU", f64::from(relu))],
        vec![
            read(x_at, "x", x, batch * g.input.elements()),
            read(
                parameters_at,
                "parameters",
                parameters,
                g.parameter_elements(),
            ),
            write(y_at, "y", y, results),
        ],
        invocations,
    )
}

/// Partial sums `[chunks, KH·KW·C/groups + 1, OC]` of the weight's gradient with the bias's, if there is
/// a bias, as the last row; `reduce_splits` adds them up. Writes `partials`.
pub fn grouped_backward_weight(
    g: &Conv2d,
    batch: usize,
    chunks: usize,
    x: View,
    dy: View,
    partials: View,
) -> KernelSpec {
    let results = chunks * g.parameter_elements();
    let places = g.kernel[0] * fours(g.kernel[1]);
    let (entry, [x_at, dy_at, partials_at], invocations) = match in_fours(g) {
        true => (
            "grouped_backward_weight4",
            [7, 10, 11],
            chunks * places * (g.input.channels / 4),
        ),
        false => ("grouped_backward_weight", [0, 3, 4], results),
    };
    spec(
        entry,
        Work::GroupedBackwardWeight {
            geometry: *g,
            chunks,
        },
        g,
        batch,
        &[("CHUNKS", chunks as f64)],
        vec![
            read(x_at, "x", x, batch * g.input.elements()),
            read(dy_at, "dy", dy, batch * g.output.elements()),
            write(partials_at, "partials", partials, results),
        ],
        invocations,
    )
}

/// `dx[N,H,W,C]` from `dy[N,OH,OW,OC]`; with `activation` (this layer's input) the gradient passes only
/// where that is positive. Writes `dx`.
pub fn grouped_backward_input(
    g: &Conv2d,
    batch: usize,
    dy: View,
    parameters: View,
    activation: Option<View>,
    dx: View,
) -> KernelSpec {
    let results = batch * g.input.elements();
    let rows = batch * g.input.height;
    let (entry, [parameters_at, dy_at, activation_at, dx_at], invocations) = match in_fours(g) {
        true => (
            "grouped_backward_input4",
            [8, 10, 12, 13],
            rows * fours(g.input.width) * (g.input.channels / 4),
        ),
        false => ("grouped_backward_input", [1, 3, 5, 6], results),
    };
    let masked = activation.is_some();
    spec(
        entry,
        Work::GroupedBackwardInput {
            geometry: *g,
            masked,
        },
        g,
        batch,
        &[("MASK", f64::from(masked))],
        vec![
            read(parameters_at, "parameters", parameters, g.weight_elements()),
            read(dy_at, "dy", dy, batch * g.output.elements()),
            mask(activation_at, activation, results, dy),
            write(dx_at, "dx", dx, results),
        ],
        invocations,
    )
}

fn spec(
    entry: &'static str,
    work: Work,
    g: &Conv2d,
    batch: usize,
    own: &[(&'static str, f64)],
    arguments: Vec<Argument>,
    invocations: usize,
) -> KernelSpec {
    let mut constants = vec![
        ("N", batch as f64),
        ("H", g.input.height as f64),
        ("W", g.input.width as f64),
        ("C", g.input.channels as f64),
        ("OH", g.output.height as f64),
        ("OW", g.output.width as f64),
        ("OC", g.output.channels as f64),
        ("KH", g.kernel[0] as f64),
        ("KW", g.kernel[1] as f64),
        ("SH", g.stride[0] as f64),
        ("SW", g.stride[1] as f64),
        ("PH", g.padding[0] as f64),
        ("PW", g.padding[1] as f64),
        ("DH", g.dilation[0] as f64),
        ("DW", g.dilation[1] as f64),
        ("GROUPS", g.groups as f64),
        ("BIAS", f64::from(g.bias)),
    ];
    constants.extend(own);
    let mut spec = KernelSpec::new(entry, SOURCE, work, &constants, arguments, invocations);
    // As usually counted: two per multiply-add, padding included.
    spec.cost.flops = 2.0 * (batch * g.positions()) as f64 * g.weight_elements() as f64;
    spec
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Shape;

    #[test]
    fn sums_are_cut_by_the_shape() {
        let of = |height, width, channels, batch| {
            let input = Shape::new(height, width, channels);
            let g = Conv2d::new(input, channels, [3, 3], [1, 1], [1, 1]);
            chunks(&g.unwrap().grouped(channels).unwrap(), batch)
        };
        assert_eq!(of(16, 16, 128, 64), 64);
        assert_eq!(of(32, 32, 32, 64), 256);
        assert_eq!(of(2, 2, 1024, 64), 1);
        assert_eq!(of(1, 512, 4, 3), 3);
        assert_eq!(of(1, 1, 8, 1), 1);
    }
}
