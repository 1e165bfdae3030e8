//! What a device is, as far as planning, tuning files and people need to know.

use serde::Serialize;

/// Which kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum BackendKind {
    /// This machine's processor.
    Host,
    /// An NVIDIA GPU.
    Cuda,
    /// A GPU through wgpu (Vulkan, Metal, DirectX, WebGPU).
    Wgpu,
}

/// What a device is and which of its features matter.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceInfo {
    /// What `--device` takes to choose it.
    pub id: String,
    /// The device's own name.
    pub name: String,
    /// The kind.
    pub backend: BackendKind,
    /// Driver or compiler.
    pub driver: String,
    /// Whether the processor plays it (a rasteriser, an emulated card); never chosen by itself.
    pub software: bool,
    /// Units that run in lockstep; `None` for the host.
    pub plane_size: Option<u32>,
    /// Bytes of shared memory of one cube; `None` for the host.
    pub shared_memory_bytes: Option<usize>,
    /// The most bytes in one buffer; `None` where nothing but memory limits it.
    pub largest_buffer_bytes: Option<u64>,
    /// Element types that buffers may hold.
    pub element_types: Vec<String>,
    /// Matrix-multiply fragments (cmma): "16x16x16 f16*f16->f32".
    pub fragments: Vec<String>,
}

impl DeviceInfo {
    /// A device that hasn't been started, so that nothing is known of its features.
    pub fn unstarted(id: String, name: String, backend: BackendKind, driver: String, software: bool) -> Self {
        Self {
            id,
            name,
            backend,
            driver,
            software,
            plane_size: None,
            shared_memory_bytes: None,
            largest_buffer_bytes: None,
            element_types: Vec::new(),
            fragments: Vec::new(),
        }
    }

    /// What identifies the device in a tuning file.
    pub fn fingerprint(&self) -> String {
        format!("{} / {} / {}", self.id, self.name, self.driver)
    }
}
