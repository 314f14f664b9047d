//! A run's network, ready to answer: pictures in, the share of every class out.
//!
//! ```no_run
//! use wgrad::data::read_picture;
//! use wgrad::predict::{Predictor, ranked};
//! use wgrad::train::{Run, Weights};
//!
//! let run = Run::open("runs/default-mnist-1".as_ref())?;
//! let mut predictor = Predictor::new(&run, Weights::Last, None, None, 1)?;
//! let seven = std::fs::read("seven.jpg").expect("a picture");
//! let picture = read_picture(&seven, predictor.reading()).expect("a picture");
//! let shares = predictor.predict(picture.pixels)?;
//! for (class, share) in ranked(&shares, 3) {
//!     println!("{} {:.1} %", run.config().model.class_names[class], 100.0 * share);
//! }
//! # Ok::<(), wgrad::Error>(())
//! ```

use crate::data::Reading;
use crate::engine::{Engine, Split};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::model::recipe::{Optimizer, Views};
use crate::model::{Loss, Shape};
use crate::plan::{Options, expect_batch};
use crate::train::{Run, Weights, class_shares};
use std::ops::ControlFlow;
use std::sync::Arc;

/// A trained network on a device that takes memory for evaluations alone.
pub struct Predictor {
    engine: Engine,
    shape: Shape,
    classes: usize,
    loss: Loss,
    normalization: Vec<f32>,
    reading: Reading,
    epoch: Option<usize>,
}

impl Predictor {
    /// The network of a run with `which` of its weights, on a GPU or without one on the CPU. It shows each
    /// image in `views`, by default the run's, and takes `batch` images at a time: few for single pictures,
    /// some hundred where there are many.
    ///
    /// # Errors
    /// As [`Run::weights_of`] and [`Engine::new`].
    pub fn new(
        run: &Run,
        which: Weights,
        gpu: Option<Arc<Gpu>>,
        views: Option<Views>,
        batch: usize,
    ) -> Result<Predictor> {
        let (config, model) = (run.config(), run.model());
        let views = views.unwrap_or(config.recipe.views);
        let options = Options {
            views,
            keep_logits: true,
            evaluates_only: true,
            ..Options::default()
        };
        let batch = batch.max(1) * views.count();
        expect_batch(model, batch, &options)?;
        // Nothing is updated.
        let optimizer = Optimizer::Sgd {
            momentum: 0.0,
            nesterov: false,
            weight_decay: 0.0,
        };
        let (epoch, [parameters, running]) = run.weights_of(which)?;
        let mut engine = Engine::new(gpu, model, batch, &optimizer, &options)?;
        engine.set_parameters(&parameters)?;
        engine.set_running(&running)?;
        Ok(Predictor {
            engine,
            shape: config.model.input,
            classes: model.classes,
            loss: model.loss,
            normalization: config.scale_and_shift(),
            reading: Reading::new(config.model.input, &config.normalization),
            epoch,
        })
    }

    /// How pictures become images for this network, for [`crate::data::read_picture`].
    pub fn reading(&self) -> &Reading {
        &self.reading
    }

    /// The epoch that the weights are of, where their file says so.
    pub fn epoch(&self) -> Option<usize> {
        self.epoch
    }

    /// The device in one line, for people.
    pub fn description(&self) -> String {
        self.engine.description()
    }

    /// The share of every class, `[N, classes]`, for `[N][H][W][C]` bytes, in their order; see
    /// [`class_shares`]. No image gives no share.
    ///
    /// # Errors
    /// [`Error::Shape`] for bytes that are no whole number of images, or what the device reports.
    pub fn predict(&mut self, images: Vec<u8>) -> Result<Vec<f64>> {
        let elements = self.shape.elements();
        if !images.len().is_multiple_of(elements) {
            return Err(Error::Shape {
                operation: "predict",
                what: format!(
                    "expected whole images of {} ({elements} bytes each), found {} bytes",
                    self.shape,
                    images.len()
                ),
            });
        }
        if images.is_empty() {
            return Ok(Vec::new());
        }
        // Losses are not asked for.
        let labels = vec![0; images.len() / elements];
        self.engine
            .upload_dataset(Split::Test, images, &labels, &self.normalization)?;
        let evaluation = self
            .engine
            .evaluate(Split::Test, &mut |_| ControlFlow::Continue(()))?;
        let outputs = evaluation.logits.unwrap_or_default();
        Ok(class_shares(self.loss, &outputs, self.classes))
    }
}

/// The `top` classes with the largest shares of one image, the largest first; of equal ones the first
/// class, and what is not a number last.
pub fn ranked(shares: &[f64], top: usize) -> Vec<(usize, f64)> {
    let mut ranked: Vec<(usize, f64)> = shares.iter().copied().enumerate().collect();
    let key = |share: f64| {
        if share.is_nan() {
            f64::NEG_INFINITY
        } else {
            share
        }
    };
    ranked.sort_by(|(_, a), (_, b)| key(*b).total_cmp(&key(*a)));
    ranked.truncate(top);
    ranked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_ranked_by_share_and_then_by_number() {
        let shares = [0.1, f64::NAN, 0.4, 0.4, -0.0, 0.0];
        let order: Vec<usize> = ranked(&shares, 9).into_iter().map(|(k, _)| k).collect();
        assert_eq!(order[..3], [2, 3, 0]);
        assert_eq!(order.last(), Some(&1));
        assert_eq!(ranked(&shares, 1), [(2, 0.4)]);
    }
}
