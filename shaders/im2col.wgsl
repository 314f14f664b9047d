// The explicit im2col matrix of a convolution and its transpose, col2im.
//
//   im2col:  columns[(n,oh,ow),(kh,kw,c)] = x[n, oh·SH + kh·DH − PH, ow·SW + kw·DW − PW, c]   (0 outside)
//   col2im:  dx[n,h,w,c] = Σ dcolumns[(n,oh,ow),(kh,kw,c)]  over the (kh,kw) whose window reaches it
//
// With them a convolution is `y[N·OH·OW, OC] = columns[N·OH·OW, KH·KW·C] · W`, and the gradient of
// a pixel is the sum over its copies. The implicit products in conv2d.wgsl compute the same index
// without storing the matrix; these two are what they are explained and tested by.
//
// Layout: x, dx and activation [N,H,W,C]; columns and dcolumns [N·OH·OW, KH·KW·C].
// im2col: one invocation copies one element of the matrix. Writes columns.
// col2im: one invocation gathers one element of dx in the order of (kh,kw), so that no two
// invocations add to the same place; with MASK the gradient is 0 where activation ≤ 0 (the
// ReLU fused into the layer before). Writes dx.
// CPU twins: im2col, col2im in src/cpu/im2col.rs.
// Maths: Chellapilla, Puri, Simard (2006), "High Performance Convolutional Neural Networks for
// Document Processing".

// What activations are stored as: f16 in mixed precision.
alias real = f32;

override N: u32;
override H: u32;
override W: u32;
override C: u32;
override OH: u32;
override OW: u32;
override KH: u32;
override KW: u32;
override SH: u32;
override SW: u32;
override PH: u32;
override PW: u32;
override DH: u32;
override DW: u32;
override MASK: bool = false;

const WORKGROUP_SIZE = 64u;

@group(0) @binding(0) var<storage, read> x: array<real>;
@group(0) @binding(1) var<storage, read_write> columns: array<real>;
@group(0) @binding(2) var<storage, read> dcolumns: array<real>;
@group(0) @binding(3) var<storage, read> activation: array<real>;
@group(0) @binding(4) var<storage, read_write> input_gradient: array<real>;  // dx

// By its bits, because a compiler may take it that no comparison meets a NaN.
fn is_nan(value: f32) -> bool {
    return (bitcast<u32>(value) & 0x7fffffffu) > 0x7f800000u;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn im2col(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if t >= N * OH * OW * KH * KW * C {
        return;
    }
    let c = t % C;
    let kw = (t / C) % KW;
    let kh = (t / (C * KW)) % KH;
    let position = t / (C * KW * KH);
    let n = position / (OH * OW);
    // Unsigned arithmetic wraps: coordinates left of or above the image become huge.
    let h = (position / OW) % OH * SH + kh * DH - PH;
    let w = position % OW * SW + kw * DW - PW;
    var value = 0.0;
    if h < H && w < W {
        value = f32(x[((n * H + h) * W + w) * C + c]);
    }
    columns[t] = real(value);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn col2im(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if t >= N * H * W * C {
        return;
    }
    let c = t % C;
    let w = (t / C) % W;
    let h = (t / (C * W)) % H;
    let n = t / (C * W * H);
    var sum = 0.0;
    for (var kh = 0u; kh < KH; kh++) {
        let down = h + PH - kh * DH;
        if down % SH != 0u || down / SH >= OH {
            continue;
        }
        for (var kw = 0u; kw < KW; kw++) {
            let across = w + PW - kw * DW;
            if across % SW != 0u || across / SW >= OW {
                continue;
            }
            let position = (n * OH + down / SH) * OW + across / SW;
            sum += f32(dcolumns[((position * KH + kh) * KW + kw) * C + c]);
        }
    }
    if MASK {
        sum = select(0.0, sum, f32(activation[t]) > 0.0 || is_nan(f32(activation[t])));
    }
    input_gradient[t] = real(sum);
}
