//! Chooses plans with the coefficients of one device.

use std::path::{Path, PathBuf};

use flora_codegen::batch::BatchShape;
use flora_codegen::cost::{Coefficients, CoefficientsError};
use flora_codegen::layer::LayerShape;
use flora_codegen::plan::{Plan, plan};

use crate::device::{Device, DeviceError};
use crate::tune::{Effort, tune};

/// Plans batches for one device.
#[derive(Debug)]
pub struct Planner {
    coefficients: Coefficients,
}

/// Where a planner's coefficients came from.
#[derive(Debug)]
pub enum Source {
    /// A file that `flora tune` wrote for this device.
    Saved(PathBuf),
    /// A quick measurement, because there was no file.
    Measured,
    /// A quick measurement, because the file can't be trusted.
    Replaced(CoefficientsError),
}

impl Planner {
    /// A planner with these coefficients.
    pub fn new(coefficients: Coefficients) -> Self {
        Self { coefficients }
    }

    /// The file of `device` under `folder`.
    pub fn file(folder: &Path, device: &Device) -> PathBuf {
        let readable = |letter: char| if letter.is_ascii_alphanumeric() { letter.to_ascii_lowercase() } else { '-' };
        let name: String = device.info().fingerprint().chars().map(readable).take(200).collect();
        folder.join(format!("{name}.json"))
    }

    /// A planner for `device`: the saved coefficients, else measured now with little effort and not saved.
    ///
    /// # Errors
    /// The device fails while it is measured.
    pub fn for_device(folder: &Path, device: &Device) -> Result<(Self, Source), DeviceError> {
        let path = Self::file(folder, device);
        let saved = Coefficients::read_for(&path, &device.info().fingerprint(), env!("CARGO_PKG_VERSION"));
        let (coefficients, source) = match saved {
            Ok(coefficients) => (coefficients, Source::Saved(path)),
            Err(error) => {
                let missing = matches!(&error, CoefficientsError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound);
                let source = if missing { Source::Measured } else { Source::Replaced(error) };
                (tune(device, Effort::QUICK, |_, _| {})?.coefficients, source)
            }
        };
        Ok((Self::new(coefficients), source))
    }

    /// Saves coefficients for `device` under `folder`: written beside the file, then renamed over it.
    ///
    /// # Errors
    /// The folder can't be made or written.
    pub fn save(folder: &Path, device: &Device, coefficients: &Coefficients) -> std::io::Result<PathBuf> {
        let path = Self::file(folder, device);
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer_pretty(&mut file, coefficients)?;
        file.as_file().sync_all()?;
        file.persist(&path).map_err(|error| error.error)?;
        Ok(path)
    }

    /// The coefficients.
    pub fn coefficients(&self) -> &Coefficients {
        &self.coefficients
    }

    /// The plan of a batch of this shape; `finishes` where the layer has a bias or an activation.
    pub fn plan(&self, shape: LayerShape, batch: &BatchShape, finishes: bool) -> Plan {
        plan(shape, batch, finishes, &self.coefficients)
    }
}
