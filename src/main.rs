//! `pcpo-wgpu`: see `pcpo-wgpu --help`.

use std::io::Write;

use clap::Parser;
use pcpo_wgpu::cli::console::STOPPED;
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
    let code = guard(|| run(cli)).unwrap_or_else(|error| {
        // That nobody reads it any more is no reason to panic.
        let _ = writeln!(std::io::stderr(), "error: {error:#}");
        if pcpo_wgpu::stop::requested() { STOPPED } else { 2 }
    });
    std::process::exit(code);
}
