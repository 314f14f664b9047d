//! The cases of the normalisations: channels that are no multiple of four, more rows than a chunk has and
//! more chunks than a workgroup merges at a time, and samples that do not count.

use super::cases::{samples, step_table};
use super::parity::{Bench, Case, Tolerance};
use crate::kernels::batch_norm::{
    BatchNorm, batch_norm_backward_input, batch_norm_backward_sums, batch_norm_evaluate,
    batch_norm_fold, batch_norm_forward, batch_norm_moments, batch_norm_shard_moments,
    batch_norm_shard_sums, batch_norm_statistics, batch_norm_sync_gradients,
    batch_norm_sync_statistics,
};
use crate::kernels::group_norm::{
    GroupNorm, group_norm_backward_affine, group_norm_backward_input, group_norm_backward_sums,
    group_norm_forward, group_norm_moments, group_norm_statistics,
};
use crate::kernels::reduce::reduce_chunks;
use crate::kernels::{Step, View};

/// Of the sums that a few more operations go into.
const FEW: Tolerance = Tolerance {
    absolute: 4e-6,
    relative: 2e-6,
};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        // More workgroups than one dimension of a dispatch holds.
        batch_norm_fold_case(2048, 2049, true),
        batch_norm_fold_case(18, 5, false),
        batch_norm_fold_case(27, 32, true),
        large_mean_case(),
    ];
    cases.extend(
        [(1, 1), (5, 100), (200, 6), (511, 1030), (1025, 12)].map(|(n, c)| reduce_case(n, c)),
    );
    for (batch, positions, channels, count) in [
        (1, 1, 1, 1),
        (1, 33, 5, 1),
        (7, 1, 4, 1),
        (7, 1, 3, 7),
        (7, 30, 32, 4),
        (7, 9, 12, 7),
        (3, 17, 260, 2),
        (130, 130, 3, 129),
        (65, 300, 8, 64),
    ] {
        let g = BatchNorm {
            batch,
            positions,
            channels,
        };
        cases.extend(batch_norm_cases(g, count));
    }
    let groups = |batch, positions, channels, groups| GroupNorm {
        batch,
        positions,
        channels,
        groups,
    };
    for g in [
        groups(1, 1, 1, 1),
        groups(7, 30, 6, 3),
        groups(7, 70, 32, 8),
        groups(1, 300, 5, 5),
        groups(2, 5000, 4, 1),
        groups(3, 129, 36, 3),
        GroupNorm::layer(7, 9, 5),
        GroupNorm::layer(1, 1, 32),
        GroupNorm::layer(33, 20, 300),
    ] {
        cases.extend(group_norm_cases(g));
    }
    cases
}

/// See `nonfinite.rs`. Of statistics only NaN: where several infinities meet in another order, one may
/// come out as NaN.
pub(super) fn nonfinite_cases() -> Vec<Case> {
    let mut cases = vec![
        batch_norm_fold_case(4, 33, true).nonfinite(),
        reduce_case(20, 33).nonfinite(),
    ];
    for (channels, count) in [(33, 2), (32, 1)] {
        let g = BatchNorm {
            batch: 2,
            positions: 2,
            channels,
        };
        let mut of = batch_norm_cases(g, count);
        of.retain(|case| {
            ![
                "batch_norm_statistics",
                "batch_norm_shard_moments",
                "batch_norm_sync_statistics",
            ]
            .contains(&&*case.kernel)
        });
        cases.extend(of.into_iter().map(Case::nonfinite));
        cases.push(batch_norm_statistics_case(g, count, true));
        cases.push(batch_norm_shard_moments_case(g, count, true));
        cases.push(batch_norm_sync_statistics_case(channels, 3, true));
    }
    for channels in [33, 32] {
        let g = BatchNorm {
            batch: 2,
            positions: 50,
            channels,
        };
        cases.push(batch_norm_moments_case(g, 1, true));
    }
    for g in [
        GroupNorm::layer(9, 1, 12),
        GroupNorm {
            batch: 5,
            positions: 3,
            channels: 35,
            groups: 7,
        },
    ] {
        let mut of = group_norm_cases(g);
        of.retain(|case| !["group_norm_moments", "group_norm_statistics"].contains(&&*case.kernel));
        cases.extend(of.into_iter().map(Case::nonfinite));
        cases.push(group_norm_moments_case(g, true));
        cases.push(group_norm_statistics_case(g, true));
    }
    cases
}

/// Every kernel of a batch-norm of which `count` samples count.
pub(super) fn batch_norm_cases(g: BatchNorm, count: usize) -> Vec<Case> {
    let c = g.channels;
    let (elements, partials) = (g.rows() * c, g.chunks().count() * 2 * c);
    let sums = Tolerance::sum(8 * g.chunks().size);
    let variant = batch_norm_text(&g, count);
    let mut cases = vec![
        batch_norm_moments_case(g, count, false),
        batch_norm_statistics_case(g, count, false),
        batch_norm_shard_moments_case(g, count, false),
        batch_norm_sync_statistics_case(c, 1 + count % 4, false),
        batch_norm_forward_case(g, false),
        batch_norm_forward_case(g, true),
        batch_norm_evaluate_case(g, false),
        batch_norm_evaluate_case(g, true),
        Case::new("batch_norm_backward_sums", variant.clone(), move |b| {
            let (x, dy, statistics) = (draw(b, elements), draw(b, elements), draw(b, 2 * c));
            let [steps, counter] = step_table(b, samples(3, count));
            let partials = b.output("partials", partials, sums);
            vec![batch_norm_backward_sums(
                &g, x, dy, statistics, steps, counter, partials,
            )]
        }),
        Case::new("batch_norm_shard_sums", variant.clone(), move |b| {
            let (gradient, before) = (draw(b, 2 * c), b.values(SHARDS * 3 * c));
            let [steps, counter] = step_table(b, shard(count));
            let sums = b.updated("shard_sums", &before, Tolerance::EXACT);
            vec![batch_norm_shard_sums(&g, gradient, steps, counter, sums)]
        }),
        Case::new("batch_norm_sync_gradients", variant.clone(), move |b| {
            let mut of_shards = b.values(SHARDS * 3 * c);
            for (i, shard) in of_shards.chunks_exact_mut(3 * c).enumerate() {
                shard[..c].fill(7.0 + i as f32);
            }
            let (of_shards, [steps, counter]) = (b.input(&of_shards), step_table(b, shard(1)));
            let means = b.output("mean_gradients", 2 * c, Tolerance::sum(SHARDS));
            vec![batch_norm_sync_gradients(of_shards, steps, counter, means)]
        }),
    ];
    cases.extend([false, true].map(|divided| {
        let variant = format!("{variant}, divided {divided}");
        Case::new("batch_norm_backward_input", variant, move |b| {
            let (x, dy) = (draw(b, elements), draw(b, elements));
            let [statistics, affine, gradient] = [(); 3].map(|()| draw(b, 2 * c));
            let [steps, counter] = step_table(b, samples(3, count));
            let dx = b.output("dx", elements, FEW);
            vec![batch_norm_backward_input(
                &g, divided, x, dy, statistics, affine, gradient, steps, counter, dx,
            )]
        })
    }));
    cases
}

/// Most shards of a batch here.
const SHARDS: usize = 5;

/// One of four, of which `count` samples count.
fn shard(count: usize) -> Step {
    Step {
        micro: 2,
        shards: 4,
        ..samples(3, count)
    }
}

fn batch_norm_text(g: &BatchNorm, count: usize) -> String {
    let BatchNorm {
        batch,
        positions,
        channels,
    } = g;
    format!("{count} of {batch}×{positions}×{channels}")
}

fn batch_norm_moments_case(g: BatchNorm, count: usize, nan: bool) -> Case {
    let variant = nan_text(batch_norm_text(&g, count), nan);
    Case::new("batch_norm_moments", variant, move |b| {
        let mut x = b.values(g.rows() * g.channels);
        if nan {
            // In the first row, among those that are read together, behind them and where none counts.
            let rows = [0, 3, 34, 49, 50].map(|row| row * g.channels);
            rows.iter()
                .enumerate()
                .for_each(|(i, row)| x[row + 5 * i] = f32::NAN);
        }
        let (x, [steps, counter]) = (b.input(&x), step_table(b, samples(3, count)));
        let tolerance = Tolerance::sum(8 * g.chunks().size);
        let partials = b.output("partials", g.chunks().count() * 2 * g.channels, tolerance);
        vec![batch_norm_moments(&g, x, steps, counter, partials)]
    })
}

fn batch_norm_forward_case(g: BatchNorm, relu: bool) -> Case {
    let variant = format!("{}, relu {relu}", batch_norm_text(&g, g.batch));
    Case::new("batch_norm_forward", variant, move |b| {
        let (n, c) = (g.rows() * g.channels, g.channels);
        let (x, statistics, affine) = (draw(b, n), draw(b, 2 * c), draw(b, 2 * c));
        let y = b.output("y", n, FEW);
        vec![batch_norm_forward(&g, relu, x, statistics, affine, y)]
    })
}

fn batch_norm_evaluate_case(g: BatchNorm, relu: bool) -> Case {
    let variant = format!("{}, relu {relu}", batch_norm_text(&g, g.batch));
    Case::new("batch_norm_evaluate", variant, move |b| {
        let (n, c) = (g.rows() * g.channels, g.channels);
        let (x, affine, running) = (draw(b, n), draw(b, 2 * c), statistics(b, c));
        let y = b.output("y", n, FEW);
        vec![batch_norm_evaluate(&g, 0.01, relu, x, running, affine, y)]
    })
}

/// What [`batch_norm_moments`] may have written: as many squares as a chunk has rows; what stands for chunks that do
/// not count is not zero.
fn chunk_moments(b: &mut Bench, g: &BatchNorm, nan: bool) -> View {
    let c = g.channels;
    let mut partials = b.values(g.chunks().count() * 2 * c);
    for partial in partials.chunks_exact_mut(2 * c) {
        let size = g.chunks().size as f32;
        let (means, squares) = partial.split_at_mut(c);
        squares.iter_mut().for_each(|v| *v = v.abs() * size);
        spoil(means.iter_mut().zip(squares), nan);
    }
    b.input(&partials)
}

fn batch_norm_shard_moments_case(g: BatchNorm, count: usize, nan: bool) -> Case {
    let (c, chunks) = (g.channels, g.chunks().count());
    let variant = nan_text(batch_norm_text(&g, count), nan);
    Case::new("batch_norm_shard_moments", variant, move |b| {
        let (x, partials) = (draw(b, g.rows() * c), chunk_moments(b, &g, nan));
        let [steps, counter] = step_table(b, shard(count));
        let before = b.values(SHARDS * 4 * c);
        let rows = b.updated("shard_moments", &before, Tolerance::sum(8 * chunks));
        vec![batch_norm_shard_moments(
            &g, x, partials, steps, counter, rows,
        )]
    })
}

/// Shards of other sizes and other means, of which the batch has some.
fn batch_norm_sync_statistics_case(c: usize, shards: usize, nan: bool) -> Case {
    let variant = nan_text(format!("{c} channels, {shards} of {SHARDS} shards"), nan);
    Case::new("batch_norm_sync_statistics", variant, move |b| {
        let mut of_shards = b.values(SHARDS * 4 * c);
        for (i, shard) in of_shards.chunks_exact_mut(4 * c).enumerate() {
            let n = [3.0, 1.0, 20.0, 7.0, 2.0][i];
            let (counts, moments) = shard.split_at_mut(c);
            let (means, squares) = moments[c..].split_at_mut(c);
            counts.fill(n);
            squares.iter_mut().for_each(|v| *v = v.abs() * n);
            spoil(means.iter_mut().zip(squares), nan);
        }
        let row = Step {
            shards: shards as u32,
            ..samples(3, 1)
        };
        let (of_shards, [steps, counter]) = (b.input(&of_shards), step_table(b, row));
        let (running, tolerance) = (draw(b, 2 * c), Tolerance::sum(8 * SHARDS));
        let statistics = b.output("statistics", 2 * c, tolerance);
        let next = b.output("next_running", 2 * c, tolerance);
        vec![batch_norm_sync_statistics(
            [0.1, 0.01],
            of_shards,
            steps,
            counter,
            running,
            statistics,
            next,
        )]
    })
}

fn batch_norm_statistics_case(g: BatchNorm, count: usize, nan: bool) -> Case {
    let (c, chunks) = (g.channels, g.chunks().count());
    let variant = nan_text(batch_norm_text(&g, count), nan);
    Case::new("batch_norm_statistics", variant, move |b| {
        let (x, partials) = (draw(b, g.rows() * c), chunk_moments(b, &g, nan));
        let [steps, counter] = step_table(b, samples(3, count));
        let tolerance = Tolerance::sum(8 * chunks);
        let statistics = b.output("statistics", 2 * c, tolerance);
        let running = b.values(2 * c);
        let running = b.updated("running", &running, tolerance);
        vec![batch_norm_statistics(
            &g,
            [0.1, 0.01],
            x,
            partials,
            steps,
            counter,
            statistics,
            running,
        )]
    })
}

/// Mean 10⁴, deviation 1: 16 bits of 24 are the mean's.
fn large_mean_case() -> Case {
    let g = BatchNorm {
        batch: 33,
        positions: 200,
        channels: 4,
    };
    let variant = format!("mean 10⁴, {}", batch_norm_text(&g, 32));
    Case::new("batch_norm_statistics", variant, move |b| {
        let x: Vec<f32> = b.values(g.rows() * 4).iter().map(|x| 1e4 + x).collect();
        let x = b.input(&x);
        let [steps, counter] = step_table(b, samples(3, 32));
        let partials = b.scratch(g.chunks().count() * 8);
        // Half a unit in the last place of the mean is 5·10⁻⁴, a tenth of the relative one.
        let tolerance = Tolerance {
            absolute: 0.0,
            relative: 1e-6,
        };
        let statistics = b.output("statistics", 8, tolerance);
        let running = b.updated("running", &[0.5; 8], tolerance);
        vec![
            batch_norm_moments(&g, x, steps, counter, partials),
            batch_norm_statistics(
                &g,
                [0.1, 1e-5],
                x,
                partials,
                steps,
                counter,
                statistics,
                running,
            ),
        ]
    })
}

fn batch_norm_fold_case(m: usize, c: usize, bias: bool) -> Case {
    let variant = format!("{m}×{c}, bias {bias}");
    Case::new("batch_norm_fold", variant, move |b| {
        let parameters = draw(b, (m + usize::from(bias)) * c);
        let (affine, running) = (draw(b, 2 * c), statistics(b, c));
        let folded = b.output("folded", (m + 1) * c, FEW);
        vec![batch_norm_fold(
            m, c, bias, 0.01, parameters, running, affine, folded,
        )]
    })
}

fn reduce_case(chunks: usize, n: usize) -> Case {
    let variant = format!("{chunks} chunks of {n}");
    Case::new("reduce_chunks", variant, move |b| {
        let partials = draw(b, chunks * n);
        let result = b.output("result", n, Tolerance::sum(chunks));
        vec![reduce_chunks(chunks, partials, result)]
    })
}

/// Every kernel of a group-norm.
pub(super) fn group_norm_cases(g: GroupNorm) -> Vec<Case> {
    let (elements, c, of) = (g.rows() * g.channels, g.channels, g.statistics());
    let variant = group_norm_text(&g);
    vec![
        group_norm_moments_case(g, false),
        group_norm_statistics_case(g, false),
        Case::new("group_norm_forward", variant.clone(), move |b| {
            let (x, statistics, affine) = (draw(b, elements), draw(b, of), draw(b, 2 * c));
            let y = b.output("y", elements, FEW);
            vec![group_norm_forward(&g, x, statistics, affine, y)]
        }),
        Case::new("group_norm_backward_sums", variant.clone(), move |b| {
            let (x, dy) = (draw(b, elements), draw(b, elements));
            let (statistics, affine) = (draw(b, of), draw(b, 2 * c));
            let tolerance = Tolerance::sum(8 * g.chunks().size * g.group_channels());
            let partials = b.output("partials", g.chunks().count() * of, tolerance);
            vec![group_norm_backward_sums(
                &g, x, dy, statistics, affine, partials,
            )]
        }),
        Case::new("group_norm_backward_input", variant.clone(), move |b| {
            let (x, dy) = (draw(b, elements), draw(b, elements));
            let (statistics, affine, sums) = (draw(b, of), draw(b, 2 * c), draw(b, of));
            let dx = b.output("dx", elements, FEW);
            vec![group_norm_backward_input(
                &g, x, dy, statistics, affine, sums, dx,
            )]
        }),
        Case::new("group_norm_backward_affine", variant, move |b| {
            let (x, dy, statistics) = (draw(b, elements), draw(b, elements), draw(b, of));
            let chunks = g.row_chunks();
            let tolerance = Tolerance::sum(8 * chunks.size);
            let partials = b.output("partials", chunks.count() * 2 * c, tolerance);
            vec![group_norm_backward_affine(&g, x, dy, statistics, partials)]
        }),
    ]
}

fn group_norm_text(g: &GroupNorm) -> String {
    let GroupNorm {
        batch,
        positions,
        channels,
        groups,
    } = g;
    format!("{batch}×{positions}×{channels} in {groups} groups")
}

fn group_norm_moments_case(g: GroupNorm, nan: bool) -> Case {
    let variant = nan_text(group_norm_text(&g), nan);
    Case::new("group_norm_moments", variant, move |b| {
        let mut x = b.values(g.rows() * g.channels);
        if nan {
            x.iter_mut().step_by(31).for_each(|v| *v = f32::NAN);
        }
        let x = b.input(&x);
        let tolerance = Tolerance::sum(8 * g.chunks().size * g.group_channels());
        let partials = b.output("partials", g.chunks().count() * g.statistics(), tolerance);
        vec![group_norm_moments(&g, x, partials)]
    })
}

fn group_norm_statistics_case(g: GroupNorm, nan: bool) -> Case {
    let variant = nan_text(group_norm_text(&g), nan);
    Case::new("group_norm_statistics", variant, move |b| {
        let x = draw(b, g.rows() * g.channels);
        let mut partials = b.values(g.chunks().count() * g.statistics());
        let elements = (g.chunks().size * g.group_channels()) as f32;
        for pair in partials.chunks_exact_mut(2) {
            pair[1] = pair[1].abs() * elements;
        }
        let pairs = partials.chunks_exact_mut(2).map(|pair| {
            let (mean, squares) = pair.split_at_mut(1);
            (&mut mean[0], &mut squares[0])
        });
        spoil(pairs, nan);
        let partials = b.input(&partials);
        let tolerance = Tolerance::sum(8 * g.chunks().count());
        let statistics = b.output("statistics", g.statistics(), tolerance);
        vec![group_norm_statistics(&g, 0.01, x, partials, statistics)]
    })
}

/// Where a mean is NaN, so are the squares.
fn spoil<'a>(moments: impl Iterator<Item = (&'a mut f32, &'a mut f32)>, nan: bool) {
    let spoiled = moments.step_by(5).filter(|_| nan);
    spoiled.for_each(|(mean, squares)| (*mean, *squares) = (f32::NAN, f32::NAN));
}

fn nan_text(variant: String, nan: bool) -> String {
    variant + if nan { ", NaN among them" } else { "" }
}

fn draw(b: &mut Bench, n: usize) -> View {
    let values = b.values(n);
    b.input(&values)
}

/// Means and variances of `c` channels.
fn statistics(b: &mut Bench, c: usize) -> View {
    let mut values = b.values(2 * c);
    values[c..].iter_mut().for_each(|v| *v = v.abs());
    b.input(&values)
}
