// What operations cost on an adapter, to choose among tiles by: four loops, each of which does one thing. The host
// runs one at a time, and one without any, and takes the time (src/tune.rs).
//
//   probe_prices:  32 numbers an invocation, as eight vec4 a to h; so many rounds of
//                    rounds[0]   x = x · scale + shift, 4 times over, for all 32
//                    rounds[1]   a += source[·], b += source[·]           two vec4
//                    rounds[2]   c += numbers[·]                          four numbers, one by one
//                    rounds[3]   d += kept[·], a += kept[·]               two vec4 of workgroup memory
//                  y[i] = the sum of the 32
//
// How many rounds stands in a buffer, so that one pipeline does for all and is compiled once. Places depend on the
// round, and numbers come from a buffer, so that nothing can be moved out of a loop or folded. What is loaded lies in
// any cache, as most of what a tile loads does. An invocation reads what it wrote itself: no barrier is needed.
// There are as many chains of multiply-adds as hide their latency even where they do not fit into registers, as those of
// a tile do not. Number n of the 32 of invocation i starts at i mod 64 + n/4; what it keeps are its first four, plus
// 0, 1, 2, 3.
//
// Layout: rounds [4]; factors [2] = scale, shift; source [256] of four elements each; numbers [1024], the same one
// by one; y [INVOCATIONS]. One invocation computes one y. Writes y.
// CPU twin: probe_prices in src/cpu/probe.rs.

override INVOCATIONS: u32;

const WORKGROUP_SIZE = 64u;
const PLACES = 256u;
const KEPT = 4u;

@group(0) @binding(0) var<storage, read> rounds: array<u32>;
@group(0) @binding(1) var<storage, read> factors: array<f32>;
@group(0) @binding(2) var<storage, read> source: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> numbers: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

var<workgroup> kept: array<vec4<f32>, KEPT * WORKGROUP_SIZE>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn probe_prices(
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
    var a = vec4<f32>(0.0, 0.25, 0.5, 0.75) + f32(local);
    var b = a + 1.0;
    var c = a + 2.0;
    var d = a + 3.0;
    var e = a + 4.0;
    var f = a + 5.0;
    var g = a + 6.0;
    var h = a + 7.0;
    for (var k = 0u; k < KEPT; k++) {
        kept[k * WORKGROUP_SIZE + local] = a + f32(k);
    }
    for (var r = 0u; r < rounds[0]; r++) {
        a = a * scale + shift; b = b * scale + shift; c = c * scale + shift; d = d * scale + shift;
        e = e * scale + shift; f = f * scale + shift; g = g * scale + shift; h = h * scale + shift;
        a = a * scale + shift; b = b * scale + shift; c = c * scale + shift; d = d * scale + shift;
        e = e * scale + shift; f = f * scale + shift; g = g * scale + shift; h = h * scale + shift;
        a = a * scale + shift; b = b * scale + shift; c = c * scale + shift; d = d * scale + shift;
        e = e * scale + shift; f = f * scale + shift; g = g * scale + shift; h = h * scale + shift;
        a = a * scale + shift; b = b * scale + shift; c = c * scale + shift; d = d * scale + shift;
        e = e * scale + shift; f = f * scale + shift; g = g * scale + shift; h = h * scale + shift;
    }
    for (var r = 0u; r < rounds[1]; r++) {
        let at = r * WORKGROUP_SIZE + local;
        a += source[at % PLACES];
        b += source[(at + PLACES / 2u) % PLACES];
    }
    for (var r = 0u; r < rounds[2]; r++) {
        let at = (r * WORKGROUP_SIZE + local) % PLACES * 4u;
        c += vec4<f32>(numbers[at], numbers[at + 1u], numbers[at + 2u], numbers[at + 3u]);
    }
    for (var r = 0u; r < rounds[3]; r++) {
        d += kept[r % KEPT * WORKGROUP_SIZE + local];
        a += kept[(r + 1u) % KEPT * WORKGROUP_SIZE + local];
    }
    let sum = ((a + b) + (c + d)) + ((e + f) + (g + h));
    y[i] = (sum.x + sum.y) + (sum.z + sum.w);
}
