//! A network's memory is what `inspect` predicts, its evaluation does not depend on the batch, and a
//! model with few products gets the larger tiles.

use std::ops::ControlFlow;
use std::sync::Arc;
use wgrad::cpu::{Twins, Values};
use wgrad::engine::{Engine, Split, memory};
use wgrad::gpu::{AdapterReport, Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::kernels::conv2d::{Family, Product, Tile};
use wgrad::kernels::{Step, Work};
use wgrad::model::recipe::{Optimizer, Precision, Views};
use wgrad::model::{self, Definition, Model};
use wgrad::plan::{Mode, Options, Plan, Section, Target};

fn gpu() -> Arc<Gpu> {
    let gpu = Gpu::open(&Choice::Best);
    Arc::new(gpu.unwrap_or_else(|e| panic!("these tests need an adapter: {e}; {NO_ADAPTER_HINT}")))
}

#[test]
fn a_network_takes_the_memory_that_was_predicted() {
    let gpu = gpu();
    for (name, _) in model::SHIPPED {
        let definition = model::load(name).unwrap();
        let model = definition
            .resolve(definition.input, definition.classes)
            .unwrap();
        let recipe = &definition.recipe;
        for (explicit_conv, large) in [(false, false), (false, true), (true, false)] {
            let options = Options {
                explicit_conv,
                large_evaluation: Some(large),
                ..Options::default()
            };
            // Explicit columns of the larger models exceed what the software adapter binds.
            let batch = if explicit_conv { 8 } else { recipe.batch_size };
            let predicted: u64 = memory(&model, batch, &recipe.optimizer, &options, gpu.report())
                .unwrap()
                .iter()
                .map(|(_, bytes)| bytes)
                .sum();
            let before = gpu.allocated_bytes();
            let network = Engine::new(
                Some(gpu.clone()),
                &model,
                batch,
                &recipe.optimizer,
                &options,
            )
            .unwrap();
            let taken = gpu.allocated_bytes() - before;
            let error = taken as f64 / predicted as f64 - 1.0;
            assert!(
                error.abs() <= 0.05,
                "{name}, explicit {explicit_conv}, large evaluation {large}: predicted {predicted} bytes, taken {taken}"
            );
            drop(network);
        }
    }
}

/// Of three images where a training step takes eight, as of a small folder of pictures, or of the last ones
/// that are predicted.
#[test]
fn a_split_of_fewer_images_than_a_batch_is_evaluated() {
    let gpu = gpu();
    let definition = model::load("lenet5").unwrap();
    let model = definition
        .resolve(definition.input, definition.classes)
        .unwrap();
    const LEN: usize = 3;
    let images: Vec<u8> = (0..LEN * model.input.elements())
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let evaluate = |gpu: Option<&Arc<Gpu>>, slab_bytes| {
        let options = Options {
            slab_bytes,
            keep_logits: true,
            ..Options::default()
        };
        let mut engine = Engine::new(gpu.cloned(), &model, 8, &SGD, &options).unwrap();
        engine
            .set_parameters(&model::initial_parameters(&model, 5))
            .unwrap();
        for split in [Split::Validation, Split::Test] {
            engine
                .upload_dataset(split, images.clone(), &[4, 0, 9], &[1.0 / 128.0, -1.0])
                .unwrap();
        }
        let found = engine
            .evaluate(Split::Test, &mut |_| ControlFlow::Continue(()))
            .unwrap();
        assert_eq!(engine.take_images(Split::Test).unwrap(), images);
        found
    };
    let expected = evaluate(None, None);
    assert_eq!(expected.predictions.len(), LEN);
    for slab_bytes in [None, Some(1)] {
        let found = evaluate(Some(&gpu), slab_bytes);
        assert_eq!(found.predictions, expected.predictions);
        let pairs = found
            .logits
            .iter()
            .zip(&expected.logits)
            .flat_map(|(a, b)| a.iter().zip(b));
        let pairs: Vec<_> = pairs.collect();
        assert_eq!(pairs.len(), LEN * model.classes);
        assert!(
            pairs.iter().all(|(a, b)| (*a - *b).abs() < 1e-4),
            "{pairs:?}"
        );
    }
}

#[test]
fn a_larger_evaluation_batch_changes_nothing_but_the_order_of_a_sum() {
    let gpu = gpu();
    for name in ["default", "lenet5", "mlp-sigmoid"] {
        let definition = model::load(name).unwrap();
        let model = definition
            .resolve(definition.input, definition.classes)
            .unwrap();
        const LEN: usize = 203;
        let images: Vec<u8> = (0..LEN * model.input.elements())
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        let labels: Vec<u32> = (0..LEN as u32).map(|i| i % 10).collect();
        let normalization = [1.0 / 128.0, -1.0];
        let evaluate = |large| {
            let options = Options {
                large_evaluation: Some(large),
                ..Options::default()
            };
            let optimizer = &definition.recipe.optimizer;
            let mut network =
                Engine::new(Some(gpu.clone()), &model, 8, optimizer, &options).unwrap();
            for split in [Split::Train, Split::Test] {
                network
                    .upload_dataset(split, images.clone(), &labels, &normalization)
                    .unwrap();
            }
            network
                .set_parameters(&model::initial_parameters(&model, 5))
                .unwrap();
            let before = network
                .evaluate(Split::Test, &mut |_| ControlFlow::Continue(()))
                .unwrap();
            // An evaluation uses buffers of the training step: neither may disturb the other.
            let order: Vec<u32> = (0..LEN as u32).collect();
            let step = Step {
                lr: 1e-3,
                bias_correction1: 0.3,
                bias_correction2: 0.1,
                ..Step::new(3, 8)
            };
            network
                .train_epoch(&order, &[step], &mut |_| Ok(ControlFlow::Continue(())))
                .unwrap();
            let after = network
                .evaluate(Split::Test, &mut |_| ControlFlow::Continue(()))
                .unwrap();
            (before, after, network.parameters().unwrap())
        };
        let (small, large) = (evaluate(false), evaluate(true));
        assert_ne!(
            small.0.loss_sum, small.1.loss_sum,
            "{name}: nothing was trained"
        );
        assert_eq!(small.2, large.2, "{name}: the parameters after a step");
        for (small, large) in [(small.0, large.0), (small.1, large.1)] {
            assert_eq!(small.predictions, large.predictions, "{name}");
            let error = (small.loss_sum - large.loss_sum).abs() / small.loss_sum;
            assert!(
                error <= 1e-6,
                "{name}: {} and {}",
                small.loss_sum,
                large.loss_sum
            );
        }
    }
}

const SEEN: usize = 23;
const CLASSES: usize = 5;
const SGD: Optimizer = Optimizer::Sgd {
    momentum: 0.0,
    nesterov: false,
    weight_decay: 0.0,
};

/// With a batch-norm that an evaluation folds into a depthwise convolution.
fn small() -> Model {
    let text = r#"name = "small"
input = [6, 5, 3]
classes = 5
loss = "softmax_cross_entropy"
recipe = { optimizer = "sgd", lr = 0.1, schedule = "constant", epochs = 1, batch_size = 8 }
layer = [
    { type = "conv2d", out_channels = 8, kernel = 3, padding = 1, activation = "relu" },
    { type = "conv2d", groups = "depthwise", kernel = 3, padding = 1, bias = false },
    { type = "batch_norm", activation = "relu" },
    { type = "max_pool2d", kernel = 2 },
    { type = "dense", units = "classes" },
]
"#;
    let definition = Definition::parse(text, "small.toml").unwrap();
    definition.resolve(definition.input, CLASSES).unwrap()
}

fn noise() -> (Vec<u8>, Vec<u32>) {
    let bytes = (0..SEEN * 6 * 5 * 3).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8);
    (bytes.collect(), (0..SEEN as u32).map(|i| i % 5).collect())
}

const NORMALIZATION: [f32; 6] = [1.0 / 64.0, 1.0 / 50.0, 1.0 / 70.0, -1.0, -0.5, 0.25];

/// What the network makes of images by the twins in f64, each seen once.
fn logits(model: &Model, parameters: &[f32], images: &[u8], labels: &[u32]) -> Vec<f64> {
    let options = Options {
        unshared: true,
        ..Options::default()
    };
    let plan = Plan::new(model, SEEN, Mode::Evaluate, &options, Target::Cpu).unwrap();
    let mut twins = Twins::<f64>::new(plan, SEEN);
    let wide = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
    *twins.values("images") = Values::Bytes(images.to_vec());
    *twins.words("labels") = labels.to_vec();
    *twins.words("order") = (0..SEEN as u32).collect();
    *twins.words("steps") = bytemuck::cast_slice(&[Step::new(0, SEEN)]).to_vec();
    *twins.floats("normalization") = wide(&NORMALIZATION);
    *twins.floats("parameters") = wide(parameters);
    *twins.floats("running") = wide(&model::initial_running(model));
    twins.run(&[Section::Gather, Section::Forward, Section::Loss]);
    let mut specs = twins.plan.specs();
    let loss = specs.find(|spec| matches!(spec.work, Work::Loss { .. }));
    twins.memory.floats(loss.unwrap().view("logits")).to_vec()
}

/// Each view by itself, as NumPy would make it: `pad(image, 1, "reflect")`, of that the window from (top, left)
/// on, and maybe `flip` along its width.
fn seen(images: &[u8], [top, left]: [usize; 2], mirrored: bool) -> Vec<u8> {
    let mut views = Vec::new();
    for image in images.chunks_exact(6 * 5 * 3) {
        let reflect = |at: usize, size: usize| match at {
            0 => 1,
            at if at == size + 1 => size - 2,
            at => at - 1,
        };
        for h in 0..6 {
            for w in 0..5 {
                let w = if mirrored { 4 - w } else { w };
                let pixel = 5 * reflect(h + top, 6) + reflect(w + left, 5);
                views.extend_from_slice(&image[3 * pixel..][..3]);
            }
        }
    }
    views
}

/// By everything that carries it out: on both engines, in small and large batches, from slabs.
#[test]
fn an_evaluation_in_views_is_the_mean_of_the_views() {
    let (model, (images, labels)) = (small(), noise());
    let parameters = model::initial_parameters(&model, 5);
    let of = |place, mirrored| {
        let images = seen(&images, place, mirrored);
        logits(&model, &parameters, &images, &labels)
    };
    let both = |place| [false, true].map(|mirrored| of(place, mirrored));
    let mean = |weights: [f64; 3]| -> Vec<f64> {
        let mut sums = vec![0.0; SEEN * CLASSES];
        for (place, weight) in [[1, 1], [0, 0], [2, 2]].into_iter().zip(weights) {
            for z in both(place) {
                let added = sums.iter_mut().zip(z);
                added.for_each(|(sum, z)| *sum += weight / 2.0 * z);
            }
        }
        sums
    };
    let plain = of([1, 1], false);
    let mirror = mean([1.0, 0.0, 0.0]);
    let six = mean([0.5, 0.25, 0.25]);
    let gpu = gpu();
    for (views, expected) in [
        (Views::One, plain),
        (Views::Mirror, mirror),
        (Views::Six, six),
    ] {
        let samples = expected.chunks_exact(CLASSES).zip(&labels);
        let losses = samples.map(|(z, label)| {
            let sum: f64 = z.iter().map(|z| z.exp()).sum();
            sum.ln() - z[*label as usize]
        });
        let loss: f64 = losses.sum();
        let largest = |z: &[f64]| (0..CLASSES).max_by(|a, b| z[*a].total_cmp(&z[*b]));
        let predictions = expected
            .chunks_exact(CLASSES)
            .map(|z| largest(z).unwrap() as u32);
        let predictions: Vec<u32> = predictions.collect();
        let mut bits = Vec::new();
        for (gpu, large, slab_bytes) in [
            (None, false, None),
            (Some(&gpu), false, None),
            (Some(&gpu), false, Some(10 * 6 * 5 * 3)),
            (Some(&gpu), true, None),
        ] {
            let options = Options {
                views,
                slab_bytes,
                large_evaluation: Some(large),
                ..Options::default()
            };
            let before = gpu.map_or(0, |gpu| gpu.allocated_bytes());
            let mut engine = Engine::new(gpu.cloned(), &model, 8, &SGD, &options).unwrap();
            if let Some(gpu) = gpu {
                let rows = memory(&model, 8, &SGD, &options, gpu.report()).unwrap();
                let predicted: u64 = rows.iter().map(|(_, bytes)| bytes).sum();
                let taken = gpu.allocated_bytes() - before;
                let error = taken as f64 / predicted as f64 - 1.0;
                assert!(
                    error.abs() <= 0.05,
                    "{views}: {predicted} bytes, taken {taken}"
                );
            }
            engine.set_parameters(&parameters).unwrap();
            engine
                .upload_dataset(Split::Test, images.clone(), &labels, &NORMALIZATION)
                .unwrap();
            let mut done = 0;
            let found = engine
                .evaluate(Split::Test, &mut |images| {
                    done = images;
                    ControlFlow::Continue(())
                })
                .unwrap();
            let how = format!("{views}, {}, large {large}", engine.description());
            assert_eq!(done, SEEN, "{how}");
            assert_eq!(found.predictions, predictions, "{how}");
            let error = (found.loss_sum - loss).abs() / loss;
            assert!(error < 1e-6, "{how}: {} for {loss}", found.loss_sum);
            if let Some(engine) = engine.on_gpu() {
                // Where it may not be more, no more views than a training step has samples.
                let shown = views.count() * engine.evaluation_batch();
                assert!(large || shown <= 8, "{how}: {shown}");
            }
            bits.push(found.loss_sum);
        }
        assert_eq!(bits[1], bits[2], "{views}: from slabs");
    }
}

fn products(
    model: &Model,
    batch: usize,
    options: &Options,
    adapter: &AdapterReport,
) -> Vec<Product> {
    let mode = Mode::Train(model::load("default").unwrap().recipe.optimizer);
    let plan = Plan::new(model, batch, mode, options, Target::Gpu(adapter)).unwrap();
    plan.products().into_iter().map(|(_, p)| p).collect()
}

/// A sum costs compile time, so the more products a model has, the smaller are their tiles.
#[test]
fn the_products_of_a_model_share_its_sums() {
    let most_sums = |name: &str| {
        let definition = model::load(name).unwrap();
        let model = definition
            .resolve(definition.input, definition.classes)
            .unwrap();
        let adapter = AdapterReport::imagined(true);
        let products = products(&model, 64, &Options::default(), &adapter);
        let sums = products.iter().map(|product| match product.tile {
            Tile::Subgroup { rows, cols, .. } => rows * cols,
            tile => panic!("{name}: {tile}"),
        });
        sums.max().unwrap()
    };
    assert_eq!(most_sums("tutorial"), 128);
    assert_eq!(most_sums("vgg-cifar"), 64);
}

/// They decide the order of the additions, so neither the family nor the adapter may.
#[test]
fn the_parts_of_a_sum_follow_from_the_shape() {
    for (name, _) in model::SHIPPED {
        let definition = model::load(name).unwrap();
        let model = definition
            .resolve(definition.input, definition.classes)
            .unwrap();
        let splits = |family, software| -> Vec<usize> {
            let options = Options {
                family: Some(family),
                precision: match family {
                    Family::Matrix => Precision::Mixed,
                    _ => Precision::F32,
                },
                ..Options::default()
            };
            let adapter = AdapterReport {
                cooperative_matrix: Some(16),
                ..AdapterReport::imagined(software)
            };
            let batch = definition.recipe.batch_size;
            let products = products(&model, batch, &options, &adapter);
            products.iter().map(Product::splits).collect()
        };
        let expected = splits(Family::Plain, true);
        for family in Family::ALL {
            for software in [true, false] {
                assert_eq!(splits(family, software), expected, "{name}, {family}");
            }
        }
        if *name != "mlp-sigmoid" {
            assert!(expected.iter().any(|splits| *splits > 1), "{name}");
        }
    }
}
