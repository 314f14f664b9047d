//! `shaders/mix.wgsl`: mix-up and cut-mix.

use super::{KernelSpec, STEP_ELEMENTS, View, Work, read, write};
use crate::model::Shape;

const SOURCE: &str = include_str!("../../shaders/mix.wgsl");

/// Words in which it stands how a sample is mixed: second label, share of the label as two whole numbers
/// (so many of so many), partner, top, left, bottom and right of the box, the partner's weight inside it in
/// 2⁻²⁴.
pub const MIX_WORDS: usize = 9;

/// Quantiles of each of two distributions that [`draw_mixes`] interpolates between.
pub const QUANTILES: usize = 257;

/// How a batch is mixed: by which of the two, or by either of them with equal chance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mix {
    pub shape: Shape,
    pub mix_up: bool,
    pub cut_mix: bool,
}

/// Draws for every sample how it is mixed with the one after it in its batch, the last one with the first,
/// and which of the two labels counts as its own: that with the larger share. Draws follow from seed and epoch
/// of row `counter[0]` of the step table `steps` and from the sample's place in the epoch's order.
///
/// `labels` and `batch_labels` are `[batch]`, `quantiles` as [`quantiles`] makes them, `mixes` `[batch,MIX_WORDS]`. Writes the last and `batch_labels`.
pub fn draw_mixes(
    mix: Mix,
    batch: usize,
    labels: View,
    steps: View,
    counter: View,
    quantiles: View,
    batch_labels: View,
    mixes: View,
) -> KernelSpec {
    KernelSpec::new(
        "draw_mixes",
        SOURCE,
        Work::DrawMixes(mix),
        &[
            ("BATCH", batch as f64),
            ("HEIGHT", mix.shape.height as f64),
            ("WIDTH", mix.shape.width as f64),
            ("MIX_UP", f64::from(mix.mix_up)),
            ("CUT_MIX", f64::from(mix.cut_mix)),
        ],
        vec![
            read(0, "labels", labels, batch),
            read(1, "steps", steps, STEP_ELEMENTS),
            read(2, "counter", counter, 1),
            read(3, "quantiles", quantiles, 2 * QUANTILES),
            write(4, "batch_labels", batch_labels, batch),
            write(5, "mixes", mixes, batch * MIX_WORDS),
        ],
        batch,
    )
}

/// `y[batch,H,W,C]` = the images of `x`, each with its partner's in it as [`draw_mixes`] has drawn them
/// into `mixes`. Writes `y`.
pub fn mix_batch(shape: Shape, batch: usize, x: View, mixes: View, y: View) -> KernelSpec {
    let elements = batch * shape.elements();
    KernelSpec::new(
        "mix_batch",
        SOURCE,
        Work::MixBatch(shape),
        &[
            ("BATCH", batch as f64),
            ("HEIGHT", shape.height as f64),
            ("WIDTH", shape.width as f64),
            ("CHANNELS", shape.channels as f64),
        ],
        vec![
            read(6, "x", x, elements),
            read(7, "mixes", mixes, batch * MIX_WORDS),
            write(8, "y", y, elements),
        ],
        elements,
    )
}

/// What [`draw_mixes`] reads as `quantiles`: those of mix-up's and of cut-mix's distribution by their alphas,
/// zeros for an alpha of 0.
pub fn quantiles(mix_up: f32, cut_mix: f32) -> Vec<f32> {
    let of = |alpha| match alpha > 0.0 {
        true => beta_quantiles(alpha),
        false => vec![0.0; QUANTILES],
    };
    [of(mix_up), of(cut_mix)].concat()
}

/// Quantiles of the distribution Beta(alpha, alpha) at 0/256, 1/256 … 256/256 as whole numbers, 2²⁴ for 1,
/// which an f32 holds exactly; alpha above 0.
pub fn beta_quantiles(alpha: f32) -> Vec<f32> {
    let alpha = f64::from(alpha);
    // ∫ t^(α−1) (1 − t)^(α−1) dt from 0 to x ≤ ½, by the power series of the second factor.
    let integral = |x: f64| {
        let (mut sum, mut term) = (0.0, 1.0);
        for n in 0..80 {
            let n = f64::from(n);
            sum += term / (alpha + n);
            term *= (n + 1.0 - alpha) / (n + 1.0) * x;
        }
        x.powf(alpha) * sum
    };
    let half = integral(0.5);
    let steps = QUANTILES - 1;
    // The distribution is the same seen from the other end.
    let lower = (0..=steps / 2).map(|i| {
        let wanted = i as f64 / (steps / 2) as f64;
        let [mut low, mut high] = [0.0, 0.5];
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            match integral(middle) < wanted * half {
                true => low = middle,
                false => high = middle,
            }
        }
        (high * f64::from(1 << 24)).round() as f32
    });
    let lower: Vec<f32> = lower.collect();
    let upper = lower.iter().rev().skip(1).map(|q| (1 << 24) as f32 - q);
    lower.iter().copied().chain(upper).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: f64 = (1 << 24) as f64;

    /// Against distributions whose quantiles have a formula: 1 is uniform, ½ the arcsine distribution,
    /// 2 has the distribution function 3x² − 2x³.
    #[test]
    fn quantiles_with_a_formula() {
        let uniform = beta_quantiles(1.0);
        let expected: Vec<f32> = (0..257).map(|i| (i * 65536) as f32).collect();
        assert_eq!(uniform, expected);
        for (i, found) in beta_quantiles(0.5).iter().enumerate() {
            let sine = (std::f64::consts::FRAC_PI_2 * i as f64 / 256.0).sin();
            assert!((f64::from(*found) - ONE * sine * sine).abs() <= 1.0, "{i}");
        }
        for (i, found) in beta_quantiles(2.0).iter().enumerate() {
            let x = f64::from(*found) / ONE;
            assert!(
                (x * x * (3.0 - 2.0 * x) - i as f64 / 256.0).abs() < 1e-6,
                "{i}"
            );
        }
    }

    /// By another program, which integrates the density by Simpson's rule.
    #[test]
    fn quantiles_of_other_distributions() {
        for (alpha, expected) in [
            (0.2, [0.0, 0.023_814_719, 0.5]),
            (10.0, [0.224_362_348, 0.424_214_665, 0.5]),
        ] {
            let found = beta_quantiles(alpha);
            for (at, expected) in [1, 64, 128].into_iter().zip(expected) {
                let error = f64::from(found[at]) / ONE - expected;
                assert!(error.abs() < 1e-6, "{alpha} at {at}: {error}");
            }
        }
    }

    #[test]
    fn quantiles_rise_from_nothing_to_all_for_every_alpha() {
        for alpha in [1e-3, 0.05, 0.2, 0.4, 1.0, 1.7, 5.0, 10.0] {
            let found = beta_quantiles(alpha);
            assert_eq!((found[0], found[256]), (0.0, ONE as f32));
            assert!(found.is_sorted(), "{alpha}");
        }
    }
}
