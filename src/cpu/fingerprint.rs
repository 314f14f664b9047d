//! Twin of `shaders/fingerprint.wgsl`.

use super::Float;

/// Terms of the sum that is operation 5.
const TERMS: usize = 16;

/// `y[i]` = operation number `operation` of `a[i]`, `b[i]`, `c[i]`, all `[n]`, each step rounded on its
/// own but for 7, which is fused; the numbers are explained in the shader.
pub fn arithmetic<T: Float>(operation: usize, a: &[T], b: &[T], c: &[T]) -> Vec<T> {
    let one = |i: usize| {
        let (u, v, w) = (a[i], b[i], c[i]);
        match operation {
            0 => u,
            1 => u + v,
            2 => u * v,
            3 => (u + v) + w,
            4 => (u + v) - u,
            5 => (0..TERMS).fold(T::default(), |total, k| total + a[(i + k) % a.len()]),
            6 => u * v + w,
            7 => u.mul_add(v, w),
            8 => u / v,
            9 => u.sqrt(),
            10 => w.exp(),
            11 => u.ln(),
            _ => panic!("expected an operation from 0 to 11, found {operation}"),
        }
    };
    (0..a.len()).map(one).collect()
}
