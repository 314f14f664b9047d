//! Small pictures for pages: images of a dataset, filters, activations.

use super::plot::COLORS;
use crate::error::{Error, Result};
use crate::model::{Model, Role, Shape};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use image::imageops::{FilterType, replace, resize, thumbnail};
use image::{DynamicImage, ImageFormat, Rgba, RgbaImage};
use plotters::style::Color;
use std::io::Cursor;

/// Between the parts of a picture: nothing, or where something has to be, a grey that is seen on white and
/// on black.
const GAP: Rgba<u8> = Rgba([140, 146, 156, 0]);
const WIDTH: u32 = 2;
/// Pixels of a part's longer side, at most.
const SIDE: u32 = 64;
/// And at least, where it is enlarged for it by a whole factor.
const LEAST: u32 = 24;
/// Filters, and channels of an activation, that are shown at most.
const FILTERS: usize = 64;
const CHANNELS: usize = 16;
const UNITS: usize = 1024;

/// The first layer's weights as pictures.
pub(super) struct Filters {
    pub layer: String,
    pub tiles: Vec<RgbaImage>,
    /// What is not seen of them; empty where all is.
    pub note: String,
}

/// The bytes of a PNG file.
pub(super) fn png(picture: &RgbaImage) -> Result<Vec<u8>> {
    let mut png = Cursor::new(Vec::new());
    DynamicImage::from(picture.clone())
        .write_to(&mut png, ImageFormat::Png)
        .map_err(|e| Error::io("draw", "a picture".as_ref(), std::io::Error::other(e)))?;
    Ok(png.into_inner())
}

/// A file's bytes as what an `<img>` takes in place of an address.
pub(super) fn data_uri(png: &[u8]) -> String {
    format!("data:image/png;base64,{}", BASE64_STANDARD.encode(png))
}

/// An image of a dataset: of three channels in colour, of any other number the first one in grey. `None`
/// where there are not so many bytes.
pub(super) fn of_bytes(bytes: &[u8], shape: Shape) -> Option<RgbaImage> {
    let channels = shape.channels;
    if bytes.len() != shape.elements() || bytes.is_empty() {
        return None;
    }
    let pixels = bytes.chunks_exact(channels).flat_map(|pixel| match pixel {
        [r, g, b] => [*r, *g, *b, 255],
        other => [other[0], other[0], other[0], 255],
    });
    RgbaImage::from_raw(shape.width as u32, shape.height as u32, pixels.collect())
}

/// Parts of the same size side by side; every pixel of small ones becomes a square.
pub(super) fn mosaic(tiles: &[RgbaImage], columns: usize) -> RgbaImage {
    let (w, h) = tiles.first().map_or((1, 1), RgbaImage::dimensions);
    let factor = LEAST.div_ceil(w.max(h).max(1));
    let (w, h) = (w * factor, h * factor);
    let columns = columns.clamp(1, tiles.len().max(1));
    let rows = tiles.len().div_ceil(columns).max(1);
    let along = |count: usize, size: u32| count as u32 * (size + WIDTH) - WIDTH;
    let mut picture = RgbaImage::from_pixel(along(columns, w), along(rows, h), GAP);
    for (i, tile) in tiles.iter().enumerate() {
        let at = |place: usize, size: u32| i64::from(place as u32 * (size + WIDTH));
        let tile = resize(tile, w, h, FilterType::Nearest);
        replace(&mut picture, &tile, at(i % columns, w), at(i / columns, h));
    }
    picture
}

/// Columns of a picture with so many parts that is about square.
pub(super) fn square(parts: usize) -> usize {
    (parts as f64).sqrt().ceil() as usize
}

/// The filters of the first layer with weights, each from its most negative weight (black) to its most
/// positive one (white), 0 in the middle; `None` where no layer multiplies.
pub(super) fn filters(model: &Model, parameters: &[f32]) -> Option<Filters> {
    let (layer, g) = model
        .layers
        .iter()
        .find_map(|layer| layer.op.product().map(|g| (layer, g)))?;
    let weight = layer.parameters.iter().find(|p| p.role == Role::Weight)?;
    let values = parameters.get(weight.start..weight.start + weight.elements())?;
    // A dense layer sees the whole image.
    let whole = g.input.positions() == 1 && model.input.elements() == g.input.channels;
    let [height, width, channels] = match whole {
        true => [model.input.height, model.input.width, model.input.channels],
        false => [g.kernel[0], g.kernel[1], g.group_channels()[0]],
    };
    let out = g.output.channels;
    if values.len() != height * width * channels * out {
        return None;
    }
    let shown = out.min(FILTERS);
    let tiles = (0..shown).map(|filter| {
        let at = |place: usize, channel: usize| values[(place * channels + channel) * out + filter];
        let drawn = if channels == 3 { 3 } else { 1 };
        let seen = (0..height * width).flat_map(|p| (0..drawn).map(move |c| (p, c)));
        let largest = seen
            .map(|(p, c)| at(p, c).abs())
            .filter(|w| w.is_finite())
            .fold(f32::MIN_POSITIVE, f32::max);
        RgbaImage::from_fn(width as u32, height as u32, |x, y| {
            let place = y as usize * width + x as usize;
            let level = |channel: usize| (127.5 + 127.5 * at(place, channel) / largest) as u8;
            match channels {
                3 => Rgba([level(0), level(1), level(2), 255]),
                _ => grey(level(0)),
            }
        })
    });
    let mut notes = Vec::new();
    if shown < out {
        notes.push(format!("the first {shown} of {out}"));
    }
    if ![1, 3].contains(&channels) {
        notes.push(format!("of {channels} input channels the first"));
    }
    Some(Filters {
        layer: layer.name.clone(),
        tiles: tiles.map(|tile| shrunk(&tile)).collect(),
        note: notes.join(", "),
    })
}

fn grey(level: u8) -> Rgba<u8> {
    Rgba([level, level, level, 255])
}

fn shrunk(tile: &RgbaImage) -> RgbaImage {
    let (w, h) = tile.dimensions();
    match w.max(h) {
        longer if longer > SIDE => {
            let scaled = |side: u32| (side * SIDE / longer).max(1);
            thumbnail(tile, scaled(w), scaled(h))
        }
        _ => tile.clone(),
    }
}

/// What a layer gives for one image, `[H][W][C]`, from its smallest value (black) to its largest (white),
/// channel beside channel, or value beside value where there is one place only; and how many of how many are
/// shown. What is no number is red.
pub(super) fn maps(shape: Shape, values: &[f32]) -> Option<(RgbaImage, usize)> {
    let Shape {
        height,
        width,
        channels,
    } = shape;
    if values.len() != shape.elements() || values.is_empty() {
        return None;
    }
    let finite = values.iter().copied().filter(|v| v.is_finite());
    let (low, high) = finite.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    let pixel = |value: f32| match value.is_finite() {
        // (In f64 so that the range of two numbers is always one.)
        true => {
            let [low, high, value] = [low, high, value].map(f64::from);
            grey((255.0 * (value - low) / (high - low).max(1e-30)) as u8)
        }
        false => {
            let (r, g, b) = COLORS[4].rgb();
            Rgba([r, g, b, 255])
        }
    };
    if height * width == 1 {
        let shown = channels.min(UNITS);
        let columns = square(shown);
        let rows = shown.div_ceil(columns);
        let picture = RgbaImage::from_fn(columns as u32, rows as u32, |x, y| {
            let at = y as usize * columns + x as usize;
            if at < shown { pixel(values[at]) } else { GAP }
        });
        return Some((picture, shown));
    }
    let shown = channels.min(CHANNELS);
    let tiles: Vec<RgbaImage> = (0..shown)
        .map(|channel| {
            let tile = RgbaImage::from_fn(width as u32, height as u32, |x, y| {
                let place = y as usize * width + x as usize;
                pixel(values[place * channels + channel])
            });
            shrunk(&tile)
        })
        .collect();
    Some((mosaic(&tiles, square(shown)), shown))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::load;

    #[test]
    fn a_filter_is_drawn_where_its_weights_lie() {
        let definition = load("default").unwrap();
        let model = definition.resolve(Shape::new(28, 28, 1), 10).unwrap();
        let mut parameters = vec![0.0; model.parameter_elements];
        // [5][5][1][24]: of filter 3 the tap at row 1, column 4 is 2, at row 0, column 0 is -1.
        parameters[(5 + 4) * 24 + 3] = 2.0;
        parameters[3] = -1.0;
        let filters = filters(&model, &parameters).unwrap();
        assert_eq!((filters.tiles.len(), &filters.layer[..]), (24, "conv2d1"));
        let at = |x, y| filters.tiles[3].get_pixel(x, y)[0];
        assert_eq!((at(4, 1), at(0, 0), at(2, 2)), (255, 63, 127));
        // Of the third channel of a colour image.
        let definition = load("tiny").unwrap();
        let model = definition.resolve(Shape::new(28, 28, 3), 10).unwrap();
        let mut parameters = vec![0.0; model.parameter_elements];
        let out = model.layers[0].output.channels;
        parameters[2 * out] = 1.0;
        let filters = super::filters(&model, &parameters).unwrap();
        assert_eq!(filters.tiles[0].get_pixel(0, 0).0, [127, 127, 255, 255]);
    }

    #[test]
    fn a_dense_layer_sees_the_image() {
        let definition = load("mlp-sigmoid").unwrap();
        let model = definition.resolve(Shape::new(28, 28, 1), 10).unwrap();
        let mut parameters = vec![0.0; model.parameter_elements];
        let out = model.layers[0].output.channels;
        parameters[(28 * 2 + 5) * out] = -3.0;
        let filters = filters(&model, &parameters).unwrap();
        assert_eq!(filters.tiles[0].dimensions(), (28, 28));
        assert_eq!(filters.tiles[0].get_pixel(5, 2)[0], 0);
    }

    #[test]
    fn activations_are_drawn_channel_by_channel() {
        // Two channels of 1×2: 0, 1 and 2, NaN.
        let values = [0.0, 2.0, 1.0, f32::NAN];
        let (picture, shown) = maps(Shape::new(1, 2, 2), &values).unwrap();
        // Twelve times as large, and nothing between the two.
        assert_eq!((picture.dimensions(), shown), ((50, 12), 2));
        let at = |x| picture.get_pixel(x, 11).0;
        assert_eq!([at(0), at(12), at(26)], [0, 127, 255].map(|v| grey(v).0));
        assert_eq!([at(24), at(49)], [GAP.0, [196, 64, 32, 255]]);
        let (picture, shown) = maps(Shape::new(1, 1, 5), &[1.0; 5]).unwrap();
        assert_eq!((picture.dimensions(), shown), ((3, 2), 5));
        assert!(maps(Shape::new(2, 2, 1), &[1.0; 3]).is_none());
        assert!(maps(Shape::new(1, 1, 2), &[f32::NAN; 2]).is_some());
    }
}
