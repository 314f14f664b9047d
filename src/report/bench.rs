//! Kernels at the shapes of a model, and its whole training step, against the adapter's own peak.
//!
//! Every time is measured in [`WINDOWS`] windows, each of as many runs as it takes to be long enough,
//! and each waited for inside the timed region. The inputs are made up and contain no denormals,
//! which some processors handle a hundred times more slowly.
//!
//! The step is held against the CPU twins before its kernels are timed, kernel by kernel, on a batch of a
//! few images: the same kernels, tiles and fusions at a smaller batch size.

use super::profile::place;
use crate::engine::{Engine, GpuEngine, Split};
use crate::error::{Error, Result};
use crate::gpu::{Dispatch, Gpu};
use crate::kernels::peak::{self, MULTIPLY_ADDS_PER_ROUND};
use crate::kernels::{Cost, Dtype, Prices, Step, View, Work};
use crate::model::recipe::Recipe;
use crate::model::{Model, initial_parameters};
use crate::plan::Options;
use crate::verify::cases::{self, PEAK_FACTORS};
use crate::verify::{self, Case, Outcome};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Windows of every measurement.
pub const WINDOWS: usize = 7;

/// The least length of a kernel's window, and of one of whole steps.
const KERNEL_WINDOW: Duration = Duration::from_millis(20);
const STEP_WINDOW: Duration = Duration::from_millis(300);

/// How long a GPU is kept busy at least before its peak counts.
const WARM_UP: Duration = Duration::from_secs(1);

/// About how long the steps last over which the GPU's busy share is taken.
const BUSY_WINDOW: Duration = Duration::from_secs(1);

/// Images of an epoch, unless they are more bytes than that.
const EPOCH_IMAGES: usize = 60_000;
const EPOCH_BYTES: usize = 64 << 20;

/// Runs of a kernel in one submission: the GPU works on one while the next is recorded.
const PER_SUBMISSION: usize = 64;

/// What `wgrad bench --json` prints. Fields may be added; those that are here keep their meaning.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Version that measured.
    pub wgrad: String,
    /// The adapter's name, or "CPU".
    pub adapter: String,
    /// The model's name.
    pub model: String,
    /// Images per step.
    pub batch_size: usize,
    /// What the adapter does at most; null where only steps were measured.
    pub peak: Option<Peak>,
    /// What operations cost the adapter, by which tiles are chosen; null on the CPU.
    #[serde(default)]
    pub prices: Option<Prices>,
    /// The dispatches of a training step in their order; none where only steps were measured.
    pub kernels: Vec<KernelReport>,
    /// Whole steps.
    pub step: StepReport,
    /// The most memory that the process has held up to the end of the steps, in 10⁶ bytes (on a
    /// software adapter the GPU's memory is part of it); null where the system does not tell.
    pub peak_rss_mb: Option<f64>,
}

/// What the adapter does at most, the fastest window each.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Peak {
    /// Multiply-adds on registers, two operations each, in 10⁹ a second.
    pub gflops: f64,
    /// A copy of a buffer far larger than the caches, bytes read and written, in 10⁹ a second.
    pub gb_per_second: f64,
}

/// One dispatch of the training step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KernelReport {
    /// The layer, or "step".
    pub layer: String,
    /// The entry point.
    pub kernel: String,
    /// Tile and splits of a product; empty for the others.
    pub variant: String,
    /// Per run of the kernel.
    pub seconds: Summary,
    /// Of the median; null for what is not a matrix product.
    pub gflops: Option<f64>,
    /// Every operand and result counted once, of the median.
    pub gb_per_second: f64,
    /// The least time that the operations or the bytes take at peak, whichever is longer, by the
    /// median. Beyond 100 where the data stay in a cache.
    pub percent_of_peak: f64,
    /// Which of the two that is.
    pub bound: Bound,
    /// The earlier median by this one, under `--compare`: above 1 is faster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

/// What a kernel takes more of the peak of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Multiply-adds.
    Arithmetic,
    /// Bytes.
    Memory,
}

/// Whole training steps.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct StepReport {
    /// Images that are trained on per second.
    pub images_per_second: Summary,
    /// Per cent of the time from the begin of the first step to the end of the last in which the GPU
    /// was at work, by its own clock, over seconds of steps in epochs of at most 60,000
    /// images, the waits between the epochs included; null where it has no clock.
    pub busy_percent: Option<f64>,
    /// From the model in host memory until the first step is through: buffers, pipelines, upload.
    pub first_step_seconds: f64,
    /// This median by the earlier one, under `--compare`: above 1 is faster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

/// A measurement over [`WINDOWS`] windows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The middle one.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    fn of(mut values: Vec<f64>) -> Summary {
        values.sort_by(f64::total_cmp);
        Summary {
            median: values[values.len() / 2],
            min: values[0],
            max: values[values.len() - 1],
        }
    }
}

/// What to measure.
pub struct Settings<'a> {
    /// What is trained.
    pub model: &'a Model,
    /// Optimiser and batch size; the learning rate plays no part.
    pub recipe: &'a Recipe,
    /// How it is planned.
    pub options: &'a Options,
    /// The whole step only: neither peak nor kernels.
    pub steps_only: bool,
    /// By which the tiles were chosen, if there are tiles.
    pub prices: Option<Prices>,
}

/// Measures on `gpu`, or on the CPU (which has steps only). The steps come first, so that the first
/// one starts with cold pipelines and the memory is theirs. `progress` hears what comes next.
///
/// # Errors
/// [`Error::Verify`] when a kernel is out of tolerance, or what the device reports.
pub fn run(
    gpu: Option<&Arc<Gpu>>,
    settings: &Settings,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let Settings { model, recipe, .. } = *settings;
    let (batch, optimizer) = (recipe.batch_size, &recipe.optimizer);
    if batch == 0 {
        return Err(Error::Usage(
            "expected a batch size of at least 1, found 0; use --batch-size".into(),
        ));
    }
    progress("first step");
    let start = Instant::now();
    let mut engine = Engine::new(gpu.cloned(), model, batch, optimizer, settings.options)?;
    let clock = gpu.filter(|gpu| gpu.report().timestamp_query);
    let clock = clock.map(Arc::as_ref);
    let step = steps(&mut engine, clock, model, recipe, start, progress)?;
    let mut report = Report {
        wgrad: env!("CARGO_PKG_VERSION").into(),
        adapter: adapter_name(gpu.map(Arc::as_ref)),
        model: model.name.clone(),
        batch_size: batch,
        peak: None,
        prices: settings.prices,
        kernels: Vec::new(),
        step,
        peak_rss_mb: peak_rss_mb(),
    };
    if let (Some(gpu), Some(engine), false) = (gpu, engine.on_gpu(), settings.steps_only) {
        progress("kernels against their twins");
        expect_right(verify::step_of(gpu, model, settings.options)?)?;
        progress("peak of the adapter");
        let peak = measure_peak(gpu)?;
        report.kernels = kernels(gpu, engine, &peak, progress)?;
        report.peak = Some(peak);
    }
    Ok(report)
}

/// What [`Report::adapter`] says.
pub fn adapter_name(gpu: Option<&Gpu>) -> String {
    gpu.map_or("CPU".into(), |gpu| gpu.report().name.clone())
}

/// Seconds per run of `run`, which gets the number of runs and returns when they are through.
fn windows(least: Duration, mut run: impl FnMut(usize) -> Result<()>) -> Result<Summary> {
    let mut window = |runs: usize| -> Result<Duration> {
        let start = Instant::now();
        run(runs)?;
        Ok(start.elapsed())
    };
    // Doubling until it is long enough warms up along the way.
    let mut runs = 1;
    while window(runs)? < least {
        runs *= 2;
    }
    let seconds: Result<Vec<f64>> = (0..WINDOWS)
        .map(|_| Ok(window(runs)?.as_secs_f64() / runs as f64))
        .collect();
    Ok(Summary::of(seconds?))
}

/// Seconds per run of one dispatch.
fn time(gpu: &Gpu, dispatch: &Dispatch) -> Result<Summary> {
    windows(KERNEL_WINDOW, |runs| {
        for first in (0..runs).step_by(PER_SUBMISSION) {
            gpu.submit("bench", &[dispatch], PER_SUBMISSION.min(runs - first))?;
        }
        gpu.wait_all()
    })
}

/// Time of a training step on random images, from `start` for the first one; and how busy `clock`,
/// the GPU, is meanwhile.
fn steps(
    engine: &mut Engine,
    clock: Option<&Gpu>,
    model: &Model,
    recipe: &Recipe,
    start: Instant,
    progress: &mut dyn FnMut(&str),
) -> Result<StepReport> {
    let (batch, elements) = (recipe.batch_size, model.input.elements());
    let images = EPOCH_IMAGES.min(EPOCH_BYTES / elements);
    let epoch = (images / batch).max(1);
    let len = epoch * batch;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let images: Vec<u8> = (0..len * elements).map(|_| rng.random()).collect();
    let classes = model.classes as u32;
    let labels: Vec<u32> = (0..len).map(|_| rng.random_range(0..classes)).collect();
    let channels = model.input.channels;
    let normalization = [vec![1.0 / 64.0; channels], vec![-2.0; channels]].concat();
    let order: Vec<u32> = (0..len as u32).collect();
    // A rate at which random labels teach nothing in the seconds that this takes.
    let scalars = recipe.optimizer.step_scalars(1e-6, 100);
    let table: Vec<Step> = (0..epoch)
        .map(|i| Step {
            lr: scalars.lr,
            bias_correction1: scalars.bias_correction1,
            bias_correction2: scalars.bias_correction2,
            seed: 1,
            epoch: 1,
            ..Step::new(i * batch, batch)
        })
        .collect();
    engine.set_parameters(&initial_parameters(model, 1))?;
    engine.upload_dataset(Split::Train, images, &labels, &normalization)?;
    let mut run = |steps: usize| -> Result<()> {
        for first in (0..steps).step_by(epoch) {
            let steps = &table[..epoch.min(steps - first)];
            engine.train_epoch(&order, steps, &mut |_| Ok(ControlFlow::Continue(())))?;
        }
        Ok(())
    };
    run(1)?;
    let first_step_seconds = start.elapsed().as_secs_f64();
    progress("whole steps");
    let seconds = windows(STEP_WINDOW, &mut run)?;
    let busy_percent = clock.map(|gpu| {
        gpu.start_clock()?;
        run((BUSY_WINDOW.as_secs_f64() / seconds.median) as usize + 1)?;
        Ok(100.0 * gpu.stop_clock()?)
    });
    let rate = |seconds: f64| batch as f64 / seconds;
    Ok(StepReport {
        images_per_second: Summary {
            median: rate(seconds.median),
            min: rate(seconds.max),
            max: rate(seconds.min),
        },
        busy_percent: busy_percent.transpose()?,
        first_step_seconds,
        ratio: None,
    })
}

/// The most memory this process has held so far (on Linux).
fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0 / 1e6)
}

/// The fastest that the adapter computes and copies.
///
/// # Errors
/// [`Error::Verify`] when the kernels are wrong, or what the device reports.
pub fn measure_peak(gpu: &Gpu) -> Result<Peak> {
    let report = gpu.report();
    // Some 20 ms of work on a few cores, some milliseconds on a large GPU.
    let rounds = 512;
    let invocations = if report.software { 1 << 14 } else { 1 << 20 };
    check(gpu, &cases::multiply_add_case(256, rounds))?;
    let factors = gpu.upload("peak factors", &PEAK_FACTORS)?;
    let y = gpu.buffer("peak result", invocations)?;
    let view = |tensor, len| View::whole(tensor, Dtype::F32, len);
    let arithmetic = peak::peak_multiply_add(invocations, rounds, view(0, 2), view(1, invocations));
    let arithmetic = gpu.dispatch_on(&arithmetic, &[&factors, &y])?;
    let operations = 2.0 * (invocations * rounds * MULTIPLY_ADDS_PER_ROUND) as f64;
    let gflops = 1e-9 * operations / fastest(gpu, &arithmetic)?;

    // 256 MiB where the adapter binds as much twice over: no cache holds that.
    let limit = report
        .max_storage_binding_bytes
        .min(report.max_buffer_bytes);
    let elements = (limit / 2).min(256 << 20) as usize / 16 * 4;
    check(gpu, &cases::copy_case(1 << 16))?;
    let src = gpu.buffer("peak source", elements)?;
    let dst = gpu.buffer("peak destination", elements)?;
    let copy = peak::peak_copy(view(0, elements), view(1, elements));
    let copy = gpu.dispatch_on(&copy, &[&src, &dst])?;
    let gb_per_second = 1e-9 * 8.0 * elements as f64 / fastest(gpu, &copy)?;
    Ok(Peak {
        gflops,
        gb_per_second,
    })
}

/// Seconds per run of one dispatch, at the clock that the GPU has under load: one that was idle takes its time to
/// raise it (an H100 was seen at a sixth of its peak), so that it is measured until it gets no faster.
fn fastest(gpu: &Gpu, dispatch: &Dispatch) -> Result<f64> {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    loop {
        let seconds = time(gpu, dispatch)?.min;
        let faster = seconds < 0.98 * best;
        best = best.min(seconds);
        if !faster && start.elapsed() >= WARM_UP {
            return Ok(best);
        }
    }
}

/// Holds a kernel against its twin.
fn check(gpu: &Gpu, case: &Case) -> Result<()> {
    expect_right(case.run(gpu)?)
}

/// # Errors
/// [`Error::Verify`] where something is out of tolerance.
fn expect_right(outcome: Outcome) -> Result<()> {
    if outcome.passed {
        return Ok(());
    }
    Err(Error::Verify(format!(
        "{} ({}): expected what its CPU twin computes, found {}; see `wgrad verify`",
        outcome.kernel,
        outcome.variant,
        outcome.detail.unwrap_or_default()
    )))
}

/// Every dispatch of a step, in order: later ones find the data that earlier ones left.
fn kernels(
    gpu: &Gpu,
    engine: &GpuEngine,
    peak: &Peak,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<KernelReport>> {
    let mut reports = Vec::new();
    for (dispatch, spec) in engine.dispatches()?.into_iter().zip(engine.plan().specs()) {
        let layer = place(&spec.layer);
        progress(&format!("{layer} {}", spec.entry));
        let seconds = time(gpu, dispatch)?;
        let Cost { flops, bytes } = spec.cost;
        let arithmetic = (Bound::Arithmetic, flops / (1e9 * peak.gflops));
        let memory = (Bound::Memory, bytes / (1e9 * peak.gb_per_second));
        let (bound, least) = if arithmetic.1 > memory.1 {
            arithmetic
        } else {
            memory
        };
        let variant = match &spec.work {
            Work::Product(product) => match product.splits() {
                1 => product.tile.to_string(),
                splits => format!("{}, {splits} splits", product.tile),
            },
            _ => String::new(),
        };
        reports.push(KernelReport {
            layer: layer.into(),
            kernel: spec.entry.into(),
            variant,
            seconds,
            gflops: (flops > 0.0).then(|| 1e-9 * flops / seconds.median),
            gb_per_second: 1e-9 * bytes / seconds.median,
            percent_of_peak: 100.0 * least / seconds.median,
            bound,
            ratio: None,
        });
    }
    Ok(reports)
}

impl Report {
    /// Reads what an earlier `wgrad bench --json` printed.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Data`] when it is something else.
    pub fn read(path: &Path) -> Result<Report> {
        let text = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
        serde_json::from_slice(&text).map_err(|e| {
            Error::data(
                path,
                format!("expected the output of `wgrad bench --json`, found something else ({e}); measure again"),
            )
        })
    }

    /// Whether a run on `adapter` of this model and batch size can be compared with this report, which
    /// was read from `path`.
    ///
    /// # Errors
    /// [`Error::Usage`] when it cannot, with what differs.
    pub fn expect_comparable(
        &self,
        path: &Path,
        adapter: &str,
        model: &str,
        batch_size: usize,
    ) -> Result<()> {
        let facts = [
            ("adapter", adapter.to_string(), self.adapter.clone()),
            ("model", model.to_string(), self.model.clone()),
            (
                "batch size",
                batch_size.to_string(),
                self.batch_size.to_string(),
            ),
        ];
        match facts.into_iter().find(|(_, now, then)| now != then) {
            None => Ok(()),
            Some((what, now, then)) => Err(Error::Usage(format!(
                "expected {} of the same {what} ({now}) to compare with, found {then}; measure both with the same --device, --model and --batch-size",
                path.display()
            ))),
        }
    }

    /// Fills in the ratios to an earlier run: of the step, and of every kernel that was there (the
    /// same entry point for the same layer, in the same turn) whatever its variant.
    pub fn compare(&mut self, earlier: &Report) {
        let mut left: Vec<&KernelReport> = earlier.kernels.iter().collect();
        for kernel in &mut self.kernels {
            let same = |k: &&KernelReport| (&k.layer, &k.kernel) == (&kernel.layer, &kernel.kernel);
            if let Some(at) = left.iter().position(same) {
                let then = left.remove(at).seconds.median;
                kernel.ratio = Some(then / kernel.seconds.median);
            }
        }
        let then = earlier.step.images_per_second.median;
        self.step.ratio = Some(self.step.images_per_second.median / then);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_median_and_extremes() {
        let summary = Summary::of(vec![3.0, 9.0, 1.0, 2.0, 5.0]);
        let expected = Summary {
            median: 3.0,
            min: 1.0,
            max: 9.0,
        };
        assert_eq!(summary, expected);
    }

    #[test]
    fn windows_are_long_enough_and_count_their_runs() {
        let mut calls = Vec::new();
        let seconds = windows(Duration::from_millis(4), |runs| {
            calls.push(runs);
            std::thread::sleep(Duration::from_millis(1) * runs as u32);
            Ok(())
        })
        .unwrap();
        let (warm_up, timed) = calls.split_at(calls.len() - WINDOWS);
        assert!(warm_up.is_sorted() && warm_up[0] == 1, "{calls:?}");
        assert!(timed.iter().all(|n| Some(n) == warm_up.last()), "{calls:?}");
        assert!(seconds.min >= 1e-3, "{seconds:?}");
    }

    #[test]
    fn a_kernel_that_is_wrong_is_not_timed() {
        let gpu = Gpu::open(&crate::gpu::Choice::Best).expect("an adapter");
        let wrong = Case::new("peak_copy", "half of it", |b| {
            let src = b.values(8);
            let dst = b.output("dst", 8, crate::verify::Tolerance::EXACT);
            let mut copy = peak::peak_copy(b.input(&src), dst);
            // Half of it is left as it was.
            copy.constants[2].1 = 1.0;
            vec![copy]
        });
        let refusal = check(&gpu, &wrong).unwrap_err();
        assert_eq!(refusal.exit_code(), 1);
        let line = refusal.to_string();
        assert!(
            line.contains("CPU twin") && line.lines().count() == 1,
            "{line}"
        );
        check(&gpu, &cases::copy_case(8)).unwrap();
    }
}
