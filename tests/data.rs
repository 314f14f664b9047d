//! Datasets: the embedded MNIST, folders of IDX files, and every way in which one can be broken.

use flate2::{Compression, write::GzEncoder};
use std::fs;
use std::io::Write;
use std::path::Path;
use tempfile::TempDir;
use wgrad::data::{self, Dataset, Normalization, Request};
use wgrad::error::Error;
use wgrad::model::Shape;

fn idx(sizes: &[u32], elements: &[u8]) -> Vec<u8> {
    let mut file = vec![0, 0, 8, sizes.len() as u8];
    file.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
    file.extend(elements);
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

const TRAIN_IMAGES: &str = "train-images-idx3-ubyte";
const TRAIN_LABELS: &str = "train-labels-idx1-ubyte";
const TEST_IMAGES: &str = "t10k-images-idx3-ubyte";
const TEST_LABELS: &str = "t10k-labels-idx1-ubyte";

/// A folder with three training images and one test image of 2×3 pixels.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let elements: Vec<u8> = (0..18).collect();
    put(&folder, TRAIN_IMAGES, &idx(&[3, 2, 3], &elements));
    put(&folder, TRAIN_LABELS, &idx(&[3], &[0, 4, 1]));
    put(&folder, TEST_IMAGES, &idx(&[1, 2, 3], &elements[1..7]));
    put(&folder, TEST_LABELS, &idx(&[1], &[2]));
    folder
}

fn put(folder: &TempDir, name: &str, bytes: &[u8]) {
    fs::write(folder.path().join(name), bytes).unwrap();
}

fn load(folder: &TempDir) -> wgrad::error::Result<data::Splits> {
    data::load(
        folder.path().to_str().unwrap(),
        &Request::default(),
        &mut |_, _| (),
    )
}

/// Asserts that loading fails with a one-line data error about `path` that holds all `words`.
fn assert_refused(folder: &TempDir, path: &Path, words: &[&str]) {
    match load(folder) {
        Err(Error::Data { path: found, what }) => {
            assert_eq!(found, path, "{what}");
            assert!(!what.contains('\n'), "{what}");
            for word in words {
                assert!(what.contains(word), "expected {word:?} in: {what}");
            }
        }
        other => panic!("expected {words:?}, found {other:?}"),
    }
}

#[test]
fn mnist_is_embedded_and_normalized() {
    let mnist = data::load("mnist", &Request::default(), &mut |_, _| ()).unwrap();
    assert_eq!(mnist.name, "mnist");
    for (split, n) in [(&mnist.train, 60_000), (&mnist.test, 10_000)] {
        assert_eq!(split.len(), n);
        assert_eq!(split.images.len(), n * 28 * 28);
        assert_eq!(split.shape, Shape::new(28, 28, 1));
        assert_eq!((split.classes, split.class_names.len()), (10, 10));
    }
    assert_eq!(mnist.train.labels[..5], [5, 0, 4, 1, 9]);
    assert_eq!(mnist.test.labels[..5], [7, 2, 1, 0, 4]);
    // Images per class, as counted on every page about MNIST.
    let count = |class| mnist.train.labels.iter().filter(|&&l| l == class).count();
    assert_eq!((count(0), count(1), count(5)), (5_923, 6_742, 5_421));

    // The well-known mean 0.1307 and deviation 0.3081 of pixels between 0 and 1.
    let Normalization { scale, shift } = Normalization::of(&mnist.train);
    assert_eq!((scale.len(), shift.len()), (1, 1));
    assert!((scale[0] * 255.0 - 1.0 / 0.3081).abs() < 1e-3, "{scale:?}");
    assert!((shift[0] + 0.1307 / 0.3081).abs() < 1e-3, "{shift:?}");
}

#[test]
fn a_folder_of_plain_files() {
    let folder = folder();
    let splits = load(&folder).unwrap();
    assert_eq!(splits.name, folder.path().to_str().unwrap());
    assert_eq!(splits.train.images, (0..18).collect::<Vec<u8>>());
    assert_eq!(splits.train.labels, [0, 4, 1]);
    assert_eq!(splits.test.images, [1, 2, 3, 4, 5, 6]);
    assert_eq!(splits.test.labels, [2]);
    for split in [&splits.train, &splits.test] {
        assert_eq!(split.shape, Shape::new(2, 3, 1));
        assert_eq!(split.classes, 5);
        assert_eq!(split.class_names, ["0", "1", "2", "3", "4"]);
    }
}

#[test]
fn other_spellings_gzip_and_channels() {
    let plain = tempfile::tempdir().unwrap();
    let elements: Vec<u8> = (0..24).collect();
    let images = idx(&[2, 2, 3, 2], &elements);
    put(&plain, "train-images.idx4-ubyte.gz", &gzip(&images));
    put(&plain, "train-labels.idx1-ubyte", &idx(&[2], &[0, 0]));
    put(&plain, "test-images-idx4-ubyte", &images);
    put(
        &plain,
        "test-labels-idx1-ubyte.gz",
        &gzip(&idx(&[2], &[0, 0])),
    );
    let splits = load(&plain).unwrap();
    assert_eq!(splits.train.images, elements);
    assert_eq!(splits.train, splits.test);
    assert_eq!(splits.train.shape, Shape::new(2, 3, 2));
    assert_eq!(splits.train.classes, 2, "never fewer than two classes");
}

#[test]
fn the_largest_label_of_either_split_counts() {
    let folder = folder();
    put(&folder, TEST_LABELS, &idx(&[1], &[255]));
    assert_eq!(load(&folder).unwrap().train.classes, 256);
}

#[test]
fn a_label_that_invents_classes_is_noted() {
    let folder = folder();
    // Labels 0, 4, 1: the test image of class 2 has no training image, nor has 3.
    let note = load(&folder).unwrap().notes.remove(0);
    for word in ["warning", "classes 2, 3 of 5", "largest label, 4"] {
        assert!(note.contains(word), "no {word:?} in {note}");
    }
    put(&folder, TRAIN_LABELS, &idx(&[3], &[0, 255, 2]));
    let note = load(&folder).unwrap().notes.remove(0);
    assert!(note.contains("classes 1, 3–254 of 256"), "{note}");
    put(&folder, TRAIN_LABELS, &idx(&[3], &[0, 1, 2]));
    assert_eq!(load(&folder).unwrap().notes, Vec::<String>::new());
    let mnist = data::load("mnist", &Request::default(), &mut |_, _| ()).unwrap();
    assert_eq!(mnist.notes, Vec::<String>::new());
}

#[test]
fn truncating_keeps_the_first_images() {
    let mut train = load(&folder()).unwrap().train;
    train.truncate(4).unwrap();
    assert_eq!(train.len(), 3);
    train.truncate(2).unwrap();
    assert_eq!(train.labels, [0, 4]);
    assert_eq!(train.images, (0..12).collect::<Vec<u8>>());
    assert_eq!(train.classes, 5);
    let error = train.truncate(0).unwrap_err();
    assert!(matches!(error, Error::Usage(_)), "{error}");
    assert_eq!(train.len(), 2);
}

#[test]
fn normalization_is_per_channel_and_finite() {
    // Channels: 0, 2, 4, 6 (mean 3, variance 5); constant 7; 0, 0, 0, 255.
    let dataset = Dataset {
        images: vec![0, 7, 0, 2, 7, 0, 4, 7, 0, 6, 7, 255],
        labels: vec![0, 1],
        shape: Shape::new(2, 1, 3),
        classes: 2,
        class_names: vec!["0".into(), "1".into()],
        files: Vec::new(),
    };
    let normalization = Normalization::of(&dataset);
    let root = 5f64.sqrt();
    let third = 255.0 * 3f64.sqrt() / 4.0;
    let scale = [1.0 / root, 1.0 / 255.0, 1.0 / third];
    let shift = [-3.0 / root, -7.0 / 255.0, -63.75 / third];
    assert_eq!(normalization.scale, scale.map(|x| x as f32));
    assert_eq!(normalization.shift, shift.map(|x| x as f32));

    let json = serde_json::to_string(&normalization).unwrap();
    let back: Normalization = serde_json::from_str(&json).unwrap();
    assert_eq!(back, normalization);
}

#[test]
fn broken_files_are_refused() {
    let elements: Vec<u8> = (0..18).collect();
    let good = idx(&[3, 2, 3], &elements);
    let with = |at: usize, byte: u8| {
        let mut file = good.clone();
        file[at] = byte;
        file
    };
    let mut flipped = gzip(&good);
    let crc = flipped.len() - 8;
    flipped[crc] ^= 1;
    let mut trailing = gzip(&good);
    trailing.push(0);
    let longer = idx(&[3, 2, 3], &(0..19).collect::<Vec<u8>>());
    let cases: &[(Vec<u8>, &[&str])] = &[
        (
            vec![],
            &["starts with 00000803 or 00000804", "found nothing"],
        ),
        (vec![0, 0, 8], &["found 000008"]),
        (with(0, 1), &["found 01000803"]),
        (with(2, 0x0d), &["found 00000d03"]),
        (with(3, 1), &["found 00000801"]),
        (good[..15].to_vec(), &["header of 16 bytes", "15"]),
        (
            good[..20].to_vec(),
            &["18 bytes", "3×2×3", "found 4", "cut short"],
        ),
        (longer.clone(), &["18 bytes", "found more"]),
        (gzip(&longer), &["18 bytes", "found more"]),
        (gzip(&good[..20]), &["18 bytes", "found 4"]),
        (flipped, &["damaged"]),
        (gzip(&good)[..25].to_vec(), &["damaged"]),
        (trailing, &["damaged"]),
        (idx(&[0, 2, 3], &[]), &["0×2×3", "not empty"]),
        (idx(&[3, 0, 3], &[]), &["3×0×3"]),
        (idx(&[u32::MAX; 3], &elements), &["4294967295×4294967295"]),
        (idx(&[u32::MAX; 4], &elements), &["4294967295×4294967295"]),
        (
            idx(&[1 << 31, 1 << 20, 1], &elements),
            &["2251799813685248 bytes", "found 18"],
        ),
        (
            gzip(&idx(&[1 << 31, 1 << 20, 1], &elements)),
            &["2251799813685248 bytes"],
        ),
    ];
    for (bytes, words) in cases {
        let folder = folder();
        put(&folder, TRAIN_IMAGES, bytes);
        assert_refused(&folder, &folder.path().join(TRAIN_IMAGES), words);
    }
}

#[test]
fn files_that_do_not_fit_each_other_are_refused() {
    let folder1 = folder();
    put(&folder1, TEST_LABELS, &idx(&[2], &[1, 1]));
    let path = folder1.path().join(TEST_LABELS);
    assert_refused(&folder1, &path, &["1 images", TEST_IMAGES, "2 labels"]);

    let folder2 = folder();
    put(&folder2, TEST_IMAGES, &idx(&[1, 3, 2], &[0; 6]));
    assert_refused(&folder2, folder2.path(), &["2×3×1", "3×2×1"]);

    let folder3 = folder();
    put(&folder3, TEST_IMAGES, &idx(&[1, 2, 3, 3], &[0; 18]));
    assert_refused(&folder3, folder3.path(), &["2×3×1", "2×3×3"]);

    let folder4 = folder();
    fs::copy(
        folder4.path().join(TEST_LABELS),
        folder4.path().join(TEST_IMAGES),
    )
    .unwrap();
    let path = folder4.path().join(TEST_IMAGES);
    assert_refused(&folder4, &path, &["found 00000801"]);
}

#[test]
fn what_is_missing_is_named() {
    for (name, words) in [
        (TRAIN_IMAGES, [TRAIN_IMAGES, "train-images.idx4-ubyte"]),
        (TRAIN_LABELS, [TRAIN_LABELS, "train-labels.idx1-ubyte"]),
        (TEST_LABELS, [TEST_LABELS, "test-labels.idx1-ubyte"]),
    ] {
        let folder = folder();
        fs::remove_file(folder.path().join(name)).unwrap();
        assert_refused(&folder, folder.path(), &words);
    }

    let folder = folder();
    let file = folder.path().join(TRAIN_IMAGES);
    let nowhere = folder.path().join("nowhere");
    for (path, word) in [(file, "found a file"), (nowhere, "no such folder")] {
        let error =
            data::load(path.to_str().unwrap(), &Request::default(), &mut |_, _| ()).unwrap_err();
        assert!(matches!(error, Error::Data { .. }), "{error}");
        let error = error.to_string();
        assert!(
            error.contains("\"mnist\"") && error.contains(word),
            "{error}"
        );
    }
}

/// Whatever the bytes, loading returns; what it accepts is consistent.
#[test]
fn no_prefix_and_no_flipped_bits_bring_it_down() {
    let folder = folder();
    let check = |name: &str, bytes: &[u8]| {
        put(&folder, name, bytes);
        match load(&folder) {
            Ok(splits) => {
                for split in [&splits.train, &splits.test] {
                    let elements = split.len() * split.shape.elements();
                    assert_eq!(split.images.len(), elements);
                    assert!(split.labels.iter().all(|&l| (l as usize) < split.classes));
                }
                true
            }
            Err(error) => {
                assert!(!error.to_string().contains('\n'), "{error}");
                false
            }
        }
    };
    // A small generator (xorshift) keeps the cases the same from run to run.
    let mut state = 0x2545_f491_u32;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as usize % below
    };
    for name in [TRAIN_IMAGES, TRAIN_LABELS] {
        let plain = fs::read(folder.path().join(name)).unwrap();
        for original in [gzip(&plain), plain] {
            for length in 0..original.len() {
                assert!(!check(name, &original[..length]), "{name}: {length}");
            }
            let mut refused = 0;
            for _ in 0..300 {
                let mut bytes = original.clone();
                for _ in 0..=random(3) {
                    let at = random(bytes.len());
                    bytes[at] ^= 1 << random(8);
                }
                refused += usize::from(!check(name, &bytes));
            }
            assert!(refused > 50, "{name}: only {refused} refused");
            assert!(check(name, &original));
        }
    }
}
