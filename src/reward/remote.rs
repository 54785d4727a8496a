//! The client of the rewards behind HTTP: JSON in, JSON out, a few requests at a time, with
//! retries and a time limit.
//!
//! Requests run on threads of their own that nobody joins. The caller only listens, so that it
//! hears the user's wish to stop while a server hangs.

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use base64::Engine;
use clap::ValueEnum;
use image::RgbImage;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use ureq::http::StatusCode;

use super::address::Address;
use crate::{io, stop};

/// How many requests run at the same time.
pub const CONNECTIONS: usize = 4;
/// How often a request is sent again after a failure that may pass.
pub const RETRIES: u32 = 3;
/// The pause before the first retry; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause that a server's `Retry-After` is granted.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long making a connection may take.
const CONNECT: Duration = Duration::from_secs(10);
/// The longest time limit, for which no clock is too short.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// Seconds of `--reward-timeout` where it is not given.
pub const DEFAULT_TIMEOUT: u64 = 60;
/// How often a wait looks whether the user wants to stop.
const LOOK: Duration = Duration::from_millis(100);
/// How many characters of an answer an error quotes.
const QUOTE: usize = 300;

/// What the command line says about rewards behind HTTP.
#[derive(Clone, Debug)]
pub struct RemoteOptions {
    /// `--reward-timeout`: how long one answer may take, from the connection to its last byte.
    pub timeout: Duration,
    /// `--judge-question`: the question to a judge; without it, the one of its way to answer.
    pub judge_question: Option<String>,
    /// `--judge-answer`
    pub judge_answer: JudgeAnswer,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        let timeout = Duration::from_secs(DEFAULT_TIMEOUT);
        Self { timeout, judge_question: None, judge_answer: JudgeAnswer::Number }
    }
}

/// How a judge's answer becomes a score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JudgeAnswer {
    /// The first number in the text of the answer.
    #[default]
    Number,
    /// The probability that the answer begins with "yes".
    Yes,
}

/// A server that takes JSON by POST. It is cloned into the threads that ask it.
#[derive(Clone)]
pub struct Client {
    /// The reward as the user named it, without a password; begins each error.
    name: Arc<str>,
    address: Arc<Address>,
    /// The variable of the environment that a key is taken from, for errors.
    key_variable: &'static str,
    /// The header `Authorization`, if there is a key.
    authorization: Option<ureq::http::HeaderValue>,
    agent: ureq::Agent,
    timeout: Duration,
    first_pause: Duration,
}

/// Why a request has no answer.
enum Failure {
    /// It may pass. The pause is the one that the server asks for.
    Passing {
        why: String,
        pause: Duration,
    },
    Final(String),
}

/// Tells the threads of a call that nobody waits for them any more, when it ends.
struct Ended(Arc<AtomicBool>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Client {
    /// Checks the settings and that the server can be reached.
    pub fn open(
        name: String,
        address: Address,
        key_variable: &'static str,
        timeout: Duration,
    ) -> Result<Self> {
        ensure!(!timeout.is_zero(), "--reward-timeout 0: is no time for an answer; write more");
        let authorization = authorization(key_variable)?;
        let proxy = address.proxy();
        if proxy.is_none() {
            let (host, port) = (address.host().to_string(), address.port());
            let (send, connected) = channel();
            spawn(move || drop(send.send(connect(&host, port))))?;
            listen(&connected)?.map_err(|why| {
                anyhow!("{name}: cannot be reached ({why}); start the server, or check the address")
            })?;
        }
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // A followed redirect may turn the POST into a GET.
            .max_redirects(0)
            .max_idle_connections_per_host(CONNECTIONS)
            .proxy(proxy)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_global(Some(timeout.min(LONGEST_TIMEOUT)))
            .build()
            .new_agent();
        Ok(Self {
            name: name.into(),
            address: address.into(),
            key_variable,
            authorization,
            agent,
            timeout,
            first_pause: FIRST_PAUSE,
        })
    }

    /// Changes the pause before the first retry.
    pub fn set_first_pause(&mut self, pause: Duration) {
        self.first_pause = pause;
    }

    /// An error of this reward.
    pub fn error(&self, why: &str) -> anyhow::Error {
        anyhow!("{}: {why}", self.name)
    }

    /// Sends `count` requests, up to [`CONNECTIONS`] at a time, and returns what `read` makes of
    /// the answers, in the order of the requests. The first failure that stays ends all: no
    /// further request is begun.
    ///
    /// # Errors
    /// Of `body`; of a request whose retries are used up; of `read`, whose words get the reward's
    /// name; and the user's wish to stop.
    pub fn ask<T>(
        &self,
        count: usize,
        body: impl Fn(usize) -> Result<Value>,
        read: impl Fn(usize, &Value) -> std::result::Result<T, String>,
    ) -> Result<Vec<T>> {
        let ended = Ended(Arc::default());
        let (send, answers) = channel();
        let mut found: Vec<Option<T>> = (0..count).map(|_| None).collect();
        let (mut begun, mut done) = (0, 0);
        while done < count {
            while begun < count && begun - done < CONNECTIONS {
                stop::check()?;
                let body = body(begun)?.to_string();
                let (client, send, ended) = (self.clone(), send.clone(), ended.0.clone());
                let post = AssertUnwindSafe(move || client.post(&body, &ended));
                spawn(move || {
                    // A thread that ended without a word would be waited for without end.
                    let answer = catch_unwind(post);
                    let answer = answer.unwrap_or_else(|_| Err("the request panicked".into()));
                    drop(send.send((begun, answer)));
                })?;
                begun += 1;
            }
            let (i, answer) = listen(&answers)?;
            let answer = answer.and_then(|answer| read(i, &answer));
            found[i] = Some(answer.map_err(|why| self.error(&why))?);
            done += 1;
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// One request with its retries.
    fn post(&self, body: &str, ended: &AtomicBool) -> std::result::Result<Value, String> {
        for retry in 0.. {
            match self.attempt(body) {
                Ok(answer) => return Ok(answer),
                Err(Failure::Passing { why, pause }) if retry < RETRIES => {
                    let pause = pause.max(self.first_pause * 2u32.pow(retry));
                    if !rest(pause, ended) {
                        return Err(why);
                    }
                }
                Err(Failure::Passing { why, .. }) => {
                    return Err(format!("{why}, even after {RETRIES} retries"));
                }
                Err(Failure::Final(why)) => return Err(why),
            }
        }
        unreachable!("the last retry returns")
    }

    fn attempt(&self, body: &str) -> std::result::Result<Value, Failure> {
        let mut request =
            self.agent.post(self.address.uri()).header("content-type", "application/json");
        if let Some(key) = &self.authorization {
            request = request.header("authorization", key);
        }
        let mut response = request.send(body).map_err(|e| self.failure(e))?;
        let status = response.status();
        let header = |name| response.headers().get(name).and_then(|v| v.to_str().ok());
        let location = header("location").map(super::address::shown);
        let pause = header("retry-after").and_then(|v| v.trim().parse().ok()).unwrap_or(0);
        let body = response.body_mut().read_to_vec().map_err(|e| self.failure(e))?;
        let body = String::from_utf8_lossy(&body);
        if status.is_success() {
            return serde_json::from_str(&body).map_err(|e| {
                Failure::Final(format!("the answer is not JSON ({e}): {}", quote(&body)))
            });
        }
        if status.is_redirection() {
            let to = location.map_or("nowhere".into(), |to| format!("to {to}"));
            return Err(Failure::Final(format!(
                "HTTP {status} redirects {to}; write the address that answers itself"
            )));
        }
        let answer = serde_json::from_str::<Value>(&body).ok();
        let words = answer.as_ref().and_then(|a| error_in(a).or_else(|| words(a.get("detail")?)));
        let words = words.map_or_else(|| quote(&body), |words| clip(&words));
        let why = format!("HTTP {status}: {words}");
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            let pause = Duration::from_secs(pause).min(LONGEST_PAUSE);
            return Err(Failure::Passing { why, pause });
        }
        let way_out = match status.as_u16() {
            401 | 403 => {
                format!("; set the environment variable {} to the server's key", self.key_variable)
            }
            404 | 405 => format!("; check the address {}", self.address.shown()),
            _ => String::new(),
        };
        Err(Failure::Final(why + &way_out))
    }

    /// Tells failures of the connection, which may pass, from the others.
    fn failure(&self, error: ureq::Error) -> Failure {
        use ureq::{Error, Timeout};
        let passing = |why| Failure::Passing { why, pause: Duration::ZERO };
        match error {
            Error::Timeout(Timeout::Connect | Timeout::Resolve) => {
                passing(format!("cannot be reached within {} seconds", CONNECT.as_secs()))
            }
            Error::Timeout(_) => Failure::Final(format!(
                "no answer within {} seconds; look what the server does, or give it more time \
                 with --reward-timeout SECONDS",
                self.timeout.as_secs_f64()
            )),
            // What is no error of the connection: TLS speaks through it too.
            Error::Io(e)
                if matches!(e.kind(), ErrorKind::InvalidData | ErrorKind::InvalidInput) =>
            {
                Failure::Final(format!("the connection cannot be used ({e})"))
            }
            Error::Io(e) => passing(match e.kind() {
                ErrorKind::UnexpectedEof => "closed the connection without an answer".into(),
                _ => format!("the connection failed ({e})"),
            }),
            Error::HostNotFound => passing("the address has no such host".into()),
            Error::ConnectionFailed => passing("the connection failed".into()),
            other => Failure::Final(format!("the request failed ({other})")),
        }
    }
}

/// The next message, or the user's wish to stop.
fn listen<T>(messages: &Receiver<T>) -> Result<T> {
    loop {
        stop::check()?;
        match messages.recv_timeout(LOOK) {
            Ok(message) => return Ok(message),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => bail!("a thread of the reward ended early"),
        }
    }
}

/// Sleeps; false when the call ended meanwhile.
fn rest(pause: Duration, ended: &AtomicBool) -> bool {
    let start = Instant::now();
    while !ended.load(Ordering::Relaxed) {
        match pause.checked_sub(start.elapsed()) {
            Some(left) if !left.is_zero() => std::thread::sleep(left.min(LOOK)),
            Some(_) | None => return true,
        }
    }
    false
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().spawn(work).context("a thread for a request to the reward")?;
    Ok(())
}

/// Whether a connection can be made. A name may stand for several addresses.
fn connect(host: &str, port: u16) -> std::result::Result<(), String> {
    let start = Instant::now();
    let addresses = std::net::ToSocketAddrs::to_socket_addrs(&(host, port));
    let mut why = format!("{host} has no address");
    for address in addresses.map_err(|e| e.to_string())? {
        let left = CONNECT.saturating_sub(start.elapsed()).max(LOOK);
        match std::net::TcpStream::connect_timeout(&address, left) {
            Ok(_) => return Ok(()),
            Err(e) => why = e.to_string(),
        }
    }
    Err(why)
}

/// The header for the key in the environment, if there is one.
fn authorization(variable: &'static str) -> Result<Option<ureq::http::HeaderValue>> {
    let key = std::env::var_os(variable).unwrap_or_default();
    let key = key.to_string_lossy();
    if key.trim().is_empty() {
        return Ok(None);
    }
    let header = ureq::http::HeaderValue::from_str(&format!("Bearer {}", key.trim()));
    let mut header = header.map_err(|_| {
        anyhow!("{variable}: holds characters that no key has; set it to the server's key alone")
    })?;
    header.set_sensitive(true);
    Ok(Some(header))
}

/// The picture as a PNG file in base64.
pub fn png_base64(image: &RgbImage) -> Result<String> {
    Ok(base64::engine::general_purpose::STANDARD.encode(io::png(image)?))
}

/// The words of the error that an answer holds at its top, if it holds one.
pub fn error_in(answer: &Value) -> Option<String> {
    words(answer.get("error")?)
}

/// The words of an error: a text, or an object around one. None where there is no error.
pub fn words(error: &Value) -> Option<String> {
    match error {
        Value::Null => None,
        Value::String(text) => Some(text.clone()).filter(|t| !t.trim().is_empty()),
        Value::Object(fields) => {
            let inner = fields.get("message").or_else(|| fields.get("error"));
            inner.and_then(words).or_else(|| Some(clip(&error.to_string())))
        }
        Value::Bool(false) => None,
        Value::Number(code) if code.as_f64() == Some(0.0) => None,
        Value::Bool(_) | Value::Number(_) | Value::Array(_) => Some(clip(&error.to_string())),
    }
}

/// The beginning of a server's text, in quotes.
pub fn quote(text: &str) -> String {
    format!("{:?}", clip(text.trim()))
}

/// The beginning of a text that may be long, on one line.
pub fn clip(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match text.char_indices().nth(QUOTE) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
