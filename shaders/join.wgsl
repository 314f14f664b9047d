// What joins two values, and the ways back.
//
//   add:                     y = a + b
//   concat:                  y[r, 0..CA] = a[r],  y[r, CA..CA+CB] = b[r]
//   slice_channels:          y[r, k] = x[r, FIRST + k],  k < COUNT
//   scale_forward:           y[n,p,c] = x[n,p,c] · factors[n,c]
//   scale_backward_factors:  df[n,c] = Σ_p x[n,p,c] · dy[n,p,c]
//
// The gradients: of add by either input dy itself, of concat two slices of dy, of scale by x the same
// kernel on dy. add also adds up the gradients of a value that is used more than once.
//
// Layout: a and b of add ELEMENTS elements in any order; rows r of CA, CB or C channels; x, y and dy
// [N,P,C], P = H·W positions; factors and df [N,C]. ELEMENTS counts the elements of y.
// scale_backward_factors: one workgroup handles CHANNELS channels of one sample. Of the PARTS
// invocations of a channel each adds up every PARTS-th position, then halves are added pairwise, so
// that the order of the additions follows from the shape. Writes df.
// All others: one invocation computes one element of y, or where the name ends in 4 four. Writes y.
// CPU twins: the functions of the same names in src/cpu/join.rs, of those that end in 4 too.
// Maths: Hu, Shen, Sun (2018), "Squeeze-and-Excitation Networks", for the scale.

// What activations are stored as: f16 in mixed precision.
alias real = f32;

override ELEMENTS: u32 = 1;
override C: u32 = 1;
override P: u32 = 1;
override N: u32 = 1;
override CA: u32 = 1;
override CB: u32 = 1;
override FIRST: u32 = 0;
override COUNT: u32 = 1;

const WORKGROUP_SIZE = 64u;
const CHANNELS = 8u;
const PARTS = WORKGROUP_SIZE / CHANNELS;

@group(0) @binding(0) var<storage, read> a: array<real>;
@group(0) @binding(1) var<storage, read> b: array<real>;
@group(0) @binding(2) var<storage, read> x: array<real>;
@group(0) @binding(3) var<storage, read> factors: array<real>;
@group(0) @binding(4) var<storage, read> output_gradient: array<real>;  // dy
@group(0) @binding(5) var<storage, read_write> y: array<real>;
@group(0) @binding(6) var<storage, read_write> factor_gradient: array<real>;  // df

// Four elements or channels at a time.
@group(0) @binding(7) var<storage, read> a4: array<vec4<real>>;
@group(0) @binding(8) var<storage, read> b4: array<vec4<real>>;
@group(0) @binding(9) var<storage, read> x4: array<vec4<real>>;
@group(0) @binding(10) var<storage, read> factors4: array<vec4<real>>;
@group(0) @binding(11) var<storage, read_write> y4: array<vec4<real>>;

struct Invocation {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
}

fn element(at: Invocation) -> u32 {
    return (at.group.y * at.groups.x + at.group.x) * WORKGROUP_SIZE + at.local;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn add(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        y[i] = real(f32(a[i]) + f32(b[i]));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn add4(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS / 4u {
        y4[i] = vec4<real>(vec4<f32>(a4[i]) + vec4<f32>(b4[i]));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn concat(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        let row = i / (CA + CB);
        let c = i % (CA + CB);
        if c < CA {
            y[i] = real(f32(a[row * CA + c]));
        } else {
            y[i] = real(f32(b[row * CB + c - CA]));
        }
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn slice_channels(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        y[i] = real(f32(x[i / COUNT * C + FIRST + i % COUNT]));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn scale_forward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        y[i] = real(f32(x[i]) * f32(factors[i / (P * C) * C + i % C]));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn scale_forward4(at: Invocation) {
    let i = element(at);
    let C4 = C / 4u;
    if i < ELEMENTS / 4u {
        y4[i] = vec4<real>(vec4<f32>(x4[i]) * vec4<f32>(factors4[i / (P * C4) * C4 + i % C4]));
    }
}

var<workgroup> sums: array<f32, WORKGROUP_SIZE>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn scale_backward_factors(at: Invocation) {
    let group = at.group.y * at.groups.x + at.group.x;
    let blocks = (C + CHANNELS - 1u) / CHANNELS;
    let n = group / blocks;
    let c = group % blocks * CHANNELS + at.local % CHANNELS;
    let counts = n < N && c < C;
    var sum = 0.0;
    if counts {
        for (var p = at.local / CHANNELS; p < P; p += PARTS) {
            let i = (n * P + p) * C + c;
            sum += f32(x[i]) * f32(output_gradient[i]);
        }
    }
    sums[at.local] = sum;
    for (var rest = PARTS / 2u; rest > 0u; rest /= 2u) {
        workgroupBarrier();
        if at.local < rest * CHANNELS {
            sums[at.local] += sums[at.local + rest * CHANNELS];
        }
    }
    if at.local < CHANNELS && counts {
        factor_gradient[n * C + c] = real(sums[at.local]);
    }
}
