//! Mixed precision: what a plan stores as halves, what the loss scale does, and that bits and accuracy hold.

use std::ops::ControlFlow;
use std::sync::Arc;
use wgrad::engine::{Engine, Split};
use wgrad::gpu::{AdapterReport, Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::kernels::half::{INTERVAL, LOSS_SCALE, SCALES};
use wgrad::kernels::{Dtype, Step};
use wgrad::model::recipe::{Optimizer, Precision};
use wgrad::model::{self, Model};
use wgrad::plan::{Lifetime, Mode, Options, Plan, Target};

fn options() -> Options {
    Options {
        precision: Precision::Mixed,
        ..Options::default()
    }
}

fn load(name: &str) -> (Model, Optimizer, usize) {
    let definition = model::load(name).unwrap();
    let model = definition
        .resolve(definition.input, definition.classes)
        .unwrap();
    let recipe = definition.recipe;
    (model, recipe.optimizer, recipe.batch_size)
}

#[test]
fn activations_take_half_the_memory_and_what_must_be_exact_stays() {
    let adapter = AdapterReport::imagined(false);
    for (name, _) in model::SHIPPED {
        let (model, optimizer, batch) = load(name);
        let plan = |precision| {
            let options = Options {
                precision,
                unshared: true,
                ..Options::default()
            };
            let mode = Mode::Train(optimizer);
            Plan::new(&model, batch, mode, &options, Target::Gpu(&adapter)).unwrap()
        };
        let (single, mixed) = (plan(Precision::F32), plan(Precision::Mixed));
        assert_eq!(mixed.flaws(), Vec::<String>::new(), "{name}");
        // Everything but the images and the logits, which are few.
        let maps = |plan: &Plan| -> usize {
            let maps = plan.tensors.iter().filter(|t| {
                t.per_sample
                    && t.slot.is_some()
                    && matches!(t.dtype, Dtype::F32 | Dtype::F16)
                    && !["input", "logits", "losses"]
                        .contains(&t.name.split('.').next().unwrap_or(""))
            });
            maps.map(|t| t.dtype.bytes(t.elements())).sum()
        };
        assert_eq!(2 * maps(&mixed), maps(&single), "{name}");
        for tensor in &mixed.tensors {
            let exact = tensor.lifetime == Lifetime::Kept
                || ["moments", "statistics", "partials", "losses", "norm"]
                    .iter()
                    .any(|part| tensor.name.ends_with(part));
            assert!(
                !exact || tensor.dtype == Dtype::F32,
                "{name}: {} is {:?}",
                tensor.name,
                tensor.dtype
            );
        }
    }
    // With the memory that tensors share, and the parts of a weight gradient, which stay floats, as many for any batch:
    // what `inspect` shows.
    let (model, optimizer, _) = load("vgg-cifar");
    let batch = 256;
    let bytes = |precision| {
        let options = Options {
            precision,
            ..Options::default()
        };
        let mode = Mode::Train(optimizer);
        let plan = Plan::new(&model, batch, mode, &options, Target::Gpu(&adapter)).unwrap();
        plan.step_bytes()[0] as f64
    };
    let ratio = bytes(Precision::Mixed) / bytes(Precision::F32);
    assert!((0.4..0.62).contains(&ratio), "{ratio}");
}

#[test]
fn an_adapter_without_halves_is_refused() {
    let adapter = AdapterReport {
        shader_f16: false,
        ..AdapterReport::imagined(false)
    };
    let (model, optimizer, batch) = load("lenet5");
    let (mode, target) = (Mode::Train(optimizer), Target::Gpu(&adapter));
    let error = Plan::new(&model, batch, mode, &options(), target).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let line = error.to_string();
    assert!(
        line.contains("16-bit floats") && line.contains("--precision f32"),
        "{line}"
    );
}

const LEN: usize = 64;

/// An engine for `lenet5` in mixed precision with images and parameters, on the adapter or the CPU.
fn engine(gpu: Option<Arc<Gpu>>) -> Engine {
    let (model, ..) = load("lenet5");
    let optimizer = Optimizer::Adamw {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.1,
    };
    let mut engine = Engine::new(gpu, &model, 16, &optimizer, &options()).unwrap();
    let images: Vec<u8> = (0..LEN * model.input.elements())
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let labels: Vec<u32> = (0..LEN as u32).map(|i| i % 10).collect();
    engine
        .upload_dataset(Split::Train, images, &labels, &[1.0 / 128.0, -1.0])
        .unwrap();
    engine
        .set_parameters(&model::initial_parameters(&model, 5))
        .unwrap();
    engine
}

fn devices() -> [Option<Arc<Gpu>>; 2] {
    let gpu = Gpu::open(&Choice::Best);
    let gpu = gpu.unwrap_or_else(|e| panic!("these tests need an adapter: {e}; {NO_ADAPTER_HINT}"));
    assert!(
        gpu.report().shader_f16,
        "{} has no 16-bit floats",
        gpu.report().name
    );
    [Some(Arc::new(gpu)), None]
}

fn train(engine: &mut Engine, steps: &[Step]) {
    let order: Vec<u32> = (0..LEN as u32).collect();
    engine
        .train_epoch(&order, steps, &mut |_| Ok(ControlFlow::Continue(())))
        .unwrap();
}

#[test]
fn an_overflow_skips_the_step_and_halves_the_scale() {
    let step = |first| Step {
        lr: 1e-3,
        bias_correction1: 0.1,
        bias_correction2: 0.01,
        ..Step::new(first, 16)
    };
    for gpu in devices() {
        let mut engine = engine(gpu);
        assert_eq!(engine.loss_scale().unwrap(), Some(LOSS_SCALE));
        let before = engine.parameters().unwrap();
        // So large that the gradient of every logit overflows.
        let [_, largest] = SCALES;
        engine.set_loss_scale([largest, 7.0, 2.0]).unwrap();
        train(&mut engine, &[step(0)]);
        assert_eq!(
            engine.loss_scale().unwrap(),
            Some([largest / 2.0, 0.0, 3.0])
        );
        assert_eq!(engine.parameters().unwrap(), before);
        let state = engine.optimizer_state().unwrap();
        assert!(state.iter().flatten().all(|value| *value == 0.0));
        // Steps that do not overflow train, and the last of so many in a row lets the scale grow.
        engine
            .set_loss_scale([1024.0, INTERVAL - 3.0, 1.0])
            .unwrap();
        train(&mut engine, &[step(0), step(16), step(32)]);
        assert_eq!(engine.loss_scale().unwrap(), Some([2048.0, 0.0, 1.0]));
        assert_ne!(engine.parameters().unwrap(), before);
    }
}

#[test]
fn gradients_are_those_of_floats_whatever_the_scale() {
    let step = Step::new(0, 16);
    for gpu in devices() {
        let mut mixed = engine(gpu.clone());
        let (model, optimizer, _) = load("lenet5");
        let mut single = Engine::new(gpu, &model, 16, &optimizer, &Options::default()).unwrap();
        let images: Vec<u8> = (0..LEN * model.input.elements())
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        let labels: Vec<u32> = (0..LEN as u32).map(|i| i % 10).collect();
        let normalization = [1.0 / 128.0, -1.0];
        single
            .upload_dataset(Split::Train, images, &labels, &normalization)
            .unwrap();
        single
            .set_parameters(&model::initial_parameters(&model, 5))
            .unwrap();
        train(&mut single, &[step]);
        let expected = single.gradients().unwrap();
        let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for scale in [1024.0, 65_536.0] {
            mixed.set_loss_scale([scale, 0.0, 0.0]).unwrap();
            train(&mut mixed, &[step]);
            let found = mixed.gradients().unwrap();
            let worst = found.iter().zip(&expected).map(|(f, e)| (f - e).abs());
            let worst = worst.fold(0.0f32, f32::max);
            assert!(
                worst <= 0.01 * largest,
                "scale {scale}: {worst} of {largest}"
            );
            assert!(worst > 0.0, "nothing was rounded");
        }
        // At f32's own scale of small numbers halves have nothing left.
        mixed.set_loss_scale([SCALES[0], 0.0, 0.0]).unwrap();
        train(&mut mixed, &[step]);
        let lost = mixed
            .gradients()
            .unwrap()
            .iter()
            .filter(|g| **g == 0.0)
            .count();
        assert!(lost > expected.len() / 2, "{lost} of {}", expected.len());
    }
}
