//! `pcpo-wgpu`: see `pcpo-wgpu --help`.

use clap::Parser;
use pcpo_wgpu::cli::console::failed;
use pcpo_wgpu::cli::{Cli, run};
use pcpo_wgpu::device::guard::{guard, note_panics};
use pcpo_wgpu::device::system::set_heaps;

fn main() {
    if cfg!(target_os = "linux") && std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // Without a desktop session, Mesa complains on the console that this is missing; it then
        // does without. SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir()) };
    }
    set_heaps();
    let cli = Cli::parse();
    note_panics();
    let code = guard(|| run(cli)).unwrap_or_else(|error| failed(&error));
    std::process::exit(code);
}
