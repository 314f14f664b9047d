//! The learning-rate range test (Smith, 2017, "Cyclical learning rates for training neural networks",
//! section 3.3): a short training in which the rate rises exponentially from step to step; where the
//! loss falls fastest is a good rate, where it rises again is too much.

use super::{in_parts, sampled_order, step_table};
use crate::data::Dataset;
use crate::engine::{Engine, ends_batch};
use crate::error::{Error, Result};
use crate::kernels::Step;
use crate::model::recipe::{Optimizer, Recipe};
use serde::Serialize;
use std::ops::ControlFlow;

/// How much of itself the loss that decides about the end keeps from step to step.
const MEMORY: f64 = 0.9;

/// The test ends where the loss is so many times its best.
const DIVERGED: f64 = 4.0;

/// Rates from `from` to `to` in `steps` steps, each the same factor above the one before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Range {
    /// Learning rate of the first step.
    pub from: f64,
    /// Learning rate of the last step.
    pub to: f64,
    /// Steps from one to the other.
    pub steps: usize,
}

impl Range {
    /// # Errors
    /// [`Error::Usage`] for rates that 32 bits do not hold or that do not rise, and for fewer than 20 or
    /// more than 100,000 steps.
    pub fn new(from: f64, to: f64, steps: usize) -> Result<Range> {
        let held = |lr: f64| lr as f32 >= f32::MIN_POSITIVE && (lr as f32).is_finite();
        if !(held(from) && held(to) && from < to) {
            return Err(Error::Usage(format!(
                "expected --from above 0 and --to above it, both as 32 bits hold them (1.2e-38 to 3.4e38), found {from:e} and {to:e}"
            )));
        }
        if !(20..=100_000).contains(&steps) {
            return Err(Error::Usage(format!(
                "expected --steps from 20 to 100000, found {steps}"
            )));
        }
        Ok(Range { from, to, steps })
    }

    /// The rate that a range begins with unless told otherwise: a ten thousandth of what the optimiser
    /// takes by default.
    pub fn first(optimizer: &Optimizer) -> f64 {
        match optimizer {
            Optimizer::Sgd { .. } => 5e-6,
            Optimizer::Adamw { .. } => 1e-7,
            Optimizer::Lion { .. } => 1e-8,
            Optimizer::Muon { .. } => 1e-5,
        }
    }

    /// Of step `step`, from 0.
    pub fn lr_at(&self, step: usize) -> f64 {
        let share = step as f64 / (self.steps - 1) as f64;
        self.from * (self.to / self.from).powf(share)
    }
}

/// A step of the test.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Learning rate of the step.
    pub lr: f64,
    /// Mean over the batch, before its update.
    pub loss: f64,
    /// Mean of the losses of the steps around it.
    pub smoothed: f64,
}

/// What a range test found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RangeTest {
    /// A point for each step that was done.
    pub points: Vec<Point>,
    /// Whether it ended because the loss rose.
    pub diverged: bool,
    /// Where the smoothed loss falls fastest by the logarithm of the rate; `None` where it never falls.
    pub steepest: Option<f64>,
    /// Where it is lowest.
    pub lowest: f64,
}

impl RangeTest {
    /// The rate to begin with: a tenth of the one with the lowest loss, which is about to be too much.
    /// `None` where the loss never fell.
    pub fn suggested(&self) -> Option<f64> {
        self.steepest.map(|_| self.lowest / 10.0)
    }

    /// Whether the loss was at its lowest when the rates ended, so that higher ones may be better.
    pub fn is_cut_off(&self) -> bool {
        let last = self.points.last();
        !self.diverged && last.is_some_and(|point| point.lr <= 1.5 * self.lowest)
    }

    /// Reads the losses of the steps from the first on; those that are no numbers belong to a test that
    /// diverged and are left out.
    ///
    /// # Errors
    /// [`Error::Usage`] where there are too few to tell anything.
    pub fn of(range: &Range, losses: &[f64], diverged: bool) -> Result<RangeTest> {
        let finite = losses.iter().take_while(|loss| loss.is_finite());
        let losses: Vec<f64> = finite.copied().collect();
        if losses.len() < 10 {
            return Err(Error::Usage(format!(
                "expected a loss that is finite for 10 steps at least, found {}; begin with a smaller --from than {:e}",
                losses.len(),
                range.from
            )));
        }
        // Over a fortieth of the range to either side; not beyond what there is, nor lopsided.
        let reach = (range.steps / 40).max(2);
        let last = losses.len() - 1;
        let smoothed: Vec<f64> = (0..=last)
            .map(|i| {
                let reach = reach.min(i).min(last - i);
                let around = &losses[i - reach..=i + reach];
                around.iter().sum::<f64>() / around.len() as f64
            })
            .collect();
        let by_value = |a: &usize, b: &usize| smoothed[*a].total_cmp(&smoothed[*b]);
        let lowest = (0..=last).min_by(by_value).unwrap_or(last);
        // The rate's logarithm rises by the same amount each step.
        let slope = |i: usize| smoothed[i + 1] - smoothed[i - 1];
        let steepest = (1..lowest).min_by(|a, b| slope(*a).total_cmp(&slope(*b)));
        let steepest = steepest.filter(|i| slope(*i) < 0.0);
        let points = losses.iter().zip(&smoothed).enumerate();
        Ok(RangeTest {
            points: points
                .map(|(i, (loss, smoothed))| Point {
                    lr: range.lr_at(i),
                    loss: *loss,
                    smoothed: *smoothed,
                })
                .collect(),
            diverged,
            steepest: steepest.map(|i| range.lr_at(i)),
            lowest: range.lr_at(lowest),
        })
    }
}

/// Trains `engine`, which holds the training images of `data` and the first parameters, over `range`, by
/// `recipe` but for its rates. `progress` hears the number of steps done and the last loss, and says
/// whether to go on.
///
/// # Errors
/// What [`RangeTest::of`] and the engine report.
pub fn range_test(
    engine: &mut Engine,
    data: &Dataset,
    recipe: &Recipe,
    seed: u64,
    range: &Range,
    progress: &mut dyn FnMut(usize, f64),
) -> Result<RangeTest> {
    let mut losses: Vec<f64> = Vec::new();
    let mut watch = Watch::default();
    for epoch in 1.. {
        if losses.len() == range.steps || watch.diverged {
            break;
        }
        let order = sampled_order(recipe.sampler, &data.labels, seed, epoch);
        let first = losses.len();
        let mut steps = step_table(recipe, &order, &data.labels, seed, epoch);
        steps.truncate(range.steps - first);
        for (i, step) in steps.iter_mut().enumerate() {
            step.lr = range.lr_at(first + i) as f32;
        }
        let parts = steps.iter().flat_map(|step| in_parts(step, recipe));
        let rows: Vec<Step> = parts.collect();
        let (mut row, mut sum, mut count) = (0, 0.0, 0);
        engine.train_epoch(&order, &rows, &mut |new| {
            for metrics in new {
                sum += f64::from(metrics.loss_sum);
                count += rows[row].count;
                if ends_batch(&rows, row) {
                    let loss = sum / f64::from(count);
                    (sum, count) = (0.0, 0);
                    // More may be under way when the last one that counts is seen.
                    if !watch.diverged {
                        losses.push(loss);
                        watch.see(loss);
                    }
                }
                row += 1;
            }
            progress(losses.len(), losses.last().copied().unwrap_or(f64::NAN));
            Ok(if watch.diverged {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            })
        })?;
    }
    RangeTest::of(range, &losses, watch.diverged)
}

/// Sees losses go by and notices when they have become too large.
#[derive(Default)]
struct Watch {
    mean: f64,
    weight: f64,
    best: Option<f64>,
    diverged: bool,
}

impl Watch {
    fn see(&mut self, loss: f64) {
        self.mean = MEMORY * self.mean + (1.0 - MEMORY) * loss;
        self.weight = MEMORY * self.weight + (1.0 - MEMORY);
        let smoothed = self.mean / self.weight;
        let best = self.best.map_or(smoothed, |best| best.min(smoothed));
        self.best = Some(best);
        self.diverged = !loss.is_finite() || smoothed > DIVERGED * best;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: Range = Range {
        from: 1e-6,
        to: 1.0,
        steps: 121,
    };

    #[test]
    fn rates_rise_by_a_factor() {
        assert_eq!(RANGE.lr_at(0), 1e-6);
        assert!((RANGE.lr_at(20) / 1e-5 - 1.0).abs() < 1e-12);
        assert!((RANGE.lr_at(120) - 1.0).abs() < 1e-12);
        for (from, to, steps) in [
            (0.0, 1.0, 100),
            (-1.0, 1.0, 100),
            (1.0, 1.0, 100),
            (1e-3, f64::INFINITY, 100),
            (f64::NAN, 1.0, 100),
            (1e-50, 1.0, 100),
            (1e-3, 1.0, 19),
        ] {
            assert!(Range::new(from, to, steps).is_err(), "{from} {to} {steps}");
        }
        assert!(Range::new(1e-3, 1.0, 20).is_ok());
    }

    /// A loss of known shape: flat, a fall about 1e-3 with the steepest point there, and a rise behind
    /// 1e-1, with noise that the smoothing takes out.
    #[test]
    fn the_steepest_and_the_lowest_point_are_found() {
        let loss = |i: usize| {
            let x = RANGE.lr_at(i).log10();
            let noise = if i.is_multiple_of(2) { 0.02 } else { -0.02 };
            2.3 - 2.0 / (1.0 + (-(x + 3.0) * 4.0).exp()) + (10.0 * (x + 1.0)).exp() / 50.0 + noise
        };
        let losses: Vec<f64> = (0..121).map(loss).collect();
        let test = RangeTest::of(&RANGE, &losses, false).unwrap();
        let steepest = test.steepest.unwrap();
        assert!((5e-4..2e-3).contains(&steepest), "{steepest}");
        assert!((1e-2..1.5e-1).contains(&test.lowest), "{}", test.lowest);
        assert_eq!(test.suggested(), Some(test.lowest / 10.0));
        assert!(!test.is_cut_off());
        assert_eq!(test.points.len(), 121);
        // What is no number is no point.
        let mut cut = losses[..100].to_vec();
        cut.push(f64::NAN);
        let test = RangeTest::of(&RANGE, &cut, true).unwrap();
        assert_eq!(test.points.len(), 100);
        assert!(RangeTest::of(&RANGE, &cut[95..], true).is_err());
        // A loss that only rises suggests nothing.
        let rising: Vec<f64> = (0..121).map(|i| 1.0 + i as f64).collect();
        let test = RangeTest::of(&RANGE, &rising, false).unwrap();
        assert_eq!((test.steepest, test.lowest), (None, 1e-6));
        assert_eq!(test.suggested(), None);
        let falling: Vec<f64> = rising.iter().rev().copied().collect();
        let test = RangeTest::of(&RANGE, &falling, false).unwrap();
        assert!(test.is_cut_off() && test.lowest == RANGE.lr_at(120));
    }

    #[test]
    fn four_times_the_best_is_the_end() {
        let mut watch = Watch::default();
        (0..50).for_each(|_| watch.see(1.0));
        // The mean takes a few steps to be above 4.
        for _ in 0..3 {
            watch.see(10.0);
            assert!(!watch.diverged);
        }
        watch.see(10.0);
        assert!(watch.diverged);
        let mut watch = Watch::default();
        watch.see(f64::NAN);
        assert!(watch.diverged);
    }
}
