//! Ten steps of training on the GPU and on the CPU, side by side.

use super::parity::Outcome;
use crate::cpu;
use crate::error::Result;
use crate::gpu::{Gpu, Step};
use crate::model::recipe::Optimizer;
use crate::model::{Conv2d, Loss, Model, Op, Pool2d, Shape, initial_parameters};
use crate::network::{Network, Options, Split};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::ops::ControlFlow;
use std::sync::Arc;

const STEPS: usize = 10;
const BATCH: usize = 6;
const CLASSES: usize = 5;
const VALID: &str = "the geometries of these models are valid";

/// What a layer of the models below is, before its input is known.
#[derive(Clone, Copy)]
enum Entry {
    Conv {
        out: usize,
        kernel: [usize; 2],
        stride: usize,
        padding: usize,
        relu: bool,
    },
    MaxPool {
        kernel: usize,
        stride: usize,
    },
    MeanPool,
    Dense {
        units: usize,
        relu: bool,
    },
    Relu,
    Sigmoid,
}

/// Every kind of layer in every kind of neighbourhood, in small.
fn models() -> Vec<Model> {
    use Entry::*;
    let conv = |out, kernel, stride, padding, relu| Conv {
        out,
        kernel,
        stride,
        padding,
        relu,
    };
    let pool = |kernel, stride| MaxPool { kernel, stride };
    let dense = |units, relu| Dense { units, relu };
    let model = |name, input: [usize; 3], loss, entries: &[Entry]| {
        let input = Shape::new(input[0], input[1], input[2]);
        let chain = Model::chain(name, input, CLASSES, loss, entries, |entry, shape| {
            Ok(match *entry {
                Conv {
                    out,
                    kernel,
                    stride,
                    padding,
                    relu,
                } => Op::Conv2d {
                    geometry: Conv2d::new(shape, out, kernel, [stride; 2], [padding; 2])?,
                    relu,
                },
                MaxPool { kernel, stride } => {
                    Op::MaxPool2d(Pool2d::new(shape, [kernel; 2], [stride; 2])?)
                }
                MeanPool => Op::MeanPool2d(Pool2d::new(shape, [2; 2], [2; 2])?),
                Dense { units, relu } => Op::Dense {
                    geometry: Conv2d::dense(shape.elements(), units),
                    relu,
                },
                Relu => Op::Relu,
                Sigmoid => Op::Sigmoid,
            })
        });
        chain.expect(VALID)
    };
    let entropy = Loss::SoftmaxCrossEntropy;
    vec![
        model(
            "fused",
            [14, 13, 1],
            entropy,
            &[
                conv(8, [3, 3], 1, 1, true),
                pool(2, 2),
                conv(12, [3, 2], 1, 0, true),
                pool(2, 2),
                dense(20, true),
                dense(CLASSES, false),
            ],
        ),
        model(
            "uneven",
            [13, 15, 3],
            entropy,
            &[
                conv(5, [3, 3], 2, 1, false),
                Relu,
                pool(3, 2),
                conv(7, [2, 2], 1, 1, true),
                MeanPool,
                dense(CLASSES, false),
            ],
        ),
        model(
            "sigmoid",
            [9, 8, 1],
            Loss::SquaredError,
            &[
                conv(4, [3, 3], 1, 1, true),
                Sigmoid,
                dense(11, true),
                Relu,
                dense(CLASSES, false),
                Sigmoid,
            ],
        ),
    ]
}

/// Trains each of a few small models for ten steps on both sides, from the same parameters on the
/// same samples, with plain SGD (whose steps are as large as the gradients, so that a wrong scale
/// shows; Adam would hide it), in the ways the network can be planned. Compares all losses, and all
/// gradients of the first step and of the last.
///
/// # Errors
/// What the device reports; a difference out of tolerance is an [`Outcome`], not an error.
pub fn training(gpu: &Arc<Gpu>) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for model in models() {
        for explicit_conv in [false, true] {
            let options = Options {
                explicit_conv,
                ..Options::default()
            };
            let form = if explicit_conv {
                "explicit"
            } else {
                "implicit"
            };
            let variant = format!("model '{}', {form} convolution, {STEPS} steps", model.name);
            outcomes.push(compare_training(gpu, &model, &options, variant)?);
        }
    }
    Ok(outcomes)
}

fn compare_training(
    gpu: &Arc<Gpu>,
    model: &Model,
    options: &Options,
    variant: String,
) -> Result<Outcome> {
    let optimizer = Optimizer::Sgd {
        momentum: 0.0,
        weight_decay: 0.0,
    };
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    // The last batch is not full.
    let len = STEPS * BATCH - 2;
    let elements = model.input.elements();
    let images: Vec<u8> = (0..len * elements).map(|_| rng.random()).collect();
    let labels: Vec<u32> = (0..len)
        .map(|_| rng.random_range(0..CLASSES as u32))
        .collect();
    let channels = model.input.channels;
    let scale = vec![1.0 / 128.0; channels];
    let shift = vec![-1.0; channels];
    let order: Vec<u32> = (0..len as u32).rev().collect();
    let steps: Vec<Step> = (0..STEPS)
        .map(|i| Step {
            first: (i * BATCH) as u32,
            count: BATCH.min(len - i * BATCH) as u32,
            lr: 0.05,
            bias_correction1: 1.0,
            bias_correction2: 1.0,
            padding: [0; 3],
        })
        .collect();
    let parameters = initial_parameters(model, 3);

    let mut network = Network::new(gpu.clone(), model, BATCH, &optimizer, options)?;
    network.set_parameters(&parameters)?;
    let normalization: Vec<f32> = scale.iter().chain(&shift).copied().collect();
    network.upload_dataset(Split::Train, &images, &labels, &normalization)?;
    let mut worst = Worst::default();
    // One epoch of a single step first: its gradients are those of the initial parameters.
    network.train_epoch(&order, &steps[..1], &mut |_| Ok(ControlFlow::Continue(())))?;
    let first_gradients = network.gradients()?;
    network.set_parameters(&parameters)?;
    let metrics = network.train_epoch(&order, &steps, &mut |_| Ok(ControlFlow::Continue(())))?;
    let last_gradients = network.gradients()?;

    let wide: Vec<f64> = parameters.iter().map(|v| f64::from(*v)).collect();
    let mut twin = cpu::Network::<f64>::new(model, wide);
    for (i, (step, found)) in steps.iter().zip(&metrics).enumerate() {
        let picked = &order[step.first as usize..][..step.count as usize];
        let (x, y) =
            cpu::gather_batch::<f64>(&images, &labels, picked, model.input, &scale, &shift);
        if i == 0 || i == STEPS - 1 {
            let expected = twin.gradients(&x, &y).gradients;
            let gradients = if i == 0 {
                &first_gradients
            } else {
                &last_gradients
            };
            // A gradient is a sum of products of sums: the error scales with the largest of them.
            let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            let tolerance = if i == 0 { 2e-5 } else { 2e-4 } * largest.max(1e-3);
            for (a, (found, expected)) in gradients.iter().zip(&expected).enumerate() {
                let place = || format!("gradient {a} of step {}", i + 1);
                worst.see(f64::from(*found), *expected, tolerance, place);
            }
            if gradients.len() != expected.len() {
                worst.see(f64::NAN, 0.0, 0.0, || "the number of gradients".into());
            }
        }
        let scalars = optimizer.step_scalars(f64::from(step.lr), i as u64 + 1);
        let expected = twin.train_step(&x, &y, &optimizer, scalars);
        let place = || format!("the loss of step {}", i + 1);
        let tolerance = 1e-4 * expected.loss_sum.abs().max(0.1);
        worst.see(
            f64::from(found.loss_sum),
            expected.loss_sum,
            tolerance,
            place,
        );
    }
    if metrics.len() != STEPS {
        worst.see(f64::NAN, 0.0, 0.0, || "the number of losses".into());
    }
    Ok(Outcome {
        kernel: "training".into(),
        variant,
        worst: worst.error,
        tolerance: worst.tolerance,
        passed: worst.failure.is_none(),
        detail: worst.failure,
    })
}

/// The largest error by its tolerance, and the first one that is out.
#[derive(Default)]
struct Worst {
    error: f64,
    tolerance: f64,
    failure: Option<String>,
}

impl Worst {
    fn see(&mut self, found: f64, expected: f64, tolerance: f64, place: impl Fn() -> String) {
        let error = (found - expected).abs();
        let within = error <= tolerance; // false for NaN
        if !within && self.failure.is_none() {
            self.failure = Some(format!(
                "{}: expected {expected} ± {tolerance:.1e}, found {found}",
                place()
            ));
        }
        if !within && error.is_nan()
            || self.tolerance == 0.0
            || error / tolerance > self.error / self.tolerance
        {
            (self.error, self.tolerance) = (error, tolerance);
        }
    }
}
