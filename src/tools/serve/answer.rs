//! From the head of a request to its answer. Everything here may wait for the disk.

use anyhow::Result;
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, LOCATION,
    REFERRER_POLICY, SET_COOKIE, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::http::request::Parts;
use hyper::{Method, Response, StatusCode};

use super::access::{Access, Entry};
use super::page::{self, Page};
use super::route::{Part, Route};
use super::runs::{self, Run, Runs};
use crate::train::wishes::Wish;

/// The longest body that a request may bring, in bytes. None of them means anything.
const BODY: u64 = 1024;
const HTML: &str = "text/html; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";

/// What every request shares.
pub struct Site {
    pub runs: Runs,
    pub access: Access,
    pub page: Page,
}

/// An answer without the headers that all have.
pub struct Answer {
    status: StatusCode,
    kind: &'static str,
    body: String,
    headers: Vec<(HeaderName, String)>,
}

impl Answer {
    pub fn text(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, kind: TEXT, body: text.into(), headers: Vec::new() }
    }

    fn html(status: StatusCode, body: String) -> Self {
        Self { kind: HTML, ..Self::text(status, body) }
    }

    fn with(mut self, name: HeaderName, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn into_response(self, page: &Page) -> Response<String> {
        let mut response = Response::new(self.body);
        *response.status_mut() = self.status;
        let fixed = [
            (CONTENT_TYPE, self.kind),
            (CONTENT_SECURITY_POLICY, page.policy()),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (REFERRER_POLICY, "no-referrer"),
            (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
            (CACHE_CONTROL, "no-store"),
        ];
        let fixed = fixed.map(|(name, value)| (name, value.to_string()));
        for (name, value) in fixed.into_iter().chain(self.headers) {
            let value = HeaderValue::try_from(value).expect("our own words, or percent-encoded");
            response.headers_mut().insert(name, value);
        }
        response
    }
}

/// Answers a request whose body has at most `length` bytes, if that is known.
pub fn answer(site: &Site, head: &Parts, length: Option<u64>) -> Answer {
    let entry = match site.access.check(head) {
        Ok(entry) => entry,
        Err(refusal) => {
            let answer = Answer::text(refusal.status, refusal.why);
            let asks = refusal.status == StatusCode::UNAUTHORIZED;
            return if asks { answer.with(WWW_AUTHENTICATE, "Bearer") } else { answer };
        }
    };
    if length.is_none_or(|length| length > BODY) {
        let why = format!("a request may bring {BODY} bytes, and says how many");
        return Answer::text(StatusCode::PAYLOAD_TOO_LARGE, why);
    }
    let Some(route) = Route::parse(head.uri.path()) else { return not_found() };
    let method = match route.part {
        Part::Page | Part::Main | Part::Version => Method::GET,
        Part::Wish(_) => Method::POST,
    };
    if head.method != method {
        let why = format!("this address knows {method} alone");
        return Answer::text(StatusCode::METHOD_NOT_ALLOWED, why).with(ALLOW, method.as_str());
    }
    if entry == Entry::Address && method == Method::GET {
        return enter(site, &route);
    }
    let found = match &route.run {
        None => list(site, route.part),
        Some(name) => site.runs.find(name).map(|run| match run {
            Some(run) => one(site, &run, route.part),
            None => not_found(),
        }),
    };
    found.unwrap_or_else(|error| failed(&error))
}

/// Puts the token into a cookie and out of the address, which stays in the browser's history.
fn enter(site: &Site, route: &Route) -> Answer {
    let answer = Answer::text(StatusCode::SEE_OTHER, "").with(LOCATION, route.path());
    site.access.cookie().into_iter().fold(answer, |answer, cookie| answer.with(SET_COOKIE, cookie))
}

fn list(site: &Site, part: Part) -> Result<Answer> {
    let runs = site.runs.list()?;
    Ok(match part {
        Part::Page => {
            // Made before the page: what comes meanwhile is one more change, not one less.
            let version = runs::version(&runs);
            let main = page::list(&runs);
            Answer::html(StatusCode::OK, site.page.whole(None, &version, &main))
        }
        Part::Main => Answer::html(StatusCode::OK, page::list(&runs)),
        Part::Version => Answer::text(StatusCode::OK, runs::version(&runs)),
        Part::Wish(_) => not_found(),
    })
}

fn one(site: &Site, run: &Run, part: Part) -> Answer {
    match part {
        Part::Page => {
            let version = run.version();
            let (status, version, main) = match site.page.run(run) {
                Ok(main) => (StatusCode::OK, version, main),
                // Without a version, the page soon asks again.
                Err(error) => {
                    (StatusCode::INTERNAL_SERVER_ERROR, String::new(), page::error(&error))
                }
            };
            Answer::html(status, site.page.whole(Some(&run.name), &version, &main))
        }
        Part::Main => match site.page.run(run) {
            Ok(main) => Answer::html(StatusCode::OK, main),
            Err(error) => failed(&error),
        },
        Part::Version => Answer::text(StatusCode::OK, run.version()),
        Part::Wish(wish) => ask(run, wish).unwrap_or_else(|error| failed(&error)),
    }
}

fn ask(run: &Run, wish: Wish) -> Result<Answer> {
    let (title, name) = (wish.title(), &run.name);
    if !run.alive() {
        let why = format!(
            "{title}: nothing runs in {name} now; continue it with `pcpo-wgpu train --resume`"
        );
        return Ok(Answer::text(StatusCode::CONFLICT, why));
    }
    run.ask(wish)?;
    let said = format!("{title}: asked; {name} takes it between two steps");
    Ok(Answer::text(StatusCode::ACCEPTED, said))
}

fn not_found() -> Answer {
    Answer::text(StatusCode::NOT_FOUND, "there is no such page or run")
}

fn failed(error: &anyhow::Error) -> Answer {
    Answer::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}"))
}
