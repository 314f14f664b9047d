//! The cases of mix-up and cut-mix with their loss, and of an evaluation's views.

use super::cases::{part, samples, step_table};
use super::parity::{Bench, Case, Tolerance};
use crate::kernels::mix::{self, MIX_WORDS, Mix};
use crate::kernels::{Step, View, loss, views};
use crate::model::Shape;
use crate::model::recipe::Views;

/// Every case.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let odd = Shape::new(5, 7, 3);
    for (mix_up, cut_mix) in [(0.2, 0.0), (0.0, 1.0), (0.4, 3.0)] {
        for (batch, count) in [(1, 1), (7, 4), (130, 130)] {
            cases.push(draw_case(odd, [mix_up, cut_mix], batch, count));
        }
    }
    // Sides of one pixel and of many.
    cases.push(draw_case(Shape::new(1, 3000, 1), [0.0, 1.0], 70, 70));
    for (shape, batch) in [
        (Shape::new(1, 1, 1), 1),
        (odd, 7),
        (Shape::new(28, 28, 1), 9),
    ] {
        cases.push(mix_case(shape, batch));
    }
    for weighted in [false, true] {
        for smoothing in [0.0, 0.1] {
            for (batch, count, classes, factor) in [
                (1, 1, 10, 1.0),
                (7, 3, 3, 1.0),
                (130, 129, 10, 4.0),
                // Where e^z would overflow.
                (70, 66, 5, 100.0),
            ] {
                let samples = [batch, count, classes];
                cases.push(loss_case(smoothing, weighted, samples, factor));
            }
        }
    }
    for shown in [Views::Mirror, Views::Six] {
        cases.push(gather_case(Shape::new(1, 1, 1), shown, 1, 1, false));
        cases.push(gather_case(Shape::new(1, 2, 5), shown, 3, 2, false));
        cases.push(gather_case(odd, shown, 7, 4, false));
        cases.push(gather_case(odd, shown, 7, 7, true));
        cases.push(average_case(shown, 1, 1));
        cases.push(average_case(shown, 37, 10));
    }
    cases
}

/// Those that are worth running on NaN and infinities, with these among what they draw.
pub fn nonfinite_cases() -> Vec<Case> {
    let mut cases = vec![
        gather_case(Shape::new(4, 3, 33), Views::Six, 7, 4, false),
        average_case(Views::Mirror, 7, 5),
        average_case(Views::Six, 37, 10),
    ];
    for smoothing in [0.0, 0.1] {
        cases.push(loss_case(smoothing, false, [7, 3, 3], 1.0));
        cases.push(loss_case(smoothing, false, [130, 129, 10], 4.0));
        cases.push(loss_case(smoothing, true, [130, 129, 10], 4.0));
    }
    cases.into_iter().map(Case::nonfinite).collect()
}

fn draw_case(shape: Shape, [mix_up, cut_mix]: [f32; 2], batch: usize, count: usize) -> Case {
    let variant = format!("{count} of batch {batch}, {shape}, alphas {mix_up} {cut_mix}");
    Case::new("draw_mixes", variant, move |b| {
        let labels = b.below(10, batch);
        let labels = b.input(&labels);
        let row = Step {
            seed: 0x9e37_79b9,
            epoch: 11,
            ..samples(3, count)
        };
        let [steps, counter] = step_table(b, row);
        let quantiles = b.input(&mix::quantiles(mix_up, cut_mix));
        let batch_labels = b.output_words("batch_labels", batch);
        let mixes = b.output_words("mixes", batch * MIX_WORDS);
        let mix = Mix {
            shape,
            mix_up: mix_up > 0.0,
            cut_mix: cut_mix > 0.0,
        };
        vec![mix::draw_mixes(
            mix,
            batch,
            labels,
            steps,
            counter,
            quantiles,
            batch_labels,
            mixes,
        )]
    })
}

fn mix_case(shape: Shape, batch: usize) -> Case {
    Case::new("mix_batch", format!("{batch}×{shape}"), move |b| {
        let x = b.values(batch * shape.elements());
        let x = b.input(&x);
        let (height, width) = (shape.height as u32, shape.width as u32);
        let mut mixes = Vec::new();
        for i in 0..batch {
            let partner = b.below(batch as u32, 1)[0];
            let [top, bottom] = ordered(b, height);
            let [left, right] = ordered(b, width);
            let weight = b.below(1 << 24, 1)[0];
            mixes.extend(match i % 3 {
                0 => [0, 1, 1, partner, 0, 0, height, width, weight],
                _ => [0, 1, 1, partner, top, left, bottom, right, 1 << 24],
            });
        }
        let mixes = b.input(&mixes);
        let y = b.output("y", batch * shape.elements(), Tolerance::sum(2));
        vec![mix::mix_batch(shape, batch, x, mixes, y)]
    })
}

/// Two places from 0 to `size`, the smaller one first.
fn ordered(b: &mut Bench, size: u32) -> [u32; 2] {
    let places = b.below(size + 1, 2);
    [places[0].min(places[1]), places[0].max(places[1])]
}

fn loss_case(
    smoothing: f32,
    weighted: bool,
    [batch, count, classes]: [usize; 3],
    factor: f32,
) -> Case {
    let weights = if weighted { ", weighted" } else { "" };
    let variant = format!(
        "{count} of batch {batch}, {classes} classes, up to ±{factor}, smoothing {smoothing}{weights}"
    );
    Case::new("mixed_softmax_cross_entropy", variant, move |b| {
        let logits = b.values(batch * classes);
        let logits: Vec<f32> = logits.iter().map(|z| z * factor).collect();
        let labels = b.below(classes as u32, batch);
        let seconds = b.below(classes as u32, batch);
        let shares = b.below(18, batch);
        // Some of one label only, some of one half each.
        let mixes = seconds.iter().zip(&shares).flat_map(|(second, share)| {
            let more = 18 + (*share).min(17) + share / 17;
            [*second, more, 36, 0, 0, 0, 0, 0, 0]
        });
        let mixes: Vec<u32> = mixes.collect();
        let weights: Option<View> = weighted.then(|| {
            let weights = b.below(12, classes);
            let weights: Vec<f32> = weights.iter().map(|w| 0.25 + *w as f32 / 4.0).collect();
            b.input(&weights)
        });
        let (logits, labels, mixes) = (b.input(&logits), b.input(&labels), b.input(&mixes));
        let [steps, counter] = step_table(b, part(3, count));
        vec![loss::mixed_softmax_cross_entropy(
            smoothing,
            batch,
            classes,
            logits,
            labels,
            mixes,
            weights,
            steps,
            counter,
            b.output("loss", batch, Tolerance::TRANSCENDENTAL),
            b.output("gradient", batch * classes, Tolerance::TRANSCENDENTAL),
        )]
    })
}

fn gather_case(shape: Shape, shown: Views, batch: usize, count: usize, streamed: bool) -> Case {
    let how = if streamed { ", streamed" } else { "" };
    let variant = format!("{shape}, {shown:?} of {count} of batch {batch}{how}");
    Case::new("gather_views", variant, move |b| {
        let (dataset, first) = (19, 6);
        let images = b.below(256, dataset * shape.elements());
        let images: Vec<u8> = images.into_iter().map(|byte| byte as u8).collect();
        let labels = b.below(10, dataset);
        let order = b.below(dataset as u32, first + count);
        let (scale, shift) = (b.values(shape.channels), b.values(shape.channels));
        let scale: Vec<f32> = scale.iter().map(|s| s / 255.0).collect();
        let (images, labels, order) = (b.input(&images), b.input(&labels), b.input(&order));
        // A slab that begins before the batch does.
        let row = Step {
            base: if streamed { 4 } else { 0 },
            ..samples(first, count)
        };
        let [steps, counter] = step_table(b, row);
        let normalization = b.input(&[scale, shift].concat());
        let elements = shown.count() * batch * shape.elements();
        let x = b.output("x", elements, Tolerance::sum(2));
        let batch_labels = b.output_words("batch_labels", batch);
        vec![views::gather_views(
            shape,
            batch,
            shown,
            streamed,
            images,
            labels,
            order,
            steps,
            counter,
            normalization,
            x,
            batch_labels,
        )]
    })
}

fn average_case(shown: Views, batch: usize, classes: usize) -> Case {
    let variant = format!("{shown:?} of batch {batch}, {classes} classes");
    Case::new("average_views", variant, move |b| {
        let z = b.values(shown.count() * batch * classes);
        let z = b.input(&z);
        let y = b.output("y", batch * classes, Tolerance::sum(shown.count()));
        vec![views::average_views(shown, batch, classes, z, y)]
    })
}
