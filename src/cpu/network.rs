//! A whole network on the CPU: forward, gradients, update.

use super::loss::argmax;
use super::optimizer::update;
use super::*;
use crate::model::recipe::{Optimizer, StepScalars};
use crate::model::{Layer, Loss, Model, Op};
use std::ops::Range;

/// A model with its parameters and the optimiser's state.
#[derive(Clone, Debug)]
pub struct Network<T> {
    model: Model,
    parameters: Vec<T>,
    state: Vec<Vec<T>>,
}

/// Output of one layer for a batch.
#[derive(Clone, Debug)]
pub struct Activation<T> {
    /// `[N,H,W,C]` with the layer's output shape.
    pub output: Vec<T>,
    /// Place of each maximum inside its window after max-pooling, else empty.
    pub index: Vec<u32>,
}

/// Loss and gradients of one batch.
#[derive(Clone, Debug)]
pub struct StepOutput<T> {
    /// Sum of the losses over the batch.
    pub loss_sum: f64,
    /// Samples whose largest output is that of their label.
    pub correct: u32,
    /// Gradient of the mean loss, laid out as the parameters.
    pub gradients: Vec<T>,
}

/// Loss and correct count of one batch, before its update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepMetrics {
    /// Sum of the losses over the batch.
    pub loss_sum: f64,
    pub correct: u32,
}

impl<T: Float> Network<T> {
    /// A network with the flat `parameters` of [`Model::parameter_elements`] and no optimiser
    /// state yet.
    pub fn new(model: &Model, parameters: Vec<T>) -> Self {
        assert_eq!(parameters.len(), model.parameter_elements);
        Network {
            model: model.clone(),
            parameters,
            state: Vec::new(),
        }
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The flat parameter vector, laid out as [`Model::layers`] says.
    pub fn parameters(&self) -> &[T] {
        &self.parameters
    }

    /// The optimiser's state vectors, each as long as the parameters: velocity (SGD), or first and
    /// second moment (AdamW); none before the first step.
    pub fn state(&self) -> &[Vec<T>] {
        &self.state
    }

    /// Puts back the state of a checkpoint.
    pub fn set_state(&mut self, state: Vec<Vec<T>>) {
        assert!(state.iter().all(|s| s.len() == self.parameters.len()));
        self.state = state;
    }

    /// The activations of all layers for x `[N,H,W,C]`, in order; the last is the network's output.
    pub fn forward(&self, x: &[T]) -> Vec<Activation<T>> {
        let mut activations: Vec<Activation<T>> = Vec::with_capacity(self.model.layers.len());
        for (i, layer) in self.model.layers.iter().enumerate() {
            let x = activations.last().map_or(x, |a| &a.output);
            let mut index = Vec::new();
            let output = match &layer.op {
                Op::Conv2d { geometry, relu } | Op::Dense { geometry, relu } => {
                    conv2d_forward(geometry, *relu, x, self.parameters_of(i))
                }
                Op::MaxPool2d(pool) => {
                    let output;
                    (output, index) = maxpool2d_forward(pool, x);
                    output
                }
                Op::MeanPool2d(pool) => meanpool2d_forward(pool, x),
                Op::Relu => relu_forward(x),
                Op::Sigmoid => sigmoid_forward(x),
            };
            activations.push(Activation { output, index });
        }
        activations
    }

    /// Loss and gradient of the mean loss for x `[N,H,W,C]` and N labels, by backpropagation
    /// (Rumelhart, Hinton, Williams, 1986).
    pub fn gradients(&self, x: &[T], labels: &[u32]) -> StepOutput<T> {
        let layers = &self.model.layers;
        let activations = self.forward(x);
        let loss = model_loss(&self.model, self.output(&activations), labels);
        let mut gradients = vec![T::zero(); self.parameters.len()];
        // Below the first layer with weights nothing wants a gradient.
        let first = layers.iter().position(|l| l.parameters.is_some());
        let mut dy = loss.gradient;
        for i in (first.unwrap_or(layers.len())..layers.len()).rev() {
            let Activation { output: y, index } = &activations[i];
            dy = match &layers[i].op {
                Op::Conv2d { geometry, relu } | Op::Dense { geometry, relu } => {
                    if *relu {
                        dy = relu_backward(y, &dy);
                    }
                    let x = i.checked_sub(1).map_or(x, |i| &activations[i].output);
                    let gradient = conv2d_backward_weight(geometry, x, &dy);
                    gradients[range(&layers[i])].copy_from_slice(&gradient);
                    if Some(i) == first {
                        break;
                    }
                    conv2d_backward_input(geometry, &dy, self.parameters_of(i))
                }
                Op::MaxPool2d(pool) if pool.overlapping() => {
                    maxpool2d_backward_overlapping(pool, &dy, index)
                }
                Op::MaxPool2d(pool) => maxpool2d_backward(pool, &dy, index),
                Op::MeanPool2d(pool) => meanpool2d_backward(pool, &dy),
                Op::Relu => relu_backward(y, &dy),
                Op::Sigmoid => sigmoid_backward(y, &dy),
            };
        }
        let (loss_sum, correct) = sum_metrics(&loss.loss, &loss.correct);
        StepOutput {
            loss_sum: loss_sum.into(),
            correct,
            gradients,
        }
    }

    /// One training step on a batch: gradients, then the optimiser's update.
    pub fn train_step(
        &mut self,
        x: &[T],
        labels: &[u32],
        optimizer: &Optimizer,
        scalars: StepScalars,
    ) -> StepMetrics {
        let step = self.gradients(x, labels);
        update(
            optimizer,
            scalars,
            &mut self.parameters,
            &step.gradients,
            &mut self.state,
        );
        StepMetrics {
            loss_sum: step.loss_sum,
            correct: step.correct,
        }
    }

    /// Sum of the losses, and the predicted class of every sample.
    pub fn evaluate(&self, x: &[T], labels: &[u32]) -> (f64, Vec<u32>) {
        let activations = self.forward(x);
        let loss = model_loss(&self.model, self.output(&activations), labels);
        let predictions = self
            .output(&activations)
            .chunks_exact(self.model.classes)
            .map(|output| argmax(output) as u32);
        let (loss_sum, _) = sum_metrics(&loss.loss, &loss.correct);
        (loss_sum.into(), predictions.collect())
    }

    fn output<'a>(&self, activations: &'a [Activation<T>]) -> &'a [T] {
        &activations[self.model.layers.len() - 1].output
    }

    fn parameters_of(&self, i: usize) -> &[T] {
        &self.parameters[range(&self.model.layers[i])]
    }
}

/// Where weight and bias of a layer lie in the flat parameter vector; empty without weights.
pub(super) fn range(layer: &Layer) -> Range<usize> {
    let start = layer.parameters.unwrap_or_default();
    start..start + layer.parameter_count()
}

/// The model's loss, for its output `[N, classes]`.
pub(super) fn model_loss<T: Float>(model: &Model, output: &[T], labels: &[u32]) -> LossOutput<T> {
    let loss = match model.loss {
        Loss::SoftmaxCrossEntropy => |z: &[T], l: &[u32], c| softmax_cross_entropy(z, l, c, 0.0),
        Loss::SquaredError => squared_error,
    };
    loss(output, labels, model.classes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::check::{noise, small_network};

    const SGD: Optimizer = Optimizer::Sgd {
        momentum: 0.9,
        weight_decay: 0.01,
    };
    const ADAMW: Optimizer = Optimizer::Adamw {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
    };

    fn noise_f32(seed: u64, len: usize) -> Vec<f32> {
        noise(seed, len).into_iter().map(|v| v as f32).collect()
    }

    /// A network with random parameters, and a batch large enough to be cut into several tasks and
    /// several partial sums everywhere.
    fn example(fused: bool) -> (Network<f32>, Vec<f32>, Vec<u32>) {
        let model = small_network(Loss::SoftmaxCrossEntropy, fused);
        let x = noise_f32(1, 50 * model.input.elements());
        let labels = (0..50).map(|i| i * i % 3).collect();
        let parameters = noise_f32(2, model.parameter_elements);
        (Network::new(&model, parameters), x, labels)
    }

    /// Everything that some steps of training leave behind, as bits.
    fn trained(network: &mut Network<f32>, x: &[f32], labels: &[u32], rule: Optimizer) -> Vec<u32> {
        let mut bits = Vec::new();
        for step in 1..=3 {
            let metrics = network.train_step(x, labels, &rule, rule.step_scalars(0.01, step));
            bits.extend([(metrics.loss_sum as f32).to_bits(), metrics.correct]);
        }
        let state = network.state().iter().flatten();
        bits.extend(
            network
                .parameters()
                .iter()
                .chain(state)
                .map(|v| v.to_bits()),
        );
        bits
    }

    #[test]
    fn the_bits_do_not_depend_on_the_number_of_threads() {
        for (fused, rule) in [(true, SGD), (false, ADAMW)] {
            let with_threads = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                let (mut network, x, labels) = example(fused);
                let train = || trained(&mut network, &x, &labels, rule);
                pool.build().unwrap().install(train)
            };
            assert_eq!(with_threads(1), with_threads(3));
        }
    }

    #[test]
    fn training_lowers_the_loss_and_evaluation_counts_the_same() {
        for (fused, rule) in [(true, SGD), (false, ADAMW)] {
            let (mut network, x, labels) = example(fused);
            let mut losses = Vec::new();
            for step in 1..=60 {
                let (loss_sum, predictions) = network.evaluate(&x, &labels);
                let hits = predictions.iter().zip(&labels).filter(|(p, l)| p == l);
                let correct = hits.count() as u32;
                let scalars = rule.step_scalars(0.01, step);
                let metrics = network.train_step(&x, &labels, &rule, scalars);
                assert_eq!(metrics, StepMetrics { loss_sum, correct });
                losses.push(loss_sum);
            }
            assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
        }
    }

    #[test]
    fn parameters_and_state_are_all_there_is_to_a_checkpoint() {
        let (mut network, x, labels) = example(true);
        trained(&mut network, &x, &labels, ADAMW);
        let mut resumed = Network::new(network.model(), network.parameters().to_vec());
        resumed.set_state(network.state().to_vec());
        assert_eq!(
            trained(&mut resumed, &x, &labels, ADAMW),
            trained(&mut network, &x, &labels, ADAMW)
        );
    }

    #[test]
    fn alignment_gaps_stay_zero() {
        let (mut network, x, labels) = example(true);
        let (starts, ends): (Vec<_>, Vec<_>) = network
            .model
            .layers
            .iter()
            .filter(|layer| layer.parameters.is_some())
            .map(|layer| (range(layer).start, range(layer).end))
            .unzip();
        let gaps: Vec<_> = ends.into_iter().zip(starts.into_iter().skip(1)).collect();
        assert!(gaps.iter().any(|(end, start)| start > end));
        for &(end, start) in &gaps {
            network.parameters[end..start].fill(0.0);
        }
        trained(&mut network, &x, &labels, ADAMW);
        for &(end, start) in &gaps {
            assert!(network.parameters[end..start].iter().all(|&w| w == 0.0));
        }
    }
}
