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
use wgrad::gpu::{Choice, Dispatch, Gpu, Step};
use wgrad::kernels::conv2d::{self, Family, Pass, Product};
use wgrad::model::{self, Model, Op};
use wgrad::network::{Network, Options, Split};

const BATCH: usize = 128;
const MODELS: [&str; 3] = ["default", "lenet5", "tutorial"];

fn open() -> Arc<Gpu> {
    let gpu = Gpu::open(&Choice::Best).expect("a benchmark needs an adapter");
    eprintln!("adapter: {}", gpu.report().line());
    Arc::new(gpu)
}

fn shipped(name: &str) -> (Model, model::recipe::Recipe) {
    let definition = model::load(name).expect("a shipped model");
    let model = definition
        .resolve(definition.input, definition.classes)
        .expect("a shipped model");
    (model, definition.recipe)
}

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

fn products(c: &mut Criterion) {
    let gpu = open();
    let family = Family::select(gpu.report(), None).expect("a family");
    for name in MODELS {
        let (model, _) = shipped(name);
        let mut group = c.benchmark_group(format!("{name} products"));
        group.sample_size(10);
        let first = model.layers.iter().position(|l| l.parameters.is_some());
        for (i, layer) in model.layers.iter().enumerate() {
            let Some((geometry, relu)) = layer.op.product() else {
                continue;
            };
            for pass in Pass::ALL {
                // The step never computes the gradient of the images.
                if pass == Pass::BackwardInput && Some(i) == first {
                    continue;
                }
                let relu = relu && pass == Pass::Forward;
                let report = gpu.report();
                let pool = match (pass, model.layers.get(i + 1).map(|l| &l.op)) {
                    (Pass::Forward, Some(Op::MaxPool2d(pool)))
                        if Product::can_pool(geometry, pool, family) =>
                    {
                        Some(*pool)
                    }
                    _ => None,
                };
                let product = Product::new(*geometry, BATCH, pass, relu, pool, family, report)
                    .expect("the pool was asked for");
                let dispatch = prepare(&gpu, &product);
                timed(&gpu, &dispatch, 1);
                group.throughput(Throughput::Elements(product.flops() as u64));
                group.bench_function(format!("{} {}", layer.name, pass.name()), |b| {
                    b.iter_custom(|iterations| timed(&gpu, &dispatch, iterations));
                });
            }
        }
    }
}

fn prepare(gpu: &Gpu, product: &Product) -> Dispatch {
    let g = product.geometry;
    let values = |len: usize| -> Vec<f32> {
        (0..len)
            .map(|i| ((i * 7 + 3) % 11) as f32 / 11.0 - 0.4)
            .collect()
    };
    let x = gpu
        .upload("x", &values(product.batch * g.input.elements()))
        .expect("x");
    let parameters = gpu
        .upload(
            "parameters",
            &values(g.weight_elements() + g.output.channels),
        )
        .expect("parameters");
    let dy = gpu
        .upload("dy", &values(product.batch * g.output.elements()))
        .expect("dy");
    let result = gpu
        .buffer("result", product.result_elements())
        .expect("result");
    let index = gpu
        .buffer("index", product.result_elements().div_ceil(4))
        .expect("index");
    match product.pass {
        Pass::Forward => conv2d::conv2d_forward(
            gpu,
            product,
            &x,
            &parameters,
            &result,
            product.pool.map(|_| &index),
        ),
        Pass::BackwardWeight => conv2d::conv2d_backward_weight(gpu, product, &x, &dy, &result),
        Pass::BackwardInput => {
            conv2d::conv2d_backward_input(gpu, product, &dy, &parameters, &result, None)
        }
    }
    .expect("a kernel")
}

fn steps(c: &mut Criterion) {
    let gpu = open();
    for name in MODELS {
        let (model, recipe) = shipped(name);
        let options = Options::default();
        let mut network =
            Network::new(gpu.clone(), &model, BATCH, &recipe.optimizer, &options).expect("network");
        network
            .set_parameters(&model::initial_parameters(&model, 1))
            .expect("parameters");
        const LEN: usize = 8 * BATCH;
        let images: Vec<u8> = (0..LEN * model.input.elements())
            .map(|i| (i * 31 % 251) as u8)
            .collect();
        let labels: Vec<u32> = (0..LEN).map(|i| (i % model.classes) as u32).collect();
        let normalization = [1.0 / 255.0, -0.5];
        network
            .upload_dataset(Split::Train, &images, &labels, &normalization)
            .expect("dataset");
        let order: Vec<u32> = (0..LEN as u32).collect();
        let table: Vec<Step> = (0..LEN / BATCH)
            .map(|i| Step {
                first: (i * BATCH) as u32,
                count: BATCH as u32,
                lr: 1e-4,
                bias_correction1: 0.5,
                bias_correction2: 0.5,
                padding: [0; 3],
            })
            .collect();
        let mut run = |steps: usize| {
            network
                .train_epoch(&order, &table[..steps], &mut |_| {
                    Ok(ControlFlow::Continue(()))
                })
                .expect("a step");
        };
        run(1);
        let mut group = c.benchmark_group("step");
        group.sample_size(10);
        group.throughput(Throughput::Elements(BATCH as u64));
        group.bench_function(name, |b| {
            b.iter_custom(|iterations| {
                let start = Instant::now();
                let mut left = iterations as usize;
                while left > 0 {
                    let now = left.min(table.len());
                    run(now);
                    left -= now;
                }
                start.elapsed()
            });
        });
    }
}

criterion_group!(benches, products, steps);
criterion_main!(benches);
