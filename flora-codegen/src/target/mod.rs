//! Generated sources without a device: a target carries the properties of the device that it stands for, and a recorder takes
//! the place of its driver, so that what is printed is what a launch there would compile.

pub(crate) mod cuda;
pub mod decoder;
pub mod export;
mod nowhere;
pub(crate) mod recorder;
#[cfg(feature = "wgpu")]
mod shader;
pub(crate) mod stable;
#[cfg(feature = "wgpu")]
mod stable_spirv;

use std::str::FromStr;

use cubecl::prelude::*;
use cubecl::server::Handle;
use serde::Serialize;

use crate::launch::{LaunchError, LayerBuffers, LowRankSums, Merged, Pool, backward, launch};
use crate::routine::Hardware;
use cuda::Cuda;
use flora_plan::batch::{AdapterSlots, Segment};
use flora_plan::layer::{Epilogue, LayerFormat, LayerShape};
use flora_plan::pipeline::CompiledLayer;
use flora_plan::plan::Plan;
use flora_plan::schedule::{BackwardSchedule, Schedule, ScheduleError, backward_schedule, schedule};
use flora_runtime::backend::Wanted;
use recorder::{OfflineDevice, Records};

/// A function of the recorder of a target, its variant and something else.
macro_rules! by_target {
    ($target:expr, $function:ident, $argument:expr) => {
        match $target {
            Target::Cuda(capability) => $function::<$crate::target::recorder::Offline<$crate::target::cuda::Cuda>>(
                capability.version(),
                $argument,
            ),
            #[cfg(feature = "wgpu")]
            Target::Wgsl => $function::<$crate::target::recorder::Offline<$crate::target::shader::Wgsl>>(0, $argument),
            #[cfg(feature = "wgpu")]
            Target::Spirv => {
                $function::<$crate::target::recorder::Offline<$crate::target::shader::Spirv>>(0, $argument)
            }
            #[cfg(not(feature = "wgpu"))]
            Target::Wgsl | Target::Spirv => Err(EmitError::NotBuilt($target)),
        }
    };
}
pub(crate) use by_target;

/// What to generate source for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// CUDA C++ for one compute capability.
    Cuda(Capability),
    /// WebGPU's shading language.
    Wgsl,
    /// Vulkan's SPIR-V, disassembled.
    Spirv,
}

/// A CUDA compute capability that flora knows the properties of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Capability {
    /// A100.
    Sm80,
    /// H100 and H200.
    Sm90,
    /// B200.
    Sm100,
}

impl Capability {
    /// Every capability, with its name.
    pub const ALL: [(&'static str, Self); 3] = [("sm_80", Self::Sm80), ("sm_90", Self::Sm90), ("sm_100", Self::Sm100)];
}

impl Target {
    /// Every target, with its name on the command line.
    pub const ALL: [(&'static str, Target); 5] = [
        ("cuda:sm_80", Target::Cuda(Capability::Sm80)),
        ("cuda:sm_90", Target::Cuda(Capability::Sm90)),
        ("cuda:sm_100", Target::Cuda(Capability::Sm100)),
        ("wgsl", Target::Wgsl),
        ("spirv", Target::Spirv),
    ];
}

/// The name is no target's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown target `{0}`; use one of: {names}", names = Target::ALL.map(|(name, _)| name).join(", "))]
pub struct UnknownTarget(pub String);

impl FromStr for Target {
    type Err = UnknownTarget;
    fn from_str(name: &str) -> Result<Self, UnknownTarget> {
        let found = Self::ALL.iter().find(|(known, _)| *known == name);
        found.map(|(_, target)| *target).ok_or_else(|| UnknownTarget(name.to_owned()))
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let found = Self::ALL.iter().find(|(_, target)| target == self);
        f.pad(found.map_or("", |(name, _)| name))
    }
}

/// One launch that a schedule would make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EmittedKernel {
    /// The kernel's name.
    pub name: String,
    /// Units of a cube.
    pub cube_dim: [u32; 3],
    /// Cubes of the launch; `None` when the device decides.
    pub cube_count: Option<[u32; 3]>,
    /// The source, the same at every run and on every machine (see `stable.rs` and `stable_spirv.rs`).
    pub source: String,
}

/// Why no source came out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EmitError {
    /// The batch can't be scheduled.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// A launch can't be made on that target.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A target whose compiler this build doesn't have.
    #[error("this build of flora has no compiler for {0}; build it with `--features wgpu`")]
    NotBuilt(Target),
    /// The compiler of that target refuses a kernel.
    #[error("the kernel `{kernel}` doesn't compile for this target: {reason}")]
    Compile {
        /// Which kernel.
        kernel: String,
        /// The compiler's words.
        reason: String,
    },
}

/// Which pass of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pass {
    /// y of x.
    #[default]
    Forward,
    /// dx by the plan's lowerings, and the gradients of the adapters' vectors.
    Backward,
}

/// A pass that is laid out.
enum LaidOut {
    Forward(Schedule),
    Backward(BackwardSchedule),
}

impl LaidOut {
    fn of(emission: &Emission) -> Result<Self, ScheduleError> {
        let Emission { pass, shape, plan, segments, adapters, .. } = emission;
        let finishes = !emission.epilogue.is_identity();
        Ok(match pass {
            Pass::Forward => Self::Forward(schedule(plan, *shape, segments, adapters, finishes)?),
            Pass::Backward => Self::Backward(backward_schedule(plan, *shape, segments, adapters)?),
        })
    }

    /// Inputs, outputs and the merged adapter that it needs: slots of both pools, and rows.
    fn needs(&self) -> (u32, u32, u32, Option<u32>) {
        match self {
            Self::Forward(own) => (own.in_slots(), own.out_slots(), own.tokens(), own.merged_adapter()),
            Self::Backward(own) => (own.in_slots(), own.out_slots(), own.tokens(), own.input().merged_adapter()),
        }
    }
}

/// What is emitted: the launches of `plan` for one batch.
#[derive(Clone, Debug)]
pub struct Emission<'a> {
    /// Which pass.
    pub pass: Pass,
    /// Extents.
    pub shape: LayerShape,
    /// Types.
    pub format: LayerFormat,
    /// Bias, activation, residual.
    pub epilogue: Epilogue,
    /// The lowerings.
    pub plan: Plan,
    /// The batch.
    pub segments: &'a [Segment],
    /// Its adapters.
    pub adapters: &'a [AdapterSlots],
}

/// CUDA text as [`EmittedKernel::source`] has it: without what cubecl's compiler makes of it by accident, and compiling to the same.
#[must_use]
pub fn stable_cuda_text(source: &str) -> String {
    stable::stable_source(source)
}

/// What a routine sees of a card.
pub fn hardware(capability: Capability) -> Hardware {
    Hardware::of(&<Cuda as recorder::Dialect>::properties(capability.version()))
}

/// The launches that `emission` would make on `target`, in order.
///
/// # Errors
/// Whatever keeps the batch from being launched there.
pub fn emit(target: Target, emission: &Emission) -> Result<Vec<EmittedKernel>, EmitError> {
    by_target!(target, record, emission)
}

fn record<R>(variant: u16, emission: &Emission) -> Result<Vec<EmittedKernel>, EmitError>
where
    R: Runtime<Device = OfflineDevice>,
    R::Server: cubecl::server::ComputeServer<Info = recorder::Recording>,
{
    let (launched, records) = recorded::<R>(variant, None, emission, 1)?;
    launched?;
    records.kernels.into_iter().collect()
}

/// Runs a batch's schedule on a recorder, `layers` times; `largest_buffer` in place of the recorder's own limit.
fn recorded<R>(
    variant: u16,
    largest_buffer: Option<u64>,
    emission: &Emission,
    layers: usize,
) -> Result<(Result<(), LaunchError>, Records), ScheduleError>
where
    R: Runtime<Device = OfflineDevice>,
    R::Server: cubecl::server::ComputeServer<Info = recorder::Recording>,
{
    let laid_out = LaidOut::of(emission)?;
    let client = R::client(&OfflineDevice { variant });
    let sums = LowRankSums::default();
    let mut hardware = Hardware::of(client.properties());
    hardware.largest_buffer = largest_buffer.unwrap_or(hardware.largest_buffer);
    let buffers = || Buffers::new(&client, emission, laid_out.needs());
    Ok(client.info().record(buffers, |Buffers { layer, x, outputs }| {
        let launched = (0..layers).try_for_each(|_| match &laid_out {
            // SAFETY: a recorder has no memory that a kernel could miss.
            LaidOut::Forward(schedule) => unsafe {
                launch(&client, &hardware, &layer, &sums, schedule, &x, outputs.as_ref()).map(drop)
            },
            // SAFETY: as above.
            LaidOut::Backward(schedule) => unsafe {
                let rows = (&x, outputs.as_ref().unwrap_or(&x));
                backward(&client, &hardware, &layer, &sums, schedule, rows, Wanted::All).map(drop)
            },
        });
        let _ = client.read_one(x);
        launched
    }))
}

/// What a batch's launches read.
struct Buffers {
    layer: LayerBuffers,
    x: Handle,
    /// The residual, or the output's gradient.
    outputs: Option<Handle>,
}

impl Buffers {
    /// For slots of both pools, rows, and the merged adapter.
    fn new<R: Runtime>(
        client: &ComputeClient<R>,
        emission: &Emission,
        (in_slots, out_slots, tokens, merged): (u32, u32, u32, Option<u32>),
    ) -> Self {
        let LayerShape { d, k } = emission.shape;
        let buffer = |bytes: u64| client.empty(bytes.next_multiple_of(4) as usize);
        let LayerFormat { activations, adapters, weight, .. } = emission.format;
        let pool = |slots: u32, width: u32| {
            let slots = slots.max(1);
            Pool { handle: buffer(adapters.bytes() * u64::from(slots) * u64::from(width)), slots }
        };
        let layer = LayerBuffers {
            shape: emission.shape,
            format: emission.format,
            base_weight: buffer(weight.bytes(emission.shape) - 4 * weight.scale_words(emission.shape)),
            weight_scales: weight.quantisation().map(|_| buffer(4 * weight.scale_words(emission.shape))),
            bias: emission.epilogue.bias.then(|| buffer(4 * u64::from(k))),
            in_pool: pool(in_slots, d),
            out_pool: pool(out_slots, k),
            epilogue: emission.epilogue,
            merged: merged
                .map(|adapter| Merged { adapter, weight: buffer(activations.bytes() * u64::from(d) * u64::from(k)) }),
        };
        let rows = u64::from(tokens.max(1));
        let x = buffer(activations.bytes() * rows * u64::from(d));
        let reads_outputs = emission.epilogue.residual || emission.pass == Pass::Backward;
        let outputs = reads_outputs.then(|| buffer(activations.bytes() * rows * u64::from(k)));
        // What is asked of the recorder is handed to its own thread; a read waits for it.
        let _ = client.read_one(x.clone());
        Self { layer, x, outputs }
    }
}

/// Segments of so many rows, each with an adapter of its own of one rank: a batch to emit launches for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EqualBatch {
    /// Rank of every adapter.
    pub rank: u32,
    /// Segments, and adapters.
    pub segments: u32,
    /// Rows of a segment.
    pub rows: u32,
}

impl EqualBatch {
    /// Its segments, and where the pools have the vectors of their adapters, one adapter behind the other. Where the plan merges, the
    /// first one's weight is resident.
    pub fn of(self, layer: &CompiledLayer, plan: &Plan) -> (Vec<Segment>, Vec<AdapterSlots>) {
        let stride = layer.slots(self.rank, 0);
        let stride = stride.in_slots().max(stride.out_slots());
        let segments = (0..self.segments).map(|adapter| Segment { rows: self.rows, adapter });
        let adapters = (0..self.segments).map(|adapter| AdapterSlots {
            is_merged: plan.merges() && adapter == 0,
            ..layer.slots(self.rank, adapter.saturating_mul(stride))
        });
        (segments.collect(), adapters.collect())
    }
}

/// The launches that `plan` makes on `target` for a batch of equal segments of a layer.
///
/// # Errors
/// Whatever keeps the batch from being launched there.
pub fn emit_layer(
    layer: &CompiledLayer,
    target: Target,
    plan: Plan,
    kind: (LayerShape, LayerFormat),
    batch: EqualBatch,
) -> Result<Vec<EmittedKernel>, EmitError> {
    emit_pass(layer, target, (Pass::Forward, plan), kind, batch)
}

/// The launches of the backward pass of such a batch: dx by `plan`, [`Plan::fixed_adjoint`] in projections, and the gradients of the
/// adapters' vectors.
///
/// # Errors
/// Whatever keeps the batch from being launched there.
pub fn emit_gradient(
    layer: &CompiledLayer,
    target: Target,
    plan: Plan,
    kind: (LayerShape, LayerFormat),
    batch: EqualBatch,
) -> Result<Vec<EmittedKernel>, EmitError> {
    emit_pass(layer, target, (Pass::Backward, plan), kind, batch)
}

fn emit_pass(
    layer: &CompiledLayer,
    target: Target,
    (pass, plan): (Pass, Plan),
    (shape, format): (LayerShape, LayerFormat),
    batch: EqualBatch,
) -> Result<Vec<EmittedKernel>, EmitError> {
    let (segments, adapters) = batch.of(layer, &plan);
    let epilogue = layer.epilogue();
    emit(target, &Emission { pass, shape, format, epilogue, plan, segments: &segments, adapters: &adapters })
}

#[cfg(test)]
mod tests {
    use flora_plan::batch::{BatchShape, LowRankSlots, VirtualRowSlots};
    use flora_plan::layer::Element;
    use flora_plan::schedule::can_hold;
    use proptest::prelude::*;

    use super::recorder::Offline;
    use super::*;

    /// The one adapter of a kind with this width.
    fn adapter(kind: u32, width: u32) -> AdapterSlots {
        let scales = VirtualRowSlots { in_scale: Some(0), out_scale: Some(0) };
        let low_rank = LowRankSlots { shrink: 0, expand: 0, rank: width };
        let many = vec![scales; width as usize];
        match kind {
            0 => AdapterSlots::base(),
            1 => AdapterSlots { virtual_rows: many, ..AdapterSlots::base() },
            2 => AdapterSlots { low_rank, ..AdapterSlots::base() },
            3 => AdapterSlots { virtual_rows: vec![scales], low_rank, is_merged: false },
            _ => AdapterSlots { virtual_rows: many, low_rank, is_merged: false },
        }
    }

    fn batches() -> impl Strategy<Value = (Vec<Segment>, Vec<AdapterSlots>)> {
        let adapters = proptest::collection::vec((0u32..5, 1u32..20), 1..5);
        let segments = proptest::collection::vec((0u32..40, 0usize..100), 1..8);
        // One past the last adapter: no weight is resident.
        (adapters, segments, 0usize..6).prop_map(|(adapters, segments, merged)| {
            let count = adapters.len();
            let segments =
                segments.into_iter().map(|(rows, adapter)| Segment { rows, adapter: (adapter % count) as u32 });
            let adapters = adapters.into_iter().enumerate().map(|(position, (kind, width))| AdapterSlots {
                is_merged: position == merged,
                ..adapter(kind, width)
            });
            (segments.collect(), adapters.collect())
        })
    }

    fn plans() -> impl Strategy<Value = Plan> {
        let all: Vec<Plan> = Plan::all().collect();
        (0..all.len(), any::<bool>(), 0usize..Plan::ON_CHIP_FROM.len()).prop_map(move |(plan, splits, rows)| {
            let plan = all[plan].with_on_chip_from(Plan::ON_CHIP_FROM[rows]);
            if splits { plan.with_split() } else { plan }
        })
    }

    /// Bytes that cubecl rounds the size of a buffer up to.
    const PAGE: u64 = 512;

    /// What a launch does on a card whose largest buffer has `limit` bytes.
    fn launched(limit: u64, emission: &Emission) -> (Result<(), LaunchError>, Records) {
        let variant = Capability::Sm90.version();
        recorded::<Offline<Cuda>>(variant, Some(limit), emission, 1).expect("it is scheduled")
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

        /// A plan that the device can hold is launched, and no buffer is longer than the device's longest; on a device that can't
        /// hold its longest buffer nothing is launched at all.
        #[test]
        fn what_can_be_held_is_launched(
            (segments, adapters) in batches(),
            plan in plans(),
            d in prop_oneof![1u32..80, Just(1024)],
            k in 1u32..80,
            half: bool,
        ) {
            let (shape, batch) = (LayerShape { d, k }, BatchShape::of(&segments, &adapters));
            let format = LayerFormat::uniform(if half { Element::F16 } else { Element::F32 });
            let (segments, adapters) = (&segments[..], &adapters[..]);
            let emission = Emission { pass: Pass::Forward, shape, format, epilogue: Epilogue::default(), plan, segments, adapters };
            // The shortest that it can hold.
            let (mut refused, mut held) = (0u64, 1 << 40);
            while held - refused > 1 {
                let middle = u64::midpoint(refused, held);
                if can_hold(&plan, shape, &batch, Some(middle)) { held = middle } else { refused = middle }
            }
            // Buffers that stand in for what isn't read are of a few words.
            let held = held.max(16);
            let (outcome, records) = launched(held, &emission);
            prop_assert_eq!(outcome, Ok(()), "{} bytes", held);
            let largest = records.largest_buffer;
            prop_assert!(largest <= held.next_multiple_of(PAGE), "{} of {} bytes", largest, held);
            if largest > PAGE {
                let (refusal, records) = launched(largest - PAGE, &emission);
                let refused = matches!(refusal, Err(LaunchError::BufferTooLarge { .. }));
                prop_assert!(refused, "{:?}", refusal);
                prop_assert_eq!(records.kernels.len(), 0);
            }
        }
    }

    /// What a schedule's tables say is uploaded once for all layers that run it, and the low-rank sums of `fused` are emptied by the
    /// launches themselves.
    #[test]
    fn tables_are_uploaded_once_a_schedule() {
        let adapters: Vec<_> = (0..5).map(|kind| adapter(kind, 3)).collect();
        let segments: Vec<_> = (0..5).map(|adapter| Segment { rows: 1 + 17 * (adapter % 2), adapter }).collect();
        let (shape, epilogue) = (LayerShape { d: 96, k: 64 }, Epilogue::default());
        for plan in Plan::unmerged() {
            let (segments, adapters) = (&segments[..], &adapters[..]);
            let emission = Emission {
                pass: Pass::Forward,
                shape,
                format: LayerFormat::default(),
                epilogue,
                plan,
                segments,
                adapters,
            };
            let uploads = |layers: usize| {
                let variant = Capability::Sm90.version();
                let (outcome, records) =
                    recorded::<Offline<Cuda>>(variant, None, &emission, layers).expect("scheduled");
                assert_eq!(outcome, Ok(()));
                (records.uploads.len(), records.kernels.len())
            };
            let ((once, launches), (thrice, launches_of_three)) = (uploads(1), uploads(3));
            assert_eq!(launches_of_three, 3 * launches, "{plan:?}");
            assert_eq!(thrice, once, "{plan:?}");
        }
    }

    /// Partial sums are in no plan but in the memory of the device.
    #[test]
    fn partial_sums_are_within_the_limit() {
        let (shape, plan) = (LayerShape { d: 4096, k: 64 }, Plan::default().with_split());
        let (segments, adapters) = (&[Segment { rows: 512, adapter: 0 }][..], &[AdapterSlots::base()][..]);
        let epilogue = Epilogue::default();
        let emission =
            Emission { pass: Pass::Forward, shape, format: LayerFormat::default(), epilogue, plan, segments, adapters };
        let y = 512 * 64 * 4;
        let (refused, records) = launched(y, &emission);
        let limit = LaunchError::BufferTooLarge { what: "partial sums", bytes: 8 * y, limit: y };
        assert_eq!((refused, records.kernels.len()), (Err(limit), 0));
        assert!(!can_hold(&plan, shape, &BatchShape::of(segments, adapters), Some(y)));
        assert!(can_hold(&Plan::default(), shape, &BatchShape::of(segments, adapters), Some(y)));
        assert_eq!(launched(y, &Emission { plan: Plan::default(), ..emission }).0, Ok(()));
    }

    /// Memory is taken from a client of the device itself, and from no other.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    #[test]
    fn memory_of_another_client_is_not_shared() {
        use flora_runtime::{BackendKind, Device, DeviceError, DeviceInfo};

        use crate::runtime::backend::CubeBackend;
        use crate::runtime::share;

        let client = |capability: Capability| {
            let device = OfflineDevice { variant: capability.version() };
            (<Offline<Cuda> as Runtime>::client(&device), device)
        };
        let (client_of_it, place) = client(Capability::Sm90);
        let (client_of_another, _) = client(Capability::Sm80);
        let info = DeviceInfo::unstarted("it".into(), "it".into(), BackendKind::Cuda, String::new(), true);
        let device = Device::new(info, CubeBackend::new(client_of_it.clone(), place));
        let of_another = client_of_another.empty(64);
        let refused = share(&device, &client_of_another, of_another, 16, Element::F32);
        assert!(matches!(refused, Err(DeviceError::ForeignMemory { .. })), "{refused:?}");
        // Another client of the same device is as good as its own.
        let (second_client, _) = client(Capability::Sm90);
        let shared = share(&device, &second_client, second_client.empty(64), 16, Element::F32);
        assert_eq!(shared.expect("memory of the device").len(), 16);
        let short = share(&device, &second_client, second_client.empty(32), 16, Element::F32);
        assert!(short.is_err(), "{short:?}");
    }
}
