//! `frozen_conv`: a convolution that does not train (`torch.nn.Conv2d`), channels last, as a matrix
//! product of pixels' neighbourhoods and the weights (implicit GEMM). The gradient of its input is
//! a convolution of stride 1 with the weights flipped and transposed, of a gradient that has zeros
//! between its pixels where the stride is more.

use std::sync::{Arc, OnceLock};

use burn::tensor::{Device, Tensor};

use super::cpu::{Matrix, Values, Write, biased, product, tensor};
use super::frozen_linear::frozen_linear;
use super::frozen_weight::{FrozenWeight, HostWeight, Storage, by_input};
use super::node::{input, node, output};
use super::product::{Product, Sizes, beginning};
use super::threads::{parts, scratch};
use crate::device::gpu::{Gpu, Kernel, kernel, output as empty};

/// The numbers of a convolution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConvShape {
    pub cin: usize,
    pub cout: usize,
    pub kernel: usize,
    pub stride: usize,
    pub padding: usize,
}

impl ConvShape {
    /// Which of an output's numbers in PyTorch's weight `[cout, cin, kernel, kernel]` stands in a
    /// row of its matrix: there the places of the neighbourhood come first.
    pub fn place(&self, row: usize) -> usize {
        row % self.cin * self.kernel * self.kernel + row / self.cin
    }
}

/// A frozen convolution on a device.
pub struct FrozenConv {
    pub shape: ConvShape,
    /// `[kernel kernel cin, cout]`: a row for each place of the neighbourhood and channel.
    weight: Arc<FrozenWeight>,
    bias: Option<Tensor<1>>,
    /// `[kernel kernel cout, cin]`, made when a gradient first asks for it.
    flipped: Arc<OnceLock<Vec<f32>>>,
}

impl FrozenConv {
    /// From the matrix of a shape's rows.
    pub fn new(weight: FrozenWeight, shape: ConvShape, bias: Option<Tensor<1>>) -> Self {
        Self { shape, weight: Arc::new(weight), bias, flipped: Arc::default() }
    }

    /// From PyTorch's weight `[cout, cin, kernel, kernel]`.
    pub fn of(
        values: &[f32],
        shape: ConvShape,
        bias: Option<Tensor<1>>,
        storage: Storage,
        device: &Device,
    ) -> Self {
        let rows = by_input(values, shape.cout, |row| shape.place(row));
        let matrix = [values.len() / shape.cout, shape.cout];
        Self::new(FrozenWeight::new(rows, matrix, storage.unquantised(), device), shape, bias)
    }
}

/// Images of one size, channels last.
#[derive(Clone, Copy)]
struct Images {
    h: usize,
    w: usize,
    c: usize,
}

/// Pixels whose neighbourhoods lie in memory at a time: enough for a product to be fast, and few
/// enough to stay in a cache.
fn pixels_at_once(row: usize) -> usize {
    ((1 << 18) / row).clamp(48, 512)
}

/// Where a convolution reads: of each output of `[h, w]`, `kernel` x `kernel` pixels of `from`.
#[derive(Clone, Copy)]
struct Window {
    from: Images,
    out: [usize; 2],
    kernel: usize,
    stride: usize,
    /// Where the first output's first pixel lies, row and column: -padding.
    first: [isize; 2],
}

impl Window {
    /// Neighbourhoods of the pixels from `first` on, `[pixels, kernel kernel c]`.
    fn gather(&self, x: &[f32], first: usize, rows: &mut [f32]) {
        let Images { h, w, c } = self.from;
        let (k, [oh, ow]) = (self.kernel, self.out);
        for (i, row) in rows.chunks_exact_mut(k * k * c).enumerate() {
            let p = first + i;
            let (image, y, x0) = (p / (oh * ow), p / ow % oh, p % ow);
            let left = (x0 * self.stride) as isize + self.first[1];
            // Columns of the neighbourhood that lie in the image.
            let begin = (-left).clamp(0, k as isize) as usize;
            let end = (w as isize - left).clamp(begin as isize, k as isize) as usize;
            for (ky, line) in row.chunks_exact_mut(k * c).enumerate() {
                let at = (y * self.stride + ky) as isize + self.first[0];
                if at < 0 || at >= h as isize || begin == end {
                    line.fill(0.0);
                    continue;
                }
                let source = (image * h + at as usize) * w + (left + begin as isize) as usize;
                line[..begin * c].fill(0.0);
                line[begin * c..end * c].copy_from_slice(&x[source * c..][..(end - begin) * c]);
                line[end * c..].fill(0.0);
            }
        }
    }

    /// Adds the product of the neighbourhoods and a matrix `[kernel kernel c, n]`.
    fn multiply(&self, x: &[f32], matrix: Matrix, n: usize, y: &mut [f32]) {
        let row = self.kernel * self.kernel * self.from.c;
        let pixels = pixels_at_once(row);
        parts(y, pixels * n, |i, y| {
            let m = y.len() / n;
            scratch(m * row, |rows| {
                self.gather(x, i * pixels, rows);
                product([m, row, n], Matrix::new(rows, row), matrix, 1.0, Write::Add, y, n);
            });
        });
    }

    /// The same place by place of the neighbourhood: a window of one pixel each, with its number.
    fn places(&self) -> impl Iterator<Item = (usize, Self)> {
        let (own, k) = (*self, self.kernel);
        (0..k * k).map(move |place| {
            let first = [0, 1].map(|axis| own.first[axis] + [place / k, place % k][axis] as isize);
            (place, Self { kernel: 1, first, ..own })
        })
    }
}

/// Weights of at most so many values are held a second time for gradients, and as f32 at once.
const SMALL: usize = 1 << 20;

/// Place by place where the matrix is large, so that no second copy of it is needed.
fn is_small(s: ConvShape) -> bool {
    s.kernel * s.kernel * s.cin * s.cout <= SMALL
}

fn forward(w: &HostWeight, x: &[f32], window: Window, s: ConvShape, y: &mut [f32]) {
    let size = [s.kernel * s.kernel * s.cin, s.cout];
    match w {
        HostWeight::F32(w) => window.multiply(x, Matrix::new(w, s.cout), s.cout, y),
        _ if is_small(s) => {
            let mut whole = vec![0.0; size[0] * size[1]];
            w.read(0, s.cout, &mut whole);
            window.multiply(x, Matrix::new(&whole, s.cout), s.cout, y);
        }
        _ => {
            let mut matrix = vec![0.0; s.cin * s.cout];
            for (place, window) in window.places() {
                w.read(place * s.cin, s.cout, &mut matrix);
                window.multiply(x, Matrix::new(&matrix, s.cout), s.cout, y);
            }
        }
    }
}

/// `[kernel kernel cout, cin]` from `[kernel kernel cin, cout]`: the places in reverse.
fn flip(w: &HostWeight, s: ConvShape) -> Vec<f32> {
    let places = s.kernel * s.kernel;
    let mut own = vec![0.0; places * s.cin * s.cout];
    w.read(0, s.cout, &mut own);
    let mut flipped = vec![0.0; own.len()];
    for (i, v) in own.iter().enumerate() {
        let (place, c, o) = (i / s.cout / s.cin, i / s.cout % s.cin, i % s.cout);
        flipped[((places - 1 - place) * s.cout + o) * s.cin + c] = *v;
    }
    flipped
}

/// The gradient of x `[B, H, W, cin]` from that of the output.
fn gradient(
    w: &HostWeight,
    flipped: &OnceLock<Vec<f32>>,
    g: &[f32],
    [b, h, width]: [usize; 3],
    out: [usize; 2],
    s: ConvShape,
) -> Vec<f32> {
    let reach = |n: usize| n + 2 * s.padding + 1 - s.kernel;
    let [gh, gw] = [reach(h), reach(width)];
    let spread;
    let g = if s.stride == 1 {
        g
    } else {
        let mut zeros = vec![0.0; b * gh * gw * s.cout];
        for (i, pixel) in g.chunks_exact(s.cout).enumerate() {
            let (image, y, x) = (i / (out[0] * out[1]), i / out[1] % out[0], i % out[1]);
            let at = (image * gh + y * s.stride) * gw + x * s.stride;
            zeros[at * s.cout..][..s.cout].copy_from_slice(pixel);
        }
        spread = zeros;
        &spread
    };
    let window = Window {
        from: Images { h: gh, w: gw, c: s.cout },
        out: [h, width],
        kernel: s.kernel,
        stride: 1,
        first: [s.padding as isize + 1 - s.kernel as isize; 2],
    };
    let mut gx = vec![0.0; b * h * width * s.cin];
    if is_small(s) {
        let flipped = flipped.get_or_init(|| flip(w, s));
        window.multiply(g, Matrix::new(flipped, s.cin), s.cin, &mut gx);
        return gx;
    }
    let places = s.kernel * s.kernel;
    let mut own = vec![0.0; s.cin * s.cout];
    for (place, window) in window.places() {
        w.read((places - 1 - place) * s.cin, s.cout, &mut own);
        window.multiply(g, Matrix::new(&own, s.cout).transposed(), s.cin, &mut gx);
    }
    gx
}

pub(super) const FORWARD: Kernel =
    kernel!(begins beginning, "frozen_conv", "product", "product_forward");
pub(super) const GRADIENT: Kernel =
    kernel!(begins beginning, "frozen_conv_gradient", "product", "product_gradient");

fn on_gpu(gpu: Gpu, x: Tensor<4>, conv: &FrozenConv, out: [usize; 2]) -> Tensor<4> {
    let (parent, x) = (input(&x), x.inner());
    let ([b, h, w, cin], s, weight) = (x.dims(), conv.shape, conv.weight.clone());
    let [oh, ow] = out;
    let sizes = move |from: [usize; 3], to: [usize; 3]| Sizes {
        rows: (b * to[0] * to[1]) as u32,
        columns: to[2] as u32,
        inner: from[2] as u32,
        kernel: [s.kernel as u32; 2],
        stride: s.stride as u32,
        padding: s.padding as u32,
        source_h: from[0] as u32,
        source_w: from[1] as u32,
        h: to[0] as u32,
        w: to[1] as u32,
        ..Sizes::default()
    };
    let (image, made) = ([h, w, cin], [oh, ow, s.cout]);
    let y = empty([b, oh, ow, s.cout], &x.device());
    let bias = conv.bias.as_ref();
    let product = Product { bias, ..Product::new(&gpu, FORWARD, &weight) };
    product.run(&x, &y, sizes(image, made));
    node([parent], y, move |g: Tensor<4>, _| {
        let gx = empty([b, h, w, cin], &g.device());
        let weight = &weight;
        let product = Product::new(&gpu, GRADIENT, weight);
        product.run(&g, &gx, sizes(made, image));
        [output(gx)]
    })
}

/// `[B, H, W, cin] -> [B, H', W', cout]`.
pub fn frozen_conv(x: Tensor<4>, conv: &FrozenConv) -> Tensor<4> {
    let ([b, h, w, _], s) = (x.dims(), conv.shape);
    if (s.kernel, s.stride, s.padding) == (1, 1, 0) {
        return frozen_linear(x, &conv.weight, conv.bias.as_ref(), None);
    }
    let out = [h, w].map(|n| (n + 2 * s.padding - s.kernel) / s.stride + 1);
    if let Some(gpu) = Gpu::of(&x) {
        return on_gpu(gpu, x, conv, out);
    }
    let parent = input(&x);
    let (values, weight) = (Values::of(&x.inner()), conv.weight.on_host());
    let mut y = biased(b * out[0] * out[1], s.cout, conv.bias.as_ref().map(Values::of).as_ref());
    let from = Images { h, w, c: s.cin };
    let first = [-(s.padding as isize); 2];
    let window = Window { from, out, kernel: s.kernel, stride: s.stride, first };
    forward(&weight, &values, window, s, &mut y);
    let y = tensor(y, [b, out[0], out[1], s.cout]);
    let flipped = conv.flipped.clone();
    node([parent], y, move |g: Tensor<4>, _| {
        let gx = gradient(&weight, &flipped, &Values::of(&g), [b, h, w], out, s);
        [output(tensor(gx, [b, h, w, s.cin]))]
    })
}
