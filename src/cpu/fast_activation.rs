//! The activations that take an exponential or the error function, in f32 and as the shader computes
//! them (`shaders/activation.wgsl` says why that is right), which is several times faster than their
//! twins' formulas.

use crate::model::Activation;
use pulp::Arch;

/// Puts `f(x)` into y.
pub(super) type Forward = fn(x: &[f32], y: &mut [f32]);

/// Puts `dy·f'(x)` into dx.
pub(super) type Backward = fn(x: &[f32], dy: &[f32], dx: &mut [f32]);

/// How an activation is computed, where there is a faster way than its twin's.
pub(super) fn forward(activation: Activation) -> Option<Forward> {
    match activation {
        Activation::Gelu => Some(|x, y| apply(x, y, |x| gated(x, gelu_tail(x)))),
        Activation::GeluTanh => Some(|x, y| apply(x, y, |x| gated(x, gelu_tanh_tail(x)))),
        Activation::Silu => Some(|x, y| apply(x, y, |x| gated(x, silu_tail(x)))),
        Activation::Tanh => Some(|x, y| apply(x, y, tanh)),
        _ => None,
    }
}

/// Likewise its gradient, of those that compute it from x.
pub(super) fn backward(activation: Activation) -> Option<Backward> {
    match activation {
        Activation::Gelu => {
            Some(|x, dy, dx| apply2(x, dy, dx, |x, dy| dy * gated_slope(x, gelu_tail(x))))
        }
        Activation::GeluTanh => {
            Some(|x, dy, dx| apply2(x, dy, dx, |x, dy| dy * gated_slope(x, gelu_tanh_tail(x))))
        }
        Activation::Silu => {
            Some(|x, dy, dx| apply2(x, dy, dx, |x, dy| dy * gated_slope(x, silu_tail(x))))
        }
        _ => None,
    }
}

/// `y = f(x)`, with the longest vectors that the processor has: the bits are the same with any.
#[inline(always)]
fn apply(x: &[f32], y: &mut [f32], f: impl Fn(f32) -> f32) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = f(x);
            }
        },
    );
}

/// `y = f(a, b)`, likewise.
#[inline(always)]
fn apply2(a: &[f32], b: &[f32], y: &mut [f32], f: impl Fn(f32, f32) -> f32) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (y, (&a, &b)) in y.iter_mut().zip(a.iter().zip(b)) {
                *y = f(a, b);
            }
        },
    );
}

/// eˣ for −87.3 ≤ x ≤ 0, within two units in the last place, without a branch: 2ⁿ·eʳ, where r is what
/// x lacks of a multiple n of ln 2 (Cody & Waite, 1980), by the polynomial of Cephes' expf; below it e^−87.3, and NaN of NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// 1.5·2²³: added to a number it leaves the nearest whole one in the last bits.
    const WHOLE: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first of few bits.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = if x < -87.3 { -87.3 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + WHOLE;
    let n = shifted - WHOLE;
    let r = x - n * LN_2[0] - n * LN_2[1];
    let p = [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ]
    .iter()
    .fold(1.987_569_1e-4, |sum, p| sum * r + p);
    let e = p * r * r + r + 1.0;
    e * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// A function S at z ≥ 0: q = 1 − S(z), slope = S′(z).
struct Tail {
    z: f32,
    q: f32,
    slope: f32,
}

#[inline(always)]
fn gelu_tail(x: f32) -> Tail {
    const R: [f32; 8] = [
        0.119_623_266,
        0.120_845_45,
        0.099_347_62,
        0.130_414_84,
        -0.057_164_45,
        0.210_115_4,
        -0.159_376_68,
        0.036_194_492,
    ];
    let z = x.abs().min(13.0);
    let e = exp(-0.5 * z * z);
    let t = 1.0 / (1.0 + 0.3 * z);
    let r = R.iter().rev().fold(0.0, |sum, r| t * (r + sum));
    Tail {
        z,
        q: e * r,
        slope: e * 0.398_942_3, // 1/√(2π)
    }
}

/// For S(z) = σ(v), and v′ its derivative by z.
#[inline(always)]
fn logistic_tail(z: f32, v: f32, v_slope: f32) -> Tail {
    let e = exp(-v);
    let q = e / (1.0 + e);
    Tail {
        z,
        q,
        slope: q * (1.0 - q) * v_slope,
    }
}

#[inline(always)]
fn gelu_tanh_tail(x: f32) -> Tail {
    /// 2·√(2/π)
    const FACTOR: f32 = 1.595_769;
    let z = x.abs().min(10.0);
    let v = FACTOR * z * (1.0 + 0.044_715 * z * z);
    logistic_tail(z, v, FACTOR * (1.0 + 0.134_145 * z * z))
}

#[inline(always)]
fn silu_tail(x: f32) -> Tail {
    let z = x.abs().min(87.0);
    logistic_tail(z, z, 1.0)
}

/// x·S(x)
#[inline(always)]
fn gated(x: f32, tail: Tail) -> f32 {
    let value = x.max(0.0) - tail.z * tail.q;
    if x > f32::NEG_INFINITY {
        value
    } else {
        f32::NAN
    }
}

/// S(x) + x·S′(x), NaN at ±∞.
#[inline(always)]
fn gated_slope(x: f32, tail: Tail) -> f32 {
    let w = tail.q - tail.z * tail.slope;
    let value = if x >= 0.0 { 1.0 - w } else { w };
    if x.is_finite() { value } else { f32::NAN }
}

#[inline(always)]
fn tanh(x: f32) -> f32 {
    let s = x * x;
    let p = [2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1]
        .iter()
        .fold(-5.704_988_7e-3, |sum, p| sum * s + p);
    let e = exp(-2.0 * x.abs());
    let far = ((1.0 - e) / (1.0 + e)).copysign(x);
    if x.abs() < 0.625 { x + x * s * p } else { far }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{activation_backward, activation_forward};

    const ALL: [Activation; 4] = [
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Silu,
        Activation::Tanh,
    ];

    /// Within some units in the last place of the twins in f64, however small a value is: the argument
    /// of the exponential is rounded, and that by up to half a unit of 90.
    #[test]
    fn as_the_twins_in_f64() {
        let x: Vec<f32> = (-40_000..=40_000).map(|i| i as f32 / 4000.0).collect();
        let wide: Vec<f64> = x.iter().copied().map(f64::from).collect();
        for activation in ALL {
            let mut found = vec![0.0; x.len()];
            forward(activation).unwrap()(&x, &mut found);
            let expected = activation_forward(activation, &wide);
            for ((&x, &found), expected) in x.iter().zip(&found).zip(expected) {
                let error = (f64::from(found) - expected).abs();
                // Below that, f32 has no digits to spare.
                let most = 3e-5 * expected.abs() + 1e-36;
                assert!(
                    error <= most,
                    "{activation:?} at {x}: {found} is not {expected}"
                );
            }
            let Some(backward) = backward(activation) else {
                continue;
            };
            backward(&x, &vec![1.0; x.len()], &mut found);
            let expected = activation_backward(activation, &wide, &vec![1.0; wide.len()]);
            for ((&x, &found), expected) in x.iter().zip(&found).zip(expected) {
                let error = (f64::from(found) - expected).abs();
                assert!(
                    error <= 5e-7,
                    "{activation:?} at {x}: {found} is not {expected}"
                );
            }
        }
    }

    #[test]
    fn as_the_twins_at_the_ends() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let x = [
            -inf, -3e38, -1e10, -200.0, -0.0, 0.0, 200.0, 1e10, 3e38, inf, nan,
        ];
        for activation in ALL {
            let mut found = x;
            forward(activation).unwrap()(&x, &mut found);
            let expected = activation_forward(activation, &x.map(f64::from));
            for (found, expected) in found.into_iter().zip(expected) {
                let close = (f64::from(found) - expected).abs() <= 1e-6 * expected.abs() + 1e-35;
                let same = f64::from(found) == expected || found.is_nan() && expected.is_nan();
                assert!(close || same, "{activation:?}: {found} is not {expected}");
            }
            let Some(backward) = backward(activation) else {
                continue;
            };
            backward(&x, &[1.0; 11], &mut found);
            let expected = activation_backward(activation, &x.map(f64::from), &[1.0; 11]);
            for (found, expected) in found.into_iter().zip(expected) {
                let same = found.is_nan() && expected.is_nan();
                assert!(
                    same || (f64::from(found) - expected).abs() < 1e-35,
                    "{activation:?}: {found} is not {expected}"
                );
            }
        }
    }
}
