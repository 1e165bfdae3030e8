//! `flora report`: what was measured, as one page that needs nothing else.
//!
//! Files ([`input`], [`model`]) become plain data ([`page`]), data becomes sections ([`sections`]) of blocks and charts ([`plot`](super::plot)),
//! and those become HTML ([`document`]).

mod document;
mod input;
mod model;
mod page;
mod sections;

use std::path::{Path, PathBuf};

use askama::Template;
use clap::Args;
use flora::prelude::*;
use serde::Serialize;

use super::bench::paper::panels;
use super::error::CommandError;
use super::{output, planner};
pub(crate) use input::InputError;
use page::{Page, PaperPanel, Prediction};

/// Write what was measured as one HTML page: coefficients, rooflines, the paper's curves, the planner's regret, serving
///
/// The page is a single file without scripts. What isn't given is left out; the page says which command measures it.
#[derive(Args)]
pub(crate) struct Arguments {
    /// The device whose coefficients are shown, as `flora devices` lists it
    #[arg(long, default_value = "auto")]
    device: String,
    /// A tuning file to show in place of the device's own
    #[arg(long, conflicts_with = "device")]
    coefficients: Option<PathBuf>,
    /// A file of `flora bench paper --json`; may be repeated
    #[arg(long, value_name = "FILE")]
    paper: Vec<PathBuf>,
    /// A file of `flora bench planner --json`; may be repeated
    #[arg(long, value_name = "FILE")]
    planner: Vec<PathBuf>,
    /// A file of `flora bench serving --json`; may be repeated
    #[arg(long, value_name = "FILE")]
    serving: Vec<PathBuf>,
    /// The page
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    output: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The most panels of the paper's curves, so that the page stays one that a browser shows.
const MOST_PANELS: usize = 500;

#[derive(Serialize)]
struct Answer<'a> {
    output: &'a Path,
    bytes: usize,
    has_coefficients: bool,
    paper_panels: usize,
    planner_grids: usize,
    serving_runs: usize,
}

pub(crate) fn report(arguments: &Arguments) -> Result<(), CommandError> {
    let page = read(arguments)?;
    let html =
        sections::document(&page).render().map_err(|error| CommandError::Output(std::io::Error::other(error)))?;
    output::replace(&arguments.output, html.as_bytes())?;
    let answer = Answer {
        output: &arguments.output,
        bytes: html.len(),
        has_coefficients: page.model.is_some(),
        paper_panels: page.paper.len(),
        planner_grids: page.planner.len(),
        serving_runs: page.serving.len(),
    };
    if arguments.json {
        return output::print_json(&answer);
    }
    output::print(&format!("{} ({})\n", answer.output.display(), output::bytes(answer.bytes as u64)))
}

/// Everything that was given.
fn read(arguments: &Arguments) -> Result<Page, CommandError> {
    let coefficients = match &arguments.coefficients {
        Some(path) => Some(DeviceCoefficients::read(path)?),
        None => saved(&devices::open(&arguments.device)?)?,
    };
    let mut records = Vec::new();
    for path in &arguments.paper {
        records.extend(input::paper(path)?);
    }
    let panels = panels(&records);
    if panels.len() > MOST_PANELS {
        let (found, limit) = (panels.len() as u64, MOST_PANELS as u64);
        return Err(CommandError::TooMany {
            what: "the layers, batches and formats of the --paper files",
            found,
            limit,
        });
    }
    let paper = panels.into_iter().map(|panel| {
        let prediction = match &coefficients {
            Some(coefficients) => model::predict(coefficients, &panel.coordinates, &panel.curves)?,
            None => Prediction::None("there are no coefficients"),
        };
        let own = records.iter().filter(|record| panel.coordinates.holds(record));
        Ok(PaperPanel {
            base_seconds: panel.base_seconds,
            records: own.cloned().collect(),
            measured: panel.curves,
            prediction,
            coordinates: panel.coordinates,
        })
    });
    Ok(Page {
        paper: paper.collect::<Result<_, CommandError>>()?,
        model: coefficients.as_ref().map(model::model),
        planner: arguments.planner.iter().map(|path| input::planner(path)).collect::<Result<_, _>>()?,
        serving: arguments.serving.iter().map(|path| input::serving(path)).collect::<Result<_, _>>()?,
    })
}

/// The device's own coefficients, if it has any that can be used.
fn saved(device: &Device) -> Result<Option<DeviceCoefficients>, CommandError> {
    match Planner::saved(&planner::config_folder()?, device) {
        Ok(coefficients) => Ok(Some(coefficients)),
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => {
            output::note(&format!("warning: {error}\nthe page has no coefficients"));
            Ok(None)
        }
    }
}
