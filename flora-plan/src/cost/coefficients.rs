//! Measured coefficients of one device, and the file that keeps them.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{GradientKernel, Kernel, Surface};
use crate::blueprints::Blueprints;
use crate::layer::LayerFormat;

/// The version of the file's meaning; a file of another version is measured again, never trusted.
pub const SCHEMA: u32 = 5;

/// Far more than a file of coefficients has; what is longer is cut, and so is no JSON.
const MAX_BYTES: u64 = 16 << 20;

/// What a set without formats says; [`DeviceCoefficients::check`] lets none pass.
static NOTHING: Coefficients =
    Coefficients { seconds_per_mac: BTreeMap::new(), gradients: BTreeMap::new(), error: None };

/// The coefficients of one device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceCoefficients {
    /// [`SCHEMA`] when this was written.
    pub schema: u32,
    /// The version of flora that measured.
    pub flora: String,
    /// What identifies the device: name, backend, driver.
    pub device: String,
    /// Whether its batched matmul multiplies padding.
    pub pads_blocks: bool,
    /// The most bytes that the device takes in one buffer, which some plans would exceed; `None` where memory is the limit.
    pub largest_buffer_bytes: Option<u64>,
    /// c0
    pub seconds_per_launch: f64,
    /// Of c0, as [`Surface::spread`].
    pub launch_spread: f64,
    /// The reciprocal of the effective bandwidth.
    pub seconds_per_byte: f64,
    /// Of the bandwidth, as [`Surface::spread`].
    pub bandwidth_spread: f64,
    /// How kernels cut their work.
    pub blueprints: Blueprints,
    /// By the layer's types, `activations/adapters/weight` as a [`LayerFormat`] is printed. At least one.
    pub formats: BTreeMap<String, Coefficients>,
}

/// The coefficients of one device for layers of one format.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Coefficients {
    /// Seconds per MAC by kernel: c2 is `matmul`, c1 is `low_rank_bmm`.
    pub seconds_per_mac: BTreeMap<Kernel, Surface>,
    /// The same of what computes gradients of adapters' vectors; nothing where that wasn't measured, as on devices that compute none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gradients: BTreeMap<GradientKernel, Surface>,
    /// How far predictions were off on batches that the surfaces weren't made from; `None` where none were held out.
    pub error: Option<FitError>,
}

/// |predicted / measured − 1| over held-out batches and lowerings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FitError {
    /// How many predictions.
    pub points: usize,
    /// Their median error.
    pub median: f64,
    /// The 95th percentile.
    pub p95: f64,
    /// The largest.
    pub largest: f64,
}

impl FitError {
    /// Of predicted and measured seconds; `None` without any.
    pub fn of(pairs: impl IntoIterator<Item = (f64, f64)>) -> Option<Self> {
        let mut errors: Vec<f64> =
            pairs.into_iter().map(|(predicted, measured)| (predicted / measured - 1.0).abs()).collect();
        errors.sort_by(f64::total_cmp);
        let at = |part: f64| errors.get(((errors.len().max(1) - 1) as f64 * part).round() as usize).copied();
        Some(Self { points: errors.len(), median: at(0.5)?, p95: at(0.95)?, largest: at(1.0)? })
    }
}

/// Why a file of coefficients can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoefficientsError {
    /// The file can't be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file isn't what `flora tune` writes.
    #[error("{}: not a tuning file: {reason}; run `flora tune` to measure again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The file is another device's or another version's.
    #[error("{}: measured for {found}, not for {expected}; run `flora tune` to measure again", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it was measured for.
        found: String,
        /// What is wanted.
        expected: String,
    },
}

impl Coefficients {
    /// What makes a set unusable: a missing kernel, a value that is no time.
    fn check(&self) -> Result<(), String> {
        for (name, kernel) in Kernel::TIMED {
            let surface = self.seconds_per_mac.get(&kernel).ok_or_else(|| format!("has no surface for `{name}`"))?;
            surface.check().map_err(|reason| format!("has a surface for `{name}` that {reason}"))?;
            let of_rows = surface.ranks == [1] && surface.adapters == [1];
            if kernel.is_gemm() && !of_rows {
                return Err(format!("has a surface for `{name}` that depends on more than rows"));
            }
        }
        for (name, kernel) in GradientKernel::TIMED.into_iter().filter(|_| !self.gradients.is_empty()) {
            let surface = self.gradients.get(&kernel).ok_or_else(|| format!("has no surface for `{name}`"))?;
            surface.check().map_err(|reason| format!("has a surface for `{name}` that {reason}"))?;
        }
        let is_error = |value: f64| value.is_finite() && value >= 0.0;
        match self.error {
            Some(FitError { median, p95, largest, .. }) if ![median, p95, largest].into_iter().all(is_error) => {
                Err("has an error that is no number".to_owned())
            }
            _ => Ok(()),
        }
    }
}

impl CoefficientsError {
    /// Whether there is no file, rather than one that is wrong.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    }
}

impl DeviceCoefficients {
    /// The coefficients for layers of `format` and the name of the format that they were measured for: its own where there are
    /// any, else those of the same activations, else the first.
    pub fn of_format(&self, format: LayerFormat) -> (&str, &Coefficients) {
        let own = format.to_string();
        let activations = format!("{}/", format.activations);
        let first = || self.formats.iter().next();
        let found = self
            .formats
            .get_key_value(&own)
            .or_else(|| self.formats.iter().find(|(name, _)| name.starts_with(&activations)))
            .or_else(first);
        found.map(|(name, own)| (name.as_str(), own)).unwrap_or(("", &NOTHING))
    }

    /// What makes a set unusable: nothing measured, a missing kernel, a value that is no time.
    pub fn check(&self) -> Result<(), String> {
        for (name, value) in [
            ("seconds_per_launch", self.seconds_per_launch),
            ("launch_spread", self.launch_spread),
            ("seconds_per_byte", self.seconds_per_byte),
            ("bandwidth_spread", self.bandwidth_spread),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(format!("{name} is {value}, which is no time"));
            }
        }
        if self.formats.is_empty() {
            return Err("no format was measured".to_owned());
        }
        self.formats.iter().try_for_each(|(name, own)| own.check().map_err(|reason| format!("`{name}` {reason}")))
    }

    /// Reads a file of whatever device.
    pub fn read(path: &Path) -> Result<Self, CoefficientsError> {
        let mut bytes = Vec::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes))
            .map_err(|source| CoefficientsError::Io { path: path.to_owned(), source })?;
        let damaged = |reason: String| CoefficientsError::Damaged { path: path.to_owned(), reason };
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        match value.get("schema").and_then(serde_json::Value::as_u64) {
            Some(schema) if schema == u64::from(SCHEMA) => {}
            Some(schema) => {
                return Err(CoefficientsError::Foreign {
                    path: path.to_owned(),
                    found: format!("schema {schema}"),
                    expected: format!("schema {SCHEMA}"),
                });
            }
            None => return Err(damaged("no schema version".to_owned())),
        }
        let read: Self = serde_json::from_value(value).map_err(|error| damaged(error.to_string()))?;
        read.check().map_err(damaged)?;
        Ok(read)
    }

    /// Reads the file of `device`; another device's or flora version's is [`CoefficientsError::Foreign`].
    pub fn read_for(path: &Path, device: &str, flora: &str) -> Result<Self, CoefficientsError> {
        let read = Self::read(path)?;
        for (found, expected) in [(&read.device, device), (&read.flora, flora)] {
            if found != expected {
                return Err(CoefficientsError::Foreign {
                    path: path.to_owned(),
                    found: found.clone(),
                    expected: expected.to_owned(),
                });
            }
        }
        Ok(read)
    }
}
