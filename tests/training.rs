//! Whole trainings of a small model, on the CPU and on the GPU: that they learn, repeat to the bit,
//! and survive being killed.

mod common;

use common::{TEST_IMAGES, TRAIN_IMAGES, contents};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use wgrad::data::{self, Normalization, Request};
use wgrad::engine::{Engine, Split};
use wgrad::gpu::{Choice, Gpu};
use wgrad::model::Definition;
use wgrad::model::recipe::{ClassWeights, Schedule, Views};
use wgrad::plan::Options;
use wgrad::train::{
    CheckpointEvery, Config, Control, DataRecord, DeviceRecord, EpochRecord, FORMAT, ModelRecord,
    Observer, Outcome, Run, Start, StepRecord, Weights, start_from, train,
};
use wgrad::{Error, Result};

const CHECKPOINT: &str = "checkpoint.safetensors";
const PREVIOUS: &str = "checkpoint.previous.safetensors";
const BEST: &str = "best.safetensors";

/// The files of a run folder that can be damaged.
const FILES: [&str; 4] = ["metrics.jsonl", CHECKPOINT, "model.safetensors", "run.json"];

#[derive(Clone)]
enum Device {
    Cpu,
    Gpu(Arc<Gpu>),
}

impl Device {
    fn gpu() -> Device {
        let gpu = Gpu::open(&Choice::Best);
        Device::Gpu(Arc::new(
            gpu.expect("an adapter; scripts/test.sh installs one"),
        ))
    }

    fn engine(&self, run: &Run) -> Engine {
        self.engine_with(run, None)
    }

    /// With slabs of so many bytes, if any.
    fn engine_with(&self, run: &Run, slab_bytes: Option<u64>) -> Engine {
        let (model, recipe) = (run.model(), &run.config().recipe);
        let (batch, optimizer) = (recipe.step_batch(), &recipe.optimizer);
        let options = Options {
            slab_bytes,
            ..Options::of(recipe)
        };
        let gpu = match self {
            Device::Cpu => None,
            Device::Gpu(gpu) => Some(gpu.clone()),
        };
        Engine::new(gpu, model, batch, optimizer, &options).unwrap()
    }
}

/// Stops after epoch `stop`, like a kill when that epoch's checkpoint is complete.
#[derive(Debug, Default)]
struct StopAfter<'a> {
    stop: usize,
    /// Set when so many images of an epoch are trained; for one more than there are, when some are
    /// tested.
    interrupt: Option<(usize, &'a AtomicBool)>,
    epochs: Vec<EpochRecord>,
    /// Largest numbers of images that were reported as trained and tested.
    images: [usize; 2],
    notes: Vec<String>,
}

impl StopAfter<'_> {
    fn interrupt_at(&self, images: usize) {
        if let Some((at, flag)) = self.interrupt.filter(|(at, _)| images >= *at) {
            assert!(at > 0);
            flag.store(true, Ordering::Relaxed);
        }
    }
}

impl Observer for StopAfter<'_> {
    fn epoch_started(&mut self, _epoch: usize, _engine: &Engine) -> Result<()> {
        Ok(())
    }

    fn trained(&mut self, _epoch: usize, images: usize, mean_loss: f64) {
        assert!(mean_loss.is_finite());
        self.images[0] = self.images[0].max(images);
        self.interrupt_at(images);
    }

    fn note(&mut self, line: &str) -> Result<()> {
        self.notes.push(line.into());
        Ok(())
    }

    fn evaluated(&mut self, split: Split, images: usize) {
        if split == Split::Test {
            self.images[1] = self.images[1].max(images);
        }
        if self.interrupt.is_some_and(|(at, _)| at > TRAIN_IMAGES) {
            self.interrupt_at(usize::MAX);
        }
    }

    fn epoch_finished(&mut self, record: &EpochRecord, _engine: &Engine) -> Result<()> {
        self.epochs.push(record.clone());
        if record.epoch == self.stop {
            return Err(Error::Usage("stopped".into()));
        }
        Ok(())
    }
}

struct Bench {
    folder: tempfile::TempDir,
    data: data::Splits,
    device: Device,
    slab_bytes: Option<u64>,
}

impl Bench {
    fn new(device: Device) -> Bench {
        let folder = tempfile::tempdir().unwrap();
        common::write_model_and_data(folder.path());
        let data = data::load(
            folder.path().join("shapes").to_str().unwrap(),
            &Request::default(),
            &mut |_, _| (),
        )
        .unwrap();
        Bench {
            folder,
            data,
            device,
            slab_bytes: None,
        }
    }

    fn config(&self, seed: u64, epochs: usize, schedule: Schedule) -> Config {
        let definition = Definition::parse(common::MODEL, "small.toml").unwrap();
        let shape = self.data.train.shape;
        let mut recipe = definition.recipe.clone();
        recipe.epochs = epochs;
        recipe.schedule = schedule;
        Config {
            format: FORMAT,
            wgrad: "test".into(),
            id: None,
            model: ModelRecord {
                name: definition.name.clone(),
                input: shape,
                classes: self.data.train.classes,
                class_names: self.data.train.class_names.clone(),
                parameters: 0,
                architecture: definition.text,
            },
            data: DataRecord::of(
                self.data.name.clone(),
                None,
                &Request::default(),
                &self.data,
            ),
            normalization: Normalization::of(&self.data.train),
            recipe,
            seed,
            init: None,
            device: DeviceRecord::default(),
            finished_epochs: 0,
            parameter_sha256: None,
        }
    }

    fn create(&self, name: &str, config: Config) -> Run {
        Run::create(Some(&self.folder.path().join(name)), config).unwrap()
    }

    /// Trains on; `stop` is the epoch to stop after, 0 for never.
    fn train(&self, run: &mut Run, stop: usize) -> (Result<()>, StopAfter<'static>) {
        let mut observer = StopAfter {
            stop,
            ..StopAfter::default()
        };
        let control = Control {
            checkpoint_every: CheckpointEvery::Epoch,
            stop_after: None,
            interrupted: &AtomicBool::new(false),
        };
        let result = self.train_with(run, &control, &mut observer).map(|_| ());
        (result, observer)
    }

    fn train_with(
        &self,
        run: &mut Run,
        control: &Control,
        observer: &mut StopAfter,
    ) -> Result<Outcome> {
        let mut engine = self.device.engine_with(run, self.slab_bytes);
        train(run, self.data.clone(), &mut engine, control, observer)
    }

    /// With a validation split that a network which learns does ever worse on: the test images under
    /// the labels of others.
    fn contrary(device: Device) -> Bench {
        let mut bench = Bench::new(device);
        let mut validation = bench.data.test.clone();
        for label in &mut validation.labels {
            *label = (*label + 1) % 4;
        }
        bench.data.validation = Some(validation);
        bench
    }

    /// A whole training; the trained run.
    fn trained(&self, name: &str, config: Config) -> Run {
        let mut run = self.create(name, config);
        self.train(&mut run, 0).0.unwrap();
        run
    }
}

fn hash(run: &Run) -> String {
    run.config().parameter_sha256.clone().unwrap()
}

/// A run closed and opened again.
fn reopen(run: Run) -> Run {
    let folder = run.folder().to_path_buf();
    drop(run);
    Run::resume(&folder).unwrap()
}

fn read(folder: &Path, file: &str) -> Vec<u8> {
    std::fs::read(folder.join(file)).unwrap()
}

/// That two runs ended with the same bits and the same metrics (but for the time they took).
fn assert_same(a: &Run, b: &Run) {
    assert_eq!(hash(a), hash(b));
    for file in [CHECKPOINT, "model.safetensors", BEST] {
        let read = |run: &Run| std::fs::read(run.folder().join(file)).ok();
        assert!(read(a) == read(b), "{file} differs");
    }
    let timeless = |run: &Run| {
        let run = Run::open(run.folder()).unwrap();
        let mut metrics = run.metrics().to_vec();
        for record in &mut metrics {
            (record.seconds, record.images_per_second) = (0.0, 0.0);
        }
        metrics
    };
    assert_eq!(timeless(a), timeless(b));
    let steps = |run: &Run| Run::open(run.folder()).unwrap().steps().to_vec();
    assert_eq!(steps(a), steps(b));
}

fn learns(device: Device) {
    let bench = Bench::new(device);
    let mut run = bench.create("run", bench.config(1, 12, Schedule::OneCycle));
    let (result, observer) = bench.train(&mut run, 0);
    result.unwrap();
    let (first, last) = (&observer.epochs[0], &observer.epochs[11]);
    // A floor, as for an untrained network it is 0.25; the bars are hard to miss.
    assert!(last.test_accuracy >= 0.95, "{last:?}");
    assert!(
        last.train_loss < 0.5 * first.train_loss,
        "{first:?} {last:?}"
    );
    // 96 images in batches of 20: the last one holds 16, and counts as 16.
    assert_eq!(last.step, 12 * 5);
    assert_eq!(observer.images, [TRAIN_IMAGES, TEST_IMAGES]);
    assert_eq!(run.metrics(), observer.epochs);
    // Each of an epoch's few steps has a record, and their mean is the epoch's.
    assert_eq!(run.steps().len(), 12 * 5);
    for (record, steps) in run.metrics().iter().zip(run.steps().chunks(5)) {
        let weights = [20.0, 20.0, 20.0, 20.0, 16.0];
        let mean = |values: [f64; 5]| {
            values.iter().zip(weights).map(|(v, w)| v * w).sum::<f64>() / TRAIN_IMAGES as f64
        };
        let of = |value: fn(&StepRecord) -> f64| std::array::from_fn(|i| value(&steps[i]));
        assert!((mean(of(|s| s.loss)) - record.train_loss).abs() < 1e-9);
        assert!((mean(of(|s| s.accuracy)) - record.train_accuracy).abs() < 1e-9);
        assert_eq!(steps[4].step, record.step);
        assert_eq!(
            (steps[4].epoch, steps[4].lr),
            (record.epoch as f64, record.lr)
        );
    }
    // The norms are those of the published weights, and of gradients that move them.
    let [parameters, _] = run.weights().unwrap();
    let layers = run.model().layers.iter();
    let named: Vec<_> = layers.flat_map(|layer| &layer.parameters).collect();
    assert_eq!(last.weight_norms.len(), named.len());
    for p in named {
        let values = &parameters[p.start..p.start + p.elements()];
        let norm = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        assert!(
            (last.weight_norms[&p.name] - norm.sqrt()).abs() < 1e-12,
            "{}",
            p.name
        );
        assert!(last.gradient_norms[&p.name] > 0.0, "{}", p.name);
    }
    // A test loss of an epoch is close to the train loss here, so neither is off by a factor.
    let ratio = last.test_loss / last.train_loss;
    assert!((0.2..5.0).contains(&ratio), "{last:?}");
}

/// With images changed and mixed, weights and smoothing: it learns, to the same bits when it is stopped in between.
fn mixing(device: Device) {
    let bench = Bench::new(device);
    let config = || {
        let mut config = bench.config(1, 20, Schedule::Constant);
        config.recipe.augment.brightness = 0.2;
        config.recipe.augment.mix_up = 0.4;
        config.recipe.augment.cut_mix = 1.0;
        config.recipe.label_smoothing = 0.1;
        config.recipe.class_weights = Some(ClassWeights::Given(vec![0.5, 1.0, 1.5, 1.0]));
        config
    };
    let whole = bench.trained("whole", config());
    let mut parts = bench.create("parts", config());
    assert!(bench.train(&mut parts, 3).0.is_err());
    let mut parts = reopen(parts);
    bench.train(&mut parts, 0).0.unwrap();
    assert_same(&whole, &parts);
    let last = &whole.metrics()[19];
    assert!(last.test_accuracy >= 0.9, "{last:?}");
    // What it was shown is harder than what it is tested on.
    assert!(last.train_accuracy < last.test_accuracy, "{last:?}");
    assert!(last.train_loss > last.test_loss, "{last:?}");
}

#[test]
fn mixing_on_the_cpu() {
    mixing(Device::Cpu);
}

#[test]
fn mixing_on_the_gpu() {
    mixing(Device::gpu());
}

fn repeats(device: Device) {
    let bench = Bench::new(device);
    let a = bench.trained("a", bench.config(1, 2, Schedule::Constant));
    let b = bench.trained("b", bench.config(1, 2, Schedule::Constant));
    assert_same(&a, &b);
    let c = bench.trained("c", bench.config(2, 2, Schedule::Constant));
    assert_ne!(hash(&a), hash(&c));
}

fn resumes(device: Device) {
    let bench = Bench::new(device);
    // Finished after two epochs, then continued to three: the same where the total does not matter.
    let whole = bench.trained("whole", bench.config(1, 3, Schedule::Constant));
    let two = bench.trained("two", bench.config(1, 2, Schedule::Constant));
    assert_ne!(hash(&whole), hash(&two));
    let mut two = reopen(two);
    two.config_mut().recipe.epochs = 3;
    let (result, observer) = bench.train(&mut two, 0);
    result.unwrap();
    assert_eq!(observer.epochs.len(), 1);
    assert_same(&whole, &two);

    // Interrupted in a training of three, whose schedule knows about the three.
    let whole = bench.trained("whole3", bench.config(1, 3, Schedule::OneCycle));
    let mut cut = bench.create("cut", bench.config(1, 3, Schedule::OneCycle));
    assert!(bench.train(&mut cut, 2).0.is_err());
    let mut cut = reopen(cut);
    assert_eq!(cut.config().finished_epochs, 2);
    bench.train(&mut cut, 0).0.unwrap();
    assert_same(&whole, &cut);

    // A finished run has nothing left to do, and stays as it is.
    let before = contents(cut.folder());
    let mut cut = reopen(cut);
    let (result, observer) = bench.train(&mut cut, 0);
    result.unwrap();
    assert!(observer.epochs.is_empty());
    assert!(contents(cut.folder()) == before);
}

/// With batch normalisation, whose running statistics are state beside the parameters, and dropout, whose
/// draws depend on the epoch: interrupted in the middle of an epoch and behind one.
fn resumes_with_running_statistics(device: Device) {
    let bench = Bench::new(device);
    let layers = "type = \"batch_norm\"\n\n[[layer]]\ntype = \"dropout\"\n\n[[layer]]\ntype = \"max_pool2d\"";
    let text = common::MODEL.replacen("type = \"max_pool2d\"", layers, 1);
    let config = || {
        let mut config = bench.config(1, 2, Schedule::OneCycle);
        config.model.architecture.clone_from(&text);
        config
    };
    let whole = bench.trained("whole", config());
    let mut cut = bench.create("cut", config());
    for at in [40, 97] {
        let flag = AtomicBool::new(false);
        let control = Control {
            checkpoint_every: CheckpointEvery::Epoch,
            stop_after: None,
            interrupted: &flag,
        };
        let mut observer = StopAfter {
            interrupt: Some((at, &flag)),
            ..StopAfter::default()
        };
        let outcome = bench.train_with(&mut cut, &control, &mut observer).unwrap();
        assert!(
            matches!(outcome, Outcome::Interrupted { .. }),
            "{outcome:?}"
        );
        cut = reopen(cut);
    }
    bench.train(&mut cut, 0).0.unwrap();
    assert_same(&whole, &cut);

    // The published weights carry them, and they have moved.
    let [_, running] = Run::open(whole.folder()).unwrap().weights().unwrap();
    assert_eq!(running.len(), whole.model().running_elements);
    let moved = running
        .iter()
        .zip(wgrad::model::initial_running(whole.model()));
    assert!(moved.filter(|(a, b)| **a != *b).count() >= 8, "{running:?}");
    // What they are is what the test accuracy was measured with.
    let mut engine = bench.device.engine(&whole);
    let (test, config) = (&bench.data.test, whole.config());
    let [parameters, _] = whole.weights().unwrap();
    engine.set_parameters(&parameters).unwrap();
    engine.set_running(&running).unwrap();
    engine
        .upload_dataset(
            Split::Test,
            test.images.clone(),
            &test.labels,
            &config.scale_and_shift(),
        )
        .unwrap();
    let result = engine.evaluate(Split::Test, &mut |_| std::ops::ControlFlow::Continue(()));
    let loss = result.unwrap().loss_sum / TEST_IMAGES as f64;
    let recorded = whole.metrics().last().unwrap().test_loss;
    assert!(
        (loss - recorded).abs() <= 1e-6 * recorded,
        "{loss}, not {recorded}"
    );
}

#[test]
fn the_cpu_resumes_with_running_statistics() {
    resumes_with_running_statistics(Device::Cpu);
}

#[test]
fn the_gpu_resumes_with_running_statistics() {
    resumes_with_running_statistics(Device::gpu());
}

#[test]
fn the_cpu_learns() {
    learns(Device::Cpu);
}

#[test]
fn the_gpu_learns() {
    learns(Device::gpu());
}

#[test]
fn the_cpu_repeats_to_the_bit() {
    repeats(Device::Cpu);
}

#[test]
fn the_gpu_repeats_to_the_bit() {
    repeats(Device::gpu());
}

#[test]
fn the_cpu_resumes_to_the_bit() {
    resumes(Device::Cpu);
}

#[test]
fn the_gpu_resumes_to_the_bit() {
    resumes(Device::gpu());
}

#[test]
fn cpu_and_gpu_train_alike() {
    let gpu = Bench::new(Device::gpu());
    let cpu = Bench::new(Device::Cpu);
    let a = gpu.trained("run", gpu.config(1, 1, Schedule::Constant));
    let b = cpu.trained("run", cpu.config(1, 1, Schedule::Constant));
    let difference = (a.metrics()[0].train_loss - b.metrics()[0].train_loss).abs();
    assert!(difference < 1e-4, "{:?} {:?}", a.metrics(), b.metrics());
    assert_ne!(hash(&a), "");
}

/// A kill between any two of the writes after an epoch, and one in the middle of each.
#[test]
fn a_kill_at_any_moment_loses_at_most_the_epoch_at_hand() {
    /// Does the first `done` of the writes after an epoch, in a folder with the files of the epoch
    /// before; gives the file that comes next.
    fn writes(folder: &Path, new: &[(String, Vec<u8>)], done: usize) -> Option<&'static str> {
        let order = [
            "metrics.jsonl",
            PREVIOUS,
            CHECKPOINT,
            BEST,
            "model.safetensors",
            "run.json",
        ];
        for file in &order[..done] {
            let (_, bytes) = new.iter().find(|(name, _)| name == file).unwrap();
            match *file {
                PREVIOUS => std::fs::rename(folder.join(CHECKPOINT), folder.join(file)).unwrap(),
                _ => std::fs::write(folder.join(file), bytes).unwrap(),
            }
        }
        order.get(done).copied()
    }
    let mut bench = Bench::new(Device::Cpu);
    bench.data.validation = Some(bench.data.test.clone());
    let config = || bench.config(1, 3, Schedule::Cosine);
    let whole = bench.trained("whole", config());
    let names = |folder: &Path| -> Vec<String> {
        let all = contents(folder).into_iter();
        all.map(|(name, _)| name).collect()
    };
    for epoch in 0..2 {
        // Folders right after this epoch and right after the next.
        let after = |epoch: usize| {
            let mut run = bench.create(&format!("after{epoch}"), config());
            if epoch > 0 {
                assert!(bench.train(&mut run, epoch).0.is_err());
            }
            let files = contents(run.folder());
            std::fs::remove_dir_all(run.folder()).unwrap();
            files
        };
        let (old, new) = (after(epoch), after(epoch + 1));
        for written in 0..=6 {
            // Before the first epoch there is no checkpoint to become the previous one.
            if epoch == 0 && written > 1 {
                continue;
            }
            let folder = bench.folder.path().join(format!("cut-{epoch}-{written}"));
            std::fs::create_dir(&folder).unwrap();
            for (name, bytes) in &old {
                std::fs::write(folder.join(name), bytes).unwrap();
            }
            if let Some(next) = writes(&folder, &new, written) {
                let (_, bytes) = new
                    .iter()
                    .find(|(name, _)| name.starts_with(&next[..5]))
                    .unwrap();
                let half = &bytes[..bytes.len() / 2];
                std::fs::write(folder.join(format!("{next}.x7y.tmp")), half).unwrap();
            }
            // The steps grow all along, and are cut in the middle of a line.
            let (_, steps) = new.iter().find(|(name, _)| name == "steps.jsonl").unwrap();
            let all = if written < 2 {
                steps.len() - 9
            } else {
                steps.len()
            };
            std::fs::write(folder.join("steps.jsonl"), &steps[..all]).unwrap();
            let mut run = Run::resume(&folder).unwrap();
            let (result, observer) = bench.train(&mut run, 0);
            result.unwrap();
            assert_eq!(
                observer.notes.len(),
                usize::from(written == 2),
                "{observer:?}"
            );
            let checkpoint_written = usize::from(written > 2);
            assert_eq!(observer.epochs.len(), 3 - epoch - checkpoint_written);
            assert_same(&whole, &run);
            assert_eq!(names(&folder), names(whole.folder()));
        }
    }
}

#[test]
fn damaged_files_are_refused_and_left_alone() {
    let bench = Bench::new(Device::Cpu);
    let run = bench.trained("run", bench.config(1, 2, Schedule::Constant));
    let folder = run.folder().to_path_buf();
    drop(run);
    std::fs::remove_file(folder.join(PREVIOUS)).unwrap();
    for file in FILES {
        let good = read(&folder, file);
        std::fs::write(folder.join(file), &good[..good.len() - 9]).unwrap();
        let before = contents(&folder);
        let error = if file == "model.safetensors" {
            Run::open(&folder).unwrap().weights().err()
        } else {
            Run::resume(&folder).and_then(|mut run| run.restore()).err()
        };
        let message = error.unwrap().to_string();
        assert!(
            message.contains(file) && !message.contains('\n'),
            "{message}"
        );
        assert!(contents(&folder) == before, "{file}");
        std::fs::write(folder.join(file), good).unwrap();
    }
    let restored = Run::resume(&folder).unwrap().restore().unwrap();
    assert_eq!(restored.checkpoint.unwrap().epoch, 2);
    assert_eq!(restored.note, None);
}

/// One bit at seeded places of both files, over header and tensors.
#[test]
fn a_flipped_bit_is_refused_or_another_checkpoint_taken() {
    let bench = Bench::new(Device::Cpu);
    let whole = bench.trained("whole", bench.config(1, 3, Schedule::OneCycle));
    let mut run = bench.create("run", bench.config(1, 3, Schedule::OneCycle));
    assert!(bench.train(&mut run, 2).0.is_err());
    let folder = run.folder().to_path_buf();
    drop(run);
    let good = contents(&folder);
    let restore = || {
        for (name, bytes) in &good {
            std::fs::write(folder.join(name), bytes).unwrap();
        }
    };
    let mut state = 7u32;
    let mut random = |below: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((u64::from(state) * below as u64) >> 32) as usize
    };
    for file in [CHECKPOINT, "model.safetensors"] {
        let (_, bytes) = good.iter().find(|(name, _)| name == file).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for i in 0..200 {
            let byte = match i % 2 {
                0 => random(header),
                _ => header + random(bytes.len() - header),
            };
            let mut damaged = bytes.clone();
            damaged[byte] ^= 1 << random(8);
            std::fs::write(folder.join(file), &damaged).unwrap();
            if file != CHECKPOINT {
                let error = Run::open(&folder).unwrap().weights().unwrap_err();
                assert!(error.to_string().contains(file), "byte {byte}: {error}");
                continue;
            }
            // Without another one, nothing is trained and nothing changed.
            std::fs::remove_file(folder.join(PREVIOUS)).unwrap();
            let before = contents(&folder);
            let error = Run::resume(&folder).unwrap().restore().unwrap_err();
            assert!(error.to_string().contains(file), "byte {byte}: {error}");
            assert!(contents(&folder) == before, "byte {byte}");
            restore();
        }
        restore();
    }
    // With another one, the training goes on from it, says so, and comes to the same end.
    std::fs::write(folder.join(CHECKPOINT), b"damaged").unwrap();
    let mut run = Run::resume(&folder).unwrap();
    let (result, observer) = bench.train(&mut run, 0);
    result.unwrap();
    assert_eq!(observer.epochs.len(), 2);
    let [note] = &observer.notes[..] else {
        panic!("{:?}", observer.notes)
    };
    assert!(
        note.contains(CHECKPOINT) && note.contains("after epoch 1"),
        "{note}"
    );
    assert_same(&whole, &run);
}

#[test]
fn files_of_another_run_are_refused() {
    let bench = Bench::new(Device::Cpu);
    let run = bench.trained("run", bench.config(1, 2, Schedule::Constant));
    let other = bench.trained("other", bench.config(2, 2, Schedule::Constant));
    let folder = run.folder().to_path_buf();
    drop(run);
    for file in [CHECKPOINT, PREVIOUS, "model.safetensors"] {
        std::fs::write(folder.join(file), read(other.folder(), file)).unwrap();
    }
    let before = contents(&folder);
    let weights = Run::open(&folder).unwrap().weights().unwrap_err();
    let restored = Run::resume(&folder).unwrap().restore().unwrap_err();
    for (error, file) in [(weights, "model.safetensors"), (restored, CHECKPOINT)] {
        let error = error.to_string();
        assert!(
            error.contains(file) && error.contains("of another"),
            "{error}"
        );
    }
    assert!(contents(&folder) == before);
    // Of the same configuration, but not what run.json says: trained on another device, for example.
    let mut config: serde_json::Value = serde_json::from_slice(&read(&folder, "run.json")).unwrap();
    config["id"] = serde_json::from_slice::<serde_json::Value>(&read(other.folder(), "run.json"))
        .unwrap()["id"]
        .clone();
    std::fs::write(folder.join("run.json"), config.to_string()).unwrap();
    std::fs::remove_file(folder.join(PREVIOUS)).unwrap();
    let error = Run::resume(&folder)
        .unwrap()
        .restore()
        .unwrap_err()
        .to_string();
    assert!(error.contains("SHA-256 in run.json"), "{error}");
}

#[test]
fn a_checkpoint_that_is_gone_is_no_new_start() {
    let bench = Bench::new(Device::Cpu);
    let run = bench.trained("run", bench.config(1, 2, Schedule::Constant));
    let folder = run.folder().to_path_buf();
    drop(run);
    std::fs::remove_file(folder.join(CHECKPOINT)).unwrap();
    std::fs::remove_file(folder.join(PREVIOUS)).unwrap();
    let before = contents(&folder);
    let error = Run::resume(&folder)
        .unwrap()
        .restore()
        .unwrap_err()
        .to_string();
    assert!(error.contains("2 finished epochs, found none"), "{error}");
    assert!(contents(&folder) == before);
}

/// Stopped again and again after every step, in the evaluation too, and with checkpoints every few
/// steps: never a bit of difference. Meanwhile the images may pass through in slabs, and batches be
/// taken in parts.
fn interruptions_change_nothing(
    device: Device,
    slab_bytes: Option<u64>,
    micro_batch: Option<usize>,
) {
    let mut bench = Bench::new(device);
    let mut config = bench.config(1, 3, Schedule::OneCycle);
    config.recipe.micro_batch = micro_batch;
    let config = || config.clone();
    let whole = bench.trained("whole", config());
    assert_eq!(whole.metrics()[2].step, 15);
    bench.slab_bytes = slab_bytes;
    for (name, every, strides) in [
        (
            "often",
            CheckpointEvery::Epoch,
            &[1, 20, 40, 60, 80, 96, 97][..],
        ),
        ("steps", CheckpointEvery::Steps(2), &[50, 97]),
        (
            "time",
            CheckpointEvery::Time(std::time::Duration::ZERO),
            &[70],
        ),
    ] {
        let mut run = bench.create(name, config());
        let mut interruptions = 0;
        'training: loop {
            for &at in strides {
                let flag = AtomicBool::new(false);
                let control = Control {
                    checkpoint_every: every,
                    stop_after: None,
                    interrupted: &flag,
                };
                let mut observer = StopAfter {
                    interrupt: Some((at, &flag)),
                    ..StopAfter::default()
                };
                match bench.train_with(&mut run, &control, &mut observer).unwrap() {
                    Outcome::Finished => break 'training,
                    outcome => {
                        let Outcome::Interrupted { epoch, steps, step } = outcome else {
                            panic!("{outcome:?}")
                        };
                        assert_eq!((epoch, steps), (run.metrics().len() + 1, 5));
                        assert!((1..=5).contains(&step));
                    }
                }
                interruptions += 1;
                assert!(interruptions < 100, "no progress");
                run = reopen(run);
            }
        }
        assert!(interruptions >= 3, "{name}: {interruptions}");
        assert_same(&whole, &run);
    }
}

#[test]
fn interruptions_change_nothing_on_the_cpu() {
    interruptions_change_nothing(Device::Cpu, None, None);
}

#[test]
fn interruptions_change_nothing_on_the_gpu() {
    interruptions_change_nothing(Device::gpu(), None, None);
}

#[test]
fn interruptions_change_nothing_with_slabs() {
    // Two batches of images of 48 bytes, and some.
    interruptions_change_nothing(Device::gpu(), Some(50 * 48), None);
}

#[test]
fn interruptions_change_nothing_between_the_parts_of_a_batch_on_the_cpu() {
    interruptions_change_nothing(Device::Cpu, None, Some(7));
}

#[test]
fn interruptions_change_nothing_between_the_parts_of_a_batch_on_the_gpu() {
    interruptions_change_nothing(Device::gpu(), Some(1), Some(7));
}

#[test]
fn a_break_ends_an_epoch_between_two_steps() {
    let bench = Bench::new(Device::Cpu);
    for device in [Device::Cpu, Device::gpu()] {
        let run = bench.create("x", bench.config(1, 1, Schedule::Constant));
        let mut engine = device.engine(&run);
        let data = &bench.data;
        for (split, samples) in [(Split::Train, &data.train), (Split::Test, &data.test)] {
            let normalization = run.config().scale_and_shift();
            let (images, labels) = (&samples.images, &samples.labels);
            engine
                .upload_dataset(split, images.clone(), labels, &normalization)
                .unwrap();
        }
        let order: Vec<u32> = (0..TRAIN_IMAGES as u32).collect();
        let step = wgrad::kernels::Step {
            lr: 0.01,
            ..wgrad::kernels::Step::new(0, 20)
        };
        let mut seen = Vec::new();
        let metrics = engine
            .train_epoch(&order, &[step; 5], &mut |new| {
                seen.extend_from_slice(new);
                Ok(std::ops::ControlFlow::Break(()))
            })
            .unwrap();
        assert_eq!(seen, metrics);
        assert!((1..5).contains(&metrics.len()), "{}", metrics.len());
        let evaluation = engine
            .evaluate(Split::Test, &mut |_| std::ops::ControlFlow::Break(()))
            .unwrap();
        assert!((1..=TEST_IMAGES).contains(&evaluation.predictions.len()));
        run.discard();
    }
}

/// The validation split is measured after each epoch like the test split, which it is here.
fn validation_is_measured(device: Device) {
    let mut bench = Bench::new(device);
    let config = || bench.config(1, 2, Schedule::Constant);
    let plain = bench.trained("plain", config());
    let text = String::from_utf8(read(plain.folder(), "metrics.jsonl")).unwrap();
    assert!(!text.contains("validation"), "{text}");
    assert!(!plain.folder().join(BEST).exists());
    let config = config();
    bench.data.validation = Some(bench.data.test.clone());
    let run = bench.trained("run", config);
    // It decides nothing about what is trained.
    assert_eq!(hash(&run), hash(&plain));
    for (record, plain) in run.metrics().iter().zip(plain.metrics()) {
        assert_eq!(record.test_loss, plain.test_loss);
        assert_eq!(record.validation_loss, Some(record.test_loss));
        assert_eq!(record.validation_accuracy, Some(record.test_accuracy));
    }
    let text = String::from_utf8(read(run.folder(), "metrics.jsonl")).unwrap();
    assert_eq!(text.matches("\"validation_accuracy\":").count(), 2);
    assert_eq!(Run::open(run.folder()).unwrap().metrics(), run.metrics());
    let best = String::from_utf8_lossy(&read(run.folder(), BEST)).into_owned();
    let epoch = run.best().unwrap().epoch;
    for part in [format!("epoch\\\":{epoch}"), "validation_accuracy".into()] {
        assert!(best.contains(&part), "no {part:?} in {best}");
    }
}

#[test]
fn validation_is_measured_on_the_cpu() {
    validation_is_measured(Device::Cpu);
}

#[test]
fn validation_is_measured_on_the_gpu() {
    validation_is_measured(Device::gpu());
}

#[test]
fn patience_ends_a_training_and_the_best_weights_stay() {
    let bench = Bench::contrary(Device::Cpu);
    let config = || {
        let mut config = bench.config(1, 12, Schedule::OneCycle);
        config.recipe.patience = Some(3);
        config
    };
    let mut run = bench.create("run", config());
    let never = AtomicBool::new(false);
    let control = |stop_after| Control {
        checkpoint_every: CheckpointEvery::Epoch,
        stop_after,
        interrupted: &never,
    };
    let mut observer = StopAfter::default();
    let outcome = bench.train_with(&mut run, &control(None), &mut observer);
    assert_eq!(outcome.unwrap(), Outcome::OutOfPatience);
    let best = run.best().unwrap().epoch;
    let last = run.metrics().last().unwrap();
    assert_eq!(last.epoch, best + 3);
    assert!(last.epoch < 12, "{:?}", run.metrics());
    assert!(last.test_accuracy > run.metrics()[0].test_accuracy);

    // The weights are those of that epoch, which another run is stopped after.
    let mut stopped = bench.create("stopped", config());
    let mut observer = StopAfter::default();
    bench
        .train_with(&mut stopped, &control(Some(best)), &mut observer)
        .unwrap();
    let weights = |run: &Run, which| Run::open(run.folder()).unwrap().weights_of(which).unwrap();
    assert_eq!(
        weights(&run, Weights::Best),
        weights(&stopped, Weights::Last)
    );
    assert_ne!(weights(&run, Weights::Best), weights(&run, Weights::Last));

    // It has ended for good, and resuming changes nothing.
    let before = contents(run.folder());
    let mut run = reopen(run);
    let mut observer = StopAfter::default();
    let outcome = bench.train_with(&mut run, &control(None), &mut observer);
    assert_eq!(outcome.unwrap(), Outcome::OutOfPatience);
    assert!(observer.epochs.is_empty());
    assert!(contents(run.folder()) == before);

    // Interrupted again and again, also while it is evaluated: the same epoch is the last.
    let mut cut = bench.create("cut", config());
    let outcome = 'training: loop {
        for at in [40, 97, 97] {
            let flag = AtomicBool::new(false);
            let control = Control {
                interrupted: &flag,
                ..control(None)
            };
            let mut observer = StopAfter {
                interrupt: Some((at, &flag)),
                ..StopAfter::default()
            };
            let outcome = bench.train_with(&mut cut, &control, &mut observer).unwrap();
            if !matches!(outcome, Outcome::Interrupted { .. }) {
                break 'training outcome;
            }
            cut = reopen(cut);
        }
        // One epoch undisturbed, or there would be no end.
        let next = cut.metrics().len() + 1;
        let mut observer = StopAfter::default();
        let outcome = bench.train_with(&mut cut, &control(Some(next)), &mut observer);
        match outcome.unwrap() {
            Outcome::Stopped => cut = reopen(cut),
            outcome => break outcome,
        }
    };
    assert_eq!(outcome, Outcome::OutOfPatience);
    assert_same(&run, &cut);
}

#[test]
fn patience_needs_a_validation_split() {
    let bench = Bench::new(Device::Cpu);
    let mut config = bench.config(1, 2, Schedule::Constant);
    config.recipe.patience = Some(3);
    let mut run = bench.create("run", config);
    let error = bench.train(&mut run, 0).0.unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let error = error.to_string();
    assert!(
        error.contains("--validation") && !error.contains('\n'),
        "{error}"
    );
    run.config_mut().recipe.patience = Some(0);
    let error = bench.train(&mut run, 0).0.unwrap_err().to_string();
    assert!(error.contains("at least 1 epoch"), "{error}");
}

/// After a damaged checkpoint a training goes back by an epoch, and so do the best weights: to those of
/// the checkpoint, or to none, until there are better ones.
#[test]
fn best_weights_of_an_epoch_that_is_undone_go() {
    let mut bench = Bench::new(Device::Cpu);
    bench.data.validation = Some(bench.data.test.clone());
    let config = || bench.config(1, 3, Schedule::Constant);
    let whole = bench.trained("whole", config());
    assert_eq!(whole.best().unwrap().epoch, 3, "{:?}", whole.metrics());
    let damaged = |name: &str| {
        let folder = bench.trained(name, config()).folder().to_path_buf();
        std::fs::write(folder.join(CHECKPOINT), b"damaged").unwrap();
        folder
    };
    let mut run = Run::resume(&damaged("run")).unwrap();
    run.restore().unwrap();
    assert_eq!(run.best().unwrap().epoch, 2);
    let last = run.weights_of(Weights::Last).unwrap();
    assert_eq!(run.weights_of(Weights::Best).unwrap(), last);
    bench.train(&mut run, 0).0.unwrap();
    assert_same(&whole, &run);

    let folder = damaged("gone");
    let metrics = folder.join("metrics.jsonl");
    let lines = std::fs::read_to_string(&metrics).unwrap();
    let mut lines: Vec<_> = lines.lines().map(String::from).collect();
    let mut first: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
    first["validation_accuracy"] = 1.0.into();
    first["validation_loss"] = 0.0.into();
    lines[0] = first.to_string();
    std::fs::write(&metrics, lines.join("\n") + "\n").unwrap();
    let mut run = Run::resume(&folder).unwrap();
    run.restore().unwrap();
    assert_eq!(run.best().unwrap().epoch, 1);
    let error = run.weights_of(Weights::Best).unwrap_err().to_string();
    assert!(error.contains("the file is gone"), "{error}");
}

/// An engine with weights of a run and the test images.
fn evaluating(bench: &Bench, run: &Run, which: Weights, options: &Options) -> Engine {
    let (model, recipe) = (run.model(), &run.config().recipe);
    let gpu = match &bench.device {
        Device::Cpu => None,
        Device::Gpu(gpu) => Some(gpu.clone()),
    };
    let (batch, optimizer) = (recipe.batch_size, &recipe.optimizer);
    let mut engine = Engine::new(gpu, model, batch, optimizer, options).unwrap();
    let (_, [parameters, running]) = run.weights_of(which).unwrap();
    engine.set_parameters(&parameters).unwrap();
    engine.set_running(&running).unwrap();
    let (test, normalization) = (&bench.data.test, run.config().scale_and_shift());
    engine
        .upload_dataset(
            Split::Test,
            test.images.clone(),
            &test.labels,
            &normalization,
        )
        .unwrap();
    engine
}

/// All logits of a split, whose last batch is not full, in its order.
fn an_evaluation_keeps_the_logits(device: Device) {
    let mut bench = Bench::new(device);
    bench.data.test.truncate(37).unwrap();
    let run = bench.trained("run", bench.config(1, 1, Schedule::Constant));
    let options = Options {
        keep_logits: true,
        ..Options::default()
    };
    let mut engine = evaluating(&bench, &run, Weights::Last, &options);
    let go_on = &mut |_| std::ops::ControlFlow::Continue(());
    let evaluation = engine.evaluate(Split::Test, go_on).unwrap();
    let logits = evaluation.logits.unwrap();
    assert_eq!(logits.len(), 37 * 4);
    let (mut loss_sum, mut predictions) = (0.0, Vec::new());
    for (z, label) in logits.chunks(4).zip(&bench.data.test.labels) {
        let exponentials: Vec<f64> = z.iter().map(|z| f64::from(*z).exp()).collect();
        let sum: f64 = exponentials.iter().sum();
        loss_sum += sum.ln() - f64::from(z[*label as usize]);
        predictions.push((0..4).max_by(|a, b| z[*a].total_cmp(&z[*b])).unwrap() as u32);
    }
    assert_eq!(predictions, evaluation.predictions);
    let difference = (loss_sum - evaluation.loss_sum).abs();
    assert!(
        difference < 1e-4 * loss_sum,
        "{loss_sum}, not {}",
        evaluation.loss_sum
    );
    // Nobody pays for them who does not ask.
    let mut plain = evaluating(&bench, &run, Weights::Last, &Options::default());
    let plain = plain.evaluate(Split::Test, go_on).unwrap();
    assert_eq!((plain.logits, plain.loss_sum), (None, evaluation.loss_sum));
}

#[test]
fn an_evaluation_on_the_cpu_keeps_the_logits() {
    an_evaluation_keeps_the_logits(Device::Cpu);
}

#[test]
fn an_evaluation_on_the_gpu_keeps_the_logits() {
    an_evaluation_keeps_the_logits(Device::gpu());
}

/// The average of the weights is evaluated beside them, changes nothing about them, and survives
/// interruptions.
fn averages(device: Device) {
    let mut bench = Bench::new(device);
    bench.data.validation = Some(bench.data.test.clone());
    let text = common::MODEL.replacen(
        "type = \"max_pool2d\"",
        "type = \"batch_norm\"\n\n[[layer]]\ntype = \"max_pool2d\"",
        1,
    );
    let config = |average| {
        let mut config = bench.config(1, 3, Schedule::OneCycle);
        config.model.architecture.clone_from(&text);
        config.recipe.average = average;
        config
    };
    let plain = bench.trained("plain", config(None));
    let whole = bench.trained("whole", config(Some(0.9)));
    assert_eq!(hash(&plain), hash(&whole));
    assert!(!plain.folder().join("average.safetensors").exists());
    for (plain, averaged) in plain.metrics().iter().zip(whole.metrics()) {
        assert_eq!(plain.test_loss, averaged.test_loss);
        assert_eq!(plain.average_test_loss, None);
        let loss = averaged.average_test_loss.unwrap();
        assert_ne!(loss, averaged.test_loss);
        // The splits are the same images.
        assert_eq!(averaged.average_validation_loss, Some(loss));
        assert_eq!(
            averaged.average_validation_accuracy,
            averaged.average_test_accuracy
        );
    }
    // What was measured is what the file holds.
    let mut engine = evaluating(&bench, &whole, Weights::Average, &Options::default());
    let go_on = &mut |_| std::ops::ControlFlow::Continue(());
    let evaluation = engine.evaluate(Split::Test, go_on).unwrap();
    let loss = evaluation.loss_sum / TEST_IMAGES as f64;
    assert_eq!(whole.metrics()[2].average_test_loss, Some(loss));

    let mut cut = bench.create("cut", config(Some(0.9)));
    for (at, more) in [(40, None), (97, None), (60, Some(2))] {
        let flag = AtomicBool::new(false);
        let control = Control {
            checkpoint_every: CheckpointEvery::Epoch,
            stop_after: more,
            interrupted: &flag,
        };
        let mut observer = StopAfter {
            interrupt: Some((at, &flag)).filter(|_| more.is_none()),
            ..StopAfter::default()
        };
        let outcome = bench.train_with(&mut cut, &control, &mut observer).unwrap();
        assert_ne!(outcome, Outcome::Finished);
        cut = reopen(cut);
    }
    bench.train(&mut cut, 0).0.unwrap();
    assert_same(&whole, &cut);
    let error = plain.weights_of(Weights::Average).unwrap_err();
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn the_cpu_evaluates_averages() {
    averages(Device::Cpu);
}

#[test]
fn the_gpu_evaluates_averages() {
    averages(Device::gpu());
}

/// In several views once at the end, whatever ends it, and as they are before.
fn views_come_last(device: Device) {
    let bench = Bench::contrary(device);
    let config = |views, patience: Option<usize>| {
        let epochs = patience.map_or(3, |_| 12);
        let mut config = bench.config(1, epochs, Schedule::Constant);
        config.recipe.views = views;
        config.recipe.average = Some(0.9);
        config.recipe.patience = patience;
        config
    };
    let plain = bench.trained("plain", config(Views::One, None));
    let seen = bench.trained("seen", config(Views::Mirror, None));
    assert_eq!(hash(&plain), hash(&seen));
    let views = |record: &EpochRecord| [record.test_loss_views, record.average_test_loss_views];
    for (plain, seen) in plain.metrics().iter().zip(seen.metrics()) {
        assert_eq!(plain.test_loss, seen.test_loss);
        assert_eq!(views(plain), [None, None]);
        let losses = views(seen);
        assert_eq!(losses.map(|l| l.is_some()), [seen.epoch == 3; 2]);
    }
    let last = seen.metrics().last().unwrap();
    let options = Options {
        views: Views::Mirror,
        ..Options::default()
    };
    for (which, loss) in [Weights::Last, Weights::Average]
        .into_iter()
        .zip(views(last))
    {
        let mut engine = evaluating(&bench, &seen, which, &options);
        let go_on = &mut |_| std::ops::ControlFlow::Continue(());
        let evaluation = engine.evaluate(Split::Test, go_on).unwrap();
        assert_eq!(
            loss,
            Some(evaluation.loss_sum / TEST_IMAGES as f64),
            "{which}"
        );
    }
    assert_ne!(last.test_loss_views, Some(last.test_loss));

    // An early end has them, too.
    let mut early = bench.create("early", config(Views::Mirror, Some(1)));
    bench.train(&mut early, 0).0.unwrap();
    let last = early.metrics().last().unwrap();
    assert!(last.epoch < 12, "{:?}", early.metrics());
    assert!(views(last).iter().all(Option::is_some), "{last:?}");
}

#[test]
fn views_come_last_on_the_cpu() {
    views_come_last(Device::Cpu);
}

#[test]
fn views_come_last_on_the_gpu() {
    views_come_last(Device::gpu());
}

/// Weights of another run, as far as they fit; the run goes on without them.
#[test]
fn a_training_starts_from_other_weights() {
    let bench = Bench::new(Device::Cpu);
    let source = bench.trained("source", bench.config(1, 1, Schedule::Constant));
    let wider = common::MODEL.replace("kernel = 2", "kernel = 4");
    assert_ne!(wider, common::MODEL);
    let config = |init| {
        let mut config = bench.config(7, 2, Schedule::Constant);
        config.model.architecture.clone_from(&wider);
        config.init = init;
        config
    };
    let seeded = bench.create("seeded", config(None));
    let Start {
        parameters, record, ..
    } = start_from(source.folder(), seeded.model(), 7).unwrap();
    assert_eq!(
        record.fitting.taken,
        ["conv2d1.weight", "conv2d1.bias", "dense1.bias"]
    );
    assert_eq!(
        record.fitting.left,
        [("dense1.weight".into(), "[4, 48] F32".into())]
    );
    assert_eq!(
        record.source,
        source
            .folder()
            .join("model.safetensors")
            .display()
            .to_string()
    );
    // The convolution is the source's, the head the seed's.
    let conv = source.model().layers[0].range();
    let own = wgrad::model::initial_parameters(seeded.model(), 7);
    assert_eq!(parameters[conv.clone()], source.weights().unwrap()[0][conv]);
    let head = &seeded.model().layers[2].parameters[0];
    let head = head.start..head.start + head.elements();
    assert_eq!(parameters[head.clone()], own[head]);

    let start = |name| bench.create(name, config(Some(record.clone())));
    let mut whole = start("whole");
    let mut cut = start("cut");
    let mut gone = start("gone");
    let none = start("none");
    let file = source.folder().join("model.safetensors");
    let mut other = read(source.folder(), "model.safetensors");
    other.push(0);
    std::fs::write(&file, other).unwrap();
    let folder = bench.folder.path().join("other");
    let error = Run::create(Some(&folder), config(Some(record.clone()))).unwrap_err();
    assert!(!folder.exists(), "{error}");
    // From here on nothing needs the source.
    std::fs::remove_dir_all(source.folder()).unwrap();
    bench.train(&mut whole, 0).0.unwrap();
    let other = bench.trained("other", config(None));
    assert_ne!(hash(&whole), hash(&other));
    assert_ne!(whole.config().id, other.config().id);
    cut = reopen(cut);
    assert_eq!(cut.config().init.as_ref(), Some(&record));
    assert!(bench.train(&mut cut, 1).0.is_err());
    let mut cut = reopen(cut);
    bench.train(&mut cut, 0).0.unwrap();
    assert_same(&whole, &cut);
    // Never from the seed alone instead.
    std::fs::remove_file(gone.folder().join(CHECKPOINT)).unwrap();
    gone = reopen(gone);
    let error = gone.restore().unwrap_err().to_string();
    assert!(error.contains("found none"), "{error}");
    gone.discard();
    let none = reopen(none);
    let folder = none.folder().to_path_buf();
    none.discard();
    assert!(!folder.exists());
}

#[test]
fn weights_that_fit_nowhere_are_refused() {
    let bench = Bench::new(Device::Cpu);
    let source = bench.trained("source", bench.config(1, 1, Schedule::Constant));
    let mlp = wgrad::model::load("mlp-sigmoid").unwrap();
    let shape = bench.data.train.shape;
    let mlp = mlp.resolve(shape, 3).unwrap();
    for (path, word) in [
        (
            source.folder().to_path_buf(),
            "found none that has the name",
        ),
        (bench.folder.path().join("nowhere"), "found no"),
        (bench.folder.path().to_path_buf(), "found no"),
    ] {
        let error = start_from(&path, &mlp, 1).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        let error = error.to_string();
        assert!(error.contains(word) && error.contains("--init"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
    let file = source.folder().join("model.safetensors");
    let mut damaged = std::fs::read(&file).unwrap();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    std::fs::write(&file, damaged).unwrap();
    let error = start_from(&file, source.model(), 1).unwrap_err();
    assert!(error.to_string().contains("damaged"), "{error}");
}

/// Digits 0 to 4, then with frozen convolutions and another head few of 5 to 9.
#[test]
fn fine_tuning_beats_a_new_start_and_leaves_frozen_layers_alone() {
    let mnist = data::load("mnist", &data::Request::default(), &mut |_, _| {}).unwrap();
    let digits = |set: &data::Dataset, from: u32, count: usize| {
        let elements = set.shape.elements();
        let (mut images, mut labels) = (Vec::new(), Vec::new());
        let all = set.images.chunks(elements).zip(&set.labels);
        let some = all.filter(|(_, label)| (from..from + 5).contains(*label));
        for (image, label) in some.take(count) {
            images.extend_from_slice(image);
            labels.push(label - from);
        }
        data::Dataset {
            images,
            labels,
            shape: set.shape,
            classes: 5,
            class_names: (from..from + 5).map(|digit| digit.to_string()).collect(),
            files: Vec::new(),
        }
    };
    let mut bench = Bench::new(Device::Cpu);
    let text = common::MODEL
        .replace("[8, 6, 1]", "[28, 28, 1]")
        .replace("classes = 4", "classes = 5")
        .replace("out_channels = 4", "out_channels = 16")
        .replace("kernel = 2", "kernel = 4");
    let config = |bench: &Bench, epochs, init| {
        let mut config = bench.config(1, epochs, Schedule::Constant);
        config.model.architecture.clone_from(&text);
        config.init = init;
        config
    };
    bench.data.train = digits(&mnist.train, 0, 2000);
    bench.data.test = digits(&mnist.test, 0, 500);
    let source = bench.trained("source", config(&bench, 2, None));
    bench.data.train = digits(&mnist.train, 5, 200);
    bench.data.test = digits(&mnist.test, 5, 1000);
    let scratch = bench.trained("scratch", config(&bench, 1, None));

    let start = start_from(source.folder(), source.model(), 1).unwrap();
    let mut config = config(&bench, 1, Some(start.record));
    config.recipe.groups.freeze = vec!["conv2d*".into()];
    let mut tuned = bench.create("tuned", config);
    bench.train(&mut tuned, 0).0.unwrap();
    let [before, after] = [&source, &tuned].map(|run| run.weights().unwrap()[0].clone());
    let conv = source.model().layers[0].range();
    assert_eq!(before[conv.clone()], after[conv.clone()]);
    assert_ne!(before[conv.end..], after[conv.end..]);
    let accuracy = |run: &Run| run.metrics()[0].test_accuracy;
    assert!(
        accuracy(&tuned) > accuracy(&scratch) + 0.05,
        "{} against {}",
        accuracy(&tuned),
        accuracy(&scratch)
    );
}

#[test]
fn a_planned_stop_comes_to_the_bits_of_the_whole() {
    let bench = Bench::new(Device::Cpu);
    let config = || bench.config(1, 3, Schedule::OneCycle);
    let whole = bench.trained("whole", config());
    let mut run = bench.create("parts", config());
    for (stop, outcome) in [(Some(2), Outcome::Stopped), (None, Outcome::Finished)] {
        let control = Control {
            checkpoint_every: CheckpointEvery::default(),
            stop_after: stop,
            interrupted: &AtomicBool::new(false),
        };
        let mut observer = StopAfter::default();
        let found = bench.train_with(&mut run, &control, &mut observer);
        assert_eq!(found.unwrap(), outcome);
        assert_eq!(run.config().finished_epochs, stop.unwrap_or(3));
        run = reopen(run);
    }
    assert_same(&whole, &run);
}

#[test]
fn other_data_is_refused_and_its_hash_says_so() {
    let bench = Bench::new(Device::Cpu);
    let run = bench.create("run", bench.config(1, 2, Schedule::Constant));
    run.expect_own_data("shapes", &bench.data).unwrap();
    type Change<'a> = (&'a str, &'a dyn Fn(&mut data::Splits));
    let changes: [Change; 4] = [
        ("training images", &|d| d.train.images[100] ^= 1),
        ("training images", &|d| d.train.labels.swap(0, 1)),
        ("test images", &|d| d.test.images[0] ^= 128),
        ("test images", &|d| d.test.truncate(39).unwrap()),
    ];
    for (which, change) in changes {
        let mut data = bench.data.clone();
        change(&mut data);
        let error = run.expect_own_data("elsewhere", &data).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let error = error.to_string();
        for word in [
            "elsewhere",
            which,
            "started with",
            "found",
            "or start a new run",
        ] {
            assert!(error.contains(word), "no {word:?} in {error}");
        }
    }
}

#[test]
fn two_processes_never_train_one_run() {
    let bench = Bench::new(Device::Cpu);
    let run = bench.trained("run", bench.config(1, 1, Schedule::Constant));
    let error = Run::resume(run.folder()).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().contains("is being trained"), "{error}");
    // Reading is free.
    let mut reader = Run::open(run.folder()).unwrap();
    reader.weights().unwrap();
    assert!(reader.restore().unwrap_err().to_string().contains("locked"));
    let folder = run.folder().to_path_buf();
    drop(run);
    Run::resume(&folder).unwrap();
}

/// The folders under tests/runs, each with the metrics that it has.
#[test]
fn runs_of_older_versions_open_evaluate_and_go_on() {
    let runs = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/runs");
    for (name, device) in [
        ("format-0-cpu", Device::Cpu),
        ("format-0-adapter", Device::gpu()),
        ("format-1-cpu", Device::Cpu),
    ] {
        let bench = Bench::new(device);
        let folder = bench.folder.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        for (file, bytes) in contents(&runs.join(name)) {
            std::fs::write(folder.join(file), bytes).unwrap();
        }
        let run = Run::open(&folder).unwrap();
        let format = u32::from(name.contains("format-1"));
        assert_eq!((run.config().format, run.metrics().len()), (format, 2));
        // Read only, nothing is changed.
        assert!(contents(&folder) == contents(&runs.join(name)));
        let mut engine = bench.device.engine(&run);
        let [parameters, running] = run.weights().unwrap();
        engine.set_parameters(&parameters).unwrap();
        engine.set_running(&running).unwrap();
        let test = &bench.data.test;
        engine
            .upload_dataset(
                Split::Test,
                test.images.clone(),
                &test.labels,
                &run.config().scale_and_shift(),
            )
            .unwrap();
        let go_on = &mut |_| std::ops::ControlFlow::Continue(());
        let loss = engine.evaluate(Split::Test, go_on).unwrap().loss_sum / test.len() as f64;
        let recorded = run.metrics()[1].test_loss;
        assert!((loss - recorded).abs() < 1e-5, "{name}: {loss} {recorded}");

        // Damage is noticed by the hash in run.json.
        let good = read(&folder, CHECKPOINT);
        let mut damaged = good.clone();
        let last = damaged.len() - 1;
        damaged[last / 3] ^= 1;
        std::fs::write(folder.join(CHECKPOINT), damaged).unwrap();
        let before = contents(&folder);
        let refused = Run::resume(&folder).unwrap().restore();
        if refused.is_ok() {
            panic!("{name}: a damaged checkpoint was taken");
        }
        let after = contents(&folder);
        let unlocked = after.into_iter().filter(|(name, _)| name != ".lock");
        assert!(unlocked.collect::<Vec<_>>() == before, "{name}");
        std::fs::write(folder.join(CHECKPOINT), good).unwrap();

        let mut run = Run::resume(&folder).unwrap();
        let (result, observer) = bench.train(&mut run, 0);
        result.unwrap();
        assert_eq!(observer.epochs.len(), 1);
        assert!(observer.epochs[0].train_loss < run.metrics()[1].train_loss);
        let run = Run::open(&folder).unwrap();
        assert_eq!(
            (run.config().format, run.config().finished_epochs),
            (FORMAT, 3)
        );
        run.weights().unwrap();
    }
}

/// What another version may have written is read where it can be, and refused in one line where not.
#[test]
fn what_is_unknown_in_run_json_is_passed_over() {
    let bench = Bench::new(Device::Cpu);
    let run = bench.trained("run", bench.config(1, 1, Schedule::Constant));
    let path = run.folder().join("run.json");
    let good: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let write = |value: &serde_json::Value| std::fs::write(&path, value.to_string()).unwrap();
    let mut newer = good.clone();
    newer["augmentation"] = "flips".into();
    newer["device"]["cores"] = 8.into();
    newer["device"]["family"] = "systolic".into();
    newer["device"]["products"] = serde_json::json!([{"tile": {"systolic": {}}}, 3]);
    write(&newer);
    let config = Run::open(run.folder()).unwrap().config().clone();
    assert_eq!(config.device.family, None);
    assert!(config.device.products.is_empty());
    assert_eq!(config.seed, 1);

    let mut bare = good.clone();
    for key in ["wgrad", "device", "id", "format"] {
        bare.as_object_mut().unwrap().remove(key);
    }
    write(&bare);
    assert_eq!(Run::open(run.folder()).unwrap().config().finished_epochs, 1);

    let mut future = good.clone();
    future["format"] = (FORMAT + 1).into();
    future["wgrad"] = "9.8.7".into();
    future["recipe"] = "another".into();
    write(&future);
    let error = Run::open(run.folder()).unwrap_err().to_string();
    assert!(
        error.contains("9.8.7") && error.contains("format 2"),
        "{error}"
    );
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn metrics_with_null_are_read_and_written_back() {
    let bench = Bench::new(Device::Cpu);
    let run = bench.trained("run", bench.config(1, 1, Schedule::Constant));
    let folder = run.folder().to_path_buf();
    drop(run);
    let mut line: serde_json::Value =
        serde_json::from_slice(&read(&folder, "metrics.jsonl")).unwrap();
    line["images_per_second"] = serde_json::Value::Null;
    line.as_object_mut().unwrap().remove("seconds");
    std::fs::write(folder.join("metrics.jsonl"), format!("{line}\n")).unwrap();
    let mut run = Run::resume(&folder).unwrap();
    assert!(run.metrics()[0].images_per_second.is_nan());
    run.config_mut().recipe.epochs = 2;
    bench.train(&mut run, 0).0.unwrap();
    let text = String::from_utf8(read(&folder, "metrics.jsonl")).unwrap();
    assert!(text.contains("\"images_per_second\":null"), "{text}");
    assert_eq!(Run::open(&folder).unwrap().metrics().len(), 2);
}

/// README: `type = "relu"` is a layer of its own, with the same result.
#[test]
fn a_standalone_relu_trains_to_the_same_bits() {
    let bench = Bench::new(Device::Cpu);
    let fused = bench.trained("fused", bench.config(1, 2, Schedule::OneCycle));
    let text = common::MODEL.replace("activation = \"relu\"\n", "\n[[layer]]\ntype = \"relu\"\n");
    assert_ne!(text, common::MODEL);
    let mut config = bench.config(1, 2, Schedule::OneCycle);
    config.model.architecture = text;
    let standalone = bench.trained("standalone", config);
    assert_eq!(standalone.model().layers.len(), 4);
    assert_eq!(hash(&fused), hash(&standalone));
}

#[test]
fn a_diverging_epoch_leaves_the_checkpoint_before_it() {
    let bench = Bench::new(Device::Cpu);
    let mut run = bench.trained("run", bench.config(1, 1, Schedule::Constant));
    let before = contents(run.folder());
    run.config_mut().recipe.epochs = 2;
    run.config_mut().recipe.lr = 1e30;
    match bench.train(&mut run, 0).0 {
        Err(Error::Diverged {
            loss,
            epoch: 2,
            step,
            lr: 1e30,
        }) => assert!(
            !loss.is_finite() && (7..=10).contains(&step),
            "{loss} {step}"
        ),
        other => panic!("expected a divergence in epoch 2, found {other:?}"),
    }
    let after = contents(run.folder());
    for ((name, old), (_, new)) in before.iter().zip(&after) {
        // The steps before the divergence are there to be looked at, until a resume.
        let grows = name == "steps.jsonl" && new.starts_with(old);
        assert!(name == "run.json" || grows || old == new, "{name} changed");
    }
    assert_eq!(before.len(), after.len());
}
