//! Kernels at the shapes of a model, and its whole training step, against the adapter's own peak.
//!
//! Every time is measured in [`WINDOWS`] windows, each of as many runs as it takes to be long enough,
//! and each waited for inside the timed region. The inputs are made up and contain no denormals,
//! which some processors handle a hundred times more slowly.
//!
//! A kernel is held against its CPU twin before it is timed: the same pipeline, with inputs of the
//! harness. Where the twin would take seconds (products of more than 10⁹ operations, tensors of more
//! than 2²⁴ elements) it is the same kernel on a smaller batch, see [`KernelReport::checked_batch`].

use super::profile::place;
use crate::error::{Error, Result};
use crate::gpu::{Dispatch, Gpu, Step};
use crate::kernels::conv2d::{Pass, Product};
use crate::kernels::peak::{self, MULTIPLY_ADDS_PER_ROUND};
use crate::model::recipe::{Optimizer, Recipe};
use crate::model::{Layer, Model, Op, initial_parameters};
use crate::network::{Network, Options, Split};
use crate::train::{CpuEngine, Engine};
use crate::verify::cases::{self, PEAK_FACTORS};
use crate::verify::{Case, product_case};
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

/// About how long the steps last over which the GPU's busy share is taken.
const BUSY_WINDOW: Duration = Duration::from_secs(1);

/// Runs of a kernel in one submission: the GPU works on one while the next is recorded.
const PER_SUBMISSION: usize = 64;

/// What `wgrad bench --json` prints. Fields may be added; those that are here keep their meaning.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Version that measured.
    pub wgrad: String,
    /// The adapter's name, or "CPU".
    pub adapter: String,
    pub model: String,
    pub batch_size: usize,
    /// What the adapter does at most; null where only steps were measured.
    pub peak: Option<Peak>,
    /// The dispatches of a training step in their order; none where only steps were measured.
    pub kernels: Vec<KernelReport>,
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
    /// Batch size at which it was held against its CPU twin.
    pub checked_batch: usize,
    /// The earlier median by this one, under `--compare`: above 1 is faster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    Arithmetic,
    Memory,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct StepReport {
    pub images_per_second: Summary,
    /// Per cent of the time from the begin of the first step to the end of the last in which the GPU
    /// was at work, by its own clock, over seconds of steps in epochs of at most 64, the waits
    /// between the epochs included; null where it has no clock.
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
    pub median: f64,
    pub min: f64,
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
    pub model: &'a Model,
    /// Optimiser and batch size; the learning rate plays no part.
    pub recipe: &'a Recipe,
    pub options: &'a Options,
    /// The whole step only: neither peak nor kernels.
    pub steps_only: bool,
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
    let network =
        |gpu: &Arc<Gpu>| Network::new(gpu.clone(), model, batch, optimizer, settings.options);
    let mut network = gpu.map(network).transpose()?;
    let clock = gpu.filter(|gpu| gpu.report().timestamp_query);
    let clock = clock.map(Arc::as_ref);
    let step = match &mut network {
        Some(network) => steps(network, clock, model, recipe, start, progress)?,
        None => {
            let mut engine = CpuEngine::new(model, batch, optimizer);
            steps(&mut engine, clock, model, recipe, start, progress)?
        }
    };
    let mut report = Report {
        wgrad: env!("CARGO_PKG_VERSION").into(),
        adapter: adapter_name(gpu.map(Arc::as_ref)),
        model: model.name.clone(),
        batch_size: batch,
        peak: None,
        kernels: Vec::new(),
        step,
        peak_rss_mb: peak_rss_mb(),
    };
    if let (Some(gpu), Some(network), false) = (gpu, &network, settings.steps_only) {
        progress("peak of the adapter");
        let peak = measure_peak(gpu)?;
        report.kernels = kernels(gpu, network, settings, &peak, progress)?;
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
    engine: &mut dyn Engine,
    clock: Option<&Gpu>,
    model: &Model,
    recipe: &Recipe,
    start: Instant,
    progress: &mut dyn FnMut(&str),
) -> Result<StepReport> {
    let (batch, elements) = (recipe.batch_size, model.input.elements());
    // A few megabytes of images; an epoch goes through them once.
    let epoch = ((8 << 20) / (batch * elements)).clamp(1, 64);
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
            first: (i * batch) as u32,
            count: batch as u32,
            lr: scalars.lr,
            bias_correction1: scalars.bias_correction1,
            bias_correction2: scalars.bias_correction2,
            padding: [0; 3],
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
    check(gpu, "peak", &cases::multiply_add_case(256, rounds))?;
    let factors = gpu.upload("peak factors", &PEAK_FACTORS)?;
    let y = gpu.buffer("peak result", invocations)?;
    let arithmetic = peak::peak_multiply_add(gpu, invocations, rounds, &factors, &y)?;
    let operations = 2.0 * (invocations * rounds * MULTIPLY_ADDS_PER_ROUND) as f64;
    let gflops = 1e-9 * operations / time(gpu, &arithmetic)?.min;

    // 256 MiB where the adapter binds as much twice over: no cache holds that.
    let limit = report
        .max_storage_binding_bytes
        .min(report.max_buffer_bytes);
    let elements = (limit / 2).min(256 << 20) as usize / 16 * 4;
    check(gpu, "peak", &cases::copy_case(1 << 16))?;
    let src = gpu.buffer("peak source", elements)?;
    let dst = gpu.buffer("peak destination", elements)?;
    let copy = peak::peak_copy(gpu, &src, &dst)?;
    let gb_per_second = 1e-9 * 8.0 * elements as f64 / time(gpu, &copy)?.min;
    Ok(Peak {
        gflops,
        gb_per_second,
    })
}

/// Holds a kernel against its twin.
fn check(gpu: &Gpu, layer: &str, case: &Case) -> Result<()> {
    let outcome = case.run(gpu)?;
    if outcome.passed {
        return Ok(());
    }
    Err(Error::Verify(format!(
        "{layer} {} ({}): expected what its CPU twin computes, found {}; see `wgrad verify`",
        case.kernel,
        case.variant,
        outcome.detail.unwrap_or_default()
    )))
}

/// Every dispatch of a step, in order: later ones find the data that earlier ones left.
fn kernels(
    gpu: &Gpu,
    network: &Network,
    settings: &Settings,
    peak: &Peak,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<KernelReport>> {
    let mut reports = Vec::new();
    for dispatch in network.plan()? {
        let (layer, kernel) = (place(dispatch.layer()), dispatch.label());
        progress(&format!("{layer} {kernel}"));
        let work = Work::of(dispatch, network, settings)?;
        check(gpu, layer, &work.case)?;
        let seconds = time(gpu, dispatch)?;
        let least = [
            (Bound::Arithmetic, work.flops / (1e9 * peak.gflops)),
            (Bound::Memory, work.bytes / (1e9 * peak.gb_per_second)),
        ];
        let [arithmetic, memory] = least;
        let (bound, least) = if arithmetic.1 > memory.1 {
            arithmetic
        } else {
            memory
        };
        reports.push(KernelReport {
            layer: layer.into(),
            kernel: kernel.into(),
            variant: work.variant,
            seconds,
            gflops: (work.flops > 0.0).then(|| 1e-9 * work.flops / seconds.median),
            gb_per_second: 1e-9 * work.bytes / seconds.median,
            percent_of_peak: 100.0 * least / seconds.median,
            bound,
            checked_batch: work.checked_batch,
            ratio: None,
        });
    }
    Ok(reports)
}

/// What a dispatch does, and how to check it.
struct Work {
    variant: String,
    flops: f64,
    bytes: f64,
    case: Case,
    checked_batch: usize,
}

impl Work {
    /// # Errors
    /// [`Error::Verify`] for a kernel that this list does not know.
    fn of(dispatch: &Dispatch, network: &Network, settings: &Settings) -> Result<Work> {
        let Settings { model, recipe, .. } = *settings;
        let (batch, kernel) = (recipe.batch_size, dispatch.label());
        let product = |kernel: &str| {
            let mut all = network.products().iter();
            all.find(|(layer, p)| layer == dispatch.layer() && p.pass.name() == kernel)
                .map(|(_, product)| product)
        };
        if let Some(product) = product(kernel) {
            return Ok(Work::of_product(product, batch));
        }
        let partials = product(Pass::BackwardWeight.name());
        let at = model.layers.iter().position(|l| l.name == dispatch.layer());
        let found = match at {
            None => step_work(kernel, model, batch, &recipe.optimizer),
            Some(at) => layer_work(kernel, &model.layers, at, batch, partials),
        };
        let (elements, checked_batch, case) = found.ok_or_else(|| {
            Error::Verify(format!(
                "{} {kernel}: expected a kernel with a case in `verify`, found none; leave the kernels out with --steps-only",
                place(dispatch.layer())
            ))
        })?;
        Ok(Work {
            variant: String::new(),
            flops: 0.0,
            bytes: 4.0 * elements as f64,
            case,
            checked_batch,
        })
    }

    fn of_product(product: &Product, batch: usize) -> Work {
        let checked_batch = affordable(batch, product.flops() / 1e9);
        let smaller = Product {
            // More than `batch` where the columns are stored: their rows.
            batch: product.batch / batch * checked_batch,
            ..*product
        };
        let tile = product.tile.to_string();
        let splits = match product.splits() {
            1 => String::new(),
            n => format!(", {n} splits"),
        };
        let pool = product.pool.map_or("", |_| ", max-pooling fused");
        Work {
            variant: tile + &splits + pool,
            flops: product.flops(),
            bytes: product.bytes(),
            case: if checked_batch == batch {
                product_case(*product)
            } else {
                product_case(smaller.with_tile(product.tile))
            },
            checked_batch,
        }
    }
}

/// The batch size at which a check of `cost` (1 is a lot) at `batch` costs no more than 1.
fn affordable(batch: usize, cost: f64) -> usize {
    ((batch as f64 / cost.max(1.0)) as usize).max(1)
}

/// Elements moved (every operand and result once), batch size of the check, and the check.
type Found = Option<(usize, usize, Case)>;

/// What belongs to no layer.
fn step_work(kernel: &str, model: &Model, batch: usize, optimizer: &Optimizer) -> Found {
    let (n, outputs) = (model.parameter_elements, batch * model.classes);
    let images = batch * model.input.elements();
    let (elements, case) = match kernel {
        // Bytes in, floats out.
        "gather_batch" => (
            images / 4 + images + 3 * batch,
            cases::gather_case(model.input, batch, batch),
        ),
        "softmax_cross_entropy" | "squared_error" => (
            2 * outputs + 4 * batch,
            cases::loss_case(model.loss, batch, batch, model.classes, 1.0),
        ),
        "sum_metrics" => (3 * batch, cases::metrics_case(batch, batch)),
        // Gradients in, parameters and states in and out.
        "sgd_update" | "adamw_update" => (
            (3 + 2 * optimizer.state_vectors()) * n,
            cases::update_case(n, *optimizer),
        ),
        "advance_step" => (2, cases::step_case()),
        _ => return None,
    };
    Some((elements, batch, case))
}

/// What belongs to layer `at` and is no product; `partials` is its weight gradient.
fn layer_work(
    kernel: &str,
    layers: &[Layer],
    at: usize,
    batch: usize,
    partials: Option<&Product>,
) -> Found {
    let layer = &layers[at];
    // The gradient handed on stops where the ReLU fused into the layer before did.
    let masked = at > 0 && layers[at - 1].op.product().is_some_and(|(_, relu)| relu);
    let (x, y) = (layer.input.elements(), layer.output.elements());
    let columns = layer.op.product();
    let columns = columns.map_or(0, |(g, _)| g.positions() * g.patch());
    let if_masked = |elements: usize| if masked { elements } else { 0 };
    let largest = x.max(y).max(columns);
    let n = affordable(batch, (batch * largest) as f64 / f64::from(1 << 24));
    let (per_image, case) = match (kernel, &layer.op) {
        ("reduce_splits", _) => {
            let product = partials?;
            let splits = product.splits();
            let elements = product.result_elements() / splits;
            let case = cases::reduce_case(splits, elements);
            return Some(((splits + 1) * elements, batch, case));
        }
        ("maxpool2d_forward", Op::MaxPool2d(p)) => {
            (x + y + y / 4, cases::maxpool_forward_case(*p, n))
        }
        (
            "maxpool2d_backward" | "maxpool2d_backward4" | "maxpool2d_backward_overlapping",
            Op::MaxPool2d(p),
        ) => (
            x + y + y / 4 + if_masked(y),
            cases::maxpool_backward_case(*p, n, masked, p.overlapping()),
        ),
        ("meanpool2d_forward", Op::MeanPool2d(p)) => (x + y, cases::meanpool_forward_case(*p, n)),
        ("meanpool2d_backward", Op::MeanPool2d(p)) => (
            x + y + if_masked(x),
            cases::meanpool_backward_case(*p, n, masked),
        ),
        ("relu_forward", _) => (2 * y, cases::relu_forward_case(n * y)),
        ("relu_backward", _) => (3 * y, cases::relu_backward_case(n * y)),
        ("sigmoid_forward", _) => (2 * y, cases::sigmoid_forward_case(n * y, 1.0)),
        ("sigmoid_backward", _) => (3 * y, cases::sigmoid_backward_case(n * y)),
        ("im2col", Op::Conv2d { geometry, .. }) => (x + columns, cases::im2col_case(*geometry, n)),
        ("col2im", Op::Conv2d { geometry, .. }) => (
            x + columns + if_masked(x),
            cases::col2im_case(*geometry, n, masked),
        ),
        _ => return None,
    };
    Some((batch * per_image, n, case))
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
    fn a_check_that_costs_too_much_takes_a_smaller_batch() {
        for (batch, cost, expected) in
            [(128, 0.5, 128), (128, 1.0, 128), (64, 5.0, 12), (3, 9.0, 1)]
        {
            assert_eq!(affordable(batch, cost), expected);
        }
    }

    #[test]
    fn a_kernel_that_is_wrong_is_not_timed() {
        let gpu = Gpu::open(&crate::gpu::Choice::Best).expect("an adapter");
        let wrong = Case::new("peak_copy", "against zeros", |b| {
            let src = b.values(8);
            let dst = b.output("dst", &[0.0f32; 8], crate::verify::Tolerance::EXACT)?;
            Ok(vec![peak::peak_copy(b.gpu, &b.input(&src)?, &dst)?])
        });
        let refusal = check(&gpu, "peak", &wrong).unwrap_err();
        assert_eq!(refusal.exit_code(), 1);
        let line = refusal.to_string();
        assert!(
            line.contains("CPU twin") && line.lines().count() == 1,
            "{line}"
        );
        check(&gpu, "peak", &cases::copy_case(8)).unwrap();
    }

    /// Layers that no shipped model has: windows that overlap, means, ReLU on its own.
    const UNEVEN: &str = r#"name = "uneven"
input = [13, 15, 3]
classes = 5
loss = "softmax_cross_entropy"
[recipe]
optimizer = "adamw"
lr = 0.01
schedule = "constant"
epochs = 1
batch_size = 3
[[layer]]
type = "conv2d"
out_channels = 5
kernel = 3
[[layer]]
type = "relu"
[[layer]]
type = "max_pool2d"
kernel = 3
stride = 2
[[layer]]
type = "conv2d"
out_channels = 8
kernel = 2
activation = "relu"
[[layer]]
type = "mean_pool2d"
kernel = 2
[[layer]]
type = "dense"
units = "classes"
"#;

    #[test]
    fn every_kernel_of_every_plan_has_a_check_and_passes_it() {
        let gpu = Arc::new(Gpu::open(&crate::gpu::Choice::Best).expect("an adapter"));
        let shipped = crate::model::SHIPPED.iter().map(|(_, text)| *text);
        for text in shipped.chain([UNEVEN]) {
            let definition = crate::model::Definition::parse(text, "a model").unwrap();
            let model = definition
                .resolve(definition.input, definition.classes)
                .unwrap();
            let recipe = Recipe {
                batch_size: 3,
                ..definition.recipe.clone()
            };
            for explicit_conv in [false, true] {
                let options = Options {
                    explicit_conv,
                    ..Options::default()
                };
                let mut network =
                    Network::new(gpu.clone(), &model, 3, &recipe.optimizer, &options).unwrap();
                let images = vec![1; 3 * model.input.elements()];
                let normalization = vec![1.0; 2 * model.input.channels];
                network
                    .upload_dataset(Split::Train, &images, &[0; 3], &normalization)
                    .unwrap();
                let settings = Settings {
                    model: &model,
                    recipe: &recipe,
                    options: &options,
                    steps_only: false,
                };
                for dispatch in network.plan().unwrap() {
                    let work = Work::of(dispatch, &network, &settings).unwrap();
                    assert_eq!(work.case.kernel, dispatch.label());
                    assert!(work.bytes > 0.0 && work.checked_batch > 0);
                    check(&gpu, dispatch.layer(), &work.case).unwrap();
                }
            }
        }
    }
}
