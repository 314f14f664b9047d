//! Twins of `shaders/optimizer.wgsl`: the update rules over the flat parameter vector.

use super::Float;
use crate::model::recipe::StepScalars;

/// `g = gradient + weight_decay·w; v = momentum·v + g; w = w − lr·v`, as in `torch.optim.SGD`.
///
/// All vectors have the same length; parameters and velocity (0 before the first step) are updated
/// in place.
pub fn sgd_update<T: Float>(
    parameters: &mut [T],
    gradients: &[T],
    velocity: &mut [T],
    momentum: f32,
    weight_decay: f32,
    scalars: StepScalars,
) {
    assert_eq!(parameters.len(), gradients.len());
    assert_eq!(parameters.len(), velocity.len());
    let [momentum, weight_decay, lr]: [T; 3] = [momentum, weight_decay, scalars.lr].map(Into::into);
    for ((w, &g), v) in parameters.iter_mut().zip(gradients).zip(velocity) {
        *v = momentum * *v + (g + weight_decay * *w);
        *w -= lr * *v;
    }
}

/// Adam with decoupled weight decay (Loshchilov & Hutter, 2019), as in `torch.optim.AdamW`:
/// `w = w·(1 − lr·weight_decay); m = β₁m + (1 − β₁)g; v = β₂v + (1 − β₂)g²;
/// w = w − lr/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)`; the bias corrections `1 − βᵗ` come with
/// `scalars`.
///
/// All vectors have the same length; parameters and both moments (0 before the first step) are
/// updated in place.
pub fn adamw_update<T: Float>(
    parameters: &mut [T],
    gradients: &[T],
    [first, second]: [&mut [T]; 2],
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
    let moments = first.iter_mut().zip(second);
    for ((w, &g), (m, v)) in parameters.iter_mut().zip(gradients).zip(moments) {
        *w *= one - lr * weight_decay;
        *m = beta1 * *m + (one - beta1) * g;
        *v = beta2 * *v + (one - beta2) * g * g;
        *w -= lr / correction1 * *m / (v.sqrt() / correction2.sqrt() + epsilon);
    }
}
