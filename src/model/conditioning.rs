//! What a network is conditioned on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use burn::tensor::Tensor;

use super::row_map::RowMap;

/// What a denoiser is conditioned on, for B images of P conditions: images of one prompt share one.
#[derive(Clone)]
pub struct Conditioning {
    /// Text tokens, `[P, T, D]`.
    pub sequence: Tensor<3>,
    /// Pooled text embedding, `[P, W]`, of the families that have one.
    pub pooled: Option<Tensor<2>>,
    /// The condition of each image.
    pub rows: RowMap,
    /// What layers made of the sequence, where it stays as it is from step to step.
    kept: Option<Arc<Kept>>,
}

/// Keys and values of layers, by the layers' names.
type Kept = Mutex<HashMap<String, [Tensor<3>; 2]>>;

impl Conditioning {
    /// Conditions, `[P, T, D]` and `[P, W]`, and which of them each image has.
    ///
    /// # Panics
    /// When the rows are of another number of conditions.
    pub fn new(sequence: Tensor<3>, pooled: Option<Tensor<2>>, rows: RowMap) -> Self {
        assert_eq!(sequence.dims()[0], rows.few(), "a condition for each of the rows' kinds");
        Self { sequence, pooled, rows, kept: None }
    }

    /// One condition for each image.
    pub fn of_each(sequence: Tensor<3>, pooled: Option<Tensor<2>>) -> Self {
        let rows = RowMap::identity(sequence.dims()[0]);
        Self::new(sequence, pooled, rows)
    }

    /// The same, where layers keep what they make of it: for several passes without gradients by
    /// one adapter.
    pub fn keeping(self) -> Self {
        Self { kept: Some(Arc::default()), ..self }
    }

    /// What `make` makes of the sequence for the layer `name`, `[P, T, ..]`: once, where it is
    /// kept.
    pub fn keys(&self, name: &str, make: impl Fn(&Tensor<3>) -> [Tensor<3>; 2]) -> [Tensor<3>; 2] {
        let Some(kept) = &self.kept else { return make(&self.sequence) };
        let mut kept = kept.lock().expect("no thread panics with it");
        if let Some(found) = kept.get(name) {
            return found.clone();
        }
        let made = make(&self.sequence);
        kept.insert(name.into(), made.clone());
        made
    }

    /// `n` images from `start` on, with the conditions that they need.
    pub fn narrow(&self, start: usize, n: usize) -> Self {
        let (rows, few) = self.rows.narrow(start, n);
        let (from, few) = (few.start, few.len());
        Self {
            sequence: self.sequence.clone().narrow(0, from, few),
            pooled: self.pooled.clone().map(|p| p.narrow(0, from, few)),
            rows,
            kept: None,
        }
    }

    /// Some of the images, of all conditions.
    pub fn at(&self, images: &[usize]) -> Self {
        Self { rows: self.rows.at(images), ..self.clone() }
    }

    /// These images, and below them others.
    ///
    /// # Panics
    /// When one has a pooled embedding and the other has none.
    pub fn then(self, other: Self) -> Self {
        let pooled = match (self.pooled, other.pooled) {
            (Some(one), Some(other)) => Some(Tensor::cat(vec![one, other], 0)),
            (None, None) => None,
            _ => panic!("both are of one family"),
        };
        Self {
            sequence: Tensor::cat(vec![self.sequence, other.sequence], 0),
            pooled,
            rows: self.rows.then(&other.rows),
            kept: None,
        }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
