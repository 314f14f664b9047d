//! Twin of `shaders/outputs.wgsl`.

use super::Float;

/// `outputs[first + i] = logits[i]` for the first `count` samples.
///
/// logits `[N, classes]`, outputs `[samples, classes]`.
pub fn store_logits<T: Float>(
    logits: &[T],
    classes: usize,
    first: usize,
    count: usize,
    outputs: &mut [T],
) {
    let len = count * classes;
    outputs[first * classes..][..len].copy_from_slice(&logits[..len]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_samples_that_count_are_stored() {
        let mut outputs = [9.0f32; 10];
        store_logits(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 1, 2, &mut outputs);
        assert_eq!(outputs, [9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 9.0, 9.0, 9.0, 9.0]);
    }
}
