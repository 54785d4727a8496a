//! The command line: what can be said, and who does it. Nothing else prints.

/// Prints a line.
macro_rules! say {
    ($($text:tt)*) => { $crate::cli::line(&mut std::io::stdout(), format_args!($($text)*)) };
}
/// Prints a line about what is wrong.
macro_rules! complain {
    ($($text:tt)*) => { $crate::cli::line(&mut std::io::stderr(), format_args!($($text)*)) };
}

/// Writes a line. That nobody reads it, since the terminal or the pipe was closed, ends nothing.
fn line(to: &mut dyn std::io::Write, text: std::fmt::Arguments) {
    let _ = to.write_fmt(format_args!("{text}\n"));
}

mod args;
mod commands;
pub mod console;
mod draw;
mod listeners;

use anyhow::Result;
use clap::{Parser, Subcommand};

use self::commands::{
    bench, check, compare, convert, credit, devices, embed, eval, plan, recipes, sample, score,
    serve, train,
};

/// Aligns text-to-image models with a reward by policy gradients (PCPO), on any GPU, without CUDA.
#[derive(Parser)]
#[command(version, about, args_override_self = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// What the program does.
#[derive(Subcommand)]
pub enum Command {
    /// Train a LoRA towards a reward; without arguments, the embedded model's job
    #[command(allow_negative_numbers = true)]
    Train(Box<train::TrainArgs>),
    /// Estimate the memory that a run needs, from shapes alone; takes the flags of train
    #[command(allow_negative_numbers = true)]
    Plan(Box<plan::PlanArgs>),
    /// Train by several methods on several seeds, and hold them against each other; takes the flags
    /// of train
    #[command(allow_negative_numbers = true)]
    Compare(Box<compare::CompareArgs>),
    /// List published settings that fit a card, for `--recipe`
    Recipes,
    /// Draw images from prompts
    #[command(allow_negative_numbers = true)]
    Sample(Box<sample::SampleArgs>),
    /// Measure a model with its adapter, or pictures that exist: rewards, distances, diversity
    #[command(allow_negative_numbers = true)]
    Eval(Box<eval::EvalArgs>),
    /// Score pictures that exist by rewards
    #[command(allow_negative_numbers = true)]
    Score(score::ScoreArgs),
    /// Show runs live in a browser, with Stop, Sample now and Save now
    Serve(serve::ServeArgs),
    /// Compare a model folder with a reference file of diffusers
    #[command(allow_negative_numbers = true)]
    Check(check::CheckArgs),
    /// Print the credit weights of a schedule
    #[command(allow_negative_numbers = true)]
    Credit(credit::CreditArgs),
    /// Encode prompts once, so that training needs no text encoder
    Embed(embed::EmbedArgs),
    /// List the devices and what `auto` takes
    Devices,
    /// Rewrite an adapter in another layout
    Convert(convert::ConvertArgs),
    /// Time the shaders on a device
    Bench(bench::BenchArgs),
}

/// Runs a command; the number is the exit code.
///
/// # Errors
/// Anything that keeps the command from its end; `main` prints it and exits with 2.
pub fn run(cli: Cli) -> Result<i32> {
    match cli.command {
        Command::Train(args) => train::run(*args),
        Command::Plan(args) => plan::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Recipes => recipes::run(),
        Command::Sample(args) => sample::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Score(args) => score::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Credit(args) => credit::run(&args),
        Command::Embed(args) => embed::run(&args),
        Command::Devices => devices::run(),
        Command::Convert(args) => convert::run(&args),
        Command::Bench(args) => bench::run(&args),
    }
}
