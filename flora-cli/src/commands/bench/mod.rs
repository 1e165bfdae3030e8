//! `flora bench`: measured tables.

mod case;
mod grid;
mod kinds;
mod layers;
pub(crate) mod paper;
mod peaks;
mod peer;
mod planner;
#[cfg(feature = "serve")]
mod quality;
mod report;
#[cfg(feature = "serve")]
pub(crate) mod serving;
pub(crate) mod serving_answer;
mod timed;
mod tuning;

use clap::{Args, Subcommand};

use super::error::CommandError;
#[cfg(not(feature = "serve"))]
use super::missing;
pub(crate) use peer::PeerError;
#[cfg(feature = "serve")]
pub(crate) use quality::PlanError;

/// Measure, and compare with other programs
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    table: Table,
}

#[derive(Subcommand)]
enum Table {
    Layers(layers::Arguments),
    Kinds(kinds::Arguments),
    Planner(planner::Arguments),
    Tuning(tuning::Arguments),
    Paper(paper::Arguments),
    #[cfg(feature = "serve")]
    Serving(serving::Arguments),
    #[cfg(not(feature = "serve"))]
    Serving(missing::Arguments),
    #[cfg(feature = "serve")]
    Quality(quality::Arguments),
    #[cfg(not(feature = "serve"))]
    Quality(missing::Arguments),
}

pub(crate) fn bench(arguments: &Arguments) -> Result<(), CommandError> {
    match &arguments.table {
        Table::Layers(arguments) => layers::layers(arguments),
        Table::Kinds(arguments) => kinds::kinds(arguments),
        Table::Planner(arguments) => planner::planner(arguments),
        Table::Tuning(arguments) => tuning::tuning(arguments),
        Table::Paper(arguments) => paper::paper(arguments),
        #[cfg(feature = "serve")]
        Table::Serving(arguments) => serving::serving(arguments),
        #[cfg(not(feature = "serve"))]
        Table::Serving(_) => missing::missing("bench serving", "serve"),
        #[cfg(feature = "serve")]
        Table::Quality(arguments) => quality::quality(arguments),
        #[cfg(not(feature = "serve"))]
        Table::Quality(_) => missing::missing("bench quality", "serve"),
    }
}
