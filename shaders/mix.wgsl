// Mix-up and cut-mix: each image of a batch is mixed with the one after it, and so are their labels.
//
//   draw_mixes, for each sample i, at place p = first + c of the epoch's order with
//   c = min(i, count − 1) (first, count, seed and epoch: the current row of the step table):
//     partner = (c + 1) mod count
//     [r0, r1, r2, r3] = pcg4d([seed, epoch, p, KEY])
//     λ from Beta(α, α), by linear interpolation between its quantiles at the first 16 bits of r1
//     mix-up:   the share of the sample's own is λ
//     cut-mix:  a box of √(1 − λ) of height and width, its centre at (r2 mod HEIGHT, r3 mod WIDTH), cut off
//               at the image's border; the share of the sample's own is what lies outside
//     where both are on, r0's highest bit draws which: 1 is cut-mix
//   mix_batch:  y = (1 − w)·x[i] + w·x[partner] inside the box, x[i] outside, where the box is the whole
//               image and w = 1 − λ for mix-up, and w = 1 for cut-mix
//
// Of the two labels the one with the larger share (of equal ones the sample's own) becomes the sample's
// label, which the accuracy is counted by; the other one is its second. A batch that is not full repeats its
// last sample and mixes among those that count.
//
// Layout: labels and batch_labels [BATCH]; quantiles [2,257] of mix-up's and of cut-mix's distribution at
// 0/256, 1/256 … 256/256, whole numbers, 2²⁴ for 1; mixes [BATCH,9]: second label, share of the label as two
// whole numbers (so many of so many), partner, top, left, bottom, right, w in 2⁻²⁴; x and y
// [BATCH,HEIGHT,WIDTH,CHANNELS]. All that is drawn is in whole numbers, so that it is the same everywhere.
// One invocation of draw_mixes handles one sample, one of mix_batch one element of y.
// Writes batch_labels and mixes; y.
// CPU twins: draw_mixes and mix_batch in src/cpu/mix.rs; pcg4d in src/cpu/random.rs.
// Maths: Zhang et al. (2018), "mixup: Beyond Empirical Risk Minimization", arXiv 1710.09412; Yun et al. (2019),
// "CutMix: Regularization Strategy to Train Strong Classifiers", arXiv 1905.04899.

override BATCH: u32;
override HEIGHT: u32;
override WIDTH: u32;
override CHANNELS: u32 = 1u;
override MIX_UP: bool = false;
override CUT_MIX: bool = false;

const WORKGROUP_SIZE = 64u;
const KEY = 0x6b79c3d5u;
const ONE = 0x1000000u;
// Of mixes.
const COLUMNS = 9u;

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

@group(0) @binding(0) var<storage, read> labels: array<u32>;
@group(0) @binding(1) var<storage, read> steps: array<Step>;
@group(0) @binding(2) var<storage, read> counter: array<u32>;
@group(0) @binding(3) var<storage, read> quantiles: array<f32>;
@group(0) @binding(4) var<storage, read_write> batch_labels: array<u32>;
@group(0) @binding(5) var<storage, read_write> mixes: array<u32>;
@group(0) @binding(6) var<storage, read> x: array<f32>;
@group(0) @binding(7) var<storage, read> drawn: array<u32>;
@group(0) @binding(8) var<storage, read_write> y: array<f32>;

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

// λ in 2⁻²⁴.
fn share(cut: bool, word: u32) -> u32 {
    let at = select(0u, 257u, cut) + (word >> 24u);
    let low = u32(quantiles[at]);
    let high = u32(quantiles[at + 1u]);
    return low + (((high - low) * ((word >> 16u) & 0xffu)) >> 8u);
}

// The largest whole number whose square is at most n, from 0 to 2²⁴.
fn square_root(n: u32) -> u32 {
    var root = u32(sqrt(f32(n)));
    // The function is not exact.
    while root * root > n {
        root -= 1u;
    }
    while (root + 1u) * (root + 1u) <= n {
        root += 1u;
    }
    return root;
}

// Where `part` of `size`, in 2⁻¹², around `centre` begins and ends.
fn side(size: u32, part: u32, centre: u32) -> vec2<u32> {
    let extent = (size * part) >> 12u;
    let before = extent / 2u;
    return vec2<u32>(centre - min(centre, before), min(centre + extent - before, size));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn draw_mixes(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= BATCH {
        return;
    }
    let row = steps[counter[0]];
    let c = min(i, row.count - 1u);
    let partner = (c + 1u) % row.count;
    let r = pcg4d(vec4<u32>(row.seed, row.epoch, row.first + c, KEY));
    let cut = CUT_MIX && (!MIX_UP || (r.x >> 31u) == 1u);
    let lambda = share(cut, r.y);
    var own = lambda;
    var whole = ONE;
    var weight = ONE - lambda;
    var rows = vec2<u32>(0u, HEIGHT);
    var columns = vec2<u32>(0u, WIDTH);
    if cut {
        let part = square_root(ONE - lambda);
        rows = side(HEIGHT, part, r.z % HEIGHT);
        columns = side(WIDTH, part, r.w % WIDTH);
        whole = HEIGHT * WIDTH;
        own = whole - (rows.y - rows.x) * (columns.y - columns.x);
        weight = ONE;
    }
    let swapped = own < whole - own;
    batch_labels[i] = labels[select(c, partner, swapped)];
    let at = i * COLUMNS;
    mixes[at] = labels[select(partner, c, swapped)];
    mixes[at + 1u] = max(own, whole - own);
    mixes[at + 2u] = whole;
    mixes[at + 3u] = partner;
    mixes[at + 4u] = rows.x;
    mixes[at + 5u] = columns.x;
    mixes[at + 6u] = rows.y;
    mixes[at + 7u] = columns.y;
    mixes[at + 8u] = weight;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn mix_batch(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let elements = HEIGHT * WIDTH * CHANNELS;
    if t >= BATCH * elements {
        return;
    }
    let i = t / elements;
    let element = t % elements;
    let h = element / (WIDTH * CHANNELS);
    let w = element / CHANNELS % WIDTH;
    let at = i * COLUMNS;
    let inside = h >= drawn[at + 4u] && w >= drawn[at + 5u] && h < drawn[at + 6u] && w < drawn[at + 7u];
    if !inside {
        y[t] = x[t];
        return;
    }
    let weight = f32(drawn[at + 8u]) / f32(ONE);
    y[t] = (1.0 - weight) * x[t] + weight * x[drawn[at + 3u] * elements + element];
}
