// The end of a step: the counter moves on to the next row of the step table.
//
//   counter[0] = counter[0] + 1
//
// One invocation does it, the rest of the workgroup nothing. Adds to counter.
// CPU twin: none, there is nothing to it.

const WORKGROUP_SIZE = 64u;

@group(0) @binding(0) var<storage, read_write> counter: array<u32>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn advance_step(@builtin(local_invocation_index) local: u32) {
    if local == 0u {
        counter[0] += 1u;
    }
}
