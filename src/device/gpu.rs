//! Our pipelines on Burn's own wgpu device and queue: compile once, bind tensors' buffers, submit
//! in order.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use anyhow::{Result, anyhow};
use burn::backend::wgpu::{AutoCompiler, WgpuResource};
use burn::backend::{BackendTensor, DispatchTensorKind};
use burn::cubecl::client::Client;
use burn::cubecl::server::Handle;
use burn::cubecl::wgpu::WgpuServer;
use burn::tensor::{Device, Tensor};
use wgpu::util::DeviceExt;

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
}

/// Burn's wgpu device and queue with our compiled pipelines; clones share them.
#[derive(Clone)]
pub struct Gpu {
    pub device: wgpu::Device,
    queue: wgpu::Queue,
    pub kernels: Kernels,
    pipelines: Arc<Mutex<HashMap<(&'static str, u32), wgpu::ComputePipeline>>>,
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

/// One kernel launch: tensors in the order of the bindings from 1 on, and the grid.
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
    /// Burn's wgpu device and queue for our pipelines, found again by [`Self::of`].
    pub fn new(burn: &Device, device: wgpu::Device, queue: wgpu::Queue, kernels: Kernels) -> Self {
        let own = Self { device, queue, kernels, pipelines: Arc::default() };
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

    fn pipeline(&self, kernel: Kernel, width: u32) -> wgpu::ComputePipeline {
        let mut pipelines = self.pipelines.lock().expect("no thread panics while it compiles");
        pipelines
            .entry((kernel.name, width))
            .or_insert_with(|| {
                let module = self.device.create_shader_module(wgpu::ShaderModuleDescriptor {
                    label: Some(kernel.name),
                    source: wgpu::ShaderSource::Wgsl((kernel.source)(width).into()),
                });
                self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                    label: Some(kernel.name),
                    layout: None,
                    module: &module,
                    entry_point: Some("main"),
                    compilation_options: Default::default(),
                    cache: None,
                })
            })
            .clone()
    }

    /// Submits the launches in order, after everything that Burn has queued. They share the
    /// uniforms (binding 0) and the width that their sources are made for.
    ///
    /// # Errors
    /// When an earlier operation that a tensor waits for failed (out of memory, a lost device).
    pub fn run(&self, uniforms: &[u8], width: u32, launches: &[Launch]) -> Result<()> {
        let client = &launches[0].bindings[0].client;
        // Burn's server has a thread of its own. The whole submission is one visit to it: each
        // question asked from here costs as much as a small kernel.
        let done = client.exclusive(|| self.submit(client, uniforms, width, launches));
        done.map_err(|e| anyhow!("the device failed: {e}"))?
    }

    fn submit(
        &self,
        client: &Client,
        uniforms: &[u8],
        width: u32,
        launches: &[Launch],
    ) -> Result<()> {
        let resource = |buffer: &&Buffer| {
            let found = client.get_resource::<WgpuServer<AutoCompiler>>(buffer.handle.clone());
            Ok(found
                .map_err(|e| anyhow!("the device failed in an earlier operation: {e}"))?
                .resource()
                .clone())
        };
        let resources: Vec<Vec<WgpuResource>> = launches
            .iter()
            .map(|launch| launch.bindings.iter().map(resource).collect())
            .collect::<Result<_>>()?;
        // Burn batches its commands; ours must not overtake them.
        client.flush().map_err(|e| anyhow!("the device refuses work: {e}"))?;
        let uniforms = self.device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
            label: None,
            contents: uniforms,
            usage: wgpu::BufferUsages::UNIFORM,
        });
        let mut encoder = self.device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        for (launch, resources) in launches.iter().zip(&resources) {
            let pipeline = self.pipeline(launch.kernel, width);
            let mut entries =
                vec![wgpu::BindGroupEntry { binding: 0, resource: uniforms.as_entire_binding() }];
            entries.extend(resources.iter().zip(1..).map(|(resource, binding)| {
                wgpu::BindGroupEntry { binding, resource: resource.as_wgpu_bind_resource() }
            }));
            let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(launch.kernel.name),
                layout: &pipeline.get_bind_group_layout(0),
                entries: &entries,
            });
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(0, &group, &[]);
            pass.dispatch_workgroups(launch.grid[0], launch.grid[1], 1);
        }
        drop(pass);
        self.queue.submit([encoder.finish()]);
        Ok(())
    }
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
