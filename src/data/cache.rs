//! Decoded pictures, kept in the user's cache folder under a key that changes with whatever they
//! were made of.
//!
//! A file is `wgrad pictures 1\n`, the length of the head (u64, little-endian), the head as JSON, the
//! images one after the other, and the SHA-256 of all that. A damaged one is as good as none.

use crate::files;
use crate::model::Shape;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{BufReader, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const MAGIC: &[u8; 17] = b"wgrad pictures 1\n";

/// Files that take more than this in all go, those first that were not used for the longest time.
pub(super) const LIMIT: u64 = 4 << 30;

/// What is known of the files that were looked at, beside their pixels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    pub key: String,
    /// Of each image.
    pub shape: Shape,
    pub images: usize,
    /// What is said about the shape.
    pub note: Option<String>,
    /// Files by number that gave no image, and why.
    pub left_out: Vec<(usize, LeftOut)>,
}

/// Why a file gave no image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum LeftOut {
    /// It is something else.
    NoPicture,
    /// It cannot be read, as its start tells.
    Unreadable(String),
    /// The system did not let it be read, which may be another time; never kept.
    Unread(String),
    /// It cannot be read, as was seen when a place had been given to it.
    Broken(String),
}

/// Where pictures with one key are kept.
pub(super) struct Cache {
    folder: PathBuf,
    file: PathBuf,
}

/// A cache file of which the head was read.
pub(super) struct Kept {
    pub head: Head,
    contents: BufReader<File>,
    hash: Sha256,
}

impl Cache {
    pub fn new(folder: &Path, key: &str) -> Cache {
        let folder = folder.join("pictures");
        Cache {
            file: folder.join(format!("{key}.bin")),
            folder,
        }
    }

    /// The pictures, if they are there.
    ///
    /// # Errors
    /// Why what is there cannot be used, in a few words.
    pub fn open(&self, key: &str) -> Result<Option<Kept>, String> {
        let words = |e: std::io::Error| e.to_string();
        let file = match File::open(&self.file) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(words(e)),
        };
        let size = file.metadata().map_err(words)?.len();
        let mut kept = Kept {
            head: Head {
                key: String::new(),
                shape: Shape::new(1, 1, 1),
                images: 0,
                note: None,
                left_out: Vec::new(),
            },
            contents: BufReader::with_capacity(1 << 20, file),
            hash: Sha256::new(),
        };
        let mut start = [0; MAGIC.len() + 8];
        kept.read(&mut start)?;
        let (magic, length) = start.split_at(MAGIC.len());
        let length = length.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
        if magic != MAGIC || length > size {
            return Err("it is something else".into());
        }
        let mut head = vec![0; length as usize];
        kept.read(&mut head)?;
        kept.head = serde_json::from_slice(&head).map_err(|e| e.to_string())?;
        let Head { shape, images, .. } = kept.head;
        let pixels = (images as u64).checked_mul(shape.elements() as u64);
        let expected = pixels.and_then(|n| n.checked_add(start.len() as u64 + length + 32));
        if kept.head.key != key || expected != Some(size) {
            return Err("it is damaged".into());
        }
        // This use counts, where it can be noted.
        let _ = File::options()
            .append(true)
            .open(&self.file)
            .and_then(|file| file.set_modified(SystemTime::now()));
        Ok(Some(kept))
    }

    /// Keeps pictures, and makes room for them.
    ///
    /// # Errors
    /// Why they could not be kept, in a few words.
    pub fn keep<'a>(
        &self,
        head: &Head,
        images: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<(), String> {
        fs::create_dir_all(&self.folder).map_err(|e| format!("{}: {e}", self.folder.display()))?;
        let text = serde_json::to_vec(head).map_err(|e| e.to_string())?;
        let length = (text.len() as u64).to_le_bytes();
        let written = files::replace_by(&self.file, |file| {
            let mut hash = Sha256::new();
            let mut add = |bytes: &[u8]| {
                hash.update(bytes);
                file.write_all(bytes)
            };
            [&MAGIC[..], &length, &text]
                .into_iter()
                .try_for_each(&mut add)?;
            images.into_iter().try_for_each(&mut add)?;
            file.write_all(&hash.finalize())
        });
        written.map_err(|e| e.to_string())?;
        prune(&self.folder, LIMIT);
        Ok(())
    }

    pub fn path(&self) -> &Path {
        &self.file
    }
}

impl Kept {
    /// Reads the images into their places, in order.
    ///
    /// # Errors
    /// Why they are not what was kept, in a few words; then the places hold anything.
    pub fn images<'a>(mut self, places: impl Iterator<Item = &'a mut [u8]>) -> Result<(), String> {
        for place in places {
            self.read(place)?;
        }
        let found = self.hash.clone().finalize();
        let mut expected = [0; 32];
        self.read(&mut expected)?;
        match found[..] == expected {
            true => Ok(()),
            false => Err("it is damaged".into()),
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        let read = self.contents.read_exact(bytes);
        read.map_err(|e| e.to_string())?;
        self.hash.update(&*bytes);
        Ok(())
    }
}

/// Removes what was not used for the longest time until `limit` bytes are left. What cannot be
/// removed stays.
fn prune(folder: &Path, limit: u64) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    let mut files: Vec<_> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let about = entry.metadata().ok().filter(fs::Metadata::is_file)?;
            Some((about.modified().ok()?, about.len(), entry.path()))
        })
        .collect();
    files.sort();
    let mut total: u64 = files.iter().map(|(_, size, _)| size).sum();
    for (_, size, path) in files {
        if total <= limit {
            break;
        }
        if fs::remove_file(path).is_ok() {
            total -= size;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_longest_unused_go_first() {
        let folder = tempfile::tempdir().unwrap();
        let names = ["b", "a", "d", "c"];
        for (age, name) in (1..).zip(names) {
            let path = folder.path().join(name);
            fs::write(&path, [0; 100]).unwrap();
            let file = File::options().append(true).open(path).unwrap();
            let time = SystemTime::now() - Duration::from_secs(1000 * age);
            file.set_modified(time).unwrap();
        }
        let left = || {
            let entries = fs::read_dir(folder.path()).unwrap();
            let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        prune(folder.path(), 400);
        assert_eq!(left().len(), 4);
        prune(folder.path(), 399);
        assert_eq!(left(), ["a", "b", "d"]);
        prune(folder.path(), 150);
        assert_eq!(left(), ["b"]);
        prune(&folder.path().join("nowhere"), 0);
    }

    #[test]
    fn what_is_kept_comes_back_or_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path(), "key");
        let head = Head {
            key: "key".into(),
            shape: Shape::new(1, 2, 1),
            images: 3,
            note: None,
            left_out: vec![(1, LeftOut::NoPicture)],
        };
        assert!(cache.open("key").unwrap().is_none());
        let images = [[1, 2], [3, 4], [5, 6]];
        let keep = || cache.keep(&head, images.iter().map(|i| &i[..])).unwrap();
        let read = |key: &str| {
            let kept = cache.open(key)?.expect("a file");
            assert_eq!(kept.head, head);
            let mut found = [[0; 2]; 3];
            kept.images(found.iter_mut().map(|i| &mut i[..]))?;
            Ok::<_, String>(found)
        };
        keep();
        assert_eq!(read("key"), Ok(images));
        assert!(read("another").is_err());
        let whole = fs::read(cache.path()).unwrap();
        for length in 0..whole.len() {
            fs::write(cache.path(), &whole[..length]).unwrap();
            assert!(cache.open("key").is_err(), "{length} bytes");
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 4;
            fs::write(cache.path(), &damaged).unwrap();
            let kept = cache.open("key").map(|kept| kept.expect("a file"));
            let mut found = [[0; 2]; 3];
            let places = found.iter_mut().map(|i| &mut i[..]);
            assert!(kept.and_then(|kept| kept.images(places)).is_err(), "{at}");
        }
        keep();
        assert_eq!(read("key"), Ok(images));
    }
}
