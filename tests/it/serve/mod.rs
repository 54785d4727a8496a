//! The live page of runs. What its tests share: the program as it serves, requests that are
//! written byte by byte, so that nothing corrects them on their way, and folders of runs.

mod hostile;
mod pages;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use crate::command_line::start;

/// The program as it serves a folder; it ends with the test.
struct Served {
    child: Child,
    port: u16,
    /// What it printed.
    line: String,
}

/// An answer.
struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Served {
    fn new(dir: &Path, flags: &[&str]) -> Self {
        let args = ["serve", dir.to_str().unwrap(), "--port", "0"];
        let mut child = start(&[&args[..], flags].concat());
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let line = line.trim().to_string();
        let port = line.rsplit_once(':').and_then(|(_, rest)| rest.split('/').next()?.parse().ok());
        Self { child, port: port.unwrap_or_else(|| panic!("no port in {line:?}")), line }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }

    /// Sends bytes and reads to the end of the answer.
    fn raw(&self, request: &str) -> Reply {
        let mut stream = self.connect();
        // A server that has heard enough closes the connection while we still speak.
        let _ = stream.write_all(request.as_bytes());
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        Reply { status, head: head.to_ascii_lowercase(), body: body.to_string() }
    }

    /// A request with the headers that are given, after `Host`.
    fn ask(&self, method: &str, path: &str, headers: &[&str]) -> Reply {
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\n", self.port);
        headers.iter().for_each(|header| request += &format!("{header}\r\n"));
        self.raw(&(request + "\r\n"))
    }

    fn get(&self, path: &str) -> Reply {
        self.ask("GET", path, &[])
    }

    /// A POST as the page's own buttons send it.
    fn post(&self, path: &str) -> Reply {
        let origin = format!("Origin: http://127.0.0.1:{}", self.port);
        self.ask("POST", path, &[&origin, "Sec-Fetch-Site: same-origin", "Content-Length: 0"])
    }
}

impl Reply {
    fn header(&self, name: &str) -> Option<&str> {
        let line = self.head.lines().find(|line| line.starts_with(&format!("{name}: ")))?;
        Some(&line[name.len() + 2..])
    }
}

/// Writes a run's folder, after one epoch.
fn write_run(dir: &Path) -> PathBuf {
    std::fs::create_dir_all(dir.join("grids")).unwrap();
    std::fs::write(dir.join("settings.toml"), "seed = 1\n").unwrap();
    image::RgbImage::new(8, 8).save(dir.join("grids/epoch-00000.png")).unwrap();
    let lines = [
        r#"{"kind":"evaluation","epoch":0,"reward_mean":0.125}"#.to_string(),
        epoch(1, 0.25),
        r#"{"kind":"evaluation","epoch":1,"reward_mean":0.375}"#.to_string(),
    ];
    std::fs::write(dir.join("metrics.jsonl"), lines.join("\n") + "\n").unwrap();
    dir.to_path_buf()
}

/// An epoch's line of metrics.jsonl.
fn epoch(epoch: usize, reward: f64) -> String {
    let zeros = ["rollout", "decode", "reward", "update"].map(|p| format!("\"{p}_seconds\":0.0"));
    format!(
        "{{\"kind\":\"epoch\",\"epoch\":{epoch},\"reward_mean\":{reward},\"reward_std\":0.0,\
         \"clip_frac\":0.0,\"approx_kl\":0.0,\"images_per_second\":1.0,\"seconds\":1.0,{},\
         \"skipped_updates\":0}}",
        zeros.join(",")
    )
}

/// A folder with two runs, and what is no run.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_run(&dir.path().join("pcpo-001"));
    write_run(&dir.path().join("b & <i>"));
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    std::fs::write(dir.path().join("secret.txt"), "SECRET").unwrap();
    dir
}

/// Adds a line to a run's metrics.
fn record(run: &Path, line: &str) {
    let mut file = File::options().append(true).open(run.join("metrics.jsonl")).unwrap();
    writeln!(file, "{line}").unwrap();
}

/// Locks a run's folder, as a run does.
fn live(run: &Path) -> File {
    let lock = File::create(run.join(".lock")).unwrap();
    lock.try_lock().unwrap();
    lock
}

/// What has been asked of a run.
fn asked(run: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(run.join("control")).into_iter().flatten();
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}
