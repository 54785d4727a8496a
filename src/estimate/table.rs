//! An estimate in words: the table of `pcpo-wgpu plan`.

use super::Estimate;
use crate::choice::name;
use crate::config::{Settings, Switch};

/// The table of `pcpo-wgpu plan`; `read_rate` is how many bytes of blocks the machine reads in a
/// second, where that was measured.
pub fn text(
    estimate: &Estimate,
    s: &Settings,
    largest: Option<usize>,
    read_rate: Option<f64>,
) -> String {
    let mib = |b: f64| format!("{:>10.0} MiB", b / f64::from(1 << 20));
    let storage = format!("weights ({})", name(s.storage));
    let mut out = format!("{storage:<20} {}\n", mib(estimate.weights));
    for (line, bytes) in [
        ("reward models", estimate.reward),
        ("program and casts", estimate.program),
        ("adapter", estimate.adapter),
        ("kept by rollout", estimate.kept),
        ("text encoders", estimate.encode),
        ("rollout", estimate.rollout),
        ("update", estimate.update),
        ("decode", estimate.decode),
    ] {
        out += &format!("{line:<20} {}\n", mib(bytes));
    }
    out += &format!(
        "peak                 {}   program and text encoders, or weights, program, adapter, \
         kept and the largest phase\n",
        mib(estimate.peak())
    );
    let held = match (estimate.checkpointing, s.activation_checkpointing) {
        (true, _) => "on: one block's activations at a time",
        (false, Switch::Auto) => "off: all blocks' activations leave room",
        (false, _) => "off: all blocks' activations",
    };
    out += &format!("activation checkpointing {held}\n");
    let tiling = if estimate.tiling { "on: a tile at a time" } else { "off: whole pictures" };
    out += &format!("VAE tiling           {tiling}\n");
    out += &match &estimate.streaming {
        None => "block streaming      off: all blocks are held\n".to_string(),
        Some(streaming) => format!("block streaming      {}\n", streaming.text(read_rate)),
    };
    if let Some(offered) = estimate.offered {
        out += &format!("the device offers    {}\n", mib(offered as f64));
        out += &match largest {
            Some(batch) => format!("largest --batch      {batch:>10}\n"),
            None => "no --batch fits\n".to_string(),
        };
    }
    out
}
