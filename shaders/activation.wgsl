// Activations as layers of their own, element by element.
//
//   relu:        y = max(0, x)                       dx = 0 where y ≤ 0, else dy (so 0 at 0, and dy at a NaN)
//   leaky_relu:  y = x where x > 0, else SLOPE·x     dx = dy where y > 0, else SLOPE·dy
//   sigmoid:     y = 1 / (1 + e^−x)                  dx = dy · y · (1 − y)
//   tanh:        y = tanh x                          dx = dy · (1 − y) · (1 + y)
//   gelu:        y = x·S(x), S(x) = Φ(x), the normal distribution function    dx = dy · (S(x) + x·S′(x))
//   gelu_tanh:   y = x·S(x), S(x) = σ(2u), u = √(2/π)·(x + 0.044715·x³)       likewise
//   silu:        y = x·S(x), S(x) = σ(x) = 1 / (1 + e^−x)                     likewise
//   hard_swish:  y = x·clamp(x/6 + ½, 0, 1)          dx = 0 where x ≤ −3, dy where x ≥ 3, else dy·(x/3 + ½)
//
// The gradients of the first four need the stored output alone, so the input is not kept (but that of
// leaky_relu where SLOPE < 0: it looks at the sign, which is then the input's); those of the others need
// the input. A NaN comes out as a NaN, but relu_backward passes dy on there, and
// leaky_relu_backward SLOPE·dy, as in PyTorch. Where x·S(x) meets −∞ · 0 it is NaN, also as there.
//
// S(−x) = 1 − S(x). With z = |x| and the tail q = S(−z) = 1 − S(z), which is computed without a
// difference and so to its last digits however small it is,
//   x·S(x) = max(0, x) − z·q        S(x) + x·S′(x) = w where x < 0, else 1 − w, with w = q − z·S′(z).
// z is cut off where q and S′ are below 10⁻³⁶ and z·q is nothing beside x; so nothing overflows.
//   gelu:       q = e^(−z²/2) · r(z), r a polynomial in t = 1 / (1 + 0.3·z) that was fitted to
//               ½·e^(z²/2)·erfc(z/√2) for 0 ≤ z ≤ 13 (least largest relative error: 1.2e-7)
//   gelu_tanh:  q = e / (1 + e), e = e^−2u        silu: q = e / (1 + e), e = e^−z
//
// Layout: every buffer has ELEMENTS elements, in any order. They are handled LANES at a time: four as the text
// stands, one where they do not come in fours, see src/kernels/lanes.rs.
// One invocation computes LANES elements twice. Forward writes y, backward writes dx.
// CPU twins: the functions of the same names in src/cpu/activation.rs.
// Maths: Goodfellow, Bengio, Courville (2016), "Deep Learning", 3.10 and 6.3; Hendrycks and Gimpel
// (2016), "Gaussian Error Linear Units"; Ramachandran, Zoph, Le (2017), "Searching for Activation
// Functions"; Howard et al. (2019), "Searching for MobileNetV3"; tanh near 0: Moshier, Cephes, tanhf.

alias Lanes = vec4<f32>;
alias Words = vec4<u32>;
alias Flags = vec4<bool>;
// What activations are stored as: f16 in mixed precision.
alias real = f32;
alias Stored = vec4<real>;
const LANES = 4u;

override ELEMENTS: u32;
override SLOPE: f32 = 0.0;

const WORKGROUP_SIZE = 64u;

@group(0) @binding(0) var<storage, read> x: array<Stored>;
@group(0) @binding(1) var<storage, read_write> y: array<Stored>;
@group(0) @binding(2) var<storage, read> stored: array<Stored>;  // y, read back (or x, where leaky_relu needs it)
@group(0) @binding(3) var<storage, read> output_gradient: array<Stored>;  // dy
@group(0) @binding(4) var<storage, read_write> input_gradient: array<Stored>;  // dx

struct Invocation {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
}

// A workgroup handles so many times LANES elements one behind the other: enough that a GPU can start
// workgroups as fast as its memory is read.
const RUN = 2u * WORKGROUP_SIZE;
override COUNT: u32 = ELEMENTS / LANES;

fn first(at: Invocation) -> u32 {
    return (at.group.y * at.groups.x + at.group.x) * RUN + at.local;
}

fn end(at: Invocation) -> u32 {
    return min((at.group.y * at.groups.x + at.group.x + 1u) * RUN, COUNT);
}

// For what takes longer to compute than to load: both loads are on their way before anything is computed.
fn inside(i: u32) -> u32 {
    return min(i, COUNT - 1u);
}

// By its bits, because a compiler may take it that no comparison meets a NaN.
fn is_nan(value: Lanes) -> Flags {
    return (bitcast<Words>(value) & Words(0x7fffffffu)) > Words(0x7f800000u);
}

// `value`, or NaN where it is undefined (through a variable: a constant NaN is an error in WGSL).
fn defined(value: Lanes, is_defined: Flags) -> Lanes {
    var nan_bits = Words(0x7fc00000u);
    return select(bitcast<Lanes>(nan_bits), value, is_defined);
}

fn relu(value: Lanes) -> Lanes {
    // Not max(0, x): what that makes of NaN is undefined, and a NaN must not vanish here.
    return select(value, Lanes(0.0), (value <= Lanes(0.0)) & !is_nan(value));
}

fn relu_gradient(result: Lanes, gradient: Lanes) -> Lanes {
    return select(Lanes(0.0), gradient, (result > Lanes(0.0)) | is_nan(result));
}

fn leaky_relu(value: Lanes) -> Lanes {
    // A NaN stays one on either side.
    return select(SLOPE * value, value, value > Lanes(0.0));
}

fn leaky_relu_gradient(side: Lanes, gradient: Lanes) -> Lanes {
    return select(SLOPE * gradient, gradient, (side > Lanes(0.0)) & !is_nan(side));
}

fn sigmoid(value: Lanes) -> Lanes {
    let e = exp(-abs(value));
    let result = select(e, Lanes(1.0), value >= Lanes(0.0)) / (1.0 + e);
    // What exp() makes of a NaN is up to the driver.
    return select(result, value, is_nan(value));
}

fn sigmoid_gradient(result: Lanes, gradient: Lanes) -> Lanes {
    return gradient * result * (1.0 - result);
}

// Not WGSL's tanh(): its error may be 1e-5, and for large x some drivers make NaN of it.
fn tanh_of(value: Lanes) -> Lanes {
    // Close to 0, where 1 − e^−2z would be a difference of near equals: z + z³·P(z²).
    let s = value * value;
    let p = (((-5.70498873e-3 * s + 2.06390888e-2) * s - 5.37397155e-2) * s + 1.33314422e-1) * s - 3.33332819e-1;
    let e = exp(-2.0 * abs(value));
    let far = select(Lanes(-1.0), Lanes(1.0), value >= Lanes(0.0)) * ((1.0 - e) / (1.0 + e));
    let result = select(far, value + value * s * p, abs(value) < Lanes(0.625));
    return select(result, value, is_nan(value));
}

fn tanh_gradient(result: Lanes, gradient: Lanes) -> Lanes {
    return gradient * (1.0 - result) * (1.0 + result);
}

// A function S at z ≥ 0: q = 1 − S(z), slope = S′(z).
struct Tail { z: Lanes, q: Lanes, slope: Lanes }

fn gelu_tail(value: Lanes) -> Tail {
    let z = min(abs(value), Lanes(13.0));
    let e = exp(-0.5 * z * z);
    let t = 1.0 / (1.0 + 0.3 * z);
    let r = t * (0.119623266 + t * (0.12084545 + t * (0.09934762 + t * (0.13041484
        + t * (-0.05716445 + t * (0.2101154 + t * (-0.15937668 + t * 0.036194492)))))));
    return Tail(z, e * r, e * 0.39894228);  // 1/√(2π)
}

// For S(z) = σ(v), and v′ its derivative by z.
fn logistic_tail(z: Lanes, v: Lanes, v_slope: Lanes) -> Tail {
    let e = exp(-v);
    let q = e / (1.0 + e);
    return Tail(z, q, q * (1.0 - q) * v_slope);
}

fn gelu_tanh_tail(value: Lanes) -> Tail {
    let z = min(abs(value), Lanes(10.0));
    // 2·√(2/π) = 1.5957691.
    let v = 1.5957691 * z * (1.0 + 0.044715 * z * z);
    return logistic_tail(z, v, 1.5957691 * (1.0 + 0.134145 * z * z));
}

fn silu_tail(value: Lanes) -> Tail {
    let z = min(abs(value), Lanes(87.0));
    return logistic_tail(z, z, Lanes(1.0));
}

// x·S(x)
fn gated(value: Lanes, tail: Tail) -> Lanes {
    // From −∞ on, seen as a word, all negative NaNs lie.
    let is_defined = !is_nan(value) & (bitcast<Words>(value) < Words(0xff800000u));
    return defined(select(Lanes(0.0), value, value > Lanes(0.0)) - tail.z * tail.q, is_defined);
}

// S(x) + x·S′(x), NaN at ±∞ (∞ · 0).
fn gated_slope(value: Lanes, tail: Tail) -> Lanes {
    let w = tail.q - tail.z * tail.slope;
    let is_finite = (bitcast<Words>(value) & Words(0x7f800000u)) != Words(0x7f800000u);
    return defined(select(w, 1.0 - w, value >= Lanes(0.0)), is_finite);
}

fn hard_swish(value: Lanes) -> Lanes {
    let is_defined = !is_nan(value) & (bitcast<Words>(value) < Words(0xff800000u));
    return defined(value * clamp(value / 6.0 + 0.5, Lanes(0.0), Lanes(1.0)), is_defined);
}

fn hard_swish_gradient(value: Lanes, gradient: Lanes) -> Lanes {
    let inner = gradient * (value / 3.0 + 0.5);
    let outer = select(Lanes(0.0), gradient, value > Lanes(0.0));
    return select(inner, outer, (abs(value) >= Lanes(3.0)) & !is_nan(value));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn relu_forward(at: Invocation) {
    for (var i = first(at); i < end(at); i += WORKGROUP_SIZE) {
        let v = Lanes(x[i]);
        y[i] = Stored(relu(v));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn relu_backward(at: Invocation) {
    for (var i = first(at); i < end(at); i += WORKGROUP_SIZE) {
        let v = Lanes(stored[i]);
        let g = Lanes(output_gradient[i]);
        input_gradient[i] = Stored(relu_gradient(v, g));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn leaky_relu_forward(at: Invocation) {
    for (var i = first(at); i < end(at); i += WORKGROUP_SIZE) {
        let v = Lanes(x[i]);
        y[i] = Stored(leaky_relu(v));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn leaky_relu_backward(at: Invocation) {
    for (var i = first(at); i < end(at); i += WORKGROUP_SIZE) {
        let v = Lanes(stored[i]);
        let g = Lanes(output_gradient[i]);
        input_gradient[i] = Stored(leaky_relu_gradient(v, g));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sigmoid_forward(at: Invocation) {
    for (var i = first(at); i < end(at); i += WORKGROUP_SIZE) {
        let v = Lanes(x[i]);
        y[i] = Stored(sigmoid(v));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sigmoid_backward(at: Invocation) {
    for (var i = first(at); i < end(at); i += WORKGROUP_SIZE) {
        let v = Lanes(stored[i]);
        let g = Lanes(output_gradient[i]);
        input_gradient[i] = Stored(sigmoid_gradient(v, g));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn tanh_forward(at: Invocation) {
    for (var i = first(at); i < end(at); i += WORKGROUP_SIZE) {
        let v = Lanes(x[i]);
        y[i] = Stored(tanh_of(v));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn tanh_backward(at: Invocation) {
    for (var i = first(at); i < end(at); i += WORKGROUP_SIZE) {
        let v = Lanes(stored[i]);
        let g = Lanes(output_gradient[i]);
        input_gradient[i] = Stored(tanh_gradient(v, g));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn gelu_forward(at: Invocation) {
    let i = first(at);
    let j = i + WORKGROUP_SIZE;
    let v = Lanes(x[inside(i)]);
    let w = Lanes(x[inside(j)]);
    if (i < COUNT) { y[i] = Stored(gated(v, gelu_tail(v))); }
    if (j < COUNT) { y[j] = Stored(gated(w, gelu_tail(w))); }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn gelu_backward(at: Invocation) {
    let i = first(at);
    let j = i + WORKGROUP_SIZE;
    let v = Lanes(x[inside(i)]);
    let g = Lanes(output_gradient[inside(i)]);
    let w = Lanes(x[inside(j)]);
    let h = Lanes(output_gradient[inside(j)]);
    if (i < COUNT) { input_gradient[i] = Stored(g * gated_slope(v, gelu_tail(v))); }
    if (j < COUNT) { input_gradient[j] = Stored(h * gated_slope(w, gelu_tail(w))); }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn gelu_tanh_forward(at: Invocation) {
    let i = first(at);
    let j = i + WORKGROUP_SIZE;
    let v = Lanes(x[inside(i)]);
    let w = Lanes(x[inside(j)]);
    if (i < COUNT) { y[i] = Stored(gated(v, gelu_tanh_tail(v))); }
    if (j < COUNT) { y[j] = Stored(gated(w, gelu_tanh_tail(w))); }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn gelu_tanh_backward(at: Invocation) {
    let i = first(at);
    let j = i + WORKGROUP_SIZE;
    let v = Lanes(x[inside(i)]);
    let g = Lanes(output_gradient[inside(i)]);
    let w = Lanes(x[inside(j)]);
    let h = Lanes(output_gradient[inside(j)]);
    if (i < COUNT) { input_gradient[i] = Stored(g * gated_slope(v, gelu_tanh_tail(v))); }
    if (j < COUNT) { input_gradient[j] = Stored(h * gated_slope(w, gelu_tanh_tail(w))); }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn silu_forward(at: Invocation) {
    let i = first(at);
    let j = i + WORKGROUP_SIZE;
    let v = Lanes(x[inside(i)]);
    let w = Lanes(x[inside(j)]);
    if (i < COUNT) { y[i] = Stored(gated(v, silu_tail(v))); }
    if (j < COUNT) { y[j] = Stored(gated(w, silu_tail(w))); }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn silu_backward(at: Invocation) {
    let i = first(at);
    let j = i + WORKGROUP_SIZE;
    let v = Lanes(x[inside(i)]);
    let g = Lanes(output_gradient[inside(i)]);
    let w = Lanes(x[inside(j)]);
    let h = Lanes(output_gradient[inside(j)]);
    if (i < COUNT) { input_gradient[i] = Stored(g * gated_slope(v, silu_tail(v))); }
    if (j < COUNT) { input_gradient[j] = Stored(h * gated_slope(w, silu_tail(w))); }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn hard_swish_forward(at: Invocation) {
    for (var i = first(at); i < end(at); i += WORKGROUP_SIZE) {
        let v = Lanes(x[i]);
        y[i] = Stored(hard_swish(v));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn hard_swish_backward(at: Invocation) {
    for (var i = first(at); i < end(at); i += WORKGROUP_SIZE) {
        let v = Lanes(x[i]);
        let g = Lanes(output_gradient[i]);
        input_gradient[i] = Stored(hard_swish_gradient(v, g));
    }
}
