//! `pcpo-wgpu`: see `pcpo-wgpu --help`.

use clap::Parser;

fn main() {
    let code = match pcpo_wgpu::cli::run(pcpo_wgpu::cli::Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            2
        }
    };
    std::process::exit(code);
}
