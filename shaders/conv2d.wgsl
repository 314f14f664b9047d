{#- A template: rendered by src/kernels/conv2d.rs with the shapes and a tile. `wgrad verify --dump DIR` writes the rendered texts. -#}
// Convolution (cross-correlation) as an implicit matrix product: the im2col matrix is never stored,
// the tile loader computes its index. A dense layer is the case of a 1×1 image under a 1×1 kernel.
//
//   forward          y  = im2col(x) · W + b, then max(0, ·) where RELU is fused   M = N·OH·OW, K = KH·KW·C
//   backward_weight  dW = im2col(x)ᵀ · dy, db = 1ᵀ · dy                           M = KH·KW·C + 1, K = N·OH·OW
//   backward_input   dx = the transposed convolution of dy with W                M = N·H·W, K = KH·KW·OC
//
// Layout: x [N,H,W,C], y and dy [N,OH,OW,OC], W [KH,KW,C,OC] followed by b [OC]: one matrix of
// KH·KW·C + 1 rows, the last of which meets a column of ones in the weight gradient.
// One subgroup (or workgroup, or invocation: the families differ in that alone) computes one tile
// of the result; columns are handled four at a time. Writes its output, adds to nothing; the weight
// gradient writes one partial sum per split, added up in order by `reduce_splits`.
// Rows (image positions) run over the batch first: the rows of a tile mostly stand at the same place
// of different images, so a whole tile can skip the taps that lie in the padding.
// With POOL the forward pass ends in the max-pooling that follows it: the rows of a window lie
// together in one invocation, only the maximum and its index (see pool.wgsl) are written.
// A term that lies in the padding (for the input gradient: a tap that does not reach the position)
// contributes nothing, whatever it would meet. A tile multiplies it by a zero instead, which makes a
// NaN of an infinite or NaN factor: an invocation that finds a NaN among its sums redoes them term by
// term, so that finite numbers pay only for looking. Terms past K are zeros on both sides.
// Sums are made in f32 whatever is stored.
// CPU twins: conv2d_forward, conv2d_backward_weight, conv2d_backward_input in src/cpu/conv2d.rs.
// Maths: Chellapilla, Puri, Simard (2006), "High Performance Convolutional Neural Networks for
// Document Processing"; Dumoulin & Visin (2016), "A guide to convolution arithmetic".
{% if not bias -%}
// This layer has no bias: neither the last row of the matrix nor the column of ones is there.
{% endif -%}
{% set weight_pass = pass == "conv2d_backward_weight" %}
{%- set input_pass = pass == "conv2d_backward_input" %}
{#- The row of the weight gradient behind those of the weight is the bias's, where there is one. -#}
{%- set taps = "(M - 1u)" if bias else "M" %}
{% if family == "subgroup" -%}
// A workgroup is one subgroup here, so what subgroupAny() gives is the same in all of it and the
// broadcasts after it are uniform; but that is no part of WGSL's uniformity analysis.
diagnostic(off, subgroup_uniformity);
{% endif -%}
{% if half -%}
enable f16;
{% endif -%}
{% if family == "matrix" -%}
enable wgpu_cooperative_matrix;
{% endif %}const N = {{ n }}u;
const H = {{ h }}u;   const W = {{ w }}u;   const IC = {{ c }}u;  // C itself means something where matrices are cooperative
const OH = {{ oh }}u; const OW = {{ ow }}u; const OC = {{ oc }}u;
const KH = {{ kh }}u; const KW = {{ kw }}u;
const SH = {{ sh }}u; const SW = {{ sw }}u;
const PH = {{ ph }}u; const PW = {{ pw }}u;
{% if dilated -%}
const DH = {{ dh }}u; const DW = {{ dw }}u;  // from one tap to the next
{% endif -%}
// The product: M rows, K terms per sum, COLUMNS columns.
{% if pool -%}
const POOL_H = {{ pool_h }}u; const POOL_W = {{ pool_w }}u; const WINDOWS_H = {{ windows_h }}u; const WINDOWS_W = {{ windows_w }}u;
{% endif -%}
const M = {{ m }}u;   const K = {{ k }}u;   const COLUMNS = {{ columns }}u;
{% if bias_apart -%}
// The tiles have all rows but the bias's, which the first ones sum up beside theirs.
{% endif -%}
const ROWS = {{ "M - 1u" if bias_apart else "M" }};
const COLUMNS4 = {{ columns4 }}u;
// Terms in fours (rows in fours for the weight gradient, whose loader runs along the rows).
const CHUNKS = {{ chunks }}u;

// What activations and weights are stored as: f16 in mixed precision.
alias real = {{ "f16" if half else "f32" }};
// What the loaders give: what a tile keeps.
alias loaded = {{ "real" if family == "matrix" else "f32" }};
{% set scalar = "real" -%}
{% set vector = "vec4<real>" -%}
{% set four = "vec2<u64>" if words64 else vector -%}
@group(0) @binding(0) var<storage, read> a_source: array<{{ four if a4 else scalar }}>;  // {{ "dy" if input_pass else "x" }}
@group(0) @binding(1) var<storage, read> b_source: array<{{ four if b4 else scalar }}>;  // {{ "dy" if weight_pass else ("W and b" if bias else "W") }}
@group(0) @binding(2) var<storage, read_write> result: array<{{ ("vec4<f32>" if o4 else "f32") if weight_pass else (vector if o4 else scalar) }}>;  // {{ "the gradient by x" if input_pass else (("partial dW and db" if bias else "partial dW") if weight_pass else "y") }}
{% if input_pass and relu -%}
@group(0) @binding(3) var<storage, read> activation: array<{{ vector if o4 else scalar }}>;  // x, whose layer ended in ReLU
{% endif -%}
{% if pool -%}
@group(0) @binding(3) var<storage, read_write> index: array<u32>;  // of the maxima, one byte each
{% endif %}
{#- ── Where a row (an image position) starts, and how far a chunk of four terms is from there. ── #}
{% set wide = "u32" if a4 else "vec4<u32>" -%}
{% set per = "/ 4u" if a4 else "" -%}
{% set a_channels = "OC" if input_pass else "IC" -%}
{% set numbers = "floats" if words64 else "vec4<loaded>" -%}
{% if words64 and (a4 or b4) -%}
// Two words of 64 bits as four floats.
fn floats(words: vec2<u64>) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(u32(words.x), u32(words.x >> 32u), u32(words.y), u32(words.y >> 32u)));
}

{% endif -%}
struct Row { base: u32, y: u32, x: u32 }
struct Chunk { offset: {{ wide }}, y: {{ wide }}, x: {{ wide }}{% if guard_chunk %}, live: {{ "bool" if a4 else "vec4<bool>" }}{% endif %} }

// Unsigned arithmetic wraps, so "negative" coordinates in the padding become huge and fail `< size`.
fn row(m: u32) -> Row {
    let p = {% if exact %}m{% else %}min(m, {{ "N * OH * OW" if weight_pass else "M" }} - 1u){% endif %};
{%- if input_pass %}
    let n = p % N;
    let y = p / (N * W) + PH;
    let x = (p / N) % W + PW;
  {%- if unit_stride %}
    return Row(((n * OH + y) * OW + x) * (OC {{ per }}), y, x);
  {%- else %}
    return Row(n * OH * OW * (OC {{ per }}), y, x);
  {%- endif %}
{%- elif weight_pass %}
    let n = p / (OH * OW);
    let y = ((p / OW) % OH) * SH - PH;
    let x = (p % OW) * SW - PW;
    return Row(((n * H + y) * W + x) * (IC {{ per }}), y, x);
{%- elif pool %}
    let place = p % (POOL_H * POOL_W);
    let window = p / (POOL_H * POOL_W);
    let n = window % N;
    let y = ((window / (N * WINDOWS_W)) * POOL_H + place / POOL_W) * SH - PH;
    let x = (((window / N) % WINDOWS_W) * POOL_W + place % POOL_W) * SW - PW;
    return Row(((n * H + y) * W + x) * (IC {{ per }}), y, x);
{%- else %}
    let n = p % N;
    let y = (p / (N * OW)) * SH - PH;
    let x = ((p / N) % OW) * SW - PW;
    return Row(((n * H + y) * W + x) * (IC {{ per }}), y, x);
{%- endif %}
}

{% if a4 -%}
// The chunk of a tap at the given of its channels, counted in fours.
fn chunk_at(tap: u32, channel4: u32{% if guard_chunk %}, live: bool{% endif %}) -> Chunk {
    let y = tap / KW{% if dilated %} * DH{% endif %};
    let x = tap % KW{% if dilated %} * DW{% endif %};
{%- if input_pass and not unit_stride %}
    let offset = channel4;
{%- elif input_pass %}
    let offset = channel4 - (y * OW + x) * (OC / 4u);
{%- else %}
    let offset = (y * W + x) * (IC / 4u) + channel4;
{%- endif %}
    return Chunk(offset, y, x{% if guard_chunk %}, live{% endif %});
}

fn chunk(q: u32) -> Chunk {
    let k = min(q, {{ taps if weight_pass else "K" }} / 4u - 1u) * 4u;
    return chunk_at(k / {{ a_channels }}, (k % {{ a_channels }}) / 4u{% if guard_chunk %}, q < {{ taps if weight_pass else "K" }} / 4u{% endif %});
}
{%- else -%}
fn chunk(q: u32) -> Chunk {
    let k = vec4<u32>(q * 4u, q * 4u + 1u, q * 4u + 2u, q * 4u + 3u);
    let tap = k / {{ a_channels }};
    let y = tap / KW{% if dilated %} * DH{% endif %};
    let x = tap % KW{% if dilated %} * DW{% endif %};
{%- if input_pass and not unit_stride %}
    let offset = k % OC;
{%- elif input_pass %}
    let offset = k % OC - (y * OW + x) * OC;
{%- else %}
    let offset = (y * W + x) * IC + k % IC;
{%- endif %}
    return Chunk(offset, y, x{% if guard_chunk %}, k < vec4<u32>({{ "K" if not weight_pass else ("M - 1u" if bias else "M") }}){% endif %});
}
{%- endif %}

{%- set one = "" if a4 else "vec4<u32>" %}
{%- set and = "&&" if a4 else "&" %}
{%- set guarded = input_pass or padded or guard_chunk or ragged %}
{%- set flag = "bool" if a4 else "vec4<bool>" %}
// Whether the chunk of this row lies in the image, not in the padding.
fn inside(r: Row, t: Chunk) -> {{ flag }} {
{%- if input_pass and not unit_stride %}
    let y = {{ one }}(r.y) - t.y;
    let x = {{ one }}(r.x) - t.x;
    return (y % SH == {{ one }}(0u)) {{ and }} (x % SW == {{ one }}(0u)) {{ and }} (y / SH < {{ one }}(OH)) {{ and }} (x / SW < {{ one }}(OW)){% if guard_chunk %} {{ and }} t.live{% endif %};
{%- elif input_pass %}
    return ({{ one }}(r.y) - t.y < {{ one }}(OH)) {{ and }} ({{ one }}(r.x) - t.x < {{ one }}(OW)){% if guard_chunk %} {{ and }} t.live{% endif %};
{%- elif padded %}
    return ({{ one }}(r.y) + t.y < {{ one }}(H)) {{ and }} ({{ one }}(r.x) + t.x < {{ one }}(W)){% if guard_chunk %} {{ and }} t.live{% endif %};
{%- elif guard_chunk %}
    return t.live;
{%- else %}
    return true;
{%- endif %}
}

// Four elements of the im2col matrix (of dy's for the input gradient), zeros where not inside.
fn load_a(r: Row, t: Chunk, live: {{ flag }}) -> vec4<loaded> {
{%- if input_pass and not unit_stride %}
    let at = r.base + (({{ one }}(r.y) - t.y) / SH * OW + ({{ one }}(r.x) - t.x) / SW) * (OC {{ per }}) + t.offset;
{%- else %}
    let at = r.base + t.offset;
{%- endif %}
{%- if guarded %}
    let safe = select({{ wide }}(0u), at, live);
{%- else %}
    let safe = at;
{%- endif %}
{%- if a4 %}
    let v = {{ numbers }}(a_source[safe]);
{%- else %}
    let v = vec4<loaded>(vec4<real>(a_source[safe.x], a_source[safe.y], a_source[safe.z], a_source[safe.w]));
{%- endif %}
    return {% if guarded %}select(vec4<loaded>(0.0), v, live){% else %}v{% endif %};
}

// By its bits, because a compiler may take it that no comparison meets a NaN.
fn is_nan(v: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(v) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
}

{% if weight_pass and bias and (by_formula or not bias_apart) %}
// The element of the column of ones that makes the bias gradient: row KH·KW·C of the result.
fn bias_row(q: u32) -> vec4<loaded> {
    return select(vec4<loaded>(0.0), vec4<loaded>(1.0), vec4<u32>(q * 4u) + vec4<u32>(0u, 1u, 2u, 3u) == vec4<u32>(M - 1u));
}
{% endif %}
{#- ── Four columns of one row of the right-hand matrix. ── #}
{% if not input_pass -%}
fn load_b(k: u32, column4: u32) -> vec4<loaded> {
    let q = min(column4, COLUMNS4 - 1u);
  {%- if b4 %}
    return {{ numbers }}(b_source[k * COLUMNS4 + q]);
  {%- else %}
    let first = k * COLUMNS;
    let at = vec4<u32>(first) + min(vec4<u32>(q * 4u) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(COLUMNS - 1u));
    return vec4<loaded>(vec4<real>(b_source[at.x], b_source[at.y], b_source[at.z], b_source[at.w]));
  {%- endif %}
}
{% endif -%}
{% if not weight_pass -%}
  {%- if input_pass %}
// Four terms of one column of the right-hand matrix, W read across its rows.
fn load_b_terms(q: u32, column: u32) -> vec4<loaded> {
    let c = min(column, IC - 1u);
    {%- if b4 %}
    let k = min(q, CHUNKS - 1u) * 4u;
    let v = {{ numbers }}(b_source[(k / OC) * IC * (OC / 4u) + (k % OC) / 4u + c * (OC / 4u)]);
    {%- else %}
    let terms = vec4<u32>(q * 4u, q * 4u + 1u, q * 4u + 2u, q * 4u + 3u);
    let k = min(terms, vec4<u32>(K - 1u));
    let at = (k / OC) * (IC * OC) + k % OC + c * OC;
    let v = vec4<loaded>(vec4<real>(b_source[at.x], b_source[at.y], b_source[at.z], b_source[at.w]));
    {%- endif %}
    return {% if not tail %}v{% elif b4 %}select(vec4<loaded>(0.0), v, q < CHUNKS){% else %}select(vec4<loaded>(0.0), v, terms < vec4<u32>(K)){% endif %};
}

  {% else %}
// Four columns of one term: zeros past the last{{ ", where the row of the bias lies" if bias }}.
fn load_b_term(k: u32, column4: u32) -> vec4<loaded> {
    return {% if tail %}select(vec4<loaded>(0.0), load_b(min(k, K{{ "" if bias else " - 1u" }}), column4), k < K){% else %}load_b(k, column4){% endif %};
}

  {% endif -%}
// The 4×4 block of W at four terms and four columns: one vec4 of columns per term.
fn load_b_block(q: u32, column4: u32) -> mat4x4<loaded> {
  {%- if input_pass %}
    // Along the terms in memory, along the columns in the product.
    return transpose(mat4x4<loaded>(
    {%- for e in range(4) %}
        load_b_terms(q, min(column4, COLUMNS4 - 1u) * 4u + {{ e }}u){{ "," if not loop.last }}
    {%- endfor %}
    ));
  {%- else %}
    return mat4x4<loaded>(
      {%- for e in range(4) %}
        load_b_term(q * 4u + {{ e }}u, column4){{ "," if not loop.last }}
      {%- endfor %}
    );
  {%- endif %}
}
{% endif %}
{% if pass == "conv2d_forward" %}
fn finish(value: vec4<f32>, column4: u32) -> vec4<f32> {
    let v = value{% if bias %} + vec4<f32>(load_b(K, column4));  // the bias{% else %};{% endif %}
  {%- if relu %}
    // Unlike max(), keeps NaN: the bits of the numbers below 0, from the first behind −0 to −∞.
    let below = (bitcast<vec4<u32>>(v) - vec4<u32>(0x80000001u)) < vec4<u32>(0x7f800000u);
    return select(v, vec4<f32>(0.0), below);
  {%- else %}
    return v;
  {%- endif %}
}
{% endif %}
{%- if pool %}
// The maximum of a window whose rows start at m, with its index: of equal values the first, and a
// NaN before every number (of several the last), as in pool.wgsl.
fn store_window(m: u32, column4: u32, {% for e in range(pool_h * pool_w) %}v{{ e }}: vec4<f32>{{ ", " if not loop.last }}{% endfor %}) {
    if (m >= M || column4 >= COLUMNS4) { return; }
    var best = finish(v0, column4);
    var place = vec4<u32>(0u);
  {%- for e in range(1, pool_h * pool_w) %}
    let f{{ e }} = finish(v{{ e }}, column4);
    let wins{{ e }} = is_nan(f{{ e }}) | ((f{{ e }} > best) & !is_nan(best));
    place = select(place, vec4<u32>({{ e }}u), wins{{ e }});
    best = select(best, f{{ e }}, wins{{ e }});
  {%- endfor %}
    let window = m / (POOL_H * POOL_W);
    let at = ((window % N) * (WINDOWS_H * WINDOWS_W) + window / N) * COLUMNS4 + column4;
    result[at] = vec4<real>(best);
    index[at] = place.x | (place.y << 8u) | (place.z << 16u) | (place.w << 24u);
}
{% else %}
  {%- if input_pass and relu %}
// Where the ReLU before passed its input on: everywhere but where it is ≤ 0, so at a NaN too.
fn passed(y: vec4<f32>) -> vec4<bool> {
    return (y > vec4<f32>(0.0)) | is_nan(y);
}
  {% endif %}
// Four columns of one row of the result, where the tiles have that row.
fn store(m: u32, column4: u32, value: vec4<f32>{% if weight_pass %}, split: u32{% endif %}) {
    if (m < ROWS) { store_row(m, column4, value{% if weight_pass %}, split{% endif %}); }
}

fn store_row(m: u32, column4: u32, value: vec4<f32>{% if weight_pass %}, split: u32{% endif %}) {
    if (column4 >= COLUMNS4) { return; }
{%- if weight_pass %}
    let row = split * M + m;
    let v = value;
{%- else %}
    let row = (m % N) * (M / N) + m / N;
  {%- if input_pass %}
    let v = value;
  {%- else %}
    let v = finish(value, column4);
  {%- endif %}
{%- endif %}
{%- if o4 %}
    let at = row * COLUMNS4 + column4;
    result[at] = {% if input_pass and relu %}vec4<real>(select(vec4<f32>(0.0), v, passed(vec4<f32>(activation[at])))){% else %}{{ "v" if weight_pass else "vec4<real>(v)" }}{% endif %};
{%- else %}
  {%- for e in range(4) %}
    if (column4 * 4u + {{ e }}u < COLUMNS) {
        let at = row * COLUMNS + column4 * 4u + {{ e }}u;
        result[at] = {% if input_pass and relu %}real(select(0.0, v[{{ e }}], passed(vec4<f32>(f32(activation[at]))).x)){% else %}{{ "v[" ~ e ~ "]" if weight_pass else "real(v[" ~ e ~ "])" }}{% endif %};
    }
  {%- endfor %}
{%- endif %}
}
{% endif %}
{#- ── The sums as the formula has them. ── #}
{% if by_formula -%}
{%- set early = family != "plain" -%}
  {%- if weight_pass %}
// Four rows of the result, from 4·q on, at four columns.
fn sums(q: u32, column4: u32, split: u32) -> mat4x4<f32> {
    let t = chunk(q);
{%- if bias %}
    let ones = bias_row(q);
{%- endif %}
    var c0 = vec4<f32>(0.0);
    var c1 = vec4<f32>(0.0);
    var c2 = vec4<f32>(0.0);
    var c3 = vec4<f32>(0.0);
    for (var p = split * {{ split_length }}u; p < min((split + 1u) * {{ split_length }}u, K); p++) {
        let r = row(p);
        let i = inside(r, t);
        let a = vec4<f32>({% if not bias %}load_a(r, t, i){% elif a4 %}select(load_a(r, t, i), ones, q >= (M - 1u) / 4u){% else %}load_a(r, t, i) + ones{% endif %});
        let b = vec4<f32>(load_b(p, column4));
    {%- if partial %}
        let counts = {% if not bias %}vec4<bool>(i){% elif a4 %}vec4<bool>(i || q >= (M - 1u) / 4u){% else %}i | (ones > vec4<loaded>(0.0)){% endif %};
      {%- for e in range(4) %}
        c{{ e }} += select(vec4<f32>(0.0), a[{{ e }}] * b, counts[{{ e }}]);
      {%- endfor %}
      {%- if early %}
        if (all(is_nan(c0) & is_nan(c1) & is_nan(c2) & is_nan(c3))) { break; }
      {%- endif %}
    {%- else %}
        c0 += a.x * b;
        c1 += a.y * b;
        c2 += a.z * b;
        c3 += a.w * b;
    {%- endif %}
    }
    return mat4x4<f32>(c0, c1, c2, c3);
}
  {%- else %}
// One row of the result at four columns.
fn sums(m: u32, column4: u32) -> vec4<f32> {
    let r = row(m);
    var c = vec4<f32>(0.0);
    for (var q = 0u; q < CHUNKS; q++) {
        let t = chunk(q);
        let i = inside(r, t);
        let a = vec4<f32>(load_a(r, t, i));
        let w = load_b_block(q, column4);
        let b = array<vec4<f32>, 4>(vec4<f32>(w[0]), vec4<f32>(w[1]), vec4<f32>(w[2]), vec4<f32>(w[3]));
    {%- if partial and a4 %}
        c = select(c, c + a.x * b[0] + a.y * b[1] + a.z * b[2] + a.w * b[3], i);
    {%- elif partial %}
        c = c + select(vec4<f32>(0.0), a.x * b[0], i.x) + select(vec4<f32>(0.0), a.y * b[1], i.y) + select(vec4<f32>(0.0), a.z * b[2], i.z) + select(vec4<f32>(0.0), a.w * b[3], i.w);
    {%- else %}
        c = c + a.x * b[0] + a.y * b[1] + a.z * b[2] + a.w * b[3];
    {%- endif %}
    {%- if early %}
        if (all(is_nan(c))) { break; }
    {%- endif %}
    }
    return c;
}
  {%- endif %}
{% endif %}
{% if redo -%}
// {{ "Four rows from m on" if weight_pass else ("The window whose rows start at m" if pool else "Row m") }} once more, term by term.
fn redo(m: u32, column4: u32{% if weight_pass %}, split: u32{% endif %}) {
    if (m >= ROWS || column4 >= COLUMNS4) { return; }
  {%- if weight_pass %}
    let v = sums(m / 4u, column4, split);
    for (var e = 0u; e < 4u; e++) { store(m + e, column4, v[e], split); }
  {%- elif pool %}
    var v = array<vec4<f32>, {{ pool_h * pool_w }}>();
    for (var e = 0u; e < POOL_H * POOL_W; e++) { v[e] = sums(m + e, column4); }
    store_window(m, column4{% for e in range(pool_h * pool_w) %}, v[{{ e }}]{% endfor %});
  {%- else %}
    store(m, column4, sums(m, column4));
  {%- endif %}
}
{% endif %}
{%- set step = 4 if weight_pass else (pool_h * pool_w if pool else 1) %}
{% include "product_" ~ family ~ ".wgsl" %}
