//! Twins of `shaders/mix.wgsl`.

use super::Float;
use super::random::pcg4d;
use crate::kernels::mix::{MIX_WORDS, Mix};
use crate::model::Shape;
use rayon::prelude::*;
use std::ops::Range;

/// What 1 is among the whole numbers that shares are drawn in.
const ONE: u32 = 1 << 24;
const KEY: u32 = 0x6b79_c3d5;

/// How each sample of a batch is mixed with the one after it among the first `count`, the last with the first:
/// the label of the larger share for each, and what `mixes` holds. The samples after them are the last again.
///
/// labels `[N]`; `stream` is seed and epoch, `first` the first sample's place in the epoch's order; quantiles
/// `[2,257]`, whole numbers. Returns labels `[N]` and mixes `[N, MIX_WORDS]`.
pub fn draw_mixes<T: Float>(
    mix: Mix,
    stream: [u32; 2],
    first: u32,
    count: usize,
    labels: &[u32],
    quantiles: &[T],
) -> (Vec<u32>, Vec<u32>) {
    let [seed, epoch] = stream;
    let (height, width) = (mix.shape.height as u32, mix.shape.width as u32);
    let drawn = (0..labels.len()).map(|i| {
        let own = i.min(count - 1);
        let partner = (own + 1) % count;
        let [r0, r1, r2, r3] = pcg4d([seed, epoch, first + own as u32, KEY]);
        let cut = mix.cut_mix && (!mix.mix_up || r0 >> 31 == 1);
        let lambda = share(&quantiles[if cut { 257 } else { 0 }..][..257], r1);
        let [mut rows, mut columns] = [0..height, 0..width];
        let (mut kept, mut whole, mut weight) = (lambda, ONE, ONE - lambda);
        if cut {
            let part = (ONE - lambda).isqrt();
            rows = side(height, part, r2 % height);
            columns = side(width, part, r3 % width);
            (whole, weight) = (height * width, ONE);
            kept = whole - rows.len() as u32 * columns.len() as u32;
        }
        let mut both = [labels[own], labels[partner]];
        if kept < whole - kept {
            both.reverse();
        }
        let words = [
            both[1],
            kept.max(whole - kept),
            whole,
            partner as u32,
            rows.start,
            columns.start,
            rows.end,
            columns.end,
            weight,
        ];
        (both[0], words)
    });
    let (labels, mixes): (Vec<u32>, Vec<[u32; MIX_WORDS]>) = drawn.unzip();
    (labels, mixes.concat())
}

/// λ in 2⁻²⁴ for a random word, between the quantiles of its distribution.
fn share<T: Float>(quantiles: &[T], word: u32) -> u32 {
    let at = (word >> 24) as usize;
    let [low, high] = [at, at + 1].map(|at| {
        let quantile: f64 = quantiles[at].into();
        quantile as u32
    });
    low + (((high - low) * ((word >> 16) & 0xff)) >> 8)
}

/// Where `part` of `size`, in 2⁻¹², around `centre` lies.
fn side(size: u32, part: u32, centre: u32) -> Range<u32> {
    let extent = (size * part) >> 12;
    let before = extent / 2;
    centre.saturating_sub(before)..(centre + extent - before).min(size)
}

/// Images with their partners' in them as they were drawn: x `[N,H,W,C]`, mixes `[N, MIX_WORDS]`; returns
/// `[N,H,W,C]`.
pub fn mix_batch<T: Float>(shape: Shape, x: &[T], mixes: &[u32]) -> Vec<T> {
    let elements = shape.elements();
    let mut y = x.to_vec();
    y.par_chunks_mut(elements)
        .zip(mixes.par_chunks_exact(MIX_WORDS))
        .for_each(|(y, mix)| {
            let partner = &x[mix[3] as usize * elements..][..elements];
            let one: T = (ONE as f32).into();
            let weight = <T as From<f32>>::from(mix[8] as f32) / one;
            for h in mix[4] as usize..mix[6] as usize {
                for w in mix[5] as usize..mix[7] as usize {
                    let at = (h * shape.width + w) * shape.channels;
                    let pixel = at..at + shape.channels;
                    for (y, &other) in y[pixel.clone()].iter_mut().zip(&partner[pixel]) {
                        *y = (T::one() - weight) * *y + weight * other;
                    }
                }
            }
        });
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::mix::beta_quantiles;

    const SHAPE: Shape = Shape {
        height: 6,
        width: 9,
        channels: 2,
    };

    fn mix(mix_up: bool, cut_mix: bool) -> Mix {
        Mix {
            shape: SHAPE,
            mix_up,
            cut_mix,
        }
    }

    /// What was drawn for a batch of as many samples, each of a class of its own.
    fn drawn(mix: Mix, alpha: f32, count: usize) -> Vec<[u32; MIX_WORDS]> {
        let labels: Vec<u32> = (0..count as u32).collect();
        let quantiles = [beta_quantiles(alpha), beta_quantiles(alpha)].concat();
        let (_, mixes) = draw_mixes(mix, [5, 2], 0, count, &labels, &quantiles);
        let mixes = mixes.chunks_exact(MIX_WORDS);
        mixes.map(|words| words.try_into().unwrap()).collect()
    }

    /// Shares of Beta(α, α) have mean ½ and variance 1 / (4 (2 α + 1)).
    #[test]
    fn shares_are_of_their_distribution() {
        for alpha in [0.2f32, 1.0, 4.0] {
            let mixes = drawn(mix(true, false), alpha, 20_000);
            // Of the partner: that of the sample's own says nothing about the swapped ones.
            let shares = mixes.iter().map(|mix| f64::from(mix[8]) / f64::from(ONE));
            let (mut sum, mut squares) = (0.0, 0.0);
            for share in shares {
                sum += share;
                squares += (share - 0.5) * (share - 0.5);
            }
            let [mean, variance] = [sum, squares].map(|sum| sum / 20_000.0);
            let expected = 0.25 / (2.0 * f64::from(alpha) + 1.0);
            // Five standard deviations of each.
            assert!((mean - 0.5).abs() < 0.018, "{alpha}: {mean}");
            assert!(
                (variance / expected - 1.0).abs() < 0.05,
                "{alpha}: {variance}"
            );
        }
    }

    #[test]
    fn the_share_of_a_cut_is_what_is_left_of_the_image() {
        let mut swapped = 0;
        for (i, words) in drawn(mix(false, true), 1.0, 5_000).into_iter().enumerate() {
            let [second, share, of, partner, top, left, bottom, right, weight] = words;
            assert!(top <= bottom && bottom <= 6 && left <= right && right <= 9);
            let area = (bottom - top) * (right - left);
            assert_eq!((of, weight), (54, ONE));
            assert_eq!(share, area.max(54 - area));
            assert_eq!(partner as usize, (i + 1) % 5_000);
            // The label is the partner's where it has more of the image.
            let own = i as u32;
            assert_eq!(second, if area > 27 { own } else { partner });
            swapped += u32::from(area > 27);
        }
        assert!((500..2_000).contains(&swapped), "{swapped}");
    }

    #[test]
    fn of_both_each_has_its_half() {
        let mixes = drawn(mix(true, true), 1.0, 10_000);
        let cuts = mixes.iter().filter(|mix| mix[2] == 54).count();
        assert!((4_750..5_250).contains(&cuts), "{cuts}");
    }

    /// The samples that do not count are the last one again, and a batch of one is mixed with itself.
    #[test]
    fn partners_are_among_those_that_count() {
        let quantiles = [beta_quantiles(1.0), beta_quantiles(1.0)].concat();
        let labels = [3, 1, 4, 4, 4];
        let (found, mixes) = draw_mixes(mix(true, true), [1, 1], 40, 3, &labels, &quantiles);
        let partners: Vec<u32> = mixes.chunks_exact(MIX_WORDS).map(|mix| mix[3]).collect();
        assert_eq!(partners, [1, 2, 0, 0, 0]);
        assert_eq!(mixes[2 * MIX_WORDS..3 * MIX_WORDS], mixes[4 * MIX_WORDS..]);
        assert_eq!(found[2], found[4]);
        let (found, mixes) = draw_mixes(mix(true, true), [1, 1], 40, 1, &[2, 2], &quantiles);
        assert_eq!((found, mixes[3], mixes[0]), (vec![2, 2], 0, 2));
    }

    /// By hand: a quarter of the second image over the first, and a box of the first in the second.
    #[test]
    fn images_are_mixed() {
        let shape = Shape::new(2, 2, 1);
        let x = [0.0, 4.0, 8.0, 12.0, 20.0, 24.0, 28.0, 32.0];
        let quarter = [0, 3, 4, 1, 0, 0, 2, 2, ONE / 4];
        let cut = [0, 3, 4, 0, 1, 0, 2, 1, ONE];
        let y = mix_batch::<f64>(shape, &x, &[quarter, cut].concat());
        assert_eq!(y, [5.0, 9.0, 13.0, 17.0, 20.0, 24.0, 8.0, 32.0]);
    }
}
