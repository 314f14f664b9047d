// Convolution in groups: the channels in and out fall into GROUPS groups of GC and GOC, and an output
// channel o sees the channels (o / GOC)·GC + c of its own group alone, c from 0 to before GC.
//
//   forward          y[n,oh,ow,o] = b[o] + Σ x[n, oh·SH + kh·DH − PH, ow·SW + kw·DW − PW, (o / GOC)·GC + c] · W[kh,kw,c,o]
//   backward_weight  dW[kh,kw,c,o] = Σ over (n,oh,ow) of that x · dy[n,oh,ow,o], db[o] = Σ dy[n,oh,ow,o]
//   backward_input   dx[n,h,w,(o / GOC)·GC + c] = Σ dy[n,oh,ow,o] · W[kh,kw,c,o]
//                    over the (oh,kh), (ow,kw) with h = oh·SH + kh·DH − PH, w likewise, and the o of the group
//
// A tap in the padding contributes nothing, whatever it would meet. With RELU the forward pass ends in
// max(0, ·); with MASK the gradient is 0 where activation ≤ 0 (the ReLU of the layer before).
//
// Layout: x, dx and activation [N,H,W,C]; y and dy [N,OH,OW,OC]; parameters W [KH,KW,GC,OC] and, with
// BIAS, b [OC] behind it; partials [CHUNKS] times the same.
// grouped_…: one invocation computes one element, its sum in the order of (kh,kw), then channels; that
//   of a weight in the order of (n,oh,ow), over a CHUNKS-th of the image rows (n,oh).
// grouped_…4: depthwise convolution, GC = GOC = 1, with channels in fours. One invocation computes four
//   channels of four neighbours in a row, of y, of dx or of taps, so that what it has loaded it uses more
//   than once: where neighbours lie as far apart as taps the windows slide along the width, and of four
//   values three are those of the step before.
// Forward writes y, backward writes partials, to be added up by `reduce_splits`, and dx.
// CPU twins: grouped_forward, grouped_backward_weight, grouped_backward_input (of both) in
// src/cpu/grouped.rs.
// Maths: Krizhevsky, Sutskever, Hinton (2012), "ImageNet Classification with Deep Convolutional Neural
// Networks", 3.2; Howard et al. (2017), "MobileNets: Efficient Convolutional Neural Networks for Mobile
// Vision Applications"; Dumoulin & Visin (2016), "A guide to convolution arithmetic".

// What activations are stored as: f16 in mixed precision.
alias real = f32;

override N: u32;
override H: u32;
override W: u32;
override C: u32;
override OH: u32;
override OW: u32;
override OC: u32;
override KH: u32;
override KW: u32;
override SH: u32;
override SW: u32;
override PH: u32;
override PW: u32;
override DH: u32;
override DW: u32;
override GROUPS: u32;
override BIAS: bool;
override RELU: bool = false;
override MASK: bool = false;
override CHUNKS: u32 = 1u;

const WORKGROUP_SIZE = 64u;

@group(0) @binding(0) var<storage, read> x: array<real>;
@group(0) @binding(1) var<storage, read> parameters: array<real>;
@group(0) @binding(2) var<storage, read_write> y: array<real>;
@group(0) @binding(3) var<storage, read> output_gradient: array<real>;  // dy
@group(0) @binding(4) var<storage, read_write> partials: array<f32>;
@group(0) @binding(5) var<storage, read> activation: array<real>;
@group(0) @binding(6) var<storage, read_write> input_gradient: array<real>;  // dx
// The same four channels at a time.
@group(0) @binding(7) var<storage, read> x4: array<vec4<real>>;
@group(0) @binding(8) var<storage, read> parameters4: array<vec4<real>>;
@group(0) @binding(9) var<storage, read_write> y4: array<vec4<real>>;
@group(0) @binding(10) var<storage, read> output_gradient4: array<vec4<real>>;
@group(0) @binding(11) var<storage, read_write> partials4: array<vec4<f32>>;
@group(0) @binding(12) var<storage, read> activation4: array<vec4<real>>;
@group(0) @binding(13) var<storage, read_write> input_gradient4: array<vec4<real>>;

// By its bits, because a compiler may take it that no comparison meets a NaN.
fn is_nan(value: f32) -> bool {
    return (bitcast<u32>(value) & 0x7fffffffu) > 0x7f800000u;
}

fn is_nan4(v: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(v) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn grouped_forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if t >= N * OH * OW * OC {
        return;
    }
    let GC = C / GROUPS;
    let o = t % OC;
    let ow = (t / OC) % OW;
    let oh = (t / (OC * OW)) % OH;
    let n = t / (OC * OW * OH);
    let first = o / (OC / GROUPS) * GC;
    var sum = 0.0;
    for (var kh = 0u; kh < KH; kh++) {
        // Unsigned arithmetic wraps: coordinates left of or above the image become huge.
        let h = oh * SH + kh * DH - PH;
        if h >= H {
            continue;
        }
        for (var kw = 0u; kw < KW; kw++) {
            let w = ow * SW + kw * DW - PW;
            if w >= W {
                continue;
            }
            let pixel = ((n * H + h) * W + w) * C + first;
            let weight = (kh * KW + kw) * GC * OC + o;
            for (var c = 0u; c < GC; c++) {
                sum += f32(x[pixel + c]) * f32(parameters[weight + c * OC]);
            }
        }
    }
    if BIAS {
        sum += f32(parameters[KH * KW * GC * OC + o]);
    }
    if RELU && sum <= 0.0 && !is_nan(sum) {
        sum = 0.0;
    }
    y[t] = real(sum);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn grouped_backward_weight(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let GC = C / GROUPS;
    let rows = KH * KW * GC + select(0u, 1u, BIAS);
    if t >= CHUNKS * rows * OC {
        return;
    }
    let o = t % OC;
    let c = (t / OC) % rows % GC;
    let tap = (t / OC) % rows / GC;  // KH·KW for the bias
    let per_chunk = (N * OH + CHUNKS - 1u) / CHUNKS;
    let begin = t / (OC * rows) * per_chunk;
    let end = min(begin + per_chunk, N * OH);
    var sum = 0.0;
    for (var row = begin; row < end; row++) {
        let h = row % OH * SH + tap / KW * DH - PH;
        if h >= H && tap < KH * KW {
            continue;
        }
        let pixels = (row / OH * H + h) * W;
        for (var ow = 0u; ow < OW; ow++) {
            let gradient = f32(output_gradient[(row * OW + ow) * OC + o]);
            let w = ow * SW + tap % KW * DW - PW;
            if tap == KH * KW {
                sum += gradient;
            } else if w < W {
                sum += f32(x[(pixels + w) * C + o / (OC / GROUPS) * GC + c]) * gradient;
            }
        }
    }
    partials[t] = sum;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn grouped_backward_input(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if t >= N * H * W * C {
        return;
    }
    let GC = C / GROUPS;
    let GOC = OC / GROUPS;
    let c = t % C;
    let w = (t / C) % W;
    let h = (t / (C * W)) % H;
    let n = t / (C * W * H);
    let first = c / GC * GOC;
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
            let position = ((n * OH + down / SH) * OW + across / SW) * OC + first;
            let weight = ((kh * KW + kw) * GC + c % GC) * OC + first;
            for (var o = 0u; o < GOC; o++) {
                sum += f32(output_gradient[position + o]) * f32(parameters[weight + o]);
            }
        }
    }
    if MASK {
        sum = select(0.0, sum, f32(activation[t]) > 0.0 || is_nan(f32(activation[t])));
    }
    input_gradient[t] = real(sum);
}

// x at column w of the row that starts at pixel `start`; anything where that is padding.
fn load_x(start: u32, w: u32, channel: u32) -> vec4<f32> {
    return vec4<f32>(x4[(start + min(w, W - 1u)) * (C / 4u) + channel]);
}

fn store_y(row: u32, ow: u32, channel: u32, sum: vec4<f32>) {
    if ow >= OW {
        return;
    }
    var v = sum;
    if BIAS {
        v += vec4<f32>(parameters4[KH * KW * (C / 4u) + channel]);
    }
    if RELU {
        v = select(v, vec4<f32>(), (v <= vec4<f32>()) & !is_nan4(v));
    }
    y4[(row * OW + ow) * (C / 4u) + channel] = vec4<real>(v);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn grouped_forward4(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let C4 = C / 4u;
    let fours = (OW + 3u) / 4u;
    if t >= N * OH * fours * C4 {
        return;
    }
    let channel = t % C4;
    let ow = (t / C4) % fours * 4u;
    let row = t / (C4 * fours);
    var s0 = vec4<f32>();
    var s1 = vec4<f32>();
    var s2 = vec4<f32>();
    var s3 = vec4<f32>();
    for (var kh = 0u; kh < KH; kh++) {
        // Unsigned arithmetic wraps: coordinates left of or above the image become huge.
        let h = row % OH * SH + kh * DH - PH;
        if h >= H {
            continue;
        }
        let start = (row / OH * H + h) * W;
        var x0: vec4<f32>;
        var x1: vec4<f32>;
        var x2: vec4<f32>;
        var x3: vec4<f32>;
        for (var kw = 0u; kw < KW; kw++) {
            let w = ow * SW + kw * DW - PW;
            if kw == 0u || SW != DW {
                x0 = load_x(start, w, channel);
                x1 = load_x(start, w + SW, channel);
                x2 = load_x(start, w + 2u * SW, channel);
            } else {
                x0 = x1;
                x1 = x2;
                x2 = x3;
            }
            x3 = load_x(start, w + 3u * SW, channel);
            let weight = vec4<f32>(parameters4[(kh * KW + kw) * C4 + channel]);
            s0 = select(s0, s0 + x0 * weight, w < W);
            s1 = select(s1, s1 + x1 * weight, w + SW < W);
            s2 = select(s2, s2 + x2 * weight, w + 2u * SW < W);
            s3 = select(s3, s3 + x3 * weight, w + 3u * SW < W);
        }
    }
    store_y(row, ow, channel, s0);
    store_y(row, ow + 1u, channel, s1);
    store_y(row, ow + 2u, channel, s2);
    store_y(row, ow + 3u, channel, s3);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn grouped_backward_weight4(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let C4 = C / 4u;
    let fours = (KW + 3u) / 4u;
    let places = KH * fours;
    if t >= CHUNKS * places * C4 {
        return;
    }
    let channel = t % C4;
    let place = (t / C4) % places;
    let chunk = t / (C4 * places);
    let kh = place / fours;
    let kw = place % fours * 4u;
    let per_chunk = (N * OH + CHUNKS - 1u) / CHUNKS;
    let end = min((chunk + 1u) * per_chunk, N * OH);
    var s0 = vec4<f32>();
    var s1 = vec4<f32>();
    var s2 = vec4<f32>();
    var s3 = vec4<f32>();
    var bias = vec4<f32>();
    for (var row = chunk * per_chunk; row < end; row++) {
        let h = row % OH * SH + kh * DH - PH;
        let start = (row / OH * H + min(h, H - 1u)) * W;
        var x0: vec4<f32>;
        var x1: vec4<f32>;
        var x2: vec4<f32>;
        var x3: vec4<f32>;
        for (var ow = 0u; ow < OW; ow++) {
            let gradient = vec4<f32>(output_gradient4[(row * OW + ow) * C4 + channel]);
            bias += gradient;
            let w = ow * SW + kw * DW - PW;
            if ow == 0u || SW != DW {
                x0 = load_x(start, w, channel);
                x1 = load_x(start, w + DW, channel);
                x2 = load_x(start, w + 2u * DW, channel);
            } else {
                x0 = x1;
                x1 = x2;
                x2 = x3;
            }
            x3 = load_x(start, w + 3u * DW, channel);
            s0 = select(s0, s0 + x0 * gradient, h < H && w < W);
            s1 = select(s1, s1 + x1 * gradient, h < H && w + DW < W);
            s2 = select(s2, s2 + x2 * gradient, h < H && w + 2u * DW < W);
            s3 = select(s3, s3 + x3 * gradient, h < H && w + 3u * DW < W);
        }
    }
    let first = chunk * (KH * KW + select(0u, 1u, BIAS));
    let at = (first + kh * KW + kw) * C4 + channel;
    partials4[at] = s0;
    if kw + 1u < KW { partials4[at + C4] = s1; }
    if kw + 2u < KW { partials4[at + 2u * C4] = s2; }
    if kw + 3u < KW { partials4[at + 3u * C4] = s3; }
    if BIAS && place == 0u { partials4[(first + KH * KW) * C4 + channel] = bias; }
}

// dy where `across` = ow·SW in the row that starts at position `start`; anything where no ow is that.
fn load_dy(start: u32, across: u32, channel: u32) -> vec4<f32> {
    return vec4<f32>(output_gradient4[(start + min(across / SW, OW - 1u)) * (C / 4u) + channel]);
}

fn reaches(across: u32) -> bool {
    return across % SW == 0u && across / SW < OW;
}

fn store_dx(row: u32, w: u32, channel: u32, sum: vec4<f32>) {
    if w >= W {
        return;
    }
    let at = (row * W + w) * (C / 4u) + channel;
    var v = sum;
    if MASK {
        v = select(vec4<f32>(), v, (vec4<f32>(activation4[at]) > vec4<f32>()) | is_nan4(vec4<f32>(activation4[at])));
    }
    input_gradient4[at] = vec4<real>(v);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn grouped_backward_input4(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let C4 = C / 4u;
    let fours = (W + 3u) / 4u;
    if t >= N * H * fours * C4 {
        return;
    }
    let channel = t % C4;
    let w = (t / C4) % fours * 4u;
    let row = t / (C4 * fours);
    var s0 = vec4<f32>();
    var s1 = vec4<f32>();
    var s2 = vec4<f32>();
    var s3 = vec4<f32>();
    for (var kh = 0u; kh < KH; kh++) {
        let down = row % H + PH - kh * DH;
        if down % SH != 0u || down / SH >= OH {
            continue;
        }
        let start = (row / H * OH + down / SH) * OW;
        var g0: vec4<f32>;
        var g1: vec4<f32>;
        var g2: vec4<f32>;
        var g3: vec4<f32>;
        for (var kw = 0u; kw < KW; kw++) {
            // The windows slide backwards, by DW.
            let across = w + PW - kw * DW;
            if kw == 0u || DW != 1u {
                g1 = load_dy(start, across + 1u, channel);
                g2 = load_dy(start, across + 2u, channel);
                g3 = load_dy(start, across + 3u, channel);
            } else {
                g3 = g2;
                g2 = g1;
                g1 = g0;
            }
            g0 = load_dy(start, across, channel);
            let weight = vec4<f32>(parameters4[(kh * KW + kw) * C4 + channel]);
            s0 = select(s0, s0 + g0 * weight, reaches(across));
            s1 = select(s1, s1 + g1 * weight, reaches(across + 1u));
            s2 = select(s2, s2 + g2 * weight, reaches(across + 2u));
            s3 = select(s3, s3 + g3 * weight, reaches(across + 3u));
        }
    }
    store_dx(row, w, channel, s0);
    store_dx(row, w + 1u, channel, s1);
    store_dx(row, w + 2u, channel, s2);
    store_dx(row, w + 3u, channel, s3);
}
