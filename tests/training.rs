//! Whole trainings of a small model, on the CPU and on the GPU: that they learn, repeat to the bit,
//! and survive being killed.

mod common;

use common::{TEST_IMAGES, TRAIN_IMAGES, contents};
use std::path::Path;
use std::sync::Arc;
use wgrad::data::{self, Normalization};
use wgrad::gpu::{Choice, Gpu};
use wgrad::model::Definition;
use wgrad::model::recipe::Schedule;
use wgrad::network::{Network, Options};
use wgrad::train::{
    Config, CpuEngine, DataRecord, DeviceRecord, Engine, EpochRecord, ModelRecord, Observer, Run,
    train,
};
use wgrad::{Error, Result};

/// The files of a run folder in the order in which they are written after an epoch.
const FILES: [&str; 4] = [
    "metrics.jsonl",
    "checkpoint.safetensors",
    "model.safetensors",
    "run.json",
];

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

    fn engine(&self, run: &Run) -> Box<dyn Engine> {
        let (model, recipe) = (run.model(), &run.config().recipe);
        let (batch, optimizer) = (recipe.batch_size, &recipe.optimizer);
        match self {
            Device::Cpu => Box::new(CpuEngine::new(model, batch, optimizer)),
            Device::Gpu(gpu) => Box::new(
                Network::new(gpu.clone(), model, batch, optimizer, &Options::default()).unwrap(),
            ),
        }
    }
}

/// Stops after epoch `stop`, like a kill when that epoch's checkpoint is complete.
struct StopAfter {
    stop: usize,
    epochs: Vec<EpochRecord>,
    /// Largest numbers of images that were reported as trained and tested.
    images: [usize; 2],
}

impl Observer for StopAfter {
    fn epoch_started(&mut self, _epoch: usize, _engine: &dyn Engine) -> Result<()> {
        Ok(())
    }

    fn trained(&mut self, _epoch: usize, images: usize, mean_loss: f64) {
        assert!(mean_loss.is_finite());
        self.images[0] = self.images[0].max(images);
    }

    fn evaluated(&mut self, images: usize) {
        self.images[1] = self.images[1].max(images);
    }

    fn epoch_finished(&mut self, record: &EpochRecord, _engine: &dyn Engine) -> Result<()> {
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
}

impl Bench {
    fn new(device: Device) -> Bench {
        let folder = tempfile::tempdir().unwrap();
        common::write_model_and_data(folder.path());
        let data = data::load(folder.path().join("shapes").to_str().unwrap()).unwrap();
        Bench {
            folder,
            data,
            device,
        }
    }

    fn config(&self, seed: u64, epochs: usize, schedule: Schedule) -> Config {
        let definition = Definition::parse(common::MODEL, "small.toml").unwrap();
        let shape = self.data.train.shape;
        let mut recipe = definition.recipe.clone();
        recipe.epochs = epochs;
        recipe.schedule = schedule;
        Config {
            wgrad: "test".into(),
            model: ModelRecord {
                name: definition.name.clone(),
                input: shape,
                classes: self.data.train.classes,
                class_names: self.data.train.class_names.clone(),
                parameters: 0,
                architecture: definition.text,
            },
            data: DataRecord {
                source: self.data.name.clone(),
                limit: None,
                training_images: self.data.train.len(),
                test_images: self.data.test.len(),
            },
            normalization: Normalization::of(&self.data.train),
            recipe,
            seed,
            device: DeviceRecord {
                requested: "auto".into(),
                description: String::new(),
                adapter: None,
                family: None,
                explicit_conv: false,
                kernels: Vec::new(),
                products: Vec::new(),
            },
            finished_epochs: 0,
            parameter_sha256: None,
        }
    }

    fn create(&self, name: &str, config: Config) -> Run {
        Run::create(Some(&self.folder.path().join(name)), config).unwrap()
    }

    /// Trains on; `stop` is the epoch to stop after, 0 for never.
    fn train(&self, run: &mut Run, stop: usize) -> (Result<()>, StopAfter) {
        let mut observer = StopAfter {
            stop,
            epochs: Vec::new(),
            images: [0, 0],
        };
        let mut engine = self.device.engine(run);
        let result = train(run, self.data.clone(), engine.as_mut(), &mut observer);
        (result, observer)
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

fn read(folder: &Path, file: &str) -> Vec<u8> {
    std::fs::read(folder.join(file)).unwrap()
}

/// That two runs ended with the same bits and the same metrics (but for the time they took).
fn assert_same(a: &Run, b: &Run) {
    assert_eq!(hash(a), hash(b));
    for file in ["checkpoint.safetensors", "model.safetensors"] {
        assert!(
            read(a.folder(), file) == read(b.folder(), file),
            "{file} differs"
        );
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
    // A test loss of an epoch is close to the train loss here, so neither is off by a factor.
    let ratio = last.test_loss / last.train_loss;
    assert!((0.2..5.0).contains(&ratio), "{last:?}");
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
    let mut two = Run::open(two.folder()).unwrap();
    two.config_mut().recipe.epochs = 3;
    let (result, observer) = bench.train(&mut two, 0);
    result.unwrap();
    assert_eq!(observer.epochs.len(), 1);
    assert_same(&whole, &two);

    // Interrupted in a training of three, whose schedule knows about the three.
    let whole = bench.trained("whole3", bench.config(1, 3, Schedule::OneCycle));
    let mut cut = bench.create("cut", bench.config(1, 3, Schedule::OneCycle));
    assert!(bench.train(&mut cut, 2).0.is_err());
    let mut cut = Run::open(cut.folder()).unwrap();
    assert_eq!(cut.config().finished_epochs, 2);
    bench.train(&mut cut, 0).0.unwrap();
    assert_same(&whole, &cut);

    // A finished run has nothing left to do, and stays as it is.
    let before = contents(cut.folder());
    let mut cut = Run::open(cut.folder()).unwrap();
    let (result, observer) = bench.train(&mut cut, 0);
    result.unwrap();
    assert!(observer.epochs.is_empty());
    assert!(contents(cut.folder()) == before);
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
    let bench = Bench::new(Device::Cpu);
    let config = || bench.config(1, 3, Schedule::Cosine);
    let whole = bench.trained("whole", config());
    for epoch in 0..2 {
        // Folders right after this epoch and right after the next.
        let after = |epoch: usize| {
            let mut run = bench.create(&format!("after{epoch}"), config());
            if epoch > 0 {
                assert!(bench.train(&mut run, epoch).0.is_err());
            }
            contents(run.folder())
        };
        let (old, new) = (after(epoch), after(epoch + 1));
        for written in 0..=FILES.len() {
            let folder = bench.folder.path().join(format!("cut-{epoch}-{written}"));
            std::fs::create_dir(&folder).unwrap();
            for (i, file) in FILES.iter().enumerate() {
                let source = if i < written { &new } else { &old };
                if let Some((_, bytes)) = source.iter().find(|(name, _)| name == file) {
                    std::fs::write(folder.join(file), bytes).unwrap();
                }
            }
            if let Some(file) = FILES.get(written) {
                let (_, bytes) = new.iter().find(|(name, _)| name == file).unwrap();
                let half = &bytes[..bytes.len() / 2];
                std::fs::write(folder.join(format!("{file}.tmp")), half).unwrap();
            }
            let mut run = Run::open(&folder).unwrap();
            let (result, observer) = bench.train(&mut run, 0);
            result.unwrap();
            let checkpoint_written = usize::from(written > 1);
            assert_eq!(observer.epochs.len(), 3 - epoch - checkpoint_written);
            assert_same(&whole, &run);
            let names: Vec<_> = contents(&folder)
                .into_iter()
                .map(|(name, _)| name)
                .collect();
            assert_eq!(names.len(), FILES.len(), "{names:?}");
        }
        std::fs::remove_dir_all(bench.folder.path().join(format!("after{epoch}"))).unwrap();
        std::fs::remove_dir_all(bench.folder.path().join(format!("after{}", epoch + 1))).unwrap();
    }
}

#[test]
fn damaged_files_are_refused_and_left_alone() {
    let bench = Bench::new(Device::Cpu);
    let run = bench.trained("run", bench.config(1, 2, Schedule::Constant));
    let folder = run.folder();
    for file in FILES {
        let good = read(folder, file);
        std::fs::write(folder.join(file), &good[..good.len() - 9]).unwrap();
        let before = contents(folder);
        let error = if file == "model.safetensors" {
            Run::open(folder).unwrap().weights().err()
        } else {
            Run::open(folder).and_then(|mut run| run.restore()).err()
        };
        let message = error.unwrap().to_string();
        assert!(
            message.contains(file) && !message.contains('\n'),
            "{message}"
        );
        assert!(contents(folder) == before, "{file}");
        std::fs::write(folder.join(file), good).unwrap();
    }
    assert_eq!(
        Run::open(folder).unwrap().restore().unwrap().unwrap().epoch,
        2
    );
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
        assert!(name == "run.json" || old == new, "{name} changed");
    }
    assert_eq!(before.len(), after.len());
}
