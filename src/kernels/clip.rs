//! `shaders/clip.wgsl`: the L2 norm of a vector, and gradients that are scaled down to a norm.

use super::lanes::{lanes, with_lanes};
use super::{KernelSpec, View, WORKGROUP_SIZE, Work, read, update, write};

const SOURCE: &str = include_str!("../../shaders/clip.wgsl");

/// Elements that a workgroup adds up at least, and sums at most.
const SHORTEST_RUN: usize = 4096;
const MOST_RUNS: usize = 1024;

/// Elements in a run of a vector of `n`: what is added up for each of the sums of [`sum_squares`].
fn run(n: usize) -> usize {
    n.div_ceil(MOST_RUNS).max(SHORTEST_RUN).next_multiple_of(4)
}

/// How many sums [`sum_squares`] makes of a vector of `n` elements.
pub fn runs(n: usize) -> usize {
    n.div_ceil(run(n))
}

/// `result[runs(n)]`: the sum of the squares of each run of `x[n]`, without those whose first factor of
/// `factors[2,n]` is 0. Writes `result`.
pub fn sum_squares(x: View, factors: Option<View>, result: View) -> KernelSpec {
    let n = x.len;
    let grouped = factors.is_some();
    KernelSpec::new(
        "sum_squares",
        with_lanes(SOURCE, n),
        Work::SumSquares {
            run: run(n),
            grouped,
        },
        &[
            ("ELEMENTS", n as f64),
            ("RUN", run(n) as f64),
            ("GROUPED", f64::from(u8::from(grouped))),
        ],
        vec![
            read(0, "x", x, n),
            write(1, "result", result, runs(n)),
            match factors {
                // Only the first of each is looked at.
                Some(factors) => read(2, "factors", factors, n),
                // A binding must hold something even where nothing looks at it.
                None => read(2, "factors", x, 0),
            },
        ],
        runs(n) * WORKGROUP_SIZE,
    )
}

/// `result[1]`: the square root of the sum of `x[n]`. Writes `result`.
pub fn norm(x: View, result: View) -> KernelSpec {
    let n = x.len;
    KernelSpec::new(
        "norm",
        with_lanes(SOURCE, n),
        Work::Norm,
        &[("ELEMENTS", n as f64)],
        vec![read(0, "x", x, n), write(1, "result", result, 1)],
        WORKGROUP_SIZE,
    )
}

/// `gradients[n]` times `min(1, limit / (norm + 1e-6))`, NaN where the norm is. Changes `gradients` in place.
pub fn clip_gradients(limit: f32, gradients: View, norm: View) -> KernelSpec {
    let n = gradients.len;
    KernelSpec::new(
        "clip_gradients",
        with_lanes(SOURCE, n),
        Work::ClipGradients { limit },
        &[("ELEMENTS", n as f64), ("LIMIT", f64::from(limit))],
        vec![
            update(3, "gradients", gradients, n),
            read(4, "norm_of_all", norm, 1),
        ],
        n / lanes(n),
    )
}
