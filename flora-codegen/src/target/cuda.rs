//! CUDA C++: the properties that cubecl's CUDA runtime reads from the driver, by compute capability.

use cubecl::ir::features::{Plane, Tma, TypeUsage};
use cubecl::ir::{
    ContiguousElements, DeviceProperties, ElemType, FloatKind, HardwareProperties, MatrixLayout,
    MemoryDeviceProperties, MmaProperties, SemanticType, StorageType, TargetProperties, VectorSize,
};
use cubecl_common::profile::TimingMethod;
use cubecl_cpp::cuda::CudaDialect;
use cubecl_cpp::cuda::arch::CudaArchitecture;
use cubecl_cpp::cuda::mma::{CudaWmmaCompiler, contiguous_elements_cuda};
use cubecl_cpp::shared::{
    CompilationOptions, CppCompiler, CppSupportedFeatures, register_mma_features, register_wmma_features,
};
use cubecl_cpp::{DialectWmmaCompiler, register_supported_types};

use super::Capability;
use super::recorder::Dialect;

impl Capability {
    /// 80, 90, 100.
    pub(crate) fn version(self) -> u16 {
        match self {
            Capability::Sm80 => 80,
            Capability::Sm90 => 90,
            Capability::Sm100 => 100,
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Cuda;

impl Dialect for Cuda {
    type Compiler = CppCompiler<CudaDialect<CudaWmmaCompiler>>;
    const NAME: &'static str = "cuda";
    const MAX_CUBE_COUNT: (u32, u32, u32) = (i32::MAX as u32, u16::MAX as u32, u16::MAX as u32);

    fn compiler() -> Self::Compiler {
        Default::default()
    }

    fn options(version: u16) -> CompilationOptions {
        CompilationOptions {
            warp_size: 32,
            supports_features: CppSupportedFeatures {
                grid_constants: version >= 70,
                clusters: version >= 90,
                fast_math: true,
                fast_tanh: version >= 75,
                elect_sync: version >= 90,
            },
        }
    }

    fn properties(version: u16) -> DeviceProperties {
        // CUDA programming guide, technical specifications by compute capability; multiprocessors of A100, H100 SXM, B200.
        let (shared_kib, multiprocessors, memory_gib) = match version {
            80 => (163, 108, 80),
            90 => (227, 132, 80),
            _ => (227, 148, 180),
        };
        let hardware = HardwareProperties {
            load_width: 128,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 1024,
            max_shared_memory_size: shared_kib * 1024,
            max_cube_count: Self::MAX_CUBE_COUNT,
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: Some(multiprocessors),
            num_tensor_cores: Some(4),
            min_tensor_cores_dim: Some(8),
            num_cpu_cores: None,
            max_vector_size: VectorSize::MAX,
        };
        let memory = MemoryDeviceProperties { max_page_size: (memory_gib << 30) / 4, alignment: 512 };
        let mut properties = DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::System);
        register_supported_types(&mut properties);
        properties.register_type_usage(ElemType::Float(FloatKind::TF32), TypeUsage::Conversion);
        properties.register_semantic_type(SemanticType::Pipeline);
        properties.features.copy_async = true;
        properties.features.memory_reinterpret = true;
        properties.features.alignment = true;
        properties.features.plane.insert(Plane::Sync);
        properties.features.plane.insert(Plane::Ops);
        properties.features.plane.insert(Plane::NonUniformControlFlow);
        let halves = [ElemType::Float(FloatKind::F16), ElemType::Float(FloatKind::BF16)];
        properties.features.matmul.ldmatrix.extend(halves.map(StorageType::from));
        if version >= 90 {
            properties.features.tma.insert(Tma::Base);
            properties.register_semantic_type(SemanticType::TensorMap);
            properties.features.cube_cluster = true;
            properties.features.matmul.stmatrix.extend(halves.map(StorageType::from));
        }
        let architecture = CudaArchitecture { version: u32::from(version) };
        register_wmma_features(CudaWmmaCompiler::supported_wmma_combinations(&architecture), &mut properties);
        register_mma_features(CudaWmmaCompiler::supported_mma_combinations(&architecture), &mut properties);
        properties
    }

    fn target_properties() -> TargetProperties {
        TargetProperties {
            mma: MmaProperties {
                register_size_bits: 32,
                const_plane_size: 32,
                register_layout_a: MatrixLayout::RowMajor,
                register_layout_b: MatrixLayout::ColMajor,
                register_layout_acc: MatrixLayout::RowMajor,
                register_duplication_a: 1,
                register_duplication_b: 1,
                register_duplication_acc: 1,
                contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
            },
        }
    }

    fn stable_source(source: &str) -> String {
        super::stable::stable_source(source)
    }
}
