//! Tensors between a device and the host.

use anyhow::{Result, anyhow};
use burn::tensor::{Device, Int, Tensor, TensorData, Transaction};

/// A tensor with the values of a slice.
pub fn upload<const D: usize>(values: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

/// Places, as Burn's selections take them.
pub fn index(at: &[usize], device: &Device) -> Tensor<1, Int> {
    let places: Vec<i32> = at.iter().map(|&place| place as i32).collect();
    Tensor::from_data(TensorData::new(places, [at.len()]), device)
}

#[cfg(test)]
thread_local! {
    /// How often this thread has waited for a device's values.
    pub static VISITS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// The values of a tensor, whatever its device.
///
/// # Errors
/// When the device failed or was lost.
pub fn read<const D: usize>(tensor: &Tensor<D>) -> Result<Vec<f32>> {
    #[cfg(test)]
    VISITS.set(VISITS.get() + 1);
    let data = tensor.clone().try_into_data().map_err(|e| failed(&e))?;
    values(data)
}

/// The values of several tensors, by one visit to the device.
///
/// # Errors
/// As [`read`].
pub fn read_all<const D: usize>(tensors: Vec<Tensor<D>>) -> Result<Vec<Vec<f32>>> {
    if tensors.is_empty() {
        return Ok(Vec::new());
    }
    #[cfg(test)]
    VISITS.set(VISITS.get() + 1);
    let all = tensors.into_iter().fold(Transaction::default(), Transaction::register);
    all.try_execute().map_err(|e| failed(&e))?.into_iter().map(values).collect()
}

/// The values of a tensor on the CPU device, where reading cannot fail.
pub fn host<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    read(tensor).expect("the CPU device holds its tensors in memory")
}

fn failed(error: &dyn std::fmt::Debug) -> anyhow::Error {
    anyhow!("the device failed while a result was read: {error:?}")
}

fn values(data: TensorData) -> Result<Vec<f32>> {
    data.try_into_vec::<f32>().map_err(|e| anyhow!("a tensor is not f32: {e:?}"))
}
