// The sum over the parts into which a gradient was cut.
//
//   result[i] = Σ_s partials[s,i]      in one fixed order, so the same bits on every run
//
// Layout: partials [SPLITS,ELEMENTS], result [ELEMENTS].
// reduce_splits: one invocation computes one element, in order of s. Writes result.
// reduce_chunks: for many parts of few elements. One workgroup computes four elements; of the 16
//   invocations that share one, each adds up every 16th part, then halves are added pairwise. Writes
//   result.
// CPU twins: reduce_splits, reduce_chunks in src/cpu/reduce.rs.

override SPLITS: u32;
override ELEMENTS: u32;

const WORKGROUP_SIZE = 64u;

@group(0) @binding(0) var<storage, read> partials: array<f32>;
@group(0) @binding(1) var<storage, read_write> result: array<f32>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn reduce_splits(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS {
        return;
    }
    var sum = 0.0;
    for (var s = 0u; s < SPLITS; s++) {
        sum += partials[s * ELEMENTS + i];
    }
    result[i] = sum;
}

const ELEMENTS_PER_WORKGROUP = 4u;

var<workgroup> sums: array<f32, WORKGROUP_SIZE>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn reduce_chunks(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let first = (group.y * groups.x + group.x) * ELEMENTS_PER_WORKGROUP;
    let i = first + local % ELEMENTS_PER_WORKGROUP;
    var sum = 0.0;
    if i < ELEMENTS {
        let stride = WORKGROUP_SIZE / ELEMENTS_PER_WORKGROUP;
        for (var s = local / ELEMENTS_PER_WORKGROUP; s < SPLITS; s += stride) {
            sum += partials[s * ELEMENTS + i];
        }
    }
    sums[local] = sum;
    for (var rest = WORKGROUP_SIZE / 2u; rest >= ELEMENTS_PER_WORKGROUP; rest /= 2u) {
        workgroupBarrier();
        if local < rest {
            sums[local] += sums[local + rest];
        }
    }
    if local < ELEMENTS_PER_WORKGROUP && i < ELEMENTS {
        result[i] = sums[local];
    }
}
