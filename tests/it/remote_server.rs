//! A small HTTP server for the tests of rewards behind HTTP; what it answers is a closure.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use serde_json::{Value, json};

/// What the server was sent.
#[derive(Clone)]
pub struct Request {
    /// `POST /PATH HTTP/1.1`
    pub line: String,
    /// `name: value`, the names in small letters.
    pub headers: Vec<String>,
    pub body: Value,
}

/// What the server does with a request.
pub enum Reply {
    /// Status 200 with this body.
    Ok(String),
    Status {
        status: &'static str,
        headers: String,
        body: String,
    },
    /// Closes the connection without a word.
    Drop,
    /// Keeps the connection and says nothing.
    Hang,
    /// Status 200 with this body, one byte each pause.
    Slow(String, Duration),
    /// Says that the body is longer than it is, and closes the connection.
    Cut(String),
    /// These bytes, whatever they are.
    Raw(&'static str),
}

pub struct Server {
    pub url: String,
    requests: Arc<Mutex<Vec<Request>>>,
    most_at_once: Arc<AtomicUsize>,
}

impl Server {
    /// Starts a server; `answer` gets the number of the request, from 0, and the request. It runs
    /// on a thread for each connection, until the process ends.
    pub fn start(answer: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = Self { url, requests: Arc::default(), most_at_once: Arc::default() };
        let (requests, most_at_once) = (server.requests.clone(), server.most_at_once.clone());
        let (answer, now) = (Arc::new(answer), Arc::new(AtomicUsize::new(0)));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (requests, most_at_once) = (requests.clone(), most_at_once.clone());
                let (answer, now) = (answer.clone(), now.clone());
                std::thread::spawn(move || {
                    // None: somebody looked whether there is a server.
                    let Some(request) = read(&stream) else { return };
                    let number = {
                        let mut requests = requests.lock().unwrap();
                        requests.push(request.clone());
                        requests.len() - 1
                    };
                    let at_once = now.fetch_add(1, Ordering::SeqCst) + 1;
                    most_at_once.fetch_max(at_once, Ordering::SeqCst);
                    let reply = answer(number, &request);
                    now.fetch_sub(1, Ordering::SeqCst);
                    write(stream, reply);
                });
            }
        });
        server
    }

    /// A server that answers every request with this JSON.
    pub fn saying(answer: Value) -> Self {
        Self::start(move |_, _| Reply::Ok(answer.to_string()))
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// How many requests were answered at the same time, at most.
    pub fn most_at_once(&self) -> usize {
        self.most_at_once.load(Ordering::SeqCst)
    }
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find_map(|h| h.strip_prefix(name)?.strip_prefix(": "))
    }

    /// The pictures of a request to a reward server.
    pub fn pictures(&self) -> Vec<image::RgbImage> {
        let items = self.body["items"].as_array().unwrap();
        items.iter().map(|item| decoded(item["image"].as_str().unwrap())).collect()
    }
}

/// A picture from its PNG file in base64.
pub fn decoded(base64: &str) -> image::RgbImage {
    let file = base64::engine::general_purpose::STANDARD.decode(base64).unwrap();
    image::load_from_memory_with_format(&file, image::ImageFormat::Png).unwrap().into_rgb8()
}

/// `{"scores": [...]}` with the red of each picture's first pixel.
pub fn reds(request: &Request) -> Reply {
    let reds: Vec<u8> = request.pictures().iter().map(|p| p.get_pixel(0, 0)[0]).collect();
    Reply::Ok(json!({ "scores": reds }).to_string())
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_string()),
        }
    }
    let small = |line: &String| {
        let (name, value) = line.split_once(": ").unwrap();
        format!("{}: {value}", name.to_lowercase())
    };
    let mut request = Request {
        line: lines[0].clone(),
        headers: lines[1..].iter().map(small).collect(),
        body: Value::Null,
    };
    let length = request.header("content-length").map_or(0, |v| v.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    request.body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    Some(request)
}

/// Clients that have gone away are no failure of the server.
fn write(mut stream: TcpStream, reply: Reply) {
    let head = |status: &str, length: usize| {
        format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n")
    };
    let _ = match reply {
        Reply::Ok(body) => write!(stream, "{}\r\n{body}", head("200 OK", body.len())),
        Reply::Status { status, headers, body } => {
            write!(stream, "{}{headers}\r\n{body}", head(status, body.len()))
        }
        Reply::Drop => Ok(()),
        Reply::Hang => {
            std::thread::sleep(Duration::from_secs(600));
            Ok(())
        }
        Reply::Slow(body, pause) => {
            write!(stream, "{}\r\n", head("200 OK", body.len())).and_then(|()| {
                body.bytes().try_for_each(|byte| {
                    std::thread::sleep(pause);
                    stream.write_all(&[byte])
                })
            })
        }
        Reply::Cut(body) => write!(stream, "{}\r\n{body}", head("200 OK", body.len() + 9)),
        Reply::Raw(bytes) => write!(stream, "{bytes}"),
    };
}
