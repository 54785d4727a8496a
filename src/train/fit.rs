//! Whether a run fits into its devices, and what is chosen by their memory.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::config::Settings;
use crate::estimate::{self, Estimate, Shapes, Target};
use crate::sampling::fleet::Roll;

/// The memory of each of this process's devices. What is chosen by it is one choice for all
/// devices, and saved with the run, which goes on to the bit.
pub(super) fn fit(
    s: &mut Settings,
    found: &Shapes,
    targets: &[Target],
    roll: &Roll,
) -> Result<Vec<Estimate>> {
    let check = |s: &Settings| -> Result<Vec<Estimate>> {
        let device = |i: usize| format!("device {}", roll.names[i]);
        let one = |(i, target): (usize, &Target)| {
            let estimated = estimate::check(found, s, *target);
            if targets.len() == 1 { estimated } else { estimated.with_context(|| device(i)) }
        };
        targets.iter().enumerate().map(one).collect()
    };
    let own = check(s).map(|all| Chosen {
        checkpointing: all.iter().any(|e| e.checkpointing),
        tiling: all.iter().any(|e| e.tiling),
        streaming: all.iter().any(|e| e.streaming.is_some()),
    });
    let all = roll.world.all(own)?;
    s.activation_checkpointing = all.iter().any(|c| c.checkpointing).into();
    s.vae_tiling = all.iter().any(|c| c.tiling).into();
    s.stream_blocks = all.iter().any(|c| c.streaming).into();
    check(s)
}

/// What a process's devices leave no other room for.
#[derive(Serialize, Deserialize)]
struct Chosen {
    checkpointing: bool,
    tiling: bool,
    streaming: bool,
}
