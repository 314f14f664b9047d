// The outputs of a batch, kept for the whole split.
//
//   outputs[first + i, k] = logits[i, k]            i < count; first, count: the current row of the step table
//
// Layout: logits [BATCH,CLASSES]; outputs [samples,CLASSES] in the split's order.
// One invocation copies one element; those of samples that do not count copy nothing.
// Writes outputs[first..first + count], leaves the rest as it is.
// CPU twin: store_logits in src/cpu/outputs.rs.

override BATCH: u32;
override CLASSES: u32;

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

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> steps: array<Step>;
@group(0) @binding(2) var<storage, read> counter: array<u32>;
@group(0) @binding(3) var<storage, read_write> outputs: array<f32>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn store_logits(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let row = counter[0];
    if t >= min(steps[row].count, BATCH) * CLASSES {
        return;
    }
    outputs[steps[row].first * CLASSES + t] = logits[t];
}
