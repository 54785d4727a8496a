//! The pictures that show where a run stands: fixed prompts and noise, before, after and between.

use image::{Rgb, RgbImage, imageops};

use crate::config::Settings;
use crate::config::settings::GRID_COLUMNS;
use crate::model::text::embeddings::PromptEmbeddings;
use crate::philox::Stream;
use crate::reward::Prompt;
use crate::sampling::fleet::{Batch, Fleet};
use crate::sampling::generate::{ImageRequest, InitialLatent};
use crate::sampling::trajectory::Noise;
use crate::schedule::Step;

/// How much an evaluation draws.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Extent {
    /// All prompts with all their pictures, which are measured.
    Full,
    /// One row of pictures to look at, between evaluations.
    Row,
    /// One picture, to see whether the policy is still finite where no grid is due.
    Probe,
}

/// What an evaluation draws: a function of settings and model.
pub(crate) struct EvaluationPlan {
    /// One for each image.
    pub prompts: Vec<Prompt>,
    pub images: Vec<ImageRequest>,
    pub batches: Vec<Batch>,
    /// Without noise for a flow, as its users will draw it.
    pub steps: Vec<Step>,
    pub noise: Noise,
    pub extent: Extent,
}

/// Prompts that a run's grids show.
fn columns(s: &Settings) -> usize {
    s.evaluation_prompts().len().min(GRID_COLUMNS)
}

impl EvaluationPlan {
    /// # Errors
    /// When a prompt has no embedding.
    pub fn new(
        s: &Settings,
        fleet: &Fleet,
        steps: &[Step],
        embeddings: &PromptEmbeddings,
        extent: Extent,
    ) -> anyhow::Result<Self> {
        let (columns, fixed) = (columns(s), s.evaluation_prompts());
        let total = match extent {
            Extent::Full => s.evaluated(),
            Extent::Row => columns,
            Extent::Probe => 1,
        };
        let prompts: Vec<Prompt> = (0..total).map(|i| fixed[i % fixed.len()].clone()).collect();
        let image = |(i, prompt): (usize, &Prompt)| {
            let initial = InitialLatent::Noise(Stream::Evaluation, i as u32);
            anyhow::Ok(ImageRequest { prompt: embeddings.row_of(&prompt.text)?, initial })
        };
        let deterministic = fleet.first().pipeline.family.is_flow();
        let step = |s: &Step| if deterministic { s.without_noise() } else { *s };
        // Images numbered from the top, which no rollout reaches.
        let first_image = u32::MAX - s.evaluated() as u32;
        Ok(Self {
            images: prompts.iter().enumerate().map(image).collect::<anyhow::Result<_>>()?,
            prompts,
            batches: fleet.layout.batches(total, columns.min(s.batch)),
            steps: steps.iter().map(step).collect(),
            noise: Noise { seed: s.seed, first_image },
            extent,
        })
    }
}

/// The pictures of an evaluation's first prompts side by side, a column a prompt, 2 pixels apart.
pub(crate) fn grid(s: &Settings, images: &[RgbImage]) -> RgbImage {
    let Some(first) = images.first() else { return RgbImage::new(1, 1) };
    let (columns, prompts) = (columns(s), s.evaluation_prompts().len());
    let shown = images.iter().enumerate().filter(|(i, _)| i % prompts < columns);
    let shown: Vec<&RgbImage> = shown.map(|(_, image)| image).collect();
    let (w, h) = (first.width() + 2, first.height() + 2);
    let rows = shown.len().div_ceil(columns) as u32;
    let white = Rgb([255; 3]);
    let mut canvas = RgbImage::from_pixel(w * columns as u32 - 2, h * rows - 2, white);
    for (i, image) in shown.into_iter().enumerate() {
        let (x, y) = ((i % columns) as i64, (i / columns) as i64);
        imageops::replace(&mut canvas, image, i64::from(w) * x, i64::from(h) * y);
    }
    canvas
}

/// Two grids of one size, one below the other: before and after.
pub(crate) fn before_after(before: &RgbImage, after: &RgbImage) -> RgbImage {
    let height = before.height() + after.height() + 10;
    let mut canvas = RgbImage::from_pixel(after.width(), height, Rgb([255; 3]));
    imageops::replace(&mut canvas, before, 0, 0);
    imageops::replace(&mut canvas, after, 0, i64::from(before.height()) + 10);
    canvas
}
