//! Twins of `shaders/join.wgsl`: what joins two values, and the ways back.

use super::Float;
use rayon::prelude::*;

/// Elements that one task handles at least.
const ELEMENTS_PER_TASK: usize = 4096;

/// Positions that one partial sum of [`scale_backward_factors`] covers.
const POSITIONS_PER_SUM: usize = 64;

/// `y = a + b`, element by element. Any shape.
pub fn add<T: Float>(a: &[T], b: &[T]) -> Vec<T> {
    assert_eq!(a.len(), b.len());
    let pairs = a.par_iter().zip(b).with_min_len(ELEMENTS_PER_TASK);
    pairs.map(|(&a, &b)| a + b).collect()
}

/// `y[r] = a[r]` and then `b[r]`: a `[rows, CA]`, b `[rows, CB]`, returns `[rows, CA + CB]`.
pub fn concat<T: Float>(rows: usize, a: &[T], b: &[T]) -> Vec<T> {
    let [ca, cb] = [a, b].map(|values| channels(rows, values));
    let mut y = vec![T::zero(); a.len() + b.len()];
    y.par_chunks_mut(ca + cb)
        .zip(a.par_chunks(ca).zip(b.par_chunks(cb)))
        .with_min_len(ELEMENTS_PER_TASK.div_ceil(ca + cb))
        .for_each(|(y, (a, b))| {
            y[..ca].copy_from_slice(a);
            y[ca..].copy_from_slice(b);
        });
    y
}

/// `y[r,k] = x[r, first + k]` for the `count` channels from `first` on: x `[rows, C]`, returns
/// `[rows, count]`.
pub fn slice_channels<T: Float>(rows: usize, first: usize, count: usize, x: &[T]) -> Vec<T> {
    let c = channels(rows, x);
    assert!(first + count <= c);
    let mut y = vec![T::zero(); rows * count];
    y.par_chunks_mut(count)
        .zip(x.par_chunks(c))
        .with_min_len(ELEMENTS_PER_TASK.div_ceil(c))
        .for_each(|(y, x)| y.copy_from_slice(&x[first..][..count]));
    y
}

/// `y[n,p,c] = x[n,p,c] · factors[n,c]`: x `[N,P,C]`, factors `[N,C]`, returns `[N,P,C]`. The gradient
/// by x is the same function of dy.
pub fn scale_forward<T: Float>(c: usize, x: &[T], factors: &[T]) -> Vec<T> {
    let sample = x.len() / channels(c, factors);
    let mut y = x.to_vec();
    y.par_chunks_mut(sample)
        .zip(factors.par_chunks(c))
        .for_each(|(y, factors)| {
            for y in y.chunks_exact_mut(c) {
                y.iter_mut().zip(factors).for_each(|(y, &f)| *y *= f);
            }
        });
    y
}

/// `df[n,c] = Σ_p x[n,p,c] · dy[n,p,c]`: x and dy `[N,P,C]`, returns `[N,C]`.
pub fn scale_backward_factors<T: Float>(positions: usize, c: usize, x: &[T], dy: &[T]) -> Vec<T> {
    assert_eq!(x.len(), dy.len());
    let mut df = vec![T::zero(); channels(positions, x)];
    df.par_chunks_mut(c)
        .zip(
            x.par_chunks(positions * c)
                .zip(dy.par_chunks(positions * c)),
        )
        .for_each(|(df, (x, dy))| {
            // In parts, whose rounding errors grow with a part's length instead of with all of it.
            let mut part = vec![T::zero(); c];
            let parts = x
                .chunks(POSITIONS_PER_SUM * c)
                .zip(dy.chunks(POSITIONS_PER_SUM * c));
            for (x, dy) in parts {
                part.fill(T::zero());
                for (x, dy) in x.chunks_exact(c).zip(dy.chunks_exact(c)) {
                    for ((sum, &x), &dy) in part.iter_mut().zip(x).zip(dy) {
                        *sum += x * dy;
                    }
                }
                super::add(df, &part);
            }
        });
    df
}

/// How many values each of `rows` has.
fn channels<T>(rows: usize, values: &[T]) -> usize {
    assert!(values.len().is_multiple_of(rows));
    values.len() / rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_undo_a_concatenation() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0, 9.0, 10.0]);
        let y = concat(2, &a, &b);
        assert_eq!(y, [1.0, 2.0, 5.0, 6.0, 7.0, 3.0, 4.0, 8.0, 9.0, 10.0]);
        assert_eq!(slice_channels(2, 0, 2, &y), a);
        assert_eq!(slice_channels(2, 2, 3, &y), b);
        assert_eq!(slice_channels(2, 3, 1, &y), [6.0, 9.0]);
    }

    #[test]
    fn every_sample_is_scaled_by_its_own_factors() {
        let x: Vec<f64> = (0..12).map(f64::from).collect();
        let y = scale_forward(2, &x, &[1.0, 10.0, 2.0, 100.0]);
        let expected = [
            0.0, 10.0, 2.0, 30.0, 4.0, 50.0, 12.0, 700.0, 16.0, 900.0, 20.0, 1100.0,
        ];
        assert_eq!(y, expected);
        let df = scale_backward_factors(3, 2, &x, &[1.0; 12]);
        assert_eq!(df, [6.0, 9.0, 24.0, 27.0]);
    }
}
