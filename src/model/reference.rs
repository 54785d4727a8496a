//! Reference files: tensors that PyTorch wrote, by the names of a diffusers class's `forward`.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use burn::tensor::{Device, Tensor};

use super::conditioning::{Conditioning, TIME_IDS};
use super::config::NetworkConfig;
use crate::device::tensor::upload;
use crate::io::tensors::HostTensor;
use crate::io::weights::Weights;

/// A reference file, and the device that its tensors go to.
pub struct ReferenceTensors {
    pub file: Weights,
    pub device: Device,
}

impl ReferenceTensors {
    /// Opens a file.
    ///
    /// # Errors
    /// When it is not safetensors.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        Ok(Self { file: Weights::open_file(path)?, device: device.clone() })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.file.source()
    }

    /// Whether it holds a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.file.has(name)
    }

    /// A tensor as it is: a value that is not finite is a failed comparison, not an unreadable
    /// file.
    ///
    /// # Errors
    /// When it is missing or has another number of dimensions.
    pub fn tensor<const D: usize>(&self, name: &str) -> Result<Tensor<D>> {
        let HostTensor { shape, values, .. } = self.file.raw(name)?;
        ensure!(
            shape.iter().all(|&n| n > 0),
            "{}: {name} has shape {shape:?}, and is empty",
            self.path().display()
        );
        let found = shape.clone();
        let shape: [usize; D] = shape.try_into().ok().with_context(|| {
            let path = self.path().display();
            format!("{path}: {name} has shape {found:?}, expected {D} dimensions")
        })?;
        Ok(upload(&values, shape, &self.device))
    }

    /// A tensor's values, of which there have to be so many.
    ///
    /// # Errors
    /// When it is missing or of another size.
    pub fn values(&self, name: &str, count: usize) -> Result<Vec<f32>> {
        let t = self.file.raw(name)?;
        let path = self.path().display();
        ensure!(
            t.values.len() == count,
            "{path}: {name} has shape {:?}, expected {count} values",
            t.shape
        );
        Ok(t.values)
    }

    /// What the network is conditioned on, for `rows` images: `in.encoder_hidden_states`, and
    /// `in.pooled_projections` and `in.time_ids` where the network takes them.
    ///
    /// # Errors
    /// When one is missing or does not fit the network.
    pub fn conditioning(&self, rows: usize, network: &dyn NetworkConfig) -> Result<Conditioning> {
        let context = network.context();
        let sequence = self.tensor::<3>("in.encoder_hidden_states")?;
        let pooled = (context[1] > 0).then(|| self.tensor::<2>("in.pooled_projections"));
        let pooled = pooled.transpose()?;
        let widths = [sequence.dims()[2], pooled.as_ref().map_or(0, |p| p.dims()[1])];
        let counts = [sequence.dims()[0], pooled.as_ref().map_or(rows, |p| p.dims()[0])];
        ensure!(
            counts == [rows; 2] && widths == context,
            "{}: embeddings of {counts:?} images, {widths:?} wide, do not fit {rows} images and a \
             network that takes {context:?}",
            self.path().display()
        );
        let mut cond = Conditioning::of_each(sequence, pooled);
        if network.takes_time_ids() {
            let ids = self.values("in.time_ids", rows * TIME_IDS)?;
            cond.time_ids = ids.as_chunks().0.to_vec();
        }
        Ok(cond)
    }

    /// What a network is conditioned on that takes captions of their own lengths, for `rows`
    /// images: `in.cap_feats` `[B, L, width]` where `in.cap_mask` `[B, L]` is not 0, or all of it.
    ///
    /// # Errors
    /// When one is missing or does not fit, or a caption has no token.
    pub fn captions(&self, rows: usize, width: usize) -> Result<Conditioning> {
        let path = self.path().display();
        let features = self.file.raw("in.cap_feats")?;
        let (shape, tokens) = (&features.shape, features.shape.get(1).copied().unwrap_or(0));
        ensure!(
            *shape == [rows, tokens, width],
            "{path}: in.cap_feats has shape {shape:?}, expected [{rows}, L, {width}]"
        );
        let mask = match self.has("in.cap_mask") {
            true => self.values("in.cap_mask", rows * tokens)?,
            false => vec![1.0; rows * tokens],
        };
        let (mut values, mut lengths) = (Vec::with_capacity(features.values.len()), Vec::new());
        for row in 0..rows {
            let own = (0..tokens).filter(|i| mask[row * tokens + i] != 0.0);
            let own: Vec<usize> = own.collect();
            ensure!(!own.is_empty(), "{path}: in.cap_mask leaves row {row} without a token");
            for i in &own {
                values.extend_from_slice(&features.values[(row * tokens + i) * width..][..width]);
            }
            values.resize((row + 1) * tokens * width, 0.0);
            lengths.push(own.len());
        }
        let sequence = upload(&values, [rows, tokens, width], &self.device);
        Ok(Conditioning::of_each(sequence, None).with_lengths(lengths))
    }
}
