//! What the kernels' GPU paths share: sources from parts, grids of any number of workgroups, and a
//! launch whose failure is a panic as Burn's own operations have it ([`crate::device::guard`]).

use bytemuck::Pod;

use crate::device::gpu::{Buffer, Gpu, Kernel, Launch};

/// Workgroups along one side of a grid.
const SIDE: usize = 65_535;

/// A grid of at least so many workgroups.
pub fn grid(groups: usize) -> [u32; 2] {
    let rows = groups.div_ceil(SIDE).max(1);
    [groups.div_ceil(rows) as u32, rows as u32]
}

/// Numbers of a shader's `Lanes` where rows are `width` apart.
pub fn lanes(width: usize) -> u32 {
    if width.is_multiple_of(4) { 4 } else { 1 }
}

/// Declares a kernel from the files of `shaders/` that it is made of, in order, its own last. What
/// its variant is, is what the first function says of it.
macro_rules! shader {
    ($name:literal, $first:expr $(, $shared:literal)*) => {
        $crate::device::gpu::Kernel {
            name: $name,
            source: |variant| {
                let first: fn(u32) -> String = $first;
                [first(variant),
                    $(include_str!(concat!("../../shaders/shared/", $shared, ".wgsl")).into(),)*
                    include_str!(concat!("../../shaders/", $name, ".wgsl")).into()].join("\n")
            },
        }
    };
}
pub(super) use shader;

/// The type `Lanes` of a width.
pub fn vector(width: u32) -> String {
    match width {
        4 => include_str!("../../shaders/shared/vector4.wgsl").into(),
        2 => include_str!("../../shaders/shared/vector2.wgsl").into(),
        _ => include_str!("../../shaders/shared/vector1.wgsl").into(),
    }
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
