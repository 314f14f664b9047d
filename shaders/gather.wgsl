// One batch out of the dataset: bytes to normalised f32.
//
//   p = first + min(i, count − 1)            first, count, base: the current row of the step table
//   s = order[p]
//   x[i,h,w,c] = images[s,h,w,c] · scale[c] + shift[c],   batch_labels[i] = labels[s]
//
// STREAMED: images holds a part of the set only, in the epoch's order from place base on, and
// images[p − base] stands for images[s].
//
// Layout: images [samples,H,W,C] as bytes, four to a word, lowest byte first, without a gap between
// images; normalization [scale of C channels, shift of C channels]; x [BATCH,H,W,C]; ELEMENTS =
// H·W·C. A batch that is not full repeats its last sample; the loss gives the repeats no weight.
// One invocation computes one element of x; the first of each sample also copies the label.
// Writes x and batch_labels.
// CPU twin: gather_batch in src/cpu/gather.rs.

override BATCH: u32;
override ELEMENTS: u32;
override CHANNELS: u32;
override STREAMED: bool = false;

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

@compute @workgroup_size(WORKGROUP_SIZE)
fn gather_batch(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if t >= BATCH * ELEMENTS {
        return;
    }
    let i = t / ELEMENTS;
    let element = t % ELEMENTS;
    let row = counter[0];
    let place = steps[row].first + min(i, steps[row].count - 1u);
    let number = order[place];
    if element == 0u {
        batch_labels[i] = labels[number];
    }
    let image = select(number, place - steps[row].base, STREAMED);
    let at = image * ELEMENTS + element;
    let byte = (images[at / 4u] >> (8u * (at % 4u))) & 0xffu;
    let c = element % CHANNELS;
    x[t] = f32(byte) * normalization[c] + normalization[CHANNELS + c];
}
