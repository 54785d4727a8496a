//! The VAE against a reference.

use anyhow::{Result, ensure};
use burn::tensor::Tensor;

use super::subject::{Comparison, Subject};
use crate::model::Component;
use crate::model::vae::Vae;

impl Subject<'_> {
    pub(super) fn vae(&self, vae: &Component) -> Result<Vec<Comparison>> {
        let r = &self.reference;
        let vae = Vae::load(vae, &self.compute.burn, self.asked.storage)?;
        let mut lines = Vec::new();
        let fitting = |name: &str, channels: &[usize]| -> Result<Tensor<4>> {
            let x = r.tensor::<4>(name)?;
            ensure!(
                channels.contains(&x.dims()[1]) && x.dims().iter().all(|&n| n > 0),
                "{}: {name} has shape {:?}, the VAE takes {} channels",
                r.path().display(),
                x.dims(),
                channels[0]
            );
            Ok(x)
        };
        // FLUX.2's latents may be given as the decoder takes them too.
        let (own, coded) = (vae.latent_channels, vae.coded_channels);
        if r.has("out.image") {
            let latents = fitting("out.latents", &[own, coded])?;
            let packed = latents.dims()[1] == own;
            let image = if packed { vae.decode(latents) } else { vae.decode_coded(latents) };
            lines.push(self.compare_tensor("image", "out.image", &image)?);
        }
        if r.has("out.encoded") && r.has("in.image") {
            let image = fitting("in.image", &[3])?;
            let [_, _, h, w] = image.dims();
            ensure!(
                h % vae.factor == 0 && w % vae.factor == 0,
                "{}: in.image has {h}x{w} pixels, the VAE takes multiples of {}",
                r.path().display(),
                vae.factor
            );
            let packed = r.file.shape("out.encoded").is_none_or(|s| s.get(1) != Some(&coded));
            let raw = own != coded && !packed;
            let latents = if raw { vae.encode_coded(image) } else { vae.encode(image) };
            lines.push(self.compare_tensor("encoded", "out.encoded", &latents)?);
        }
        Ok(lines)
    }
}
