// Family "plain": one invocation computes four columns of {{ "four rows" if weight_pass else "one row" }}; the fallback that runs on any
// adapter, and the easiest of the three to read.
@compute @workgroup_size(64)
fn {{ pass }}(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * 64u + local;
    let column4 = i % COLUMNS4;
{%- if weight_pass %}
    let q = (i / COLUMNS4) % CHUNKS;
    let split = i / (COLUMNS4 * CHUNKS);
    if (split >= {{ splits }}u) { return; }
    let v = sums(q, column4, split);
    store(q * 4u, column4, v[0], split);
    store(q * 4u + 1u, column4, v[1], split);
    store(q * 4u + 2u, column4, v[2], split);
    store(q * 4u + 3u, column4, v[3], split);
{%- else %}
    let m = i / COLUMNS4;
    if (m >= M) { return; }
    store(m, column4, sums(m, column4));
{%- endif %}
}
