//! The names of a UNet's modules in the layout of its authors (LDM), which single files, and LoRAs
//! of SDXL by sd-scripts, have.

use super::config::{LevelConfig, MidKind};

/// A module's name here, diffusers', and in the authors' layout.
pub struct Renaming {
    pub ours: String,
    pub theirs: String,
}

/// Parts of a resnet.
const RESNET: [(&str, &str); 6] = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];

/// Modules outside the levels.
const OUTSIDE: [(&str, &str); 7] = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
];

/// All modules of a UNet; of an attention its name stands for everything below it.
pub fn renamings(levels: &[LevelConfig], mid: MidKind) -> Vec<Renaming> {
    let mut all = List(Vec::new());
    for (ours, theirs) in OUTSIDE {
        all.add(ours, theirs);
    }
    let n = levels.len();
    let mut block = 1;
    for (i, level) in levels.iter().enumerate() {
        for j in 0..level.layers {
            let theirs = format!("input_blocks.{block}");
            all.resnet(&format!("down_blocks.{i}.resnets.{j}"), &format!("{theirs}.0"));
            if level.down_attends {
                all.add(format!("down_blocks.{i}.attentions.{j}"), format!("{theirs}.1"));
            }
            block += 1;
        }
        if i + 1 < n {
            let theirs = format!("input_blocks.{block}.0.op");
            all.add(format!("down_blocks.{i}.downsamplers.0.conv"), theirs);
            block += 1;
        }
    }
    match mid {
        MidKind::None => {}
        MidKind::Resnet => all.resnet("mid_block.resnets.0", "middle_block.0"),
        MidKind::CrossAttention => {
            all.resnet("mid_block.resnets.0", "middle_block.0");
            all.add("mid_block.attentions.0", "middle_block.1");
            all.resnet("mid_block.resnets.1", "middle_block.2");
        }
    }
    block = 0;
    for (i, level) in levels.iter().rev().enumerate() {
        for j in 0..level.layers + 1 {
            let theirs = format!("output_blocks.{block}");
            all.resnet(&format!("up_blocks.{i}.resnets.{j}"), &format!("{theirs}.0"));
            if level.up_attends {
                all.add(format!("up_blocks.{i}.attentions.{j}"), format!("{theirs}.1"));
            }
            if j == level.layers && i + 1 < n {
                // It stands behind the attention, where there is one.
                let at = if level.up_attends { 2 } else { 1 };
                let ours = format!("up_blocks.{i}.upsamplers.0.conv");
                all.add(ours, format!("{theirs}.{at}.conv"));
            }
            block += 1;
        }
    }
    all.0
}

struct List(Vec<Renaming>);

impl List {
    fn add(&mut self, ours: impl Into<String>, theirs: impl Into<String>) {
        self.0.push(Renaming { ours: ours.into(), theirs: theirs.into() });
    }

    fn resnet(&mut self, ours: &str, theirs: &str) {
        for (part, original) in RESNET {
            self.add(format!("{ours}.{part}"), format!("{theirs}.{original}"));
        }
    }
}

/// What of `name` follows the module `of`, with the dot in front: empty for the module itself.
fn below<'a>(name: &'a str, of: &str) -> Option<&'a str> {
    name.strip_prefix(of).filter(|rest| rest.is_empty() || rest.starts_with('.'))
}

impl Renaming {
    /// A name in the authors' layout under its name here, where it is of this module.
    pub fn to_ours(&self, theirs: &str) -> Option<String> {
        below(theirs, &self.theirs).map(|rest| format!("{}{rest}", self.ours))
    }

    /// A name here as it is in the authors' layout, where it is of this module.
    pub fn to_theirs(&self, ours: &str) -> Option<String> {
        below(ours, &self.ours).map(|rest| format!("{}{rest}", self.theirs))
    }
}
