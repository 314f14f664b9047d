//! The cases with NaN and infinities: every kernel must spread them as far as its twin does and no
//! further, and the twins are held to PyTorch by tests of their own. What it guards against: compilers
//! that take it that no number is NaN, and zeros that stand for what does not count, since 0 · ∞ and
//! 0 · NaN are NaN.

use super::cases::*;
use super::parity::{Case, Tolerance};
use super::products::{Operand, build, product_text};
use crate::gpu::AdapterReport;
use crate::kernels::conv2d::{self, Family, Pass, Product};
use crate::model::recipe::Optimizer;
use crate::model::{Conv2d, Loss, Pool2d, Shape};

const VALID: &str = "the geometries of this list are valid";

/// Every case that `adapter` can run.
pub fn cases(adapter: &AdapterReport) -> Vec<Case> {
    let simple = simple_cases().into_iter().map(Case::nonfinite);
    let families = Family::ALL.into_iter().filter(|f| f.supported(adapter));
    simple
        .chain(super::norm::nonfinite_cases())
        .chain(families.flat_map(|family| product_cases(family, adapter)))
        .collect()
}

/// The kernels that handle their elements one by one.
fn simple_cases() -> Vec<Case> {
    let sgd = Optimizer::Sgd {
        momentum: 0.9,
        nesterov: false,
        weight_decay: 0.01,
    };
    let adamw = Optimizer::Adamw {
        beta1: 0.7,
        beta2: 0.9,
        epsilon: 1e-8,
        weight_decay: 0.1,
    };
    let lion = Optimizer::Lion {
        beta1: 0.5,
        beta2: 0.9,
        weight_decay: 0.1,
    };
    let geometry = Conv2d::new(Shape::new(8, 6, 3), 1, [5, 3], [2, 1], [2, 0]).expect(VALID);
    let mut cases = vec![
        gather_case(Shape::new(4, 3, 33), 7, 4, false),
        im2col_case(geometry, 7),
        relu_forward_case(200),
        relu_backward_case(200),
        sigmoid_forward_case(200, 1.0),
        sigmoid_backward_case(200),
        metrics_case(7, 3),
        metrics_case(130, 129),
        update_case(200, sgd, false),
        update_case(200, adamw, false),
        update_case(200, lion, true),
        reduce_case(5, 100),
        multiply_add_case(200, 20),
        copy_case(260),
    ];
    cases.extend([false, true].map(|masked| col2im_case(geometry, 7, masked)));
    for pool in pools() {
        cases.push(maxpool_forward_case(pool, 3));
        cases.push(meanpool_forward_case(pool, 3));
        for masked in [false, true] {
            if !pool.overlapping() {
                cases.push(maxpool_backward_case(pool, 3, masked, false));
            }
            cases.push(maxpool_backward_case(pool, 3, masked, true));
            cases.push(meanpool_backward_case(pool, 3, masked));
        }
    }
    for kind in [Loss::SoftmaxCrossEntropy, Loss::SquaredError] {
        // Of one class each, so that −∞ is the largest too.
        cases.push(loss_case(kind, 20, 20, 1, 1.0));
        cases.push(loss_case(kind, 7, 3, 3, 1.0));
        cases.push(loss_case(kind, 130, 129, 10, 4.0));
        // More classes than lie between two NaNs.
        cases.push(loss_case(kind, 9, 8, 50, 1.0));
    }
    cases
}

/// Layers with and without padding, strides, dilation, bias and channels in fours; the numbers of terms and of
/// positions are no multiples of what a tile takes at a time.
fn layers() -> Vec<(Conv2d, Option<[usize; 2]>)> {
    let conv = |[h, w, c]: [usize; 3], out, kernel, stride, padding, pool| {
        let geometry = Conv2d::new(Shape::new(h, w, c), out, kernel, stride, padding);
        (geometry.expect(VALID), pool)
    };
    let dilated = |[h, w, c]: [usize; 3], out, kernel, stride, padding, dilation| {
        let input = Shape::new(h, w, c);
        let geometry = Conv2d::dilated(input, out, kernel, stride, padding, dilation);
        (geometry.expect(VALID).without_bias(), None)
    };
    vec![
        conv([9, 10, 1], 8, [5, 5], [1, 1], [0, 0], Some([2, 2])),
        conv([7, 9, 3], 5, [3, 2], [2, 1], [1, 1], None),
        conv([7, 6, 8], 8, [3, 3], [1, 1], [1, 1], Some([2, 2])),
        conv([9, 7, 8], 12, [3, 3], [2, 3], [1, 2], None),
        conv([5, 9, 12], 20, [3, 3], [1, 1], [1, 0], Some([1, 2])),
        conv([5, 5, 4], 4, [1, 1], [2, 2], [0, 0], None),
        (Conv2d::dense(37, 10), None),
        (Conv2d::dense(64, 12), None),
        (Conv2d::dense(37, 10).without_bias(), None),
        dilated([8, 8, 8], 12, [3, 3], [2, 2], [[0, 1]; 2], [1, 1]),
        dilated([9, 8, 3], 5, [3, 2], [1, 2], [[2, 1], [0, 2]], [2, 3]),
    ]
}

/// Every pass of every layer, once for each operand that holds a NaN and infinities.
fn product_cases(family: Family, adapter: &AdapterReport) -> Vec<Case> {
    let mut cases = Vec::new();
    for (geometry, window) in layers() {
        let mut add = |pass, relu, pool, operands: [Operand; 2]| {
            let product = Product::new(geometry, 3, pass, relu, pool, family, adapter);
            let product = product.expect(VALID);
            cases.extend(operands.map(|operand| product_case(product, operand)));
        };
        let (x, parameters, dy) = (Operand::X, Operand::Parameters, Operand::Dy);
        add(Pass::BackwardWeight, false, None, [x, dy]);
        add(Pass::BackwardInput, false, None, [parameters, dy]);
        add(Pass::BackwardInput, true, None, [x, parameters]);
        add(Pass::Forward, true, None, [x, parameters]);
        let pool = window.map(|k| Pool2d::new(geometry.output, k, k).expect(VALID));
        match pool {
            Some(p) if Product::can_pool(&geometry, &p, family) => {
                add(Pass::Forward, true, pool, [x, parameters]);
            }
            _ => add(Pass::Forward, false, None, [x, parameters]),
        }
    }
    let image = Shape::new(2, 2, 1);
    let geometry = Conv2d::new(image, 4, [1, 1], [1, 1], [0, 0]).expect(VALID);
    let pool = Pool2d::new(geometry.output, [2, 2], [2, 2]).expect(VALID);
    if Product::can_pool(&geometry, &pool, family) {
        let product = Product::new(
            geometry,
            1,
            Pass::Forward,
            false,
            Some(pool),
            family,
            adapter,
        );
        cases.push(one_nan_case(product.expect(VALID)));
    }
    cases
}

fn product_case(product: Product, operand: Operand) -> Case {
    let name = match operand {
        Operand::X => "x",
        Operand::Parameters => "the parameters",
        Operand::Dy => "dy",
    };
    let variant = format!("{}, NaN and ±∞ in {name}", product_text(&product));
    let columns = product.geometry.output.channels;
    let case = Case::new(product.pass.name(), variant, move |bench| {
        build(&product, bench, |of, values| {
            if of != operand {
                return;
            }
            let last = values.len() - 1;
            // In corners of the first and the last sample, which the padding meets; of the weight, in
            // columns of their own, and the last is the bias.
            values[0] = f32::NAN;
            values[last] = f32::INFINITY;
            if of == Operand::Parameters {
                values[last - columns - 1] = f32::NEG_INFINITY;
            }
        })
    });
    case.for_tile(&product.tile)
}

/// [1, NaN, 2, 3] under a filter of 1, pooled: NaN, and it stood at place 1.
fn one_nan_case(product: Product) -> Case {
    let variant = format!("{}, [1, NaN, 2, 3]", product_text(&product));
    let case = Case::new(product.pass.name(), variant, move |b| {
        let x = b.input(&[1.0, f32::NAN, 2.0, 3.0]);
        let parameters = b.input(&[1.0f32, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        let y = b.output("y", 4, Tolerance::EXACT);
        let index = b.output_bytes("index", 4);
        vec![conv2d::conv2d_forward(
            product,
            x,
            parameters,
            y,
            Some(index),
        )]
    });
    case.for_tile(&product.tile)
}
