// How a device calculates, to compare devices by (docs/determinism.md):
//
//   arithmetic:  y[i] = OPERATION of the triple a[i], b[i], c[i]
//
//   0  a                       5  ((a[0] + a[1]) + a[2]) + …, 16 terms    9  sqrt(a)
//   1  a + b                      from i on, at the end from the start   10  exp(c)
//   2  a · b                   6  a · b + c                              11  log(a)
//   3  (a + b) + c             7  fma(a, b, c)
//   4  (a + b) − a             8  a / b
//
// One operation a pipeline: were they side by side, a compiler could share a product between two of
// them and so not contract it. The triples come from a buffer, so that nothing can be folded.
//
// Layout: a, b, c, y [ELEMENTS]. One invocation computes one element. Writes y.
// CPU twin: arithmetic in src/cpu/fingerprint.rs.

override ELEMENTS: u32;
override OPERATION: u32;

const WORKGROUP_SIZE = 64u;
const TERMS = 16u;

@group(0) @binding(0) var<storage, read> a: array<f32>;
@group(0) @binding(1) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read> c: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

fn sum(first: u32) -> f32 {
    var total = 0.0;
    for (var k = 0u; k < TERMS; k++) {
        total += a[(first + k) % ELEMENTS];
    }
    return total;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn arithmetic(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= ELEMENTS {
        return;
    }
    // Every operation reads all three, so that every pipeline has the same bindings.
    let u = a[i];
    let v = b[i];
    let w = c[i];
    switch OPERATION {
        case 0u: { y[i] = u; }
        case 1u: { y[i] = u + v; }
        case 2u: { y[i] = u * v; }
        case 3u: { y[i] = (u + v) + w; }
        case 4u: { y[i] = (u + v) - u; }
        case 5u: { y[i] = sum(i); }
        case 6u: { y[i] = u * v + w; }
        case 7u: { y[i] = fma(u, v, w); }
        case 8u: { y[i] = u / v; }
        case 9u: { y[i] = sqrt(u); }
        case 10u: { y[i] = exp(w); }
        default: { y[i] = log(u); }
    }
}
