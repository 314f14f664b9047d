//! A training loop of one's own over [`Engine`]: the order of the images, the learning rate of every step, what is
//! done with the gradients, and when to stop, are all decided here. Nothing is written to disk.
//! `cargo run --release --example custom_loop [IMAGES]`.

use std::ops::ControlFlow;
use wgrad::data::{Normalization, Request, load};
use wgrad::engine::{Engine, Split};
use wgrad::kernels::Step;
use wgrad::model::recipe::{Optimizer, Recipe};
use wgrad::model::{self, initial_parameters};
use wgrad::train::epoch_order;
use wgrad::{Error, Result};

const BATCH: usize = 64;
const SEED: u64 = 1;

pub fn main() -> Result<()> {
    let images = std::env::args().nth(1).and_then(|n| n.parse().ok());
    let accuracy = run(images.unwrap_or(60_000))?;
    println!("test accuracy {:.2} %", 100.0 * accuracy);
    Ok(())
}

/// Trains on so many images; the accuracy on the test images.
pub fn run(images: usize) -> Result<f64> {
    let mut data = load("mnist", &Request::default(), &mut |_, _| ())?;
    data.truncate(images)?;
    let model = model::load("tutorial")?.resolve(data.train.shape, data.train.classes)?;
    let recipe = Recipe {
        optimizer: Optimizer::Adamw {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
        },
        batch_size: BATCH,
        ..Recipe::default()
    };
    // None: the CPU. With Some(Gpu::open(…)?.into()) the same steps run there.
    let mut engine = Engine::of(None, &model, &recipe)?;
    engine.set_parameters(&initial_parameters(&model, SEED))?;

    let Normalization { scale, shift } = Normalization::of(&data.train);
    let normalization = [scale, shift].concat();
    // The labels by which the order goes and the accuracy is counted stay here, the images do not.
    let (labels, truth) = (data.train.labels, data.test.labels);
    engine.upload_dataset(Split::Train, data.train.images, &labels, &normalization)?;
    engine.upload_dataset(Split::Test, data.test.images, &truth, &normalization)?;

    let (epochs, per_epoch) = (3, labels.len().div_ceil(BATCH));
    let mut accuracy = 0.0;
    for epoch in 1..=epochs {
        // At random, but in the first epoch the classes take turns: 0, 1, …, 9, 0, 1, ….
        let mut order = epoch_order(labels.len(), SEED, epoch);
        if epoch == 1 {
            let mut seen = [0; 10];
            let mut rank = vec![0; labels.len()];
            for &image in &order {
                let class = labels[image as usize] as usize;
                rank[image as usize] = seen[class];
                seen[class] += 1;
            }
            order.sort_by_key(|&image| (rank[image as usize], labels[image as usize]));
        }
        // Triangular: up to a third of all steps, then down to 0.
        let rate = |step: usize| {
            let done = step as f64 / (epochs * per_epoch) as f64;
            2e-3 * (3.0 * done).min(1.5 * (1.0 - done))
        };
        let steps: Vec<Step> = (0..per_epoch)
            .map(|i| {
                let first = i * BATCH;
                let step = (epoch - 1) * per_epoch + i;
                let scalars = recipe.optimizer.step_scalars(rate(step), step as u64 + 1);
                Step {
                    lr: scalars.lr,
                    bias_correction1: scalars.bias_correction1,
                    bias_correction2: scalars.bias_correction2,
                    ..Step::new(first, BATCH.min(labels.len() - first))
                }
            })
            .collect();
        let metrics = engine.train_epoch(&order, &steps, &mut |_| Ok(ControlFlow::Continue(())))?;
        let loss: f64 =
            metrics.iter().map(|m| f64::from(m.loss_sum)).sum::<f64>() / labels.len() as f64;

        // The gradients of the last batch, one flat vector in which every parameter has its place.
        let gradients = engine.gradients()?;
        let norms = model
            .layers
            .iter()
            .flat_map(|layer| &layer.parameters)
            .map(|p| {
                let values = &gradients[p.start..p.start + p.elements()];
                let norm = values.iter().map(|g| g * g).sum::<f32>().sqrt();
                format!("{} {norm:.1e}", p.name)
            });
        let norms: Vec<String> = norms.collect();

        let evaluation = engine.evaluate(Split::Test, &mut |_| ControlFlow::Continue(()))?;
        let right = evaluation
            .predictions
            .iter()
            .zip(&truth)
            .filter(|(p, t)| p == t);
        accuracy = right.count() as f64 / truth.len() as f64;
        println!(
            "epoch {epoch}: loss {loss:.4}, test {:.2} %, gradients: {}",
            100.0 * accuracy,
            norms.join(", ")
        );
        if !loss.is_finite() {
            return Err(Error::Usage(
                "expected a finite loss; lower the learning rate".into(),
            ));
        }
    }
    Ok(accuracy)
}
