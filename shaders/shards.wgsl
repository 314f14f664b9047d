// Sums over the shards of a batch, by a tree that is the same whoever computes them.
//
//   tree(l,j) = tree(l−1,2j) + tree(l−1,2j+1)   the shards from j·2^l on, 2^l of them; past the last one: the left alone
//   sum_shards:  tree(0,micro) = x, and what is whole with that
//   fold_shards: result = tree over all shards, times share where SCALED
//
// Every term and every sum that is subnormal counts as 0, since devices differ in what they do with those.
//
// Layout: x and result [ELEMENTS], nodes [LEVELS or 2·LEVELS − 1,ELEMENTS]: row l holds the node of level l whose
// right sibling is still to come, row LEVELS + l the one whose left sibling is not computed here, since its shards
// come before first_shard. Elements are handled LANES at a time: four as the text stands, one where they do not
// come in fours, see src/kernels/lanes.rs. WIDTH = ELEMENTS / LANES.
// One invocation computes LANES elements. Which shard a step is, and of how many, says the current row of the step
// table. sum_shards updates nodes, where the row is a shard at all; fold_shards, which needs all shards from the
// first on, writes result.
// CPU twins: of the same names in src/cpu/shards.rs.

alias Lanes = vec4<f32>;
alias Words = vec4<u32>;

override WIDTH: u32;
override LEVELS: u32 = 1;
override SCALED: bool = false;

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

@group(0) @binding(0) var<storage, read> x: array<Lanes>;
@group(0) @binding(1) var<storage, read_write> nodes: array<Lanes>;
@group(0) @binding(2) var<storage, read> steps: array<Step>;
@group(0) @binding(3) var<storage, read> counter: array<u32>;
@group(0) @binding(4) var<storage, read> whole_nodes: array<Lanes>;  // nodes, read back
@group(0) @binding(5) var<storage, read_write> result: array<Lanes>;

fn flushed(value: Lanes) -> Lanes {
    return select(value, Lanes(0.0), (bitcast<Words>(value) & Words(0x7f800000u)) == Words(0u));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sum_shards(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let shard = steps[counter[0]].micro;
    if i >= WIDTH || shard >= steps[counter[0]].shards {
        return;
    }
    let first = steps[counter[0]].first_shard;
    var sum = flushed(x[i]);
    var level = 0u;
    for (; level + 1u < LEVELS; level++) {
        let node = shard >> level;
        if (node & 1u) == 0u || ((node - 1u) << level) < first {
            break;
        }
        sum = flushed(nodes[level * WIDTH + i] + sum);
    }
    let row = level + select(0u, LEVELS, ((shard >> level) & 1u) == 1u);
    nodes[row * WIDTH + i] = sum;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn fold_shards(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= WIDTH {
        return;
    }
    let shards = steps[counter[0]].shards;
    // A binary digit of the number of shards for each node, the smallest and last one first.
    var level = min(countTrailingZeros(shards), LEVELS - 1u);
    var sum = whole_nodes[level * WIDTH + i];
    level += 1u;
    for (; level < LEVELS; level++) {
        if ((shards >> level) & 1u) == 1u {
            sum = flushed(whole_nodes[level * WIDTH + i] + sum);
        }
    }
    if SCALED {
        sum = flushed(sum * steps[counter[0]].share);
    }
    result[i] = sum;
}
