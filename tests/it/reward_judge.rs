//! The reward `judge:`, against a server that answers as a model would.

use pcpo_wgpu::reward::judge::Judge;
use pcpo_wgpu::reward::{JudgeAnswer, RemoteOptions, Reward};
use serde_json::{Value, json};

use crate::remote_server::{Reply, Request, Server, decoded};
use crate::reward_remote::{SOON, holds, pictures, prompt, score, status};

pub fn judge(server: &Server, judge_answer: JudgeAnswer) -> Judge {
    let options = RemoteOptions { judge_answer, timeout: SOON, ..RemoteOptions::default() };
    Judge::open(&format!("{}#org/a-model", server.url), &options).unwrap()
}

/// What a judge makes of one picture, when the model says this.
fn judged(text: Value) -> Result<f64, String> {
    let message = json!({ "role": "assistant", "content": text });
    let server = Server::saying(json!({ "choices": [{ "index": 0, "message": message }] }));
    score(&mut judge(&server, JudgeAnswer::Number), 1).map(|scores| scores[0])
}

/// The same where its first token is one of these.
fn judged_yes(tokens: &[(&str, f64)]) -> Result<f64, String> {
    let tokens = tokens.iter().map(|(t, p)| json!({ "token": t, "logprob": p.ln() }));
    let top = json!({ "token": "", "logprob": 0, "top_logprobs": tokens.collect::<Vec<_>>() });
    let choice = json!({ "message": { "content": "?" }, "logprobs": { "content": [top] } });
    let server = Server::saying(json!({ "choices": [choice] }));
    score(&mut judge(&server, JudgeAnswer::Yes), 1).map(|scores| scores[0])
}

#[test]
fn a_judge_gives_the_first_number_of_its_answer() {
    assert_eq!(judged(json!("7")), Ok(7.0));
    assert_eq!(judged(json!("I give it 7/10.")), Ok(7.0));
    assert_eq!(judged(json!("<think>Not 3, nor 4.</think> 8.5")), Ok(8.5));
    assert_eq!(judged(json!("<think>3</think>4</think>\n-2")), Ok(-2.0));
    let error = judged(json!("A fine picture.")).unwrap_err();
    holds(
        &error,
        &["#org/a-model: picture 1 of 1 (\"prompt 0\")", "\"A fine picture.\"", "number"],
    );
    holds(&judged(json!("<think>3 or 4")).unwrap_err(), &["still thinks"]);
    holds(&judged(Value::Null).unwrap_err(), &["no text"]);
    let server = Server::saying(json!({ "choices": [] }));
    let error = score(&mut judge(&server, JudgeAnswer::Number), 1).unwrap_err();
    holds(&error, &["no \"choices\""]);
}

#[test]
fn a_judge_gives_the_probability_of_yes() {
    let close = |found: Result<f64, String>, right: f64| {
        let found = found.unwrap();
        assert!((found - right).abs() < 1e-12, "{found} for {right}");
    };
    close(judged_yes(&[("yes", 0.5), ("no", 0.5)]), 0.5);
    let spelled = [("Yes", 0.4), (" Yes", 0.2), ("no", 0.2), ("YES", 0.1), ("yes\n", 0.05)];
    close(judged_yes(&spelled), 0.75);
    close(judged_yes(&[(" No", 1.0), ("yesterday", 0.0)]), 0.0);
    let error = judged_yes(&[("<think>", 0.9), ("I", 0.1)]).unwrap_err();
    holds(&error, &["neither yes nor no", "<think>"]);
    for choice in [json!({ "message": {} }), json!({ "logprobs": null }), json!({ "logprobs": {} })]
    {
        let server = Server::saying(json!({ "choices": [choice] }));
        let error = score(&mut judge(&server, JudgeAnswer::Yes), 1).unwrap_err();
        holds(&error, &["no logprobs", "--judge-answer number"]);
    }
}

#[test]
fn a_judges_server_says_why_it_fails() {
    let body = r#"{"error": {"message": "model not found", "code": 400}}"#;
    let server = Server::start(|_, _| status("400 Bad Request", "", body));
    let error = score(&mut judge(&server, JudgeAnswer::Number), 2).unwrap_err();
    holds(&error, &["HTTP 400", ": model not found"]);
    let server = Server::start(|_, _| Reply::Ok(body.into()));
    let error = score(&mut judge(&server, JudgeAnswer::Yes), 1).unwrap_err();
    holds(&error, &["picture 1 of 1", "says \"model not found\""]);
}

#[test]
fn a_judge_is_asked_the_question_about_each_picture() {
    let server = Server::start(|_, request| {
        let text = request.body["messages"][0]["content"][0]["text"].as_str().unwrap();
        // Answers with the count that the question holds.
        let count = text.split(' ').nth(1).unwrap();
        let message = json!({ "content": format!("<think>..</think>{count}") });
        Reply::Ok(json!({ "choices": [{ "message": message }] }).to_string())
    });
    let options = RemoteOptions {
        judge_question: Some("Are {count} cats in \"{prompt}\"? { } {tags}".into()),
        ..RemoteOptions::default()
    };
    let (images, _) = pictures(6);
    let metadata = |i| json!({ "count": i, "tags": ["a"] });
    let prompts: Vec<_> = (0..6).map(|i| prompt("p {count}", metadata(i))).collect();
    let mut judge = Judge::open(&format!("{}#a", server.url), &options).unwrap();
    let scores = judge.score(&images, &prompts.iter().collect::<Vec<_>>()).unwrap();
    assert_eq!(scores, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let requests = server.requests();
    let of = |i: &usize| format!("Are {i} cats in \"p {{count}}\"? {{ }} [\"a\"]");
    let text = |r: &Request| r.body["messages"][0]["content"][0]["text"].clone();
    (0..6).for_each(|i| assert!(requests.iter().any(|r| text(r) == of(&i)), "{i}"));
    let request = requests.iter().find(|r| text(r) == of(&4)).unwrap();
    let content = &request.body["messages"][0]["content"];
    let url = content[1]["image_url"]["url"].as_str().unwrap();
    assert_eq!(decoded(url.strip_prefix("data:image/png;base64,").unwrap()), images[4]);
    assert_eq!((&content[0]["type"], &content[1]["type"]), (&json!("text"), &json!("image_url")));
    assert_eq!(request.body["messages"][0]["role"], "user");
    assert_eq!(request.body["temperature"], 0);
    assert_eq!(request.body["max_tokens"], 256);
    assert_eq!(request.body.get("logprobs"), None);
}

#[test]
fn a_judges_url_may_end_in_v1() {
    let server = Server::start(|_, _| status("400 Bad Request", "", "no"));
    for (url, model) in [("", "a"), ("/", "a"), ("/v1", "a"), ("/v1/", "a"), ("/x", "c")] {
        let options = RemoteOptions { judge_answer: JudgeAnswer::Yes, ..Default::default() };
        let mut judge = Judge::open(&format!("{}{url}#{model}", server.url), &options).unwrap();
        score(&mut judge, 1).unwrap_err();
    }
    let requests = server.requests();
    let lines: Vec<_> = requests.iter().map(|r| &*r.line).collect();
    assert!(lines[..4].iter().all(|l| *l == "POST /v1/chat/completions HTTP/1.1"), "{lines:?}");
    assert_eq!(lines[4], "POST /x/v1/chat/completions HTTP/1.1");
    assert_eq!(
        (&requests[0].body["model"], &requests[4].body["model"]),
        (&json!("a"), &json!("c"))
    );
    let body = &requests[0].body;
    assert_eq!((&body["max_tokens"], &body["logprobs"]), (&json!(1), &json!(true)));
    assert_eq!(body["top_logprobs"], 20);
    let question = body["messages"][0]["content"][0]["text"].as_str().unwrap();
    holds(question, &["following: prompt 0\n", "yes or no"]);
    for bad in [
        "",
        "http://127.0.0.1",
        "http://127.0.0.1#",
        "#model",
        "host#model",
        "ftp://h#m",
        "http://h#a#b",
    ] {
        let error = Judge::open(bad, &RemoteOptions::default()).err().unwrap().to_string();
        assert!(error.starts_with("--reward judge:"), "{error}");
    }
    let options = RemoteOptions { judge_question: Some(" ".into()), ..Default::default() };
    let error = Judge::open(&format!("{}#m", server.url), &options).err().unwrap().to_string();
    holds(&error, &["--judge-question"]);
}
