//! `pcpo-wgpu`: see `pcpo-wgpu --help`.

use clap::Parser;

fn main() {
    if cfg!(target_os = "linux") && std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // Without a desktop session, Mesa complains on the console that this is missing; it then does without.
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir()) };
    }
    pcpo_wgpu::memory::set_heaps();
    let code = match pcpo_wgpu::cli::run(pcpo_wgpu::cli::Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            if pcpo_wgpu::progress::stopped() { pcpo_wgpu::progress::STOPPED } else { 2 }
        }
    };
    std::process::exit(code);
}
