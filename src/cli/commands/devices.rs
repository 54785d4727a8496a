//! `devices`: what there is, and what `auto` takes.

use anyhow::Result;

use crate::device::Compute;
use crate::device::adapters::{adapters, auto};

pub fn run() -> Result<i32> {
    let adapters = adapters();
    let auto = auto(&adapters);
    for (i, a) in adapters.iter().enumerate() {
        let (limits, features) = (a.adapter.limits(), a.adapter.features());
        let yes = |f: wgpu::Features| if features.contains(f) { "yes" } else { "no" };
        let mib = |n: u64| n >> 20;
        say!("{i}: {}{}", a.label(), if auto == Some(i) { "   <- auto" } else { "" });
        say!(
            "   type {:?}, buffer {} MiB, binding {} MiB, workgroup memory {} KiB, f16 {}, \
             subgroups {}, matrix units {}",
            a.info.device_type,
            mib(limits.max_buffer_size),
            mib(limits.max_storage_buffer_binding_size),
            limits.max_compute_workgroup_storage_size >> 10,
            yes(wgpu::Features::SHADER_F16),
            yes(wgpu::Features::SUBGROUP),
            if a.has_matrices() { "yes" } else { "no" },
        );
    }
    let chosen = if auto.is_none() { "   <- auto: there is no hardware GPU" } else { "" };
    say!("cpu: {}{chosen}", Compute::cpu().name);
    Ok(0)
}
