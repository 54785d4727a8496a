//! What people call the choices of the command line.

use clap::ValueEnum;

/// A choice as the command line writes it.
pub fn name(choice: impl ValueEnum) -> String {
    choice.to_possible_value().expect("no choice is hidden").get_name().to_string()
}
