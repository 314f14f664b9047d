// Family "workgroup": the classic tile of real GPUs. A workgroup stages BLOCK_K terms of a
// BLOCK_M × BLOCK_N tile in workgroup memory, terms outermost, and every invocation keeps
// {{ rows }} rows × {{ cols }} vec4 of columns in named registers.
{%- if slices > 1 %}
// So few tiles leave a GPU idle: {{ slices }} slices of the terms are summed side by side, each by THREADS
// invocations with a tile of their own, and added up in order.
{%- endif %}
{%- set sliced = "[slice]" if slices > 1 else "" %}
const BLOCK_M4 = {{ block_m // 4 }}u;
const BLOCK_N4 = {{ block_n // 4 }}u;
const BLOCK_K = {{ block_k }}u;
const THREADS = {{ threads }}u;
const THREADS_M = {{ threads_m }}u;
const THREADS_N = {{ threads_n }}u;
const TILES_M = {{ tiles_m }}u;
const TILES_N = {{ tiles_n }}u;
// Terms that an invocation sums up, and the first of the last block of them.
const LENGTH = {{ length }}u;
const LAST = {{ (length - 1) // block_k * block_k }}u;

// Four terms of a tile, and two vec4 more: stores of invocations side by side, which may be four terms
// apart, then meet different banks.
struct FourA { terms: array<array<vec4<f32>, BLOCK_M4>, 4>, apart: array<vec4<f32>, 2> }
struct FourB { terms: array<array<vec4<f32>, BLOCK_N4>, 4>, apart: array<vec4<f32>, 2> }
alias TileA = array<FourA, BLOCK_K / 4>;
alias TileB = array<FourB, BLOCK_K / 4>;
var<workgroup> tile_a: {% if slices > 1 %}array<TileA, {{ slices }}>{% else %}TileA{% endif %};
var<workgroup> tile_b: {% if slices > 1 %}array<TileB, {{ slices }}>{% else %}TileB{% endif %};
{#- What an invocation loads: so many pieces of a block, each at its own distance from the first. #}
{%- set items_a = block_m // 4 * (block_k if weight_pass else block_k // 4) %}
{%- set items_b = block_n // 4 * (block_k if weight_pass else block_k // 4) %}
{%- set shared = items_a + items_b == threads %}
{%- set pieces_a = (items_a + threads - 1) // threads %}
{%- set pieces_b = (items_b + threads - 1) // threads %}
{#- For the weight gradient: so many terms from one piece to the next. #}
{%- set step_a = threads // (block_m // 4) %}
{%- set step_b = threads // (block_n // 4) %}
{%- set across_b = input_pass %}
{%- set item_b = "(invocation - " ~ items_a ~ "u)" if shared else "invocation" %}

// What an invocation loads keeps its place in the tile. All of it that does not depend on the terms:
struct Place {
{%- if weight_pass %}
    tap: Chunk,
    column4: u32,
{%- else %}
  {%- for s in range(pieces_a) %}{% for e in range(1 if apart else 4) %}
    row{{ s }}_{{ e }}: Row,
  {%- endfor %}{% endfor %}
    column4: u32,
{%- endif %}
}

fn place_of(invocation: u32, first_m4: u32, first_n4: u32) -> Place {
{%- if weight_pass %}
    return Place(chunk(first_m4 + invocation % BLOCK_M4), min(first_n4 + invocation % BLOCK_N4, COLUMNS4 - 1u));
{%- else %}
    let m = (first_m4 + invocation / (BLOCK_K / 4u)) * 4u;
    return Place(
  {%- for s in range(pieces_a) %}
    {%- set above = s * threads // (block_k // 4) * 4 %}
    {%- if apart %}
        row(min(m{{ " + " ~ above ~ "u" if s }}, M - 4u)),
    {%- else %}{% for e in range(4) %}
        row(m{{ " + " ~ (above + e) ~ "u" if above + e }}),
    {%- endfor %}{% endif %}
  {%- endfor %}
        {% if across_b %}first_n4 + {{ item_b }} / (BLOCK_K / 4u){% else %}min(first_n4 + {{ item_b }} % BLOCK_N4, COLUMNS4 - 1u){% endif %},
    );
{%- endif %}
}

{% set piece = "vec4<f32>" if weight_pass else "mat4x4<f32>" -%}
// What it loads of a block.
struct Staged {
{%- if shared %}
    piece: {{ piece }},
{%- else %}
  {%- for s in range(pieces_a) %}
    a{{ s }}: {{ piece }},
  {%- endfor %}
  {%- for s in range(pieces_b) %}
    b{{ s }}: {{ piece }},
  {%- endfor %}
{%- endif %}
}

{% if not weight_pass -%}
// Four rows by four terms, turned in registers, so that the stores are vec4 too.
{%- if apart %}
fn load_rows(r0: Row, t: Chunk) -> mat4x4<f32> {
    // The next three rows are as far from the first everywhere.
  {%- for base, y, x in apart[1:] %}
    let r{{ loop.index }} = Row(r0.base + {{ base }}u, r0.y{{ " + " ~ y ~ "u" if y }}, r0.x{{ " + " ~ x ~ "u" if x }});
  {%- endfor %}
{%- else %}
fn load_rows(r0: Row, r1: Row, r2: Row, r3: Row, t: Chunk) -> mat4x4<f32> {
{%- endif %}
    return transpose(mat4x4<f32>(
  {%- for e in range(4) %}
        load_a(r{{ e }}, t, inside(r{{ e }}, t)){{ "," if not loop.last }}
  {%- endfor %}
    ));
}

{% endif -%}
{% if weight_pass and pieces_a > 1 and step_a <= ow -%}
// The row so many positions on, where those are no more than a line of the image has.
fn row_after(r: Row, positions: u32) -> Row {
    var base = r.base + positions * SW * (IC {{ per }});
    var y = r.y + PH;
    var x = r.x + PW + positions * SW;
    if (x >= OW * SW) {
        base = base + SH * W * (IC {{ per }}) - OW * SW * (IC {{ per }});
        y += SH;
        x -= OW * SW;
    }
    if (y >= OH * SH) {
        base = base + H * W * (IC {{ per }}) - OH * SH * W * (IC {{ per }});
        y = 0u;
    }
    return Row(base, y - PH, x - PW);
}

{% endif -%}
fn stage(place: Place, invocation: u32, {{ "begin" if outside else "first" }}: u32{% if ragged %}, end: u32{% endif %}) -> Staged {
    var staged: Staged;
{%- if weight_pass %}
  {%- if outside %}
    let first = min(begin, K - BLOCK_K);
  {%- endif %}
    let k = first + invocation / BLOCK_M4;
    let row0 = row(k);
  {%- for s in range(1, pieces_a) %}
    {%- if step_a <= ow %}
    let row{{ s }} = row_after(row{{ s - 1 }}, {{ step_a }}u);
    {%- else %}
    let row{{ s }} = row(k + {{ s * step_a }}u);
    {%- endif %}
  {%- endfor %}
  {%- for s in range(pieces_a) %}
    staged.a{{ s }} = load_a(row{{ s }}, place.tap, inside(row{{ s }}, place.tap){% if ragged %} {{ and }} {{ flag }}(k{{ " + " ~ (s * step_a) ~ "u" if s }} < end){% endif %});
  {%- endfor %}
    let l = first + invocation / BLOCK_N4;
  {%- for s in range(pieces_b) %}
    {%- set at = "l + " ~ (s * step_b) ~ "u" if s else "l" %}
    staged.b{{ s }} = {% if ragged %}select(vec4<f32>(0.0), load_b(min({{ at }}, K - 1u), place.column4), {{ at }} < end){% else %}load_b({{ at }}, place.column4){% endif %};
  {%- endfor %}
{%- else %}
    {{ "if (invocation < " ~ items_a ~ "u) {" if items_a < threads else "{" }}
  {%- if one_tap %}
        // The terms of a block belong to one tap.
        let t = chunk_at(first / {{ a_channels }}, (first % {{ a_channels }}) / 4u + invocation % (BLOCK_K / 4u));
  {%- else %}
        let t = chunk(first / 4u + invocation % (BLOCK_K / 4u));
  {%- endif %}
  {%- for s in range(pieces_a) %}
        staged.{{ "piece" if shared else "a" ~ s }} = load_rows({% for e in range(1 if apart else 4) %}place.row{{ s }}_{{ e }}, {% endfor %}t);
  {%- endfor %}
    }{{ " else {" if shared else ("\n    if (invocation < " ~ items_b ~ "u) {" if items_b < threads else "\n    {") }}
  {%- for s in range(pieces_b) %}
    {%- if across_b %}
        staged.{{ "piece" if shared else "b" ~ s }} = load_b_block(first / 4u + {{ item_b }} % (BLOCK_K / 4u), place.column4{{ " + " ~ (s * threads // (block_k // 4)) ~ "u" if s }});
    {%- else %}
        staged.{{ "piece" if shared else "b" ~ s }} = load_b_block(first / 4u + {{ item_b }} / BLOCK_N4{{ " + " ~ (s * threads // (block_n // 4)) ~ "u" if s }}, place.column4);
    {%- endif %}
  {%- endfor %}
    }
{%- endif %}
    return staged;
}

fn keep(staged: Staged, {% if slices > 1 %}slice: u32, {% endif %}invocation: u32) {
{%- if weight_pass %}
  {%- for tile, step, pieces, block in [("a", step_a, pieces_a, "BLOCK_M4"), ("b", step_b, pieces_b, "BLOCK_N4")] %}
    let {{ tile }} = invocation / {{ block }};
    {%- for s in range(pieces) %}
      {%- set first = s * step %}
    tile_{{ tile }}{{ sliced }}[{{ tile ~ " / 4u + " if step > 4 }}{{ first // 4 }}].terms[{{ tile }}{{ " % 4u" if step > 4 else (" + " ~ (first % 4) ~ "u" if first % 4) }}][invocation % {{ block }}] = staged.{{ tile }}{{ s }};
    {%- endfor %}
  {%- endfor %}
{%- else %}
    {{ "if (invocation < " ~ items_a ~ "u) {" if items_a < threads else "{" }}
        let q = invocation % (BLOCK_K / 4u);
        let m4 = invocation / (BLOCK_K / 4u);
  {%- for s in range(pieces_a) %}{% for u in range(4) %}
        tile_a{{ sliced }}[q].terms[{{ u }}][m4{{ " + " ~ (s * threads // (block_k // 4)) ~ "u" if s }}] = staged.{{ "piece" if shared else "a" ~ s }}[{{ u }}];
  {%- endfor %}{% endfor %}
    }{{ " else {" if shared else ("\n    if (invocation < " ~ items_b ~ "u) {" if items_b < threads else "\n    {") }}
  {%- if across_b %}
        let q = {{ item_b }} % (BLOCK_K / 4u);
        let n4 = {{ item_b }} / (BLOCK_K / 4u);
  {%- else %}
        let q = {{ item_b }} / BLOCK_N4;
        let n4 = {{ item_b }} % BLOCK_N4;
  {%- endif %}
  {%- for s in range(pieces_b) %}{% for u in range(4) %}
        tile_b{{ sliced }}[q{{ " + " ~ (s * threads // (block_n // 4)) ~ "u" if s and not across_b }}].terms[{{ u }}][n4{{ " + " ~ (s * threads // (block_k // 4)) ~ "u" if s and across_b }}] = staged.{{ "piece" if shared else "b" ~ s }}[{{ u }}];
  {%- endfor %}{% endfor %}
    }
{%- endif %}
}

@compute @workgroup_size({{ threads * slices }})
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
{%- if slices > 1 %}
    let slice = local / THREADS;
    let invocation = local % THREADS;
{%- else %}
    let invocation = local;
{%- endif %}
    // Eight invocations side by side: what a subgroup reads of both tiles is as little as can be.
{%- if threads_n > 8 %}
    let thread_n = invocation % 8u + 8u * (invocation / (8u * THREADS_M));
    let thread_m = invocation / 8u % THREADS_M;
{%- else %}
    let thread_n = invocation % THREADS_N;
    let thread_m = invocation / THREADS_N;
{%- endif %}
{%- for i in range(rows) %}{% for j in range(cols) %}
    var c{{ i }}_{{ j }} = vec4<f32>(0.0);
{%- endfor %}{% endfor %}
{%- if weight_pass %}
    let split = tile / (TILES_M * TILES_N) % {{ splits }}u;
    let begin = split * {{ split_length }}u{{ " + slice * LENGTH" if slices > 1 }};
  {%- if ragged or outside %}
    let end = min((split + 1u) * {{ split_length }}u, K);
  {%- endif %}
  {%- if bias_apart %}
    // The bias's row: the sums of the columns, an invocation four of them.
    let sums_bias = first_m4 == 0u && invocation < BLOCK_N4;
    var bias = vec4<f32>(0.0);
  {%- endif %}
{%- else %}
    let begin = {{ "slice * LENGTH" if slices > 1 else "0u" }};
{%- endif %}
    let place = place_of(invocation, first_m4, first_n4);
{%- set end = ", end" if ragged else "" %}
{%- set slice = "slice, " if slices > 1 else "" %}
{%- if ahead %}
    var staged = stage(place, invocation, begin{{ end }});
{%- endif %}
    for (var k0 = 0u; k0 < LENGTH; k0 += BLOCK_K) {
{%- if ahead %}
        keep(staged, {{ slice }}invocation);
        workgroupBarrier();
        // The next block (the last one once more) is on its way while this one is multiplied.
        staged = stage(place, invocation, begin + min(k0 + BLOCK_K, LAST){{ end }});
{%- else %}
        keep(stage(place, invocation, begin + k0{{ end }}), {{ slice }}invocation);
        workgroupBarrier();
{%- endif %}
{%- if outside %}
        // Past the end of the terms lie whole blocks.
        if (begin + k0 < end) {
{%- endif %}
{#- The next term is read before this one is multiplied; where that takes no longer than reading, the next two. #}
{%- set lead = 1 if rows * cols > 4 else 2 %}
{%- for k in range(block_k + lead) %}
  {%- if k < block_k %}
    {%- for j in range(cols) %}
        let b{{ k }}_{{ j }} = tile_b{{ sliced }}[{{ k // 4 }}].terms[{{ k % 4 }}][thread_n{{ " + " ~ (j * threads_n) ~ "u" if j }}];
    {%- endfor %}
    {%- for i in range(rows // 4) %}
        let a{{ k }}_{{ i }} = tile_a{{ sliced }}[{{ k // 4 }}].terms[{{ k % 4 }}][thread_m{{ " + " ~ (i * threads_m) ~ "u" if i }}];
    {%- endfor %}
  {%- endif %}
  {%- if k >= lead %}
    {%- for i in range(rows) %}{% for j in range(cols) %}
        c{{ i }}_{{ j }} = fma(vec4<f32>(a{{ k - lead }}_{{ i // 4 }}[{{ i % 4 }}]), b{{ k - lead }}_{{ j }}, c{{ i }}_{{ j }});
    {%- endfor %}{% endfor %}
  {%- endif %}
{%- endfor %}
{%- if bias_apart %}
        if (sums_bias) {
  {%- for k in range(block_k) %}
            bias += tile_b{{ sliced }}[{{ k // 4 }}].terms[{{ k % 4 }}][invocation];
  {%- endfor %}
        }
{%- endif %}
{{- "\n        }" if outside }}
        workgroupBarrier();
    }
{%- if slices > 1 %}
  {%- if bias_apart %}
    if (sums_bias) { tile_b[slice][0].terms[0][invocation] = bias; }
  {%- endif %}
    // The first slice adds the others' sums to its own, in order.
  {%- set at_once = block_k // 4 %}
  {%- for first in range(0, rows * cols, at_once) %}
    {%- if first %}
    workgroupBarrier();
    {%- endif %}
    {%- for e in range(at_once) %}
    tile_a[slice][{{ e }}].terms[invocation / BLOCK_M4][invocation % BLOCK_M4] = c{{ (first + e) // cols }}_{{ (first + e) % cols }};
    {%- endfor %}
    workgroupBarrier();
    if (slice == 0u) {
    {%- for e in range(at_once) %}
      {%- set c = "c" ~ ((first + e) // cols) ~ "_" ~ ((first + e) % cols) %}
        {{ c }} = {{ c }}{% for part in range(1, slices) %} + tile_a[{{ part }}][{{ e }}].terms[invocation / BLOCK_M4][invocation % BLOCK_M4]{% endfor %};
    {%- endfor %}
    }
  {%- endfor %}
    if (slice != 0u) { return; }
  {%- if bias_apart %}
    bias = bias{% for part in range(1, slices) %} + tile_b[{{ part }}][0].terms[0][invocation % BLOCK_N4]{% endfor %};
  {%- endif %}
{%- endif %}
    if (!live) { return; }
{%- if bias_apart %}
    if (sums_bias) { store_row(M - 1u, first_n4 + invocation, bias, split); }
{%- endif %}
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
