//! One training for each of several seeds: how they came out, side by side.

use crate::error::{Error, Result};
use crate::files::replace;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// The file of the folder that holds the runs' folders.
const FILE: &str = "seeds.json";

/// `seeds.json`: which seeds, and what has come of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeedsRecord {
    /// In the order in which they are trained.
    pub seeds: Vec<u64>,
    /// Of the runs that have finished an epoch.
    #[serde(default)]
    pub runs: Vec<SeedRun>,
    /// Over `runs`, of the test accuracy after the last epoch; `None` until all of them have finished
    /// the same number of epochs.
    pub mean: Option<f64>,
    /// Of the sample: the sum of squares over n − 1. `None` for a single run too.
    pub standard_deviation: Option<f64>,
    /// The same of the averages of the weights, where they are kept.
    #[serde(default)]
    pub average_mean: Option<f64>,
    /// Likewise.
    #[serde(default)]
    pub average_standard_deviation: Option<f64>,
}

/// How far one of the runs is and how well it does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeedRun {
    /// The run's seed.
    pub seed: u64,
    /// Within the folder of all.
    pub folder: String,
    /// Epochs that it has finished.
    pub epochs: usize,
    /// After the last of them.
    pub test_loss: f64,
    /// Likewise, from 0 to 1.
    pub test_accuracy: f64,
    /// Of the average of the weights, where it is kept.
    #[serde(default)]
    pub average_test_accuracy: Option<f64>,
    /// Sum over the epochs.
    pub seconds: f64,
}

impl SeedsRecord {
    /// Of runs that are yet to come.
    pub fn new(seeds: Vec<u64>) -> SeedsRecord {
        SeedsRecord {
            seeds,
            runs: Vec::new(),
            mean: None,
            standard_deviation: None,
            average_mean: None,
            average_standard_deviation: None,
        }
    }

    /// The run folder of a seed.
    pub fn folder(parent: &Path, seed: u64) -> PathBuf {
        parent.join(format!("seed-{seed}"))
    }

    /// Takes the record of runs back that came to nothing, and their folder if it is empty then.
    pub fn discard(parent: &Path) {
        // What cannot be removed does no harm.
        let _ = fs::remove_file(parent.join(FILE));
        let _ = fs::remove_dir(parent);
    }

    /// The record in a folder; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a damaged one, [`Error::Io`].
    pub fn read(parent: &Path) -> Result<Option<SeedsRecord>> {
        let path = parent.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
        let damaged = |e| {
            let what = format!("expected the seeds of several runs, found a damaged file ({e})");
            Error::checkpoint(&path, what)
        };
        serde_json::from_str(&text).map(Some).map_err(damaged)
    }

    /// Takes the runs' results, computes mean and deviation, and writes the record.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&mut self, parent: &Path, runs: Vec<SeedRun>) -> Result<()> {
        let equal = runs.windows(2).all(|pair| pair[0].epochs == pair[1].epochs);
        let complete = equal && runs.len() == self.seeds.len();
        let over = |accuracy: fn(&SeedRun) -> Option<f64>| {
            let accuracies: Option<Vec<f64>> = runs.iter().map(accuracy).collect();
            mean_and_deviation(&accuracies.filter(|_| complete).unwrap_or_default())
        };
        (self.mean, self.standard_deviation) = over(|run| Some(run.test_accuracy));
        (self.average_mean, self.average_standard_deviation) =
            over(|run| run.average_test_accuracy);
        self.runs = runs;
        let path = parent.join(FILE);
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::checkpoint(&path, format!("cannot be written as JSON: {e}")))?;
        replace(&path, (text + "\n").as_bytes())
    }
}

/// Mean and standard deviation of a sample; the latter of two values at least.
fn mean_and_deviation(values: &[f64]) -> (Option<f64>, Option<f64>) {
    let n = values.len() as f64;
    if values.is_empty() {
        return (None, None);
    }
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    let deviation = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt());
    (Some(mean), deviation)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// statistics.mean and statistics.stdev of Python's standard library.
    #[test]
    fn the_deviation_is_that_of_a_sample() {
        assert_eq!(mean_and_deviation(&[]), (None, None));
        assert_eq!(mean_and_deviation(&[0.5]), (Some(0.5), None));
        let (mean, deviation) = mean_and_deviation(&[0.9, 0.8, 0.95, 0.75]);
        assert!((mean.unwrap() - 0.85).abs() < 1e-12);
        assert!((deviation.unwrap() - 0.09128709291752768).abs() < 1e-12);
    }

    #[test]
    fn runs_of_different_lengths_have_no_mean() {
        let folder = tempfile::tempdir().unwrap();
        let run = |seed, epochs| SeedRun {
            seed,
            folder: format!("seed-{seed}"),
            epochs,
            test_loss: 1.0,
            test_accuracy: 0.5,
            average_test_accuracy: (seed == 1).then_some(0.5),
            seconds: 1.0,
        };
        let mut record = SeedsRecord::new(vec![1, 2]);
        assert_eq!(SeedsRecord::read(folder.path()).unwrap(), None);
        for (runs, mean) in [
            (vec![run(1, 2)], None),
            (vec![run(1, 2), run(2, 1)], None),
            (vec![run(1, 2), run(2, 2)], Some(0.5)),
        ] {
            record.write(folder.path(), runs).unwrap();
            assert_eq!(record.mean, mean);
            // Not all of them have an average.
            assert_eq!(record.average_mean, None);
            let read = SeedsRecord::read(folder.path()).unwrap();
            assert_eq!(read.as_ref(), Some(&record));
        }
        assert_eq!(record.standard_deviation, Some(0.0));
        fs::write(folder.path().join(FILE), "{}").unwrap();
        let error = SeedsRecord::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("seeds.json"), "{error}");
    }
}
