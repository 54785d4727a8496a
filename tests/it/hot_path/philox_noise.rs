//! `philox_noise`.

use pcpo_wgpu::device::Compute;
use pcpo_wgpu::device::tensor::read;
use pcpo_wgpu::ops::NoiseKey;
use pcpo_wgpu::ops::philox_noise::philox_noise;
use pcpo_wgpu::philox::{self, Stream};

use super::{KEY, SHAPES};
use crate::support::gpu;

#[test]
fn philox_noise_on_the_gpu_is_that_of_the_cpu_in_any_batch_layout() {
    let (gpu, cpu) = (gpu(), Compute::cpu());
    for shape in SHAPES {
        let found = read(&philox_noise(&gpu, shape, KEY)).unwrap();
        let expected = read(&philox_noise(&cpu, shape, KEY)).unwrap();
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 2e-6), "{shape:?}");
        // And of the formula in f64.
        let dim: usize = shape[1..].iter().product();
        for (i, z) in found.iter().enumerate() {
            let (image, element) = ((i / dim) as u32, i % dim);
            let words = philox::words(
                KEY.seed,
                Stream::StepNoise,
                KEY.first_image + image,
                KEY.step,
                element as u32 / 4,
            );
            let pair = if element % 4 < 2 { [words[0], words[1]] } else { [words[2], words[3]] };
            let radius = (-2.0 * ((f64::from(pair[0] >> 9) + 0.5) / 8_388_608.0).ln()).sqrt();
            let (sin, cos) =
                (std::f64::consts::TAU * f64::from(pair[1]) / 4_294_967_296.0).sin_cos();
            let exact = radius * if element % 2 == 0 { cos } else { sin };
            assert!(
                (f64::from(*z) - exact).abs() < 2e-6,
                "{shape:?}: element {i} is {z}, not {exact}"
            );
        }
        assert_eq!(found, read(&philox_noise(&gpu, shape, KEY)).unwrap(), "repeats to the bit");
        let last = NoiseKey { first_image: KEY.first_image + shape[0] as u32 - 1, ..KEY };
        let alone = read(&philox_noise(&gpu, [1, shape[1], shape[2], shape[3]], last)).unwrap();
        assert_eq!(alone, found[found.len() - alone.len()..], "a batch of one has the same noise");
    }
}
