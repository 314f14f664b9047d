// What an adapter can do at most, to measure the other kernels by: arithmetic without memory, and
// memory without arithmetic.
//
//   peak_multiply_add:  a = a · scale + shift, 8 · ROUNDS times over, for 16 numbers an invocation;
//                       y[i] = their sum
//   peak_copy:          copied[i] = source[i]
//
// The multiply-adds: 4 vec4 chains that do not depend on each other, enough to fill the pipelines and
// few enough to stay in the registers of a software adapter. scale and shift come from a buffer, so
// that the compiler cannot fold the loop, and the sum is stored, so that it cannot drop it. With
// |scale| < 1 the numbers tend to shift / (1 − scale): they neither overflow nor become denormal.
// Number n of the 16 of invocation i starts at i mod 64 + n/4.
//
// Layout: factors [2] = scale, shift; y [INVOCATIONS]; source, copied [ELEMENTS_4] of four elements each.
// One invocation computes one y, or copies four elements. Writes y or copied.
// CPU twins: peak_multiply_add, peak_copy in source/cpu/peak.rs.

override INVOCATIONS: u32;
override ROUNDS: u32;
override ELEMENTS_4: u32;

const WORKGROUP_SIZE = 64u;

@group(0) @binding(0) var<storage, read> factors: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@group(0) @binding(2) var<storage, read> source: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> copied: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn peak_multiply_add(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= INVOCATIONS {
        return;
    }
    let scale = factors[0];
    let shift = vec4<f32>(factors[1]);
    var a = vec4<f32>(0.0, 0.25, 0.5, 0.75) + f32(i % 64u);
    var b = a + 1.0;
    var c = a + 2.0;
    var d = a + 3.0;
    for (var done = 0u; done < ROUNDS; done++) {
        a = a * scale + shift; b = b * scale + shift; c = c * scale + shift; d = d * scale + shift;
        a = a * scale + shift; b = b * scale + shift; c = c * scale + shift; d = d * scale + shift;
        a = a * scale + shift; b = b * scale + shift; c = c * scale + shift; d = d * scale + shift;
        a = a * scale + shift; b = b * scale + shift; c = c * scale + shift; d = d * scale + shift;
        a = a * scale + shift; b = b * scale + shift; c = c * scale + shift; d = d * scale + shift;
        a = a * scale + shift; b = b * scale + shift; c = c * scale + shift; d = d * scale + shift;
        a = a * scale + shift; b = b * scale + shift; c = c * scale + shift; d = d * scale + shift;
        a = a * scale + shift; b = b * scale + shift; c = c * scale + shift; d = d * scale + shift;
    }
    let sum = (a + b) + (c + d);
    y[i] = (sum.x + sum.y) + (sum.z + sum.w);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn peak_copy(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i < ELEMENTS_4 {
        copied[i] = source[i];
    }
}
