//! The development tasks: what a change is checked with, on a machine with no GPU.
//!
//! One file a task. Each gives the exit code of the process; what to say to people is said by the task itself.

mod lavapipe;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Development tasks of flora.
#[derive(Parser)]
#[command(name = "cargo xtask", version)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Runs a program with software Vulkan that has cooperative matrices; also usable as cargo's runner.
    Lavapipe(lavapipe::Arguments),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Task::Lavapipe(arguments) => lavapipe::run(&arguments),
    }
}
