//! Sampling: the chain of steps, and the rollout that keeps what the update needs of it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, anyhow, ensure};
use burn::tensor::Tensor;
use image::RgbImage;

use crate::device::{Compute, rows_at_a_time};
use crate::lora::Lora;
use crate::model::vae::Vae;
use crate::model::{Conditioning, Denoiser, Inputs};
use crate::ops::sampler_step::sampler_step;
use crate::ops::{Coefficients, Guidance, NoiseKey, read};
use crate::schedule::Step;

/// The policy for one batch: a network, its adapter, its conditioning and its guidance.
pub struct Denoise<'a> {
    pub compute: &'a Compute,
    pub net: &'a dyn Denoiser,
    pub lora: Option<&'a Lora>,
    pub guidance: Guided,
    pub cond: &'a Conditioning,
    pub uncond: &'a Conditioning,
}

/// How a run's guidance scale reaches a network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guided {
    /// Two passes that are combined, or one.
    pub combine: Guidance,
    /// The scale as an input, for distilled networks.
    pub input: f32,
}

impl Guided {
    /// A distilled network takes the scale as an input; others are run with and without text.
    pub fn new(net: &dyn Denoiser, scale: f64) -> Self {
        Self { combine: if net.distilled() { Guidance::Off } else { Guidance::new(scale) }, input: scale as f32 }
    }
}

/// Which rows of the network's input a pass has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Branch {
    /// All that guidance needs: with it the unconditional rows first.
    All,
    Conditional,
    Unconditional,
}

impl Denoise<'_> {
    /// The network's output for latents `[B, ..]` at one timestep: `[B, ..]`, or `[2B, ..]` with guidance, the
    /// unconditional rows first.
    pub fn output(&self, x: &Tensor<4>, t: f64) -> Tensor<4> {
        self.pass(Branch::All, x, t, |x, inputs| self.net.forward(x, inputs, self.lora))
    }

    /// Hands `run` the network's inputs for a branch.
    pub fn pass<R>(&self, branch: Branch, x: &Tensor<4>, t: f64, run: impl FnOnce(Tensor<4>, Inputs) -> R) -> R {
        let both;
        let (x, cond) = match (branch, self.guidance.combine) {
            (Branch::Unconditional, _) => (x.clone(), self.uncond),
            (Branch::All, Guidance::Scale(_)) => {
                both = Conditioning::cat(vec![self.uncond.clone(), self.cond.clone()]);
                (Tensor::cat(vec![x.clone(), x.clone()], 0), &both)
            }
            _ => (x.clone(), self.cond),
        };
        let rows = x.dims()[0];
        let (timesteps, guidance) = (vec![t as f32; rows], vec![self.guidance.input; rows]);
        run(x, Inputs { timesteps: &timesteps, cond, guidance: &guidance })
    }
}

/// What the update reads of one step of one batch. On the host: a GPU holds one batch of them at a time.
#[derive(Clone, Debug, PartialEq)]
pub struct Visit {
    /// Latents before the step, `[B, C, H, W]`.
    pub x: Vec<f32>,
    /// The sampling policy's prediction after guidance.
    pub old: Vec<f32>,
}

/// A sampled batch.
pub struct Sampled {
    /// Final latents.
    pub latents: Tensor<4>,
    /// The visits that were asked for, in sampling order.
    pub visits: Vec<Visit>,
}

/// Samples a batch from initial latents and keeps the visits of the steps in `keep`; `tick` is called after each step.
///
/// # Errors
/// When the device fails, or `tick` asks to stop.
pub fn sample(
    policy: &Denoise,
    latents: Tensor<4>,
    steps: &[Step],
    keep: &[usize],
    (seed, first_image): (u64, u32),
    tick: impl Fn() -> Result<()>,
) -> Result<Sampled> {
    let mut x = latents;
    let mut kept = Vec::with_capacity(keep.len());
    for (i, step) in steps.iter().enumerate() {
        let out = policy.output(&x, step.t);
        let key = NoiseKey { seed, first_image, step: i as u32 };
        let c = Coefficients::from(step);
        let next = sampler_step(policy.compute, &x, &out, policy.guidance.combine, &c, key)?;
        if keep.contains(&i) {
            kept.push((x, next.prediction));
        }
        x = next.x_prev;
        tick()?;
    }
    policy.compute.sync()?;
    let visit = |(x, old): &(Tensor<4>, Tensor<4>)| Ok(Visit { x: read(x)?, old: read(old)? });
    Ok(Sampled { latents: x, visits: kept.iter().map(visit).collect::<Result<_>>()? })
}

/// Decodes latents to 8-bit pictures, one at a time: a VAE's activations are its largest.
///
/// # Errors
/// When the device fails, or a pixel is not finite.
pub fn decode(vae: &Vae, latents: &Tensor<4>) -> Result<Vec<RgbImage>> {
    let picture = |i: usize| {
        let image = vae.decode(latents.clone().narrow(0, i, 1));
        let [_, _, height, width] = image.dims();
        let values = read(&image)?;
        ensure!(
            values.iter().all(|v| v.is_finite()),
            "a decoded image holds values that are not finite: the run has diverged, or the VAE overflows"
        );
        let byte = |v: f32| ((v.clamp(-1.0, 1.0) + 1.0) * 127.5).round() as u8;
        let plane = height * width;
        Ok(RgbImage::from_fn(width as u32, height as u32, |x, y| {
            let at = y as usize * width + x as usize;
            image::Rgb([byte(values[at]), byte(values[plane + at]), byte(values[2 * plane + at])])
        }))
    };
    (0..latents.dims()[0]).map(picture).collect()
}

/// `total` rows in batches of at most `most`, on the CPU of a share for each core: (first row, number of rows).
pub fn batches(compute: &Compute, total: usize, most: usize) -> Vec<(usize, usize)> {
    let rows = rows_at_a_time(compute.threads(), total, most);
    (0..total).step_by(rows).map(|first| (first, rows.min(total - first))).collect()
}

/// Runs `f` over all items, in order of the result: one after the other on a GPU, on a thread for each core on the
/// CPU, whose operations are too small for all cores.
///
/// # Errors
/// The first item's error.
pub fn for_batches<T: Sync, R: Send>(
    compute: &Compute,
    items: &[T],
    f: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let threads = compute.threads().min(items.len());
    if threads <= 1 {
        return items.iter().map(f).collect();
    }
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Option<Result<R>>>> = Mutex::new(items.iter().map(|_| None).collect());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                // A pool of its own with a share of the cores: Burn's operations stay in it instead of queueing for the
                // pool that all threads share, and it is never handed a second batch in the middle of a first.
                let pool = rayon::ThreadPoolBuilder::new().num_threads(compute.threads() / threads).build();
                while let Some(i) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < items.len()) {
                    let result = match &pool {
                        Ok(pool) => pool.install(|| f(&items[i])),
                        Err(e) => Err(anyhow!(
                            "the system gives no thread for a batch: {e}; use a smaller --batch or fewer cores"
                        )),
                    };
                    results.lock().expect("no holder panics")[i] = Some(result);
                }
            });
        }
    });
    let results = results.into_inner().expect("all threads have ended");
    results.into_iter().map(|r| r.expect("every item was taken")).collect()
}
