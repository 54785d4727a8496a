//! transformers' `CLIPVisionModelWithProjection`.

use anyhow::Result;
use burn::tensor::Tensor;

use crate::model::loader::Loader;
use crate::model::nn::{Activation, Conv2d, LayerNorm, Linear, channels_last};
use crate::model::text::clip::{CLIP_LAYER, Layer};

/// The numbers of a CLIP image encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    pub width: usize,
    pub heads: usize,
    /// Width of the feed-forward.
    pub inner: usize,
    pub layers: usize,
    /// Side of its pictures in pixels.
    pub size: usize,
    /// Side of a patch in pixels.
    pub patch: usize,
    /// Width of its features.
    pub projection: usize,
    pub eps: f64,
    pub activation: Activation,
}

/// The tokens of pictures: the class first, then the patches, row by row, `[B, 1 + patches,
/// width]`.
pub fn tokens(patches: &Conv2d, class: &Tensor<3>, pictures: Tensor<4>) -> Tensor<3> {
    let x = patches.forward(channels_last(pictures));
    let [b, rows, columns, width] = x.dims();
    let x = x.reshape([b, rows * columns, width]);
    Tensor::cat(vec![class.clone().expand([b, 1, width]), x], 1)
}

/// An image encoder.
pub struct Vision {
    pub config: VisionConfig,
    class: Tensor<3>,
    patches: Conv2d,
    positions: Tensor<3>,
    before: LayerNorm,
    layers: Vec<Layer>,
    after: LayerNorm,
    projection: Linear,
}

impl Vision {
    /// Loads the parts of `vision_model`, and `visual_projection` beside it.
    ///
    /// # Errors
    /// Names the file and the tensor that is missing or of the wrong shape.
    pub fn load(outer: &Loader, c: VisionConfig) -> Result<Self> {
        let root = outer.at("vision_model");
        let parts = root.at("embeddings");
        let tokens = (c.size / c.patch).pow(2) + 1;
        let layer = |i: usize| {
            let place = root.at(format!("encoder.layers.{i}"));
            Layer::load(&place, &CLIP_LAYER, [c.width, c.inner], c.heads, c.eps)
        };
        Ok(Self {
            class: parts.tensor("class_embedding", [c.width])?.reshape([1, 1, c.width]),
            patches: Conv2d::patches(&parts, "patch_embedding", 3, c.width, c.patch)?,
            positions: parts
                .tensor("position_embedding.weight", [tokens, c.width])?
                .unsqueeze::<3>(),
            // The name has lost a letter in every checkpoint.
            before: LayerNorm::load(&root, "pre_layrnorm", c.width, c.eps)?,
            layers: (0..c.layers).map(layer).collect::<Result<_>>()?,
            after: LayerNorm::load(&root, "post_layernorm", c.width, c.eps)?,
            projection: Linear::load(outer, "visual_projection", c.width, c.projection)?,
            config: c,
        })
    }

    /// Prepared pictures `[B, 3, size, size]` -> projected features `[B, projection]`, not
    /// normalised.
    pub fn forward(&self, pictures: Tensor<4>) -> Tensor<2> {
        let x = tokens(&self.patches, &self.class, pictures);
        let mut x = self.before.forward(x + self.positions.clone());
        for layer in &self.layers {
            x = layer.forward(x, None, self.config.activation);
        }
        let class = self.after.forward(x.narrow(1, 0, 1)).squeeze_dim::<2>(1);
        self.projection.forward(class, None)
    }
}
