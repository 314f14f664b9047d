//! What a trained network makes of test images: counts, scores, mistakes, and how far its confidence can
//! be trusted.

use crate::error::{Error, Result};

/// Bins of [`Results::calibration`], as many as Guo et al. took.
pub const BINS: usize = 15;

/// Test images with what a network says of each.
#[derive(Clone, Debug, PartialEq)]
pub struct Results {
    /// `[classes][classes]`: images by true class, then by predicted class.
    pub confusion: Vec<Vec<usize>>,
    /// `[N]`, true and predicted class of every image.
    pub pairs: Vec<[usize; 2]>,
    /// `[N]`, the probability that the network gives the class that it predicts, from 0 to 1.
    pub confidence: Vec<f64>,
}

/// How well one class is told from the others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClassScores {
    /// Images of the class.
    pub images: usize,
    /// Images that are taken for it.
    pub predicted: usize,
    /// Images of the class that are taken for it.
    pub correct: usize,
    /// `correct / predicted`; `None` where nothing is taken for the class.
    pub precision: Option<f64>,
    /// `correct / images`; `None` where the class has no images.
    pub recall: Option<f64>,
    /// Their harmonic mean, `2 · correct / (images + predicted)`; `None` where there is neither.
    pub f1: Option<f64>,
}

/// Images whose confidence lies in one range.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bin {
    /// How many fall into it.
    pub images: usize,
    /// Mean over them; 0 without any.
    pub confidence: f64,
    /// Share of them that is right; 0 without any.
    pub accuracy: f64,
}

/// Confidence against accuracy (Guo, Pleiss, Sun and Weinberger, 2017, "On calibration of modern neural
/// networks", arXiv 1706.04599, section 2).
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// [`BINS`] of the same width; the first is of confidences from 0 to 1/15.
    pub bins: Vec<Bin>,
    /// The expected calibration error: `Σ images/N · |accuracy − confidence|` over the bins.
    pub error: f64,
}

impl Results {
    /// From `[N]` labels and predictions, and `[N, classes]` probabilities
    /// ([`crate::train::class_shares`]). What is no probability (of a network that learned by squared
    /// error) counts as the nearest that is one, and NaN as 0.
    ///
    /// # Errors
    /// [`Error::Shape`] where they are not as many, or a class is beyond `classes`.
    pub fn of(
        labels: &[u32],
        predictions: &[u32],
        shares: &[f64],
        classes: usize,
    ) -> Result<Results> {
        let n = labels.len();
        let known = |class: &u32| (*class as usize) < classes;
        let fits = predictions.len() == n
            && shares.len() == n * classes
            && labels.iter().chain(predictions).all(known);
        if !fits {
            return Err(Error::Shape {
                operation: "results",
                what: format!(
                    "expected predictions and probabilities for {n} images in {classes} classes, found {} and {}",
                    predictions.len(),
                    shares.len()
                ),
            });
        }
        let pairs = labels.iter().zip(predictions);
        let pairs: Vec<[usize; 2]> = pairs.map(|(t, p)| [*t as usize, *p as usize]).collect();
        let mut confusion = vec![vec![0; classes]; classes];
        pairs.iter().for_each(|[t, p]| confusion[*t][*p] += 1);
        let rows = pairs.iter().enumerate();
        let confidence = rows.map(|(i, [_, p])| {
            let share = shares[i * classes + p];
            if share.is_nan() {
                0.0
            } else {
                share.clamp(0.0, 1.0)
            }
        });
        Ok(Results {
            confusion,
            confidence: confidence.collect(),
            pairs,
        })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// Share of the images whose class is predicted; NaN without images.
    pub fn accuracy(&self) -> f64 {
        let correct = self.pairs.iter().filter(|[t, p]| t == p).count();
        correct as f64 / self.len() as f64
    }

    /// Of every class.
    pub fn classes(&self) -> Vec<ClassScores> {
        let share = |part: usize, of: usize| (of > 0).then(|| part as f64 / of as f64);
        let scores = self.confusion.iter().enumerate().map(|(class, row)| {
            let images = row.iter().sum();
            let predicted = self.confusion.iter().map(|row| row[class]).sum();
            let correct = row[class];
            ClassScores {
                images,
                predicted,
                correct,
                precision: share(correct, predicted),
                recall: share(correct, images),
                f1: share(2 * correct, images + predicted),
            }
        });
        scores.collect()
    }

    /// True class, predicted class and number of images, of the mistakes that are most frequent; of equal
    /// ones the lower classes first.
    pub fn most_confused(&self, count: usize) -> Vec<[usize; 3]> {
        let rows = self.confusion.iter().enumerate();
        let cells = rows.flat_map(|(t, row)| row.iter().enumerate().map(move |(p, n)| [t, p, *n]));
        let mut wrong: Vec<[usize; 3]> = cells.filter(|[t, p, n]| t != p && *n > 0).collect();
        wrong.sort_by_key(|[t, p, n]| (std::cmp::Reverse(*n), *t, *p));
        wrong.truncate(count);
        wrong
    }

    /// The images that the network is wrong about and most sure of, by number.
    pub fn worst(&self, count: usize) -> Vec<usize> {
        let wrong = self.pairs.iter().enumerate().filter(|(_, [t, p])| t != p);
        let mut wrong: Vec<usize> = wrong.map(|(i, _)| i).collect();
        wrong.sort_by(|a, b| {
            let order = self.confidence[*b].total_cmp(&self.confidence[*a]);
            order.then(a.cmp(b))
        });
        wrong.truncate(count);
        wrong
    }

    /// How far confidence and accuracy lie apart.
    pub fn calibration(&self) -> Calibration {
        let mut bins = vec![Bin::default(); BINS];
        for ([t, p], confidence) in self.pairs.iter().zip(&self.confidence) {
            // Bin m is of confidences from above (m − 1)/M to m/M, as in the paper.
            let at = (confidence * BINS as f64).ceil() as usize;
            let bin = &mut bins[at.clamp(1, BINS) - 1];
            bin.images += 1;
            bin.confidence += confidence;
            bin.accuracy += f64::from(u8::from(t == p));
        }
        for bin in bins.iter_mut().filter(|bin| bin.images > 0) {
            bin.confidence /= bin.images as f64;
            bin.accuracy /= bin.images as f64;
        }
        let n = self.len().max(1) as f64;
        let gaps = bins.iter().map(|bin| {
            let gap = (bin.accuracy - bin.confidence).abs();
            bin.images as f64 / n * gap
        });
        let error = gaps.sum();
        Calibration { bins, error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seven images of classes 0, 1 and 2; class 3 has none and nothing is taken for it.
    fn results() -> Results {
        let labels = [0, 0, 0, 1, 1, 2, 2];
        let predictions = [0, 0, 1, 1, 2, 1, 1];
        let sure = [1.0, 0.5, 0.8, 0.6, 0.9, 0.7, 0.8];
        let mut shares = vec![0.0; 28];
        for (i, (class, p)) in predictions.iter().zip(sure).enumerate() {
            shares[4 * i + *class as usize] = p;
        }
        Results::of(&labels, &predictions, &shares, 4).unwrap()
    }

    /// By hand from the counts: of class 1, one of the four images that are taken for it is of it, and one
    /// of its two is found.
    #[test]
    fn scores_are_those_counted_by_hand() {
        let results = results();
        assert_eq!(
            results.confusion,
            [[2, 1, 0, 0], [0, 1, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0]]
        );
        let scores = results.classes();
        let [a, b, c, d] = &scores[..] else { panic!() };
        assert_eq!((a.images, a.predicted, a.correct), (3, 2, 2));
        assert_eq!((a.precision, a.recall), (Some(1.0), Some(2.0 / 3.0)));
        assert_eq!(a.f1, Some(0.8));
        assert_eq!((b.precision, b.recall), (Some(0.25), Some(0.5)));
        // 2 · 0.25 · 0.5 / 0.75
        assert_eq!(b.f1, Some(1.0 / 3.0));
        assert_eq!(
            (c.precision, c.recall, c.f1),
            (Some(0.0), Some(0.0), Some(0.0))
        );
        assert_eq!((d.precision, d.recall, d.f1), (None, None, None));
        assert_eq!(results.accuracy(), 3.0 / 7.0);
        assert_eq!(results.most_confused(2), [[2, 1, 2], [0, 1, 1]]);
        assert_eq!(results.most_confused(9).len(), 3);
        // Of the two that it is equally sure of, the first comes first.
        assert_eq!(results.worst(3), [4, 2, 6]);
    }

    /// The bins of Guo et al. by hand: 0.5 lies in bin 8 (7/15 to 8/15), 0.6 in 9, 0.7 in 11, 0.8 in 12,
    /// 0.9 in 14 and 1 in 15.
    #[test]
    fn the_calibration_error_is_that_of_the_paper() {
        let Calibration { bins, error } = results().calibration();
        let full: Vec<usize> = (0..BINS).filter(|i| bins[*i].images > 0).collect();
        assert_eq!(full, [7, 8, 10, 11, 13, 14]);
        assert_eq!((bins[11].images, bins[11].accuracy), (2, 0.0));
        let expected = (0.5 + 0.4 + 0.7 + 2.0 * 0.8 + 0.9 + 0.0) / 7.0;
        assert!((error - expected).abs() < 1e-12, "{error}, not {expected}");
    }

    #[test]
    fn odd_probabilities_count_as_the_nearest() {
        let shares = [f64::NAN, 0.0, 1.7, 0.0, -0.5, -0.9];
        let results = Results::of(&[0, 0, 0], &[0, 0, 0], &shares, 2).unwrap();
        assert_eq!(results.confidence, [0.0, 1.0, 0.0]);
        assert_eq!(results.calibration().bins[0].images, 2);
        let empty = Results::of(&[], &[], &[], 2).unwrap();
        assert!(empty.accuracy().is_nan() && empty.is_empty());
        assert_eq!(empty.calibration().error, 0.0);
        for (labels, predictions, shares) in [
            (&[0][..], &[][..], &[0.5, 0.5][..]),
            (&[0], &[0], &[0.5]),
            (&[2], &[0], &[0.5, 0.5]),
            (&[0], &[2], &[0.5, 0.5]),
        ] {
            assert!(Results::of(labels, predictions, shares, 2).is_err());
        }
    }
}
