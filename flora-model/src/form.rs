//! How a weight becomes a projection of a model, for the model's own weights and for those that adapters bring along.

use flora_adapters::BaseForm;
use flora_ir::Activation;
use flora_plan::cost::{DeviceCoefficients, LayerPrices, PricedLayer};
use flora_plan::layer::{Element, LayerFormat};
use flora_plan::plan::Plan;
use flora_plan::weight::PackedWeight;
use flora_runtime::{Device, PlannedProjection, Planning, ProjectionError, ProjectionOptions};

use crate::options::{PlanningChoice, ServeOptions};

/// What all projections of a model have in common.
#[derive(Clone, Debug)]
pub(crate) struct ProjectionForm {
    pub(crate) device: Device,
    pub(crate) base: BaseForm,
    pub(crate) activations: Element,
    pub(crate) adapters: Element,
    planning: FormPlanning,
}

#[derive(Clone, Debug)]
enum FormPlanning {
    Fixed(Plan),
    Priced(Box<DeviceCoefficients>),
}

/// What follows a projection's product.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Finish {
    #[default]
    Nothing,
    Activation(Activation),
    /// The step's residual is added.
    Residual,
}

impl ProjectionForm {
    pub(crate) fn new(device: &Device, options: &ServeOptions<'_>) -> Self {
        let ServeOptions { base, activations, adapters, planning, .. } = *options;
        let planning = match planning {
            PlanningChoice::Fixed(plan) => FormPlanning::Fixed(plan),
            PlanningChoice::Priced(coefficients) => FormPlanning::Priced(Box::new(coefficients.clone())),
        };
        Self { device: device.clone(), base, activations, adapters, planning }
    }

    pub(crate) fn projection(
        &self,
        weight: &PackedWeight,
        bias: Option<&[f32]>,
        finish: Finish,
    ) -> Result<PlannedProjection, ProjectionError> {
        let Self { activations, adapters, .. } = *self;
        let (activation, residual) = match finish {
            Finish::Nothing => (Activation::Identity, false),
            Finish::Activation(activation) => (activation, false),
            Finish::Residual => (Activation::Identity, true),
        };
        let options = ProjectionOptions { bias, activation, residual, activations, adapters, fragments: true };
        let planning = match &self.planning {
            FormPlanning::Fixed(plan) => Planning::Fixed(*plan),
            FormPlanning::Priced(coefficients) => {
                let format = LayerFormat { activations, adapters, weight: weight.format(), fragments: true };
                let layer = PricedLayer { shape: weight.shape(), format };
                Planning::Priced(Box::new(LayerPrices::new(coefficients, layer)))
            }
        };
        PlannedProjection::new(&self.device, weight, options, planning)
    }
}
