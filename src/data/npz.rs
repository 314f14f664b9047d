//! NumPy archives: a zip file of arrays, each with a header of its own (NEP 1; NumPy's `npy` format,
//! <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>).

use super::{Dataset, Splits};
use crate::error::{Error, Result};
use crate::host::available_memory;
use crate::model::Shape;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use zip::ZipArchive;

/// No dataset has more classes; a label beyond is damage.
pub(super) const MOST_CLASSES: u64 = 1 << 16;
/// No array of images or labels needs a longer header.
const LONGEST_HEADER: u64 = 1 << 16;

/// How the arrays of a split may be called, in lower case.
struct Names {
    images: &'static [&'static str],
    labels: &'static [&'static str],
}

const TRAIN: Names = Names {
    images: &["x_train", "train_images"],
    labels: &["y_train", "train_labels"],
};
const VALIDATION: Names = Names {
    images: &["x_val", "val_images"],
    labels: &["y_val", "val_labels"],
};
const TEST: Names = Names {
    images: &["x_test", "test_images"],
    labels: &["y_test", "test_labels"],
};

/// Whether the path is called as such an archive is.
pub(super) fn is(path: &Path) -> bool {
    path.extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("npz"))
}

/// Images and labels of `path`, with validation images where it has them.
pub(super) fn load(name: &str, path: &Path) -> Result<Splits> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let zip = ZipArchive::new(BufReader::new(file)).map_err(|e| {
        Error::data(
            path,
            format!("expected a NumPy archive (.npz), found something else ({e}); save it with np.savez_compressed"),
        )
    })?;
    let mut archive = Archive { path, zip };
    let train = archive.split(&TRAIN)?;
    let validation = match archive.find(VALIDATION.images) {
        Some(_) => Some(archive.split(&VALIDATION)?),
        None => None,
    };
    let test = archive.split(&TEST)?;

    let splits = [Some(&train), validation.as_ref(), Some(&test)];
    let labels = splits.into_iter().flatten().flat_map(|split| &split.labels);
    let classes = labels.max().map_or(2, |&label| label as usize + 1).max(2);
    let names: Vec<String> = (0..classes).map(|class| class.to_string()).collect();
    let dataset = |split: Split| Dataset {
        images: split.images,
        labels: split.labels,
        shape: split.shape,
        classes,
        class_names: names.clone(),
        files: Vec::new(),
    };
    super::assembled(
        name,
        path,
        dataset(train),
        validation.map(dataset),
        dataset(test),
    )
}

struct Split {
    images: Vec<u8>,
    shape: Shape,
    labels: Vec<u32>,
}

struct Archive<'a> {
    path: &'a Path,
    zip: ZipArchive<BufReader<File>>,
}

/// What a header says.
#[derive(Debug, PartialEq)]
struct Header {
    /// NumPy's name of the element type, as `|u1` or `<i8`.
    dtype: String,
    fortran: bool,
    shape: Vec<u64>,
}

impl Archive<'_> {
    /// The names of the arrays, as they are in the file.
    fn arrays(&self) -> Vec<String> {
        let names = self.zip.file_names().filter_map(|name| name.ok());
        names
            .filter_map(|name| Some(name.strip_suffix(".npy")?.to_owned()))
            .collect()
    }

    /// The array that has one of the names, in whatever case.
    fn find(&self, names: &[&str]) -> Option<String> {
        let arrays = self.arrays();
        let mut found = names.iter().filter_map(|name| {
            let same = |array: &&String| array.eq_ignore_ascii_case(name);
            arrays.iter().find(same).cloned()
        });
        found.next()
    }

    fn expect(&self, names: &[&str]) -> Result<String> {
        self.find(names).ok_or_else(|| {
            let mut arrays = self.arrays();
            arrays.truncate(12);
            let found = match arrays.is_empty() {
                true => "none at all".into(),
                false => arrays.join(", "),
            };
            Error::data(
                self.path,
                format!(
                    "expected an array {}, found {found}; save it under that name",
                    names.join(" or ")
                ),
            )
        })
    }

    fn error<T>(&self, array: &str, what: String) -> Result<T> {
        Err(Error::data(self.path, format!("{array}: {what}")))
    }

    fn split(&mut self, names: &Names) -> Result<Split> {
        let (images, labels) = (self.expect(names.images)?, self.expect(names.labels)?);
        let (pixels, shape) = self.images(&images)?;
        let values = self.labels(&labels)?;
        let count = pixels.len() / shape.elements();
        if values.len() != count {
            return self.error(
                &labels,
                format!(
                    "expected a label for each of the {count} images of {images}, found {} labels; save arrays of one dataset",
                    values.len()
                ),
            );
        }
        Ok(Split {
            images: pixels,
            shape,
            labels: values,
        })
    }

    /// `[N][H][W][C]` bytes and the shape of one image.
    fn images(&mut self, array: &str) -> Result<(Vec<u8>, Shape)> {
        let (header, bytes) = self.read(array)?;
        if header.dtype != "|u1" {
            return self.error(
                array,
                format!(
                    "expected images of uint8, found {}; save them from 0 to 255, with .astype(np.uint8)",
                    header.dtype
                ),
            );
        }
        if header.fortran {
            return self.error(
                array,
                "expected images in C order, found Fortran's; save np.ascontiguousarray of them"
                    .into(),
            );
        }
        let sizes: Vec<usize> = header.shape.iter().map(|size| *size as usize).collect();
        // What is neither is taken as the first says.
        let few = |channels: usize| channels == 1 || channels == 3;
        let shape = match sizes[..] {
            [_, h, w] => Shape::new(h, w, 1),
            [_, c, h, w] if few(c) && !few(w) => {
                let shape = Shape::new(h, w, c);
                let mut images = Vec::with_capacity(bytes.len());
                for planes in bytes.chunks_exact(shape.elements()) {
                    super::cifar::interleave(planes, shape, &mut images);
                }
                return Ok((images, shape));
            }
            [_, h, w, c] if c <= 4 => Shape::new(h, w, c),
            _ => {
                return self.error(
                    array,
                    format!(
                        "expected images of shape (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, found {}; reshape them",
                        tuple(&header.shape)
                    ),
                );
            }
        };
        Ok((bytes, shape))
    }

    fn labels(&mut self, array: &str) -> Result<Vec<u32>> {
        let (header, bytes) = self.read(array)?;
        if !matches!(header.shape[..], [_] | [_, 1]) {
            return self.error(
                array,
                format!(
                    "expected one label per image, shape (N,) or (N, 1), found {}; save class numbers, as labels.argmax(axis=1)",
                    tuple(&header.shape)
                ),
            );
        }
        let (order, kind) = header.dtype.split_at(1);
        let Some(size) = integer_size(kind) else {
            return self.error(
                array,
                format!(
                    "expected labels of an integer type, found {}; save class numbers, with .astype(np.int64)",
                    header.dtype
                ),
            );
        };
        let mut labels = Vec::with_capacity(bytes.len() / size);
        for (i, element) in bytes.chunks_exact(size).enumerate() {
            let mut wide = [0; 8];
            wide[..size].copy_from_slice(element);
            if order == ">" {
                wide[..size].reverse();
            }
            let signed = kind.starts_with('i') && wide[size - 1] >= 0x80;
            let value = u64::from_le_bytes(wide);
            if signed || value >= MOST_CLASSES {
                let found = match signed {
                    true => (value as i64) << (64 - 8 * size) >> (64 - 8 * size),
                    false => value as i64,
                };
                return self.error(
                    array,
                    format!("expected labels from 0 to below {MOST_CLASSES}, found {found} at {i}; save class numbers from 0"),
                );
            }
            labels.push(value as u32);
        }
        Ok(labels)
    }

    /// Header and elements of an array. No more is held in memory than the machine has free, and no
    /// more is unpacked than the header promises.
    fn read(&mut self, array: &str) -> Result<(Header, Vec<u8>)> {
        let path = self.path;
        let error = |what: String| Err(Error::data(path, format!("{array}: {what}")));
        let damaged = |e: &dyn std::fmt::Display| {
            Error::data(
                path,
                format!(
                    "{array}: expected an intact archive, found a damaged one ({e}); fetch or save it again"
                ),
            )
        };
        let mut file = self
            .zip
            .by_name(&format!("{array}.npy"))
            .map_err(|e| damaged(&e))?;
        let mut take = |limit: u64| {
            let mut bytes = Vec::new();
            (&mut file)
                .take(limit)
                .read_to_end(&mut bytes)
                .map_err(|e| damaged(&e))?;
            Ok(bytes)
        };
        let start = take(8)?;
        let width = match start[..] {
            [0x93, b'N', b'U', b'M', b'P', b'Y', 1, _] => 2,
            [0x93, b'N', b'U', b'M', b'P', b'Y', 2 | 3, _] => 4,
            _ => return error("expected NumPy's array format, found something else; save it with np.savez_compressed".into()),
        };
        let mut length = [0; 8];
        let word = take(width)?;
        length[..word.len()].copy_from_slice(&word);
        let length = u64::from_le_bytes(length);
        let text = take(length.min(LONGEST_HEADER))?;
        let header = match std::str::from_utf8(&text).ok().and_then(Header::parse) {
            Some(header) if text.len() as u64 == length => header,
            _ => {
                return error(
                    "expected a header with descr, fortran_order and shape of a plain array, found another; save it again with np.savez_compressed".into(),
                );
            }
        };
        let size = header.dtype.get(2..).and_then(|size| size.parse().ok());
        let size = size.filter(|size| (1..=16).contains(size));
        let promised = header
            .shape
            .iter()
            .try_fold(size.unwrap_or(1), |product: u64, &n| product.checked_mul(n))
            .filter(|promised| *promised < u64::MAX);
        let Some(promised) = promised.filter(|promised| *promised > 0) else {
            return error(format!(
                "expected at least one element and sizes that a file can hold, found shape {}; save the array again",
                tuple(&header.shape)
            ));
        };
        let available = available_memory();
        if promised > available {
            return Err(super::idx::too_large(path, promised, available));
        }
        let mut bytes = Vec::new();
        if bytes.try_reserve_exact(promised as usize + 1).is_err() {
            return Err(super::idx::too_large(path, promised, available));
        }
        (&mut file)
            .take(promised + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| damaged(&e))?;
        if bytes.len() as u64 != promised {
            let found = match bytes.len() as u64 > promised {
                true => "more".into(),
                false => bytes.len().to_string(),
            };
            return error(format!(
                "expected {promised} bytes after the header ({}), found {found}; save the array again",
                tuple(&header.shape)
            ));
        }
        Ok((header, bytes))
    }
}

/// Bytes of an integer type, whatever its order.
fn integer_size(kind: &str) -> Option<usize> {
    match kind {
        "u1" | "i1" => Some(1),
        "u2" | "i2" => Some(2),
        "u4" | "i4" => Some(4),
        "u8" | "i8" => Some(8),
        _ => None,
    }
}

/// A shape as NumPy writes it.
fn tuple(shape: &[u64]) -> String {
    let sizes: Vec<String> = shape.iter().map(u64::to_string).collect();
    match sizes.len() {
        1 => format!("({},)", sizes[0]),
        _ => format!("({})", sizes.join(", ")),
    }
}

impl Header {
    /// Reads the Python dictionary that NumPy writes: `{'descr': '|u1', 'fortran_order': False,
    /// 'shape': (60000, 28, 28), }`. `None` for anything else, as the types of records.
    fn parse(text: &str) -> Option<Header> {
        let value = |key: &str| {
            let after = text.split_once(&format!("'{key}'"))?.1;
            Some(after.trim_start().strip_prefix(':')?.trim_start())
        };
        let dtype = value("descr")?.strip_prefix('\'')?.split_once('\'')?.0;
        let fortran = match value("fortran_order")? {
            rest if rest.starts_with("False") => false,
            rest if rest.starts_with("True") => true,
            _ => return None,
        };
        let shape = value("shape")?.strip_prefix('(')?.split_once(')')?.0;
        let sizes = shape.split(',').map(str::trim).filter(|s| !s.is_empty());
        let shape = sizes.map(|size| size.parse().ok()).collect::<Option<_>>()?;
        let plain = dtype.len() >= 3 && dtype.is_ascii();
        plain.then(|| Header {
            dtype: dtype.into(),
            fortran,
            shape,
        })
    }
}
