// Muon: the momentum of a convolution's weight W [K, OC], K = KH·KW·C, made orthogonal by Newton and Schulz.
//
//   muon_momentum:   v = MOMENTUM·v + g,  x = g + MOMENTUM·v
//   muon_scale:      x = x / (norm + 1e-7), so that no singular value exceeds 1
//   muon_polynomial: p = 3.4445·I − 4.775·a + 2.0315·aa,  with a = xᵀx (or x·xᵀ where that is smaller)
//                    and aa = a·a; x·p (p·x) is the next x, three times
//   muon_update:     w = w · SIZE/norm − lr·RATE·x;  a w of zeros is not scaled
// Where the row says that the update is skipped v and w stay as they are, and x is 0.
//
// The products are those of conv2d.wgsl. lr comes from the current row of the step table, the norms (of x and
// of w) from clip.wgsl; SIZE is √OC.
// Layout: g, v, x, w [ELEMENTS]; a, aa, p [SIDE,SIDE], ELEMENTS = SIDE².
// One invocation computes one element. muon_momentum updates v and writes x; muon_scale updates x;
//   muon_polynomial writes p; muon_update updates w.
// CPU twins: muon_momentum, muon_scale, muon_polynomial, muon_update in src/cpu/muon.rs.
// Maths: Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks", as in the
// airbench94_muon of arXiv 2404.00498.

override ELEMENTS: u32;
override MOMENTUM: f32 = 0.0;
override SIDE: u32 = 1;
override SIZE: f32 = 1.0;
override RATE: f32 = 1.0;

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

@group(0) @binding(0) var<storage, read> gradients: array<f32>;
@group(0) @binding(1) var<storage, read_write> velocity: array<f32>;
@group(0) @binding(2) var<storage, read_write> x: array<f32>;
@group(0) @binding(3) var<storage, read> norm: array<f32>;
@group(0) @binding(4) var<storage, read> a: array<f32>;
@group(0) @binding(5) var<storage, read> aa: array<f32>;
@group(0) @binding(6) var<storage, read_write> p: array<f32>;
@group(0) @binding(7) var<storage, read_write> parameters: array<f32>;
@group(0) @binding(8) var<storage, read> direction: array<f32>;
@group(0) @binding(9) var<storage, read> steps: array<Step>;
@group(0) @binding(10) var<storage, read> counter: array<u32>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn muon_momentum(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS {
        return;
    }
    if steps[counter[0]].skip != 0u {
        x[i] = 0.0;
        return;
    }
    let g = gradients[i];
    let v = MOMENTUM * velocity[i] + g;
    velocity[i] = v;
    x[i] = g + MOMENTUM * v;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn muon_scale(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS {
        return;
    }
    x[i] /= norm[0] + 1e-7;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn muon_polynomial(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS {
        return;
    }
    var diagonal = 0.0;
    if i / SIDE == i % SIDE {
        diagonal = 3.4445;
    }
    p[i] = diagonal - 4.775 * a[i] + 2.0315 * aa[i];
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn muon_update(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS || steps[counter[0]].skip != 0u {
        return;
    }
    var w = parameters[i];
    if norm[0] != 0.0 {
        w *= SIZE / norm[0];
    }
    parameters[i] = w - steps[counter[0]].lr * RATE * direction[i];
}
