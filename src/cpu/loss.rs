//! Twins of `shaders/loss.wgsl`: the losses with their gradients, and the sums of a step.
//!
//! Source: Goodfellow, Bengio, Courville (2016), "Deep Learning", 4.1 and 6.2.2; Szegedy et al. (2016),
//! "Rethinking the Inception Architecture for Computer Vision", 7, for the smoothing.

use super::Float;
use crate::kernels::mix::MIX_WORDS;

/// What a loss function gives for a batch of N samples.
#[derive(Clone, Debug, PartialEq)]
pub struct LossOutput<T> {
    /// Loss of each sample, `[N]`.
    pub loss: Vec<T>,
    /// Gradient of the sum of the losses over `total` by the network's output, `[N, classes]`: that of
    /// the mean where `total` is the number of samples.
    pub gradient: Vec<T>,
    /// 1 where the largest output (see [`argmax`]) is the label's, else 0; `[N]`.
    pub correct: Vec<u32>,
}

/// `p = softmax(z)`, `loss = −Σ_k t[k] log p[k]`, `gradient = (p − t) / total` with the target
/// `t = (1 − smoothing) onehot(label) + smoothing / classes`: without smoothing `−log p[label]` and
/// `(p − onehot(label)) / total`. The softmax is taken of `z − max z`, which changes nothing and never
/// overflows; where max z is no finite number it is undefined, and loss and gradient are NaN.
///
/// logits `[N, classes]`, labels `[N]`, each below `classes`.
pub fn softmax_cross_entropy<T: Float>(
    logits: &[T],
    labels: &[u32],
    classes: usize,
    smoothing: f32,
    total: f32,
) -> LossOutput<T> {
    per_sample(logits, labels, classes, total, |z, label, gradient| {
        let (log_sum, largest) = softmax(z, gradient);
        let loss = log_sum - (z[label] - largest);
        if smoothing == 0.0 {
            gradient[label] -= T::one();
            return loss;
        }
        let (rest, each): (T, T) = smoothed(smoothing, classes);
        gradient[label] -= rest;
        gradient.iter_mut().for_each(|g| *g -= each);
        let spread: T = z.iter().map(|&z| log_sum - (z - largest)).sum();
        rest * loss + each * spread
    })
}

/// [`softmax_cross_entropy`] with `t[k]` times the weight of class k: `gradient = (p Σ_k t[k] − t) / total`.
/// Where `total` is the sum of `weights[label]` that is PyTorch's `CrossEntropyLoss(weight,
/// label_smoothing)`.
///
/// logits `[N, classes]`, labels `[N]`, each below `classes`, weights `[classes]`.
pub fn weighted_softmax_cross_entropy<T: Float>(
    logits: &[T],
    labels: &[u32],
    weights: &[T],
    smoothing: f32,
    total: f32,
) -> LossOutput<T> {
    let classes = weights.len();
    let (rest, each): (T, T) = smoothed(smoothing, classes);
    per_sample(logits, labels, classes, total, |z, label, gradient| {
        let (log_sum, largest) = softmax(z, gradient);
        let mut sum = rest * weights[label];
        let mut loss = sum * (log_sum - (z[label] - largest));
        if smoothing > 0.0 {
            for (&z, &weight) in z.iter().zip(weights) {
                loss += each * weight * (log_sum - (z - largest));
                sum += each * weight;
            }
        }
        gradient.iter_mut().for_each(|p| *p *= sum);
        gradient[label] -= rest * weights[label];
        for (gradient, &weight) in gradient.iter_mut().zip(weights) {
            *gradient -= each * weight;
        }
        loss
    })
}

/// [`softmax_cross_entropy`], or with weights [`weighted_softmax_cross_entropy`], of mixed samples: the target
/// `(1 − smoothing) (share onehot(label) + (1 − share) onehot(second)) + smoothing / classes`, each class's
/// times its weight: PyTorch's `cross_entropy` with class probabilities, but for the mean, which there is over
/// the samples whatever their weights.
///
/// logits `[N, classes]`, labels `[N]` and the second ones below `classes`, mixes `[N, MIX_WORDS]` with the
/// second label and the share as two whole numbers, so many of so many.
pub fn mixed_softmax_cross_entropy<T: Float>(
    logits: &[T],
    labels: &[u32],
    classes: usize,
    mixes: &[u32],
    weights: Option<&[T]>,
    smoothing: f32,
    total: f32,
) -> LossOutput<T> {
    let (rest, each): (T, T) = smoothed(smoothing, classes);
    let weight = |k: usize| weights.map_or(T::one(), |weights| weights[k]);
    let mut mixes = mixes.chunks_exact(MIX_WORDS);
    per_sample(logits, labels, classes, total, |z, label, gradient| {
        let mix = mixes.next().expect("a mix for every sample");
        let [numerator, denominator]: [T; 2] = [mix[1], mix[2]].map(|n| (n as f32).into());
        let (second, share) = (mix[0] as usize, numerator / denominator);
        let targets = [
            (label, rest * share * weight(label)),
            (second, rest * (T::one() - share) * weight(second)),
        ];
        let (log_sum, largest) = softmax(z, gradient);
        let mut sum = targets[0].1 + targets[1].1;
        let mut loss = T::zero();
        // Where the label has it all, the second one's logit may be −∞.
        for (k, target) in targets.into_iter().filter(|(_, t)| *t > T::zero()) {
            loss += target * (log_sum - (z[k] - largest));
        }
        if smoothing > 0.0 {
            for (k, &z) in z.iter().enumerate() {
                loss += each * weight(k) * (log_sum - (z - largest));
                sum += each * weight(k);
            }
        }
        gradient.iter_mut().for_each(|p| *p *= sum);
        for (k, target) in targets {
            gradient[k] -= target;
        }
        for (k, gradient) in gradient.iter_mut().enumerate() {
            *gradient -= each * weight(k);
        }
        loss
    })
}

/// What the target of a class is if it is the label's, beside what every class gets.
fn smoothed<T: Float>(smoothing: f32, classes: usize) -> (T, T) {
    let (smoothing, classes): (T, T) = (smoothing.into(), (classes as f32).into());
    (T::one() - smoothing, smoothing / classes)
}

/// Writes the softmax of `z` and returns the log of its denominator, which is that of `z − max z`, and
/// max z.
fn softmax<T: Float>(z: &[T], p: &mut [T]) -> (T, T) {
    let largest = z[argmax(z)];
    let sum: T = z.iter().map(|&z| (z - largest).exp()).sum();
    for (p, &z) in p.iter_mut().zip(z) {
        *p = (z - largest).exp() / sum;
    }
    (sum.ln(), largest)
}

/// `loss = ½ Σ_k (output[k] − onehot(label)[k])²`, `gradient = (output − onehot(label)) / total`.
///
/// output `[N, classes]`, labels `[N]`, each below `classes`.
pub fn squared_error<T: Float>(
    output: &[T],
    labels: &[u32],
    classes: usize,
    total: f32,
) -> LossOutput<T> {
    per_sample(
        output,
        labels,
        classes,
        total,
        |output, label, difference| {
            difference.copy_from_slice(output);
            difference[label] -= T::one();
            let half: T = 0.5.into();
            half * difference.iter().map(|&d| d * d).sum()
        },
    )
}

/// The predicted class of every sample, see [`argmax`]: logits `[N, classes]`, returns `[N]`.
pub fn predict<T: Float>(logits: &[T], classes: usize) -> Vec<u32> {
    let samples = logits.chunks_exact(classes);
    samples.map(|logits| argmax(logits) as u32).collect()
}

/// The sum of the losses and the number of correct samples.
pub fn sum_metrics<T: Float>(loss: &[T], correct: &[u32]) -> (T, u32) {
    (loss.iter().copied().sum(), correct.iter().sum())
}

/// Position of the first NaN, else of the largest value, of equal ones the first: `torch.argmax`.
pub fn argmax<T: Float>(values: &[T]) -> usize {
    (1..values.len()).fold(0, |best, k| {
        let (value, largest) = (values[k], values[best]);
        let wins = !largest.is_nan() && (value.is_nan() || value > largest);
        if wins { k } else { best }
    })
}

/// Runs `loss(output, label, gradient)`, which returns a sample's loss and writes its gradient,
/// over the batch.
fn per_sample<T: Float>(
    output: &[T],
    labels: &[u32],
    classes: usize,
    total: f32,
    mut loss: impl FnMut(&[T], usize, &mut [T]) -> T,
) -> LossOutput<T> {
    assert_eq!(output.len(), labels.len() * classes);
    let mut gradient = vec![T::zero(); output.len()];
    let samples = || output.chunks_exact(classes).zip(labels);
    let loss = samples()
        .zip(gradient.chunks_exact_mut(classes))
        .map(|((output, &label), gradient)| loss(output, label as usize, gradient))
        .collect();
    let total: T = total.into();
    gradient.iter_mut().for_each(|g| *g /= total);
    let correct = samples()
        .map(|(output, &label)| u32::from(argmax(output) == label as usize))
        .collect();
    LossOutput {
        loss,
        gradient,
        correct,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cross_entropy(logits: &[f32], labels: &[u32], classes: usize) -> LossOutput<f32> {
        softmax_cross_entropy(logits, labels, classes, 0.0, labels.len() as f32)
    }

    fn squares(output: &[f32], labels: &[u32], classes: usize) -> LossOutput<f32> {
        squared_error(output, labels, classes, labels.len() as f32)
    }

    #[test]
    fn of_equal_outputs_the_first_is_the_prediction() {
        let output = [1.0, 2.0, 2.0, 0.0, 0.0, 0.0];
        for function in [cross_entropy, squares] {
            assert_eq!(function(&output, &[1, 0], 3).correct, [1, 1]);
            assert_eq!(function(&output, &[2, 1], 3).correct, [0, 0]);
        }
    }

    #[test]
    fn nan_outputs_give_a_nan_loss() {
        for function in [cross_entropy, squares] {
            for output in [[f32::NAN, 1.0], [1.0, f32::NAN]] {
                assert!(function(&output, &[0], 2).loss[0].is_nan());
            }
        }
    }

    #[test]
    fn the_first_nan_is_the_prediction_else_the_largest() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        assert_eq!(argmax(&[1.0, nan, inf, nan]), 1);
        assert_eq!(argmax(&[nan, 2.0, inf]), 0);
        assert_eq!(argmax(&[-inf, inf, 3.0, inf]), 1);
        assert_eq!(argmax(&[-inf, -inf]), 0);
    }

    /// As `torch.nn.functional.cross_entropy` has them.
    #[test]
    fn infinite_logits() {
        let inf = f32::INFINITY;
        for undefined in [[inf, 1.0], [-inf, -inf]] {
            let output = cross_entropy(&undefined, &[0], 2);
            assert!(output.loss[0].is_nan() && output.gradient.iter().all(|g| g.is_nan()));
        }
        let output = cross_entropy(&[0.5, -inf], &[1], 2);
        assert_eq!((output.loss, output.gradient), (vec![inf], vec![1.0, -1.0]));
        let output = cross_entropy(&[0.5, -inf], &[0], 2);
        assert_eq!((output.loss, output.gradient), (vec![0.0], vec![0.0, 0.0]));
    }

    /// A weight of 1 for all changes nothing, and equal weights cancel in the gradient.
    #[test]
    fn equal_weights_are_none() {
        let (z, labels) = ([0.5, -1.0, 2.0, 1.0, 0.0, -3.0], [2, 1]);
        for smoothing in [0.0, 0.25] {
            let plain = softmax_cross_entropy::<f64>(&z, &labels, 3, smoothing, 2.0);
            for weight in [1.0, 4.0] {
                let (weights, total) = ([weight.into(); 3], 2.0 * weight);
                let weighted =
                    weighted_softmax_cross_entropy(&z, &labels, &weights, smoothing, total);
                let weight = f64::from(weight);
                for (w, p) in weighted.loss.iter().zip(&plain.loss) {
                    assert!((w - weight * p).abs() < 1e-12, "{w} {p}");
                }
                for (w, p) in weighted.gradient.iter().zip(&plain.gradient) {
                    assert!((w - p).abs() < 1e-12, "{w} {p}");
                }
            }
        }
    }

    #[test]
    fn sums_of_a_step() {
        assert_eq!(sum_metrics(&[0.5, 0.25, 2.0], &[1, 0, 1]), (2.75, 2));
    }
}
