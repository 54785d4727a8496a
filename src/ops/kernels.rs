//! What the sources of kernels are made of.

/// Threads of a workgroup: each leaves a partial sum. `THREADS` in the shaders.
pub const THREADS: usize = 64;

/// What a kernel that works on elements is told of their width.
pub fn lanes(width: u32) -> &'static str {
    if width == 4 {
        include_str!("../../shaders/shared/lanes4.wgsl")
    } else {
        include_str!("../../shaders/shared/lanes1.wgsl")
    }
}

/// The width that a sample's dimension allows.
pub fn width(dim: usize) -> u32 {
    if dim.is_multiple_of(4) { 4 } else { 1 }
}

/// Declares a [`Kernel`] from the files of `shaders/` that it is made of, in order, its own last.
/// `; "FOLDER/PART"` makes a variant of it with a part of another folder.
macro_rules! kernel {
    ($name:literal $(, $shared:literal)* $(; $variant:literal)?) => {
        $crate::device::gpu::Kernel {
            name: concat!($name $(, ":", $variant)?),
            source: |width| [$crate::ops::kernels::lanes(width),
                $(include_str!(concat!("../../shaders/shared/", $shared, ".wgsl")),)*
                $(include_str!(concat!("../../shaders/", $variant, ".wgsl")),)?
                include_str!(concat!("../../shaders/", $name, ".wgsl"))].join("\n"),
        }
    };
}
pub(crate) use kernel;
