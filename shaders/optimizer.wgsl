// The update rules over the flat parameter vector.
//
//   sgd_update:    g = gradient + WEIGHT_DECAY·w,  v = MOMENTUM·v + g,  w = w − lr·v
//   adamw_update:  w = w · (1 − lr·WEIGHT_DECAY)
//                  m = BETA1·m + (1 − BETA1)·g,  v = BETA2·v + (1 − BETA2)·g²
//                  w = w − lr / bias_correction1 · m / (√v / √bias_correction2 + EPSILON)
//
// lr and the bias corrections 1 − BETA^step come from the current row of the step table.
// Layout: every vector has ELEMENTS elements; state1 is the velocity v (SGD) or the first moment m
// (AdamW), state2 the second moment v (AdamW).
// One invocation updates one parameter. Updates w and the state in place.
// CPU twins: sgd_update, adamw_update in src/cpu/optimizer.rs.
// Maths: torch.optim.SGD; Loshchilov & Hutter (2019), "Decoupled Weight Decay Regularization", as
// in torch.optim.AdamW.

override ELEMENTS: u32;
override MOMENTUM: f32 = 0.0;
override WEIGHT_DECAY: f32 = 0.0;
override BETA1: f32 = 0.0;
override BETA2: f32 = 0.0;
override EPSILON: f32 = 0.0;

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
    padding: u32,
}

@group(0) @binding(0) var<storage, read_write> parameters: array<f32>;
@group(0) @binding(1) var<storage, read> gradients: array<f32>;
@group(0) @binding(2) var<storage, read_write> state1: array<f32>;
@group(0) @binding(3) var<storage, read_write> state2: array<f32>;
@group(0) @binding(4) var<storage, read> steps: array<Step>;
@group(0) @binding(5) var<storage, read> counter: array<u32>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn sgd_update(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS {
        return;
    }
    let w = parameters[i];
    let g = gradients[i] + WEIGHT_DECAY * w;
    let v = MOMENTUM * state1[i] + g;
    state1[i] = v;
    parameters[i] = w - steps[counter[0]].lr * v;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn adamw_update(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS {
        return;
    }
    let row = steps[counter[0]];
    let g = gradients[i];
    let w = parameters[i] * (1.0 - row.lr * WEIGHT_DECAY);
    let m = BETA1 * state1[i] + (1.0 - BETA1) * g;
    let v = BETA2 * state2[i] + (1.0 - BETA2) * g * g;
    state1[i] = m;
    state2[i] = v;
    let root = sqrt(v) / sqrt(row.bias_correction2);
    parameters[i] = w - row.lr / row.bias_correction1 * m / (root + EPSILON);
}
