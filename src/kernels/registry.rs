//! All kernels of networks, for validation.

use super::{
    activation, attention_gpu, frozen_conv, frozen_linear, geglu, group_norm_silu, layer_norm,
    rms_norm,
};
use crate::device::gpu::Kernel;

/// Every kernel with its variants: lanes, widths of heads, or how weights are stored and channels
/// come; of the last two also by the subgroups' width and by what products take, of the last by
/// matrix units.
pub fn kernels() -> Vec<(Kernel, Vec<u32>)> {
    let lanes = [
        activation::FORWARD,
        activation::GRADIENT,
        geglu::FORWARD,
        geglu::GRADIENT,
        layer_norm::FORWARD,
        layer_norm::GRADIENT,
        rms_norm::FORWARD,
        rms_norm::GRADIENT,
        attention_gpu::DELTA,
    ];
    let groups = [group_norm_silu::FORWARD, group_norm_silu::GRADIENT];
    let heads = [attention_gpu::FORWARD, attention_gpu::GRADIENT_Q, attention_gpu::GRADIENT_KV];
    let products = [
        frozen_conv::FORWARD,
        frozen_conv::GRADIENT,
        frozen_linear::FORWARD,
        frozen_linear::GRADIENT,
    ];
    let all = lanes.map(|k| (k, vec![1, 4])).into_iter();
    let all = all.chain(groups.map(|k| (k, vec![1, 2, 4])));
    const E: u32 = attention_gpu::EIGHTS;
    const H: u32 = attention_gpu::HALF;
    let widths =
        &[5, 40, 64, 512, H + 5, H + 40, E + 5, E + 40, E + 64, E + 512, E + H + 5, E + H + 40];
    let all = all.chain(heads.map(|k| (k, widths.to_vec())));
    // See `variant` in `product`.
    all.chain(products.map(|k| (k, (0..32).chain(48..56).collect()))).collect()
}
