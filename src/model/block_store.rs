//! The blocks of a network: all held on the device, or each read when its turn comes and dropped
//! after it, for weights that are larger than the device's memory.

use std::any::Any;
use std::ops::Deref;
use std::sync::{Arc, Mutex, Weak};

use anyhow::Result;
use burn::tensor::Device;

use super::loader::{Loader, PreparedWeights, Storage};
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
    prepared: Option<Arc<PreparedWeights>>,
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
        let Some(stream) = &l.stream else {
            let blocks: Vec<T> = (0..count).map(|i| load(l, i)).collect::<Result<_>>()?;
            let layers = blocks.iter().flat_map(T::layers).collect();
            return Ok(Self { kept: Kept::Held(blocks), layers });
        };
        let source = Source {
            weights: l.weights.clone(),
            device: l.device.clone(),
            storage: l.storage,
            prepared: stream.prepared(),
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

    /// Keeps a block that is read when its turn comes, for as long as the result lives.
    ///
    /// # Panics
    /// As [`Self::get`].
    pub fn keep(&self, i: usize) -> Option<Arc<dyn Any + Send + Sync>>
    where
        T: 'static,
    {
        match self.get(i) {
            Block::Held(_) => None,
            Block::Read(block) => Some(block),
        }
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;
    use crate::model::component::Component;
    use crate::model::loader::Stream;

    /// A block that counts how often it is read.
    struct Counted;

    impl StoredBlock for Counted {
        type Layer = usize;

        fn layers(&self) -> Vec<usize> {
            vec![1, 2]
        }
    }

    #[test]
    fn a_block_that_is_kept_is_read_once() {
        let dir =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/sd3/transformer");
        let weights = Component::folder(&dir).unwrap().weights().unwrap();
        let device = Device::flex();
        let loader = Loader::new(&weights, &device, Storage::F32);
        let reads = Arc::new(AtomicUsize::new(0));
        let counter = reads.clone();
        let load = move |_: &Loader, _| {
            counter.fetch_add(1, Relaxed);
            Ok(Counted)
        };
        let held = BlockStore::new(&loader, 3, load.clone()).unwrap();
        assert_eq!((reads.swap(0, Relaxed), held.len(), held.layers().len()), (3, 3, 6));
        assert!(held.keep(0).is_none());
        let store = BlockStore::new(&loader.streaming(Some(Stream::FromDisk)), 3, load).unwrap();
        assert_eq!((reads.swap(0, Relaxed), store.len(), store.layers().len()), (3, 3, 6));
        drop(store.get(1));
        drop(store.get(1));
        assert_eq!(reads.swap(0, Relaxed), 2, "it is let go of");
        let kept = store.keep(1);
        drop(store.get(1));
        drop(store.get(1));
        assert_eq!(reads.swap(0, Relaxed), 1, "it is kept");
        drop(kept);
        drop(store.get(1));
        assert_eq!(reads.load(Relaxed), 1);
    }
}
