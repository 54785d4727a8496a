//! Who may speak to the server. Any page in the user's browser can send requests to 127.0.0.1, so
//! each one is looked at before anything else:
//!
//! - `Host` is an address of the server. A page whose name was made to point here (DNS rebinding)
//!   is of the server's origin for the browser, but its requests carry that name.
//! - `Origin` and `Sec-Fetch-Site`, which a page cannot forge, tell of no other origin. A POST
//!   without `Origin` has the header `X-Pcpo`, which a page cannot send to another origin unless
//!   that one agrees first, and this server never does.
//! - The token is there, where there is one: in the address, in `Authorization`, or in the cookie
//!   that its first visit left.

use std::net::SocketAddr;

use anyhow::{Result, anyhow, ensure};
use hyper::header::{AUTHORIZATION, COOKIE, HOST, HeaderName, ORIGIN};
use hyper::http::request::Parts;
use hyper::{Method, StatusCode};
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// What a browser says about the origin of a request.
const SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// What a program sends with a POST in place of an origin.
const OWN: HeaderName = HeaderName::from_static("x-pcpo");
/// Bytes of a token that is made.
const TOKEN: usize = 16;

/// Who may speak.
pub struct Access {
    /// What `Host` may be; anything where other machines are served, who know us by many names.
    hosts: Option<Vec<String>>,
    token: Option<Token>,
    /// Where the server is, for errors.
    address: SocketAddr,
}

struct Token {
    text: String,
    /// Name and value of the cookie. A browser sends cookies to all ports, so the name has ours;
    /// the value is not the token, which the user may have chosen.
    cookie: (String, String),
}

/// How a request was let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// As all others.
    Plain,
    /// With the token in its address, which is to be replaced by the cookie.
    Address,
}

/// Why a request is not let in.
#[derive(Debug)]
pub struct Refusal {
    pub status: StatusCode,
    pub why: String,
}

impl Access {
    /// # Errors
    /// When the token is empty, or none can be made.
    pub fn new(address: SocketAddr, token: Option<String>) -> Result<Self> {
        ensure!(
            token.as_deref() != Some(""),
            "--token \"\": is empty; give a text, or leave the flag out"
        );
        let port = address.port();
        let local = address.ip().to_canonical().is_loopback();
        let token = if local { token } else { Some(token.map_or_else(random, Ok)?) };
        let token = token.map(|text| {
            let value = hex(&Sha256::digest(format!("pcpo-wgpu serve\n{text}")));
            Token { text, cookie: (format!("pcpo-{port}"), value) }
        });
        let names = ["127.0.0.1", "localhost", "[::1]"];
        let mut hosts: Vec<String> = names.iter().map(|name| format!("{name}:{port}")).collect();
        hosts.push(address.to_string());
        if port == 80 {
            hosts.extend(names.map(str::to_string));
        }
        Ok(Self { hosts: local.then_some(hosts), token, address })
    }

    /// The token as the end of an address: `?token=...`, or nothing.
    pub fn query(&self) -> String {
        let encoded =
            |token: &Token| utf8_percent_encode(&token.text, NON_ALPHANUMERIC).to_string();
        self.token.as_ref().map_or(String::new(), |t| format!("?token={}", encoded(t)))
    }

    /// The cookie that stands for the token, as `Set-Cookie` has it.
    pub fn cookie(&self) -> Option<String> {
        let (name, value) = &self.token.as_ref()?.cookie;
        Some(format!("{name}={value}; Path=/; HttpOnly; SameSite=Strict"))
    }

    /// Decides about a request.
    ///
    /// # Errors
    /// The refusal.
    pub fn check(&self, head: &Parts) -> Result<Entry, Refusal> {
        let host = self.host(head)?;
        origin(head, &host)?;
        self.token(head)
    }

    /// What the client takes the server to be called.
    fn host(&self, head: &Parts) -> Result<String, Refusal> {
        let mut values = head.headers.get_all(HOST).iter();
        let host = match (values.next(), values.next()) {
            (Some(value), None) => value.to_str().ok().map(str::to_ascii_lowercase),
            _ => None,
        };
        // A proxy's request, with a whole address in its first line, has two hosts.
        let host = host.filter(|_| head.uri.authority().is_none());
        let own = |host: &String| self.hosts.as_ref().is_none_or(|own| own.contains(host));
        host.filter(own).ok_or_else(|| {
            forbidden(&format!(
                "this server is http://{}/ and goes by no other name; open that (a tunnel must \
                 begin at the same port)",
                self.address
            ))
        })
    }

    fn token(&self, head: &Parts) -> Result<Entry, Refusal> {
        let Some(token) = &self.token else { return Ok(Entry::Plain) };
        let refusal = || Refusal {
            status: StatusCode::UNAUTHORIZED,
            why: "a token is needed: open the address that `pcpo-wgpu serve` printed, or send \
                  `Authorization: Bearer TOKEN`"
                .into(),
        };
        let text = token.text.as_bytes();
        let pairs = head.uri.query().unwrap_or("").split('&');
        if let Some(given) = pairs.filter_map(|pair| pair.strip_prefix("token=")).next() {
            let given: Vec<u8> = percent_decode_str(given).collect();
            return if same(&given, text) { Ok(Entry::Address) } else { Err(refusal()) };
        }
        if let Some(given) = head.headers.get(AUTHORIZATION) {
            let given = given.as_bytes().split_at_checked("Bearer ".len());
            let given = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer "));
            let right = given.is_some_and(|(_, given)| same(given, text));
            return if right { Ok(Entry::Plain) } else { Err(refusal()) };
        }
        let (name, value) = &token.cookie;
        let cookies = head.headers.get_all(COOKIE).iter().filter_map(|line| line.to_str().ok());
        let pairs =
            cookies.flat_map(|line| line.split(';')).filter_map(|c| c.trim().split_once('='));
        let right = |(n, v): (&str, &str)| n == name && same(v.as_bytes(), value.as_bytes());
        if pairs.into_iter().any(right) { Ok(Entry::Plain) } else { Err(refusal()) }
    }
}

/// Refuses what comes from another origin, or may do so.
fn origin(head: &Parts, host: &str) -> Result<(), Refusal> {
    let own = format!("http://{host}");
    let mut origins = head.headers.get_all(ORIGIN).iter().peekable();
    let none = origins.peek().is_none();
    let other = origins.any(|o| !o.as_bytes().eq_ignore_ascii_case(own.as_bytes()));
    let mut sites = head.headers.get_all(SITE).iter();
    let elsewhere = sites.any(|s| !matches!(s.as_bytes(), b"none" | b"same-origin"));
    if other || elsewhere {
        return Err(forbidden(
            "this request comes from another page; type the server's address instead of \
             following a link to it",
        ));
    }
    let marked = head.headers.get(OWN).is_some_and(|value| value == "1");
    if head.method == Method::POST && none && !marked {
        return Err(forbidden("a POST needs an Origin, or the header `X-Pcpo: 1`"));
    }
    Ok(())
}

fn forbidden(why: &str) -> Refusal {
    Refusal { status: StatusCode::FORBIDDEN, why: why.into() }
}

/// Compares secrets in a time that tells nothing about them.
fn same(a: &[u8], b: &[u8]) -> bool {
    Sha256::digest(a).as_slice().ct_eq(Sha256::digest(b).as_slice()).into()
}

fn random() -> Result<String> {
    let mut bytes = [0; TOKEN];
    getrandom::fill(&mut bytes)
        .map_err(|e| anyhow!("no random token can be made ({e}); give one with --token TEXT"))?;
    Ok(hex(&bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
