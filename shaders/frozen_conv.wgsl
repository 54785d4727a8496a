// A convolution whose weights do not train, channels last: x [B, source_h, source_w, inner] with
// weights [kernel_h, kernel_w, inner, columns] gives [B, h, w, columns]. Follows product.wgsl and
// product_forward.wgsl, which have the sums.

// The pixel that a place of the kernel lies on for pixel `row` of the result; NONE beyond the
// image.
fn source_row(row: u32, place: u32) -> u32 {
    if row >= sizes.rows { return NONE; }
    // Below zero these wrap to what is beyond every image.
    let y = row / sizes.w % sizes.h * sizes.stride + place / sizes.kernel_w - sizes.padding;
    let x = row % sizes.w * sizes.stride + place % sizes.kernel_w - sizes.padding;
    if y >= sizes.source_h || x >= sizes.source_w { return NONE; }
    return (row / (sizes.w * sizes.h) * sizes.source_h + y) * sizes.source_w + x;
}
