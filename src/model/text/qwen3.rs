//! transformers' `Qwen3ForCausalLM` and `Qwen3Model` as text encoders: states between its layers.
//! Its layers are never held together: each is read from the file, run on all prompts, and dropped.

use anyhow::{Result, bail, ensure};
use burn::tensor::{Device, Tensor};
use serde_json::{Value, json};

use crate::device::tensor::{read, upload};
use crate::io::weights::Weights;
use crate::kernels::attention::{Heads, attention};
use crate::model::component::Component;
use crate::model::config::Config;
use crate::model::loader::{Loader, Storage};
use crate::model::nn::{Linear, RmsNorm, silu_gated};

/// What stands for minus infinity among scores: its exponential is 0 beside any other's.
const NEVER: f32 = -1e30;

/// The numbers of an encoder.
#[derive(Clone, Debug)]
pub struct Qwen3Config {
    pub width: usize,
    pub heads: usize,
    /// Heads of keys and values, each of which several of the queries' share.
    pub kv_heads: usize,
    /// Width of a head, which need not be width / heads.
    pub head: usize,
    /// Width of the feed-forward.
    pub inner: usize,
    pub layers: usize,
    pub vocabulary: usize,
    eps: f64,
    theta: f64,
}

impl Qwen3Config {
    /// The architectures that it is read of.
    pub const ARCHITECTURES: [&str; 2] = ["Qwen3ForCausalLM", "Qwen3Model"];

    /// Whether a text encoder's configuration is of one.
    pub fn is_of(c: &Config) -> bool {
        let architecture = c.json["architectures"][0].as_str();
        c.json["model_type"] == "qwen3"
            || architecture.is_some_and(|a| Self::ARCHITECTURES.contains(&a))
    }

    /// Reads a text encoder's `config.json`.
    ///
    /// # Errors
    /// Names the field that is missing or not supported.
    pub fn read(c: &Config) -> Result<Self> {
        let architecture = c.json["architectures"][0].as_str();
        if architecture.is_some_and(|a| !Self::ARCHITECTURES.contains(&a)) {
            bail!(c.bad("architectures", "is not supported; Qwen3ForCausalLM is"));
        }
        c.only(&[
            ("hidden_act", json!("silu")),
            ("rope_scaling", json!(null)),
            ("use_sliding_window", json!(false)),
        ])?;
        let full = |kinds: &Vec<Value>| kinds.iter().all(|kind| *kind == "full_attention");
        ensure!(
            c.json["layer_types"].as_array().is_none_or(full),
            c.bad("layer_types", "is not supported; only full_attention is")
        );
        let heads = c.count("num_attention_heads", 32)?;
        let kv_heads = c.count("num_key_value_heads", 32)?;
        ensure!(
            heads.is_multiple_of(kv_heads),
            c.bad("num_key_value_heads", &format!("does not divide {heads} heads"))
        );
        let head = c.width("head_dim", 128)?;
        ensure!(head.is_multiple_of(2), c.bad("head_dim", "must be even"));
        Ok(Self {
            width: c.width("hidden_size", 4096)?,
            heads,
            kv_heads,
            head,
            inner: c.width("intermediate_size", 22016)?,
            layers: c.count("num_hidden_layers", 32)?,
            vocabulary: c.width("vocab_size", 151_936)?,
            eps: c.eps("rms_norm_eps", 1e-6)?,
            theta: theta(c)?,
        })
    }
}

/// What all names begin with: those of `Qwen3ForCausalLM` with its model's name.
pub fn prefix(weights: &Weights) -> &'static str {
    if weights.has("model.embed_tokens.weight") { "model." } else { "" }
}

/// The base of the rotary embedding, at the top of the configuration or in `rope_parameters`.
fn theta(c: &Config) -> Result<f64> {
    let parameters = &c.json["rope_parameters"];
    if parameters.is_null() {
        return c.positive("rope_theta", 10_000.0);
    }
    let kind = &parameters["rope_type"];
    ensure!(
        parameters.is_object() && (kind.is_null() || *kind == "default"),
        c.bad("rope_parameters", "is not supported; rope_type default is")
    );
    match &parameters["rope_theta"] {
        Value::Null => c.positive("rope_theta", 10_000.0),
        given => {
            let theta = given.as_f64().filter(|t| *t > 0.0);
            theta.ok_or_else(|| c.bad("rope_parameters", "has no positive rope_theta"))
        }
    }
}

/// Which states between the layers make a prompt's embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum States {
    /// Z-Image: before the last layer.
    SecondLast,
    /// FLUX.2: behind 9, 18 and 27 layers, side by side in the width.
    Three,
}

impl States {
    /// Behind how many layers they are, of so many.
    ///
    /// # Errors
    /// When there are too few layers.
    fn of(self, layers: usize) -> Result<Vec<usize>> {
        let states = match self {
            Self::SecondLast => vec![layers - 1],
            Self::Three => vec![9, 18, 27],
        };
        let last = states[states.len() - 1];
        ensure!(
            last <= layers,
            "the text encoder has {layers} layers, and the state behind layer {last} is asked for"
        );
        Ok(states)
    }

    /// How many there are.
    pub fn count(self) -> usize {
        match self {
            Self::SecondLast => 1,
            Self::Three => 3,
        }
    }
}

/// Token numbers of a prompt, and which of them are not padding.
#[derive(Clone, Debug, PartialEq)]
pub struct Tokens {
    pub ids: Vec<u32>,
    pub own: Vec<bool>,
}

impl Tokens {
    /// Leaves the padding out.
    pub fn leave_padding_out(&mut self) {
        let mut own = self.own.iter();
        self.ids.retain(|_| own.next() == Some(&true));
        self.own.retain(|own| *own);
    }
}

/// The encoder's file and numbers.
pub struct Qwen3Encoder {
    pub config: Qwen3Config,
    states: States,
    weights: Weights,
    device: Device,
    storage: Storage,
}

/// One layer's weights.
struct Layer {
    input_norm: RmsNorm,
    /// q, k, v and out.
    projections: [Linear; 4],
    qk_norms: [RmsNorm; 2],
    post_norm: RmsNorm,
    /// gate, up and down.
    mlp: [Linear; 3],
}

/// What all layers read of a prompt.
struct Prompt {
    /// cos and sin, `[1, T, 1, head]`.
    turns: [Tensor<4>; 2],
    /// Added to the scores, `[1, 1, T, T]`.
    bias: Tensor<4>,
    /// 1 for tokens that attend to something, `[1, T, 1]`.
    seeing: Tensor<3>,
}

impl Layer {
    fn load(root: &Loader, c: &Qwen3Config, i: usize) -> Result<Self> {
        let l = root.at(format!("layers.{i}"));
        let (attention, mlp) = (l.at("self_attn"), l.at("mlp"));
        let (queries, keys) = (c.heads * c.head, c.kv_heads * c.head);
        let norm = |l: &Loader, part: &str, width: usize| RmsNorm::load(l, part, width, c.eps);
        Ok(Self {
            input_norm: norm(&l, "input_layernorm", c.width)?,
            projections: [
                Linear::load(&attention, "q_proj", c.width, queries)?,
                Linear::load(&attention, "k_proj", c.width, keys)?,
                Linear::load(&attention, "v_proj", c.width, keys)?,
                Linear::load(&attention, "o_proj", queries, c.width)?,
            ],
            qk_norms: [norm(&attention, "q_norm", c.head)?, norm(&attention, "k_norm", c.head)?],
            post_norm: norm(&l, "post_attention_layernorm", c.width)?,
            mlp: [
                Linear::load(&mlp, "gate_proj", c.width, c.inner)?,
                Linear::load(&mlp, "up_proj", c.width, c.inner)?,
                Linear::load(&mlp, "down_proj", c.inner, c.width)?,
            ],
        })
    }

    /// `[1, T, width]`
    fn forward(&self, c: &Qwen3Config, x: Tensor<3>, prompt: &Prompt) -> Tensor<3> {
        let [b, t, _] = x.dims();
        let [q, k, v, out] = &self.projections;
        let h = self.input_norm.forward(x.clone());
        let split = |linear: &Linear, heads: usize| {
            linear.forward(h.clone(), None).reshape([b, t, heads, c.head])
        };
        let q = turn(self.qk_norms[0].forward(split(q, c.heads)), &prompt.turns);
        let k = turn(self.qk_norms[1].forward(split(k, c.kv_heads)), &prompt.turns);
        // Each head of keys and values as often as queries share it.
        let shared = c.heads / c.kv_heads;
        let spread = |x: Tensor<4>| {
            let x: Tensor<5> = x.unsqueeze_dim(3);
            x.expand([b, t, c.kv_heads, shared, c.head]).reshape([b, t, c.heads * c.head])
        };
        let (k, v) = (spread(k), spread(split(v, c.kv_heads)));
        let q = q.reshape([b, t, c.heads * c.head]);
        let heads = Heads::of(c.heads, c.heads * c.head);
        let attended = attention(q, k, v, Some(prompt.bias.clone()), heads);
        let x = x + out.forward(attended * prompt.seeing.clone(), None);
        let h = self.post_norm.forward(x.clone());
        let [gate, up, down] = &self.mlp;
        let h = silu_gated(gate.forward(h.clone(), None), up.forward(h, None));
        x + down.forward(h, None)
    }
}

/// Rotates the two halves of `[B, T, heads, head]` against each other.
fn turn(x: Tensor<4>, [cos, sin]: &[Tensor<4>; 2]) -> Tensor<4> {
    let half = x.dims()[3] / 2;
    let (first, second) = (x.clone().narrow(3, 0, half), x.clone().narrow(3, half, half));
    let turned = Tensor::cat(vec![-second, first], 3);
    x * cos.clone() + turned * sin.clone()
}

impl Qwen3Encoder {
    /// Opens a text encoder; nothing is read but the configuration and the list of tensors.
    ///
    /// # Errors
    /// Names the file and the field that is missing or not supported.
    pub fn open(
        part: &Component,
        states: States,
        device: &Device,
        storage: Storage,
    ) -> Result<Self> {
        let config = Qwen3Config::read(&part.config)?;
        if let Err(e) = states.of(config.layers) {
            bail!("{}: num_hidden_layers: {e}", part.config.path.display());
        }
        let weights = part.weights()?;
        Ok(Self { config, states, weights, device: device.clone(), storage })
    }

    /// Width of a token's embedding.
    pub fn width(&self) -> usize {
        self.states.count() * self.config.width
    }

    /// Prompts of any lengths -> `[T, width]` of each, on the host. Each layer is read once, and
    /// run on one prompt after the other. A token attends to itself and to what stands before it,
    /// but for padding.
    ///
    /// # Errors
    /// When a token is outside the vocabulary, or a tensor is missing or of the wrong shape.
    pub fn forward(&self, prompts: &[Tokens]) -> Result<Vec<Vec<f32>>> {
        let c = &self.config;
        let wanted = self.states.of(c.layers)?;
        let root = Loader::new(&self.weights, &self.device, self.storage);
        let root = if prefix(&self.weights).is_empty() { root } else { root.at("model") };
        let embed = |p: &Tokens| self.embed(&root, &p.ids);
        let mut hidden: Vec<Vec<f32>> = prompts.iter().map(embed).collect::<Result<_>>()?;
        let mut states: Vec<Vec<Vec<f32>>> = vec![Vec::new(); prompts.len()];
        for i in 0..wanted[wanted.len() - 1] {
            let layer = Layer::load(&root, c, i)?;
            // What transformers has behind the last layer is normed.
            let norm = (i + 1 == c.layers).then(|| RmsNorm::load(&root, "norm", c.width, c.eps));
            let norm = norm.transpose()?;
            for (prompt, hidden) in prompts.iter().zip(&mut hidden) {
                let t = hidden.len() / c.width;
                let x = upload(hidden, [1, t, c.width], &self.device);
                let y = layer.forward(c, x, &self.prompt(prompt));
                *hidden = read(&match &norm {
                    Some(norm) => norm.forward(y),
                    None => y,
                })?;
            }
            if wanted.contains(&(i + 1)) {
                states.iter_mut().zip(&hidden).for_each(|(all, state)| all.push(state.clone()));
            }
        }
        // With one layer alone the state before it is the embedding.
        if wanted == [0] {
            states.iter_mut().zip(hidden).for_each(|(all, state)| all.push(state));
        }
        Ok(states.iter().map(|all| side_by_side(all, c.width)).collect())
    }

    /// Rows of the embedding, picked on the host: the whole table would be the largest tensor of
    /// all.
    fn embed(&self, root: &Loader, ids: &[u32]) -> Result<Vec<f32>> {
        let (name, c) = (root.name("embed_tokens.weight"), &self.config);
        let mut rows = Vec::new();
        for &id in ids {
            ensure!(
                (id as usize) < c.vocabulary,
                "token {id} is outside the text encoder's vocabulary of {}; do tokenizer and text \
                 encoder belong together?",
                c.vocabulary
            );
            rows.extend(self.weights.row(&name, id as usize, &[c.width])?);
        }
        Ok(rows)
    }

    fn prompt(&self, p: &Tokens) -> Prompt {
        let (t, head) = (p.ids.len(), self.config.head);
        let mut turns = [Vec::new(), Vec::new()];
        for position in 0..t {
            // In f32, as transformers has it.
            let frequency =
                |i: usize| 1.0 / (self.config.theta as f32).powf(2.0 * i as f32 / head as f32);
            let angles = (0..head / 2).map(|i| position as f32 * frequency(i));
            let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(f32::sin_cos).unzip();
            // Both halves turn by the same angles.
            turns[0].extend(cos.repeat(2));
            turns[1].extend(sin.repeat(2));
        }
        let may = |i: usize, j: usize| j <= i && p.own[j];
        let score = |i: usize, j: usize| if may(i, j) { 0.0 } else { NEVER };
        let bias: Vec<f32> = (0..t).flat_map(|i| (0..t).map(move |j| score(i, j))).collect();
        // Padding before a prompt attends to nothing.
        let seeing = (0..t).map(|i| f32::from(u8::from((0..=i).any(|j| p.own[j]))));
        let seeing: Vec<f32> = seeing.collect();
        Prompt {
            turns: turns.map(|v| upload(&v, [1, t, 1, head], &self.device)),
            bias: upload(&bias, [1, 1, t, t], &self.device),
            seeing: upload(&seeing, [1, t, 1], &self.device),
        }
    }
}

/// States `[T, width]` as one, token by token.
fn side_by_side(states: &[Vec<f32>], width: usize) -> Vec<f32> {
    let tokens = states.first().map_or(0, |state| state.len() / width);
    let token = |i: usize| states.iter().flat_map(move |state| &state[i * width..][..width]);
    (0..tokens).flat_map(token).copied().collect()
}
