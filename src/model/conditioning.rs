//! What a network is conditioned on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use burn::tensor::Tensor;

use super::row_map::RowMap;

/// How many numbers SDXL is told of a picture: the original height and width, top and left of what
/// was cut out of it, and the height and width that are wanted; all in pixels.
pub const TIME_IDS: usize = 6;

/// These numbers; diffusers calls them `add_time_ids`.
pub type TimeIds = [f32; TIME_IDS];

/// What SDXL is told of sizes, where it is not the size of the picture itself.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MicroConditioning {
    pub given: Option<TimeIds>,
    /// Of the negative prompt; those of the prompt where nothing is given.
    pub negative: Option<TimeIds>,
}

impl MicroConditioning {
    /// What pictures of a height and width in pixels are told.
    pub fn of(&self, [height, width]: [usize; 2]) -> TimeIds {
        let (h, w) = (height as f32, width as f32);
        self.given.unwrap_or([h, w, 0.0, 0.0, h, w])
    }

    /// What their negative prompt is told.
    pub fn of_negative(&self, pixels: [usize; 2]) -> TimeIds {
        self.negative.unwrap_or(self.of(pixels))
    }
}

/// What a denoiser is conditioned on, for B images of P conditions: images of one prompt share one.
#[derive(Clone)]
pub struct Conditioning {
    /// Text tokens, `[P, T, D]`.
    pub sequence: Tensor<3>,
    /// How many of T are a condition's own, where a family tells them from what fills up rows; the
    /// others are zeros. Empty where all are.
    pub lengths: Vec<usize>,
    /// Pooled text embedding, `[P, W]`, of the families that have one.
    pub pooled: Option<Tensor<2>>,
    /// Sizes in pixels, one for each of P, of the families that are told them.
    pub time_ids: Vec<TimeIds>,
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
        let (lengths, time_ids) = (Vec::new(), Vec::new());
        Self { sequence, lengths, pooled, time_ids, rows, kept: None }
    }

    /// The same with sizes in pixels, those of all conditions.
    pub fn with_time_ids(self, ids: TimeIds) -> Self {
        let time_ids = vec![ids; self.rows.few()];
        Self { time_ids, ..self }
    }

    /// The same, where of each condition's tokens so many are its own.
    pub fn with_lengths(self, lengths: Vec<usize>) -> Self {
        Self { lengths, ..self }
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
            lengths: self.lengths.iter().skip(from).take(few).copied().collect(),
            time_ids: self.time_ids.iter().skip(from).take(few).copied().collect(),
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
            lengths: [self.lengths, other.lengths].concat(),
            pooled,
            time_ids: [self.time_ids, other.time_ids].concat(),
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
