//! Twins of `shaders/average.wgsl`.

use super::Float;

/// `average = share·average + (1 − share)·values`.
pub fn average_values<T: Float>(share: f32, average: &mut [T], values: &[T]) {
    let share: T = share.into();
    for (average, &value) in average.iter_mut().zip(values) {
        *average = share * *average + (T::one() - share) * value;
    }
}

/// Exchanges a and b.
pub fn swap_values<T: Float>(a: &mut [T], b: &mut [T]) {
    a.swap_with_slice(b);
}
