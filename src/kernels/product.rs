//! The GPU's product with frozen weights (`shaders/shared/product.wgsl`): that of a convolution,
//! that of a linear layer, and the gradients of both.

use burn::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

use super::cpu::Write;
use super::frozen_weight::{FrozenWeight, Stored};
use super::gpu::{computing, in_parts, launch};
use crate::device::gpu::{Buffer, Gpu, Kernel, Kernels, buffer};

/// Kept in sync with `shaders/shared/product.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct Sizes {
    pub rows: u32,
    pub columns: u32,
    pub inner: u32,
    /// This, the width and the last two are [`Product::run`]'s to fill in.
    pub has_bias: u32,
    pub width: u32,
    pub kernel: [u32; 2],
    pub stride: u32,
    pub padding: u32,
    pub source_h: u32,
    pub source_w: u32,
    pub h: u32,
    pub w: u32,
    pub first: u32,
    pub adds: u32,
    pub factor: f32,
}

/// Rows and columns that a workgroup makes.
const TILE: [usize; 2] = [64, 64];
/// The same where subgroups are eight wide.
const EIGHTS: [usize; 2] = [256, 32];
/// The same on matrix units.
const MATRICES: [usize; 2] = [128, 128];

/// Bits of a variant's number: whether subgroups are eight wide, whether products take f16, and
/// whether that runs on matrix units. Those below say how weights are stored and channels come.
const OF_EIGHTS: u32 = 8;
const OF_HALF: u32 = 16;
const OF_MATRICES: u32 = 32;

/// The number of a variant: how weights are stored, whether channels come in fours, whether
/// subgroups are eight wide, whether products take f16, and whether that runs on matrix units.
fn variant(weight: &FrozenWeight, sizes: &Sizes, gpu: &Gpu) -> u32 {
    let format = match &weight.stored {
        Stored::F32(_) => 0,
        Stored::F16(_) => 1,
        Stored::Quantised(q) if q.bits == 8 => 2,
        Stored::Quantised(_) => 3,
    };
    let fours = sizes.inner.is_multiple_of(4) && sizes.columns.is_multiple_of(4);
    let Kernels { eights, half, matrices, .. } = gpu.kernels;
    let half = half && !weight.exact;
    let matrices = half && matrices;
    let bit = |bit: u32, set: bool| if set { bit } else { 0 };
    let kind = bit(OF_MATRICES, matrices) | bit(OF_HALF, half) | bit(OF_EIGHTS, eights);
    kind | (2 * format) | u32::from(fours)
}

/// What comes first in the source of a variant.
pub fn beginning(variant: u32) -> String {
    let weights = [
        include_str!("../../shaders/weights/f32.wgsl"),
        include_str!("../../shaders/weights/f16.wgsl"),
        concat!("const BITS: u32 = 8u;\n", include_str!("../../shaders/weights/quantised.wgsl")),
        concat!("const BITS: u32 = 4u;\n", include_str!("../../shaders/weights/quantised.wgsl")),
    ];
    let channels = [
        include_str!("../../shaders/shared/channels1.wgsl"),
        include_str!("../../shaders/shared/channels4.wgsl"),
    ];
    let [half, eights, matrices] = [OF_HALF, OF_EIGHTS, OF_MATRICES].map(|bit| variant & bit != 0);
    let tiles = [
        include_str!("../../shaders/shared/product_tile.wgsl"),
        concat!(
            include_str!("../../shaders/shared/eights.wgsl"),
            include_str!("../../shaders/shared/product_eights.wgsl")
        ),
        include_str!("../../shaders/shared/product_matrices.wgsl"),
    ];
    let [tiles, weights, channels] = [
        tiles[if matrices { 2 } else { eights.into() }],
        weights[(variant / 2 % 4) as usize],
        channels[(variant % 2) as usize],
    ];
    let more = if matrices { "enable wgpu_cooperative_matrix;" } else { "" };
    [more, computing(half, eights), channels, weights, tiles].join("\n")
}

/// A product on a GPU.
pub struct Product<'a> {
    pub gpu: &'a Gpu,
    pub kernel: Kernel,
    pub weight: &'a FrozenWeight,
    pub bias: Option<&'a Tensor<1>>,
    pub factor: f32,
    pub write: Write,
}

impl<'a> Product<'a> {
    /// A product as it is, without a bias.
    pub fn new(gpu: &'a Gpu, kernel: Kernel, weight: &'a FrozenWeight) -> Self {
        Self { gpu, kernel, weight, bias: None, factor: 1.0, write: Write::Replace }
    }

    /// Fills `out` `[rows, columns]`.
    pub fn run<const D: usize, const E: usize>(
        &self,
        source: &Tensor<D>,
        out: &Tensor<E>,
        sizes: Sizes,
    ) {
        let (width, has_bias) = (self.weight.columns as u32, self.bias.is_some().into());
        let (adds, factor) = ((self.write == Write::Add).into(), self.factor);
        let sizes = Sizes { width, has_bias, adds, factor, ..sizes };
        let (source, out) = (buffer(source), buffer(out));
        let own = self.bias.map(buffer);
        let bias: &Buffer = own.as_ref().unwrap_or(&source);
        let [rows, columns] = [sizes.rows, sizes.columns].map(|n| n as usize);
        let variant = variant(self.weight, &sizes, self.gpu);
        let tile = match variant {
            v if v & OF_MATRICES != 0 => MATRICES,
            v if v & OF_EIGHTS != 0 => EIGHTS,
            _ => TILE,
        };
        let tiles = rows.div_ceil(tile[0]) * columns.div_ceil(tile[1]);
        let depth = sizes.inner * sizes.kernel[0] * sizes.kernel[1];
        let products = tile[0] * tile[1] * depth as usize;
        let run = |bindings: &[&Buffer]| {
            in_parts(self.gpu, bindings[0], tiles, products, |first, grid| {
                let sizes = Sizes { first, ..sizes };
                launch(self.gpu, self.kernel, variant, &sizes, bindings, grid);
            });
        };
        match &self.weight.stored {
            Stored::F32(w) | Stored::F16(w) => run(&[&source, &buffer(w), bias, &out]),
            Stored::Quantised(q) => {
                run(&[&source, &buffer(&q.words), bias, &out, &buffer(&q.scales)]);
            }
        }
    }
}
