//! The cases of convolution in groups: one group, several, as many as channels, with one output to a
//! channel and with two; strides, dilation, padding on some sides alone; with a bias and without; finite
//! numbers, and a NaN and infinities in the corners that the padding meets.

use super::parity::{Bench, Case, Tolerance};
use super::products::unusual;
use crate::cpu;
use crate::kernels::conv2d::Pass;
use crate::kernels::{KernelSpec, grouped};
use crate::model::{Conv2d, Shape};

const VALID: &str = "the geometries of this list are valid";

/// An operand of a case, in the order in which the kernel takes them.
#[derive(Clone, Copy, PartialEq)]
enum Operand {
    First,
    Second,
}

fn geometries() -> Vec<(Conv2d, usize)> {
    let conv = |input: [usize; 3], out, kernel, stride, padding, dilation, groups, batch| {
        let input = Shape::new(input[0], input[1], input[2]);
        let g = Conv2d::dilated(input, out, kernel, stride, padding, dilation);
        (g.and_then(|g| g.grouped(groups)).expect(VALID), batch)
    };
    let without_bias = |(g, batch): (Conv2d, usize)| (g.without_bias(), batch);
    let (even, odd, none) = ([[1, 1]; 2], [[0, 1]; 2], [[0, 0]; 2]);
    vec![
        // Every channel for itself, in fours: rows of fours and not, taps of more than four.
        conv([8, 8, 8], 8, [3, 3], [1, 1], even, [1, 1], 8, 7),
        conv([9, 7, 12], 12, [3, 3], [2, 2], odd, [1, 1], 12, 3),
        without_bias(conv(
            [7, 10, 4],
            4,
            [5, 5],
            [1, 1],
            [[2, 2]; 2],
            [1, 1],
            4,
            7,
        )),
        conv(
            [11, 13, 4],
            4,
            [3, 3],
            [1, 1],
            [[2, 2], [0, 3]],
            [2, 2],
            4,
            1,
        ),
        // Neighbours and taps as far apart, and not 1.
        without_bias(conv(
            [9, 11, 8],
            8,
            [2, 3],
            [1, 2],
            [[0, 0], [2, 1]],
            [3, 2],
            8,
            2,
        )),
        conv([6, 9, 4], 4, [3, 2], [3, 3], [[1, 0], [0, 1]], [1, 2], 4, 7),
        conv([5, 3, 4], 4, [1, 1], [1, 1], none, [1, 1], 4, 7),
        // Many image rows, in chunks of which the last has fewer.
        conv([19, 16, 8], 8, [3, 3], [1, 1], even, [1, 1], 8, 11),
        // Not in fours, and with two outputs to a channel.
        conv([7, 8, 6], 6, [3, 3], [1, 1], even, [1, 1], 6, 7),
        conv([7, 6, 4], 8, [3, 3], [2, 1], [[1, 1], [0, 2]], [1, 1], 4, 7),
        without_bias(conv(
            [8, 7, 3],
            6,
            [3, 2],
            [1, 2],
            [[0, 2], [1, 0]],
            [2, 3],
            3,
            1,
        )),
        // Groups of several channels.
        conv(
            [7, 9, 6],
            10,
            [3, 2],
            [2, 1],
            [[1, 0], [0, 1]],
            [1, 1],
            2,
            7,
        ),
        without_bias(conv(
            [8, 9, 12],
            6,
            [2, 3],
            [1, 3],
            [[2, 0], [1, 2]],
            [3, 2],
            3,
            1,
        )),
        conv([5, 6, 3], 5, [3, 3], [1, 1], even, [1, 1], 1, 7),
        conv([16, 15, 8], 8, [3, 3], [1, 1], even, [1, 1], 2, 13),
    ]
}

/// Every case.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (g, batch) in geometries() {
        for pass in Pass::ALL {
            cases.push(case(g, batch, pass, false, None));
            // Sums that are in one piece anyway are there.
            if pass != Pass::BackwardWeight || grouped::chunks(&g, batch) > 1 {
                cases.push(case(g, batch, pass, true, None));
            }
            for operand in [Operand::First, Operand::Second] {
                cases.push(case(g, batch, pass, true, Some(operand)));
            }
        }
    }
    cases
}

/// The cases of one geometry, all numbers finite.
pub(super) fn grouped_cases(g: Conv2d, batch: usize, relu: bool, masked: bool) -> Vec<Case> {
    vec![
        case(g, batch, Pass::Forward, relu, None),
        case(g, batch, Pass::BackwardWeight, false, None),
        case(g, batch, Pass::BackwardInput, masked, None),
    ]
}

/// `relu` ends the forward pass in it and masks the gradient by the input; for the weight's gradient it
/// stands for sums in one piece.
fn case(g: Conv2d, batch: usize, pass: Pass, relu: bool, spoiled: Option<Operand>) -> Case {
    let kernel = match pass {
        Pass::Forward => "grouped_forward",
        Pass::BackwardWeight => "grouped_backward_weight",
        Pass::BackwardInput => "grouped_backward_input",
    };
    let chunks = if relu { 1 } else { grouped::chunks(&g, batch) };
    let mut variant = format!(
        "{batch} of {}, kernel {}×{}, {} channels out, stride {}×{}, padding {}×{}{}",
        g.input,
        g.kernel[0],
        g.kernel[1],
        g.output.channels,
        g.stride[0],
        g.stride[1],
        g.padding[0],
        g.padding[1],
        unusual(&g),
    );
    variant += &match pass {
        Pass::Forward if relu => ", ReLU".to_string(),
        Pass::BackwardInput if relu => ", masked".to_string(),
        Pass::BackwardWeight => format!(", {chunks} chunks"),
        _ => String::new(),
    };
    if let Some(operand) = spoiled {
        let first = operand == Operand::First;
        variant += ", NaN and ±∞ in ";
        variant += match pass {
            Pass::BackwardInput if first => "dy",
            _ if first => "x",
            Pass::BackwardWeight => "dy",
            _ => "the parameters",
        };
    }
    Case::new(kernel, variant, move |bench| {
        build(g, batch, pass, relu, chunks, spoiled, bench)
    })
}

fn build(
    g: Conv2d,
    batch: usize,
    pass: Pass,
    relu: bool,
    chunks: usize,
    spoiled: Option<Operand>,
    bench: &mut Bench,
) -> Vec<KernelSpec> {
    let (x, y) = (batch * g.input.elements(), batch * g.output.elements());
    let parameters = g.parameter_elements();
    let [mut first, mut second] = match pass {
        Pass::Forward => [x, parameters],
        Pass::BackwardWeight => [x, y],
        Pass::BackwardInput => [y, parameters],
    }
    .map(|len| bench.values(len));
    // In corners, which the padding meets.
    let corners = |values: &mut [f32]| {
        let last = values.len() - 1;
        values[last] = f32::INFINITY;
        values[last - g.output.channels.min(last)] = f32::NEG_INFINITY;
        values[0] = f32::NAN;
    };
    match spoiled {
        None => {}
        Some(Operand::First) => corners(&mut first),
        Some(Operand::Second) => corners(&mut second),
    }
    let (a, b) = (bench.input(&first), bench.input(&second));
    match pass {
        Pass::Forward => {
            let result = bench.output("y", y, Tolerance::sum(g.patch() + 1));
            vec![grouped::grouped_forward(&g, batch, relu, a, b, result)]
        }
        Pass::BackwardWeight => {
            let terms = (batch * g.positions()).div_ceil(chunks) + g.output.width;
            let partials = bench.output("partials", chunks * parameters, Tolerance::sum(terms));
            vec![grouped::grouped_backward_weight(
                &g, batch, chunks, a, b, partials,
            )]
        }
        Pass::BackwardInput => {
            let mask = relu.then(|| {
                let mut x = cpu::relu_forward(&bench.values(x));
                if spoiled.is_some() {
                    corners(&mut x);
                }
                bench.input(&x)
            });
            let terms = g.kernel[0] * g.kernel[1] * g.group_channels()[1];
            let dx = bench.output("dx", x, Tolerance::sum(terms));
            vec![grouped::grouped_backward_input(&g, batch, a, b, mask, dx)]
        }
    }
}
