//! Training: the loop over epochs, the engines it can drive, and the run folder it leaves behind.
//!
//! The loop prints nothing: an [`Observer`] hears what happens. Everything that decides a run is
//! drawn from its configuration (seed, recipe, data), so the same configuration on the same engine
//! gives the same bits, and so does a run that was interrupted and resumed in between.

mod checkpoint;
mod engine;
mod run;

pub use checkpoint::{Checkpoint, parameter_hash};
pub use engine::{CpuEngine, Engine};
pub use run::{Config, DataRecord, DeviceRecord, EpochRecord, ModelRecord, Run};

use crate::data::Splits;
use crate::error::{Error, Result};
use crate::gpu::Step;
use crate::model::initial_parameters;
use crate::model::recipe::Recipe;
use crate::network::Split;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::time::Instant;

/// Hears how training goes on. Epochs count from 1.
pub trait Observer {
    /// An epoch begins.
    fn epoch_started(&mut self, epoch: usize, engine: &dyn Engine) -> Result<()>;
    /// So many training images of the epoch are done, with this mean loss so far.
    fn trained(&mut self, epoch: usize, images: usize, mean_loss: f64);
    /// So many test images of this epoch's evaluation are done.
    fn evaluated(&mut self, images: usize);
    /// The epoch is over, its checkpoint is on disk; `engine` is there to be asked.
    fn epoch_finished(&mut self, record: &EpochRecord, engine: &dyn Engine) -> Result<()>;
}

/// Trains `run` from its last checkpoint (or from its seed) to the last epoch of its recipe, and
/// writes a checkpoint after every epoch.
///
/// # Errors
/// [`Error::Diverged`] as soon as a loss is not finite (the last checkpoint stays as it is), what
/// the engine reports, and what keeps the run folder from being written.
pub fn train(
    run: &mut Run,
    mut data: Splits,
    engine: &mut dyn Engine,
    observer: &mut dyn Observer,
) -> Result<()> {
    let mut finished = 0;
    match run.restore()? {
        Some(checkpoint) => {
            engine.set_parameters(&checkpoint.parameters)?;
            engine.set_optimizer_state(&checkpoint.optimizer_state)?;
            finished = checkpoint.epoch;
        }
        None => engine.set_parameters(&initial_parameters(run.model(), run.config().seed))?,
    }
    let recipe = run.config().recipe.clone();
    if finished >= recipe.epochs {
        return Ok(());
    }
    let normalization = run.config().scale_and_shift();
    for (split, samples) in [
        (Split::Train, &mut data.train),
        (Split::Test, &mut data.test),
    ] {
        let images = std::mem::take(&mut samples.images);
        engine.upload_dataset(split, images, &samples.labels, &normalization)?;
    }
    for epoch in finished + 1..=recipe.epochs {
        observer.epoch_started(epoch, engine)?;
        let record = train_epoch(run.config(), epoch, &data, engine, observer)?;
        let checkpoint = Checkpoint {
            epoch,
            parameters: engine.parameters()?,
            optimizer_state: engine.optimizer_state()?,
        };
        run.finish_epoch(record.clone(), &checkpoint)?;
        observer.epoch_finished(&record, engine)?;
    }
    Ok(())
}

/// One epoch of training and the evaluation after it.
fn train_epoch(
    config: &Config,
    epoch: usize,
    data: &Splits,
    engine: &mut dyn Engine,
    observer: &mut dyn Observer,
) -> Result<EpochRecord> {
    let start = Instant::now();
    let (recipe, samples) = (&config.recipe, data.train.len());
    let order = epoch_order(samples, config.seed, epoch);
    let steps = step_table(recipe, samples, epoch);
    let last_step = (epoch * steps.len()) as u64;
    let diverged = |loss, step| Error::Diverged {
        loss,
        epoch,
        step,
        lr: recipe.lr,
    };
    let (mut done, mut images, mut loss_sum, mut correct) = (0, 0, 0.0, 0);
    engine.train_epoch(&order, &steps, &mut |new| {
        for metrics in new {
            loss_sum += f64::from(metrics.loss_sum);
            correct += metrics.correct as usize;
            images += steps[done].count as usize;
            done += 1;
            if !loss_sum.is_finite() {
                let step = last_step - (steps.len() - done) as u64;
                return Err(diverged(metrics.loss_sum.into(), step));
            }
        }
        observer.trained(epoch, images, loss_sum / images.max(1) as f64);
        Ok(())
    })?;
    let train_seconds = start.elapsed().as_secs_f64();
    let evaluation = engine.evaluate(Split::Test, &mut |images| observer.evaluated(images))?;
    if !evaluation.loss_sum.is_finite() {
        return Err(diverged(evaluation.loss_sum, last_step));
    }
    let predictions = evaluation.predictions.iter().zip(&data.test.labels);
    let test_correct = predictions.filter(|(prediction, label)| prediction == label);
    let mean = |sum: f64, count: usize| sum / count as f64;
    Ok(EpochRecord {
        epoch,
        step: last_step,
        train_loss: mean(loss_sum, samples),
        train_accuracy: mean(correct as f64, samples),
        test_loss: mean(evaluation.loss_sum, data.test.len()),
        test_accuracy: mean(test_correct.count() as f64, data.test.len()),
        images_per_second: samples as f64 / train_seconds,
        seconds: start.elapsed().as_secs_f64(),
        lr: recipe.schedule.lr_at(
            recipe.lr,
            last_step - 1,
            (recipe.epochs * steps.len()) as u64,
        ),
    })
}

/// The steps of `epoch` (from 1): batches of consecutive samples of the epoch's order, the last one
/// smaller where the batch size does not divide the samples, with the learning rate that the
/// schedule has for each.
fn step_table(recipe: &Recipe, samples: usize, epoch: usize) -> Vec<Step> {
    let per_epoch = samples.div_ceil(recipe.batch_size);
    let total = (per_epoch * recipe.epochs) as u64;
    (0..per_epoch)
        .map(|i| {
            let first = i * recipe.batch_size;
            let step = ((epoch - 1) * per_epoch + i) as u64;
            let lr = recipe.schedule.lr_at(recipe.lr, step, total);
            let scalars = recipe.optimizer.step_scalars(lr, step + 1);
            Step {
                first: first as u32,
                count: recipe.batch_size.min(samples - first) as u32,
                lr: scalars.lr,
                bias_correction1: scalars.bias_correction1,
                bias_correction2: scalars.bias_correction2,
                padding: [0; 3],
            }
        })
        .collect()
}

/// The order in which `epoch` visits the samples: a random permutation (Fisher and Yates, in the
/// form of Durstenfeld, 1964) that depends on nothing but the three arguments. The generator is
/// keyed by hand and the draws are made here, so that no version of a crate can change a run.
pub fn epoch_order(samples: usize, seed: u64, epoch: usize) -> Vec<u32> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&(epoch as u64).to_le_bytes());
    // No other use of the same seed draws the same numbers.
    key[16..].copy_from_slice(b"wgrad sample ord");
    let mut generator = ChaCha8Rng::from_seed(key);
    let mut order: Vec<u32> = (0..samples as u32).collect();
    for i in (1..samples).rev() {
        let j = below(&mut generator, i as u32 + 1) as usize;
        order.swap(i, j);
    }
    order
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
        };
        let (first, second) = (step_table(&recipe, 10, 1), step_table(&recipe, 10, 2));
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
}
