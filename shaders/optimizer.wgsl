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
// Layout: every vector has ELEMENTS elements, factors [2,ELEMENTS]; state1 is the velocity v (SGD) or the first moment m
// (AdamW, Lion), state2 the second moment v (AdamW). Parameters are handled LANES at a time: four as the text
// stands, one where they do not come in fours, see src/kernels/lanes.rs. WIDTH = ELEMENTS / LANES.
// One invocation updates LANES parameters. Updates w and the state in place.
// CPU twins: sgd_update, adamw_update, lion_update in src/cpu/optimizer.rs.
// Maths: torch.optim.SGD; Loshchilov & Hutter (2019), "Decoupled Weight Decay Regularization", as
// in torch.optim.AdamW; Chen et al. (2023), "Symbolic Discovery of Optimization Algorithms".

alias Lanes = vec4<f32>;
alias Words = vec4<u32>;
alias Flags = vec4<bool>;

override WIDTH: u32;
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
    first_shard: u32,
    shards: u32,
    share: f32,
}

@group(0) @binding(0) var<storage, read_write> parameters: array<Lanes>;
@group(0) @binding(1) var<storage, read> gradients: array<Lanes>;
@group(0) @binding(2) var<storage, read_write> state1: array<Lanes>;
@group(0) @binding(3) var<storage, read_write> state2: array<Lanes>;
@group(0) @binding(4) var<storage, read> steps: array<Step>;
@group(0) @binding(5) var<storage, read> counter: array<u32>;
@group(0) @binding(6) var<storage, read> factors: array<Lanes>;

// Of the parameters at i, on learning rate and weight decay.
struct Factors { rate: Lanes, decay: Lanes }

fn factors_of(i: u32) -> Factors {
    if GROUPED {
        return Factors(factors[i], factors[WIDTH + i]);
    }
    return Factors(Lanes(1.0), Lanes(1.0));
}

// Which of them are trained.
fn trained(own: Factors) -> Flags {
    return own.rate > Lanes(0.0);
}

// By its bits, because a compiler may take it that no comparison meets a NaN.
fn is_nan(value: Lanes) -> Flags {
    return (bitcast<Words>(value) & Words(0x7fffffffu)) > Words(0x7f800000u);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sgd_update(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= WIDTH || steps[counter[0]].skip != 0u {
        return;
    }
    let own = factors_of(i);
    let w = parameters[i];
    let before = state1[i];
    let g = gradients[i] + WEIGHT_DECAY * own.decay * w;
    let v = MOMENTUM * before + g;
    var direction = v;
    if NESTEROV {
        direction = g + MOMENTUM * v;
    }
    state1[i] = select(before, v, trained(own));
    parameters[i] = select(w, w - steps[counter[0]].lr * own.rate * direction, trained(own));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn adamw_update(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= WIDTH || steps[counter[0]].skip != 0u {
        return;
    }
    let own = factors_of(i);
    let row = steps[counter[0]];
    let lr = row.lr * own.rate;
    let g = gradients[i];
    let w = parameters[i];
    let first = state1[i];
    let second = state2[i];
    let m = BETA1 * first + (1.0 - BETA1) * g;
    let v = BETA2 * second + (1.0 - BETA2) * g * g;
    let root = sqrt(v) / sqrt(row.bias_correction2);
    let decayed = w * (1.0 - lr * (WEIGHT_DECAY * own.decay));
    let updated = decayed - lr / row.bias_correction1 * m / (root + EPSILON);
    state1[i] = select(first, m, trained(own));
    state2[i] = select(second, v, trained(own));
    parameters[i] = select(w, updated, trained(own));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn lion_update(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= WIDTH || steps[counter[0]].skip != 0u {
        return;
    }
    let own = factors_of(i);
    let lr = steps[counter[0]].lr * own.rate;
    let g = gradients[i];
    let w = parameters[i];
    let m = state1[i];
    let c = BETA1 * m + (1.0 - BETA1) * g;
    let direction = select(sign(c), c, is_nan(c));
    let updated = w * (1.0 - lr * (WEIGHT_DECAY * own.decay)) - lr * direction;
    state1[i] = select(m, BETA2 * m + (1.0 - BETA2) * g, trained(own));
    parameters[i] = select(w, updated, trained(own));
}
