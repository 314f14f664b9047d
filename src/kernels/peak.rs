//! `shaders/peak.wgsl`: what an adapter can do at most.

use super::{KernelSpec, View, Work, read, write};

const SOURCE: &str = include_str!("../../shaders/peak.wgsl");

/// Multiply-adds of one invocation in one round: 16 numbers, 8 times.
pub const MULTIPLY_ADDS_PER_ROUND: usize = 128;

/// `rounds` · 8 times `a = a · scale + shift` for 16 numbers in each of `invocations` invocations;
/// `y[invocations]` receives their sums. `factors` is `[scale, shift]`. Writes `y`.
pub fn peak_multiply_add(invocations: usize, rounds: usize, factors: View, y: View) -> KernelSpec {
    KernelSpec::new(
        "peak_multiply_add",
        SOURCE,
        Work::PeakMultiplyAdd { rounds },
        &[
            ("INVOCATIONS", invocations as f64),
            ("ROUNDS", rounds as f64),
            // Every override wants a value.
            ("ELEMENTS_4", 0.0),
        ],
        vec![
            read(0, "factors", factors, 2),
            write(1, "y", y, invocations),
        ],
        invocations,
    )
}

/// `dst = src`, four elements an invocation, of which `src` has a multiple. Writes as many elements of
/// `dst` as `src` has.
pub fn peak_copy(src: View, dst: View) -> KernelSpec {
    let n = src.len;
    assert!(
        n.is_multiple_of(4),
        "expected a multiple of 4 elements, found {n}"
    );
    KernelSpec::new(
        "peak_copy",
        SOURCE,
        Work::PeakCopy,
        &[
            ("INVOCATIONS", 0.0),
            ("ROUNDS", 0.0),
            ("ELEMENTS_4", (n / 4) as f64),
        ],
        vec![read(2, "src", src, n), write(3, "dst", dst, n)],
        n / 4,
    )
}
