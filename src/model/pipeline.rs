//! A whole model, of any family: network, VAE and schedule. Text encoders are apart: they run once,
//! and need not stay.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use burn::tensor::Device;

use super::conditioning::MicroConditioning;
use super::config::NetworkConfig;
use super::denoiser::Denoiser;
use super::family::Family;
use super::files::ModelFiles;
use super::loader::{Storage, Stream};
use super::resolution::{Resolution, latent_size};
use super::text::TextEncoders;
use super::text::embeddings::{PromptEmbeddings, fits};
use super::vae::Vae;
use crate::schedule::Schedule;

/// Checks that a network is told sizes, where some are given for it.
///
/// # Errors
/// Names the flag.
pub fn check_time_ids(micro: MicroConditioning, network: &dyn NetworkConfig) -> Result<()> {
    ensure!(
        micro == MicroConditioning::default() || network.takes_time_ids(),
        "--time-ids: is for SDXL, whose network is told of sizes; leave it out"
    );
    Ok(())
}

/// Where a model's text embeddings come from.
#[derive(Clone, Copy)]
pub enum TextFrom<'a> {
    /// The model's encoders, with this many tokens of T5 or Qwen3.
    Encoders(usize),
    /// A file that `embed` wrote: no encoder is loaded.
    File(&'a Path),
}

/// The texts that a model is to be conditioned on.
#[derive(Clone, Copy)]
pub struct Texts<'a> {
    pub prompts: &'a [String],
    /// What guidance leads away from. Where nothing is given it is the empty prompt, or zeros where
    /// the model has them.
    pub negative: Option<&'a str>,
}

/// The text embeddings of prompts for a model: the encoders are loaded, run once, and dropped.
///
/// # Errors
/// Names the file and the field or tensor that is missing, damaged, not supported, or of another
/// model.
pub fn embed(
    files: &ModelFiles,
    texts: Texts,
    from: TextFrom,
    device: &Device,
    storage: Storage,
) -> Result<PromptEmbeddings> {
    let context = files.family.config(&files.network()?.config)?.context();
    let zeros = texts.negative.is_none() && files.zeros_for_no_prompt()?;
    let negative = (!zeros).then(|| texts.negative.unwrap_or_default());
    let embeddings = match from {
        TextFrom::File(path) => {
            let embeddings = PromptEmbeddings::open(path)?;
            let source = format!("--embeddings {}", path.display());
            fits(context, embeddings.widths(), &source)?;
            // A prompt that is missing is missed now, not in the middle of a run.
            texts.prompts.iter().try_for_each(|p| embeddings.row_of(p).map(drop))?;
            ensure!(
                embeddings.has_lengths() == (files.family == Family::ZImage),
                "{source}: {} tensor lengths, and {} takes {}; make the file with this model",
                if embeddings.has_lengths() { "holds a" } else { "holds no" },
                files.family.class(),
                if files.family == Family::ZImage { "one" } else { "none" },
            );
            embeddings
        }
        TextFrom::Encoders(length) => {
            let encoders = TextEncoders::load(files, length, context[0], device, storage)?;
            fits(context, encoders.widths(), &files.shown().to_string())?;
            let negative = negative.map(str::to_string).into_iter();
            encoders.encode(&negative.chain(texts.prompts.iter().cloned()).collect::<Vec<_>>())?
        }
    };
    embeddings.against(negative)
}

/// A loaded model.
pub struct Pipeline {
    pub family: Family,
    /// Whether it is of Stable Diffusion 2.
    pub second: bool,
    pub net: Box<dyn Denoiser>,
    pub vae: Vae,
    pub schedule: Schedule,
    /// What the network is told of sizes.
    pub micro: MicroConditioning,
    /// Height and width of its latents.
    size: [usize; 2],
}

impl Pipeline {
    /// Loads a model; `resolution` is the size of its images where it is not the model's own,
    /// `micro` what its network is told of sizes where that is not their own, `stream` where its
    /// blocks are read from when their turn comes.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, damaged or not supported.
    pub fn load(
        files: &ModelFiles,
        device: &Device,
        storage: Storage,
        stream: Option<Stream>,
        resolution: Option<Resolution>,
        micro: MicroConditioning,
    ) -> Result<Self> {
        ensure!(
            !files.is_network_alone(),
            "--model {}: is the folder of a network alone; give the folder that holds \
             model_index.json",
            files.shown()
        );
        let family = files.family;
        let schedule = files.schedule()?;
        let net = files.load_network(device, storage, stream)?;
        let vae = Vae::load(&files.component("vae")?, device, storage)?;
        let own = net.latent_shape();
        let channels = own[0];
        ensure!(
            vae.latent_channels == channels,
            "{}: the VAE has {} latent channels, the network {channels}; the parts belong to \
             different models",
            files.shown(),
            vae.latent_channels
        );
        let size = latent_size(resolution, vae.factor, own)?;
        net.accepts(size).context("--resolution")?;
        check_time_ids(micro, net.config())?;
        Ok(Self { schedule, family, second: files.is_second(), net, vae, micro, size })
    }

    /// The same, whose pictures are decoded in tiles where `tiled` says so.
    pub fn in_tiles(mut self, tiled: bool) -> Self {
        self.vae.tile = tiled.then_some(self.vae.tile_side);
        self
    }

    /// Shape of one latent, [C, H, W].
    pub fn latent_shape(&self) -> [usize; 3] {
        let [h, w] = self.size;
        [self.vae.latent_channels, h, w]
    }

    /// Tokens that the network makes of one latent.
    pub fn tokens(&self) -> usize {
        self.net.config().tokens(self.size)
    }
}
