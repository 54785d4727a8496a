//! The processes of a job. Every one of them does the same in the same order; where they exchange
//! something, one that has failed says so instead, and all end with its error.

use std::sync::Arc;

use anyhow::{Context, Error, Result, anyhow, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::trajectory::NotFinite;
use crate::device::chosen::OnHost;
use crate::stop;

/// What carries bytes between processes. All of them call the same in the same order.
pub trait Link: Send + Sync {
    /// Of this process, from 0, and how many there are.
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    /// What each process gives, in the order of their ranks, to that of rank 0; nothing elsewhere.
    ///
    /// # Errors
    /// When a process cannot be reached.
    fn gather(&self, own: Vec<u8>) -> Result<Vec<Vec<u8>>>;
    /// What the process of rank 0 gives, to all.
    ///
    /// # Errors
    /// When a process cannot be reached.
    fn cast(&self, of_first: Vec<u8>) -> Result<Vec<u8>>;
}

/// The processes of a job: this one alone, or linked ones.
#[derive(Clone, Default)]
pub struct World {
    link: Option<Arc<dyn Link>>,
    /// The machine of each, by their ranks.
    hosts: Vec<String>,
}

/// What all have learnt of an error in one process.
#[derive(Debug)]
struct Agreed(String);

impl std::fmt::Display for Agreed {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// How an exchange begins: whether each process has what the others wait for.
#[derive(Serialize, Deserialize)]
struct Failure {
    text: String,
    not_finite: bool,
    /// Whether it is the user's wish.
    stopped: bool,
}

impl Failure {
    fn of(error: &Error) -> Self {
        let (text, not_finite) = (format!("{error:#}"), error.is::<NotFinite>());
        Self { text, not_finite, stopped: stop::requested() }
    }

    fn error(self, from: String) -> Error {
        let Self { text, not_finite, stopped } = self;
        if stopped {
            stop::request();
        }
        let cause = if not_finite { NotFinite(text).into() } else { Error::msg(text) };
        cause.context(Agreed(from))
    }
}

impl World {
    /// This process of several.
    ///
    /// # Errors
    /// When a process cannot be reached.
    pub fn linked(link: impl Link + 'static, host: String) -> Result<Self> {
        let world = Self { link: Some(Arc::new(link)), hosts: Vec::new() };
        let hosts = world.all(Ok(host))?;
        Ok(Self { hosts, ..world })
    }

    pub fn rank(&self) -> usize {
        self.link.as_ref().map_or(0, |link| link.rank())
    }

    pub fn size(&self) -> usize {
        self.link.as_ref().map_or(1, |link| link.size())
    }

    /// Whether this process writes, draws randomness of its own and talks: that of rank 0.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// How a process is called in messages.
    pub fn name(&self, rank: usize) -> String {
        match self.hosts.get(rank) {
            Some(host) => format!("rank {rank} on {host}"),
            None => format!("rank {rank}"),
        }
    }

    /// The machine of a process.
    pub fn host(&self, rank: usize) -> &str {
        self.hosts.get(rank).map_or("", String::as_str)
    }

    /// Which of the processes on its machine this one is.
    pub fn on_host(&self) -> OnHost {
        let (own, before) = (self.host(self.rank()), self.hosts.iter().take(self.rank()));
        let of = self.hosts.iter().filter(|host| *host == own).count().max(1);
        OnHost { index: before.filter(|host| *host == own).count(), of }
    }

    /// A result that all processes have: the first error of any is every one's.
    ///
    /// # Errors
    /// This process's own, or that of another, which is named.
    pub fn agree<T>(&self, own: Result<T>) -> Result<T> {
        let Some(link) = &self.link else { return own };
        let own = match own {
            // All have heard it already.
            Err(e) if e.is::<Agreed>() => return Err(e),
            other => other,
        };
        let said = encode(&own.as_ref().err().map(Failure::of))?;
        let all = link.gather(said)?;
        let failures: Vec<Option<Failure>> =
            all.iter().map(|bytes| decode(bytes)).collect::<Result<_>>()?;
        let first = failures.into_iter().enumerate().find_map(|(rank, f)| Some((rank, f?)));
        let first: Option<(usize, Failure)> = decode(&link.cast(encode(&first)?)?)?;
        match (first, own) {
            (None, own) => own,
            (Some((rank, failure)), _) => Err(failure.error(self.name(rank))),
        }
    }

    /// What each process has, in the order of their ranks, to all of them.
    ///
    /// # Errors
    /// As [`Self::agree`].
    pub fn all<T: Serialize + DeserializeOwned>(&self, own: Result<T>) -> Result<Vec<T>> {
        let own = self.agree(own)?;
        let Some(link) = &self.link else { return Ok(vec![own]) };
        let gathered = link.gather(encode(&own)?)?;
        let all: Vec<Vec<u8>> = decode(&link.cast(encode(&gathered)?)?)?;
        all.iter().map(|bytes| decode(bytes)).collect()
    }

    /// What each process has, in the order of their ranks, to that of rank 0; nothing elsewhere.
    ///
    /// # Errors
    /// As [`Self::agree`].
    pub fn gather<T: Serialize + DeserializeOwned>(&self, own: Result<T>) -> Result<Vec<T>> {
        let own = self.agree(own)?;
        let Some(link) = &self.link else { return Ok(vec![own]) };
        let gathered = link.gather(if self.is_first() { Vec::new() } else { encode(&own)? })?;
        let mut own = Some(own);
        let each = |(rank, bytes): (usize, &Vec<u8>)| match rank {
            0 => own.take().context("there is one process of rank 0"),
            _ => decode(bytes),
        };
        gathered.iter().enumerate().map(each).collect()
    }

    /// What the process of rank 0 has, to all; the others give nothing.
    ///
    /// # Errors
    /// As [`Self::agree`].
    pub fn from_first<T: Serialize + DeserializeOwned>(
        &self,
        of_first: Option<Result<T>>,
    ) -> Result<T> {
        let own = self.agree(of_first.transpose())?;
        let missing = || anyhow!("the process of rank 0 gives nothing");
        let Some(link) = &self.link else { return own.ok_or_else(missing) };
        let bytes = link.cast(own.as_ref().map(encode).transpose()?.unwrap_or_default())?;
        match own {
            Some(own) => Ok(own),
            None => decode(&bytes),
        }
    }

    /// Checks that all processes say the same.
    ///
    /// # Errors
    /// Names the process that differs and both values.
    pub fn ensure_alike(&self, what: &str, own: &str, way_out: &str) -> Result<()> {
        let all = self.all(Ok(own.to_string()))?;
        for (rank, other) in all.iter().enumerate() {
            let name = self.name(rank);
            let (first, other) = difference(&all[0], other);
            ensure!(first == other, "{what} of {name} is {other}, of rank 0 {first}; {way_out}");
        }
        Ok(())
    }
}

/// Texts, or of those with several lines the first that differ.
fn difference<'a>(a: &'a str, b: &'a str) -> (&'a str, &'a str) {
    let differ = a.lines().zip(b.lines()).find(|(a, b)| a != b);
    differ.unwrap_or((a, b))
}

fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>> {
    postcard::to_allocvec(value).context("what processes exchange")
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    postcard::from_bytes(bytes).context("what processes exchange")
}
