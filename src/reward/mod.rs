//! Rewards: a picture and its prompt to a number, higher is better. The set is open: [`REWARDS`]
//! lists what `--reward` names, and a library's user brings an own [`Reward`].

mod builtin;
mod command;
mod score;

use anyhow::{Result, anyhow, ensure};

pub use self::score::{Reward, score};

/// A reward that `--reward` can name.
pub struct Named {
    /// What stands before the colon.
    pub name: &'static str,
    /// What stands behind the colon, for people.
    pub argument: Option<&'static str>,
    /// Makes it of what stands behind the colon.
    open: fn(&str) -> Result<Box<dyn Reward>>,
}

/// What `--reward` can name; help texts and errors list it from here.
pub const REWARDS: [Named; 5] = [
    Named {
        name: "jpeg-compressibility",
        argument: None,
        open: |_| Ok(Box::new(builtin::Jpeg { sign: -1.0 })),
    },
    Named {
        name: "jpeg-incompressibility",
        argument: None,
        open: |_| Ok(Box::new(builtin::Jpeg { sign: 1.0 })),
    },
    Named { name: "symmetry", argument: None, open: |_| Ok(Box::new(builtin::Symmetry)) },
    Named {
        name: "color",
        argument: Some("NAME"),
        open: |name| Ok(Box::new(builtin::Color::named(name)?)),
    },
    Named {
        name: "command",
        argument: Some("PROGRAM"),
        open: |program| Ok(Box::new(command::Command::start(program)?)),
    },
];

/// All rewards in one line: `a, b and c:ARGUMENT`.
pub fn list() -> String {
    let mut all: Vec<String> = REWARDS
        .iter()
        .map(|r| r.argument.map_or(r.name.to_string(), |a| format!("{}:{a}", r.name)))
        .collect();
    let last = all.pop().unwrap_or_default();
    format!("{} and {last}", all.join(", "))
}

/// Makes the reward that `--reward` names.
///
/// # Errors
/// Names the value and what is supported.
pub fn parse(spec: &str) -> Result<Box<dyn Reward>> {
    let (name, argument) = match spec.split_once(':') {
        Some((name, argument)) => (name, Some(argument)),
        None => (spec, None),
    };
    let found = REWARDS.iter().find(|r| r.name == name);
    let named = found.ok_or_else(|| anyhow!("--reward {spec}: unknown; {} are there", list()))?;
    ensure!(
        argument.is_none() || named.argument.is_some(),
        "--reward {spec}: {name} takes nothing behind a colon; write --reward {name}"
    );
    (named.open)(argument.unwrap_or_default())
}
