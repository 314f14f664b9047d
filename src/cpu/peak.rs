//! Twins of `shaders/peak.wgsl`.

use super::Float;

/// The sums `y[invocations]` of 16 numbers after `rounds` · 8 times `a = a · scale + shift`; number n
/// of invocation i starts at i mod 64 + n/4.
pub fn peak_multiply_add<T: Float>(
    invocations: usize,
    rounds: usize,
    [scale, shift]: [T; 2],
) -> Vec<T> {
    let last = |first: f32| (0..8 * rounds).fold(first.into(), |a, _| a * scale + shift);
    (0..invocations)
        .map(|i| {
            (0..16)
                .map(|n| last((i % 64) as f32 + n as f32 / 4.0))
                .sum()
        })
        .collect()
}

/// A copy.
pub fn peak_copy<T: Float>(src: &[T]) -> Vec<T> {
    src.to_vec()
}
