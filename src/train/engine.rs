//! What can carry out training steps: a network on the GPU, or the oracle on the CPU.

use crate::cpu;
use crate::error::{Error, Result};
use crate::gpu::{Gpu, Metrics, Step};
use crate::model::Model;
use crate::model::recipe::{Optimizer, StepScalars};
use crate::network::{Evaluation, Network, Product, Split};
use std::ops::ControlFlow;

/// What the training loop asks of a network. Vectors of parameters and optimiser state are flat, see
/// [`crate::model::Layer::parameters`].
pub trait Engine {
    /// Takes a split: `images` as N×H×W×C bytes (its own from now on, so that nobody holds them
    /// twice), a label each, and `normalization` as scale per
    /// channel, then shift per channel.
    fn upload_dataset(
        &mut self,
        split: Split,
        images: Vec<u8>,
        labels: &[u32],
        normalization: &[f32],
    ) -> Result<()>;

    /// Carries out `steps` over the training samples in the given `order`; `progress` gets the
    /// metrics of newly finished steps (of none, now and then) in order. When it says break, no
    /// further step is begun; the metrics of all steps that were carried out still go through it,
    /// and are what is returned. An error of its own ends the epoch.
    fn train_epoch(
        &mut self,
        order: &[u32],
        steps: &[Step],
        progress: &mut dyn FnMut(&[Metrics]) -> Result<ControlFlow<()>>,
    ) -> Result<Vec<Metrics>>;

    /// Runs a split forward; `progress` gets the number of samples done. When it says break, the
    /// evaluation ends early and has fewer predictions than the split has samples.
    fn evaluate(
        &mut self,
        split: Split,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Evaluation>;

    fn parameters(&self) -> Result<Vec<f32>>;

    fn set_parameters(&mut self, parameters: &[f32]) -> Result<()>;

    /// One vector per state of the optimiser, zero before the first step.
    fn optimizer_state(&self) -> Result<Vec<Vec<f32>>>;

    fn set_optimizer_state(&mut self, state: &[Vec<f32>]) -> Result<()>;

    /// The device in one line, for people.
    fn description(&self) -> String;

    /// The matrix products of a step with the name of their layer, as chosen; none on the CPU.
    fn products(&self) -> &[(String, Product)];

    /// The GPU behind the engine, if it is one.
    fn gpu(&self) -> Option<&Gpu>;

    /// The network on that GPU.
    fn network(&mut self) -> Option<&mut Network>;
}

impl Engine for Network {
    fn upload_dataset(
        &mut self,
        split: Split,
        images: Vec<u8>,
        labels: &[u32],
        normalization: &[f32],
    ) -> Result<()> {
        Network::upload_dataset(self, split, &images, labels, normalization)
    }

    fn train_epoch(
        &mut self,
        order: &[u32],
        steps: &[Step],
        progress: &mut dyn FnMut(&[Metrics]) -> Result<ControlFlow<()>>,
    ) -> Result<Vec<Metrics>> {
        Network::train_epoch(self, order, steps, progress)
    }

    fn evaluate(
        &mut self,
        split: Split,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Evaluation> {
        Network::evaluate(self, split, progress)
    }

    fn parameters(&self) -> Result<Vec<f32>> {
        Network::parameters(self)
    }

    fn set_parameters(&mut self, parameters: &[f32]) -> Result<()> {
        Network::set_parameters(self, parameters)
    }

    fn optimizer_state(&self) -> Result<Vec<Vec<f32>>> {
        Network::optimizer_state(self)
    }

    fn set_optimizer_state(&mut self, state: &[Vec<f32>]) -> Result<()> {
        Network::set_optimizer_state(self, state)
    }

    fn description(&self) -> String {
        Network::gpu(self).report().line()
    }

    fn products(&self) -> &[(String, Product)] {
        Network::products(self)
    }

    fn gpu(&self) -> Option<&Gpu> {
        Some(Network::gpu(self))
    }

    fn network(&mut self) -> Option<&mut Network> {
        Some(self)
    }
}

/// The CPU path with the data it trains on: what runs where there is no GPU.
pub struct CpuEngine {
    network: cpu::FastNetwork,
    optimizer: Optimizer,
    batch_size: usize,
    train: Option<Samples>,
    test: Option<Samples>,
}

struct Samples {
    images: Vec<u8>,
    labels: Vec<u32>,
    normalization: Vec<f32>,
}

impl CpuEngine {
    /// An engine for `model` with all parameters zero.
    pub fn new(model: &Model, batch_size: usize, optimizer: &Optimizer) -> CpuEngine {
        CpuEngine {
            network: cpu::FastNetwork::new(model, vec![0.0; model.parameter_elements]),
            optimizer: *optimizer,
            batch_size,
            train: None,
            test: None,
        }
    }

    /// The CPU in one line, for people.
    pub fn device() -> String {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        format!("CPU ({threads} threads)")
    }

    /// The chosen samples as the network takes them.
    fn batch(&self, samples: &Samples, order: &[u32]) -> (Vec<f32>, Vec<u32>) {
        let shape = self.network.model().input;
        let (scale, shift) = samples.normalization.split_at(shape.channels);
        cpu::gather_batch(&samples.images, &samples.labels, order, shape, scale, shift)
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

/// # Errors
/// [`Error::Shape`] where nothing was uploaded.
fn uploaded(samples: &Option<Samples>) -> Result<&Samples> {
    samples.as_ref().ok_or(Error::Shape {
        operation: "network",
        what: "expected a dataset, found none; call upload_dataset first".into(),
    })
}

impl Engine for CpuEngine {
    fn upload_dataset(
        &mut self,
        split: Split,
        images: Vec<u8>,
        labels: &[u32],
        normalization: &[f32],
    ) -> Result<()> {
        let shape = self.network.model().input;
        let operation = "upload_dataset";
        expect_len(
            operation,
            "bytes",
            labels.len() * shape.elements(),
            images.len(),
        )?;
        expect_len(
            operation,
            "numbers",
            2 * shape.channels,
            normalization.len(),
        )?;
        let samples = Some(Samples {
            images,
            labels: labels.to_vec(),
            normalization: normalization.to_vec(),
        });
        match split {
            Split::Train => self.train = samples,
            Split::Test => self.test = samples,
        }
        Ok(())
    }

    fn train_epoch(
        &mut self,
        order: &[u32],
        steps: &[Step],
        progress: &mut dyn FnMut(&[Metrics]) -> Result<ControlFlow<()>>,
    ) -> Result<Vec<Metrics>> {
        let mut all = Vec::with_capacity(steps.len());
        for step in steps {
            let (first, count) = (step.first as usize, step.count as usize);
            let (x, labels) = self.batch(uploaded(&self.train)?, &order[first..first + count]);
            let scalars = StepScalars {
                lr: step.lr,
                bias_correction1: step.bias_correction1,
                bias_correction2: step.bias_correction2,
            };
            let result = self
                .network
                .train_step(&x, &labels, &self.optimizer, scalars);
            let metrics = Metrics {
                loss_sum: result.loss_sum as f32,
                correct: result.correct,
            };
            all.push(metrics);
            if progress(&[metrics])?.is_break() {
                break;
            }
        }
        Ok(all)
    }

    fn evaluate(
        &mut self,
        split: Split,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Evaluation> {
        let samples = uploaded(match split {
            Split::Train => &self.train,
            Split::Test => &self.test,
        })?;
        let all: Vec<u32> = (0..samples.labels.len() as u32).collect();
        let mut evaluation = Evaluation {
            loss_sum: 0.0,
            predictions: Vec::with_capacity(all.len()),
        };
        for order in all.chunks(self.batch_size) {
            let (x, labels) = self.batch(samples, order);
            let (loss_sum, predictions) = self.network.evaluate(&x, &labels);
            evaluation.loss_sum += loss_sum;
            evaluation.predictions.extend(predictions);
            if progress(evaluation.predictions.len()).is_break() {
                break;
            }
        }
        Ok(evaluation)
    }

    fn parameters(&self) -> Result<Vec<f32>> {
        Ok(self.network.parameters().to_vec())
    }

    fn set_parameters(&mut self, parameters: &[f32]) -> Result<()> {
        let model = self.network.model().clone();
        let expected = model.parameter_elements;
        expect_len("set_parameters", "parameters", expected, parameters.len())?;
        let state = self.network.state().to_vec();
        self.network = cpu::FastNetwork::new(&model, parameters.to_vec());
        self.network.set_state(state);
        Ok(())
    }

    fn optimizer_state(&self) -> Result<Vec<Vec<f32>>> {
        let mut state = self.network.state().to_vec();
        let zeros = || vec![0.0; self.network.parameters().len()];
        state.resize_with(self.optimizer.state_vectors(), zeros);
        Ok(state)
    }

    fn set_optimizer_state(&mut self, state: &[Vec<f32>]) -> Result<()> {
        let operation = "set_optimizer_state";
        expect_len(
            operation,
            "vectors",
            self.optimizer.state_vectors(),
            state.len(),
        )?;
        for vector in state {
            let expected = self.network.parameters().len();
            expect_len(operation, "values", expected, vector.len())?;
        }
        self.network.set_state(state.to_vec());
        Ok(())
    }

    fn description(&self) -> String {
        CpuEngine::device()
    }

    fn products(&self) -> &[(String, Product)] {
        &[]
    }

    fn gpu(&self) -> Option<&Gpu> {
        None
    }

    fn network(&mut self) -> Option<&mut Network> {
        None
    }
}
