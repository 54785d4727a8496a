//! `pcpo-wgpu credit`: the weights of a schedule under each rule, as a table, JSON or a plot.

use anyhow::Result;
use image::{Rgb, RgbImage};
use serde_json::{Value, json};

use crate::credit::{self, Credit};
use crate::schedule::{Schedule, Step};

/// A schedule under each rule, in sampling order.
pub struct Table {
    eta: f64,
    native: Vec<Step>,
    proportionate: Vec<Step>,
    /// At 50 steps only.
    released: Option<Vec<Step>>,
}

/// Computes the table.
///
/// # Errors
/// When the number of steps or eta is out of range.
pub fn table(schedule: &Schedule, steps: usize, eta: f64) -> Result<Table> {
    let native = schedule.steps(steps, eta)?;
    let rule = |r| credit::apply(r, schedule, native.clone());
    let released = if steps == 50 { Some(rule(Credit::Released)?) } else { None };
    Ok(Table { eta, proportionate: rule(Credit::Proportionate)?, released, native })
}

/// (smallest, largest) weight of the steps that have one.
fn range(steps: &[Step], weight: fn(&Step) -> f64) -> (f64, f64) {
    let weights = steps.iter().filter(|s| s.sigma > 0.0).map(weight);
    weights.fold((f64::INFINITY, 0.0), |(lo, hi), w| (lo.min(w), hi.max(w)))
}

impl Table {
    /// The columns that `--json` promises.
    pub fn json(&self) -> Value {
        let row = |i: usize| {
            let (n, p) = (&self.native[i], &self.proportionate[i]);
            let mut row = json!({ "t": n.t, "sigma": n.sigma, "w_native": n.w_native, "w_proportionate": p.weight });
            if let Some(released) = &self.released {
                row["w_released"] = json!(released[i].weight);
                row["sigma_released"] = json!(released[i].sigma);
            }
            row
        };
        let rows: Vec<Value> = (0..self.native.len()).map(row).collect();
        json!({ "sampler": "ddim", "steps": self.native.len(), "eta": self.eta, "rows": rows })
    }

    /// The table for people, with each rule's spread.
    pub fn text(&self) -> String {
        let mut out = String::from("    t      sigma   w native   w proportionate");
        out += if self.released.is_some() { "   w released   sigma released\n" } else { "\n" };
        for (i, n) in self.native.iter().enumerate() {
            out += &format!("{:5} {:10.6} {:10.6} {:17.6}", n.t, n.sigma, n.w_native, self.proportionate[i].weight);
            if let Some(released) = &self.released {
                out += &format!(" {:12.6} {:16.6}", released[i].weight, released[i].sigma);
            }
            out.push('\n');
        }
        let spread = |name: &str, (lo, hi): (f64, f64)| {
            format!("{name}: {lo:.5} .. {hi:.5}, largest / smallest {:.2}\n", hi / lo)
        };
        out += &spread("native", range(&self.native, |s| s.w_native));
        out += &spread("proportionate", range(&self.proportionate, |s| s.weight));
        if let Some(released) = &self.released {
            out += &spread("released (in the objective)", range(released, |s| s.weight));
            out += &spread("released (of its sampler)", range(released, |s| s.w_native));
        }
        out
    }

    /// Bars of the native weights with a line at the proportionate one, sampling order from left to right.
    pub fn plot(&self) -> RgbImage {
        let (width, height, margin) = (640u32, 320u32, 20u32);
        let mut canvas = RgbImage::from_pixel(width + 2 * margin, height + 2 * margin, Rgb([255; 3]));
        let top = range(&self.native, |s| s.w_native).1.max(1e-9);
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
        }
        let line = height - level(credit::mean_native(&self.native));
        fill(0, width, line.saturating_sub(1), (line + 1).min(height), Rgb([200, 60, 40]));
        canvas
    }
}
