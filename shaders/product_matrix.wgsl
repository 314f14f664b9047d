// Family "matrix": products of small matrices of halves, which a subgroup holds together (cooperative matrices),
// summed up in floats. A workgroup stages BLOCK_K terms of a BLOCK_M × BLOCK_N tile in workgroup memory, and each of
// its {{ down }} × {{ across }} subgroups keeps {{ rows }} × {{ cols }} matrices of sums.
// No subgroup operations beside them: modules that have both crash a driver. In which subgroup an invocation is
// follows from its place in the workgroup.
const SIDE = {{ side }}u;
const LANES = {{ lanes }}u;
const SIDE4 = {{ side // 4 }}u;
const BLOCK_M = {{ block_m }}u;
const BLOCK_N = {{ block_n }}u;
const BLOCK_N4 = {{ block_n // 4 }}u;
const BLOCK_K = {{ block_k }}u;
const THREADS = {{ threads }}u;
const TILES_M = {{ tiles_m }}u;
const TILES_N = {{ tiles_n }}u;
// Terms that are summed up, and the first of the last block of them.
const LENGTH = {{ length }}u;
const LAST = {{ (length - 1) // block_k * block_k }}u;

{#- Both tiles lie as their loader reads four elements at a time: A along the terms (along the rows in the weight
    gradient), B along the columns (along the terms in the input gradient). #}
{%- set across_a = block_m // 4 if weight_pass else block_k // 4 %}
{%- set across_b = block_k // 4 if input_pass else block_n // 4 %}
{%- set items_a = block_m * block_k // 4 %}
{%- set items_b = block_n * block_k // 4 %}
{%- set pieces_a = (items_a + threads - 1) // threads %}
{%- set pieces_b = (items_b + threads - 1) // threads %}
{%- set down_a = "invocation / " ~ across_a ~ "u" %}
{%- set down_b = "invocation / " ~ across_b ~ "u" %}

// Fours from one row of a tile to the next: two more than are in it, so that rows side by side meet different
// banks and every one begins at a multiple of 16 bytes, which drivers ask for.
alias Four = array<real, 4>;
const STRIDE_A = {{ across_a + 2 }}u;
const STRIDE_B = {{ across_b + 2 }}u;
var<workgroup> tile_a: array<Four, {{ items_a // across_a * (across_a + 2) }}>;
var<workgroup> tile_b: array<Four, {{ items_b // across_b * (across_b + 2) }}>;
// The sums on their way out: one row of matrices of every subgroup.
alias FourSums = array<f32, 4>;
const STRIDE_C = {{ block_n // 4 + 1 }}u;
var<workgroup> tile_c: array<FourSums, {{ down * side * (block_n // 4 + 1) }}>;

alias MatrixA = coop_mat{{ side }}x{{ side }}<real, A>;
alias MatrixB = coop_mat{{ side }}x{{ side }}<real, B>;
alias MatrixC = coop_mat{{ side }}x{{ side }}<f32, C>;

// What an invocation loads keeps its place across the tile. All of it that does not depend on the terms:
struct Place {
{%- if weight_pass %}
    tap: Chunk,
  {%- if bias %}
    ones: vec4<real>,
  {%- if a4 %}
    is_ones: bool,
  {%- endif %}
  {%- endif %}
{%- else %}
  {%- for s in range(pieces_a) %}
    row{{ s }}: Row,
  {%- endfor %}
{%- endif %}
    // {{ "The first column" if input_pass else "Of the columns, in fours" }}.
    column: u32,
}

fn place_of(invocation: u32, first_m: u32, first_n: u32) -> Place {
{%- if weight_pass %}
    let q = first_m / 4u + invocation % {{ across_a }}u;
{%- endif %}
    return Place(
{%- if weight_pass %}
        chunk(q),
  {%- if bias %}
        bias_row(q),
  {%- if a4 %}
        q >= (M - 1u) / 4u,
  {%- endif %}
  {%- endif %}
{%- else %}
  {%- for s in range(pieces_a) %}
        row(first_m + {{ down_a }}{{ " + " ~ (s * threads // across_a) ~ "u" if s }}),
  {%- endfor %}
{%- endif %}
        {{ "first_n + " ~ down_b if input_pass else "min(first_n / 4u + invocation % BLOCK_N4, COLUMNS4 - 1u)" }},
    );
}

// What it loads of a block.
struct Staged {
{%- for s in range(pieces_a) %}
    a{{ s }}: vec4<real>,
{%- endfor %}
{%- for s in range(pieces_b) %}
    b{{ s }}: vec4<real>,
{%- endfor %}
}

fn stage(place: Place, invocation: u32, first: u32{% if weight_pass %}, end: u32{% endif %}) -> Staged {
    var staged: Staged;
{%- if weight_pass %}
  {%- for s in range(pieces_a) %}
    let k{{ s }} = first + {{ down_a }}{{ " + " ~ (s * threads // across_a) ~ "u" if s }};
    let row{{ s }} = row(k{{ s }});
    let tap{{ s }} = load_a(row{{ s }}, place.tap, inside(row{{ s }}, place.tap));
    staged.a{{ s }} = select(vec4<real>(0.0), {% if not bias %}tap{{ s }}{% elif a4 %}select(tap{{ s }}, place.ones, place.is_ones){% else %}tap{{ s }} + place.ones{% endif %}, k{{ s }} < end);
  {%- endfor %}
  {%- for s in range(pieces_b) %}
    let l{{ s }} = first + {{ down_b }}{{ " + " ~ (s * threads // across_b) ~ "u" if s }};
    staged.b{{ s }} = select(vec4<real>(0.0), load_b(min(l{{ s }}, K - 1u), place.column), l{{ s }} < end);
  {%- endfor %}
{%- else %}
  {%- if one_tap %}
    // The terms of a block belong to one tap.
    let t = chunk_at(first / {{ a_channels }}, (first % {{ a_channels }}) / 4u + invocation % {{ across_a }}u);
  {%- else %}
    let t = chunk(first / 4u + invocation % {{ across_a }}u);
  {%- endif %}
  {%- for s in range(pieces_a) %}
    staged.a{{ s }} = load_a(place.row{{ s }}, t, inside(place.row{{ s }}, t));
  {%- endfor %}
  {%- for s in range(pieces_b) %}
    {%- if input_pass %}
    staged.b{{ s }} = load_b_terms(first / 4u + invocation % {{ across_b }}u, place.column{{ " + " ~ (s * threads // across_b) ~ "u" if s }});
    {%- else %}
    staged.b{{ s }} = load_b_term(first + {{ down_b }}{{ " + " ~ (s * threads // across_b) ~ "u" if s }}, place.column);
    {%- endif %}
  {%- endfor %}
{%- endif %}
    return staged;
}

fn four(v: vec4<real>) -> Four {
    return Four(v.x, v.y, v.z, v.w);
}

fn keep(staged: Staged, invocation: u32) {
{%- for tile, items, across, pieces in [("a", items_a, across_a, pieces_a), ("b", items_b, across_b, pieces_b)] %}
    {% if items < threads %}if (invocation < {{ items }}u) {% endif %}{
        let at = invocation / {{ across }}u * {{ across + 2 }}u + invocation % {{ across }}u;
  {%- for s in range(pieces) %}
        tile_{{ tile }}[at{{ " + " ~ (s * threads // across * (across + 2)) ~ "u" if s }}] = four(staged.{{ tile }}{{ s }});
  {%- endfor %}
    }
{%- endfor %}
}

// Writes what is in `tile_c`: the given row of matrices of every subgroup.
fn write_out(local: u32, first_m: u32, first_n: u32{% if weight_pass %}, split: u32{% endif %}) {
    for (var i = local; i < {{ down * side // 4 * (block_n // 4) }}u; i += THREADS) {
        let column4 = first_n / 4u + i % BLOCK_N4;
        let rows4 = i / BLOCK_N4;
        let m = first_m + rows4 / SIDE4 * {{ rows * side }}u + rows4 % SIDE4 * 4u;
        let at = rows4 * 4u * STRIDE_C + i % BLOCK_N4;
{%- for e in range(4) %}
        let s{{ e }} = tile_c[at{{ " + " ~ e ~ "u * STRIDE_C" if e }}];
        let c{{ e }} = vec4<f32>(s{{ e }}[0], s{{ e }}[1], s{{ e }}[2], s{{ e }}[3]);
{%- endfor %}
{%- if pool %}
  {%- set area = pool_h * pool_w %}
  {%- for w in range(4 // area) %}
        store_window(m{{ " + " ~ (w * area) ~ "u" if w }}, column4{% for e in range(area) %}, c{{ w * area + e }}{% endfor %});
  {%- endfor %}
{%- else %}
  {%- for e in range(4) %}
        store(m{{ " + " ~ e ~ "u" if e }}, column4, c{{ e }}{% if weight_pass %}, split{% endif %});
  {%- endfor %}
{%- endif %}
{%- if redo %}
        if (any(is_nan(c0 + c1 + c2 + c3))) {
            for (var e = 0u; e < 4u; e += {{ step }}u) {
                redo(m + e, column4{% if weight_pass %}, split{% endif %});
            }
        }
{%- endif %}
    }
}

@compute @workgroup_size({{ threads }})
fn {{ pass }}(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let tile = group.y * groups.x + group.x;
    // The surplus groups of a folded dispatch recompute nothing but still meet every barrier.
    let live = tile < TILES_M * TILES_N * {{ splits }}u;
    let first_m = ((tile / TILES_N) % TILES_M) * BLOCK_M;
    let first_n = (tile % TILES_N) * BLOCK_N;
    // Where in the tile the subgroup is.
    let subgroup = invocation / LANES;
    let down = subgroup % {{ down }}u;
    let across = subgroup / {{ down }}u;
    let m = down * {{ rows * side }}u;
    let n = across * {{ cols * side }}u;
{%- for i in range(rows) %}{% for j in range(cols) %}
    var c{{ i }}_{{ j }} = MatrixC();
{%- endfor %}{% endfor %}
{%- if weight_pass %}
    let split = tile / (TILES_M * TILES_N) % {{ splits }}u;
    let begin = split * {{ split_length }}u;
    let end = min((split + 1u) * {{ split_length }}u, K);
{%- else %}
    let begin = 0u;
{%- endif %}
    let place = place_of(invocation, first_m, first_n);
{%- set end = ", end" if weight_pass else "" %}
{%- if ahead %}
    var staged = stage(place, invocation, begin{{ end }});
{%- endif %}
    for (var k0 = 0u; k0 < LENGTH; k0 += BLOCK_K) {
{%- if ahead %}
        keep(staged, invocation);
        workgroupBarrier();
        // The next block (the last one once more) is on its way while this one is multiplied.
        staged = stage(place, invocation, begin + min(k0 + BLOCK_K, LAST){{ end }});
{%- else %}
        keep(stage(place, invocation, begin + k0{{ end }}), invocation);
        workgroupBarrier();
{%- endif %}
{%- for k in range(0, block_k, side) %}
  {%- for i in range(rows) %}
    {%- if weight_pass %}
        let a{{ k }}_{{ i }} = coopLoad<MatrixA>(&tile_a[{{ k }}u * STRIDE_A + (m + {{ i }}u * SIDE) / 4u][0], 4u * STRIDE_A);
    {%- else %}
        let a{{ k }}_{{ i }} = coopLoadT<MatrixA>(&tile_a[(m + {{ i }}u * SIDE) * STRIDE_A + {{ k // 4 }}u][0], 4u * STRIDE_A);
    {%- endif %}
  {%- endfor %}
  {%- for j in range(cols) %}
    {%- if input_pass %}
        let b{{ k }}_{{ j }} = coopLoad<MatrixB>(&tile_b[(n + {{ j }}u * SIDE) * STRIDE_B + {{ k // 4 }}u][0], 4u * STRIDE_B);
    {%- else %}
        let b{{ k }}_{{ j }} = coopLoadT<MatrixB>(&tile_b[{{ k }}u * STRIDE_B + (n + {{ j }}u * SIDE) / 4u][0], 4u * STRIDE_B);
    {%- endif %}
  {%- endfor %}
  {%- for i in range(rows) %}{% for j in range(cols) %}
        c{{ i }}_{{ j }} = coopMultiplyAdd(a{{ k }}_{{ i }}, b{{ k }}_{{ j }}, c{{ i }}_{{ j }});
  {%- endfor %}{% endfor %}
{%- endfor %}
        workgroupBarrier();
    }
    // Out through workgroup memory, one row of matrices after the other, in a loop: what writes them is long.
    for (var i = 0u; i < {{ rows }}u; i++) {
        switch i {
{%- for i in range(rows) %}
            {{ "default" if loop.last else "case " ~ i ~ "u" }}: {
  {%- for j in range(cols) %}
                coopStoreT(c{{ i }}_{{ j }}, &tile_c[down * SIDE * STRIDE_C + (n + {{ j }}u * SIDE) / 4u][0], 4u * STRIDE_C);
  {%- endfor %}
            }
{%- endfor %}
        }
        workgroupBarrier();
        if (live) {
            write_out(invocation, first_m + i * SIDE, first_n{% if weight_pass %}, split{% endif %});
        }
        workgroupBarrier();
    }
}
