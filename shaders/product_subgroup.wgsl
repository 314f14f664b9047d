// Family "subgroup": one subgroup computes a tile and touches no workgroup memory. LANES_N lanes lie
// along the columns, the others along the rows; a lane keeps ROWS × COLUMNS_4 vec4 sums in named
// registers. What a lane loads of the left matrix the others get by shuffle, so that each element
// is loaded once per tile. For adapters where loads are dear and shuffles cheap.
const LANES = {{ lanes }}u;
const LANES_N = {{ lanes_n }}u;
const TILE_M = {{ tile_m }}u;         // rows of a tile: LANES / LANES_N groups of {{ rows }}
const TILE_N4 = {{ tile_n4 }}u;       // columns of a tile, in fours
const TILES_M = {{ tiles_m }}u;
const TILES_N = {{ tiles_n }}u;

@compute @workgroup_size({{ lanes }})
fn {{ pass }}(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let lane_n = lane % LANES_N;
    let lane_first = lane - lane_n;   // first lane of this lane's row group
    let tile = group.y * groups.x + group.x;
    if (tile >= TILES_M * TILES_N * {{ splits }}u) { return; }
    let first_m = ((tile / TILES_N) % TILES_M) * TILE_M + (lane / LANES_N) * {{ rows }}u;
    let first_n = (tile % TILES_N) * TILE_N4 + lane_n;
{%- for i in range(rows) %}{% for j in range(cols) %}
    var c{{ i }}_{{ j }} = vec4<f32>(0.0);
{%- endfor %}{% endfor %}
{%- if weight_pass %}
    // Rows are the im2col columns; this lane loads some of the row group's chunks of four.
  {%- for g in range(loads) %}
    let q{{ g }} = first_m / 4u + min({{ g * lanes_n }}u + lane_n, {{ rows // 4 - 1 }}u);
    let t{{ g }} = chunk(q{{ g }});
    let ones{{ g }} = bias_row(q{{ g }});
  {%- endfor %}
    let split = tile / (TILES_M * TILES_N);
    let end = min((split + 1u) * {{ split_length }}u, K);
    for (var p = split * {{ split_length }}u; p < end; p += {{ unroll }}u) {
  {%- for u in range(unroll) %}
        let r{{ u }} = row(p + {{ u }}u);
    {%- for g in range(loads) %}
        let a{{ u }}_{{ g }} = {% if a4 %}select(load_a(r{{ u }}, t{{ g }}, inside(r{{ u }}, t{{ g }})), ones{{ g }}, q{{ g }} >= (M - 1u) / 4u){% else %}load_a(r{{ u }}, t{{ g }}, inside(r{{ u }}, t{{ g }})) + ones{{ g }}{% endif %};
    {%- endfor %}
    {%- for j in range(cols) %}
        let b{{ u }}_{{ j }} = {% if u == 0 %}load_b(p, first_n + {{ j * lanes_n }}u){% else %}select(vec4<f32>(0.0), load_b(min(p + {{ u }}u, K - 1u), first_n + {{ j * lanes_n }}u), p + {{ u }}u < end){% endif %};
    {%- endfor %}
  {%- endfor %}
  {%- for i4 in range(rows // 4) %}
    {%- for u in range(unroll) %}
        let x{{ i4 }}_{{ u }} = subgroupShuffle(a{{ u }}_{{ i4 // lanes_n }}, lane_first + {{ i4 % lanes_n }}u);
    {%- endfor %}
    {%- for e in range(4) %}{% for j in range(cols) %}
        c{{ i4 * 4 + e }}_{{ j }} = c{{ i4 * 4 + e }}_{{ j }}{% for u in range(unroll) %} + x{{ i4 }}_{{ u }}[{{ e }}] * b{{ u }}_{{ j }}{% endfor %};
    {%- endfor %}{% endfor %}
  {%- endfor %}
    }
{%- else %}
  {%- for i in range(rows) %}
    let r{{ i }} = row(first_m + {{ i }}u);
  {%- endfor %}
    // Each lane of a row group loads one chunk of four terms, then all take turns to broadcast.
    for (var q0 = 0u; q0 < CHUNKS; q0 += LANES_N) {
        let t = chunk(q0 + lane_n);
  {%- for i in range(rows) %}
        let i{{ i }} = inside(r{{ i }}, t);
  {%- endfor %}
  {%- if input_pass or padded %}
        // Nothing but padding for every row and lane: no term of this turn counts.
        if (!subgroupAny({% for i in range(rows) %}{{ "any(i" ~ i ~ ")" if not a4 else "i" ~ i }}{{ " || " if not loop.last }}{% endfor %})) { continue; }
  {%- endif %}
  {%- for i in range(rows) %}
        let a{{ i }} = load_a(r{{ i }}, t, i{{ i }});
  {%- endfor %}
        for (var s = 0u; s < min(LANES_N, CHUNKS - q0); s++) {
  {%- for j in range(cols) %}
            let b{{ j }} = load_b_block(q0 + s, first_n + {{ j * lanes_n }}u);
  {%- endfor %}
  {%- for i in range(rows) %}
            let x{{ i }} = subgroupShuffle(a{{ i }}, lane_first + s);
    {%- for j in range(cols) %}
            c{{ i }}_{{ j }} = c{{ i }}_{{ j }} + x{{ i }}.x * b{{ j }}[0] + x{{ i }}.y * b{{ j }}[1] + x{{ i }}.z * b{{ j }}[2] + x{{ i }}.w * b{{ j }}[3];
    {%- endfor %}
  {%- endfor %}
        }
    }
{%- endif %}
{%- if pool %}
  {%- set area = pool_h * pool_w %}
  {%- for w in range(rows // area) %}{% for j in range(cols) %}
    store_window(first_m + {{ w * area }}u, first_n + {{ j * lanes_n }}u{% for e in range(area) %}, c{{ w * area + e }}_{{ j }}{% endfor %});
  {%- endfor %}{% endfor %}
{%- else %}
  {%- for i in range(rows) %}{% for j in range(cols) %}
    store(first_m + {{ i }}u, first_n + {{ j * lanes_n }}u, c{{ i }}_{{ j }}{% if weight_pass %}, split{% endif %});
  {%- endfor %}{% endfor %}
{%- endif %}
}
