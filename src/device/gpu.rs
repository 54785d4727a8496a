//! Our kernels in Burn's queue: tensors' buffers, and launches that Burn's server records among its
//! own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use burn::backend::{BackendTensor, DispatchTensorKind};
use burn::cubecl::client::Client;
use burn::cubecl::ir::metadata::Info;
use burn::cubecl::ir::{ElemType, Scope, UIntKind};
use burn::cubecl::prelude::*;
use burn::cubecl::server::{Handle, KernelArguments, MetadataBindingInfo};
use burn::cubecl::{CubeKernel, PrecompiledSource};
use burn::tensor::{Device, Tensor};

/// A kernel: its name is the shader's file name, its source carries the shared parts. A variant is
/// another source of the same name: a number of elements a thread (1 or 4) in the hot path.
#[derive(Clone, Copy)]
pub struct Kernel {
    pub name: &'static str,
    /// The source of a variant.
    pub source: fn(u32) -> String,
}

/// Numbers that a thread takes at a time, where rows of so many are read in order.
pub fn width(row: usize) -> u32 {
    if row.is_multiple_of(4) { 4 } else { 1 }
}

/// What a kernel's source begins with where its variant is a number of elements a thread.
pub fn lanes(width: u32) -> String {
    match width {
        4 => include_str!("../../shaders/shared/lanes4.wgsl").into(),
        2 => include_str!("../../shaders/shared/lanes2.wgsl").into(),
        _ => include_str!("../../shaders/shared/lanes1.wgsl").into(),
    }
}

/// Declares a [`Kernel`] from a function that says what a variant begins with ([`lanes`] where none
/// is given) and the files of `shaders/` that it is made of, in order, its own last. `;
/// "FOLDER/PART"` makes another kernel of it with a part of another folder.
macro_rules! kernel {
    ($name:literal $(, $shared:literal)* $(; $part:literal)?) => {
        $crate::device::gpu::kernel!(
            begins $crate::device::gpu::lanes, $name $(, $shared)* $(; $part)?
        )
    };
    (begins $first:expr, $name:literal $(, $shared:literal)* $(; $part:literal)?) => {
        $crate::device::gpu::Kernel {
            name: concat!($name $(, ":", $part)?),
            source: |variant| {
                let first: fn(u32) -> String = $first;
                [first(variant),
                    $(include_str!(concat!("../../shaders/shared/", $shared, ".wgsl")).into(),)*
                    $(include_str!(concat!("../../shaders/", $part, ".wgsl")).into(),)?
                    include_str!(concat!("../../shaders/", $name, ".wgsl")).into()].join("\n")
            },
        }
    };
}
pub(crate) use kernel;

/// Which variants of its kernels a device runs.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    /// Those for subgroups that are eight wide on a software device: `shaders/shared/eights.wgsl`
    /// says why.
    pub eights: bool,
    /// Those whose products take f16.
    pub half: bool,
    /// Those whose products in f16 run on matrix units: `shaders/shared/product_matrices.wgsl`.
    pub matrices: bool,
    /// Products that one submission makes at most.
    pub most_products: f64,
}

/// A wgpu device that is Burn's too, and what our kernels are on it; clones share it.
#[derive(Clone)]
pub struct Gpu {
    pub device: wgpu::Device,
    pub kernels: Kernels,
    /// Bytes that a binding holds at most.
    pub most_bound: u64,
    /// Products that have been queued since they were last sent off.
    queued: Arc<Mutex<f64>>,
}

/// Memory of a Burn tensor, contiguous, or of Burn's pool; holds the allocation as long as it
/// lives.
pub struct Buffer {
    client: Client,
    handle: Handle,
}

impl Buffer {
    /// Memory for `elements` numbers, from the pool that this buffer is from.
    pub fn scratch(&self, elements: usize) -> Self {
        let handle = if POISON.load(Ordering::Relaxed) {
            self.client.create_from_slice(bytemuck::cast_slice(&vec![f32::NAN; elements]))
        } else {
            self.client.empty(size_of::<f32>() * elements)
        };
        Self { client: self.client.clone(), handle }
    }
}

/// One kernel launch: tensors in the order of the shader's bindings from 1 on, and the grid.
pub struct Launch<'a> {
    pub kernel: Kernel,
    pub bindings: Vec<&'a Buffer>,
    pub grid: [u32; 2],
}

/// Resolves a tensor to its memory, with everything that Burn still owed to it queued.
pub fn buffer<const D: usize>(tensor: &Tensor<D>) -> Buffer {
    let kind = tensor.clone().into_dispatch().kind;
    let DispatchTensorKind::Cube(BackendTensor::Float(t)) = kind else {
        panic!("a GPU kernel was given a tensor of another backend");
    };
    // With fusion a tensor is a promise: resolving it runs what it waits for.
    #[cfg(feature = "fusion")]
    let t = {
        let client: burn_fusion::client::GlobalFusionClient<_> = t.client.clone();
        client.resolve_tensor_float::<burn_wgpu::CubeBackend>(t)
    };
    let t = burn_cubecl::kernel::into_contiguous(t);
    Buffer { client: t.client, handle: t.handle }
}

/// What has been opened, by Burn's device.
static OPENED: RwLock<Vec<(Device, Gpu)>> = RwLock::new(Vec::new());

/// Destroys all that has been opened, as a driver does that loses its device: for tests.
#[doc(hidden)]
pub fn lose_all() {
    let opened = OPENED.read().unwrap_or_else(PoisonError::into_inner);
    opened.iter().for_each(|(_, gpu)| gpu.device.destroy());
}

impl Gpu {
    /// Burn's wgpu device, found again by [`Self::of`].
    pub fn new(burn: &Device, device: wgpu::Device, kernels: Kernels) -> Self {
        let most_bound = device.limits().max_storage_buffer_binding_size;
        let own = Self { device, kernels, most_bound, queued: Arc::default() };
        let mut opened = OPENED.write().unwrap_or_else(PoisonError::into_inner);
        opened.push((burn.clone(), own.clone()));
        own
    }

    /// The GPU that a tensor is on; `None` on the CPU backend.
    pub fn of<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        let device = tensor.device().without_autodiff();
        if device == Device::flex() {
            return None;
        }
        let opened = OPENED.read().unwrap_or_else(PoisonError::into_inner);
        let own = opened.iter().rev().find(|(burn, _)| *burn == device).map(|(_, gpu)| gpu.clone());
        Some(own.expect("tensors are on devices that this program has opened"))
    }

    /// Queues the launches in order, behind everything that Burn has queued. They share the
    /// uniforms and the variant of their sources. What fails on the device, fails where a result is
    /// read; a tensor that no binding holds is a panic of the device ([`super::guard`]).
    pub fn run(&self, uniforms: &[u8], variant: u32, launches: &[Launch]) {
        for Launch { kernel, bindings, grid } in launches {
            let largest = bindings.iter().map(|buffer| buffer.handle.size_in_used()).max();
            if let Some(bytes) = largest.filter(|bytes| *bytes > self.most_bound) {
                let [needs, has] = [bytes, self.most_bound].map(|n| n.div_ceil(1 << 20));
                let words = format!(
                    "{}: a tensor of {needs} MiB, where a binding of this device holds {has} MiB",
                    kernel.name
                );
                // Not a fault of the place, which a panic would note.
                std::panic::resume_unwind(Box::new(words));
            }
            let mut words = vec![0u64; uniforms.len().div_ceil(8)];
            bytemuck::cast_slice_mut(&mut words)[..uniforms.len()].copy_from_slice(uniforms);
            let handles = bindings.iter().map(|buffer| buffer.handle.clone().binding());
            let arguments = KernelArguments::new()
                .with_buffers(handles.collect())
                .with_info(MetadataBindingInfo::custom(words));
            let count = CubeCount::Static(grid[0], grid[1], 1);
            let task = Task { kernel: *kernel, variant, tensors: bindings.len() };
            bindings[0].client.launch(Box::new(task), count, arguments);
        }
    }

    /// Before work of so many products is queued: sends off what is, where both would be more than
    /// a submission may hold. A watchdog takes a device away that works on one for two seconds
    /// (Windows). One thread at a time gives a device work.
    pub fn make_room(&self, buffer: &Buffer, products: f64) {
        let mut queued = self.queued.lock().unwrap_or_else(PoisonError::into_inner);
        if *queued + products > self.kernels.most_products {
            *queued = 0.0;
            // A lost device is seen where a result is read.
            let _ = buffer.client.flush();
        }
        *queued += products;
    }
}

/// A launch as Burn's server takes it: it compiles the source once, and records the dispatch among
/// Burn's own, so that dozens of them are one submission.
struct Task {
    kernel: Kernel,
    variant: u32,
    tensors: usize,
}

impl KernelMetadata for Task {
    fn name(&self) -> &'static str {
        self.kernel.name
    }

    fn id(&self) -> KernelId {
        // Unchecked: our shaders keep their indices in range, end their loops, divide by nothing
        // that can be 0, and write workgroup memory before they read it.
        KernelId::new::<Self>()
            .info((self.kernel.name, self.variant))
            .mode(ExecutionMode::Unchecked)
    }

    fn address_type(&self) -> ElemType {
        UIntKind::U32.into()
    }
}

impl CubeKernel for Task {
    /// Nothing: the source stands for it.
    fn define(&self) -> KernelDefinition {
        let settings =
            KernelSettings::new(self.id().cube_dim, ExecutionMode::Unchecked, AddressType::U32);
        KernelDefinition { body: Scope::root(settings.clone()), settings, info: Info::default() }
    }

    fn source(&self) -> Option<PrecompiledSource> {
        // Errors name the entry point.
        let entry = self.kernel.name.replace(['/', ':'], "_");
        let source = bound_as_burn_does((self.kernel.source)(self.variant), self.tensors)
            .replace("fn main(", &format!("fn {entry}_main("));
        let entrypoint_name = format!("{entry}_main");
        Some(PrecompiledSource { source, entrypoint_name, lang: "wgsl" })
    }
}

/// A source with its bindings where Burn puts them: tensors from 0 on, where ours count from 1,
/// then the uniforms, which ours have at 0.
fn bound_as_burn_does(source: String, tensors: usize) -> String {
    let at = |binding: usize| format!("@binding({binding})");
    let source = source.replace(&at(0), "@binding(uniforms)");
    let moved = (1..=tensors).fold(source, |source, i| source.replace(&at(i), &at(i - 1)));
    moved.replace("@binding(uniforms)", &at(tensors))
}

static POISON: AtomicBool = AtomicBool::new(false);

/// From now on outputs start as NaN instead of whatever memory held: tests show that way that no
/// kernel relies on zeros.
pub fn poison_outputs() {
    POISON.store(true, Ordering::Relaxed);
}

/// A tensor for a kernel to fill.
pub fn output<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    if POISON.load(Ordering::Relaxed) {
        Tensor::full(shape, f32::NAN, device)
    } else {
        Tensor::empty(shape, device)
    }
}

#[cfg(test)]
mod tests {
    use super::bound_as_burn_does;

    #[test]
    fn tensors_move_down_by_one_and_the_uniforms_behind_them() {
        let ours: Vec<String> = (0..=11).map(|i| format!("@group(0) @binding({i}) x{i}")).collect();
        let bound = bound_as_burn_does(ours.join("\n"), 11);
        let burns = |i: usize| if i == 0 { 11 } else { i - 1 };
        for (i, line) in bound.lines().enumerate() {
            assert_eq!(line, format!("@group(0) @binding({}) x{i}", burns(i)));
        }
    }
}
