//! Twins of `shaders/activation.wgsl`, and the bias as an operation of its own (on the GPU it is
//! part of the product's epilogue).

use super::{Float, add, reduce_splits};
use rayon::prelude::*;

/// Elements that one task handles at least; below that a thread costs more than it saves.
const ELEMENTS_PER_TASK: usize = 4096;

/// Rows that make up one partial sum of [`bias_backward`].
const ROWS_PER_SUM: usize = 512;

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
    map(x, |x| {
        let e = (-x.abs()).exp();
        (if x >= T::zero() { T::one() } else { e }) / (T::one() + e)
    })
}

/// `dx = dy · y · (1 − y)`.
pub fn sigmoid_backward<T: Float>(y: &[T], dy: &[T]) -> Vec<T> {
    map2(y, dy, |y, dy| dy * y * (T::one() - y))
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
    fn bias_gradient_counts_every_row_of_every_partial_sum() {
        let rows = 2 * ROWS_PER_SUM + 3;
        let dy: Vec<f64> = (0..rows).flat_map(|row| [1.0, row as f64]).collect();
        let expected = [rows as f64, (rows * (rows - 1) / 2) as f64];
        assert_eq!(bias_backward(2, &dy), expected);
    }
}
