//! The reward `http:`, and what all rewards behind HTTP share, against a server that answers as
//! each test wants.

use std::time::{Duration, Instant};

use image::{Rgb, RgbImage};
use pcpo_wgpu::reward::http::Http;
use pcpo_wgpu::reward::judge::Judge;
use pcpo_wgpu::reward::{JudgeAnswer, Prompt, RemoteOptions, Reward};
use serde_json::{Value, json};

use crate::remote_server::{Reply, Request, Server, reds};
use crate::reward_judge::judge;

pub const SOON: Duration = Duration::from_secs(5);

pub fn prompt(text: &str, metadata: Value) -> Prompt {
    let metadata = metadata.as_object().cloned().unwrap_or_default();
    Prompt { text: text.into(), metadata }
}

/// `count` pictures, each of its own red, with their prompts.
pub fn pictures(count: usize) -> (Vec<RgbImage>, Vec<Prompt>) {
    let picture = |i: usize| RgbImage::from_pixel(3, 2, Rgb([i as u8, 7, 9]));
    let pictures = (0..count).map(picture).collect();
    (pictures, (0..count).map(|i| prompt(&format!("prompt {i}"), Value::Null)).collect())
}

/// What the reward makes of `count` pictures; an error as its words.
pub fn score(reward: &mut dyn Reward, count: usize) -> Result<Vec<f64>, String> {
    let (images, prompts) = pictures(count);
    let prompts: Vec<&Prompt> = prompts.iter().collect();
    reward.score(&images, &prompts).map_err(|e| format!("{e:#}"))
}

fn http(server: &Server, timeout: Duration) -> Http {
    Http::open(&server.url, timeout).unwrap().with_first_pause(Duration::from_millis(5))
}

/// The error of a reward whose server answers `count` pictures so.
fn error_for(count: usize, answer: impl Fn(usize) -> Reply + Send + Sync + 'static) -> String {
    let server = Server::start(move |n, _| answer(n));
    let error = score(&mut http(&server, SOON), count).unwrap_err();
    assert!(error.starts_with(&format!("--reward http:{}: ", server.url)), "{error}");
    error
}

pub fn holds(text: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(text.contains(part), "{part:?} is not in: {text}"));
}

/// Runs the test `name` of this file again, in a process with these variables: what `body` does
/// concerns a whole process.
fn in_own_process(name: &str, variables: &[(&str, &str)], body: impl FnOnce()) {
    const CHILD: &str = "PCPO_TEST_CHILD";
    if std::env::var(CHILD).is_ok_and(|child| child == name) {
        return body();
    }
    let module = module_path!().split_once("::").unwrap().1;
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("{module}::{name}"), "--nocapture"])
        .env(CHILD, name)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("1 passed"), "{said}");
}

#[test]
fn batches_run_at_once_and_scores_keep_their_order() {
    // Later batches are answered earlier.
    let server = Server::start(|n, request| {
        std::thread::sleep(Duration::from_millis(400 - 80 * n.min(4) as u64));
        reds(request)
    });
    let scores = score(&mut http(&server, SOON), 37).unwrap();
    assert_eq!(scores, (0..37).map(f64::from).collect::<Vec<_>>());
    let mut sizes: Vec<_> = server.requests().iter().map(|r| r.pictures().len()).collect();
    sizes.sort();
    assert_eq!(sizes, [5, 8, 8, 8, 8]);
    assert_eq!(server.most_at_once(), 4);
    assert_eq!(score(&mut http(&server, SOON), 0), Ok(vec![]));
}

#[test]
fn a_request_holds_pictures_prompts_and_metadata() {
    let server = Server::saying(json!({ "scores": [0.25, -1e3] }));
    let picture = RgbImage::from_fn(5, 3, |x, y| Rgb([x as u8 * 50, y as u8 * 90, 200]));
    let images = [picture.clone(), RgbImage::new(1, 1)];
    let metadata = json!({ "text": "HELLO", "count": 3 });
    let prompts = [prompt("a \"sign\" ü", metadata.clone()), prompt("b", Value::Null)];
    let url = format!("{}/rate?model=a", server.url);
    let mut reward = Http::open(&url, SOON).unwrap();
    let scores = reward.score(&images, &prompts.iter().collect::<Vec<_>>()).unwrap();
    assert_eq!(scores, [0.25, -1e3]);
    let request = server.requests().remove(0);
    assert_eq!(request.line, "POST /rate?model=a HTTP/1.1");
    assert_eq!(request.header("content-type"), Some("application/json"));
    assert_eq!(request.header("authorization"), None);
    assert_eq!(request.pictures(), images);
    let items = request.body["items"].as_array().unwrap();
    assert_eq!((&items[0]["prompt"], &items[0]["metadata"]), (&json!("a \"sign\" ü"), &metadata));
    assert_eq!((&items[1]["prompt"], &items[1]["metadata"]), (&json!("b"), &json!({})));
    assert_eq!(
        (request.body.as_object().unwrap().len(), items[0].as_object().unwrap().len()),
        (1, 3)
    );
}

/// What a server does at first, and its name.
type Case = (&'static str, fn() -> Reply);

#[test]
fn failures_that_pass_are_tried_again() {
    let cases: [Case; 5] = [
        ("dropped", || Reply::Drop),
        ("cut", || Reply::Cut("{".into())),
        ("500", || status("500 Internal Server Error", "", "no memory")),
        ("503", || status("503 Service Unavailable", "", "{\"error\": \"loading\"}")),
        ("429", || status("429 Too Many Requests", "retry-after: 0\r\n", "")),
    ];
    for (name, fail) in cases {
        let server = Server::start(move |n, request| if n < 2 { fail() } else { reds(request) });
        assert_eq!(score(&mut http(&server, SOON), 3), Ok(vec![0.0, 1.0, 2.0]), "{name}");
        assert_eq!(server.requests().len(), 3, "{name}");
    }
}

pub fn status(status: &'static str, headers: &str, body: &str) -> Reply {
    Reply::Status { status, headers: headers.into(), body: body.into() }
}

#[test]
fn a_server_says_how_long_to_wait() {
    let server = Server::start(|n, request| match n {
        0 => status("429 Too Many Requests", "Retry-After: 1\r\n", ""),
        _ => reds(request),
    });
    let start = Instant::now();
    score(&mut http(&server, SOON), 1).unwrap();
    assert!((1.0..3.0).contains(&start.elapsed().as_secs_f64()), "{:?}", start.elapsed());
}

#[test]
fn failures_that_stay_end_with_the_servers_words() {
    let error = error_for(1, |_| status("500 Internal Server Error", "", "out of memory"));
    holds(&error, &["HTTP 500", "out of memory", "3 retries"]);
    let error = error_for(1, |_| Reply::Drop);
    holds(&error, &["closed the connection without an answer", "3 retries"]);
    let page = format!("<html>{}END", "x".repeat(400));
    let error = error_for(1, move |_| Reply::Ok(page.clone()));
    holds(&error, &["not JSON", "<html>xxx", "..."]);
    assert!(!error.contains("END") && error.len() < 500, "{error}");
    let error = error_for(1, |_| Reply::Raw("SSH-2.0-OpenSSH_9.2\r\n\r\n"));
    holds(&error, &["the request failed"]);
}

#[test]
fn other_statuses_are_not_tried_again() {
    let server =
        Server::start(|_, _| status("422 Unprocessable Content", "", r#"{"detail": "no items"}"#));
    let error = score(&mut http(&server, SOON), 1).unwrap_err();
    holds(&error, &["HTTP 422", "no items"]);
    assert_eq!(server.requests().len(), 1);
    let error = error_for(1, |_| status("404 Not Found", "", "nothing here"));
    holds(&error, &["HTTP 404", "nothing here", "check the address http://127.0.0.1:"]);
    let error = error_for(1, |_| status("401 Unauthorized", "", "who are you"));
    holds(&error, &["HTTP 401", "who are you", "PCPO_REWARD_API_KEY"]);
    for code in ["301 Moved Permanently", "302 Found", "307 Temporary Redirect"] {
        let error = error_for(1, move |_| status(code, "location: http://a:b@other/x\r\n", ""));
        holds(&error, &[&code[..3], "redirects to http://a:***@other/x"]);
    }
}

#[test]
fn after_a_failure_no_further_batch_is_begun() {
    let server = Server::start(|n, request| {
        if n == 0 {
            return status("400 Bad Request", "", "enough");
        }
        std::thread::sleep(Duration::from_millis(200));
        reds(request)
    });
    holds(&score(&mut http(&server, SOON), 80).unwrap_err(), &["HTTP 400", "enough"]);
    std::thread::sleep(Duration::from_millis(400));
    assert!(server.requests().len() <= 4, "{} requests", server.requests().len());
}

#[test]
fn retries_end_with_the_call() {
    let server = Server::start(|n, _| match n {
        0 => status("503 Service Unavailable", "", "busy"),
        _ => {
            std::thread::sleep(Duration::from_millis(100));
            status("400 Bad Request", "", "enough")
        }
    });
    let mut reward = http(&server, SOON).with_first_pause(Duration::from_millis(500));
    holds(&score(&mut reward, 16).unwrap_err(), &["HTTP 400"]);
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(server.requests().len(), 2, "the batch of the 503 is not sent again");
}

#[test]
fn an_answer_that_comes_too_late_is_not_waited_for() {
    let replies: [fn() -> Reply; 2] =
        [|| Reply::Hang, || Reply::Slow("{\"scores\": [1]}".into(), Duration::from_millis(150))];
    for reply in replies {
        let server = Server::start(move |_, _| reply());
        let start = Instant::now();
        let error = score(&mut http(&server, Duration::from_millis(500)), 1).unwrap_err();
        holds(&error, &["no answer within 0.5 seconds", "--reward-timeout SECONDS"]);
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        assert_eq!(server.requests().len(), 1, "a timeout is not tried again");
    }
    let slow = || Reply::Slow("{\"scores\": [1]}".into(), Duration::from_millis(20));
    let server = Server::start(move |_, _| slow());
    assert_eq!(score(&mut http(&server, SOON), 1), Ok(vec![1.0]));
}

#[test]
fn an_answer_without_good_scores_is_an_error() {
    let cases: &[(&str, &[&str])] = &[
        (r#"{"scores": [1]}"#, &["1 scores for 2 pictures"]),
        (r#"{"scores": [1, 2, 3]}"#, &["3 scores for 2 pictures"]),
        (r#"{"scores": []}"#, &["0 scores for 2 pictures"]),
        (r#"{"score": [1, 2]}"#, &["no list \"scores\"", r#"{"score":[1,2]}"#]),
        (r#"{"scores": 3}"#, &["no list \"scores\"", "3"]),
        ("[1, 2]", &["no list \"scores\"", "[1,2]"]),
        (r#"{"scores": [1, NaN]}"#, &["not JSON", "NaN"]),
        (r#"{"scores": [1, 1e999]}"#, &["not JSON", "1e999"]),
        (r#"{"scores": [1, "NaN"]}"#, &["picture 2 of 2 (\"prompt 1\")", "text \"NaN\""]),
        (r#"{"scores": [1, "0.5"]}"#, &["picture 2 of 2", "text \"0.5\""]),
        (r#"{"scores": [null, 1]}"#, &["picture 1 of 2 (\"prompt 0\")", "null is not a number"]),
        (r#"{"scores": [true, 1]}"#, &["picture 1 of 2", "true is not a number"]),
        (r#"{"scores": [1, [2]]}"#, &["picture 2 of 2", "[2] is not a number"]),
        (r#"{"scores": [1, "no face found"]}"#, &["picture 2 of 2", "no face found"]),
        (r#"{"scores": [1, {"error": "no face"}]}"#, &["picture 2 of 2", "says \"no face\""]),
        (r#"{"scores": [1, {}]}"#, &["picture 2 of 2", "{}"]),
        (r#"{"scores": [1, 0], "errors": [null, "dark"]}"#, &["picture 2 of 2", "says \"dark\""]),
        (r#"{"errors": [{"error": "dark"}, null]}"#, &["picture 1 of 2", "says \"dark\""]),
        (r#"{"scores": [1, 0], "errors": "all dark"}"#, &["says \"all dark\""]),
        (r#"{"error": "no model"}"#, &["says \"no model\""]),
        (r#"{"error": {"message": "no model"}, "scores": [1, 2]}"#, &["says \"no model\""]),
        ("", &["not JSON"]),
    ];
    for (answer, parts) in cases {
        let answer = answer.to_string();
        holds(&error_for(2, move |_| Reply::Ok(answer.clone())), parts);
    }
    let answer = json!({ "scores": [1, 2.5], "errors": [null, null], "error": null });
    let server = Server::saying(answer);
    assert_eq!(score(&mut http(&server, SOON), 2), Ok(vec![1.0, 2.5]));
}

#[test]
fn a_picture_is_counted_among_all() {
    let server = Server::start(|_, request: &Request| match request.pictures().len() {
        8 => reds(request),
        _ => Reply::Ok(json!({ "scores": [1, "bad", 1] }).to_string()),
    });
    let error = score(&mut http(&server, SOON), 11).unwrap_err();
    holds(&error, &["picture 10 of 11 (\"prompt 9\")", "bad"]);
}

#[test]
fn a_server_that_is_not_there_is_found_before_the_run() {
    // Bound and given back: nobody listens there.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = Http::open(&format!("http://me:secret@{closed}/"), SOON).err().unwrap();
    let error = format!("{error:#}");
    holds(&error, &["--reward http:http://me:***@127.0.0.1:", "cannot be reached (", "start the"]);
    assert!(!error.contains("secret"), "{error}");
    let judge = format!("http://{closed}#model");
    let error = Judge::open(&judge, &RemoteOptions::default()).err().unwrap().to_string();
    holds(&error, &["--reward judge:http://127.0.0.1:", "#model: cannot be reached"]);
    for url in ["", "host", "ftp://host/", "http://me:sec ret@host/", "http://host:99999/"] {
        let error = Http::open(url, SOON).err().unwrap().to_string();
        assert!(error.starts_with("--reward http:") && !error.contains("ret"), "{error}");
    }
    let server = Server::saying(json!({}));
    let error = Http::open(&server.url, Duration::ZERO).err().unwrap().to_string();
    holds(&error, &["--reward-timeout 0"]);
    // As long as may be.
    assert!(score(&mut http(&server, Duration::MAX), 1).is_err());
}

#[test]
fn a_server_that_goes_away_is_an_error() {
    let server = Server::start(|_, _| Reply::Drop);
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://me:secret@{}/", gone.local_addr().unwrap());
    let mut reward = Http::open(&url, SOON).unwrap().with_first_pause(Duration::from_millis(1));
    drop(gone);
    let error = score(&mut reward, 1).unwrap_err();
    holds(&error, &["http://me:***@127.0.0.1:", "the connection failed (", "3 retries"]);
    assert!(!error.contains("secret"), "{error}");
    assert!(score(&mut http(&server, SOON), 1).is_err());
    assert_eq!(server.requests().len(), 4);
}

#[test]
fn the_wish_to_stop_is_heard_while_a_server_hangs() {
    in_own_process("the_wish_to_stop_is_heard_while_a_server_hangs", &[], || {
        let server = Server::start(|_, _| Reply::Hang);
        let mut reward = http(&server, Duration::from_secs(600));
        let stopper = std::thread::spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            pcpo_wgpu::stop::request();
            Instant::now()
        });
        let error = score(&mut reward, 1).unwrap_err();
        let heard = stopper.join().unwrap().elapsed();
        holds(&error, &["stopped"]);
        assert!(heard < Duration::from_millis(500), "{heard:?}");
        assert_eq!(server.requests().len(), 1);
    });
}

#[test]
fn keys_are_sent_and_not_printed() {
    let keys = [("PCPO_REWARD_API_KEY", "reward-key\n"), ("PCPO_JUDGE_API_KEY", "judge-key")];
    let name = "keys_are_sent_and_not_printed";
    in_own_process(name, &keys, || {
        let server = Server::start(|_, _| status("401 Unauthorized", "", "no"));
        let error = score(&mut http(&server, SOON), 1).unwrap_err();
        assert!(!error.contains("reward-key"), "{error}");
        let error = score(&mut judge(&server, JudgeAnswer::Number), 1).unwrap_err();
        holds(&error, &["PCPO_JUDGE_API_KEY"]);
        assert!(!error.contains("judge-key"), "{error}");
        let sent: Vec<_> =
            server.requests().iter().map(|r| r.header("authorization").map(String::from)).collect();
        assert_eq!(sent, [Some("Bearer reward-key".into()), Some("Bearer judge-key".into())]);
    });
}

#[test]
fn a_password_in_the_url_is_sent() {
    let server = Server::start(|_, request| reds(request));
    let url = server.url.replace("//", "//me:secret@");
    score(&mut Http::open(&url, SOON).unwrap(), 1).unwrap();
    let sent = server.requests().remove(0);
    assert_eq!(sent.header("authorization"), Some("Basic bWU6c2VjcmV0"));
}

#[test]
fn a_key_that_cannot_be_sent_is_not_printed() {
    let keys = [("PCPO_REWARD_API_KEY", "se\ncret")];
    in_own_process("a_key_that_cannot_be_sent_is_not_printed", &keys, || {
        let server = Server::saying(json!({}));
        let error = Http::open(&server.url, SOON).err().unwrap().to_string();
        holds(&error, &["PCPO_REWARD_API_KEY"]);
        assert!(!error.contains("cret"), "{error}");
    });
}

#[test]
fn this_machine_is_asked_without_the_environments_proxy() {
    let proxies = [("http_proxy", "http://127.0.0.1:9"), ("ALL_PROXY", "http://127.0.0.1:9")];
    in_own_process("this_machine_is_asked_without_the_environments_proxy", &proxies, || {
        let server = Server::start(|_, request| reds(request));
        score(&mut http(&server, SOON), 1).unwrap();
        // With the proxy, which is not there, the host is not looked for.
        let mut far = Http::open("http://host.invalid/", SOON).unwrap();
        far = far.with_first_pause(Duration::from_millis(1));
        holds(&score(&mut far, 1).unwrap_err(), &["the connection failed"]);
    });
}
