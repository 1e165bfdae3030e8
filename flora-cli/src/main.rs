//! The `flora` command.

mod commands;
mod log;
mod models;

fn main() -> std::process::ExitCode {
    log::start();
    commands::main()
}
