//! `recipes`: published settings that fit a card.

use anyhow::Result;

use crate::config::recipe::RECIPES;

pub fn run() -> Result<i32> {
    say!("{:<18} {:>9}  what", "recipe", "memory");
    for recipe in &RECIPES {
        say!("{:<18} {:>9}  {}", recipe.name, recipe.memory(), recipe.title());
    }
    say!(
        "\nmemory: by `pcpo-wgpu plan` for 48 prompts, without a reward model\n\
         use: pcpo-wgpu train --recipe NAME --model DIR --prompts FILE --reward SPEC"
    );
    Ok(0)
}
