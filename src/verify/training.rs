//! Whole steps of training and evaluation on the GPU and on the CPU, side by side, in every way that
//! the adapter can plan them.

use super::parity::Outcome;
use crate::cpu;
use crate::error::Result;
use crate::gpu::{AdapterReport, Gpu, Step};
use crate::model::recipe::Optimizer;
use crate::model::{Conv2d, Loss, Model, Op, Pool2d, Shape, initial_parameters};
use crate::network::{self, Family, Network, Options, Split};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::ops::ControlFlow;
use std::sync::Arc;

const STEPS: usize = 10;
const BATCH: usize = 6;
/// Neither of the evaluation's batches divides it.
const TEST_IMAGES: usize = 5 * BATCH + 2;
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
                conv(12, [3, 2], 1, 0, false),
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

/// The ways in which a step of `model` can be planned on `adapter`: the options and what to call them.
fn plans(model: &Model, adapter: &AdapterReport) -> Result<Vec<(Options, String)>> {
    let mut plans = Vec::new();
    for family in Family::ALL.into_iter().filter(|f| f.supported(adapter)) {
        let options = Options {
            family: Some(family),
            large_evaluation: Some(false),
            ..Options::default()
        };
        let unfused = Options {
            unfused_pooling: true,
            ..options.clone()
        };
        let explicit = Options {
            explicit_conv: true,
            ..options.clone()
        };
        let products = |options| network::products(model, BATCH, options, adapter);
        let fuses = products(&options)? != products(&unfused)?;
        let pooling = if fuses { ", pooling fused" } else { "" };
        plans.push((options, format!("{family}{pooling}")));
        if fuses {
            plans.push((unfused, format!("{family}, pooling unfused")));
        }
        plans.push((explicit, format!("{family}, explicit convolution")));
    }
    Ok(plans)
}

/// Trains each of a few small models for ten steps on both sides, from the same parameters on the
/// same samples, with plain SGD (whose steps are as large as the gradients, so that a wrong scale
/// shows; Adam would hide it), and evaluates it afterwards, in every way that a step can be planned:
/// by every family that the adapter can run, with pooling fused and not, with the im2col matrix
/// computed and stored, in small and in large evaluation batches. Compares all losses, all gradients
/// of the first step and of the last, the evaluation's loss and every prediction. `progress` hears
/// what comes next.
///
/// # Errors
/// What the device reports; a difference out of tolerance is an [`Outcome`], not an error.
pub fn training(gpu: &Arc<Gpu>, progress: &mut dyn FnMut(&str)) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for model in models() {
        let reference = Reference::of(&model);
        for (options, name) in plans(&model, gpu.report())? {
            let variant = format!("model '{}', {name}", model.name);
            progress(&variant);
            outcomes.extend(compare(gpu, &reference, &options, &variant)?);
        }
    }
    Ok(outcomes)
}

const OPTIMIZER: Optimizer = Optimizer::Sgd {
    momentum: 0.0,
    weight_decay: 0.0,
};

/// Images that are random bytes, and their labels.
struct Images {
    images: Vec<u8>,
    labels: Vec<u32>,
}

impl Images {
    fn draw(rng: &mut ChaCha8Rng, model: &Model, len: usize) -> Images {
        Images {
            images: (0..len * model.input.elements())
                .map(|_| rng.random())
                .collect(),
            labels: (0..len)
                .map(|_| rng.random_range(0..CLASSES as u32))
                .collect(),
        }
    }

    /// The batch of the images `picked`, as the twin makes it.
    fn batch(&self, model: &Model, picked: &[u32]) -> (Vec<f64>, Vec<u32>) {
        let [scale, shift] = normalization(model);
        cpu::gather_batch(
            &self.images,
            &self.labels,
            picked,
            model.input,
            &scale,
            &shift,
        )
    }
}

/// Scale and shift of every channel.
fn normalization(model: &Model) -> [Vec<f32>; 2] {
    [1.0 / 128.0, -1.0].map(|value| vec![value; model.input.channels])
}

/// A training of `model` and what the twins make of it.
struct Reference<'a> {
    model: &'a Model,
    train: Images,
    test: Images,
    order: Vec<u32>,
    steps: Vec<Step>,
    parameters: Vec<f32>,
    /// Of every step.
    losses: Vec<f64>,
    first_gradients: Vec<f64>,
    last_gradients: Vec<f64>,
}

impl Reference<'_> {
    fn of(model: &Model) -> Reference<'_> {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        // The last batch is not full.
        let len = STEPS * BATCH - 2;
        let mut reference = Reference {
            model,
            train: Images::draw(&mut rng, model, len),
            test: Images::draw(&mut rng, model, TEST_IMAGES),
            order: (0..len as u32).rev().collect(),
            steps: (0..STEPS)
                .map(|i| Step {
                    first: (i * BATCH) as u32,
                    count: BATCH.min(len - i * BATCH) as u32,
                    lr: 0.05,
                    bias_correction1: 1.0,
                    bias_correction2: 1.0,
                    padding: [0; 3],
                })
                .collect(),
            parameters: initial_parameters(model, 3),
            losses: Vec::new(),
            first_gradients: Vec::new(),
            last_gradients: Vec::new(),
        };
        let mut twin = twin(model, &reference.parameters);
        for (i, step) in reference.steps.iter().enumerate() {
            let picked = &reference.order[step.first as usize..][..step.count as usize];
            let (x, y) = reference.train.batch(model, picked);
            let gradients = twin.gradients(&x, &y).gradients;
            if i == 0 {
                reference.first_gradients.clone_from(&gradients);
            }
            reference.last_gradients = gradients;
            let scalars = OPTIMIZER.step_scalars(f64::from(step.lr), i as u64 + 1);
            let loss = twin.train_step(&x, &y, &OPTIMIZER, scalars).loss_sum;
            reference.losses.push(loss);
        }
        reference
    }
}

fn twin(model: &Model, parameters: &[f32]) -> cpu::Network<f64> {
    cpu::Network::new(model, parameters.iter().map(|v| f64::from(*v)).collect())
}

/// The training and the evaluations of one plan.
fn compare(
    gpu: &Arc<Gpu>,
    reference: &Reference,
    options: &Options,
    variant: &str,
) -> Result<Vec<Outcome>> {
    let Reference {
        model,
        train,
        order,
        steps,
        parameters,
        ..
    } = reference;
    let mut network = Network::new(gpu.clone(), model, BATCH, &OPTIMIZER, options)?;
    network.set_parameters(parameters)?;
    let normalization = normalization(model).concat();
    network.upload_dataset(Split::Train, &train.images, &train.labels, &normalization)?;
    // One epoch of a single step first: its gradients are those of the initial parameters.
    network.train_epoch(order, &steps[..1], &mut |_| Ok(ControlFlow::Continue(())))?;
    let first_gradients = network.gradients()?;
    network.set_parameters(parameters)?;
    let metrics = network.train_epoch(order, steps, &mut |_| Ok(ControlFlow::Continue(())))?;
    let last_gradients = network.gradients()?;

    let mut worst = Worst::default();
    for (which, tolerance, found, expected) in [
        ("first", 2e-5, first_gradients, &reference.first_gradients),
        ("last", 2e-4, last_gradients, &reference.last_gradients),
    ] {
        // A gradient is a sum of products of sums: the error scales with the largest of them.
        let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let tolerance = tolerance * largest.max(1e-3);
        worst.expect_count("gradients", found.len(), expected.len());
        for (a, (found, expected)) in found.iter().zip(expected).enumerate() {
            let place = || format!("gradient {a} of the {which} step");
            worst.see(f64::from(*found), *expected, tolerance, place);
        }
    }
    worst.expect_count("losses", metrics.len(), STEPS);
    for (i, (found, expected)) in metrics.iter().zip(&reference.losses).enumerate() {
        let place = || format!("the loss of step {}", i + 1);
        let tolerance = 1e-4 * expected.abs().max(0.1);
        worst.see(f64::from(found.loss_sum), *expected, tolerance, place);
    }
    let mut outcomes = vec![worst.outcome("training", format!("{variant}, {STEPS} steps"))];

    let trained = network.parameters()?;
    outcomes.push(evaluate(&mut network, reference, &trained, variant)?);
    let large = Options {
        large_evaluation: Some(true),
        ..options.clone()
    };
    let mut network = Network::new(gpu.clone(), model, BATCH, &OPTIMIZER, &large)?;
    // Where the buffers hold no larger batch it is the same plan again.
    if network.evaluation_batch() > BATCH {
        network.set_parameters(&trained)?;
        outcomes.push(evaluate(&mut network, reference, &trained, variant)?);
    }
    Ok(outcomes)
}

/// The evaluation of the `trained` parameters, which are `network`'s.
fn evaluate(
    network: &mut Network,
    reference: &Reference,
    trained: &[f32],
    variant: &str,
) -> Result<Outcome> {
    let Reference { model, test, .. } = reference;
    let normalization = normalization(model).concat();
    network.upload_dataset(Split::Test, &test.images, &test.labels, &normalization)?;
    let found = network.evaluate(Split::Test, &mut |_| ControlFlow::Continue(()))?;

    let all: Vec<u32> = (0..TEST_IMAGES as u32).collect();
    let (x, y) = test.batch(model, &all);
    let twin = twin(model, trained);
    let expected = twin.gradients(&x, &y).loss_sum;
    let activations = twin.forward(&x);
    let outputs = activations.last().map_or(&x, |last| &last.output);
    let mut worst = Worst::default();
    let tolerance = 1e-5 * expected.abs().max(0.1);
    worst.see(found.loss_sum, expected, tolerance, || "the loss".into());
    worst.expect_count("predictions", found.predictions.len(), TEST_IMAGES);
    for (i, (class, outputs)) in found
        .predictions
        .iter()
        .zip(outputs.chunks(CLASSES))
        .enumerate()
    {
        // Rounding may decide between two classes that are as good as equal.
        let largest = outputs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let chosen = outputs.get(*class as usize).copied().unwrap_or(f64::NAN);
        let place = || format!("the output of class {class}, predicted for image {i}");
        worst.see(chosen, largest, 1e-5 * largest.abs().max(1.0), place);
    }
    let batch = network.evaluation_batch();
    Ok(worst.outcome("evaluation", format!("{variant}, batches of {batch}")))
}

/// The largest error by its tolerance, and the first one that is out.
#[derive(Default)]
struct Worst {
    error: f64,
    tolerance: f64,
    failure: Option<String>,
}

impl Worst {
    fn outcome(self, kernel: &str, variant: String) -> Outcome {
        Outcome {
            kernel: kernel.into(),
            variant,
            worst: self.error,
            tolerance: self.tolerance,
            passed: self.failure.is_none(),
            detail: self.failure,
        }
    }

    fn expect_count(&mut self, what: &str, found: usize, expected: usize) {
        let place = || format!("the number of {what}");
        self.see(found as f64, expected as f64, 0.0, place);
    }

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
