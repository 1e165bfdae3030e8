//! Measured coefficients of one device, and the file that keeps them.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Kernel;

/// The version of the file's meaning; a file of another version is measured again, never trusted.
pub const SCHEMA: u32 = 2;

/// Far more than a file of coefficients has; what is longer is cut, and so is no JSON.
const MAX_BYTES: u64 = 1 << 20;

/// Seconds per MAC at measured points, interpolated on logarithmic axes and constant beyond the ends.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Curve {
    /// (regime, seconds per MAC), regimes rising.
    pub points: Vec<(u64, f64)>,
}

impl Curve {
    /// The value at `regime`; `None` for a curve without points.
    pub fn at(&self, regime: u64) -> Option<f64> {
        let (first, last) = (self.points.first()?, self.points.last()?);
        if regime <= first.0 {
            return Some(first.1);
        }
        let Some(next) = self.points.iter().position(|point| point.0 >= regime) else {
            return Some(last.1);
        };
        let ((x0, y0), (x1, y1)) = (self.points[next - 1], self.points[next]);
        let position = ((regime as f64).ln() - (x0 as f64).ln()) / ((x1 as f64).ln() - (x0 as f64).ln());
        Some((y0.ln() + position * (y1.ln() - y0.ln())).exp())
    }

    fn check(&self) -> Result<(), String> {
        if self.points.is_empty() {
            return Err("has no points".to_owned());
        }
        if self.points.windows(2).any(|pair| pair[0].0 >= pair[1].0) || self.points[0].0 == 0 {
            return Err("has regimes that don't rise from 1".to_owned());
        }
        match self.points.iter().find(|point| !(point.1.is_finite() && point.1 > 0.0)) {
            Some(point) => Err(format!("holds {} at {}, which is no time", point.1, point.0)),
            None => Ok(()),
        }
    }
}

/// The coefficients of one device and element type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Coefficients {
    /// [`SCHEMA`] when this was written.
    pub schema: u32,
    /// The version of flora that measured.
    pub flora: String,
    /// What identifies the device: name, backend, driver.
    pub device: String,
    /// Whether its batched matmul multiplies padding and its tiles of W_i serve a tile's rows only: false on the host.
    pub pads_blocks: bool,
    /// The most bytes that the device takes in one buffer, which some plans would exceed; `None` where memory is the limit.
    pub largest_buffer_bytes: Option<u64>,
    /// c0
    pub seconds_per_launch: f64,
    /// The reciprocal of the effective bandwidth.
    pub seconds_per_byte: f64,
    /// Seconds per MAC by kernel: c2 is `matmul`, c1 is `low_rank_bmm`.
    pub seconds_per_mac: BTreeMap<Kernel, Curve>,
}

/// Why a file of coefficients can't be used.
#[derive(Debug, thiserror::Error)]
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
    /// The kernels that a complete set has a curve for, in the order in which one's time explains another's.
    pub const KERNELS: [Kernel; 8] = [
        Kernel::Matmul,
        Kernel::Stacked,
        Kernel::OnChip,
        Kernel::Bmm,
        Kernel::Fused,
        Kernel::LowRankBmm,
        Kernel::Segmented,
        Kernel::Materialise,
    ];

    /// Seconds per MAC; 0 for [`Kernel::Move`], whose cost is its bytes.
    pub fn seconds_per_mac(&self, kernel: Kernel, regime: u64) -> f64 {
        self.seconds_per_mac.get(&kernel).and_then(|curve| curve.at(regime)).unwrap_or(0.0)
    }

    /// What makes a set unusable: a missing curve, a value that is no time.
    pub fn check(&self) -> Result<(), String> {
        for (name, value) in
            [("seconds_per_launch", self.seconds_per_launch), ("seconds_per_byte", self.seconds_per_byte)]
        {
            if !(value.is_finite() && value >= 0.0) {
                return Err(format!("{name} is {value}, which is no time"));
            }
        }
        for kernel in Self::KERNELS {
            match self.seconds_per_mac.get(&kernel) {
                None => return Err(format!("no curve for {kernel:?}")),
                Some(curve) => curve.check().map_err(|reason| format!("the curve of {kernel:?} {reason}"))?,
            }
        }
        Ok(())
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
