//! Augmentation: its twins against PyTorch and by hand, its draws by their statistics, its kernels
//! against the twins, and trainings with it to the bit.

mod common;

use serde::Deserialize;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use wgrad::cpu::augment::{augment_batch, draw_augmentation};
use wgrad::cpu::gather_batch;
use wgrad::data::Dataset;
use wgrad::engine::{Engine, Split};
use wgrad::gpu::{Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::kernels::Step;
use wgrad::kernels::augment::{NODES, parameters};
use wgrad::model::augment::{Augment, Border, Flip};
use wgrad::model::recipe::{Optimizer, Sampler};
use wgrad::model::{Definition, Model, Shape, initial_parameters};
use wgrad::plan::Options;
use wgrad::report::preview::{Excerpt, preview};
use wgrad::train::{balanced_order, epoch_order};
use wgrad::verify;

fn gpu() -> Arc<Gpu> {
    let gpu = Gpu::open(&Choice::Best);
    Arc::new(gpu.unwrap_or_else(|e| panic!("these tests need an adapter: {e}; {NO_ADAPTER_HINT}")))
}

fn none() -> Augment {
    Augment::default()
}

/// What is drawn for the samples at these places of an order in which each image is its own.
fn draw(augment: &Augment, shape: Shape, seed: u32, epoch: u32, places: &[u32]) -> Vec<Vec<f64>> {
    let normalization = [vec![1.0; shape.channels], vec![-100.0; shape.channels]].concat();
    let drawn = draw_augmentation(
        augment,
        shape,
        [seed, epoch],
        places,
        places,
        &normalization,
    );
    let rows = drawn.chunks(parameters(augment));
    rows.map(<[f64]>::to_vec).collect()
}

/// A table of one sample that changes nothing.
fn unchanged(augment: &Augment) -> Vec<f64> {
    let mut row = vec![0.0; parameters(augment)];
    [row[0], row[4]] = [1.0; 2];
    row[14..17].fill(1.0);
    row
}

/// One image of one row, changed as the table says, as bytes.
fn show(augment: &Augment, shape: Shape, image: &[u8], row: &[f64]) -> Vec<f64> {
    let normalization = [vec![1.0; shape.channels], vec![0.0; shape.channels]].concat();
    let mut x = vec![f64::NAN; shape.elements()];
    augment_batch(augment, shape, image, &[0], row, &normalization, &mut x);
    x
}

#[derive(Deserialize)]
struct Case {
    name: String,
    shape: [usize; 3],
    /// Seed, epoch, place in the order, number.
    draw: [u32; 4],
    augment: Augment,
    image: Vec<u8>,
    scale: Vec<f32>,
    shift: Vec<f32>,
    x: Vec<f32>,
}

/// Against NumPy and PyTorch's `grid_sample`, draws and all; see `golden/make_augment.py`.
#[test]
fn images_are_changed_as_by_another_program() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("golden/augment.json")).unwrap();
    assert_eq!(cases.len(), 9);
    for case in cases {
        let [height, width, channels] = case.shape;
        let shape = Shape::new(height, width, channels);
        let [seed, epoch, place, sample] = case.draw;
        let normalization = [case.scale, case.shift].concat();
        let table: Vec<f32> = draw_augmentation(
            &case.augment,
            shape,
            [seed, epoch],
            &[place],
            &[sample],
            &normalization,
        );
        let mut x = vec![f32::NAN; shape.elements()];
        augment_batch(
            &case.augment,
            shape,
            &case.image,
            &[0],
            &table,
            &normalization,
            &mut x,
        );
        for (i, (found, expected)) in x.iter().zip(&case.x).enumerate() {
            assert!(
                (found - expected).abs() < 2e-5,
                "{}, element {i}: expected {expected}, found {found}",
                case.name
            );
        }
    }
}

#[test]
fn by_hand() {
    let row = Shape::new(1, 4, 1);
    let image = [10, 20, 30, 40];
    let crop = Augment { crop: 2, ..none() };
    let reflect = Augment {
        border: Border::Reflect,
        ..crop
    };
    let mut table = unchanged(&crop);
    table[2] = 2.0;
    assert_eq!(show(&crop, row, &image, &table), [30.0, 40.0, 0.0, 0.0]);
    assert_eq!(
        show(&reflect, row, &image, &table),
        [30.0, 40.0, 30.0, 20.0]
    );
    table[2] = -2.0;
    assert_eq!(show(&crop, row, &image, &table), [0.0, 0.0, 10.0, 20.0]);
    assert_eq!(
        show(&reflect, row, &image, &table),
        [30.0, 20.0, 10.0, 20.0]
    );
    // Mirrored.
    (table[0], table[2]) = (-1.0, 3.0);
    assert_eq!(show(&crop, row, &image, &table), [40.0, 30.0, 20.0, 10.0]);

    // Half a pixel to the left, fading beyond the border.
    let warp = Augment {
        rotate: 90.0,
        ..none()
    };
    let mut table = unchanged(&warp);
    table[2] = 0.5;
    assert_eq!(show(&warp, row, &image, &table), [15.0, 25.0, 35.0, 20.0]);
    let reflected = Augment {
        border: Border::Reflect,
        ..warp
    };
    let shown = show(&reflected, row, &image, &table);
    assert_eq!(shown, [15.0, 25.0, 35.0, 35.0]);

    // A quarter turn about the centre is a permutation of a square's pixels.
    let square = Shape::new(3, 3, 1);
    let image = [1, 2, 3, 4, 5, 6, 7, 8, 9];
    let table = [&[0.0, 1.0, 0.0, -1.0, 0.0, 2.0], &unchanged(&warp)[6..]].concat();
    let turned = show(&warp, square, &image, &table);
    assert_eq!(turned, [7.0, 4.0, 1.0, 8.0, 5.0, 2.0, 9.0, 6.0, 3.0]);

    // Rectangles: one inside, one that reaches beyond a corner.
    let erase = Augment {
        cut_out: 2,
        ..none()
    };
    let mut table = unchanged(&erase);
    table[6..14].copy_from_slice(&[0.0, 1.0, 2.0, 2.0, 2.0, -1.0, 4.0, 1.0]);
    let erased = show(&erase, square, &image, &table);
    assert_eq!(erased, [1.0, 0.0, 3.0, 4.0, 0.0, 6.0, 0.0, 8.0, 9.0]);

    // Nodes that all move alike move the image.
    let elastic = Augment {
        elastic: 1.0,
        elastic_grid: 2,
        ..none()
    };
    let mut table = unchanged(&elastic);
    for node in table[NODES..].chunks_mut(2) {
        node.copy_from_slice(&[1.0, 0.0]);
    }
    let moved = show(&elastic, square, &image, &table);
    for (moved, expected) in moved
        .iter()
        .zip([4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 0.0, 0.0, 0.0])
    {
        assert!((moved - expected).abs() < 1e-12, "{moved}, not {expected}");
    }

    // Colours: twice as bright, half the distance to grey 100 (of which 50 is added), and to its own grey.
    let colours = Augment {
        brightness: 1.0,
        contrast: 0.5,
        saturation: 0.5,
        ..none()
    };
    let pixel = Shape::new(1, 1, 3);
    let mut table = unchanged(&colours);
    table[14..18].copy_from_slice(&[2.0, 0.5, 0.0, 50.0]);
    let grey = 0.299 * 150.0 + 0.587 * 177.5 + 0.114 * 60.0;
    for shown in show(&colours, pixel, &[100, 200, 10], &table) {
        assert!((shown - grey).abs() < 1e-4, "{shown}, not {grey}");
    }
}

/// Without a change the bits are those of the plain gather, copied or interpolated.
#[test]
fn an_unchanged_image_is_gathered_to_the_bit() {
    for shape in [Shape::new(5, 7, 3), Shape::new(28, 28, 1)] {
        let images: Vec<u8> = (0..3 * shape.elements())
            .map(|i| (i * 37 % 256) as u8)
            .collect();
        let scale: Vec<f32> = (0..shape.channels).map(|c| 0.013 + c as f32).collect();
        let shift: Vec<f32> = (0..shape.channels).map(|c| -0.7 * c as f32).collect();
        let places = [2, 0];
        let (expected, _) = gather_batch(&images, &places, &[0; 3], &places, shape, &scale, &shift);
        let normalization = [scale, shift].concat();
        let crop = Augment { crop: 3, ..none() };
        let elastic = Augment {
            elastic: 2.0,
            rotate: 5.0,
            ..none()
        };
        for augment in [crop, elastic] {
            let row: Vec<f32> = unchanged(&augment).iter().map(|v| *v as f32).collect();
            let mut x = vec![f32::NAN; expected.len()];
            let table = row.repeat(2);
            augment_batch(
                &augment,
                shape,
                &images,
                &places,
                &table,
                &normalization,
                &mut x,
            );
            let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&x), bits(&expected), "{augment:?}");
        }
    }
}

/// Mean and variance of what should be uniform from −1 to 1, and that none is beyond.
fn expect_uniform(what: &str, values: &[f64]) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| v * v).sum::<f64>() / n;
    assert!(values.iter().all(|v| v.abs() <= 1.0 + 1e-6), "{what}");
    // Five standard deviations.
    assert!(
        mean.abs() < 5.0 * (1.0 / 3.0 / n).sqrt(),
        "{what}: mean {mean}"
    );
    let off = (variance - 1.0 / 3.0).abs();
    assert!(
        off < 5.0 * (4.0 / 45.0 / n).sqrt(),
        "{what}: variance {variance}"
    );
}

#[test]
fn draws_are_uniform_and_within_their_bounds() {
    let shape = Shape::new(20, 30, 3);
    let places: Vec<u32> = (0..4000).collect();
    let of = |augment: Augment| draw(&augment, shape, 7, 3, &places);
    let column = |rows: &[Vec<f64>], change: &dyn Fn(&[f64]) -> f64| -> Vec<f64> {
        rows.iter().map(|row| change(row)).collect()
    };

    let rows = of(Augment {
        rotate: 30.0,
        ..none()
    });
    let angle = |row: &[f64]| row[3].atan2(row[4]).to_degrees() / -30.0;
    expect_uniform("rotate", &column(&rows, &angle));
    // The centre stays where it is.
    for row in &rows {
        let (w, h) = (14.5, 9.5);
        let centre = [
            row[0] * w + row[1] * h + row[2],
            row[3] * w + row[4] * h + row[5],
        ];
        assert!(
            (centre[0] - w).abs() < 1e-5 && (centre[1] - h).abs() < 1e-5,
            "{centre:?}"
        );
    }
    let rows = of(Augment {
        scale: 0.25,
        ..none()
    });
    expect_uniform("scale", &column(&rows, &|row| (1.0 / row[0] - 1.0) / 0.25));
    let rows = of(Augment {
        shear: 20.0,
        ..none()
    });
    expect_uniform(
        "shear",
        &column(&rows, &|row| row[1].atan().to_degrees() / 20.0),
    );
    let rows = of(Augment {
        shift: 0.1,
        ..none()
    });
    expect_uniform("shift right", &column(&rows, &|row| row[2] / 3.0));
    expect_uniform("shift down", &column(&rows, &|row| row[5] / 2.0));
    let rows = of(Augment {
        brightness: 0.3,
        contrast: 0.2,
        saturation: 0.1,
        ..none()
    });
    expect_uniform("brightness", &column(&rows, &|row| (row[14] - 1.0) / 0.3));
    expect_uniform("contrast", &column(&rows, &|row| (row[15] - 1.0) / 0.2));
    expect_uniform("saturation", &column(&rows, &|row| (row[16] - 1.0) / 0.1));
    let rows = of(Augment {
        elastic: 3.0,
        ..none()
    });
    for node in [0, 1, 50, 97] {
        expect_uniform("elastic", &column(&rows, &|row| row[NODES + node] / 3.0));
    }

    // Whole numbers: each as often as the others.
    let rows = of(Augment { crop: 2, ..none() });
    for at in [2, 5] {
        for offset in -2..=2 {
            let count = rows
                .iter()
                .filter(|row| row[at] == f64::from(offset))
                .count();
            assert!(
                (count as f64 - 800.0).abs() < 5.0 * 640f64.sqrt(),
                "{offset}: {count}"
            );
        }
    }
    let mirrored = |rows: &[Vec<f64>]| rows.iter().filter(|row| row[0] == -1.0).count() as f64;
    let rows = of(Augment {
        flip: Flip::Random,
        ..none()
    });
    assert!((mirrored(&rows) - 2000.0).abs() < 5.0 * 1000f64.sqrt());

    // Windows lie inside the image and have about the area that was asked for.
    let rows = of(Augment {
        resized_crop: Some([0.1, 0.5]),
        ..none()
    });
    for row in &rows {
        let (wide, high) = (30.0 * row[0], 20.0 * row[4]);
        let (left, top) = (row[2] + 0.5 - 0.5 * row[0], row[5] + 0.5 - 0.5 * row[4]);
        assert!(left > -1e-5 && left + wide < 30.0 + 1e-5, "{row:?}");
        assert!(top > -1e-5 && top + high < 20.0 + 1e-5, "{row:?}");
        let (area, aspect) = (wide * high / 600.0, wide / high);
        assert!(
            area < 0.5 + 1e-6 && (area > 0.1 - 1e-6 || high > 19.99),
            "{row:?}"
        );
        assert!(
            aspect > 0.749 && (aspect < 1.334 || wide > 29.99),
            "{row:?}"
        );
    }

    // Rectangles too, and a quarter of the images has none.
    let rows = of(Augment {
        erase: 0.75,
        erase_size: [0.1, 0.3],
        ..none()
    });
    let mut erased = 0;
    for row in &rows {
        let [top, left, bottom, right] = [row[6], row[7], row[8], row[9]];
        assert!(
            top >= 0.0 && left >= 0.0 && bottom <= 20.0 && right <= 30.0,
            "{row:?}"
        );
        let area = (bottom - top) * (right - left);
        if area > 0.0 {
            erased += 1;
            // Whole sides make it a little smaller, the image's end too.
            assert!(area <= 180.0 && area > 60.0 - 20.0, "{row:?}");
        }
    }
    assert!(
        (f64::from(erased) - 3000.0).abs() < 5.0 * 750f64.sqrt(),
        "{erased}"
    );
    let rows = of(Augment {
        cut_out: 5,
        ..none()
    });
    for row in &rows {
        assert!(
            (-2.0..18.0).contains(&row[10]) && row[12] - row[10] == 5.0,
            "{row:?}"
        );
        assert!(
            (-2.0..28.0).contains(&row[11]) && row[13] - row[11] == 5.0,
            "{row:?}"
        );
    }
}

#[test]
fn what_is_drawn_follows_from_seed_epoch_and_place_alone() {
    let shape = Shape::new(8, 6, 1);
    let augment = Augment {
        rotate: 10.0,
        crop: 2,
        elastic: 1.0,
        ..none()
    };
    let all = draw(&augment, shape, 1, 2, &[0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(draw(&augment, shape, 1, 2, &[5])[0], all[5]);
    assert_eq!(draw(&augment, shape, 1, 2, &[4, 5, 6])[..], all[4..]);
    for other in [
        draw(&augment, shape, 2, 2, &[5]),
        draw(&augment, shape, 1, 3, &[5]),
    ] {
        assert_ne!(other[0], all[5]);
    }
    // What else is drawn changes nothing.
    let more = Augment {
        erase: 1.0,
        brightness: 0.5,
        ..augment
    };
    let more = draw(&more, shape, 1, 2, &[5]).remove(0);
    assert_eq!(more[..6], all[5][..6]);
    assert_eq!(more[NODES..], all[5][NODES..]);
}

#[test]
fn an_alternating_flip_alternates_and_keeps_to_its_image() {
    let shape = Shape::new(3, 4, 1);
    let augment = Augment {
        flip: Flip::Alternating,
        ..none()
    };
    let flips = |epoch, places: &[u32], samples: &[u32]| -> Vec<bool> {
        let drawn: Vec<f64> =
            draw_augmentation(&augment, shape, [3, epoch], places, samples, &[1.0, 0.0]);
        drawn.chunks(NODES).map(|row| row[0] < 0.0).collect()
    };
    let samples: Vec<u32> = (0..4000).collect();
    let reversed: Vec<u32> = samples.iter().rev().copied().collect();
    let first = flips(1, &samples, &samples);
    let half = first.iter().filter(|flip| **flip).count() as f64;
    assert!((half - 2000.0).abs() < 5.0 * 1000f64.sqrt(), "{half}");
    let second = flips(2, &reversed, &samples);
    assert!(first.iter().zip(&second).all(|(a, b)| a != b));
    assert_eq!(flips(3, &samples, &samples), first);
}

#[test]
fn kernels_compute_what_their_twins_do() {
    let gpu = gpu();
    let mut failures = Vec::new();
    let mut count = 0;
    for case in verify::cases(gpu.report()) {
        if !["draw_augmentation", "augment_batch"].contains(&case.kernel.as_str()) {
            continue;
        }
        count += 1;
        let outcome = case.run(&gpu).unwrap();
        println!(
            "{}, {}: {:.1e} of {:.1e}",
            outcome.kernel, outcome.variant, outcome.worst, outcome.tolerance
        );
        if let Some(detail) = outcome.detail {
            failures.push(format!("{}, {}: {detail}", outcome.kernel, outcome.variant));
        }
    }
    assert!(count > 40, "{count} cases");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

const EVERYTHING: &str = "
[recipe.augment]
shift = 0.1
rotate = 10
scale = 0.1
shear = 5
flip = 'alternating'
crop = 1
border = 'reflect'
resized_crop = [0.6, 1]
erase = 0.5
cut_out = 2
brightness = 0.2
contrast = 0.2
elastic = 0.5
elastic_grid = 2
";

fn definition(augment: &str) -> Definition {
    let text = common::MODEL.replacen("\n\n[[layer]]", &format!("\n{augment}\n[[layer]]"), 1);
    Definition::parse(&text, "small.toml").unwrap()
}

/// Parameters and losses after two epochs of five steps, the last of which is not full.
fn trained(gpu: Option<Arc<Gpu>>, augment: &str, slab_bytes: Option<u64>) -> (Vec<f32>, Vec<f32>) {
    let definition = definition(augment);
    let model: Model = definition
        .resolve(definition.input, definition.classes)
        .unwrap();
    let options = Options {
        slab_bytes,
        ..Options::of(&definition.recipe)
    };
    let rule = Optimizer::Sgd {
        momentum: 0.9,
        nesterov: false,
        weight_decay: 0.0,
    };
    let mut engine = Engine::new(gpu, &model, 20, &rule, &options).unwrap();
    engine
        .set_parameters(&initial_parameters(&model, 1))
        .unwrap();
    let (images, labels) = common::images(96, 1);
    let labels: Vec<u32> = labels.into_iter().map(u32::from).collect();
    let upload = engine.upload_dataset(Split::Train, images, &labels, &[0.01, -1.0]);
    upload.unwrap();
    let order: Vec<u32> = (0..96).map(|i| i * 5 % 96).collect();
    let mut losses = Vec::new();
    for epoch in 1..=2 {
        let steps: Vec<Step> = (0..5)
            .map(|i| Step {
                lr: 0.05,
                seed: 9,
                epoch,
                ..Step::new(20 * i, 20.min(96 - 20 * i))
            })
            .collect();
        let go_on = &mut |_: &[_]| Ok(std::ops::ControlFlow::Continue(()));
        let metrics = engine.train_epoch(&order, &steps, go_on).unwrap();
        losses.extend(metrics.iter().map(|m| m.loss_sum));
    }
    (engine.parameters().unwrap(), losses)
}

#[test]
fn the_same_seed_gives_the_same_bits_and_both_devices_agree() {
    let gpu = gpu();
    let (cpu, losses) = trained(None, EVERYTHING, None);
    assert_eq!(
        (cpu.clone(), losses.clone()),
        trained(None, EVERYTHING, None)
    );
    let plain = trained(None, "", None).1;
    assert_ne!(losses, plain);
    let (on_gpu, gpu_losses) = trained(Some(gpu.clone()), EVERYTHING, None);
    for (a, b) in losses.iter().zip(&gpu_losses) {
        assert!((a - b).abs() < 1e-3 * a.abs().max(1.0), "{a} and {b}");
    }
    for (a, b) in cpu.iter().zip(&on_gpu) {
        assert!((a - b).abs() < 2e-3, "{a} and {b}");
    }
    // In slabs of a batch, and on end.
    let slabs = trained(Some(gpu), EVERYTHING, Some(20 * 48));
    assert_eq!(slabs, (on_gpu, gpu_losses));
}

/// What is shown is what the step's kernels make, on both devices; and the original where nothing is drawn.
#[test]
fn a_preview_shows_what_a_step_is_given() {
    let gpu = gpu();
    let (images, labels) = common::images(96, 1);
    let data = Dataset {
        images,
        labels: labels.into_iter().map(u32::from).collect(),
        shape: Shape::new(8, 6, 1),
        classes: 4,
        class_names: ["a", "b", "c", "d"].map(String::from).to_vec(),
        files: Vec::new(),
    };
    let shown = |gpu: Option<&Gpu>, augment: &str, epoch, count| {
        let definition = definition(augment);
        let model = definition.resolve(data.shape, data.classes).unwrap();
        let normalization = [1.0 / 64.0, -1.0];
        preview(
            gpu,
            &model,
            &definition.recipe,
            &data,
            &normalization,
            Excerpt {
                seed: 5,
                epoch,
                count,
            },
        )
        .unwrap()
    };
    let show = |gpu: Option<&Gpu>, augment: &str, epoch| shown(gpu, augment, epoch, 20);
    let plain = show(None, "", 1);
    assert_eq!(plain.samples[..], epoch_order(96, 5, 1)[..20]);
    for (sample, [first, second]) in plain.samples.iter().zip(&plain.targets) {
        let label = data.labels[*sample as usize];
        assert_eq!((*first, second.1), ((label, 1.0), 0.0));
    }
    assert_eq!(plain.before.len(), 20 * 48);
    let first = plain.samples[0] as usize;
    assert_eq!(plain.before[..48], data.images[48 * first..][..48]);
    assert_eq!(plain.after, plain.before);
    assert_eq!(show(Some(&gpu), "", 1), plain);

    let cpu = show(None, EVERYTHING, 2);
    let on_gpu = show(Some(&gpu), EVERYTHING, 2);
    assert_eq!(on_gpu.before, cpu.before);
    assert_ne!(cpu.after, cpu.before);
    let pairs = cpu.after.iter().zip(&on_gpu.after);
    assert!(pairs.clone().all(|(a, b)| a.abs_diff(*b) <= 1));
    assert_ne!(show(None, EVERYTHING, 3).samples, cpu.samples);

    // Each image with the next one of its batch, and so their labels.
    let mixed = show(None, "[recipe.augment]\nmix_up = 0.5", 1);
    assert_eq!(
        show(Some(&gpu), "[recipe.augment]\nmix_up = 0.5", 1).targets,
        mixed.targets
    );
    let image = |i: usize| plain.before[48 * (i % 20)..][..48].iter();
    for (i, [(first, share), (second, rest)]) in mixed.targets.iter().enumerate() {
        let labels = [i, i + 1].map(|i| data.labels[plain.samples[i % 20] as usize]);
        assert!(*share >= 0.5 && share + rest == 1.0);
        assert!([[*first, *second], [*second, *first]].contains(&labels));
        let after = &mixed.after[48 * i..][..48];
        let is_mix = |a: f32, b: f32| {
            let bytes = image(i).zip(image(i + 1)).zip(after);
            bytes.clone().all(|((x, y), z)| {
                (a * f32::from(*x) + b * f32::from(*y) - f32::from(*z)).abs() <= 1.0
            })
        };
        assert!(is_mix(*share, *rest) || is_mix(*rest, *share), "{i}");
    }

    // More than a batch: the same ones first, the last batch a smaller one.
    for augment in [EVERYTHING, "[recipe.augment]\nmix_up = 0.5"] {
        let whole = shown(None, augment, 1, 1000);
        let order = epoch_order(96, 5, 1);
        assert_eq!(whole.samples, order);
        let first = show(None, augment, 1);
        assert_eq!(whole.after[..20 * 48], first.after);
        assert_eq!(whole.targets[..20], first.targets);
        assert_eq!((whole.after.len(), whole.targets.len()), (96 * 48, 96));
        for (sample, before) in order.iter().zip(whole.before.chunks(48)) {
            assert_eq!(before, &data.images[48 * *sample as usize..][..48]);
        }
    }
    let moved = "[recipe.augment]\ncrop = 1\nflip = 'random'";
    let some = shown(Some(&gpu), moved, 1, 90);
    assert_eq!((some.samples.len(), some.before.len()), (90, 90 * 48));
    assert_eq!(some, shown(None, moved, 1, 90));
    let plainly = shown(None, "", 1, 96);
    assert_eq!(plainly.after, plainly.before);

    // As the sampler has it.
    let rare = Dataset {
        labels: (0..96).map(|i| u32::from(i < 6)).collect(),
        classes: 2,
        ..data.clone()
    };
    let mut definition = definition("");
    definition.recipe.sampler = Sampler::Balanced;
    let model = definition.resolve(rare.shape, rare.classes).unwrap();
    let excerpt = Excerpt {
        seed: 5,
        epoch: 1,
        count: 96,
    };
    let normalization = [1.0 / 64.0, -1.0];
    let balanced = preview(
        None,
        &model,
        &definition.recipe,
        &rare,
        &normalization,
        excerpt,
    );
    assert_eq!(
        balanced.unwrap().samples,
        balanced_order(&rare.labels, 5, 1)
    );

    // A crop by whole pixels moves bytes and changes none.
    let cropped = show(None, "[recipe.augment]\ncrop = 1\nborder = 'reflect'", 1);
    let differ = cropped.after.chunks(48).zip(plain.before.chunks(48));
    for (after, before) in differ {
        assert!(after.iter().all(|byte| before.contains(byte)));
    }
}

#[test]
fn the_command_draws_a_preview() {
    let folder = tempfile::tempdir().unwrap();
    common::write_model_and_data(folder.path());
    let preview = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wgrad"));
        command.current_dir(folder.path());
        let small = ["preview", "--model", "small.toml", "--data", "shapes"];
        let output = command.args(small).args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    };
    let (code, out, error) = preview(&["--set", "augment.rotate=10", "--count", "5"]);
    assert_eq!(code, Some(0), "{error}");
    assert!(out.contains("augment  rotate 10"), "{out}");
    assert!(out.contains("preview.png: 5 images"), "{out}");
    let png = std::fs::read(folder.path().join("preview.png")).unwrap();
    assert!(png.starts_with(b"\x89PNG"));
    let (code, out, _) = preview(&["--out", "other.png"]);
    assert_eq!(code, Some(0));
    assert!(out.contains("augment  nothing"), "{out}");
    let (code, _, error) = preview(&["--epoch", "0"]);
    assert_eq!(code, Some(2), "{error}");
    assert!(error.contains("--epoch of at least 1, found 0"), "{error}");
    let (code, _, error) = preview(&["--set", "augment.rotate=200"]);
    assert_eq!(code, Some(2), "{error}");
    assert!(error.contains("from 0 to 180, found 200"), "{error}");
    let (code, _, error) = preview(&["--out", "nowhere/preview.png"]);
    assert_eq!(code, Some(1), "{error}");
}

/// The same through the command: killed and resumed is uninterrupted, and the run says how it was trained.
#[test]
fn a_resumed_training_draws_what_an_uninterrupted_one_does() {
    let folder = tempfile::tempdir().unwrap();
    common::write_model_and_data(folder.path());
    let text = common::MODEL.replacen("\n\n[[layer]]", &format!("\n{EVERYTHING}\n[[layer]]"), 1);
    std::fs::write(folder.path().join("small.toml"), text).unwrap();
    let wgrad = |arguments: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wgrad"));
        command.current_dir(folder.path());
        let output = command.args(arguments.split(' ')).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    let train = "train --model small.toml --data shapes --device cpu";
    wgrad(&format!("{train} --epochs 3 --out whole"));
    wgrad(&format!("{train} --epochs 1 --out parts"));
    wgrad("train --resume parts --epochs 3");
    let weights = |run: &str| {
        let file = Path::new(run).join("model.safetensors");
        std::fs::read(folder.path().join(file)).unwrap()
    };
    assert!(weights("whole") == weights("parts"));
    let run = std::fs::read_to_string(folder.path().join("whole/run.json")).unwrap();
    assert!(
        run.contains("\"alternating\"") && run.contains("\"cut_out\": 2"),
        "{run}"
    );
}
