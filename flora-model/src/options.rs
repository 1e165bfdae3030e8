//! How a model is put on a device.

use flora_adapters::BaseForm;
use flora_plan::cost::DeviceCoefficients;
use flora_plan::layer::Element;
use flora_plan::plan::Plan;

/// How a model is put on a device.
#[derive(Clone, Debug)]
pub struct ServeOptions<'a> {
    /// Which modules may be adapted, by the last part of their path, as PEFT's `target_modules` says it. An adapter of any other
    /// module is refused. Empty: every projection, the token embedding and the output matrix.
    pub adapted: Vec<String>,
    /// The form of base weights. An [`AdapterDirectory`](crate::AdapterDirectory) is told of it too, with `over`.
    pub base: BaseForm,
    /// The type of activations, keys and values.
    pub activations: Element,
    /// The type of adapters.
    pub adapters: Element,
    /// The most bytes that the resident adapters take, over all projections: taken as adapters come, and given back for others.
    pub adapter_bytes: u64,
    /// The name of an adapter whose weights are kept in every projection that it adapts, as long as it is resident: its rows are
    /// multiplied by them where the plan [merges](Plan::merges), whatever else is in their batch. They take memory beside
    /// `adapter_bytes`, as much as [`AdapterDirectory::merged_bytes`](crate::AdapterDirectory::merged_bytes) says.
    pub merged: Option<String>,
    /// Tokens that all sequences have at most: the engine's. A device's memory for keys and values grows to as much, in blocks; the
    /// host's grows as long as there are more.
    pub cache_tokens: usize,
    /// How lowerings are chosen.
    pub planning: PlanningChoice<'a>,
}

/// How lowerings are chosen.
#[derive(Clone, Copy, Debug)]
pub enum PlanningChoice<'a> {
    /// Always these.
    Fixed(Plan),
    /// The cheapest of each step's batch, by what was measured on the device.
    Priced(&'a DeviceCoefficients),
}

impl Default for PlanningChoice<'_> {
    fn default() -> Self {
        Self::Fixed(Plan::fixed())
    }
}

impl Default for ServeOptions<'_> {
    fn default() -> Self {
        Self {
            adapted: Vec::new(),
            base: BaseForm::Stored,
            activations: Element::F32,
            adapters: Element::F32,
            adapter_bytes: 256 << 20,
            merged: None,
            cache_tokens: 1 << 14,
            planning: PlanningChoice::default(),
        }
    }
}
