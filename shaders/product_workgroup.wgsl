// Family "workgroup": the classic tile of real GPUs. A workgroup stages BLOCK_K terms of a
// BLOCK_M × BLOCK_N tile in workgroup memory, terms outermost, and every invocation keeps
// {{ rows }} rows × {{ cols }} vec4 of columns in named registers.
const BLOCK_M4 = {{ block_m // 4 }}u;
const BLOCK_N4 = {{ block_n // 4 }}u;
const BLOCK_K = {{ block_k }}u;
const THREADS = {{ threads }}u;
const THREADS_N = {{ threads_n }}u;
const TILES_M = {{ tiles_m }}u;
const TILES_N = {{ tiles_n }}u;

var<workgroup> tile_a: array<vec4<f32>, {{ block_k * block_m // 4 }}>;  // [BLOCK_K][BLOCK_M / 4]
var<workgroup> tile_b: array<vec4<f32>, {{ block_k * block_n // 4 }}>;  // [BLOCK_K][BLOCK_N / 4]

{% if weight_pass -%}
fn load_tap(p: u32, q: u32) -> vec4<f32> {
    let r = row(p);
    let t = chunk(q);
    return load_a(r, t, inside(r, t));
}
{%- else -%}
fn load_row(m: u32, t: Chunk) -> vec4<f32> {
    let r = row(m);
    return load_a(r, t, inside(r, t));
}
{%- endif %}

@compute @workgroup_size({{ threads }})
fn {{ pass }}(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let tile = group.y * groups.x + group.x;
    // The surplus groups of a folded dispatch recompute nothing but still meet every barrier.
    let live = tile < TILES_M * TILES_N * {{ splits }}u;
    let first_m4 = ((tile / TILES_N) % TILES_M) * BLOCK_M4;
    let first_n4 = (tile % TILES_N) * BLOCK_N4;
    let thread_n = local % THREADS_N;
    let thread_m = local / THREADS_N;
{%- for i in range(rows) %}{% for j in range(cols) %}
    var c{{ i }}_{{ j }} = vec4<f32>(0.0);
{%- endfor %}{% endfor %}
{%- if weight_pass %}
    let split = tile / (TILES_M * TILES_N);
    let begin = split * {{ split_length }}u;
    let end = min(begin + {{ split_length }}u, K);
    for (var k0 = begin; k0 < begin + {{ split_length }}u; k0 += BLOCK_K) {
        for (var i = local; i < BLOCK_M4 * BLOCK_K; i += THREADS) {
            let q = first_m4 + i % BLOCK_M4;
            let p = k0 + i / BLOCK_M4;
            let v = {% if not bias %}load_tap(p, q){% elif a4 %}select(load_tap(p, q), bias_row(q), q >= (M - 1u) / 4u){% else %}load_tap(p, q) + bias_row(q){% endif %};
            tile_a[i] = select(vec4<f32>(0.0), v, p < end);
        }
        for (var i = local; i < BLOCK_N4 * BLOCK_K; i += THREADS) {
            let p = k0 + i / BLOCK_N4;
            tile_b[i] = select(vec4<f32>(0.0), load_b(min(p, K - 1u), first_n4 + i % BLOCK_N4), p < end);
        }
{%- else %}
    for (var k0 = 0u; k0 < CHUNKS * 4u; k0 += BLOCK_K) {
        for (var i = local; i < BLOCK_M4 * (BLOCK_K / 4u); i += THREADS) {
            // Four rows by four terms, turned in registers, so that the stores are vec4 too.
            let q = i % (BLOCK_K / 4u);
            let m4 = i / (BLOCK_K / 4u);
            let t = chunk(k0 / 4u + q);
            let first = (first_m4 + m4) * 4u;
            let v = transpose(mat4x4<f32>(load_row(first, t), load_row(first + 1u, t), load_row(first + 2u, t), load_row(first + 3u, t)));
            for (var u = 0u; u < 4u; u++) { tile_a[(q * 4u + u) * BLOCK_M4 + m4] = v[u]; }
        }
        for (var i = local; i < BLOCK_N4 * (BLOCK_K / 4u); i += THREADS) {
            let n4 = i % BLOCK_N4;
            let q = i / BLOCK_N4;
            let v = load_b_block(k0 / 4u + q, first_n4 + n4);
            for (var u = 0u; u < 4u; u++) { tile_b[(q * 4u + u) * BLOCK_N4 + n4] = v[u]; }
        }
{%- endif %}
        workgroupBarrier();
        for (var k = 0u; k < BLOCK_K; k++) {
{%- for j in range(cols) %}
            let b{{ j }} = tile_b[k * BLOCK_N4 + thread_n + {{ j * threads_n }}u];
{%- endfor %}
{%- for i4 in range(rows // 4) %}
            let a{{ i4 }} = tile_a[k * BLOCK_M4 + thread_m + {{ i4 * threads_m }}u];
  {%- for e in range(4) %}{% for j in range(cols) %}
            c{{ i4 * 4 + e }}_{{ j }} = fma(vec4<f32>(a{{ i4 }}[{{ e }}]), b{{ j }}, c{{ i4 * 4 + e }}_{{ j }});
  {%- endfor %}{% endfor %}
{%- endfor %}
        }
        workgroupBarrier();
    }
    if (!live) { return; }
{%- if redo %}
    let total = {% for i in range(rows) %}{% for j in range(cols) %}c{{ i }}_{{ j }}{{ " + " if not loop.last }}{% endfor %}{{ " + " if not loop.last }}{% endfor %};
{%- endif %}
{%- if pool %}
  {%- set area = pool_h * pool_w %}
  {%- for w in range(rows // area) %}{% for j in range(cols) %}
    store_window((first_m4 + thread_m + {{ (w * area // 4) * threads_m }}u) * 4u + {{ w * area % 4 }}u, first_n4 + thread_n + {{ j * threads_n }}u{% for e in range(area) %}, c{{ w * area + e }}_{{ j }}{% endfor %});
  {%- endfor %}{% endfor %}
{%- else %}
  {%- for i in range(rows) %}{% for j in range(cols) %}
    store((first_m4 + thread_m + {{ (i // 4) * threads_m }}u) * 4u + {{ i % 4 }}u, first_n4 + thread_n + {{ j * threads_n }}u, c{{ i }}_{{ j }}{% if weight_pass %}, split{% endif %});
  {%- endfor %}{% endfor %}
{%- endif %}
{%- if redo %}
    if (any(is_nan(total))) {
        for (var i = 0u; i < {{ rows }}u; i += {{ step }}u) {
            for (var j = 0u; j < {{ cols }}u; j++) {
                redo((first_m4 + thread_m + (i / 4u) * {{ threads_m }}u) * 4u + i % 4u, first_n4 + thread_n + j * {{ threads_n }}u{% if weight_pass %}, split{% endif %});
            }
        }
    }
{%- endif %}
}
