//! How a model is put on a device.

use flora_adapters::BaseForm;
use flora_plan::cost::DeviceCoefficients;
use flora_plan::layer::Element;
use flora_plan::lowering::{AdditiveLowering, MultiplicativeLowering};
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
    /// Tokens by which a sequence's keys and values grow on a device: the engine's block. The host's grow by blocks of its own.
    pub block_tokens: u32,
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

/// Rows from which a segment of a multiplicative adapter gets its W_i on chip: fewer cost less as virtual rows (`stacked`) on every
/// device that was measured.
const ON_CHIP_FROM: u32 = 8;

impl Default for PlanningChoice<'_> {
    /// The fused launch, each segment's lowering by its own rows: what else is in the batch changes nothing.
    fn default() -> Self {
        let plan = Plan::new(MultiplicativeLowering::OnChip, AdditiveLowering::Fused);
        Self::Fixed(plan.with_on_chip_from(ON_CHIP_FROM))
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
            block_tokens: 32,
            planning: PlanningChoice::default(),
        }
    }
}
