//! The normalisations: their twins against PyTorch, and what they add to a plan. The numbers in
//! `golden/norm.json` are made by the script beside them, `golden/make_norm.py`, which also says how they
//! are laid out.

use serde::Deserialize;
use wgrad::cpu::{self, Float, Twins};
use wgrad::kernels::batch_norm::BatchNorm;
use wgrad::kernels::conv2d::{Pass, Product};
use wgrad::kernels::group_norm::GroupNorm;
use wgrad::kernels::{AdapterReport, Step as StepRow, Work};
use wgrad::model::recipe::Optimizer;
use wgrad::model::{Activation, Conv2d, Loss, Model, Op, Shape, initial_running};
use wgrad::plan::{Mode, Options, Plan, Section, Target};

#[derive(Deserialize)]
struct Golden {
    batch_norm: Vec<BatchNormCase>,
    group_norm: Vec<GroupNormCase>,
    layer_norm: Vec<GroupNormCase>,
}

type Numbers = Vec<f32>;

#[derive(Deserialize)]
struct BatchNormCase {
    input: [usize; 3],
    momentum: f32,
    epsilon: f32,
    affine: Numbers,
    running: Numbers,
    steps: Vec<Step>,
    evaluated: Numbers,
}

#[derive(Deserialize)]
struct Step {
    x: Numbers,
    y: Numbers,
    dy: Numbers,
    dx: Numbers,
    daffine: Numbers,
    running: Numbers,
}

#[derive(Deserialize)]
struct GroupNormCase {
    input: [usize; 3],
    /// Of a layer normalisation there is none.
    groups: Option<usize>,
    epsilon: f32,
    x: Numbers,
    affine: Numbers,
    y: Numbers,
    dy: Numbers,
    dx: Numbers,
    daffine: Numbers,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/norm.json")).unwrap()
}

fn numbers<T: Float>(golden: &Numbers) -> Vec<T> {
    golden.iter().map(|v| (*v).into()).collect()
}

/// Every element within `tolerance·(1 + |expected|)`; the golden values are rounded to f32, so that
/// even f64 agrees to no more than that.
#[track_caller]
fn assert_close<T: Float>(name: &str, found: &[T], expected: &Numbers) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let epsilon: f64 = T::epsilon().into();
    let tolerance = (64.0 * epsilon).max(f64::from(f32::EPSILON));
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let (found, expected): (f64, f64) = (found.into(), expected.into());
        let good = (found - expected).abs() <= tolerance * (1.0 + expected.abs());
        assert!(good, "{name}[{i}] is {found}, not {expected}");
    }
}

fn batch_norm<T: Float>(case: &BatchNormCase) {
    let [h, w, channels] = case.input;
    let (positions, affine) = (h * w, numbers::<T>(&case.affine));
    let (mut running, mut x) = (numbers::<T>(&case.running), Vec::new());
    for step in &case.steps {
        x = numbers(&step.x);
        let count = x.len() / (positions * channels);
        // Two samples too many, of which nothing may be seen.
        let g = BatchNorm {
            batch: count + 2,
            positions,
            channels,
        };
        let full = g.rows() * channels;
        x.resize(full, 9.0.into());
        let mut dy = numbers(&step.dy);
        dy.resize(full, 5.0.into());

        let partials = cpu::batch_norm_moments(&g, &x, count);
        let constants = [case.momentum, case.epsilon];
        let statistics =
            cpu::batch_norm_statistics(&g, constants, &x, &partials, count, &mut running);
        assert_close("running", &running, &step.running);
        let mut y = vec![T::zero(); full];
        cpu::batch_norm_forward(false, &x, &statistics, &affine, &mut y);
        assert_close("y", &y[..step.y.len()], &step.y);

        let partials = cpu::batch_norm_backward_sums(&g, &x, &dy, &statistics, count);
        let gradient = cpu::reduce_chunks(&partials, g.chunks().count());
        assert_close("daffine", &gradient, &step.daffine);
        // What it held before is not zero.
        let mut dx = x.clone();
        cpu::batch_norm_backward_input(
            &g,
            false,
            &x,
            &dy,
            &statistics,
            &affine,
            &gradient,
            count,
            &mut dx,
        );
        let (counted, rest) = dx.split_at(step.dx.len());
        assert_close("dx", counted, &step.dx);
        assert!(rest.iter().all(|dx| *dx == T::zero()));
    }
    let mut y = vec![T::zero(); x.len()];
    cpu::batch_norm_evaluate(case.epsilon, false, &x, &running, &affine, &mut y);
    assert_close("evaluated", &y[..case.evaluated.len()], &case.evaluated);
}

fn group_norm<T: Float>(case: &GroupNormCase) {
    let [h, w, channels] = case.input;
    let (x, affine, dy) = (
        numbers::<T>(&case.x),
        numbers(&case.affine),
        numbers(&case.dy),
    );
    let (positions, batch) = (h * w, x.len() / (h * w * channels));
    let g = match case.groups {
        Some(groups) => GroupNorm {
            batch,
            positions,
            channels,
            groups,
        },
        None => GroupNorm::layer(batch, positions, channels),
    };
    let partials = cpu::group_norm_moments(&g, &x);
    let statistics = cpu::group_norm_statistics(&g, case.epsilon, &x, &partials);
    let mut y = vec![T::zero(); x.len()];
    cpu::group_norm_forward(&g, &x, &statistics, &affine, &mut y);
    assert_close("y", &y, &case.y);
    let partials = cpu::group_norm_backward_sums(&g, &x, &dy, &statistics, &affine);
    let sums = cpu::reduce_splits(&partials, g.chunks().count());
    let mut dx = vec![T::zero(); x.len()];
    cpu::group_norm_backward_input(&g, &x, &dy, &statistics, &affine, &sums, &mut dx);
    assert_close("dx", &dx, &case.dx);
    let partials = cpu::group_norm_backward_affine(&g, &x, &dy, &statistics);
    let gradient = cpu::reduce_chunks(&partials, g.row_chunks().count());
    assert_close("daffine", &gradient, &case.daffine);
}

#[test]
fn batch_norm_trains_and_evaluates_as_pytorchs() {
    let cases = golden().batch_norm;
    assert_eq!(cases.len(), 3);
    for case in cases {
        assert_eq!(case.steps.len(), 2);
        batch_norm::<f32>(&case);
        batch_norm::<f64>(&case);
    }
}

#[test]
fn group_norm_and_layer_norm_are_pytorchs() {
    let golden = golden();
    let cases: Vec<_> = golden.group_norm.iter().chain(&golden.layer_norm).collect();
    assert_eq!(cases.len(), 6);
    for case in cases {
        group_norm::<f32>(case);
        group_norm::<f64>(case);
    }
}

/// Convolutions and dense layers with a normalisation of each kind behind them.
fn normalised() -> Model {
    let (epsilon, momentum) = (1e-2, 0.1);
    let loss = Loss::SoftmaxCrossEntropy;
    let mut model = Model::new("normalised", Shape::new(5, 6, 2), 3, loss);
    let conv = |input, channels| {
        let geometry = Conv2d::new(input, channels, [3, 2], [1, 1], [1, 0]);
        Op::Conv2d(geometry.unwrap())
    };
    // A bias and the normalisation's own shift are one too many, and depthwise is the other kernel.
    let depthwise = |input: Shape| {
        let geometry = Conv2d::new(input, input.channels, [3, 3], [1, 1], [1, 1]).unwrap();
        Op::Conv2d(geometry.without_bias().grouped(input.channels).unwrap())
    };
    let dense = |input: Shape, units| Op::Dense(Conv2d::dense(input.elements(), units));
    let batch_norm = Op::BatchNorm { epsilon, momentum };
    let mut push = |build: &dyn Fn(Shape) -> Op, activation| {
        let value = model.layers.len();
        let op = build(model.shape(value));
        model.push(None, op, activation, None, &[value]).unwrap();
    };
    push(&|_| batch_norm, None);
    push(&|input| conv(input, 4), None);
    push(&|_| batch_norm, Some(Activation::Relu));
    push(&depthwise, None);
    push(&|_| batch_norm, None);
    push(&|input| conv(input, 6), None);
    push(&|_| Op::GroupNorm { groups: 3, epsilon }, None);
    push(&|input| dense(input, 5), None);
    push(&|_| Op::LayerNorm { epsilon }, None);
    push(&|_| batch_norm, Some(Activation::Relu));
    push(&|input| dense(input, 3), None);
    model.finish().unwrap()
}

/// Numbers between −1 and 1, much as random ones.
fn noise(seed: usize, len: usize) -> impl Iterator<Item = f64> {
    (0..len).map(move |i| (12.9898 * (i + 1000 * seed) as f64).sin())
}

const SGD: Mode = Mode::Train(Optimizer::Sgd {
    momentum: 0.9,
    nesterov: false,
    weight_decay: 0.0,
});

fn plan(model: &Model, mode: Mode, unfused: bool) -> Plan {
    let options = Options {
        unfused,
        unshared: true,
        ..Options::default()
    };
    Plan::new(model, 4, mode, &options, Target::Cpu).unwrap()
}

fn entries(plan: &Plan, prefix: &str) -> Vec<String> {
    let such = plan.specs().filter(|spec| spec.entry.starts_with(prefix));
    such.map(|spec| format!("{} {}", spec.layer, spec.entry))
        .collect()
}

#[test]
fn plans_have_no_flaws() {
    let (model, adapter) = (normalised(), AdapterReport::imagined(true));
    for mode in [SGD, Mode::Evaluate] {
        for target in [Target::Cpu, Target::Gpu(&adapter)] {
            let plan = Plan::new(&model, 4, mode, &Options::default(), target).unwrap();
            assert_eq!(plan.flaws(), Vec::<String>::new());
        }
    }
}

#[test]
fn an_evaluated_batch_norm_is_folded_into_the_convolution_before_it() {
    let model = normalised();
    assert_eq!(
        entries(&plan(&model, SGD, false), "batch_norm_fold"),
        [""; 0]
    );
    let unfused = entries(&plan(&model, Mode::Evaluate, true), "batch_norm");
    let found: Vec<&str> = unfused.iter().map(String::as_str).collect();
    assert_eq!(
        found,
        ["batch_norm1", "batch_norm2", "batch_norm3", "batch_norm4"]
            .map(|l| format!("{l} batch_norm_evaluate"))
    );
    // The first has no convolution before it, the last a normalisation.
    assert_eq!(
        entries(&plan(&model, Mode::Evaluate, false), "batch_norm"),
        [
            "batch_norm1 batch_norm_evaluate",
            "conv2d1 batch_norm_fold",
            "conv2d2 batch_norm_fold",
            "batch_norm4 batch_norm_evaluate"
        ]
    );
}

#[test]
fn a_relu_is_computed_along() {
    let relus = |plan: &Plan| {
        let activation = |work: &Work| matches!(work, Work::ActivationForward(Activation::Relu));
        let alone = plan.specs().filter(|spec| activation(&spec.work)).count();
        let along = plan.specs().filter(|spec| {
            matches!(
                spec.work,
                Work::BatchNormForward { relu: true, .. }
                    | Work::BatchNormEvaluate { relu: true, .. }
                    | Work::Product(Product {
                        relu: true,
                        pass: Pass::Forward,
                        ..
                    })
            )
        });
        (
            alone,
            along.map(|spec| spec.layer.clone()).collect::<Vec<_>>(),
        )
    };
    let model = normalised();
    let fused = |layers: &[&str]| (0, layers.iter().map(|l| l.to_string()).collect::<Vec<_>>());
    assert_eq!(relus(&plan(&model, SGD, true)), (2, vec![]));
    assert_eq!(
        relus(&plan(&model, SGD, false)),
        fused(&["batch_norm2", "batch_norm4"])
    );
    // Here the first went into the convolution with the normalisation.
    assert_eq!(
        relus(&plan(&model, Mode::Evaluate, false)),
        fused(&["conv2d1", "batch_norm4"])
    );
}

#[test]
fn what_another_layer_reads_is_not_folded() {
    let mut model = Model::new("twice", Shape::new(4, 4, 2), 3, Loss::SoftmaxCrossEntropy);
    let norm = Op::BatchNorm {
        epsilon: 1e-3,
        momentum: 0.1,
    };
    let conv = Conv2d::new(model.input, 2, [3, 3], [1, 1], [1, 1]).unwrap();
    let mut push = |op, inputs: &[usize]| model.push(None, op, None, None, inputs).unwrap();
    let convolved = push(Op::Conv2d(conv), &[0]);
    let first = push(norm, &[convolved]);
    // This one's output only the next reads.
    let again = push(Op::Conv2d(conv), &[first]);
    let second = push(norm, &[again]);
    push(norm, &[convolved]);
    push(Op::Dense(Conv2d::dense(32, 3)), &[second]);
    let model = model.finish().unwrap();
    assert_eq!(
        entries(&plan(&model, Mode::Evaluate, false), "batch_norm_fold"),
        ["conv2d2 batch_norm_fold"]
    );
}

#[test]
fn folded_and_unfolded_give_the_same() {
    let model = normalised();
    let mut running: Vec<f64> = initial_running(&model)
        .iter()
        .map(|v| (*v).into())
        .collect();
    let drawn = noise(3, running.len());
    running
        .iter_mut()
        .zip(drawn)
        .for_each(|(r, d)| *r += 0.5 * d);
    let [folded, unfolded] = [false, true].map(|unfused| {
        let mut twins = Twins::<f64>::new(plan(&model, Mode::Evaluate, unfused), 4);
        *twins.floats("running") = running.clone();
        *twins.floats("parameters") = noise(1, model.parameter_elements).collect();
        let x: Vec<f64> = noise(2, 4 * model.input.elements()).collect();
        twins.floats("input")[..x.len()].copy_from_slice(&x);
        let step = StepRow::new(0, 4);
        *twins.words("steps") = bytemuck::cast_slice(&[step]).to_vec();
        twins.run(&[Section::Forward, Section::Loss]);
        twins.floats("losses")[..4].to_vec()
    });
    for (folded, unfolded) in folded.iter().zip(&unfolded) {
        assert!(
            (folded - unfolded).abs() <= 1e-12 * unfolded.abs(),
            "{folded}, {unfolded}"
        );
    }
}

#[test]
fn a_step_moves_the_running_statistics_and_evaluation_does_not() {
    let model = normalised();
    for (mode, moves) in [(SGD, true), (Mode::Evaluate, false)] {
        let plan = plan(&model, mode, false);
        let changes = plan
            .specs()
            .any(|spec| matches!(spec.work, Work::BatchNormStatistics { .. }));
        assert_eq!(changes, moves);
    }
}
