//! Reward programs that do not behave. Servers are in `reward_remote.rs`.

#![cfg(unix)]

use std::process::Command;
use std::time::{Duration, Instant};

use super::{Draws, TINY, cases, outcome};
use crate::command_line::program;
use crate::support::error_of;

/// A program that is well for two epochs (an evaluation before and after each, four images each)
/// and then does something: the run ends with one error that names it, keeps what it has, leaves no
/// process behind, and goes on with a program that is well.
#[test]
fn a_program_that_misbehaves_ends_the_run_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mark = format!("pcpo-test-{}", std::process::id());
    let well = "n=0; while read l; do n=$((n+1)); echo $((n % 7));";
    let program_of = |then: &str| format!("command:{well} if [ $n = 11 ]; then {then}; fi; done");
    let job: Vec<&str> =
        TINY.iter().copied().filter(|a| !["--reward", "color:blue"].contains(a)).collect();
    for (name, then, words) in [
        ("hangs", "exec sleep 600".to_string(), "no answer within 2 seconds"),
        ("dies", "exit 3".to_string(), "exit status: 3"),
        ("is killed", "kill -9 $$".to_string(), "signal: 9"),
        ("no number", "read l; echo nonsense".to_string(), "which is not a number"),
        ("not finite", "read l; echo nan".to_string(), "which is not a number"),
        ("too many", "echo 1; echo 2; echo 3".to_string(), "without being asked"),
        ("closes", "exec 1>&-; sleep 600".to_string(), "ended without an answer"),
        (
            "forks",
            format!("(exec -a {mark} sleep 600) & (exec -a {mark} sleep 600) & exit 0"),
            "exit status: 0",
        ),
    ] {
        let out = dir.path().join(name);
        // `exec -a` is bash's.
        let reward = format!("command:exec bash -c '{}'", &program_of(&then)["command:".len()..]);
        let own = ["--reward", &reward, "--reward-timeout", "0.2"];
        let begun = Instant::now();
        let output =
            program(&[&["train", "--out", out.to_str().unwrap()][..], &job, &own].concat());
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{name}: {error}");
        assert!(error.contains(words) && error.contains("--reward command:"), "{name}: {error}");
        assert!(error.contains("--resume"), "{name}: {error}");
        assert!(begun.elapsed() < Duration::from_secs(60), "{name}: {:?}", begun.elapsed());
        let left = Command::new("pgrep").args(["-f", &mark]).output().unwrap();
        assert!(left.stdout.is_empty(), "{name}: something is left running");
        // The run's settings name the program: one that is well now stands in its place.
        let settings = out.join("settings.toml");
        let text = std::fs::read_to_string(&settings).unwrap();
        let mended = text.replace("= 11 ]", "= never ]");
        assert_ne!(text, mended);
        std::fs::write(&settings, mended).unwrap();
        let output = program(&["train", "--resume", out.to_str().unwrap()]);
        assert!(output.status.success(), "{name}: {}", error_of(&output));
        outcome(&out);
    }
}

/// What a program writes to stderr is the user's, however much it is, and late answers are waited
/// for.
#[test]
fn a_program_that_floods_stderr_or_is_slow_is_borne() {
    let dir = tempfile::tempdir().unwrap();
    let job: Vec<&str> =
        TINY.iter().copied().filter(|a| !["--reward", "color:blue"].contains(a)).collect();
    for (name, does) in [
        ("floods", "head -c 2000000 /dev/zero | tr '\\0' 'x' >&2; echo >&2; echo 1"),
        ("slow", "sleep 0.15; echo 1"),
    ] {
        let out = dir.path().join(name);
        let reward = format!("command:while read l; do {does}; done");
        let own = ["--reward", &reward, "--reward-timeout", "0.2", "--epochs", "1"];
        let output =
            program(&[&["train", "--out", out.to_str().unwrap()][..], &job, &own].concat());
        assert!(output.status.success(), "{name}: {:.500}", error_of(&output));
    }
}

/// The same of a server.
#[test]
fn random_answers_of_a_server_are_numbers_or_refused() {
    use std::sync::Mutex;

    use pcpo_wgpu::reward::http::Http;
    use pcpo_wgpu::reward::{Prompt, Reward};

    use crate::remote_server::{Reply, Server};
    let words = [
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "\"scores\"",
        "\"error\"",
        "1",
        "-2.5",
        "null",
        "1e999",
        "NaN",
        "\"a\"",
        " ",
        "\u{fffd}",
        "true",
    ];
    let draws = Mutex::new(Draws(5));
    let server = Server::start(move |_, _| {
        let mut draws = draws.lock().unwrap();
        let n = draws.below(6);
        let random: String = (0..n).map(|_| words[draws.below(words.len())]).collect();
        match draws.below(6) {
            0 => Reply::Ok(format!("{{\"scores\":[{random}]}}")),
            1 => Reply::Ok(format!("{{\"scores\":[{}]}}", draws.below(9))),
            2 => Reply::Cut(random),
            3 => Reply::Status { status: "418 Teapot", headers: String::new(), body: random },
            4 => Reply::Raw(["\r\n\r\n", "HTTP/1.1 999 \r\n\r\n", "no HTTP"][draws.below(3)]),
            _ => Reply::Ok(random),
        }
    });
    let (mut numbers, mut refused) = (0, 0);
    for case in 0..cases(30, 1000) {
        let reward = Http::open(&server.url, Duration::from_secs(2)).unwrap();
        let mut reward = reward.with_first_pause(Duration::from_millis(1));
        let prompt = Prompt { text: "a".into(), metadata: Default::default() };
        let begun = Instant::now();
        match reward.score(&[pcpo_wgpu::RgbImage::new(8, 8)], &[&prompt]) {
            Ok(scores) => {
                assert!(scores.len() == 1 && scores[0].is_finite(), "case {case}: {scores:?}");
                numbers += 1;
            }
            Err(e) => {
                assert!(format!("{e:#}").contains(&server.url), "case {case}: {e:#}");
                refused += 1;
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "case {case}");
    }
    println!("of a server: {numbers} numbers, {refused} refused");
    assert!(numbers > 0 && refused > 0);
}

/// Answers that nobody would give, from one program after the other: each is a number or refused.
#[test]
fn random_answers_are_numbers_or_refused() {
    use pcpo_wgpu::reward::{self, Prompt, RemoteOptions, RewardContext};
    let compute = pcpo_wgpu::device::Compute::cpu();
    let (mut numbers, mut refused) = (0, 0);
    let words = [
        "1", "-1.5", "nan", "inf", "1e400", "", " ", "0x1", "1,5", "{}", "\\x00", "1 2", "\\xff",
        "é",
    ];
    let mut draws = Draws(3);
    for case in 0..cases(30, 1000) {
        let n = draws.below(4);
        let answer: Vec<&str> = (0..n).map(|_| words[draws.below(words.len())]).collect();
        let end = ["\\n", "", "\\r\\n"][draws.below(3)];
        let does =
            format!("read l; printf %b '{}{end}'", answer.join(["", " ", "\\n"][draws.below(3)]));
        let context = RewardContext {
            compute: compute.clone(),
            storage: pcpo_wgpu::Storage::F32,
            remote: RemoteOptions { timeout: Duration::from_millis(500), ..Default::default() },
        };
        let mut reward = reward::open(&format!("command:{does}"), &context).unwrap();
        let image = pcpo_wgpu::RgbImage::new(8, 8);
        let prompt = Prompt { text: "a".into(), metadata: Default::default() };
        let begun = Instant::now();
        match reward.score(&[image], &[&prompt]) {
            Ok(scores) => {
                assert!(scores.len() == 1 && scores[0].is_finite(), "case {case}: {scores:?}");
                numbers += 1;
            }
            Err(e) => {
                assert!(format!("{e:#}").contains("--reward command:"), "case {case}: {e:#}");
                refused += 1;
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "case {case}: {does}");
    }
    println!("{numbers} numbers, {refused} refused");
    assert!(numbers > 0 && refused > numbers);
}
