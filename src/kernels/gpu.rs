//! What the kernels' GPU paths share: grids of any number of workgroups, and a launch whose failure
//! is a panic as Burn's own operations have it ([`crate::device::guard`]).

use bytemuck::Pod;

use crate::device::gpu::{Buffer, Gpu, Kernel, Launch};

/// Workgroups along one side of a grid.
const SIDE: usize = 65_535;

/// A grid of at least so many workgroups.
pub fn grid(groups: usize) -> [u32; 2] {
    let rows = groups.div_ceil(SIDE).max(1);
    [groups.div_ceil(rows) as u32, rows as u32]
}

/// Runs one kernel on buffers in the order of its bindings.
pub fn launch(
    gpu: &Gpu,
    kernel: Kernel,
    variant: u32,
    uniforms: &impl Pod,
    bindings: &[&Buffer],
    grid: [u32; 2],
) {
    let launch = Launch { kernel, bindings: bindings.to_vec(), grid };
    let done = gpu.run(bytemuck::bytes_of(uniforms), variant, &[launch]);
    done.unwrap_or_else(|e| panic!("{}: {e:#}", kernel.name));
}
