// Dropout while training: a share of the elements becomes 0, the others grow so that the mean stays.
//
//   y = x · mask,   mask = 0 with probability 1 − SCALE⁻¹, else SCALE = 1 / (1 − probability)
//
// Whether element e of a sample is kept follows from (seed, epoch, sample, layer, e) alone, where the
// sample is its number in the dataset, order[first + min(i, count − 1)], the layer stands for itself
// by its KEY, and first, count, seed and epoch stand in the current row of the step table. So no mask
// is stored: the gradient is the same kernel on dy. As in PyTorch 0 · NaN and 0 · ∞ are NaN.
//
//   [r0, r1, r2, r3] = pcg4d(pcg4d([seed, epoch, sample, KEY]) + [e / 4, 0, 0, 0])
//   kept where r(e mod 4) ≥ DROPPED = probability · 2³²
//
// Layout: x and y [BATCH,ELEMENTS].
// One invocation handles four consecutive elements of one sample. Writes y.
// CPU twin: dropout in src/cpu/dropout.rs; pcg4d in src/cpu/random.rs.
// Maths: Srivastava et al. (2014), "Dropout"; Jarzynski and Olano (2020), "Hash Functions for GPU
// Rendering", Journal of Computer Graphics Techniques 9(3).

// What activations are stored as: f16 in mixed precision.
alias real = f32;

override BATCH: u32;
override ELEMENTS: u32;
override KEY: u32;
override DROPPED: u32;
override SCALE: f32;

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

@group(0) @binding(0) var<storage, read> x: array<real>;
@group(0) @binding(1) var<storage, read> order: array<u32>;
@group(0) @binding(2) var<storage, read> steps: array<Step>;
@group(0) @binding(3) var<storage, read> counter: array<u32>;
@group(0) @binding(4) var<storage, read_write> y: array<real>;

// Four random words for four words.
fn pcg4d(words: vec4<u32>) -> vec4<u32> {
    var v = words * 1664525u + 1013904223u;
    v.x += v.y * v.w;
    v.y += v.z * v.x;
    v.z += v.x * v.y;
    v.w += v.y * v.z;
    v ^= v >> vec4<u32>(16u);
    v.x += v.y * v.w;
    v.y += v.z * v.x;
    v.z += v.x * v.y;
    v.w += v.y * v.z;
    return v;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn dropout(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let blocks = (ELEMENTS + 3u) / 4u;
    let i = t / blocks;
    let block = t % blocks;
    if i >= BATCH {
        return;
    }
    let row = steps[counter[0]];
    let number = order[row.first + min(i, row.count - 1u)];
    let stream = pcg4d(vec4<u32>(row.seed, row.epoch, number, KEY));
    let random = pcg4d(stream + vec4<u32>(block, 0u, 0u, 0u));
    for (var part = 0u; part < 4u; part++) {
        let e = 4u * block + part;
        if e < ELEMENTS {
            let value = f32(x[i * ELEMENTS + e]);
            let is_finite = (bitcast<u32>(value) & 0x7f800000u) != 0x7f800000u;
            var nan_bits = 0x7fc00000u;
            let dropped = select(bitcast<f32>(nan_bits), 0.0, is_finite);
            y[i * ELEMENTS + e] = real(select(dropped, value * SCALE, random[part] >= DROPPED));
        }
    }
}
