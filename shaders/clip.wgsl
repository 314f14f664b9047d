// The L2 norm of a vector, and gradients that are scaled down to a norm.
//
//   sum_squares:    result[p] = Σ x[i]²  over the RUN elements from p·RUN on; GROUPED: but not over those
//                   whose first factor is 0
//   norm:           result[0] = √Σ x[i]
//   clip_gradients: gradients[i] = gradients[i] · min(1, LIMIT / (norm[0] + 1e-6)), NaN where the norm is NaN
//
// Layout: x, gradients [ELEMENTS], factors [ELEMENTS,2], result of sum_squares [⌈ELEMENTS / RUN⌉].
// sum_squares, norm: one workgroup computes one sum; of its invocations each adds up every 64th element,
//   then halves are added pairwise, so the order is always the same. Write result.
// clip_gradients: one invocation scales one element. Updates gradients in place.
// CPU twins: sum_squares, norm, clip_gradients in src/cpu/clip.rs.
// Maths: Pascanu, Mikolov & Bengio (2013), as in torch.nn.utils.clip_grad_norm_.

override ELEMENTS: u32;
override RUN: u32 = 1;
override GROUPED: bool = false;
override LIMIT: f32 = 0.0;

const WORKGROUP_SIZE = 64u;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> result: array<f32>;
@group(0) @binding(2) var<storage, read> factors: array<f32>;
@group(0) @binding(3) var<storage, read_write> gradients: array<f32>;
@group(0) @binding(4) var<storage, read> norm_of_all: array<f32>;

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

@compute @workgroup_size(WORKGROUP_SIZE)
fn sum_squares(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let part = group.y * groups.x + group.x;
    let first = part * RUN;
    let end = min(first + RUN, ELEMENTS);
    var own = 0.0;
    for (var i = first + local; i < end; i += WORKGROUP_SIZE) {
        var counts = true;
        if GROUPED {
            counts = factors[2u * i] != 0.0;
        }
        if counts {
            own += x[i] * x[i];
        }
    }
    let sum = sum_up(local, own);
    if local == 0u && first < ELEMENTS {
        result[part] = sum;
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn norm(@builtin(local_invocation_index) local: u32) {
    var own = 0.0;
    for (var i = local; i < ELEMENTS; i += WORKGROUP_SIZE) {
        own += x[i];
    }
    let sum = sum_up(local, own);
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
    if i >= ELEMENTS {
        return;
    }
    var factor = norm_of_all[0];
    if !is_nan(factor) {
        factor = min(1.0, LIMIT / (factor + 1e-6));
    }
    gradients[i] *= factor;
}
