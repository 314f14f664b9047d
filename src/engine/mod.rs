//! What carries out a plan step after step: a GPU, or the CPU. Both keep the dataset, the parameters and
//! all that lives from step to step; the host says how many steps to run.

mod activations;
mod cpu;
mod gpu;

pub use activations::{Activation, activations};
pub use cpu::CpuEngine;
pub use gpu::{GpuEngine, memory};

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::kernels::conv2d::Product;
use crate::kernels::optimizer::STATE_NAMES;
use crate::kernels::shards::{Node, nodes};
use crate::kernels::{Metrics, Step};
use crate::model::Model;
use crate::model::recipe::{Optimizer, Recipe, Views};
use crate::plan::Options;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::time::Instant;

/// Which part of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// What is learnt from.
    Train,
    /// What decisions are made by.
    Validation,
    /// What the result is measured on.
    Test,
}

/// Result of running a split through the network.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Sum of the per-sample losses.
    pub loss_sum: f64,
    /// The sums that it is made of, of the samples that were computed together, in order.
    pub losses: Vec<f32>,
    /// Place in the split of the first sample that was done.
    pub first: usize,
    /// Predicted class of every sample that was done, in the split's order.
    pub predictions: Vec<u32>,
    /// `[samples, classes]`, the outputs of the network behind them, where [`Options::keep_logits`] asks
    /// for them.
    pub logits: Option<Vec<f32>>,
}

/// A network on a device, with the data that it learns from. Vectors of parameters, running statistics
/// and optimiser state are flat, see [`crate::model::Layer::parameters`].
pub enum Engine {
    /// The shaders.
    Gpu(Box<GpuEngine>),
    /// The twins, and what is faster.
    Cpu(Box<CpuEngine>),
}

/// What is averaged: the name of the average, and of what it is one.
const AVERAGES: [[&str; 2]; 2] = [
    ["average_parameters", "parameters"],
    ["average_running", "running"],
];

/// Hears the metrics of newly finished steps and says whether to go on.
pub type StepProgress<'a> = &'a mut dyn FnMut(&[Metrics]) -> Result<ControlFlow<()>>;

/// Stands between the backward pass and the update of an engine that computes some of a batch's shards, while others
/// compute the rest ([`Options::spread`]).
pub trait Exchange {
    /// Of a slab of the gradients, where it lies in them: `nodes` are the sums over the shards here, as
    /// [`crate::kernels::shards::nodes`] has them, and `row` is the last of the batch that is computed here. Gives the
    /// sum over all shards. Slabs come in the order of [`crate::plan::Plan::slabs`], while the backward pass goes on.
    ///
    /// # Errors
    /// What keeps it from being made; then nothing was updated since the batch before.
    fn gradients(
        &mut self,
        row: &Step,
        slab: &Range<usize>,
        nodes: &[Vec<f32>],
    ) -> Result<Vec<f32>>;

    /// The vectors of `len` that all shards have, one after the other; `own` are those of the shards here.
    ///
    /// # Errors
    /// As [`Exchange::gradients`].
    fn rows(&mut self, row: &Step, len: usize, own: &[f32]) -> Result<Vec<f32>>;

    /// As [`Exchange::gradients`] of the running statistics, so many, behind all slabs; gives their mean. `metrics` are
    /// those of the rows here, `computed` is when the device was through with them.
    ///
    /// # Errors
    /// As [`Exchange::gradients`].
    fn statistics(
        &mut self,
        row: &Step,
        len: usize,
        nodes: &[Vec<f32>],
        metrics: &[Metrics],
        computed: Instant,
    ) -> Result<Vec<f32>>;
}

/// The shards of a batch that are computed here, by its last row here.
fn own_shards(row: &Step) -> Range<usize> {
    let end = (row.micro + 1).min(row.shards);
    row.first_shard as usize..end as usize
}

fn own_nodes(row: &Step) -> Vec<Node> {
    nodes(own_shards(row))
}

impl Engine {
    /// Plans steps of `model` on `batch` samples, a batch or the largest part of one
    /// ([`crate::model::recipe::Recipe::step_batch`]), for the GPU, or without one for the CPU. Parameters start at zero; see [`Engine::set_parameters`].
    ///
    /// # Errors
    /// As [`crate::plan::Plan::new`]; on a GPU also [`Error::OutOfMemory`] (with the batch size that fits)
    /// and [`Error::Gpu`] with the label of what was being made.
    pub fn new(
        gpu: Option<Arc<Gpu>>,
        model: &Model,
        batch: usize,
        optimizer: &Optimizer,
        options: &Options,
    ) -> Result<Engine> {
        Ok(match gpu {
            Some(gpu) => {
                let engine = GpuEngine::new(gpu, model, batch, optimizer, options)?;
                Engine::Gpu(Box::new(engine))
            }
            None => Engine::Cpu(Box::new(CpuEngine::new(model, batch, optimizer, options)?)),
        })
    }

    /// As [`Engine::new`], with steps and options as `recipe` has them.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn of(gpu: Option<Arc<Gpu>>, model: &Model, recipe: &Recipe) -> Result<Engine> {
        let (batch, options) = (recipe.step_batch(), Options::of(recipe));
        Engine::new(gpu, model, batch, &recipe.optimizer, &options)
    }

    /// Another engine on the same device for the same network, whose evaluations show each image in these
    /// views. It has neither data nor parameters yet.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn with_views(&self, views: Views) -> Result<Engine> {
        Ok(match self {
            Engine::Gpu(e) => Engine::Gpu(Box::new(e.with_views(views)?)),
            Engine::Cpu(e) => Engine::Cpu(Box::new(e.with_views(views)?)),
        })
    }

    /// Takes a split: `images` as N×H×W×C bytes (its own from now on, so that nobody holds them
    /// twice), a label each, and `normalization` as scale per channel, then shift per channel.
    ///
    /// On a GPU the images go to the device. Where they exceed what it binds at once, 4 GiB, its memory
    /// or [`Options::slab_bytes`], they stay on the host, and while the device computes on some of them,
    /// the next follow. The bits do not depend on which.
    ///
    /// # Errors
    /// [`Error::Shape`] when the lengths do not fit the model; on a GPU [`Error::OutOfMemory`] when there
    /// is no room for a part of the images either, [`Error::Usage`] when the adapter does not bind the
    /// samples' numbers.
    pub fn upload_dataset(
        &mut self,
        split: Split,
        images: Vec<u8>,
        labels: &[u32],
        normalization: &[f32],
    ) -> Result<()> {
        match self {
            Engine::Gpu(e) => e.upload_dataset(split, images, labels, normalization),
            Engine::Cpu(e) => e.upload_dataset(split, images, labels, normalization),
        }
    }

    /// Gives back the images of a split, which the engine no longer has then.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are none, or what the device reports.
    pub fn take_images(&mut self, split: Split) -> Result<Vec<u8>> {
        match self {
            Engine::Gpu(e) => e.take_images(split),
            Engine::Cpu(e) => e.take_images(split),
        }
    }

    /// Trains on the samples of the training split in the given `order`, one step per row of
    /// `steps`; where a row's [`Step::micro`] counts the parts of a batch, the last of them updates the
    /// parameters, and needs [`Options::micro`]. `progress` gets the metrics of newly finished steps (maybe of none), in order, now
    /// and then. When it says break, no further batch is begun; the metrics of all that were carried
    /// out still go through it, and are what is returned. An error of its own ends the epoch.
    ///
    /// # Errors
    /// [`Error::Shape`] when order or table do not fit the split, [`Error::Usage`] with
    /// [`Options::evaluates_only`], or what the device reports.
    pub fn train_epoch(
        &mut self,
        order: &[u32],
        steps: &[Step],
        progress: StepProgress,
    ) -> Result<Vec<Metrics>> {
        let evaluates_only = match self {
            Engine::Gpu(e) => e.evaluates_only(),
            Engine::Cpu(e) => e.evaluates_only(),
        };
        if evaluates_only {
            return Err(Error::Usage(
                "expected an engine that trains, found one that only evaluates; plan it without Options::evaluates_only".into(),
            ));
        }
        match self {
            Engine::Gpu(e) => e.train_epoch(order, steps, progress),
            Engine::Cpu(e) => e.train_epoch(order, steps, progress),
        }
    }

    /// As [`Engine::train_epoch`] on the rows of some shards of every batch, of one at least, with `exchange` for the
    /// rest. The metrics are those of these rows.
    ///
    /// # Errors
    /// As [`Engine::train_epoch`], and as [`Exchange::gradients`].
    pub fn train_shards(
        &mut self,
        order: &[u32],
        steps: &[Step],
        exchange: &mut dyn Exchange,
        progress: StepProgress,
    ) -> Result<Vec<Metrics>> {
        match self {
            Engine::Gpu(e) => e.train_shards(order, steps, exchange, progress),
            Engine::Cpu(e) => e.train_shards(order, steps, exchange, progress),
        }
    }

    /// Runs the whole validation or test split forward. `progress` gets the number of samples done; when it says break,
    /// the evaluation ends early and has fewer predictions than the split has samples.
    ///
    /// # Errors
    /// [`Error::Usage`] for the training split, [`Error::Shape`] when nothing was uploaded, or what the
    /// device reports.
    pub fn evaluate(
        &mut self,
        split: Split,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Evaluation> {
        self.evaluate_part(split, [0, 1], progress)
    }

    /// The same of part `part` (from 0) of `parts` of the split; those of all parts on end are what
    /// [`Engine::evaluate`] gives, to the bit.
    ///
    /// # Errors
    /// As [`Engine::evaluate`].
    pub fn evaluate_part(
        &mut self,
        split: Split,
        [part, parts]: [usize; 2],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Evaluation> {
        if split == Split::Train {
            return Err(Error::Usage(
                "expected the validation or the test split: the training split's steps also update the parameters; upload the images as a test split to evaluate them".into(),
            ));
        }
        match self {
            Engine::Gpu(e) => e.evaluate(split, [part, parts], progress),
            Engine::Cpu(e) => e.evaluate(split, [part, parts], progress),
        }
    }

    /// The flat parameter vector.
    pub fn parameters(&self) -> Result<Vec<f32>> {
        self.kept("parameters")
    }

    /// With a moving average, that starts from them, too.
    ///
    /// # Errors
    /// [`Error::Shape`] when the length is not the model's.
    pub fn set_parameters(&mut self, parameters: &[f32]) -> Result<()> {
        if self.averages() {
            self.set_kept("average_parameters", parameters)?;
        }
        self.set_kept("parameters", parameters)
    }

    /// Gradients of the last batch, laid out like the parameters: clipped where a recipe clips them, 0 where a
    /// frozen weight needs none.
    pub fn gradients(&self) -> Result<Vec<f32>> {
        let micro = match self {
            Engine::Gpu(e) => e.micro(),
            Engine::Cpu(e) => e.micro(),
        };
        self.kept(if micro { "accumulated" } else { "gradients" })
    }

    /// The running statistics, see [`crate::model::Layer::running`].
    pub fn running(&self) -> Result<Vec<f32>> {
        self.kept("running")
    }

    /// With a moving average, that starts from them, too.
    ///
    /// # Errors
    /// [`Error::Shape`] when the length is not the model's.
    pub fn set_running(&mut self, running: &[f32]) -> Result<()> {
        if self.averages() {
            self.set_kept("average_running", running)?;
        }
        self.set_kept("running", running)
    }

    /// The optimiser's state vectors (velocity, or first and second moment), zero before the first step.
    pub fn optimizer_state(&self) -> Result<Vec<Vec<f32>>> {
        let names = &STATE_NAMES[..self.state_vectors()];
        names.iter().map(|name| self.kept(name)).collect()
    }

    /// # Errors
    /// [`Error::Shape`] when the number or length of the vectors is not the optimiser's.
    pub fn set_optimizer_state(&mut self, state: &[Vec<f32>]) -> Result<()> {
        expect_len(
            "set_optimizer_state",
            "vectors",
            self.state_vectors(),
            state.len(),
        )?;
        let named = STATE_NAMES.iter().zip(state);
        named
            .into_iter()
            .try_for_each(|(name, values)| self.set_kept(name, values))
    }

    /// In mixed precision what the loss is scaled by, the steps since that last changed, and the steps that were
    /// skipped so far because gradients overflowed.
    pub fn loss_scale(&self) -> Result<Option<[f32; 3]>> {
        if !self.scales_loss() {
            return Ok(None);
        }
        let values = self.kept("loss_scale")?;
        Ok(<[f32; 3]>::try_from(values).ok())
    }

    /// # Errors
    /// [`Error::Usage`] where the loss is not scaled.
    pub fn set_loss_scale(&mut self, values: [f32; 3]) -> Result<()> {
        if !self.scales_loss() {
            return Err(Error::Usage(
                "expected a training in mixed precision, found one in f32; plan it with Options::precision"
                    .into(),
            ));
        }
        self.set_kept("loss_scale", &values)
    }

    fn scales_loss(&self) -> bool {
        match self {
            Engine::Gpu(e) => e.scales_loss(),
            Engine::Cpu(e) => e.scales_loss(),
        }
    }

    /// The moving averages of the parameters and of the running statistics, where they are kept.
    pub fn average(&self) -> Result<Option<[Vec<f32>; 2]>> {
        if !self.averages() {
            return Ok(None);
        }
        let [parameters, running] = AVERAGES.map(|[average, _]| self.kept(average));
        Ok(Some([parameters?, running?]))
    }

    /// # Errors
    /// [`Error::Usage`] where no average is kept, [`Error::Shape`] when a length is not the model's.
    pub fn set_average(&mut self, average: &[Vec<f32>; 2]) -> Result<()> {
        self.expect_average()?;
        let pairs = AVERAGES.iter().zip(average);
        pairs
            .into_iter()
            .try_for_each(|([name, _], values)| self.set_kept(name, values))
    }

    /// Exchanges parameters and running statistics with their moving averages: evaluate, and call it again.
    ///
    /// # Errors
    /// [`Error::Usage`] where no average is kept, or what the device reports.
    pub fn swap_average(&mut self) -> Result<()> {
        self.expect_average()?;
        AVERAGES.into_iter().try_for_each(|names| match self {
            Engine::Gpu(e) => e.swap(names),
            Engine::Cpu(e) => e.swap(names),
        })
    }

    fn averages(&self) -> bool {
        match self {
            Engine::Gpu(e) => e.averages(),
            Engine::Cpu(e) => e.averages(),
        }
    }

    fn expect_average(&self) -> Result<()> {
        if self.averages() {
            return Ok(());
        }
        Err(Error::Usage(
            "expected a moving average of the parameters, found none; plan it with Options::average"
                .into(),
        ))
    }

    fn state_vectors(&self) -> usize {
        match self {
            Engine::Gpu(e) => e.state_vectors(),
            Engine::Cpu(e) => e.state_vectors(),
        }
    }

    fn kept(&self, name: &'static str) -> Result<Vec<f32>> {
        match self {
            Engine::Gpu(e) => e.kept(name),
            Engine::Cpu(e) => Ok(e.kept(name)),
        }
    }

    fn set_kept(&mut self, name: &'static str, values: &[f32]) -> Result<()> {
        match self {
            Engine::Gpu(e) => e.set_kept(name, values),
            Engine::Cpu(e) => e.set_kept(name, values),
        }
    }

    /// The device in one line, for people.
    pub fn description(&self) -> String {
        match self {
            Engine::Gpu(e) => e.gpu().report().line(),
            Engine::Cpu(_) => CpuEngine::device(),
        }
    }

    /// The matrix products of a step with the name of their layer, as chosen; none on the CPU, which has
    /// nothing to choose.
    pub fn products(&self) -> Vec<(String, Product)> {
        match self {
            Engine::Gpu(e) => e.plan().products(),
            Engine::Cpu(_) => Vec::new(),
        }
    }

    /// The GPU's engine, if it is one, for those who measure.
    pub fn on_gpu(&mut self) -> Option<&mut GpuEngine> {
        match self {
            Engine::Gpu(e) => Some(e),
            Engine::Cpu(_) => None,
        }
    }

    /// The GPU behind the engine, if it is one.
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Engine::Gpu(e) => Some(e.gpu()),
            Engine::Cpu(_) => None,
        }
    }
}

fn expect_len(operation: &'static str, what: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Shape {
        operation,
        what: format!("expected {expected} {what}, found {found}"),
    })
}

/// Refuses a split whose parts do not fit each other or the model.
fn expect_dataset(
    model: &Model,
    images: &[u8],
    labels: &[u32],
    normalization: &[f32],
) -> Result<()> {
    let operation = "upload_dataset";
    let (len, elements) = (labels.len(), model.input.elements());
    if images.len() != len * elements || len == 0 {
        return Err(Error::Shape {
            operation,
            what: format!(
                "expected {len} images of {} ({} bytes), found {} bytes",
                model.input,
                len * elements,
                images.len()
            ),
        });
    }
    if let Some(label) = labels.iter().find(|l| **l as usize >= model.classes) {
        return Err(Error::Shape {
            operation,
            what: format!("expected labels below {}, found {label}", model.classes),
        });
    }
    if normalization.len() != 2 * model.input.channels {
        return Err(Error::Shape {
            operation,
            what: format!(
                "expected a scale and a shift for each of {} channels, found {} numbers",
                model.input.channels,
                normalization.len()
            ),
        });
    }
    Ok(())
}

/// The steps that an epoch over `len` samples has at most, `batch` of them at a time. Parts of a larger
/// batch may be smaller than that, but not by half.
fn most_rows(len: usize, batch: usize, options: &Options) -> usize {
    let rows = len.div_ceil(batch) * if options.micro { 2 } else { 1 };
    // The last batch has as many shards as the others, however small they are.
    rows + options.shards.unwrap_or(0)
}

/// Whether the step in this row is the last part of its batch.
pub(crate) fn ends_batch(steps: &[Step], row: usize) -> bool {
    steps.get(row + 1).is_none_or(Step::begins)
}

/// The rows of the batch that begins with this one.
fn batch_from(steps: &[Step], row: usize) -> Range<usize> {
    let last = (row..steps.len()).find(|row| ends_batch(steps, *row));
    row..last.map_or(steps.len(), |last| last + 1)
}

/// Refuses an epoch whose order or steps reach beyond the `len` samples of the split, or one with
/// parts of batches that are out of order, or where steps are no `micro` ones.
fn expect_epoch(
    len: usize,
    batch: usize,
    options: &Options,
    order: &[u32],
    steps: &[Step],
) -> Result<()> {
    let before = std::iter::once(None).chain(steps.iter().map(Some));
    let fits = order.len() == len
        && order.iter().all(|i| (*i as usize) < len)
        && steps.len() <= most_rows(len, batch, options)
        && steps.iter().zip(before).all(|(s, before)| {
            let next = before.map_or(0, |before| before.micro + 1);
            s.count as usize <= batch
                && s.count > 0
                && s.first as usize + s.count as usize <= len
                && (s.begins() || options.micro && s.micro == next)
                && options.shards.is_none_or(|most| s.shards as usize <= most)
        });
    if fits {
        return Ok(());
    }
    Err(Error::Shape {
        operation: "train_epoch",
        what: format!(
            "expected an order of {len} samples and steps of 1 to {batch} of them, found {} samples and {} steps that reach elsewhere",
            order.len(),
            steps.len()
        ),
    })
}

/// The steps of part number `part` of `parts` of an evaluation: the split in its order.
fn evaluation_steps(len: usize, batch: usize, [part, parts]: [usize; 2]) -> Vec<Step> {
    let all = len.div_ceil(batch);
    (part * all / parts..(part + 1) * all / parts)
        .map(|i| Step::new(i * batch, batch.min(len - i * batch)))
        .collect()
}

/// # Errors
/// [`Error::Shape`] where nothing was uploaded.
fn uploaded<T>(split: Option<T>) -> Result<T> {
    split.ok_or(Error::Shape {
        operation: "network",
        what: "expected a dataset, found none; call upload_dataset first".into(),
    })
}
