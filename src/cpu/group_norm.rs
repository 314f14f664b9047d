//! Twins of `shaders/group_norm.wgsl`: group normalisation, and layer normalisation as a case of it.
//!
//! What belongs to a group is spread over its channels first, so that the loops over rows are the same
//! for every channel, which the compiler turns into vector instructions.
//!
//! Sources: Wu, He (2018), "Group Normalization"; Ba, Kiros, Hinton (2016), "Layer Normalization";
//! Chan, Golub, LeVeque (1983), "Algorithms for Computing the Sample Variance".

use super::batch_norm::{halves, number, rows_per_task};
use super::{Float, add};
use crate::kernels::group_norm::GroupNorm;
use rayon::prelude::*;
use std::ops::Range;

/// Mean and `Σ (x − mean)²` of every group of `x − x₀` in every chunk of positions. `x₀` is the group's
/// first value: the differences are as small as the deviation, however large the mean, so nothing is
/// lost in rounding.
///
/// x `[N, positions, C]`, returns `[chunks, N, G, 2]`.
pub fn group_norm_moments<T: Float>(g: &GroupNorm, x: &[T]) -> Vec<T> {
    let (c, width) = (g.channels, g.group_channels());
    by_chunk(g, 3, |sample, elements, scratch, result| {
        let (start, sums) = scratch.split_at_mut(c);
        let (mean, squares) = sums.split_at_mut(c);
        let first = &x[sample * g.positions * c..][..c];
        for (start, x) in start.chunks_exact_mut(width).zip(first.chunks_exact(width)) {
            start.fill(x[0]);
        }
        mean.fill(T::zero());
        for row in x[elements.clone()].chunks_exact(c) {
            for i in 0..c {
                mean[i] += row[i] - start[i];
            }
        }
        let n: T = number(elements.len() / g.groups);
        for mean in mean.chunks_exact_mut(width) {
            mean.fill(total(mean) / n);
        }
        squares.fill(T::zero());
        for row in x[elements].chunks_exact(c) {
            for i in 0..c {
                let difference = row[i] - start[i] - mean[i];
                squares[i] += difference * difference;
            }
        }
        let groups = mean.chunks_exact(width).zip(squares.chunks_exact(width));
        for (result, (mean, squares)) in result.chunks_exact_mut(2).zip(groups) {
            result[0] = mean[0];
            result[1] = total(squares);
        }
    })
}

/// Mean and `1 / √(variance + ε)` of every group, merged from the moments of the chunks in
/// order.
///
/// x `[N, positions, C]`, of which the groups' first values are read; partials `[chunks, N, G, 2]`;
/// returns `[N, G, 2]`.
pub fn group_norm_statistics<T: Float>(
    g: &GroupNorm,
    epsilon: f32,
    x: &[T],
    partials: &[T],
) -> Vec<T> {
    let (size, width) = (g.chunks().size, g.group_channels());
    let mut statistics = vec![T::zero(); g.statistics()];
    for (chunk, partials) in partials.chunks_exact(statistics.len()).enumerate() {
        let before = chunk * size;
        let more = size.min(g.positions - before);
        let share = number::<T>(more) / number(before + more);
        let before: T = number(before * width);
        for (merged, partial) in statistics.chunks_exact_mut(2).zip(partials.chunks_exact(2)) {
            let difference = partial[0] - merged[0];
            merged[0] += difference * share;
            merged[1] += partial[1] + difference * (difference * before * share);
        }
    }
    let epsilon: T = epsilon.into();
    for (group, of) in statistics.chunks_exact_mut(2).enumerate() {
        of[0] += x[group / g.groups * g.positions * g.channels + group % g.groups * width];
        of[1] = T::one() / (of[1] / number(g.elements()) + epsilon).sqrt();
    }
    statistics
}

/// `y = (x − mean)·rstd·γ + β`.
///
/// x and y `[N, positions, C]`, statistics `[N, G, 2]`: mean, rstd; affine `[2, C]`: γ, β.
pub fn group_norm_forward<T: Float>(
    g: &GroupNorm,
    x: &[T],
    statistics: &[T],
    affine: &[T],
    y: &mut [T],
) {
    let c = g.channels;
    let (weight, bias) = halves(affine);
    by_sample(g, y, 2, |sample, elements, scratch, y| {
        let (mean, rstd) = scratch.split_at_mut(c);
        spread(g, statistics, sample, [mean, rstd]);
        for (y, x) in y.chunks_exact_mut(c).zip(x[elements].chunks_exact(c)) {
            for i in 0..c {
                y[i] = (x[i] - mean[i]) * rstd[i] * weight[i] + bias[i];
            }
        }
    });
}

/// `Σ dy·γ` and `Σ dy·γ·x̂` of every group in every chunk of positions, with `x̂ = (x − mean)·rstd`.
///
/// x and dy `[N, positions, C]`, statistics `[N, G, 2]`, affine `[2, C]`, returns `[chunks, N, G, 2]`.
pub fn group_norm_backward_sums<T: Float>(
    g: &GroupNorm,
    x: &[T],
    dy: &[T],
    statistics: &[T],
    affine: &[T],
) -> Vec<T> {
    let (c, width) = (g.channels, g.group_channels());
    let weight = halves(affine).0;
    by_chunk(g, 4, |sample, elements, scratch, result| {
        let (of, sums) = scratch.split_at_mut(2 * c);
        let (mean, rstd) = of.split_at_mut(c);
        spread(g, statistics, sample, [mean, rstd]);
        sums.fill(T::zero());
        let (sum, weighted) = sums.split_at_mut(c);
        let rows = x[elements.clone()].chunks_exact(c);
        for (x, dy) in rows.zip(dy[elements].chunks_exact(c)) {
            for i in 0..c {
                sum[i] += dy[i];
                weighted[i] += dy[i] * (x[i] - mean[i]);
            }
        }
        for i in 0..c {
            sum[i] *= weight[i];
            weighted[i] *= weight[i] * rstd[i];
        }
        let groups = sum.chunks_exact(width).zip(weighted.chunks_exact(width));
        for (result, (sum, weighted)) in result.chunks_exact_mut(2).zip(groups) {
            result[0] = total(sum);
            result[1] = total(weighted);
        }
    })
}

/// `dx = rstd·(dy·γ − (Σ dy·γ + x̂·Σ dy·γ·x̂) / E)` over the E elements of a group.
///
/// x, dy and dx `[N, positions, C]`, statistics and sums `[N, G, 2]`, affine `[2, C]`.
pub fn group_norm_backward_input<T: Float>(
    g: &GroupNorm,
    x: &[T],
    dy: &[T],
    statistics: &[T],
    affine: &[T],
    sums: &[T],
    dx: &mut [T],
) {
    let c = g.channels;
    let weight = halves(affine).0;
    let elements: T = number(g.elements());
    by_sample(g, dx, 4, |sample, places, scratch, dx| {
        let (of, sum) = scratch.split_at_mut(2 * c);
        let (mean, rstd) = of.split_at_mut(c);
        let (offset, slope) = sum.split_at_mut(c);
        spread(g, statistics, sample, [mean, rstd]);
        spread(g, sums, sample, [offset, slope]);
        for i in 0..c {
            offset[i] /= elements;
            slope[i] *= rstd[i] / elements;
        }
        let rows = x[places.clone()].chunks_exact(c);
        let rows = rows.zip(dy[places].chunks_exact(c));
        for (dx, (x, dy)) in dx.chunks_exact_mut(c).zip(rows) {
            for i in 0..c {
                dx[i] = rstd[i] * (dy[i] * weight[i] - offset[i] - (x[i] - mean[i]) * slope[i]);
            }
        }
    });
}

/// `Σ dy·x̂` and `Σ dy` of every channel in every chunk of rows; their sum over the chunks is the
/// gradient of γ and β.
///
/// x and dy `[N, positions, C]`, statistics `[N, G, 2]`, returns `[row chunks, 2, C]`.
pub fn group_norm_backward_affine<T: Float>(
    g: &GroupNorm,
    x: &[T],
    dy: &[T],
    statistics: &[T],
) -> Vec<T> {
    let (c, size) = (g.channels, g.row_chunks().size);
    let mut partials = vec![T::zero(); g.row_chunks().count() * 2 * c];
    partials
        .par_chunks_mut(2 * c)
        .zip(x.par_chunks(size * c).zip(dy.par_chunks(size * c)))
        .enumerate()
        .for_each_init(
            || vec![T::zero(); 2 * c],
            |scratch, (chunk, (partial, (x, dy)))| {
                let (mean, rstd) = scratch.split_at_mut(c);
                let (weight, bias) = partial.split_at_mut(c);
                let rows = x.chunks_exact(c).zip(dy.chunks_exact(c));
                for (i, (x, dy)) in rows.enumerate() {
                    let row = chunk * size + i;
                    if i == 0 || row.is_multiple_of(g.positions) {
                        spread(g, statistics, row / g.positions, [mean, rstd]);
                    }
                    for i in 0..c {
                        weight[i] += dy[i] * ((x[i] - mean[i]) * rstd[i]);
                        bias[i] += dy[i];
                    }
                }
            },
        );
    partials
}

/// Gives every channel the two values that its group has in a sample's part of `[N, G, 2]`.
fn spread<T: Float>(g: &GroupNorm, pairs: &[T], sample: usize, [first, second]: [&mut [T]; 2]) {
    let width = g.group_channels();
    let pairs = pairs[sample * g.groups * 2..].chunks_exact(2);
    let channels = first
        .chunks_exact_mut(width)
        .zip(second.chunks_exact_mut(width));
    for (pair, (first, second)) in pairs.zip(channels) {
        first.fill(pair[0]);
        second.fill(pair[1]);
    }
}

/// A sum in eight parts side by side.
fn total<T: Float>(values: &[T]) -> T {
    let mut parts = [T::zero(); 8];
    let eights = values.chunks_exact(8);
    let rest = eights.remainder();
    for eight in eights {
        add(&mut parts, eight);
    }
    parts.into_iter().chain(rest.iter().copied()).sum()
}

/// Calls `partial(sample, elements, scratch, result)` for every chunk of positions of every sample:
/// `elements` are the chunk's places in `[N, positions, C]`, scratch has `vectors` times C elements, and
/// result is the two values of each group. Returns `[chunks, N, G, 2]`.
fn by_chunk<T: Float>(
    g: &GroupNorm,
    vectors: usize,
    partial: impl Fn(usize, Range<usize>, &mut [T], &mut [T]) + Sync + Send,
) -> Vec<T> {
    let (c, chunks) = (g.channels, g.chunks());
    let mut partials = vec![T::zero(); chunks.count() * g.statistics()];
    partials
        .par_chunks_mut(2 * g.groups)
        .with_min_len(rows_per_task(c).div_ceil(chunks.size))
        .enumerate()
        .for_each_init(
            || vec![T::zero(); vectors * c],
            |scratch, (i, result)| {
                let (chunk, sample) = (i / g.batch, i % g.batch);
                let first = chunk * chunks.size;
                let end = (first + chunks.size).min(g.positions);
                let place = |position| (sample * g.positions + position) * c;
                partial(sample, place(first)..place(end), scratch, result);
            },
        );
    partials
}

/// Calls `output(sample, elements, scratch, result)` for every sample, see [`by_chunk`]; result is its
/// part of y `[N, positions, C]`.
fn by_sample<T: Float>(
    g: &GroupNorm,
    y: &mut [T],
    vectors: usize,
    output: impl Fn(usize, Range<usize>, &mut [T], &mut [T]) + Sync + Send,
) {
    let (c, sample_elements) = (g.channels, g.positions * g.channels);
    y.par_chunks_mut(sample_elements)
        .with_min_len(rows_per_task(c).div_ceil(g.positions))
        .enumerate()
        .for_each_init(
            || vec![T::zero(); vectors * c],
            |scratch, (sample, result)| {
                let first = sample * sample_elements;
                output(sample, first..first + sample_elements, scratch, result);
            },
        );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::check::noise;

    #[test]
    fn a_mean_that_is_large_against_the_deviation() {
        for (positions, channels, groups) in [(1000, 6, 3), (1, 37, 1), (70, 96, 2)] {
            let g = GroupNorm {
                batch: 3,
                positions,
                channels,
                groups,
            };
            let x = noise(1, g.rows() * channels);
            let x: Vec<f32> = x.iter().map(|v| (1e4 + v) as f32).collect();
            let wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let found = group_norm_statistics(&g, 1e-5, &x, &group_norm_moments(&g, &x));
            let expected = group_norm_statistics(&g, 1e-5, &wide, &group_norm_moments(&g, &wide));
            for (found, expected) in found.chunks_exact(2).zip(expected.chunks_exact(2)) {
                // Half a unit in the last place of the mean: a better one f32 does not hold.
                assert!((f64::from(found[0]) - expected[0]).abs() <= 4.9e-4, "{g:?}");
                let relative = f64::from(found[1]) / expected[1] - 1.0;
                assert!(relative.abs() <= 1e-6, "{g:?}: {found:?}, {expected:?}");
            }
        }
    }

    #[test]
    fn a_sample_without_gradient_gets_none() {
        let g = GroupNorm {
            batch: 2,
            positions: 3,
            channels: 4,
            groups: 2,
        };
        let (x, affine, mut dy) = (noise(2, 24), noise(3, 8), noise(4, 24));
        dy[12..].fill(0.0);
        let statistics = group_norm_statistics(&g, 1e-5, &x, &group_norm_moments(&g, &x));
        let sums = group_norm_backward_sums(&g, &x, &dy, &statistics, &affine);
        let mut dx = vec![9.0; 24];
        group_norm_backward_input(&g, &x, &dy, &statistics, &affine, &sums, &mut dx);
        assert!(dx[..12].iter().all(|dx| *dx != 0.0) && dx[12..].iter().all(|dx| *dx == 0.0));
    }
}
