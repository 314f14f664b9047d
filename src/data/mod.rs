//! Datasets: images as bytes, labels as class numbers, split for training and testing.
//!
//! Bytes stay bytes until the GPU's batch gather makes them f32 by the [`Normalization`]. This
//! module knows nothing of models or devices.

mod cache;
mod cifar;
mod drawing;
mod folder;
mod idx;
mod mnist;
mod npz;
mod parquet;
mod picture;
mod split;
pub mod survey;
mod weights;

pub use drawing::{Invert, Picture, Reading, read_picture};
pub use folder::{Files, Found, files_in, read_file};
pub use weights::{balanced_weights, read_weights};

use crate::error::{Error, Result};
use crate::model::Shape;
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Labelled images. [`load`] makes sure that there is at least one image, that images and labels
/// are as many, and that every label is below `classes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// `[N][H][W][C]`, one byte per element.
    pub images: Vec<u8>,
    /// `[N]`, each below `classes`.
    pub labels: Vec<u32>,
    /// Of one image.
    pub shape: Shape,
    /// Number of classes.
    pub classes: usize,
    /// One name per class.
    pub class_names: Vec<String>,
    /// The file of each image, as the folder of pictures names it; empty for other data.
    pub files: Vec<String>,
}

impl Dataset {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are no images; never so after [`load`].
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Keeps the first `n` images, or all when there are fewer; the class count stays.
    ///
    /// # Errors
    /// [`Error::Usage`] when `n` is 0.
    pub fn truncate(&mut self, n: usize) -> Result<()> {
        if n == 0 {
            return Err(Error::Usage(
                "expected a limit of at least 1 training image, found 0; raise --limit".into(),
            ));
        }
        if n < self.len() {
            self.labels.truncate(n);
            self.files.truncate(n);
            self.images.truncate(n * self.shape.elements());
        }
        Ok(())
    }

    /// Gives the images the labels that `names` has for their classes. Where it knows none of them and they
    /// are numbers from 0, labels stay as they are.
    ///
    /// # Errors
    /// The name of a class that is not among them.
    pub fn relabel(&mut self, names: &[String]) -> std::result::Result<(), String> {
        let label = |name: &String| names.iter().position(|known| known == name);
        let labels: Vec<Option<usize>> = self.class_names.iter().map(label).collect();
        let mut numbered = (0..).zip(&self.class_names);
        if labels.iter().all(Option::is_none)
            && numbered.all(|(class, name): (usize, _)| *name == class.to_string())
        {
            return Ok(());
        }
        let found = labels.iter().zip(&self.class_names);
        let labels = found.map(|(label, name)| label.map(|l| l as u32).ok_or(name.clone()));
        let labels = labels.collect::<std::result::Result<Vec<_>, _>>()?;
        for own in &mut self.labels {
            *own = labels[*own as usize];
        }
        self.classes = names.len();
        self.class_names = names.to_vec();
        Ok(())
    }

    /// SHA-256, in hexadecimal, of everything that training or testing on these images depends on:
    /// their shape, the number of classes, labels and bytes.
    pub fn sha256(&self) -> String {
        let sizes = [self.shape.height, self.shape.width, self.shape.channels];
        let header: Vec<u8> = sizes
            .into_iter()
            .chain([self.classes, self.len()])
            .flat_map(|n| (n as u64).to_le_bytes())
            .collect();
        let labels: Vec<u8> = self.labels.iter().flat_map(|l| l.to_le_bytes()).collect();
        crate::files::sha256([&header[..], &labels, &self.images])
    }
}

/// A dataset for training, one for testing and maybe one for validation, with the same image shape and classes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Splits {
    /// What [`load`] was asked for.
    pub name: String,
    /// What is learnt from.
    pub train: Dataset,
    /// What decides when and which; not trained on.
    pub validation: Option<Dataset>,
    /// What the result is measured on; decides nothing.
    pub test: Dataset,
    /// What looks wrong about them, a line each.
    pub notes: Vec<String>,
}

/// How images become [`Splits`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// Height and width that pictures are brought to; by default what the source says. Where that
    /// is fixed, no other is accepted.
    pub image_size: Option<[usize; 2]>,
    /// Share of the training images of each class that is held back for validation; by default none
    /// where there are test images, else 0.1.
    pub validation: Option<f64>,
    /// Share of the images of each class that is held back for testing where there are no test
    /// images; by default 0.1.
    pub test: Option<f64>,
    /// Decides which images are held back.
    pub split_seed: u64,
    /// Folder for what took long to decode; nothing is kept without.
    pub cache: Option<PathBuf>,
}

/// Loads `"mnist"`, which is part of the binary, or what lies at a path (a folder that is itself
/// called so is `"./mnist"`), told by what is there: pictures in folders by class, IDX files, CIFAR's
/// binary files, a NumPy archive, or Parquet files of the Hugging Face hub; `docs/data.md` says how each
/// is laid out.
///
/// `progress` hears how many images of how many are read, where that takes long.
///
/// # Errors
/// [`Error::Usage`] for a request that the source cannot meet; [`Error::Data`] when there is no such
/// dataset, a file is missing, or a file is not what its header promises; [`Error::Io`] when a file cannot
/// be read.
pub fn load(
    spec: &str,
    request: &Request,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Splits> {
    let shares = [
        ("--validation", request.validation),
        ("--test", request.test),
    ];
    for (flag, share) in shares {
        split::expect_share(flag, share.unwrap_or(0.0))?;
    }
    let path = Path::new(spec);
    // Others can be scaled and split as is asked for.
    let mut fixed = true;
    let mut splits = if spec == "mnist" {
        mnist::load()?
    } else if parquet::holds(path) {
        fixed = false;
        parquet::load(spec, path, request, None, progress)?
    } else if cifar::holds(path) {
        cifar::load(spec, path)?
    } else if npz::is(path) {
        npz::load(spec, path)?
    } else if folder::holds(path) {
        fixed = false;
        folder::load(spec, request, progress)?
    } else if path.is_dir() {
        idx::load_folder(path)?
    } else {
        let found = if path.exists() {
            "a file; give the folder that holds it"
        } else {
            "no such folder"
        };
        return Err(Error::data(
            path,
            format!(
                "expected \"mnist\", a folder of pictures, IDX files, CIFAR's binary files or Parquet files, or an .npz file, found {found}"
            ),
        ));
    };
    if fixed {
        expect_fixed(request, &splits)?;
    }
    if let (None, Some(share)) = (&splits.validation, request.validation)
        && share > 0.0
    {
        splits.validation = Some(split::carve(&mut splits.train, share, request.split_seed));
    }
    splits.notes.extend(survey::leak(&splits));
    Ok(splits)
}

/// The test images that [`load`] finds, for a network that takes images of `shape`, and what looks
/// wrong about them. Pictures are brought to that shape; of a folder without test images all are
/// taken.
///
/// # Errors
/// As [`load`].
pub fn load_test(
    spec: &str,
    shape: Shape,
    cache: Option<&Path>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(Dataset, Vec<String>)> {
    let path = Path::new(spec);
    let splits = if spec != "mnist" && parquet::holds(path) {
        let request = Request {
            image_size: Some([shape.height, shape.width]),
            ..Request::default()
        };
        parquet::load(spec, path, &request, Some(shape.channels), progress)?
    } else if spec != "mnist" && folder::holds(path) {
        return folder::load_test(spec, shape, cache, progress);
    } else {
        load(spec, &Request::default(), progress)?
    };
    Ok((splits.test, splits.notes))
}

/// Height and width of the pictures of `spec` as they are in their files, and how many have them, the
/// most frequent first; nothing where images come in one size.
///
/// # Errors
/// As [`load`].
pub fn picture_sizes(spec: &str) -> Result<Vec<([usize; 2], usize)>> {
    let path = Path::new(spec);
    let fixed = spec == "mnist" || cifar::holds(path) || npz::is(path) || !folder::holds(path);
    let sizes = if spec != "mnist" && parquet::holds(path) {
        parquet::sizes(path)?
    } else if fixed {
        Vec::new()
    } else {
        folder::sizes(path)?
    };
    let mut counts = BTreeMap::new();
    for size in sizes {
        *counts.entry(size).or_insert(0) += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(size, count)| (Reverse(*count), *size));
    Ok(counts)
}

/// Refuses what cannot be asked of images that come in one size and with test images.
fn expect_fixed(request: &Request, splits: &Splits) -> Result<()> {
    let Shape { height, width, .. } = splits.train.shape;
    let found = match request {
        Request {
            image_size: Some([h, w]),
            ..
        } if [*h, *w] != [height, width] => {
            format!("--image-size of {height}x{width}, found {h}x{w}")
        }
        Request {
            test: Some(share), ..
        } => format!("no --test, found {share}"),
        _ => return Ok(()),
    };
    Err(Error::Usage(format!(
        "expected {found}: the images of {} come in one size and with test images; leave it out",
        splits.name
    )))
}

impl Splits {
    /// Keeps the first `n` images of each split.
    ///
    /// # Errors
    /// As [`Dataset::truncate`].
    pub fn truncate(&mut self, n: usize) -> Result<()> {
        let validation = self.validation.iter_mut();
        let mut splits = [&mut self.train, &mut self.test]
            .into_iter()
            .chain(validation);
        splits.try_for_each(|split| split.truncate(n))
    }
}

/// How bytes become network inputs: `x = byte · scale[c] + shift[c]` for channel `c`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Normalization {
    /// Factor of a byte, by channel.
    pub scale: Vec<f32>,
    /// What is added then, by channel.
    pub shift: Vec<f32>,
}

impl Normalization {
    /// The normalisation that gives each channel mean 0 and variance 1 over all images of
    /// `dataset`; a channel that is constant becomes 0. Sums are exact, rounding comes last.
    pub fn of(dataset: &Dataset) -> Normalization {
        let (scale, shift) = moments(dataset)
            .into_iter()
            .map(|[mean, deviation]| {
                let scale = if deviation > 0.0 {
                    1.0 / deviation
                } else {
                    1.0 / 255.0
                };
                (scale as f32, (-mean * scale) as f32)
            })
            .unzip();
        Normalization { scale, shift }
    }
}

/// Mean and standard deviation of the bytes of each channel. Sums are exact, rounding comes last; the
/// deviation is 0 exactly when the channel is constant.
fn moments(dataset: &Dataset) -> Vec<[f64; 2]> {
    let channels = dataset.shape.channels;
    let mut histograms = vec![[0u64; 256]; channels];
    for pixel in dataset.images.chunks_exact(channels) {
        for (histogram, &byte) in histograms.iter_mut().zip(pixel) {
            histogram[usize::from(byte)] += 1;
        }
    }
    histograms
        .iter()
        .map(|histogram| {
            let moment = |power| {
                (0u128..)
                    .zip(histogram)
                    .map(|(byte, &n)| byte.pow(power) * u128::from(n))
                    .sum::<u128>()
            };
            let (n, sum, squares) = (moment(0).max(1), moment(1), moment(2));
            // n²·variance, a whole number.
            let deviation = ((n * squares - sum * sum) as f64).sqrt() / n as f64;
            [sum as f64 / n as f64, deviation]
        })
        .collect()
}

/// Puts the two splits of a dataset together; `path` is what errors name.
fn splits(
    name: &str,
    path: &Path,
    classes: usize,
    train: (idx::Images, Vec<u8>),
    test: (idx::Images, Vec<u8>),
) -> Result<Splits> {
    let dataset = |(images, labels): (idx::Images, Vec<u8>)| Dataset {
        images: images.bytes,
        labels: labels.into_iter().map(u32::from).collect(),
        shape: images.shape,
        classes,
        class_names: (0..classes).map(|class| class.to_string()).collect(),
        files: Vec::new(),
    };
    assembled(name, path, dataset(train), None, dataset(test))
}

/// The splits of a dataset, which must have one image shape; `path` is what errors name.
fn assembled(
    name: &str,
    path: &Path,
    train: Dataset,
    validation: Option<Dataset>,
    test: Dataset,
) -> Result<Splits> {
    let others = validation.iter().map(|split| ("validation", split));
    for (which, split) in others.chain([("test", &test)]) {
        if split.shape != train.shape {
            return Err(Error::data(
                path,
                format!(
                    "expected {which} images of the shape of the training images ({}), found {}; use files of one dataset",
                    train.shape, split.shape
                ),
            ));
        }
    }
    Ok(Splits {
        name: name.into(),
        notes: without_images(&train).into_iter().collect(),
        train,
        validation,
        test,
    })
}

/// Says which classes have no training image, as when a label byte is damaged.
fn without_images(train: &Dataset) -> Option<String> {
    let mut seen = vec![false; train.classes];
    for label in &train.labels {
        seen[*label as usize] = true;
    }
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for class in (0..train.classes).filter(|class| !seen[*class]) {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == class => *last = class,
            _ => ranges.push((class, class)),
        }
    }
    let text: Vec<String> = ranges
        .iter()
        .map(|(first, last)| match last - first {
            0 => first.to_string(),
            1 => format!("{first}, {last}"),
            _ => format!("{first}–{last}"),
        })
        .collect();
    (!ranges.is_empty()).then(|| {
        format!(
            "warning: no training image in classes {} of {} (the largest label, {}, decides how many there are); check the label files",
            text.join(", "),
            train.classes,
            train.classes - 1
        )
    })
}
