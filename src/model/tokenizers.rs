//! Where a model's tokenizers are.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::files::ModelFiles;
use super::text::tokenizer::{CLIP_VOCABULARY, Tokenizer};

impl ModelFiles {
    /// The tokenizer of a text encoder, of a CLIP with `max_tokens`.
    ///
    /// # Errors
    /// Names the file that is missing or cannot be used.
    pub fn clip_tokenizer(
        &self,
        encoder: &str,
        [max_tokens, entries]: [usize; 2],
    ) -> Result<Tokenizer> {
        let folder = encoder.replace("text_encoder", "tokenizer");
        if let Some(dir) = self.tokenizer_dir(&folder) {
            return Tokenizer::load(&dir, max_tokens);
        }
        // The second encoder, and the one of Stable Diffusion 2, are open_clip's.
        let open_clip = self.pads_with_letter(encoder);
        if let Some(first) = self.tokenizer_dir("tokenizer") {
            let own = Tokenizer::load(&first, max_tokens)?;
            return if open_clip { own.padded_with("!") } else { Ok(own) };
        }
        ensure!(
            entries == CLIP_VOCABULARY,
            "--model {}: its {encoder} has {entries} words, not CLIP's {CLIP_VOCABULARY}; put its \
             tokenizer beside the file, as the folder {folder}",
            self.shown()
        );
        let own = Tokenizer::clip(max_tokens, CLIP_VOCABULARY as u32 - 1, false)?;
        if open_clip { own.padded_with("!") } else { Ok(own) }
    }

    /// The folder of T5's tokenizer.
    ///
    /// # Errors
    /// When there is none.
    pub fn t5_tokenizer(&self, encoder: &str) -> Result<PathBuf> {
        let folder = encoder.replace("text_encoder", "tokenizer");
        self.tokenizer_dir(&folder).with_context(|| {
            format!(
                "--model {}: T5's tokenizer is missing; put it beside the file, as the folder \
                 {folder} with tokenizer.json, or give --embeddings",
                self.shown()
            )
        })
    }

    /// The folder of Qwen3's tokenizer.
    ///
    /// # Errors
    /// When there is none.
    pub fn chat_tokenizer(&self) -> Result<PathBuf> {
        let dir = self.tokenizer_dir("tokenizer").filter(|dir| dir.is_dir());
        dir.with_context(|| {
            format!(
                "--model {}: has no folder tokenizer, with the tokenizer.json and chat_template of \
                 Qwen3; put it there, or give --embeddings",
                self.shown()
            )
        })
    }

    /// Whether an encoder of a file is open_clip's, whose texts are filled up with "!".
    pub fn pads_with_letter(&self, encoder: &str) -> bool {
        self.file().is_some_and(|f| f.is_open_clip(encoder))
    }

    /// A tokenizer's folder: a model folder's own, or beside a file, or with its configurations.
    pub fn tokenizer_dir(&self, folder: &str) -> Option<PathBuf> {
        if self.file().is_none() {
            return Some(self.path().join(folder));
        }
        let beside = self.path().parent().map(Path::to_path_buf);
        let places = beside.into_iter().chain(self.spec.config.clone());
        places.map(|place| place.join(folder)).find(|d| d.is_dir())
    }
}
