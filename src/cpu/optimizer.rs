//! Twins of `shaders/optimizer.wgsl`: the update rules over the flat parameter vector.
//!
//! `factors[2,n]`, where there are any, are a parameter's own on learning rate and weight decay; one whose
//! first is not above 0 stays as it is, and so does its state.

use super::Float;
use crate::model::recipe::StepScalars;

/// Calls `update` with each parameter's number and its factors on learning rate and weight decay, but not
/// for those that stay as they are.
fn each<T: Float>(n: usize, factors: Option<&[T]>, mut update: impl FnMut(usize, [T; 2])) {
    if let Some(factors) = factors {
        assert_eq!(factors.len(), 2 * n);
    }
    for i in 0..n {
        let own = factors.map_or([T::one(); 2], |factors| [factors[i], factors[n + i]]);
        if own[0] > T::zero() {
            update(i, own);
        }
    }
}

/// `g = gradient + weight_decay·w; v = momentum·v + g; w = w − lr·v`, or with Nesterov's momentum
/// `w − lr·(g + momentum·v)`, as in `torch.optim.SGD`.
///
/// All vectors have the same length; parameters and velocity (0 before the first step) are updated
/// in place.
pub fn sgd_update<T: Float>(
    parameters: &mut [T],
    gradients: &[T],
    velocity: &mut [T],
    factors: Option<&[T]>,
    (momentum, nesterov): (f32, bool),
    weight_decay: f32,
    scalars: StepScalars,
) {
    assert_eq!(parameters.len(), gradients.len());
    assert_eq!(parameters.len(), velocity.len());
    let [momentum, weight_decay, lr]: [T; 3] = [momentum, weight_decay, scalars.lr].map(Into::into);
    each(gradients.len(), factors, |i, [rate, decay]| {
        let (w, v) = (&mut parameters[i], &mut velocity[i]);
        let g = gradients[i] + weight_decay * decay * *w;
        *v = momentum * *v + g;
        *w -= lr * rate * if nesterov { g + momentum * *v } else { *v };
    });
}

/// Adam with decoupled weight decay (Loshchilov & Hutter, 2019), as in `torch.optim.AdamW`:
/// `w = w·(1 − lr·weight_decay); m = β₁m + (1 − β₁)g; v = β₂v + (1 − β₂)g²;
/// w = w − lr/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)`; the bias corrections `1 − βᵗ` come with
/// `scalars`.
///
/// All vectors have the same length; parameters and both moments (0 before the first step) are
/// updated in place.
#[allow(clippy::too_many_arguments)]
pub fn adamw_update<T: Float>(
    parameters: &mut [T],
    gradients: &[T],
    [first, second]: [&mut [T]; 2],
    factors: Option<&[T]>,
    betas: [f32; 2],
    epsilon: f32,
    weight_decay: f32,
    scalars: StepScalars,
) {
    assert_eq!(parameters.len(), gradients.len());
    assert_eq!(parameters.len(), first.len());
    assert_eq!(parameters.len(), second.len());
    let [beta1, beta2, epsilon, weight_decay]: [T; 4] =
        [betas[0], betas[1], epsilon, weight_decay].map(Into::into);
    let [lr, correction1, correction2]: [T; 3] = [
        scalars.lr,
        scalars.bias_correction1,
        scalars.bias_correction2,
    ]
    .map(Into::into);
    let one = T::one();
    each(gradients.len(), factors, |i, [rate, decay]| {
        let (w, m, v, g) = (
            &mut parameters[i],
            &mut first[i],
            &mut second[i],
            gradients[i],
        );
        let lr = lr * rate;
        *w *= one - lr * (weight_decay * decay);
        *m = beta1 * *m + (one - beta1) * g;
        *v = beta2 * *v + (one - beta2) * g * g;
        *w -= lr / correction1 * *m / (v.sqrt() / correction2.sqrt() + epsilon);
    });
}

/// Lion (Chen et al., 2023, algorithm 2): `w = w·(1 − lr·weight_decay) − lr·sign(β₁m + (1 − β₁)g);
/// m = β₂m + (1 − β₂)g`, with the sign of 0 being 0 and that of NaN NaN.
///
/// All vectors have the same length; parameters and moment (0 before the first step) are updated in place.
pub fn lion_update<T: Float>(
    parameters: &mut [T],
    gradients: &[T],
    moment: &mut [T],
    factors: Option<&[T]>,
    betas: [f32; 2],
    weight_decay: f32,
    scalars: StepScalars,
) {
    assert_eq!(parameters.len(), gradients.len());
    assert_eq!(parameters.len(), moment.len());
    let [beta1, beta2]: [T; 2] = betas.map(Into::into);
    let [weight_decay, lr]: [T; 2] = [weight_decay, scalars.lr].map(Into::into);
    let one = T::one();
    each(gradients.len(), factors, |i, [rate, decay]| {
        let (w, m, g) = (&mut parameters[i], &mut moment[i], gradients[i]);
        let lr = lr * rate;
        let c = beta1 * *m + (one - beta1) * g;
        let direction = if c == T::zero() { c } else { c.signum() };
        *w = *w * (one - lr * (weight_decay * decay)) - lr * direction;
        *m = beta2 * *m + (one - beta2) * g;
    });
}
