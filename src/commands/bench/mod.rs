//! `flora bench`: measured tables.

mod case;
mod grid;
mod layers;
pub(crate) mod paper;
mod peaks;
mod peer;
mod planner;
mod report;
pub(crate) mod serving;
mod timed;
mod tuning;

use clap::{Args, Subcommand};

use super::error::CommandError;
pub(crate) use peer::PeerError;

/// Measure, and compare with other programs
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    table: Table,
}

#[derive(Subcommand)]
enum Table {
    Layers(layers::Arguments),
    Planner(planner::Arguments),
    Tuning(tuning::Arguments),
    Paper(paper::Arguments),
    Serving(serving::Arguments),
}

pub(crate) fn bench(arguments: &Arguments) -> Result<(), CommandError> {
    match &arguments.table {
        Table::Layers(arguments) => layers::layers(arguments),
        Table::Planner(arguments) => planner::planner(arguments),
        Table::Tuning(arguments) => tuning::tuning(arguments),
        Table::Paper(arguments) => paper::paper(arguments),
        Table::Serving(arguments) => serving::serving(arguments),
    }
}
