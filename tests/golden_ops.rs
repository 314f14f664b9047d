//! The CPU twins of the elementwise operations, of pooling with padding and of the smoothed, weighted
//! and mixed loss against PyTorch. The numbers in `golden/ops.json` are made by the script beside them,
//! `golden/make_ops.py`.

use serde::Deserialize;
use wgrad::cpu::{self, Float, join};
use wgrad::model::{Pool2d, Shape};

#[derive(Deserialize)]
struct Golden {
    activation: Vec<ActivationCase>,
    maxpool2d: Vec<PoolCase>,
    meanpool2d: Vec<PoolCase>,
    softmax_cross_entropy: Vec<LossCase>,
    scale: ScaleCase,
    mixed_softmax_cross_entropy: Vec<LossCase>,
}

/// JSON has neither NaN, which is null, nor infinity, which is 3e38.
type Numbers = Vec<Option<f32>>;

fn number(golden: Option<f32>) -> f32 {
    match golden {
        None => f32::NAN,
        Some(value) if value.abs() == 3e38 => value * f32::INFINITY,
        Some(value) => value,
    }
}

#[derive(Deserialize)]
struct ActivationCase {
    name: String,
    x: Numbers,
    y: Numbers,
    dy: Numbers,
    dx: Numbers,
}

#[derive(Deserialize)]
struct PoolCase {
    input: [usize; 3],
    output: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 2],
    ceil: bool,
    count_include_pad: bool,
    x: Numbers,
    y: Numbers,
    #[serde(default)]
    index: Vec<u8>,
    dy: Numbers,
    dx: Numbers,
}

impl PoolCase {
    fn pool(&self) -> Pool2d {
        let [height, width, channels] = self.input;
        let input = Shape::new(height, width, channels);
        let padding = self.padding.map(|padding| [padding; 2]);
        let (kernel, stride) = (self.kernel, self.stride);
        let pool = Pool2d::padded(
            input,
            kernel,
            stride,
            padding,
            self.ceil,
            self.count_include_pad,
        );
        let pool = pool.unwrap();
        assert_eq!([pool.output.height, pool.output.width], self.output);
        pool
    }
}

#[derive(Deserialize)]
struct LossCase {
    classes: usize,
    weights: Option<Numbers>,
    smoothing: f32,
    logits: Numbers,
    labels: Vec<u32>,
    /// Of mixed samples: the second label, and the share of the first as so many of so many.
    #[serde(default)]
    second: Vec<u32>,
    #[serde(default)]
    kept: Vec<u32>,
    #[serde(default)]
    of: u32,
    loss: Numbers,
    gradient: Numbers,
}

#[derive(Deserialize)]
struct ScaleCase {
    positions: usize,
    channels: usize,
    x: Numbers,
    factors: Numbers,
    y: Numbers,
    dy: Numbers,
    dx: Numbers,
    dfactors: Numbers,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/ops.json")).unwrap()
}

fn numbers<T: Float>(golden: &Numbers) -> Vec<T> {
    golden.iter().map(|v| number(*v).into()).collect()
}

/// Whether both have the same length, NaN and infinities in the same places and all else within
/// `tolerance·(1 + |expected|)`.
fn close<T: Float>(found: &[T], expected: &Numbers, tolerance: f64) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err(format!("{} values, not {}", found.len(), expected.len()));
    }
    for (i, (&found, expected)) in found.iter().zip(expected).enumerate() {
        let found: f64 = found.into();
        let expected = f64::from(number(*expected));
        let good = found == expected
            || found.is_nan() && expected.is_nan()
            || expected.is_finite()
                && (found - expected).abs() <= tolerance * (1.0 + expected.abs());
        if !good {
            return Err(format!("[{i}] is {found}, not {expected}"));
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
fn the_comparison_sees_one_changed_value_nan_and_infinity() {
    let expected = vec![Some(1.0), None, Some(3e38)];
    let inf = f64::INFINITY;
    assert!(close(&[1.0, f64::NAN, inf], &expected, 1e-6).is_ok());
    assert!(close(&[1.00001, f64::NAN, inf], &expected, 1e-6).is_err());
    assert!(close(&[1.0, 0.0, inf], &expected, 1e-6).is_err());
    assert!(close(&[1.0, f64::NAN, -inf], &expected, 1e-6).is_err());
    assert!(close(&[1.0, f64::NAN, f64::NAN], &expected, 1e-6).is_err());
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
    activations,
    maxpool2d,
    meanpool2d,
    losses,
    mixed_loss,
    scale
);

mod check {
    use super::*;

    /// As the script has it.
    const SLOPE: f32 = 0.125;

    pub fn activations<T: Float>() {
        let cases = golden().activation;
        assert_eq!(cases.len(), 6);
        for case in cases {
            let (x, dy) = (numbers::<T>(&case.x), numbers::<T>(&case.dy));
            let (y, dx) = match case.name.as_str() {
                "leaky_relu" => {
                    let y = cpu::leaky_relu_forward(SLOPE, &x);
                    let dx = cpu::leaky_relu_backward(SLOPE, &y, &dy);
                    (y, dx)
                }
                "tanh" => {
                    let y = cpu::tanh_forward(&x);
                    let dx = cpu::tanh_backward(&y, &dy);
                    (y, dx)
                }
                "gelu" => (cpu::gelu_forward(&x), cpu::gelu_backward(&x, &dy)),
                "gelu_tanh" => (cpu::gelu_tanh_forward(&x), cpu::gelu_tanh_backward(&x, &dy)),
                "silu" => (cpu::silu_forward(&x), cpu::silu_backward(&x, &dy)),
                _ => (
                    cpu::hard_swish_forward(&x),
                    cpu::hard_swish_backward(&x, &dy),
                ),
            };
            assert_close(&format!("{} y", case.name), &y, &case.y);
            assert_close(&format!("{} dx", case.name), &dx, &case.dx);
        }
    }

    pub fn maxpool2d<T: Float>() {
        let mut scattered = 0;
        for case in golden().maxpool2d {
            let p = case.pool();
            assert!(!p.inside());
            let (y, index) = cpu::maxpool2d_forward(&p, &numbers::<T>(&case.x));
            assert_close("y", &y, &case.y);
            assert_eq!(index, case.index);
            let dy: Vec<T> = numbers(&case.dy);
            let dx = cpu::maxpool2d_backward_overlapping(&p, &dy, &index);
            assert_close("dx, gathered", &dx, &case.dx);
            if !p.overlapping() {
                let dx = cpu::maxpool2d_backward(&p, &dy, &index);
                assert_close("dx, scattered", &dx, &case.dx);
                scattered += 1;
            }
        }
        assert_eq!(scattered, 2);
    }

    pub fn meanpool2d<T: Float>() {
        for case in golden().meanpool2d {
            let p = case.pool();
            let y = cpu::meanpool2d_forward(&p, &numbers::<T>(&case.x));
            assert_close("y", &y, &case.y);
            let dx = cpu::meanpool2d_backward(&p, &numbers::<T>(&case.dy));
            assert_close("dx", &dx, &case.dx);
        }
    }

    pub fn losses<T: Float>() {
        for case in golden().softmax_cross_entropy {
            let logits: Vec<T> = numbers(&case.logits);
            let (labels, smoothing) = (&case.labels, case.smoothing);
            let found = match &case.weights {
                Some(weights) => {
                    let each: Vec<f32> = numbers(weights);
                    let total = labels.iter().map(|label| each[*label as usize]).sum();
                    let weights = numbers(weights);
                    cpu::weighted_softmax_cross_entropy(&logits, labels, &weights, smoothing, total)
                }
                None => {
                    let total = labels.len() as f32;
                    cpu::softmax_cross_entropy(&logits, labels, case.classes, smoothing, total)
                }
            };
            assert_close("loss", &found.loss, &case.loss);
            assert_close("gradient", &found.gradient, &case.gradient);
        }
    }

    pub fn mixed_loss<T: Float>() {
        for case in golden().mixed_softmax_cross_entropy {
            let logits: Vec<T> = numbers(&case.logits);
            let (labels, smoothing) = (&case.labels, case.smoothing);
            let mixes = case.second.iter().zip(&case.kept);
            let mixes =
                mixes.flat_map(|(second, kept)| [*second, *kept, case.of, 0, 0, 0, 0, 0, 0]);
            let mixes: Vec<u32> = mixes.collect();
            let weights: Option<Vec<T>> = case.weights.as_ref().map(numbers);
            let weights = weights.as_deref();
            // PyTorch's mean over class probabilities is over the samples, whatever they weigh.
            let total = labels.len() as f32;
            let found = cpu::mixed_softmax_cross_entropy(
                &logits,
                labels,
                case.classes,
                &mixes,
                weights,
                smoothing,
                total,
            );
            assert_close("loss", &found.loss, &case.loss);
            assert_close("gradient", &found.gradient, &case.gradient);
        }
    }

    pub fn scale<T: Float>() {
        let case = golden().scale;
        let (x, factors, dy) = (
            numbers::<T>(&case.x),
            numbers(&case.factors),
            numbers(&case.dy),
        );
        let y = join::scale_forward(case.channels, &x, &factors);
        assert_close("y", &y, &case.y);
        let dx = join::scale_forward(case.channels, &dy, &factors);
        assert_close("dx", &dx, &case.dx);
        let df = join::scale_backward_factors(case.positions, case.channels, &x, &dy);
        assert_close("df", &df, &case.dfactors);
    }
}
