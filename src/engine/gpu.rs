//! Steps on the GPU: everything is allocated and compiled once, an epoch uploads its shuffle and its step
//! table and then only says how many steps to run; losses come back in a small read-back that stalls
//! nothing.

use super::{
    Evaluation, Exchange, Split, StepProgress, batch_from, ends_batch, evaluation_steps,
    expect_dataset, expect_epoch, expect_len, most_rows, own_nodes, own_shards, uploaded,
};
use crate::error::{Error, Result};
use crate::gpu::{AdapterReport, Buffer, Dispatch, Gpu, Readback, Span, Ticket};
use crate::host::fitting_batch;
use crate::kernels::half::LOSS_SCALE;
use crate::kernels::shards::{Node, levels};
use crate::kernels::{Dtype, Metrics, STEP_ELEMENTS, Step, View, average};
use crate::model::recipe::{Optimizer, Precision, Views};
use crate::model::{Model, PARAMETER_ALIGNMENT, initial_running};
use crate::plan::{
    self, Lifetime, Mode, Options, Plan, SHARD_STATISTICS, Section, Target, most_samples,
};
use indicatif::BinaryBytes;
use rayon::prelude::*;
use std::collections::{HashMap, VecDeque};
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of images that go to the device at a time where a split is too large for it, unless the options
/// say otherwise.
const SLAB: u64 = 32 << 20;

/// What one submission may take at most; far below the two seconds after which Windows resets a
/// GPU, and short enough for a smooth progress bar.
const SUBMISSION: Duration = Duration::from_millis(100);

/// Most views of samples in an evaluation batch, so that even a tiny model's evaluation comes in several short
/// submissions.
const MOST_EVALUATED: usize = 1 << 14;

/// A network on the GPU: its plans and everything that lives from step to step.
pub struct GpuEngine {
    gpu: Arc<Gpu>,
    model: Model,
    optimizer: Optimizer,
    options: Options,
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
    /// The kernels of a step, bound to all images, or to either of two slabs of them.
    dispatches: Vec<Vec<Dispatch>>,
    /// The same for each further shard of a batch that is under way at a time, in memory of its own.
    replicas: Vec<Vec<Vec<Dispatch>>>,
    /// Where the images pass through the device.
    streamed: Option<Streamed>,
}

/// The images of a split that stays on the host.
struct Streamed {
    images: Vec<u8>,
    /// Bytes of one of them.
    elements: usize,
    /// That of the last epoch.
    order: Vec<u32>,
    /// Where in it the last epoch's table began.
    first: usize,
    /// What is on the device, in turn.
    slabs: [Buffer; 2],
    /// Images in a slab.
    room: usize,
}

impl Resident {
    /// Steps on end whose images are on the device together: all of them, or as many as a slab holds.
    fn slabs(&self, steps: &[Step]) -> Vec<Slab> {
        match &self.streamed {
            Some(streamed) => slabs(steps, streamed.room),
            None => vec![Slab {
                rows: 0..steps.len(),
                images: 0..0,
            }],
        }
    }

    /// The kernels of a step for one of the shards that are under way at a time, bound to that slab.
    fn bound(&self, replica: usize, slab: usize) -> &[Dispatch] {
        let bound = match replica {
            0 => &self.dispatches,
            _ => &self.replicas[replica - 1],
        };
        &bound[slab % bound.len()]
    }

    /// Puts the images of `slab`, the one of this number, onto the device if they are not there.
    fn bring(&self, gpu: &Gpu, number: usize, slab: &Slab) -> Result<()> {
        match &self.streamed {
            Some(streamed) => streamed.upload(gpu, number, slab),
            None => Ok(()),
        }
    }
}

impl Streamed {
    /// Puts the images of `slab`, the one of this number, behind everything submitted so far: the steps
    /// before it run meanwhile, and those that read what it overwrites are over when it is copied.
    fn upload(&self, gpu: &Gpu, number: usize, slab: &Slab) -> Result<()> {
        let mut bytes = vec![0; slab.images.len() * self.elements];
        bytes
            .par_chunks_mut(self.elements)
            .zip(&self.order[slab.images.clone()])
            .for_each(|(bytes, image)| {
                let at = *image as usize * self.elements;
                bytes.copy_from_slice(&self.images[at..][..self.elements]);
            });
        gpu.write("dataset slab", &self.slabs[number % 2], &bytes)
    }
}

/// Steps whose images are on the device together.
#[derive(Clone, Debug, PartialEq)]
struct Slab {
    rows: Range<usize>,
    /// Their places in the epoch's order.
    images: Range<usize>,
}

/// Cuts steps into slabs of at most `room` images each, or of one step.
fn slabs(steps: &[Step], room: usize) -> Vec<Slab> {
    let mut slabs: Vec<Slab> = Vec::new();
    for (row, step) in steps.iter().enumerate() {
        let first = step.first as usize;
        let end = first + step.count as usize;
        match slabs.last_mut() {
            Some(slab) if slab.images.start <= first && end - slab.images.start <= room => {
                slab.rows.end = row + 1;
                slab.images.end = end.max(slab.images.end);
            }
            _ => slabs.push(Slab {
                rows: row..row + 1,
                images: first..end,
            }),
        }
    }
    slabs
}

/// The steps with the places where their slabs begin.
fn based(steps: &[Step], slabs: &[Slab]) -> Vec<Step> {
    let mut steps = steps.to_vec();
    for slab in slabs {
        for step in &mut steps[slab.rows.clone()] {
            step.base = slab.images.start as u32;
        }
    }
    steps
}

/// The plan of an evaluation beside that of training steps. It never runs while they do, so it uses their
/// memory: its batch shows as many views as the steps' has samples, or as fit there where that is wanted.
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
    let views = options.views.count();
    let same = plan((training.batch / views).max(1))?;
    if !options.large_evaluation.unwrap_or(!adapter.software) || options.explicit_conv {
        return Ok(same);
    }
    let sizes = |plan: &Plan, dtype| {
        let slots = plan.slots.iter().filter(|s| s.dtype == dtype);
        let mut sizes: Vec<usize> = slots.map(|s| s.elements).collect();
        sizes.sort_by_key(|size| usize::MAX - size);
        sizes
    };
    // The smallest ones hold a number a sample, whoever has to make room for them.
    let ratios = [Dtype::F32, Dtype::F16].into_iter().flat_map(|dtype| {
        let (room, wanted) = (sizes(training, dtype), sizes(&same, dtype));
        let pairs = wanted.into_iter().enumerate();
        pairs.map(move |(i, wanted)| room.get(i).copied().unwrap_or(0) * same.batch / wanted)
    });
    let fitting = ratios.min().unwrap_or(0).min(MOST_EVALUATED / views);
    let fitting = fitting.min(most_samples(model, options)?);
    if fitting > same.batch {
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

/// Memory for the tensors of a step.
fn slots_of(gpu: &Gpu, plan: &Plan) -> Result<Vec<Buffer>> {
    (0..plan.slots.len())
        .map(|i| slot_of(gpu, plan, i))
        .collect()
}

fn slot_of(gpu: &Gpu, plan: &Plan, i: usize) -> Result<Buffer> {
    // Named after the largest of the tensors that it holds.
    let held = plan.tensors.iter().filter(|t| t.slot == Some(i));
    let largest = held.max_by_key(|t| t.elements());
    let label = largest.map_or("unused", |t| &t.name);
    let slot = plan.slots[i];
    gpu.buffer(label, slot.dtype.words(slot.elements))
}

/// The images of a split, brought to the device as the rows of a step table come that look at them.
struct Images<'a> {
    gpu: &'a Gpu,
    resident: &'a Resident,
    slabs: Vec<Slab>,
    /// The one that is at hand, and how many were brought.
    slab: usize,
    brought: usize,
}

impl<'a> Images<'a> {
    fn of(gpu: &'a Gpu, resident: &'a Resident, steps: &[Step]) -> Images<'a> {
        Images {
            gpu,
            resident,
            slabs: resident.slabs(steps),
            slab: 0,
            brought: 0,
        }
    }

    /// Whether those of the next row, this one, are yet to be brought.
    fn lack(&mut self, row: usize) -> bool {
        self.slab += usize::from(row == self.slabs[self.slab].rows.end);
        self.brought == self.slab
    }

    fn bring(&mut self) -> Result<()> {
        self.brought += 1;
        let slab = &self.slabs[self.slab];
        self.resident.bring(self.gpu, self.slab, slab)
    }

    /// The kernels of a step for one of the shards that are under way at a time, bound to them.
    fn bound(&self, replica: usize) -> &'a [Dispatch] {
        self.resident.bound(replica, self.slab)
    }
}

/// Sums over shards that are on their way to the host, and what an exchange made of those before, each for its part of
/// the gradients.
#[derive(Default)]
struct SlabsUnderWay {
    coming: Vec<(Range<usize>, Vec<Readback>)>,
    sums: Vec<(Range<usize>, Vec<f32>)>,
}

impl SlabsUnderWay {
    fn exchange(&mut self, gpu: &Gpu, row: &Step, exchange: &mut dyn Exchange) -> Result<()> {
        for (range, readbacks) in self.coming.drain(..) {
            let nodes = arrived(gpu, readbacks)?;
            let sum = exchange.gradients(row, &range, &nodes)?;
            self.sums.push((range, sum));
        }
        Ok(())
    }
}

fn arrived(gpu: &Gpu, readbacks: Vec<Readback>) -> Result<Vec<Vec<f32>>> {
    let values = readbacks.into_iter();
    values.map(|readback| readback.finish(gpu)).collect()
}

/// Dispatches on their way to the device: in pieces that take about [`SUBMISSION`] each, of which two are under way.
struct Feed<'a> {
    gpu: &'a Gpu,
    waiting: Vec<&'a Dispatch>,
    under_way: VecDeque<(Ticket, usize)>,
    /// Dispatches of a piece.
    most: usize,
    since: Instant,
}

impl<'a> Feed<'a> {
    fn new(gpu: &'a Gpu, most: usize) -> Feed<'a> {
        Feed {
            gpu,
            waiting: Vec::new(),
            under_way: VecDeque::new(),
            most,
            since: Instant::now(),
        }
    }

    fn push(&mut self, dispatches: &'a [Dispatch]) -> Result<()> {
        for dispatch in dispatches {
            self.waiting.push(dispatch);
            if self.waiting.len() >= self.most {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Submits what waits.
    fn flush(&mut self) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        if self.under_way.len() == 2
            && let Some((ticket, count)) = self.under_way.pop_front()
        {
            self.gpu.wait(&ticket)?;
            let each = self.since.elapsed().as_secs_f64() / count as f64;
            self.since = Instant::now();
            let most = SUBMISSION.as_secs_f64() / each.max(1e-7);
            self.most = (most as usize).clamp(1, 2 * self.most);
        }
        let ticket = self.gpu.submit("step", &self.waiting, 1)?;
        self.under_way.push_back((ticket, self.waiting.len()));
        self.waiting.clear();
        Ok(())
    }
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
        let mode = match options.evaluates_only {
            true => Mode::Evaluate,
            false => Mode::Train(*optimizer),
        };
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
                        Some(batch) => options.batch_advice(batch),
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
        let slots = slots_of(&gpu, &training)?;
        let rooms = training.room_for(&evaluation);
        let shared = rooms.into_iter().enumerate().map(|(i, room)| match room {
            Some(room) => Ok(slots[room].clone()),
            None => slot_of(&gpu, &evaluation, i),
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
            let specs: Vec<_> = planned.plan.specs().collect();
            specs
                .into_par_iter()
                .try_for_each(|spec| gpu.compile(spec))?;
        }
        let mut engine = GpuEngine {
            gpu,
            model: model.clone(),
            optimizer: *optimizer,
            options: options.clone(),
            kept,
            training,
            evaluation,
            splits: [None, None, None],
        };
        engine.set_kept("running", &initial_running(model))?;
        if let Some(weights) = &options.class_weights {
            engine.set_kept("class_weights", weights)?;
        }
        if let Some(quantiles) = options.quantiles() {
            engine.set_kept("quantiles", &quantiles)?;
        }
        if let Some(factors) = plan::factors(model, optimizer, options)? {
            engine.set_kept("factors", &factors)?;
        }
        if options.precision == Precision::Mixed && !options.evaluates_only {
            engine.set_kept("loss_scale", &LOSS_SCALE)?;
        }
        if options.average {
            engine.set_kept("average_running", &initial_running(model))?;
        }
        Ok(engine)
    }

    /// The device.
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

    /// As [`super::Engine::with_views`].
    pub(super) fn with_views(&self, views: Views) -> Result<GpuEngine> {
        let options = Options {
            views,
            average: false,
            ..self.options.clone()
        };
        GpuEngine::new(
            self.gpu.clone(),
            &self.model,
            self.training.plan.batch,
            &self.optimizer,
            &options,
        )
    }

    pub(super) fn evaluates_only(&self) -> bool {
        self.options.evaluates_only
    }

    pub(super) fn micro(&self) -> bool {
        self.options.micro
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

    pub(super) fn scales_loss(&self) -> bool {
        self.options.precision == Precision::Mixed && !self.options.evaluates_only
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
        images: Vec<u8>,
        labels: &[u32],
        normalization: &[f32],
    ) -> Result<()> {
        expect_dataset(&self.model, &images, labels, normalization)?;
        // Bytes are indexed with 32 bits.
        let limit = self.gpu.report().binding_limit().min(u32::MAX.into());
        let most = self.options.slab_bytes.unwrap_or(limit).min(limit);
        let whole = match images.len() as u64 <= most {
            true => match self.place(split, &images, labels, normalization, None) {
                // Maybe there is room for a part.
                Err(Error::OutOfMemory { .. }) => None,
                placed => Some(placed?),
            },
            false => None,
        };
        let resident = match whole {
            Some(resident) => resident,
            None => {
                let elements = self.model.input.elements();
                let bytes = self.options.slab_bytes.unwrap_or(SLAB).min(limit);
                let batch = self.planned(split).plan.batch;
                let room = (bytes as usize / elements).min(labels.len()).max(batch);
                let placed = self.place(split, &images, labels, normalization, Some(room));
                let mut resident = placed.map_err(|e| match e {
                    Error::OutOfMemory {
                        label,
                        what,
                        allocated,
                    } => Error::OutOfMemory {
                        label,
                        what: format!("{what} after {}; {}", BinaryBytes(allocated), self.advice()),
                        allocated,
                    },
                    other => other,
                })?;
                if let Some(streamed) = &mut resident.streamed {
                    streamed.images = images;
                }
                resident
            }
        };
        self.splits[split as usize] = Some(resident);
        Ok(())
    }

    /// As [`super::Engine::take_images`].
    pub fn take_images(&mut self, split: Split) -> Result<Vec<u8>> {
        let resident = uploaded(self.splits[split as usize].take())?;
        let mut images = match resident.streamed {
            Some(streamed) => streamed.images,
            None => self
                .gpu
                .read("dataset images", &resident.tensors["images"])?,
        };
        images.truncate(resident.len * self.model.input.elements());
        Ok(images)
    }

    /// What makes room for a dataset.
    fn advice(&self) -> String {
        match self.training.plan.batch {
            1 => "use a smaller model, or --device cpu".into(),
            batch => self.options.batch_advice(batch / 2),
        }
    }

    fn planned(&self, split: Split) -> &Planned {
        match split {
            Split::Train => &self.training,
            Split::Validation | Split::Test => &self.evaluation,
        }
    }

    /// What a split takes on the device: all of it, or beside the images, which then are still missing,
    /// two slabs for so many of them.
    fn place(
        &self,
        split: Split,
        images: &[u8],
        labels: &[u32],
        normalization: &[f32],
        slab: Option<usize>,
    ) -> Result<Resident> {
        let (len, gpu, planned) = (labels.len(), &self.gpu, self.planned(split));
        let (elements, batch) = (self.model.input.elements(), planned.plan.batch);
        let rows = most_rows(len, batch, &self.options);
        let counters = match planned.plan.syncs() {
            true => PARAMETER_ALIGNMENT * self.options.shards.unwrap_or(1),
            false => 1,
        };
        // A kernel is bound to a batch at least, of which a smaller split fills a part.
        let least = (batch * elements).div_ceil(4);
        let at_hand = match slab {
            None => vec![gpu.upload_with_room("dataset images", images, least)?],
            Some(room) => (0..2)
                .map(|_| gpu.buffer("dataset slab", (room * elements).div_ceil(4)))
                .collect::<Result<_>>()?,
        };
        let mut tensors = HashMap::from([
            (
                "labels",
                gpu.upload_with_room("dataset labels", labels, batch)?,
            ),
            ("normalization", gpu.upload("normalisation", normalization)?),
            ("order", gpu.buffer("order", len.max(batch))?),
            ("steps", gpu.buffer("step table", rows * STEP_ELEMENTS)?),
            ("counter", gpu.buffer("step counter", counters)?),
            ("metrics", gpu.buffer("metrics", rows * 2)?),
            ("predictions", gpu.buffer("predictions", len)?),
        ]);
        if let (None, [images]) = (slab, &at_hand[..]) {
            tensors.insert("images", images.clone());
        }
        if planned.plan.tensor("outputs").is_some() {
            tensors.insert("outputs", gpu.buffer("outputs", len * self.model.classes)?);
        }
        let counter = &tensors["counter"];
        let dispatches = self.bind(split, &at_hand, &tensors, counter, &planned.slots)?;
        let order: Vec<u32> = (0..len as u32).collect();
        if split != Split::Train {
            gpu.write("order", &tensors["order"], &order)?;
        }
        let streamed = match (slab, <[Buffer; 2]>::try_from(at_hand)) {
            (Some(room), Ok(slabs)) => Some(Streamed {
                images: Vec::new(),
                elements,
                order,
                first: 0,
                slabs,
                room,
            }),
            _ => None,
        };
        let resident = Resident {
            len,
            tensors,
            dispatches,
            replicas: Vec::new(),
            streamed,
        };
        Ok(resident)
    }

    /// The kernels of a step on a split, bound to all of its images that are `at_hand`, or to either of two slabs of
    /// them, to a step counter and to memory of the step.
    fn bind(
        &self,
        split: Split,
        at_hand: &[Buffer],
        tensors: &HashMap<&'static str, Buffer>,
        counter: &Buffer,
        slots: &[Buffer],
    ) -> Result<Vec<Vec<Dispatch>>> {
        let (gpu, planned) = (&self.gpu, self.planned(split));
        let options = Options {
            streamed: true,
            ..self.options.clone()
        };
        let mode = match split {
            Split::Train => Mode::Train(self.optimizer),
            Split::Validation | Split::Test => Mode::Evaluate,
        };
        let plan = match at_hand.len() {
            1 => None,
            _ => {
                let (target, batch) = (Target::Gpu(gpu.report()), planned.plan.batch);
                Some(Plan::new(&self.model, batch, mode, &options, target)?)
            }
        };
        // The same but for where its images are.
        let plan = plan.as_ref().unwrap_or(&planned.plan);
        let dispatches = at_hand.iter().map(|images| {
            let dispatches = plan.specs().map(|spec| {
                gpu.dispatch(spec, |argument| {
                    let view = argument.view;
                    let tensor = &plan.tensors[view.tensor];
                    let words = view.dtype.words(view.len).max(1);
                    match (tensor.lifetime, tensor.slot) {
                        (Lifetime::Data, _) if tensor.name == "images" => images.clone(),
                        (Lifetime::Data, _) if tensor.name == "counter" => counter.clone(),
                        // A dataset is longer than a step knows.
                        (Lifetime::Data, _) => tensors[tensor.name.as_str()].clone(),
                        (Lifetime::Kept, _) => self.kept[&tensor.name].slice(view.start, words),
                        (Lifetime::Step, slot) => {
                            let slot = slot.expect("a tensor that a kernel is bound to has memory");
                            let start = view.dtype.words(tensor.offset + view.start);
                            slots[slot].slice(start, words)
                        }
                    }
                })
            });
            dispatches.collect::<Result<Vec<_>>>()
        });
        dispatches.collect()
    }

    /// Makes room for as many shards at a time as the batches of `steps` have.
    fn add_replicas(&mut self, steps: &[Step]) -> Result<()> {
        let (mut row, mut most) = (0, 0);
        while row < steps.len() {
            let rows = batch_from(steps, row);
            most = most.max(rows.len());
            row = rows.end;
        }
        loop {
            let resident = uploaded(self.splits[Split::Train as usize].as_ref())?;
            let replica = resident.replicas.len() + 1;
            if replica >= most {
                return Ok(());
            }
            let counter = &resident.tensors["counter"];
            let counter = counter.slice(replica * PARAMETER_ALIGNMENT, 1);
            let at_hand = match &resident.streamed {
                Some(streamed) => &streamed.slabs[..],
                None => std::slice::from_ref(&resident.tensors["images"]),
            };
            let slots = slots_of(&self.gpu, &self.training.plan).map_err(|e| match e {
                Error::OutOfMemory {
                    label,
                    what,
                    allocated,
                } => Error::OutOfMemory {
                    label,
                    what: format!(
                        "{what} after {}, for shard {} of {most}; {}",
                        BinaryBytes(allocated),
                        replica + 1,
                        self.advice()
                    ),
                    allocated,
                },
                other => other,
            })?;
            let bound = self.bind(Split::Train, at_hand, &resident.tensors, &counter, &slots)?;
            if let Some(resident) = &mut self.splits[Split::Train as usize] {
                resident.replicas.push(bound);
            }
        }
    }

    /// As [`super::Engine::train_epoch`].
    pub fn train_epoch(
        &mut self,
        order: &[u32],
        steps: &[Step],
        progress: StepProgress,
    ) -> Result<Vec<Metrics>> {
        self.begin_epoch(order, steps)?;
        let syncs = self.training.plan.syncs();
        if syncs {
            self.add_replicas(steps)?;
        }
        let resident = uploaded(self.splits[Split::Train as usize].as_ref())?;
        match syncs {
            true => self.run_phases(resident, steps, progress),
            false => self.run(&self.training, resident, steps, progress),
        }
    }

    /// As [`super::Engine::train_shards`].
    pub fn train_shards(
        &mut self,
        order: &[u32],
        steps: &[Step],
        exchange: &mut dyn Exchange,
        progress: StepProgress,
    ) -> Result<Vec<Metrics>> {
        self.begin_epoch(order, steps)?;
        if self.training.plan.syncs() {
            self.add_replicas(steps)?;
        }
        let resident = uploaded(self.splits[Split::Train as usize].as_ref())?;
        self.run_shards(resident, steps, exchange, progress)
    }

    /// Uploads what an epoch goes by.
    fn begin_epoch(&mut self, order: &[u32], steps: &[Step]) -> Result<()> {
        let at = Split::Train as usize;
        let (len, batch) = (
            uploaded(self.splits[at].as_ref())?.len,
            self.training.plan.batch,
        );
        expect_epoch(len, batch, &self.options, order, steps)?;
        if let Some(Resident {
            streamed: Some(streamed),
            ..
        }) = &mut self.splits[at]
        {
            streamed.order.copy_from_slice(order);
            streamed.first = steps.first().map_or(0, |step| step.first as usize);
        }
        let resident = uploaded(self.splits[at].as_ref())?;
        let table = based(steps, &resident.slabs(steps));
        self.gpu.write("order", &resident.tensors["order"], order)?;
        self.gpu
            .write("step table", &resident.tensors["steps"], &table)
    }

    /// As [`super::Engine::evaluate_part`].
    pub fn evaluate(
        &mut self,
        split: Split,
        part: [usize; 2],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Evaluation> {
        let resident = uploaded(self.splits[split as usize].as_ref())?;
        let (len, batch) = (resident.len, self.evaluation.plan.batch);
        let steps = evaluation_steps(len, batch, part);
        let first = steps.first().map_or(0, |step| step.first as usize);
        let last = steps
            .last()
            .map_or(0, |step| (step.first + step.count) as usize);
        if !steps.is_empty() {
            let table = based(&steps, &resident.slabs(&steps));
            self.gpu
                .write("step table", &resident.tensors["steps"], &table)?;
        }
        let mut done = 0;
        let metrics = self.run(&self.evaluation, resident, &steps, &mut |new| {
            done += new.len();
            Ok(progress((done * batch).min(last - first)))
        })?;
        let range = first..last.min(first + metrics.len() * batch);
        let predictions: Vec<u32> = self
            .gpu
            .read("predictions", &resident.tensors["predictions"])?;
        let logits = resident.tensors.get("outputs").map(|outputs| {
            let logits: Vec<f32> = self.gpu.read("outputs", outputs)?;
            let classes = self.model.classes;
            Ok(logits[range.start * classes..range.end * classes].to_vec())
        });
        Ok(Evaluation {
            loss_sum: metrics.iter().map(|m| f64::from(m.loss_sum)).sum(),
            losses: metrics.iter().map(|m| m.loss_sum).collect(),
            first,
            predictions: predictions[range].to_vec(),
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
        let resident = uploaded(self.splits[Split::Train as usize].as_ref())?;
        self.gpu
            .write("step counter", &resident.tensors["counter"], &[0u32])?;
        if let Some(streamed) = &resident.streamed {
            let first = streamed.first;
            let images = first..(first + streamed.room).min(resident.len);
            streamed.upload(&self.gpu, 0, &Slab { rows: 0..1, images })?;
        }
        Ok(resident.dispatches[0].iter().collect())
    }

    /// Carries out a step per row of the step table, a few steps per submission, at most two
    /// submissions ahead of the GPU, and collects the metrics without stalling it. Where images pass
    /// through, those of the next slab follow the first steps on the current one. When `progress` says
    /// break, what is in flight is the end, and the rest of the batch that it ends in.
    fn run(
        &self,
        planned: &Planned,
        resident: &Resident,
        steps: &[Step],
        progress: StepProgress,
    ) -> Result<Vec<Metrics>> {
        let gpu = &self.gpu;
        let slabs = resident.slabs(steps);
        let (mut slab, mut brought) = (0, 0);
        let all_metrics = &resident.tensors["metrics"];
        gpu.write("step counter", &resident.tensors["counter"], &[0u32])?;
        let mut rows = steps.len();
        let mut metrics: Vec<Metrics> = Vec::with_capacity(rows);
        let mut in_flight: std::collections::VecDeque<(Ticket, usize)> = Default::default();
        let mut readback: Option<Readback> = None;
        let (mut submitted, mut completed, mut fetched) = (0, 0, 0);
        // Start with single steps, then as many as fit the time a submission may take.
        let mut per_submission = 1;
        let mut last_wait = Instant::now();
        let mut last_readback = Instant::now();
        while submitted < rows || !in_flight.is_empty() {
            if submitted < rows && in_flight.len() < 2 {
                if brought == slab {
                    resident.bring(gpu, slab, &slabs[slab])?;
                    brought += 1;
                }
                let end = slabs[slab].rows.end.min(rows);
                let repeat = per_submission.min(end - submitted);
                let bound = &resident.dispatches[slab % resident.dispatches.len()];
                let dispatches: Vec<&Dispatch> = (submitted..submitted + repeat)
                    .flat_map(|row| {
                        let updates = ends_batch(steps, row);
                        let parts = planned.plan.kernels.iter().zip(bound);
                        let wanted =
                            parts.filter(move |((part, _), _)| updates || !part.ends_batch());
                        wanted.map(|(_, dispatch)| dispatch)
                    })
                    .collect();
                let ticket = gpu.submit("step", &dispatches, 1)?;
                submitted += repeat;
                in_flight.push_back((ticket, repeat));
                if brought == slab + 1 && brought < slabs.len() {
                    resident.bring(gpu, brought, &slabs[brought])?;
                    brought += 1;
                }
                if submitted == slabs[slab].rows.end {
                    slab += 1;
                }
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
                let ends = |row: &usize| *row == 0 || ends_batch(steps, row - 1);
                rows = (submitted..rows).find(ends).unwrap_or(rows);
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

    /// Carries out batches phase by phase, for plans whose kernels need all shards at a time, at most two batches
    /// ahead of what `progress` hears.
    fn run_phases(
        &self,
        resident: &Resident,
        steps: &[Step],
        progress: StepProgress,
    ) -> Result<Vec<Metrics>> {
        let (gpu, plan) = (&self.gpu, &self.training.plan);
        let phases = plan.phases();
        let mut images = Images::of(gpu, resident, steps);
        let all_metrics = &resident.tensors["metrics"];
        let mut feed = Feed::new(gpu, plan.kernels.len());
        let mut all: Vec<Metrics> = Vec::with_capacity(steps.len());
        let mut before: Option<Readback> = None;
        let (mut next, mut stops) = (0, false);
        while next < steps.len() && !stops {
            let rows = batch_from(steps, next);
            next = rows.end;
            self.set_counters(resident, rows.clone())?;
            for (number, phase) in phases.iter().enumerate() {
                for (replica, row) in rows.clone().enumerate() {
                    // The first one looks at the images.
                    if number == 0 && images.lack(row) {
                        feed.flush()?;
                        images.bring()?;
                    }
                    feed.push(&images.bound(replica)[phase.of_shards.clone()])?;
                }
                feed.push(&images.bound(0)[phase.of_batch.clone()])?;
            }
            feed.flush()?;
            let new = all_metrics.slice(2 * rows.start, 2 * rows.len());
            let new = gpu.start_readback("metrics", &new)?;
            if let Some(before) = before.replace(new) {
                let new: Vec<Metrics> = before.finish(gpu)?;
                stops = progress(&new)?.is_break();
                all.extend(new);
            }
        }
        if let Some(before) = before {
            let new: Vec<Metrics> = before.finish(gpu)?;
            let _ = progress(&new)?;
            all.extend(new);
        }
        Ok(all)
    }

    /// Has each of these rows be the current one of a shard that is under way.
    fn set_counters(&self, resident: &Resident, rows: Range<usize>) -> Result<()> {
        let mut counters = vec![0; PARAMETER_ALIGNMENT * (rows.len() - 1) + 1];
        for (replica, row) in rows.enumerate() {
            counters[PARAMETER_ALIGNMENT * replica] = row as u32;
        }
        let buffer = &resident.tensors["counter"];
        self.gpu.write("step counter", buffer, &counters)
    }

    /// Carries out batches of which other processes compute some shards, with an exchange in each that the update waits
    /// for.
    fn run_shards(
        &self,
        resident: &Resident,
        steps: &[Step],
        exchange: &mut dyn Exchange,
        progress: StepProgress,
    ) -> Result<Vec<Metrics>> {
        let (gpu, plan) = (&self.gpu, &self.training.plan);
        let mut images = Images::of(gpu, resident, steps);
        let of = |bound, wanted: &dyn Fn(Section) -> bool| -> Vec<&Dispatch> {
            let kernels = plan.kernels.iter().zip(bound);
            let wanted = kernels.filter(|((section, _), _)| wanted(*section));
            wanted.map(|(_, dispatch)| dispatch).collect()
        };
        let mut all: Vec<Metrics> = Vec::with_capacity(steps.len());
        let mut last: Option<Ticket> = None;
        while all.len() < steps.len() {
            let rows = batch_from(steps, all.len());
            let mut together = rows.clone();
            if !plan.syncs() {
                // Shards that have only their sums in common come one after the other.
                self.set_counters(resident, rows.start..rows.start + 1)?;
                together = rows.end - 1..rows.end;
                for row in rows.start..together.start {
                    if images.lack(row) {
                        images.bring()?;
                    }
                    let shard = of(images.bound(0), &|section| {
                        section < Section::Exchange || section == Section::Advance
                    });
                    // Two of them are under way at most.
                    if let Some(last) = last.replace(gpu.submit("step", &shard, 1)?) {
                        gpu.wait(&last)?;
                    }
                }
            } else {
                self.set_counters(resident, rows.clone())?;
            }
            let metrics = resident.tensors["metrics"].slice(2 * rows.start, 2 * rows.len());
            let row = &steps[rows.end - 1];
            let metrics = self.exchange(row, together, &mut images, &metrics, exchange)?;
            let update = of(images.bound(0), &|section| section == Section::Update);
            last = Some(gpu.submit("step", &update, 1)?);
            let stops = progress(&metrics)?.is_break();
            all.extend(metrics);
            if stops {
                break;
            }
        }
        if let Some(last) = last {
            gpu.wait(&last)?;
        }
        Ok(all)
    }

    /// Computes the shards of these rows phase by phase, of which `row` is the last, and exchanges what a batch makes
    /// here while the rest is computed. Gives the batch's metrics.
    fn exchange(
        &self,
        row: &Step,
        rows: Range<usize>,
        images: &mut Images,
        metrics: &Buffer,
        exchange: &mut dyn Exchange,
    ) -> Result<Vec<Metrics>> {
        let (gpu, plan) = (&self.gpu, &self.training.plan);
        let (nodes, shards) = (own_nodes(row), own_shards(row));
        let submit = |dispatches: &[Dispatch]| -> Result<()> {
            let dispatches: Vec<&Dispatch> = dispatches.iter().collect();
            gpu.submit("step", &dispatches, 1).map(drop)
        };
        let mut under_way = SlabsUnderWay::default();
        for (number, phase) in plan.phases().into_iter().enumerate() {
            for (replica, row) in rows.clone().enumerate() {
                if number == 0 && images.lack(row) {
                    images.bring()?;
                }
                // A row of no shard is there for the update alone.
                if !nodes.is_empty() {
                    submit(&images.bound(replica)[phase.of_shards.clone()])?;
                }
            }
            let kernels = phase.of_batch.clone();
            let specs = plan.kernels[kernels.clone()].iter();
            let views: Vec<View> = specs.filter_map(|(_, spec)| spec.of_shards()).collect();
            if !views.is_empty() {
                let len = |view: View| view.len / self.options.shards.unwrap_or(1);
                let mut own = Vec::new();
                for view in &views {
                    let rows = &self.kept[&plan.tensors[view.tensor].name];
                    let rows = rows.slice(shards.start * len(*view), shards.len() * len(*view));
                    let some = !shards.is_empty();
                    own.push(
                        some.then(|| gpu.start_readback("shards", &rows))
                            .transpose()?,
                    );
                }
                // While the device computes this phase.
                under_way.exchange(gpu, row, exchange)?;
                for (view, own) in views.iter().zip(own) {
                    let own = own.map_or(Ok(Vec::new()), |own| own.finish(gpu))?;
                    let all = exchange.rows(row, len(*view), &own)?;
                    let rows = &self.kept[&plan.tensors[view.tensor].name];
                    gpu.write("shards", &rows.slice(0, all.len()), &all)?;
                }
                submit(&images.bound(0)[kernels])?;
            }
            for slab in &plan.slabs[phase.slabs.clone()] {
                let sums = self.start_nodes(&slab.tensor, slab.range.len(), &nodes)?;
                under_way.coming.push((slab.range.clone(), sums));
            }
        }
        let len = match self.kept.contains_key(SHARD_STATISTICS) {
            true => self.len_of("running"),
            false => 0,
        };
        let statistics = self.start_nodes(SHARD_STATISTICS, len, &nodes)?;
        let metrics = gpu.start_readback("metrics", metrics)?;
        let (metrics, running) = std::thread::scope(|scope| {
            // Nothing else says when the device is through while slabs are exchanged.
            let computed = scope.spawn(|| {
                let metrics = metrics.finish::<Metrics>(gpu);
                (metrics, Instant::now())
            });
            under_way.exchange(gpu, row, exchange)?;
            let (metrics, computed) = computed.join().map_err(|_| Error::Gpu {
                label: "metrics".into(),
                what: "the thread that waited for them failed".into(),
            })?;
            let (metrics, statistics) = (metrics?, arrived(gpu, statistics)?);
            let running = exchange.statistics(row, len, &statistics, &metrics, computed)?;
            Ok::<_, Error>((metrics, running))
        })?;
        for (range, sum) in under_way.sums {
            let place = self.kept["accumulated"].slice(range.start, range.len());
            gpu.write("gradients", &place, &sum)?;
        }
        if len > 0 {
            gpu.write("running statistics", &self.kept["running"], &running)?;
        }
        Ok(metrics)
    }

    /// Has the sums over shards that a kept tensor of rows of `len` holds sent to the host.
    fn start_nodes(&self, tensor: &str, len: usize, nodes: &[Node]) -> Result<Vec<Readback>> {
        let Some(rows) = self.kept.get(tensor) else {
            return Ok(Vec::new());
        };
        let levels = levels(self.options.shards.unwrap_or(1));
        let nodes = nodes.iter().map(|node| {
            let node = rows.slice(node.row(levels) * len, len);
            self.gpu.start_readback("sums over shards", &node)
        });
        nodes.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slabs_hold_steps_on_end() {
        let steps = |places: &[[usize; 2]]| -> Vec<Step> {
            let steps = places
                .iter()
                .map(|[first, count]| Step::new(*first, *count));
            steps.collect()
        };
        let cut = |places: &[[usize; 2]], room| -> Vec<[usize; 4]> {
            let slabs = slabs(&steps(places), room).into_iter();
            slabs
                .map(|s| [s.rows.start, s.rows.end, s.images.start, s.images.end])
                .collect()
        };
        let epoch = [[6, 3], [9, 3], [12, 3], [15, 2]];
        assert_eq!(cut(&epoch, 6), [[0, 2, 6, 12], [2, 4, 12, 17]]);
        assert_eq!(cut(&epoch, 11), [[0, 4, 6, 17]]);
        assert_eq!(cut(&epoch, 10), [[0, 3, 6, 15], [3, 4, 15, 17]]);
        assert_eq!(cut(&epoch, 3).len(), 4);
        // Back to the start, and over the same images again.
        let again = [[0, 4], [0, 4], [2, 1], [1, 4], [0, 4]];
        assert_eq!(cut(&again, 4), [[0, 3, 0, 4], [3, 4, 1, 5], [4, 5, 0, 4]]);
        assert!(cut(&[], 4).is_empty());
        let table = based(&steps(&epoch), &slabs(&steps(&epoch), 6));
        let bases: Vec<u32> = table.iter().map(|step| step.base).collect();
        assert_eq!(bases, [6, 6, 12, 12]);
    }
}
