//! Where the coefficients of a device are kept, and the planner that uses them.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use flora_plan::batch::BatchShape;
use flora_plan::cost::{CoefficientsError, DeviceCoefficients, LayerPrices, PricedLayer};
use flora_plan::layer::LayerFormat;
use flora_plan::model_planner::ModelPlanner;
use flora_plan::plan::{Plan, plan};

use crate::tune::{Effort, tune};
use flora_runtime::{Device, DeviceError};

/// Plans batches for one device.
#[derive(Debug)]
pub struct Planner {
    coefficients: DeviceCoefficients,
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
    pub fn new(coefficients: DeviceCoefficients) -> Self {
        Self { coefficients }
    }

    /// The file of `device` under `folder`.
    pub fn file(folder: &Path, device: &Device) -> PathBuf {
        let readable = |letter: char| if letter.is_ascii_alphanumeric() { letter.to_ascii_lowercase() } else { '-' };
        let name: String = device.info().fingerprint().chars().map(readable).take(200).collect();
        folder.join(format!("{name}.json"))
    }

    /// What is saved for `device` under `folder`.
    ///
    /// # Errors
    /// No file, or one that can't be trusted: damaged, another device's, another version's.
    pub fn saved(folder: &Path, device: &Device) -> Result<DeviceCoefficients, CoefficientsError> {
        let path = Self::file(folder, device);
        DeviceCoefficients::read_for(&path, &device.info().fingerprint(), env!("CARGO_PKG_VERSION"))
    }

    /// A planner for `device`: the saved coefficients, else measured now with little effort and not saved.
    ///
    /// # Errors
    /// The device fails while it is measured.
    pub fn for_device(folder: &Path, device: &Device) -> Result<(Self, Source), DeviceError> {
        let (coefficients, source) = match Self::saved(folder, device) {
            Ok(coefficients) => (coefficients, Source::Saved(Self::file(folder, device))),
            Err(error) => {
                let source = if error.is_missing() { Source::Measured } else { Source::Replaced(error) };
                let formats = [LayerFormat::default()];
                (tune(device, &formats, &Effort::LEAST, |_, _| {})?.coefficients, source)
            }
        };
        Ok((Self::new(coefficients), source))
    }

    /// Saves coefficients for `device` under `folder`, with those that a trustworthy file there has for other formats. One process
    /// at a time: others wait. Written beside the file, then renamed over it, so that whoever reads sees one or the other.
    ///
    /// # Errors
    /// The folder can't be made, locked or written.
    pub fn save(folder: &Path, device: &Device, coefficients: &DeviceCoefficients) -> std::io::Result<PathBuf> {
        std::fs::create_dir_all(folder)?;
        let lock = File::create(folder.join("tuning.lock"))?;
        lock.lock()?;
        let others = Self::saved(folder, device).map_or_else(|_| BTreeMap::new(), |saved| saved.formats);
        let mut all = coefficients.clone();
        for (name, own) in others {
            all.formats.entry(name).or_insert(own);
        }
        let path = Self::file(folder, device);
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer_pretty(&mut file, &all)?;
        file.as_file().sync_all()?;
        file.persist(&path).map_err(|error| error.error)?;
        lock.unlock()?;
        Ok(path)
    }

    /// The coefficients.
    pub fn coefficients(&self) -> &DeviceCoefficients {
        &self.coefficients
    }

    /// `device` as its tuning found that it runs fastest.
    #[must_use]
    pub fn tuned(&self, device: &Device) -> Device {
        device.tuned(&self.coefficients.blueprints)
    }

    /// The prices of a layer.
    pub fn prices(&self, layer: PricedLayer) -> LayerPrices {
        LayerPrices::new(&self.coefficients, layer)
    }

    /// The plan of a batch of this shape; `finishes` where the layer has a bias or an activation. For many batches, keep
    /// [`Self::prices`] or a [`Self::model`].
    pub fn plan(&self, layer: PricedLayer, batch: &BatchShape, finishes: bool) -> Plan {
        plan(&self.prices(layer), batch, finishes)
    }

    /// A planner of all layers of a model, each with whether it has an epilogue.
    pub fn model(&self, layers: impl IntoIterator<Item = (PricedLayer, bool)>) -> ModelPlanner {
        ModelPlanner::new(&self.coefficients, layers)
    }
}
