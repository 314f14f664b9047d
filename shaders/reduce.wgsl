// The sum over the parts into which a gradient was cut, or a batch.
//
//   reduce_splits, reduce_chunks:  result[i] = Σ_s partials[s,i]
//   accumulate:  accumulated[i] = gradients[i] for the first part of a batch, else
//                accumulated[i] + gradients[i]
//
// Each in one fixed order, so the same bits on every run.
//
// Layout: partials [SPLITS,ELEMENTS], result, gradients and accumulated [ELEMENTS].
// reduce_splits: one invocation computes one element, in order of s. Writes result.
// reduce_chunks: for many parts of few elements. One workgroup computes four elements; of the 16
//   invocations that share one, each adds up every 16th part, then halves are added pairwise. Writes
//   result.
// accumulate: one invocation adds one element. Which part of its batch a step is says the current row of
//   the step table. Adds to accumulated.
// CPU twins: reduce_splits, reduce_chunks, accumulate in src/cpu/reduce.rs.

override SPLITS: u32 = 1;
override ELEMENTS: u32;

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
}

@group(0) @binding(0) var<storage, read> partials: array<f32>;
@group(0) @binding(1) var<storage, read_write> result: array<f32>;
@group(0) @binding(2) var<storage, read> gradients: array<f32>;
@group(0) @binding(3) var<storage, read_write> accumulated: array<f32>;
@group(0) @binding(4) var<storage, read> steps: array<Step>;
@group(0) @binding(5) var<storage, read> counter: array<u32>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn reduce_splits(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS {
        return;
    }
    var sum = 0.0;
    var s = 0u;
    // Eight loads are on their way at a time.
    for (; s + 8u <= SPLITS; s += 8u) {
        let at = s * ELEMENTS + i;
        let v0 = partials[at];
        let v1 = partials[at + ELEMENTS];
        let v2 = partials[at + 2u * ELEMENTS];
        let v3 = partials[at + 3u * ELEMENTS];
        let v4 = partials[at + 4u * ELEMENTS];
        let v5 = partials[at + 5u * ELEMENTS];
        let v6 = partials[at + 6u * ELEMENTS];
        let v7 = partials[at + 7u * ELEMENTS];
        sum = sum + v0 + v1 + v2 + v3 + v4 + v5 + v6 + v7;
    }
    for (; s < SPLITS; s++) {
        sum += partials[s * ELEMENTS + i];
    }
    result[i] = sum;
}

const ELEMENTS_PER_WORKGROUP = 4u;

var<workgroup> sums: array<f32, WORKGROUP_SIZE>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn reduce_chunks(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let first = (group.y * groups.x + group.x) * ELEMENTS_PER_WORKGROUP;
    let i = first + local % ELEMENTS_PER_WORKGROUP;
    var sum = 0.0;
    if i < ELEMENTS {
        let stride = WORKGROUP_SIZE / ELEMENTS_PER_WORKGROUP;
        for (var s = local / ELEMENTS_PER_WORKGROUP; s < SPLITS; s += stride) {
            sum += partials[s * ELEMENTS + i];
        }
    }
    sums[local] = sum;
    for (var rest = WORKGROUP_SIZE / 2u; rest >= ELEMENTS_PER_WORKGROUP; rest /= 2u) {
        workgroupBarrier();
        if local < rest {
            sums[local] += sums[local + rest];
        }
    }
    if local < ELEMENTS_PER_WORKGROUP && i < ELEMENTS {
        result[i] = sums[local];
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn accumulate(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS {
        return;
    }
    // What an earlier batch left may be anything, a NaN too.
    if steps[counter[0]].micro == 0u {
        accumulated[i] = gradients[i];
    } else {
        accumulated[i] += gradients[i];
    }
}
