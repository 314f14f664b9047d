//! Twins of `shaders/activation.wgsl` by the formulas as one writes them first, and the bias as an operation of its own (on the GPU it is
//! part of the product's epilogue).

use super::{Float, add, reduce_splits};
use crate::model::Activation;
use rayon::prelude::*;
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

/// Elements that one task handles at least; below that a thread costs more than it saves.
const ELEMENTS_PER_TASK: usize = 4096;

/// Rows that make up one partial sum of [`bias_backward`].
const ROWS_PER_SUM: usize = 512;

/// `y = f(x)` by the function of the activation's name. Any shape.
pub fn activation_forward<T: Float>(activation: Activation, x: &[T]) -> Vec<T> {
    match activation {
        Activation::Relu => relu_forward(x),
        Activation::Sigmoid => sigmoid_forward(x),
        Activation::LeakyRelu { slope } => leaky_relu_forward(slope, x),
        Activation::Gelu => gelu_forward(x),
        Activation::GeluTanh => gelu_tanh_forward(x),
        Activation::Silu => silu_forward(x),
        Activation::Tanh => tanh_forward(x),
        Activation::HardSwish => hard_swish_forward(x),
    }
}

/// `dx = dy · f'`; what was saved is y or x, see [`Activation::by_output`].
pub fn activation_backward<T: Float>(activation: Activation, saved: &[T], dy: &[T]) -> Vec<T> {
    match activation {
        Activation::Relu => relu_backward(saved, dy),
        Activation::Sigmoid => sigmoid_backward(saved, dy),
        Activation::LeakyRelu { slope } => leaky_relu_backward(slope, saved, dy),
        Activation::Gelu => gelu_backward(saved, dy),
        Activation::GeluTanh => gelu_tanh_backward(saved, dy),
        Activation::Silu => silu_backward(saved, dy),
        Activation::Tanh => tanh_backward(saved, dy),
        Activation::HardSwish => hard_swish_backward(saved, dy),
    }
}

/// `y = max(0, x)`; NaN stays NaN. Any shape.
pub fn relu_forward<T: Float>(x: &[T]) -> Vec<T> {
    map(x, |x| if x <= T::zero() { T::zero() } else { x })
}

/// `dx = 0 where y ≤ 0, else dy`: the derivative is 1 where the input was positive, which is where
/// the output is; at 0 it is taken as 0, and a NaN passes dy on, both as in PyTorch.
pub fn relu_backward<T: Float>(y: &[T], dy: &[T]) -> Vec<T> {
    map2(y, dy, |y, dy| if y <= T::zero() { T::zero() } else { dy })
}

/// `y = 1 / (1 + e^−x)`, computed with `e^−|x|`, which never overflows. Any shape.
pub fn sigmoid_forward<T: Float>(x: &[T]) -> Vec<T> {
    map(x, sigmoid)
}

fn sigmoid<T: Float>(x: T) -> T {
    let e = (-x.abs()).exp();
    (if x >= T::zero() { T::one() } else { e }) / (T::one() + e)
}

/// `dx = dy · y · (1 − y)`.
pub fn sigmoid_backward<T: Float>(y: &[T], dy: &[T]) -> Vec<T> {
    map2(y, dy, |y, dy| dy * y * (T::one() - y))
}

/// `y = x where x > 0, else slope·x`. Any shape.
pub fn leaky_relu_forward<T: Float>(slope: f32, x: &[T]) -> Vec<T> {
    let slope: T = slope.into();
    map(x, |x| if x > T::zero() { x } else { slope * x })
}

/// `dx = dy where x > 0, else slope·dy`; so at a NaN, as in PyTorch. The output y does in place of x for
/// a slope that is not negative: it has the same sign.
pub fn leaky_relu_backward<T: Float>(slope: f32, x: &[T], dy: &[T]) -> Vec<T> {
    let slope: T = slope.into();
    map2(x, dy, |x, dy| if x > T::zero() { dy } else { slope * dy })
}

/// `y = tanh x`. Any shape.
pub fn tanh_forward<T: Float>(x: &[T]) -> Vec<T> {
    map(x, T::tanh)
}

/// `dx = dy · (1 − y²)`.
pub fn tanh_backward<T: Float>(y: &[T], dy: &[T]) -> Vec<T> {
    map2(y, dy, |y, dy| dy * (T::one() - y) * (T::one() + y))
}

/// `y = x·Φ(x)`, where Φ is the normal distribution function, by the error function itself. Any shape.
pub fn gelu_forward<T: Float>(x: &[T]) -> Vec<T> {
    map(x, |x| x * normal(x))
}

/// `dx = dy · (Φ(x) + x·Φ′(x))`.
pub fn gelu_backward<T: Float>(x: &[T], dy: &[T]) -> Vec<T> {
    // 1/√(2π), and the factor of x² in the exponent.
    let [peak, half] = [0.5 * SQRT_2_BY_PI, -0.5].map(constant::<T>);
    map2(x, dy, |x, dy| {
        dy * (normal(x) + x * peak * (half * x * x).exp())
    })
}

/// `y = x·σ(2u)` with `u = √(2/π)·(x + 0.044715·x³)`, which is `½·x·(1 + tanh u)`. Any shape.
pub fn gelu_tanh_forward<T: Float>(x: &[T]) -> Vec<T> {
    map(x, |x| x * gelu_tanh_gate(x))
}

/// `dx = dy · (s + x·s·(1 − s)·2u′)` with `s = σ(2u)`.
pub fn gelu_tanh_backward<T: Float>(x: &[T], dy: &[T]) -> Vec<T> {
    let [factor, cubic] = [2.0 * SQRT_2_BY_PI, 3.0 * GELU_CUBIC].map(constant::<T>);
    map2(x, dy, |x, dy| {
        let s = gelu_tanh_gate(x);
        let slope = s * (T::one() - s);
        // Where the gate is shut or open, u′ may overflow.
        let bend = if slope.is_zero() && x.is_finite() {
            T::zero()
        } else {
            x * slope * factor * (T::one() + cubic * x * x)
        };
        dy * (s + bend)
    })
}

/// `y = x·σ(x)`. Any shape.
pub fn silu_forward<T: Float>(x: &[T]) -> Vec<T> {
    map(x, |x| x * sigmoid(x))
}

/// `dx = dy · σ(x) · (1 + x·(1 − σ(x)))`.
pub fn silu_backward<T: Float>(x: &[T], dy: &[T]) -> Vec<T> {
    map2(x, dy, |x, dy| {
        let s = sigmoid(x);
        dy * s * (T::one() + x * (T::one() - s))
    })
}

/// `y = x·clamp(x/6 + ½, 0, 1)`. Any shape.
pub fn hard_swish_forward<T: Float>(x: &[T]) -> Vec<T> {
    let [half, six]: [T; 2] = [0.5.into(), 6.0.into()];
    map(x, |x| x * (x / six + half).max(T::zero()).min(T::one()))
}

/// `dx = 0 where x ≤ −3, dy where x ≥ 3, else dy · (x/3 + ½)`.
pub fn hard_swish_backward<T: Float>(x: &[T], dy: &[T]) -> Vec<T> {
    let [half, three]: [T; 2] = [0.5.into(), 3.0.into()];
    map2(x, dy, |x, dy| {
        if x <= -three {
            T::zero()
        } else if x >= three {
            dy
        } else {
            dy * (x / three + half)
        }
    })
}

/// √(2/π), and the factor of x³ in the formula with tanh.
const SQRT_2_BY_PI: f64 = FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
const GELU_CUBIC: f64 = 0.044715;

/// Φ(x): `½ erfc(−x/√2)`, in f64 whatever T is.
fn normal<T: Float>(x: T) -> T {
    let x: f64 = x.into();
    constant(0.5 * libm::erfc(-x * FRAC_1_SQRT_2))
}

fn gelu_tanh_gate<T: Float>(x: T) -> T {
    let [factor, cubic] = [2.0 * SQRT_2_BY_PI, GELU_CUBIC].map(constant::<T>);
    sigmoid(factor * x * (T::one() + cubic * x * x))
}

fn constant<T: Float>(value: f64) -> T {
    num_traits::cast(value).expect("a float holds any number, if rounded")
}

/// `y[row,c] = x[row,c] + bias[c]`: x `[rows, C]`, bias `[C]`, returns `[rows, C]`.
pub fn bias_forward<T: Float>(x: &[T], bias: &[T]) -> Vec<T> {
    assert!(x.len().is_multiple_of(bias.len()));
    let mut y = x.to_vec();
    y.par_chunks_mut(bias.len())
        .with_min_len(ELEMENTS_PER_TASK.div_ceil(bias.len()))
        .for_each(|row| add(row, bias));
    y
}

/// `db[c] = Σ_row dy[row,c]`: dy `[rows, C]`, returns `[C]`.
pub fn bias_backward<T: Float>(c: usize, dy: &[T]) -> Vec<T> {
    assert!(dy.len().is_multiple_of(c));
    let partials: Vec<Vec<T>> = dy
        .par_chunks(ROWS_PER_SUM * c)
        .map(|rows| reduce_splits(rows, rows.len() / c))
        .collect();
    reduce_splits(&partials.concat(), partials.len())
}

fn map<T: Float>(x: &[T], f: impl Fn(T) -> T + Sync + Send) -> Vec<T> {
    x.par_iter()
        .with_min_len(ELEMENTS_PER_TASK)
        .map(|&x| f(x))
        .collect()
}

fn map2<T: Float>(a: &[T], b: &[T], f: impl Fn(T, T) -> T + Sync + Send) -> Vec<T> {
    assert_eq!(a.len(), b.len());
    a.par_iter()
        .zip(b)
        .with_min_len(ELEMENTS_PER_TASK)
        .map(|(&a, &b)| f(a, b))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relu_at_zero_and_nan() {
        let y = relu_forward(&[-1.0, 0.0, 2.0]);
        assert_eq!(y, [0.0, 0.0, 2.0]);
        assert_eq!(relu_backward(&y, &[5.0, 6.0, 7.0]), [0.0, 0.0, 7.0]);
        assert!(relu_forward(&[f32::NAN])[0].is_nan());
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        assert_eq!(relu_forward(&[inf, -inf]), [inf, 0.0]);
        // torch.relu's gradient: 0 where the result is ≤ 0, whatever dy is, else dy.
        let dx = relu_backward(&[nan, inf, 0.0, 0.0], &[3.0, 4.0, nan, inf]);
        assert_eq!(dx, [3.0, 4.0, 0.0, 0.0]);
    }

    #[test]
    fn sigmoid_saturates_without_overflow() {
        let y = sigmoid_forward(&[-1e4f32, 0.0, 1e4]);
        assert_eq!(y, [0.0, 0.5, 1.0]);
        assert_eq!(sigmoid_backward(&y, &[1.0, 1.0, 1.0]), [0.0, 0.25, 0.0]);
    }

    #[test]
    fn activations_at_the_ends() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let x = [-inf, -1e30, -90.0, 0.0, 90.0, 1e30, inf, nan];
        // As PyTorch has them.
        for (forward, backward, below, above) in GATED {
            let y = forward(&x);
            assert_eq!(y[1..7], [-0.0, below, 0.0, 90.0, 1e30, inf]);
            assert!(y[0].is_nan() && y[7].is_nan());
            let dx = backward(&x, &[1.0; 8]);
            assert_eq!(dx[1..6], [0.0, dx[2], 0.5, 1.0, 1.0]);
            assert!(dx[2].abs() < 1e-30);
            if above {
                assert_eq!([dx[0], dx[6]], [0.0, 1.0]);
                assert!(dx[7].is_nan());
            } else {
                assert!(dx[0].is_nan() && dx[6].is_nan() && dx[7].is_nan());
            }
        }
        let y = leaky_relu_forward(0.1, &x);
        assert_eq!(y[..7], [-inf, -1e29, -9.0, 0.0, 90.0, 1e30, inf]);
        assert!(y[7].is_nan());
        let dx = leaky_relu_backward(0.1, &y, &[1.0; 8]);
        assert_eq!(dx, [0.1, 0.1, 0.1, 0.1, 1.0, 1.0, 1.0, 0.1]);
        let y = tanh_forward(&x);
        assert_eq!(y[..7], [-1.0, -1.0, -1.0, 0.0, 1.0, 1.0, 1.0]);
        assert_eq!(
            tanh_backward(&y, &[1.0; 8])[..7],
            [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
        );
    }

    type Forward = fn(&[f32]) -> Vec<f32>;
    type Backward = fn(&[f32], &[f32]) -> Vec<f32>;

    /// Forward, backward, the value at −90, and whether the gradient at infinities is defined.
    const GATED: [(Forward, Backward, f32, bool); 4] = [
        (gelu_forward, gelu_backward, -0.0, false),
        (gelu_tanh_forward, gelu_tanh_backward, -0.0, false),
        (silu_forward, silu_backward, -90.0 * 8.194_01e-40, false),
        (hard_swish_forward, hard_swish_backward, -0.0, true),
    ];

    #[test]
    fn bias_gradient_counts_every_row_of_every_partial_sum() {
        let rows = 2 * ROWS_PER_SUM + 3;
        let dy: Vec<f64> = (0..rows).flat_map(|row| [1.0, row as f64]).collect();
        let expected = [rows as f64, (rows * (rows - 1) / 2) as f64];
        assert_eq!(bias_backward(2, &dy), expected);
    }
}
