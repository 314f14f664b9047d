//! `shaders/reduce.wgsl`: the sum over the parts of a weight gradient.

use super::{KernelSpec, View, Work, read, write};

const SOURCE: &str = include_str!("../../shaders/reduce.wgsl");

/// `result[n] = Σ_s partials[splits,n]` in order of s, with n the elements of `result`. Writes `result`.
pub fn reduce_splits(splits: usize, partials: View, result: View) -> KernelSpec {
    let n = result.len;
    KernelSpec::new(
        "reduce_splits",
        SOURCE,
        Work::ReduceSplits { splits },
        &[("SPLITS", splits as f64), ("ELEMENTS", n as f64)],
        vec![
            read(0, "partials", partials, splits * n),
            write(1, "result", result, n),
        ],
        n,
    )
}
