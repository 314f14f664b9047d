//! Steps on the GPU: everything is allocated and compiled once, an epoch uploads its shuffle and its step
//! table and then only says how many steps to run; losses come back in a small read-back that stalls
//! nothing.

use super::{
    Evaluation, Split, StepProgress, evaluation_steps, expect_dataset, expect_epoch, expect_len,
    uploaded,
};
use crate::error::{Error, Result};
use crate::gpu::{AdapterReport, Buffer, Dispatch, Gpu, Readback, Span, Ticket};
use crate::host::fitting_batch;
use crate::kernels::{Dtype, Metrics, STEP_ELEMENTS, Step, View, average};
use crate::model::recipe::Optimizer;
use crate::model::{Model, initial_running};
use crate::plan::{self, Lifetime, Mode, Options, Plan, Target, most_samples};
use indicatif::BinaryBytes;
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Refuses a split that `adapter` cannot bind or the kernel that gathers batches cannot index.
///
/// # Errors
/// [`Error::Usage`] with the number of images that fit.
fn expect_images(
    split: Split,
    images: usize,
    elements: usize,
    adapter: &AdapterReport,
) -> Result<()> {
    // Bytes are indexed with 32 bits.
    let limit = adapter.binding_limit().min(u64::from(u32::MAX));
    let size = images as u128 * elements as u128;
    if size <= u128::from(limit) {
        return Ok(());
    }
    let what = match split {
        Split::Train => "training",
        Split::Validation => "validation",
        Split::Test => "test",
    };
    let advice = match (limit / elements as u64, split) {
        (0, _) => "use smaller images, or".into(),
        (most, Split::Train) => format!("use --limit {most} or fewer, or"),
        (most, _) => format!("use at most {most} of them, or"),
    };
    Err(Error::Usage(format!(
        "expected {what} images of at most {limit} bytes on {}, found {size}; {advice} another --device: cpu has no such limit",
        adapter.name
    )))
}

/// What one submission may take at most; far below the two seconds after which Windows resets a
/// GPU, and short enough for a smooth progress bar.
const SUBMISSION: Duration = Duration::from_millis(100);

/// Most samples of an evaluation batch, so that even a tiny model's evaluation comes in several short
/// submissions.
const MOST_EVALUATED: usize = 1 << 14;

/// A network on the GPU: its plans and everything that lives from step to step.
pub struct GpuEngine {
    gpu: Arc<Gpu>,
    model: Model,
    optimizer: Optimizer,
    /// What is kept from step to step, by name.
    kept: HashMap<String, Buffer>,
    training: Planned,
    evaluation: Planned,
    /// By [`Split`].
    splits: [Option<Resident>; 3],
}

/// A plan with its memory.
struct Planned {
    plan: Plan,
    slots: Vec<Buffer>,
}

/// One split of the dataset with the steps on it.
struct Resident {
    len: usize,
    tensors: HashMap<&'static str, Buffer>,
    dispatches: Vec<Dispatch>,
}

/// The plan of an evaluation beside that of training steps. It never runs while they do, so it uses their
/// memory, and takes as many samples as fit there where that is wanted.
///
/// # Errors
/// As [`Plan::new`].
fn evaluation_plan(
    model: &Model,
    training: &Plan,
    options: &Options,
    adapter: &AdapterReport,
) -> Result<Plan> {
    let plan = |batch| Plan::new(model, batch, Mode::Evaluate, options, Target::Gpu(adapter));
    let same = plan(training.batch)?;
    if !options.large_evaluation.unwrap_or(!adapter.software) || options.explicit_conv {
        return Ok(same);
    }
    let floats = |plan: &Plan| {
        let slots = plan.slots.iter().filter(|s| s.dtype == Dtype::F32);
        let mut sizes: Vec<usize> = slots.map(|s| s.elements).collect();
        sizes.sort_by_key(|size| usize::MAX - size);
        sizes
    };
    let room = floats(training);
    // The smallest ones hold a number a sample, whoever has to make room for them.
    let ratios = floats(&same).into_iter().enumerate().map(|(i, wanted)| {
        let room = room.get(i).copied().unwrap_or(0);
        room * training.batch / wanted
    });
    let fitting = ratios.min().unwrap_or(0).min(MOST_EVALUATED);
    let fitting = fitting.min(most_samples(model, options)?);
    if fitting > training.batch {
        plan(fitting)
    } else {
        Ok(same)
    }
}

/// Device memory of training steps and evaluations by purpose, in bytes, on an adapter like `adapter`,
/// without touching a GPU; the dataset comes on top.
///
/// # Errors
/// As [`Plan::new`].
pub fn memory(
    model: &Model,
    batch: usize,
    optimizer: &Optimizer,
    options: &Options,
    adapter: &AdapterReport,
) -> Result<Vec<(String, u64)>> {
    let mode = Mode::Train(*optimizer);
    let training = Plan::new(model, batch, mode, options, Target::Gpu(adapter))?;
    let evaluation = evaluation_plan(model, &training, options, adapter)?;
    let rooms = training.room_for(&evaluation);
    let more = evaluation
        .slots
        .iter()
        .zip(rooms)
        .filter(|(_, room)| room.is_none());
    let more: u64 = more
        .map(|(s, _)| 4 * s.dtype.words(s.elements) as u64)
        .sum();
    let mut rows = training.memory();
    if more > 0 {
        rows.push(("evaluation".into(), more));
    }
    Ok(rows)
}

impl GpuEngine {
    /// As [`super::Engine::new`].
    pub fn new(
        gpu: Arc<Gpu>,
        model: &Model,
        batch: usize,
        optimizer: &Optimizer,
        options: &Options,
    ) -> Result<GpuEngine> {
        let adapter = gpu.report().clone();
        let mode = Mode::Train(*optimizer);
        let training = Plan::new(model, batch, mode, options, Target::Gpu(&adapter))?;
        let evaluation = evaluation_plan(model, &training, options, &adapter)?;
        GpuEngine::build(gpu, model, optimizer, options, training, evaluation).map_err(
            |e| match e {
                Error::OutOfMemory {
                    label,
                    what,
                    allocated,
                } => {
                    let total = |batch| -> Result<u64> {
                        let rows = memory(model, batch, optimizer, options, &adapter)?;
                        Ok(rows.iter().map(|(_, bytes)| bytes).sum())
                    };
                    // Where the driver does not tell what it gave: half of what was asked for.
                    let room = match allocated {
                        0 => total(batch).unwrap_or(0) / 2,
                        bytes => bytes,
                    };
                    let batch = fitting_batch(batch, |batch| Ok(total(batch)? <= room));
                    let advice = match batch.ok().flatten() {
                        Some(batch) => format!("use --batch-size {batch}"),
                        None => "use a smaller model, or --device cpu".into(),
                    };
                    Error::OutOfMemory {
                        label,
                        what: format!("{what} after {}; {advice}", BinaryBytes(allocated)),
                        allocated,
                    }
                }
                other => other,
            },
        )
    }

    fn build(
        gpu: Arc<Gpu>,
        model: &Model,
        optimizer: &Optimizer,
        options: &Options,
        training: Plan,
        evaluation: Plan,
    ) -> Result<GpuEngine> {
        let mut kept = HashMap::new();
        for tensor in training
            .tensors
            .iter()
            .filter(|t| t.lifetime == Lifetime::Kept)
        {
            let buffer = gpu.buffer(&tensor.name, tensor.elements())?;
            kept.insert(tensor.name.clone(), buffer);
        }
        let slot = |plan: &Plan, i: usize| {
            // Named after the largest of the tensors that it holds.
            let held = plan.tensors.iter().filter(|t| t.slot == Some(i));
            let largest = held.max_by_key(|t| t.elements());
            let label = largest.map_or("unused", |t| &t.name);
            let slot = plan.slots[i];
            gpu.buffer(label, slot.dtype.words(slot.elements))
        };
        let slots: Vec<Buffer> = (0..training.slots.len())
            .map(|i| slot(&training, i))
            .collect::<Result<_>>()?;
        let rooms = training.room_for(&evaluation);
        let shared = rooms.into_iter().enumerate().map(|(i, room)| match room {
            Some(room) => Ok(slots[room].clone()),
            None => slot(&evaluation, i),
        });
        let evaluation = Planned {
            slots: shared.collect::<Result<_>>()?,
            plan: evaluation,
        };
        let training = Planned {
            plan: training,
            slots,
        };
        for planned in [&training, &evaluation] {
            planned
                .plan
                .specs()
                .try_for_each(|spec| gpu.compile(spec))?;
        }
        let mut engine = GpuEngine {
            gpu,
            model: model.clone(),
            optimizer: *optimizer,
            kept,
            training,
            evaluation,
            splits: [None, None, None],
        };
        engine.set_kept("running", &initial_running(model))?;
        if let Some(weights) = &options.class_weights {
            engine.set_kept("class_weights", weights)?;
        }
        if let Some(factors) = plan::factors(model, optimizer, options)? {
            engine.set_kept("factors", &factors)?;
        }
        if options.average {
            engine.set_kept("average_running", &initial_running(model))?;
        }
        Ok(engine)
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// A training step.
    pub fn plan(&self) -> &Plan {
        &self.training.plan
    }

    /// Samples per step of an evaluation, see [`Options::large_evaluation`].
    pub fn evaluation_batch(&self) -> usize {
        self.evaluation.plan.batch
    }

    pub(super) fn state_vectors(&self) -> usize {
        self.optimizer.state_vectors()
    }

    pub(super) fn kept(&self, name: &'static str) -> Result<Vec<f32>> {
        let mut values = self.gpu.read(name, &self.kept[name])?;
        // A buffer has one element at least.
        values.truncate(self.len_of(name));
        Ok(values)
    }

    pub(super) fn set_kept(&mut self, name: &'static str, values: &[f32]) -> Result<()> {
        expect_len(name, "values", self.len_of(name), values.len())?;
        self.gpu.write(name, &self.kept[name], values)
    }

    pub(super) fn averages(&self) -> bool {
        self.kept.contains_key("average_parameters")
    }

    /// Exchanges two vectors that are kept.
    pub(super) fn swap(&mut self, names: [&'static str; 2]) -> Result<()> {
        let len = self.len_of(names[0]);
        if len == 0 {
            return Ok(());
        }
        let [a, b] = [0, 1].map(|tensor| View::whole(tensor, Dtype::F32, len));
        let buffers = names.map(|name| &self.kept[name]);
        let swap = average::swap_values(a, b);
        let dispatch = self.gpu.dispatch_on(&swap, &buffers)?;
        let ticket = self.gpu.submit(swap.entry, &[&dispatch], 1)?;
        self.gpu.wait(&ticket)
    }

    fn len_of(&self, name: &str) -> usize {
        let plan = &self.training.plan;
        plan.tensor(name)
            .map_or(0, |tensor| plan.tensors[tensor].elements())
    }

    /// As [`super::Engine::upload_dataset`].
    pub fn upload_dataset(
        &mut self,
        split: Split,
        images: &[u8],
        labels: &[u32],
        normalization: &[f32],
    ) -> Result<()> {
        expect_dataset(&self.model, images, labels, normalization)?;
        let (len, gpu) = (labels.len(), &self.gpu);
        expect_images(split, len, self.model.input.elements(), gpu.report())?;
        let planned = match split {
            Split::Train => &self.training,
            Split::Validation | Split::Test => &self.evaluation,
        };
        let rows = len.div_ceil(planned.plan.batch);
        let images = gpu.upload("dataset images", images).map_err(|e| match e {
            Error::OutOfMemory {
                label,
                what,
                allocated,
            } => Error::OutOfMemory {
                label,
                what: format!(
                    "{what} after {}; use {}a smaller --batch-size",
                    BinaryBytes(allocated),
                    match split {
                        Split::Train => format!("a smaller --limit (these are {len} images) or "),
                        _ => String::new(),
                    }
                ),
                allocated,
            },
            other => other,
        })?;
        let mut tensors = HashMap::from([
            ("images", images),
            ("labels", gpu.upload("dataset labels", labels)?),
            ("normalization", gpu.upload("normalisation", normalization)?),
            ("order", gpu.buffer("order", len)?),
            ("steps", gpu.buffer("step table", rows * STEP_ELEMENTS)?),
            ("counter", gpu.buffer("step counter", 1)?),
            ("metrics", gpu.buffer("metrics", rows * 2)?),
            ("predictions", gpu.buffer("predictions", len)?),
        ]);
        if planned.plan.tensor("outputs").is_some() {
            tensors.insert("outputs", gpu.buffer("outputs", len * self.model.classes)?);
        }
        let dispatches = planned.plan.specs().map(|spec| {
            gpu.dispatch(spec, |argument| {
                let view = argument.view;
                let tensor = &planned.plan.tensors[view.tensor];
                let words = view.dtype.words(view.len).max(1);
                match (tensor.lifetime, tensor.slot) {
                    // A dataset is longer than a step knows.
                    (Lifetime::Data, _) => tensors[tensor.name.as_str()].clone(),
                    (Lifetime::Kept, _) => self.kept[&tensor.name].slice(view.start, words),
                    (Lifetime::Step, slot) => {
                        let slot = slot.expect("a tensor that a kernel is bound to has memory");
                        let start = view.dtype.words(tensor.offset + view.start);
                        planned.slots[slot].slice(start, words)
                    }
                }
            })
        });
        let dispatches = dispatches.collect::<Result<_>>()?;
        if split != Split::Train {
            let order: Vec<u32> = (0..len as u32).collect();
            gpu.write("order", &tensors["order"], &order)?;
            let steps = evaluation_steps(len, planned.plan.batch);
            gpu.write("step table", &tensors["steps"], &steps)?;
        }
        self.splits[split as usize] = Some(Resident {
            len,
            tensors,
            dispatches,
        });
        Ok(())
    }

    /// As [`super::Engine::train_epoch`].
    pub fn train_epoch(
        &mut self,
        order: &[u32],
        steps: &[Step],
        progress: StepProgress,
    ) -> Result<Vec<Metrics>> {
        let resident = uploaded(&self.splits[Split::Train as usize])?;
        expect_epoch(resident.len, self.training.plan.batch, order, steps)?;
        self.gpu.write("order", &resident.tensors["order"], order)?;
        self.gpu
            .write("step table", &resident.tensors["steps"], steps)?;
        self.run(resident, steps.len(), progress)
    }

    /// As [`super::Engine::evaluate`].
    pub fn evaluate(
        &mut self,
        split: Split,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Evaluation> {
        let resident = uploaded(&self.splits[split as usize])?;
        let (len, batch) = (resident.len, self.evaluation.plan.batch);
        let mut done = 0;
        let metrics = self.run(resident, len.div_ceil(batch), &mut |new| {
            done += new.len();
            Ok(progress((done * batch).min(len)))
        })?;
        let mut predictions: Vec<u32> = self
            .gpu
            .read("predictions", &resident.tensors["predictions"])?;
        predictions.truncate(metrics.len() * batch);
        let logits = resident.tensors.get("outputs").map(|outputs| {
            let mut logits: Vec<f32> = self.gpu.read("outputs", outputs)?;
            logits.truncate(predictions.len() * self.model.classes);
            Ok(logits)
        });
        Ok(Evaluation {
            loss_sum: metrics.iter().map(|m| f64::from(m.loss_sum)).sum(),
            predictions,
            logits: logits.transpose()?,
        })
    }

    /// Runs one training step (the first of the last epoch's table, again) and tells how long each
    /// of its dispatches took, in order. The step counts: it updates the parameters.
    ///
    /// # Errors
    /// [`Error::Shape`] before the first epoch, [`Error::Usage`] without timestamp queries.
    pub fn profile_step(&mut self) -> Result<Vec<Span>> {
        self.gpu.profile(&self.dispatches()?)
    }

    /// The dispatches of a training step, one for each kernel of the plan, to be run by hand (see
    /// [`Gpu::submit`]); the first row of the last epoch's table is the current one again.
    ///
    /// # Errors
    /// [`Error::Shape`] before the training split was uploaded, or what the device reports.
    pub fn dispatches(&self) -> Result<Vec<&Dispatch>> {
        let resident = uploaded(&self.splits[Split::Train as usize])?;
        self.gpu
            .write("step counter", &resident.tensors["counter"], &[0u32])?;
        Ok(resident.dispatches.iter().collect())
    }

    /// Carries out a step per row of the step table, a few steps per submission, at most two
    /// submissions ahead of the GPU, and collects the metrics without stalling it. When `progress`
    /// says break, what is in flight is the end.
    fn run(
        &self,
        resident: &Resident,
        rows: usize,
        progress: StepProgress,
    ) -> Result<Vec<Metrics>> {
        let gpu = &self.gpu;
        let dispatches: Vec<&Dispatch> = resident.dispatches.iter().collect();
        let all_metrics = &resident.tensors["metrics"];
        gpu.write("step counter", &resident.tensors["counter"], &[0u32])?;
        let mut metrics: Vec<Metrics> = Vec::with_capacity(rows);
        let mut in_flight: std::collections::VecDeque<(Ticket, usize)> = Default::default();
        let mut readback: Option<Readback> = None;
        let (mut submitted, mut completed, mut fetched) = (0, 0, 0);
        // Start with single steps, then as many as fit the time a submission may take.
        let mut per_submission = 1;
        let mut last_wait = Instant::now();
        let mut last_readback = Instant::now();
        let mut rows = rows;
        while submitted < rows || !in_flight.is_empty() {
            if submitted < rows && in_flight.len() < 2 {
                let repeat = per_submission.min(rows - submitted);
                let ticket = gpu.submit("step", &dispatches, repeat)?;
                submitted += repeat;
                in_flight.push_back((ticket, repeat));
                if last_readback.elapsed() > Duration::from_millis(250) && readback.is_none() {
                    let new = all_metrics.slice(2 * fetched, 2 * (submitted - fetched));
                    fetched = submitted;
                    readback = Some(gpu.start_readback("metrics", &new)?);
                    last_readback = Instant::now();
                }
                continue;
            }
            if let Some((ticket, repeat)) = in_flight.pop_front() {
                gpu.wait(&ticket)?;
                completed += repeat;
                let step_time = last_wait.elapsed().div_f64(repeat as f64);
                last_wait = Instant::now();
                per_submission = (SUBMISSION.as_secs_f64() / step_time.as_secs_f64().max(1e-6))
                    .clamp(1.0, 64.0)
                    .min(2.0 * per_submission as f64) as usize;
            }
            // A submission behind the copy has finished, so the copy has: this does not wait.
            let new: Vec<Metrics> = match readback.take_if(|_| completed > fetched) {
                Some(readback) => readback.finish(gpu)?,
                None => Vec::new(),
            };
            if progress(&new)?.is_break() {
                rows = submitted;
            }
            metrics.extend(new);
        }
        if let Some(readback) = readback {
            let new: Vec<Metrics> = readback.finish(gpu)?;
            let _ = progress(&new)?;
            metrics.extend(new);
        }
        if fetched < rows {
            let rest = all_metrics.slice(2 * fetched, 2 * (rows - fetched));
            let new: Vec<Metrics> = gpu.read("metrics", &rest)?;
            let _ = progress(&new)?;
            metrics.extend(new);
        }
        Ok(metrics)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(result: Result<()>) -> String {
        match result {
            Err(Error::Usage(message)) => message,
            other => panic!("expected a refusal, found {other:?}"),
        }
    }

    #[test]
    fn images_are_counted_to_4_gib_and_no_further() {
        let mut adapter = AdapterReport::imagined(false);
        adapter.max_storage_binding_bytes = 16 << 30;
        adapter.max_buffer_bytes = 16 << 30;
        let elements = 1 << 20;
        expect_images(Split::Train, 4095, elements, &adapter).unwrap();
        let message = refusal(expect_images(Split::Train, 4096, elements, &adapter));
        assert!(message.contains("4294967296"), "{message}");
        assert!(message.contains("--limit 4095 or"), "{message}");
        adapter.max_storage_binding_bytes = 128 << 20;
        let message = refusal(expect_images(Split::Test, 129, elements, &adapter));
        assert!(message.contains("at most 128 of"), "{message}");
        assert!(!message.contains("--limit"), "{message}");
        let message = refusal(expect_images(Split::Test, 1, 1 << 28, &adapter));
        assert!(message.contains("smaller images"), "{message}");
        assert!(!message.contains("--limit"), "{message}");
    }
}
