//! A projection as the Burn module that users put in their models: what the suite runs goes through Burn's tensors, on the backend
//! that shares the device's memory. Burn has none for an emulated card, so there the projection runs by itself.

use std::cell::RefCell;

use flora::prelude::*;
use flora_burn::{AdaptedLinear, BurnDevice, Cuda, FloraBackend, Host, LinearError, Planning, StepBatch, Wgpu};
use flora_runtime::{BackendKind, BatchError};

pub(crate) enum OnBurn {
    Host(AdaptedLinear<Host>),
    Wgpu(AdaptedLinear<Wgpu>),
    Cuda(AdaptedLinear<Cuda>),
    Emulated(Box<RefCell<Projection>>),
}

/// Runs an expression on the layer, whatever its backend, or one on the projection.
macro_rules! on {
    ($own:expr, $layer:ident => $do:expr, $projection:ident => $otherwise:expr) => {
        match $own {
            OnBurn::Host($layer) => $do,
            OnBurn::Wgpu($layer) => $do,
            OnBurn::Cuda($layer) => $do,
            OnBurn::Emulated($projection) => $otherwise,
        }
    };
}

impl OnBurn {
    pub(crate) fn new(projection: Projection) -> Self {
        let planning = Planning::Fixed(Plan::default());
        match projection.device().info().backend {
            BackendKind::Host => Self::Host(AdaptedLinear::from_projection(projection, planning)),
            BackendKind::Wgpu => Self::Wgpu(AdaptedLinear::from_projection(projection, planning)),
            BackendKind::Cuda if projection.device().info().software => {
                Self::Emulated(Box::new(RefCell::new(projection)))
            }
            BackendKind::Cuda => Self::Cuda(AdaptedLinear::from_projection(projection, planning)),
            other => panic!("{other:?} has no backend of Burn's here"),
        }
    }

    /// The projection in the module.
    pub(crate) fn with<T>(&self, change: impl FnOnce(&mut Projection) -> T) -> T {
        on!(self, layer => layer.change(change), projection => change(&mut projection.borrow_mut()))
    }

    pub(crate) fn shape(&self) -> LayerShape {
        on!(self, layer => layer.shape(), projection => projection.borrow().shape())
    }

    pub(crate) fn forward(&self, batch: &Batch, plan: &Plan, x: &[f32], residual: Option<&[f32]>) -> Vec<f32> {
        let y = on!(
            self,
            layer => forward(layer, batch, plan, x, residual).map_err(|error| error.to_string()),
            projection => {
                let projection = projection.borrow();
                projection.forward_with_residual(batch, plan, x, residual).map_err(|error| error.to_string())
            }
        );
        y.expect("a batch of loaded adapters runs")
    }
}

fn forward<B: FloraBackend>(
    layer: &AdaptedLinear<B>,
    batch: &Batch,
    plan: &Plan,
    x: &[f32],
    residual: Option<&[f32]>,
) -> Result<Vec<f32>, LinearError> {
    let (device, segments) = layer
        .change(|projection| Ok::<_, BatchError>((projection.device().clone(), projection.segments(batch)?)))
        .expect("names of loaded adapters");
    let target = BurnDevice::<B>::of(&device).expect("its own device");
    let (shape, element) = (layer.shape(), layer.activations());
    let step = StepBatch::new(segments.iter().map(|segment| (segment.adapter, segment.rows)));
    let tensor = |values: &[f32], width: u32| target.upload(values, [step.rows(), width as usize], element);
    let residual = residual.map(|residual| tensor(residual, shape.k)).transpose()?;
    layer.set_planning(Planning::Fixed(*plan));
    let y = layer.forward(tensor(x, shape.d)?, &step, residual)?;
    Ok(y.into_data().convert::<f32>().into_vec().expect("numbers"))
}
