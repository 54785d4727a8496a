//! `judge:URL#MODEL`: a vision-language model behind `URL/v1/chat/completions`, as llama.cpp, vLLM
//! and others serve it. It is asked one question about each picture. A key in the environment
//! variable `PCPO_JUDGE_API_KEY` is sent as `Authorization: Bearer KEY`.

use anyhow::{Result, anyhow, bail, ensure};
use image::RgbImage;
use serde_json::{Value, json};

use super::address::{Address, shown};
use super::prompt::Prompt;
use super::remote::{Client, JudgeAnswer, RemoteOptions, clip, error_in, png_base64, quote};
use super::score::Reward;

/// The question for [`JudgeAnswer::Number`].
pub const NUMBER_QUESTION: &str = "Rate from 0 to 10 how well this picture shows the following: \
     {prompt}\nAnswer with the number alone.";
/// The question for [`JudgeAnswer::Yes`].
pub const YES_QUESTION: &str =
    "Does this picture show the following: {prompt}\nAnswer yes or no, with one word.";
/// How many tokens an answer with a number may have.
const NUMBER_TOKENS: u32 = 256;
/// How many candidates for the first token are asked for: the most that vLLM gives by default.
const CANDIDATES: u32 = 20;

/// A model that is asked about pictures.
pub struct Judge {
    client: Client,
    model: String,
    question: String,
    answer: JudgeAnswer,
}

impl Judge {
    /// Checks `URL#MODEL` and that the server can be reached. URL is what stands before `/v1`.
    ///
    /// # Errors
    /// When a part is missing, nothing listens there, the question is empty, or the key cannot be
    /// sent.
    pub fn open(url_and_model: &str, options: &RemoteOptions) -> Result<Self> {
        let name = format!("--reward judge:{}", shown(url_and_model));
        let (address, model) = address(&name, url_and_model)?;
        let question = options.judge_question.as_deref().unwrap_or(match options.judge_answer {
            JudgeAnswer::Number => NUMBER_QUESTION,
            JudgeAnswer::Yes => YES_QUESTION,
        });
        ensure!(!question.trim().is_empty(), "--judge-question: is empty; leave it out, or ask");
        Ok(Self {
            client: Client::open(name, address, "PCPO_JUDGE_API_KEY", options.timeout)?,
            model: model.trim().into(),
            question: question.into(),
            answer: options.judge_answer,
        })
    }
}

/// # Errors
/// When it is no `URL#MODEL`, with `name` in front.
pub(super) fn check(name: &str, url_and_model: &str) -> Result<()> {
    address(name, url_and_model).map(drop)
}

/// Where a model is asked, and its name.
fn address<'a>(name: &str, url_and_model: &'a str) -> Result<(Address, &'a str)> {
    let parts = url_and_model.rsplit_once('#');
    let (url, model) = parts.filter(|(_, model)| !model.trim().is_empty()).ok_or_else(|| {
        anyhow!("{name}: names no model; write judge:URL#MODEL, like http://HOST:8080#NAME")
    })?;
    ensure!(!url.is_empty(), "{name}: has no URL; write judge:URL#MODEL");
    ensure!(!url.contains('#'), "{name}: has more than one #; write judge:URL#MODEL");
    let base = url.trim_end_matches('/');
    let base = base.strip_suffix("/v1").unwrap_or(base).trim_end_matches('/');
    Ok((Address::parse(name, &format!("{base}/v1/chat/completions"))?, model))
}

impl Reward for Judge {
    fn score(&mut self, images: &[RgbImage], prompts: &[&Prompt]) -> Result<Vec<f64>> {
        let items: Vec<_> = images.iter().zip(prompts).collect();
        let body = |i: usize| -> Result<Value> {
            let (image, prompt) = items[i];
            let url = format!("data:image/png;base64,{}", png_base64(image)?);
            let mut body = json!({
                "model": self.model,
                "messages": [{ "role": "user", "content": [
                    { "type": "text", "text": fill(&self.question, prompt)? },
                    { "type": "image_url", "image_url": { "url": url } },
                ]}],
                "temperature": 0,
            });
            match self.answer {
                JudgeAnswer::Number => body["max_tokens"] = json!(NUMBER_TOKENS),
                JudgeAnswer::Yes => {
                    body["max_tokens"] = json!(1);
                    body["logprobs"] = json!(true);
                    body["top_logprobs"] = json!(CANDIDATES);
                }
            }
            Ok(body)
        };
        let read = |i: usize, answer: &Value| {
            let score = match self.answer {
                JudgeAnswer::Number => number(answer),
                JudgeAnswer::Yes => yes(answer),
            };
            score.map_err(|why| {
                let prompt = quote(&items[i].1.text);
                format!("picture {} of {} ({prompt}): {why}", i + 1, items.len())
            })
        };
        self.client.ask(items.len(), body, read)
    }
}

/// The question about a picture: `{prompt}` becomes its prompt, `{NAME}` the field NAME of its
/// metadata, as it is for a text and as JSON for the rest. Braces around anything but a name stay;
/// what is put in is not looked through again.
///
/// # Errors
/// When the metadata has no such field.
fn fill(question: &str, prompt: &Prompt) -> Result<String> {
    let (mut filled, mut rest) = (String::new(), question);
    while let Some(open) = rest.find('{') {
        filled += &rest[..open];
        rest = &rest[open..];
        let name = rest.find('}').map(|close| &rest[1..close]);
        let value = name.and_then(|name| match name {
            "prompt" => Some(prompt.text.clone()),
            name => prompt.metadata.get(name).map(|value| match value {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            }),
        });
        match (name, value) {
            (Some(name), Some(value)) => {
                filled += &value;
                rest = &rest[name.len() + 2..];
            }
            (Some(name), None) if is_name(name) => bail!(
                "--judge-question: {{{name}}} stands for a field of the prompt's metadata, which \
                 {:?} has not; add it to the prompts' file, or leave it out",
                prompt.text
            ),
            _ => {
                filled.push('{');
                rest = &rest[1..];
            }
        }
    }
    Ok(filled + rest)
}

/// Whether what stands in braces is a name: letters, digits and underscores.
fn is_name(text: &str) -> bool {
    let may = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    text.starts_with(|c: char| c.is_alphabetic() || c == '_') && text.chars().all(may)
}

/// The first of the answer's choices.
fn choice(answer: &Value) -> std::result::Result<&Value, String> {
    if let Some(why) = error_in(answer) {
        return Err(format!("the server says {}", quote(&why)));
    }
    answer
        .pointer("/choices/0")
        .ok_or_else(|| format!("the answer has no \"choices\": {}", clip(&answer.to_string())))
}

/// The score of [`JudgeAnswer::Number`]: the first number of the text behind the last
/// `</think>`.
fn number(answer: &Value) -> std::result::Result<f64, String> {
    let choice = choice(answer)?;
    let text = choice
        .pointer("/message/content")
        .and_then(Value::as_str)
        .ok_or_else(|| format!("the answer has no text: {}", clip(&choice.to_string())))?;
    let said = text.rsplit("</think>").next().unwrap_or_default();
    let way_out = "ask for the number alone with --judge-question";
    if said.contains("<think>") || (said.trim().is_empty() && choice["finish_reason"] == "length") {
        return Err(format!(
            "the model still thinks after {NUMBER_TOKENS} tokens; take one that answers at once"
        ));
    }
    let found = first_number(said);
    found.ok_or_else(|| format!("the answer {} holds no number; {way_out}", quote(said)))
}

/// The first decimal number in a text: digits with an optional fraction, or a fraction alone,
/// and a sign in front unless that joins the number to a letter or digit. No exponent, and no
/// comma: `7/10` is 7, `.5` is 0.5, `A-4` is 4, `8-10` is 8.
fn first_number(text: &str) -> Option<f64> {
    let bytes = text.as_bytes();
    let digit = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
    let mut start = (0..bytes.len()).find(|&i| digit(i) || (bytes[i] == b'.' && digit(i + 1)))?;
    let mut end = start;
    while digit(end) {
        end += 1;
    }
    if bytes.get(end) == Some(&b'.') && digit(end + 1) {
        end += 1;
        while digit(end) {
            end += 1;
        }
    }
    let joined = |i: usize| text[..i].chars().next_back().is_some_and(char::is_alphanumeric);
    if start > 0 && matches!(bytes[start - 1], b'-' | b'+') && !joined(start - 1) {
        start -= 1;
    }
    text[start..end].parse().ok().filter(|v: &f64| v.is_finite())
}

/// The score of [`JudgeAnswer::Yes`]: the probability that the first token is "yes", whatever its
/// case and the spaces around it; the sum over the candidates that the server lists.
fn yes(answer: &Value) -> std::result::Result<f64, String> {
    let choice = choice(answer)?;
    let candidates = choice.pointer("/logprobs/content/0/top_logprobs").and_then(Value::as_array);
    let candidates = candidates.filter(|c| !c.is_empty()).ok_or(
        "the server sends no logprobs, which --judge-answer yes needs; use another server, or \
         --judge-answer number",
    )?;
    let (mut probability, mut answered) = (0.0, false);
    for candidate in candidates {
        let token = candidate["token"].as_str().unwrap_or_default().trim().to_lowercase();
        answered |= token == "yes" || token == "no";
        if token == "yes" {
            let logprob = candidate["logprob"]
                .as_f64()
                .filter(|p| *p < 0.01)
                .ok_or_else(|| format!("a logprob is not one: {}", clip(&candidate.to_string())))?;
            probability += logprob.exp();
        }
    }
    if !answered {
        let tokens: Vec<_> = candidates.iter().take(5).map(|c| c["token"].to_string()).collect();
        return Err(format!(
            "the model begins with neither yes nor no, but with one of {}; ask for one of the \
             two with --judge-question, or take a model that does not think first",
            clip(&tokens.join(", "))
        ));
    }
    Ok(probability.min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_of_a_text() {
        for (text, right) in [
            ("7", Some(7.0)),
            ("7/10", Some(7.0)),
            ("**8.5**", Some(8.5)),
            ("Score: -3.", Some(-3.0)),
            ("+2", Some(2.0)),
            ("about .5 of it", Some(0.5)),
            ("8-10", Some(8.0)),
            ("A-4", Some(4.0)),
            ("ä-4", Some(4.0)),
            ("1.2.3", Some(1.2)),
            ("9..", Some(9.0)),
            ("none. At - all", None),
            ("", None),
        ] {
            assert_eq!(first_number(text), right, "{text:?}");
        }
        assert_eq!(first_number(&"9".repeat(400)), None, "more than a float holds");
    }

    #[test]
    fn braces_in_a_question() {
        let metadata = json!({ "text": "a {prompt}", "count": 3, "of": ["x", 1] });
        let prompt =
            Prompt { text: "{count} cats".into(), metadata: metadata.as_object().unwrap().clone() };
        for (question, right) in [
            ("no braces", "no braces"),
            ("{prompt}!", "{count} cats!"),
            ("{text} {count} {of}", "a {prompt} 3 [\"x\",1]"),
            ("{\"score\": 1} {", "{\"score\": 1} {"),
            ("{ {prompt} } {}", "{ {count} cats } {}"),
            ("ü{{count}}ü", "ü{3}ü"),
        ] {
            assert_eq!(fill(question, &prompt).unwrap(), right);
        }
        let error = fill("is {unknown} there?", &prompt).unwrap_err().to_string();
        assert!(error.contains("{unknown}") && error.contains("cats"), "{error}");
    }
}
