//! A dataset and a model that are small enough to train in a blink.

#![allow(dead_code)] // Each test crate uses a part.

use std::fs;
use std::path::Path;

pub const TRAIN_IMAGES: usize = 96;
pub const TEST_IMAGES: usize = 40;

/// Convolution, pooling, dense: 8×6 images in as many classes as the dataset has.
pub const MODEL: &str = r#"name = "small"
input = [8, 6, 1]
classes = 4
loss = "softmax_cross_entropy"

[recipe]
optimizer = "adamw"
lr = 0.01
schedule = "constant"
epochs = 3
batch_size = 20

[[layer]]
type = "conv2d"
out_channels = 4
kernel = 3
padding = 1
activation = "relu"

[[layer]]
type = "max_pool2d"
kernel = 2

[[layer]]
type = "dense"
units = "classes"
"#;

/// An IDX file of bytes.
pub fn idx(sizes: &[u32], bytes: &[u8]) -> Vec<u8> {
    let mut file = vec![0, 0, 8, sizes.len() as u8];
    for size in sizes {
        file.extend(size.to_be_bytes());
    }
    file.extend(bytes);
    file
}

/// `count` images of 8×6 in four classes: noise, and where the class says a bright bar (rows 1 and
/// 2, rows 5 and 6, columns 0 and 1, columns 4 and 5).
pub fn images(count: usize, seed: u32) -> (Vec<u8>, Vec<u8>) {
    let mut state = seed;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8 / 3
    };
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for i in 0..count {
        let class = i % 4;
        for row in 0..8 {
            for column in 0..6 {
                let bright = match class {
                    0 => (1..3).contains(&row),
                    1 => (5..7).contains(&row),
                    2 => column < 2,
                    _ => column >= 4,
                };
                pixels.push(noise() + if bright { 120 } else { 0 });
            }
        }
        labels.push(class as u8);
    }
    (pixels, labels)
}

/// Writes the model as `small.toml` and the dataset as folder `shapes` into `folder`.
pub fn write_model_and_data(folder: &Path) {
    fs::write(folder.join("small.toml"), MODEL).unwrap();
    let data = folder.join("shapes");
    fs::create_dir(&data).unwrap();
    for (split, count, seed) in [("train", TRAIN_IMAGES, 1), ("t10k", TEST_IMAGES, 2)] {
        let (pixels, labels) = images(count, seed);
        let n = count as u32;
        let write = |name: String, bytes| fs::write(data.join(name), bytes).unwrap();
        write(
            format!("{split}-images-idx3-ubyte"),
            idx(&[n, 8, 6], &pixels),
        );
        write(format!("{split}-labels-idx1-ubyte"), idx(&[n], &labels));
    }
}

/// Names and contents of all files of a folder, not those of folders in it.
pub fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().path().is_file())
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}
