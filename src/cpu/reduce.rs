//! Twin of `shaders/reduce.wgsl`.

use super::{Float, add};

/// `sum[i] = Σ_s partials[s,i]`, added in the order of s: partials `[splits, elements]`, returns
/// `[elements]`.
pub fn reduce_splits<T: Float>(partials: &[T], splits: usize) -> Vec<T> {
    assert!(splits > 0 && partials.len().is_multiple_of(splits));
    let mut sum = vec![T::zero(); partials.len() / splits];
    for partial in partials.chunks_exact(sum.len()) {
        add(&mut sum, partial);
    }
    sum
}

/// `sum[i] = Σ_s partials[s,i]` over many chunks s, in the order of s: partials `[chunks, elements]`,
/// returns `[elements]`.
pub fn reduce_chunks<T: Float>(partials: &[T], chunks: usize) -> Vec<T> {
    reduce_splits(partials, chunks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_in_order() {
        assert_eq!(
            reduce_splits(&[1.0, 2.0, 10.0, 20.0, 100.0, 200.0], 3),
            [111.0, 222.0]
        );
        // From the last to the first, the 3 would be lost.
        assert_eq!(reduce_splits(&[1e8f32, -1e8, 3.0], 3), [3.0]);
    }
}
