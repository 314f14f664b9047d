//! Twins of `shaders/half.wgsl`, and the rounding to halves of everything that is stored as such.

use super::Float;
use crate::kernels::half::{INTERVAL, SCALES};
use half::f16;
use half::slice::HalfFloatSliceExt;

/// The nearest half, of two the even one; infinite from 65,520 on.
pub fn round_to_half<T: Float>(value: T) -> T {
    let wide: f64 = value.into();
    f16::from_f64(wide).to_f32().into()
}

/// [`round_to_half`] in place, by the processor's own conversions where it has some.
pub fn round_to_halves(values: &mut [f32]) {
    let mut halves = [f16::ZERO; 1024];
    for values in values.chunks_mut(halves.len()) {
        let halves = &mut halves[..values.len()];
        halves.convert_from_f32_slice(values);
        halves.convert_to_f32_slice(values);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_rounded_as_its_values_are() {
        // Every exponent and sign, with fractions that are ties, below and above.
        let bits = (0..1 << 9).flat_map(|top: u32| {
            [
                0, 1, 0xfff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7f_f000, 0x7f_ffff,
            ]
            .map(|fraction| f32::from_bits(top << 23 | fraction))
        });
        let values: Vec<f32> = bits.collect();
        let mut rounded = values.clone();
        round_to_halves(&mut rounded);
        for (value, found) in values.into_iter().zip(rounded) {
            let expected = round_to_half(value);
            let same = expected.to_bits() == found.to_bits();
            assert!(
                same || expected.is_nan() && found.is_nan(),
                "{value:e}: {expected:e}, {found:e}"
            );
        }
    }
}
