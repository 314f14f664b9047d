//! Sums as 16-bit floats, half the bytes: what rounding leaves out of one is added to the next (Seide et al., 2014,
//! "1-Bit Stochastic Gradient Descent"; Karimireddy et al., 2019, arXiv 1901.09847).

use half::f16;

/// Words of `len` numbers: the exponent of their scale, then two to a word.
pub(super) fn words(len: usize) -> usize {
    if len == 0 { 0 } else { 1 + len.div_ceil(2) }
}

/// The message of `values` with what is `left` over of those before, which leaves there what is left over of these.
pub(super) fn encoded(values: &[f32], left: &mut [f32]) -> Vec<u32> {
    if values.is_empty() {
        return Vec::new();
    }
    let sums: Vec<f32> = values.iter().zip(&*left).map(|(v, l)| v + l).collect();
    let finite = sums.iter().filter(|sum| sum.is_finite());
    let largest = finite.fold(0.0f32, |most, sum| most.max(sum.abs()));
    // The largest becomes one from 2^14 to 2^15, so that the small ones are precise, too.
    let exponent = match largest {
        0.0 => 0,
        largest => (largest.log2().floor() as i32 - 14).clamp(-110, 110),
    };
    let (up, down) = (2f32.powi(-exponent), 2f32.powi(exponent));
    let halves: Vec<u16> = sums
        .iter()
        .zip(left)
        .map(|(sum, left)| {
            let half = f16::from_f32(sum * up);
            let rest = sum - half.to_f32() * down;
            // What is no number goes through, and leaves nothing.
            *left = if rest.is_finite() { rest } else { 0.0 };
            half.to_bits()
        })
        .collect();
    let pairs = halves.chunks(2);
    let words = pairs.map(|pair| u32::from(pair[0]) | u32::from(*pair.get(1).unwrap_or(&0)) << 16);
    std::iter::once(exponent as u32).chain(words).collect()
}

/// The `len` numbers of a message.
pub(super) fn decoded(message: &[u32], len: usize) -> Vec<f32> {
    let Some((exponent, pairs)) = message.split_first() else {
        return Vec::new();
    };
    let down = 2f32.powi(*exponent as i32);
    let halves = pairs
        .iter()
        .flat_map(|pair| [*pair as u16, (*pair >> 16) as u16]);
    let values = halves.map(|half| f16::from_bits(half).to_f32() * down);
    values.take(len).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_sum_leaves_out_comes_with_the_next() {
        for scale in [1e-30, 1e-6, 1.0, 1e20] {
            let values = [1.0, -0.3, 1e-5, 0.0, 0.7001].map(|v: f32| v * scale);
            let mut left = [0.0; 5];
            let mut total = [0.0f64; 5];
            for round in 1..=50 {
                let message = encoded(&values, &mut left);
                assert_eq!(message.len(), words(5));
                let decoded = decoded(&message, 5);
                for i in 0..5 {
                    total[i] += f64::from(decoded[i]);
                    let apart = (total[i] / f64::from(scale)
                        - f64::from(round) * f64::from(values[i] / scale))
                    .abs();
                    // Never more than one rounding, however many there were.
                    assert!(apart < 1e-3, "{i} of {scale} in round {round}: {apart:e}");
                }
            }
        }
        // Two rounding errors of a half, and none where the number is one.
        let mut left = [0.0; 2];
        encoded(&[1.0, 1.0 + 1e-4], &mut left);
        assert!(left[0] == 0.0 && left[1] != 0.0);
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let mut left = [0.0; 3];
        let message = encoded(&[f32::NAN, f32::INFINITY, 1.0], &mut left);
        let values = decoded(&message, 3);
        assert!(values[0].is_nan() && values[1] == f32::INFINITY && values[2] == 1.0);
        assert_eq!(left, [0.0; 3]);
        assert!(encoded(&[], &mut []).is_empty() && decoded(&[], 0).is_empty());
    }
}
