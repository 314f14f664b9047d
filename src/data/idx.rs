//! The IDX format of MNIST: bytes `0, 0, element type, number of dimensions`, the sizes as
//! big-endian u32, then the elements with the last dimension running fastest.
//! (Described at the end of LeCun's MNIST page, <http://yann.lecun.com/exdb/mnist/>.)

use super::Splits;
use crate::error::{Error, Result};
use crate::host::available_memory;
use crate::model::Shape;
use flate2::bufread::MultiGzDecoder;
use indicatif::BinaryBytes;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

const UNSIGNED_BYTE: u8 = 0x08;
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// The images of one file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Images {
    /// `[N][H][W][C]`.
    pub bytes: Vec<u8>,
    /// Of an image.
    pub shape: Shape,
}

pub(super) fn load_folder(folder: &Path) -> Result<Splits> {
    let split = |names: &[&str]| {
        let images = find(folder, names, "images", &[3, 4])?;
        let labels = find(folder, names, "labels", &[1])?;
        read_pair(
            (&images, &mut open(&images)?),
            (&labels, &mut open(&labels)?),
        )
    };
    let train = split(&["train"])?;
    let test = split(&["t10k", "test"])?;
    let largest = train.1.iter().chain(&test.1).max();
    let classes = largest.map_or(2, |&label| usize::from(label) + 1).max(2);
    super::splits(&folder.display().to_string(), folder, classes, train, test)
}

/// The first file of the folder that has one of the spellings of its name.
fn find(folder: &Path, splits: &[&str], kind: &str, dimensions: &[u8]) -> Result<PathBuf> {
    let mut spellings = Vec::new();
    for split in splits {
        for dimension in dimensions {
            for separator in ["-", "."] {
                spellings.push(format!("{split}-{kind}{separator}idx{dimension}-ubyte"));
            }
        }
    }
    for spelling in &spellings {
        for ending in ["", ".gz"] {
            let path = folder.join(format!("{spelling}{ending}"));
            if path.is_file() {
                return Ok(path);
            }
        }
    }
    Err(Error::data(
        folder,
        format!(
            "expected a file named {}, gzipped (.gz) or not, found none; put it there or give another folder",
            spellings.join(" or ")
        ),
    ))
}

fn open(path: &Path) -> Result<BufReader<File>> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    Ok(BufReader::new(file))
}

/// Reads the images and the labels of one split, gzipped or not, from two files (path for errors,
/// and contents).
pub(super) fn read_pair(
    (image_path, image_file): (&Path, &mut dyn BufRead),
    (label_path, label_file): (&Path, &mut dyn BufRead),
) -> Result<(Images, Vec<u8>)> {
    let images = read_images(image_path, image_file)?;
    let labels = read_labels(label_path, label_file)?;
    let count = images.bytes.len() / images.shape.elements();
    if labels.len() != count {
        return Err(Error::data(
            label_path,
            format!(
                "expected a label for each of the {count} images of {}, found {} labels; use files of one dataset",
                image_path.display(),
                labels.len()
            ),
        ));
    }
    Ok((images, labels))
}

fn read_images(path: &Path, file: &mut dyn BufRead) -> Result<Images> {
    let (sizes, bytes) = read(path, file, &[3, 4])?;
    let size = |axis| sizes.get(axis).map_or(1, |&size: &u32| size as usize);
    Ok(Images {
        bytes,
        shape: Shape::new(size(1), size(2), size(3)),
    })
}

fn read_labels(path: &Path, file: &mut dyn BufRead) -> Result<Vec<u8>> {
    read(path, file, &[1]).map(|(_, bytes)| bytes)
}

pub(super) fn too_large(path: &Path, bytes: u64, available: u64) -> Error {
    Error::data(
        path,
        format!(
            "expected elements that fit into the free memory, {}, found {bytes} bytes; use fewer or smaller images, or a machine with more memory",
            BinaryBytes(available)
        ),
    )
}

/// Sizes and elements of a file of bytes with one of the given numbers of dimensions. No more is
/// held in memory than the file turns out to have and the machine has free, and no more is unpacked
/// than its header promises.
fn read(path: &Path, file: &mut dyn BufRead, dimensions: &[u8]) -> Result<(Vec<u32>, Vec<u8>)> {
    read_within(path, file, dimensions, available_memory())
}

fn read_within(
    path: &Path,
    file: &mut dyn BufRead,
    dimensions: &[u8],
    available: u64,
) -> Result<(Vec<u32>, Vec<u8>)> {
    let error = |what: String| Err(Error::data(path, what));
    let start = file.fill_buf().map_err(|e| Error::io("read", path, e))?;
    let gzipped = start.starts_with(&GZIP_MAGIC);
    let mut contents: Box<dyn Read> = if gzipped {
        Box::new(MultiGzDecoder::new(file))
    } else {
        Box::new(file)
    };
    let mut take = |limit: u64| {
        let mut bytes = Vec::new();
        // In one piece: growing would take twice as much for a moment.
        let room = bytes.try_reserve_exact(limit as usize);
        let room = room.map_err(|_| ErrorKind::OutOfMemory.into());
        match room.and_then(|()| (&mut contents).take(limit).read_to_end(&mut bytes)) {
            Err(e) if e.kind() == ErrorKind::OutOfMemory => Err(too_large(path, limit, available)),
            Ok(_) => Ok(bytes),
            Err(e) if gzipped && e.raw_os_error().is_none() => Err(Error::data(
                path,
                format!("expected an intact gzip file, found a damaged one ({e}); fetch it again"),
            )),
            Err(e) => Err(Error::io("read", path, e)),
        }
    };

    let magic = take(4)?;
    let expected = || {
        let words = dimensions
            .iter()
            .map(|d| format!("0000{UNSIGNED_BYTE:02x}{d:02x}"));
        words.collect::<Vec<_>>().join(" or ")
    };
    let count = match magic[..] {
        [0, 0, UNSIGNED_BYTE, count] if dimensions.contains(&count) => count,
        _ => {
            let found: String = magic.iter().map(|byte| format!("{byte:02x}")).collect();
            return error(format!(
                "expected an IDX file of bytes that starts with {}, found {}; check that this is the right file",
                expected(),
                if found.is_empty() { "nothing" } else { &found }
            ));
        }
    };
    let header = take(4 * u64::from(count))?;
    if header.len() < 4 * usize::from(count) {
        return error(format!(
            "expected a header of {} bytes, found only {}; the file is cut short, fetch it again",
            4 + 4 * usize::from(count),
            4 + header.len()
        ));
    }
    let (words, _) = header.as_chunks::<4>();
    let sizes: Vec<u32> = words.iter().map(|word| u32::from_be_bytes(*word)).collect();
    let shape = sizes
        .iter()
        .map(u32::to_string)
        .collect::<Vec<_>>()
        .join("×");
    if sizes.contains(&0) {
        return error(format!(
            "expected at least one element along each dimension, found {shape}; give a dataset that is not empty"
        ));
    }
    let promised = sizes
        .iter()
        .try_fold(1u64, |product, &size| product.checked_mul(size.into()))
        .filter(|&product| product < u64::MAX);
    let Some(promised) = promised else {
        return error(format!(
            "expected sizes that a file can hold, found {shape}; the header is damaged, fetch the file again"
        ));
    };
    // A header may promise what is not there; a look at the start tells.
    let limit = match promised > available {
        true => available.min(1 << 20),
        false => promised + 1,
    };
    let bytes = take(limit)?;
    if promised > available && bytes.len() as u64 == limit {
        return Err(too_large(path, promised, available));
    }
    match (bytes.len() as u64).cmp(&promised) {
        std::cmp::Ordering::Less => error(format!(
            "expected {promised} bytes after the header ({shape}), found {}; the file is cut short, fetch it again",
            bytes.len()
        )),
        std::cmp::Ordering::Greater => error(format!(
            "expected {promised} bytes after the header ({shape}), found more; the file is not what its header says, fetch it again"
        )),
        std::cmp::Ordering::Equal => Ok((sizes, bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    #[test]
    fn a_lack_of_memory_is_not_called_damage() {
        let plain = [&[0, 0, 8, 1, 0, 0, 16, 0][..], &[7; 4096]].concat();
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(&plain).unwrap();
        let gzip = gzip.finish().unwrap();
        for file in [plain, gzip] {
            let read = |available| read_within(Path::new("a"), &mut &file[..], &[1], available);
            assert_eq!(read(4096).unwrap().1, [7; 4096]);
            let message = read(4000).unwrap_err().to_string();
            assert!(message.contains("free memory, 3.91 KiB"), "{message}");
            assert!(message.contains("found 4096 bytes"), "{message}");
            assert!(!message.contains("damaged"), "{message}");
        }
    }
}
