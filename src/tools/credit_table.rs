//! `pcpo-wgpu credit`: the weights of a schedule under each rule, as a table, JSON or a plot.

use anyhow::Result;
use image::{Rgb, RgbImage};
use serde_json::{Value, json};

use crate::choice::name;
use crate::schedule::credit::{self, Credit};
use crate::schedule::{Sampler, Sampling, Schedule, Step, StepKind};

/// A schedule under each rule, in sampling order.
pub struct Table {
    sampling: Sampling,
    /// The flow's shift; diffusion has none.
    shift: Option<f64>,
    zeta: f64,
    native: Vec<Step>,
    proportionate: Vec<Step>,
    /// For diffusion at 50 steps, where the schedule has the released sampler.
    released: Option<Vec<Step>>,
}

/// Computes the table; `zeta` is a published total in place of the grid's own.
///
/// # Errors
/// When a number is out of range, or the sampler does not fit the schedule.
pub fn table(schedule: &Schedule, sampling: Sampling, zeta: Option<f64>) -> Result<Table> {
    let native = schedule.steps(&sampling)?;
    let rule = |r, zeta| credit::apply(r, schedule, native.clone(), zeta);
    let diffusion = !sampling.sampler.is_flow();
    let released =
        if diffusion && sampling.steps == 50 { rule(Credit::Released, None).ok() } else { None };
    let shift = match schedule {
        Schedule::Flow(flow) => Some(sampling.shift.unwrap_or(flow.shift)),
        Schedule::Ddim(_) => None,
    };
    let proportionate = rule(Credit::Proportionate, zeta)?;
    Ok(Table {
        sampling,
        shift,
        zeta: zeta.unwrap_or_else(|| credit::zeta(&native)),
        proportionate,
        released,
        native,
    })
}

/// (smallest, largest) weight of the steps that have one.
fn range(steps: &[Step], weight: fn(&Step) -> f64) -> (f64, f64) {
    let weights = steps.iter().filter(|s| s.sigma > 0.0).map(weight);
    weights.fold((f64::INFINITY, 0.0), |(lo, hi), w| (lo.min(w), hi.max(w)))
}

/// The noise as its source writes it: a flow's SDE has it per root of time.
fn noise(step: &Step, sampler: Sampler) -> f64 {
    match step.kind {
        StepKind::Flow { dt, .. } if sampler.is_sde() => step.sigma / dt.sqrt(),
        StepKind::Flow { .. } | StepKind::Diffusion { .. } => step.sigma,
    }
}

/// Time as the family writes it: 1000..0 for diffusion, 1..0 for flow.
fn time(step: &Step) -> f64 {
    match step.kind {
        StepKind::Flow { t, .. } => t,
        StepKind::Diffusion { .. } => step.t,
    }
}

impl Table {
    /// The columns that `--json` promises.
    pub fn json(&self) -> Value {
        let s = &self.sampling;
        let row = |i: usize| {
            let (n, p) = (&self.native[i], &self.proportionate[i]);
            let sigma = noise(n, s.sampler);
            let mut row = json!({
                "t": time(n), "sigma": sigma, "w_native": n.w_native, "w_proportionate": p.weight,
            });
            match n.kind {
                StepKind::Flow { dt, .. } => row["dt"] = json!(dt),
                StepKind::Diffusion { .. } => row["t"] = json!(n.t as u64),
            }
            if let Some(released) = &self.released {
                row["w_released"] = json!(released[i].weight);
                row["sigma_released"] = json!(released[i].sigma);
            }
            row
        };
        let rows: Vec<Value> = (0..self.native.len()).map(row).collect();
        let mut all =
            json!({ "sampler": name(s.sampler), "steps": s.steps, "eta": s.eta, "rows": rows });
        if let Some(shift) = self.shift {
            all["shift"] = json!(shift);
            all["zeta"] = json!(self.zeta);
        }
        all
    }

    /// The table for people, with each rule's spread.
    pub fn text(&self) -> String {
        let flow = self.shift.is_some();
        let mut out = String::from(if flow { "     t         dt" } else { "    t" });
        out += "      sigma   w native   w proportionate";
        out += if self.released.is_some() { "   w released   sigma released\n" } else { "\n" };
        for (i, n) in self.native.iter().enumerate() {
            out += &match n.kind {
                StepKind::Flow { t, dt } => format!("{t:.4} {dt:10.6}"),
                StepKind::Diffusion { .. } => format!("{:5}", n.t),
            };
            let sigma = noise(n, self.sampling.sampler);
            out +=
                &format!(" {sigma:10.6} {:10.6} {:17.6}", n.w_native, self.proportionate[i].weight);
            if let Some(released) = &self.released {
                out += &format!(" {:12.6} {:16.6}", released[i].weight, released[i].sigma);
            }
            out.push('\n');
        }
        let spread = |name: &str, (lo, hi): (f64, f64)| {
            if lo > hi {
                return format!("{name}: no step has noise, so none has a weight\n");
            }
            format!("{name}: {lo:.5} .. {hi:.5}, largest / smallest {:.2}\n", hi / lo)
        };
        // What has to be even is the credit of an interval: of a step for diffusion, of a unit of
        // time for a flow.
        let native: fn(&Step) -> f64 = if flow { |s| s.w_native / s.share } else { |s| s.w_native };
        let weight: fn(&Step) -> f64 = if flow { |s| s.weight / s.share } else { |s| s.weight };
        out += &spread(if flow { "native, per dt" } else { "native" }, range(&self.native, native));
        out += &spread(
            if flow { "proportionate, per dt" } else { "proportionate" },
            range(&self.proportionate, weight),
        );
        if let Some(released) = &self.released {
            out += &spread("released (in the objective)", range(released, |s| s.weight));
            out += &spread("released (of its sampler)", range(released, |s| s.w_native));
        }
        if flow {
            out += &format!("zeta: {}\n", self.zeta);
        }
        out
    }

    /// Bars of the native weights with a line at the proportionate ones, sampling order from left
    /// to right.
    pub fn plot(&self) -> RgbImage {
        let (width, height, margin) = (640u32, 320u32, 20u32);
        let mut canvas =
            RgbImage::from_pixel(width + 2 * margin, height + 2 * margin, Rgb([255; 3]));
        let top = range(&self.native, |s| s.w_native)
            .1
            .max(range(&self.proportionate, |s| s.weight).1)
            .max(1e-9);
        let mut fill = |x0: u32, x1: u32, y0: u32, y1: u32, color: Rgb<u8>| {
            for x in x0..x1 {
                for y in y0..y1 {
                    canvas.put_pixel(margin + x, margin + y, color);
                }
            }
        };
        let n = self.native.len() as u32;
        let level = |w: f64| ((w / top).clamp(0.0, 1.0) * f64::from(height)) as u32;
        for (i, step) in self.native.iter().enumerate() {
            let (x0, x1) = (i as u32 * width / n, ((i as u32 + 1) * width / n).saturating_sub(1));
            fill(x0, x1, height - level(step.w_native), height, Rgb([120, 150, 200]));
            let line = height - level(self.proportionate[i].weight);
            fill(x0, x1, line.saturating_sub(1), (line + 1).min(height), Rgb([200, 60, 40]));
        }
        canvas
    }
}
