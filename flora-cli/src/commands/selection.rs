//! What kernels are emitted for: a layer, a target, types, and a batch of equal segments.

use clap::Args;
use clap::builder::RangedU64ValueParser;
use flora::prelude::*;
use flora_codegen::target::{EqualBatch, Target};
use flora_plan::lowering::{Part, PartLowering, lowerings_of};

use super::error::CommandError;
use super::{layer, types};

/// A layer and a batch, as the command line says it.
#[derive(Args)]
pub(super) struct Selection {
    /// A built-in layer (linear, flora, flora_mean, hira, lora, ia3, ia3_feedforward, dora) or a file in the text form
    pub(super) layer: String,
    /// cuda:sm_80, cuda:sm_90, cuda:sm_100, wgsl or spirv
    #[arg(long, default_value = "cuda:sm_90")]
    target: String,
    /// stacked, on_chip, bmm or merged for what is multiplied into the weight (fLoRA, HiRA, IA3), fused, segmented, bmm or merged for
    /// what is added (LoRA); the layer's first legal one unless given
    #[arg(long)]
    lowering: Option<String>,
    /// Inputs of the layer
    #[arg(long, default_value = "576", value_parser = RangedU64ValueParser::<u32>::new().range(1..=65536))]
    d: u32,
    /// Outputs of the layer
    #[arg(long, default_value = "576", value_parser = RangedU64ValueParser::<u32>::new().range(1..=65536))]
    k: u32,
    /// Rank of every adapter
    #[arg(long, default_value = "8", value_parser = RangedU64ValueParser::<u32>::new().range(1..=1024))]
    rank: u32,
    /// Segments of the batch, each with an adapter of its own; 4 unless given, 1 for `merged`, where the first one's weight is
    /// resident
    #[arg(long, value_parser = RangedU64ValueParser::<u32>::new().range(1..=256))]
    segments: Option<u32>,
    /// Rows of a segment
    #[arg(long, default_value = "16", value_parser = RangedU64ValueParser::<u32>::new().range(1..=4096))]
    rows: u32,
    /// The type of activations; the equation's types unless given, which are f32 where it names none
    #[arg(long, value_parser = types::element())]
    dtype: Option<Element>,
    /// The type of adapters; that of the activations, or the equation's, unless given
    #[arg(long, value_parser = types::element())]
    adapter_dtype: Option<Element>,
    /// The format of the base weight; the type of the activations, or the equation's, unless given
    #[arg(long, value_parser = types::weight_format())]
    weight: Option<WeightFormat>,
    /// Let cubes share the depth where the device would be short of work
    #[arg(long)]
    pub(super) split: bool,
}

/// The same, compiled and checked.
pub(super) struct Chosen {
    pub(super) compiled: CompiledLayer,
    pub(super) target: Target,
    pub(super) plan: Plan,
    pub(super) shape: LayerShape,
    pub(super) format: LayerFormat,
    pub(super) batch: EqualBatch,
}

impl Selection {
    /// What is asked for; the backward pass has another plan unless one is given.
    pub(super) fn chosen(&self, gradient: bool) -> Result<Chosen, CommandError> {
        let compiled = layer::open(&self.layer)?.compiled;
        let target = self.target.parse()?;
        let plan = match (gradient, self.lowering.as_deref()) {
            (true, None) => Plan::fixed_adjoint(),
            (_, lowering) => plan_of(&self.layer, &compiled.parts, lowering)?,
        };
        let plan = if self.split { plan.with_split() } else { plan };
        let &Self { d, k, rank, rows, .. } = self;
        let segments = self.segments.unwrap_or(if plan.merges() { 1 } else { 4 });
        let format = self.dtype.map_or_else(|| compiled.format(), LayerFormat::uniform);
        let format = LayerFormat {
            adapters: self.adapter_dtype.unwrap_or(format.adapters),
            weight: self.weight.unwrap_or(format.weight),
            ..format
        };
        let shape = LayerShape { d, k };
        if !format.weight.fits(shape) {
            return Err(CommandError::PartialBlock { format: format.weight, block: format.weight.whole(1), d });
        }
        Ok(Chosen { compiled, target, plan, shape, format, batch: EqualBatch { rank, segments, rows } })
    }
}

/// The plan in which every part of the layer that `lowering` can compute is computed by it.
fn plan_of(layer: &str, parts: &[Part], lowering: Option<&str>) -> Result<Plan, CommandError> {
    let rows = || parts.iter().flat_map(|part| lowerings_of(*part));
    let wrong = |lowering: &str| {
        let names: Vec<_> = rows().map(|row| row.lowering().name()).collect();
        let help = match &names[..] {
            [] => "the layer has no adapter, only the base GEMM; leave --lowering out".to_owned(),
            names => format!("it can be lowered by {}", names.join(" or ")),
        };
        CommandError::WrongLowering { layer: layer.to_owned(), lowering: lowering.to_owned(), help }
    };
    let Some(name) = lowering else { return Ok(Plan::default()) };
    let wanted = Lowering::from_name(name).ok_or_else(|| wrong(name))?;
    if rows().all(|row| row.lowering() != wanted) {
        return Err(wrong(wanted.name()));
    }
    let computing = [Part::Multiplicative, Part::Additive].map(|part| PartLowering::find(part, wanted));
    Ok(computing.into_iter().flatten().fold(Plan::default(), Plan::with_part))
}
