//! `shaders/reduce.wgsl`: the sum over the parts of a gradient.

use super::batch_norm::CHANNELS_PER_WORKGROUP;
use super::{KernelSpec, View, WORKGROUP_SIZE, Work, read, write};

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

/// `result[n] = Σ_s partials[chunks,n]` in one fixed order, for many chunks of few elements. Writes
/// `result`.
pub fn reduce_chunks(chunks: usize, partials: View, result: View) -> KernelSpec {
    let n = result.len;
    KernelSpec::new(
        "reduce_chunks",
        SOURCE,
        Work::ReduceChunks { chunks },
        &[("SPLITS", chunks as f64), ("ELEMENTS", n as f64)],
        vec![
            read(0, "partials", partials, chunks * n),
            write(1, "result", result, n),
        ],
        n.div_ceil(CHANNELS_PER_WORKGROUP) * WORKGROUP_SIZE,
    )
}
