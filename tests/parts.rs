//! What is computed in parts: datasets that pass through the device in slabs, and batches of which a few
//! samples are taken at a time.

use std::ops::ControlFlow;
use std::sync::Arc;
use wgrad::engine::{Engine, Evaluation, Split};
use wgrad::gpu::{Choice, Fault, Gpu};
use wgrad::kernels::{Metrics, Step};
use wgrad::model::recipe::Recipe;
use wgrad::model::{Definition, Model, initial_parameters};
use wgrad::plan::Options;
use wgrad::train::epoch_order;

const TRAIN: usize = 47;
const TEST: usize = 31;
const BATCH: usize = 6;
/// Of an image, which begins anywhere in a word.
const BYTES: usize = 105;
const EPOCHS: usize = 3;

fn gpu() -> Arc<Gpu> {
    let gpu = Gpu::open(&Choice::Best);
    Arc::new(gpu.expect("an adapter; sh scripts/test.sh installs one"))
}

fn model(layers: &str) -> Model {
    let text = format!(
        "name = \"small\"\ninput = [5, 7, 3]\nclasses = 4\nloss = \"softmax_cross_entropy\"\n
         recipe = {{ optimizer = \"sgd\", lr = 0.05, schedule = \"constant\", epochs = 1, batch_size = {BATCH} }}\n
         layer = [{layers}]"
    );
    let definition = Definition::parse(&text, "small").unwrap();
    definition.resolve(definition.input, 4).unwrap()
}

/// With draws and statistics, which depend on the place of every sample.
const FULL: &str = r#"{ type = "conv2d", out_channels = 6, kernel = 3, padding = 1, bias = false },
    { type = "batch_norm", activation = "relu" },
    { type = "max_pool2d", kernel = 2 },
    { type = "dropout", probability = 0.3 },
    { type = "dense", units = "classes" }"#;

/// After LeNet-5: in no layer does one sample touch another.
const LENET: &str = r#"{ type = "conv2d", out_channels = 6, kernel = 3, padding = 1, activation = "tanh" },
    { type = "mean_pool2d", kernel = 2 },
    { type = "conv2d", out_channels = 16, kernel = 2, activation = "relu" },
    { type = "dense", units = 12, activation = "sigmoid" },
    { type = "dense", units = "classes" }"#;

fn split(len: usize, seed: u32) -> (Vec<u8>, Vec<u32>) {
    let mut state = seed;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let images = (0..len * BYTES).map(|_| byte()).collect();
    (images, (0..len as u32).map(|i| i * 7 / 3 % 4).collect())
}

fn upload(engine: &mut Engine, which: Split) {
    let (images, labels) = match which {
        Split::Train => split(TRAIN, 1),
        _ => split(TEST, 2),
    };
    let normalization = [0.02, 0.01, 0.015, -1.0, -1.5, -2.0];
    engine
        .upload_dataset(which, images, &labels, &normalization)
        .unwrap();
}

fn engine(gpu: Option<Arc<Gpu>>, model: &Model, batch: usize, options: &Options) -> Engine {
    let optimizer = &Recipe::default().optimizer;
    let mut engine = Engine::new(gpu, model, batch, optimizer, options).unwrap();
    engine
        .set_parameters(&initial_parameters(model, 5))
        .unwrap();
    engine
}

/// An epoch's table: batches of `batch` in parts of at most `most`.
fn table(batch: usize, most: usize, epoch: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    for first in (0..TRAIN).step_by(batch) {
        let count = batch.min(TRAIN - first);
        let parts = count.div_ceil(most);
        for part in 0..parts {
            let [from, to] = [part, part + 1].map(|part| part * count / parts);
            steps.push(Step {
                lr: 0.02,
                seed: 9,
                epoch: epoch as u32,
                total: count as f32,
                micro: part as u32,
                ..Step::new(first + from, to - from)
            });
        }
    }
    steps
}

#[derive(Clone, Debug, PartialEq)]
struct Outcome {
    parameters: Vec<f32>,
    running: Vec<f32>,
    metrics: Vec<Metrics>,
    evaluations: Vec<Evaluation>,
}

/// Some epochs, the second in two pieces, with an evaluation of both splits after each.
fn train(engine: &mut Engine) -> Outcome {
    let (mut metrics, mut evaluations) = (Vec::new(), Vec::new());
    for epoch in 1..=EPOCHS {
        let order = epoch_order(TRAIN, 3, epoch);
        let steps = table(BATCH, BATCH, epoch);
        let pieces = steps.split_at(if epoch == 2 { 3 } else { 0 });
        for piece in [pieces.0, pieces.1] {
            let go_on = &mut |_: &[Metrics]| Ok(ControlFlow::Continue(()));
            metrics.extend(engine.train_epoch(&order, piece, go_on).unwrap());
        }
        for split in [Split::Validation, Split::Test] {
            let go_on = &mut |_| ControlFlow::Continue(());
            evaluations.push(engine.evaluate(split, go_on).unwrap());
        }
    }
    Outcome {
        parameters: engine.parameters().unwrap(),
        running: engine.running().unwrap(),
        metrics,
        evaluations,
    }
}

/// Bytes that went to the device as whole splits and as slabs.
fn images_sent(gpu: &Gpu) -> [u64; 2] {
    let transfers = gpu.take_transfers();
    ["dataset images", "dataset slab"].map(|purpose| {
        let such = transfers.by_purpose.iter().filter(|(p, ..)| *p == purpose);
        such.map(|(.., bytes)| bytes).sum()
    })
}

const SPLITS: [Split; 3] = [Split::Train, Split::Validation, Split::Test];

#[test]
fn slabs_change_no_bit() {
    let (gpu, model) = (gpu(), model(FULL));
    for large_evaluation in [false, true] {
        let mut whole = None;
        // All there; a batch at a time; two and a bit; whole batches; all but an image of the larger split.
        let batch = BATCH * BYTES;
        let sizes = [None, Some(1), Some(2 * batch + 17), Some(4 * batch)];
        for size in sizes.into_iter().chain([Some((TRAIN - 1) * BYTES)]) {
            let options = Options {
                slab_bytes: size.map(|bytes| bytes as u64),
                large_evaluation: Some(large_evaluation),
                ..Options::default()
            };
            let mut engine = engine(Some(gpu.clone()), &model, BATCH, &options);
            gpu.take_transfers();
            for split in SPLITS {
                upload(&mut engine, split);
            }
            let outcome = train(&mut engine);
            let fits = |len: usize| size.is_none_or(|bytes| len * BYTES <= bytes);
            let (mut whole_bytes, mut slab_bytes) = (0, 0);
            // What passes through goes there once in an epoch, the rest once and for all.
            for len in [TRAIN, TEST, TEST] {
                match fits(len) {
                    true => whole_bytes += len * BYTES,
                    false => slab_bytes += EPOCHS * len * BYTES,
                }
            }
            let sent = [whole_bytes as u64, slab_bytes as u64];
            assert_eq!(images_sent(&gpu), sent, "{size:?}");
            assert_eq!(slab_bytes > 0, size.is_some());
            let whole = whole.get_or_insert_with(|| outcome.clone());
            assert!(outcome == *whole, "{size:?}, {large_evaluation}");
        }
    }
}

fn engine_with_data(gpu: &Arc<Gpu>, model: &Model, options: &Options) -> Engine {
    let mut engine = engine(Some(gpu.clone()), model, BATCH, options);
    for split in SPLITS {
        upload(&mut engine, split);
    }
    engine
}

/// The same bits where a device has no memory for all images; where it is lost, an error.
#[test]
fn a_split_that_finds_no_memory_streams() {
    let (gpu, model) = (gpu(), model(FULL));
    let whole = train(&mut engine_with_data(&gpu, &model, &Options::default()));
    // At the images, and at what comes after them.
    for after in [0, 3] {
        let mut engine = engine(Some(gpu.clone()), &model, BATCH, &Options::default());
        gpu.take_transfers();
        for split in SPLITS {
            gpu.inject(Fault::Full, after);
            upload(&mut engine, split);
        }
        assert!(train(&mut engine) == whole, "{after}");
        let [_, slabs] = images_sent(&gpu);
        assert_eq!(slabs as usize, EPOCHS * (TRAIN + 2 * TEST) * BYTES);
    }
    let options = Options {
        slab_bytes: Some(1),
        ..Options::default()
    };
    let mut engine = engine_with_data(&gpu, &model, &options);
    train(&mut engine);
    gpu.inject(Fault::Lost, 4);
    let go_on = &mut |_: &[Metrics]| Ok(ControlFlow::Continue(()));
    let order = epoch_order(TRAIN, 3, 1);
    let error = engine.train_epoch(&order, &table(BATCH, BATCH, 1), go_on);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("the device was lost"), "{error}");
}

/// Images come behind the computation: when the host first waits for a step on a slab, those of the two after it are
/// on their way.
#[test]
fn slabs_are_sent_before_a_step_is_waited_for() {
    let (gpu, model) = (gpu(), model(FULL));
    let options = Options {
        slab_bytes: Some(1),
        ..Options::default()
    };
    let mut engine = engine(Some(gpu.clone()), &model, BATCH, &options);
    upload(&mut engine, Split::Train);
    let epoch = |engine: &mut Engine| {
        let go_on = &mut |_: &[Metrics]| Ok(ControlFlow::Continue(()));
        let order = epoch_order(TRAIN, 3, 1);
        engine.train_epoch(&order, &table(BATCH, BATCH, 1), go_on)
    };
    // The first step goes kernel by kernel, as they are compiled.
    epoch(&mut engine).unwrap();
    gpu.take_transfers();
    gpu.inject(Fault::Hang, 0);
    let error = epoch(&mut engine).unwrap_err().to_string();
    assert!(error.contains("hangs"), "{error}");
    let [_, sent] = images_sent(&gpu);
    assert_eq!(sent as usize, 3 * BATCH * BYTES);
}

/// The largest difference of two vectors, relative to the largest element.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = a.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let apart = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    apart.fold(0.0f32, f32::max) / largest
}

fn parts_add_up_to_their_batch(gpu: Option<Arc<Gpu>>) {
    let model = model(LENET);
    // The last batch has 7, of which no part is full.
    let (batch, most) = (20, 6);
    let train = |most: usize, epochs: usize| {
        let options = Options {
            micro: most < batch,
            // By the gradients of the whole batch, which are larger.
            clip_norm: Some(0.05),
            ..Options::default()
        };
        let mut engine = engine(gpu.clone(), &model, most, &options);
        upload(&mut engine, Split::Train);
        let mut sums = [0.0; 2];
        for epoch in 1..=epochs {
            let order = epoch_order(TRAIN, 3, epoch);
            let go_on = &mut |_: &[Metrics]| Ok(ControlFlow::Continue(()));
            let steps = table(batch, most, epoch);
            let metrics = engine.train_epoch(&order, &steps, go_on).unwrap();
            assert_eq!(metrics.len(), steps.len());
            for metrics in metrics {
                sums[0] += metrics.loss_sum;
                sums[1] += metrics.correct as f32;
            }
        }
        let [parameters, gradients] = [engine.parameters(), engine.gradients()];
        let state = engine.optimizer_state().unwrap().concat();
        [
            parameters.unwrap(),
            gradients.unwrap(),
            state,
            sums.to_vec(),
        ]
    };
    for epochs in [1, 4] {
        let (whole, parts) = (train(batch, epochs), train(most, epochs));
        for (name, (whole, parts)) in ["parameters", "gradients", "state", "metrics"]
            .iter()
            .zip(whole.iter().zip(&parts))
        {
            let apart = difference(whole, parts);
            assert!(apart < 1e-5, "{name} after {epochs} epochs: {apart:e}");
        }
        assert_ne!(whole, parts, "a sum in another order");
    }
}

#[test]
fn parts_add_up_to_their_batch_on_the_cpu() {
    parts_add_up_to_their_batch(None);
}

#[test]
fn parts_add_up_to_their_batch_on_the_gpu() {
    parts_add_up_to_their_batch(Some(gpu()));
}

/// Draws are of a sample, whatever part it comes in.
#[test]
fn parts_draw_what_their_batch_draws() {
    let layers = LENET.replace(
        "{ type = \"dense\", units = 12",
        "{ type = \"dropout\", probability = 0.5 }, { type = \"dense\", units = 12",
    );
    let model = model(&layers);
    for gpu in [None, Some(gpu())] {
        let [whole, parts] = [20, 6].map(|most| {
            let options = Options {
                micro: most < 20,
                ..Options::default()
            };
            let mut engine = engine(gpu.clone(), &model, most, &options);
            upload(&mut engine, Split::Train);
            let go_on = &mut |_: &[Metrics]| Ok(ControlFlow::Continue(()));
            let order = epoch_order(TRAIN, 3, 1);
            engine
                .train_epoch(&order, &table(20, most, 1), go_on)
                .unwrap();
            engine.parameters().unwrap()
        });
        let apart = difference(&whole, &parts);
        assert!(apart < 1e-5, "{apart:e}");
    }
}

/// An epoch ends between two batches, never in the middle of one.
#[test]
fn a_break_comes_after_the_last_part_of_a_batch() {
    let model = model(LENET);
    let options = Options {
        micro: true,
        ..Options::default()
    };
    for gpu in [None, Some(gpu())] {
        let mut engine = engine(gpu, &model, 6, &options);
        upload(&mut engine, Split::Train);
        let order = epoch_order(TRAIN, 3, 1);
        // 4, 4 and 2 parts.
        let steps = table(20, 6, 1);
        let parts: Vec<u32> = steps.iter().map(|step| step.micro).collect();
        assert_eq!(parts, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]);
        let metrics = engine
            .train_epoch(&order, &steps, &mut |_| Ok(ControlFlow::Break(())))
            .unwrap();
        assert!([4, 8, 10].contains(&metrics.len()), "{}", metrics.len());
        // Out of order, and without the option.
        let mut wrong = steps.clone();
        wrong[1].micro = 2;
        let go_on = &mut |_: &[Metrics]| Ok(ControlFlow::Continue(()));
        let error = engine.train_epoch(&order, &wrong, go_on).unwrap_err();
        assert!(error.to_string().contains("steps"), "{error}");
    }
    let mut engine = engine(None, &model, 6, &Options::default());
    upload(&mut engine, Split::Train);
    let go_on = &mut |_: &[Metrics]| Ok(ControlFlow::Continue(()));
    let order = epoch_order(TRAIN, 3, 1);
    let error = engine.train_epoch(&order, &table(20, 6, 1), go_on);
    assert!(error.is_err());
}
