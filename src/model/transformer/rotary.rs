//! Rotary position embedding (RoFormer, Su et al. 2021) over several axes, as the FLUX models and
//! Z-Image have it: each axis turns its own share of a head's pairs.

use burn::tensor::{Device, Tensor, TensorData};

/// cos and sin, each number twice in a row, `[1 or P, T, 1, head]`.
pub type Turns = [Tensor<4>; 2];

/// The numbers of an embedding.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// Widths of the axes; together they are a head's.
    pub axes: Vec<usize>,
    pub theta: f64,
    /// Whether angles are rounded to f32 before their cosine is taken, as Z-Image's tables have
    /// it.
    pub rounded: bool,
}

impl Rotary {
    /// Of the positions of P sequences, all of one length.
    pub fn of<const N: usize>(&self, sequences: &[Vec<[f32; N]>], device: &Device) -> Turns {
        let head: usize = self.axes.iter().sum();
        let tokens = sequences.first().map_or(0, Vec::len);
        // Of each pair its axis and frequency.
        let frequency =
            |pair: usize, width: usize| self.theta.powf(-2.0 * pair as f64 / width as f64);
        let axis = |(axis, &width): (usize, &usize)| {
            (0..width / 2).map(move |pair| (axis, frequency(pair, width)))
        };
        let pairs: Vec<(usize, f64)> = self.axes.iter().enumerate().flat_map(axis).collect();
        let mut values = [Vec::new(), Vec::new()];
        for position in sequences.iter().flatten() {
            for (axis, frequency) in &pairs {
                let angle = f64::from(position[*axis]) * frequency;
                let angle = if self.rounded { f64::from(angle as f32) } else { angle };
                let (sin, cos) = angle.sin_cos();
                values[0].extend([cos as f32; 2]);
                values[1].extend([sin as f32; 2]);
            }
        }
        let shape = [sequences.len(), tokens, 1, head];
        values.map(|v| Tensor::from_data(TensorData::new(v, shape), device))
    }
}

/// Rotates neighbouring pairs of `[B, T, heads, head]`.
pub fn rotate(x: Tensor<4>, [cos, sin]: &Turns) -> Tensor<4> {
    let [b, t, h, d] = x.dims();
    let pairs = x.clone().reshape([b, t, h, d / 2, 2]);
    let (real, imaginary) = (pairs.clone().narrow(4, 0, 1), pairs.narrow(4, 1, 1));
    let turned = Tensor::cat(vec![-imaginary, real], 4).reshape([b, t, h, d]);
    x * cos.clone() + turned * sin.clone()
}
