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
// Layout: every buffer has ELEMENTS elements, in any order.
// One invocation computes one element; in the kernels that end in 4, which are those whose time goes
// into loads and stores, four. Forward writes y, backward writes dx.
// CPU twins: the functions of the same names in src/cpu/activation.rs, of those that end in 4 too.
// Maths: Goodfellow, Bengio, Courville (2016), "Deep Learning", 3.10 and 6.3; Hendrycks and Gimpel
// (2016), "Gaussian Error Linear Units"; Ramachandran, Zoph, Le (2017), "Searching for Activation
// Functions"; Howard et al. (2019), "Searching for MobileNetV3"; tanh near 0: Moshier, Cephes, tanhf.

// What activations are stored as: f16 in mixed precision.
alias real = f32;

override ELEMENTS: u32;
override SLOPE: f32 = 0.0;

const WORKGROUP_SIZE = 64u;

@group(0) @binding(0) var<storage, read> x: array<real>;
@group(0) @binding(1) var<storage, read_write> y: array<real>;
@group(0) @binding(2) var<storage, read> stored: array<real>;  // y, read back (or x, where leaky_relu needs it)
@group(0) @binding(3) var<storage, read> output_gradient: array<real>;  // dy
@group(0) @binding(4) var<storage, read_write> input_gradient: array<real>;  // dx

// Four elements at a time.
@group(0) @binding(5) var<storage, read> x4: array<vec4<real>>;
@group(0) @binding(6) var<storage, read_write> y4: array<vec4<real>>;
@group(0) @binding(7) var<storage, read> stored4: array<vec4<real>>;
@group(0) @binding(8) var<storage, read> output_gradient4: array<vec4<real>>;
@group(0) @binding(9) var<storage, read_write> input_gradient4: array<vec4<real>>;

struct Invocation {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
}

fn element(at: Invocation) -> u32 {
    return (at.group.y * at.groups.x + at.group.x) * WORKGROUP_SIZE + at.local;
}

// By its bits, because a compiler may take it that no comparison meets a NaN.
fn is_nan(value: f32) -> bool {
    return (bitcast<u32>(value) & 0x7fffffffu) > 0x7f800000u;
}

// `value`, or NaN where it is undefined (through a variable: a constant NaN is an error in WGSL).
fn defined(value: f32, is_defined: bool) -> f32 {
    var nan_bits = 0x7fc00000u;
    return select(bitcast<f32>(nan_bits), value, is_defined);
}

fn relu(value: f32) -> f32 {
    // Not max(0, x): what that makes of NaN is undefined, and a NaN must not vanish here.
    return select(value, 0.0, value <= 0.0 && !is_nan(value));
}

fn relu_gradient(result: f32, gradient: f32) -> f32 {
    return select(0.0, gradient, result > 0.0 || is_nan(result));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn relu_forward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        y[i] = real(relu(f32(x[i])));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn relu_forward4(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS / 4u {
        let v = vec4<f32>(x4[i]);
        y4[i] = vec4<real>(vec4<f32>(relu(v.x), relu(v.y), relu(v.z), relu(v.w)));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn relu_backward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        input_gradient[i] = real(relu_gradient(f32(stored[i]), f32(output_gradient[i])));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn relu_backward4(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS / 4u {
        let v = vec4<f32>(stored4[i]);
        let g = vec4<f32>(output_gradient4[i]);
        let d = vec4<f32>(
            relu_gradient(v.x, g.x),
            relu_gradient(v.y, g.y),
            relu_gradient(v.z, g.z),
            relu_gradient(v.w, g.w),
        );
        input_gradient4[i] = vec4<real>(d);
    }
}

fn leaky_relu(value: f32) -> f32 {
    // A NaN stays one on either side.
    return select(SLOPE * value, value, value > 0.0);
}

fn leaky_relu_gradient(side: f32, gradient: f32) -> f32 {
    return select(SLOPE * gradient, gradient, side > 0.0 && !is_nan(side));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn leaky_relu_forward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        y[i] = real(leaky_relu(f32(x[i])));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn leaky_relu_forward4(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS / 4u {
        let v = vec4<f32>(x4[i]);
        y4[i] = vec4<real>(vec4<f32>(leaky_relu(v.x), leaky_relu(v.y), leaky_relu(v.z), leaky_relu(v.w)));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn leaky_relu_backward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        input_gradient[i] = real(leaky_relu_gradient(f32(stored[i]), f32(output_gradient[i])));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn leaky_relu_backward4(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS / 4u {
        let v = vec4<f32>(stored4[i]);
        let g = vec4<f32>(output_gradient4[i]);
        let d = vec4<f32>(
            leaky_relu_gradient(v.x, g.x),
            leaky_relu_gradient(v.y, g.y),
            leaky_relu_gradient(v.z, g.z),
            leaky_relu_gradient(v.w, g.w),
        );
        input_gradient4[i] = vec4<real>(d);
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sigmoid_forward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        let e = exp(-abs(f32(x[i])));
        let value = select(e, 1.0, f32(x[i]) >= 0.0) / (1.0 + e);
        // What exp() makes of a NaN is up to the driver.
        y[i] = real(select(value, f32(x[i]), is_nan(f32(x[i]))));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sigmoid_backward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        input_gradient[i] = real(f32(output_gradient[i]) * f32(stored[i]) * (1.0 - f32(stored[i])));
    }
}

// Not WGSL's tanh(): its error may be 1e-5, and for large x some drivers make NaN of it.
@compute @workgroup_size(WORKGROUP_SIZE)
fn tanh_forward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        let value = f32(x[i]);
        // Close to 0, where 1 − e^−2z would be a difference of near equals: z + z³·P(z²).
        let s = value * value;
        let p = (((-5.70498873e-3 * s + 2.06390888e-2) * s - 5.37397155e-2) * s + 1.33314422e-1) * s - 3.33332819e-1;
        let e = exp(-2.0 * abs(value));
        let far = select(-1.0, 1.0, value >= 0.0) * ((1.0 - e) / (1.0 + e));
        let result = select(far, value + value * s * p, abs(value) < 0.625);
        y[i] = real(select(result, value, is_nan(value)));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn tanh_backward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        input_gradient[i] = real(f32(output_gradient[i]) * (1.0 - f32(stored[i])) * (1.0 + f32(stored[i])));
    }
}

// A function S at z ≥ 0: q = 1 − S(z), slope = S′(z).
struct Tail { z: f32, q: f32, slope: f32 }

fn gelu_tail(value: f32) -> Tail {
    let z = min(abs(value), 13.0);
    let e = exp(-0.5 * z * z);
    let t = 1.0 / (1.0 + 0.3 * z);
    let r = t * (0.119623266 + t * (0.12084545 + t * (0.09934762 + t * (0.13041484
        + t * (-0.05716445 + t * (0.2101154 + t * (-0.15937668 + t * 0.036194492)))))));
    return Tail(z, e * r, e * 0.39894228);  // 1/√(2π)
}

// For S(z) = σ(v), and v′ its derivative by z.
fn logistic_tail(z: f32, v: f32, v_slope: f32) -> Tail {
    let e = exp(-v);
    let q = e / (1.0 + e);
    return Tail(z, q, q * (1.0 - q) * v_slope);
}

fn gelu_tanh_tail(value: f32) -> Tail {
    let z = min(abs(value), 10.0);
    // 2·√(2/π) = 1.5957691.
    let v = 1.5957691 * z * (1.0 + 0.044715 * z * z);
    return logistic_tail(z, v, 1.5957691 * (1.0 + 0.134145 * z * z));
}

fn silu_tail(value: f32) -> Tail {
    let z = min(abs(value), 87.0);
    return logistic_tail(z, z, 1.0);
}

// x·S(x)
fn gated(value: f32, tail: Tail) -> f32 {
    let bits = bitcast<u32>(value);
    // From −∞ on, seen as a word, all negative NaNs lie.
    let is_defined = !is_nan(value) && bits < 0xff800000u;
    return defined(select(0.0, value, value > 0.0) - tail.z * tail.q, is_defined);
}

// S(x) + x·S′(x), NaN at ±∞ (∞ · 0).
fn gated_slope(value: f32, tail: Tail) -> f32 {
    let w = tail.q - tail.z * tail.slope;
    let is_finite = (bitcast<u32>(value) & 0x7f800000u) != 0x7f800000u;
    return defined(select(w, 1.0 - w, value >= 0.0), is_finite);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn gelu_forward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        y[i] = real(gated(f32(x[i]), gelu_tail(f32(x[i]))));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn gelu_backward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        input_gradient[i] = real(f32(output_gradient[i]) * gated_slope(f32(x[i]), gelu_tail(f32(x[i]))));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn gelu_tanh_forward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        y[i] = real(gated(f32(x[i]), gelu_tanh_tail(f32(x[i]))));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn gelu_tanh_backward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        input_gradient[i] = real(f32(output_gradient[i]) * gated_slope(f32(x[i]), gelu_tanh_tail(f32(x[i]))));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn silu_forward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        y[i] = real(gated(f32(x[i]), silu_tail(f32(x[i]))));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn silu_backward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        input_gradient[i] = real(f32(output_gradient[i]) * gated_slope(f32(x[i]), silu_tail(f32(x[i]))));
    }
}

fn hard_swish(value: f32) -> f32 {
    let is_defined = !is_nan(value) && bitcast<u32>(value) < 0xff800000u;
    return defined(value * clamp(value / 6.0 + 0.5, 0.0, 1.0), is_defined);
}

fn hard_swish_gradient(value: f32, gradient: f32) -> f32 {
    let inner = gradient * (value / 3.0 + 0.5);
    let outer = select(0.0, gradient, value > 0.0);
    return select(inner, outer, abs(value) >= 3.0 && !is_nan(value));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn hard_swish_forward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        y[i] = real(hard_swish(f32(x[i])));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn hard_swish_forward4(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS / 4u {
        let v = vec4<f32>(x4[i]);
        y4[i] = vec4<real>(vec4<f32>(hard_swish(v.x), hard_swish(v.y), hard_swish(v.z), hard_swish(v.w)));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn hard_swish_backward(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS {
        input_gradient[i] = real(hard_swish_gradient(f32(x[i]), f32(output_gradient[i])));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn hard_swish_backward4(at: Invocation) {
    let i = element(at);
    if i < ELEMENTS / 4u {
        let v = vec4<f32>(x4[i]);
        let g = vec4<f32>(output_gradient4[i]);
        let d = vec4<f32>(
            hard_swish_gradient(v.x, g.x),
            hard_swish_gradient(v.y, g.y),
            hard_swish_gradient(v.z, g.z),
            hard_swish_gradient(v.w, g.w),
        );
        input_gradient4[i] = vec4<real>(d);
    }
}
