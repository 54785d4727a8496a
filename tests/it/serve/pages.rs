//! What the pages show, what the buttons do, and how the program begins and ends.

use std::fs::File;
use std::net::Ipv4Addr;

use super::{Served, asked, folder, live, record};
use crate::command_line::program;
use crate::support::error_of;

#[test]
fn the_list_and_a_run_are_shown_and_news_change_their_versions() {
    let dir = folder();
    let run = dir.path().join("pcpo-001");
    let served = Served::new(dir.path(), &[]);
    let expected = format!("serving {} on http://127.0.0.1:{}/", dir.path().display(), served.port);
    assert_eq!(served.line, expected);
    let list = served.get("/");
    assert_eq!(list.status, 200, "{}", list.body);
    for part in ["<a href=\"/run/pcpo%2D001\">pcpo-001</a>", "<td>1</td><td>0.3750</td>"] {
        assert!(list.body.contains(part), "{part}: {}", list.body);
    }
    assert!(list.body.contains("b &amp; &lt;i&gt;") && !list.body.contains("<i>"));
    assert!(!list.body.contains("empty") && !list.body.contains("secret"));
    assert_eq!(served.get("/run/b%20%26%20%3Ci%3E").status, 200);
    let page = served.get("/run/pcpo-001");
    assert!(page.status == 200 && page.body.starts_with("<!doctype html>"), "{}", page.body);
    assert!(page.body.contains("0.375") && page.body.contains("not running"));
    let policy = page.header("content-security-policy").unwrap();
    for part in ["default-src 'none'", "frame-ancestors 'none'", "script-src 'sha256-"] {
        assert!(policy.contains(part), "{policy}");
    }
    for (name, value) in [
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-resource-policy", "same-origin"),
        ("cache-control", "no-store"),
    ] {
        assert_eq!(page.header(name), Some(value), "{name}");
        assert_eq!(served.get("/nothing").header(name), Some(value), "{name}");
    }
    let main = served.get("/run/pcpo-001/main").body;
    assert!(page.body.contains(&main) && !main.contains("<script"), "{main}");

    let versions = || ["/run/pcpo-001/version", "/version"].map(|path| served.get(path).body);
    let mut before = versions();
    assert_eq!(before, versions(), "nothing is new");
    assert!(page.body.contains(&before[0]) && list.body.contains(&before[1]));
    let mut changed = |what: &str| {
        let now = versions();
        assert!(now.iter().zip(&before).all(|(now, before)| now != before), "{what}");
        before = now;
    };
    record(&run, r#"{"kind":"evaluation","epoch":2,"reward_mean":0.5}"#);
    changed("a record");
    assert!(served.get("/run/pcpo-001/main").body.contains("0.5"));
    assert!(served.get("/main").body.contains("0.5000"));
    std::fs::write(run.join("grids/epoch-00001.png"), b"x").unwrap();
    changed("a picture");
    let lock = live(&run);
    changed("the run lives");
    assert!(!served.get("/run/pcpo-001/main").body.contains("not running"));
    // Dropping it is not enough while another test is starting a program, which has a copy.
    lock.unlock().unwrap();
    changed("the run ended");
}

#[test]
fn the_folder_of_one_run_is_a_list_of_one() {
    let dir = folder();
    let served = Served::new(&dir.path().join("pcpo-001"), &[]);
    assert!(served.get("/").body.contains("/run/pcpo%2D001"));
    assert_eq!(served.get("/run/pcpo-001").status, 200);
    assert_eq!(served.get("/run/b%20%26%20%3Ci%3E").status, 404);
}

#[test]
fn a_half_written_file_is_an_answer_and_not_the_end() {
    let dir = folder();
    let run = dir.path().join("pcpo-001");
    let served = Served::new(dir.path(), &[]);
    let whole = std::fs::read(run.join("metrics.jsonl")).unwrap();
    std::fs::write(run.join("metrics.jsonl"), b"{\"kind\":\"epo\xff").unwrap();
    let page = served.get("/run/pcpo-001");
    assert_eq!(page.status, 500);
    assert!(page.body.contains("metrics.jsonl") && page.body.contains("<script>"), "{}", page.body);
    let main = served.get("/run/pcpo-001/main");
    assert!(main.status == 500 && main.body.contains("metrics.jsonl"), "{}", main.body);
    assert_eq!(served.get("/").status, 200);
    std::fs::write(run.join("metrics.jsonl"), whole).unwrap();
    assert_eq!(served.get("/run/pcpo-001").status, 200);
}

#[test]
fn buttons_reach_a_live_run_as_files_and_no_other() {
    let dir = folder();
    let run = dir.path().join("pcpo-001");
    let served = Served::new(dir.path(), &[]);
    let dead = served.post("/run/pcpo-001/stop");
    assert!(dead.status == 409 && dead.body.contains("nothing runs"), "{}", dead.body);
    // A run that was killed leaves its file, but no lock.
    // Somebody else may be looking, too.
    let looking = File::create(run.join(".lock")).unwrap();
    assert_eq!(served.post("/run/pcpo-001/stop").status, 409);
    looking.try_lock_shared().unwrap();
    assert_eq!(served.post("/run/pcpo-001/stop").status, 409);
    looking.unlock().unwrap();
    assert!(asked(&run).is_empty());
    let _lock = live(&run);
    let stop = served.post("/run/pcpo-001/stop");
    assert!(stop.status == 202 && stop.body.starts_with("Stop"), "{}", stop.body);
    assert_eq!(asked(&run), ["stop"]);
    assert_eq!(std::fs::read(run.join("control/stop")).unwrap(), b"");
    let by_program = served.ask("POST", "/run/pcpo-001/save", &["X-Pcpo: 1"]);
    assert_eq!((by_program.status, served.post("/run/pcpo-001/sample").status), (202, 202));
    assert_eq!(asked(&run), ["sample", "save", "stop"]);
    assert_eq!(served.post("/run/pcpo-001/delete").status, 404);
}

#[cfg(unix)]
#[test]
fn wrong_arguments_name_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("nowhere");
    let (missing, here) = (missing.to_str().unwrap(), dir.path().to_str().unwrap());
    let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (args, words) in [
        (&[missing][..], &["DIR", missing, "pcpo-wgpu train"][..]),
        (&[here, "--host", "example"], &["--host example", "0.0.0.0"]),
        (&[here, "--port", &port], &["--port", &port, "another port"]),
        (&[here, "--token", ""], &["--token", "empty"]),
    ] {
        let output = program(&[&["serve"], args].concat());
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let error = error_of(&output);
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_it_well() {
    let dir = folder();
    let mut served = Served::new(dir.path(), &[]);
    let _slow = served.connect();
    // SAFETY: a signal to a process that the test started and has not waited for.
    unsafe { libc::kill(served.child.id() as i32, libc::SIGINT) };
    assert_eq!(served.child.wait().unwrap().code(), Some(0));
}
