//! Twins of `shaders/loss.wgsl`: the two losses with their gradients, and the sums of a step.
//!
//! Source: Goodfellow, Bengio, Courville (2016), "Deep Learning", 4.1 and 6.2.2.

use super::Float;

/// What a loss function gives for a batch of N samples.
#[derive(Clone, Debug, PartialEq)]
pub struct LossOutput<T> {
    /// Loss of each sample, `[N]`.
    pub loss: Vec<T>,
    /// Gradient of the *mean* loss over the batch by the network's output, `[N, classes]`.
    pub gradient: Vec<T>,
    /// 1 where the largest output (see [`argmax`]) is the label's, else 0; `[N]`.
    pub correct: Vec<u32>,
}

/// `p = softmax(z)`, `loss = −log p[label]`, `gradient = (p − onehot(label)) / N`. The softmax is
/// taken of `z − max z`, which changes nothing and never overflows; where max z is no finite number
/// it is undefined, and loss and gradient are NaN.
///
/// logits `[N, classes]`, labels `[N]`, each below `classes`.
pub fn softmax_cross_entropy<T: Float>(
    logits: &[T],
    labels: &[u32],
    classes: usize,
) -> LossOutput<T> {
    per_sample(logits, labels, classes, |z, label, gradient| {
        let largest = z[argmax(z)];
        let sum: T = z.iter().map(|&z| (z - largest).exp()).sum();
        for (gradient, &z) in gradient.iter_mut().zip(z) {
            *gradient = (z - largest).exp() / sum;
        }
        gradient[label] -= T::one();
        sum.ln() - (z[label] - largest)
    })
}

/// `loss = ½ Σ_k (output[k] − onehot(label)[k])²`, `gradient = (output − onehot(label)) / N`.
///
/// output `[N, classes]`, labels `[N]`, each below `classes`.
pub fn squared_error<T: Float>(output: &[T], labels: &[u32], classes: usize) -> LossOutput<T> {
    per_sample(output, labels, classes, |output, label, difference| {
        difference.copy_from_slice(output);
        difference[label] -= T::one();
        let half: T = 0.5.into();
        half * difference.iter().map(|&d| d * d).sum()
    })
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
    loss: impl Fn(&[T], usize, &mut [T]) -> T,
) -> LossOutput<T> {
    assert_eq!(output.len(), labels.len() * classes);
    let mut gradient = vec![T::zero(); output.len()];
    let samples = || output.chunks_exact(classes).zip(labels);
    let loss = samples()
        .zip(gradient.chunks_exact_mut(classes))
        .map(|((output, &label), gradient)| loss(output, label as usize, gradient))
        .collect();
    let count: T = (labels.len() as f32).into();
    gradient.iter_mut().for_each(|g| *g /= count);
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

    #[test]
    fn of_equal_outputs_the_first_is_the_prediction() {
        let output = [1.0, 2.0, 2.0, 0.0, 0.0, 0.0];
        for function in [softmax_cross_entropy::<f32>, squared_error] {
            assert_eq!(function(&output, &[1, 0], 3).correct, [1, 1]);
            assert_eq!(function(&output, &[2, 1], 3).correct, [0, 0]);
        }
    }

    #[test]
    fn nan_outputs_give_a_nan_loss() {
        for function in [softmax_cross_entropy::<f32>, squared_error] {
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
        let (inf, cross_entropy) = (f32::INFINITY, softmax_cross_entropy::<f32>);
        for undefined in [[inf, 1.0], [-inf, -inf]] {
            let output = cross_entropy(&undefined, &[0], 2);
            assert!(output.loss[0].is_nan() && output.gradient.iter().all(|g| g.is_nan()));
        }
        let output = cross_entropy(&[0.5, -inf], &[1], 2);
        assert_eq!((output.loss, output.gradient), (vec![inf], vec![1.0, -1.0]));
        let output = cross_entropy(&[0.5, -inf], &[0], 2);
        assert_eq!((output.loss, output.gradient), (vec![0.0], vec![0.0, 0.0]));
    }

    #[test]
    fn sums_of_a_step() {
        assert_eq!(sum_metrics(&[0.5, 0.25, 2.0], &[1, 0, 1]), (2.75, 2));
    }
}
