//! Devices that are known before they are started: starting one takes a driver, a compiler and a second or two.

use std::fmt;

use crate::device::{Device, DeviceError};
use crate::info::DeviceInfo;

/// A device that may be started.
pub struct Found {
    info: DeviceInfo,
    start: Box<dyn FnOnce(DeviceInfo) -> Result<Device, DeviceError>>,
}

impl fmt::Debug for Found {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Found").field(&self.info.id).finish()
    }
}

impl Found {
    /// A device, and what starts it.
    pub fn new(info: DeviceInfo, start: impl FnOnce(DeviceInfo) -> Result<Device, DeviceError> + 'static) -> Self {
        Self { info, start: Box::new(start) }
    }

    /// What is known of it before it is started.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Starts it and runs a first batch.
    ///
    /// # Errors
    /// A driver or compiler that is missing, a first batch that comes out wrong.
    pub fn start(self) -> Result<Device, DeviceError> {
        (self.start)(self.info)
    }
}
