//! Encoded pictures: what they are, by their contents, and how they become images of one shape.
//!
//! Read are JPEG, PNG, WebP, BMP, TIFF and GIF (of several frames the first). A picture is turned as
//! its EXIF orientation says, laid on white where it is transparent, brought to 8 bits per channel,
//! scaled so that it just covers the wanted size (a triangle filter as wide as the scale asks for:
//! nothing aliases) and cropped in the middle. One that has the size already keeps its bytes.

use super::drawing::{self, Invert, Picture, Reading};
use crate::model::Shape;
use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::{U8, U8x3};
use fast_image_resize::{FilterType, PixelTrait, ResizeAlg, ResizeOptions, Resizer};
use image::metadata::Orientation;
use image::{
    DynamicImage, GrayImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage, guess_format,
};
use indicatif::BinaryBytes;
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Pictures that unpack to more are refused: a few bytes can promise any size.
const LARGEST: u64 = 512 << 20;

/// Of pictures that unpack to more, one is decoded at a time.
const LARGE: u64 = 64 << 20;
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// What the first bytes of a picture tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Height and width as it is looked at, turned.
    pub size: [usize; 2],
    pub grey: bool,
}

/// Whether these bytes start as pictures do that can be read.
pub(super) fn is_picture(start: &[u8]) -> bool {
    use ImageFormat::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
    guess_format(start).is_ok_and(|format| [Bmp, Gif, Jpeg, Png, Tiff, WebP].contains(&format))
}

/// The header of a picture, of which the start may do.
///
/// # Errors
/// What is wrong with it, in a few words.
pub(super) fn header(bytes: &[u8]) -> Result<Header, String> {
    guarded(|| {
        let mut decoder = decoder(bytes, LARGEST)?;
        let (width, height) = decoder.dimensions();
        let turned = is_turned(decoder.orientation().map_err(words)?);
        let (height, width) = if turned {
            (width, height)
        } else {
            (height, width)
        };
        Ok(Header {
            size: [height as usize, width as usize],
            grey: !decoder.color_type().has_color(),
        })
    })
}

/// Decodes a picture into `target`, `[H][W][C]` of `shape`, with 1 channel (grey) or 3 (red, green,
/// blue).
///
/// # Errors
/// What is wrong with it, in a few words; then `target` is as it was.
pub(super) fn decode(bytes: &[u8], shape: Shape, target: &mut [u8]) -> Result<(), String> {
    guarded(|| {
        let Opened {
            picture,
            orientation,
            ..
        } = open(bytes, shape, LARGEST)?;
        target.copy_from_slice(&brought_to(picture, orientation, shape)?);
        Ok(())
    })
}

/// As [`decode`], of a picture that a trained network is asked about.
///
/// # Errors
/// What is wrong with it, in a few words.
pub(super) fn read(bytes: &[u8], how: &Reading) -> Result<Picture, String> {
    guarded(|| {
        let Opened {
            picture,
            orientation,
            ..
        } = open(bytes, how.shape, how.most_bytes.min(LARGEST))?;
        match picture {
            DynamicImage::ImageLuma8(_) if how.draws() => {
                let mut picture = picture;
                picture.apply_orientation(orientation);
                drawing::read(picture.into_luma8(), how)
            }
            _ => {
                let mut pixels = brought_to(picture, orientation, how.shape)?;
                let inverted = how.invert == Invert::Always;
                if inverted {
                    pixels.iter_mut().for_each(|byte| *byte = 255 - *byte);
                }
                Ok(Picture {
                    pixels,
                    inverted,
                    centred: false,
                })
            }
        }
    })
}

/// A decoded picture, not yet turned.
struct Opened {
    /// Grey, or red, green, blue.
    picture: DynamicImage,
    orientation: Orientation,
    /// What keeps other large ones waiting.
    _turn: Option<MutexGuard<'static, ()>>,
}

/// Decodes a picture that unpacks to `most` bytes at most, for images of `shape`.
fn open(bytes: &[u8], shape: Shape, most: u64) -> Result<Opened, String> {
    let mut decoder = decoder(bytes, most)?;
    let large = decoder.total_bytes() > LARGE;
    let turn = large.then(|| ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner));
    let orientation = decoder.orientation().map_err(words)?;
    if guess_format(bytes).is_ok_and(|format| format == ImageFormat::Jpeg) && is_cut(bytes) {
        return Err("cut short".into());
    }
    Ok(Opened {
        picture: plain(DynamicImage::from_decoder(decoder).map_err(words)?, shape),
        orientation,
        _turn: turn,
    })
}

/// The bytes of an image of `shape`: the middle of a picture that is still to be turned.
pub(super) fn brought_to(
    picture: DynamicImage,
    orientation: Orientation,
    shape: Shape,
) -> Result<Vec<u8>, String> {
    let mut picture = cover(picture, orientation, shape)?;
    picture.apply_orientation(orientation);
    Ok(match shape.channels {
        1 => picture.into_luma8().into_raw(),
        _ => picture.into_rgb8().into_raw(),
    })
}

/// A decoder that has read the header of a picture which is not too large.
fn decoder(bytes: &[u8], most: u64) -> Result<impl ImageDecoder + '_, String> {
    let mut limits = Limits::default();
    limits.max_alloc = Some(most);
    let mut reader = ImageReader::new(Cursor::new(bytes));
    reader.limits(limits);
    let reader = reader.with_guessed_format().map_err(words)?;
    if reader.format().is_none() {
        return Err("not a picture of a known format".into());
    }
    let decoder = reader.into_decoder().map_err(words)?;
    let ((width, height), size) = (decoder.dimensions(), decoder.total_bytes());
    if size > most {
        return Err(format!(
            "{width}×{height} pixels, {}, more than the {} that are decoded",
            BinaryBytes(size),
            BinaryBytes(most)
        ));
    }
    if width == 0 || height == 0 {
        return Err("without a pixel".into());
    }
    Ok(decoder)
}

/// Whether a JPEG file ends within its pixels: from the back, their start comes before their end.
/// (The decoder would make up what is missing.)
fn is_cut(jpeg: &[u8]) -> bool {
    const END: [u8; 2] = [0xff, 0xd9];
    const START_OF_SCAN: [u8; 2] = [0xff, 0xda];
    let marker = jpeg
        .windows(2)
        .rev()
        .find(|w| *w == END || *w == START_OF_SCAN);
    marker.is_none_or(|marker| marker == START_OF_SCAN)
}

/// 8 bits per channel, without transparency: grey where it has no colour or none is wanted, else
/// red, green, blue.
fn plain(picture: DynamicImage, shape: Shape) -> DynamicImage {
    let (color, grey) = (picture.color(), shape.channels == 1);
    let on_white = |value: u8, alpha: u8| {
        let (value, alpha) = (u32::from(value), u32::from(alpha));
        ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    match (color.has_color() && !grey, color.has_alpha()) {
        (false, false) => picture.into_luma8().into(),
        (true, false) => picture.into_rgb8().into(),
        (false, true) => {
            let picture = picture.into_luma_alpha8();
            let pixels = picture.pixels().map(|p| on_white(p[0], p[1])).collect();
            GrayImage::from_raw(picture.width(), picture.height(), pixels)
                .unwrap_or_default()
                .into()
        }
        (true, true) => {
            let picture = picture.into_rgba8();
            let pixels = picture.pixels();
            let pixels = pixels.flat_map(|p| [0, 1, 2].map(|c| on_white(p[c], p[3])));
            let pixels = pixels.collect();
            RgbImage::from_raw(picture.width(), picture.height(), pixels)
                .unwrap_or_default()
                .into()
        }
    }
}

/// The middle of a picture that is still to be turned, scaled to the height and width of `shape`.
fn cover(
    picture: DynamicImage,
    orientation: Orientation,
    shape: Shape,
) -> Result<DynamicImage, String> {
    let [height, width] = match is_turned(orientation) {
        true => [shape.width, shape.height],
        false => [shape.height, shape.width],
    };
    let size = [picture.height() as usize, picture.width() as usize];
    if size == [height, width] {
        return Ok(picture);
    }
    let [from_height, from_width] = size.map(|n| n as f64);
    let scale = (height as f64 / from_height).max(width as f64 / from_width);
    let crop = [
        (width as f64 / scale).min(from_width),
        (height as f64 / scale).min(from_height),
    ];
    let crop = [
        (from_height - crop[1]) / 2.0,
        (from_width - crop[0]) / 2.0,
        crop[1],
        crop[0],
    ];
    scaled(&picture, crop, [height, width])
}

/// A part of a picture (top, left, height and width) scaled to a height and width.
pub(super) fn scaled(
    picture: &DynamicImage,
    [top, left, rows, columns]: [f64; 4],
    [height, width]: [usize; 2],
) -> Result<DynamicImage, String> {
    let options = ResizeOptions::new()
        .resize_alg(ResizeAlg::Convolution(FilterType::Bilinear))
        .crop(left, top, columns, rows);
    let (width, height) = (width as u32, height as u32);
    let scaled = match picture {
        DynamicImage::ImageLuma8(_) => {
            let pixels = scaled_pixels::<U8>(picture, &options, [height, width])?;
            GrayImage::from_raw(width, height, pixels).map(DynamicImage::from)
        }
        _ => {
            let pixels = scaled_pixels::<U8x3>(picture, &options, [height, width])?;
            RgbImage::from_raw(width, height, pixels).map(DynamicImage::from)
        }
    };
    scaled.ok_or_else(|| "not scaled".into())
}

/// The same for one type of pixels. Not `Resizer::resize`, which is compiled for all its 13 types: a fifth of all
/// code that a build of wgrad compiles.
fn scaled_pixels<P: PixelTrait>(
    picture: &DynamicImage,
    options: &ResizeOptions,
    [height, width]: [u32; 2],
) -> Result<Vec<u8>, String> {
    let (rows, columns) = (picture.height(), picture.width());
    let from = TypedImageRef::<P>::from_buffer(columns, rows, picture.as_bytes()).map_err(words)?;
    let mut pixels = vec![0; width as usize * height as usize * P::size()];
    let mut to = TypedImage::<P>::from_buffer(width, height, &mut pixels).map_err(words)?;
    Resizer::new()
        .resize_typed(&from, &mut to, options)
        .map_err(words)?;
    Ok(pixels)
}

/// Whether height and width change places.
fn is_turned(orientation: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    [Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH].contains(&orientation)
}

/// A decoder that panics on some bytes has failed on them, no more.
fn guarded<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err("the decoder gave up".into()))
}

/// An error in one line.
fn words(error: impl std::fmt::Display) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().trim().into()
}
