//! Recipes: published settings that fit a card, as TOML files with their source.

use anyhow::{Context, Result, anyhow};

use super::options::Options;

/// Settings by name.
pub struct Recipe {
    /// What `--recipe` calls it.
    pub name: &'static str,
    text: &'static str,
}

macro_rules! recipes {
    ($($name:literal),*) => {
        [$(Recipe { name: $name, text: include_str!(concat!("recipes/", $name, ".toml")) }),*]
    };
}

/// All recipes, by what they need.
pub const RECIPES: [Recipe; 11] = recipes!(
    "sd15-6gb",
    "sd15-branch-6gb",
    "sd35m-12gb",
    "sd35m-16gb",
    "sd35m-branch-16gb",
    "sd35m-nft-16gb",
    "sd35m-awm-16gb",
    "flux2-klein-12gb",
    "flux-12gb",
    "z-image-turbo-16gb",
    "flux-24gb"
);

impl Recipe {
    /// The recipe of a name.
    ///
    /// # Errors
    /// Names those that are there.
    pub fn find(name: &str) -> Result<&'static Self> {
        RECIPES.iter().find(|recipe| recipe.name == name).ok_or_else(|| {
            let all: Vec<&str> = RECIPES.iter().map(|recipe| recipe.name).collect();
            anyhow!("--recipe {name}: there is none of that name; {} are there", all.join(", "))
        })
    }

    /// What it is for, in a line.
    pub fn title(&self) -> &'static str {
        self.comment(0)
    }

    /// The memory that `plan` found for it with 48 prompts, all of it on the device, and no reward
    /// model.
    pub fn memory(&self) -> &'static str {
        self.comment(1).trim_start_matches("Memory: ")
    }

    fn comment(&self, line: usize) -> &'static str {
        self.text.lines().nth(line).map_or("", |line| line.trim_start_matches("# "))
    }

    /// Its settings.
    ///
    /// # Errors
    /// When its file is damaged.
    pub fn options(&self) -> Result<Options> {
        toml::from_str(self.text).with_context(|| format!("--recipe {}", self.name))
    }
}
