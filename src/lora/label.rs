//! What an adapter's file says of it besides the numbers: by modelspec 1.0, in sd-scripts' words,
//! and in our own.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;

use crate::io::tensors::HostTensor;
use crate::io::weights::Weights;

/// What a file says of its adapter besides the numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Label {
    /// The network's place in its pipeline, which keys begin with.
    pub network: &'static str,
    /// Entries of the metadata: `modelspec.*`, `ss_*` and `pcpo.*`.
    pub about: BTreeMap<String, String>,
}

impl Label {
    /// Nothing but the network's place.
    pub fn plain(network: &'static str) -> Self {
        Self { network, about: BTreeMap::new() }
    }
}

/// Whether a metadata entry says what an adapter is, in whichever layout it is written.
fn is_about(key: &str) -> bool {
    let sizes = ["ss_network_module", "ss_network_dim", "ss_network_alpha"];
    let known = ["modelspec.", "ss_", "pcpo."].iter().any(|start| key.starts_with(start));
    known && key != HASH && !sizes.contains(&key)
}

/// The modelspec entry of the hash over all values.
pub const HASH: &str = "modelspec.hash_sha256";

/// What a file says of its adapter, for it to be written again.
///
/// # Errors
/// When the file cannot be read.
pub fn about(path: &Path) -> Result<BTreeMap<String, String>> {
    let mut all = Weights::open_file(path)?.all_metadata()?;
    all.retain(|key, _| is_about(key));
    Ok(all)
}

/// SHA-256 over all values in the order of the file.
pub fn hash(tensors: &[HostTensor]) -> String {
    use sha2::Digest;
    let mut hasher = sha2::Sha256::new();
    tensors.iter().for_each(|t| hasher.update(bytemuck::cast_slice::<f32, u8>(&t.values)));
    format!("0x{:x}", hasher.finalize())
}
