// Group normalisation: the channels of each group over all positions of one sample. Layer
// normalisation over the channels of each position is the case of one group and one position, with
// every position a sample of its own.
//
//   per sample n and group g, over the E = POSITIONS·C/G elements x[n, :, c in g]:
//   mean = Σ x / E        variance = Σ (x − mean)² / E        rstd = 1 / √(variance + ε)
//   x̂ = (x − mean)·rstd   y = x̂·γ[c] + β[c]
//   dγ[c] = Σ dy·x̂        dβ[c] = Σ dy        over all samples and positions
//   dx = rstd·(dy·γ[c] − (Σ dy·γ + x̂·Σ dy·γ·x̂) / E)        sums over the group's elements
//
// A sample that does not count has dy = 0 and so adds nothing and gets dx = 0.
//
// Layout: x, y, dy and dx [N,POSITIONS,C] (NHWC); affine [2,C]: γ, β; statistics [N,G,2]: mean, rstd;
// sums [N,G,2]: Σ dy·γ, Σ dy·γ·x̂. Sums over a group are taken in chunks of POSITIONS_PER_CHUNK:
// partials [CHUNKS,N,G,2]; those over rows in chunks of ROWS_PER_CHUNK: row_partials [ROW_CHUNKS,2,C].
// Channels are handled LANES at a time: four as the text stands, one where a group's are no multiple
// of four, see src/kernels/lanes.rs. WIDTH = C / LANES, GROUP_WIDTH = WIDTH / G.
//
// group_norm_moments: one invocation takes one chunk of one group and writes the mean of x − x₀ and its
//   Σ (x − mean)² to partials (Welford 1962). x₀ is the group's first value: the differences are as
//   small as the deviation, however large the mean, so nothing is lost in rounding.
// group_norm_statistics: one invocation merges the chunks of one group in order. Writes statistics.
// group_norm_forward: one invocation handles LANES channels of ROWS_PER_STRIP rows. Writes y.
// group_norm_backward_sums: as group_norm_moments; writes Σ dy·γ and Σ dy·γ·x̂ to partials, which
//   reduce_splits adds up into sums.
// group_norm_backward_input: as group_norm_forward. Writes dx.
// group_norm_backward_affine: one invocation takes LANES channels of one chunk of rows and writes
//   Σ dy·x̂ and Σ dy to row_partials, which reduce_chunks adds up into the gradient of affine.
// CPU twins: of the same names in src/cpu/group_norm.rs.
// Maths: Wu, He (2018), "Group Normalization"; Ba, Kiros, Hinton (2016), "Layer Normalization"; Chan,
// Golub, LeVeque (1983), "Algorithms for Computing the Sample Variance".

alias Lanes = vec4<f32>;
// What activations are stored as: f16 in mixed precision.
alias real = f32;
alias Stored = vec4<real>;
const LANES = 4u;

override N: u32;
override POSITIONS: u32;
override WIDTH: u32;
override GROUP_WIDTH: u32;
override CHUNKS: u32;
override POSITIONS_PER_CHUNK: u32;
override ROW_CHUNKS: u32;
override ROWS_PER_CHUNK: u32;
override EPSILON: f32 = 0.0;

const WORKGROUP_SIZE = 64u;
const ROWS_PER_STRIP = 8u;

@group(0) @binding(0) var<storage, read> x: array<Stored>;
@group(0) @binding(1) var<storage, read> output_gradient: array<Stored>;  // dy
@group(0) @binding(2) var<storage, read> statistics: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read> affine: array<Lanes>;
@group(0) @binding(4) var<storage, read> sums: array<vec2<f32>>;
@group(0) @binding(5) var<storage, read_write> partials: array<vec2<f32>>;
@group(0) @binding(6) var<storage, read_write> y: array<Stored>;
@group(0) @binding(7) var<storage, read_write> input_gradient: array<Stored>;  // dx
@group(0) @binding(8) var<storage, read> chunk_moments: array<vec2<f32>>;  // partials, read back
@group(0) @binding(9) var<storage, read_write> new_statistics: array<vec2<f32>>;
@group(0) @binding(10) var<storage, read_write> row_partials: array<Lanes>;

fn first_of(lanes: Lanes) -> f32 {
    return lanes.x;
}

fn total(lanes: Lanes) -> f32 {
    return dot(lanes, Lanes(1.0));
}

// x₀ of a group.
fn start_of(group: u32) -> f32 {
    let count = WIDTH / GROUP_WIDTH;
    let first = group / count * POSITIONS * WIDTH + group % count * GROUP_WIDTH;
    return first_of(Lanes(x[first]));
}

// A group's share of a chunk: its first element, and the positions that it has.
struct Chunk { group: u32, first: u32, positions: u32 }

// The chunk of invocation t, in partials' order.
fn chunk_of(t: u32) -> Chunk {
    let count = WIDTH / GROUP_WIDTH;
    let group = t % count;
    let n = t / count % N;
    let start = t / (count * N) * POSITIONS_PER_CHUNK;
    return Chunk(
        n * count + group,
        (n * POSITIONS + start) * WIDTH + group * GROUP_WIDTH,
        min(POSITIONS_PER_CHUNK, POSITIONS - start),
    );
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn group_norm_moments(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if t >= CHUNKS * N * (WIDTH / GROUP_WIDTH) {
        return;
    }
    let chunk = chunk_of(t);
    let start = start_of(chunk.group);
    var count = 0.0;
    var mean = Lanes(0.0);
    var squares = Lanes(0.0);
    for (var p = 0u; p < chunk.positions; p++) {
        for (var c = 0u; c < GROUP_WIDTH; c++) {
            let value = Lanes(x[chunk.first + p * WIDTH + c]) - start;
            let difference = value - mean;
            count += 1.0;
            mean += difference * (1.0 / count);
            squares += difference * (value - mean);
        }
    }
    // The lanes have as many elements each.
    let middle = total(mean) / f32(LANES);
    let apart = mean - middle;
    partials[t] = vec2(middle, total(squares + apart * apart * count));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn group_norm_statistics(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let count = N * (WIDTH / GROUP_WIDTH);
    if t >= count {
        return;
    }
    var positions = 0u;
    var mean = 0.0;
    var squares = 0.0;
    for (var chunk = 0u; chunk < CHUNKS; chunk++) {
        let more = min(POSITIONS_PER_CHUNK, POSITIONS - positions);
        let moments = chunk_moments[chunk * count + t];
        let difference = moments.x - mean;
        let share = f32(more) / f32(positions + more);
        let weight = f32(positions * GROUP_WIDTH * LANES);
        mean += difference * share;
        squares += moments.y + difference * (difference * weight * share);
        positions += more;
    }
    let variance = squares / f32(POSITIONS * GROUP_WIDTH * LANES);
    new_statistics[t] = vec2(start_of(t) + mean, 1.0 / sqrt(variance + EPSILON));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn group_norm_forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let first = t / WIDTH * ROWS_PER_STRIP;
    let channel = t % WIDTH;
    let weight = affine[channel];
    let bias = affine[WIDTH + channel];
    for (var row = first; row < min(first + ROWS_PER_STRIP, N * POSITIONS); row++) {
        let norm = statistics[(row / POSITIONS * WIDTH + channel) / GROUP_WIDTH];
        let at = row * WIDTH + channel;
        y[at] = Stored((Lanes(x[at]) - norm.x) * norm.y * weight + bias);
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn group_norm_backward_sums(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if t >= CHUNKS * N * (WIDTH / GROUP_WIDTH) {
        return;
    }
    let chunk = chunk_of(t);
    let norm = statistics[chunk.group];
    let channel = chunk.first % WIDTH;
    var sum = Lanes(0.0);
    var weighted = Lanes(0.0);
    for (var p = 0u; p < chunk.positions; p++) {
        for (var c = 0u; c < GROUP_WIDTH; c++) {
            let at = chunk.first + p * WIDTH + c;
            let scaled = Lanes(output_gradient[at]) * affine[channel + c];
            sum += scaled;
            weighted += scaled * (Lanes(x[at]) - norm.x);
        }
    }
    partials[t] = vec2(total(sum), total(weighted) * norm.y);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn group_norm_backward_input(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let first = t / WIDTH * ROWS_PER_STRIP;
    let channel = t % WIDTH;
    let weight = affine[channel];
    let elements = f32(POSITIONS * GROUP_WIDTH * LANES);
    for (var row = first; row < min(first + ROWS_PER_STRIP, N * POSITIONS); row++) {
        let index = (row / POSITIONS * WIDTH + channel) / GROUP_WIDTH;
        let norm = statistics[index];
        let sum = sums[index] / elements;
        let at = row * WIDTH + channel;
        let normalised = (Lanes(x[at]) - norm.x) * norm.y;
        input_gradient[at] = Stored((Lanes(output_gradient[at]) * weight - sum.x - normalised * sum.y) * norm.y);
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn group_norm_backward_affine(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if t >= ROW_CHUNKS * WIDTH {
        return;
    }
    let chunk = t / WIDTH;
    let channel = t % WIDTH;
    let first = chunk * ROWS_PER_CHUNK;
    var weight_gradient = Lanes(0.0);
    var bias_gradient = Lanes(0.0);
    for (var row = first; row < min(first + ROWS_PER_CHUNK, N * POSITIONS); row++) {
        let norm = statistics[(row / POSITIONS * WIDTH + channel) / GROUP_WIDTH];
        let at = row * WIDTH + channel;
        weight_gradient += Lanes(output_gradient[at]) * ((Lanes(x[at]) - norm.x) * norm.y);
        bias_gradient += Lanes(output_gradient[at]);
    }
    row_partials[2u * chunk * WIDTH + channel] = weight_gradient;
    row_partials[(2u * chunk + 1u) * WIDTH + channel] = bias_gradient;
}
