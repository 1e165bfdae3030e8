//! The host as a device: the same schedules on the processor. The default where there is no GPU, and a device of its own for the
//! cost model.

use std::sync::Arc;

use cubecl::bytes::Bytes;
use flora_codegen::blueprints::{Blueprints, Tile};
use flora_codegen::layer::{Element, LayerFormat, WeightFormat};
use flora_codegen::schedule::{Materialised, Schedule};
use flora_codegen::weight::PackedWeight;
use flora_host::{Engine, Operands, Values, ValuesMut, Weight};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::{
    Backend, BackendKind, DeviceError, DeviceInfo, LayerOperands, Queueing, Storage, WeightBuffer, WeightStorage,
};

/// Numbers that are being made.
enum Fresh {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Fresh {
    fn zeros(count: usize, element: Element) -> Self {
        match element {
            Element::F32 => Self::F32(vec![0.0; count]),
            Element::F16 => Self::F16(vec![f16::ZERO; count]),
            Element::Bf16 => Self::Bf16(vec![bf16::ZERO; count]),
        }
    }

    fn rounded(values: &[f32], element: Element) -> Self {
        let mut fresh = Self::zeros(values.len(), element);
        match &mut fresh {
            Self::F32(stored) => stored.copy_from_slice(values),
            Self::F16(stored) => stored.convert_from_f32_slice(values),
            Self::Bf16(stored) => stored.convert_from_f32_slice(values),
        }
        fresh
    }

    fn values_mut(&mut self) -> ValuesMut<'_> {
        match self {
            Self::F32(values) => ValuesMut::F32(values),
            Self::F16(values) => ValuesMut::F16(values),
            Self::Bf16(values) => ValuesMut::Bf16(values),
        }
    }

    fn storage(self) -> Storage {
        Storage::Host(Arc::new(match self {
            Self::F32(values) => Bytes::from_elems(values),
            Self::F16(values) => Bytes::from_elems(values),
            Self::Bf16(values) => Bytes::from_elems(values),
        }))
    }
}

/// The numbers in a host's buffer.
pub(super) fn values(storage: &Storage, element: Element) -> Result<Values<'_>, DeviceError> {
    let Storage::Host(bytes) = storage else { return Err(foreign()) };
    fn cast<T: bytemuck::AnyBitPattern>(bytes: &[u8]) -> Result<&[T], DeviceError> {
        let failed = |error| DeviceError::Execution(format!("a buffer's bytes can't be read as numbers: {error}"));
        bytemuck::try_cast_slice(bytes).map_err(failed)
    }
    Ok(match element {
        Element::F32 => Values::F32(cast(bytes)?),
        Element::F16 => Values::F16(cast(bytes)?),
        Element::Bf16 => Values::Bf16(cast(bytes)?),
    })
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

fn weight(weight: &WeightBuffer) -> Result<&Weight, DeviceError> {
    match &weight.storage {
        WeightStorage::Host(weight) => Ok(weight),
        WeightStorage::Device { .. } => Err(foreign()),
    }
}

fn operands(layer: &LayerOperands) -> Result<Operands<'_>, DeviceError> {
    let bias = match layer.bias.as_ref().map(|bias| values(&bias.storage, Element::F32)).transpose()? {
        Some(Values::F32(bias)) => Some(bias),
        _ => None,
    };
    let adapters = layer.format.adapters;
    Ok(Operands {
        weight: weight(&layer.base_weight)?,
        bias,
        in_pool: values(&layer.in_pool.buffer.storage, adapters)?,
        out_pool: values(&layer.out_pool.buffer.storage, adapters)?,
        epilogue: layer.epilogue,
        merged: layer.merged.as_ref().map(|(_, merged)| weight(merged)).transpose()?,
    })
}

impl Backend for HostBackend {
    fn upload(&self, values: &[f32], element: Element) -> Storage {
        Fresh::rounded(values, element).storage()
    }

    fn resized(&self, storage: &Storage, elements: usize, element: Element) -> Result<Storage, DeviceError> {
        let Storage::Host(old) = storage else { return Err(foreign()) };
        let mut bytes = vec![0u8; elements * element.bytes() as usize];
        let kept = old.len().min(bytes.len());
        bytes[..kept].copy_from_slice(&old[..kept]);
        Ok(Storage::Host(Arc::new(Bytes::from_bytes_vec(bytes))))
    }

    fn write(&self, storage: &mut Storage, first: usize, values: &[f32], element: Element) -> Result<(), DeviceError> {
        let Storage::Host(source) = Fresh::rounded(values, element).storage() else { return Err(foreign()) };
        let Storage::Host(shared) = storage else { return Err(foreign()) };
        // Whoever else holds the buffer keeps the numbers that it had.
        if Arc::get_mut(shared).is_none() {
            *shared = Arc::new(Bytes::from_bytes_vec(shared.to_vec()));
        }
        let own = Arc::get_mut(shared).ok_or_else(foreign)?;
        let first = first * element.bytes() as usize;
        let end = first + source.len();
        let Some(place) = own.get_mut(first..end) else {
            return Err(DeviceError::WrongSize { what: "a pool", expected: end, found: own.len() });
        };
        place.copy_from_slice(&source);
        Ok(())
    }

    fn upload_weight(&self, weight: &PackedWeight) -> WeightStorage {
        WeightStorage::Host(Arc::new(Weight::new(weight)))
    }

    fn read(&self, storage: &Storage, _elements: usize, element: Element) -> Result<Vec<f32>, DeviceError> {
        Ok(match values(storage, element)? {
            Values::F32(values) => values.to_vec(),
            Values::F16(values) => values.to_f32_vec(),
            Values::Bf16(values) => values.to_f32_vec(),
        })
    }

    fn execute(
        &self,
        layer: &LayerOperands,
        schedule: &Schedule,
        x: &Storage,
        residual: Option<&Storage>,
    ) -> Result<Storage, DeviceError> {
        let activations = layer.format.activations;
        let mut y = Fresh::zeros(schedule.tokens() as usize * layer.shape.k as usize, activations);
        let residual = residual.map(|residual| values(residual, activations)).transpose()?;
        self.engine.execute(&operands(layer)?, schedule, values(x, activations)?, y.values_mut(), residual)?;
        Ok(y.storage())
    }

    fn merge(&self, layer: &LayerOperands, step: &Materialised) -> Result<WeightStorage, DeviceError> {
        Ok(WeightStorage::Host(Arc::new(self.engine.materialise(&operands(layer)?, step, 0)?)))
    }

    fn merged_format(&self, _format: LayerFormat) -> WeightFormat {
        // Made in f32, and kept so.
        WeightFormat::Float(Element::F32)
    }

    fn device_seconds(&self, _work: &mut Queueing<'_>) -> Option<Result<f64, DeviceError>> {
        None
    }

    fn tuned(&self, _blueprints: &Blueprints) -> Arc<dyn Backend> {
        Arc::new(Self { engine: Engine::new() })
    }

    fn tiles(&self, _format: LayerFormat) -> Vec<Tile> {
        Vec::new()
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}
