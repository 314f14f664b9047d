// Max- and mean-pooling over windows of KH×KW at steps of SH×SW. The first windows begin PH rows above
// and PW columns left of the image, and the last ones may reach beyond it too.
//
//   maxpool2d:   y[n,oh,ow,c] = max over (kh,kw) of x[n, oh·SH + kh − PH, ow·SW + kw − PW, c]
//                dx = the gradients of the windows whose maximum stands there, added up
//   meanpool2d:  y[n,oh,ow,c] = Σ over (kh,kw) of x[n, oh·SH + kh − PH, ow·SW + kw − PW, c] / D(oh,ow)
//                dx = the gradients of the windows that contain the position, each / D(oh,ow), added up
//
// Both go over the places (kh,kw) that lie on the image; every window has one. D counts the window's
// places in rows FH to before LH and columns FW to before LW, which like oh·SH + kh are counted from
// the first row and column of the padding; where that makes KH·KW for all, it stands in DIVISOR (else
// that is 0). Without PADDED every window lies on the image.
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
// All others: one invocation computes one element of the output; the backward kernels gather over
//   the windows in row-major order, so that no two invocations add to the same place.
// Those that end in 4: the same, four channels an invocation, where channels come in fours.
// Forward writes y (and index), backward writes dx.
// CPU twins: maxpool2d_forward, maxpool2d_backward, maxpool2d_backward_overlapping,
// meanpool2d_forward, meanpool2d_backward in src/cpu/pool.rs, of those that end in 4 too.
// Maths: Goodfellow, Bengio, Courville (2016), "Deep Learning", 9.3; torch.nn.functional.max_pool2d
// and avg_pool2d for ties, NaN, padding, what a mean is divided by, and remainders.

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
override PADDED: bool = false;
override PH: u32 = 0;
override PW: u32 = 0;
override FH: u32 = 0;
override LH: u32 = 0;
override FW: u32 = 0;
override LW: u32 = 0;
override DIVISOR: u32 = 0;
override MASK: bool = false;

const WORKGROUP_SIZE = 64u;

@group(0) @binding(0) var<storage, read> x: array<real>;
@group(0) @binding(1) var<storage, read_write> y: array<real>;
@group(0) @binding(2) var<storage, read_write> index: array<u32>;
@group(0) @binding(3) var<storage, read> output_gradient: array<real>;  // dy
@group(0) @binding(4) var<storage, read> winner: array<u32>;  // the index, read back
@group(0) @binding(5) var<storage, read> activation: array<real>;  // what MASK looks at
@group(0) @binding(6) var<storage, read_write> input_gradient: array<real>;  // dx
// Values four channels at a time.
@group(0) @binding(7) var<storage, read> output_gradient4: array<vec4<real>>;
@group(0) @binding(8) var<storage, read> activation4: array<vec4<real>>;
@group(0) @binding(9) var<storage, read_write> input_gradient4: array<vec4<real>>;
@group(0) @binding(10) var<storage, read> x4: array<vec4<real>>;
@group(0) @binding(11) var<storage, read_write> y4: array<vec4<real>>;

// From `first` to before `end`.
struct Span { first: u32, end: u32 }

// The windows along one axis that contain position `at`, counted from the first of the padding.
fn windows(at: u32, size: u32, stride: u32, count: u32) -> Span {
    var first = 0u;
    if at >= size {
        first = (at - size) / stride + 1u;
    }
    return Span(first, min(at / stride + 1u, count));
}

// The places along one axis of the window that begins at `start` which lie from `first` to before
// `end`; both are counted from the first of the padding.
fn places(start: u32, size: u32, first: u32, end: u32) -> Span {
    if !PADDED {
        return Span(0u, size);
    }
    return Span(max(start, first) - start, min(start + size, end) - start);
}

fn rows_of(oh: u32) -> Span {
    return places(oh * SH, KH, PH, PH + H);
}

fn columns_of(ow: u32) -> Span {
    return places(ow * SW, KW, PW, PW + W);
}

// What the mean of a window is divided by.
fn divisor(oh: u32, ow: u32) -> f32 {
    if DIVISOR > 0u {
        return f32(DIVISOR);
    }
    let rows = places(oh * SH, KH, FH, LH);
    let columns = places(ow * SW, KW, FW, LW);
    return f32((rows.end - rows.first) * (columns.end - columns.first));
}

// Pixel (oh·SH − PH, ow·SW − PW) of image n, where its window begins. Modulo 2³² where that lies
// before the image; the step to a place that does not brings it back.
fn corner_of(n: u32, oh: u32, ow: u32) -> u32 {
    return (n * H + oh * SH - PH) * W + ow * SW - PW;
}

// By its bits, because a compiler may take it that no comparison meets a NaN.
fn is_nan(value: f32) -> bool {
    return (bitcast<u32>(value) & 0x7fffffffu) > 0x7f800000u;
}

// Where the ReLU before passed its input.
fn passed(value: f32) -> bool {
    return value > 0.0 || is_nan(value);
}

fn passed4(value: vec4<f32>) -> vec4<bool> {
    return (value > vec4<f32>()) | is_nan4(value);
}

fn is_nan4(value: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(value) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
}

fn winner_of(element: u32) -> u32 {
    return (winner[element / 4u] >> (8u * (element % 4u))) & 0xffu;
}

// The gradient of an element of y, or nothing where the ReLU before it passed nothing.
fn pooled_gradient(element: u32) -> f32 {
    var gradient = f32(output_gradient[element]);
    if MASK {
        gradient = select(0.0, gradient, passed(f32(activation[element])));
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
        let corner = corner_of(n, oh, ow) * C + c;
        let rows = rows_of(oh);
        let columns = columns_of(ow);
        var best = f32(x[corner + (rows.first * W + columns.first) * C]);
        var place = rows.first * KW + columns.first;
        for (var kh = rows.first; kh < rows.end; kh++) {
            for (var kw = columns.first; kw < columns.end; kw++) {
                let value = f32(x[corner + (kh * W + kw) * C]);
                if is_nan(value) || (value > best && !is_nan(best)) {
                    best = value;
                    place = kh * KW + kw;
                }
            }
        }
        y[element] = real(best);
        word |= place << (8u * part);
    }
    index[t] = word;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn maxpool2d_forward4(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let C4 = C / 4u;
    if t >= N * OH * OW * C4 {
        return;
    }
    let ow = (t / C4) % OW;
    let oh = (t / (C4 * OW)) % OH;
    let corner = corner_of(t / (C4 * OW * OH), oh, ow) * C4 + t % C4;
    let rows = rows_of(oh);
    let columns = columns_of(ow);
    var best = vec4<f32>(x4[corner + (rows.first * W + columns.first) * C4]);
    var place = vec4<u32>(rows.first * KW + columns.first);
    for (var kh = rows.first; kh < rows.end; kh++) {
        for (var kw = columns.first; kw < columns.end; kw++) {
            let value = vec4<f32>(x4[corner + (kh * W + kw) * C4]);
            let wins = is_nan4(value) | ((value > best) & !is_nan4(best));
            best = select(best, value, wins);
            place = select(place, vec4<u32>(kh * KW + kw), wins);
        }
    }
    y4[t] = vec4<real>(best);
    index[t] = place.x | (place.y << 8u) | (place.z << 16u) | (place.w << 24u);
}

// What belongs to the window at `position` = (n·OH + oh)·OW + ow: rows h to before end_h and columns
// w to before end_w of image n. Counted from the first of the padding, the window begins at (top,left).
struct Region { n: u32, h: u32, w: u32, end_h: u32, end_w: u32, top: u32, left: u32 }

fn region(position: u32) -> Region {
    let ow = position % OW;
    let oh = (position / OW) % OH;
    let end_h = select((oh + 1u) * SH - PH, H, oh + 1u == OH);
    let end_w = select((ow + 1u) * SW - PW, W, ow + 1u == OW);
    let top = oh * SH;
    let left = ow * SW;
    return Region(position / (OW * OH), max(top, PH) - PH, max(left, PW) - PW, end_h, end_w, top, left);
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
            let won = h + PH == r.top + place / KW && w + PW == r.left + place % KW;
            input_gradient[((r.n * H + h) * W + w) * C + t % C] = real(select(0.0, gradient, won));
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
    var gradient = vec4<f32>(output_gradient4[t]);
    if MASK {
        gradient = select(vec4<f32>(), gradient, passed4(vec4<f32>(activation4[t])));
    }
    let place = (vec4<u32>(winner[t]) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(0xffu);
    for (var h = r.h; h < r.end_h; h++) {
        for (var w = r.w; w < r.end_w; w++) {
            let won = (vec4<u32>(h + PH - r.top) == place / KW) & (vec4<u32>(w + PW - r.left) == place % KW);
            input_gradient4[((r.n * H + h) * W + w) * C4 + t % C4] = vec4<real>(select(vec4<f32>(), gradient, won));
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
    let rows = windows(h + PH, KH, SH, OH);
    let columns = windows(w + PW, KW, SW, OW);
    var sum = 0.0;
    for (var oh = rows.first; oh < rows.end; oh++) {
        for (var ow = columns.first; ow < columns.end; ow++) {
            let element = ((n * OH + oh) * OW + ow) * C + c;
            if winner_of(element) == (h + PH - oh * SH) * KW + (w + PW - ow * SW) {
                sum += pooled_gradient(element);
            }
        }
    }
    input_gradient[t] = real(sum);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn maxpool2d_backward_overlapping4(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let C4 = C / 4u;
    if t >= N * H * W * C4 {
        return;
    }
    let w = (t / C4) % W;
    let h = (t / (C4 * W)) % H;
    let n = t / (C4 * W * H);
    let rows = windows(h + PH, KH, SH, OH);
    let columns = windows(w + PW, KW, SW, OW);
    var sum = vec4<f32>();
    for (var oh = rows.first; oh < rows.end; oh++) {
        for (var ow = columns.first; ow < columns.end; ow++) {
            let element = ((n * OH + oh) * OW + ow) * C4 + t % C4;
            let place = (vec4<u32>(winner[element]) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(0xffu);
            var won = place == vec4<u32>((h + PH - oh * SH) * KW + (w + PW - ow * SW));
            if MASK {
                won &= passed4(vec4<f32>(activation4[element]));
            }
            sum += select(vec4<f32>(), vec4<f32>(output_gradient4[element]), won);
        }
    }
    input_gradient4[t] = vec4<real>(sum);
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
    let corner = corner_of(t / (C * OW * OH), oh, ow) * C + c;
    let rows = rows_of(oh);
    let columns = columns_of(ow);
    var sum = 0.0;
    for (var kh = rows.first; kh < rows.end; kh++) {
        for (var kw = columns.first; kw < columns.end; kw++) {
            sum += f32(x[corner + (kh * W + kw) * C]);
        }
    }
    y[t] = real(sum / divisor(oh, ow));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn meanpool2d_forward4(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let C4 = C / 4u;
    if t >= N * OH * OW * C4 {
        return;
    }
    let ow = (t / C4) % OW;
    let oh = (t / (C4 * OW)) % OH;
    let corner = corner_of(t / (C4 * OW * OH), oh, ow) * C4 + t % C4;
    let rows = rows_of(oh);
    let columns = columns_of(ow);
    var sum = vec4<f32>();
    for (var kh = rows.first; kh < rows.end; kh++) {
        for (var kw = columns.first; kw < columns.end; kw++) {
            sum += vec4<f32>(x4[corner + (kh * W + kw) * C4]);
        }
    }
    y4[t] = vec4<real>(sum / divisor(oh, ow));
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
    let rows = windows(h + PH, KH, SH, OH);
    let columns = windows(w + PW, KW, SW, OW);
    var sum = 0.0;
    for (var oh = rows.first; oh < rows.end; oh++) {
        for (var ow = columns.first; ow < columns.end; ow++) {
            var gradient = f32(output_gradient[((n * OH + oh) * OW + ow) * C + c]);
            if DIVISOR == 0u {
                gradient /= divisor(oh, ow);
            }
            sum += gradient;
        }
    }
    if MASK {
        sum = select(0.0, sum, passed(f32(activation[t])));
    }
    if DIVISOR > 0u {
        sum /= f32(DIVISOR);
    }
    input_gradient[t] = real(sum);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn meanpool2d_backward4(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let C4 = C / 4u;
    if t >= N * H * W * C4 {
        return;
    }
    let w = (t / C4) % W;
    let h = (t / (C4 * W)) % H;
    let n = t / (C4 * W * H);
    let rows = windows(h + PH, KH, SH, OH);
    let columns = windows(w + PW, KW, SW, OW);
    var sum = vec4<f32>();
    for (var oh = rows.first; oh < rows.end; oh++) {
        for (var ow = columns.first; ow < columns.end; ow++) {
            var gradient = vec4<f32>(output_gradient4[((n * OH + oh) * OW + ow) * C4 + t % C4]);
            if DIVISOR == 0u {
                gradient /= divisor(oh, ow);
            }
            sum += gradient;
        }
    }
    if MASK {
        sum = select(vec4<f32>(), sum, passed4(vec4<f32>(activation4[t])));
    }
    if DIVISOR > 0u {
        sum /= f32(DIVISOR);
    }
    input_gradient4[t] = vec4<real>(sum);
}
