//! The memory that `inspect` predicts is the memory that a network takes.

use std::sync::Arc;
use wgrad::gpu::{Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::model;
use wgrad::network::{Network, Options, memory};

#[test]
fn a_network_takes_the_memory_that_was_predicted() {
    let gpu = Gpu::open(&Choice::Auto)
        .unwrap_or_else(|e| panic!("this test needs an adapter: {e}; {NO_ADAPTER_HINT}"));
    let gpu = Arc::new(gpu);
    for (name, _) in model::SHIPPED {
        let definition = model::load(name).unwrap();
        let model = definition
            .resolve(definition.input, definition.classes)
            .unwrap();
        let recipe = &definition.recipe;
        for explicit_conv in [false, true] {
            let options = Options {
                explicit_conv,
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
            let network =
                Network::new(gpu.clone(), &model, batch, &recipe.optimizer, &options).unwrap();
            let taken = gpu.allocated_bytes() - before;
            let error = taken as f64 / predicted as f64 - 1.0;
            assert!(
                error.abs() <= 0.05,
                "{name}, explicit {explicit_conv}: predicted {predicted} bytes, taken {taken}"
            );
            drop(network);
        }
    }
}
