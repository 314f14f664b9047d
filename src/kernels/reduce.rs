//! `shaders/reduce.wgsl`: the sum over the parts of a gradient, or of a batch.

use super::lanes::{lanes, with_lanes};
use super::{KernelSpec, STEP_ELEMENTS, View, WORKGROUP_SIZE, Work, read, update, write};

const SOURCE: &str = include_str!("../../shaders/reduce.wgsl");

/// `result[n] = Σ_s partials[splits,n]` in order of s, with n the elements of `result`. Writes `result`.
pub fn reduce_splits(splits: usize, partials: View, result: View) -> KernelSpec {
    let n = result.len;
    KernelSpec::new(
        "reduce_splits",
        with_lanes(SOURCE, n),
        Work::ReduceSplits { splits },
        &[("SPLITS", splits as f64), ("WIDTH", (n / lanes(n)) as f64)],
        vec![
            read(0, "partials", partials, splits * n),
            write(1, "result", result, n),
        ],
        n / lanes(n),
    )
}

/// `result[n] = Σ_s partials[chunks,n]` in one fixed order, for many chunks of few elements. Writes
/// `result`.
pub fn reduce_chunks(chunks: usize, partials: View, result: View) -> KernelSpec {
    let n = result.len;
    KernelSpec::new(
        "reduce_chunks",
        with_lanes(SOURCE, n),
        Work::ReduceChunks { chunks },
        &[("SPLITS", chunks as f64), ("WIDTH", (n / lanes(n)) as f64)],
        vec![
            read(0, "partials", partials, chunks * n),
            write(1, "result", result, n),
        ],
        n / lanes(n) * WORKGROUP_SIZE,
    )
}

/// `accumulated[n] += gradients[n]`, or where row `counter[0]` of the step table `steps` is the first part
/// of a batch `accumulated[n] = gradients[n]`. Changes `accumulated` in place.
pub fn accumulate(gradients: View, accumulated: View, steps: View, counter: View) -> KernelSpec {
    let n = gradients.len;
    KernelSpec::new(
        "accumulate",
        with_lanes(SOURCE, n),
        Work::Accumulate,
        &[("WIDTH", (n / lanes(n)) as f64)],
        vec![
            read(2, "gradients", gradients, n),
            update(3, "accumulated", accumulated, n),
            read(4, "steps", steps, STEP_ELEMENTS),
            read(5, "counter", counter, 1),
        ],
        n / lanes(n),
    )
}
