//! Where coefficients come from: the settings folder, or a quick measurement.

use std::path::PathBuf;

use flora::prelude::*;
use flora_tune::planner::Source;

use super::error::CommandError;
use super::output;

/// The folder of tuning files: `FLORA_CONFIG`, else `flora` in the platform's folder for settings.
pub(crate) fn config_folder() -> Result<PathBuf, CommandError> {
    match std::env::var_os("FLORA_CONFIG").filter(|folder| !folder.is_empty()) {
        Some(folder) => Ok(folder.into()),
        None => dirs::config_dir().map(|folder| folder.join("flora")).ok_or(CommandError::NoConfigFolder),
    }
}

/// A planner for `device`; says on standard error where its coefficients come from, and returns it in a word.
pub(crate) fn for_device(device: &Device) -> Result<(Planner, &'static str), CommandError> {
    let (planner, source) = Planner::for_device(&config_folder()?, device)?;
    let word = match source {
        Source::Saved(path) => {
            output::note(&format!("coefficients: {}", path.display()));
            "saved"
        }
        Source::Measured => {
            output::note("coefficients: measured just now; `flora tune` measures longer and keeps them");
            "measured"
        }
        Source::Replaced(error) => {
            output::note(&format!("warning: {error}\ncoefficients: measured just now"));
            "measured"
        }
    };
    Ok((planner, word))
}
