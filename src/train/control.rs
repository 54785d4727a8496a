//! What a run does that is asked for while it goes, but stopping.

use anyhow::Result;

use super::epoch::EpochState;
use super::evaluation::{Extent, grid};
use super::observer::Event;
use super::recovery::suspend;
use super::run::Run;
use super::run_folder::sample_name;
use super::wishes::Wish;
use crate::io;

/// Between two updates, and before the first: does what was asked but stopping.
///
/// # Errors
/// When the device fails.
pub(super) fn hear(run: &mut Run, state: &EpochState) -> Result<()> {
    let dir = run.folder.dir.clone();
    let world = &run.fleet.world;
    // The first process hears for all.
    let heard = |wish: Wish| world.from_first(world.is_first().then(|| Ok(wish.take(&dir))));
    let (save, sample) = (heard(Wish::Save)?, heard(Wish::Sample)?);
    if save {
        let said = if state.updates.is_empty() {
            "saved: nothing was learnt since the last complete epoch".to_string()
        } else {
            match suspend(run, state) {
                Ok(()) => format!("saved: {} updates of the epoch", state.updates.len()),
                Err(e) => format!("could not be saved: {e:#}"),
            }
        };
        // The run goes on: its log has the epoch as a whole.
        let (epoch, lines) = (run.state.epoch, run.state.metrics_lines);
        run.forget_after(epoch, lines);
        run.observer.on(Event::Notice(&said));
    }
    if sample {
        let pictures = run.draw(&run.plan_evaluation(Extent::Full)?)?;
        let file = dir.join(sample_name(run.state.updates));
        let write = || io::write(&file, &io::png(&grid(run.settings, &pictures))?);
        let written = if run.folder.writes() { write() } else { Ok(()) };
        run.fleet.world.agree(written)?;
        run.observer.on(Event::Notice(&format!("sampled: {}", file.display())));
    }
    Ok(())
}
