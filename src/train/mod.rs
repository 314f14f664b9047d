//! Training: the loop over epochs, the engines it can drive, and the run folder it leaves behind.
//!
//! The loop prints nothing: an [`Observer`] hears what happens. Everything that decides a run is
//! drawn from its configuration (seed, recipe, data), so the same configuration on the same engine
//! gives the same bits, and so does a run that was interrupted and resumed in between.

mod checkpoint;
mod ensemble;
mod init;
mod lr_find;
mod run;
mod seeds;

pub use checkpoint::{Checkpoint, Partial, parameter_hash};
pub use ensemble::{class_shares, expect_alike, mean_shares};
pub use init::{Start, start_from};
pub use lr_find::{Point, Range, RangeTest, range_test};
pub use run::{
    Config, DataRecord, DeviceRecord, EpochRecord, FORMAT, InitRecord, ModelRecord, Restored, Run,
    StepRecord, Weights,
};
pub use seeds::{SeedRun, SeedsRecord};

use crate::cluster::Cluster;
use crate::data::{Dataset, Splits};
use crate::engine::{Engine, Evaluation, Split, ends_batch};
use crate::error::{Error, Result};
use crate::kernels::{Metrics, Step};
use crate::model::recipe::{ClassWeights, Recipe, Sampler, Views};
use crate::model::{Model, Parameter, initial_parameters, whiten};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Hears how training goes on, as far as it wants to. Epochs count from 1. An error ends the training.
pub trait Observer {
    /// An epoch begins, or goes on where it was interrupted.
    fn epoch_started(&mut self, _epoch: usize, _engine: &Engine) -> Result<()> {
        Ok(())
    }
    /// So many training images of the epoch are done, with this mean loss so far.
    fn trained(&mut self, _epoch: usize, _images: usize, _mean_loss: f64) {}
    /// Some steps more are done and recorded. After a kill those behind the last checkpoint come again.
    fn stepped(&mut self, _record: &StepRecord) -> Result<()> {
        Ok(())
    }
    /// So many images of the validation or test split are done in one of this epoch's evaluations.
    fn evaluated(&mut self, _split: Split, _images: usize) {}
    /// The epoch is over, and its checkpoint not on disk yet: after a kill it comes again. `engine` is there to be
    /// asked.
    fn epoch_measured(&mut self, _record: &EpochRecord, _engine: &Engine) -> Result<()> {
        Ok(())
    }
    /// The epoch is over, its checkpoint is on disk; `engine` is there to be asked.
    fn epoch_finished(&mut self, _record: &EpochRecord, _engine: &Engine) -> Result<()> {
        Ok(())
    }
    /// Something that the user should know, in one line.
    fn note(&mut self, _line: &str) -> Result<()> {
        Ok(())
    }
}

/// Nobody listens.
impl Observer for () {}

/// When a training writes checkpoints in the middle of an epoch, and when it stops early. None of it
/// changes a bit of what is trained.
#[derive(Clone, Copy, Debug)]
pub struct Control<'a> {
    /// How often a checkpoint is written in the middle of an epoch.
    pub checkpoint_every: CheckpointEvery,
    /// Stop when this many epochs are finished, counted from the start of the training.
    pub stop_after: Option<usize>,
    /// Once this is true, the training finishes the steps in flight, writes a checkpoint and stops.
    pub interrupted: &'a AtomicBool,
}

/// Checkpoints once a minute, and no early end.
impl Default for Control<'_> {
    fn default() -> Self {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Control {
            checkpoint_every: CheckpointEvery::default(),
            stop_after: None,
            interrupted: &NEVER,
        }
    }
}

/// How often a checkpoint is written beside the one after each epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointEvery {
    /// Not at all.
    Epoch,
    /// Whenever the number of steps since the start of the training is a multiple of this.
    Steps(u64),
    /// When the last one is this old.
    Time(Duration),
}

impl Default for CheckpointEvery {
    fn default() -> Self {
        CheckpointEvery::Time(Duration::from_secs(60))
    }
}

/// `epoch`, a number of steps (`500`) or a time (`30s`, `10m`, `1h`).
impl FromStr for CheckpointEvery {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let expected = || {
            format!(
                "expected epoch, a number of steps (500) or a time (30s, 10m, 1h), at least 1, found '{text}'"
            )
        };
        if text == "epoch" {
            return Ok(CheckpointEvery::Epoch);
        }
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &text[digits.len()..] {
            "" => None,
            "s" => Some(1),
            "m" => Some(60),
            "h" => Some(3600),
            _ => return Err(expected()),
        };
        let number = digits.parse::<u64>().ok().filter(|n| *n > 0);
        let number = number.ok_or_else(expected)?;
        Ok(match unit {
            None => CheckpointEvery::Steps(number),
            Some(unit) => CheckpointEvery::Time(Duration::from_secs(number.saturating_mul(unit))),
        })
    }
}

/// How a training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All planned epochs are finished.
    Finished,
    /// Training ended before, because the validation split has seen no better epoch for as many as the
    /// recipe has patience. There is nothing to go on with.
    OutOfPatience,
    /// As many as [`Control::stop_after`] asked for are.
    Stopped,
    /// It was asked to stop after this step (from 1) of this epoch (from 1), and has written a
    /// checkpoint; so many steps has the epoch.
    Interrupted {
        /// From 1.
        epoch: usize,
        /// Steps of the epoch that are done.
        step: usize,
        /// Steps that the epoch has.
        steps: usize,
    },
}

/// Trains `run` from its last checkpoint (or from its seed) to the last epoch of its recipe, and
/// writes a checkpoint after every epoch and when `control` asks for one.
///
/// # Errors
/// [`Error::Diverged`] as soon as a loss is not finite (the last checkpoint stays as it is), what
/// [`expect_validation`] and [`Run::restore`] find wrong, what the engine reports, and what keeps the run
/// folder from being written.
pub fn train(
    run: &mut Run,
    data: Splits,
    engine: &mut Engine,
    control: &Control,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    carry_out(run, data, engine, control, observer, None)
}

/// As [`train`], together with the other processes of `cluster`: the engine's plan is [`crate::plan::Options::spread`].
/// The leader has the run, the others [`Run::follow`] it. Where one of them is gone, the leader writes a checkpoint.
///
/// # Errors
/// As [`train`], and [`Error::Cluster`] where another process is gone.
pub fn train_together(
    run: &mut Run,
    data: Splits,
    engine: &mut Engine,
    control: &Control,
    observer: &mut dyn Observer,
    cluster: &mut Cluster,
) -> Result<Outcome> {
    carry_out(run, data, engine, control, observer, Some(cluster))
}

fn carry_out(
    run: &mut Run,
    mut data: Splits,
    engine: &mut Engine,
    control: &Control,
    observer: &mut dyn Observer,
    mut cluster: Option<&mut Cluster>,
) -> Result<Outcome> {
    expect_validation(&run.config().recipe, &data)?;
    let restored = match run.follows() {
        true => Restored::nothing(),
        false => run.restore()?,
    };
    if let Some(note) = &restored.note {
        observer.note(note)?;
    }
    let (mut finished, mut partial) = (0, Partial::default());
    match restored.checkpoint {
        Some(checkpoint) => {
            engine.set_parameters(&checkpoint.parameters)?;
            engine.set_running(&checkpoint.running)?;
            engine.set_optimizer_state(&checkpoint.optimizer_state)?;
            if let Some(average) = &checkpoint.average {
                engine.set_average(average)?;
            }
            if let Some(loss_scale) = checkpoint.loss_scale {
                engine.set_loss_scale(loss_scale)?;
            }
            (finished, partial) = (checkpoint.epoch, checkpoint.partial);
        }
        None if run.follows() => {}
        None => {
            engine.set_parameters(&first_parameters(run.model(), run.config(), &data.train))?;
        }
    }
    if let Some(cluster) = &mut cluster {
        partial = together(cluster, run, engine, &mut finished, partial)?;
    }
    let planned = run.config().recipe.epochs;
    if finished >= planned {
        return Ok(Outcome::Finished);
    }
    if run.out_of_patience() {
        return Ok(Outcome::OutOfPatience);
    }
    let normalization = run.config().scale_and_shift();
    let splits = [
        (Split::Train, Some(&mut data.train)),
        (Split::Validation, data.validation.as_mut()),
        (Split::Test, Some(&mut data.test)),
    ];
    for (split, samples) in splits {
        let Some(samples) = samples else { continue };
        let images = std::mem::take(&mut samples.images);
        engine.upload_dataset(split, images, &samples.labels, &normalization)?;
    }
    let mut epoch = Epoch {
        run,
        data: &data,
        engine,
        control,
        observer,
        last_checkpoint: Instant::now(),
        normalization,
        cluster,
    };
    let last = control.stop_after.map_or(planned, |n| n.min(planned));
    for number in finished + 1..=last {
        let outcome = epoch.train(number, std::mem::take(&mut partial))?;
        if let Some(outcome) = outcome {
            return Ok(outcome);
        }
        if number < planned && epoch.run.out_of_patience() {
            return Ok(Outcome::OutOfPatience);
        }
    }
    Ok(if last < planned {
        Outcome::Stopped
    } else {
        Outcome::Finished
    })
}

/// Brings the processes to where the leader is; what is done of the epoch after the finished ones.
fn together(
    cluster: &mut Cluster,
    run: &mut Run,
    engine: &mut Engine,
    finished: &mut usize,
    partial: Partial,
) -> Result<Partial> {
    let damaged =
        |e: serde_json::Error| Error::Cluster(format!("a message between ranks: {e}; start again"));
    let own = (*finished, partial, run.metrics());
    let told = cluster.from_leader(&serde_json::to_vec(&own).map_err(damaged)?)?;
    let (epochs, partial, metrics) = serde_json::from_slice(&told).map_err(damaged)?;
    *finished = epochs;
    if run.follows() {
        run.take_metrics(metrics);
    }
    cluster.level(engine)?;
    Ok(partial)
}

/// The parameters that a training on `data` begins with.
pub fn first_parameters(model: &Model, config: &Config, data: &Dataset) -> Vec<f32> {
    let mut parameters = initial_parameters(model, config.seed);
    let normalization = config.scale_and_shift();
    whiten(model, &data.images, &normalization, &mut parameters);
    parameters
}

/// Makes sure that there is a validation split where the recipe needs one.
///
/// # Errors
/// [`Error::Usage`] for patience without a validation split, or of 0 epochs.
pub fn expect_validation(recipe: &Recipe, data: &Splits) -> Result<()> {
    match recipe.patience {
        Some(0) => Err(Error::Usage(
            "expected a patience of at least 1 epoch, found 0; leave it out to train all epochs"
                .into(),
        )),
        Some(patience) if data.validation.is_none() => Err(Error::Usage(format!(
            "expected a validation split, by which a patience of {patience} ends the training, found none; add --validation 0.1, or leave patience out"
        ))),
        _ => Ok(()),
    }
}

/// About how many records of its steps an epoch leaves.
const STEP_RECORDS: usize = 50;

/// Mean loss and accuracy over a split.
#[derive(Clone, Copy)]
struct Means {
    loss: f64,
    accuracy: f64,
}

/// Of one set of weights.
struct Measured {
    validation: Option<Means>,
    test: Means,
}

/// What an epoch needs.
struct Epoch<'a> {
    run: &'a mut Run,
    data: &'a Splits,
    engine: &'a mut Engine,
    control: &'a Control<'a>,
    observer: &'a mut dyn Observer,
    last_checkpoint: Instant,
    /// Scale, then shift per channel.
    normalization: Vec<f32>,
    /// The processes that train together, where there are several.
    cluster: Option<&'a mut Cluster>,
}

impl Epoch<'_> {
    /// Trains and evaluates epoch `epoch`, of which `at` is done; the outcome, if it was interrupted. Where another
    /// process is gone, what was done until then is in the checkpoint.
    fn train(&mut self, epoch: usize, mut at: Partial) -> Result<Option<Outcome>> {
        let outcome = self.train_from(epoch, &mut at);
        if let Err(Error::Cluster(_)) = outcome {
            self.checkpoint(epoch - 1, at)?;
        }
        outcome
    }

    fn train_from(&mut self, epoch: usize, at: &mut Partial) -> Result<Option<Outcome>> {
        let config = self.run.config();
        let (recipe, seed) = (config.recipe.clone(), config.seed);
        let samples = self.data.train.len();
        let labels = &self.data.train.labels;
        let order = sampled_order(recipe.sampler, labels, seed, epoch);
        let steps = step_table(&recipe, &order, labels, seed, epoch);
        if at.step > steps.len() || at.images > samples {
            let what = format!(
                "expected a checkpoint within the {} steps of an epoch, found one after {}; use a copy of it, or train again",
                steps.len(),
                at.step
            );
            return Err(Error::checkpoint(self.run.folder(), what));
        }
        let before = (epoch - 1) * steps.len();
        let record_every = steps.len().div_ceil(STEP_RECORDS);
        let diverged = |loss, step: usize| Error::Diverged {
            loss,
            epoch,
            step: step as u64,
            lr: recipe.lr,
        };
        if let Some(cluster) = &mut self.cluster {
            // What unlike devices make of equal sums may differ in its last bits.
            cluster.level(self.engine)?;
        }
        self.observer.epoch_started(epoch, self.engine)?;
        while at.step < steps.len() {
            let until = self.next_checkpoint(before + at.step) - before;
            let rows: Vec<Step> = steps[at.step..until.min(steps.len())]
                .iter()
                .flat_map(|step| in_parts(step, &recipe))
                .collect();
            let mut row = 0;
            let (control, observer) = (self.control, &mut *self.observer);
            let (last_checkpoint, run) = (self.last_checkpoint, &mut *self.run);
            let start = Instant::now();
            let mut progress = |new: &[Metrics]| {
                for metrics in new {
                    at.loss_sum += f64::from(metrics.loss_sum);
                    at.correct += u64::from(metrics.correct);
                    at.images += rows[row].count as usize;
                    let (images, loss_sum, correct) = &mut at.since;
                    *images += rows[row].count as usize;
                    *loss_sum += f64::from(metrics.loss_sum);
                    *correct += u64::from(metrics.correct);
                    if !at.loss_sum.is_finite() {
                        return Err(diverged(metrics.loss_sum.into(), before + at.step + 1));
                    }
                    // The engine stops where a batch ends.
                    let ends = ends_batch(&rows, row);
                    at.step += usize::from(ends);
                    row += 1;
                    let recorded = at.step.is_multiple_of(record_every) || at.step == steps.len();
                    if ends && recorded {
                        let (images, loss_sum, correct) = std::mem::take(&mut at.since);
                        let record = StepRecord {
                            step: (before + at.step) as u64,
                            epoch: (epoch - 1) as f64 + at.step as f64 / steps.len() as f64,
                            loss: loss_sum / images as f64,
                            accuracy: correct as f64 / images as f64,
                            lr: recipe.lr_at((before + at.step - 1) as u64, steps.len()),
                        };
                        run.add_step(record)?;
                        observer.stepped(&record)?;
                    }
                }
                observer.trained(epoch, at.images, at.loss_sum / at.images.max(1) as f64);
                let stop = control.interrupted() || control.is_old(last_checkpoint);
                Ok(if stop {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                })
            };
            let trained = match &mut self.cluster {
                None => {
                    let trained = self.engine.train_epoch(&order, &rows, &mut progress);
                    trained.map(drop)
                }
                Some(cluster) => {
                    let interrupted = control.interrupted;
                    cluster.train_epoch(self.engine, &order, &rows, interrupted, &mut progress)
                }
            };
            trained?;
            at.seconds += start.elapsed().as_secs_f64();
            if at.step == steps.len() {
                at.gradient_norms = norms(self.run.model(), &self.engine.gradients()?);
            }
            let by_steps = until < steps.len() && at.step == until;
            if by_steps || self.control.is_old(self.last_checkpoint) {
                self.checkpoint(epoch - 1, at.clone())?;
            }
            if self.interrupted() {
                return self.interrupt(epoch, at.clone(), steps.len());
            }
        }
        let start = Instant::now();
        let Some(measured) = self.measure()? else {
            return self.interrupt(epoch, at.clone(), steps.len());
        };
        let average = match recipe.average {
            Some(_) => {
                self.engine.swap_average()?;
                let average = self.measure();
                // Whatever came of it, the training goes on with its own.
                self.engine.swap_average()?;
                match average? {
                    None => return self.interrupt(epoch, at.clone(), steps.len()),
                    average => average,
                }
            }
            None => None,
        };
        let average_validation = average.as_ref().and_then(|average| average.validation);
        let last_step = before + steps.len();
        for Measured { validation, test } in std::iter::once(&measured).chain(&average) {
            for result in validation.iter().chain([test]) {
                if !result.loss.is_finite() {
                    return Err(diverged(result.loss, last_step));
                }
            }
        }
        let mean = |sum: f64| sum / samples as f64;
        let checkpoint = self.state(epoch, Partial::default())?;
        let mut record = EpochRecord {
            epoch,
            step: last_step as u64,
            train_loss: mean(at.loss_sum),
            train_accuracy: mean(at.correct as f64),
            validation_loss: measured.validation.map(|result| result.loss),
            validation_accuracy: measured.validation.map(|result| result.accuracy),
            test_loss: measured.test.loss,
            test_accuracy: measured.test.accuracy,
            average_validation_loss: average_validation.map(|result| result.loss),
            average_validation_accuracy: average_validation.map(|result| result.accuracy),
            average_test_loss: average.as_ref().map(|average| average.test.loss),
            average_test_accuracy: average.as_ref().map(|average| average.test.accuracy),
            test_loss_views: None,
            test_accuracy_views: None,
            average_test_loss_views: None,
            average_test_accuracy_views: None,
            images_per_second: images_per_second(samples, at.seconds),
            seconds: at.seconds + start.elapsed().as_secs_f64(),
            lr: recipe.lr_at(last_step as u64 - 1, steps.len()),
            weight_norms: norms(self.run.model(), &checkpoint.parameters),
            gradient_norms: at.gradient_norms.clone(),
            loss_scale: checkpoint.loss_scale.map(|[scale, ..]| f64::from(scale)),
            skipped_steps: checkpoint.loss_scale.map(|[.., skipped]| skipped as u64),
        };
        if recipe.views != Views::One && self.run.ends_with(&record) {
            let Some([raw, average]) = self.measure_views(recipe.views)? else {
                return self.interrupt(epoch, at.clone(), steps.len());
            };
            record.test_loss_views = raw.map(|result| result.loss);
            record.test_accuracy_views = raw.map(|result| result.accuracy);
            record.average_test_loss_views = average.map(|result| result.loss);
            record.average_test_accuracy_views = average.map(|result| result.accuracy);
            record.seconds = at.seconds + start.elapsed().as_secs_f64();
        }
        self.observer.epoch_measured(&record, self.engine)?;
        self.run.finish_epoch(record.clone(), &checkpoint)?;
        self.last_checkpoint = Instant::now();
        self.observer.epoch_finished(&record, self.engine)?;
        Ok(None)
    }

    /// How good the engine's weights are on the validation split, where there is one, and on the test
    /// split; `None` when it was interrupted.
    fn measure(&mut self) -> Result<Option<Measured>> {
        let data = self.data;
        let validation = match &data.validation {
            Some(samples) => match self.evaluate(Split::Validation, samples)? {
                None => return Ok(None),
                result => result,
            },
            None => None,
        };
        let test = self.evaluate(Split::Test, &data.test)?;
        Ok(test.map(|test| Measured { validation, test }))
    }

    /// How good the engine's weights and their average, where there is one, are on the test split in
    /// these views; nothing where the device has no room for that. `None` when it was interrupted.
    fn measure_views(&mut self, views: Views) -> Result<Option<[Option<Means>; 2]>> {
        let engine = match self.engine.with_views(views) {
            // The training is not lost for it.
            Err(e @ Error::OutOfMemory { .. }) => {
                let line = format!("not evaluated in several views: {e}");
                self.observer.note(&line)?;
                None
            }
            engine => Some(engine?),
        };
        if let Some(cluster) = &mut self.cluster {
            let all = cluster.gather(&[u8::from(engine.is_some())])?;
            if all.concat().contains(&0) {
                return Ok(Some([None, None]));
            }
        }
        let Some(mut engine) = engine else {
            return Ok(Some([None, None]));
        };
        let data = self.data;
        // The last evaluation, so that nobody else needs them.
        let images = self.engine.take_images(Split::Test)?;
        let labels = &data.test.labels;
        engine.upload_dataset(Split::Test, images, labels, &self.normalization)?;
        let raw = [self.engine.parameters()?, self.engine.running()?];
        let mut results = [None, None];
        let all = [Some(raw), self.engine.average()?];
        for (weights, result) in all.iter().zip(&mut results) {
            let Some([parameters, running]) = weights else {
                continue;
            };
            engine.set_parameters(parameters)?;
            engine.set_running(running)?;
            std::mem::swap(self.engine, &mut engine);
            let measured = self.evaluate(Split::Test, &data.test);
            std::mem::swap(self.engine, &mut engine);
            *result = measured?;
            if result.is_none() {
                return Ok(None);
            }
        }
        // Back to where others expect them.
        let images = engine.take_images(Split::Test)?;
        drop(engine);
        self.engine
            .upload_dataset(Split::Test, images, labels, &self.normalization)?;
        Ok(Some(results))
    }

    /// Mean loss and accuracy of the engine's weights on a split, of which each of several processes evaluates a part;
    /// `None` when it was interrupted.
    fn evaluate(&mut self, split: Split, samples: &Dataset) -> Result<Option<Means>> {
        let (control, observer) = (self.control, &mut *self.observer);
        let part = match &self.cluster {
            Some(cluster) => [cluster.rank(), cluster.ranks()],
            None => [0, 1],
        };
        let images = samples.len();
        let evaluation = self.engine.evaluate_part(split, part, &mut |done| {
            observer.evaluated(split, (part[1] * done).min(images));
            control.go_on()
        })?;
        let own = [
            evaluation.predictions.len() as f64,
            correct(&evaluation, samples) as f64,
        ];
        let losses = evaluation.losses.iter().map(|loss| f64::from(*loss));
        let own: Vec<f64> = own.into_iter().chain(losses).collect();
        let all = match &mut self.cluster {
            Some(cluster) => cluster.gather(bytemuck::cast_slice(&own))?,
            None => vec![bytemuck::cast_slice(&own).to_vec()],
        };
        let (mut done, mut correct, mut loss) = (0.0, 0.0, 0.0);
        for of_rank in all {
            let numbers: Vec<f64> = bytemuck::pod_collect_to_vec(&of_rank);
            done += numbers[0];
            correct += numbers[1];
            // One by one, as a single process has them.
            numbers[2..].iter().for_each(|sum| loss += sum);
        }
        let means = Means {
            loss: loss / images as f64,
            accuracy: correct / images as f64,
        };
        Ok((done as usize == images).then_some(means))
    }

    /// Whether this process was asked to stop; of several, whether all know that one was.
    fn interrupted(&self) -> bool {
        match &self.cluster {
            Some(cluster) => cluster.interrupted(),
            None => self.control.interrupted(),
        }
    }

    /// The next step (counted from the start of the training) after `step` with a checkpoint, if
    /// they come by steps.
    fn next_checkpoint(&self, step: usize) -> usize {
        match self.control.checkpoint_every {
            CheckpointEvery::Steps(n) => {
                let n = usize::try_from(n).unwrap_or(usize::MAX);
                (step / n).saturating_add(1).saturating_mul(n)
            }
            _ => usize::MAX,
        }
    }

    fn interrupt(&mut self, epoch: usize, at: Partial, steps: usize) -> Result<Option<Outcome>> {
        let step = at.step;
        self.checkpoint(epoch - 1, at)?;
        Ok(Some(Outcome::Interrupted { epoch, step, steps }))
    }

    /// Writes a checkpoint in the middle of an epoch.
    fn checkpoint(&mut self, finished: usize, at: Partial) -> Result<()> {
        if self.run.follows() {
            self.last_checkpoint = Instant::now();
            return Ok(());
        }
        let checkpoint = self.state(finished, at)?;
        self.run.write_checkpoint(&checkpoint)?;
        self.last_checkpoint = Instant::now();
        Ok(())
    }

    fn state(&self, epoch: usize, partial: Partial) -> Result<Checkpoint> {
        Ok(Checkpoint {
            epoch,
            partial,
            parameters: self.engine.parameters()?,
            running: self.engine.running()?,
            optimizer_state: self.engine.optimizer_state()?,
            average: self.engine.average()?,
            loss_scale: self.engine.loss_scale()?,
        })
    }
}

/// How many of the samples that were done were classified correctly.
fn correct(evaluation: &Evaluation, samples: &Dataset) -> usize {
    let labels = &samples.labels[evaluation.first..];
    let predictions = evaluation.predictions.iter().zip(labels);
    let correct = predictions.filter(|(prediction, label)| prediction == label);
    correct.count()
}

impl Control<'_> {
    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// What an evaluation does next.
    fn go_on(&self) -> ControlFlow<()> {
        match self.interrupted() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    /// Whether a checkpoint of this time is too old.
    fn is_old(&self, last: Instant) -> bool {
        match self.checkpoint_every {
            CheckpointEvery::Time(period) => last.elapsed() >= period,
            _ => false,
        }
    }
}

/// L2 norm of each parameter in a flat vector, but for those that are not finite.
fn norms(model: &Model, flat: &[f32]) -> BTreeMap<String, f64> {
    let parameters = model.layers.iter().flat_map(|layer| &layer.parameters);
    let norm = |p: &Parameter| {
        let values = flat[p.start..p.start + p.elements()].iter();
        values.map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
    };
    let named = parameters.map(|p| (p.name.clone(), norm(p)));
    named.filter(|(_, norm)| norm.is_finite()).collect()
}

/// NaN where the clock did not move.
fn images_per_second(images: usize, seconds: f64) -> f64 {
    if seconds > 0.0 {
        images as f64 / seconds
    } else {
        f64::NAN
    }
}

/// The steps of `epoch` (from 1): batches of consecutive samples of the epoch's order, the last one
/// smaller where the batch size does not divide the samples, with the learning rate that the
/// schedule has for each, and with what the mean of its loss is over: its samples, or where classes have
/// weights the sum of those of its labels.
pub(crate) fn step_table(
    recipe: &Recipe,
    order: &[u32],
    labels: &[u32],
    seed: u64,
    epoch: usize,
) -> Vec<Step> {
    let samples = order.len();
    let per_epoch = samples.div_ceil(recipe.batch_size);
    (0..per_epoch)
        .map(|i| {
            let first = i * recipe.batch_size;
            let step = ((epoch - 1) * per_epoch + i) as u64;
            let lr = recipe.lr_at(step, per_epoch);
            let scalars = recipe.optimizer.step_scalars(lr, step + 1);
            let count = recipe.batch_size.min(samples - first);
            let batch = order[first..first + count].iter();
            let labels = batch.map(|sample| labels[*sample as usize] as usize);
            Step {
                lr: scalars.lr,
                bias_correction1: scalars.bias_correction1,
                bias_correction2: scalars.bias_correction2,
                seed: seed as u32 ^ (seed >> 32) as u32,
                epoch: epoch as u32,
                total: match &recipe.class_weights {
                    Some(ClassWeights::Given(weights)) => labels.map(|label| weights[label]).sum(),
                    // Those that balance a dataset are given when it is known.
                    _ => count as f32,
                },
                average: recipe.average_at(step),
                ..Step::new(first, count)
            }
        })
        .collect()
}

/// A step on a whole batch in the recipe's parts, which are of about the same size, since a batch-norm takes each
/// by itself.
fn in_parts(step: &Step, recipe: &Recipe) -> impl Iterator<Item = Step> + use<> {
    let step = *step;
    let count = step.count as usize;
    let parts = recipe.parts(count);
    (0..parts).map(move |part| {
        let [from, to] = [part, part + 1].map(|part| (part * count / parts) as u32);
        Step {
            first: step.first + from,
            count: to - from,
            micro: part as u32,
            shards: parts as u32,
            share: 1.0 / parts as f32,
            ..step
        }
    })
}

/// The order in which `epoch` visits the samples with these labels, as the sampler has it.
pub(crate) fn sampled_order(sampler: Sampler, labels: &[u32], seed: u64, epoch: usize) -> Vec<u32> {
    match sampler {
        Sampler::Shuffle => epoch_order(labels.len(), seed, epoch),
        Sampler::Balanced => balanced_order(labels, seed, epoch),
    }
}

/// The order in which `epoch` visits the samples: a random permutation (Fisher and Yates, in the
/// form of Durstenfeld, 1964) that depends on nothing but the three arguments. The generator is
/// keyed by hand and the draws are made here, so that no version of a crate can change a run.
pub fn epoch_order(samples: usize, seed: u64, epoch: usize) -> Vec<u32> {
    let mut generator = generator(seed, epoch, b"wgrad sample ord");
    let mut order: Vec<u32> = (0..samples as u32).collect();
    shuffle(&mut generator, &mut order);
    order
}

/// The order in which `epoch` visits samples of these labels so that every class that has any comes
/// equally often (to one sample, where their number does not divide the samples), as many samples in
/// all as there are. A class's samples take turns in random rounds: none comes twice more often than
/// another. Depends on nothing but the arguments.
pub fn balanced_order(labels: &[u32], seed: u64, epoch: usize) -> Vec<u32> {
    let mut generator = generator(seed, epoch, b"wgrad balanced o");
    let classes = labels.iter().max().map_or(0, |&label| label as usize + 1);
    let mut members = vec![Vec::new(); classes];
    for (sample, label) in (0..).zip(labels) {
        members[*label as usize].push(sample);
    }
    members.retain(|members| !members.is_empty());
    // Which classes get one more changes from epoch to epoch.
    let mut ranks: Vec<u32> = (0..members.len() as u32).collect();
    shuffle(&mut generator, &mut ranks);
    let mut order = Vec::with_capacity(labels.len());
    let classes = members.len();
    for (members, rank) in members.iter_mut().zip(ranks) {
        // Adds up to all samples: the ranks are 0 to below the number of classes.
        let mut share = (labels.len() + rank as usize) / classes;
        while share > 0 {
            shuffle(&mut generator, members);
            let round = share.min(members.len());
            order.extend_from_slice(&members[..round]);
            share -= round;
        }
    }
    shuffle(&mut generator, &mut order);
    order
}

/// The generator of a purpose in an epoch: no two purposes of the same seed draw the same numbers.
fn generator(seed: u64, epoch: usize, purpose: &[u8; 16]) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&(epoch as u64).to_le_bytes());
    key[16..].copy_from_slice(purpose);
    ChaCha8Rng::from_seed(key)
}

/// Fisher and Yates, see [`epoch_order`].
fn shuffle(generator: &mut ChaCha8Rng, items: &mut [u32]) {
    for i in (1..items.len()).rev() {
        let j = below(generator, i as u32 + 1) as usize;
        items.swap(i, j);
    }
}

/// A uniform number below `bound`: the high half of a 64-bit product, drawn again where the low
/// half shows that some results would be likelier than others (Lemire, 2019).
fn below(generator: &mut ChaCha8Rng, bound: u32) -> u32 {
    let threshold = bound.wrapping_neg() % bound;
    loop {
        let product = u64::from(generator.next_u32()) * u64::from(bound);
        if product as u32 >= threshold {
            return (product >> 32) as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::recipe::{Optimizer, Schedule};

    #[test]
    fn checkpoints_come_by_steps_or_time() {
        let parse = |text: &str| text.parse::<CheckpointEvery>();
        let seconds = |n| Ok(CheckpointEvery::Time(Duration::from_secs(n)));
        assert_eq!(parse("epoch"), Ok(CheckpointEvery::Epoch));
        assert_eq!(parse("500"), Ok(CheckpointEvery::Steps(500)));
        assert_eq!(parse("30s"), seconds(30));
        assert_eq!(parse("10m"), seconds(600));
        assert_eq!(parse("1h"), seconds(3600));
        assert_eq!(parse("18446744073709551615h"), seconds(u64::MAX));
        for bad in [
            "", "0", "0s", "-1", "1.5m", "10 m", "10d", "epochs", "s", "ß",
        ] {
            let message = parse(bad).unwrap_err();
            assert!(
                message.contains("30s") && message.contains(bad),
                "{message}"
            );
        }
    }

    #[test]
    fn a_clock_that_stands_still_gives_no_rate() {
        assert!(images_per_second(10, 0.0).is_nan());
        assert_eq!(images_per_second(10, 2.0), 5.0);
    }

    #[test]
    fn an_order_is_a_permutation_that_seed_and_epoch_decide() {
        let order = epoch_order(1000, 1, 1);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<u32>>());
        assert_eq!(order, epoch_order(1000, 1, 1));
        assert_ne!(order, epoch_order(1000, 1, 2));
        assert_ne!(order, epoch_order(1000, 2, 1));
        assert_eq!(epoch_order(1, 1, 1), [0]);
    }

    #[test]
    fn the_order_of_a_seed_never_changes() {
        assert_eq!(epoch_order(8, 1, 1), FIRST);
    }
    const FIRST: [u32; 8] = [1, 7, 5, 6, 2, 3, 0, 4];

    #[test]
    fn every_position_is_equally_likely() {
        // 4! = 24 orders, 24,000 draws: 1,000 of each, with a standard deviation of 31.
        let mut counts = std::collections::HashMap::new();
        for epoch in 0..24_000 {
            *counts.entry(epoch_order(4, 7, epoch)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 24);
        for (order, count) in counts {
            assert!((845..1155).contains(&count), "{order:?}: {count}");
        }
    }

    #[test]
    fn a_balanced_epoch_gives_every_class_its_share_in_turns() {
        // 70 samples of class 0, 21 of class 1, none of class 2, 8 of class 3, 1 of class 4.
        let labels: Vec<u32> = (0..100)
            .map(|i| match (i * 37) % 100 {
                0 => 4,
                1..9 => 3,
                9..30 => 1,
                _ => 0,
            })
            .collect();
        let mut extras = vec![0; 5];
        for epoch in 1..=40 {
            let order = balanced_order(&labels, 3, epoch);
            assert_eq!(order.len(), 100);
            let mut taken = vec![0; 100];
            order.iter().for_each(|i| taken[*i as usize] += 1);
            for class in [0, 1, 3, 4] {
                let of_class = || (0..100).filter(|i| labels[*i] == class).map(|i| taken[i]);
                let (least, most) = (of_class().min().unwrap(), of_class().max().unwrap());
                assert!(most <= least + 1, "class {class}: {least} to {most} times");
                assert_eq!(of_class().sum::<i32>(), 25);
            }
            // Without class 0 there are 30 samples of 3 classes: 10 each; of 31, one has 11.
            let some: Vec<u32> = labels
                .iter()
                .copied()
                .filter(|l| *l > 0)
                .chain([1])
                .collect();
            let order = balanced_order(&some, 3, epoch);
            let mut counts = [0; 5];
            order
                .iter()
                .for_each(|i| counts[some[*i as usize] as usize] += 1);
            assert_eq!(counts.iter().sum::<i32>(), 31);
            for class in [1, 3, 4] {
                assert!([10, 11].contains(&counts[class]));
                extras[class] += counts[class] - 10;
            }
        }
        // Which one it is changes.
        assert!(
            extras[1] > 0 && extras[3] > 0 && extras[4] > 0,
            "{extras:?}"
        );
        assert_eq!(balanced_order(&labels, 3, 1), balanced_order(&labels, 3, 1));
        assert_ne!(balanced_order(&labels, 3, 1), balanced_order(&labels, 3, 2));
        assert_ne!(balanced_order(&labels, 3, 1), balanced_order(&labels, 4, 1));
        assert_eq!(balanced_order(&[5], 1, 1), [0]);
        // Of one class alone it is a permutation.
        let mut order = balanced_order(&[0; 50], 1, 1);
        order.sort_unstable();
        assert!(order.into_iter().eq(0..50));
    }

    #[test]
    fn the_steps_cover_the_epoch_and_go_on_counting() {
        let recipe = Recipe {
            optimizer: Optimizer::Adamw {
                beta1: 0.5,
                beta2: 0.75,
                epsilon: 1e-8,
                weight_decay: 0.0,
            },
            lr: 1.0,
            schedule: Schedule::Cosine,
            epochs: 2,
            batch_size: 4,
            label_smoothing: 0.0,
            ..Recipe::default()
        };
        let order: Vec<u32> = (0..10).rev().collect();
        let [first, second] = [1, 2].map(|epoch| step_table(&recipe, &order, &[0; 10], 7, epoch));
        let spans: Vec<_> = first.iter().map(|s| (s.first, s.count)).collect();
        assert_eq!(spans, [(0, 4), (4, 4), (8, 2)]);
        assert_eq!(
            spans,
            second
                .iter()
                .map(|s| (s.first, s.count))
                .collect::<Vec<_>>()
        );
        // Half of six steps: the middle of the cosine, and the fourth power of the betas.
        assert_eq!(second[0].lr, 0.5);
        assert_eq!(second[0].bias_correction1, 1.0 - 0.0625);
        assert_eq!(second[0].bias_correction2, 1.0 - 0.31640625);
        assert_eq!(first[0].lr, 1.0);
        assert_eq!(first[0].bias_correction1, 0.5);
    }

    #[test]
    fn the_parts_of_a_batch_are_of_about_one_size() {
        let parts_of = |count, recipe: &Recipe| -> Vec<[u32; 3]> {
            let step = Step {
                lr: 0.5,
                total: 3.5,
                ..Step::new(100, count)
            };
            let parts = in_parts(&step, recipe);
            parts
                .map(|part| {
                    assert_eq!((part.lr, part.total), (0.5, 3.5));
                    [part.first, part.count, part.micro]
                })
                .collect()
        };
        let parts = |count, most| {
            let recipe = Recipe {
                micro_batch: Some(most),
                ..Recipe::default()
            };
            parts_of(count, &recipe)
        };
        assert_eq!(parts(7, 7), [[100, 7, 0]]);
        assert_eq!(parts(8, 4), [[100, 4, 0], [104, 4, 1]]);
        assert_eq!(parts(9, 4), [[100, 3, 0], [103, 3, 1], [106, 3, 2]]);
        assert_eq!(parts(5, 4), [[100, 2, 0], [102, 3, 1]]);
        assert_eq!(parts(1, 4), [[100, 1, 0]]);
        let shards = |count| {
            let recipe = Recipe {
                batch_size: 10,
                shards: Some(4),
                ..Recipe::default()
            };
            assert_eq!(recipe.step_batch(), 3);
            parts_of(count, &recipe)
        };
        assert_eq!(
            shards(10),
            [[100, 2, 0], [102, 3, 1], [105, 2, 2], [107, 3, 3]]
        );
        // As many as ever where each has a sample.
        assert_eq!(
            shards(4),
            [[100, 1, 0], [101, 1, 1], [102, 1, 2], [103, 1, 3]]
        );
        assert_eq!(shards(2), [[100, 1, 0], [101, 1, 1]]);
    }

    #[test]
    fn the_loss_of_a_batch_is_over_its_samples_or_the_weights_of_its_labels() {
        let mut recipe = Recipe {
            batch_size: 4,
            ..Recipe::default()
        };
        let order: Vec<u32> = (0..10).rev().collect();
        let labels = [0, 0, 1, 2, 2, 1, 0, 0, 1, 2];
        let totals = |recipe: &Recipe| -> Vec<f32> {
            let steps = step_table(recipe, &order, &labels, 7, 1);
            steps.iter().map(|step| step.total).collect()
        };
        assert_eq!(totals(&recipe), [4.0, 4.0, 2.0]);
        recipe.class_weights = Some(ClassWeights::Given(vec![0.5, 2.0, 0.125]));
        assert_eq!(totals(&recipe), [3.125, 4.25, 1.0]);
    }
}
