//! `http:URL`: a server that scores pictures. It is sent
//! `{"items": [{"image": PNG IN BASE64, "prompt": TEXT, "metadata": OBJECT}, ...]}` by POST and
//! answers `{"scores": [NUMBER, ...]}`, one for each item, in order.
//!
//! A server that cannot score an item says so, and scoring ends with its words: by a text or
//! `{"error": TEXT}` in place of the number; by a list `errors` beside `scores`, with a text or
//! null for each item; or by `{"error": TEXT}` for the whole request. A key in the environment
//! variable `PCPO_REWARD_API_KEY` is sent as `Authorization: Bearer KEY`.

use std::time::Duration;

use anyhow::{Result, ensure};
use image::RgbImage;
use serde_json::{Value, json};

use super::address::{Address, shown};
use super::prompt::Prompt;
use super::remote::{Client, clip, error_in, png_base64, quote, words};
use super::score::Reward;

/// How many pictures one request holds.
pub const BATCH: usize = 8;

/// A reward server.
pub struct Http(Client);

impl Http {
    /// Checks that the server can be reached. An answer may take `timeout`.
    ///
    /// # Errors
    /// When the URL is none, nothing listens there, or the key cannot be sent.
    pub fn open(url: &str, timeout: Duration) -> Result<Self> {
        let name = format!("--reward http:{}", shown(url));
        let address = Address::parse(&name, url)?;
        Ok(Self(Client::open(name, address, "PCPO_REWARD_API_KEY", timeout)?))
    }

    /// Changes the pause before the first retry.
    pub fn with_first_pause(mut self, pause: Duration) -> Self {
        self.0.set_first_pause(pause);
        self
    }
}

/// # Errors
/// When the URL cannot be asked, with `name` in front.
pub(super) fn check(name: &str, url: &str) -> Result<()> {
    ensure!(!url.trim().is_empty(), "{name}: names nothing; write http:URL");
    Address::parse(name, url).map(drop)
}

impl Reward for Http {
    fn score(&mut self, images: &[RgbImage], prompts: &[&Prompt]) -> Result<Vec<f64>> {
        let items: Vec<_> = images.iter().zip(prompts).collect();
        let batches: Vec<_> = items.chunks(BATCH).collect();
        let body = |batch: usize| -> Result<Value> {
            let item = |(image, prompt): &(&RgbImage, &&Prompt)| -> Result<Value> {
                Ok(json!({
                    "image": png_base64(image)?,
                    "prompt": prompt.text,
                    "metadata": prompt.metadata,
                }))
            };
            let items = batches[batch].iter().map(item).collect::<Result<Vec<_>>>()?;
            Ok(json!({ "items": items }))
        };
        let read = |batch: usize, answer: &Value| {
            scores(answer, batches[batch].len()).map_err(|fault| match fault.item {
                Some(i) => {
                    let i = batch * BATCH + i;
                    let prompt = quote(&items[i].1.text);
                    format!("picture {} of {} ({prompt}): {}", i + 1, items.len(), fault.why)
                }
                None => fault.why,
            })
        };
        Ok(self.0.ask(batches.len(), body, read)?.concat())
    }
}

/// What is wrong with an answer.
struct Fault {
    /// Which item of the batch it concerns; none for the whole answer.
    item: Option<usize>,
    why: String,
}

/// The scores of one batch.
fn scores(answer: &Value, count: usize) -> std::result::Result<Vec<f64>, Fault> {
    let whole = |why| Fault { item: None, why };
    if let Some(why) = error_in(answer) {
        return Err(whole(format!("the server says {}", quote(&why))));
    }
    match answer.get("errors") {
        None | Some(Value::Null) => {}
        Some(Value::Array(errors)) => {
            let mut errors = errors.iter().enumerate().filter_map(|(i, e)| Some((i, words(e)?)));
            if let Some((i, why)) = errors.next() {
                let why = format!("the server says {}", quote(&why));
                return Err(Fault { item: Some(i).filter(|i| *i < count), why });
            }
        }
        Some(other) => {
            if let Some(why) = words(other) {
                return Err(whole(format!("the server says {}", quote(&why))));
            }
        }
    }
    let Some(scores) = answer.get("scores").and_then(Value::as_array) else {
        let answer = clip(&answer.to_string());
        return Err(whole(format!("the answer has no list \"scores\": {answer}")));
    };
    if scores.len() != count {
        let many = format!("answered {} scores for {count} pictures", scores.len());
        return Err(whole(format!("{many}; it must give one for each")));
    }
    let score = |(item, entry): (usize, &Value)| {
        let fault = |why| Fault { item: Some(item), why };
        match entry {
            Value::Number(number) => number
                .as_f64()
                .filter(|v| v.is_finite())
                .ok_or_else(|| fault(format!("the score {number} is not finite"))),
            Value::Null | Value::Bool(_) | Value::Array(_) => {
                Err(fault(format!("the score {} is not a number", clip(&entry.to_string()))))
            }
            Value::String(text) => {
                Err(fault(format!("the server gives the text {} for its score", quote(text))))
            }
            Value::Object(_) => {
                let why = words(entry).unwrap_or_default();
                Err(fault(format!("the server says {}", quote(&why))))
            }
        }
    };
    scores.iter().enumerate().map(score).collect()
}
