//! What the kernels' GPU paths share: grids of any number of workgroups, launches, and long work in
//! parts.

use std::ops::Range;

use bytemuck::Pod;

use crate::device::gpu::{Buffer, Gpu, Kernel, Launch};

/// What the source of a kernel with products begins with: what they take in f32 or f16, held in a
/// workgroup's memory or, where subgroups are eight wide, not at all.
pub fn computing(half: bool, eights: bool) -> &'static str {
    match (half, eights) {
        (false, _) => include_str!("../../shaders/compute/f32.wgsl"),
        (true, false) => include_str!("../../shaders/compute/f16.wgsl"),
        (true, true) => include_str!("../../shaders/compute/rounded.wgsl"),
    }
}

/// Workgroups along one side of a grid.
const SIDE: usize = 65_535;

/// A grid of at least so many workgroups.
pub fn grid(groups: usize) -> [u32; 2] {
    let rows = groups.div_ceil(SIDE).max(1);
    [groups.div_ceil(rows) as u32, rows as u32]
}

/// Runs of workgroups that are launched one by one: `groups` in all, each of so many products, of
/// which a launch makes at most so many.
fn parts(most: f64, groups: usize, products: usize) -> impl Iterator<Item = Range<usize>> {
    let most = ((most / products.max(1) as f64) as usize).max(1);
    (0..groups).step_by(most).map(move |first| first..groups.min(first + most))
}

/// Runs `launch` for workgroups in parts that a device's watchdog bears: `groups` in all, each of
/// so many products. A part is launched by its first workgroup and its grid.
pub fn in_parts(
    gpu: &Gpu,
    buffer: &Buffer,
    groups: usize,
    products: usize,
    launch: impl Fn(u32, [u32; 2]),
) {
    for part in parts(gpu.kernels.most_products, groups, products) {
        gpu.make_room(buffer, (part.len() * products) as f64);
        launch(part.start as u32, grid(part.len()));
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
    gpu.run(bytemuck::bytes_of(uniforms), variant, &[launch]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_work_is_launched_in_parts_that_are_all_of_it() {
        const MOST: f64 = 1.5e10;
        for (groups, products, count) in [
            (1, 1, 1),
            (1000, 1 << 20, 1),
            (1, 1 << 40, 1),
            (3, 1 << 40, 3),
            (100_000, 1 << 22, 28),
        ] {
            let all: Vec<Range<usize>> = parts(MOST, groups, products).collect();
            assert_eq!(all.len(), count, "{groups} of {products}");
            assert_eq!((all[0].start, all[count - 1].end), (0, groups));
            assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start));
            let most = all.iter().map(|run| run.len() * products).max().unwrap();
            assert!(count == groups || most as f64 <= MOST);
        }
    }
}
