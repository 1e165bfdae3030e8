//! The `flora` command.

mod commands;
mod log;
mod memory;
mod models;

fn main() -> std::process::ExitCode {
    memory::keep_freed();
    log::start();
    commands::main()
}
