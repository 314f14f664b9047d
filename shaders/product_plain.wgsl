// Family "plain": one invocation computes four columns of {{ "four rows" if weight_pass else "one row" }}; the fallback that runs on any
// adapter, and the easiest of the three to read.
@compute @workgroup_size(64)
fn {{ pass }}(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups.x + group.x) * 64u + thread;
    let column4 = i % COLUMNS4;
{%- if weight_pass %}
    let q = (i / COLUMNS4) % CHUNKS;
    let split = i / (COLUMNS4 * CHUNKS);
    if (split >= {{ splits }}u) { return; }
    let t = chunk(q);
    let ones = bias_row(q);
    var c0 = vec4<f32>(0.0);
    var c1 = vec4<f32>(0.0);
    var c2 = vec4<f32>(0.0);
    var c3 = vec4<f32>(0.0);
    for (var p = split * {{ split_length }}u; p < min((split + 1u) * {{ split_length }}u, K); p++) {
        let r = row(p);
        let a = {% if a4 %}select(load_a(r, t, inside(r, t)), ones, q >= (M - 1u) / 4u){% else %}load_a(r, t, inside(r, t)) + ones{% endif %};
        let b = load_b(p, column4);
        c0 += a.x * b;
        c1 += a.y * b;
        c2 += a.z * b;
        c3 += a.w * b;
    }
    store(q * 4u, column4, c0, split);
    store(q * 4u + 1u, column4, c1, split);
    store(q * 4u + 2u, column4, c2, split);
    store(q * 4u + 3u, column4, c3, split);
{%- else %}
    let m = i / COLUMNS4;
    if (m >= M) { return; }
    let r = row(m);
    var c = vec4<f32>(0.0);
    for (var q = 0u; q < CHUNKS; q++) {
        let t = chunk(q);
        let a = load_a(r, t, inside(r, t));
        let b = load_b_block(q, column4);
        c = c + a.x * b[0] + a.y * b[1] + a.z * b[2] + a.w * b[3];
    }
    store(m, column4, c);
{%- endif %}
}
