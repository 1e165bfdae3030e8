//! The `flora` command.

mod commands;
mod models;

fn main() -> std::process::ExitCode {
    commands::main()
}
