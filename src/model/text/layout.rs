//! Which text encoders a family has, and how they are put together.

use super::qwen3::States;

/// Which text encoders a family has, and how they are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextLayout {
    /// Stable Diffusion 1 and 2: one CLIP's last hidden state.
    Clip,
    /// SDXL: two CLIPs' second-last hidden states side by side in the width, and the second's
    /// pooled state.
    TwoClips,
    /// Stable Diffusion 3: two CLIPs side by side in the width, filled up with zeros; then T5's
    /// tokens, or as many zeros where a folder has no T5.
    TwoClipsAndT5,
    /// FLUX: T5's tokens, and CLIP's pooled state.
    T5AndPooledClip,
    /// Qwen3's states between its layers.
    Qwen3(States),
}

impl TextLayout {
    /// The folders of the encoders whose weights are held while they run.
    pub fn held(self) -> &'static [&'static str] {
        match self {
            Self::Clip | Self::T5AndPooledClip => &["text_encoder"],
            Self::TwoClips | Self::TwoClipsAndT5 => &["text_encoder", "text_encoder_2"],
            Self::Qwen3(_) => &[],
        }
    }

    /// The folder of the encoder that is read layer by layer.
    pub fn streamed(self) -> Option<&'static str> {
        match self {
            Self::Clip | Self::TwoClips => None,
            Self::TwoClipsAndT5 => Some("text_encoder_3"),
            Self::T5AndPooledClip => Some("text_encoder_2"),
            Self::Qwen3(_) => Some("text_encoder"),
        }
    }

    /// Tokens that the network sees, of CLIP's and of the encoder's that is read layer by layer.
    pub fn tokens(self, clip: usize, streamed: usize) -> usize {
        match self {
            Self::Clip | Self::TwoClips => clip,
            Self::TwoClipsAndT5 => clip + streamed,
            Self::T5AndPooledClip | Self::Qwen3(_) => streamed,
        }
    }
}
