//! `shaders/augment.wgsl`: a batch out of the dataset, each image changed at random.

use super::{KernelSpec, STEP_ELEMENTS, View, Work, read, write};
use crate::model::Shape;
use crate::model::augment::{Augment, Border, Flip};

const SOURCE: &str = include_str!("../../shaders/augment.wgsl");

/// Stands for the augmentation when random numbers are drawn, and for which images an alternating flip
/// begins with.
pub const KEYS: [u32; 2] = [0x97a0_d5ab, 0x5f1d_36f1];

/// Numbers of each sample before those of the elastic grid's nodes.
pub const NODES: usize = 18;

/// Of the blocks of four random words, the first of the grid's nodes.
pub const NODE_BLOCKS: u32 = 16;

/// Numbers that are drawn for each sample: 18, and two for each node of the grid where there is one.
pub fn parameters(augment: &Augment) -> usize {
    NODES + 2 * grid(augment).map_or(0, |grid| (grid + 3) * (grid + 3))
}

/// Cells along an axis of the elastic grid, where there is one.
pub fn grid(augment: &Augment) -> Option<usize> {
    (augment.elastic > 0.0).then_some(augment.elastic_grid as usize)
}

/// Below which of 2²⁴ random words a rectangle is erased, and the fewest and most pixels that it has.
pub fn erased(augment: &Augment, shape: Shape) -> (u32, [u32; 2]) {
    let area = (shape.height * shape.width) as f64;
    let [least, most] = augment
        .erase_size
        .map(|share| (f64::from(share) * area).round().max(1.0) as u32);
    let below = (f64::from(augment.erase) * 2f64.powi(24)).round() as u32;
    (below, [least, most.max(least)])
}

/// Square root of height / width: what the sides of a resized crop are stretched by.
pub fn aspect(shape: Shape) -> f32 {
    (shape.height as f64 / shape.width as f64).sqrt() as f32
}

/// Draws what happens to each sample of the batch and copies the labels; see the shader for what the
/// rows of the table `drawn` `[batch, parameters]` hold.
///
/// The draws follow from seed and epoch in row `counter[0]` of the step table `steps`, and from the
/// sample's place in the epoch's `order`; an alternating flip from the image's number. Writes `drawn` and
/// `batch_labels` `[batch]`.
pub fn draw_augmentation(
    augment: &Augment,
    shape: Shape,
    batch: usize,
    labels: View,
    order: View,
    steps: View,
    counter: View,
    normalization: View,
    drawn: View,
    batch_labels: View,
) -> KernelSpec {
    let per_sample = parameters(augment);
    let (erase, [erase_least, erase_most]) = erased(augment, shape);
    let mut constants = sizes(shape, batch, per_sample);
    let [resize_least, resize_most] = augment.resized_crop.unwrap_or([1.0, 1.0]);
    let flag = |on| f64::from(u8::from(on));
    constants.extend([
        ("SHIFT_DOWN", f64::from(shift(augment, shape.height))),
        ("SHIFT_RIGHT", f64::from(shift(augment, shape.width))),
        ("ROTATE", f64::from(augment.rotate.to_radians())),
        ("SCALE", f64::from(augment.scale)),
        ("SHEAR", f64::from(augment.shear.to_radians())),
        ("FLIP_RANDOM", flag(augment.flip == Flip::Random)),
        ("FLIP_ALTERNATING", flag(augment.flip == Flip::Alternating)),
        ("CROP", f64::from(augment.crop)),
        ("RESIZE", flag(augment.resized_crop.is_some())),
        ("RESIZE_LEAST", f64::from(resize_least)),
        ("RESIZE_MOST", f64::from(resize_most)),
        ("ASPECT", f64::from(aspect(shape))),
        ("ERASE", f64::from(erase)),
        ("ERASE_LEAST", f64::from(erase_least)),
        ("ERASE_MOST", f64::from(erase_most)),
        ("CUT_OUT", f64::from(augment.cut_out)),
        ("BRIGHTNESS", f64::from(augment.brightness)),
        ("CONTRAST", f64::from(augment.contrast)),
        ("SATURATION", f64::from(augment.saturation)),
        ("ELASTIC", f64::from(augment.elastic)),
    ]);
    KernelSpec::new(
        "draw_augmentation",
        SOURCE,
        Work::DrawAugmentation {
            augment: *augment,
            shape,
        },
        &constants,
        vec![
            read(1, "labels", labels, batch),
            read(2, "order", order, batch),
            read(3, "steps", steps, STEP_ELEMENTS),
            read(4, "counter", counter, 1),
            read(5, "normalization", normalization, 2 * shape.channels),
            write(7, "drawn", drawn, batch * per_sample),
            write(8, "batch_labels", batch_labels, batch),
        ],
        batch * (1 + (per_sample - NODES).div_ceil(4)),
    )
}

/// `x[batch,H,W,C]`: the images of the batch, changed as `augmentation` says (see [`draw_augmentation`]) and
/// normalised; what is erased is 0.
///
/// `images`, `order`, `steps`, `counter`, `normalization` and `streamed` as in
/// [`super::gather::gather_batch`]. Writes `x`.
pub fn augment_batch(
    augment: &Augment,
    shape: Shape,
    batch: usize,
    streamed: bool,
    images: View,
    order: View,
    steps: View,
    counter: View,
    normalization: View,
    augmentation: View,
    x: View,
) -> KernelSpec {
    let per_sample = parameters(augment);
    let elements = shape.elements();
    let flag = |on| f64::from(u8::from(on));
    let mut constants = sizes(shape, batch, per_sample);
    constants.extend([
        ("GRID", grid(augment).unwrap_or(0) as f64),
        ("STREAMED", flag(streamed)),
        ("WARP", flag(augment.warps())),
        ("REFLECT", flag(augment.border == Border::Reflect)),
        ("ERASES", flag(augment.erases())),
        ("RECOLOURS", flag(augment.recolours())),
        ("SATURATES", flag(saturates(augment, shape))),
    ]);
    KernelSpec::new(
        "augment_batch",
        SOURCE,
        Work::AugmentBatch {
            augment: *augment,
            shape,
            streamed,
        },
        &constants,
        vec![
            // As many as a batch has: what is read of a larger set.
            read(0, "images", images, batch * elements),
            read(2, "order", order, batch),
            read(3, "steps", steps, STEP_ELEMENTS),
            read(4, "counter", counter, 1),
            read(5, "normalization", normalization, 2 * shape.channels),
            read(6, "augmentation", augmentation, batch * per_sample),
            write(9, "x", x, batch * elements),
        ],
        batch * shape.height * shape.width,
    )
}

/// Whether there are colours to be made more or less of one.
pub fn saturates(augment: &Augment, shape: Shape) -> bool {
    augment.saturation > 0.0 && shape.channels == 3
}

/// Largest shift along an axis of `size` pixels, in pixels.
pub fn shift(augment: &Augment, size: usize) -> f32 {
    augment.shift * size as f32
}

fn sizes(shape: Shape, batch: usize, per_sample: usize) -> Vec<(&'static str, f64)> {
    vec![
        ("BATCH", batch as f64),
        ("HEIGHT", shape.height as f64),
        ("WIDTH", shape.width as f64),
        ("CHANNELS", shape.channels as f64),
        ("PARAMETERS", per_sample as f64),
    ]
}
