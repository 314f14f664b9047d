//! Twins of `shaders/half.wgsl`, and the rounding to halves of everything that is stored as such.

use super::Float;
use crate::kernels::half::{INTERVAL, SCALES};
use half::f16;

/// The nearest half, of two the even one; infinite from 65,520 on.
pub fn round_to_half<T: Float>(value: T) -> T {
    let wide: f64 = value.into();
    f16::from_f64(wide).to_f32().into()
}

/// `x`; what is written is rounded as every half is.
pub fn to_half<T: Float>(x: &[T]) -> Vec<T> {
    x.to_vec()
}

/// `x`: every half is a float.
pub fn to_float<T: Float>(x: &[T]) -> Vec<T> {
    x.to_vec()
}

/// `x · scale`, to be rounded likewise.
pub fn scale_to_half<T: Float>(x: &[T], scale: T) -> Vec<T> {
    x.iter().map(|&x| x * scale).collect()
}

/// `gradients / scale` in place.
pub fn unscale_gradients<T: Float>(gradients: &mut [T], scale: T) {
    gradients.iter_mut().for_each(|g| *g /= scale);
}

/// The loss scale after a step whose scaled gradients have that norm, in place; gives whether the update is
/// skipped.
pub fn advance_loss_scale<T: Float>(norm: T, loss_scale: &mut [T]) -> bool {
    let [smallest, largest]: [T; 2] = SCALES.map(Into::into);
    let [two, half]: [T; 2] = [2.0, 0.5].map(Into::into);
    let [scale, good, skipped] = loss_scale else {
        panic!("expected scale, good and skipped, found {loss_scale:?}");
    };
    if !norm.is_finite() {
        *scale = (half * *scale).max(smallest);
        *good = T::zero();
        *skipped += T::one();
        return true;
    }
    *good += T::one();
    if *good >= INTERVAL.into() {
        *scale = (two * *scale).min(largest);
        *good = T::zero();
    }
    false
}
