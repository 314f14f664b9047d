//! A network's memory is what `inspect` predicts, its evaluation does not depend on the batch, and a
//! model with few products gets the larger tiles.

use std::ops::ControlFlow;
use std::sync::Arc;
use wgrad::engine::{Engine, Split, memory};
use wgrad::gpu::{AdapterReport, Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::kernels::Step;
use wgrad::kernels::conv2d::{Family, Product, Tile};
use wgrad::model::{self, Model};
use wgrad::plan::{Mode, Options, Plan, Target};

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
                ..Options::default()
            };
            let adapter = AdapterReport::imagined(software);
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
