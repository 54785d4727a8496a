//! CLIP's tokenizer, from tokenizer.json, from vocab.json and merges.txt, or with the vocabulary
//! that all of CLIP's models share; and T5's, from tokenizer.json.

use std::io::Read;
use std::panic::catch_unwind;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::{BertNormalizer, Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

/// Tokens of T5 and Qwen3 that diffusers' pipelines take at most.
pub const MOST_TOKENS: usize = 512;

/// Entries of CLIP's own vocabulary.
pub const CLIP_VOCABULARY: usize = 49408;

/// The two ends of a text.
const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// Its merges, as OpenAI packed them; MIT, see the licence beside it.
const CLIP_MERGES: &[u8] =
    include_bytes!("../../../models/clip-tokenizer/bpe_simple_vocab_16e6.txt.gz");

/// Text to token numbers of one fixed length.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The start token, which T5 has none of.
    bos: Option<u32>,
    eos: u32,
    pad: u32,
    /// Tokens in each row, start, end and padding included.
    pub length: usize,
    /// Whether texts are mended first, as open_clip does.
    mend: bool,
}

/// The settings of CLIP's slow tokenizer (transformers' `CLIPTokenizer`).
fn from_vocabulary(dir: &Path) -> Result<tokenizers::Tokenizer> {
    let text = |name: &str| dir.join(name).to_string_lossy().into_owned();
    with_words(BPE::from_file(&text("vocab.json"), &text("merges.txt")))
        .map_err(|e| anyhow!("{}: vocab.json and merges.txt cannot be used: {e}", dir.display()))
}

/// CLIP's own vocabulary.
struct ClipWords {
    /// The bytes, the bytes that end a word, what is merged of them, and the two ends of a text.
    words: Vec<String>,
    merges: Vec<(String, String)>,
}

fn clip_words() -> Result<ClipWords> {
    let mut text = String::new();
    flate2::read::GzDecoder::new(CLIP_MERGES)
        .read_to_string(&mut text)
        .context("CLIP's vocabulary cannot be unpacked")?;
    let merged = CLIP_VOCABULARY - 2 * 256 - 2;
    let merges: Vec<(String, String)> = text
        .lines()
        .skip(1)
        .take(merged)
        .filter_map(|line| line.split_once(' '))
        .map(|(a, b)| (a.to_string(), b.to_string()))
        .collect();
    let mut words = byte_letters();
    words.extend(byte_letters().iter().map(|letter| format!("{letter}</w>")));
    words.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
    words.extend([START.to_string(), END.to_string()]);
    Ok(ClipWords { words, merges })
}

/// The tokenizer of that vocabulary.
fn clip_vocabulary() -> Result<tokenizers::Tokenizer> {
    let ClipWords { words, merges } = clip_words()?;
    let vocabulary: Vocab = words.into_iter().zip(0..).collect();
    with_words(BPE::builder().vocab_and_merges(vocabulary, merges))
        .map_err(|e| anyhow!("CLIP's vocabulary: {e}"))
}

/// Writes a `tokenizer` folder of CLIP's own vocabulary, which fills texts up with their end or, as
/// open_clip's do, with "!".
///
/// # Errors
/// When a file cannot be written.
pub fn write_clip_vocabulary(dir: &Path, letter: bool) -> Result<()> {
    let ClipWords { words, merges } = clip_words()?;
    let vocabulary: serde_json::Map<String, Value> =
        words.into_iter().zip(0..).map(|(word, i)| (word, Value::from(i))).collect();
    crate::io::write(&dir.join("vocab.json"), Value::Object(vocabulary).to_string().as_bytes())?;
    let lines = merges.iter().map(|(a, b)| format!("{a} {b}\n"));
    let merges = format!("#version: 0.2\n{}", lines.collect::<String>());
    crate::io::write(&dir.join("merges.txt"), merges.as_bytes())?;
    let config = serde_json::json!({
        "bos_token": START,
        "eos_token": END,
        "model_max_length": 77,
        "pad_token": if letter { "!" } else { END },
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": END,
    });
    crate::io::write(&dir.join("tokenizer_config.json"), config.to_string().as_bytes())
}

/// The letter that stands for each byte, in the order of CLIP's vocabulary: printable ones for
/// themselves, the others moved to where letters are.
fn byte_letters() -> Vec<String> {
    let printable = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff);
    let moved = (0x100..).take(256 - 188);
    printable.chain(moved).filter_map(char::from_u32).map(String::from).collect()
}

/// A tokenizer of CLIP's words over a vocabulary.
fn with_words(bpe: BpeBuilder) -> tokenizers::Result<tokenizers::Tokenizer> {
    let bpe = bpe
        .end_of_word_suffix("</w>".into())
        .continuing_subword_prefix(String::new())
        .unk_token(END.into())
        .build()?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    let spaces =
        Replace::new(tokenizers::normalizers::replace::ReplacePattern::Regex(r"\s+".into()), " ")?;
    let steps: Vec<NormalizerWrapper> = vec![NFC.into(), spaces.into(), Lowercase.into()];
    inner.with_normalizer(Some(Normalizers::new(steps)));
    let words = concat!(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|",
        r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    );
    let split =
        Split::new(SplitPattern::Regex(words.into()), SplitDelimiterBehavior::Removed, true)?;
    let steps: Vec<PreTokenizerWrapper> =
        vec![split.into(), ByteLevel::new(false, true, true).into()];
    inner.with_pre_tokenizer(Some(Sequence::new(steps)));
    Ok(inner)
}

/// A text as open_clip mends it: curly quotes made straight, wide letters narrow, and HTML's names
/// of letters replaced, twice. ftfy, which it uses, mends wrongly decoded text besides, and Python
/// knows some of HTML's names without their semicolon.
fn mended(text: &str) -> String {
    let letter = |c: char| match c {
        '\u{2018}'..='\u{201b}' => '\'',
        '\u{201c}'..='\u{201f}' => '"',
        '\u{3000}' => ' ',
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(c as u32 - 0xfee0).unwrap_or(c),
        c => c,
    };
    let straight: String = text.chars().map(letter).collect();
    let once = html_escape::decode_html_entities(&straight);
    html_escape::decode_html_entities(&once).into_owned()
}

/// A special token's text: a string or an object with `content`, in either of the two config files.
pub(super) fn special(configs: &[Value], field: &str, default: &str) -> String {
    let text = |v: &Value| v.as_str().or_else(|| v["content"].as_str()).map(str::to_string);
    configs.iter().find_map(|c| text(&c[field])).unwrap_or_else(|| default.to_string())
}

/// Reads a tokenizer.json.
pub(super) fn from_json(path: &Path) -> Result<tokenizers::Tokenizer> {
    // The library panics at some that are damaged.
    let read = catch_unwind(|| tokenizers::Tokenizer::from_file(path));
    let read = read.unwrap_or_else(|_| Err("it is damaged".into()));
    read.map_err(|e| anyhow!("{}: cannot be used: {e}", path.display()))
}

impl Tokenizer {
    /// Loads a `tokenizer` folder; rows are at most `max_tokens` long.
    ///
    /// # Errors
    /// Names the file that is missing or cannot be used.
    pub fn load(dir: &Path, max_tokens: usize) -> Result<Self> {
        let fast = dir.join("tokenizer.json");
        let mut inner = if fast.is_file() {
            from_json(&fast)?
        } else {
            ensure!(
                dir.join("vocab.json").is_file() && dir.join("merges.txt").is_file(),
                "{}: no tokenizer.json and no vocab.json with merges.txt",
                dir.display()
            );
            from_vocabulary(dir)?
        };
        // Start, end, padding and length are ours, from the tokenizer's own configs.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| anyhow!("{}: {e}", dir.display()))?;
        let mut configs = Vec::new();
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let path = dir.join(name);
            if path.is_file() {
                configs.push(crate::io::read_json::<Value>(&path)?);
            }
        }
        // As transformers does: the map wins over the config, unless the config lists its added
        // tokens.
        if configs.first().is_some_and(|c| c["added_tokens_decoder"].is_null()) {
            configs.reverse();
        }
        let fields = [("bos_token", START), ("eos_token", END), ("pad_token", END)];
        // Special tokens are cut out of a prompt before BPE: with SD 2's pad token, every "!" is
        // padding.
        let added = fields
            .map(|(field, default)| AddedToken::from(special(&configs, field, default), true));
        inner.add_special_tokens(&added);
        let id = |(field, default): (&str, &str)| {
            let token = special(&configs, field, default);
            inner.token_to_id(&token).ok_or_else(|| {
                anyhow!("{}: {field} {token:?} is not in the vocabulary", dir.display())
            })
        };
        let (bos, eos, pad) = (id(fields[0])?, id(fields[1])?, id(fields[2])?);
        // A tokenizer without a limit of its own writes an astronomically large number.
        let own = configs.iter().find_map(|c| c["model_max_length"].as_f64()).filter(|&n| n < 1e9);
        let length = own.map_or(max_tokens, |n| n as usize);
        ensure!(
            (2..=max_tokens).contains(&length),
            "{}: model_max_length = {length} does not fit the text encoder's {max_tokens} tokens",
            dir.display()
        );
        Ok(Self { inner, bos: Some(bos), eos, pad, length, mend: false })
    }

    /// The tokenizer of CLIP's own vocabulary; rows are `length` tokens long and filled with `pad`.
    /// `mend` takes curly quotes, wide letters and HTML's names out of texts first, as open_clip
    /// does.
    ///
    /// # Errors
    /// When there is no room for a token.
    pub fn clip(length: usize, pad: u32, mend: bool) -> Result<Self> {
        ensure!(length > 2, "the text encoder takes {length} tokens, too few for a word");
        let inner = clip_vocabulary()?;
        let end = CLIP_VOCABULARY as u32 - 1;
        Ok(Self { inner, bos: Some(end - 1), eos: end, pad, length, mend })
    }

    /// Loads T5's tokenizer; rows are `length` tokens long.
    ///
    /// # Errors
    /// Names the file that is missing or cannot be used, or the length that is out of range.
    pub fn load_t5(dir: &Path, length: usize) -> Result<Self> {
        ensure!(
            (1..=MOST_TOKENS).contains(&length),
            "--max-sequence-length {length}: must lie between 1 and {MOST_TOKENS} where there is a \
             T5"
        );
        let path = dir.join("tokenizer.json");
        ensure!(
            path.is_file(),
            "{}: missing; a folder with spiece.model alone gets one from \
             `T5TokenizerFast.from_pretrained(..).save_pretrained(..)`",
            path.display()
        );
        let mut inner = from_json(&path)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        let id = |token: &str| {
            inner
                .token_to_id(token)
                .ok_or_else(|| anyhow!("{}: {token:?} is not in the vocabulary", path.display()))
        };
        let (eos, pad) = (id("</s>")?, id("<pad>")?);
        Ok(Self { inner, bos: None, eos, pad, length, mend: false })
    }

    /// Loads BERT's tokenizer, from tokenizer.json or vocab.txt; rows are `length` tokens long.
    ///
    /// # Errors
    /// Names the file that is missing or cannot be used.
    pub fn load_bert(dir: &Path, length: usize) -> Result<Self> {
        let (fast, words) = (dir.join("tokenizer.json"), dir.join("vocab.txt"));
        let path = if fast.is_file() { &fast } else { &words };
        ensure!(
            path.is_file(),
            "{}: missing; put the tokenizer.json or vocab.txt of bert-base-uncased there",
            words.display()
        );
        let fail = |e: tokenizers::Error| anyhow!("{}: cannot be used: {e}", path.display());
        let mut inner = if fast.is_file() {
            from_json(&fast)?
        } else {
            let pieces = WordPiece::from_file(&words.to_string_lossy());
            let pieces = pieces.unk_token("[UNK]".into()).build().map_err(fail)?;
            let mut inner = tokenizers::Tokenizer::new(pieces);
            inner.with_normalizer(Some(BertNormalizer::default()));
            inner.with_pre_tokenizer(Some(BertPreTokenizer));
            inner
        };
        inner.with_padding(None);
        inner.with_truncation(None).map_err(fail)?;
        let names = ["[CLS]", "[SEP]", "[PAD]"];
        inner.add_special_tokens(&names.map(|n| AddedToken::from(n, true)));
        let id = |token: &str| {
            inner
                .token_to_id(token)
                .ok_or_else(|| anyhow!("{}: {token:?} is not in the vocabulary", path.display()))
        };
        let (bos, eos, pad) = (id(names[0])?, id(names[1])?, id(names[2])?);
        Ok(Self { inner, bos: Some(bos), eos, pad, length, mend: false })
    }

    /// The same with another token behind the end of a text, which is cut out of texts like every
    /// special one.
    ///
    /// # Errors
    /// When the vocabulary has no such token.
    pub fn padded_with(mut self, token: &str) -> Result<Self> {
        let pad = self.inner.token_to_id(token);
        self.pad = pad.with_context(|| format!("pad_token {token:?} is not in the vocabulary"))?;
        self.inner.add_special_tokens(&[AddedToken::from(token, true)]);
        Ok(self)
    }

    /// The token behind the end of a text.
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// Entries of the vocabulary.
    pub fn entries(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// One row of exactly `length` tokens: start, text (cut where too long), end, padding.
    ///
    /// # Errors
    /// When the text cannot be tokenized.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mended = if self.mend { mended(text) } else { text.to_string() };
        let encoding =
            self.inner.encode_fast(mended, false).map_err(|e| anyhow!("prompt {text:?}: {e}"))?;
        let mut row: Vec<u32> = self.bos.into_iter().collect();
        row.extend(encoding.get_ids().iter().take(self.length - 1 - row.len()));
        row.push(self.eos);
        row.resize(self.length, self.pad);
        Ok(row)
    }
}
