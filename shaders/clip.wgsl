// The L2 norm of a vector, and gradients that are scaled down to a norm.
//
//   sum_squares:    result[p] = Σ x[i]²  over the RUN elements from p·RUN on; GROUPED: but not over those
//                   whose first factor is 0
//   norm:           result[0] = √Σ x[i]
//   clip_gradients: gradients[i] = gradients[i] · min(1, LIMIT / (norm[0] + 1e-6)), NaN where the norm is NaN
//
// Layout: x, gradients [ELEMENTS], factors [2,ELEMENTS], result of sum_squares [⌈ELEMENTS / RUN⌉]. Elements
// are handled LANES at a time: four as the text stands, one where they do not come in fours, see
// src/kernels/lanes.rs.
// sum_squares, norm: one workgroup computes one sum; of its invocations each adds up LANES elements in every
//   64·LANES, then halves are added pairwise, so the order is always the same. Write result.
// clip_gradients: one invocation scales LANES elements. Updates gradients in place.
// CPU twins: sum_squares, norm, clip_gradients in src/cpu/clip.rs.
// Maths: Pascanu, Mikolov & Bengio (2013), as in torch.nn.utils.clip_grad_norm_.

alias Lanes = vec4<f32>;
const LANES = 4u;

override ELEMENTS: u32;
override RUN: u32 = 1;
override GROUPED: bool = false;
override LIMIT: f32 = 0.0;

const WORKGROUP_SIZE = 64u;

@group(0) @binding(0) var<storage, read> x: array<Lanes>;
@group(0) @binding(1) var<storage, read_write> result: array<f32>;
@group(0) @binding(2) var<storage, read> factors: array<Lanes>;
@group(0) @binding(3) var<storage, read_write> gradients: array<Lanes>;
@group(0) @binding(4) var<storage, read> norm_of_all: array<f32>;

fn total(lanes: Lanes) -> f32 {
    return dot(lanes, Lanes(1.0));
}

var<workgroup> sums: array<f32, WORKGROUP_SIZE>;

// The sum over what the invocations of a workgroup bring along.
fn sum_up(local: u32, own: f32) -> f32 {
    sums[local] = own;
    for (var rest = WORKGROUP_SIZE / 2u; rest > 0u; rest /= 2u) {
        workgroupBarrier();
        if local < rest {
            sums[local] += sums[local + rest];
        }
    }
    return sums[0];
}

// The squares of what counts of x[i].
fn squares(i: u32) -> Lanes {
    let value = x[i];
    if GROUPED {
        return select(value * value, Lanes(0.0), factors[i] == Lanes(0.0));
    }
    return value * value;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sum_squares(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let part = group.y * groups.x + group.x;
    let end = min((part + 1u) * RUN, ELEMENTS) / LANES;
    var own = Lanes(0.0);
    var i = part * RUN / LANES + local;
    // Four loads are on their way at a time.
    for (; i + 3u * WORKGROUP_SIZE < end; i += 4u * WORKGROUP_SIZE) {
        let s0 = squares(i);
        let s1 = squares(i + WORKGROUP_SIZE);
        let s2 = squares(i + 2u * WORKGROUP_SIZE);
        let s3 = squares(i + 3u * WORKGROUP_SIZE);
        own = own + s0 + s1 + s2 + s3;
    }
    for (; i < end; i += WORKGROUP_SIZE) {
        own += squares(i);
    }
    let sum = sum_up(local, total(own));
    if local == 0u && part * RUN < ELEMENTS {
        result[part] = sum;
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn norm(@builtin(local_invocation_index) local: u32) {
    var own = Lanes(0.0);
    for (var i = local; i < ELEMENTS / LANES; i += WORKGROUP_SIZE) {
        own += x[i];
    }
    let sum = sum_up(local, total(own));
    if local == 0u {
        result[0] = sqrt(sum);
    }
}

// By its bits, because a compiler may take it that no comparison meets a NaN.
fn is_nan(value: f32) -> bool {
    return (bitcast<u32>(value) & 0x7fffffffu) > 0x7f800000u;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn clip_gradients(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS / LANES {
        return;
    }
    var factor = norm_of_all[0];
    if !is_nan(factor) {
        factor = min(1.0, LIMIT / (factor + 1e-6));
    }
    gradients[i] *= factor;
}
