//! The development tasks: what a change is checked with, on a machine with no GPU.
//!
//! One file a task. Each gives the exit code of the process; what to say to people is said by the task itself.

#[cfg(test)]
mod acyclic;
mod api;
mod cargo;
mod gpu;
mod lavapipe;
mod machine_code;
mod program;
mod sanitize;
mod test;
mod wheel;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Development tasks of flora.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs every test: on the host, on software Vulkan with cooperative matrices, and the fuzz tests for a minute.
    Test(test::Arguments),
    /// Leaves a folder that checks, tunes and measures flora on a machine with a GPU but no Rust.
    Gpu(gpu::Arguments),
    /// Prints what bounds the kernels' main loops, beside those of other compilers.
    MachineCode(machine_code::Arguments),
    /// Compares the public items of every library with their listings, or writes these.
    Api(api::Arguments),
    /// Builds the Python package's wheel.
    Wheel(wheel::Arguments),
    /// Runs a program with software Vulkan that has cooperative matrices; also usable as cargo's runner.
    Lavapipe(lavapipe::Arguments),
    /// Runs a program in which kernels of emulated cards are watched for races or wrong accesses; also usable as cargo's runner.
    Sanitize(sanitize::Arguments),
}

fn main() -> ExitCode {
    if let Some(code) = api::as_rustdoc(std::env::args_os()) {
        return code;
    }
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .with_ansi(false)
        .log_internal_errors(false)
        .init();
    match Arguments::parse().command {
        Command::Test(arguments) => test::run(&arguments),
        Command::Api(arguments) => api::run(&arguments),
        Command::Gpu(arguments) => gpu::run(&arguments),
        Command::Wheel(arguments) => wheel::run(&arguments),
        Command::MachineCode(arguments) => machine_code::run(&arguments),
        Command::Lavapipe(arguments) => lavapipe::run(&arguments),
        Command::Sanitize(arguments) => sanitize::run(&arguments),
    }
}
