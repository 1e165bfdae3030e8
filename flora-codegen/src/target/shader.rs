//! WGSL and SPIR-V: a device with WebGPU's default limits, and a Vulkan 1.3 device with the features that current GPUs have.

use cubecl::ir::features::{Plane, TypeUsage};
use cubecl::ir::{
    AddressType, DeviceProperties, ElemType, FloatKind, HardwareProperties, IntKind, MemoryDeviceProperties,
    TargetProperties, UIntKind,
};
use cubecl_common::profile::TimingMethod;
use cubecl_core::{VulkanCompilationOptions, WgpuCompilationOptions};
use cubecl_spirv::{GLCompute, SpirvCompiler};
use cubecl_wgpu::WgslCompiler;

use super::recorder::Dialect;

const MAX_CUBE_COUNT: (u32, u32, u32) = (u16::MAX as u32, u16::MAX as u32, u16::MAX as u32);

/// What both have: 32-bit types.
fn properties(shared_memory: usize, units: u32, planes: (u32, u32)) -> DeviceProperties {
    let hardware = HardwareProperties {
        load_width: 128,
        plane_size_min: planes.0,
        plane_size_max: planes.1,
        max_bindings: 15,
        max_shared_memory_size: shared_memory,
        max_cube_count: MAX_CUBE_COUNT,
        max_units_per_cube: units,
        max_cube_dim: (units, units, 64),
        num_streaming_multiprocessors: None,
        num_tensor_cores: None,
        min_tensor_cores_dim: None,
        num_cpu_cores: None,
        max_vector_size: 4,
    };
    let memory = MemoryDeviceProperties { max_page_size: 1 << 27, alignment: 256 };
    let mut properties = DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::System);
    properties.register_address_type(AddressType::U32);
    let types =
        [ElemType::UInt(UIntKind::U32), ElemType::Int(IntKind::I32), ElemType::Float(FloatKind::F32), ElemType::Bool];
    for element in types {
        properties.register_type_usage(element, TypeUsage::all());
    }
    properties
}

#[derive(Clone, Debug)]
pub(super) struct Wgsl;

impl Dialect for Wgsl {
    type Compiler = WgslCompiler;
    const NAME: &'static str = "wgsl";
    const MAX_CUBE_COUNT: (u32, u32, u32) = MAX_CUBE_COUNT;

    fn compiler() -> Self::Compiler {
        Default::default()
    }

    fn options(_variant: u16) -> WgpuCompilationOptions {
        Default::default()
    }

    fn properties(_variant: u16) -> DeviceProperties {
        properties(16 << 10, 256, (8, 128))
    }

    fn target_properties() -> TargetProperties {
        TargetProperties { mma: Default::default() }
    }

    fn stable_source(source: &str) -> String {
        super::stable::stable_source(source)
    }
}

#[derive(Clone, Debug)]
pub(super) struct Spirv;

impl Dialect for Spirv {
    type Compiler = SpirvCompiler<GLCompute>;
    const NAME: &'static str = "spirv";
    const MAX_CUBE_COUNT: (u32, u32, u32) = MAX_CUBE_COUNT;

    fn compiler() -> Self::Compiler {
        Default::default()
    }

    fn options(_variant: u16) -> WgpuCompilationOptions {
        WgpuCompilationOptions {
            supports_u64: true,
            supports_vulkan: true,
            vulkan: VulkanCompilationOptions { max_spirv_version: (1, 6), ..Default::default() },
        }
    }

    fn properties(_variant: u16) -> DeviceProperties {
        let mut properties = properties(32 << 10, 1024, (32, 32));
        // What desktop drivers report for a storage buffer's range.
        properties.memory.max_page_size = u64::from(u32::MAX);
        properties.register_type_usage(ElemType::Float(FloatKind::F16), TypeUsage::all());
        for plane in [Plane::Ops, Plane::Sync, Plane::NonUniformControlFlow] {
            properties.features.plane.insert(plane);
        }
        properties
    }

    fn target_properties() -> TargetProperties {
        TargetProperties { mma: Default::default() }
    }

    fn stable_source(source: &str) -> String {
        super::stable_spirv::stable_spirv(source)
    }
}
