//! The CPU twins against PyTorch. The numbers in `golden/golden.json` are made by the script beside
//! them, `golden/make.py`, which also says how they are laid out.

use serde::Deserialize;
use wgrad::cpu::{self, Float};
use wgrad::model::recipe::Optimizer;
use wgrad::model::{Conv2d, Pool2d, Shape};

#[derive(Deserialize)]
struct Golden {
    conv2d: Vec<ConvCase>,
    maxpool2d: Vec<PoolCase>,
    meanpool2d: Vec<PoolCase>,
    softmax_cross_entropy: Vec<LossCase>,
    squared_error: Vec<LossCase>,
    sgd: Vec<SgdCase>,
    adamw: Vec<AdamwCase>,
}

/// JSON has no NaN; the script writes null.
type Numbers = Vec<Option<f32>>;

#[derive(Deserialize)]
struct ConvCase {
    input: [usize; 3],
    out_channels: usize,
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 2],
    relu: bool,
    x: Numbers,
    parameters: Numbers,
    y: Numbers,
    dy: Numbers,
    dx: Numbers,
    dparameters: Numbers,
}

#[derive(Deserialize)]
struct PoolCase {
    input: [usize; 3],
    kernel: [usize; 2],
    stride: [usize; 2],
    x: Numbers,
    y: Numbers,
    #[serde(default)]
    index: Vec<u8>,
    dy: Numbers,
    dx: Numbers,
}

#[derive(Deserialize)]
struct LossCase {
    classes: usize,
    output: Numbers,
    labels: Vec<u32>,
    loss: Numbers,
    gradient: Numbers,
}

#[derive(Deserialize)]
struct SgdCase {
    momentum: f32,
    weight_decay: f32,
    start: Numbers,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct AdamwCase {
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    weight_decay: f32,
    start: Numbers,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    lr: f64,
    gradient: Numbers,
    parameters: Numbers,
    state: Vec<Numbers>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/golden.json")).unwrap()
}

fn shape([height, width, channels]: [usize; 3]) -> Shape {
    Shape::new(height, width, channels)
}

fn numbers<T: Float>(golden: &Numbers) -> Vec<T> {
    golden
        .iter()
        .map(|v| v.unwrap_or(f32::NAN).into())
        .collect()
}

/// Whether both have the same length, NaN in the same places and all else within
/// `tolerance·(1 + |expected|)`.
fn close<T: Float>(found: &[T], expected: &Numbers, tolerance: f64) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err(format!("{} values, not {}", found.len(), expected.len()));
    }
    for (i, (&found, expected)) in found.iter().zip(expected).enumerate() {
        let found: f64 = found.into();
        let good = match expected {
            None => found.is_nan(),
            Some(expected) => {
                let expected = f64::from(*expected);
                (found - expected).abs() <= tolerance * (1.0 + expected.abs())
            }
        };
        if !good {
            return Err(format!("[{i}] is {found}, not {expected:?}"));
        }
    }
    Ok(())
}

#[track_caller]
fn assert_close<T: Float>(name: &str, found: &[T], expected: &Numbers) {
    // The golden values are rounded to f32, so that even f64 agrees to no more than that.
    let epsilon: f64 = T::epsilon().into();
    let tolerance = (32.0 * epsilon).max(f64::from(f32::EPSILON));
    if let Err(difference) = close(found, expected, tolerance) {
        panic!("{name}{difference}");
    }
}

#[test]
fn the_comparison_sees_one_changed_value_nan_and_a_missing_value() {
    let expected = vec![Some(1.0), None, Some(-3.0)];
    assert!(close(&[1.0, f64::NAN, -3.0], &expected, 1e-6).is_ok());
    assert!(close(&[1.0, f64::NAN, -3.00001], &expected, 1e-6).is_err());
    assert!(close(&[f64::NAN, f64::NAN, -3.0], &expected, 1e-6).is_err());
    assert!(close(&[1.0, 0.0, -3.0], &expected, 1e-6).is_err());
    assert!(close(&[1.0, f64::NAN], &expected, 1e-6).is_err());
}

/// Runs a generic test in both precisions.
macro_rules! in_f32_and_f64 {
    ($($test:ident),*) => {$(
        mod $test {
            #[test]
            fn f32() { super::check::$test::<f32>() }
            #[test]
            fn f64() { super::check::$test::<f64>() }
        }
    )*};
}

in_f32_and_f64!(
    conv2d,
    maxpool2d,
    meanpool2d,
    losses,
    sgd_update,
    adamw_update
);

mod check {
    use super::*;

    pub fn conv2d<T: Float>() {
        for case in golden().conv2d {
            let g = Conv2d::new(
                shape(case.input),
                case.out_channels,
                case.kernel,
                case.stride,
                case.padding,
            )
            .unwrap();
            let x: Vec<T> = numbers(&case.x);
            let parameters: Vec<T> = numbers(&case.parameters);
            let y = cpu::conv2d_forward(&g, case.relu, &x, &parameters);
            assert_close("y", &y, &case.y);
            let mut dy: Vec<T> = numbers(&case.dy);
            if case.relu {
                dy = cpu::relu_backward(&y, &dy);
            }
            let dx = cpu::conv2d_backward_input(&g, &dy, &parameters);
            assert_close("dx", &dx, &case.dx);
            let gradient = cpu::conv2d_backward_weight(&g, &x, &dy);
            assert_close("dparameters", &gradient, &case.dparameters);
        }
    }

    pub fn maxpool2d<T: Float>() {
        for case in golden().maxpool2d {
            let p = Pool2d::new(shape(case.input), case.kernel, case.stride).unwrap();
            let (y, index) = cpu::maxpool2d_forward(&p, &numbers::<T>(&case.x));
            assert_close("y", &y, &case.y);
            assert_eq!(index, case.index);
            let dy: Vec<T> = numbers(&case.dy);
            let dx = cpu::maxpool2d_backward_overlapping(&p, &dy, &index);
            assert_close("dx, gathered", &dx, &case.dx);
            if !p.overlapping() {
                let dx = cpu::maxpool2d_backward(&p, &dy, &index);
                assert_close("dx, scattered", &dx, &case.dx);
            }
        }
    }

    pub fn meanpool2d<T: Float>() {
        for case in golden().meanpool2d {
            let p = Pool2d::new(shape(case.input), case.kernel, case.stride).unwrap();
            let y = cpu::meanpool2d_forward(&p, &numbers::<T>(&case.x));
            assert_close("y", &y, &case.y);
            let dx = cpu::meanpool2d_backward(&p, &numbers::<T>(&case.dy));
            assert_close("dx", &dx, &case.dx);
        }
    }

    pub fn losses<T: Float>() {
        let golden = golden();
        for case in golden.softmax_cross_entropy {
            loss::<T>(&case, |z, labels, classes| {
                cpu::softmax_cross_entropy(z, labels, classes, 0.0, labels.len() as f32)
            });
        }
        for case in golden.squared_error {
            loss::<T>(&case, |z, labels, classes| {
                cpu::squared_error(z, labels, classes, labels.len() as f32)
            });
        }
    }

    fn loss<T: Float>(
        case: &LossCase,
        function: impl Fn(&[T], &[u32], usize) -> cpu::LossOutput<T>,
    ) {
        let found = function(&numbers(&case.output), &case.labels, case.classes);
        assert_close("loss", &found.loss, &case.loss);
        assert_close("gradient", &found.gradient, &case.gradient);
    }

    pub fn sgd_update<T: Float>() {
        for case in golden().sgd {
            let (momentum, weight_decay) = (case.momentum, case.weight_decay);
            let rule = Optimizer::Sgd {
                momentum,
                nesterov: false,
                weight_decay,
            };
            let mut w: Vec<T> = numbers(&case.start);
            let mut velocity = vec![T::zero(); w.len()];
            for (i, step) in case.steps.iter().enumerate() {
                cpu::sgd_update(
                    &mut w,
                    &numbers(&step.gradient),
                    &mut velocity,
                    None,
                    (momentum, false),
                    weight_decay,
                    rule.step_scalars(step.lr, i as u64 + 1),
                );
                assert_close("parameters", &w, &step.parameters);
                assert_close("velocity", &velocity, &step.state[0]);
            }
        }
    }

    pub fn adamw_update<T: Float>() {
        for case in golden().adamw {
            let rule = Optimizer::Adamw {
                beta1: case.beta1,
                beta2: case.beta2,
                epsilon: case.epsilon,
                weight_decay: case.weight_decay,
            };
            let mut w: Vec<T> = numbers(&case.start);
            let (mut m, mut v) = (vec![T::zero(); w.len()], vec![T::zero(); w.len()]);
            for (i, step) in case.steps.iter().enumerate() {
                cpu::adamw_update(
                    &mut w,
                    &numbers(&step.gradient),
                    [&mut m, &mut v],
                    None,
                    [case.beta1, case.beta2],
                    case.epsilon,
                    case.weight_decay,
                    rule.step_scalars(step.lr, i as u64 + 1),
                );
                assert_close("parameters", &w, &step.parameters);
                assert_close("first moment", &m, &step.state[0]);
                assert_close("second moment", &v, &step.state[1]);
            }
        }
    }
}
