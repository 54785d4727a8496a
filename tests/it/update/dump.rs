//! The dumps of tests/golden/update.

use pcpo_wgpu::device::Compute;
use pcpo_wgpu::device::tensor::upload;
use pcpo_wgpu::io::tensors::{HostTensor, write_tensors};
use pcpo_wgpu::io::weights::Weights;
use pcpo_wgpu::lora::formats::load;
use pcpo_wgpu::lora::{Adapter, LayerShape};
use pcpo_wgpu::model::Conditioning;

use crate::support::golden;

/// The gradient of every matrix.
pub type Gradients = Vec<HostTensor>;

/// A dump's tensors.
pub struct Dump {
    pub file: Weights,
}

impl Dump {
    pub fn open(name: &str) -> Self {
        Self { file: Weights::open_file(&golden(&format!("update/{name}.safetensors"))).unwrap() }
    }

    pub fn values(&self, name: &str) -> Vec<f32> {
        self.file.f32(name).unwrap().values
    }

    pub fn metadata(&self, name: &str) -> String {
        self.file.required_metadata(name).unwrap()
    }

    /// Embeddings of the images `first` to `first + n`.
    pub fn conditioning(
        &self,
        compute: &Compute,
        prefix: &str,
        first: usize,
        n: usize,
    ) -> Conditioning {
        let rows = |name: &str| {
            let shape = self.file.shape(name).unwrap()[1..].to_vec();
            (self.file.rows(name, first..first + n, &shape).unwrap(), shape)
        };
        let (values, shape) = rows(&format!("{prefix}prompt_embeds"));
        let sequence = upload(&values, [n, shape[0], shape[1]], &compute.burn);
        let name = format!("{prefix}pooled_prompt_embeds");
        let pooled = self.file.has(&name).then(|| {
            let (values, shape) = rows(&name);
            upload(&values, [n, shape[0]], &compute.burn)
        });
        let mut cond = Conditioning::of_each(sequence, pooled);
        let name = format!("{prefix}prompt_lengths");
        if self.file.has(&name) {
            let lengths = self.values(&name)[first..first + n].to_vec();
            cond = cond.with_lengths(lengths.into_iter().map(|n| n as usize).collect());
        }
        let name = format!("{prefix}time_ids");
        if self.file.has(&name) {
            cond.time_ids = rows(&name).0.as_chunks().0.to_vec();
        }
        cond
    }

    /// An adapter that the dump holds under a prefix, by way of a file of its own with its alpha.
    pub fn adapter(&self, prefix: &str, network: &str, linears: &[LayerShape]) -> Adapter {
        let names = self.file.names().filter(|n| n.starts_with(prefix));
        let own = |n: &str| {
            let t = self.file.f32(n).unwrap();
            HostTensor { name: n.trim_start_matches(prefix).to_string(), ..t }
        };
        let tensors: Vec<HostTensor> = names.map(own).collect();
        let alpha = format!("{{\"{network}.lora_alpha\": {}}}", self.metadata("lora_alpha"));
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("adapter.safetensors");
        write_tensors(&file, &tensors, &[("lora_adapter_metadata", alpha)]).unwrap();
        load(&file, linears).unwrap()
    }
}
