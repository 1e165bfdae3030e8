//! flora compiles the equation of a low-rank-adapted layer into kernels that serve a batch in which every request brings its
//! own adapter.
//!
//! ```
//! use flora::prelude::*;
//!
//! /// StarCoder's query projection with per-request fLoRA adapters (Eq. 5 of the paper).
//! #[flora::layer]
//! fn query(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
//!     x.matmul(w0 * b.matmul(a))
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = devices::host();
//! let layer = compile_verified(query::layer())?;
//! let (d, k, rank) = (3, 2, 1);
//!
//! // Each user's tensors, folded once, when they are loaded.
//! let tensors = Bindings::from_iter([
//!     ("b", Value::matrix(d, rank, vec![1.0, 2.0, 3.0])?),
//!     ("a", Value::matrix(rank, k, vec![10.0, 100.0])?),
//! ]);
//! let alice = layer.linear.fold(&tensors)?;
//!
//! let base_weight = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
//! let mut projection = Projection::new(&device, LayerShape { d: 3, k: 2 }, &base_weight, None, layer.activation())?;
//! projection.load([("alice", Some(&alice))])?;
//!
//! // One row of alice's, one of the base model's, in one batch.
//! let batch = Batch::new([(Some("alice"), 1), (None, 1)]);
//! let plan = Plan::new(MultiplicativeLowering::Stacked, AdditiveLowering::Segmented);
//! let y = projection.forward(&batch, &plan, &[1.0, 1.0, 1.0, 1.0, 1.0, 1.0])?;
//! assert_eq!(y, [60.0, 600.0, 3.0, 3.0]);
//! # Ok(())
//! # }
//! ```

extern crate self as flora;

/// Equations as data: what [`macro@layer`] expands to.
pub use flora_ir as ir;
pub use flora_macros::layer;

/// Adapters and base weights from files.
pub mod adapters {
    pub use flora_adapters::{AdapterStore, BaseError, BaseForm, Layers, LoadedAdapter, RegisterError, StoreError};
    pub use flora_checkpoint::{
        AdapterError, AdapterFolder, AdapterKinds, AdapterModule, KindDescription, KindError, Model, ModelError,
        Operand,
    };
}

/// The devices that this build has code for.
pub mod devices {
    pub use flora_devices::{Unsupported, auto, host, list, open, unsupported};
}

/// How a batch is run: shapes and types, lowerings, prices, plans and schedules.
pub mod planning {
    pub use flora_plan::batch::{AdapterSlots, BatchShape, Segment};
    pub use flora_plan::cost::{DeviceCoefficients, LayerPrices, PricedLayer};
    pub use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
    pub use flora_plan::lowering::{AdditiveLowering, Lowering, MultiplicativeLowering, PartLowering};
    pub use flora_plan::plan::{Plan, plan};
    pub use flora_plan::schedule::{Schedule, ScheduleError, schedule};
    pub use flora_tune::Planner;
    pub use flora_tune::planner::Source;
}

/// Runs: a device, projections with their adapters, the operands below them, and what a kind of device implements.
pub mod runtime {
    pub use flora_plan::blueprints::{Blueprints, Tile};
    pub use flora_plan::schedule::{BackwardSchedule, Materialised};
    pub use flora_plan::weight::{PackedWeight, WeightError, WeightValues};
    pub use flora_runtime::backend::Queueing;
    pub use flora_runtime::{
        Backend, BackendKind, Batch, BatchError, BatchSegment, Buffer, Device, DeviceError, DeviceInfo, Gradients,
        LayerOperands, OperandError, PoolBuffer, Projection, ProjectionError, ProjectionGradient, ProjectionOptions,
        StepBatch, Storage, Wanted, WeightBuffer,
    };
}

/// Layers as Burn modules.
#[cfg(feature = "burn")]
pub mod burn {
    #[cfg(feature = "cuda")]
    pub use flora_burn::Cuda;
    #[cfg(feature = "wgpu")]
    pub use flora_burn::Wgpu;
    pub use flora_burn::{
        AdaptedLinear, BurnDevice, FloraBackend, Host, LinearError, Planning, StepBatch, TensorError,
    };
}

/// Outputs held against the equation in f64.
pub mod oracle {
    pub use flora_oracle::{Deviation, OracleError, Sample, check};
}

/// Kernels as text, without a device.
#[cfg(feature = "emit")]
pub mod target {
    pub use flora_codegen::target::{
        Capability, Emission, EmitError, EmittedKernel, EqualBatch, Pass, Target, UnknownTarget, emit, emit_gradient,
        emit_layer,
    };
}

/// A decoder behind an engine that batches continuously, and the OpenAI API before it.
#[cfg(feature = "serve")]
pub mod serving {
    pub use flora_engine::{
        AdapterChoice, AdapterContent, AdapterFacts, AdapterFailure, AdapterId, AdapterMetrics, AdapterOptions,
        AdapterRequests, AdapterSource, AdapterSpans, BlockId, BlockSharing, CompiledGrammar, Composition,
        CompositionError, Decoder, DecoderLimits, Engine, Event, FinishReason, Grammar, GrammarState, LogProbabilities,
        LogitRows, LogitRules, Metrics, Options, OptionsError, PlaceError, Request, RequestError, Sampling,
        ScoredToken, SequenceId, Span, SpanError, Spans, StepSegment, StopAt, Stream, Usage, Vocabulary,
    };
    pub use flora_model::{
        AdapterDirectory, DeviceModel, DirectoryError, PlanningChoice, PreparedAdapter, ServeError, ServeOptions, load,
    };
    pub use flora_server::{
        AdapterUpdates, AllowedOrigins, ApiKey, App, InvalidApiKey, InvalidOrigin, ServerError, ServerOptions,
        UpdateError, router, serve,
    };
    pub use flora_tokenizer::{ChatError, EncodeError, Tokenizer, TokenizerError};
}

/// Adapters that are trained, many at once over one base.
#[cfg(feature = "serve")]
pub mod training {
    pub use flora_model::{TargetScore, TrainError, TrainOptions, TrainedModel};
    pub use flora_train::{
        AdamW, Adapter, AddError, DataError, Dataset, Decay, EndedJob, Ending, Evaluation, Event, Happened, JobId,
        JobOptions, Length, NewJob, Places, Sources, Start, TrainSegment, Trainee, Trainer, Warmup,
    };
}

/// What a serving engine uses.
pub mod prelude {
    pub use flora_ir::{Activation, Bindings, Value};
    pub use flora_plan::cost::DeviceCoefficients;
    pub use flora_plan::layer::{Element, LayerFormat, LayerShape, WeightFormat};
    pub use flora_plan::lowering::{AdditiveLowering, Lowering, MultiplicativeLowering};
    pub use flora_plan::pipeline::{CompiledLayer, compile, compile_verified};
    pub use flora_plan::plan::Plan;
    pub use flora_plan::weight::PackedWeight;
    pub use flora_runtime::{Batch, Device, Projection, ProjectionOptions};
    pub use flora_tune::Planner;

    pub use crate::devices;
}

/// The Rust blocks of the README and of the pages in `docs`, run as tests.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/layers.md")]
    struct Layers;
    #[cfg(feature = "emit")]
    #[doc = include_str!("../docs/inspecting.md")]
    struct Inspecting;
}
