//! The command line: one file a subcommand, each from its arguments to what it prints.

mod bench;
#[cfg(feature = "serve")]
mod convert;
mod devices;
mod error;
mod explain;
#[cfg(feature = "emit")]
mod export;
#[cfg(feature = "emit")]
mod inspect;
mod kinds;
mod layer;
#[cfg(not(all(feature = "emit", feature = "serve")))]
mod missing;
mod output;
mod plan;
mod planner;
mod plot;
mod report;
mod run;
#[cfg(feature = "emit")]
mod selection;
#[cfg(feature = "serve")]
mod serving;
#[cfg(feature = "serve")]
mod train;
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
    #[cfg(feature = "emit")]
    Inspect(inspect::Arguments),
    #[cfg(not(feature = "emit"))]
    Inspect(missing::Arguments),
    #[cfg(feature = "emit")]
    Export(export::Arguments),
    #[cfg(not(feature = "emit"))]
    Export(missing::Arguments),
    Bench(bench::Arguments),
    Report(report::Arguments),
    #[cfg(feature = "serve")]
    Generate(serving::generate::Arguments),
    #[cfg(feature = "serve")]
    Serve(serving::serve::Arguments),
    #[cfg(feature = "serve")]
    Train(Box<train::Arguments>),
    #[cfg(feature = "serve")]
    Convert(Box<convert::Arguments>),
    #[cfg(not(feature = "serve"))]
    Generate(missing::Arguments),
    #[cfg(not(feature = "serve"))]
    Serve(missing::Arguments),
    #[cfg(not(feature = "serve"))]
    Train(missing::Arguments),
    #[cfg(not(feature = "serve"))]
    Convert(missing::Arguments),
}

/// Runs the command; 0, 1 for an error, 2 for wrong usage.
pub(crate) fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Devices(arguments) => devices::devices(&arguments),
        Command::Tune(arguments) => tune::tune(&arguments),
        Command::Run(arguments) => run::run(&arguments),
        Command::Plan(arguments) => plan::plan(&arguments),
        Command::Explain(arguments) => explain::explain(&arguments),
        #[cfg(feature = "emit")]
        Command::Inspect(arguments) => inspect::inspect(&arguments),
        #[cfg(not(feature = "emit"))]
        Command::Inspect(_) => missing::missing("inspect", "emit"),
        #[cfg(feature = "emit")]
        Command::Export(arguments) => export::export(&arguments),
        #[cfg(not(feature = "emit"))]
        Command::Export(_) => missing::missing("export", "emit"),
        Command::Bench(arguments) => bench::bench(&arguments),
        Command::Report(arguments) => report::report(&arguments),
        #[cfg(feature = "serve")]
        Command::Generate(arguments) => serving::generate::generate(&arguments),
        #[cfg(feature = "serve")]
        Command::Serve(arguments) => serving::serve::serve(&arguments),
        #[cfg(feature = "serve")]
        Command::Train(arguments) => train::train(&arguments),
        #[cfg(feature = "serve")]
        Command::Convert(arguments) => convert::convert(&arguments),
        #[cfg(not(feature = "serve"))]
        Command::Generate(_) => missing::missing("generate", "serve"),
        #[cfg(not(feature = "serve"))]
        Command::Serve(_) => missing::missing("serve", "serve"),
        #[cfg(not(feature = "serve"))]
        Command::Train(_) => missing::missing("train", "serve"),
        #[cfg(not(feature = "serve"))]
        Command::Convert(_) => missing::missing("convert", "serve"),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(&error.to_text());
            ExitCode::FAILURE
        }
    }
}
