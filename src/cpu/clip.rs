//! Twins of `shaders/clip.wgsl`.

use super::Float;

/// The sum of the squares of each `run` elements of x, without those whose first factor is 0: x `[n]`,
/// factors `[2, n]`, returns `[⌈n / run⌉]`.
pub fn sum_squares<T: Float>(x: &[T], factors: Option<&[T]>, run: usize) -> Vec<T> {
    let counts = |i: usize| factors.is_none_or(|factors| factors[i] != T::zero());
    let starts = (0..x.len()).step_by(run);
    let sum = |start: usize| {
        let all = (start..x.len().min(start + run)).filter(|i| counts(*i));
        all.map(|i| x[i] * x[i]).sum()
    };
    starts.map(sum).collect()
}

/// The square root of the sum of x.
pub fn norm<T: Float>(x: &[T]) -> T {
    x.iter().copied().sum::<T>().sqrt()
}

/// Scales the gradients, whose norm that is, to one of at most `limit`; a norm that is NaN makes them NaN.
/// As `torch.nn.utils.clip_grad_norm_`.
pub fn clip_gradients<T: Float>(limit: f32, gradients: &mut [T], norm: T) {
    let [limit, epsilon]: [T; 2] = [limit, 1e-6].map(Into::into);
    let factor = limit / (norm + epsilon);
    let factor = if factor > T::one() { T::one() } else { factor };
    gradients.iter_mut().for_each(|g| *g *= factor);
}
