//! Contact sheets: many small pictures with a caption each, as one PNG to look at.

use crate::error::{Error, Result};
use crate::model::Shape;
use embedded_graphics::mono_font::{MonoFont, MonoTextStyle};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::*;
use embedded_graphics::text::{Baseline, Text};
use embedded_graphics_unicodefonts::{MONO_7X14, MONO_9X18_BOLD};
use image::imageops::{FilterType, replace, resize, thumbnail};
use image::{DynamicImage, GrayImage, ImageFormat, Rgb, RgbImage};
use std::convert::Infallible;
use std::io::Cursor;

/// One picture of a sheet.
#[derive(Clone, Debug)]
pub struct Tile<'a> {
    /// `[H][W][C]`, one or three channels.
    pub pixels: &'a [u8],
    /// Of the picture.
    pub shape: Shape,
    /// A line under the picture, or up to three; one that is too long ends in an ellipsis.
    pub caption: String,
}

/// Pixels that the longer side of a picture has on the sheet, or nearly so.
const SIDE: usize = 128;
/// No caption gets less room than this, however narrow the pictures.
const NARROWEST: u32 = 84;
/// Of a caption at most.
const LINES: usize = 3;
const MARGIN: u32 = 16;
const GAP: u32 = 12;
const TITLE: MonoFont = MONO_9X18_BOLD;
const CAPTION: MonoFont = MONO_7X14;
/// Sheets larger than this (pixels) are for nobody to look at.
const LARGEST: u64 = 1 << 28;

/// Red, green and blue of the background: for a tile where there is nothing to show.
pub const BLANK: [u8; 3] = [248, 248, 246];
const PAPER: Rgb<u8> = Rgb(BLANK);
const FRAME: Rgb<u8> = Rgb([205, 205, 200]);
const INK: Rgb888 = Rgb888::new(32, 32, 36);
const FAINT: Rgb888 = Rgb888::new(64, 64, 70);

/// Draws `tiles`, `columns` in a row, under a title, and returns the bytes of a PNG file. Small pictures
/// are enlarged by a whole factor (every pixel stays a square), large ones are shrunk.
///
/// # Errors
/// [`Error::Shape`] for a tile whose pixels do not fit its shape or that has neither one nor three
/// channels, for no tiles or columns at all, and for more of them than a picture can hold.
pub fn contact_sheet(title: &str, columns: usize, tiles: &[Tile]) -> Result<Vec<u8>> {
    if tiles.is_empty() || columns == 0 {
        return Err(shape(format!(
            "expected at least one picture and one column, found {} and {columns}",
            tiles.len()
        )));
    }
    let sizes: Vec<(u32, u32)> = tiles.iter().map(drawn_size).collect::<Result<_>>()?;
    let columns = columns.min(tiles.len());
    let width = sizes.iter().map(|size| size.0).max().unwrap_or(0);
    let height = sizes.iter().map(|size| size.1).max().unwrap_or(0);
    // A frame of one pixel goes around each picture.
    let lines = tiles.iter().map(|tile| tile.caption.lines().count());
    let lines = lines.max().unwrap_or(0).clamp(1, LINES) as u32;
    let cell = [
        (width + 2).max(NARROWEST),
        height + 2 + 4 + lines * CAPTION.character_size.height,
    ];
    let rows = tiles.len().div_ceil(columns);
    let top = MARGIN + TITLE.character_size.height + GAP;
    let along = |cells: usize, size: u32| cells as u64 * u64::from(size + GAP) - u64::from(GAP);
    let wide = along(columns, cell[0])
        .max((text_width(&TITLE, title)).min(640))
        .saturating_add(2 * u64::from(MARGIN));
    let high = along(rows, cell[1]).saturating_add(u64::from(top + MARGIN));
    if wide.saturating_mul(high) > LARGEST {
        return Err(shape(format!(
            "expected a sheet of at most {LARGEST} pixels, found {wide}×{high} for {} pictures; take fewer",
            tiles.len()
        )));
    }

    let mut canvas = Canvas(RgbImage::from_pixel(wide as u32, high as u32, PAPER));
    let room = wide as u32 - 2 * MARGIN;
    canvas.write(&TITLE, INK, title, [MARGIN, MARGIN], room);
    for (i, (tile, size)) in tiles.iter().zip(&sizes).enumerate() {
        let x = MARGIN + (i % columns) as u32 * (cell[0] + GAP);
        let y = top + (i / columns) as u32 * (cell[1] + GAP);
        let frame = RgbImage::from_pixel(size.0 + 2, size.1 + 2, FRAME);
        replace(&mut canvas.0, &frame, x.into(), y.into());
        let picture = picture(tile, *size)?;
        replace(&mut canvas.0, &picture, (x + 1).into(), (y + 1).into());
        for (i, line) in (0..lines).zip(tile.caption.lines()) {
            let below = y + height + 2 + 4 + i * CAPTION.character_size.height;
            canvas.write(&CAPTION, FAINT, line, [x, below], cell[0]);
        }
    }

    let mut png = Cursor::new(Vec::new());
    DynamicImage::from(canvas.0)
        .write_to(&mut png, ImageFormat::Png)
        .map_err(|e| shape(format!("expected a sheet that a PNG can hold, found {e}")))?;
    Ok(png.into_inner())
}

fn shape(what: String) -> Error {
    Error::Shape {
        operation: "contact_sheet",
        what,
    }
}

/// Width and height of a tile on the sheet, without its frame.
fn drawn_size(tile: &Tile) -> Result<(u32, u32)> {
    let Shape {
        height,
        width,
        channels,
    } = tile.shape;
    let positions = height.checked_mul(width);
    let elements = positions.and_then(|n| n.checked_mul(channels));
    if elements != Some(tile.pixels.len()) || elements == Some(0) || ![1, 3].contains(&channels) {
        return Err(shape(format!(
            "expected pixels of height × width × 1 or 3 channels, found {} for {}",
            tile.pixels.len(),
            tile.shape
        )));
    }
    let longer = height.max(width);
    let drawn = |side: usize| match SIDE / longer {
        0 => (side * SIDE / longer).max(1) as u32,
        factor => (side * factor) as u32,
    };
    Ok((drawn(width), drawn(height)))
}

/// The picture of a tile in its size on the sheet.
fn picture(tile: &Tile, (width, height): (u32, u32)) -> Result<RgbImage> {
    let (w, h) = (tile.shape.width as u32, tile.shape.height as u32);
    let pixels = tile.pixels.to_vec();
    let original = match tile.shape.channels {
        1 => GrayImage::from_raw(w, h, pixels).map(DynamicImage::from),
        _ => RgbImage::from_raw(w, h, pixels).map(DynamicImage::from),
    };
    let original = original.ok_or_else(|| shape("expected pixels that fit their shape".into()))?;
    let original = original.into_rgb8();
    Ok(match width < w || height < h {
        true => thumbnail(&original, width, height),
        false => resize(&original, width, height, FilterType::Nearest),
    })
}

fn text_width(font: &MonoFont, text: &str) -> u64 {
    text.chars().count() as u64 * u64::from(font.character_size.width)
}

/// What embedded-graphics draws on.
struct Canvas(RgbImage);

impl Canvas {
    /// Writes one line with its upper left corner `at`, cut to `room` pixels.
    fn write(&mut self, font: &MonoFont, ink: Rgb888, text: &str, at: [u32; 2], room: u32) {
        let fits = (room / font.character_size.width) as usize;
        let mut line: String = text
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        if line.chars().count() > fits {
            line = line.chars().take(fits.saturating_sub(1)).collect();
            line.truncate(line.trim_end().len());
            line.push('…');
        }
        let style = MonoTextStyle::new(font, ink);
        let at = Point::new(at[0] as i32, at[1] as i32);
        let Ok(_) = Text::with_baseline(&line, at, style, Baseline::Top).draw(self);
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.0.width(), self.0.height())
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I>(&mut self, pixels: I) -> std::result::Result<(), Infallible>
    where
        I: IntoIterator<Item = Pixel<Rgb888>>,
    {
        for Pixel(at, colour) in pixels {
            let (x, y) = (at.x as u32, at.y as u32);
            if let Some(pixel) = self.0.get_pixel_mut_checked(x, y) {
                *pixel = Rgb([colour.r(), colour.g(), colour.b()]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(title: &str, columns: usize, tiles: &[Tile]) -> RgbImage {
        let png = contact_sheet(title, columns, tiles).unwrap();
        image::load_from_memory(&png).unwrap().into_rgb8()
    }

    fn tile(pixels: &[u8], shape: Shape, caption: impl Into<String>) -> Tile<'_> {
        Tile {
            pixels,
            shape,
            caption: caption.into(),
        }
    }

    #[test]
    fn small_pictures_are_enlarged_by_a_whole_factor_and_large_ones_shrunk() {
        // Two pixels, black and red, become squares of 64.
        let pair = [0, 0, 0, 255, 0, 0];
        // Black and white stripes of one pixel mix to grey.
        let stripes: Vec<u8> = (0..512 * 256).map(|i| (i % 2) as u8 * 255).collect();
        let sheet = decoded(
            "a",
            2,
            &[
                tile(&pair, Shape::new(1, 2, 3), "pair"),
                tile(&stripes, Shape::new(256, 512, 1), "stripes"),
            ],
        );
        let (x, y) = (MARGIN + 1, MARGIN + 18 + GAP + 1);
        let at = |dx: u32, dy: u32| sheet.get_pixel(x + dx, y + dy).0;
        assert_eq!((at(0, 0), at(63, 63)), ([0; 3], [0; 3]));
        assert_eq!((at(64, 0), at(127, 63)), ([255, 0, 0], [255, 0, 0]));
        assert_eq!(at(128, 0), FRAME.0);
        assert_eq!(at(10, 64), FRAME.0);
        let second = 130 + GAP;
        for (dx, dy) in [(0, 0), (127, 63), (50, 20)] {
            let [red, green, blue] = at(second + dx, dy);
            assert!(red == green && green == blue && (120..136).contains(&red));
        }
        assert_eq!(at(second + 128, 0), FRAME.0);
    }

    #[test]
    fn captions_stay_in_their_cell_and_end_in_an_ellipsis() {
        let black = [0; 28 * 28];
        let shape = Shape::new(28, 28, 1);
        let long = "Straßenbahnhaltestelle №7, Ελλάδα, Москва";
        let sheet = |captions: [&str; 2]| {
            let tiles = captions.map(|caption| tile(&black, shape, caption));
            decoded("", 2, &tiles)
        };
        let (cell, caption) = (28 * 4 + 2, MARGIN + 18 + GAP + 28 * 4 + 2 + 4);
        let ink = |sheet: &RgbImage, from: u32, to: u32| {
            let column = |x| {
                (caption..caption + 14)
                    .filter(|y| *sheet.get_pixel(x, *y) != PAPER)
                    .count()
            };
            (from..to).map(column).sum::<usize>()
        };
        let (empty, cut) = (sheet(["", "b"]), sheet([long, "b"]));
        let (left, right) = (MARGIN, MARGIN + cell + GAP);
        assert_eq!(ink(&empty, left, right), 0);
        assert!(ink(&cut, left, left + cell) > 100);
        assert_eq!(ink(&cut, left + cell, right), 0);
        // The last character that fits is an ellipsis: as much ink as three dots have.
        let last = left + (cell / 7 - 1) * 7;
        let dots = sheet(["…", "b"]);
        assert!(ink(&dots, left, left + 7) > 0);
        assert_eq!(ink(&cut, last, last + 7), ink(&dots, left, left + 7));
        assert_eq!(
            ink(&cut, right, right + cell),
            ink(&empty, right, right + cell)
        );
    }

    /// As tall as its longest caption needs, and no taller than three lines.
    #[test]
    fn a_caption_may_have_lines() {
        let black = [0; 28 * 28];
        let height = |captions: &[&str]| {
            let tiles: Vec<Tile> = captions
                .iter()
                .map(|caption| tile(&black, Shape::new(28, 28, 1), *caption))
                .collect();
            decoded("", 2, &tiles)
        };
        let one = height(&["a", ""]);
        assert_eq!(height(&["", ""]).height(), one.height());
        for (captions, lines) in [
            (["a\nb\nc", "d"], 3),
            (["a\n\n\n\nb", "d"], 3),
            (["a\nb", ""], 2),
        ] {
            assert_eq!(height(&captions).height(), one.height() + (lines - 1) * 14);
        }
        // The second line is written where it belongs.
        let below = MARGIN + 18 + GAP + 28 * 4 + 2 + 4 + 14;
        let ink = |sheet: &RgbImage| {
            let pixels =
                (below..below + 14).flat_map(|y| (MARGIN..MARGIN + 14).map(move |x| (x, y)));
            pixels
                .filter(|(x, y)| *sheet.get_pixel(*x, *y) != PAPER)
                .count()
        };
        assert!(ink(&height(&["a\nb", ""])) > 5);
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        let refused = |columns, tiles: &[Tile], expected: &str| {
            let message = contact_sheet("a", columns, tiles).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        let good = tile(&[1; 12], Shape::new(2, 2, 3), "");
        refused(1, &[], "at least one picture");
        refused(0, std::slice::from_ref(&good), "one column");
        for shape in [
            Shape::new(2, 3, 3),
            Shape::new(2, 3, 2),
            Shape::new(usize::MAX, usize::MAX, 3),
        ] {
            refused(1, &[tile(&[1; 12], shape, "")], "1 or 3 channels");
        }
        refused(1, &[tile(&[], Shape::new(0, 2, 3), "")], "1 or 3 channels");
        refused(1, &vec![good; 100_000], "take fewer");
    }
}
