//! Pictures that a trained network is asked about. They are made into images as those of a dataset are;
//! but who draws a digit for a network that learned light ink on a dark ground, as MNIST has it, draws
//! dark ink on white paper, anywhere on it and at any size.
//!
//! **Which networks** learned from such drawings, the normalisation tells that they were trained with:
//! mean `m` and standard deviation `s` of the training images. If these were all black or of one
//! brightness, a share of `m² / (m² + s²)` of them would be bright. It is 0.15 for MNIST, 0.2 for letters
//! and characters of the same make, 0.4 for clothes (Fashion-MNIST) and 0.6 and more for photographs.
//! Below [`INK`], and with one channel, it is ink.
//!
//! **Which pictures** are dark on light: those whose border is brighter than the training images are on
//! average, and brighter than the picture is on average.
//!
//! **Centring** is what LeCun's page says of how MNIST was made: the ink's box is scaled so that its
//! longer side takes 20 of 28 pixels, the proportions kept, and is laid with its centre of mass in the
//! middle. A picture that has the network's size is taken to have been centred before.

use super::Normalization;
use super::picture::{self, brought_to, scaled};
use crate::model::Shape;
use image::metadata::Orientation;
use image::{DynamicImage, GrayImage};
use std::str::FromStr;

/// A network that learned from images with less bright than this learned from ink.
const INK: f64 = 0.3;

/// The share of the short side that a drawing's longer side takes, as in MNIST.
const FIELD: f64 = 20.0 / 28.0;

/// A picture with less between its ground and its brightest pixel has no ink on it.
const CONTRAST: u8 = 32;

/// Which pictures are turned into their negative.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Invert {
    /// Dark ink on light paper, where the network learned from light ink on a dark ground.
    #[default]
    Auto,
    /// Every picture.
    Always,
    /// None.
    Never,
}

/// `auto`, `always` or `never`.
impl FromStr for Invert {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Invert::Auto),
            "always" => Ok(Invert::Always),
            "never" => Ok(Invert::Never),
            _ => Err(format!("expected auto, always or never, found '{text}'")),
        }
    }
}

/// How pictures become what a network takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// Of the network's images.
    pub shape: Shape,
    /// Which are turned into their negative.
    pub invert: Invert,
    /// Whether drawings are centred.
    pub centre: bool,
    /// Pictures that unpack to more bytes are refused, and in any case those of more than 512 MiB.
    pub most_bytes: u64,
    /// The mean brightness of the training images where the network learned from light ink on a dark
    /// ground, 0 to 255.
    ink: Option<f64>,
}

/// An image made of a picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// `[H][W][C]`, one byte per element.
    pub pixels: Vec<u8>,
    /// Whether it is the picture's negative.
    pub inverted: bool,
    /// Whether the ink was cut out, scaled and centred.
    pub centred: bool,
}

impl Reading {
    /// What suits a network that takes images of `shape` and was trained with this normalisation: drawings
    /// are recognised and centred where it learned from light ink on a dark ground.
    pub fn new(shape: Shape, normalization: &Normalization) -> Reading {
        Reading {
            shape,
            invert: Invert::Auto,
            centre: true,
            most_bytes: u64::MAX,
            ink: ink(shape, normalization),
        }
    }

    /// Whether the network learned from light ink on a dark ground.
    pub fn draws(&self) -> bool {
        self.ink.is_some()
    }
}

/// The mean of the training images where they are light ink on a dark ground.
fn ink(shape: Shape, normalization: &Normalization) -> Option<f64> {
    let (1, [scale], [shift]) = (
        shape.channels,
        &normalization.scale[..],
        &normalization.shift[..],
    ) else {
        return None;
    };
    let (scale, shift) = (f64::from(*scale), f64::from(*shift));
    // x = byte·scale + shift has mean 0 and deviation 1.
    let (mean, deviation) = (-shift / scale, 1.0 / scale);
    let bright = mean.powi(2) / (mean.powi(2) + deviation.powi(2));
    (mean > 0.0 && bright < INK).then_some(mean)
}

/// Decodes a picture (JPEG, PNG, WebP, BMP, TIFF or GIF) into an image for a network.
///
/// # Errors
/// What is wrong with it, in a few words.
pub fn read_picture(bytes: &[u8], how: &Reading) -> std::result::Result<Picture, String> {
    picture::read(bytes, how)
}

/// A grey picture, turned as it is looked at, as an image for a network that learned from ink.
pub(super) fn read(mut picture: GrayImage, how: &Reading) -> std::result::Result<Picture, String> {
    let inverted = match how.invert {
        Invert::Auto => how.ink.is_some_and(|mean| is_negative(&picture, mean)),
        Invert::Always => true,
        Invert::Never => false,
    };
    if inverted {
        picture.iter_mut().for_each(|byte| *byte = 255 - *byte);
    }
    let Shape { height, width, .. } = how.shape;
    let own_size = [picture.height(), picture.width()] == [height as u32, width as u32];
    if how.centre && !own_size {
        let ground = median(&border(&picture));
        if let Some(pixels) = centred(&picture, ground, how.shape)? {
            return Ok(Picture {
                pixels,
                inverted,
                centred: true,
            });
        }
    }
    Ok(Picture {
        pixels: brought_to(picture.into(), Orientation::NoTransforms, how.shape)?,
        inverted,
        centred: false,
    })
}

/// Whether this is dark ink on light paper, for a network whose training images have this mean.
fn is_negative(picture: &GrayImage, training_mean: f64) -> bool {
    let mean = |bytes: &[u8]| {
        let sum: u64 = bytes.iter().map(|byte| u64::from(*byte)).sum();
        sum as f64 / bytes.len().max(1) as f64
    };
    let ground = mean(&border(picture));
    ground > training_mean && ground > mean(picture.as_raw())
}

/// The pixels along the edges, a sixteenth of the short side deep.
fn border(picture: &GrayImage) -> Vec<u8> {
    let [height, width] = [picture.height(), picture.width()].map(|n| n as usize);
    let depth = (height.min(width) / 16).max(1);
    let mut pixels = Vec::new();
    for (y, row) in picture.as_raw().chunks(width.max(1)).enumerate() {
        if y < depth || y + depth >= height || 2 * depth >= width {
            pixels.extend(row);
        } else {
            pixels.extend(&row[..depth]);
            pixels.extend(&row[width - depth..]);
        }
    }
    pixels
}

/// The value that half of them do not exceed.
fn median(bytes: &[u8]) -> u8 {
    let mut counts = [0usize; 256];
    bytes
        .iter()
        .for_each(|byte| counts[usize::from(*byte)] += 1);
    let mut below = 0;
    let at = counts.iter().position(|count| {
        below += count;
        2 * below >= bytes.len()
    });
    at.unwrap_or(0) as u8
}

/// Light ink on a `ground` of this brightness, cut out, scaled and laid with its centre of mass in the
/// middle of an image of `shape`; `None` where there is none.
fn centred(
    picture: &GrayImage,
    ground: u8,
    shape: Shape,
) -> std::result::Result<Option<Vec<u8>>, String> {
    let brightest = picture.iter().copied().max().unwrap_or(0);
    let contrast = brightest.saturating_sub(ground);
    if contrast < CONTRAST {
        return Ok(None);
    }
    // What is within a quarter of the ground is paper and its noise.
    let paper = f32::from(ground) + f32::from(contrast) / 4.0;
    let stretch = |byte: &u8| {
        let ink = (f32::from(*byte) - paper) / (f32::from(brightest) - paper);
        (255.0 * ink.clamp(0.0, 1.0)).round() as u8
    };
    let ink: Vec<u8> = picture.iter().map(stretch).collect();
    let columns = picture.width() as usize;
    let is_ink = |byte: &u8| *byte >= 64;
    let rows_with = |row: &[u8]| row.iter().any(is_ink);
    let top = ink.chunks(columns).position(rows_with).unwrap_or(0);
    let bottom = ink.chunks(columns).rposition(rows_with).unwrap_or(0);
    let (mut left, mut right) = (columns, 0);
    for row in ink.chunks(columns).filter(|row| rows_with(row)) {
        left = left.min(row.iter().position(is_ink).unwrap_or(columns));
        right = right.max(row.iter().rposition(is_ink).unwrap_or(0));
    }
    let size = [bottom + 1 - top, right + 1 - left].map(|n| n as f64);
    let field = FIELD * shape.height.min(shape.width) as f64;
    let scale = field / size[0].max(size[1]);
    let [height, width] = size.map(|n| (n * scale).round().max(1.0) as usize);
    let Some(ink) = GrayImage::from_raw(picture.width(), picture.height(), ink) else {
        return Ok(None);
    };
    let part = [top as f64, left as f64, size[0], size[1]];
    let small = scaled(&DynamicImage::from(ink), part, [height, width])?.into_luma8();
    // A thin line on a large sheet is faint when it is small.
    let brightest = f32::from(small.iter().copied().max().unwrap_or(0).max(1));
    let small: Vec<u8> = small
        .iter()
        .map(|byte| (f32::from(*byte) * 255.0 / brightest).round() as u8)
        .collect();
    let mass: f64 = small.iter().map(|byte| f64::from(*byte)).sum();
    let (mut y, mut x) = (0.0, 0.0);
    for (i, byte) in small.iter().enumerate() {
        y += f64::from(*byte) * ((i / width) as f64 + 0.5);
        x += f64::from(*byte) * ((i % width) as f64 + 0.5);
    }
    let offset = |side: usize, size: usize, centre: f64| {
        let at = (side as f64 / 2.0 - centre).round().max(0.0) as usize;
        at.min(side - size)
    };
    let top = offset(shape.height, height, y / mass);
    let left = offset(shape.width, width, x / mass);
    let mut pixels = vec![0; shape.elements()];
    for (row, from) in small.chunks(width).enumerate() {
        let at = (top + row) * shape.width + left;
        pixels[at..at + width].copy_from_slice(from);
    }
    Ok(Some(pixels))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Request, load};
    use std::io::Cursor;

    const DIGIT: Shape = Shape {
        height: 28,
        width: 28,
        channels: 1,
    };

    fn png(picture: GrayImage) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        picture
            .write_to(&mut bytes, image::ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    }

    /// By mean and standard deviation of the bytes.
    fn trained_with(moments: &[[f32; 2]]) -> Normalization {
        Normalization {
            scale: moments.iter().map(|[_, s]| 1.0 / s).collect(),
            shift: moments.iter().map(|[m, s]| -m / s).collect(),
        }
    }

    #[test]
    fn only_networks_that_learned_from_ink_are_drawn_for() {
        let draws = |channels, moments: &[[f32; 2]]| {
            Reading::new(Shape::new(28, 28, channels), &trained_with(moments)).draws()
        };
        // MNIST, EMNIST's balanced split, KMNIST.
        for ink in [[33.3, 78.6], [44.7, 85.0], [48.9, 88.8]] {
            assert!(draws(1, &[ink]), "{ink:?}");
        }
        // Fashion-MNIST, photographs, photographs at night, MNIST's negative, a constant.
        for other in [
            [72.9, 90.0],
            [120.0, 60.0],
            [30.0, 35.0],
            [221.7, 78.6],
            [0.0, 255.0],
        ] {
            assert!(!draws(1, &[other]), "{other:?}");
        }
        assert!(!draws(3, &[[33.3, 78.6]; 3]));
    }

    #[test]
    fn the_embedded_images_keep_their_bytes_and_their_negatives_are_recognised() {
        let splits = load("mnist", &Request::default(), &mut |_, _| {}).unwrap();
        let how = Reading::new(DIGIT, &Normalization::of(&splits.train));
        for digit in splits.test.images.chunks(28 * 28).take(2000) {
            let image = |bytes| GrayImage::from_raw(28, 28, bytes).unwrap();
            let same = read(image(digit.to_vec()), &how).unwrap();
            assert!(!same.inverted && !same.centred && same.pixels == digit);
            let negative = digit.iter().map(|byte| 255 - byte).collect();
            let same = read(image(negative), &how).unwrap();
            assert!(same.inverted && !same.centred && same.pixels == digit);
        }
    }

    #[test]
    fn ink_is_scaled_and_its_mass_is_centred() {
        let how = Reading::new(DIGIT, &trained_with(&[[33.3, 78.6]]));
        // A grey sheet with a dark block of 40×100 in a corner, and a darker half of it.
        let sheet = GrayImage::from_fn(300, 200, |x, y| {
            let ink = (20..60).contains(&x) && (10..110).contains(&y);
            image::Luma([match ink {
                true if y < 60 => 30,
                true => 80,
                false => 200 + (x % 3) as u8,
            }])
        });
        let Picture {
            pixels,
            inverted,
            centred,
        } = read_picture(&png(sheet), &how).unwrap();
        assert!(inverted && centred);
        let at = |y: usize, x: usize| pixels[y * 28 + x];
        let rows: Vec<usize> = (0..28).filter(|y| at(*y, 14) > 0).collect();
        let columns: Vec<usize> = (0..28).filter(|x| at(14, *x) > 0).collect();
        assert_eq!((rows.len(), columns.len()), (20, 8));
        assert_eq!(columns[0], 10, "{columns:?}");
        // The heavier half is above, so the box lies below the middle.
        assert_eq!(rows[0], 5, "{rows:?}");
        assert_eq!(pixels.iter().max(), Some(&255));
        let never = Reading {
            invert: Invert::Never,
            centre: false,
            ..how
        };
        let sheet = GrayImage::from_pixel(56, 56, image::Luma([200]));
        let plain = read_picture(&png(sheet.clone()), &never).unwrap();
        assert_eq!(plain.pixels, [200; 28 * 28]);
        // An empty sheet has nothing to be centred.
        let empty = read_picture(&png(sheet), &how).unwrap();
        assert!(!empty.centred && !empty.inverted);
    }

    #[test]
    fn a_limit_on_pixels_is_kept() {
        let how = Reading {
            most_bytes: 100 * 100,
            ..Reading::new(DIGIT, &trained_with(&[[120.0, 60.0]]))
        };
        let sheet = |side| png(GrayImage::new(side, 100));
        assert!(read_picture(&sheet(100), &how).is_ok());
        let why = read_picture(&sheet(101), &how).unwrap_err();
        assert!(why.contains("101×100 pixels"), "{why}");
    }
}
