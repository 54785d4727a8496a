//! Weights larger than memory: a network whose blocks are read when their turn comes gives the bits
//! of one that holds them all.

use pcpo_wgpu::device::Compute;
use pcpo_wgpu::lora::Adapter;
use pcpo_wgpu::model::reference::ReferenceTensors;
use pcpo_wgpu::model::{Storage, Stream};

use crate::command_line::program;
use crate::support::{cpu, error_of, files, golden, gpu};

/// A folder of each kind of network, with an adapter's targets.
const FOLDERS: [(&str, &str); 6] = [
    ("sdxl", "to_q"),
    ("nomid", "to_q"),
    ("sd3", "to_q"),
    ("flux-dev", "proj_mlp"),
    ("flux2-klein", "to_qkv_mlp_proj"),
    ("z-image", "w2"),
];

/// From the host's memory, with nothing in it yet.
fn host() -> Stream {
    Stream::FromHost(Default::default())
}

/// The prediction of a folder's reference with an adapter that does something.
fn prediction(
    compute: &Compute,
    folder: &str,
    target: &str,
    storage: Storage,
    stream: Option<Stream>,
) -> Vec<f32> {
    let dir = golden(folder);
    let net = files(&dir).load_network(&compute.burn, storage, stream).unwrap();
    let mut adapter = Adapter::new(&net.linears(), &[target.into()], 2, 2.0, 1).unwrap();
    adapter.parameters_mut().flatten().enumerate().for_each(|(i, p)| *p += (i % 7) as f32 * 0.01);
    let inputs = ReferenceTensors::open(&dir.join("reference.safetensors"), &compute.burn).unwrap();
    net.forward_reference(&inputs, Some(&adapter.to_device(&compute.burn))).unwrap().values
}

#[test]
fn streamed_blocks_give_the_bits_of_held_ones() {
    for compute in [cpu(), gpu()] {
        for (folder, target) in FOLDERS {
            let held = prediction(&compute, folder, target, Storage::F32, None);
            for (from, stream) in [("host", host()), ("disk", Stream::FromDisk)] {
                let found = prediction(&compute, folder, target, Storage::F32, Some(stream));
                assert!(found == held, "{folder} from the {from} on {}", compute.name);
            }
        }
        let (folder, target) = ("z-image", "to_v");
        for storage in [Storage::F16, Storage::Q8, Storage::Q4] {
            let held = prediction(&compute, folder, target, storage, None);
            let found = prediction(&compute, folder, target, storage, Some(host()));
            assert!(found == held, "{folder} {storage:?} on {}", compute.name);
        }
    }
}

/// A small run on a folder.
fn train(folder: &str, device: &str, out: &str, extra: &[&str]) -> std::process::Output {
    let model = golden(folder);
    let fixed = ["train", "--model", model.to_str().unwrap(), "--device", device, "--out", out];
    let job = ["--prompt", "red apple", "--reward", "color:blue", "--epochs", "1", "--batch", "2"];
    let sizes = ["--images-per-epoch", "4", "--group-size", "4", "--steps", "3", "--rank", "2"];
    let own = ["--max-sequence-length", "24", "--activation-checkpointing", "true"];
    program(&[&fixed[..], &job, &sizes, &own, extra].concat())
}

#[test]
fn a_run_of_streamed_blocks_trains_the_same_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("z-image", "16x20", "cpu"),
        ("flux2-klein", "16x24", "cpu"),
        ("sdxl", "32", "cpu"),
        ("z-image", "16x20", "gpu"),
    ];
    for (folder, resolution, device) in cases {
        let gpu = crate::support::gpu_name();
        let name = if device == "gpu" { &gpu } else { device };
        let adapters = ["false", "true"].map(|streamed| {
            let out = dir.path().join(format!("{folder}-{device}-{streamed}"));
            let extra = ["--resolution", resolution, "--stream-blocks", streamed];
            let extra = [&extra[..], &["--preset", "pcpo", "--kl-beta", "0.05"]].concat();
            let output = train(folder, name, out.to_str().unwrap(), &extra);
            assert!(output.status.success(), "{}", error_of(&output));
            std::fs::read(out.join("adapter.safetensors")).unwrap()
        });
        assert!(adapters[0] == adapters[1], "{folder} on {device}: the adapters differ");
    }
}

/// Without a word, blocks are streamed where nothing else fits; and what that costs is said.
#[test]
fn a_plan_streams_where_nothing_else_fits_and_says_what_it_costs() {
    let model = golden("sdxl");
    let fixed = ["plan", "--device", "cpu", "--model", model.to_str().unwrap(), "--prompt", "a"];
    let sizes = ["--images-per-epoch", "2", "--group-size", "2", "--steps", "4"];
    let own = ["--resolution", "32", "--reward", "color:blue"];
    let plan = |extra: &[&str]| {
        let output = program(&[&fixed[..], &sizes, &own, extra].concat());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let number = |line: &str| -> f64 {
            let found =
                text.lines().find(|l| l.starts_with(line)).unwrap_or_else(|| panic!("{text}"));
            found.trim_start_matches(line).split_whitespace().next().unwrap().parse().unwrap()
        };
        let streaming = text.lines().find(|l| l.starts_with("block streaming")).unwrap();
        (number("peak "), number("weights (f32)"), streaming.to_string(), output.status.code())
    };
    let (held, all, off, _) = plan(&[]);
    assert!(off.ends_with("off: all blocks are held"), "{off}");
    let (streamed, some, on, _) = plan(&["--stream-blocks", "true"]);
    assert!(streamed < held && some < all, "{streamed} of {held}, {some} of {all}");
    let words =
        ["on: ", " of blocks are read ", " times an epoch, ", " s of it at the ", "measured"];
    assert!(words.iter().all(|w| on.contains(w)), "{on}");
    // Between the two needs: as many MiB as the streamed run needs, and not what the other does.
    let memory = format!("{}", (streamed + 0.5) / 1024.0);
    let (_, _, chosen, code) = plan(&["--memory", &memory]);
    assert!(chosen.contains("on: ") && code == Some(0), "{chosen}");
    let (_, _, forbidden, code) = plan(&["--memory", &memory, "--stream-blocks", "false"]);
    assert!(forbidden.contains("off: ") && code == Some(1), "{forbidden}");
}

#[test]
fn what_streaming_excludes_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let extra = ["--stream-blocks", "true", "--activation-checkpointing", "false"];
    let model = golden("z-image");
    let fixed = ["train", "--model", model.to_str().unwrap(), "--out", out.to_str().unwrap()];
    let output =
        program(&[&fixed[..], &["--prompt", "a", "--reward", "color:blue"], &extra].concat());
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("--stream-blocks true") && error.contains("--activation-"), "{error}");
    assert!(!out.exists());
}
