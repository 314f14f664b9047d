// Max- and mean-pooling over windows of KH×KW at steps of SH×SW, without padding.
//
//   maxpool2d:   y[n,oh,ow,c] = max over (kh,kw) of x[n, oh·SH + kh, ow·SW + kw, c]
//                dx = the gradients of the windows whose maximum stands there, added up
//   meanpool2d:  y[n,oh,ow,c] = Σ over (kh,kw) of x[n, oh·SH + kh, ow·SW + kw, c] / (KH·KW)
//                dx = the gradients of the windows that contain the position, added up, / (KH·KW)
//
// The index of a maximum is its place kh·KW + kw inside the window; of equal values the first in
// row-major order wins, and a NaN beats every number (of several the last), as in PyTorch. The
// whole gradient of a window goes to its winner.
// With MASK the gradient passes only where the ReLU fused into the layer before passed its input:
// everywhere but where y ≤ 0 for max-pooling (y *is* the winner's value), x ≤ 0 for mean-pooling; so
// at a NaN too.
//
// Layout: x and dx [N,H,W,C]; y and dy [N,OH,OW,C]; index as y but one byte each, four to a word,
// lowest byte first, hence KH·KW ≤ 256.
// maxpool2d_forward: one invocation computes four consecutive elements of y, one word of index.
// maxpool2d_backward: for windows that do not overlap; one invocation per element of dy, which
//   fills its own region of dx: the window, the gap up to the next one, and at the last windows
//   what is left of the image. Every element of dx belongs to exactly one region.
// maxpool2d_backward4: the same, four channels an invocation, where channels come in fours.
// All others: one invocation computes one element of the output; the backward kernels gather over
//   the windows in row-major order, so that no two invocations add to the same place.
// Forward writes y (and index), backward writes dx.
// CPU twins: maxpool2d_forward, maxpool2d_backward (of maxpool2d_backward4 too),
// maxpool2d_backward_overlapping, meanpool2d_forward, meanpool2d_backward in src/cpu/pool.rs.
// Maths: Goodfellow, Bengio, Courville (2016), "Deep Learning", 9.3; torch.nn.functional.max_pool2d
// and avg_pool2d for ties, NaN and remainders.

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
override MASK: bool = false;

const WORKGROUP_SIZE = 64u;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@group(0) @binding(2) var<storage, read_write> index: array<u32>;
@group(0) @binding(3) var<storage, read> output_gradient: array<f32>;  // dy
@group(0) @binding(4) var<storage, read> winner: array<u32>;  // the index, read back
@group(0) @binding(5) var<storage, read> activation: array<f32>;  // what MASK looks at
@group(0) @binding(6) var<storage, read_write> input_gradient: array<f32>;  // dx
// The gradients and the activation four channels at a time.
@group(0) @binding(7) var<storage, read> output_gradient4: array<vec4<f32>>;
@group(0) @binding(8) var<storage, read> activation4: array<vec4<f32>>;
@group(0) @binding(9) var<storage, read_write> input_gradient4: array<vec4<f32>>;

// The windows along one axis that contain position `at`: from `first` to before `end`.
struct Windows { first: u32, end: u32 }

fn windows(at: u32, size: u32, stride: u32, count: u32) -> Windows {
    var first = 0u;
    if at >= size {
        first = (at - size) / stride + 1u;
    }
    return Windows(first, min(at / stride + 1u, count));
}

// By its bits, because a compiler may take it that no comparison meets a NaN.
fn is_nan(value: f32) -> bool {
    return (bitcast<u32>(value) & 0x7fffffffu) > 0x7f800000u;
}

// Where the ReLU before passed its input.
fn passed(value: f32) -> bool {
    return value > 0.0 || is_nan(value);
}

fn winner_of(element: u32) -> u32 {
    return (winner[element / 4u] >> (8u * (element % 4u))) & 0xffu;
}

// The gradient of an element of y, or nothing where the ReLU before it passed nothing.
fn pooled_gradient(element: u32) -> f32 {
    var gradient = output_gradient[element];
    if MASK {
        gradient = select(0.0, gradient, passed(activation[element]));
    }
    return gradient;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn maxpool2d_forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if t * 4u >= N * OH * OW * C {
        return;
    }
    var word = 0u;
    for (var part = 0u; part < 4u; part++) {
        let element = t * 4u + part;
        if element >= N * OH * OW * C {
            break;
        }
        let c = element % C;
        let ow = (element / C) % OW;
        let oh = (element / (C * OW)) % OH;
        let n = element / (C * OW * OH);
        let corner = ((n * H + oh * SH) * W + ow * SW) * C + c;
        var best = x[corner];
        var place = 0u;
        for (var kh = 0u; kh < KH; kh++) {
            for (var kw = 0u; kw < KW; kw++) {
                let value = x[corner + (kh * W + kw) * C];
                if is_nan(value) || (value > best && !is_nan(best)) {
                    best = value;
                    place = kh * KW + kw;
                }
            }
        }
        y[element] = best;
        word |= place << (8u * part);
    }
    index[t] = word;
}

// What belongs to the window at `position` = (n·OH + oh)·OW + ow: rows h to before end_h and columns
// w to before end_w of image n.
struct Region { n: u32, h: u32, w: u32, end_h: u32, end_w: u32 }

fn region(position: u32) -> Region {
    let ow = position % OW;
    let oh = (position / OW) % OH;
    let end_h = select((oh + 1u) * SH, H, oh + 1u == OH);
    let end_w = select((ow + 1u) * SW, W, ow + 1u == OW);
    return Region(position / (OW * OH), oh * SH, ow * SW, end_h, end_w);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn maxpool2d_backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if t >= N * OH * OW * C {
        return;
    }
    let r = region(t / C);
    let gradient = pooled_gradient(t);
    let place = winner_of(t);
    for (var h = r.h; h < r.end_h; h++) {
        for (var w = r.w; w < r.end_w; w++) {
            let won = h == r.h + place / KW && w == r.w + place % KW;
            input_gradient[((r.n * H + h) * W + w) * C + t % C] = select(0.0, gradient, won);
        }
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn maxpool2d_backward4(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let C4 = C / 4u;
    if t >= N * OH * OW * C4 {
        return;
    }
    let r = region(t / C4);
    var gradient = output_gradient4[t];
    if MASK {
        let a = activation4[t];
        let passes = vec4<bool>(passed(a.x), passed(a.y), passed(a.z), passed(a.w));
        gradient = select(vec4<f32>(), gradient, passes);
    }
    let place = (vec4<u32>(winner[t]) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(0xffu);
    for (var h = r.h; h < r.end_h; h++) {
        for (var w = r.w; w < r.end_w; w++) {
            let won = (vec4<u32>(h - r.h) == place / KW) & (vec4<u32>(w - r.w) == place % KW);
            input_gradient4[((r.n * H + h) * W + w) * C4 + t % C4] = select(vec4<f32>(), gradient, won);
        }
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn maxpool2d_backward_overlapping(
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
    let rows = windows(h, KH, SH, OH);
    let columns = windows(w, KW, SW, OW);
    var sum = 0.0;
    for (var oh = rows.first; oh < rows.end; oh++) {
        for (var ow = columns.first; ow < columns.end; ow++) {
            let element = ((n * OH + oh) * OW + ow) * C + c;
            if winner_of(element) == (h - oh * SH) * KW + (w - ow * SW) {
                sum += pooled_gradient(element);
            }
        }
    }
    input_gradient[t] = sum;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn meanpool2d_forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if t >= N * OH * OW * C {
        return;
    }
    let c = t % C;
    let ow = (t / C) % OW;
    let oh = (t / (C * OW)) % OH;
    let n = t / (C * OW * OH);
    let corner = ((n * H + oh * SH) * W + ow * SW) * C + c;
    var sum = 0.0;
    for (var kh = 0u; kh < KH; kh++) {
        for (var kw = 0u; kw < KW; kw++) {
            sum += x[corner + (kh * W + kw) * C];
        }
    }
    y[t] = sum / f32(KH * KW);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn meanpool2d_backward(
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
    let rows = windows(h, KH, SH, OH);
    let columns = windows(w, KW, SW, OW);
    var sum = 0.0;
    for (var oh = rows.first; oh < rows.end; oh++) {
        for (var ow = columns.first; ow < columns.end; ow++) {
            sum += output_gradient[((n * OH + oh) * OW + ow) * C + c];
        }
    }
    if MASK {
        sum = select(0.0, sum, passed(activation[t]));
    }
    input_gradient[t] = sum / f32(KH * KW);
}
