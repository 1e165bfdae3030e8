//! The host as a device: the same schedules on the processor. The default where there is no GPU, and a device of its own for the
//! cost model.

use std::sync::Arc;

use flora_codegen::blueprints::{Blueprints, Tile};
use flora_codegen::layer::{Element, LayerFormat, WeightFormat};
use flora_codegen::schedule::{Materialised, Schedule};
use flora_codegen::weight::PackedWeight;
use flora_host::{Engine, Operands, Values, ValuesMut};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::{
    Backend, BackendKind, DeviceError, DeviceInfo, LayerOperands, Queueing, Storage, WeightBuffer, WeightStorage,
};

/// Numbers in the host's memory.
#[derive(Debug)]
pub(super) enum Numbers {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Numbers {
    fn zeros(count: usize, element: Element) -> Self {
        match element {
            Element::F32 => Numbers::F32(vec![0.0; count]),
            Element::F16 => Numbers::F16(vec![f16::ZERO; count]),
            Element::Bf16 => Numbers::Bf16(vec![bf16::ZERO; count]),
        }
    }

    fn values(&self) -> Values<'_> {
        match self {
            Numbers::F32(values) => Values::F32(values),
            Numbers::F16(values) => Values::F16(values),
            Numbers::Bf16(values) => Values::Bf16(values),
        }
    }

    fn values_mut(&mut self) -> ValuesMut<'_> {
        match self {
            Numbers::F32(values) => ValuesMut::F32(values),
            Numbers::F16(values) => ValuesMut::F16(values),
            Numbers::Bf16(values) => ValuesMut::Bf16(values),
        }
    }
}

pub(super) struct HostBackend {
    engine: Engine,
}

pub(super) fn open() -> (DeviceInfo, HostBackend) {
    let threads = rayon::current_num_threads();
    let info = DeviceInfo {
        id: "host".to_owned(),
        name: format!("{}, {threads} threads", processor()),
        backend: BackendKind::Host,
        driver: Engine::instruction_set().to_owned(),
        software: false,
        plane_size: None,
        shared_memory_bytes: None,
        largest_buffer_bytes: None,
        element_types: Element::ALL.map(|element| element.name().to_owned()).to_vec(),
        fragments: Vec::new(),
    };
    (info, HostBackend { engine: Engine::new() })
}

/// The processor's own name, where it has one.
fn processor() -> String {
    #[cfg(target_arch = "x86_64")]
    if let Some(brand) = raw_cpuid::CpuId::new().get_processor_brand_string() {
        return brand.as_str().trim().to_owned();
    }
    format!("{} processor", std::env::consts::ARCH)
}

/// [`super::Device`] lets no other backend's storage through.
fn foreign() -> DeviceError {
    DeviceError::Execution("a device's memory was passed to the host".to_owned())
}

fn numbers(storage: &Storage) -> Result<&Numbers, DeviceError> {
    match storage {
        Storage::Host(numbers) => Ok(numbers),
        Storage::Device(_) => Err(foreign()),
    }
}

fn weight(weight: &WeightBuffer) -> Result<&PackedWeight, DeviceError> {
    match &weight.storage {
        WeightStorage::Host(weight) => Ok(weight),
        WeightStorage::Device { .. } => Err(foreign()),
    }
}

fn operands(layer: &LayerOperands) -> Result<Operands<'_>, DeviceError> {
    let bias = match layer.bias.as_ref().map(|bias| numbers(&bias.storage)).transpose()? {
        Some(Numbers::F32(bias)) => Some(&bias[..]),
        _ => None,
    };
    Ok(Operands {
        weight: weight(&layer.base_weight)?,
        bias,
        in_pool: numbers(&layer.in_pool.buffer.storage)?.values(),
        out_pool: numbers(&layer.out_pool.buffer.storage)?.values(),
        epilogue: layer.epilogue,
        merged: layer.merged.as_ref().map(|(_, merged)| weight(merged)).transpose()?,
    })
}

impl Backend for HostBackend {
    fn upload(&self, values: &[f32], element: Element) -> Storage {
        let mut stored = Numbers::zeros(values.len(), element);
        match &mut stored {
            Numbers::F32(stored) => stored.copy_from_slice(values),
            Numbers::F16(stored) => stored.convert_from_f32_slice(values),
            Numbers::Bf16(stored) => stored.convert_from_f32_slice(values),
        }
        Storage::Host(Arc::new(stored))
    }

    fn upload_weight(&self, weight: &PackedWeight) -> WeightStorage {
        WeightStorage::Host(Arc::new(weight.clone()))
    }

    fn read(&self, storage: &Storage, _elements: usize, _element: Element) -> Result<Vec<f32>, DeviceError> {
        Ok(match numbers(storage)? {
            Numbers::F32(values) => values.clone(),
            Numbers::F16(values) => values.to_f32_vec(),
            Numbers::Bf16(values) => values.to_f32_vec(),
        })
    }

    fn execute(
        &self,
        layer: &LayerOperands,
        schedule: &Schedule,
        x: &Storage,
        residual: Option<&Storage>,
    ) -> Result<Storage, DeviceError> {
        let count = schedule.tokens() as usize * layer.shape.k as usize;
        let mut y = Numbers::zeros(count, layer.format.activations);
        let residual = residual.map(numbers).transpose()?.map(Numbers::values);
        self.engine.execute(&operands(layer)?, schedule, numbers(x)?.values(), y.values_mut(), residual)?;
        Ok(Storage::Host(Arc::new(y)))
    }

    fn merge(&self, layer: &LayerOperands, step: &Materialised) -> Result<(WeightStorage, WeightFormat), DeviceError> {
        let made = self.engine.materialise(&operands(layer)?, step, 0)?;
        let format = made.format();
        Ok((WeightStorage::Host(Arc::new(made)), format))
    }

    fn device_seconds(&self, _work: &mut Queueing<'_>) -> Option<Result<f64, DeviceError>> {
        None
    }

    fn tuned(&self, blueprints: &Blueprints) -> Arc<dyn Backend> {
        let engine = match blueprints.swept_rows {
            Some(rows) => Engine::new().with_swept_rows(rows as usize),
            None => Engine::new(),
        };
        Arc::new(Self { engine })
    }

    fn tiles(&self, _format: LayerFormat) -> Vec<Tile> {
        Vec::new()
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}
