// Family "subgroup": one subgroup computes a tile and touches no workgroup memory. A lane owns
// {{ rows }} rows and all columns of the tile, {{ rows }} × {{ cols }} vec4 sums in named registers. What the right-hand
// matrix holds for the tile is spread over the lanes and passed around by broadcasts, so that each
// element of either matrix is loaded once per tile. For adapters where loads are dear and
// broadcasts cheap.
const TILE_M = {{ tile_m }}u;    // rows of a tile: {{ lanes }} lanes of {{ rows }}
const TILE_N4 = {{ cols }}u;     // columns of a tile, in fours
const TILES_M = {{ tiles_m }}u;
const TILES_N = {{ tiles_n }}u;

@compute @workgroup_size({{ lanes }})
fn {{ pass }}(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tile = group.y * groups.x + group.x;
    if (tile >= TILES_M * TILES_N * {{ splits }}u) { return; }
    let first_m = ((tile / TILES_N) % TILES_M) * TILE_M + lane * {{ rows }}u;
    let first_n = (tile % TILES_N) * TILE_N4;
{%- for i in range(rows) %}{% for j in range(cols) %}
    var c{{ i }}_{{ j }} = vec4<f32>(0.0);
{%- endfor %}{% endfor %}
    // A turn of the loop is four terms of the sums; of its {{ 4 * cols }} vec4s of the right-hand matrix this
    // lane loads these.
{%- set shares = (4 * cols + lanes - 1) // lanes %}
{%- for s in range(shares) %}
    let v{{ s }} = min({{ s * lanes }}u + lane, {{ 4 * cols - 1 }}u);
{%- endfor %}
{%- if weight_pass %}
    // Rows are the im2col columns, four to a chunk, terms the image positions.
  {%- for g in range(rows // 4) %}
    let q{{ g }} = first_m / 4u + {{ g }}u;
    let t{{ g }} = chunk(q{{ g }});
    {%- if bias %}
    let ones{{ g }} = bias_row(q{{ g }});
    {%- endif %}
  {%- endfor %}
    let split = tile / (TILES_M * TILES_N);
    let end = min((split + 1u) * {{ split_length }}u, K);
    for (var p = split * {{ split_length }}u; p < end; p += 4u) {
  {%- for s in range(shares) %}
        let p{{ s }} = p + v{{ s }} / TILE_N4;
        let w{{ s }} = select(vec4<f32>(0.0), load_b(min(p{{ s }}, K - 1u), first_n + v{{ s }} % TILE_N4), p{{ s }} < end);
  {%- endfor %}
  {%- for u in range(4) %}
        let r{{ u }} = row(p + {{ u }}u);
  {%- endfor %}
  {%- for g in range(rows // 4) %}
        let x{{ g }} = transpose(mat4x4<f32>(
    {%- for u in range(4) %}
            {{ "select(vec4<f32>(0.0), " if k % 4 != 0 }}{% if not bias %}load_a(r{{ u }}, t{{ g }}, inside(r{{ u }}, t{{ g }})){% elif a4 %}select(load_a(r{{ u }}, t{{ g }}, inside(r{{ u }}, t{{ g }})), ones{{ g }}, q{{ g }} >= (M - 1u) / 4u){% else %}load_a(r{{ u }}, t{{ g }}, inside(r{{ u }}, t{{ g }})) + ones{{ g }}{% endif %}{% if k % 4 != 0 %}, p + {{ u }}u < end){% endif %}{{ "," if not loop.last }}
    {%- endfor %}
        ));
    {%- for e in range(4) %}
        let a{{ 4 * g + e }} = x{{ g }}[{{ e }}];
    {%- endfor %}
  {%- endfor %}
{%- else %}
  {%- for i in range(rows) %}
    let r{{ i }} = row(first_m + {{ i }}u);
  {%- endfor %}
    // Where channels come in fours, the chunks of a tap lie side by side.
  {%- set per_tap = chunks // (kh * kw) if a4 else 1 %}
    for (var first = 0u; first < CHUNKS; first += {{ per_tap }}u) {
        {{ "var" if per_tap > 1 else "let" }} t = chunk(first);
  {%- for i in range(rows) %}
        let i{{ i }} = inside(r{{ i }}, t);
  {%- endfor %}
  {%- if input_pass or (padded and a4) %}
        // Nothing but padding for every row: no term of this tap counts.
        if (!subgroupAny({% for i in range(rows) %}{{ "any(i" ~ i ~ ")" if not a4 else "i" ~ i }}{{ " || " if not loop.last }}{% endfor %})) { continue; }
  {%- endif %}
        {% if per_tap > 1 %}for (var q = first; q < first + {{ per_tap }}u; q++) {{ "{" }}{% else %}{ let q = first;{% endif %}
  {%- for s in range(shares) %}
    {%- if input_pass %}
        let w{{ s }} = load_b_terms(q, first_n * 4u + v{{ s }});
    {%- else %}
        let w{{ s }} = load_b_term(q * 4u + v{{ s }} / TILE_N4, first_n + v{{ s }} % TILE_N4);
    {%- endif %}
  {%- endfor %}
  {%- for i in range(rows) %}
        let a{{ i }} = load_a(r{{ i }}, t, i{{ i }});
  {%- endfor %}
  {%- if per_tap > 1 %}
        t.offset += 1u;
  {%- endif %}
{%- endif %}
{%- for j in range(cols) %}
        let b{{ j }} = {{ "transpose" if input_pass }}(mat4x4<f32>(
  {%- for e in range(4) %}
  {%- set v = j * 4 + e if input_pass else e * cols + j %}
            subgroupBroadcast(w{{ v // lanes }}, {{ v % lanes }}u){{ "," if not loop.last }}
  {%- endfor %}
        ));
  {%- for i in range(rows) %}
    {%- if fused %}
      {%- for e in range(4) %}
        c{{ i }}_{{ j }} = fma(vec4<f32>(a{{ i }}[{{ e }}]), b{{ j }}[{{ e }}], c{{ i }}_{{ j }});
      {%- endfor %}
    {%- else %}
        c{{ i }}_{{ j }} = c{{ i }}_{{ j }} + a{{ i }}.x * b{{ j }}[0] + a{{ i }}.y * b{{ j }}[1] + a{{ i }}.z * b{{ j }}[2] + a{{ i }}.w * b{{ j }}[3];
    {%- endif %}
  {%- endfor %}
{%- endfor %}
    }
{%- if not weight_pass %}
    }
{%- endif %}
{%- set area = pool_h * pool_w if pool else 1 %}
{%- if redo %}
    var total = vec4<f32>(0.0);
{%- endif %}
    // In a loop over the rows (or windows) with selects, because most of the time that a driver
    // compiles goes into stores; an array under a loop index would cost more than it saves.
    for (var i = 0u; i < {{ rows // area }}u; i++) {
{%- for j in range(cols) %}
  {%- for e in range(area) %}
        var s{{ e }}_{{ j }} = c{{ e }}_{{ j }};
    {%- for i in range(1, rows // area) %}
        s{{ e }}_{{ j }} = select(s{{ e }}_{{ j }}, c{{ i * area + e }}_{{ j }}, i == {{ i }}u);
    {%- endfor %}
  {%- endfor %}
{%- endfor %}
        // A bound that the driver does not know keeps it from unrolling.
        for (var j = 0u; j < min(TILE_N4, COLUMNS4 - first_n); j++) {
  {%- for e in range(area) %}
        var s{{ e }} = s{{ e }}_0;
    {%- for j in range(1, cols) %}
        s{{ e }} = select(s{{ e }}, s{{ e }}_{{ j }}, j == {{ j }}u);
    {%- endfor %}
  {%- endfor %}
  {%- if redo %}
        total += {% for e in range(area) %}s{{ e }}{{ " + " if not loop.last }}{% endfor %};
  {%- endif %}
  {%- if pool %}
        store_window(first_m + i * {{ area }}u, first_n + j{% for e in range(area) %}, s{{ e }}{% endfor %});
  {%- else %}
        store(first_m + i, first_n + j, s0{% if weight_pass %}, split{% endif %});
  {%- endif %}
        }
    }
{%- if redo %}
    if (any(is_nan(total))) {
        for (var i = 0u; i < {{ rows }}u; i += {{ step }}u) {
            for (var j = 0u; j < min(TILE_N4, COLUMNS4 - first_n); j++) {
                redo(first_m + i, first_n + j{% if weight_pass %}, split{% endif %});
            }
        }
    }
{%- endif %}
}
