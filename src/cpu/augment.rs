//! Twins of `shaders/augment.wgsl`, which says what the numbers of a sample are.

use super::Float;
use super::random::pcg4d;
use crate::kernels::augment::{
    KEYS, NODE_BLOCKS, NODES, aspect, erased, grid, parameters, saturates, shift,
};
use crate::model::Shape;
use crate::model::augment::{Augment, Border, Flip};
use rayon::prelude::*;

/// What counts of red, green and blue in a grey.
const GREY: [f32; 3] = [0.299, 0.587, 0.114];

/// What happens to each of N samples: `positions` are their places in the epoch's order, `samples` their
/// numbers in the dataset, normalization the scales of all channels, then their shifts.
///
/// Returns the table `[N, parameters]`.
pub fn draw_augmentation<T: Float>(
    augment: &Augment,
    shape: Shape,
    [seed, epoch]: [u32; 2],
    positions: &[u32],
    samples: &[u32],
    normalization: &[T],
) -> Vec<T> {
    assert_eq!(positions.len(), samples.len());
    let per_sample = parameters(augment);
    let mean = mean_grey(shape, normalization);
    let mut drawn = vec![T::zero(); samples.len() * per_sample];
    let rows = drawn.chunks_mut(per_sample);
    for ((row, &position), &sample) in rows.zip(positions).zip(samples) {
        let stream = pcg4d([seed, epoch, position, KEYS[0]]);
        let block = |number: u32| {
            pcg4d([
                stream[0].wrapping_add(number),
                stream[1],
                stream[2],
                stream[3],
            ])
        };
        let (row, nodes) = row.split_at_mut(NODES);

        let [turn, size, tilt, mirror] = block(0);
        let [down, right, crop_down, crop_right] = block(1);
        let mirrored = match augment.flip {
            Flip::Never => false,
            Flip::Random => mirror >> 31 == 1,
            Flip::Alternating => {
                let [word, ..] = pcg4d([seed, sample, 0, KEYS[1]]);
                ((word >> 31).wrapping_add(epoch)) & 1 == 1
            }
        };
        let whole = |word| {
            let steps = below(word, 2 * augment.crop + 1);
            number::<T>(f64::from(steps) - f64::from(augment.crop))
        };
        let sides = |largest: f32, word| <T as From<f32>>::from(largest) * to_both_sides::<T>(word);
        let placement = Placement {
            sine_cosine: sine_cosine(sides(augment.rotate.to_radians(), turn)),
            sheared: sine_cosine(sides(augment.shear.to_radians(), tilt)),
            factor: T::one() + sides(augment.scale, size),
            shift: [
                sides(shift(augment, shape.height), down),
                sides(shift(augment, shape.width), right),
            ],
            window: match augment.resized_crop {
                Some(areas) => window(shape, areas, block(2)),
                None => Window::whole(),
            },
            mirrored,
            moved: [whole(crop_down), whole(crop_right)],
        };
        row[..6].copy_from_slice(&placement.matrix(shape));

        let [erase, area, high, _] = block(3);
        let [top, left, cut_top, cut_left] = block(4);
        let rectangle = rectangle(augment, shape, [erase, area, high, top, left]);
        row[6..10].copy_from_slice(&rectangle.map(|edge| number(f64::from(edge))));
        let half = f64::from(augment.cut_out / 2);
        let cut = [(cut_top, shape.height), (cut_left, shape.width)]
            .map(|(word, size)| f64::from(below(word, size as u32)) - half);
        let side = f64::from(augment.cut_out);
        let cut = [cut[0], cut[1], cut[0] + side, cut[1] + side];
        row[10..14].copy_from_slice(&cut.map(number));

        let [brightness, contrast, saturation, _] = block(5);
        let contrast = sides(augment.contrast, contrast);
        row[14] = T::one() + sides(augment.brightness, brightness);
        row[15] = T::one() + contrast;
        row[16] = T::one() + sides(augment.saturation, saturation);
        row[17] = -contrast * mean;

        for (number, nodes) in (NODE_BLOCKS..).zip(nodes.chunks_mut(4)) {
            for (node, word) in nodes.iter_mut().zip(block(number)) {
                *node = sides(augment.elastic, word);
            }
        }
    }
    drawn
}

/// Where the pixels of a sample come from.
struct Placement<T> {
    sine_cosine: [T; 2],
    /// Of the angle that the image is sheared by.
    sheared: [T; 2],
    factor: T,
    /// Down and right, in pixels.
    shift: [T; 2],
    window: Window<T>,
    mirrored: bool,
    /// Down and right, in whole pixels: what is shown lies so far from its source.
    moved: [T; 2],
}

/// A part of the image that is enlarged to the whole: its share of height and width, and where its first
/// pixel comes from.
struct Window<T> {
    share: [T; 2],
    from: [T; 2],
}

impl<T: Float> Window<T> {
    fn whole() -> Window<T> {
        Window {
            share: [T::one(); 2],
            from: [T::zero(); 2],
        }
    }
}

impl<T: Float> Placement<T> {
    /// From a pixel's column and row to where its value comes from.
    fn matrix(&self, shape: Shape) -> [T; 6] {
        let [height, width] = [shape.height, shape.width].map(|size| number::<T>(size as f64));
        let half = number::<T>(0.5);
        let [middle_down, middle_right] = [height, width].map(|size| half * (size - T::one()));
        let [sine, cosine] = self.sine_cosine;
        let slope = self.sheared[0] / self.sheared[1];
        let (a, b) = (cosine - sine * slope, cosine * slope + sine);
        let [a, b, c, d] = [a, b, -sine, cosine].map(|entry| entry / self.factor);
        let (sign, start) = match self.mirrored {
            true => (-T::one(), width - T::one() - self.moved[1]),
            false => (T::one(), self.moved[1]),
        };
        let Window { share, from } = &self.window;
        let column = share[1] * start + from[1] - middle_right - self.shift[1];
        let line = share[0] * self.moved[0] + from[0] - middle_down - self.shift[0];
        [
            a * share[1] * sign,
            b * share[0],
            a * column + b * line + middle_right,
            c * share[1] * sign,
            d * share[0],
            c * column + d * line + middle_down,
        ]
    }
}

/// A window of an area between those shares of the image's, and of an aspect from 3/4 to 4/3; what would
/// be larger than the image is cut to it.
fn window<T: Float>(shape: Shape, areas: [f32; 2], random: [u32; 4]) -> Window<T> {
    let [least, most] = areas.map(<T as From<f32>>::from);
    let side = (least + (most - least) * from_zero(random[0])).sqrt();
    // Half the logarithm of 4/3.
    let stretch = <T as From<f32>>::from(0.143_841_04) * to_both_sides(random[1]);
    let aspect = <T as From<f32>>::from(aspect(shape));
    let share = [
        side * exponential(-stretch) / aspect,
        side * exponential(stretch) * aspect,
    ]
    .map(|share| share.min(T::one()));
    let half = number::<T>(0.5);
    let from = |axis: usize, size: usize| {
        let room = (T::one() - share[axis]) * number(size as f64);
        from_zero::<T>(random[2 + axis]) * room + half * share[axis] - half
    };
    Window {
        share,
        from: [from(0, shape.height), from(1, shape.width)],
    }
}

/// Top, left, bottom and right of what is erased; nothing where the first of the words says so.
fn rectangle(
    augment: &Augment,
    shape: Shape,
    [erase, area, high, top, left]: [u32; 5],
) -> [u32; 4] {
    let [height, width] = [shape.height as u32, shape.width as u32];
    let (threshold, [least, most]) = erased(augment, shape);
    let [high, wide] = match erase >> 8 < threshold {
        true => {
            let area = least + below(area, most - least + 1);
            let shortest = (area.wrapping_mul(3) / 10).isqrt().max(1);
            let tallest = (area.wrapping_mul(33) / 10).isqrt().max(shortest);
            let high = shortest + below(high, tallest - shortest + 1);
            [high.min(height), (area / high).clamp(1, width)]
        }
        false => [0, 0],
    };
    let top = below(top, height - high + 1);
    let left = below(left, width - wide + 1);
    [top, left, top + high, left + wide]
}

/// The mean grey of the training set, as a byte.
fn mean_grey<T: Float>(shape: Shape, normalization: &[T]) -> T {
    let (scale, shift) = normalization.split_at(shape.channels);
    let mut grey = T::zero();
    for (c, (&scale, &shift)) in scale.iter().zip(shift).enumerate() {
        let share = match shape.channels {
            3 => <T as From<f32>>::from(GREY[c]),
            channels => T::one() / number(channels as f64),
        };
        grey -= share * shift / scale;
    }
    grey.max(T::zero()).min(number(255.0))
}

/// The images of N samples, changed and normalised, into x `[N,H,W,C]`; what is erased is 0.
///
/// images `[…,H,W,C]`, places: where the N images lie in it; augmentation: the table of
/// [`draw_augmentation`]; normalization the scales of all channels, then their shifts.
pub fn augment_batch<T: Float>(
    augment: &Augment,
    shape: Shape,
    images: &[u8],
    places: &[u32],
    augmentation: &[T],
    normalization: &[T],
    x: &mut [T],
) {
    let elements = shape.elements();
    let samples = augmentation.par_chunks_exact(parameters(augment));
    x.par_chunks_exact_mut(elements)
        .zip(samples)
        .zip(places)
        .for_each(|((x, sample), &place)| {
            let image = &images[place as usize * elements..][..elements];
            augment_image(augment, shape, image, sample, normalization, x);
        });
}

fn augment_image<T: Float>(
    augment: &Augment,
    shape: Shape,
    image: &[u8],
    sample: &[T],
    normalization: &[T],
    x: &mut [T],
) {
    let channels = shape.channels;
    let (scale, shift) = normalization.split_at(channels);
    let (warps, recolours, erases) = (augment.warps(), augment.recolours(), augment.erases());
    let saturates = saturates(augment, shape);
    let (&[brightness, contrast, saturation, added], nodes) = (
        sample[14..NODES].first_chunk().expect("four numbers"),
        &sample[NODES..],
    );
    let byte = |value: T| value.max(T::zero()).min(number(255.0));
    let grid = grid(augment);
    let columns: Vec<T> = (0..shape.width).map(|w| number(w as f64)).collect();
    let mut lines = vec![[T::zero(); 2]; grid.map_or(0, |grid| grid + 3)];
    let rows = x.chunks_exact_mut(shape.width * channels);
    for (h, pixels) in rows.enumerate() {
        let row = number::<T>(h as f64);
        if let Some(grid) = grid {
            nodes_of_row(grid, h, shape.height, nodes, &mut lines);
        }
        let pixels = pixels.chunks_exact_mut(channels);
        for (w, (pixel, &column)) in pixels.zip(&columns).enumerate() {
            let erased = |edges: &[T]| {
                row >= edges[0] && row < edges[2] && column >= edges[1] && column < edges[3]
            };
            if erases && (erased(&sample[6..10]) || erased(&sample[10..14])) {
                pixel.fill(T::zero());
                continue;
            }
            let mut shown = [column, row];
            if let Some(grid) = grid {
                let [right, down] = displacement(grid, w, shape.width, &lines);
                shown = [column + right, row + down];
            }
            let right = sample[0] * shown[0] + sample[1] * shown[1] + sample[2];
            let down = sample[3] * shown[0] + sample[4] * shown[1] + sample[5];
            if warps {
                interpolate(augment.border, shape, image, [down, right], pixel);
            } else {
                copy(augment.border, shape, image, [down, right], pixel);
            }
            if recolours {
                for value in &mut *pixel {
                    *value = byte(byte(*value * brightness) * contrast + added);
                }
            }
            if saturates {
                let parts = pixel.iter().zip(GREY);
                let grey: T = parts
                    .map(|(v, part)| *v * <T as From<f32>>::from(part))
                    .sum();
                for value in &mut *pixel {
                    *value = byte(grey + saturation * (*value - grey));
                }
            }
            for ((value, &scale), &shift) in pixel.iter_mut().zip(scale).zip(shift) {
                *value = *value * scale + shift;
            }
        }
    }
}

/// The bytes of a whole pixel.
fn copy<T: Float>(
    border: Border,
    shape: Shape,
    image: &[u8],
    [down, right]: [T; 2],
    pixel: &mut [T],
) {
    let [h, w] = [down, right].map(whole);
    match (
        inside(border, h, shape.height),
        inside(border, w, shape.width),
    ) {
        (Some(h), Some(w)) => {
            let bytes = &image[(h * shape.width + w) * shape.channels..];
            for (value, &byte) in pixel.iter_mut().zip(bytes) {
                *value = <T as From<f32>>::from(f32::from(byte));
            }
        }
        _ => pixel.fill(T::zero()),
    }
}

/// Bytes between four pixels.
fn interpolate<T: Float>(
    border: Border,
    shape: Shape,
    image: &[u8],
    [down, right]: [T; 2],
    pixel: &mut [T],
) {
    let (above, left_of) = (down.floor(), right.floor());
    let [h, w] = [above, left_of].map(whole);
    let [share_down, share_right] = [down - above, right - left_of];
    let lines = [h, h + 1].map(|h| inside(border, h, shape.height));
    let places = [w, w + 1].map(|w| inside(border, w, shape.width));
    pixel.fill(T::zero());
    for (line, weight_down) in lines.into_iter().zip([T::one() - share_down, share_down]) {
        for (place, weight) in places
            .into_iter()
            .zip([T::one() - share_right, share_right])
        {
            let (Some(h), Some(w)) = (line, place) else {
                continue;
            };
            let weight = weight_down * weight;
            let bytes = &image[(h * shape.width + w) * shape.channels..];
            for (value, &byte) in pixel.iter_mut().zip(bytes) {
                *value += weight * <T as From<f32>>::from(f32::from(byte));
            }
        }
    }
}

/// Where along an axis of `size` pixels a value comes from; `None` where there is nothing.
fn inside(border: Border, at: i32, size: usize) -> Option<usize> {
    let last = size as i32 - 1;
    match border {
        Border::Zero => (0..=last).contains(&at).then_some(at as usize),
        Border::Reflect => {
            let period = (2 * last).max(1);
            let along = at.abs() % period;
            Some(along.min(period - along) as usize % size)
        }
    }
}

/// The grid's displacements in the middle of row `h` of an image of that height, right and down, for each of
/// the grid's columns.
fn nodes_of_row<T: Float>(grid: usize, h: usize, height: usize, nodes: &[T], lines: &mut [[T; 2]]) {
    let (cell, weights) = cell::<T>(grid, h, height);
    lines.fill([T::zero(); 2]);
    for (m, weight) in weights.into_iter().enumerate() {
        let nodes = nodes[2 * (cell + m) * (grid + 3)..].chunks_exact(2);
        for (line, node) in lines.iter_mut().zip(nodes) {
            line[0] += weight * node[1];
            line[1] += weight * node[0];
        }
    }
}

/// How far the pixel in column `w` is displaced, right and down.
fn displacement<T: Float>(grid: usize, w: usize, width: usize, lines: &[[T; 2]]) -> [T; 2] {
    let (cell, weights) = cell::<T>(grid, w, width);
    let mut sum = [T::zero(); 2];
    for (weight, line) in weights.into_iter().zip(&lines[cell..]) {
        sum[0] += weight * line[0];
        sum[1] += weight * line[1];
    }
    sum
}

/// The cell of the grid in which the middle of a pixel lies along an axis, and the weights of the four nodes
/// around it: a cubic B-spline.
fn cell<T: Float>(grid: usize, at: usize, size: usize) -> (usize, [T; 4]) {
    let cell = (2 * at + 1) * grid / (2 * size);
    let [at, grid, size] = [at, grid, size].map(|n| number::<T>(n as f64));
    let t = (at + number(0.5)) * grid / size - number(cell as f64);
    let s = T::one() - t;
    let [three, four, six] = [3.0, 4.0, 6.0].map(number::<T>);
    let middle = |t: T| four - six * t * t + three * t * t * t;
    (
        cell,
        [s * s * s, middle(t), middle(s), t * t * t].map(|weight| weight / six),
    )
}

/// A number that f32 holds exactly.
fn number<T: Float>(value: f64) -> T {
    (value as f32).into()
}

fn whole<T: Float>(value: T) -> i32 {
    value.to_i32().unwrap_or(0)
}

/// From 0 to below 1, in steps of 2⁻²⁴.
fn from_zero<T: Float>(word: u32) -> T {
    number(f64::from(word >> 8) / f64::from(1 << 24))
}

/// From −1 to below 1, in steps of 2⁻²³.
fn to_both_sides<T: Float>(word: u32) -> T {
    number(f64::from(word >> 8) / f64::from(1 << 23) - 1.0)
}

/// A whole number below n.
fn below(word: u32, n: u32) -> u32 {
    ((u64::from(word) * u64::from(n)) >> 32) as u32
}

/// Sine and cosine of an angle from −π to π.
fn sine_cosine<T: Float>(angle: T) -> [T; 2] {
    let half = number::<T>(0.5) * angle;
    let s = half * half;
    // Of the Taylor series, from the highest power down.
    let terms = [-39_916_800.0, 362_880.0, -5040.0, 120.0, -6.0].map(number::<T>);
    let tail = terms
        .into_iter()
        .fold(T::zero(), |sum, term| T::one() / term + s * sum);
    let sine = half + half * s * tail;
    let cosine = (T::one() - sine * sine).max(T::zero()).sqrt();
    let two = number::<T>(2.0);
    [two * sine * cosine, T::one() - two * sine * sine]
}

/// The exponential of a number that is at most 0.15 away from 0.
fn exponential<T: Float>(v: T) -> T {
    let terms = [120.0, 24.0, 6.0, 2.0, 1.0, 1.0].map(number::<T>);
    terms
        .into_iter()
        .fold(T::zero(), |sum, term| T::one() / term + v * sum)
}
