//! The twins of the normalisations against PyTorch. The numbers in `golden/norm.json` are made by the
//! script beside them, `golden/make_norm.py`, which also says how they are laid out.

use serde::Deserialize;
use wgrad::cpu::{self, Float};
use wgrad::kernels::batch_norm::BatchNorm;
use wgrad::kernels::group_norm::GroupNorm;

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
        let y = cpu::batch_norm_forward(&x, &statistics, &affine);
        assert_close("y", &y[..step.y.len()], &step.y);

        let partials = cpu::batch_norm_backward_sums(&g, &x, &dy, &statistics, count);
        let gradient = cpu::reduce_chunks(&partials, g.chunks().count());
        assert_close("daffine", &gradient, &step.daffine);
        let dx =
            cpu::batch_norm_backward_input(&g, &x, &dy, &statistics, &affine, &gradient, count);
        let (counted, rest) = dx.split_at(step.dx.len());
        assert_close("dx", counted, &step.dx);
        assert!(rest.iter().all(|dx| *dx == T::zero()));
    }
    let y = cpu::batch_norm_evaluate(case.epsilon, &x, &running, &affine);
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
    let y = cpu::group_norm_forward(&g, &x, &statistics, &affine);
    assert_close("y", &y, &case.y);
    let partials = cpu::group_norm_backward_sums(&g, &x, &dy, &statistics, &affine);
    let sums = cpu::reduce_splits(&partials, g.chunks().count());
    let dx = cpu::group_norm_backward_input(&g, &x, &dy, &statistics, &affine, &sums);
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
