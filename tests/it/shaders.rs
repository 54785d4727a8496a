//! Every shader validates and translates for Metal, Direct3D 12 and Vulkan.

use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use pcpo_wgpu::device::gpu::Kernel;
use pcpo_wgpu::{kernels, ops};

/// Every kernel of the hot path and of the networks, in all its variants.
fn kernels() -> Vec<(Kernel, u32)> {
    let hot = ops::registry::kernels().into_iter().flat_map(|k| [(k, 1), (k, 4)]);
    let own = kernels::registry::kernels().into_iter();
    hot.chain(own.flat_map(|(k, variants)| variants.into_iter().map(move |v| (k, v)))).collect()
}

#[test]
fn every_shader_translates_for_msl_hlsl_and_spirv() {
    for (kernel, width) in kernels() {
        let name = format!("{} of variant {width}", kernel.name);
        let source = (kernel.source)(width);
        let module = naga::front::wgsl::parse_str(&source)
            .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)));
        // Only weights and what products take are ever in f16, and only where subgroups are eight
        // wide are they spoken of.
        let mut more = Capabilities::empty();
        let of_weights = kernel.name.starts_with("frozen_");
        more.set(
            Capabilities::SHADER_FLOAT16_IN_FLOAT32,
            of_weights || source.contains("quantizeToF16"),
        );
        more.set(Capabilities::SUBGROUP, source.contains("subgroup"));
        let half = source.contains("enable f16;");
        more.set(Capabilities::SHADER_FLOAT16, half);
        let matrices = source.contains("enable wgpu_cooperative_matrix;");
        more.set(Capabilities::COOPERATIVE_MATRIX, matrices);
        let info = Validator::new(ValidationFlags::all(), more)
            .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
            .subgroup_operations(naga::valid::SubgroupOperationSet::all())
            .validate(&module)
            .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)));
        // Burn binds tensors in their order, then the uniforms (`device/gpu.rs`).
        let variables = module.global_variables.iter();
        let mut bound: Vec<u32> =
            variables.filter_map(|(_, v)| Some(v.binding.as_ref()?.binding)).collect();
        bound.sort();
        assert_eq!(bound, (0..bound.len() as u32).collect::<Vec<_>>(), "{name}: bindings");
        let words = spv::write_vec(&module, &info, &spv::Options::default(), None)
            .unwrap_or_else(|e| panic!("{name}: SPIR-V: {e}"));
        assert_eq!(words[0], 0x0723_0203, "{name}: SPIR-V's magic number");
        // Elsewhere matrices are of other sizes, or there are none.
        if matrices {
            continue;
        }
        // The least version that wgpu takes.
        let options = msl::Options {
            fake_missing_bindings: true,
            lang_version: (2, 0),
            ..Default::default()
        };
        let (metal, _) =
            msl::write_string(&module, &info, &options, &msl::PipelineOptions::default())
                .unwrap_or_else(|e| panic!("{name}: MSL: {e}"));
        assert!(metal.contains("kernel void"), "{name}: MSL has no kernel");
        let mut text = String::new();
        hlsl::Writer::new(
            &mut text,
            &hlsl::Options {
                fake_missing_bindings: true,
                // f16 came with 6.2.
                shader_model: if half { hlsl::ShaderModel::V6_2 } else { hlsl::ShaderModel::V5_1 },
                ..Default::default()
            },
            &hlsl::PipelineOptions::default(),
        )
        .write(&module, &info, None)
        .unwrap_or_else(|e| panic!("{name}: HLSL: {e}"));
        let of_groups = kernel.name.starts_with("group_norm");
        let threads = if of_groups { 256 } else { ops::THREADS };
        assert!(
            text.contains(&format!("numthreads({threads}, 1, 1)")),
            "{name}: HLSL has no kernel of {threads} threads"
        );
    }
}

#[test]
fn every_file_in_shaders_is_used() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let sources: Vec<String> = kernels().iter().map(|(k, variant)| (k.source)(*variant)).collect();
    let mut files = 0;
    for folder in
        ["", "shared", "objectives", "weights", "eights", "compute"].map(|folder| dir.join(folder))
    {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                continue;
            }
            files += 1;
            let text = std::fs::read_to_string(&path).unwrap();
            let used = sources.iter().any(|source| source.contains(&text));
            assert!(used, "{} belongs to no kernel", path.display());
        }
    }
    assert!(files >= 16, "{files} files");
}
