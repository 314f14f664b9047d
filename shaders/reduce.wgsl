// The sum over the parts into which a gradient was cut, or a batch.
//
//   reduce_splits, reduce_chunks:  result[i] = Σ_s partials[s,i]
//   accumulate:  accumulated[i] = gradients[i] for the first part of a batch, else
//                accumulated[i] + gradients[i]
//
// Each in one fixed order, so the same bits on every run.
//
// Layout: partials [SPLITS,ELEMENTS], result, gradients and accumulated [ELEMENTS]. Elements are handled
// LANES at a time: four as the text stands, one where they do not come in fours, see src/kernels/lanes.rs.
// WIDTH = ELEMENTS / LANES.
// reduce_splits: one invocation computes LANES elements, in order of s. Writes result.
// reduce_chunks: for many parts of few elements. One workgroup computes LANES elements; each of its
//   invocations adds up every 64th part, then halves are added pairwise. Writes result.
// accumulate: one invocation adds LANES elements. Which part of its batch a step is says the current row of
//   the step table. Adds to accumulated.
// CPU twins: reduce_splits, reduce_chunks, accumulate in src/cpu/reduce.rs.

alias Lanes = vec4<f32>;

override SPLITS: u32 = 1;
override WIDTH: u32;

const WORKGROUP_SIZE = 64u;

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

@group(0) @binding(0) var<storage, read> partials: array<Lanes>;
@group(0) @binding(1) var<storage, read_write> result: array<Lanes>;
@group(0) @binding(2) var<storage, read> gradients: array<Lanes>;
@group(0) @binding(3) var<storage, read_write> accumulated: array<Lanes>;
@group(0) @binding(4) var<storage, read> steps: array<Step>;
@group(0) @binding(5) var<storage, read> counter: array<u32>;

// Four parts whose loads are on their way together.
struct Four { v0: Lanes, v1: Lanes, v2: Lanes, v3: Lanes }

fn four(at: u32, stride: u32) -> Four {
    return Four(partials[at], partials[at + stride], partials[at + 2u * stride], partials[at + 3u * stride]);
}

fn add(sum: Lanes, parts: Four) -> Lanes {
    return sum + parts.v0 + parts.v1 + parts.v2 + parts.v3;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn reduce_splits(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= WIDTH {
        return;
    }
    var sum = Lanes(0.0);
    var s = 0u;
    for (; s + 16u <= SPLITS; s += 16u) {
        let a = four(s * WIDTH + i, WIDTH);
        let b = four((s + 4u) * WIDTH + i, WIDTH);
        let c = four((s + 8u) * WIDTH + i, WIDTH);
        let d = four((s + 12u) * WIDTH + i, WIDTH);
        sum = add(add(add(add(sum, a), b), c), d);
    }
    for (; s + 4u <= SPLITS; s += 4u) {
        sum = add(sum, four(s * WIDTH + i, WIDTH));
    }
    for (; s < SPLITS; s++) {
        sum += partials[s * WIDTH + i];
    }
    result[i] = sum;
}

var<workgroup> sums: array<Lanes, WORKGROUP_SIZE>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn reduce_chunks(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = group.y * groups.x + group.x;
    var sum = Lanes(0.0);
    if i < WIDTH {
        const STRIDE = WORKGROUP_SIZE;
        var s = local;
        for (; s + 3u * STRIDE < SPLITS; s += 4u * STRIDE) {
            sum = add(sum, four(s * WIDTH + i, STRIDE * WIDTH));
        }
        for (; s < SPLITS; s += STRIDE) {
            sum += partials[s * WIDTH + i];
        }
    }
    sums[local] = sum;
    for (var rest = WORKGROUP_SIZE / 2u; rest > 0u; rest /= 2u) {
        workgroupBarrier();
        if local < rest {
            sums[local] += sums[local + rest];
        }
    }
    if local == 0u && i < WIDTH {
        result[i] = sums[0];
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn accumulate(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= WIDTH {
        return;
    }
    // What an earlier batch left may be anything, a NaN too.
    if steps[counter[0]].micro == 0u {
        accumulated[i] = gradients[i];
    } else {
        accumulated[i] += gradients[i];
    }
}
