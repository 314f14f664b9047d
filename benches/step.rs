//! Criterion benchmarks: every matrix product of the shipped models, and their whole training step.
//!
//!     cargo bench                       # everything
//!     cargo bench -- lenet5             # one model
//!
//! Every measurement waits for the GPU inside the timed region. Criterion prints "elements": for the
//! products these are floating-point operations (two per multiply-add of the convolution), so that
//! Gelem/s reads as GFLOP/s; for the steps they are images.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wgrad::engine::{Engine, Split};
use wgrad::gpu::{Choice, Dispatch, Gpu};
use wgrad::kernels::Step;
use wgrad::model;
use wgrad::plan::Options;

const BATCH: usize = 128;
const MODELS: [&str; 3] = ["default", "lenet5", "tutorial"];

/// Batches of the dataset.
const BATCHES: usize = 8;

/// Time of `iterations` runs of `dispatch`, in submissions of ten, the last one waited for.
fn timed(gpu: &Gpu, dispatch: &Dispatch, iterations: u64) -> Duration {
    let start = Instant::now();
    let mut left = iterations as usize;
    while left > 0 {
        let repeat = left.min(10);
        gpu.submit("bench", &[dispatch], repeat).expect("submit");
        gpu.wait_all().expect("wait");
        left -= repeat;
    }
    start.elapsed()
}

fn models(c: &mut Criterion) {
    let gpu = Arc::new(Gpu::open(&Choice::Best).expect("a benchmark needs an adapter"));
    eprintln!("adapter: {}", gpu.report().line());
    for name in MODELS {
        let definition = model::load(name).expect("a shipped model");
        let model = definition.resolve(definition.input, definition.classes);
        let model = model.expect("a shipped model");
        let (optimizer, options) = (definition.recipe.optimizer, Options::default());
        let mut engine = Engine::new(Some(gpu.clone()), &model, BATCH, &optimizer, &options)
            .expect("a plan that fits");
        let parameters = model::initial_parameters(&model, 1);
        engine.set_parameters(&parameters).expect("parameters");
        const LEN: usize = BATCHES * BATCH;
        let images: Vec<u8> = (0..LEN * model.input.elements())
            .map(|i| (i * 31 % 251) as u8)
            .collect();
        let labels: Vec<u32> = (0..LEN).map(|i| (i % model.classes) as u32).collect();
        engine
            .upload_dataset(Split::Train, images, &labels, &[1.0 / 255.0, -0.5])
            .expect("dataset");
        let order: Vec<u32> = (0..LEN as u32).collect();
        let table: Vec<Step> = (0..BATCHES)
            .map(|i| Step {
                lr: 1e-4,
                bias_correction1: 0.5,
                bias_correction2: 0.5,
                ..Step::new(i * BATCH, BATCH)
            })
            .collect();
        let run = |engine: &mut Engine, steps: usize| {
            engine
                .train_epoch(&order, &table[..steps], &mut |_| {
                    Ok(ControlFlow::Continue(()))
                })
                .expect("a step");
        };
        run(&mut engine, 1);

        let mut group = c.benchmark_group(format!("{name} products"));
        group.sample_size(10);
        let on_gpu = engine.on_gpu().expect("a GPU");
        let dispatches = on_gpu.dispatches().expect("a dataset");
        for (dispatch, spec) in dispatches.into_iter().zip(on_gpu.plan().specs()) {
            if spec.cost.flops == 0.0 {
                continue;
            }
            group.throughput(Throughput::Elements(spec.cost.flops as u64));
            group.bench_function(format!("{} {}", spec.layer, spec.entry), |b| {
                b.iter_custom(|iterations| timed(&gpu, dispatch, iterations));
            });
        }
        group.finish();

        let mut group = c.benchmark_group("step");
        group.sample_size(10);
        group.throughput(Throughput::Elements(BATCH as u64));
        group.bench_function(name, |b| {
            b.iter_custom(|iterations| {
                let start = Instant::now();
                let mut left = iterations as usize;
                while left > 0 {
                    let now = left.min(table.len());
                    run(&mut engine, now);
                    left -= now;
                }
                start.elapsed()
            });
        });
        group.finish();
    }
}

criterion_group!(benches, models);
criterion_main!(benches);
