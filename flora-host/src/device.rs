//! The host as a device: the same schedules on the processor. The default where there is no GPU, and a device of its own for the
//! cost model.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use flora_plan::blueprints::{Blueprints, Tile};
use flora_plan::layer::{Element, LayerFormat, WeightFormat};
use flora_plan::schedule::{BackwardSchedule, Materialised, Schedule};
use flora_plan::weight::PackedWeight;
use flora_runtime::backend::{Backend, Queueing, ReplacedRows};
use flora_runtime::{
    BackendKind, Device, DeviceError, DeviceInfo, Gradients, LayerOperands, OperandError, PoolBuffer, RankGates,
    SparseRows, Storage, Wanted, WeightBuffer,
};
use half::slice::HalfFloatSliceExt;

use crate::backward::GradientsMut;
use crate::engine::HostEngine;
use crate::error::HostError;
use crate::memory::{HostMemory, foreign};
use crate::operands::Operands;
use crate::owned::OwnedValues;
use crate::spare::HostPlace;
use crate::values::{NOT_REPLACED, Replaced, Rows, RowsMut, Values};
use crate::weight::Weight;

struct HostBackend {
    engine: HostEngine,
    place: HostPlace,
    /// Where activations are rounded.
    rounding: Option<RoundingProducts>,
}

/// What multiplies in place of the engine where activations are rounded.
struct RoundingProducts {
    engine: HostEngine,
    /// Whether it doesn't, for now.
    is_paused: AtomicBool,
}

impl RoundingProducts {
    fn new() -> Self {
        Self { engine: HostEngine::new().rounding_activations(), is_paused: AtomicBool::new(false) }
    }
}

/// This machine's processor as a device.
pub fn device() -> Device {
    Device::new(describe(), HostBackend { engine: HostEngine::new(), place: HostPlace::default(), rounding: None })
}

/// What [`device`] is.
pub fn describe() -> DeviceInfo {
    let threads = rayon::current_num_threads();
    let name = format!("{}, {threads} threads", processor());
    let driver = HostEngine::instruction_set().to_owned();
    DeviceInfo {
        element_types: Element::ALL.map(|element| element.name().to_owned()).to_vec(),
        ..DeviceInfo::unstarted("host".to_owned(), name, BackendKind::Host, driver, false)
    }
}

/// The processor's own name, where it has one.
fn processor() -> String {
    #[cfg(target_arch = "x86_64")]
    if let Some(brand) = raw_cpuid::CpuId::new().get_processor_brand_string() {
        return brand.as_str().trim().to_owned();
    }
    format!("{} processor", std::env::consts::ARCH)
}

impl From<HostError> for DeviceError {
    fn from(error: HostError) -> Self {
        DeviceError::Mismatch(Box::new(error))
    }
}

fn values(storage: &Storage, element: Element) -> Result<Values<'_>, DeviceError> {
    storage.get::<HostMemory>().and_then(|memory| memory.values(element)).ok_or_else(|| foreign(element))
}

fn weight(weight: &WeightBuffer) -> Result<&Weight, DeviceError> {
    weight.memory::<Weight>().ok_or_else(|| foreign(Element::F32))
}

fn pool(pool: &PoolBuffer, element: Element) -> Result<Values<'_>, DeviceError> {
    let memory = pool.memory::<HostMemory>().and_then(|memory| memory.values(element));
    memory.ok_or_else(|| foreign(element))
}

/// The operands of one of the host's layers, as [`HostEngine::execute`] takes them.
///
/// # Errors
/// Another device's.
pub fn operands(layer: &LayerOperands) -> Result<Operands<'_>, DeviceError> {
    let bias = match layer.bias().map(crate::memory::values).transpose()? {
        Some(Values::F32(bias)) => Some(bias),
        _ => None,
    };
    let adapters = layer.format().adapters;
    Ok(Operands {
        weight: weight(layer.base_weight())?,
        bias,
        in_pool: pool(layer.in_pool(), adapters)?,
        out_pool: pool(layer.out_pool(), adapters)?,
        epilogue: layer.epilogue(),
        merged: layer.merged_weight().map(weight).transpose()?,
    })
}

impl HostBackend {
    /// What multiplies.
    fn products(&self) -> &HostEngine {
        let rounding = self.rounding.as_ref().filter(|rounding| !rounding.is_paused.load(Ordering::Relaxed));
        rounding.map_or(&self.engine, |rounding| &rounding.engine)
    }

    fn run(
        &self,
        layer: &LayerOperands,
        schedule: &Schedule,
        (x, replaced): (&Storage, Option<ReplacedRows<'_>>),
        gates: Option<RankGates<'_>>,
        residual: Option<&Storage>,
    ) -> Result<Storage, DeviceError> {
        let places = replaced.map(|replaced| {
            let mut places = vec![NOT_REPLACED; schedule.tokens() as usize];
            for (row, place) in replaced.pieces.iter().cloned().flatten().zip(0..) {
                places[row] = place;
            }
            (places, replaced.values)
        });
        let replaced = places.as_ref().map(|(places, values)| Replaced { places, values });
        let activations = layer.format().activations;
        let (tokens, d, k) = (schedule.tokens() as usize, layer.shape().d as usize, layer.shape().k as usize);
        let mut y = self.place.spare().take(tokens * k, activations);
        let x = Rows { values: values(x, activations)?.first(tokens * d), pitch: d };
        let residual = residual.map(|residual| values(residual, activations)).transpose()?;
        let residual = residual.map(|residual| residual.first(tokens * k));
        let sums = RowsMut { values: y.values_mut(), pitch: k };
        self.products().execute_gated(&operands(layer)?, schedule, (x, replaced), gates, sums, residual)?;
        Ok(Storage::new(HostMemory::Spare(y)))
    }

    fn gradients(
        &self,
        layer: &LayerOperands,
        schedule: &BackwardSchedule,
        (x, g): (&Storage, &Storage),
        wanted: Wanted,
    ) -> Result<Gradients<Storage>, DeviceError> {
        let activations = layer.format().activations;
        let (tokens, d, k) = (schedule.tokens() as usize, layer.shape().d as usize, layer.shape().k as usize);
        let (x, g) = (values(x, activations)?.first(tokens * d), values(g, activations)?.first(tokens * k));
        let mut input = wanted.has_input().then(|| OwnedValues::zeros(tokens * d, activations));
        let zeros = |vectors: u32, width: usize| vec![0.0; vectors as usize * width];
        let mut vectors =
            wanted.has_adapters().then(|| [zeros(schedule.in_vectors(), d), zeros(schedule.out_vectors(), k)]);
        let gradients = GradientsMut {
            input: input.as_mut().map(OwnedValues::values_mut),
            vectors: vectors.as_mut().map(|vectors| vectors.each_mut().map(Vec::as_mut_slice)),
        };
        self.engine.backward(&operands(layer)?, schedule, x, g, gradients)?;
        let storage = |values| Storage::new(HostMemory::Owned(values));
        Ok(Gradients {
            input: input.map(storage),
            vectors: vectors.map(|vectors| vectors.map(|vectors| storage(OwnedValues::F32(vectors)))),
        })
    }
}

impl Backend for HostBackend {
    fn upload(&self, values: &[f32], element: Element) -> Storage {
        Storage::new(HostMemory::Owned(OwnedValues::rounded(values, element)))
    }

    fn upload_weight(&self, weight: &PackedWeight) -> Storage {
        Storage::new(Weight::new(weight))
    }

    fn capacity(&self, storage: &Storage, element: Element) -> Option<usize> {
        Some(storage.get::<HostMemory>()?.values(element)?.len())
    }

    fn resized(&self, storage: &Storage, elements: usize, element: Element) -> Result<Storage, DeviceError> {
        let values = values(storage, element)?.to_owned_values();
        Ok(Storage::new(HostMemory::Owned(values.resized(elements))))
    }

    fn write(&self, storage: &mut Storage, first: usize, values: &[f32], element: Element) -> Result<(), DeviceError> {
        // Whoever else holds the buffer keeps the numbers that it had.
        if storage.get_mut::<HostMemory>().is_none() {
            *storage = Storage::new(HostMemory::Owned(self::values(storage, element)?.to_owned_values()));
        }
        let held: &mut HostMemory = storage.get_mut().ok_or_else(|| foreign(element))?;
        if held.overwrite(first, values) {
            return Ok(());
        }
        let (expected, found) = (first + values.len(), held.values(element).map_or(0, |held| held.len()));
        Err(OperandError::WrongSize { what: "a pool", expected, found }.into())
    }

    fn read(&self, storage: &Storage, parts: &[Range<usize>], element: Element) -> Result<Vec<f32>, DeviceError> {
        let values = values(storage, element)?;
        let mut read = Vec::with_capacity(parts.iter().map(Range::len).sum());
        for part in parts.iter().cloned() {
            match values {
                Values::F32(values) => read.extend_from_slice(&values[part]),
                Values::F16(values) => read.extend(values[part].to_f32_vec()),
                Values::Bf16(values) => read.extend(values[part].to_f32_vec()),
            }
        }
        Ok(read)
    }

    fn execute(
        &self,
        layer: &LayerOperands,
        schedule: &Schedule,
        x: &Storage,
        residual: Option<&Storage>,
    ) -> Result<Storage, DeviceError> {
        self.run(layer, schedule, (x, None), None, residual)
    }

    fn execute_replaced(
        &self,
        layer: &LayerOperands,
        schedule: &Schedule,
        x: &Storage,
        replaced: ReplacedRows<'_>,
        residual: Option<&Storage>,
    ) -> Result<Storage, DeviceError> {
        self.run(layer, schedule, (x, Some(replaced)), None, residual)
    }

    fn has_gates(&self) -> bool {
        true
    }

    fn execute_gated(
        &self,
        layer: &LayerOperands,
        schedule: &Schedule,
        x: (&Storage, Option<ReplacedRows<'_>>),
        gates: RankGates<'_>,
        residual: Option<&Storage>,
    ) -> Option<Result<Storage, DeviceError>> {
        Some(self.run(layer, schedule, x, Some(gates), residual))
    }

    fn backward(
        &self,
        layer: &LayerOperands,
        schedule: &BackwardSchedule,
        x: &Storage,
        g: &Storage,
        wanted: Wanted,
    ) -> Option<Result<Gradients<Storage>, DeviceError>> {
        Some(self.gradients(layer, schedule, (x, g), wanted))
    }

    fn multiply_sparse(&self, products: &mut [SparseRows<'_>]) {
        crate::sparse::multiply(self.engine.arch(), products);
    }

    fn merge(&self, layer: &LayerOperands, step: &Materialised) -> Result<Storage, DeviceError> {
        let made = self.engine.materialise(&operands(layer)?, step, 0)?;
        let format = self.merged_format(layer.format());
        if made.format() == format {
            return Ok(Storage::new(made));
        }
        let rounded = PackedWeight::from_f32(format, made.shape(), &made.to_f32()).map_err(HostError::NotAWeight)?;
        Ok(Storage::new(Weight::new(&rounded)))
    }

    fn merged_format(&self, format: LayerFormat) -> WeightFormat {
        // As large as the rows' numbers, and multiplied as quickly as a base weight of their type.
        WeightFormat::Float(format.activations)
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn device_seconds(&self, _work: &mut Queueing<'_>) -> Option<Result<f64, DeviceError>> {
        None
    }

    fn tuned(&self, _blueprints: &Blueprints) -> Arc<dyn Backend> {
        let rounding = self.rounding.as_ref().map(|_| RoundingProducts::new());
        Arc::new(Self { engine: HostEngine::new(), place: self.place.clone(), rounding })
    }

    fn rounding_activations(&self) -> Option<Arc<dyn Backend>> {
        let rounding = Some(RoundingProducts::new());
        Some(Arc::new(Self { engine: HostEngine::new(), place: self.place.clone(), rounding }))
    }

    fn unrounded(&self, work: &mut Queueing<'_>) -> Result<(), DeviceError> {
        let pause = |is_paused| {
            if let Some(rounding) = &self.rounding {
                rounding.is_paused.store(is_paused, Ordering::Relaxed);
            }
        };
        pause(true);
        let done = work();
        pause(false);
        done
    }

    fn tiles(&self, _format: LayerFormat) -> Vec<Tile> {
        Vec::new()
    }

    fn place(&self) -> &dyn Any {
        &self.place
    }
}
