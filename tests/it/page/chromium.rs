//! The page of a run as a browser shows it: looked at, moved, measured.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use pcpo_wgpu::tools::report::REPORT;

use super::{check_numbers, whole_run, written};

/// PCPO_CHROMIUM, or what is found under the names that Chromium has.
fn chromium() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os("PCPO_CHROMIUM") {
        return Some(given.into());
    }
    let path = std::env::var_os("PATH")?;
    let names = ["chromium", "chromium-browser", "google-chrome", "chrome"];
    let mut places = std::env::split_paths(&path).flat_map(|dir| names.map(|name| dir.join(name)));
    places.find(|place| place.is_file())
}

/// A browser with a profile and a home of its own, ended after a minute.
struct Browser {
    program: PathBuf,
    home: tempfile::TempDir,
}

impl Browser {
    fn run(&self, arguments: &[&str], page: &Path) -> Output {
        let out = |name: &str| std::fs::File::create(self.home.path().join(name)).unwrap();
        let profile = format!("--user-data-dir={}", self.home.path().display());
        let mut browser = Command::new(&self.program)
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"])
            .args(["--no-first-run", "--disable-extensions", "--disable-background-networking"])
            .args(["--enable-logging=stderr", "--v=0", &profile])
            .args(arguments)
            .arg(address(page))
            .env("HOME", self.home.path())
            .stdin(Stdio::null())
            .stdout(out("stdout"))
            .stderr(out("stderr"))
            .spawn()
            .unwrap();
        let start = Instant::now();
        let status = loop {
            if let Some(status) = browser.try_wait().unwrap() {
                break status;
            }
            if start.elapsed() > Duration::from_secs(60) {
                browser.kill().unwrap();
                panic!("Chromium does not end: {}", self.read("stderr"));
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        let (stdout, stderr) = (self.read("stdout").into_bytes(), self.read("stderr").into_bytes());
        assert!(status.success(), "{status}: {}", self.read("stderr"));
        Output { status, stdout, stderr }
    }

    fn read(&self, name: &str) -> String {
        let bytes = std::fs::read(self.home.path().join(name)).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The document after its scripts have run, which say nothing on the console.
    fn dom(&self, page: &Path, width: usize) -> String {
        let size = format!("--window-size={width},900");
        let output = self.run(&["--virtual-time-budget=5000", &size, "--dump-dom"], page);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let complaint = |l: &&str| l.contains("CONSOLE") || l.contains("Uncaught");
        assert_eq!(said.lines().find(complaint), None);
        String::from_utf8(output.stdout).unwrap()
    }
}

fn address(page: &Path) -> String {
    let path = page.canonicalize().unwrap().display().to_string();
    format!("file://{}", path.replace('%', "%25").replace(' ', "%20").replace('#', "%23"))
}

/// A page that shows another one as wide as a phone, and puts down how wide that would like to be
/// and what its slider says when it is moved.
fn in_a_phone(html: &str) -> String {
    let inner = html_escape::encode_double_quoted_attribute(html);
    format!(
        "<!doctype html><body><iframe width=\"390\" height=\"844\" srcdoc=\"{inner}\"></iframe>\
         <script>\
         document.querySelector('iframe').onload = (event) => {{\
         const inner = event.target.contentDocument;\
         const slider = inner.getElementById('grid-slider');\
         slider.value = 0;\
         slider.dispatchEvent(new Event('input'));\
         const found = document.body.dataset;\
         found.wide = inner.documentElement.scrollWidth;\
         found.frames = inner.querySelectorAll('#grid-stage figure:not([hidden])').length;\
         found.told = inner.getElementById('grid-output').textContent;\
         }};</script></body>"
    )
}

#[test]
fn page_in_chromium() {
    let Some(program) = chromium() else {
        println!("skipped: page_in_chromium: no Chromium");
        return;
    };
    let browser = Browser { program, home: tempfile::tempdir().unwrap() };
    let dir = tempfile::tempdir().unwrap();
    let records = whole_run(dir.path(), false);
    let html = written(dir.path());
    let page = dir.path().join(REPORT);

    let dom = browser.dom(&page, 1200);
    check_numbers(&dom, &records);
    assert_eq!(dom.matches("<svg").count(), html.matches("<svg").count());
    assert!(dom.contains("aria-valuetext=\"epoch 6 reward -0.5400\""), "the slider is not set");

    let phone = dir.path().join("phone.html");
    std::fs::write(&phone, in_a_phone(&html)).unwrap();
    let dom = browser.dom(&phone, 1200);
    let found = dom.rsplit("<body").next().unwrap();
    for right in ["data-wide=\"390\"", "data-frames=\"1\"", "data-told=\"epoch 1 reward -0.7067\""]
    {
        assert!(found.contains(right), "{right} is not in {}", &found[..200.min(found.len())]);
    }

    let picture = dir.path().join("page.png");
    let shot = format!("--screenshot={}", picture.display());
    browser.run(&[&shot, "--window-size=1200,2400"], &page);
    check_picture(&picture);
}

/// That a picture was taken and there is something in it.
fn check_picture(path: &Path) {
    let picture = image::open(path).unwrap().into_rgb8();
    assert_eq!(picture.dimensions(), (1200, 2400));
    let mut colors: Vec<[u8; 3]> = picture.pixels().map(|p| p.0).collect();
    colors.sort_unstable();
    colors.dedup();
    assert!(colors.len() > 100, "{} colours", colors.len());
}
