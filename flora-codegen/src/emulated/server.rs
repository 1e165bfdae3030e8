//! The emulated card's driver, as cubecl sees it: memory, and launches that are over when they return.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use cubecl::prelude::*;
use cubecl::server::{
    Binding, ComputeServer, CopyDescriptor, ExecutionMode, IoError, KernelArguments, ProfileError, ProfilingToken,
    ServerCommunication, ServerError, ServerUtilities,
};
use cubecl::{Compiler, MemoryConfiguration};
use cubecl_common::backtrace::BackTrace;
use cubecl_common::bytes::Bytes;
use cubecl_common::device::{Device, DeviceId, DeviceService};
use cubecl_common::future::DynFut;
use cubecl_common::profile::ProfileDuration;
use cubecl_common::stream_id::StreamId;
use cubecl_runtime::allocator::ContiguousMemoryLayoutPolicy;
use cubecl_runtime::compiler::CubeTask;
use cubecl_runtime::id::KernelId;
use cubecl_runtime::logging::ServerLogger;
use cubecl_runtime::memory_management::{
    ManagedMemoryHandle, MemoryAllocationMode, MemoryManagement, MemoryManagementOptions, MemoryUsage,
};
use cubecl_runtime::storage::ManagedResource;
use cubecl_runtime::timestamp_profiler::TimestampProfiler;
use flora_toolchain::{CxxCompiler, Sanitizer};

use super::keep::{KeepFailure, Keeper};
use super::memory::{Memory, Resource};
use super::program::{Program, ProgramError};
use crate::target::cuda::Cuda;
use crate::target::recorder::{Dialect, OfflineDevice, emitted};
use crate::target::{EmitError, EmittedKernel};

type CudaCompiler = <Cuda as Dialect>::Compiler;

/// Why a launch failed.
#[derive(Debug, thiserror::Error)]
enum LaunchFailure {
    #[error(transparent)]
    Emit(#[from] EmitError),
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Compiler(#[from] flora_toolchain::CxxError),
    #[error(transparent)]
    Keep(#[from] KeepFailure),
    #[error("a buffer isn't there: {0:?}")]
    Memory(IoError),
    #[error("an emulated card launches no number of cubes that it has to read first")]
    DynamicCount,
}

/// What a kernel is compiled by.
struct Tools {
    compiler: CxxCompiler,
    sanitizer: Option<Sanitizer>,
    /// Machine code for a card of this kind, where it is to be kept.
    kept: Option<Keeper>,
}

impl Tools {
    fn find(variant: u16) -> Result<Self, LaunchFailure> {
        let kept = Keeper::from_environment(variant)?;
        Ok(Self { compiler: CxxCompiler::find()?, sanitizer: Sanitizer::of_process(), kept })
    }
}

/// One emulated card.
pub(crate) struct EmulatedServer {
    /// Its compute capability.
    variant: u16,
    memory: MemoryManagement<Memory>,
    /// Each with the units of its cubes.
    programs: HashMap<(KernelId, ExecutionMode), (Program, [u32; 3])>,
    options: <CudaCompiler as Compiler>::CompilationOptions,
    /// Found at the first launch.
    tools: Option<Tools>,
    timestamps: TimestampProfiler,
    /// What went wrong since somebody asked.
    errors: Vec<ServerError>,
    utilities: Arc<ServerUtilities<Self>>,
}

// SAFETY: it is used from one thread at a time; libraries may be called from any.
unsafe impl Send for EmulatedServer {}

impl fmt::Debug for EmulatedServer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("EmulatedServer")
    }
}

impl ServerCommunication for EmulatedServer {
    const SERVER_COMM_ENABLED: bool = false;
}

impl DeviceService for EmulatedServer {
    fn init(device_id: DeviceId) -> Self {
        let variant = OfflineDevice::from_id(device_id).variant;
        let properties = Cuda::properties(variant);
        let logger = Arc::new(ServerLogger::default());
        // A page for each buffer: nothing but its edges lies beside it.
        let memory = MemoryManagement::from_configuration(
            Memory::default(),
            &properties.memory,
            MemoryConfiguration::ExclusivePages,
            logger.clone(),
            MemoryManagementOptions::new("emulated CUDA"),
        );
        let layout = ContiguousMemoryLayoutPolicy::new(properties.memory.alignment as usize);
        Self {
            variant,
            memory,
            programs: HashMap::new(),
            options: Cuda::options(variant),
            tools: None,
            timestamps: TimestampProfiler::default(),
            errors: Vec::new(),
            utilities: Arc::new(ServerUtilities::new(properties, logger, (), layout)),
        }
    }

    fn utilities(&self) -> Arc<dyn std::any::Any + Send + Sync> {
        self.utilities.clone()
    }
}

impl EmulatedServer {
    /// The bytes of a binding, as many as its owner asked for.
    fn resource(&mut self, binding: Binding) -> Result<Resource, IoError> {
        let length = binding.size_in_used() as usize;
        let resource = self.memory.get_resource(binding.memory, binding.offset_start, binding.offset_end)?;
        Ok(Resource { length, ..resource })
    }

    /// The program of a kernel, compiled when it is launched first.
    fn program(
        &mut self,
        kernel: &dyn CubeTask<CudaCompiler>,
        count: &CubeCount,
        mode: ExecutionMode,
    ) -> Result<&(Program, [u32; 3]), LaunchFailure> {
        let key = (kernel.id(), mode);
        if !self.programs.contains_key(&key) {
            let tools = match &mut self.tools {
                Some(tools) => tools,
                None => self.tools.insert(Tools::find(self.variant)?),
            };
            let emitted: EmittedKernel = emitted::<Cuda>(kernel, &self.options, count, mode)?;
            let program = Program::new(&tools.compiler, (&emitted.name, &emitted.source), tools.sanitizer)?;
            if let Some(kept) = &tools.kept {
                kept.keep(&emitted.source)?;
            }
            self.programs.insert(key.clone(), (program, emitted.cube_dim));
        }
        Ok(&self.programs[&key])
    }

    fn run(
        &mut self,
        kernel: &dyn CubeTask<CudaCompiler>,
        count: &CubeCount,
        arguments: KernelArguments,
        mode: ExecutionMode,
    ) -> Result<(), LaunchFailure> {
        let CubeCount::Static(x, y, z) = *count else { return Err(LaunchFailure::DynamicCount) };
        let buffers = arguments.buffers.into_iter().map(|binding| self.resource(binding));
        let mut buffers = buffers.collect::<Result<Vec<_>, _>>().map_err(LaunchFailure::Memory)?;
        let info = arguments.info.data;
        // What has no fixed size follows the buffers, as a buffer.
        let mut dynamic = info.get(arguments.info.dynamic_metadata_offset..).unwrap_or_default().to_vec();
        if !dynamic.is_empty() {
            buffers.push(Resource { start: dynamic.as_mut_ptr().cast(), length: 8 * dynamic.len() });
        }
        let (program, block) = self.program(kernel, count, mode)?;
        // SAFETY: cubecl lays out what its kernel takes.
        Ok(unsafe { program.run(([x, y, z], *block), &buffers, &info) }?)
    }

    fn taken_errors(&mut self) -> Result<(), ServerError> {
        let errors = std::mem::take(&mut self.errors);
        if errors.is_empty() {
            return Ok(());
        }
        Err(ServerError::ServerUnhealthy { errors, backtrace: BackTrace::capture() })
    }

    fn failed(&mut self, reason: &dyn fmt::Display) {
        self.errors.push(ServerError::Generic { reason: reason.to_string(), backtrace: BackTrace::capture() });
    }
}

impl ComputeServer for EmulatedServer {
    type Kernel = Box<dyn CubeTask<CudaCompiler>>;
    type Info = ();
    type MemoryLayoutPolicy = ContiguousMemoryLayoutPolicy;
    type Storage = Memory;

    fn initialize_memory(&mut self, memory: ManagedMemoryHandle, size: u64, _stream: StreamId) {
        let made = self.memory.reserve(size).and_then(|reserved| {
            let binding = memory.clone().binding();
            self.memory.bind(reserved, memory, 0)?;
            let mut resource = self.memory.get_resource(binding, None, None)?;
            // A card promises nothing about new memory: all ones are a NaN in every type.
            resource.bytes().fill(0xff);
            Ok(())
        });
        if let Err(error) = made {
            self.errors.push(ServerError::Io(error));
        }
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    fn read(&mut self, descriptors: Vec<CopyDescriptor>, _stream: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let read = self.taken_errors().and_then(|()| {
            let bytes = descriptors.into_iter().map(|descriptor| {
                let mut resource = self.resource(descriptor.handle).map_err(ServerError::Io)?;
                Ok(Bytes::from_bytes_vec(resource.bytes().to_vec()))
            });
            bytes.collect()
        });
        Box::pin(async move { read })
    }

    fn write(&mut self, descriptors: Vec<(CopyDescriptor, Bytes)>, _stream: StreamId) {
        for (descriptor, bytes) in descriptors {
            match self.resource(descriptor.handle) {
                Ok(mut resource) => resource.bytes()[..bytes.len()].copy_from_slice(&bytes),
                Err(error) => self.errors.push(ServerError::Io(error)),
            }
        }
    }

    fn sync(&mut self, _stream: StreamId) -> DynFut<Result<(), ServerError>> {
        let outcome = self.taken_errors();
        Box::pin(async move { outcome })
    }

    fn get_resource(&mut self, binding: Binding, _stream: StreamId) -> Result<ManagedResource<Resource>, ServerError> {
        let memory = binding.memory.clone();
        let resource = self.resource(binding).map_err(ServerError::Io)?;
        Ok(ManagedResource::new(memory, resource))
    }

    unsafe fn launch(
        &mut self,
        kernel: Self::Kernel,
        count: CubeCount,
        arguments: KernelArguments,
        mode: ExecutionMode,
        _stream: StreamId,
    ) {
        if let Err(error) = self.run(&*kernel, &count, arguments, mode) {
            self.failed(&error);
        }
    }

    fn flush(&mut self, _stream: StreamId) -> Result<(), ServerError> {
        self.taken_errors()
    }

    fn memory_usage(&mut self, _stream: StreamId) -> Result<MemoryUsage, ServerError> {
        Ok(self.memory.memory_usage())
    }

    fn memory_cleanup(&mut self, _stream: StreamId) {
        self.memory.cleanup(true);
    }

    fn start_profile(&mut self, _stream: StreamId) -> Result<ProfilingToken, ServerError> {
        Ok(self.timestamps.start())
    }

    fn end_profile(&mut self, _stream: StreamId, token: ProfilingToken) -> Result<ProfileDuration, ProfileError> {
        self.timestamps.stop(token)
    }

    fn allocation_mode(&mut self, mode: MemoryAllocationMode, _stream: StreamId) {
        self.memory.mode(mode);
    }
}
