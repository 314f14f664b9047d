//! The cases of augmentation: each kind alone, and all together.

use super::cases::{samples, step_table};
use super::parity::{Bench, Case, Tolerance};
use crate::cpu;
use crate::kernels::augment::{augment_batch, draw_augmentation, parameters};
use crate::kernels::{Step, View};
use crate::model::Shape;
use crate::model::augment::{Augment, Border, Flip};

pub(super) fn cases() -> Vec<Case> {
    let square = Shape::new(28, 28, 1);
    let colour = Shape::new(9, 14, 3);
    let odd = Shape::new(7, 5, 2);
    let reflect = |augment| Augment {
        border: Border::Reflect,
        ..augment
    };
    let none = Augment::default();
    let flip = |flip| Augment { flip, ..none };
    let crop = Augment { crop: 4, ..none };
    let affine = Augment {
        shift: 0.2,
        rotate: 180.0,
        scale: 0.4,
        shear: 30.0,
        ..none
    };
    let resized = Augment {
        resized_crop: Some([0.08, 1.0]),
        ..none
    };
    let erase = Augment { erase: 0.7, ..none };
    let colours = Augment {
        brightness: 0.4,
        contrast: 0.8,
        saturation: 0.9,
        ..none
    };
    let elastic = Augment {
        elastic: 3.0,
        ..none
    };
    let everything = Augment {
        flip: Flip::Random,
        crop: 2,
        erase_size: [0.1, 0.9],
        cut_out: 4,
        elastic: 2.0,
        elastic_grid: 3,
        border: Border::Reflect,
        ..Augment {
            resized_crop: resized.resized_crop,
            erase: 0.5,
            brightness: 0.4,
            contrast: 0.4,
            saturation: 0.4,
            ..affine
        }
    };
    let lists: [(&str, Augment, Shape); 27] = [
        ("flip", flip(Flip::Random), square),
        ("flip", flip(Flip::Random), colour),
        ("alternating flip", flip(Flip::Alternating), odd),
        ("crop", crop, square),
        ("crop", reflect(crop), colour),
        // Farther than the image is wide, and an axis without a neighbour.
        ("crop", reflect(Augment { crop: 17, ..none }), odd),
        ("crop", reflect(crop), Shape::new(1, 3, 4)),
        ("shift", Augment { shift: 0.3, ..none }, colour),
        (
            "rotate",
            Augment {
                rotate: 45.0,
                ..none
            },
            square,
        ),
        (
            "scale",
            Augment { scale: 0.9, ..none },
            Shape::new(32, 32, 3),
        ),
        (
            "shear",
            reflect(Augment {
                shear: 60.0,
                ..none
            }),
            odd,
        ),
        ("affine", affine, square),
        ("affine", reflect(affine), colour),
        ("affine", reflect(affine), Shape::new(1, 1, 1)),
        ("resized crop", resized, colour),
        ("resized crop", resized, Shape::new(40, 7, 1)),
        ("erase", erase, square),
        ("erase", erase, odd),
        (
            "cut-out",
            Augment { cut_out: 5, ..none },
            Shape::new(11, 6, 3),
        ),
        ("colours", colours, colour),
        ("colours", colours, odd),
        ("elastic", elastic, square),
        (
            "elastic",
            Augment {
                elastic_grid: 16,
                elastic: 20.0,
                ..none
            },
            odd,
        ),
        ("all", everything, square),
        ("all", everything, colour),
        ("all", everything, Shape::new(5, 4, 33)),
        (
            "all",
            Augment {
                border: Border::Zero,
                ..everything
            },
            Shape::new(32, 32, 3),
        ),
    ];
    let mut cases = Vec::new();
    for (name, augment, shape) in lists {
        let name = match augment.border {
            Border::Reflect => format!("{name}, reflected"),
            Border::Zero => name.into(),
        };
        cases.push(draw_case(&name, augment, shape, 37, 33));
        cases.push(batch_case(&name, augment, shape, 7, 4, false));
    }
    cases.push(batch_case("crop", crop, colour, 7, 7, true));
    cases.push(batch_case("all", everything, square, 7, 5, true));
    cases
}

/// The step's row, with a slab that begins before the batch does.
fn row(b: &mut Bench, first: usize, count: usize, streamed: bool) -> [View; 2] {
    let row = Step {
        seed: 0x9e37_79b9,
        epoch: 11,
        base: if streamed { 4 } else { 0 },
        ..samples(first, count)
    };
    step_table(b, row)
}

/// Scales and shifts as a dataset has them: means between black and white.
fn normalization(shape: Shape) -> Vec<f32> {
    let channels = 0..shape.channels;
    let scale = |c: usize| 1.0 / (60.0 + (7 * c % 11) as f32);
    let scales: Vec<f32> = channels.clone().map(scale).collect();
    let shifts = channels.map(|c| -scale(c) * (100.0 + (5 * c % 13) as f32));
    scales.iter().copied().chain(shifts).collect()
}

fn variant(name: &str, shape: Shape, batch: usize, count: usize) -> String {
    format!("{name}, {shape}, {count} of batch {batch}")
}

fn draw_case(name: &str, augment: Augment, shape: Shape, batch: usize, count: usize) -> Case {
    let variant = variant(name, shape, batch, count);
    Case::new("draw_augmentation", variant, move |b| {
        let (dataset, first) = (41, 6);
        let labels = b.below(10, dataset);
        let order = b.below(dataset as u32, first + count);
        let (labels, order) = (b.input(&labels), b.input(&order));
        let [steps, counter] = row(b, first, count, false);
        let normalization = b.input(&normalization(shape));
        let size = (shape.height + shape.width) as f64;
        // Sums of products of sizes and what sines are made of.
        let tolerance = Tolerance {
            absolute: 1e-6 * (size + 1.0),
            relative: 1e-5,
        };
        let drawn = b.output("drawn", batch * parameters(&augment), tolerance);
        let batch_labels = b.output_words("batch_labels", batch);
        vec![draw_augmentation(
            &augment,
            shape,
            batch,
            labels,
            order,
            steps,
            counter,
            normalization,
            drawn,
            batch_labels,
        )]
    })
}

fn batch_case(
    name: &str,
    augment: Augment,
    shape: Shape,
    batch: usize,
    count: usize,
    streamed: bool,
) -> Case {
    let how = if streamed { ", streamed" } else { "" };
    let variant = variant(name, shape, batch, count) + how;
    Case::new("augment_batch", variant, move |b| {
        let (dataset, first) = (19, 6);
        let images = b.below(256, dataset * shape.elements());
        let images: Vec<u8> = images.into_iter().map(|byte| byte as u8).collect();
        let order = b.below(dataset as u32, first + count);
        let normalization = normalization(shape);
        let places: Vec<u32> = (0..batch as u32).collect();
        let drawn: Vec<f32> = cpu::augment::draw_augmentation(
            &augment,
            shape,
            [5, 3],
            &places,
            &places,
            &normalization,
        );
        let (images, order) = (b.input(&images), b.input(&order));
        let [steps, counter] = row(b, first, count, streamed);
        let normalization = b.input(&normalization);
        let drawn = b.input(&drawn);
        let size = (shape.height + shape.width) as f64;
        // The place that a value comes from is off by some 2⁻²⁴ of the size, and in noise neighbouring
        // pixels are up to 4 apart: of two drivers one came within half of this, one within a fifth.
        let tolerance = Tolerance {
            absolute: match augment.warps() {
                true => 4e-6 * (size + f64::from(augment.elastic) + 10.0),
                false => Tolerance::sum(8).absolute,
            },
            ..Tolerance::sum(8)
        };
        let x = b.output("x", batch * shape.elements(), tolerance);
        vec![augment_batch(
            &augment,
            shape,
            batch,
            streamed,
            images,
            order,
            steps,
            counter,
            normalization,
            drawn,
            x,
        )]
    })
}
