// Batch normalisation: every channel over all rows of the batch that count.
//
//   n = count·POSITIONS rows count, the first of ROWS
//   mean = Σ x / n        variance = Σ (x − mean)² / n        rstd = 1 / √(variance + ε)
//   x̂ = (x − mean)·rstd   y = x̂·γ + β
//   dγ = Σ dy·x̂           dβ = Σ dy
//   dx = γ·rstd·(dy − (dβ + x̂·dγ) / n), and 0 in the rows that do not count
//   running mean ← running mean + momentum·(mean − running mean), and so the running variance with
//   variance·n / (n − 1); of one row there is no such variance, and the running one stays
//
// Layout: x, y, dy and dx [ROWS,C] with ROWS = batch·POSITIONS (NHWC); affine [2,C]: γ, β; running [2,C]:
// mean, variance; statistics [2,C]: mean, rstd; gradient [2,C]: dγ, dβ. Sums over rows are taken in
// chunks of ROWS_PER_CHUNK: partials [CHUNKS,2,C].
//
// Over the shards of a batch: each writes row micro of shard_moments [S,4,C] (n, x₀, mean and Σ (x − mean)² of
// x − x₀) and of shard_sums [S,3,C] (n, dγ, dβ), which are merged and added up in the order of shards.
// Channels are handled LANES at a time: four as the text stands, one where C is no multiple of four,
// see src/kernels/lanes.rs. WIDTH = C / LANES.
//
// batch_norm_moments: one invocation takes LANES channels of one chunk and writes the mean of x − x₀ and
//   its Σ (x − mean)² to partials, from those of eight rows at a time, whose loads are on their way together.
//   x₀ is the channel's first value: the differences are as small as the deviation, however large the mean,
//   so nothing is lost in rounding.
// batch_norm_statistics: one workgroup takes LANES channels; each of its invocations merges every 64th
//   chunk, then halves are merged pairwise. Writes statistics, updates running.
// batch_norm_forward: one invocation handles LANES channels of ROWS_PER_STRIP rows. Writes y, with RELU
//   max(0, y) (and NaN where that is NaN), the activation that follows.
// batch_norm_backward_sums: as batch_norm_moments; writes Σ dy·x̂ and Σ dy to partials, which
//   reduce_chunks adds up into gradient.
// batch_norm_backward_input: as batch_norm_forward. Writes dx.
//   With DIVIDED gradient is that by n already.
// batch_norm_shard_moments: as batch_norm_statistics; writes the shard's row of shard_moments.
// batch_norm_sync_statistics: one invocation merges LANES channels of all shards. Writes statistics and next_running.
// batch_norm_shard_sums: one invocation handles LANES channels. Writes the shard's row of shard_sums.
// batch_norm_sync_gradients: one invocation adds up LANES channels of all shards. Writes Σ dγ / Σ n and Σ dβ / Σ n
//   to mean_gradients [2,C].
// batch_norm_evaluate: as batch_norm_forward, by the running statistics. Writes y.
// batch_norm_fold: the convolution before, with weights w·γ·rstd and bias (b − mean)·γ·rstd + β, whose
//   output needs no normalisation. parameters [M (+ 1 with BIAS), C], folded [M + 1, C]; one
//   invocation writes one element.
// CPU twins: of the same names in src/cpu/batch_norm.rs.
// Maths: Ioffe, Szegedy (2015), "Batch Normalization"; Welford (1962) for a row more; Chan, Golub, LeVeque (1983), "Algorithms for
// Computing the Sample Variance".

alias Lanes = vec4<f32>;
alias Words = vec4<u32>;
// What activations are stored as: f16 in mixed precision.
alias real = f32;
alias Stored = vec4<real>;

override ROWS: u32 = 1u;
override POSITIONS: u32 = 1u;
override C: u32;
override WIDTH: u32 = 1u;
override CHUNKS: u32 = 1u;
override ROWS_PER_CHUNK: u32 = 1u;
override MOMENTUM: f32 = 0.0;
override EPSILON: f32 = 0.0;
override M: u32 = 1u;
override BIAS: bool = false;
override RELU: bool = false;
override DIVIDED: bool = false;

const WORKGROUP_SIZE = 64u;
const ROWS_PER_STRIP = 8u;

struct Step {
    first: u32,
    count: u32,
    lr: f32,
    bias_correction1: f32,
    bias_correction2: f32,
    seed: u32,
    epoch: u32,
    base: u32,
    total: f32,
    micro: u32,
    average: f32,
    skip: u32,
    first_shard: u32,
    shards: u32,
    share: f32,
}

@group(0) @binding(0) var<storage, read> x: array<Stored>;
@group(0) @binding(1) var<storage, read> output_gradient: array<Stored>;  // dy
@group(0) @binding(2) var<storage, read> statistics: array<Lanes>;
@group(0) @binding(3) var<storage, read> affine: array<Lanes>;
@group(0) @binding(4) var<storage, read> gradient: array<Lanes>;
@group(0) @binding(5) var<storage, read> steps: array<Step>;
@group(0) @binding(6) var<storage, read> counter: array<u32>;
@group(0) @binding(7) var<storage, read_write> partials: array<Lanes>;
@group(0) @binding(8) var<storage, read_write> y: array<Stored>;
@group(0) @binding(9) var<storage, read_write> input_gradient: array<Stored>;  // dx
@group(0) @binding(10) var<storage, read> running: array<Lanes>;
@group(0) @binding(11) var<storage, read> chunk_moments: array<Lanes>;  // partials, read back
@group(0) @binding(12) var<storage, read_write> new_statistics: array<Lanes>;
@group(0) @binding(13) var<storage, read_write> new_running: array<Lanes>;
// Channel by channel.
@group(0) @binding(14) var<storage, read> parameters: array<f32>;
@group(0) @binding(15) var<storage, read> running_values: array<f32>;
@group(0) @binding(16) var<storage, read> affine_values: array<f32>;
@group(0) @binding(17) var<storage, read_write> folded: array<f32>;
@group(0) @binding(18) var<storage, read_write> shard_rows: array<Lanes>;  // shard_moments or shard_sums
@group(0) @binding(19) var<storage, read> of_shards: array<Lanes>;  // the same, read back
@group(0) @binding(20) var<storage, read_write> mean_gradients: array<Lanes>;

// Rows that count.
fn counted() -> u32 {
    return min(steps[counter[0]].count * POSITIONS, ROWS);
}

// Those among `n` that a chunk has.
fn counted_in(chunk: u32, n: u32) -> u32 {
    let first = chunk * ROWS_PER_CHUNK;
    return min(max(n, first) - first, ROWS_PER_CHUNK);
}

// Of some rows of LANES channels: how many, their mean, Σ (x − mean)².
struct Moments { count: f32, mean: Lanes, squares: Lanes }

fn merge(a: Moments, b: Moments) -> Moments {
    if b.count == 0.0 {
        return a;
    }
    let difference = b.mean - a.mean;
    let share = b.count / (a.count + b.count);
    return Moments(
        a.count + b.count,
        a.mean + difference * share,
        a.squares + b.squares + difference * (difference * a.count * share),
    );
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn batch_norm_moments(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if t >= CHUNKS * WIDTH {
        return;
    }
    let chunk = t / WIDTH;
    let channel = t % WIDTH;
    let rows = counted_in(chunk, counted());
    let start = Lanes(x[channel]);
    var at = chunk * ROWS_PER_CHUNK * WIDTH + channel;
    var moments = Moments();
    var row = 0u;
    for (; row + 8u <= rows; row += 8u) {
        let v0 = Lanes(x[at]) - start;
        let v1 = Lanes(x[at + WIDTH]) - start;
        let v2 = Lanes(x[at + 2u * WIDTH]) - start;
        let v3 = Lanes(x[at + 3u * WIDTH]) - start;
        let v4 = Lanes(x[at + 4u * WIDTH]) - start;
        let v5 = Lanes(x[at + 5u * WIDTH]) - start;
        let v6 = Lanes(x[at + 6u * WIDTH]) - start;
        let v7 = Lanes(x[at + 7u * WIDTH]) - start;
        let mean = (((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7))) * 0.125;
        let d0 = v0 - mean;
        let d1 = v1 - mean;
        let d2 = v2 - mean;
        let d3 = v3 - mean;
        let d4 = v4 - mean;
        let d5 = v5 - mean;
        let d6 = v6 - mean;
        let d7 = v7 - mean;
        let squares = ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)) + ((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7));
        moments = merge(moments, Moments(8.0, mean, squares));
        at += 8u * WIDTH;
    }
    for (; row < rows; row++) {
        let value = Lanes(x[at]) - start;
        let difference = value - moments.mean;
        moments.mean += difference * (1.0 / f32(row + 1u));
        moments.squares += difference * (value - moments.mean);
        at += WIDTH;
    }
    partials[2u * chunk * WIDTH + channel] = moments.mean;
    partials[(2u * chunk + 1u) * WIDTH + channel] = moments.squares;
}

// What batch_norm_moments wrote of a chunk, of which `n` rows count; nothing where there is no such chunk.
fn moments_of(chunk: u32, channel: u32, n: u32) -> Moments {
    let at = 2u * min(chunk, CHUNKS - 1u) * WIDTH + channel;
    return Moments(f32(counted_in(chunk, n)), chunk_moments[at], chunk_moments[at + WIDTH]);
}

var<workgroup> merged: array<Moments, WORKGROUP_SIZE>;

// All chunks of LANES channels in merged[0], as the first invocation of the workgroup sees it.
fn merge_chunks(channel: u32, local: u32) {
    var moments = Moments();
    if channel < WIDTH {
        let n = counted();
        // The loads of four chunks are on their way at a time.
        for (var chunk = local; chunk < CHUNKS; chunk += 4u * WORKGROUP_SIZE) {
            let m0 = moments_of(chunk, channel, n);
            let m1 = moments_of(chunk + WORKGROUP_SIZE, channel, n);
            let m2 = moments_of(chunk + 2u * WORKGROUP_SIZE, channel, n);
            let m3 = moments_of(chunk + 3u * WORKGROUP_SIZE, channel, n);
            moments = merge(merge(merge(merge(moments, m0), m1), m2), m3);
        }
    }
    merged[local] = moments;
    for (var rest = WORKGROUP_SIZE / 2u; rest > 0u; rest /= 2u) {
        workgroupBarrier();
        if local < rest {
            merged[local] = merge(merged[local], merged[local + rest]);
        }
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn batch_norm_statistics(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let channel = group.y * groups.x + group.x;
    merge_chunks(channel, local);
    if local == 0u && channel < WIDTH {
        let n = merged[0].count;
        let mean = Lanes(x[channel]) + merged[0].mean;
        let squares = merged[0].squares;
        new_statistics[channel] = mean;
        new_statistics[WIDTH + channel] = 1.0 / sqrt(squares / n + EPSILON);
        new_running[channel] += MOMENTUM * (mean - new_running[channel]);
        if n > 1.0 {
            let variance = squares / (n - 1.0);
            new_running[WIDTH + channel] += MOMENTUM * (variance - new_running[WIDTH + channel]);
        }
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn batch_norm_shard_moments(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let channel = group.y * groups.x + group.x;
    let shard = steps[counter[0]].micro;
    merge_chunks(channel, local);
    // A row that is no shard is computed for nothing.
    if local == 0u && channel < WIDTH && shard < steps[counter[0]].shards {
        let at = 4u * shard * WIDTH + channel;
        shard_rows[at] = Lanes(merged[0].count);
        shard_rows[at + WIDTH] = Lanes(x[channel]);
        shard_rows[at + 2u * WIDTH] = merged[0].mean;
        shard_rows[at + 3u * WIDTH] = merged[0].squares;
    }
}

fn one_of(lanes: Lanes) -> f32 {
    return lanes.x;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn batch_norm_sync_statistics(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let channel = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if channel >= WIDTH {
        return;
    }
    // Of x − x₀ with that of the first shard.
    let start = of_shards[WIDTH + channel];
    var moments = Moments();
    for (var shard = 0u; shard < steps[counter[0]].shards; shard++) {
        let at = 4u * shard * WIDTH + channel;
        let mean = (of_shards[at + WIDTH] - start) + of_shards[at + 2u * WIDTH];
        moments = merge(moments, Moments(one_of(of_shards[at]), mean, of_shards[at + 3u * WIDTH]));
    }
    let n = moments.count;
    let mean = start + moments.mean;
    new_statistics[channel] = mean;
    new_statistics[WIDTH + channel] = 1.0 / sqrt(moments.squares / n + EPSILON);
    new_running[channel] = running[channel] + MOMENTUM * (mean - running[channel]);
    var variance = running[WIDTH + channel];
    if n > 1.0 {
        variance += MOMENTUM * (moments.squares / (n - 1.0) - variance);
    }
    new_running[WIDTH + channel] = variance;
}

// 0 where that is more. What is NaN is told by its bits, because a compiler may take it that no
// comparison meets a NaN.
fn activated(value: Lanes) -> Lanes {
    let not_a_number = (bitcast<Words>(value) & Words(0x7fffffffu)) > Words(0x7f800000u);
    return select(value, Lanes(0.0), (value <= Lanes(0.0)) & !not_a_number);
}

// y of strip and channel t; past the last strip there is no row.
fn normalise(t: u32, mean: Lanes, rstd: Lanes) {
    let first = t / WIDTH * ROWS_PER_STRIP;
    let channel = t % WIDTH;
    let weight = affine[channel];
    let bias = affine[WIDTH + channel];
    let end = min(first + ROWS_PER_STRIP, ROWS) * WIDTH;
    for (var at = first * WIDTH + channel; at < end; at += WIDTH) {
        let value = (Lanes(x[at]) - mean) * rstd * weight + bias;
        if RELU {
            y[at] = Stored(activated(value));
        } else {
            y[at] = Stored(value);
        }
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn batch_norm_forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    normalise(t, statistics[t % WIDTH], statistics[WIDTH + t % WIDTH]);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn batch_norm_evaluate(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let rstd = 1.0 / sqrt(running[WIDTH + t % WIDTH] + EPSILON);
    normalise(t, running[t % WIDTH], rstd);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn batch_norm_backward_sums(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if t >= CHUNKS * WIDTH {
        return;
    }
    let chunk = t / WIDTH;
    let channel = t % WIDTH;
    let rows = counted_in(chunk, counted());
    let mean = statistics[channel];
    var at = chunk * ROWS_PER_CHUNK * WIDTH + channel;
    var weight_gradient = Lanes(0.0);
    var bias_gradient = Lanes(0.0);
    var row = 0u;
    // The loads of eight rows are on their way at a time.
    for (; row + 8u <= rows; row += 8u) {
        let x0 = Lanes(x[at]);
        let x1 = Lanes(x[at + WIDTH]);
        let x2 = Lanes(x[at + 2u * WIDTH]);
        let x3 = Lanes(x[at + 3u * WIDTH]);
        let x4 = Lanes(x[at + 4u * WIDTH]);
        let x5 = Lanes(x[at + 5u * WIDTH]);
        let x6 = Lanes(x[at + 6u * WIDTH]);
        let x7 = Lanes(x[at + 7u * WIDTH]);
        let g0 = Lanes(output_gradient[at]);
        let g1 = Lanes(output_gradient[at + WIDTH]);
        let g2 = Lanes(output_gradient[at + 2u * WIDTH]);
        let g3 = Lanes(output_gradient[at + 3u * WIDTH]);
        let g4 = Lanes(output_gradient[at + 4u * WIDTH]);
        let g5 = Lanes(output_gradient[at + 5u * WIDTH]);
        let g6 = Lanes(output_gradient[at + 6u * WIDTH]);
        let g7 = Lanes(output_gradient[at + 7u * WIDTH]);
        weight_gradient = weight_gradient + g0 * (x0 - mean) + g1 * (x1 - mean) + g2 * (x2 - mean) + g3 * (x3 - mean)
            + g4 * (x4 - mean) + g5 * (x5 - mean) + g6 * (x6 - mean) + g7 * (x7 - mean);
        bias_gradient = bias_gradient + g0 + g1 + g2 + g3 + g4 + g5 + g6 + g7;
        at += 8u * WIDTH;
    }
    for (; row < rows; row++) {
        let g = Lanes(output_gradient[at]);
        weight_gradient += g * (Lanes(x[at]) - mean);
        bias_gradient += g;
        at += WIDTH;
    }
    partials[2u * chunk * WIDTH + channel] = weight_gradient * statistics[WIDTH + channel];
    partials[(2u * chunk + 1u) * WIDTH + channel] = bias_gradient;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn batch_norm_backward_input(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let first = t / WIDTH * ROWS_PER_STRIP;
    let channel = t % WIDTH;
    let n = counted();
    let divisor = select(f32(n), 1.0, DIVIDED);
    let mean = statistics[channel];
    let rstd = statistics[WIDTH + channel];
    let scale = affine[channel] * rstd;
    let slope = gradient[channel] * rstd / divisor;
    let offset = gradient[WIDTH + channel] / divisor;
    for (var row = first; row < min(first + ROWS_PER_STRIP, ROWS); row++) {
        let at = row * WIDTH + channel;
        if row < n {
            let g = Lanes(output_gradient[at]);
            input_gradient[at] = Stored(scale * (g - offset - (Lanes(x[at]) - mean) * slope));
        } else {
            input_gradient[at] = Stored(Lanes(0.0));
        }
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn batch_norm_shard_sums(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let channel = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let shard = steps[counter[0]].micro;
    if channel >= WIDTH || shard >= steps[counter[0]].shards {
        return;
    }
    let at = 3u * shard * WIDTH + channel;
    shard_rows[at] = Lanes(f32(counted()));
    shard_rows[at + WIDTH] = gradient[channel];
    shard_rows[at + 2u * WIDTH] = gradient[WIDTH + channel];
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn batch_norm_sync_gradients(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let channel = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if channel >= WIDTH {
        return;
    }
    var n = Lanes(0.0);
    var weight_gradient = Lanes(0.0);
    var bias_gradient = Lanes(0.0);
    for (var shard = 0u; shard < steps[counter[0]].shards; shard++) {
        let at = 3u * shard * WIDTH + channel;
        n += of_shards[at];
        weight_gradient += of_shards[at + WIDTH];
        bias_gradient += of_shards[at + 2u * WIDTH];
    }
    mean_gradients[channel] = weight_gradient / n;
    mean_gradients[WIDTH + channel] = bias_gradient / n;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn batch_norm_fold(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if t >= (M + 1u) * C {
        return;
    }
    let channel = t % C;
    let scale = affine_values[channel] / sqrt(running_values[C + channel] + EPSILON);
    if t < M * C {
        folded[t] = parameters[t] * scale;
        return;
    }
    var bias = -running_values[channel];
    if BIAS {
        bias += parameters[t];
    }
    folded[t] = bias * scale + affine_values[C + channel];
}
