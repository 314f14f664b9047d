//! Steps on the CPU: what trains where there is no GPU.

use super::{
    Evaluation, Exchange, Split, StepProgress, batch_from, ends_batch, evaluation_steps,
    expect_dataset, expect_epoch, expect_len, most_rows, own_nodes, own_shards, uploaded,
};
use crate::cpu::{Memory, Values, fast};
use crate::error::Result;
use crate::kernels::half::LOSS_SCALE;
use crate::kernels::shards::{Node, levels};
use crate::kernels::{Dtype, Metrics, Step, View};
use crate::model::recipe::{Optimizer, Precision, Views};
use crate::model::{Model, initial_running};
use crate::plan::{self, Lifetime, Mode, Options, Phase, Plan, SHARD_STATISTICS, Section, Target};
use std::collections::HashMap;
use std::ops::{ControlFlow, Range};
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

/// A network on the CPU.
///
/// A batch that is not full has a plan of its own, for as many samples as it has.
pub struct CpuEngine {
    model: Model,
    batch: usize,
    optimizer: Optimizer,
    options: Options,
    plans: Vec<(Key, Planned)>,
    /// The tensors of all plans; those that are kept, and the memory of the steps, are the same ones.
    memory: Memory<f32>,
    /// Where in the memory the tensors of these names are.
    places: HashMap<String, usize>,
    scratch: fast::Scratch,
    /// By [`Split`].
    splits: [Option<Samples>; 3],
}

/// Whether a plan trains, and its batch.
type Key = (bool, usize);

struct Planned {
    plan: Plan,
    /// Of its tensors in the memory, where several shards of a batch are under way for each.
    places: Vec<Vec<usize>>,
    phases: Vec<Phase>,
}

/// A batch of the training split.
struct Batch<'a> {
    steps: &'a [Step],
    rows: Range<usize>,
    /// Of each row.
    plans: &'a [usize],
    /// The split's tensors.
    data: &'a HashMap<&'static str, usize>,
}

/// What goes to other processes.
enum Made {
    /// The sums over the shards here of a part of the gradients.
    Slab(Range<usize>, Vec<Vec<f32>>),
    /// Vectors of so many elements, of each shard here, and where those of all shards go.
    Rows(usize, Vec<f32>, Sender<Vec<f32>>),
}

/// A split of the dataset: how many samples, and its tensors.
struct Samples {
    len: usize,
    tensors: HashMap<&'static str, usize>,
}

impl CpuEngine {
    /// An engine for `model` with all parameters zero.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn new(
        model: &Model,
        batch: usize,
        optimizer: &Optimizer,
        options: &Options,
    ) -> Result<CpuEngine> {
        let mut engine = CpuEngine {
            model: model.clone(),
            batch,
            optimizer: *optimizer,
            options: options.clone(),
            plans: Vec::new(),
            memory: Memory::default(),
            places: HashMap::new(),
            scratch: fast::Scratch::default(),
            splits: [None, None, None],
        };
        let first = match options.evaluates_only {
            true => (false, engine.batch_of(Split::Test)),
            false => (true, batch),
        };
        engine.plan(first)?;
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

    /// The CPU in one line, for people.
    pub fn device() -> String {
        let threads = rayon::current_num_threads();
        let s = if threads == 1 { "" } else { "s" };
        format!("CPU ({threads} thread{s})")
    }

    /// As [`super::Engine::with_views`].
    pub(super) fn with_views(&self, views: Views) -> Result<CpuEngine> {
        let options = Options {
            views,
            average: false,
            ..self.options.clone()
        };
        CpuEngine::new(&self.model, self.batch, &self.optimizer, &options)
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

    pub(super) fn kept(&self, name: &'static str) -> Vec<f32> {
        match self
            .places
            .get(name)
            .map(|place| &self.memory.values[*place])
        {
            Some(Values::Floats(values)) => values.clone(),
            _ => Vec::new(),
        }
    }

    pub(super) fn set_kept(&mut self, name: &'static str, values: &[f32]) -> Result<()> {
        let place = self.places.get(name).copied();
        let Some(Values::Floats(kept)) = place.map(|place| &mut self.memory.values[place]) else {
            return expect_len(name, "values", 0, values.len());
        };
        expect_len(name, "values", kept.len(), values.len())?;
        kept.copy_from_slice(values);
        Ok(())
    }

    pub(super) fn averages(&self) -> bool {
        self.options.average
    }

    pub(super) fn scales_loss(&self) -> bool {
        self.options.precision == Precision::Mixed && !self.options.evaluates_only
    }

    /// Exchanges two vectors that are kept.
    pub(super) fn swap(&mut self, [one, other]: [&'static str; 2]) -> Result<()> {
        self.memory
            .values
            .swap(self.places[one], self.places[other]);
        Ok(())
    }

    /// Most samples of a step on this split: of an evaluation's, as many as training takes, each in all views.
    fn batch_of(&self, split: Split) -> usize {
        match split {
            Split::Train => self.batch,
            _ => (self.batch / self.options.views.count()).max(1),
        }
    }

    /// Where the plan stands in the list of plans.
    fn plan(&mut self, key: Key) -> Result<usize> {
        if let Some(at) = self.plans.iter().position(|(other, _)| *other == key) {
            return Ok(at);
        }
        let (trains, batch) = key;
        let mode = match trains {
            true => Mode::Train(self.optimizer),
            false => Mode::Evaluate,
        };
        let plan = Plan::new(&self.model, batch, mode, &self.options, Target::Cpu)?;
        let places = vec![self.places_of(&plan, 0)];
        let phases = plan.phases();
        let planned = Planned {
            plan,
            places,
            phases,
        };
        self.plans.push((key, planned));
        Ok(self.plans.len() - 1)
    }

    /// The places of a plan's tensors for the shard of that number among those that are under way.
    fn places_of(&mut self, plan: &Plan, replica: usize) -> Vec<usize> {
        let mut places = Vec::with_capacity(plan.tensors.len());
        for tensor in &plan.tensors {
            let len = tensor.elements();
            places.push(match (tensor.lifetime, tensor.slot) {
                // The split that is at hand is put in its place.
                (Lifetime::Data, _) | (Lifetime::Step, None) => usize::MAX,
                (Lifetime::Kept, _) => self.place(tensor.name.clone(), tensor.dtype, len),
                (Lifetime::Step, Some(slot)) => {
                    let like = plan.slots[..slot]
                        .iter()
                        .filter(|s| s.dtype == tensor.dtype);
                    let name = format!("{:?} slot {}.{replica}", tensor.dtype, like.count());
                    self.place(name, tensor.dtype, plan.slots[slot].elements)
                }
            });
        }
        places
    }

    /// Makes a plan the current one, for the shard of that number among those that are under way, and a row of the step
    /// table.
    fn enter(
        &mut self,
        at: usize,
        replica: usize,
        row: usize,
        data: &HashMap<&'static str, usize>,
    ) {
        self.memory.values[data["counter"]] = Values::Words(vec![row as u32]);
        while self.plans[at].1.places.len() <= replica {
            let plan = self.plans[at].1.plan.clone();
            let places = self.places_of(&plan, self.plans[at].1.places.len());
            self.plans[at].1.places.push(places);
        }
        let (_, planned) = &self.plans[at];
        self.memory.places.clone_from(&planned.places[replica]);
        let offsets = planned.plan.tensors.iter().map(|tensor| tensor.offset);
        self.memory.offsets = offsets.collect();
        for (tensor, place) in planned.plan.tensors.iter().zip(&mut self.memory.places) {
            if let Some(data) = data.get(tensor.name.as_str()) {
                *place = *data;
            }
        }
    }

    /// The place of that name, of at least `len` elements.
    fn place(&mut self, name: String, dtype: Dtype, len: usize) -> usize {
        let values = &mut self.memory.values;
        let place = *self.places.entry(name).or_insert_with(|| {
            values.push(Values::zeros(dtype, 0));
            values.len() - 1
        });
        values[place].grow(len);
        place
    }

    pub(super) fn upload_dataset(
        &mut self,
        split: Split,
        images: Vec<u8>,
        labels: &[u32],
        normalization: &[f32],
    ) -> Result<()> {
        expect_dataset(&self.model, &images, labels, normalization)?;
        let len = labels.len();
        let steps = most_rows(len, self.batch_of(split), &self.options);
        // Another split takes the place of one that was there.
        let old = self.splits[split as usize]
            .take()
            .map(|samples| samples.tensors)
            .unwrap_or_default();
        let mut put = |name: &'static str, values: Values<f32>| match old.get(name) {
            Some(place) => {
                self.memory.values[*place] = values;
                (name, *place)
            }
            None => {
                self.memory.values.push(values);
                (name, self.memory.values.len() - 1)
            }
        };
        let words = |len: usize| Values::Words(vec![0; len]);
        let tensors = [
            put("images", Values::Bytes(images)),
            put("labels", Values::Words(labels.to_vec())),
            put("normalization", Values::Floats(normalization.to_vec())),
            put("order", Values::Words((0..len as u32).collect())),
            put("steps", words(0)),
            put("counter", words(1)),
            put("metrics", words(2 * steps)),
            put("predictions", words(len)),
        ];
        let mut tensors: HashMap<_, _> = tensors.into_iter().collect();
        if self.options.keep_logits && split != Split::Train {
            let values = Values::zeros(Dtype::F32, len * self.model.classes);
            tensors.extend([put("outputs", values)]);
        }
        self.splits[split as usize] = Some(Samples { len, tensors });
        Ok(())
    }

    pub(super) fn take_images(&mut self, split: Split) -> Result<Vec<u8>> {
        let place = uploaded(self.splits[split as usize].as_ref())?.tensors["images"];
        self.splits[split as usize] = None;
        Ok(
            match std::mem::replace(&mut self.memory.values[place], Values::Bytes(Vec::new())) {
                Values::Bytes(images) => images,
                _ => unreachable!("images are bytes"),
            },
        )
    }

    pub(super) fn train_epoch(
        &mut self,
        order: &[u32],
        steps: &[Step],
        progress: StepProgress,
    ) -> Result<Vec<Metrics>> {
        let samples = uploaded(self.splits[Split::Train as usize].as_ref())?;
        expect_epoch(samples.len, self.batch, &self.options, order, steps)?;
        let place = samples.tensors["order"];
        self.memory.values[place] = Values::Words(order.to_vec());
        match self.plans[0].1.plan.syncs() {
            true => self.run_phases(steps, None, progress),
            false => self.run(Split::Train, steps, progress),
        }
    }

    /// As [`super::Engine::train_shards`].
    pub(super) fn train_shards(
        &mut self,
        order: &[u32],
        steps: &[Step],
        exchange: &mut dyn Exchange,
        progress: StepProgress,
    ) -> Result<Vec<Metrics>> {
        let samples = uploaded(self.splits[Split::Train as usize].as_ref())?;
        expect_epoch(samples.len, self.batch, &self.options, order, steps)?;
        let place = samples.tensors["order"];
        self.memory.values[place] = Values::Words(order.to_vec());
        self.run_phases(steps, Some(exchange), progress)
    }

    pub(super) fn evaluate(
        &mut self,
        split: Split,
        part: [usize; 2],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Evaluation> {
        let len = uploaded(self.splits[split as usize].as_ref())?.len;
        let steps = evaluation_steps(len, self.batch_of(split), part);
        let first = steps.first().map_or(0, |step| step.first as usize);
        let (mut done, mut losses) = (0, Vec::new());
        self.run(split, &steps, &mut |new| {
            for metrics in new {
                done += steps[losses.len()].count as usize;
                losses.push(metrics.loss_sum);
            }
            Ok(progress(done))
        })?;
        let predictions = self.words(split, "predictions")[first..first + done].to_vec();
        let outputs = uploaded(self.splits[split as usize].as_ref())?
            .tensors
            .get("outputs");
        let logits = outputs.map(|place| match &self.memory.values[*place] {
            Values::Floats(values) => {
                let classes = self.model.classes;
                values[first * classes..(first + done) * classes].to_vec()
            }
            _ => Vec::new(),
        });
        Ok(Evaluation {
            loss_sum: losses.iter().map(|loss| f64::from(*loss)).sum(),
            losses,
            first,
            predictions,
            logits,
        })
    }

    /// Carries out `steps` on a split, until `progress` says break and a batch ends.
    fn run(
        &mut self,
        split: Split,
        steps: &[Step],
        progress: StepProgress,
    ) -> Result<Vec<Metrics>> {
        let data = self.begin(split, steps)?;
        let mut all = Vec::with_capacity(steps.len());
        let mut stops = false;
        for (row, step) in steps.iter().enumerate() {
            let at = self.plan((split == Split::Train, step.count as usize))?;
            self.enter(at, 0, row, &data);
            let updates = ends_batch(steps, row);
            self.carry_out(at, 0..usize::MAX, |section| {
                updates || !section.ends_batch()
            });
            let metrics = self.metrics(split, row..row + 1);
            stops |= progress(&metrics)?.is_break();
            all.extend(metrics);
            if stops && updates {
                break;
            }
        }
        Ok(all)
    }

    /// Puts a table of steps in its place, and gives those of the split's tensors.
    fn begin(&mut self, split: Split, steps: &[Step]) -> Result<HashMap<&'static str, usize>> {
        let data = uploaded(self.splits[split as usize].as_ref())?
            .tensors
            .clone();
        self.memory.values[data["steps"]] = Values::Words(bytemuck::cast_slice(steps).to_vec());
        Ok(data)
    }

    fn metrics(&self, split: Split, rows: Range<usize>) -> Vec<Metrics> {
        let metrics = &self.words(split, "metrics")[2 * rows.start..2 * rows.end];
        bytemuck::cast_slice(metrics).to_vec()
    }

    /// Those among some kernels of the plan `at`, the current one, that are of the wanted sections.
    fn carry_out(&mut self, at: usize, kernels: Range<usize>, wanted: impl Fn(Section) -> bool) {
        let all = &self.plans[at].1.plan.kernels;
        let kernels = &all[kernels.start..kernels.end.min(all.len())];
        for (_, spec) in kernels.iter().filter(|(section, _)| wanted(*section)) {
            fast::run(spec, &mut self.memory, &self.scratch);
        }
    }

    /// Carries out batches of the training split phase by phase, for plans whose kernels need all shards at a time, and
    /// where there is something to `exchange` in each.
    fn run_phases(
        &mut self,
        steps: &[Step],
        mut exchange: Option<&mut dyn Exchange>,
        progress: StepProgress,
    ) -> Result<Vec<Metrics>> {
        let split = Split::Train;
        let data = self.begin(split, steps)?;
        let mut all = Vec::with_capacity(steps.len());
        while all.len() < steps.len() {
            let rows = batch_from(steps, all.len());
            let plans = steps[rows.clone()].iter();
            let plans: Vec<usize> = plans
                .map(|step| self.plan((true, step.count as usize)))
                .collect::<Result<_>>()?;
            let batch = Batch {
                steps,
                rows: rows.clone(),
                plans: &plans,
                data: &data,
            };
            match &mut exchange {
                Some(exchange) => self.exchange(&batch, *exchange)?,
                None => {
                    self.compute(&batch, None);
                }
            }
            self.enter(plans[0], 0, rows.start, &data);
            self.carry_out(plans[0], 0..usize::MAX, |section| {
                section == Section::Update
            });
            let metrics = self.metrics(split, rows);
            let flow = progress(&metrics)?;
            all.extend(metrics);
            if flow.is_break() {
                break;
            }
        }
        Ok(all)
    }

    /// Computes a batch up to its update, or to the exchange of what is made here, which hears of it meanwhile. Says
    /// when that was; nothing where nobody hears any more.
    fn compute(&mut self, batch: &Batch, made: Option<&Sender<Made>>) -> Option<Instant> {
        let Batch { rows, plans, .. } = batch;
        let last = &batch.steps[rows.end - 1];
        let nodes = own_nodes(last);
        // Those for shards of other sizes have the same ones.
        let (plan, phases) = (plans[0], self.plans[plans[0]].1.phases.len());
        // Shards that have only their sums in common come one after the other.
        let before = match self.plans[plan].1.plan.syncs() {
            true => 0,
            false => rows.len() - 1,
        };
        let shards = || rows.clone().zip(*plans);
        for (row, at) in shards().take(before) {
            self.enter(*at, 0, row, batch.data);
            self.carry_out(*at, 0..usize::MAX, |section| section < Section::Exchange);
        }
        for phase in 0..phases {
            // A row of no shard is there for the update alone.
            let shards = shards().skip(before).filter(|_| !nodes.is_empty());
            for (replica, (row, at)) in shards.enumerate() {
                self.enter(*at, replica, row, batch.data);
                let kernels = self.plans[*at].1.phases[phase].of_shards.clone();
                self.carry_out(*at, kernels, |_| true);
            }
            self.enter(plan, 0, rows.start, batch.data);
            let Phase {
                of_batch, slabs, ..
            } = self.plans[plan].1.phases[phase].clone();
            if let Some(made) = made {
                self.gather(plan, of_batch.clone(), last, made)?;
            }
            self.carry_out(plan, of_batch, |section| {
                section == Section::Sync || section == Section::Exchange && made.is_none()
            });
            if let Some(made) = made {
                for slab in &self.plans[plan].1.plan.slabs[slabs] {
                    let sums = self.nodes(&slab.tensor, slab.range.len(), &nodes);
                    made.send(Made::Slab(slab.range.clone(), sums)).ok()?;
                }
            }
        }
        Some(Instant::now())
    }

    /// Completes, from other processes, what some kernels take of all shards.
    fn gather(
        &mut self,
        at: usize,
        kernels: Range<usize>,
        row: &Step,
        made: &Sender<Made>,
    ) -> Option<()> {
        let specs = self.plans[at].1.plan.kernels[kernels].iter();
        let views: Vec<View> = specs.filter_map(|(_, spec)| spec.of_shards()).collect();
        for view in views {
            let len = view.len / self.options.shards.unwrap_or(1);
            let own = own_shards(row);
            let own = &self.memory.floats(view)[own.start * len..own.end * len];
            let (sender, all) = channel();
            made.send(Made::Rows(len, own.to_vec(), sender)).ok()?;
            let all = all.recv().ok()?;
            self.memory.change_floats(view, |_, rows| {
                rows[..all.len()].copy_from_slice(&all);
            });
        }
        Some(())
    }

    /// The sums over shards that a kept tensor of rows of `len` holds, where there is one.
    fn nodes(&self, tensor: &str, len: usize, nodes: &[Node]) -> Vec<Vec<f32>> {
        let levels = levels(self.options.shards.unwrap_or(1));
        let place = self.places.get(tensor);
        let Some(Values::Floats(values)) = place.map(|place| &self.memory.values[*place]) else {
            return Vec::new();
        };
        let nodes = nodes.iter().map(|node| node.row(levels) * len);
        nodes.map(|start| values[start..][..len].to_vec()).collect()
    }

    /// Computes a batch's shards here, and exchanges what they make while the rest is computed.
    fn exchange(&mut self, batch: &Batch, exchange: &mut dyn Exchange) -> Result<()> {
        let row = &batch.steps[batch.rows.end - 1];
        let (sender, made) = channel();
        let engine = &mut *self;
        // MPI wants to be called from the thread that started it, so the other one computes.
        let (sums, computed) = std::thread::scope(|scope| {
            let computing = scope.spawn(move || engine.compute(batch, Some(&sender)));
            let mut sums = Vec::new();
            for made in made {
                match made {
                    Made::Slab(slab, nodes) => sums.push(exchange.gradients(row, &slab, &nodes)?),
                    Made::Rows(len, own, all) => {
                        // Who asked for them waits, unless it is gone.
                        let _ = all.send(exchange.rows(row, len, &own)?);
                    }
                }
            }
            match computing.join() {
                Ok(computed) => Ok((sums, computed.unwrap_or_else(Instant::now))),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })?;
        let len = self.statistics_len();
        let statistics = self.nodes(SHARD_STATISTICS, len, &own_nodes(row));
        let metrics = self.metrics(Split::Train, batch.rows.clone());
        let running = exchange.statistics(row, len, &statistics, &metrics, computed)?;
        // The slabs go from the end to the beginning.
        let gradients: Vec<f32> = sums.into_iter().rev().flatten().collect();
        self.set_kept("accumulated", &gradients)?;
        match len {
            0 => Ok(()),
            _ => self.set_kept("running", &running),
        }
    }

    /// How many running statistics are exchanged.
    fn statistics_len(&self) -> usize {
        match self.places.contains_key(SHARD_STATISTICS) {
            true => self.model.running_elements,
            false => 0,
        }
    }

    /// A tensor of words of a split that was uploaded.
    fn words(&self, split: Split, name: &'static str) -> &[u32] {
        let samples = self.splits[split as usize].as_ref();
        let place = samples.map(|samples| samples.tensors[name]);
        match place.map(|place| &self.memory.values[place]) {
            Some(Values::Words(words)) => words,
            _ => &[],
        }
    }

    /// Bytes that training `model` on the CPU takes at most, the dataset aside: the plan's memory, what
    /// its faster functions take for themselves, and the copies that a checkpoint is written from.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn memory(
        model: &Model,
        batch: usize,
        optimizer: &Optimizer,
        options: &Options,
    ) -> Result<u64> {
        let mode = Mode::Train(*optimizer);
        let plan = Plan::new(model, batch, mode, options, Target::Cpu)?;
        let held: u64 = plan.memory().iter().map(|(_, bytes)| bytes).sum();
        // The twins hold halves as floats.
        let halves = plan.slots.iter().filter(|slot| slot.dtype == Dtype::F16);
        let halves = halves.map(|slot| 2 * slot.elements as u64).sum::<u64>();
        let held = held + halves * plan.replicas as u64;
        let scratch = plan.specs().map(fast::scratch_bytes).max().unwrap_or(0);
        let kept = 1 + optimizer.state_vectors() as u64 + u64::from(options.average);
        let parameters = 4 * model.parameter_elements as u64;
        // Of a checkpoint: a copy of what is kept, and its bytes as they are written.
        Ok(held + scratch + 3 * kept * parameters)
    }
}
