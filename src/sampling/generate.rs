//! The one way to pictures: initial noise -> batches -> the chain of steps, for rollouts, grids,
//! `sample`, and whatever else draws.

use std::ops::Range;

use anyhow::Result;
use burn::tensor::Tensor;

use super::Replica;
use super::fleet::{Batch, Fleet};
use super::policy::{GuidanceMode, Policy, PromptPair, Weighted};
use super::trajectory::{Noise, Trajectory, Transition, sample};
use crate::device::tensor::upload;
use crate::lora::{Adapter, Lora};
use crate::model::text::embeddings::PromptEmbeddings;
use crate::philox::{self, Stream};
use crate::schedule::Step;

/// Where an image's latent begins.
#[derive(Clone, Debug, PartialEq)]
pub enum InitialLatent {
    /// In the noise of a stream's image of that number.
    Noise(Stream, u32),
    /// In these values, `[C, H, W]`.
    Values(Vec<f32>),
}

/// One image to draw.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageRequest {
    /// The row of its prompt in the embeddings.
    pub prompt: usize,
    pub initial: InitialLatent,
}

/// Images to draw.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub images: &'a [ImageRequest],
    /// Which images are one batch, and on which device.
    pub batches: &'a [Batch],
    pub embeddings: &'a PromptEmbeddings,
    /// Whose outputs are added up, the model's own without an adapter.
    pub policies: &'a [Weighted<Option<&'a Adapter>>],
    pub guidance_scale: f64,
    pub steps: &'a [Step],
    /// Indices of the steps whose transitions are kept.
    pub keep: &'a [usize],
    /// Shape of a latent, `[C, H, W]`.
    pub latent: [usize; 3],
    /// Which noise image 0 draws in its steps; image i draws that of number `first_image + i`.
    pub noise: Noise,
}

/// A batch that was drawn.
pub struct Generated {
    /// Which of the request's images.
    pub images: Range<usize>,
    /// Final latents, `[B, C, H, W]`.
    pub latents: Tensor<4>,
    /// What was to be kept, in sampling order.
    pub transitions: Vec<Transition>,
    /// Rows that the network has computed; guidance's are not counted twice.
    pub calls: usize,
}

/// Draws the images of this process's devices; `finish` takes each batch on the replica that drew
/// it, and what it makes of it has the batch's number. `tick` is called after each step of each
/// batch.
///
/// # Errors
/// When the device fails, an embedding is damaged, `finish` fails or `tick` asks to stop.
pub fn generate<R: Send>(
    fleet: &Fleet,
    request: &Request,
    tick: &(dyn Fn() -> Result<()> + Sync),
    finish: impl Fn(&Replica, Generated) -> Result<R> + Sync,
) -> Result<Vec<(usize, R)>> {
    let replicas = &fleet.replicas[..];
    let loras: Vec<Vec<Lora>> =
        request.policies.iter().map(|p| upload_adapter(replicas, p.value)).collect();
    let draw = |replica: &Replica, batch: &Batch| {
        let images = &batch.rows;
        let own = &request.images[images.clone()];
        let prompts = prompt_pair(replica, request.embeddings, own, request.latent)?;
        let guidance = GuidanceMode::new(&*replica.pipeline.net, request.guidance_scale);
        let mut policies = Vec::new();
        for (given, loras) in request.policies.iter().zip(&loras) {
            let value = Policy {
                compute: &replica.compute,
                net: &*replica.pipeline.net,
                lora: lora_of(loras, replicas, replica),
                guidance,
                prompts: &prompts,
            };
            policies.push(Weighted { weight: given.weight, value });
        }
        let first_image = request.noise.first_image + images.start as u32;
        let noise = Noise { first_image, ..request.noise };
        let latents = initial_latents(request, &request.images[images.clone()]);
        let equal = policies[0].value.equal_rows(&latents);
        let [c, h, w] = request.latent;
        let latents = upload(&latents, [images.len(), c, h, w], &replica.compute.burn);
        let (steps, keep) = (request.steps, request.keep);
        let Trajectory { latents, transitions, calls } =
            sample(&policies, latents, &equal, steps, keep, noise, &|| tick())?;
        finish(replica, Generated { images: images.clone(), latents, transitions, calls })
    };
    fleet.map(request.batches, |batch| batch.device, draw)
}

/// The adapter on every replica's device.
pub fn upload_adapter(replicas: &[Replica], adapter: Option<&Adapter>) -> Vec<Lora> {
    let all =
        adapter.into_iter().flat_map(|a| replicas.iter().map(|r| a.to_device(&r.compute.burn)));
    all.collect()
}

/// The adapter on one replica's device.
pub fn lora_of<'a>(loras: &'a [Lora], replicas: &[Replica], replica: &Replica) -> Option<&'a Lora> {
    let i = replicas.iter().position(|r| std::ptr::eq(r, replica));
    loras.get(i.expect("work is given to one of the replicas"))
}

/// What images of a latent's shape `[C, H, W]` are conditioned on, on a replica's device.
///
/// # Errors
/// When an embedding is damaged.
pub fn prompt_pair(
    replica: &Replica,
    embeddings: &PromptEmbeddings,
    images: &[ImageRequest],
    [_, h, w]: [usize; 3],
) -> Result<PromptPair> {
    let (device, pipeline) = (&replica.compute.burn, &replica.pipeline);
    let rows: Vec<usize> = images.iter().map(|i| i.prompt).collect();
    let no_rows = vec![embeddings.uncond(); rows.len()];
    let pixels = [h, w].map(|side| side * pipeline.vae.factor);
    let micro = &pipeline.micro;
    Ok(PromptPair {
        cond: embeddings.conditioning(&rows, device)?.with_time_ids(micro.of(pixels)),
        uncond: embeddings.conditioning(&no_rows, device)?.with_time_ids(micro.of_negative(pixels)),
    })
}

fn initial_latents(request: &Request, images: &[ImageRequest]) -> Vec<f32> {
    let [c, h, w] = request.latent;
    let mut values = Vec::with_capacity(images.len() * c * h * w);
    for image in images {
        match &image.initial {
            InitialLatent::Values(own) => values.extend_from_slice(own),
            InitialLatent::Noise(stream, number) => {
                values.extend(philox::noise(request.noise.seed, *stream, *number, 0, c * h * w));
            }
        }
    }
    values
}
