//! Batch-norms whose statistics are those of all shards of a batch: the training is that without shards.

use std::ops::ControlFlow;
use std::sync::Arc;
use wgrad::cpu::{Twins, Values};
use wgrad::engine::{CpuEngine, Engine, Split};
use wgrad::gpu::{Choice, Gpu};
use wgrad::kernels::{Metrics, Step};
use wgrad::model::recipe::{Optimizer, Precision};
use wgrad::model::{Definition, Model, initial_parameters, initial_running};
use wgrad::plan::{Mode, Options, Plan, Target};

/// Neither is a multiple of the shards; the last batch has fewer samples than a batch has shards.
const SAMPLES: usize = 29;
const BATCH: usize = 13;
const SHARDS: usize = 4;
const IMAGE: usize = 5 * 7 * 3;
const NORMALIZATION: [f32; 6] = [0.02, 0.01, 0.015, -1.0, -1.5, -2.0];

const RULE: Optimizer = Optimizer::Sgd {
    momentum: 0.5,
    nesterov: false,
    weight_decay: 0.0,
};

/// Batch-norms of images, behind each other, in branches that meet, and of vectors.
fn model() -> Model {
    let text = format!(
        "name = \"small\"\ninput = [5, 7, 3]\nclasses = 4\nloss = \"softmax_cross_entropy\"\n
         recipe = {{ optimizer = \"sgd\", lr = 0.05, schedule = \"constant\", epochs = 1, batch_size = {BATCH} }}\n
         layer = [{{ type = \"batch_norm\" }},
             {{ type = \"conv2d\", out_channels = 8, kernel = 3, padding = 1, bias = false }},
             {{ type = \"batch_norm\", activation = \"relu\", name = \"stem\" }},
             {{ type = \"conv2d\", out_channels = 8, kernel = 1, bias = false, name = \"side\" }},
             {{ type = \"batch_norm\", name = \"short\" }},
             {{ type = \"conv2d\", input = \"stem\", out_channels = 8, kernel = 3, padding = 1, bias = false }},
             {{ type = \"batch_norm\", name = \"long\" }},
             {{ type = \"add\", inputs = [\"long\", \"short\"], activation = \"relu\" }},
             {{ type = \"max_pool2d\", kernel = 2 }},
             {{ type = \"dense\", units = 5 }},
             {{ type = \"batch_norm\" }},
             {{ type = \"dense\", units = \"classes\" }}]"
    );
    let definition = Definition::parse(&text, "small").unwrap();
    definition.resolve(definition.input, 4).unwrap()
}

fn options(shards: Option<usize>, sync_batch_norm: bool, precision: Precision) -> Options {
    Options {
        micro: shards.is_some(),
        shards,
        sync_batch_norm,
        precision,
        average: true,
        ..Options::default()
    }
}

/// Channels differ in mean and deviation, and samples, so that shards do.
fn images() -> Vec<u8> {
    let mut state = 1u32;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 24
    };
    (0..SAMPLES * IMAGE)
        .map(|i| (byte() % (100 + 50 * (i as u32 % 3)) + 5 * (i / IMAGE % 7) as u32) as u8)
        .collect()
}

fn labels() -> Vec<u32> {
    (0..SAMPLES as u32).map(|i| i * 7 / 3 % 4).collect()
}

fn order() -> Vec<u32> {
    (0..SAMPLES as u32).rev().collect()
}

/// The batches of an epoch in so many shards at most.
fn table(most: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    for first in (0..SAMPLES).step_by(BATCH) {
        let count = BATCH.min(SAMPLES - first);
        let shards = most.min(count);
        steps.extend((0..shards).map(|shard| {
            let [from, to] = [shard, shard + 1].map(|shard| shard * count / shards);
            Step {
                lr: 0.1,
                total: count as f32,
                micro: shard as u32,
                shards: shards as u32,
                share: 1.0 / shards as f32,
                average: 0.5,
                ..Step::new(first + from, to - from)
            }
        }));
    }
    steps
}

/// Of so many batches in f64: the last one's gradients, the parameters, and the running statistics.
fn twins(shards: Option<usize>, synced: bool, batches: usize) -> [Vec<f64>; 3] {
    let (model, most) = (model(), shards.unwrap_or(1));
    let options = Options {
        unshared: true,
        ..options(shards, synced, Precision::F32)
    };
    let (batch, mode) = (BATCH.div_ceil(most), Mode::Train(RULE));
    let plan = Plan::new(&model, batch, mode, &options, Target::Cpu).unwrap();
    assert_eq!(plan.syncs(), synced);
    let mut twins = Twins::<f64>::new(plan, SAMPLES);
    let wide = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
    let steps = table(most);
    *twins.values("images") = Values::Bytes(images());
    *twins.words("labels") = labels();
    *twins.words("order") = order();
    *twins.words("steps") = bytemuck::cast_slice(&steps).to_vec();
    *twins.floats("normalization") = wide(&NORMALIZATION);
    *twins.floats("parameters") = wide(&initial_parameters(&model, 5));
    *twins.floats("running") = wide(&initial_running(&model));
    for batch in steps.iter().filter(|s| s.begins()).take(batches) {
        twins.run_phases(batch.shards as usize);
    }
    let gradients = match shards {
        Some(_) => "accumulated",
        None => "gradients",
    };
    [gradients, "parameters", "running"].map(|name| twins.floats(name).clone())
}

/// The largest difference, by the largest number.
fn apart<T: Copy + Into<f64>>(found: &[T], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    let apart = found.iter().zip(expected);
    let apart = apart.map(|(a, b)| ((*a).into() - b).abs());
    // Not so for NaN.
    apart.fold(0.0, |most, x| if x <= most { most } else { x }) / largest
}

#[test]
fn synced_shards_are_the_whole_batch() {
    // The last batch has three samples in three shards.
    for batches in 1..=3 {
        let whole = twins(None, false, batches);
        for (shards, synced) in [(1, true), (3, true), (SHARDS, true), (SHARDS, false)] {
            let found = twins(Some(shards), synced, batches);
            for (found, whole) in found.iter().zip(&whole) {
                let apart = apart(found, whole);
                // To the rounding of f64, but for the rounding of a gradient's share to f32.
                assert_eq!(apart < 1e-10, synced, "{shards} shards: {apart:e}");
                assert!(synced || apart > 1e-2, "{apart:e}");
            }
        }
    }
}

struct Training {
    engine: Engine,
    steps: Vec<Step>,
}

impl Training {
    fn new(gpu: Option<&Arc<Gpu>>, shards: Option<usize>, options: &Options) -> Training {
        let (model, most) = (model(), shards.unwrap_or(1));
        let batch = BATCH.div_ceil(most);
        let mut engine = Engine::new(gpu.cloned(), &model, batch, &RULE, options).unwrap();
        engine
            .set_parameters(&initial_parameters(&model, 5))
            .unwrap();
        engine
            .upload_dataset(Split::Train, images(), &labels(), &NORMALIZATION)
            .unwrap();
        let steps = table(most);
        Training { engine, steps }
    }

    fn run(&mut self, rows: usize) -> Vec<Metrics> {
        let go_on = &mut |_: &[Metrics]| Ok(ControlFlow::Continue(()));
        let steps = &self.steps[..rows];
        self.engine.train_epoch(&order(), steps, go_on).unwrap()
    }

    /// As [`twins`] has them, and the metrics.
    fn results(&self) -> [Vec<f32>; 3] {
        let e = &self.engine;
        [e.gradients(), e.parameters(), e.running()].map(|values| values.unwrap())
    }
}

fn a_device_syncs(gpu: Option<Arc<Gpu>>) {
    let gpu = gpu.as_ref();
    let halves = gpu.is_none_or(|gpu| gpu.report().shader_f16);
    let precisions = [(Precision::F32, 1e-5), (Precision::Mixed, 5e-3)];
    for (precision, tolerance) in precisions.into_iter().take(1 + usize::from(halves)) {
        let of = |shards, synced| {
            let options = options(shards, synced, precision);
            let mut training = Training::new(gpu, shards, &options);
            let rows = training.steps.len();
            let metrics = training.run(rows);
            assert_eq!(metrics.len(), rows);
            (training.results(), metrics)
        };
        let (whole, synced) = (of(None, false), of(Some(SHARDS), true));
        let unsynced = of(Some(SHARDS), false);
        let expected = match precision {
            Precision::F32 => twins(None, false, 3),
            // In halves all else is far from it.
            Precision::Mixed => whole
                .0
                .clone()
                .map(|v| v.into_iter().map(f64::from).collect()),
        };
        for (i, expected) in expected.iter().enumerate() {
            let [synced, unsynced] = [&synced, &unsynced].map(|of| apart(&of.0[i], expected));
            assert!(synced < tolerance, "{precision:?}: {synced:e}");
            assert!(unsynced > 2.0 * tolerance, "{precision:?}: {unsynced:e}");
        }
        assert!(of(Some(SHARDS), true) == synced, "not the same bits");
        // Whole batches are synced as they are.
        assert!(of(None, true) == whole);
    }
}

#[test]
fn the_cpu_syncs() {
    a_device_syncs(None);
}

fn software() -> Arc<Gpu> {
    let gpu = Gpu::open(&Choice::Best);
    Arc::new(gpu.expect("an adapter; sh scripts/test.sh installs one"))
}

#[test]
fn the_gpu_syncs() {
    a_device_syncs(Some(software()));
}

/// Slabs of a few images, of fewer than a batch has.
#[test]
fn streamed_images_change_no_bit() {
    let gpu = software();
    let results = [None, Some(5 * IMAGE as u64), Some(9 * IMAGE as u64)].map(|slab_bytes| {
        let options = Options {
            slab_bytes,
            ..options(Some(SHARDS), true, Precision::F32)
        };
        let mut training = Training::new(Some(&gpu), Some(SHARDS), &options);
        let rows = training.steps.len();
        (training.run(rows), training.results())
    });
    assert!(results[0] == results[1] && results[0] == results[2]);
}

/// Who stops, stops between two batches, and goes on to the same bits, maybe with more shards at a time.
#[test]
fn a_training_stops_after_whole_batches() {
    for gpu in [None, Some(software())] {
        let options = options(Some(SHARDS), true, Precision::F32);
        let new = || Training::new(gpu.as_ref(), Some(SHARDS), &options);
        let mut stopped = new();
        let mut heard = 0;
        let mut stop = |new: &[Metrics]| {
            heard += new.len();
            Ok(ControlFlow::Break(()))
        };
        let steps = stopped.steps.clone();
        let metrics = stopped.engine.train_epoch(&order(), &steps, &mut stop);
        assert_eq!(heard, metrics.unwrap().len());
        assert!(heard % SHARDS == 0 && heard < steps.len());
        let mut other = new();
        other.run(heard);
        assert!(stopped.results() == other.results());
        // The last batch first, which has fewer shards.
        let mut last = new();
        last.steps.rotate_right(3);
        last.run(3 + SHARDS);
        let mut again = new();
        again.steps.rotate_right(3);
        again.run(3);
        again.steps.rotate_left(3);
        again.run(SHARDS);
        assert!(last.results() == again.results());
    }
}

/// All shards of a batch are under way at a time.
#[test]
fn memory_counts_all_shards() {
    let model = model();
    let of = |synced| {
        let options = options(Some(SHARDS), synced, Precision::F32);
        let mode = Mode::Train(RULE);
        let plan = Plan::new(&model, 4, mode, &options, Target::Cpu).unwrap();
        let step = plan.step_bytes()[0];
        let rows = plan.memory();
        let activations = rows.iter().find(|(name, _)| name.contains("activations"));
        let bytes = activations.unwrap().1;
        let all = CpuEngine::memory(&model, 4, &RULE, &options).unwrap();
        (bytes / step, bytes, all)
    };
    let ((one, before, all), (replicas, bytes, more)) = (of(false), of(true));
    assert_eq!((one, replicas as usize), (1, SHARDS));
    assert!(more - all > bytes - before);
}
