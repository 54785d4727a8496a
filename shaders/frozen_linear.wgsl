// x W + b with weights that do not train: a convolution of one place. Follows product.wgsl and
// product_forward.wgsl, which have the sums.

fn source_row(row: u32, place: u32) -> u32 { return select(row, NONE, row >= sizes.rows); }
