//! Every kernel against its CPU twin, and the harness that does it against itself.

use wgrad::cpu::{self, Memory, Values};
use wgrad::gpu::{Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::kernels::{Access, Argument, Dtype, KernelSpec, View, Work};
use wgrad::verify::{
    Case, Expected, Fingerprint, GUARD, GUARD_WORDS, POISON, Rounding, Tolerance, WORD_POISON,
    cases, compare,
};

fn gpu() -> Gpu {
    Gpu::open(&Choice::Best)
        .unwrap_or_else(|e| panic!("these tests need an adapter: {e}; {NO_ADAPTER_HINT}"))
}

#[test]
fn every_kernel_agrees_with_its_twin() {
    let gpu = gpu();
    let mut failures = Vec::new();
    for case in cases(gpu.report()) {
        let outcome = case.run(&gpu);
        let what = match outcome {
            Ok(outcome) if outcome.passed => continue,
            Ok(outcome) => outcome.detail.unwrap_or_default(),
            Err(e) => e.to_string(),
        };
        failures.push(format!("{} ({}): {what}", case.kernel, case.variant));
    }
    assert!(
        failures.is_empty(),
        "{} cases failed on {}:\n{}",
        failures.len(),
        gpu.report().line(),
        failures.join("\n")
    );
}

/// Every kind of kernel on numbers that were worked out by hand: a mistake in a specification is one that
/// the GPU and the twins share.
#[test]
fn kernels_and_twins_make_what_was_worked_out_by_hand() {
    use wgrad::kernels::activation::{activation_backward, activation_forward};
    use wgrad::kernels::conv2d::{self, Family, Pass, Product};
    use wgrad::kernels::gather::gather_batch;
    use wgrad::kernels::optimizer::update_parameters;
    use wgrad::kernels::{Step, average, clip, im2col, loss, muon, peak, pool, reduce, step};
    use wgrad::model::recipe::Optimizer;
    use wgrad::model::{Activation, Conv2d, Loss, Pool2d, Shape};
    use wgrad::model::{Activation::Relu, Activation::Sigmoid};

    let gpu = gpu();
    let floats = |values: &[f64]| Values::Floats(values.to_vec());
    let words = |values: &[u32]| Values::Words(values.to_vec());
    let bytes = |values: &[u8]| Values::Bytes(values.to_vec());
    let empty = |len| floats(&vec![77.0; len]);
    // Two rows, of which the second is current, and the counter that says so.
    let steps = |first, count, lr, bias_correction1, bias_correction2| {
        let current = Step {
            lr,
            bias_correction1,
            bias_correction2,
            ..Step::new(first, count)
        };
        let other = Step {
            first: 1,
            count: 1,
            lr: 9.0,
            ..current
        };
        words(bytemuck::cast_slice(&[other, current]))
    };
    let check = |tensors: Vec<Values<f64>>,
                 build: &dyn Fn(&[View]) -> KernelSpec,
                 expected: &[(usize, Values<f64>)]| {
        let view = |(i, values): (usize, &Values<f64>)| match values {
            Values::Floats(values) => View::whole(i, Dtype::F32, values.len()),
            Values::Words(values) => View::whole(i, Dtype::U32, values.len()),
            Values::Bytes(values) => View::whole(i, Dtype::U8, values.len()),
        };
        let views: Vec<View> = tensors.iter().enumerate().map(view).collect();
        let spec = build(&views);
        let buffers: Vec<_> = tensors
            .iter()
            .map(|values| match values {
                Values::Floats(values) => {
                    let narrow: Vec<f32> = values.iter().map(|v| *v as f32).collect();
                    gpu.upload("test", &narrow)
                }
                Values::Words(values) => gpu.upload("test", values),
                Values::Bytes(values) => gpu.upload("test", values),
            })
            .collect::<Result<_, _>>()
            .unwrap();
        let bound: Vec<_> = buffers.iter().collect();
        let dispatch = gpu.dispatch_on(&spec, &bound).unwrap();
        gpu.submit("test", &[&dispatch], 1).unwrap();
        let mut memory = Memory {
            places: (0..tensors.len()).collect(),
            offsets: vec![0; tensors.len()],
            values: tensors,
        };
        cpu::run(&spec, &mut memory);
        for (i, expected) in expected {
            let twin = &memory.values[*i];
            let found = match expected {
                Values::Floats(_) => {
                    let found: Vec<f32> = gpu.read("test", &buffers[*i]).unwrap();
                    Values::Floats(found.into_iter().map(f64::from).collect())
                }
                Values::Words(_) => Values::Words(gpu.read("test", &buffers[*i]).unwrap()),
                Values::Bytes(bytes) => {
                    let mut found: Vec<u8> = gpu.read("test", &buffers[*i]).unwrap();
                    found.truncate(bytes.len());
                    Values::Bytes(found)
                }
            };
            for (who, values) in [("the twin", twin), ("the GPU", &found)] {
                let same = match (values, expected) {
                    (Values::Floats(a), Values::Floats(b)) => {
                        let mut pairs = a.iter().zip(b);
                        a.len() == b.len() && pairs.all(|(a, b)| (a - b).abs() <= 1e-5)
                    }
                    (Values::Words(a), Values::Words(b)) => a == b,
                    (Values::Bytes(a), Values::Bytes(b)) => a == b,
                    _ => false,
                };
                let entry = spec.entry;
                assert!(
                    same,
                    "{entry}, tensor {i}: expected {expected:?}, {who} made {values:?}"
                );
            }
        }
    };

    let pixels = Shape::new(1, 2, 2);
    check(
        vec![
            bytes(&[0, 1, 2, 3, 10, 20, 30, 40, 100, 101, 102, 103]),
            words(&[7, 8, 9]),
            words(&[2, 1, 0, 1]),
            steps(1, 2, 0.0, 1.0, 1.0),
            words(&[1]),
            floats(&[0.5, 2.0, 1.0, -1.0]),
            empty(12),
            words(&[77; 3]),
        ],
        &|v| {
            gather_batch(
                pixels, 3, false, v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7],
            )
        },
        &[
            (
                6,
                floats(&[6., 39., 16., 79., 1., 1., 2., 5., 1., 1., 2., 5.]),
            ),
            (7, words(&[8, 7, 7])),
        ],
    );

    let padded = Conv2d::new(Shape::new(1, 3, 1), 1, [1, 2], [1, 1], [0, 1]).unwrap();
    check(
        vec![floats(&[1., 2., 3.]), empty(8)],
        &|v| im2col::im2col(&padded, 1, v[0], v[1]),
        &[(1, floats(&[0., 1., 1., 2., 2., 3., 3., 0.]))],
    );
    check(
        vec![floats(&[1., 2., 3., 4., 5., 6., 7., 8.]), empty(3)],
        &|v| im2col::col2im(&padded, 1, v[0], None, v[1]),
        &[(1, floats(&[5., 9., 13.]))],
    );
    check(
        vec![
            floats(&[1., 2., 3., 4., 5., 6., 7., 8.]),
            floats(&[1., 0., 2.]),
            empty(3),
        ],
        &|v| im2col::col2im(&padded, 1, v[0], Some(v[1]), v[2]),
        &[(2, floats(&[5., 0., 13.]))],
    );

    let adapter = gpu.report();
    // Matrices take halves alone; `wgrad verify` has them.
    let of_floats = |f: &Family| f.supported(adapter) && *f != Family::Matrix;
    for family in Family::ALL.into_iter().filter(of_floats) {
        let square = Conv2d::new(Shape::new(3, 3, 1), 1, [2, 2], [1, 1], [0, 0]).unwrap();
        let product = |geometry, pass, relu, pool| {
            Product::new(geometry, 1, pass, relu, pool, family, adapter).unwrap()
        };
        let x = floats(&[1., 2., 3., 4., 5., 6., 7., 8., 9.]);
        let parameters = floats(&[1., 2., 3., 4., -40.]);
        for (relu, y) in [(false, [-3., 7., 27., 37.]), (true, [0., 7., 27., 37.])] {
            let forward = product(square, Pass::Forward, relu, None);
            check(
                vec![x.clone(), parameters.clone(), empty(4)],
                &|v| conv2d::conv2d_forward(forward, v[0], v[1], v[2], None),
                &[(2, floats(&y))],
            );
        }
        let dy = floats(&[1., 0., 0., 2.]);
        let weight = product(square, Pass::BackwardWeight, false, None);
        check(
            vec![x.clone(), dy.clone(), empty(5)],
            &|v| conv2d::conv2d_backward_weight(weight, v[0], v[1], v[2]),
            &[(2, floats(&[11., 14., 20., 23., 3.]))],
        );
        let input = product(square, Pass::BackwardInput, false, None);
        check(
            vec![dy.clone(), parameters.clone(), empty(9)],
            &|v| conv2d::conv2d_backward_input(input, v[0], v[1], v[2], None),
            &[(2, floats(&[1., 2., 0., 3., 6., 4., 0., 6., 8.]))],
        );
        let input = product(square, Pass::BackwardInput, true, None);
        check(
            vec![
                dy,
                parameters,
                empty(9),
                floats(&[1., -1., 1., 1., 1., 0., 1., 1., 1.]),
            ],
            &|v| conv2d::conv2d_backward_input(input, v[0], v[1], v[2], Some(v[3])),
            &[(2, floats(&[1., 0., 0., 3., 6., 0., 0., 6., 8.]))],
        );
        // Two inputs, two units: a row of weights for each input, then the biases.
        let dense = product(Conv2d::dense(2, 2), Pass::Forward, false, None);
        check(
            vec![
                floats(&[1., 2.]),
                floats(&[1., 10., 2., 20., 100., 200.]),
                empty(2),
            ],
            &|v| conv2d::conv2d_forward(dense, v[0], v[1], v[2], None),
            &[(2, floats(&[105., 250.]))],
        );
        // Filters of 1, −1, 2 and 0 over [3, 4], pooled.
        let geometry = Conv2d::new(Shape::new(1, 2, 1), 4, [1, 1], [1, 1], [0, 0]).unwrap();
        let window = Pool2d::new(geometry.output, [1, 2], [1, 2]).unwrap();
        if Product::can_pool(&geometry, &window, family) {
            let pooled = product(geometry, Pass::Forward, false, Some(window));
            check(
                vec![
                    floats(&[3., 4.]),
                    floats(&[1., -1., 2., 0., 0., 0., 5., 1.]),
                    empty(4),
                    bytes(&[7; 4]),
                ],
                &|v| conv2d::conv2d_forward(pooled, v[0], v[1], v[2], Some(v[3])),
                &[(2, floats(&[4., -3., 13., 1.])), (3, bytes(&[1, 0, 1, 0]))],
            );
        }
    }

    let pooling =
        |h, w, c, kernel, stride| Pool2d::new(Shape::new(h, w, c), kernel, stride).unwrap();
    let halves = pooling(2, 4, 1, [2, 2], [2, 2]);
    check(
        vec![
            floats(&[1., 5., 7., 7., 2., 3., 7., 0.]),
            empty(2),
            bytes(&[7; 2]),
        ],
        &|v| pool::maxpool2d_forward(&halves, 1, v[0], v[1], v[2]),
        &[(1, floats(&[5., 7.])), (2, bytes(&[1, 0]))],
    );
    let max_backward = |p: Pool2d, dy: &[f64], index: &[u8], dx: &[f64]| {
        check(
            vec![floats(dy), bytes(index), empty(dx.len())],
            &|v| pool::maxpool2d_backward(&p, 1, v[0], v[1], None, v[2]),
            &[(2, floats(dx))],
        );
    };
    max_backward(
        halves,
        &[10., 20.],
        &[1, 2],
        &[0., 10., 0., 0., 0., 0., 20., 0.],
    );
    // Two windows that the middle has won, and four channels at once.
    max_backward(
        pooling(1, 3, 1, [1, 2], [1, 1]),
        &[10., 20.],
        &[1, 0],
        &[0., 30., 0.],
    );
    max_backward(
        pooling(1, 2, 4, [1, 2], [1, 2]),
        &[1., 2., 3., 4.],
        &[0, 1, 0, 1],
        &[1., 0., 3., 0., 0., 2., 0., 4.],
    );
    check(
        vec![
            floats(&[10., 20.]),
            bytes(&[1, 2]),
            floats(&[0., 3.]),
            empty(8),
        ],
        &|v| pool::maxpool2d_backward(&halves, 1, v[0], v[1], Some(v[2]), v[3]),
        &[(3, floats(&[0., 0., 0., 0., 0., 0., 20., 0.]))],
    );
    let pairs = pooling(1, 4, 1, [1, 2], [1, 2]);
    check(
        vec![floats(&[1., 3., 5., 9.]), empty(2)],
        &|v| pool::meanpool2d_forward(&pairs, 1, v[0], v[1]),
        &[(1, floats(&[2., 7.]))],
    );
    check(
        vec![floats(&[2., 4.]), floats(&[1., 0., 1., 1.]), empty(4)],
        &|v| pool::meanpool2d_backward(&pairs, 1, v[0], Some(v[1]), v[2]),
        &[(2, floats(&[1., 0., 2., 2.]))],
    );

    let forward = |activation: Activation, x: &[f64], y: &[f64]| {
        check(
            vec![floats(x), empty(y.len())],
            &|v| activation_forward(activation, v[0], v[1]),
            &[(1, floats(y))],
        );
    };
    forward(Relu, &[-1., 0., 2.], &[0., 0., 2.]);
    forward(Sigmoid, &[0., 3f64.ln()], &[0.5, 0.75]);
    let backward = |activation: Activation, saved: &[f64], dy: &[f64], dx: &[f64]| {
        check(
            vec![floats(saved), floats(dy), empty(dx.len())],
            &|v| activation_backward(activation, v[0], v[1], v[2]),
            &[(2, floats(dx))],
        );
    };
    backward(Relu, &[0., 0., 2.], &[5., 6., 7.], &[0., 0., 7.]);
    backward(Sigmoid, &[0.5, 0.75], &[4., 16.], &[1., 3.]);

    // Two samples, of which `count` count; their predictions go to places 2 and 3.
    let losses = |function: Loss, count, logits: [f64; 4], labels, expected: [&[f64]; 2], found| {
        let mut predictions = [9; 5];
        predictions[2..2 + count].copy_from_slice(&[1, 0][..count]);
        check(
            vec![
                floats(&logits),
                words(labels),
                steps(2, count, 0.0, 1.0, 1.0),
                words(&[1]),
                empty(2),
                empty(4),
                words(&[77; 2]),
                words(&[9; 5]),
            ],
            &|v| {
                loss::loss(
                    function, 0.0, 2, 2, v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7],
                )
            },
            &[
                (4, floats(expected[0])),
                (5, floats(expected[1])),
                (6, words(found)),
                (7, words(&predictions)),
            ],
        );
    };
    losses(
        Loss::SquaredError,
        1,
        [1., 3., 9., 9.],
        &[1, 0],
        [&[2.5, 0.], &[1., 2., 0., 0.]],
        &[1, 0],
    );
    let ln3 = 3f64.ln();
    losses(
        Loss::SoftmaxCrossEntropy,
        2,
        [0., ln3, ln3, 0.],
        &[1, 1],
        [
            &[4f64.ln() - ln3, 4f64.ln()],
            &[0.125, -0.125, 0.375, -0.375],
        ],
        &[1, 0],
    );
    check(
        vec![
            floats(&[1.5, 2., 100.]),
            words(&[1, 2, 0]),
            words(&[1, 0, 0]),
            steps(0, 2, 0.0, 1.0, 1.0),
            words(&[1]),
            words(&[9; 6]),
        ],
        &|v| loss::sum_metrics(3, v[0], v[1], v[2], v[3], v[4], v[5]),
        &[(5, words(&[9, 9, 3.5f32.to_bits(), 1, 9, 9]))],
    );

    let sgd = Optimizer::Sgd {
        momentum: 0.9,
        nesterov: false,
        weight_decay: 0.1,
    };
    check(
        vec![
            floats(&[1.]),
            floats(&[0.5]),
            floats(&[2.]),
            steps(0, 1, 0.1, 1.0, 1.0),
            words(&[1]),
        ],
        &|v| update_parameters(&sgd, v[0], v[1], None, &[v[2]], v[3], v[4]),
        &[(0, floats(&[0.76])), (2, floats(&[2.4]))],
    );
    let adamw = Optimizer::Adamw {
        beta1: 0.5,
        beta2: 0.75,
        epsilon: 1e-8,
        weight_decay: 0.1,
    };
    check(
        vec![
            floats(&[2.]),
            floats(&[1.]),
            floats(&[0.]),
            floats(&[0.]),
            steps(0, 1, 0.1, 0.5, 0.25),
            words(&[1]),
        ],
        &|v| update_parameters(&adamw, v[0], v[1], None, &v[2..4], v[4], v[5]),
        &[
            (0, floats(&[1.88])),
            (2, floats(&[0.5])),
            (3, floats(&[0.25])),
        ],
    );

    let nesterov = Optimizer::Sgd {
        momentum: 0.9,
        nesterov: true,
        weight_decay: 0.1,
    };
    check(
        vec![
            floats(&[1., 7., 8.]),
            floats(&[0.5, 1., 1.]),
            floats(&[2., 1., 1.]),
            steps(0, 1, 0.1, 1.0, 1.0),
            words(&[1]),
            floats(&[2., 0., -1., 0.5, 1., 1.]),
        ],
        &|v| update_parameters(&nesterov, v[0], v[1], Some(v[5]), &[v[2]], v[3], v[4]),
        &[(0, floats(&[0.467, 7., 8.])), (2, floats(&[2.35, 1., 1.]))],
    );
    let lion = Optimizer::Lion {
        beta1: 0.5,
        beta2: 0.75,
        weight_decay: 0.1,
    };
    check(
        vec![
            floats(&[2., 2., 2.]),
            floats(&[1., 0., -1.]),
            floats(&[-0.5, 0., 0.5]),
            steps(0, 1, 0.1, 1.0, 1.0),
            words(&[1]),
        ],
        &|v| update_parameters(&lion, v[0], v[1], None, &[v[2]], v[3], v[4]),
        &[
            (0, floats(&[1.88, 1.98, 2.08])),
            (2, floats(&[-0.125, 0., 0.125])),
        ],
    );
    check(
        vec![floats(&[1., 2., 3.]), empty(1)],
        &|v| clip::sum_squares(v[0], None, v[1]),
        &[(1, floats(&[14.]))],
    );
    check(
        vec![
            floats(&[1., 2., 3.]),
            floats(&[-1., 0., 1., 1., 1., 0.]),
            empty(1),
        ],
        &|v| clip::sum_squares(v[0], Some(v[1]), v[2]),
        &[(2, floats(&[10.]))],
    );
    check(
        vec![floats(&[9., 16.]), empty(1)],
        &|v| clip::norm(v[0], v[1]),
        &[(1, floats(&[5.]))],
    );
    check(
        vec![floats(&[3., 4.]), floats(&[5.])],
        &|v| clip::clip_gradients(1.0, v[0], v[1]),
        &[(0, floats(&[0.6, 0.8]))],
    );
    check(
        vec![
            floats(&[1.]),
            floats(&[2.]),
            empty(1),
            steps(0, 1, 0.1, 1.0, 1.0),
            words(&[1]),
        ],
        &|v| muon::muon_momentum(0.5, v[0], v[1], v[2], v[3], v[4]),
        &[(1, floats(&[2.])), (2, floats(&[2.]))],
    );
    check(
        vec![floats(&[3., 4.]), floats(&[5.])],
        &|v| muon::muon_scale(v[0], v[1]),
        &[(0, floats(&[0.6, 0.8]))],
    );
    check(
        vec![
            floats(&[1., 2., 2., 0.]),
            floats(&[0., 1., 1., 0.]),
            empty(4),
        ],
        &|v| muon::muon_polynomial(2, v[0], v[1], v[2]),
        &[(2, floats(&[-1.3305, -7.5185, -7.5185, 3.4445]))],
    );
    check(
        vec![
            floats(&[3., 4.]),
            floats(&[5.]),
            floats(&[1., -1.]),
            steps(0, 1, 0.1, 1.0, 1.0),
            words(&[1]),
        ],
        &|v| muon::muon_update(3.0, 0.5, v[0], v[1], v[2], v[3], v[4]),
        &[(0, floats(&[1.75, 2.45]))],
    );
    let row = Step {
        average: 0.75,
        ..Step::new(0, 1)
    };
    check(
        vec![
            floats(&[1., 2.]),
            floats(&[5., -2.]),
            words(bytemuck::cast_slice(&[row])),
            words(&[0]),
        ],
        &|v| average::average_values(v[0], v[1], v[2], v[3]),
        &[(0, floats(&[2., 1.]))],
    );
    check(
        vec![floats(&[1., 2.]), floats(&[3., 4.])],
        &|v| average::swap_values(v[0], v[1]),
        &[(0, floats(&[3., 4.])), (1, floats(&[1., 2.]))],
    );

    check(
        vec![floats(&[1., 2., 3., 10., 20., 30.]), empty(3)],
        &|v| reduce::reduce_splits(2, v[0], v[1]),
        &[(1, floats(&[11., 22., 33.]))],
    );
    check(
        vec![words(&[41])],
        &|v| step::advance_step(v[0]),
        &[(0, words(&[42]))],
    );
    check(
        vec![floats(&[1., 2., 3., 4.]), empty(4)],
        &|v| peak::peak_copy(v[0], v[1]),
        &[(1, floats(&[1., 2., 3., 4.]))],
    );
}

/// What a device may do is up to it, but not beyond what WGSL allows every device.
#[test]
fn the_fingerprint_is_the_same_twice_and_within_what_wgsl_allows() {
    let gpu = gpu();
    let found = Fingerprint::of(&gpu).unwrap();
    assert_eq!(found, Fingerprint::of(&gpu).unwrap());
    assert_ne!(found.fma, Rounding::Other, "{found:?}");
    assert_ne!(found.multiply_add, Rounding::Other, "{found:?}");
    // Division 2.5 ULP, sqrt as 1 / inversesqrt, exp 3 + 2 · |x| for |x| up to 16.
    for (precision, most) in [(found.division, 2), (found.sqrt, 5), (found.exp, 35)] {
        assert!(precision.max_ulp <= most, "{found:?}");
    }
    assert!(found.log.exact > 0.1, "{found:?}");
    for row in found.rows() {
        let width: usize = row.iter().map(|cell| cell.chars().count() + 2).sum();
        assert!(width <= 80, "{row:?}");
    }
}

#[test]
fn every_case_has_a_name_of_its_own() {
    let mut names: Vec<_> = cases(gpu().report())
        .into_iter()
        .map(|case| format!("{} {}", case.kernel, case.variant))
        .collect();
    names.sort();
    let twice: Vec<_> = names.windows(2).filter(|two| two[0] == two[1]).collect();
    assert!(
        twice.is_empty(),
        "two cases with the same name share their inputs: {twice:#?}"
    );
}

/// A read-back of `elements` with the guard intact.
fn read_back(elements: &[u32]) -> Vec<u32> {
    [elements, &[GUARD; GUARD_WORDS]].concat()
}

fn floats(values: &[f32]) -> Vec<u32> {
    read_back(&values.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
}

const TOLERANCE: Tolerance = Tolerance {
    absolute: 0.01,
    relative: 0.1,
};

fn expected() -> Expected {
    Expected::Floats(vec![1.0, -2.0, 0.0], TOLERANCE)
}

#[test]
fn comparison_accepts_what_is_within_tolerance_and_reports_the_worst() {
    let found = compare("y", &floats(&[1.0, -2.15, 0.005]), &expected());
    assert_eq!(found.failure, None);
    assert!((found.worst - 0.15).abs() < 1e-6, "{found:?}");
    assert!((found.tolerance - 0.21).abs() < 1e-6, "{found:?}");
}

#[test]
fn comparison_refuses_one_changed_element() {
    for changed in [[1.12, -2.0, 0.0], [1.0, 2.0, 0.0], [1.0, -2.0, -0.02]] {
        let found = compare("y", &floats(&changed), &expected());
        assert!(found.failure.is_some(), "{changed:?}");
    }
    let words = Expected::Words(vec![7, 8, 9]);
    assert_eq!(
        compare("index", &read_back(&[7, 8, 9]), &words).failure,
        None
    );
    let failure = compare("index", &read_back(&[7, 9, 9]), &words).failure;
    assert_eq!(
        failure.as_deref(),
        Some("index[1]: expected 8, found 9; 1 of 3 out")
    );
}

#[test]
fn comparison_takes_nan_and_infinity_only_for_themselves() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let values = [nan, inf, -inf, -2.0, f32::MAX];
    for found in values {
        for reference in values {
            let expected = Expected::Floats(vec![1.0, f64::from(reference), 0.0], TOLERANCE);
            let compared = compare("y", &floats(&[1.0, found, 0.0]), &expected);
            let same = found == reference || found.is_nan() && reference.is_nan();
            assert_eq!(compared.failure.is_none(), same, "{found} for {reference}");
            assert_eq!(compared.worst == 0.0, same, "{compared:?}");
            let text = compared.failure.unwrap_or_default();
            assert!(!text.contains("± NaN") && !text.contains("± inf"), "{text}");
        }
    }
    // The poison is a NaN, but not one that a kernel has written.
    let expected = Expected::Floats(vec![f64::NAN], TOLERANCE);
    let failure = compare("y", &floats(&[f32::from_bits(POISON)]), &expected).failure;
    assert!(failure.unwrap().contains("never written"));
}

#[test]
fn comparison_refuses_a_length_mismatch() {
    for elements in [&[1.0, -2.0][..], &[1.0, -2.0, 0.0, 0.0]] {
        assert!(
            compare("y", &floats(elements), &expected())
                .failure
                .is_some()
        );
    }
    assert!(
        compare("y", &[], &Expected::Words(Vec::new()))
            .failure
            .is_some()
    );
}

#[test]
fn comparison_refuses_an_overwritten_guard() {
    for i in [3, 3 + GUARD_WORDS - 1] {
        let mut found = floats(&[1.0, -2.0, 0.0]);
        found[i] = 0;
        assert!(
            compare("y", &found, &expected()).failure.is_some(),
            "guard word {i}"
        );
    }
}

#[test]
fn comparison_refuses_an_element_left_unwritten() {
    let found = floats(&[1.0, -2.0, f32::from_bits(POISON)]);
    let failure = compare("y", &found, &expected()).failure.unwrap();
    assert!(failure.contains("never written"), "{failure}");
    let words = Expected::Words(vec![7, 8]);
    let failure = compare("index", &read_back(&[WORD_POISON, 8]), &words).failure;
    assert!(failure.unwrap().contains("never written"));
}

/// A kernel that should copy its argument "src" to "dst"; its source is `parameters`, then `body`, run
/// for i below the `groups` · 64 invocations.
fn copying(
    entry: &'static str,
    groups: usize,
    index: &str,
    arguments: &[(&'static str, View, &str)],
    body: &str,
) -> KernelSpec {
    let mut source = String::new();
    for (i, (name, view, access)) in arguments.iter().enumerate() {
        let element = if view.dtype == Dtype::F32 {
            "f32"
        } else {
            "u32"
        };
        source +=
            &format!("@group(0) @binding({i}) var<storage, {access}> {name}: array<{element}>;\n");
    }
    source += &format!(
        "@compute @workgroup_size(64)
         fn {entry}(
             @builtin(workgroup_id) group: vec3<u32>,
             @builtin(num_workgroups) groups: vec3<u32>,
             @builtin(local_invocation_index) local: u32,
         ) {{
             let i = ({index}) * 64u + local;
             {body}
         }}"
    );
    let arguments = arguments.iter().enumerate();
    let arguments = arguments.map(|(i, (name, view, _))| Argument {
        binding: i as u32,
        name,
        view: *view,
        access: Access::Update,
        elements: view.len,
    });
    let arguments = arguments.collect();
    // The harness asks for a source that lives as long as the program.
    KernelSpec::new(
        entry,
        source.leak(),
        Work::PeakCopy,
        &[],
        arguments,
        64 * groups,
    )
}

const UNFOLDED: &str = "group.y * groups.x + group.x";

/// The whole harness on kernels that are wrong on purpose.
#[test]
fn a_wrong_kernel_fails() {
    let gpu = gpu();
    // Writes `value` to the elements from `first` to before `end`.
    let run = |first: usize, end: usize, value: f32| {
        let case = Case::new("wrong", "on purpose", move |b| {
            let src = b.input(&[0.5f32; 100]);
            let dst = b.output("y", 100, Tolerance::sum(1));
            let body = format!(
                "if i >= {first}u && i < {end}u {{ dst[i] = src[0] + {:?}; }}",
                value - 0.5
            );
            let arguments = [("src", src, "read"), ("dst", dst, "read_write")];
            vec![copying("wrong", 3, UNFOLDED, &arguments, &body)]
        });
        case.run(&gpu).unwrap().detail
    };
    assert_eq!(run(0, 100, 0.5), None);
    let detail = run(0, 100, 0.75).unwrap();
    assert!(
        detail.contains("expected 0.5") && detail.contains("100 of 100"),
        "{detail}"
    );
    let detail = run(0, 99, 0.5).unwrap();
    assert!(
        detail.contains("y[99]") && detail.contains("never written"),
        "{detail}"
    );
    let detail = run(0, 101, 0.5).unwrap();
    assert!(detail.contains("past element 100"), "{detail}");
    let nothing = Case::new("wrong", "compares nothing", |_| Vec::new());
    assert!(!nothing.run(&gpu).unwrap().passed);
}

/// A read past the end of an input that is used, and a write into one.
#[test]
fn a_kernel_that_strays_fails() {
    let gpu = gpu();
    // `body` makes y[i] from 100 floats x and 100 words k.
    let run = |access: &'static str, body: &'static str| {
        let case = Case::new("stray", body, move |b| {
            let (x, k) = (b.input(&[0.5f32; 100]), b.input(&[3u32; 100]));
            let y = b.output("y", 100, Tolerance::sum(1));
            // Under the names that the twin of a copy knows.
            let arguments = [
                ("src", x, access),
                ("k", k, access),
                ("dst", y, "read_write"),
            ];
            let body = format!("if i < 100u {{ {body} }}");
            vec![copying("stray", 2, UNFOLDED, &arguments, &body)]
        });
        case.run(&gpu).unwrap().detail
    };
    assert_eq!(run("read", "dst[i] = src[i] + f32(k[i] - 3u);"), None);
    for body in [
        "dst[i] = src[i + 1u] + f32(k[i] - 3u);",
        "dst[i] = src[i] + f32(k[i] - 3u) * src[i + 64u];",
        // Far beyond the guard, where the index is clamped.
        "dst[i] = src[i + 100000u] + f32(k[i] - 3u);",
        "dst[i] = src[i] + f32(k[i + 1u] - 3u);",
        "dst[i] = src[i] + f32(k[i + 100000u] - 3u);",
    ] {
        let detail = run("read", body).expect(body);
        assert!(
            detail.contains("expected 0.5") && detail.contains("found "),
            "{body}: {detail}"
        );
    }
    for body in [
        "dst[i] = src[i]; src[i] = f32(k[0]);",
        "dst[i] = src[i]; k[99] = 4u;",
        "dst[i] = src[i] + f32(k[i] - 3u); src[i + 1u] = src[i];",
    ] {
        let detail = run("read_write", body).expect(body);
        assert!(
            detail.contains("expected nothing to be written to it"),
            "{body}: {detail}"
        );
    }
}

/// A kernel that is right in one row of workgroups and wrong in several.
#[test]
fn a_kernel_that_does_not_unfold_its_workgroups_fails() {
    let gpu = gpu();
    let run = |index: &'static str| {
        let case = Case::new("folded", index, move |b| {
            let src = b.input(&[1.0f32; 256]);
            let dst = b.updated("y", &[0.0; 256], Tolerance::EXACT);
            let arguments = [("src", src, "read"), ("dst", dst, "read_write")];
            let body = "if i < 256u { dst[i] += src[i]; }";
            vec![copying("folded", 4, index, &arguments, body)]
        });
        case.run(&gpu).unwrap().detail
    };
    assert_eq!(run("group.y * groups.x + group.x + 0u * groups.x"), None);
    for wrong in [
        "group.x + 0u * groups.x",
        "group.y * (groups.x + 1u) + group.x",
    ] {
        let detail = run(wrong).expect(wrong);
        assert!(
            detail.contains("workgroups in several rows: y["),
            "{detail}"
        );
    }
}

/// The order of every sum follows from the shape: a tile, which is chosen by measurement, must not
/// change a bit. Holds where the driver compiles every tile's multiply-adds alike, as Mesa's does.
#[test]
fn every_tile_of_a_family_gives_the_same_bits() {
    use wgrad::gpu::Buffer;
    use wgrad::kernels::conv2d::{self, Family, Pass, Product};
    use wgrad::kernels::reduce;
    use wgrad::model::{Conv2d, Pool2d, Shape};
    let gpu = gpu();
    let values = |half, len: usize| {
        let value = |i: u32| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0;
        let values: Vec<f32> = (0..len as u32).map(value).collect();
        if half {
            let halves: Vec<half::f16> = values.into_iter().map(half::f16::from_f32).collect();
            return gpu.upload("test", &halves).unwrap();
        }
        gpu.upload("test", &values).unwrap()
    };
    let bits = |buffer: &Buffer| gpu.read::<u32>("test", buffer).unwrap();
    let geometries = [
        // Vectors and scalars, padding and strides, sums in one part and in many.
        (
            Conv2d::new(Shape::new(9, 7, 12), 24, [3, 3], [1, 1], [1, 1]),
            40,
        ),
        (
            Conv2d::new(Shape::new(14, 13, 3), 5, [5, 4], [2, 1], [1, 2]),
            40,
        ),
        (Ok(Conv2d::dense(77, 10)), 2100),
    ];
    let mut most_splits = 1;
    for (geometry, batch) in geometries {
        let g = geometry.unwrap();
        let pool = Pool2d::new(g.output, [2, 2], [2, 2]).ok();
        for family in Family::ALL
            .into_iter()
            .filter(|f| f.supported(gpu.report()))
        {
            let half = family == Family::Matrix;
            let lens = [
                batch * g.input.elements(),
                g.parameter_elements(),
                batch * g.output.elements(),
            ];
            let [x, parameters, dy] = lens.map(|len| values(half, len));
            let pool = pool.filter(|p| Product::can_pool(&g, p, family));
            let passes = Pass::ALL.map(|pass| (pass, None));
            for (pass, pool) in passes
                .into_iter()
                .chain(pool.map(|p| (Pass::Forward, Some(p))))
            {
                let relu = pass != Pass::BackwardWeight;
                let product =
                    Product::new(g, batch, pass, relu, pool, family, gpu.report()).unwrap();
                let product = product.in_halves(half);
                let tiles = product.tiles_on(gpu.report());
                let real = if half { Dtype::F16 } else { Dtype::F32 };
                let run = |tile| {
                    let product = product.with_tile(tile);
                    let (n, splits) = (product.result_elements(), product.splits());
                    let result = gpu.buffer("test", n).unwrap();
                    let index = gpu.buffer("test", n.div_ceil(4)).unwrap();
                    let sum = gpu.buffer("test", n / splits).unwrap();
                    let buffers = [&x, &parameters, &dy, &result, &index, &sum];
                    let [vx, vp, vdy] = [0, 1, 2].map(|i| View::whole(i, real, lens[i]));
                    let sums = pass == Pass::BackwardWeight;
                    let vresult = View::whole(3, if sums { Dtype::F32 } else { real }, n);
                    let vsum = View::whole(5, Dtype::F32, n / splits);
                    let vindex = pool.map(|_| View::whole(4, Dtype::U8, n));
                    let spec = match pass {
                        Pass::Forward => conv2d::conv2d_forward(product, vx, vp, vresult, vindex),
                        Pass::BackwardWeight => {
                            conv2d::conv2d_backward_weight(product, vx, vdy, vresult)
                        }
                        Pass::BackwardInput => {
                            conv2d::conv2d_backward_input(product, vdy, vp, vresult, Some(vx))
                        }
                    };
                    let sums = sums.then(|| reduce::reduce_splits(splits, vresult, vsum));
                    let dispatches = std::iter::once(spec).chain(sums);
                    let dispatches: Vec<_> = dispatches
                        .map(|spec| gpu.dispatch_on(&spec, &buffers).unwrap())
                        .collect();
                    let dispatches: Vec<_> = dispatches.iter().collect();
                    gpu.submit("test", &dispatches, 1).unwrap();
                    let found = if dispatches.len() == 2 { &sum } else { &result };
                    [bits(found), bits(&index)]
                };
                most_splits = most_splits.max(product.splits());
                let expected = run(tiles[0]);
                assert!(expected[0].iter().any(|bits| *bits != 0));
                for tile in &tiles[1..] {
                    let found = run(*tile);
                    assert!(found == expected, "{product}: other bits with {tile}");
                }
            }
        }
    }
    assert!(most_splits > 3, "{most_splits}");
}

#[test]
fn a_dispatch_refuses_buffers_that_are_too_short() {
    use wgrad::Error;
    use wgrad::kernels::activation::activation_forward;
    use wgrad::kernels::{pool, reduce};
    use wgrad::model::{Activation, Pool2d, Shape};
    let gpu = gpu();
    let [long, short] = [100, 99].map(|len| gpu.buffer("test", len).unwrap());
    let buffers = [&long, &short];
    let [long, short] = [0, 1].map(|i| View::whole(i, Dtype::F32, buffers[i].len()));
    let index = View::whole(0, Dtype::U8, 25);
    let pooling = Pool2d::new(Shape::new(10, 10, 1), [2, 2], [2, 2]).unwrap();
    let refused = [
        (
            "relu_forward: expected y of at least 100 words, found 99",
            activation_forward(Activation::Relu, long, short),
        ),
        (
            "maxpool2d_forward: expected x of at least 100 words, found 99",
            pool::maxpool2d_forward(&pooling, 1, short, long, index),
        ),
        (
            // Bytes, four to a word.
            "maxpool2d_forward: expected index of at least 7 words, found 6",
            pool::maxpool2d_forward(&pooling, 1, long, long, index.slice(0, 24)),
        ),
        (
            "reduce_splits: expected partials of at least 300 words, found 100",
            reduce::reduce_splits(3, long, long),
        ),
    ];
    for (message, spec) in refused {
        match gpu.dispatch_on(&spec, &buffers).err() {
            Some(e @ Error::Shape { .. }) => assert!(e.to_string().contains(message), "{e}"),
            other => panic!("expected a shape error with '{message}', found {other:?}"),
        }
    }
}

#[test]
fn a_product_refuses_the_pools_that_it_cannot_end_in() {
    use wgrad::gpu::AdapterReport;
    use wgrad::kernels::conv2d::{Family, Pass, Product};
    use wgrad::model::{Conv2d, Pool2d, Shape};
    let adapter = AdapterReport::imagined(true);
    let layer =
        |channels| Conv2d::new(Shape::new(12, 12, 3), channels, [3, 3], [1, 1], [1, 1]).unwrap();
    let product = |channels, size, kernel, stride, pass, family| {
        let (geometry, input) = (layer(channels), Shape::new(size, size, channels));
        let pool = Pool2d::new(input, kernel, stride).unwrap();
        let fits = pass == Pass::Forward && Product::can_pool(&geometry, &pool, family);
        let made = Product::new(geometry, 4, pass, true, Some(pool), family, &adapter);
        assert_eq!(made.is_ok(), fits, "{pool:?}, {pass:?}, {family}");
        made
    };
    let (forward, tiled) = (Pass::Forward, Family::Workgroup);
    for family in [Family::Subgroup, tiled] {
        for window in [[2, 2], [1, 2], [2, 1], [1, 4]] {
            assert!(product(8, 12, window, window, forward, family).is_ok());
        }
    }
    for refused in [
        product(8, 12, [2, 2], [1, 1], forward, tiled),
        product(8, 12, [2, 2], [3, 3], forward, tiled),
        product(8, 12, [3, 3], [3, 3], forward, tiled),
        product(8, 12, [3, 1], [3, 1], forward, tiled),
        product(6, 12, [2, 2], [2, 2], forward, tiled),
        product(8, 12, [2, 2], [2, 2], forward, Family::Plain),
        product(8, 12, [2, 2], [2, 2], Pass::BackwardInput, tiled),
        // Not what the convolution gives.
        product(8, 10, [2, 2], [2, 2], forward, tiled),
    ] {
        let message = refused.unwrap_err().to_string();
        assert!(message.contains("expected max-pooling"), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
}

#[test]
fn whole_steps_agree_with_the_twin_in_every_family_and_fusion() {
    use wgrad::kernels::conv2d::Family;
    let gpu = std::sync::Arc::new(gpu());
    let outcomes = wgrad::verify::steps(Some(&gpu), &mut |_| {}).expect("the steps run");
    let failures: Vec<_> = outcomes.iter().filter(|o| !o.passed).collect();
    assert!(failures.is_empty(), "{failures:#?}");
    let has = |kernel: &str, what: &str| {
        let mut found = outcomes.iter().filter(|o| o.kernel == kernel);
        assert!(found.any(|o| o.variant.contains(what)), "{kernel}, {what}");
    };
    let families = Family::ALL.into_iter();
    let families = families.filter(|f| f.supported(gpu.report()));
    for device in families.map(|f| f.to_string()).chain(["cpu".into()]) {
        let ways = match device.as_str() {
            "matrix" => &["mixed precision"][..],
            _ => &["fused", "unfused", "explicit convolution"],
        };
        for way in ways {
            for kernel in ["training", "evaluation"] {
                has(kernel, &format!("{device}, {way}"));
                has(
                    &format!("{kernel}, each kernel"),
                    &format!("{device}, {way}"),
                );
            }
        }
    }
    // Larger than a training step's.
    has("evaluation", "fused, batches of 11");
}

#[test]
fn random_geometries_agree_with_the_twin() {
    let gpu = gpu();
    let mut failures = Vec::new();
    for index in 0..wgrad::verify::DRAWS {
        for case in wgrad::verify::drawn(gpu.report(), 1, index) {
            let outcome = case.run(&gpu).unwrap();
            if let Some(detail) = outcome.detail {
                failures.push(format!(
                    "draw {index}, {} ({}): {detail}",
                    case.kernel, case.variant
                ));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// On every machine, and without the draws before it.
#[test]
fn a_draw_is_its_seeds_and_numbers() {
    use wgrad::gpu::AdapterReport;
    use wgrad::verify::drawn;
    let names = |software, seed, index| -> Vec<String> {
        let cases = drawn(&AdapterReport::imagined(software), seed, index);
        let names = cases.iter().map(|c| format!("{}: {}", c.kernel, c.variant));
        names.collect()
    };
    assert_eq!(names(true, 1, 3), names(true, 1, 3));
    assert_ne!(names(true, 1, 3), names(true, 1, 4));
    assert_ne!(names(true, 1, 3), names(true, 2, 3));
    // Only the tiles of subgroups differ between the two adapters, and one has matrices.
    let others = |software| -> Vec<String> {
        let names = names(software, 1, 3).into_iter();
        let apart = |name: &String| name.contains("subgroup") || name.contains("matrix");
        names.filter(|name| !apart(name)).collect()
    };
    assert_eq!(others(true), others(false));
    assert!(others(true).len() > 8);
    // A whole list has poolings that are fused and that overlap, dense layers and strides.
    let all: Vec<String> = (0..wgrad::verify::DRAWS)
        .flat_map(|i| names(true, 1, i))
        .collect();
    for part in ["max-pooled", "_overlapping", "1×1×", "stride 2×", "splits"] {
        assert!(all.iter().any(|name| name.contains(part)), "{part}");
    }
}
