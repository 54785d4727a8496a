//! `attention`: softmax(scale q k^T + bias) v over tokens, head by head, a block of scores at a
//! time (FlashAttention, Dao et al. 2022; the backward pass of Dao 2023). What a row's softmax is
//! made with is kept, from which the gradient makes its scores again; no score matrix lies in
//! memory.

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::attention_gpu::{Call, on_gpu};
use super::cpu::{Matrix, Values, Write, product, tensor};
use super::layer_norm::sum;
use super::node::{input, node, output};
use super::vector::{exp, vectorised};
use crate::device::gpu::Gpu;

/// The numbers of an attention.
#[derive(Clone, Copy)]
pub struct Heads {
    pub heads: usize,
    pub scale: f64,
}

impl Heads {
    /// Heads of tokens of a width, their scores over the root of a head's width.
    pub fn of(heads: usize, width: usize) -> Self {
        Self { heads, scale: 1.0 / ((width / heads) as f64).sqrt() }
    }
}

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    heads: usize,
    tq: usize,
    tk: usize,
    width: usize,
    scale: f32,
}

impl Sizes {
    fn head(&self) -> usize {
        self.width / self.heads
    }
}

/// Queries and keys of a block of scores.
const QUERIES: usize = 64;
const KEYS: usize = 512;

/// What is added to the scores: element (image, head, i, j) of `[1 or B, 1 or heads, Tq, Tk]`.
struct Bias {
    values: Values,
    image: usize,
    head: usize,
}

/// Strides of a bias over images and heads; 0 where one is for all.
fn strides(bias: &Tensor<4>) -> [usize; 2] {
    let [b, heads, tq, tk] = bias.dims();
    let step = |n: usize, size: usize| if n == 1 { 0 } else { size };
    [step(b, heads * tq * tk), step(heads, tq * tk)]
}

impl Bias {
    fn of(bias: &Tensor<4>) -> Self {
        let [image, head] = strides(bias);
        Self { values: Values::of(bias), image, head }
    }
}

/// One head of one image.
struct Head<'a> {
    s: Sizes,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    /// `[Tq, Tk]`
    bias: Option<&'a [f32]>,
}

impl<'a> Head<'a> {
    fn at(s: Sizes, [q, k, v]: [&'a [f32]; 3], bias: Option<&'a Bias>, b: usize, h: usize) -> Self {
        let from = h * s.head();
        Self {
            s,
            q: &q[b * s.tq * s.width + from..],
            k: &k[b * s.tk * s.width + from..],
            v: &v[b * s.tk * s.width + from..],
            bias: bias.map(|x| &x.values[b * x.image + h * x.head..]),
        }
    }

    /// Scores of `m` queries from `i` on with `n` keys from `j` on.
    fn scores(&self, [i, m]: [usize; 2], [j, n]: [usize; 2], out: &mut [f32]) {
        let w = self.s.width;
        let q = Matrix::new(&self.q[i * w..], w);
        let k = Matrix::new(&self.k[j * w..], w).transposed();
        product([m, self.s.head(), n], q, k, self.s.scale, Write::Replace, out, n);
        if let Some(bias) = self.bias {
            for (row, out) in out.chunks_exact_mut(n).take(m).enumerate() {
                let bias = &bias[(i + row) * self.s.tk + j..][..n];
                out.iter_mut().zip(bias).for_each(|(s, b)| *s += b);
            }
        }
    }
}

/// Keys in blocks: first and number.
fn blocks(total: usize, size: usize) -> impl Iterator<Item = [usize; 2]> {
    (0..total).step_by(size).map(move |first| [first, size.min(total - first)])
}

/// Output and sums of some queries of one image.
struct Rows<'a> {
    image: usize,
    first: usize,
    /// `[m, width]`
    out: &'a mut [f32],
    /// The largest score and one over the sum of each row, `[m, heads]`: the logarithm of both in
    /// one number would lose a large score's last digits.
    sums: &'a mut [[f32; 2]],
}

fn forward_rows(s: Sizes, qkv: [&[f32]; 3], bias: Option<&Bias>, rows: Rows) {
    let (m, d) = (rows.out.len() / s.width, s.head());
    let mut scores = vec![0.0; m * KEYS.min(s.tk)];
    for h in 0..s.heads {
        let head = Head::at(s, qkv, bias, rows.image, h);
        let out = &mut rows.out[h * d..];
        let (mut most, mut total) = (vec![f32::NEG_INFINITY; m], vec![0f32; m]);
        for [j, n] in blocks(s.tk, KEYS) {
            let scores = &mut scores[..m * n];
            head.scores([rows.first, m], [j, n], scores);
            for (i, row) in scores.chunks_exact_mut(n).enumerate() {
                let [new, sum] = vectorised(
                    #[inline(always)]
                    || {
                        let new = row.iter().fold(most[i], |a, b| a.max(*b));
                        row.iter_mut().for_each(|x| *x = exp(*x - new));
                        [new, sum(n, |j| row[j])]
                    },
                );
                let kept = if most[i] == new { 1.0 } else { exp(most[i] - new) };
                total[i] = total[i] * kept + sum;
                most[i] = new;
                if kept != 1.0 && j > 0 {
                    out[i * s.width..][..d].iter_mut().for_each(|x| *x *= kept);
                }
            }
            let v = Matrix::new(&head.v[j * s.width..], s.width);
            let into = if j == 0 { Write::Replace } else { Write::Add };
            product([m, n, d], Matrix::new(scores, n), v, 1.0, into, out, s.width);
        }
        for i in 0..m {
            let share = 1.0 / total[i];
            out[i * s.width..][..d].iter_mut().for_each(|x| *x *= share);
            rows.sums[i * s.heads + h] = [most[i], share];
        }
    }
}

/// Output `[B, Tq, width]`, and the softmax's sums `[B, Tq, heads]`, on the CPU.
fn forward(s: Sizes, qkv: [&[f32]; 3], bias: Option<&Bias>) -> (Vec<f32>, Vec<[f32; 2]>) {
    let (mut out, mut sums) = (vec![0.0; qkv[0].len()], vec![[0.0; 2]; qkv[0].len() / s.head()]);
    let images = out.chunks_mut(s.tq * s.width).zip(sums.chunks_mut(s.tq * s.heads));
    let work = images.enumerate().flat_map(|(image, (out, sums))| {
        let parts = out.chunks_mut(QUERIES * s.width).zip(sums.chunks_mut(QUERIES * s.heads));
        parts.enumerate().map(move |(i, (out, sums))| Rows { image, first: i * QUERIES, out, sums })
    });
    let work: Vec<Rows> = work.collect();
    work.into_par_iter().for_each(|rows| forward_rows(s, qkv, bias, rows));
    (out, sums)
}

/// Gradients of q, k and v, of one head, `[T, d]`, or of all.
struct Gradients {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// What the gradient of one image needs besides: its output, that output's gradient, its
/// sums.
struct Given<'a> {
    out: &'a [f32],
    g: &'a [f32],
    sums: &'a [[f32; 2]],
}

fn gradient_head(s: Sizes, head: Head, h: usize, given: &Given) -> Gradients {
    let (d, w, from) = (s.head(), s.width, h * s.head());
    let [mut gq, mut gk, mut gv] = [s.tq, s.tk, s.tk].map(|tokens| vec![0.0; tokens * d]);
    let size = QUERIES.min(s.tq) * KEYS.min(s.tk);
    let (mut p, mut gp) = (vec![0.0; size], vec![0.0; size]);
    for [i, m] in blocks(s.tq, QUERIES) {
        let at = i * w + from;
        let g = Matrix::new(&given.g[at..], w);
        let delta = |row: usize| {
            let (g, out) = (&given.g[at + row * w..], &given.out[at + row * w..]);
            vectorised(
                #[inline(always)]
                || sum(d, |j| g[j] * out[j]),
            )
        };
        for [j, n] in blocks(s.tk, KEYS) {
            let (p, gp) = (&mut p[..m * n], &mut gp[..m * n]);
            head.scores([i, m], [j, n], p);
            let v = Matrix::new(&head.v[j * w..], w).transposed();
            product([m, d, n], g, v, 1.0, Write::Replace, gp, n);
            for (row, (p, gp)) in p.chunks_exact_mut(n).zip(gp.chunks_exact_mut(n)).enumerate() {
                let [most, share] = given.sums[(i + row) * s.heads + h];
                vectorised(
                    #[inline(always)]
                    || {
                        p.iter_mut().for_each(|p| *p = exp(*p - most) * share);
                        // One block of keys gives the row's sum in the terms that it is taken
                        // from: where a softmax has one key, they cancel to the bit.
                        let delta = if n == s.tk { sum(n, |j| p[j] * gp[j]) } else { delta(row) };
                        gp.iter_mut().zip(p).for_each(|(gp, p)| *gp = *p * (*gp - delta));
                    },
                );
            }
            let (pt, gpt) = (Matrix::new(p, n).transposed(), Matrix::new(gp, n).transposed());
            product([n, m, d], pt, g, 1.0, Write::Add, &mut gv[j * d..], d);
            let q = Matrix::new(&head.q[i * w..], w);
            product([n, m, d], gpt, q, s.scale, Write::Add, &mut gk[j * d..], d);
            let k = Matrix::new(&head.k[j * w..], w);
            product([m, n, d], Matrix::new(gp, n), k, s.scale, Write::Add, &mut gq[i * d..], d);
        }
    }
    Gradients { q: gq, k: gk, v: gv }
}

/// Gradients of q, k and v on the CPU.
fn gradient(s: Sizes, qkv: [&[f32]; 3], bias: Option<&Bias>, given: Given) -> Gradients {
    let of_one = |i: usize| {
        let (b, h) = (i / s.heads, i % s.heads);
        let (of, rows) = (b * s.tq * s.width.., b * s.tq * s.heads..);
        let given = Given { out: &given.out[of.clone()], g: &given.g[of], sums: &given.sums[rows] };
        gradient_head(s, Head::at(s, qkv, bias, b, h), h, &given)
    };
    let heads = qkv[0].len() / (s.tq * s.head());
    let heads: Vec<Gradients> = (0..heads).into_par_iter().map(of_one).collect();
    let beside = |tokens: usize, one: fn(&Gradients) -> &[f32]| {
        let mut all = Vec::with_capacity(heads.len() * tokens * s.head());
        for image in heads.chunks(s.heads) {
            for at in (0..tokens * s.head()).step_by(s.head()) {
                image.iter().for_each(|head| all.extend_from_slice(&one(head)[at..][..s.head()]));
            }
        }
        all
    };
    Gradients { q: beside(s.tq, |g| &g.q), k: beside(s.tk, |g| &g.k), v: beside(s.tk, |g| &g.v) }
}

/// `q` `[B, Tq, heads d]`, `k` and `v` `[B, Tk, heads d]` -> `[B, Tq, heads d]`; `bias`
/// `[1 or B, 1 or heads, 1 or Tq, Tk]`, a constant, is added to the scaled scores.
pub fn attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    bias: Option<Tensor<4>>,
    heads: Heads,
) -> Tensor<3> {
    let ([b, tq, width], tk) = (q.dims(), k.dims()[1]);
    let s = Sizes { heads: heads.heads, tq, tk, width, scale: heads.scale as f32 };
    let parents = [input(&q), input(&k), input(&v)];
    let [q, k, v] = [q, k, v].map(|x| x.inner());
    let bias = bias.map(|bias| {
        let [images, heads, ..] = bias.dims();
        bias.inner().expand([images, heads, tq, tk])
    });
    if let Some(gpu) = Gpu::of(&q) {
        let strides = bias.as_ref().map_or([0, 0], strides);
        let call = Call { heads: heads.heads, scale: heads.scale as f32, bias: strides };
        return on_gpu(gpu, [q, k, v], bias, call, parents);
    }
    let [q, k, v] = [q, k, v].map(|x| Values::of(&x));
    let bias = bias.as_ref().map(Bias::of);
    let (out, sums) = forward(s, [&q, &k, &v], bias.as_ref());
    let out = tensor(out, [b, tq, width]);
    let kept = Values::of(&out);
    node(parents, out, move |g: Tensor<3>, _| {
        let g = Values::of(&g);
        let given = Given { out: &kept, g: &g, sums: &sums };
        let g = gradient(s, [&q, &k, &v], bias.as_ref(), given);
        let (like_q, like_k) = ([b, tq, width], [b, tk, width]);
        [output(tensor(g.q, like_q)), output(tensor(g.k, like_k)), output(tensor(g.v, like_k))]
    })
}
