//! What a sample of each class counts.

use super::Dataset;
use super::survey::class_counts;
use crate::error::{Error, Result};
use std::fs;
use std::path::Path;

/// `samples / (classes · samples of the class)` for each class, as scikit-learn's
/// `class_weight="balanced"`; classes without a sample count for nothing and have weight 1.
pub fn balanced_weights(train: &Dataset) -> Vec<f32> {
    let counts = class_counts(train);
    let classes = counts.iter().filter(|count| **count > 0).count();
    let weight = |count: usize| match count {
        0 => 1.0,
        _ => (train.len() as f64 / (classes as f64 * count as f64)) as f32,
    };
    counts.into_iter().map(weight).collect()
}

/// Reads a file with a line for each class: its name, white space, its weight. Empty lines are passed
/// over.
///
/// # Errors
/// [`Error::Data`] with the line of an unknown class, of one named twice or of a weight that is no
/// finite number above 0, and with the name of a class that is not there.
pub fn read_weights(path: &Path, class_names: &[String]) -> Result<Vec<f32>> {
    let text = match path.is_file() {
        true => fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?,
        false => {
            return Err(Error::data(
                path,
                "expected \"balanced\" or a file with a class name and a weight a line, found no such file",
            ));
        }
    };
    let mut weights = vec![None; class_names.len()];
    // Editors on Windows like to begin a file with a byte order mark.
    let text = text.trim_start_matches('\u{feff}');
    for (i, line) in text.lines().map(str::trim).enumerate() {
        if line.is_empty() {
            continue;
        }
        let error = |what: String| Err(Error::data(path, format!("line {}: {what}", i + 1)));
        let Some((name, weight)) = line.rsplit_once(char::is_whitespace) else {
            return error(format!(
                "expected a class name and a weight, found '{line}'"
            ));
        };
        let name = name.trim_end();
        let Some(class) = class_names.iter().position(|class| class == name) else {
            return error(format!(
                "expected the name of a class, as `wgrad data` lists them, found '{name}'"
            ));
        };
        match weight.parse::<f32>() {
            Ok(number) if number > 0.0 && number.is_finite() => {
                if weights[class].replace(number).is_some() {
                    return error(format!(
                        "expected each class once, found a second weight for '{name}'; remove one"
                    ));
                }
            }
            _ => {
                return error(format!(
                    "expected a finite weight above 0, found '{weight}'"
                ));
            }
        }
    }
    let named = weights.into_iter().zip(class_names).map(|(weight, name)| {
        weight.ok_or_else(|| {
            Error::data(
                path,
                format!("expected a weight for each class, found none for '{name}'; add a line"),
            )
        })
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Shape;

    #[test]
    fn balanced_weights_are_those_of_scikit_learn() {
        // compute_class_weight("balanced", classes=[0, 1, 3], y=[0, 0, 0, 0, 1, 1, 3, 3, 3, 3]):
        // 0.83333333, 1.66666667, 0.83333333
        let train = Dataset {
            images: vec![0; 10],
            labels: vec![0, 0, 0, 0, 1, 1, 3, 3, 3, 3],
            shape: Shape::new(1, 1, 1),
            classes: 4,
            class_names: ["a", "b", "c", "d"].map(String::from).to_vec(),
            files: Vec::new(),
        };
        let expected = [10.0 / 12.0, 10.0 / 6.0, 1.0, 10.0 / 12.0];
        assert_eq!(balanced_weights(&train), expected);
    }

    #[test]
    fn names_may_hold_spaces() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.txt");
        fs::write(&path, "\u{feff}polar bear \t 2.5\r\n\r\n cat 1e-1\n").unwrap();
        let names = ["cat", "polar bear"].map(String::from);
        assert_eq!(read_weights(&path, &names).unwrap(), [0.1, 2.5]);
    }
}
