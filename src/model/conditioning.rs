//! What a network is conditioned on.

use burn::tensor::Tensor;

/// What a denoiser is conditioned on, for B images.
#[derive(Clone)]
pub struct Conditioning {
    /// Text tokens, `[B, T, D]`.
    pub sequence: Tensor<3>,
    /// Pooled text embedding, `[B, P]`, of the families that have one.
    pub pooled: Option<Tensor<2>>,
}

impl Conditioning {
    /// `n` rows from `start` on.
    pub fn rows(&self, start: usize, n: usize) -> Self {
        Self {
            sequence: self.sequence.clone().narrow(0, start, n),
            pooled: self.pooled.clone().map(|p| p.narrow(0, start, n)),
        }
    }

    /// All rows of all parts, in order.
    ///
    /// # Panics
    /// When there is no part, or some have a pooled embedding and others do not.
    pub fn cat(parts: Vec<Self>) -> Self {
        let pooled: Vec<Tensor<2>> = parts.iter().filter_map(|p| p.pooled.clone()).collect();
        assert!(pooled.is_empty() || pooled.len() == parts.len(), "all parts are of one family");
        Self {
            sequence: Tensor::cat(parts.into_iter().map(|p| p.sequence).collect(), 0),
            pooled: (!pooled.is_empty()).then(|| Tensor::cat(pooled, 0)),
        }
    }

    /// Row `0` repeated.
    pub fn repeat(&self, n: usize) -> Self {
        Self {
            sequence: self.sequence.clone().repeat_dim(0, n),
            pooled: self.pooled.clone().map(|p| p.repeat_dim(0, n)),
        }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.sequence.dims()[0]
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
