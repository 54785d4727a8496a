//! The blocks of a network: all held on the device, or each read when its turn comes and dropped
//! after it, for weights that are larger than the device's memory.

use std::ops::Deref;
use std::sync::{Arc, Mutex, Weak};

use anyhow::Result;
use burn::tensor::Device;

use super::loader::{Loader, Prepared, Storage, Stream};
use crate::io::weights::Weights;

/// A block, as a network's blocks see it.
pub trait StoredBlock: Send + Sync {
    /// What is said of a layer.
    type Layer: Send + Sync;

    /// The layers that a LoRA can target.
    fn layers(&self) -> Vec<Self::Layer>;
}

type Load<T> = dyn Fn(&Loader, usize) -> Result<T> + Send + Sync;

/// Blocks of one kind.
pub struct BlockStore<T: StoredBlock> {
    kept: Kept<T>,
    layers: Vec<T::Layer>,
}

enum Kept<T> {
    Held(Vec<T>),
    Streamed(Source<T>),
}

/// Where blocks are read from.
struct Source<T> {
    weights: Weights,
    device: Device,
    storage: Storage,
    /// Matrices as they go to the device, where the host has room for them.
    prepared: Option<Arc<Prepared>>,
    load: Box<Load<T>>,
    /// Blocks that are in use: batches that run at once share one.
    slots: Vec<Mutex<Weak<T>>>,
}

impl<T> Source<T> {
    fn read(&self, i: usize) -> Result<Arc<T>> {
        let mut slot = self.slots[i].lock().expect("no thread panics with it but by an error");
        if let Some(block) = slot.upgrade() {
            return Ok(block);
        }
        let mut loader = Loader::new(&self.weights, &self.device, self.storage);
        loader.prepared = self.prepared.clone();
        let block = Arc::new((self.load)(&loader, i)?);
        *slot = Arc::downgrade(&block);
        Ok(block)
    }
}

/// A block for the time of its work.
pub enum Block<'a, T> {
    Held(&'a T),
    Read(Arc<T>),
}

impl<T> Deref for Block<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self {
            Self::Held(block) => block,
            Self::Read(block) => block,
        }
    }
}

impl<T: StoredBlock> BlockStore<T> {
    /// `count` blocks that `load` reads from the component that `l` is of, held or streamed as `l`
    /// says. Streamed ones are read once here, so that what is missing or damaged is known now.
    ///
    /// # Errors
    /// Those of `load`.
    pub fn new(
        l: &Loader,
        count: usize,
        load: impl Fn(&Loader, usize) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        let Some(stream) = l.stream else {
            let blocks: Vec<T> = (0..count).map(|i| load(l, i)).collect::<Result<_>>()?;
            let layers = blocks.iter().flat_map(T::layers).collect();
            return Ok(Self { kept: Kept::Held(blocks), layers });
        };
        let source = Source {
            weights: l.weights.clone(),
            device: l.device.clone(),
            storage: l.storage,
            prepared: (stream == Stream::FromHost).then(Arc::default),
            load: Box::new(load),
            slots: (0..count).map(|_| Mutex::new(Weak::new())).collect(),
        };
        let mut layers = Vec::new();
        for i in 0..count {
            layers.extend(source.read(i)?.layers());
        }
        Ok(Self { kept: Kept::Streamed(source), layers })
    }

    pub fn len(&self) -> usize {
        match &self.kept {
            Kept::Held(blocks) => blocks.len(),
            Kept::Streamed(source) => source.slots.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The layers that a LoRA can target, block by block.
    pub fn layers(&self) -> &[T::Layer] {
        &self.layers
    }

    /// Block `i`.
    ///
    /// # Panics
    /// When its file, which could be read before, cannot be read any more.
    pub fn get(&self, i: usize) -> Block<'_, T> {
        match &self.kept {
            Kept::Held(blocks) => Block::Held(&blocks[i]),
            Kept::Streamed(source) => match source.read(i) {
                Ok(block) => Block::Read(block),
                Err(e) => panic!("the weights of block {i} cannot be read again: {e:#}"),
            },
        }
    }
}
