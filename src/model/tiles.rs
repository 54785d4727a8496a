//! Pictures decoded tile by tile, for devices that cannot hold the decoder's largest level, as
//! diffusers' `AutoencoderKL.tiled_decode` does it. Group normalisation sees a tile only, so that
//! the picture is not quite that of one piece; overlaps are blended.

use burn::tensor::{Tensor, TensorData};

/// Side of a tile in latent pixels.
pub const TILE: usize = 64;

/// Share of a tile that the next one overlaps: a quarter.
const OVERLAP: usize = 4;

/// Latents `[B, C, h, w]` -> images of `factor` times the size, in tiles of a side in latent
/// pixels.
pub fn tiled(
    latents: Tensor<4>,
    tile: usize,
    factor: usize,
    decode: impl Fn(Tensor<4>) -> Tensor<4>,
) -> Tensor<4> {
    let [_, _, h, w] = latents.dims();
    if h <= tile && w <= tile {
        return decode(latents);
    }
    // Tiles begin so many latent pixels apart, and are blended over so many pixels.
    let apart = (tile - tile / OVERLAP).max(1);
    let blended = tile * factor / OVERLAP;
    let kept = tile * factor - blended;
    let mut rows = Vec::new();
    // Of the row above and of the tile to the left, as decoded and blended themselves.
    let mut above: Vec<Tensor<4>> = Vec::new();
    for y in (0..h).step_by(apart) {
        let (mut row, mut own) = (Vec::new(), Vec::<Tensor<4>>::new());
        for (j, x) in (0..w).step_by(apart).enumerate() {
            let part = latents.clone().narrow(2, y, tile.min(h - y));
            let mut image = decode(part.narrow(3, x, tile.min(w - x)));
            if let Some(above) = above.get(j) {
                image = blend(above, image, blended, 2);
            }
            if let Some(left) = own.last() {
                image = blend(left, image, blended, 3);
            }
            let [_, _, height, width] = image.dims();
            row.push(image.clone().narrow(2, 0, kept.min(height)).narrow(3, 0, kept.min(width)));
            own.push(image);
        }
        rows.push(Tensor::cat(row, 3));
        above = own;
    }
    Tensor::cat(rows, 2)
}

/// `next` with its first pixels along a dimension mixed with the last of `before`, more and more of
/// its own.
fn blend(before: &Tensor<4>, next: Tensor<4>, extent: usize, dim: usize) -> Tensor<4> {
    let (had, has) = (before.dims()[dim], next.dims()[dim]);
    let extent = extent.min(had).min(has);
    if extent == 0 {
        return next;
    }
    let share: Vec<f32> = (0..extent).map(|i| i as f32 / extent as f32).collect();
    let mut shape = [1; 4];
    shape[dim] = extent;
    let share: Tensor<4> = Tensor::from_data(TensorData::new(share, shape), &next.device());
    // Along another dimension the neighbour may be larger: rows of a last, shorter tile.
    let mut old = before.clone().narrow(dim, had - extent, extent);
    for other in [2, 3] {
        old = old.narrow(other, 0, if other == dim { extent } else { next.dims()[other] });
    }
    let mixed = old * (-share.clone() + 1.0) + next.clone().narrow(dim, 0, extent) * share;
    if extent == has {
        return mixed;
    }
    Tensor::cat(vec![mixed, next.narrow(dim, extent, has - extent)], dim)
}
