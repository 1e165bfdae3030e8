//! The `flora` command.

mod commands;
mod models;

fn main() -> std::process::ExitCode {
    // What the crates below have to say, beside the command's own answers.
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .with_ansi(false)
        .log_internal_errors(false)
        .init();
    commands::main()
}
