// The sum over the parts into which a weight gradient was cut.
//
//   result[i] = Σ_s partials[s,i]      in order of s, so the same bits on every run
//
// Layout: partials [SPLITS,ELEMENTS], result [ELEMENTS].
// One invocation computes one element of result. Writes result.
// CPU twin: reduce_splits in src/cpu/reduce.rs.

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
