//! Twins of `shaders/batch_norm.wgsl`. Only the first `count` samples count.
//!
//! Sources: Ioffe, Szegedy (2015), "Batch Normalization: Accelerating Deep Network Training by
//! Reducing Internal Covariate Shift"; Chan, Golub, LeVeque (1983), "Algorithms for Computing the
//! Sample Variance".

use super::Float;
use crate::kernels::batch_norm::BatchNorm;
use rayon::prelude::*;

/// Elements that one task handles, about.
const ELEMENTS_PER_TASK: usize = 16_384;

/// Rows of `c` elements that one task handles.
pub(super) fn rows_per_task(c: usize) -> usize {
    ELEMENTS_PER_TASK.div_ceil(c)
}

pub(super) fn number<T: Float>(n: usize) -> T {
    num_traits::cast(n).expect("a float holds every count")
}

/// The halves of a `[2, C]` matrix.
pub(super) fn halves<T>(matrix: &[T]) -> (&[T], &[T]) {
    matrix.split_at(matrix.len() / 2)
}

/// Mean and `Σ (x − mean)²` of every channel of `x − x₀` in every chunk of rows, by Welford's recurrence
/// (1962). `x₀` is the first row: the differences are as small as the deviation, however large the mean,
/// so nothing is lost in rounding.
///
/// x `[rows, C]`, returns `[chunks, 2, C]`.
pub fn batch_norm_moments<T: Float>(g: &BatchNorm, x: &[T], count: usize) -> Vec<T> {
    let c = g.channels;
    let mut partials = vec![T::zero(); g.chunks().count() * 2 * c];
    let (start, rows) = (&x[..c], &x[..count * g.positions * c]);
    partials
        .par_chunks_mut(2 * c)
        .zip(rows.par_chunks(g.chunks().size * c))
        .for_each(|(partial, rows)| {
            let (mean, squares) = partial.split_at_mut(c);
            for (row, x) in rows.chunks_exact(c).enumerate() {
                let share = T::one() / number(row + 1);
                for i in 0..c {
                    let value = x[i] - start[i];
                    let difference = value - mean[i];
                    mean[i] += difference * share;
                    squares[i] += difference * (value - mean[i]);
                }
            }
        });
    partials
}

/// Mean and `1 / √(variance + ε)` of every channel, merged from the moments of the chunks in order; the
/// running statistics move by `momentum` towards the new ones, the running variance towards
/// `Σ (x − mean)² / (n − 1)`, as in PyTorch. Of one row there is no such variance (PyTorch refuses
/// it): the running one then stays as it was.
///
/// x `[rows, C]`, of which the first row is read; partials `[chunks, 2, C]`; running `[2, C]`: mean,
/// variance; returns `[2, C]`.
pub fn batch_norm_statistics<T: Float>(
    g: &BatchNorm,
    [momentum, epsilon]: [f32; 2],
    x: &[T],
    partials: &[T],
    count: usize,
    running: &mut [T],
) -> Vec<T> {
    let (c, rows) = (g.channels, count * g.positions);
    let mut statistics = merge_chunks(g, partials, rows);
    let (mean, squares) = statistics.split_at_mut(c);
    mean.iter_mut().zip(x).for_each(|(mean, x)| *mean += *x);
    let (running_mean, running_variance) = running.split_at_mut(c);
    let momentum: T = momentum.into();
    for i in 0..c {
        running_mean[i] += momentum * (mean[i] - running_mean[i]);
        if rows > 1 {
            let variance = squares[i] / number(rows - 1);
            running_variance[i] += momentum * (variance - running_variance[i]);
        }
        squares[i] = rstd(squares[i] / number(rows), epsilon);
    }
    statistics
}

/// Mean and `Σ (x − mean)²` of `x − x₀` over all chunks, `[2, C]`.
fn merge_chunks<T: Float>(g: &BatchNorm, partials: &[T], rows: usize) -> Vec<T> {
    let (c, size) = (g.channels, g.chunks().size);
    let mut moments = vec![T::zero(); 2 * c];
    let (mean, squares) = moments.split_at_mut(c);
    // The chunks after these have no row that counts.
    let chunks = rows.div_ceil(size);
    for (chunk, partial) in partials.chunks_exact(2 * c).take(chunks).enumerate() {
        let before = chunk * size;
        let more = size.min(rows - before);
        let share = number::<T>(more) / number(before + more);
        let before: T = number(before);
        for i in 0..c {
            let difference = partial[i] - mean[i];
            mean[i] += difference * share;
            squares[i] += partial[c + i] + difference * (difference * before * share);
        }
    }
    moments
}

/// What a shard of a batch has to say of its rows: how many count, `x₀`, and mean and `Σ (x − mean)²` of `x − x₀`.
///
/// x `[rows, C]`, of which the first row is read; partials `[chunks, 2, C]`; returns `[4, C]`.
pub fn batch_norm_shard_moments<T: Float>(
    g: &BatchNorm,
    x: &[T],
    partials: &[T],
    count: usize,
) -> Vec<T> {
    let rows = count * g.positions;
    let n = vec![number(rows); g.channels];
    [&n, &x[..g.channels], &merge_chunks(g, partials, rows)].concat()
}

/// [`batch_norm_statistics`] of a whole batch from the moments of its shards `[shards, 4, C]`, merged in their order
/// (Chan, Golub, LeVeque, 1983), and the running statistics that follow.
///
/// running `[2, C]`; returns two of `[2, C]`.
pub fn batch_norm_sync_statistics<T: Float>(
    [momentum, epsilon]: [f32; 2],
    (of_shards, c): (&[T], usize),
    running: &[T],
) -> [Vec<T>; 2] {
    let (mut statistics, mut next) = (vec![T::zero(); 2 * c], running.to_vec());
    let momentum: T = momentum.into();
    for i in 0..c {
        let start = of_shards[c + i];
        let [mut n, mut mean, mut squares] = [T::zero(); 3];
        for shard in of_shards.chunks_exact(4 * c) {
            let [more, own_start, own_mean, own_squares] = [0, 1, 2, 3].map(|k| shard[k * c + i]);
            let difference = (own_start - start) + own_mean - mean;
            let share = more / (n + more);
            squares += own_squares + difference * (difference * n * share);
            mean += difference * share;
            n += more;
        }
        mean += start;
        next[i] += momentum * (mean - running[i]);
        if n > T::one() {
            next[c + i] += momentum * (squares / (n - T::one()) - running[c + i]);
        }
        statistics[i] = mean;
        statistics[c + i] = rstd(squares / n, epsilon);
    }
    [statistics, next]
}

/// `y = (x − mean)·rstd·γ + β`, in the rows that do not count as well; with `relu` the larger of that and
/// 0, and NaN where that is NaN.
///
/// x and y `[rows, C]`, statistics `[2, C]`: mean, rstd; affine `[2, C]`: γ, β.
pub fn batch_norm_forward<T: Float>(
    relu: bool,
    x: &[T],
    statistics: &[T],
    affine: &[T],
    y: &mut [T],
) {
    let (mean, rstd) = halves(statistics);
    let (weight, bias) = halves(affine);
    let c = mean.len();
    y.par_chunks_mut(rows_per_task(c) * c)
        .zip(x.par_chunks(rows_per_task(c) * c))
        .for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                for i in 0..c {
                    let value = (x[i] - mean[i]) * rstd[i] * weight[i] + bias[i];
                    y[i] = if relu && value <= T::zero() {
                        T::zero()
                    } else {
                        value
                    };
                }
            }
        });
}

/// `Σ dy·x̂` and `Σ dy` of every channel in every chunk of rows, with `x̂ = (x − mean)·rstd`; their sum
/// over the chunks is the gradient of γ and β.
///
/// x and dy `[rows, C]`, statistics `[2, C]`, returns `[chunks, 2, C]`.
pub fn batch_norm_backward_sums<T: Float>(
    g: &BatchNorm,
    x: &[T],
    dy: &[T],
    statistics: &[T],
    count: usize,
) -> Vec<T> {
    let c = g.channels;
    let (mean, rstd) = halves(statistics);
    let mut partials = vec![T::zero(); g.chunks().count() * 2 * c];
    let counted = count * g.positions * c;
    partials
        .par_chunks_mut(2 * c)
        .zip(x[..counted].par_chunks(g.chunks().size * c))
        .zip(dy[..counted].par_chunks(g.chunks().size * c))
        .for_each(|((partial, x), dy)| {
            let (weight, bias) = partial.split_at_mut(c);
            for (x, dy) in x.chunks_exact(c).zip(dy.chunks_exact(c)) {
                for i in 0..c {
                    weight[i] += dy[i] * (x[i] - mean[i]);
                    bias[i] += dy[i];
                }
            }
            for (weight, &rstd) in weight.iter_mut().zip(rstd) {
                *weight *= rstd;
            }
        });
    partials
}

/// How many rows of a shard count, and its gradient `[2, C]` of γ and β; returns `[3, C]`.
pub fn batch_norm_shard_sums<T: Float>(g: &BatchNorm, gradient: &[T], count: usize) -> Vec<T> {
    let n = vec![number(count * g.positions); g.channels];
    [&n, gradient].concat()
}

/// `Σ dγ / Σ n` and `Σ dβ / Σ n` over the shards of a batch `[shards, 3, C]`; returns `[2, C]`.
pub fn batch_norm_sync_gradients<T: Float>((of_shards, c): (&[T], usize)) -> Vec<T> {
    let mut sums = vec![T::zero(); 3 * c];
    for shard in of_shards.chunks_exact(3 * c) {
        sums.iter_mut().zip(shard).for_each(|(sum, x)| *sum += *x);
    }
    let (n, gradients) = sums.split_at(c);
    let means = gradients.iter().zip(n.iter().cycle());
    means.map(|(sum, n)| *sum / *n).collect()
}

/// `dx = γ·rstd·(dy − (Σ dy + x̂·Σ dy·x̂) / n)` in the n rows that count, 0 in the others.
///
/// x, dy and dx `[rows, C]`, statistics, affine and gradient (of affine, or `divided` by n already) `[2, C]`.
#[allow(clippy::too_many_arguments)] // One for each tensor, as the kernel has them.
pub fn batch_norm_backward_input<T: Float>(
    g: &BatchNorm,
    divided: bool,
    x: &[T],
    dy: &[T],
    statistics: &[T],
    affine: &[T],
    gradient: &[T],
    count: usize,
    dx: &mut [T],
) {
    let c = g.channels;
    let (mean, rstd) = halves(statistics);
    let (weight_gradient, bias_gradient) = halves(gradient);
    let n: T = number(if divided { 1 } else { count * g.positions });
    let scale: Vec<T> = affine.iter().zip(rstd).map(|(&w, &r)| w * r).collect();
    let slope = weight_gradient.iter().zip(rstd);
    let slope: Vec<T> = slope.map(|(&g, &r)| g * r / n).collect();
    let offset: Vec<T> = bias_gradient.iter().map(|&g| g / n).collect();
    let (scale, slope, offset) = (&scale[..c], &slope[..c], &offset[..c]);
    let (counted, rest) = dx.split_at_mut(count * g.positions * c);
    rest.fill(T::zero());
    counted
        .par_chunks_mut(rows_per_task(c) * c)
        .zip(x.par_chunks(rows_per_task(c) * c))
        .zip(dy.par_chunks(rows_per_task(c) * c))
        .for_each(|((dx, x), dy)| {
            let rows = x.chunks_exact(c).zip(dy.chunks_exact(c));
            for (dx, (x, dy)) in dx.chunks_exact_mut(c).zip(rows) {
                for i in 0..c {
                    dx[i] = scale[i] * (dy[i] - offset[i] - (x[i] - mean[i]) * slope[i]);
                }
            }
        });
}

/// [`batch_norm_forward`] by the running statistics `[2, C]`: mean, variance.
pub fn batch_norm_evaluate<T: Float>(
    epsilon: f32,
    relu: bool,
    x: &[T],
    running: &[T],
    affine: &[T],
    y: &mut [T],
) {
    let (mean, variance) = halves(running);
    let rstd = variance.iter().map(|&v| rstd(v, epsilon));
    let statistics: Vec<T> = mean.iter().copied().chain(rstd).collect();
    batch_norm_forward(relu, x, &statistics, affine, y);
}

/// Weight and bias of the convolution that is the one before and this normalisation in one:
/// `w·γ·rstd` and `(b − mean)·γ·rstd + β`.
///
/// parameters `[m, C]`, with `bias` `[m + 1, C]`; running and affine `[2, C]`; returns `[m + 1, C]`.
pub fn batch_norm_fold<T: Float>(
    bias: bool,
    epsilon: f32,
    parameters: &[T],
    running: &[T],
    affine: &[T],
) -> Vec<T> {
    let (mean, variance) = halves(running);
    let (weight, shift) = halves(affine);
    let c = mean.len();
    let mut folded = parameters.to_vec();
    if !bias {
        folded.resize(parameters.len() + c, T::zero());
    }
    let last = folded.len() - c;
    for i in 0..c {
        let scale = weight[i] * rstd(variance[i], epsilon);
        folded[last + i] -= mean[i];
        for value in folded[i..].iter_mut().step_by(c) {
            *value *= scale;
        }
        folded[last + i] += shift[i];
    }
    folded
}

fn rstd<T: Float>(variance: T, epsilon: f32) -> T {
    T::one() / (variance + epsilon.into()).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::check::noise;

    /// mean and rstd in f32 of `mean ± deviation`, and the same in f64.
    fn statistics(g: &BatchNorm, x: &[f32], count: usize) -> [Vec<f64>; 2] {
        fn of<T: Float>(g: &BatchNorm, x: Vec<T>, count: usize) -> Vec<f64> {
            let partials = batch_norm_moments(g, &x, count);
            let mut running = vec![T::zero(); 2 * g.channels];
            let statistics =
                batch_norm_statistics(g, [0.1, 1e-5], &x, &partials, count, &mut running);
            statistics.into_iter().map(Into::into).collect()
        }
        let wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        [of(g, x.to_vec(), count), of(g, wide, count)]
    }

    #[test]
    fn a_mean_that_is_large_against_the_deviation() {
        let g = BatchNorm {
            batch: 64,
            positions: 100,
            channels: 3,
        };
        let x: Vec<f32> = noise(1, g.rows() * 3)
            .iter()
            .map(|v| (1e4 + v) as f32)
            .collect();
        let [found, expected] = statistics(&g, &x, 64);
        for i in 0..3 {
            // Two units in the last place of the mean; the mean square would be off by tens.
            assert!(
                (found[i] - expected[i]).abs() <= 2e-3,
                "{found:?}, {expected:?}"
            );
            let relative = found[3 + i] / expected[3 + i] - 1.0;
            assert!(relative.abs() <= 1e-6, "{found:?}, {expected:?}");
        }
    }

    #[test]
    fn one_row_leaves_the_running_variance_alone() {
        let g = BatchNorm {
            batch: 4,
            positions: 1,
            channels: 2,
        };
        let x = [5.0f32, -3.0, 7.0, 7.0, 7.0, 7.0, 7.0, 7.0];
        let mut running = [1.0, 1.0, 2.0, 2.0];
        let partials = batch_norm_moments(&g, &x, 1);
        let statistics = batch_norm_statistics(&g, [0.5, 0.25], &x, &partials, 1, &mut running);
        assert_eq!(statistics, [5.0, -3.0, 2.0, 2.0]);
        assert_eq!(running, [3.0, -1.0, 2.0, 2.0]);
        let mut y = [9.0; 2];
        batch_norm_forward(false, &x[..2], &statistics, &[3.0, 4.0, 0.5, 0.25], &mut y);
        assert_eq!(y, [0.5, 0.25]);
    }

    #[test]
    fn a_nan_and_an_infinity_spoil_their_channel_only() {
        let g = BatchNorm {
            batch: 5,
            positions: 20,
            channels: 3,
        };
        let mut x: Vec<f32> = noise(2, g.rows() * 3).iter().map(|v| *v as f32).collect();
        x[3 * 41] = f32::NAN;
        x[3 * 17 + 2] = f32::INFINITY;
        // That does not count.
        x[3 * 90 + 1] = f32::NAN;
        let [found, _] = statistics(&g, &x, 4);
        let statistics: Vec<f32> = found.iter().map(|v| *v as f32).collect();
        let (affine, mut y) = ([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], vec![0.0; 3 * 80]);
        batch_norm_forward(false, &x[..3 * 80], &statistics, &affine, &mut y);
        for row in y.chunks_exact(3) {
            assert!(row[0].is_nan() && row[1].is_finite() && row[2].is_nan());
        }
    }

    #[test]
    fn a_folded_convolution_needs_no_normalisation() {
        let (m, c) = (5, 3);
        let (x, weight) = (noise(3, 7 * m), noise(4, m * c));
        let (bias, affine) = (noise(5, c), noise(6, 2 * c));
        let mut running = noise(7, 2 * c);
        running[c..].iter_mut().for_each(|v| *v = v.abs());
        for with_bias in [false, true] {
            let parameters = if with_bias {
                [weight.clone(), bias.clone()].concat()
            } else {
                weight.clone()
            };
            let bias = if with_bias { &bias[..] } else { &[0.0; 3] };
            let convolved =
                crate::cpu::bias_forward(&crate::cpu::matmul_nn(7, c, m, &x, &weight), bias);
            let mut expected = vec![0.0; 7 * c];
            batch_norm_evaluate(1e-3, false, &convolved, &running, &affine, &mut expected);
            let folded = batch_norm_fold(with_bias, 1e-3, &parameters, &running, &affine);
            let (weight, bias) = folded.split_at(m * c);
            let found = crate::cpu::bias_forward(&crate::cpu::matmul_nn(7, c, m, &x, weight), bias);
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() <= 1e-12);
            }
        }
    }
}
