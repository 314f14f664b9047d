//! `shaders/group_norm.wgsl`: normalisation of a sample's channels, group by group; layer normalisation
//! is a case of it.
//!
//! Affine parameters are one view `[2,C]`, weight γ and bias β; statistics are `[N,G,2]`, mean and
//! `rstd = 1 / √(variance + ε)` of every group of every sample.

use super::batch_norm::{Chunks, ROWS_PER_STRIP};
use super::lanes::{lanes, with_lanes};
use super::{KernelSpec, View, Work, read, write};

const SOURCE: &str = include_str!("../../shaders/group_norm.wgsl");

/// What is normalised: `[batch, positions, channels]` in `groups` equal groups of channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupNorm {
    pub batch: usize,
    pub positions: usize,
    pub channels: usize,
    pub groups: usize,
}

impl GroupNorm {
    /// Layer normalisation over the `channels` of each of the `positions` of each sample.
    pub const fn layer(batch: usize, positions: usize, channels: usize) -> GroupNorm {
        GroupNorm {
            batch: batch * positions,
            positions: 1,
            channels,
            groups: 1,
        }
    }

    pub const fn rows(&self) -> usize {
        self.batch * self.positions
    }

    /// Elements that are normalised together.
    pub const fn elements(&self) -> usize {
        self.positions * self.group_channels()
    }

    pub const fn group_channels(&self) -> usize {
        self.channels / self.groups
    }

    /// Elements of the statistics: two for each group of each sample.
    pub const fn statistics(&self) -> usize {
        self.batch * self.groups * 2
    }

    /// How the sums over the positions of a group are cut.
    pub fn chunks(&self) -> Chunks {
        Chunks::new(
            self.positions,
            256_usize.div_ceil(self.group_channels()),
            64,
        )
    }

    /// How the sums over all rows are cut.
    pub fn row_chunks(&self) -> Chunks {
        Chunks::new(self.rows(), 32, 512)
    }
}

fn constants(g: &GroupNorm) -> Vec<(&'static str, f64)> {
    let lanes = lanes(g.group_channels());
    [
        ("N", g.batch),
        ("POSITIONS", g.positions),
        ("WIDTH", g.channels / lanes),
        ("GROUP_WIDTH", g.group_channels() / lanes),
        ("CHUNKS", g.chunks().count()),
        ("POSITIONS_PER_CHUNK", g.chunks().size),
        ("ROW_CHUNKS", g.row_chunks().count()),
        ("ROWS_PER_CHUNK", g.row_chunks().size),
    ]
    .map(|(name, value)| (name, value as f64))
    .to_vec()
}

fn source(g: &GroupNorm) -> &'static str {
    with_lanes(SOURCE, g.group_channels())
}

/// Invocations of a kernel that handles strips of rows.
fn strips(g: &GroupNorm) -> usize {
    g.rows().div_ceil(ROWS_PER_STRIP) * (g.channels / lanes(g.group_channels()))
}

/// Elements of what there is for every chunk of every group.
fn partial_elements(g: &GroupNorm) -> usize {
    g.chunks().count() * g.statistics()
}

/// `partials[chunks,N,G,2]`: mean and Σ (x − mean)² of `x − x₀` in every chunk of positions of
/// `x[N,positions,C]`, where `x₀` is the group's first value. Writes `partials`.
pub fn group_norm_moments(g: &GroupNorm, x: View, partials: View) -> KernelSpec {
    KernelSpec::new(
        "group_norm_moments",
        source(g),
        Work::GroupNormMoments(*g),
        &constants(g),
        vec![
            read(0, "x", x, g.rows() * g.channels),
            write(5, "partials", partials, partial_elements(g)),
        ],
        partial_elements(g) / 2,
    )
}

/// `statistics[N,G,2]` from what [`group_norm_moments`] wrote of the same `x`. Writes `statistics`.
pub fn group_norm_statistics(
    g: &GroupNorm,
    epsilon: f32,
    x: View,
    partials: View,
    statistics: View,
) -> KernelSpec {
    let mut constants = constants(g);
    constants.push(("EPSILON", epsilon.into()));
    KernelSpec::new(
        "group_norm_statistics",
        source(g),
        Work::GroupNormStatistics {
            geometry: *g,
            epsilon,
        },
        &constants,
        vec![
            read(0, "x", x, g.rows() * g.channels),
            read(8, "partials", partials, partial_elements(g)),
            write(9, "statistics", statistics, g.statistics()),
        ],
        g.statistics() / 2,
    )
}

/// `y[N,positions,C] = (x − mean)·rstd·γ + β`. Writes `y`.
pub fn group_norm_forward(
    g: &GroupNorm,
    x: View,
    statistics: View,
    affine: View,
    y: View,
) -> KernelSpec {
    let n = g.rows() * g.channels;
    KernelSpec::new(
        "group_norm_forward",
        source(g),
        Work::GroupNormForward(*g),
        &constants(g),
        vec![
            read(0, "x", x, n),
            read(2, "statistics", statistics, g.statistics()),
            read(3, "affine", affine, 2 * g.channels),
            write(6, "y", y, n),
        ],
        strips(g),
    )
}

/// `partials[chunks,N,G,2]`: Σ dy·γ and Σ dy·γ·x̂ in every chunk of positions, whose sums over the chunks
/// ([`super::reduce::reduce_splits`]) [`group_norm_backward_input`] takes. Writes `partials`.
pub fn group_norm_backward_sums(
    g: &GroupNorm,
    x: View,
    dy: View,
    statistics: View,
    affine: View,
    partials: View,
) -> KernelSpec {
    let n = g.rows() * g.channels;
    KernelSpec::new(
        "group_norm_backward_sums",
        source(g),
        Work::GroupNormBackwardSums(*g),
        &constants(g),
        vec![
            read(0, "x", x, n),
            read(1, "dy", dy, n),
            read(2, "statistics", statistics, g.statistics()),
            // Only γ is looked at.
            read(3, "affine", affine, g.channels),
            write(5, "partials", partials, partial_elements(g)),
        ],
        partial_elements(g) / 2,
    )
}

/// `dx[N,positions,C] = rstd·(dy·γ − (Σ dy·γ + x̂·Σ dy·γ·x̂) / E)` with the sums over the E elements of a
/// group in `sums[N,G,2]`. Writes `dx`.
pub fn group_norm_backward_input(
    g: &GroupNorm,
    x: View,
    dy: View,
    statistics: View,
    affine: View,
    sums: View,
    dx: View,
) -> KernelSpec {
    let n = g.rows() * g.channels;
    KernelSpec::new(
        "group_norm_backward_input",
        source(g),
        Work::GroupNormBackwardInput(*g),
        &constants(g),
        vec![
            read(0, "x", x, n),
            read(1, "dy", dy, n),
            read(2, "statistics", statistics, g.statistics()),
            // Only γ is looked at.
            read(3, "affine", affine, g.channels),
            read(4, "sums", sums, g.statistics()),
            write(7, "dx", dx, n),
        ],
        strips(g),
    )
}

/// `partials[row chunks,2,C]`: Σ dy·x̂ and Σ dy in every chunk of rows, whose sum over the chunks
/// ([`super::reduce::reduce_chunks`]) is the gradient of γ and β. Writes `partials`.
pub fn group_norm_backward_affine(
    g: &GroupNorm,
    x: View,
    dy: View,
    statistics: View,
    partials: View,
) -> KernelSpec {
    let (n, chunks) = (g.rows() * g.channels, g.row_chunks().count());
    KernelSpec::new(
        "group_norm_backward_affine",
        source(g),
        Work::GroupNormBackwardAffine(*g),
        &constants(g),
        vec![
            read(0, "x", x, n),
            read(1, "dy", dy, n),
            read(2, "statistics", statistics, g.statistics()),
            write(10, "partials", partials, chunks * 2 * g.channels),
        ],
        chunks * (g.channels / lanes(g.group_channels())),
    )
}
