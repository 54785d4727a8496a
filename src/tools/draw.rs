//! Pictures from prompts, as `sample` and `eval` draw them: an opened model with its steps, and
//! the images to begin with.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::io::tensors::HostTensor;
use crate::io::weights::Weights;
use crate::lora::Adapter;
use crate::model::text::embeddings::PromptEmbeddings;
use crate::philox::Stream;
use crate::sampling::Replica;
use crate::sampling::fleet::{Batch, Fleet};
use crate::sampling::generate::{Generated, ImageRequest, InitialLatent, Request, generate};
use crate::sampling::policy::Weighted;
use crate::sampling::trajectory::Noise;
use crate::schedule::Step;

/// A model that is ready to draw.
pub struct Canvas {
    pub fleet: Fleet,
    pub embeddings: PromptEmbeddings,
    /// In the order of the pictures.
    pub prompts: Vec<String>,
    /// Pictures of each prompt.
    pub per_prompt: usize,
    /// Each with its strength, see [`Self::policies`].
    pub adapters: Vec<Weighted<Adapter>>,
    pub guidance_scale: f64,
    pub steps: Vec<Step>,
    /// Of the latents and of the steps' noise.
    pub seed: u64,
    /// Where the pictures begin, where that is not noise: `[N, C, H, W]`.
    pub latents: Option<HostTensor>,
    /// Shape of a latent, `[C, H, W]`.
    pub shape: [usize; 3],
}

/// Which pictures are drawn, and by what.
#[derive(Clone, Copy)]
pub struct Drawing<'a> {
    /// See [`Request`].
    pub policies: &'a [Weighted<Option<&'a Adapter>>],
    pub steps: &'a [Step],
    /// The number of the first picture, which its noise depends on. Given latents are those of the
    /// pictures from 0.
    pub first: usize,
    /// Pictures that the network takes at once.
    pub at_once: usize,
}

impl Canvas {
    /// What is drawn by, as a sum of networks: implicit reward guidance, base + sum of strength_k
    /// (adapter_k - base), without those that have no part in it. With one adapter of strength 1
    /// it is the adapter, with strength 0 the base. From p ~ base exp(reward / beta) it follows
    /// that a strength divides beta, and that a sum of adapters is for the sum of their rewards;
    /// docs/METHOD.md, section 10.
    pub fn policies(&self) -> Vec<Weighted<Option<&Adapter>>> {
        let own = self.adapters.iter().map(|a| Weighted { weight: a.weight, value: &a.value });
        with_base(own.collect())
    }

    /// Number of pictures.
    pub fn total(&self) -> usize {
        self.prompts.len() * self.per_prompt
    }

    /// The prompt of a picture.
    pub fn prompt(&self, image: usize) -> &str {
        &self.prompts[image / self.per_prompt]
    }

    /// Units of progress of a drawing: steps of its batches.
    pub fn units(&self, drawing: &Drawing) -> usize {
        self.batches(drawing).len() * drawing.steps.len()
    }

    /// Draws a picture of each prompt, `per_prompt` times over, and hands each batch to `finish`.
    ///
    /// # Errors
    /// As [`generate`].
    pub fn draw<R: Send>(
        &self,
        drawing: &Drawing,
        tick: &(dyn Fn() -> Result<()> + Sync),
        finish: impl Fn(&Replica, Generated) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        let drawn =
            self.request(drawing, |request| generate(&self.fleet, request, tick, finish))?;
        Ok(drawn.into_iter().map(|(_, made)| made).collect())
    }

    /// Hands over what a drawing asks of the sampler.
    ///
    /// # Errors
    /// Those of `take`.
    pub fn request<R>(
        &self,
        drawing: &Drawing,
        take: impl FnOnce(&Request) -> Result<R>,
    ) -> Result<R> {
        let images = self.images(drawing.first)?;
        take(&Request {
            images: &images,
            batches: &self.batches(drawing),
            embeddings: &self.embeddings,
            policies: drawing.policies,
            guidance_scale: self.guidance_scale,
            steps: drawing.steps,
            keep: &[],
            latent: self.shape,
            noise: Noise { seed: self.seed, first_image: drawing.first as u32 },
        })
    }

    fn batches(&self, drawing: &Drawing) -> Vec<Batch> {
        self.fleet.layout.batches(self.total(), drawing.at_once)
    }

    fn images(&self, first: usize) -> Result<Vec<ImageRequest>> {
        let size: usize = self.shape.iter().product();
        let image = |i: usize| {
            let initial = match &self.latents {
                Some(t) if first == 0 => {
                    InitialLatent::Values(t.values[i * size..(i + 1) * size].to_vec())
                }
                Some(_) | None => InitialLatent::Noise(Stream::Evaluation, (first + i) as u32),
            };
            Ok(ImageRequest { prompt: self.embeddings.row_of(self.prompt(i))?, initial })
        };
        (0..self.total()).map(image).collect()
    }
}

/// The tensor `latents` of a file, `[total, channels, H, W]`.
///
/// # Errors
/// Names the file, and what its shape should be.
pub fn given_latents(file: &Path, total: usize, channels: usize) -> Result<HostTensor> {
    let t = Weights::open_file(file)?.f32("latents")?;
    ensure!(
        t.shape.len() == 4 && t.shape[..2] == [total, channels],
        "--latents {}: latents has shape {:?}, expected [{total}, {channels}, H, W], one for each \
         of {total} images",
        file.display(),
        t.shape
    );
    Ok(t)
}

/// What `base + sum of weight_k (value_k - base)` is a sum of; the base is `None`.
fn with_base<T>(given: Vec<Weighted<T>>) -> Vec<Weighted<Option<T>>> {
    let given = given.into_iter().filter(|a| a.weight != 0.0);
    let own = given.map(|a| Weighted { weight: a.weight, value: Some(a.value) });
    let own: Vec<Weighted<Option<T>>> = own.collect();
    let rest = 1.0 - own.iter().map(|a| a.weight).sum::<f64>();
    // What rounding leaves of strengths that add up to 1 is not worth a network's call.
    let base = (rest.abs() > 1e-12).then_some(Weighted { weight: rest, value: None });
    base.into_iter().chain(own).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// METHOD2 9.13: the networks of Gaussians are known. Rewards that are linear add up exactly;
    /// for one that narrows the distribution the sum is not the tilt.
    #[test]
    fn strengths_mix_gaussians_as_the_formula_says() {
        let (alpha_bar, x): (f64, f64) = (0.3, 0.37);
        // eps of N(mean, variance) at the noise level of alpha_bar.
        let eps = |mean: f64, variance: f64| {
            let off = x - alpha_bar.sqrt() * mean;
            (1.0 - alpha_bar).sqrt() * off / (alpha_bar * variance + 1.0 - alpha_bar)
        };
        let mixed = |given: Vec<Weighted<f64>>| {
            let parts = with_base(given).into_iter();
            parts.map(|p| p.weight * p.value.unwrap_or(eps(0.0, 1.0))).sum::<f64>()
        };
        let one = |weight, value| Weighted { weight, value };
        let two = mixed(vec![one(0.7, eps(1.5, 1.0)), one(-2.0, eps(0.4, 1.0))]);
        assert!((two - eps(0.7 * 1.5 - 2.0 * 0.4, 1.0)).abs() < 1e-12);
        let narrowed = mixed(vec![one(2.0, eps(0.0, 0.25))]);
        assert!((narrowed - 0.489_311_17).abs() < 1e-8, "{narrowed}");
        assert!((eps(0.0, 1.0 / 7.0) - 0.416_721_05).abs() < 1e-8);
        // The other's network is not called.
        assert_eq!(with_base(vec![one(1.0, 5.0)]), [Weighted::whole(Some(5.0))]);
        assert_eq!(with_base(vec![one(0.0, 5.0)]), [Weighted::whole(None)]);
    }
}
