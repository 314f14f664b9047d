//! A redesign changes no bit: hashes of the parameters after a few steps of the models that were there
//! before steps became data: on the software adapter as they were then, on the CPU as they are since the
//! weight gradient is summed in blocks of 256 terms, and for `vgg-cifar` since Winograd's convolution.
//!
//! Bits belong to a device. The hashes are those of Mesa's software adapter in one version, and of any
//! x86-64 processor with AVX2 and fused multiply-adds; elsewhere the test says so and is skipped.

use std::ops::ControlFlow;
use std::sync::Arc;
use wgrad::engine::{Engine, Split};
use wgrad::gpu::{Choice, Gpu};
use wgrad::kernels::Step;
use wgrad::model;
use wgrad::plan::Options;
use wgrad::train::parameter_hash;

const BATCH: usize = 6;
const SAMPLES: usize = 3 * BATCH - 2;

/// Model, hash on the software adapter, hash on the CPU; the first digits of each.
const HASHES: [(&str, &str, &str); 5] = [
    ("default", "c0c2c47a7d4679a9", "d7cd8fe84425d2db"),
    ("lenet5", "ef4eddbde9f7e367", "b1edc0d7c419f9ea"),
    ("tutorial", "227a2c994157602b", "6972af641fadddff"),
    ("mlp-sigmoid", "a866af12f9a37ebf", "987111d07629195b"),
    ("vgg-cifar", "2e76df8496d7c6f9", "cd78eb7c64c61c40"),
];

/// The hash of the parameters of `name` after three steps, the last on a batch that is not full.
fn hash(name: &str, gpu: Option<&Arc<Gpu>>) -> String {
    let definition = model::load(name).unwrap();
    let model = definition.resolve(definition.input, definition.classes);
    let model = model.unwrap();
    let (optimizer, options) = (definition.recipe.optimizer, Options::default());
    let mut engine = Engine::new(gpu.cloned(), &model, BATCH, &optimizer, &options).unwrap();
    let parameters = model::initial_parameters(&model, 7);
    engine.set_parameters(&parameters).unwrap();
    let bytes = SAMPLES * model.input.elements();
    let images = (0..bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8);
    let labels: Vec<u32> = (0..SAMPLES as u32).map(|i| i * i % 10).collect();
    let channels = model.input.channels;
    let normalization = [vec![1.0 / 64.0; channels], vec![-2.0; channels]].concat();
    engine
        .upload_dataset(Split::Train, images.collect(), &labels, &normalization)
        .unwrap();
    let order: Vec<u32> = (0..SAMPLES as u32).rev().collect();
    let steps: Vec<Step> = (0..3)
        .map(|i| {
            let scalars = optimizer.step_scalars(0.01, i as u64 + 1);
            Step {
                lr: scalars.lr,
                bias_correction1: scalars.bias_correction1,
                bias_correction2: scalars.bias_correction2,
                ..Step::new(i * BATCH, BATCH.min(SAMPLES - i * BATCH))
            }
        })
        .collect();
    engine
        .train_epoch(&order, &steps, &mut |_| Ok(ControlFlow::Continue(())))
        .unwrap();
    parameter_hash(&engine.parameters().unwrap())[..16].into()
}

fn expect(device: &str, found: Vec<String>, expected: [&str; 5]) {
    let names = HASHES.map(|(name, ..)| name);
    assert_eq!(found, expected, "{device}, {names:?}");
}

#[test]
fn short_trainings_on_the_software_adapter() {
    let gpu = Arc::new(Gpu::open(&Choice::Best).expect("an adapter; scripts/test.sh installs one"));
    let (wanted, found) = ("llvmpipe Mesa 22.3.6 (LLVM 15.0.6)", &gpu.report().driver);
    if found != wanted || gpu.report().subgroup_size != Some([8, 8]) {
        let lanes = gpu.report().subgroup_size;
        println!(
            "skipped: the hashes are those of {wanted} with subgroups of 8, found {found} with {lanes:?}"
        );
        return;
    }
    let found = HASHES.map(|(name, ..)| hash(name, Some(&gpu)));
    expect(
        "software adapter",
        found.to_vec(),
        HASHES.map(|(_, hash, _)| hash),
    );
}

#[test]
fn short_trainings_on_the_cpu() {
    #[cfg(target_arch = "x86_64")]
    let fused =
        std::arch::is_x86_feature_detected!("fma") && std::arch::is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    let fused = false;
    if !fused {
        println!(
            "skipped: the hashes are those of an x86-64 processor with AVX2 and fused multiply-adds"
        );
        return;
    }
    let found = HASHES.map(|(name, ..)| hash(name, None));
    expect("CPU", found.to_vec(), HASHES.map(|(_, _, hash)| hash));
}
