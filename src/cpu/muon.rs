//! Twins of `shaders/muon.wgsl`.

use super::Float;

/// `v = momentum·v + g` in place; returns `g + momentum·v`.
pub fn muon_momentum<T: Float>(momentum: f32, gradients: &[T], velocity: &mut [T]) -> Vec<T> {
    let momentum: T = momentum.into();
    let pairs = gradients.iter().zip(velocity);
    pairs
        .map(|(&g, v)| {
            *v = momentum * *v + g;
            g + momentum * *v
        })
        .collect()
}

/// `x = x / (norm + 1e-7)`.
pub fn muon_scale<T: Float>(x: &mut [T], norm: T) {
    let epsilon: T = 1e-7f32.into();
    x.iter_mut().for_each(|x| *x /= norm + epsilon);
}

/// `3.4445·I − 4.775·a + 2.0315·aa`: all `[side, side]`.
pub fn muon_polynomial<T: Float>(side: usize, a: &[T], aa: &[T]) -> Vec<T> {
    let [diagonal, first, second]: [T; 3] = [3.4445, 4.775, 2.0315].map(Into::into);
    let pairs = a.iter().zip(aa).enumerate();
    pairs
        .map(|(i, (&a, &aa))| {
            let identity = if i / side == i % side {
                diagonal
            } else {
                T::zero()
            };
            identity - first * a + second * aa
        })
        .collect()
}

/// `w = w·size/norm − lr·rate·direction`, where norm is that of w; one of zeros is not scaled.
pub fn muon_update<T: Float>(
    size: f32,
    rate: f32,
    lr: f32,
    parameters: &mut [T],
    norm: T,
    direction: &[T],
) {
    let [size, rate, lr]: [T; 3] = [size, rate, lr].map(Into::into);
    let scale = if norm == T::zero() {
        T::one()
    } else {
        size / norm
    };
    for (w, &x) in parameters.iter_mut().zip(direction) {
        *w = *w * scale - lr * rate * x;
    }
}
