// The gradient of frozen_linear.wgsl's x: g W transposed. Follows product.wgsl and
// product_gradient.wgsl, which have the sums.

fn source_row(row: u32, place: u32) -> u32 { return select(row, NONE, row >= sizes.rows); }
