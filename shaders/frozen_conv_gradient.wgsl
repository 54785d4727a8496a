// The gradient of frozen_conv.wgsl's x: g [B, source_h, source_w, inner] with the same weights
// [kernel_h, kernel_w, columns, inner] gives [B, h, w, columns]. Follows product.wgsl and
// product_gradient.wgsl, which have the sums.

// The pixel of g that pixel `row` of x went to through a place of the kernel; NONE where there is
// none.
fn source_row(row: u32, place: u32) -> u32 {
    if row >= sizes.rows { return NONE; }
    let y = row / sizes.w % sizes.h + sizes.padding;
    let x = row % sizes.w + sizes.padding;
    let ky = place / sizes.kernel_w;
    let kx = place % sizes.kernel_w;
    if y < ky || x < kx { return NONE; }
    let sy = (y - ky) / sizes.stride;
    let sx = (x - kx) / sizes.stride;
    // A stride skips pixels between those that the kernel starts from.
    if sy * sizes.stride != y - ky || sx * sizes.stride != x - kx { return NONE; }
    if sy >= sizes.source_h || sx >= sizes.source_w { return NONE; }
    return (row / (sizes.w * sizes.h) * sizes.source_h + sy) * sizes.source_w + sx;
}
