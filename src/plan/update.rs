//! From the gradients to new parameters: clipping, the optimiser's rule, the moving average.

use super::{Builder, Lifetime, Options, Section};
use crate::error::Result;
use crate::kernels::conv2d::{self, Pass};
use crate::kernels::{Dtype, View, average, clip, half, muon, optimizer, reduce};
use crate::model::recipe::Optimizer;
use crate::model::{Conv2d, Factors, Layer, Model, Role};

/// What the kept tensor `factors[2,elements]` of a training plan holds: for each element of the flat
/// parameter vector its factor on the learning rate, then those on weight decay. The first is 0 for what is frozen and
/// for what lies between parameters, and below 0 for what Muon takes. `None` where a plan has no such
/// tensor, since all are trained alike.
///
/// # Errors
/// As [`crate::model::recipe::Groups::factors`].
pub fn factors(model: &Model, rule: &Optimizer, options: &Options) -> Result<Option<Vec<f32>>> {
    let groups = options.groups.factors(model)?;
    if !are_needed(rule, &groups) {
        return Ok(None);
    }
    let others = match *rule {
        Optimizer::Muon { other_lr, .. } => options.lr.map_or(1.0, |lr| other_lr / lr as f32),
        _ => 1.0,
    };
    let is_muon = matches!(rule, Optimizer::Muon { .. });
    let mut factors = vec![0.0; 2 * model.parameter_elements];
    let (rates, decays) = factors.split_at_mut(model.parameter_elements);
    for (layer, groups) in model.layers.iter().zip(groups) {
        for (parameter, own) in layer.parameters.iter().zip(groups) {
            let by_muon = is_muon && layer.op.is_for_muon() && parameter.role == Role::Weight;
            let lr = own.lr * if by_muon { -1.0 } else { others };
            let range = parameter.start..parameter.start + parameter.elements();
            rates[range.clone()].fill(lr);
            decays[range].fill(own.decay);
        }
    }
    Ok(Some(factors))
}

/// Whether some parameters are trained differently from others.
fn are_needed(rule: &Optimizer, groups: &[Vec<Factors>]) -> bool {
    let plain = Factors {
        lr: 1.0,
        decay: 1.0,
    };
    matches!(rule, Optimizer::Muon { .. }) || groups.iter().flatten().any(|own| *own != plain)
}

impl Builder<'_> {
    /// A tensor of floats that is kept from step to step.
    pub(super) fn kept(&mut self, name: &str, shape: &[usize]) -> View {
        let view = self.tensor(name, shape, Dtype::F32);
        self.tensors[view.tensor].lifetime = Lifetime::Kept;
        view
    }

    pub(super) fn update(&mut self, rule: &Optimizer, options: &Options) {
        self.section = Section::Update;
        if let Some((_, next)) = self.synced {
            self.emit(reduce::reduce_splits(1, next, self.running));
        }
        let elements = self.parameters.len;
        let state: Vec<View> = (0..rule.state_vectors())
            .map(|i| self.kept(optimizer::STATE_NAMES[i], &[elements]))
            .collect();
        let factors = are_needed(rule, &self.factors).then(|| self.kept("factors", &[2, elements]));
        let gradients = self.batch_gradients();
        if let Some(loss_scale) = self.loss_scale {
            let norm = self.norm(gradients, factors);
            self.emit(half::unscale_gradients(gradients, loss_scale));
            let [steps, counter] = self.step();
            self.emit(half::advance_loss_scale(norm, loss_scale, steps, counter));
        }
        if let Some(limit) = options.clip_norm {
            let norm = self.norm(gradients, factors);
            self.emit(clip::clip_gradients(limit, gradients, norm));
        }
        if let Optimizer::Muon { momentum, .. } = *rule {
            let model = self.model;
            for (i, layer) in model.layers.iter().enumerate() {
                // The weight comes first.
                if layer.op.is_for_muon() && self.factors[i][0].lr != 0.0 {
                    self.layer.clone_from(&layer.name);
                    self.muon(layer, momentum, self.factors[i][0].lr, state[0]);
                }
            }
            self.layer.clear();
        }
        let [steps, counter] = self.step();
        self.emit(optimizer::update_parameters(
            rule,
            self.parameters,
            gradients,
            factors,
            &state,
            steps,
            counter,
        ));
        if options.average {
            for (name, values) in [
                ("average_parameters", self.parameters),
                ("average_running", self.running),
            ] {
                let average = self.kept(name, &[values.len]);
                if values.len > 0 {
                    self.emit(average::average_values(average, values, steps, counter));
                }
            }
        }
    }

    /// The L2 norm of a vector, without what is frozen.
    fn norm(&mut self, x: View, factors: Option<View>) -> View {
        let sums = self.tensor("sums of squares", &[clip::runs(x.len)], Dtype::F32);
        let norm = self.tensor("norm", &[1], Dtype::F32);
        self.emit(clip::sum_squares(x, factors, sums));
        self.emit(clip::norm(sums, norm));
        norm
    }

    /// Muon on the weight `[k, outputs]` of a convolution: the gradient's momentum, made orthogonal by
    /// Newton and Schulz in the smaller of its two dimensions.
    fn muon(&mut self, layer: &Layer, momentum: f32, rate: f32, velocity: View) {
        let weight = &layer.parameters[0];
        let outputs = layer.output.channels;
        let k = weight.elements() / outputs;
        let of = |all: View| all.slice(weight.start, weight.elements());
        let (gradients, parameters) = (of(self.batch_gradients()), of(self.parameters));
        let mut x = self.tensor("momentum", &[k, outputs], Dtype::F32);
        let [steps, counter] = self.step();
        self.emit(muon::muon_momentum(
            momentum,
            gradients,
            of(velocity),
            x,
            steps,
            counter,
        ));
        let norm = self.norm(x, None);
        self.emit(muon::muon_scale(x, norm));
        let side = k.min(outputs);
        let square = Conv2d::dense(side, side).without_bias();
        let matrix = Conv2d::dense(k, outputs).without_bias();
        for _ in 0..muon::NEWTON_SCHULZ_STEPS {
            let a = self.tensor("gram", &[side, side], Dtype::F32);
            if side == outputs {
                // xᵀx: the gradient of a dense layer's weight over k samples.
                let product = self.product(&square, k, Pass::BackwardWeight);
                self.in_parts(product.splits(), a, |partials| {
                    conv2d::conv2d_backward_weight(product, x, x, partials)
                });
            } else {
                // x·xᵀ: the gradient by the input of one with x as its weight.
                let product = self.product(&matrix, k, Pass::BackwardInput);
                self.emit(conv2d::conv2d_backward_input(product, x, x, a, None));
            }
            let aa = self.tensor("gram squared", &[side, side], Dtype::F32);
            let product = self.product(&square, side, Pass::Forward);
            self.emit(conv2d::conv2d_forward(product, a, a, aa, None));
            let p = self.tensor("polynomial", &[side, side], Dtype::F32);
            self.emit(muon::muon_polynomial(side, a, aa, p));
            let next = self.tensor("orthogonal", &[k, outputs], Dtype::F32);
            let (geometry, left, right) = match side == outputs {
                true => (square, x, p),
                false => (matrix, p, x),
            };
            let product = self.product(&geometry, k, Pass::Forward);
            self.emit(conv2d::conv2d_forward(product, left, right, next, None));
            x = next;
        }
        let size = (outputs as f32).sqrt();
        let norm = self.norm(parameters, None);
        self.emit(muon::muon_update(
            size, rate, parameters, norm, x, steps, counter,
        ));
    }
}
