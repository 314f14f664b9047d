// The exponential moving average of what is trained, and its exchange with that.
//
//   average_values: average[i] = share·average[i] + (1 − share)·values[i]
//   swap_values:    a[i] ⇄ b[i]
//
// share comes from the current row of the step table.
// Layout: every vector has ELEMENTS elements. They are handled LANES at a time: four as the text stands, one
// where they do not come in fours, see src/kernels/lanes.rs.
// One invocation computes LANES elements. Update average, and a and b, in place.
// CPU twins: average_values, swap_values in src/cpu/average.rs.
// Maths: Polyak & Juditsky (1992); tf.train.ExponentialMovingAverage.

alias Lanes = vec4<f32>;
const LANES = 4u;

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
    first_shard: u32,
    shards: u32,
    share: f32,
}

@group(0) @binding(0) var<storage, read_write> average: array<Lanes>;
@group(0) @binding(1) var<storage, read> values: array<Lanes>;
@group(0) @binding(2) var<storage, read> steps: array<Step>;
@group(0) @binding(3) var<storage, read> counter: array<u32>;
@group(0) @binding(4) var<storage, read_write> a: array<Lanes>;
@group(0) @binding(5) var<storage, read_write> b: array<Lanes>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn average_values(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS / LANES {
        return;
    }
    let share = steps[counter[0]].average;
    average[i] = share * average[i] + (1.0 - share) * values[i];
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn swap_values(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS / LANES {
        return;
    }
    let held = a[i];
    a[i] = b[i];
    b[i] = held;
}
