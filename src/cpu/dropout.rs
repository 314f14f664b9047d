//! Twin of `shaders/dropout.wgsl`.

use super::Float;
use super::random::pcg4d;
use crate::kernels::dropout::threshold;
use rayon::prelude::*;

/// `y = x · mask`, where the mask is 0 with `probability` and else 1 / (1 − probability), so that the
/// mean stays. Whether element e of a sample is kept follows from (seed, epoch, sample, layer, e) alone;
/// `key` stands for the layer. The gradient is the same function of dy. 0 · NaN and 0 · ∞ are NaN.
///
/// x `[N, elements]`, samples: the N samples' numbers in the dataset; returns `[N, elements]`.
pub fn dropout<T: Float>(
    probability: f32,
    key: u32,
    [seed, epoch]: [u32; 2],
    samples: &[u32],
    x: &[T],
) -> Vec<T> {
    assert!(x.len().is_multiple_of(samples.len()));
    let elements = x.len() / samples.len();
    let (dropped, scale) = threshold(probability);
    let factors: [T; 2] = [T::zero(), scale.into()];
    let mut y = x.to_vec();
    y.par_chunks_mut(elements)
        .zip(samples)
        .for_each(|(y, &sample)| {
            let [first, rest @ ..] = pcg4d([seed, epoch, sample, key]);
            for (block, y) in (0u32..).zip(y.chunks_mut(4)) {
                let random = pcg4d([first.wrapping_add(block), rest[0], rest[1], rest[2]]);
                for (y, random) in y.iter_mut().zip(random) {
                    *y *= factors[usize::from(random >= dropped)];
                }
            }
        });
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    const ELEMENTS: usize = 10_000;

    /// 1 where an element is kept, 0 where it is dropped.
    fn kept(probability: f32, key: u32, seed: u32, epoch: u32, sample: u32) -> Vec<f64> {
        let ones = vec![1.0; ELEMENTS];
        let y = dropout(probability, key, [seed, epoch], &[sample], &ones);
        let scale = 1.0 / (1.0 - f64::from(probability));
        y.iter()
            .map(|&y| {
                assert!(y == 0.0 || (y - scale).abs() < 1e-6, "{y}");
                f64::from(y != 0.0)
            })
            .collect()
    }

    fn mean(values: &[f64]) -> f64 {
        values.iter().sum::<f64>() / values.len() as f64
    }

    /// How far two masks are from independent, in standard deviations of what independent ones give.
    fn correlation(a: &[f64], b: &[f64], probability: f64) -> f64 {
        let keep = 1.0 - probability;
        let terms = a.iter().zip(b).map(|(a, b)| (a - keep) * (b - keep));
        let deviation = probability * keep * (a.len().min(b.len()) as f64).sqrt();
        terms.sum::<f64>() / deviation
    }

    #[test]
    fn the_share_of_zeros_is_the_probability_and_the_mean_stays() {
        for probability in [0.0f32, 0.1, 0.5, 0.9] {
            let p = f64::from(probability);
            let deviation = (p * (1.0 - p) / ELEMENTS as f64).sqrt();
            let mut shares = Vec::new();
            for sample in 0..100 {
                let share = 1.0 - mean(&kept(probability, 7, 1, 2, sample));
                assert!((share - p).abs() <= 5.0 * deviation, "{share} for {p}");
                shares.push(share);
            }
            let share = mean(&shares);
            assert!((share - p).abs() <= 0.5 * deviation, "{share} for {p}");
            // Neither too far from p nor, as a bad generator may be, too close to it.
            let spread = shares.iter().map(|s| (s - p).powi(2)).sum::<f64>() / 100.0;
            let ratio = spread / deviation.powi(2);
            assert!(p == 0.0 || (0.5..2.0).contains(&ratio), "{ratio} for {p}");
        }
    }

    /// Masks whose keys differ by one in one place, or by one place of the elements, have nothing to
    /// do with each other; nor have the rows and blocks of an image.
    #[test]
    fn neighbouring_masks_are_independent() {
        for probability in [0.1f32, 0.5] {
            let p = f64::from(probability);
            let mut worst = 0.0f64;
            let mut tries = 0;
            for number in 0..40 {
                let base = kept(probability, number, 3, 5, 8);
                for other in [
                    kept(probability, number + 1, 3, 5, 8),
                    kept(probability, number, 4, 5, 8),
                    kept(probability, number, 3, 6, 8),
                    kept(probability, number, 3, 5, 9),
                    kept(probability, number, 5, 3, 8),
                    kept(probability, 8, 3, 5, number.wrapping_add(1 << 31)),
                ] {
                    worst = worst.max(correlation(&base, &other, p).abs());
                    tries += 1;
                }
                for lag in [1, 2, 3, 4, 5, 8, 16, 28, 32, 64, 128, 1024] {
                    worst = worst.max(correlation(&base, &base[lag..], p).abs());
                    tries += 1;
                }
            }
            // Of 720 standard normal numbers the largest is beyond 4.5 once in two hundred times.
            assert_eq!(tries, 720);
            assert!(worst < 4.5, "{worst}");
        }
    }

    #[test]
    fn a_sample_keeps_its_mask_wherever_it_stands_in_the_batch() {
        let (x, elements) = (vec![1.0f32; 5 * 7], 7);
        let both =
            |samples: &[u32]| dropout(0.4, 9, [1, 2], samples, &x[..samples.len() * elements]);
        let (a, b) = (both(&[3, 8, 5, 5, 1]), both(&[5, 3, 8]));
        assert_eq!(a[..7], b[7..14]);
        assert_eq!(a[7..14], b[14..]);
        assert_eq!(a[14..21], b[..7]);
        assert_eq!(a[14..21], a[21..28]);
        assert_ne!(a[..7], a[28..]);
    }

    #[test]
    fn nothing_hides_a_nan() {
        let x = [f32::NAN, f32::INFINITY].repeat(50);
        let y = dropout(0.5, 1, [1, 1], &[1], &x);
        for (y, x) in y.iter().zip(x) {
            assert!(y.is_nan() || x == f32::INFINITY && *y == x, "{y} of {x}");
        }
    }
}
