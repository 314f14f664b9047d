// Several views of each image of an evaluation, and the weighted mean of what the network makes of them.
//
//   gather_views, for view v of sample i at place p = first + min(i, count − 1):
//     s = order[p]                          first, count, base: the current row of the step table
//     x[v,i,h,w,c] = images[s,h',w',c] · scale[c] + shift[c],   batch_labels[i] = labels[s]
//     w' = w, or WIDTH − 1 − w where v is odd: mirrored; then of views 2 and 3 h' = h − 1 and one off w',
//     of views 4 and 5 h' = h + 1 and one added to w': moved by a pixel, with what lies beyond the border
//     reflected at it (−1 stands for 1)
//   average_views:  y[i,k] = Σ_v weight[v] · z[v,i,k]   in order of v, the weights ½ each of two views, and of
//     six ¼ for 0 and 1, ⅛ for the rest
//
// STREAMED as in gather.wgsl.
//
// Layout: images, labels, order and normalization as in gather.wgsl; x [VIEWS,BATCH,HEIGHT,WIDTH,CHANNELS];
// z [VIEWS,BATCH,CLASSES], y [BATCH,CLASSES]. A batch that is not full repeats its last sample.
// One invocation computes one element of x; the first of each sample also copies the label. One invocation
// computes one element of y.
// Writes x and batch_labels; y.
// CPU twins: gather_views and average_views in src/cpu/views.rs.
// Source: Jordan (2024), "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498, its test-time
// augmentation.

override BATCH: u32;
override VIEWS: u32;
override HEIGHT: u32 = 1u;
override WIDTH: u32 = 1u;
override CHANNELS: u32 = 1u;
override STREAMED: bool = false;
override CLASSES: u32 = 1u;

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

@group(0) @binding(0) var<storage, read> images: array<u32>;
@group(0) @binding(1) var<storage, read> labels: array<u32>;
@group(0) @binding(2) var<storage, read> order: array<u32>;
@group(0) @binding(3) var<storage, read> steps: array<Step>;
@group(0) @binding(4) var<storage, read> counter: array<u32>;
@group(0) @binding(5) var<storage, read> normalization: array<f32>;
@group(0) @binding(6) var<storage, read_write> x: array<f32>;
@group(0) @binding(7) var<storage, read_write> batch_labels: array<u32>;
@group(0) @binding(8) var<storage, read> z: array<f32>;
@group(0) @binding(9) var<storage, read_write> y: array<f32>;

// The place before (of views 2 and 3) or behind `at` (of 4 and 5) among `size`, reflected at the ends.
fn moved(at: u32, size: u32, view: u32) -> u32 {
    if view / 2u == 1u {
        return select(at - 1u, min(1u, size - 1u), at == 0u);
    }
    if view / 2u == 2u {
        return select(at + 1u, max(size, 2u) - 2u, at + 1u == size);
    }
    return at;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn gather_views(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let elements = HEIGHT * WIDTH * CHANNELS;
    if t >= VIEWS * BATCH * elements {
        return;
    }
    let view = t / (BATCH * elements);
    let i = t / elements % BATCH;
    let element = t % elements;
    let row = counter[0];
    let place = steps[row].first + min(i, steps[row].count - 1u);
    let number = order[place];
    if view == 0u && element == 0u {
        batch_labels[i] = labels[number];
    }
    let image = select(number, place - steps[row].base, STREAMED);
    let c = element % CHANNELS;
    let h = moved(element / (WIDTH * CHANNELS), HEIGHT, view);
    var w = element / CHANNELS % WIDTH;
    if view % 2u == 1u {
        w = WIDTH - 1u - w;
    }
    w = moved(w, WIDTH, view);
    let at = image * elements + (h * WIDTH + w) * CHANNELS + c;
    let byte = (images[at / 4u] >> (8u * (at % 4u))) & 0xffu;
    x[t] = f32(byte) * normalization[c] + normalization[CHANNELS + c];
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn average_views(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let elements = BATCH * CLASSES;
    if t >= elements {
        return;
    }
    var sum = 0.0;
    for (var view = 0u; view < VIEWS; view++) {
        var weight = 0.5;
        if VIEWS > 2u {
            weight = select(0.125, 0.25, view < 2u);
        }
        sum += weight * z[view * elements + t];
    }
    y[t] = sum;
}
