//! What a step does, as data: named tensors and a list of kernels. Nothing here needs a device, so that a
//! plan can be printed, counted, checked and tested on any machine.
//!
//! ```text
//! model ──► gather, forward, loss, backward, update ──► fused ──► tiles ──► memory ──► checked
//!           (forward.rs, backward.rs)                   (fuse.rs)           (memory.rs)  (check.rs)
//! ```

mod backward;
mod check;
mod forward;
mod fuse;
mod memory;
mod norm;
mod print;
#[cfg(test)]
mod tests;
mod update;

pub use check::{expect_batch, most_samples};
pub use memory::Slot;
pub use update::factors;

use crate::error::{Error, Result};
use crate::host::batch_advice;
use crate::kernels::conv2d::{Family, Pass, Product, Tile};
use crate::kernels::mix::{self, Mix};
use crate::kernels::{
    Access, AdapterReport, Dtype, KernelSpec, STEP_ELEMENTS, View, Work, augment, gather, loss,
    outputs, reduce, shards, step, views,
};
use crate::model::augment::Augment;
use crate::model::recipe::{ClassWeights, Groups, Optimizer, Precision, Recipe, Views};
use crate::model::{Factors, Layer, Loss, Model, Shape};
use check::expect_samples;
use std::collections::HashMap;
use std::ops::Range;

/// What a plan is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// A training step by this rule.
    Train(Optimizer),
    /// Loss and predictions; needs neither gradients nor optimiser state.
    Evaluate,
}

/// What a plan is made for.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// The shaders, on such an adapter.
    Gpu(&'a AdapterReport),
    /// Their twins.
    Cpu,
}

/// How a plan is made.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Kernel family to use instead of the one that suits the adapter.
    pub family: Option<Family>,
    /// Store the im2col matrix instead of computing its index in the product.
    pub explicit_conv: bool,
    /// Every kernel by itself, none computed along by the one before it.
    pub unfused: bool,
    /// Every tensor in memory of its own, for those who look at it after each kernel.
    pub unshared: bool,
    /// Choices of tile that were made before (by an earlier run or by measurement); used for the
    /// products they fit, in place of the built-in choice. The result's bits do not depend on them.
    pub choices: Vec<Product>,
    /// Whether an evaluation takes larger batches than a training step, as many samples as fit into
    /// the step's memory. Chosen by the adapter unless given: a GPU is better filled that way, a
    /// software adapter gains nothing and would have to compile the forward pass twice.
    pub large_evaluation: Option<bool>,
    /// How much of the target of softmax cross-entropy is spread over all classes while training, from 0
    /// to 1. An evaluation gives the plain loss whatever it was trained by.
    pub label_smoothing: f32,
    /// Whether an evaluation keeps the logits of all samples, not their predictions alone.
    pub keep_logits: bool,
    /// Whether nothing is trained: an engine then plans and takes memory for evaluations alone.
    pub evaluates_only: bool,
    /// What a training sample of each class counts in softmax cross-entropy, `[classes]`; 1 without.
    pub class_weights: Option<Vec<f32>>,
    /// How training images are changed at random; an evaluation shows them as they are.
    pub augment: Augment,
    /// In which views an evaluation shows each image; training steps show one. No part of what a recipe
    /// has to say here: while a network is trained it is evaluated as it is, often.
    pub views: Views,
    /// Whether the images on the device are those of a slab, in the epoch's order from the row's
    /// [`crate::kernels::Step::base`] on, instead of all of a split.
    pub streamed: bool,
    /// Most bytes of images on the device at a time: a split that has more is streamed in slabs of so
    /// many (of one batch at least). Unless given, what the adapter holds is kept there. The CPU has
    /// all images at hand and takes no slabs.
    pub slab_bytes: Option<u64>,
    /// Whether a step may be a part of a batch: gradients of all parts are added up before the update.
    pub micro: bool,
    /// Into how many shards a batch is cut at most; the gradients of all are added up by a fixed tree, and so are the
    /// running statistics that each leads to. Goes with `micro`.
    pub shards: Option<usize>,
    /// Whether other processes compute some of the shards.
    pub spread: bool,
    /// Elements of the gradients that other processes are sent at a time, at least; unless given, 1 MiB of them or an
    /// eighth of all.
    pub slab_elements: Option<usize>,
    /// Whether a batch-norm takes its statistics of all shards of a batch together.
    pub sync_batch_norm: bool,
    /// How the parameters of one role or place are trained differently from the rest.
    pub groups: Groups,
    /// Largest L2 norm of all gradients together; a larger one is scaled down to it.
    pub clip_norm: Option<f32>,
    /// Whether a moving average of the parameters and the running statistics is kept.
    pub average: bool,
    /// What activations are stored and computed on as.
    pub precision: Precision,
    /// The recipe's learning rate, by which that of what Muon does not take is measured; the same as that
    /// without.
    pub lr: Option<f64>,
}

impl Options {
    /// With what a recipe has to say, and defaults for the rest.
    pub fn of(recipe: &Recipe) -> Options {
        Options {
            label_smoothing: recipe.label_smoothing,
            class_weights: match &recipe.class_weights {
                Some(ClassWeights::Given(weights)) => Some(weights.clone()),
                // What balances a dataset's classes is known when the dataset is.
                _ => None,
            },
            augment: recipe.augment,
            micro: recipe.step_batch() < recipe.batch_size || recipe.shards.is_some(),
            shards: recipe.shards,
            sync_batch_norm: recipe.sync_batch_norm,
            groups: recipe.groups.clone(),
            clip_norm: recipe.clip_norm,
            average: recipe.average.is_some(),
            precision: recipe.precision,
            lr: Some(recipe.lr),
            ..Options::default()
        }
    }

    /// What to do where only so many samples of a step fit into memory.
    pub fn batch_advice(&self, batch: usize) -> String {
        match self.shards {
            None => batch_advice(batch, self.micro),
            Some(shards) => {
                let batch = batch * shards;
                match self.sync_batch_norm {
                    true => format!(
                        "use --batch-size {batch} or smaller, or leave --sync-batch-norm out"
                    ),
                    false => format!("use more --shards, or --batch-size {batch} or smaller"),
                }
            }
        }
    }

    /// What the kept tensor `quantiles` of a training plan holds, see [`mix::quantiles`]; `None` where it has no
    /// such tensor, since no images are mixed.
    pub fn quantiles(&self) -> Option<Vec<f32>> {
        let Augment {
            mix_up, cut_mix, ..
        } = self.augment;
        let mixes = self.augment.mixes();
        mixes.then(|| mix::quantiles(mix_up, cut_mix))
    }
}

/// How long a tensor's values are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// From step to step: parameters, gradients, running statistics, optimiser state. Plans of one
    /// model share those of the same name.
    Kept,
    /// As long as a split of the dataset. As long as the split, too: the plan knows what a step needs.
    Data,
    /// Within a step, in memory that it shares with others, see [`Tensor::slot`].
    Step,
}

/// A tensor of a plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// By which an engine and the tests find it.
    pub name: String,
    /// In row-major order; of a batch the samples come first.
    pub shape: Vec<usize>,
    /// Of its elements.
    pub dtype: Dtype,
    /// How long its values are needed.
    pub lifetime: Lifetime,
    /// Whether it has a share for each sample of the batch.
    pub per_sample: bool,
    /// Its place in [`Plan::slots`]; `None` for what is not of a step.
    pub slot: Option<usize>,
    /// Where it lies in its slot, in elements.
    pub offset: usize,
}

impl Tensor {
    /// How many elements it has.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The parts of a step, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    /// The batch out of the dataset.
    Gather,
    /// From the batch to the logits.
    Forward,
    /// Losses, predictions and the gradient by the logits.
    Loss,
    /// From there to the gradients by the parameters.
    Backward,
    /// What the shards of a batch have in common on the way forward and back; once for all of them, between kernels
    /// that are carried out for each.
    Sync,
    /// From the gradients of a batch's shards to those of the batch; once for each, as the update is. Where several
    /// processes compute a batch, their exchange takes its place.
    Exchange,
    /// The optimiser; once for a batch that is taken in several parts.
    Update,
    /// On to the next row of the step table.
    Advance,
}

impl Section {
    /// Whether it is carried out once for a batch, after its last part.
    pub fn ends_batch(self) -> bool {
        matches!(self, Section::Exchange | Section::Update)
    }

    /// Whether it is carried out once for a batch, not for each of its shards.
    pub fn is_of_batch(self) -> bool {
        self == Section::Sync || self.ends_batch()
    }
}

/// The kept tensor with the sums of the running statistics over shards so far, see [`shards::rows`].
pub const SHARD_STATISTICS: &str = "shard_statistics";

/// A part of the gradients whose sums over shards are whole while the backward pass goes on to earlier layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Slab {
    /// The kept tensor with its sums over shards so far, see [`shards::rows`].
    pub tensor: String,
    /// Where it lies in the gradients.
    pub range: Range<usize>,
}

/// Name of the first slab's tensor; those of the others have a number besides.
const SHARD_GRADIENTS: &str = "shard_gradients";

/// Slabs of the gradients at most, where an exchange of one goes on while the next is computed.
const SLABS: usize = 8;

/// Elements of a slab at least, 1 MiB: of a smaller one the exchange is waiting rather than sending.
const SLAB_ELEMENTS: usize = 1 << 18;

/// A part of what is done with a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Phase {
    /// The kernels to carry out for each of its shards.
    pub of_shards: Range<usize>,
    /// Those to carry out once behind them.
    pub of_batch: Range<usize>,
    /// Which slabs of the gradients are whole behind the first ones.
    pub slabs: Range<usize>,
}

/// A step as data.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Samples that a step takes at most.
    pub batch: usize,
    /// What the kernels read and write, by their numbers.
    pub tensors: Vec<Tensor>,
    /// In order, with the part of the step that each belongs to.
    pub kernels: Vec<(Section, KernelSpec)>,
    /// Shards that are under way at a time, each with its own memory of the step.
    pub replicas: usize,
    /// The memory of the step: tensors that are never alive at the same time share one.
    pub slots: Vec<Slot>,
    /// The network's input and the output of every layer, as [`Layer::inputs`] counts them; where kernels are
    /// fused, not all of them are written.
    pub values: Vec<View>,
    /// The gradients of a shard, from the last on, as the backward pass has them; none where there are no shards.
    pub slabs: Vec<Slab>,
    /// Where in the gradients those lie that no kernel writes, since their parameters are frozen.
    frozen: Vec<[usize; 2]>,
}

impl Plan {
    /// Plans a step of `model` on batches of `batch` samples.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] for a batch that is empty or too large for the kernels' indices, a family that
    /// the adapter cannot run, or tensors that it cannot bind, each with the flag that helps.
    pub fn new(
        model: &Model,
        batch: usize,
        mode: Mode,
        options: &Options,
        target: Target,
    ) -> Result<Plan> {
        match mode {
            Mode::Train(_) => expect_batch(model, batch, options)?,
            Mode::Evaluate => expect_samples(model, batch, options)?,
        }
        let trains = mode != Mode::Evaluate;
        if trains && options.augment.mixes() && model.loss != Loss::SoftmaxCrossEntropy {
            return Err(Error::Usage(format!(
                "expected no mix_up and no cut_mix with the loss {}, which takes one label an image; set both to 0, or the model's loss to softmax_cross_entropy",
                model.loss.name()
            )));
        }
        let plan = Plan::unchecked(model, batch, mode, options, target)?;
        if let Target::Gpu(adapter) = target
            && options.precision == Precision::Mixed
            && !adapter.shader_f16
        {
            return Err(Error::Usage(format!(
                "expected an adapter whose shaders compute with 16-bit floats for mixed precision, found {}; use another --device (cpu always can), or train with --precision f32",
                adapter.name
            )));
        }
        if let Target::Gpu(adapter) = target {
            plan.expect_bindings(adapter, options, |batch| {
                Plan::unchecked(model, batch, mode, options, target)
            })?;
        }
        debug_assert_eq!(plan.flaws(), Vec::<String>::new());
        Ok(plan)
    }

    fn unchecked(
        model: &Model,
        batch: usize,
        mode: Mode,
        options: &Options,
        target: Target,
    ) -> Result<Plan> {
        let family = match target {
            Target::Gpu(adapter) => Family::select(adapter, options.family, options.precision)?,
            Target::Cpu => Family::Cpu,
        };
        let mut builder = Builder::new(model, batch, mode, options, family);
        if let Mode::Train(_) = mode {
            builder.factors = options.groups.factors(model)?;
        }
        builder.begin_shard(options);
        builder.gather(options);
        builder.input();
        builder.forward();
        builder.logits();
        builder.average(options);
        let gradient = builder.loss(options);
        if let Mode::Train(optimizer) = mode {
            builder.backward(gradient);
            match options.shards {
                Some(shards) => builder.fold_shards(shards),
                None if options.micro => builder.accumulate(),
                None => {}
            }
            builder.update(&optimizer, options);
        }
        builder.section = Section::Advance;
        builder.emit(step::advance_step(builder.data.counter));
        let mut plan = Plan {
            batch,
            tensors: builder.tensors,
            kernels: builder.kernels,
            replicas: match builder.synced {
                // Those that this process computes are not known yet.
                Some((shards, _)) if !options.spread => shards,
                _ => 1,
            },
            slots: Vec::new(),
            values: builder.values,
            slabs: builder.slabs,
            frozen: builder.frozen,
        };
        if !options.unfused {
            plan.fuse(family);
        }
        if let Target::Gpu(adapter) = target {
            plan.choose_tiles(family, adapter, model, &options.choices)?;
        }
        plan.share_memory(!options.unshared);
        Ok(plan)
    }

    /// The kernels without their sections.
    pub fn specs(&self) -> impl Iterator<Item = &KernelSpec> {
        self.kernels.iter().map(|(_, spec)| spec)
    }

    /// Whether some kernels need all shards of a batch at a time, see [`Plan::phases`].
    pub fn syncs(&self) -> bool {
        self.kernels.iter().any(|(s, _)| *s == Section::Sync)
    }

    /// The kernels of a batch in turn, to the update; the counter's advance is in none. Without kernels that need all
    /// shards at a time a phase ends where a slab of the gradients is whole.
    pub fn phases(&self) -> Vec<Phase> {
        let sections = self.kernels.iter().map(|(section, _)| *section);
        let end = sections.clone().position(|s| s == Section::Advance);
        let end = end.unwrap_or(self.kernels.len());
        let completes = |spec: &KernelSpec, slab: &Slab| {
            matches!(spec.work, Work::SumShards { .. })
                && self.tensors[spec.view("nodes").tensor].name == slab.tensor
        };
        // Behind which kernel each slab is whole.
        let slabs = self.slabs.iter();
        let whole = slabs.filter_map(|slab| self.specs().position(|spec| completes(spec, slab)));
        let whole: Vec<usize> = whole.map(|kernel| kernel + 1).collect();
        // What is behind the last one is no work to speak of.
        let cuts = match self.syncs() {
            true => &[],
            false => &whole[..whole.len().saturating_sub(1)],
        };
        let next = |from: usize, of_batch: bool| {
            let mut kernels = sections.clone().enumerate().take(end).skip(from);
            kernels
                .find(|(_, s)| s.is_of_batch() == of_batch)
                .map_or(end, |(i, _)| i)
        };
        let mut phases: Vec<Phase> = Vec::new();
        let mut at = 0;
        while at < end {
            let of_batch = next(at, true);
            let middle = cuts
                .iter()
                .copied()
                .find(|cut| at < *cut && *cut < of_batch);
            let middle = middle.unwrap_or(of_batch);
            let to = next(middle, false);
            let before = phases.last().map_or(0, |phase| phase.slabs.end);
            phases.push(Phase {
                of_shards: at..middle,
                of_batch: middle..to,
                slabs: before..whole.partition_point(|slab| *slab <= middle).max(before),
            });
            at = to;
        }
        phases
    }

    /// The matrix products of the step with the name of their layer: what can be tuned.
    pub fn products(&self) -> Vec<(String, Product)> {
        let product = |spec: &KernelSpec| match &spec.work {
            Work::Product(product) => Some((spec.layer.clone(), *product)),
            _ => None,
        };
        self.specs().filter_map(product).collect()
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<usize> {
        self.tensors.iter().position(|t| t.name == name)
    }

    /// Gives every product its tile: the one that was chosen before, where one is, else the built-in
    /// choice.
    fn choose_tiles(
        &mut self,
        family: Family,
        adapter: &AdapterReport,
        model: &Model,
        choices: &[Product],
    ) -> Result<()> {
        let layers = model.layers.iter().filter(|l| l.op.product().is_some());
        let muon = self.specs().filter(|s| matches!(s.work, Work::MuonScale));
        let most = Pass::ALL.len() * (layers.count() + muon.count());
        for (_, spec) in &mut self.kernels {
            let Work::Product(p) = &spec.work else {
                continue;
            };
            let family = family.for_product(p.half, adapter);
            let built_in =
                Product::new(p.geometry, p.batch, p.pass, p.relu, p.pool, family, adapter)?
                    .in_halves(p.half)
                    .in_model_of(most, adapter);
            let chosen = choices.iter().find(|c| built_in.takes(c, adapter));
            let tile = chosen.unwrap_or(&built_in).tile;
            spec.set_product(built_in.with_tile(tile));
        }
        Ok(())
    }

    /// How often a tensor is read.
    fn readers(&self, tensor: usize) -> usize {
        let arguments = self.specs().flat_map(|spec| &spec.arguments);
        let reads = arguments.filter(|a| a.view.tensor == tensor && a.access != Access::Write);
        reads.filter(|a| a.elements > 0).count()
    }
}

/// The tensors of the dataset.
struct Data {
    images: View,
    labels: View,
    order: View,
    steps: View,
    counter: View,
    normalization: View,
    metrics: View,
    predictions: View,
}

/// A plan in the making.
pub(crate) struct Builder<'a> {
    model: &'a Model,
    pub(crate) batch: usize,
    mode: Mode,
    explicit_conv: bool,
    /// What activations and their gradients are stored as.
    real: Dtype,
    /// In mixed precision the copies in halves of the layers' parameters, by the layers' names.
    working: HashMap<String, View>,
    loss_scale: Option<View>,
    /// Of the products, before each gets its own.
    tile: Tile,
    tensors: Vec<Tensor>,
    kernels: Vec<(Section, KernelSpec)>,
    section: Section,
    /// The layer that is at hand.
    layer: String,
    data: Data,
    parameters: View,
    gradients: Option<View>,
    /// Their sum over the parts of a batch so far, where it has parts.
    accumulated: Option<View>,
    running: View,
    /// Those that a shard of a batch leads to, where it has shards.
    shard_running: Option<View>,
    /// Shards of a batch at most and the running statistics that it leads to, where batch-norms are synced.
    synced: Option<(usize, View)>,
    /// The sums over shards of parts of the gradients so far, and which parts they are of.
    slabs: Vec<Slab>,
    slab_nodes: Vec<View>,
    /// Shards of a batch at most, the rows of their sums, and elements of a slab.
    shards: Option<[usize; 3]>,
    /// The network's input and the output of every layer.
    values: Vec<View>,
    labels: View,
    losses: View,
    prediction: View,
    /// How the samples are mixed, where they are.
    mixes: Option<View>,
    /// What a layer's forward pass keeps for its way back, by the layer's number and a name.
    saved: HashMap<(usize, &'static str), View>,
    /// How the parameters of each layer are trained; empty where none are.
    factors: Vec<Vec<Factors>>,
    frozen: Vec<[usize; 2]>,
}

impl<'a> Builder<'a> {
    fn new(
        model: &'a Model,
        batch: usize,
        mode: Mode,
        options: &Options,
        family: Family,
    ) -> Builder<'a> {
        let mut tensors = Vec::new();
        let mut add = |name: &str, shape: &[usize], dtype, lifetime, per_sample| {
            tensors.push(Tensor {
                name: name.into(),
                shape: shape.to_vec(),
                dtype,
                lifetime,
                per_sample,
                slot: None,
                offset: 0,
            });
            View::whole(tensors.len() - 1, dtype, shape.iter().product())
        };
        let (f32, u32) = (Dtype::F32, Dtype::U32);
        let (data, kept, step) = (Lifetime::Data, Lifetime::Kept, Lifetime::Step);
        let image = model.input;
        let dims = [batch, image.height, image.width, image.channels];
        let views = match mode {
            Mode::Train(_) => Views::One,
            Mode::Evaluate => options.views,
        };
        let mut seen = dims;
        seen[0] *= views.count();
        Builder {
            data: Data {
                images: add("images", &dims, Dtype::U8, data, true),
                labels: add("labels", &[batch], u32, data, true),
                order: add("order", &[batch], u32, data, true),
                steps: add("steps", &[1, STEP_ELEMENTS], u32, data, false),
                counter: add("counter", &[1], u32, data, false),
                normalization: add("normalization", &[2, image.channels], f32, data, false),
                metrics: add("metrics", &[1, 2], u32, data, false),
                predictions: add("predictions", &[batch], u32, data, true),
            },
            parameters: add("parameters", &[model.parameter_elements], f32, kept, false),
            running: add("running", &[model.running_elements], f32, kept, false),
            gradients: match mode {
                Mode::Train(_) => Some(add(
                    "gradients",
                    &[model.parameter_elements],
                    f32,
                    kept,
                    false,
                )),
                Mode::Evaluate => None,
            },
            accumulated: None,
            shard_running: None,
            synced: None,
            slabs: Vec::new(),
            slab_nodes: Vec::new(),
            shards: options.shards.map(|most| match options.spread {
                true => {
                    let slab = model.parameter_elements.div_ceil(SLABS).max(SLAB_ELEMENTS);
                    let slab = options.slab_elements.unwrap_or(slab);
                    [most, shards::rows(most, true), slab]
                }
                false => [most, shards::rows(most, false), usize::MAX],
            }),
            values: vec![add("input", &seen, f32, step, true)],
            labels: add("batch_labels", &[batch], u32, step, true),
            losses: add("losses", &[batch], f32, step, true),
            prediction: add("prediction", &[batch], u32, step, true),
            model,
            batch,
            mode,
            explicit_conv: options.explicit_conv,
            real: match options.precision {
                Precision::F32 => Dtype::F32,
                Precision::Mixed => Dtype::F16,
            },
            working: HashMap::new(),
            loss_scale: None,
            tile: match family {
                Family::Cpu => Tile::Whole,
                _ => Tile::Plain,
            },
            tensors,
            kernels: Vec::new(),
            section: Section::Gather,
            layer: String::new(),
            mixes: None,
            saved: HashMap::new(),
            factors: Vec::new(),
            frozen: Vec::new(),
        }
    }

    /// A tensor of the step.
    pub(crate) fn tensor(&mut self, name: &str, shape: &[usize], dtype: Dtype) -> View {
        let name = match self.layer.as_str() {
            "" => name.to_string(),
            layer => format!("{layer}.{name}"),
        };
        self.tensors.push(Tensor {
            name,
            shape: shape.to_vec(),
            dtype,
            lifetime: Lifetime::Step,
            per_sample: false,
            slot: None,
            offset: 0,
        });
        View::whole(self.tensors.len() - 1, dtype, shape.iter().product())
    }

    /// A tensor of the step that holds a map of `shape` for every sample.
    pub(crate) fn maps(&mut self, name: &str, shape: Shape, dtype: Dtype) -> View {
        let dims = [self.batch, shape.height, shape.width, shape.channels];
        let view = self.tensor(name, &dims, dtype);
        self.tensors[view.tensor].per_sample = true;
        view
    }

    /// The next kernel, for the layer at hand.
    pub(crate) fn emit(&mut self, spec: KernelSpec) {
        let spec = spec.of_layer(&self.layer);
        self.kernels.push((self.section, spec));
    }

    /// The layer's part of the flat parameter vector.
    pub(crate) fn parameters_of(&self, layer: &Layer) -> View {
        let range = layer.range();
        self.parameters.slice(range.start, range.len())
    }

    /// The layer's part of the gradients.
    pub(crate) fn gradients_of(&self, layer: &Layer) -> View {
        let range = layer.range();
        let gradients = self.gradients.expect("a training plan has gradients");
        gradients.slice(range.start, range.len())
    }

    /// The gradients of a whole batch, all of them: what the update goes by.
    pub(crate) fn batch_gradients(&self) -> View {
        let gradients = self.accumulated.or(self.gradients);
        gradients.expect("a training plan has gradients")
    }

    /// The layer's running statistics.
    pub(crate) fn running_of(&self, layer: &Layer) -> View {
        let range = layer.running_range();
        let running = self.shard_running.unwrap_or(self.running);
        running.slice(range.start, range.len())
    }

    /// Table and counter of the steps, for kernels that ask how many samples count.
    pub(crate) fn step(&self) -> [View; 2] {
        [self.data.steps, self.data.counter]
    }

    /// The samples' numbers in the dataset, for kernels that draw.
    pub(crate) fn order(&self) -> View {
        self.data.order
    }

    pub(crate) fn trains(&self) -> bool {
        matches!(self.mode, Mode::Train(_))
    }

    fn gather(&mut self, options: &Options) {
        if !self.trains() && options.views != Views::One {
            self.gather_views(options);
            return;
        }
        let mixes = self.trains() && options.augment.mixes();
        let [x, labels] = match mixes {
            true => [
                self.maps("unmixed", self.model.input, Dtype::F32),
                self.batch_words("unmixed_labels", 1),
            ],
            false => [self.values[0], self.labels],
        };
        if self.trains() && options.augment.changes_images() {
            self.augment(options, x, labels);
        } else {
            let data = &self.data;
            self.emit(gather::gather_batch(
                self.model.input,
                self.batch,
                options.streamed,
                data.images,
                data.labels,
                data.order,
                data.steps,
                data.counter,
                data.normalization,
                x,
                labels,
            ));
        }
        if mixes {
            self.mix(options, x, labels);
        }
    }

    /// All views of the batch, and from here to [`Builder::average`] each of them is a sample.
    fn gather_views(&mut self, options: &Options) {
        let data = &self.data;
        let spec = views::gather_views(
            self.model.input,
            self.batch,
            options.views,
            options.streamed,
            data.images,
            data.labels,
            data.order,
            data.steps,
            data.counter,
            data.normalization,
            self.values[0],
            self.labels,
        );
        self.emit(spec);
        self.batch *= options.views.count();
    }

    /// From the logits of an evaluation's views to those of its samples, where there are several.
    fn average(&mut self, options: &Options) {
        if self.trains() || options.views == Views::One {
            return;
        }
        self.batch /= options.views.count();
        let logits = self.values[self.values.len() - 1];
        let classes = self.model.classes;
        let mean = self.maps("logits.mean", Shape::new(1, 1, classes), Dtype::F32);
        self.emit(views::average_views(
            options.views,
            self.batch,
            classes,
            logits,
            mean,
        ));
        self.values.push(mean);
    }

    /// Mixes the gathered images and labels.
    fn mix(&mut self, options: &Options, x: View, labels: View) {
        let (shape, batch) = (self.model.input, self.batch);
        let mix = Mix {
            shape,
            mix_up: options.augment.mix_up > 0.0,
            cut_mix: options.augment.cut_mix > 0.0,
        };
        let quantiles = self.kept("quantiles", &[2, mix::QUANTILES]);
        let mixes = self.batch_words("mixes", mix::MIX_WORDS);
        let [steps, counter] = self.step();
        self.emit(mix::draw_mixes(
            mix,
            batch,
            labels,
            steps,
            counter,
            quantiles,
            self.labels,
            mixes,
        ));
        self.emit(mix::mix_batch(shape, batch, x, mixes, self.values[0]));
        self.mixes = Some(mixes);
    }

    /// A tensor of the step with so many words for every sample.
    fn batch_words(&mut self, name: &str, words: usize) -> View {
        let view = self.tensor(name, &[self.batch, words], Dtype::U32);
        self.tensors[view.tensor].per_sample = true;
        view
    }

    /// The batch with each image changed at random.
    fn augment(&mut self, options: &Options, x: View, batch_labels: View) {
        let (augment, image, batch) = (&options.augment, self.model.input, self.batch);
        let per_sample = augment::parameters(augment);
        let drawn = self.tensor("augmentation", &[batch, per_sample], Dtype::F32);
        self.tensors[drawn.tensor].per_sample = true;
        let data = &self.data;
        let (order, normalization) = (data.order, data.normalization);
        let (images, labels, steps, counter) = (data.images, data.labels, data.steps, data.counter);
        self.emit(augment::draw_augmentation(
            augment,
            image,
            batch,
            labels,
            order,
            steps,
            counter,
            normalization,
            drawn,
            batch_labels,
        ));
        self.emit(augment::augment_batch(
            augment,
            image,
            batch,
            options.streamed,
            images,
            order,
            steps,
            counter,
            normalization,
            drawn,
            x,
        ));
    }

    /// Loss, predictions and metrics; gives the gradient by the network's output.
    fn loss(&mut self, options: &Options) -> View {
        self.section = Section::Loss;
        let logits = self.values[self.values.len() - 1];
        let (batch, classes) = (self.batch, self.model.classes);
        let gradient = self.maps("logits.gradient", Shape::new(1, 1, classes), Dtype::F32);
        let data = &self.data;
        let (steps, counter, predictions) = (data.steps, data.counter, data.predictions);
        let metrics = data.metrics;
        let smoothing = match self.mode {
            Mode::Train(_) => options.label_smoothing,
            Mode::Evaluate => 0.0,
        };
        let weighted = options.class_weights.is_some() && self.trains();
        let weighted = weighted && self.model.loss == Loss::SoftmaxCrossEntropy;
        let weights = weighted.then(|| self.kept("class_weights", &[classes]));
        let labels = self.labels;
        let losses = self.losses;
        let without_predictions = match (self.mixes, weights) {
            (Some(mixes), weights) => Some(loss::mixed_softmax_cross_entropy(
                smoothing, batch, classes, logits, labels, mixes, weights, steps, counter, losses,
                gradient,
            )),
            (None, Some(weights)) => Some(loss::weighted_softmax_cross_entropy(
                smoothing, batch, classes, logits, labels, weights, steps, counter, losses,
                gradient,
            )),
            (None, None) => None,
        };
        if let Some(loss) = without_predictions {
            self.emit(loss);
            self.emit(loss::predict(
                batch,
                classes,
                logits,
                steps,
                counter,
                self.prediction,
                predictions,
            ));
        } else {
            self.emit(loss::loss(
                self.model.loss,
                smoothing,
                batch,
                classes,
                logits,
                labels,
                steps,
                counter,
                losses,
                gradient,
                self.prediction,
                predictions,
            ));
        }
        if options.keep_logits && !self.trains() {
            let outputs = self.maps("outputs", Shape::new(1, 1, classes), Dtype::F32);
            self.tensors[outputs.tensor].lifetime = Lifetime::Data;
            self.emit(outputs::store_logits(
                batch, classes, logits, steps, counter, outputs,
            ));
        }
        self.emit(loss::sum_metrics(
            self.batch,
            self.losses,
            self.prediction,
            self.labels,
            steps,
            counter,
            metrics,
        ));
        gradient
    }

    /// Adds the gradients to those of the batch's parts before this one.
    fn accumulate(&mut self) {
        let gradients = self.batch_gradients();
        let accumulated = self.tensor("accumulated", &[gradients.len], Dtype::F32);
        self.tensors[accumulated.tensor].lifetime = Lifetime::Kept;
        let [steps, counter] = self.step();
        self.emit(reduce::accumulate(gradients, accumulated, steps, counter));
        self.accumulated = Some(accumulated);
    }

    /// Each shard moves the running statistics on from where the batch before left them, or all together do.
    fn begin_shard(&mut self, options: &Options) {
        if !self.trains() || options.shards.is_none() || self.running.len == 0 {
            return;
        }
        if options.sync_batch_norm {
            let next = self.kept("next_running", &[self.running.len]);
            self.synced = options.shards.map(|shards| (shards, next));
            return;
        }
        let running = self.tensor("shard_running", &[self.running.len], Dtype::F32);
        self.emit(reduce::reduce_splits(1, self.running, running));
        self.shard_running = Some(running);
    }

    /// Adds up the gradients from place `from` on that are not yet, where that is a slab of them or all the rest, or
    /// `at_once`.
    pub(crate) fn add_up_slab(&mut self, from: usize, at_once: bool) {
        let Some([shards, rows, slab]) = self.shards else {
            return;
        };
        let gradients = self.gradients.expect("a training plan has gradients");
        let to = self
            .slabs
            .last()
            .map_or(gradients.len, |slab| slab.range.start);
        if from == to || !at_once && from > 0 && to - from < slab {
            return;
        }
        let name = match self.slabs.len() {
            0 => SHARD_GRADIENTS.to_string(),
            n => format!("{SHARD_GRADIENTS}.{n}"),
        };
        let layer = std::mem::take(&mut self.layer);
        let nodes = self.kept(&name, &[rows, to - from]);
        let [steps, counter] = self.step();
        let x = gradients.slice(from, to - from);
        self.emit(shards::sum_shards(shards, x, nodes, steps, counter));
        self.layer = layer;
        self.slab_nodes.push(nodes);
        self.slabs.push(Slab {
            tensor: name,
            range: from..to,
        });
    }

    /// From the sums over a batch's shards to its gradients, and to the mean of the running statistics that they lead
    /// to.
    fn fold_shards(&mut self, shards: usize) {
        let accumulated = self.kept("accumulated", &[self.batch_gradients().len]);
        let [steps, counter] = self.step();
        let mut folds = Vec::new();
        for (slab, nodes) in self.slabs.iter().zip(&self.slab_nodes) {
            let sum = accumulated.slice(slab.range.start, slab.range.len());
            folds.push((false, *nodes, sum));
        }
        if let (Some(x), Some([_, rows, _])) = (self.shard_running, self.shards) {
            let nodes = self.kept(SHARD_STATISTICS, &[rows, x.len]);
            self.emit(shards::sum_shards(shards, x, nodes, steps, counter));
            folds.push((true, nodes, self.running));
        }
        self.section = Section::Exchange;
        for (scaled, nodes, result) in folds {
            self.emit(shards::fold_shards(
                shards, scaled, nodes, steps, counter, result,
            ));
        }
        self.accumulated = Some(accumulated);
    }
}
