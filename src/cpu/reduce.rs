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

/// `accumulated[i] += gradients[i]`, or for the `first` part of a batch `accumulated[i] = gradients[i]`; two
/// vectors of one length, the second changed in place.
pub fn accumulate<T: Float>(gradients: &[T], first: bool, accumulated: &mut [T]) {
    assert_eq!(gradients.len(), accumulated.len());
    if first {
        accumulated.copy_from_slice(gradients);
    } else {
        add(accumulated, gradients);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_part_starts_anew() {
        let mut sum = [f64::NAN, 7.0];
        accumulate(&[1.0, 2.0], true, &mut sum);
        assert_eq!(sum, [1.0, 2.0]);
        accumulate(&[10.0, -3.0], false, &mut sum);
        assert_eq!(sum, [11.0, -1.0]);
    }

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
