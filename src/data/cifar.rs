//! CIFAR-10 and CIFAR-100 as their authors publish them, in the binary version: records of one label
//! (CIFAR-100: two, coarse and fine) and 3072 bytes, a plane of 32 × 32 for red, green and blue each.
//! (Described at <https://www.cs.toronto.edu/~kriz/cifar.html>.)

use super::{Dataset, Splits};
use crate::error::{Error, Result};
use crate::host::available_memory;
use crate::model::Shape;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

const SHAPE: Shape = Shape::new(32, 32, 3);
/// Each in the published archive.
const TEN: &str = "cifar-10-batches-bin";
const HUNDRED: &str = "cifar-100-binary";

/// The files of one of the two sets.
struct Layout {
    train: &'static [&'static str],
    test: &'static str,
    names: &'static str,
    /// Bytes before the pixels of a record; the last one is the label.
    labels: usize,
    classes: usize,
}

const CIFAR_10: Layout = Layout {
    train: &[
        "data_batch_1.bin",
        "data_batch_2.bin",
        "data_batch_3.bin",
        "data_batch_4.bin",
        "data_batch_5.bin",
    ],
    test: "test_batch.bin",
    names: "batches.meta.txt",
    labels: 1,
    classes: 10,
};

const CIFAR_100: Layout = Layout {
    train: &["train.bin"],
    test: "test.bin",
    names: "fine_label_names.txt",
    labels: 2,
    classes: 100,
};

/// The folder with the files at or in `folder`, and what they are.
fn find(folder: &Path) -> Option<(PathBuf, &'static Layout)> {
    [
        (folder.to_path_buf(), &CIFAR_10),
        (folder.join(TEN), &CIFAR_10),
        (folder.to_path_buf(), &CIFAR_100),
        (folder.join(HUNDRED), &CIFAR_100),
    ]
    .into_iter()
    .find(|(folder, layout)| {
        let files = layout.train.iter().chain([&layout.test]);
        files.into_iter().any(|file| folder.join(file).is_file())
    })
}

/// Whether there is a file of either set.
pub(super) fn holds(folder: &Path) -> bool {
    find(folder).is_some()
}

/// The folder is one that [`holds`] a set.
pub(super) fn load(name: &str, folder: &Path) -> Result<Splits> {
    let (folder, layout) = find(folder).ok_or_else(|| {
        Error::data(
            folder,
            format!("expected {} and others, found none", CIFAR_10.train[0]),
        )
    })?;
    let names = class_names(&folder.join(layout.names), layout.classes)?;
    let train = layout.read(&folder, layout.train, &names)?;
    let test = layout.read(&folder, &[layout.test], &names)?;
    super::assembled(name, &folder, train, None, test)
}

/// The names, one a line; numbers where there is no such file.
fn class_names(path: &Path, classes: usize) -> Result<Vec<String>> {
    if !path.is_file() {
        return Ok((0..classes).map(|class| class.to_string()).collect());
    }
    let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let names: Vec<String> = lines.map(String::from).collect();
    if names.len() == classes {
        return Ok(names);
    }
    Err(Error::data(
        path,
        format!(
            "expected a name for each of {classes} classes, one a line, found {} lines; fetch the file again",
            names.len()
        ),
    ))
}

impl Layout {
    /// The images of some files, one after the other.
    fn read(&self, folder: &Path, files: &[&str], names: &[String]) -> Result<Dataset> {
        let pixels = SHAPE.elements();
        let record = self.labels + pixels;
        let paths: Vec<PathBuf> = files.iter().map(|file| folder.join(file)).collect();
        let mut total = 0;
        for path in &paths {
            let size = match fs::metadata(path) {
                Ok(data) if data.is_file() => data.len(),
                _ => {
                    return Err(Error::data(
                        path,
                        "expected this file beside the others of CIFAR's binary version, found none; unpack the whole archive",
                    ));
                }
            };
            let whole = size / record as u64;
            if size == 0 || size != whole * record as u64 {
                return Err(Error::data(
                    path,
                    format!(
                        "expected whole records of {record} bytes, found {whole} and {} bytes more; the file is cut short or another, fetch it again",
                        size % record as u64
                    ),
                ));
            }
            total += whole;
        }
        let bytes = total.saturating_mul(pixels as u64);
        let available = available_memory();
        if bytes > available {
            return Err(super::idx::too_large(folder, bytes, available));
        }
        let mut dataset = Dataset {
            images: Vec::with_capacity(bytes as usize),
            labels: Vec::with_capacity(total as usize),
            shape: SHAPE,
            classes: self.classes,
            class_names: names.to_vec(),
            files: Vec::new(),
        };
        for path in &paths {
            let io = |e| Error::io("read", path, e);
            let mut contents = Vec::new();
            // Not more than was there a moment ago.
            let file = File::open(path).map_err(io)?;
            let size = file.metadata().map_err(io)?.len();
            file.take(size).read_to_end(&mut contents).map_err(io)?;
            for (i, record) in contents.chunks_exact(record).enumerate() {
                let (labels, planes) = record.split_at(self.labels);
                let label = labels[self.labels - 1];
                if usize::from(label) >= self.classes {
                    return Err(Error::data(
                        path,
                        format!(
                            "expected labels below {}, found {label} in record {i}; the file is damaged or another, fetch it again",
                            self.classes
                        ),
                    ));
                }
                dataset.labels.push(label.into());
                interleave(planes, SHAPE, &mut dataset.images);
            }
        }
        Ok(dataset)
    }
}

/// Appends an image that is given as `[C][H][W]` as `[H][W][C]`.
pub(super) fn interleave(planes: &[u8], shape: Shape, images: &mut Vec<u8>) {
    let positions = shape.positions();
    for position in 0..positions {
        images.extend((0..shape.channels).map(|channel| planes[channel * positions + position]));
    }
}
