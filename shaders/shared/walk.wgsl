// Which thread takes which units of an elementwise kernel. A workgroup of 64 takes a block of 512
// units; a run of eight threads takes an eighth of it from end to end, eight neighbours at a time:
// whole cache lines for a GPU, one stream for a processor that runs eight threads as one vector.
// Grid: blocks, folded where there are more than a dimension of a grid takes.

const RUN: u32 = 8u;
const ROUNDS: u32 = 8u;

fn first_unit(group: vec3<u32>, groups: vec3<u32>, thread: u32) -> u32 {
    return ((group.y * groups.x + group.x) * 64u + thread - thread % RUN) * ROUNDS + thread % RUN;
}
fn end_unit(first: u32, units: u32) -> u32 { return min(first + ROUNDS * RUN, units); }
