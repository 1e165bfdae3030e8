//! A cubecl runtime that compiles what it is asked to launch and keeps the source, and what the launch takes, instead of running it.

use std::collections::HashMap;
use std::fmt::Debug;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cubecl::Compiler;
use cubecl::MemoryConfiguration;
use cubecl::device::{Device, DeviceId};
use cubecl::ir::{DeviceProperties, MemoryDeviceProperties, TargetProperties};
use cubecl::prelude::*;
use cubecl::server::{
    Binding, ComputeServer, CopyDescriptor, ExecutionMode, IoError, KernelArguments, ProfileError, ProfilingToken,
    ServerCommunication, ServerError, ServerUtilities,
};
use cubecl_common::backtrace::BackTrace;
use cubecl_common::bytes::Bytes;
use cubecl_common::device::DeviceService;
use cubecl_common::future::DynFut;
use cubecl_common::profile::ProfileDuration;
use cubecl_common::stream_id::StreamId;
use cubecl_core::zspace::{Shape, Strides};
use cubecl_runtime::allocator::ContiguousMemoryLayoutPolicy;
use cubecl_runtime::compiler::CubeTask;
use cubecl_runtime::id::KernelId;
use cubecl_runtime::logging::ServerLogger;
use cubecl_runtime::memory_management::{
    ManagedMemoryHandle, MemoryAllocationMode, MemoryManagement, MemoryManagementOptions, MemoryUsage,
};
use cubecl_runtime::storage::{ComputeStorage, ManagedResource};

use super::nowhere::{Nowhere, Place};
use super::{EmitError, EmittedKernel};

/// What stands in for a device: its compiler and its properties.
pub(crate) trait Dialect: Debug + Clone + Send + Sync + 'static {
    type Compiler: Compiler;
    const NAME: &'static str;
    const MAX_CUBE_COUNT: (u32, u32, u32);
    fn compiler() -> Self::Compiler;
    fn options(variant: u16) -> <Self::Compiler as Compiler>::CompilationOptions;
    fn properties(variant: u16) -> DeviceProperties;
    fn target_properties() -> TargetProperties;
    /// The source without the accidents of this dialect's compiler.
    fn stable_source(source: &str) -> String;
}

/// One variant of a dialect; for CUDA the compute capability.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct OfflineDevice {
    pub(crate) variant: u16,
}

impl Device for OfflineDevice {
    fn from_id(id: DeviceId) -> Self {
        Self { variant: id.index_id }
    }
    fn to_id(&self) -> DeviceId {
        DeviceId::new(0, self.variant)
    }
}

/// What one device was asked for.
#[derive(Debug, Default)]
pub(crate) struct Records {
    /// The launches, in order.
    pub(super) kernels: Vec<Result<EmittedKernel, EmitError>>,
    /// What each of them takes.
    pub(super) arguments: Vec<Arguments>,
    /// Bytes of the largest buffer, rounded up as cubecl does.
    pub(super) largest_buffer: u64,
    /// What was written from the host, and where.
    pub(super) uploads: Vec<(Place, Bytes)>,
    /// Every buffer since the first launch, so that none takes another's place.
    alive: Vec<ManagedMemoryHandle>,
}

/// What a launch takes.
#[derive(Debug)]
pub(super) struct Arguments {
    pub(super) buffers: Vec<Place>,
    /// What is passed by value, behind the buffers.
    pub(super) by_value: Vec<u64>,
    /// What has no fixed size of that: a further buffer.
    pub(super) dynamic: Vec<u64>,
}

/// The records of one device.
#[derive(Debug, Default)]
pub(crate) struct Recording {
    records: Mutex<Records>,
    /// Held while one caller launches, because clients of one device share the recorder.
    turn: Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Recording {
    /// What `launches` asks for, with the buffers that others made for it.
    pub(super) fn record<B, T>(&self, buffers: impl FnOnce() -> B, launches: impl FnOnce(B) -> T) -> (T, Records) {
        let _turn = lock(&self.turn);
        let buffers = buffers();
        *lock(&self.records) = Records::default();
        let launched = launches(buffers);
        (launched, std::mem::take(&mut *lock(&self.records)))
    }
}

/// The cubes of a launch; `None` where they are read on the device.
fn static_count(count: &CubeCount) -> Option<[u32; 3]> {
    match *count {
        CubeCount::Static(x, y, z) => Some([x, y, z]),
        CubeCount::Dynamic(_) => None,
    }
}

/// The text of a kernel, and how it would be launched.
pub(crate) fn emitted<D: Dialect>(
    kernel: &dyn CubeTask<D::Compiler>,
    options: &<D::Compiler as Compiler>::CompilationOptions,
    count: &CubeCount,
    mode: ExecutionMode,
) -> Result<EmittedKernel, EmitError> {
    // cubecl numbers CUDA temporaries by one counter that every compilation resets.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = lock(&ONE_AT_A_TIME);
    let name = kernel.name().to_owned();
    let mut compiler = D::compiler();
    // The compilers of some dialects panic on operations that they lack.
    let compiled =
        catch_unwind(AssertUnwindSafe(|| kernel.compile(&mut compiler, options, mode, kernel.address_type())));
    match compiled {
        Ok(Ok(compiled)) => Ok(EmittedKernel {
            name: compiled.entrypoint_name,
            cube_dim: [compiled.cube_dim.x, compiled.cube_dim.y, compiled.cube_dim.z],
            cube_count: static_count(count),
            source: D::stable_source(&compiled.source),
        }),
        Ok(Err(error)) => Err(EmitError::Compile { kernel: name, reason: first_line(&error.to_string()) }),
        Err(panic) => {
            let words = panic.downcast_ref::<String>().map(String::as_str);
            let words = words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("the compiler panicked");
            Err(EmitError::Compile { kernel: name, reason: first_line(words) })
        }
    }
}

/// The server side: compiles every launch.
pub(crate) struct OfflineServer<D: Dialect> {
    options: <D::Compiler as Compiler>::CompilationOptions,
    /// What was compiled before: batches of other adapters launch the same kernels.
    known: HashMap<(KernelId, ExecutionMode), EmittedKernel>,
    memory: MemoryManagement<Nowhere>,
    utilities: Arc<ServerUtilities<Self>>,
}

impl<D: Dialect> OfflineServer<D> {
    /// [`emitted`], compiled once for each kernel.
    fn emitted(
        &mut self,
        kernel: &dyn CubeTask<D::Compiler>,
        count: &CubeCount,
        mode: ExecutionMode,
    ) -> Result<EmittedKernel, EmitError> {
        let key = (kernel.id(), mode);
        if let Some(known) = self.known.get(&key) {
            return Ok(EmittedKernel { cube_count: static_count(count), ..known.clone() });
        }
        let emitted = emitted::<D>(kernel, &self.options, count, mode)?;
        self.known.insert(key, emitted.clone());
        Ok(emitted)
    }

    /// As much of a buffer as its owner asked for.
    fn place(&mut self, binding: Binding) -> Result<Place, IoError> {
        let bytes = binding.size_in_used();
        let place = self.memory.get_resource(binding.memory, binding.offset_start, binding.offset_end)?;
        Ok(Place { bytes, ..place })
    }
}

impl<D: Dialect> Debug for OfflineServer<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OfflineServer<{}>", D::NAME)
    }
}

impl<D: Dialect> ServerCommunication for OfflineServer<D> {
    const SERVER_COMM_ENABLED: bool = false;
}

impl<D: Dialect> DeviceService for OfflineServer<D> {
    fn init(device_id: DeviceId) -> Self {
        let variant = OfflineDevice::from_id(device_id).variant;
        let properties = D::properties(variant);
        let layout = ContiguousMemoryLayoutPolicy::new(properties.memory.alignment as usize);
        let logger = Arc::new(ServerLogger::default());
        // A page for each buffer, and no limit: a buffer that is too large for the device is refused before it is made.
        let memory = MemoryManagement::from_configuration(
            Nowhere,
            &MemoryDeviceProperties { max_page_size: u64::MAX >> 1, alignment: properties.memory.alignment },
            MemoryConfiguration::ExclusivePages,
            logger.clone(),
            MemoryManagementOptions::new("offline"),
        );
        let utilities = ServerUtilities::new(properties, logger, Recording::default(), layout);
        Self { options: D::options(variant), known: HashMap::new(), memory, utilities: Arc::new(utilities) }
    }

    fn utilities(&self) -> Arc<dyn std::any::Any + Send + Sync> {
        self.utilities.clone()
    }
}

impl<D: Dialect> ComputeServer for OfflineServer<D> {
    type Kernel = Box<dyn CubeTask<D::Compiler>>;
    type Info = Recording;
    type MemoryLayoutPolicy = ContiguousMemoryLayoutPolicy;
    type Storage = Nowhere;

    fn initialize_memory(&mut self, memory: ManagedMemoryHandle, size: u64, _stream: StreamId) {
        let mut records = lock(&self.utilities.info.records);
        records.largest_buffer = records.largest_buffer.max(size);
        records.alive.push(memory.clone());
        // What isn't bound is missed where it is used.
        let _ = self.memory.reserve(size).and_then(|reserved| self.memory.bind(reserved, memory, 0));
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    fn read(&mut self, descriptors: Vec<CopyDescriptor>, _stream: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        // There is no memory behind a recorder, so there is nothing to read but the fact that all launches came before.
        let empty = descriptors.iter().map(|_| Bytes::from_bytes_vec(Vec::new())).collect();
        Box::pin(async move { Ok(empty) })
    }

    fn write(&mut self, descriptors: Vec<(CopyDescriptor, Bytes)>, _stream: StreamId) {
        let written = descriptors.into_iter().filter_map(|(to, bytes)| Some((self.place(to.handle).ok()?, bytes)));
        let written: Vec<_> = written.collect();
        lock(&self.utilities.info.records).uploads.extend(written);
    }

    fn sync(&mut self, _stream: StreamId) -> DynFut<Result<(), ServerError>> {
        Box::pin(async { Ok(()) })
    }

    fn get_resource(
        &mut self,
        binding: Binding,
        _stream: StreamId,
    ) -> Result<ManagedResource<<Self::Storage as ComputeStorage>::Resource>, ServerError> {
        let memory = binding.memory.clone();
        Ok(ManagedResource::new(memory, self.place(binding).map_err(ServerError::Io)?))
    }

    unsafe fn launch(
        &mut self,
        kernel: Self::Kernel,
        count: CubeCount,
        arguments: KernelArguments,
        mode: ExecutionMode,
        _stream: StreamId,
    ) {
        let buffers = arguments.buffers.into_iter().map(|binding| self.place(binding)).collect::<Result<_, _>>();
        let by_value = arguments.info.data;
        let dynamic = by_value.get(arguments.info.dynamic_metadata_offset..).unwrap_or_default().to_vec();
        let record = match buffers {
            Ok(buffers) => {
                self.emitted(&*kernel, &count, mode).map(|kernel| (kernel, Arguments { buffers, by_value, dynamic }))
            }
            Err(error) => {
                let (kernel, reason) = (kernel.name().to_owned(), first_line(&error.to_string()));
                Err(EmitError::Compile { kernel, reason })
            }
        };
        let mut records = lock(&self.utilities.info.records);
        match record {
            Ok((kernel, arguments)) => {
                records.kernels.push(Ok(kernel));
                records.arguments.push(arguments);
            }
            Err(error) => records.kernels.push(Err(error)),
        }
    }

    fn flush(&mut self, _stream: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn memory_usage(&mut self, _stream: StreamId) -> Result<MemoryUsage, ServerError> {
        Ok(MemoryUsage { number_allocs: 0, bytes_in_use: 0, bytes_padding: 0, bytes_reserved: 0 })
    }

    fn memory_cleanup(&mut self, _stream: StreamId) {}

    fn start_profile(&mut self, _stream: StreamId) -> Result<ProfilingToken, ServerError> {
        Err(ServerError::Generic { reason: "an offline target has no clock".into(), backtrace: BackTrace::capture() })
    }

    fn end_profile(&mut self, _stream: StreamId, _token: ProfilingToken) -> Result<ProfileDuration, ProfileError> {
        Err(ProfileError::NotRegistered { backtrace: BackTrace::capture() })
    }

    fn allocation_mode(&mut self, _mode: MemoryAllocationMode, _stream: StreamId) {}
}

fn first_line(text: &str) -> String {
    text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().trim().to_owned()
}

/// The runtime of a dialect without a device.
#[derive(Clone, Debug)]
pub(crate) struct Offline<D>(PhantomData<D>);

impl<D: Dialect> Runtime for Offline<D> {
    type Compiler = D::Compiler;
    type Server = OfflineServer<D>;
    type Device = OfflineDevice;

    fn client(device: &Self::Device) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }

    fn name(_client: &ComputeClient<Self>) -> &'static str {
        D::NAME
    }

    fn require_array_lengths() -> bool {
        D::NAME == "cuda"
    }

    fn max_cube_count() -> (u32, u32, u32) {
        D::MAX_CUBE_COUNT
    }

    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        let mut expected = 1;
        shape.iter().zip(strides.iter()).rev().all(|(extent, stride)| {
            let contiguous = *stride == expected;
            expected *= *extent;
            contiguous
        })
    }

    fn target_properties() -> TargetProperties {
        D::target_properties()
    }

    fn enumerate_devices(_kind: u16, _info: &Recording) -> Vec<DeviceId> {
        Vec::new()
    }
}
