// The update rules over the flat parameter vector.
//
//   sgd_update:    g = gradient + WEIGHT_DECAY·w,  v = MOMENTUM·v + g
//                  w = w − lr·v, or with NESTEROV w − lr·(g + MOMENTUM·v)
//   adamw_update:  w = w · (1 − lr·WEIGHT_DECAY)
//                  m = BETA1·m + (1 − BETA1)·g,  v = BETA2·v + (1 − BETA2)·g²
//                  w = w − lr / bias_correction1 · m / (√v / √bias_correction2 + EPSILON)
//   lion_update:   w = w · (1 − lr·WEIGHT_DECAY) − lr·sign(BETA1·m + (1 − BETA1)·g)
//                  m = BETA2·m + (1 − BETA2)·g
//
// lr and the bias corrections 1 − BETA^step come from the current row of the step table. GROUPED: a
// parameter has factors of its own on lr and WEIGHT_DECAY; one whose first is not above 0 stays as it is,
// and so does its state. All stay where the row says that the update is skipped.
// Layout: every vector has ELEMENTS elements, factors [ELEMENTS,2]; state1 is the velocity v (SGD) or the first moment m
// (AdamW, Lion), state2 the second moment v (AdamW).
// One invocation updates one parameter. Updates w and the state in place.
// CPU twins: sgd_update, adamw_update, lion_update in src/cpu/optimizer.rs.
// Maths: torch.optim.SGD; Loshchilov & Hutter (2019), "Decoupled Weight Decay Regularization", as
// in torch.optim.AdamW; Chen et al. (2023), "Symbolic Discovery of Optimization Algorithms".

override ELEMENTS: u32;
override GROUPED: bool = false;
override MOMENTUM: f32 = 0.0;
override NESTEROV: bool = false;
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
    skip: u32,
}

@group(0) @binding(0) var<storage, read_write> parameters: array<f32>;
@group(0) @binding(1) var<storage, read> gradients: array<f32>;
@group(0) @binding(2) var<storage, read_write> state1: array<f32>;
@group(0) @binding(3) var<storage, read_write> state2: array<f32>;
@group(0) @binding(4) var<storage, read> steps: array<Step>;
@group(0) @binding(5) var<storage, read> counter: array<u32>;
@group(0) @binding(6) var<storage, read> factors: array<f32>;

// Of parameter i, on learning rate and weight decay.
fn factors_of(i: u32) -> vec2<f32> {
    if GROUPED {
        return vec2(factors[2u * i], factors[2u * i + 1u]);
    }
    return vec2(1.0);
}

// By its bits, because a compiler may take it that no comparison meets a NaN.
fn is_nan(value: f32) -> bool {
    return (bitcast<u32>(value) & 0x7fffffffu) > 0x7f800000u;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sgd_update(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS || steps[counter[0]].skip != 0u {
        return;
    }
    let own = factors_of(i);
    if own.x <= 0.0 {
        return;
    }
    let w = parameters[i];
    let g = gradients[i] + WEIGHT_DECAY * own.y * w;
    let v = MOMENTUM * state1[i] + g;
    state1[i] = v;
    var direction = v;
    if NESTEROV {
        direction = g + MOMENTUM * v;
    }
    parameters[i] = w - steps[counter[0]].lr * own.x * direction;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn adamw_update(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS || steps[counter[0]].skip != 0u {
        return;
    }
    let own = factors_of(i);
    if own.x <= 0.0 {
        return;
    }
    let row = steps[counter[0]];
    let lr = row.lr * own.x;
    let g = gradients[i];
    let w = parameters[i] * (1.0 - lr * (WEIGHT_DECAY * own.y));
    let m = BETA1 * state1[i] + (1.0 - BETA1) * g;
    let v = BETA2 * state2[i] + (1.0 - BETA2) * g * g;
    state1[i] = m;
    state2[i] = v;
    let root = sqrt(v) / sqrt(row.bias_correction2);
    parameters[i] = w - lr / row.bias_correction1 * m / (root + EPSILON);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn lion_update(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS || steps[counter[0]].skip != 0u {
        return;
    }
    let own = factors_of(i);
    if own.x <= 0.0 {
        return;
    }
    let lr = steps[counter[0]].lr * own.x;
    let g = gradients[i];
    let m = state1[i];
    let c = BETA1 * m + (1.0 - BETA1) * g;
    var direction = c;
    if !is_nan(c) {
        direction = sign(c);
    }
    state1[i] = BETA2 * m + (1.0 - BETA2) * g;
    parameters[i] = parameters[i] * (1.0 - lr * (WEIGHT_DECAY * own.y)) - lr * direction;
}
