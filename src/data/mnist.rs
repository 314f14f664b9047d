//! MNIST, embedded so that an installed `wgrad` trains from any folder and without a network.
//! Licence, source and checksums: `data/README.md`.

use super::{Splits, idx};
use crate::error::{Error, Result};
use md5::{Digest, Md5};
use ruzstd::decoding::StreamingDecoder;
use std::io::Read;
use std::path::Path;

/// An embedded file: where it lies in the source tree, its contents, and the MD5 that is published
/// for the unpacked file.
struct Embedded {
    path: &'static str,
    zstd: &'static [u8],
    md5: &'static str,
}

macro_rules! embedded {
    ($file:literal, $md5:literal) => {
        Embedded {
            path: concat!("data/mnist/", $file),
            zstd: include_bytes!(concat!("../../data/mnist/", $file)),
            md5: $md5,
        }
    };
}

static TRAIN: [Embedded; 2] = [
    embedded!(
        "train-images-idx3-ubyte.zst",
        "6bbc9ace898e44ae57da46a324031adb"
    ),
    embedded!(
        "train-labels-idx1-ubyte.zst",
        "a25bea736e30d166cdddb491f175f624"
    ),
];
static TEST: [Embedded; 2] = [
    embedded!(
        "t10k-images-idx3-ubyte.zst",
        "2646ac647ad5339dbf082846283269ea"
    ),
    embedded!(
        "t10k-labels-idx1-ubyte.zst",
        "27ae3e4e09519cfbb04c329615203637"
    ),
];

pub(super) fn load() -> Result<Splits> {
    let split = |[images, labels]: &[Embedded; 2]| {
        idx::read_pair(
            (Path::new(images.path), &mut &images.unpack()?[..]),
            (Path::new(labels.path), &mut &labels.unpack()?[..]),
        )
    };
    let classes = 10;
    super::splits(
        "mnist",
        Path::new("data/mnist"),
        classes,
        split(&TRAIN)?,
        split(&TEST)?,
    )
}

impl Embedded {
    fn unpack(&self) -> Result<Vec<u8>> {
        let error = |found: String| {
            Error::data(
                Path::new(self.path),
                format!(
                    "expected the published MNIST file (MD5 {}), found {found}; build wgrad from an intact checkout",
                    self.md5
                ),
            )
        };
        let damaged = |e: &dyn std::fmt::Display| error(format!("a damaged zstd file ({e})"));
        let mut bytes = Vec::new();
        StreamingDecoder::new(self.zstd)
            .map_err(|e| damaged(&e))?
            .read_to_end(&mut bytes)
            .map_err(|e| damaged(&e))?;
        let md5: String = Md5::digest(&bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        if md5 != self.md5 {
            return Err(error(md5));
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_other_than_the_published_one_is_refused() {
        let swapped = Embedded {
            zstd: TRAIN[1].zstd,
            ..TEST[1]
        };
        let error = swapped.unpack().unwrap_err().to_string();
        assert!(error.contains(TEST[1].md5), "{error}");
        assert!(
            error.contains(&format!("found {}", TRAIN[1].md5)),
            "{error}"
        );

        for length in [0, 2, 1000] {
            let damaged = Embedded {
                zstd: &TEST[1].zstd[..length],
                ..TEST[1]
            };
            let error = damaged.unpack().unwrap_err().to_string();
            assert!(error.contains("damaged zstd"), "{error}");
        }
        assert_eq!(TEST[1].unpack().unwrap().len(), 10_008);
    }
}
