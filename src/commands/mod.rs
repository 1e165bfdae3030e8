//! The command line: one file a subcommand, each from its arguments to what it prints.

mod bench;
mod devices;
mod error;
mod explain;
mod inspect;
mod kinds;
mod layer;
mod output;
mod plan;
mod planner;
mod report;
mod run;
mod serving;
mod tune;
mod types;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Serves batches in which every request brings its own low-rank adapter.
#[derive(Parser)]
#[command(name = "flora", version, about, max_term_width = 120)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Devices(devices::Arguments),
    Tune(tune::Arguments),
    Run(run::Arguments),
    Plan(plan::Arguments),
    Explain(explain::Arguments),
    Inspect(inspect::Arguments),
    Bench(bench::Arguments),
    Report(report::Arguments),
    Generate(serving::generate::Arguments),
    Serve(serving::serve::Arguments),
}

/// Runs the command; 0, 1 for an error, 2 for wrong usage.
pub(crate) fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Devices(arguments) => devices::devices(&arguments),
        Command::Tune(arguments) => tune::tune(&arguments),
        Command::Run(arguments) => run::run(&arguments),
        Command::Plan(arguments) => plan::plan(&arguments),
        Command::Explain(arguments) => explain::explain(&arguments),
        Command::Inspect(arguments) => inspect::inspect(&arguments),
        Command::Bench(arguments) => bench::bench(&arguments),
        Command::Report(arguments) => report::report(&arguments),
        Command::Generate(arguments) => serving::generate::generate(&arguments),
        Command::Serve(arguments) => serving::serve::serve(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(&error.to_text());
            ExitCode::FAILURE
        }
    }
}
