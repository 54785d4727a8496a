//! `--dump-update FILE[:K]`: one update whole, so that it can be recomputed outside
//! (`scripts/verify_update.py`).

use anyhow::Result;
use burn::tensor::Tensor;

use super::epoch::EpochState;
use super::forward::noise_key;
use super::gradient::Loss;
use super::job::DumpRequest;
use super::plan::Part;
use super::run::Run;
use super::update::TrajectoryBatch;
use super::update_gradient::UpdateGradient;
use crate::choice::name;
use crate::device::tensor::read;
use crate::io::tensors::{HostTensor, write_tensors};
use crate::lora::Adapter;
use crate::lora::formats::{self, Format};
use crate::model::Conditioning;
use crate::model::conditioning::TIME_IDS;
use crate::ops::forward_objective::ForwardTime;
use crate::ops::philox_noise::philox_noise;
use crate::sampling::policy::PromptPair;
use crate::schedule::{Prediction, Step, StepKind};

/// What an update was made of.
pub(crate) struct Update<'a> {
    pub run: &'a Run<'a>,
    pub state: &'a EpochState,
    pub batches: &'a [&'a TrajectoryBatch],
    pub loss: &'a Loss,
    pub gradient: &'a UpdateGradient,
}

/// Writes the update. Predictions, weights and noise are in eps units where a network of diffusion
/// predicts v, and in the velocity's own for a flow.
///
/// # Errors
/// When the device fails or the file cannot be written.
pub(crate) fn write(u: &Update, request: &DumpRequest) -> Result<()> {
    let mut tensors = match u.loss {
        Loss::Policy(_) => transitions(u)?,
        Loss::Forward(_) => ends(u)?,
    };
    tensors.extend(per_step(&u.state.plan.trained));
    tensors.extend(embeddings(u)?);
    let mut gradient = u.run.adapter.clone();
    gradient.parameters_mut().zip(&u.gradient.gradients).for_each(|(p, g)| p.clone_from(g));
    let network = u.run.first().pipeline.family.network();
    for (prefix, adapter) in [("lora", &u.run.adapter), ("grad", &gradient)] {
        tensors.extend(prefixed(prefix, adapter, network));
    }
    write_tensors(&request.file, &tensors, &metadata(u))
}

/// An adapter's tensors, with a word before their names.
fn prefixed(prefix: &str, adapter: &Adapter, network: &str) -> impl Iterator<Item = HostTensor> {
    let named = formats::tensors(adapter, Format::Diffusers, network).into_iter();
    named.map(move |t| HostTensor { name: format!("{prefix}.{}", t.name), ..t })
}

/// Where the rows of batches stand in the dump: the images in their order, and behind them the
/// trajectories where only the KL is taken.
fn first_rows(batches: &[&TrajectoryBatch]) -> Vec<usize> {
    let images: usize = batches
        .iter()
        .map(|batch| batch.part.images.clone())
        .filter(|images| !images.is_empty())
        .map(|images| images.len())
        .sum();
    let least = |f: fn(&Part) -> usize| batches.iter().map(|b| f(&b.part)).min().unwrap_or(0);
    let image = least(|p| if p.images.is_empty() { usize::MAX } else { p.images.start });
    let trajectory = least(|p| p.trajectories.start);
    let first = |batch: &&TrajectoryBatch| match &batch.part {
        part if part.images.is_empty() => images + part.trajectories.start - trajectory,
        part => part.images.start - image,
    };
    batches.iter().map(first).collect()
}

/// Latents, noise, old predictions, log rho and advantages, with what each row weighs at a step: 0
/// where the step does not have it.
fn transitions(u: &Update) -> Result<Vec<HostTensor>> {
    let compute = &u.run.first().compute;
    let trained = &u.state.plan.trained;
    let firsts = first_rows(u.batches);
    let ends = firsts.iter().zip(u.batches).map(|(first, b)| first + b.part.rows.len());
    let rows = ends.max().unwrap_or(0);
    let [c, h, w] = u.run.latent_shape();
    let size = c * h * w;
    let all = || vec![0.0; trained.len() * rows * size];
    let (mut latents, mut noise, mut old) = (all(), all(), all());
    let mut log_rho = vec![0.0; trained.len() * rows];
    let (mut weights, mut advantages) = (log_rho.clone(), vec![0.0; rows]);
    let mut done = u.gradient.steps.iter();
    for (batch, &first) in u.batches.iter().zip(&firsts) {
        let part = &batch.part;
        let n = part.rows.len();
        advantages[first..first + n].copy_from_slice(&u.state.advantages_of(part));
        for (at, transition) in part.steps.clone().zip(&batch.transitions) {
            let step = &trained[at];
            let from = at * rows + first;
            let values = from * size..(from + n) * size;
            let x = read(&batch.rows(&transition.x, &compute.burn))?;
            let prediction = read(&batch.rows(&transition.old_prediction, &compute.burn))?;
            let drawn = philox_noise(compute, [n, c, h, w], batch.noise.at(step));
            noise[values.clone()].copy_from_slice(&read(&drawn)?);
            old[values.clone()].copy_from_slice(&in_eps(u, step, &x, &prediction));
            latents[values].copy_from_slice(&x);
            weights[from..from + n].fill(step.row_weight as f32);
            let own = done.next().into_iter().flat_map(|step| &step.rows);
            log_rho[from..from + n].iter_mut().zip(own).for_each(|(to, of)| *to = of.log_rho);
        }
    }
    let (steps, shape) = (trained.len(), [trained.len(), rows, c, h, w]);
    Ok(vec![
        HostTensor::new("latents", shape, latents),
        HostTensor::new("noise", shape, noise),
        HostTensor::new("eps_old", shape, old),
        HostTensor::new("log_rho", [steps, rows], log_rho),
        HostTensor::new("row_weights", [steps, rows], weights),
        HostTensor::new("advantages", [rows], advantages),
    ])
}

/// Final latents, the noise that they were mixed with at each time, which images have the time, and
/// the old policy.
fn ends(u: &Update) -> Result<Vec<HostTensor>> {
    let (compute, plan) = (&u.run.first().compute, &u.state.plan);
    let rows: usize = u.batches.iter().map(|batch| batch.part.images.len()).sum();
    let [c, h, w] = u.run.latent_shape();
    let (mut x0, mut noise, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    let mut advantages = Vec::new();
    for batch in u.batches {
        x0.extend(&batch.ends);
        advantages.extend(u.state.advantages_of(&batch.part));
    }
    let pass = u.state.updates.len() / u.run.settings.updates_per_epoch;
    for (at, step) in plan.trained.iter().enumerate() {
        for batch in u.batches {
            let key = noise_key(batch, step, pass);
            noise.extend(read(&philox_noise(compute, [batch.part.images.len(), c, h, w], key))?);
            let times = plan.times[batch.part.images.clone()].iter();
            weights.extend(times.map(|own| f32::from(u8::from(own.contains(&at)))));
        }
    }
    let steps = plan.trained.len();
    let column = |name: &str, f: fn(ForwardTime) -> f32| {
        let values = plan.trained.iter().map(|step| f(ForwardTime::from(step)));
        HostTensor::new(name, [steps], values.collect())
    };
    let mut tensors = vec![
        HostTensor::new("x0", [rows, c, h, w], x0),
        HostTensor::new("noise", [steps, rows, c, h, w], noise),
        HostTensor::new("row_weights", [steps, rows], weights),
        HostTensor::new("advantages", [rows], advantages),
        column("signal", |t| t.signal),
        column("noise_level", |t| t.noise),
        column("x0_x", |t| t.x0_x),
        column("x0_p", |t| t.x0_p),
    ];
    let network = u.run.first().pipeline.family.network();
    let sampled = u.run.good.as_ref().filter(|_| !u.state.updates.is_empty());
    let adapters =
        [("old", u.run.followers.old.as_ref()), ("sampled", sampled.map(|g| &g.adapter))];
    for (prefix, adapter) in adapters {
        tensors.extend(adapter.into_iter().flat_map(|a| prefixed(prefix, a, network)));
    }
    Ok(tensors)
}

/// A prediction in eps units where the network predicts v.
fn in_eps(u: &Update, step: &Step, x: &[f32], prediction: &[f32]) -> Vec<f32> {
    match u.run.first().pipeline.schedule.prediction() {
        Prediction::Epsilon | Prediction::Velocity => prediction.to_vec(),
        Prediction::V => {
            let bar = alpha_bar(step);
            let (signal, spread) = (bar.sqrt() as f32, (1.0 - bar).sqrt() as f32);
            prediction.iter().zip(x).map(|(p, x)| signal * p + spread * x).collect()
        }
    }
}

fn per_step(trained: &[Step]) -> Vec<HostTensor> {
    let column = |name: &str, f: fn(&Step) -> f64| {
        HostTensor::new(name, [trained.len()], trained.iter().map(|s| f(s) as f32).collect())
    };
    vec![
        column("timesteps", |s| s.t),
        column("alphas_cumprod", alpha_bar),
        column("weights", |s| s.weight),
        column("weights_native", |s| s.w_native),
        column("quadratic", |s| s.quadratic),
        column("loss_weights", |s| s.loss_weight),
    ]
}

fn embeddings(u: &Update) -> Result<Vec<HostTensor>> {
    // Rows where only the KL is taken are those of several steps.
    let (mut rows, mut prompts) = (0, Vec::<PromptPair>::new());
    for (batch, first) in u.batches.iter().zip(first_rows(u.batches)) {
        if first == rows {
            prompts.push(u.run.prompts_of(u.run.first(), &u.state.plan, &batch.part)?);
            rows += batch.part.rows.len();
        }
    }
    let mut tensors = Vec::new();
    for (prefix, conditional) in [("", true), ("negative_", false)] {
        let parts = || prompts.iter().map(|p| if conditional { &p.cond } else { &p.uncond });
        let each = |p: &Conditioning| p.rows.spread(p.sequence.clone());
        let sequence: Tensor<3> = Tensor::cat(parts().map(each).collect(), 0);
        let name = format!("{prefix}prompt_embeds");
        tensors.push(HostTensor::new(name, sequence.dims(), read(&sequence)?));
        let own = |p: &Conditioning| {
            let rows = p.rows.of().to_vec();
            let lengths = p.lengths.clone();
            rows.into_iter().filter_map(move |row| lengths.get(row).map(|n| *n as f32))
        };
        let lengths: Vec<f32> = parts().flat_map(own).collect();
        if !lengths.is_empty() {
            let name = format!("{prefix}prompt_lengths");
            tensors.push(HostTensor::new(name, [lengths.len()], lengths));
        }
        let each = |p: &Conditioning| Some(p.rows.spread(p.pooled.clone()?));
        let pooled: Option<Vec<Tensor<2>>> = parts().map(each).collect();
        if u.run.first().pipeline.net.config().takes_time_ids() {
            let each = |p: &Conditioning| {
                p.rows.of().iter().flat_map(|&row| p.time_ids[row]).collect::<Vec<f32>>()
            };
            let ids: Vec<f32> = parts().flat_map(each).collect();
            let name = format!("{prefix}time_ids");
            tensors.push(HostTensor::new(name, [ids.len() / TIME_IDS, TIME_IDS], ids));
        }
        if let Some(pooled) = pooled {
            let pooled = Tensor::cat(pooled, 0);
            let name = format!("{prefix}pooled_prompt_embeds");
            tensors.push(HostTensor::new(name, pooled.dims(), read(&pooled)?));
        }
    }
    Ok(tensors)
}

fn metadata(u: &Update) -> Vec<(&'static str, String)> {
    // Of branches it is a mean over more rows.
    let kl_beta = match u.loss {
        Loss::Policy(surrogate) => f64::from(surrogate.beta),
        Loss::Forward(surrogate) => f64::from(surrogate.kl_beta),
    };
    let prediction = match u.run.first().pipeline.schedule.prediction() {
        Prediction::Epsilon => "epsilon",
        Prediction::V => "v_prediction",
        Prediction::Velocity => "velocity",
    };
    let targets: Vec<&str> = u.run.adapter.layers.iter().map(|l| l.name.as_str()).collect();
    let indices: Vec<String> = u.state.plan.trained.iter().map(|s| s.index.to_string()).collect();
    vec![
        ("objective", name(u.run.settings.objective)),
        // As the kernels have it.
        ("clip_range", f64::from(u.run.settings.clip_range as f32).to_string()),
        ("nft_beta", u.run.settings.nft_beta.to_string()),
        ("advantage_clamp", u.run.settings.advantage_clamp.to_string()),
        ("guidance_scale", u.run.settings.guidance_scale.to_string()),
        // What the loss is a mean over.
        ("entries", u.state.entries(u.run.settings, u.batches).to_string()),
        ("kl_beta", kl_beta.to_string()),
        ("guidance_gradient", name(u.run.settings.guidance_gradient)),
        ("prediction_type", prediction.to_string()),
        ("lora_rank", u.run.adapter.rank.to_string()),
        ("lora_alpha", u.run.adapter.alpha.to_string()),
        ("lora_targets", targets.join(",")),
        // What the noise is keyed by, so that the update can be replayed here as well.
        ("seed", u.run.settings.seed.to_string()),
        ("first_image", u.batches[0].noise.first_image.to_string()),
        ("step_indices", indices.join(",")),
    ]
}

/// The step's cumulative alpha; 0 for a flow, which has none.
fn alpha_bar(step: &Step) -> f64 {
    match step.kind {
        StepKind::Diffusion { alpha_bar, .. } => alpha_bar,
        StepKind::Flow { .. } => 0.0,
    }
}
