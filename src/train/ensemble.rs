//! Several networks as one: the mean of the probabilities that they give.

use super::Run;
use crate::error::{Error, Result};
use crate::model::Loss;

/// The probability of every class that a network gives for each sample, `[samples, classes]`: the softmax
/// of its outputs, or where it learned by squared error the outputs themselves, which estimate the same.
pub fn class_shares(loss: Loss, outputs: &[f32], classes: usize) -> Vec<f64> {
    let mut shares: Vec<f64> = outputs.iter().map(|z| f64::from(*z)).collect();
    if loss == Loss::SoftmaxCrossEntropy {
        for row in shares.chunks_mut(classes) {
            let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            row.iter_mut().for_each(|z| *z = (*z - largest).exp());
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|p| *p /= sum);
        }
    }
    shares
}

/// The predictions by the mean of several networks' [`class_shares`]: of every sample the class with the
/// largest one, of equal ones the first.
pub fn mean_shares<'a>(members: impl Iterator<Item = &'a [f64]>, classes: usize) -> Vec<u32> {
    let mut sums: Vec<f64> = Vec::new();
    for shares in members {
        // As good as the mean, which has the same largest one.
        sums.resize(shares.len(), 0.0);
        sums.iter_mut().zip(shares).for_each(|(sum, p)| *sum += p);
    }
    let largest = |row: &[f64]| {
        let best = (0..classes).reduce(|best, k| if row[k] > row[best] { k } else { best });
        best.unwrap_or(0) as u32
    };
    sums.chunks(classes).map(largest).collect()
}

/// Makes sure that two runs can be taken together: they see the same images in the same classes, and
/// where `same_data` is asked for, they were tested on the same.
///
/// # Errors
/// [`Error::Usage`] with what differs.
pub fn expect_alike(one: &Run, other: &Run, same_data: bool) -> Result<()> {
    let (a, b) = (one.config(), other.config());
    let what = |run: &Run| {
        let model = &run.config().model;
        format!("{} in {} classes", model.input, model.classes)
    };
    let differ = if a.model.input != b.model.input || a.model.classes != b.model.classes {
        [what(one), what(other)]
    } else if a.model.class_names != b.model.class_names {
        let mut pairs = a.model.class_names.iter().zip(&b.model.class_names);
        let (one, other) = pairs.find(|(a, b)| a != b).unzip();
        [one, other].map(|name| format!("the class '{}'", name.map_or("", String::as_str)))
    } else if same_data && a.data.test_sha256 != b.data.test_sha256 {
        let images = |run: &Run| format!("test images of {}", run.config().data.source);
        let [a, b] = [images(one), images(other)];
        // The same place may hold others by now, or take another part of them.
        [a, format!("other {b}; name them by --data")]
    } else {
        return Ok(());
    };
    let [expected, found] = differ;
    Err(Error::Usage(format!(
        "expected runs for the same images and classes, {expected} as in {}, found {found} in {}",
        one.folder().display(),
        other.folder().display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_averaged_not_predictions() {
        let ln = |p: [f64; 3]| p.map(|p| (p.ln() + 5.0) as f32);
        let softmax = |p| class_shares(Loss::SoftmaxCrossEntropy, &ln(p), 3);
        let one = softmax([0.5, 0.3, 0.2]);
        assert!(
            (one[0] - 0.5).abs() < 1e-6 && (one[2] - 0.2).abs() < 1e-6,
            "{one:?}"
        );
        // Two of three are for class 0, but by little.
        let members = [one, softmax([0.45, 0.35, 0.2]), softmax([0.05, 0.9, 0.05])];
        assert_eq!(mean_shares(members.iter().map(|m| &m[..]), 3), [1]);
        // Huge outputs do not overflow, and ties go to the first.
        let huge = class_shares(Loss::SoftmaxCrossEntropy, &[3e38, 3e38, -3e38], 3);
        assert_eq!(huge, [0.5, 0.5, 0.0]);
        assert_eq!(mean_shares([&huge[..]].into_iter(), 3), [0]);
        let squared = class_shares(Loss::SquaredError, &[0.25, 0.75], 2);
        assert_eq!(squared, [0.25, 0.75]);
    }
}
