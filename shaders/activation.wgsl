// Activations as layers of their own, element by element.
//
//   relu:     y = max(0, x)            dx = 0 where y ≤ 0, else dy (so 0 at 0, and dy at a NaN)
//   sigmoid:  y = 1 / (1 + e^−x)       dx = dy · y · (1 − y)
//
// Both gradients need the stored output alone, so the input is not kept. The sigmoid takes e^−|x|,
// which never overflows. A NaN comes out as a NaN.
// Layout: every buffer has ELEMENTS elements, in any order.
// One invocation computes one element. Forward writes y, backward writes dx.
// CPU twins: relu_forward, relu_backward, sigmoid_forward, sigmoid_backward in
// src/cpu/activation.rs.
// Maths: Goodfellow, Bengio, Courville (2016), "Deep Learning", 3.10 and 6.3.

override ELEMENTS: u32;

const WORKGROUP_SIZE = 64u;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@group(0) @binding(2) var<storage, read> stored: array<f32>;  // y, read back
@group(0) @binding(3) var<storage, read> output_gradient: array<f32>;  // dy
@group(0) @binding(4) var<storage, read_write> input_gradient: array<f32>;  // dx

// By its bits, because a compiler may take it that no comparison meets a NaN.
fn is_nan(value: f32) -> bool {
    return (bitcast<u32>(value) & 0x7fffffffu) > 0x7f800000u;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn relu_forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i < ELEMENTS {
        // Not max(0, x): what that makes of NaN is undefined, and a NaN must not vanish here.
        y[i] = select(x[i], 0.0, x[i] <= 0.0 && !is_nan(x[i]));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn relu_backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i < ELEMENTS {
        input_gradient[i] = select(0.0, output_gradient[i], stored[i] > 0.0 || is_nan(stored[i]));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sigmoid_forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i < ELEMENTS {
        let e = exp(-abs(x[i]));
        let value = select(e, 1.0, x[i] >= 0.0) / (1.0 + e);
        // What exp() makes of a NaN is up to the driver.
        y[i] = select(value, x[i], is_nan(x[i]));
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sigmoid_backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i < ELEMENTS {
        input_gradient[i] = output_gradient[i] * stored[i] * (1.0 - stored[i]);
    }
}
