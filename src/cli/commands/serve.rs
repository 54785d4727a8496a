//! `serve`: the runs of a folder, live in a browser.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};

use anyhow::{Result, anyhow};
use clap::Args;

use crate::stop;
use crate::tools::report::{self, Report};
use crate::tools::serve::{Look, Options, Server};

#[derive(Args)]
pub struct ServeArgs {
    /// Folder of runs, or the folder of one run
    #[arg(value_name = "DIR", default_value = "runs")]
    dir: PathBuf,
    /// Address to listen at; one that other machines reach has a token
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen at; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 8765)]
    port: u16,
    /// What a visitor must know; where other machines are served and none is given, a random one
    #[arg(long, value_name = "TEXT")]
    token: Option<String>,
}

pub fn run(args: &ServeArgs) -> Result<i32> {
    let server = Server::bind(Options {
        host: host(&args.host)?,
        dir: args.dir.clone(),
        port: args.port,
        token: args.token.clone(),
        look: LOOK,
    })?;
    // A second server in one process (tests) keeps the first handler.
    let _ = ctrlc::set_handler(|| {
        stop::request();
    });
    say!("serving {} on {}", args.dir.display(), server.url());
    // Whoever reads this through a pipe waits for it.
    let _ = std::io::stdout().flush();
    server.run(stop::requested);
    Ok(0)
}

fn host(text: &str) -> Result<IpAddr> {
    if text == "localhost" {
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    text.parse().map_err(|_| {
        anyhow!(
            "--host {text}: is not an IP address; write one of this machine, or 0.0.0.0 for all \
             of them"
        )
    })
}

/// The page of `report.html`.
const LOOK: Look = Look { render, style: report::STYLE, script: report::SCRIPT };

/// The page's content. What pictures cost is paid once for each, whoever looks.
fn render(dir: &Path) -> Result<String> {
    static REPORT: LazyLock<Mutex<Report>> = LazyLock::new(Mutex::default);
    let mut report = REPORT.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    Ok(report::body(&report.view(dir)?))
}
