// A product with frozen weights, for a convolution, a linear layer, and the gradients of both. Row
// r of the result is the sum over places (of the kernel; a linear layer has one) of row
// source_row(r, place) of the source times that place's matrix [inner, columns].
//
// A number is summed up over places, then channels, by one thread or by a matrix unit: neither the
// batch nor how tiles are cut changes a bit of it.
//
// The rest of a source: product_tile.wgsl, or product_eights.wgsl where subgroups are eight wide,
// or product_matrices.wgsl; channels1 or channels4.wgsl (reading and writing), a file of weights/,
// product_forward or product_gradient.wgsl, and the kernel with its source_row.

struct Sizes {
    // Of the result, in pixels and channels; channels of the source.
    rows: u32, columns: u32, inner: u32, has_bias: u32,
    // Numbers in a row of the stored weights (the convolution's outputs, both ways).
    width: u32, kernel_h: u32, kernel_w: u32, stride: u32,
    // Images of the source and of the result.
    padding: u32, source_h: u32, source_w: u32, h: u32,
    w: u32,
    // Workgroups of the launches before; whether the result, times a factor, is added to what is
    // there.
    first: u32, adds: u32, factor: f32,
}

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read_write> source: array<Lanes>; // [.., inner]
@group(0) @binding(3) var<storage, read_write> bias: array<Lanes>;   // [columns], or any
@group(0) @binding(4) var<storage, read_write> out: array<Lanes>;    // [rows, columns]

const NONE: u32 = 0xffffffffu;
