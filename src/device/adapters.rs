//! Which adapter a run uses: listing, choosing, and opening it once for Burn and for our own
//! shaders.

use anyhow::{Result, anyhow, bail, ensure};
use burn::tensor::Device;
use burn::tensor::wgpu::WgpuSetup;

use super::compute::{Compute, ComputeType};
use super::gpu::{Gpu, Kernels};
use super::runtime::configure;
use super::system;

/// One line of `pcpo-wgpu devices`.
pub struct Adapter {
    pub adapter: wgpu::Adapter,
    pub info: wgpu::AdapterInfo,
}

impl Adapter {
    /// Whether the adapter is hardware: software Vulkan (lavapipe calls itself llvmpipe), WARP and
    /// the like are not.
    pub fn is_hardware(&self) -> bool {
        use wgpu::DeviceType::*;
        matches!(self.info.device_type, DiscreteGpu | IntegratedGpu | VirtualGpu)
    }

    /// Name, backend and driver in one line.
    pub fn label(&self) -> String {
        let i = &self.info;
        format!("{} ({:?}, {} {})", i.name, i.backend, i.driver, i.driver_info)
    }

    /// Bytes of memory that it offers, where it can be asked.
    pub fn memory(&self) -> Option<u64> {
        if !self.is_hardware() {
            return Some(system::available());
        }
        // Only Vulkan tells; Metal shares the machine's memory.
        #[cfg(not(target_vendor = "apple"))]
        {
            // SAFETY: the handles are read and live as long as the guard.
            unsafe {
                let adapter = self.adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
                let instance = adapter.shared_instance().raw_instance();
                let properties =
                    instance.get_physical_device_memory_properties(adapter.raw_physical_device());
                let heaps = &properties.memory_heaps[..properties.memory_heap_count as usize];
                // The first flag of a heap: local to the device.
                heaps.iter().filter(|h| h.flags.as_raw() & 1 == 1).map(|h| h.size).max()
            }
        }
        #[cfg(target_vendor = "apple")]
        Some(system::available())
    }

    /// Whether shaders reach matrix units (tensor cores) that take 16 x 16 numbers in f16 and add
    /// up in f32, in subgroups of 32: `--compute f16` uses them.
    pub fn has_matrices(&self) -> bool {
        let i = &self.info;
        let features = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
            | wgpu::Features::SHADER_F16
            | wgpu::Features::SUBGROUP;
        let limits = self.adapter.limits();
        let wanted = |m: &wgpu::CooperativeMatrixProperties| {
            (m.m_size, m.n_size, m.k_size) == (16, 16, 16)
                && m.ab_type == wgpu::CooperativeScalarType::F16
                && m.cr_type == wgpu::CooperativeScalarType::F32
        };
        (i.subgroup_min_size, i.subgroup_max_size) == (32, 32)
            && self.adapter.features().contains(features)
            // What shaders/shared/product_matrices.wgsl takes.
            && limits.max_compute_workgroup_storage_size >= 27_136
            && limits.max_compute_invocations_per_workgroup >= 256
            && self.adapter.cooperative_matrix_properties().iter().any(wanted)
    }

    fn matches(&self, wanted: &str) -> bool {
        let lavapipe =
            self.info.name.to_lowercase().contains("llvmpipe") && "lavapipe".contains(wanted);
        lavapipe || self.label().to_lowercase().contains(wanted)
    }
}

fn instance() -> wgpu::Instance {
    wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::PRIMARY,
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    })
}

/// All adapters that can compute, in wgpu's order; their numbers are what `--device N` takes.
pub fn adapters() -> Vec<Adapter> {
    list(&instance())
}

fn list(instance: &wgpu::Instance) -> Vec<Adapter> {
    pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY))
        .into_iter()
        .map(|adapter| Adapter { info: adapter.get_info(), adapter })
        .collect()
}

/// The adapter that `auto` takes: a discrete GPU before an integrated before a virtual one; never
/// software.
pub fn auto(adapters: &[Adapter]) -> Option<usize> {
    use wgpu::DeviceType::*;
    let rank = |a: &Adapter| match a.info.device_type {
        DiscreteGpu => 0,
        IntegratedGpu => 1,
        VirtualGpu | Cpu | Other => 2,
    };
    (0..adapters.len()).filter(|&i| adapters[i].is_hardware()).min_by_key(|&i| rank(&adapters[i]))
}

/// Opens the device named by `--device`: `auto`, `cpu`, a number of `pcpo-wgpu devices`, or a part
/// of a name.
///
/// # Errors
/// When no adapter has that number or name, when several do, or when the driver refuses the device.
pub fn open(wanted: &str) -> Result<Compute> {
    open_with(wanted, Opening::default())
}

/// How a device is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Opening {
    pub compute: ComputeType,
    /// Runs the kernels of hardware on software too, for tests.
    pub by_tiles: bool,
}

impl From<ComputeType> for Opening {
    fn from(compute: ComputeType) -> Self {
        Self { compute, by_tiles: false }
    }
}

/// [`open`] with kernels of one's choice.
///
/// # Errors
/// As [`open`], and when the device cannot compute in that type.
pub fn open_with(wanted: &str, how: Opening) -> Result<Compute> {
    let compute = open_device(wanted, how)?;
    ensure!(
        how.compute == ComputeType::F32 || compute.gpu.is_some(),
        "--compute f16: the CPU computes in f32; leave it out, or name a GPU of `pcpo-wgpu \
         devices` with --device"
    );
    Ok(compute)
}

fn open_device(wanted: &str, how: Opening) -> Result<Compute> {
    let name = wanted.to_lowercase();
    if name == "cpu" {
        return Ok(Compute::cpu());
    }
    let instance = instance();
    let adapters = list(&instance);
    let hint = "`pcpo-wgpu devices` lists what there is, `--device cpu` always works";
    if name == "auto" {
        return match auto(&adapters) {
            Some(i) => request(instance, &adapters[i], how),
            None => {
                let mut compute = Compute::cpu();
                compute.name += ": no hardware GPU was found, so the CPU backend computes \
                    (software Vulkan is slower)";
                Ok(compute)
            }
        };
    }
    if let Ok(n) = wanted.parse::<usize>() {
        let adapter = adapters.get(n).ok_or_else(|| {
            anyhow!("--device {n}: there are {} adapters, numbered from 0; {hint}", adapters.len())
        })?;
        return request(instance, adapter, how);
    }
    let found: Vec<&Adapter> = adapters.iter().filter(|a| a.matches(&name)).collect();
    match found[..] {
        [] => bail!("--device {wanted}: no adapter has that name; {hint}"),
        [one] => request(instance, one, how),
        _ => {
            let names: Vec<String> = found.iter().map(|a| a.label()).collect();
            bail!(
                "--device {wanted}: {} adapters match ({}); give a number; {hint}",
                names.len(),
                names.join("; ")
            )
        }
    }
}

fn request(instance: wgpu::Instance, chosen: &Adapter, how: Opening) -> Result<Compute> {
    configure();
    let adapter = chosen.adapter.clone();
    let half = how.compute == ComputeType::F16;
    let matrices = half && chosen.has_matrices();
    let experimental = if matrices {
        // SAFETY: matrix units are used by our own shaders alone, which keep to their rules.
        unsafe { wgpu::ExperimentalFeatures::enabled() }
    } else {
        wgpu::ExperimentalFeatures::disabled()
    };
    let mut features = adapter.features() - wgpu::Features::all_experimental_mask();
    features.set(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX, matrices);
    // Everything that the adapter has: Burn's kernels use f16, subgroups and large bindings where
    // they exist.
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("pcpo-wgpu"),
        required_features: features - wgpu::Features::MAPPABLE_PRIMARY_BUFFERS,
        experimental_features: experimental,
        required_limits: adapter.limits(),
        memory_hints: wgpu::MemoryHints::MemoryUsage,
        ..Default::default()
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).map_err(|e| {
        anyhow!(
            "--device: {} cannot be opened: {e}; try another of `pcpo-wgpu devices`",
            chosen.label()
        )
    })?;
    let setup = WgpuSetup {
        instance,
        adapter,
        device: device.clone(),
        queue,
        backend: chosen.info.backend,
    };
    let burn = Device::wgpu_options()
        .setup(setup)
        .init()
        .map_err(|e| anyhow!("--device: {} cannot be used by Burn: {e}", chosen.label()))?;
    let eights = !how.by_tiles
        && !chosen.is_hardware()
        && device.features().contains(wgpu::Features::SUBGROUP)
        && (chosen.info.subgroup_min_size, chosen.info.subgroup_max_size) == (8, 8);
    ensure!(
        !half || device.features().contains(wgpu::Features::SHADER_F16),
        "--compute f16: {} has no f16 in its shaders; leave it out",
        chosen.label()
    );
    // A second or two of a slow device: 10^10 products a second are a tenth of what slow integrated
    // GPUs make, 10^11 a tenth of what slow cards do.
    let most_products =
        if chosen.info.device_type == wgpu::DeviceType::DiscreteGpu { 1e11 } else { 1.5e10 };
    let gpu = Gpu::new(&burn, device, Kernels { eights, half, matrices, most_products });
    let software =
        if chosen.is_hardware() { "" } else { " [software: for tests of the GPU path, slow]" };
    Ok(Compute {
        burn,
        gpu: Some(gpu),
        name: format!("{}{software}", chosen.label()),
        software: !chosen.is_hardware(),
        memory: chosen.memory(),
    })
}
