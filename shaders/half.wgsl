// Mixed precision: what lies between floats and halves, and the loss scale that keeps small gradients from
// vanishing in halves.
//
//   to_half:            y[i] = x[i], rounded
//   to_float:           x[i] = y[i]
//   scale_to_half:      y[i] = x[i] · scale, rounded
//   unscale_gradients:  gradients[i] = gradients[i] / scale
//   advance_loss_scale: norm finite: good += 1, and after INTERVAL of them in a row scale ·= 2, good = 0
//                       else: scale /= 2, good = 0, skipped += 1
//
// norm is that of the gradients while they are scaled: neither NaN nor infinite unless a half overflowed. The
// current row of the step table is told whether to skip the update. Scales are powers of two from SMALLEST to
// LARGEST, so that they round nothing.
// Layout: x, y, gradients [ELEMENTS], counted in LANES: four as the text stands, one where they do not come in
// fours, see src/kernels/lanes.rs; loss_scale [3]: scale, good, skipped; norm [1].
// One invocation handles LANES elements, advance_loss_scale is one alone. to_half and scale_to_half write y,
// to_float writes x; unscale_gradients updates gradients, advance_loss_scale loss_scale and the row.
// CPU twins: of the same names in src/cpu/half.rs.
// Maths: Micikevicius et al. (2018), "Mixed Precision Training"; torch.amp.GradScaler.

alias Lanes = vec4<f32>;
// What activations are stored as: f16 in mixed precision.
alias real = f32;
alias Stored = vec4<real>;
const LANES = 4u;

override ELEMENTS: u32 = 1;

const WORKGROUP_SIZE = 64u;
const INTERVAL = 2000.0;
const SMALLEST = 0x1p-14f;
const LARGEST = 0x1p24f;

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

@group(0) @binding(0) var<storage, read> x: array<Lanes>;
@group(0) @binding(1) var<storage, read_write> y: array<Stored>;
@group(0) @binding(2) var<storage, read> halves: array<Stored>;  // y, read back
@group(0) @binding(3) var<storage, read_write> floats: array<Lanes>;  // x, written
@group(0) @binding(4) var<storage, read> loss_scale: array<f32>;
@group(0) @binding(5) var<storage, read_write> gradients: array<Lanes>;
@group(0) @binding(6) var<storage, read> norm: array<f32>;
@group(0) @binding(7) var<storage, read_write> new_scale: array<f32>;  // loss_scale, changed
@group(0) @binding(8) var<storage, read_write> steps: array<Step>;
@group(0) @binding(9) var<storage, read> counter: array<u32>;

struct Invocation {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
}

fn element(at: Invocation) -> u32 {
    return (at.group.y * at.groups.x + at.group.x) * WORKGROUP_SIZE + at.local;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn to_half(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        y[i] = Stored(x[i]);
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn to_float(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        floats[i] = Lanes(halves[i]);
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn scale_to_half(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        y[i] = Stored(x[i] * loss_scale[0]);
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn unscale_gradients(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        gradients[i] = gradients[i] / loss_scale[0];
    }
}

// By its bits, because a compiler may take it that no number is NaN or infinite.
fn is_finite(value: f32) -> bool {
    return (bitcast<u32>(value) & 0x7fffffffu) < 0x7f800000u;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn advance_loss_scale(@builtin(local_invocation_index) local: u32) {
    if local > 0u {
        return;
    }
    let scale = new_scale[0];
    let good = new_scale[1] + 1.0;
    if is_finite(norm[0]) {
        let grows = good >= INTERVAL;
        new_scale[0] = select(scale, min(2.0 * scale, LARGEST), grows);
        new_scale[1] = select(good, 0.0, grows);
        steps[counter[0]].skip = 0u;
    } else {
        new_scale[0] = max(0.5 * scale, SMALLEST);
        new_scale[1] = 0.0;
        new_scale[2] += 1.0;
        steps[counter[0]].skip = 1u;
    }
}
