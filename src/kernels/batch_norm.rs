//! `shaders/batch_norm.wgsl`: normalisation of every channel over the batch.
//!
//! Affine parameters are one view `[2,C]`, weight γ and bias β; so are running statistics, mean and
//! variance, and those of a batch, mean and `rstd = 1 / √(variance + ε)`. Only the first `count`
//! samples count, by row `counter[0]` of the step table `steps`.

use super::lanes::{lanes, with_lanes};
use super::{KernelSpec, STEP_ELEMENTS, View, WORKGROUP_SIZE, Work, read, update, write};

const SOURCE: &str = include_str!("../../shaders/batch_norm.wgsl");

/// Rows that one invocation of the kernels handles which write a value for every element.
pub(super) const ROWS_PER_STRIP: usize = 8;

/// Rows whose loads are on their way together.
const ROWS_AT_A_TIME: usize = 8;

/// Invocations that it takes to keep the memory of a large GPU busy, with so many rows at a time each.
const INVOCATIONS: usize = 1 << 15;

/// What is normalised: `[rows, channels]` with `rows = batch · positions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchNorm {
    pub batch: usize,
    /// Of one sample: H·W.
    pub positions: usize,
    pub channels: usize,
}

impl BatchNorm {
    pub const fn rows(&self) -> usize {
        self.batch * self.positions
    }

    /// How the sums over rows are cut: into as many chunks as fill a GPU, as far as what merges them has
    /// little to do beside it.
    pub fn chunks(&self) -> Chunks {
        let width = self.channels / lanes(self.channels);
        let most = (INVOCATIONS / width).clamp(64, 2048);
        let size = self.rows().div_ceil(most).max(32);
        Chunks::new(self.rows(), size.next_multiple_of(ROWS_AT_A_TIME), most)
    }
}

/// How a sum over `len` terms is cut into chunks; it follows from `len` alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    len: usize,
    /// Terms of a chunk; the last may have fewer.
    pub size: usize,
}

impl Chunks {
    /// Chunks of at least `size` terms, and at most `most` of them.
    pub fn new(len: usize, size: usize, most: usize) -> Chunks {
        let size = size.max(len.div_ceil(most)).max(1);
        Chunks { len, size }
    }

    /// How many there are.
    pub const fn count(&self) -> usize {
        self.len.div_ceil(self.size)
    }
}

fn constants(g: &BatchNorm) -> Vec<(&'static str, f64)> {
    let width = g.channels / lanes(g.channels);
    [
        ("ROWS", g.rows()),
        ("POSITIONS", g.positions),
        ("C", g.channels),
        ("WIDTH", width),
        ("CHUNKS", g.chunks().count()),
        ("ROWS_PER_CHUNK", g.chunks().size),
    ]
    .map(|(name, value)| (name, value as f64))
    .to_vec()
}

/// Invocations of a kernel that handles chunks of rows, and of one that handles strips.
fn invocations(g: &BatchNorm) -> [usize; 2] {
    let width = g.channels / lanes(g.channels);
    [g.chunks().count(), g.rows().div_ceil(ROWS_PER_STRIP)].map(|rows| rows * width)
}

/// `partials[chunks,2,C]`: mean and Σ (x − mean)² of `x − x₀` in every chunk of the rows of
/// `x[rows,C]`, where `x₀` is the first row. Writes `partials`.
pub fn batch_norm_moments(
    g: &BatchNorm,
    x: View,
    steps: View,
    counter: View,
    partials: View,
) -> KernelSpec {
    KernelSpec::new(
        "batch_norm_moments",
        with_lanes(SOURCE, g.channels),
        Work::BatchNormMoments(*g),
        &constants(g),
        vec![
            read(0, "x", x, g.rows() * g.channels),
            read(5, "steps", steps, STEP_ELEMENTS),
            read(6, "counter", counter, 1),
            write(7, "partials", partials, g.chunks().count() * 2 * g.channels),
        ],
        invocations(g)[0],
    )
}

/// `statistics[2,C]` from what [`batch_norm_moments`] wrote of the same `x`; `running[2,C]` moves by
/// `momentum` towards the mean and the unbiased variance, except that one row leaves the running
/// variance as it is. Writes `statistics`, changes `running`.
pub fn batch_norm_statistics(
    g: &BatchNorm,
    [momentum, epsilon]: [f32; 2],
    x: View,
    partials: View,
    steps: View,
    counter: View,
    statistics: View,
    running: View,
) -> KernelSpec {
    let c = g.channels;
    let mut constants = constants(g);
    constants.push(("MOMENTUM", momentum.into()));
    constants.push(("EPSILON", epsilon.into()));
    KernelSpec::new(
        "batch_norm_statistics",
        with_lanes(SOURCE, c),
        Work::BatchNormStatistics {
            geometry: *g,
            momentum,
            epsilon,
        },
        &constants,
        vec![
            read(0, "x", x, c),
            read(11, "partials", partials, g.chunks().count() * 2 * c),
            read(5, "steps", steps, STEP_ELEMENTS),
            read(6, "counter", counter, 1),
            write(12, "statistics", statistics, 2 * c),
            update(13, "running", running, 2 * c),
        ],
        c / lanes(c) * WORKGROUP_SIZE,
    )
}

/// Row `micro` of `shard_moments[shards,4,C]` from what [`batch_norm_moments`] wrote of the same `x`: how many rows
/// count, `x₀`, and mean and Σ (x − mean)² of `x − x₀`. Changes `shard_moments` in place.
pub fn batch_norm_shard_moments(
    g: &BatchNorm,
    x: View,
    partials: View,
    steps: View,
    counter: View,
    shard_moments: View,
) -> KernelSpec {
    let c = g.channels;
    KernelSpec::new(
        "batch_norm_shard_moments",
        with_lanes(SOURCE, c),
        Work::BatchNormShardMoments(*g),
        &constants(g),
        vec![
            read(0, "x", x, c),
            read(11, "partials", partials, g.chunks().count() * 2 * c),
            read(5, "steps", steps, STEP_ELEMENTS),
            read(6, "counter", counter, 1),
            update(18, "shard_moments", shard_moments, shard_moments.len),
        ],
        c / lanes(c) * WORKGROUP_SIZE,
    )
}

/// `statistics[2,C]` of a whole batch from `of_shards[shards,4,C]`, what [`batch_norm_shard_moments`] wrote of each of
/// its shards, and `next_running[2,C]`, to where they move `running[2,C]`, see [`batch_norm_statistics`]. Writes
/// `statistics` and `next_running`.
pub fn batch_norm_sync_statistics(
    [momentum, epsilon]: [f32; 2],
    of_shards: View,
    steps: View,
    counter: View,
    running: View,
    statistics: View,
    next_running: View,
) -> KernelSpec {
    let c = statistics.len / 2;
    KernelSpec::new(
        "batch_norm_sync_statistics",
        with_lanes(SOURCE, c),
        Work::BatchNormSyncStatistics { momentum, epsilon },
        &[
            ("C", c as f64),
            ("WIDTH", (c / lanes(c)) as f64),
            ("MOMENTUM", momentum.into()),
            ("EPSILON", epsilon.into()),
        ],
        vec![
            read(19, "of_shards", of_shards, of_shards.len),
            read(5, "steps", steps, STEP_ELEMENTS),
            read(6, "counter", counter, 1),
            read(10, "running", running, 2 * c),
            write(12, "statistics", statistics, 2 * c),
            write(13, "next_running", next_running, 2 * c),
        ],
        c / lanes(c),
    )
}

/// `y[rows,C] = (x − mean)·rstd·γ + β`, in the rows that do not count as well; with `relu` the larger of
/// that and 0. Writes `y`.
pub fn batch_norm_forward(
    g: &BatchNorm,
    relu: bool,
    x: View,
    statistics: View,
    affine: View,
    y: View,
) -> KernelSpec {
    let n = g.rows() * g.channels;
    let mut constants = constants(g);
    constants.push(("RELU", relu.into()));
    KernelSpec::new(
        "batch_norm_forward",
        with_lanes(SOURCE, g.channels),
        Work::BatchNormForward { geometry: *g, relu },
        &constants,
        vec![
            read(0, "x", x, n),
            read(2, "statistics", statistics, 2 * g.channels),
            read(3, "affine", affine, 2 * g.channels),
            write(8, "y", y, n),
        ],
        invocations(g)[1],
    )
}

/// `partials[chunks,2,C]`: Σ dy·x̂ and Σ dy in every chunk of rows, whose sum over the chunks
/// ([`super::reduce::reduce_chunks`]) is the gradient of γ and β. Writes `partials`.
pub fn batch_norm_backward_sums(
    g: &BatchNorm,
    x: View,
    dy: View,
    statistics: View,
    steps: View,
    counter: View,
    partials: View,
) -> KernelSpec {
    let n = g.rows() * g.channels;
    KernelSpec::new(
        "batch_norm_backward_sums",
        with_lanes(SOURCE, g.channels),
        Work::BatchNormBackwardSums(*g),
        &constants(g),
        vec![
            read(0, "x", x, n),
            read(1, "dy", dy, n),
            read(2, "statistics", statistics, 2 * g.channels),
            read(5, "steps", steps, STEP_ELEMENTS),
            read(6, "counter", counter, 1),
            write(7, "partials", partials, g.chunks().count() * 2 * g.channels),
        ],
        invocations(g)[0],
    )
}

/// `dx[rows,C] = γ·rstd·(dy − (dβ + x̂·dγ) / n)` in the n rows that count, 0 in the others, with
/// `gradient[2,C]`: dγ, dβ; `divided`: by n already, which may be that of a whole batch. Writes `dx`.
pub fn batch_norm_backward_input(
    g: &BatchNorm,
    divided: bool,
    x: View,
    dy: View,
    statistics: View,
    affine: View,
    gradient: View,
    steps: View,
    counter: View,
    dx: View,
) -> KernelSpec {
    let (n, c) = (g.rows() * g.channels, g.channels);
    let mut constants = constants(g);
    constants.push(("DIVIDED", divided.into()));
    KernelSpec::new(
        "batch_norm_backward_input",
        with_lanes(SOURCE, c),
        Work::BatchNormBackwardInput {
            geometry: *g,
            divided,
        },
        &constants,
        vec![
            read(0, "x", x, n),
            read(1, "dy", dy, n),
            read(2, "statistics", statistics, 2 * c),
            // Only γ is looked at.
            read(3, "affine", affine, c),
            read(4, "gradient", gradient, 2 * c),
            read(5, "steps", steps, STEP_ELEMENTS),
            read(6, "counter", counter, 1),
            write(9, "dx", dx, n),
        ],
        invocations(g)[1],
    )
}

/// Row `micro` of `shard_sums[shards,3,C]`: how many rows count, and `gradient[2,C]`. Changes `shard_sums` in place.
pub fn batch_norm_shard_sums(
    g: &BatchNorm,
    gradient: View,
    steps: View,
    counter: View,
    shard_sums: View,
) -> KernelSpec {
    let c = g.channels;
    KernelSpec::new(
        "batch_norm_shard_sums",
        with_lanes(SOURCE, c),
        Work::BatchNormShardSums(*g),
        &constants(g),
        vec![
            read(4, "gradient", gradient, 2 * c),
            read(5, "steps", steps, STEP_ELEMENTS),
            read(6, "counter", counter, 1),
            update(18, "shard_sums", shard_sums, shard_sums.len),
        ],
        c / lanes(c),
    )
}

/// `mean_gradients[2,C]`: Σ dγ / Σ n and Σ dβ / Σ n over `of_shards[shards,3,C]`, what [`batch_norm_shard_sums`] wrote
/// of each shard of a batch. Writes `mean_gradients`.
pub fn batch_norm_sync_gradients(
    of_shards: View,
    steps: View,
    counter: View,
    mean_gradients: View,
) -> KernelSpec {
    let c = mean_gradients.len / 2;
    KernelSpec::new(
        "batch_norm_sync_gradients",
        with_lanes(SOURCE, c),
        Work::BatchNormSyncGradients,
        &[("C", c as f64), ("WIDTH", (c / lanes(c)) as f64)],
        vec![
            read(19, "of_shards", of_shards, of_shards.len),
            read(5, "steps", steps, STEP_ELEMENTS),
            read(6, "counter", counter, 1),
            write(20, "mean_gradients", mean_gradients, 2 * c),
        ],
        c / lanes(c),
    )
}

/// [`batch_norm_forward`] by the running statistics. Writes `y`.
pub fn batch_norm_evaluate(
    g: &BatchNorm,
    epsilon: f32,
    relu: bool,
    x: View,
    running: View,
    affine: View,
    y: View,
) -> KernelSpec {
    let n = g.rows() * g.channels;
    let mut constants = constants(g);
    constants.push(("EPSILON", epsilon.into()));
    constants.push(("RELU", relu.into()));
    KernelSpec::new(
        "batch_norm_evaluate",
        with_lanes(SOURCE, g.channels),
        Work::BatchNormEvaluate {
            geometry: *g,
            epsilon,
            relu,
        },
        &constants,
        vec![
            read(0, "x", x, n),
            read(10, "running", running, 2 * g.channels),
            read(3, "affine", affine, 2 * g.channels),
            write(8, "y", y, n),
        ],
        invocations(g)[1],
    )
}

/// `folded[m + 1, C]`: the weight `[m,C]` of the convolution before, with `bias` that as well as its
/// last row, so that the convolution gives what [`batch_norm_evaluate`] would make of it:
/// `w·γ·rstd` and `(b − mean)·γ·rstd + β`. Writes `folded`.
pub fn batch_norm_fold(
    m: usize,
    c: usize,
    bias: bool,
    epsilon: f32,
    parameters: View,
    running: View,
    affine: View,
    folded: View,
) -> KernelSpec {
    KernelSpec::new(
        "batch_norm_fold",
        SOURCE,
        Work::BatchNormFold { bias, epsilon },
        &[
            ("C", c as f64),
            ("M", m as f64),
            ("BIAS", f64::from(bias)),
            ("EPSILON", epsilon.into()),
        ],
        vec![
            read(14, "parameters", parameters, (m + usize::from(bias)) * c),
            read(15, "running", running, 2 * c),
            read(16, "affine", affine, 2 * c),
            write(17, "folded", folded, (m + 1) * c),
        ],
        (m + 1) * c,
    )
}
