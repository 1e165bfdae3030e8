//! `flora bench kinds`: what an adapter of each kind costs, from a folder of them: beside base rows, and beside a LoRA that has as many
//! low-rank components.

use std::path::PathBuf;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use flora::prelude::*;
use flora_adapters::AdapterStore;
use flora_checkpoint::{AdapterFolder, BaseWeight, Model};
use flora_ir::algebra::{FoldedAdapter, RankOne, VirtualRow};
use flora_plan::batch::BatchShape;
use flora_runtime::{BackendKind, Buffer, PlannedProjection, Planning, ProjectionError, StepBatch};
use serde::Serialize;

use super::case::Tokens;
use super::layers::tokens;
use super::report::Times;
use super::timed::{Clock, random, random_input};
use crate::commands::error::CommandError;
use crate::commands::kinds::KindArguments;
use crate::commands::{output, planner};

/// Time one adapter of each kind beside base rows, and beside LoRA of as many components
///
/// Every adapter of the folder has a batch to itself, each segment with a copy of its own, and is planned as in serving. Base rows,
/// the adapter and a LoRA that has as many low-rank components take turns over one base weight, round after round, every other round
/// the other way round; the ratios are taken in each round, and their medians are shown. benches/kinds.py makes a folder of PEFT's kinds.
///
/// base rows beside it: what base rows cost in a batch with a few single rows of the adapter (one for each 32, at least 4), over what they
/// cost by themselves: (T(such a batch) − what is the adapter's) / T(as many base rows). The adapter's is T(its few rows, then base rows) −
/// T(as few base rows, then base rows): so its vectors come from where they do in company, and each side has as many passes over w0.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Arguments {
    /// The device, as `flora devices` lists it
    #[arg(long, default_value = "host")]
    device: String,
    /// A .gguf file, a .safetensors file or a model's folder
    #[arg(long)]
    model: PathBuf,
    /// A folder of PEFT adapter folders
    #[arg(long, group = "sources")]
    adapters: PathBuf,
    #[command(flatten)]
    kinds: KindArguments,
    /// The projection; the first that the adapters have unless given
    #[arg(long, value_name = "PATH")]
    module: Option<String>,
    /// Segments and tokens of each; may be repeated; default 32x1 and 4x128
    #[arg(long, value_name = "SEGMENTSxTOKENS", value_parser = tokens)]
    tokens: Vec<Tokens>,
    /// Repetitions that count
    #[arg(long, default_value = "15", value_parser = RangedU64ValueParser::<usize>::new().range(1..=100_000))]
    rounds: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One adapter in one batch.
#[derive(Serialize)]
struct Record {
    adapter: String,
    kind: String,
    segments: u32,
    tokens: u32,
    /// Virtual rows of a token.
    rows_over_w0: usize,
    components: usize,
    plan: String,
    seconds: f64,
    ratio_to_base: f64,
    /// None for a kind without low-rank components, or with rows of its own over w0.
    ratio_to_lora: Option<f64>,
    base_rows_beside_it: f64,
    /// (third quartile − first quartile) / median of the ratio to the base.
    spread: f64,
}

/// A projection with copies of one adapter, ready to run.
struct Adapted {
    projection: PlannedProjection,
    x: Buffer,
}

/// A batch of a projection.
type Case<'a> = (&'a Adapted, &'a StepBatch);

/// Seconds of batches, one behind the other.
fn timed<'a>(clock: Clock<'_>, cases: (Option<Case<'a>>, Case<'a>)) -> Result<f64, ProjectionError> {
    let forward = |(adapted, batch): Case<'_>| adapted.projection.forward(&adapted.x, batch, None);
    clock.seconds_of(|| {
        cases.0.map(forward).transpose()?;
        forward(cases.1)
    })
}

pub(super) fn kinds(arguments: &Arguments) -> Result<(), CommandError> {
    let device = devices::open(&arguments.device)?;
    let model = Model::open(&arguments.model)?;
    let layers = arguments.kinds.layers()?;
    let store = AdapterStore::open(&arguments.adapters, layers.clone())?.fitting(&model);
    for error in store.failed().values() {
        output::note(&format!("warning: {error}"));
    }
    let path = match (&arguments.module, store.modules().first(), store.failed().values().next()) {
        (Some(path), _, _) => path.clone(),
        (None, Some(path), _) => (*path).to_owned(),
        (None, None, Some(error)) => return Err(CommandError::NoAdapter(error.clone())),
        (None, None, None) => String::new(),
    };
    let base = model.weight(&path)?;
    let (planner, _) = planner::for_device(&device)?;
    let device = planner.tuned(&device);
    let calls = if device.info().backend == BackendKind::Host { [1, 20] } else { [1, 200] };
    let bench = Bench { clock: Clock { device: &device, calls }, planner: &planner, base: &base };
    let tokens = match &arguments.tokens[..] {
        [] => &[Tokens { segments: 32, rows: 1 }, Tokens { segments: 4, rows: 128 }],
        tokens => tokens,
    };

    let names: Vec<_> = store.names().map(str::to_owned).collect();
    let bar = output::progress(names.len() * tokens.len(), "measuring");
    let mut records = Vec::new();
    for name in &names {
        let folder = AdapterFolder::open(&arguments.adapters.join(name), layers.kinds())?;
        let mut prepared = layers.prepare(&folder, &model)?;
        let Some(folded) = prepared.modules.remove(&path) else {
            bar.suspend(|| output::note(&format!("note: left out: `{name}` leaves {path} alone")));
            continue;
        };
        let offset = prepared.bias_offsets.remove(&path);
        for tokens in tokens {
            let measured = bench.measure(&folded, offset.as_deref(), *tokens, arguments.rounds)?;
            records.push(Record { adapter: name.clone(), kind: folder.kind.name().to_owned(), ..measured });
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    match arguments.json {
        true => output::print_json(&records),
        false => output::print(&human(&device, &base, &records)),
    }
}

struct Bench<'a> {
    clock: Clock<'a>,
    planner: &'a Planner,
    base: &'a BaseWeight,
}

impl Bench<'_> {
    fn shape(&self) -> LayerShape {
        LayerShape { d: self.base.d as u32, k: self.base.k as u32 }
    }

    /// A projection with `copies` of an adapter at the positions from 1 on, and as many of `lora` behind them.
    fn adapted(
        &self,
        (folded, offset): (&FoldedAdapter, Option<&[f32]>),
        lora: Option<&FoldedAdapter>,
        copies: u32,
        tokens: u32,
    ) -> Result<Adapted, CommandError> {
        let (shape, device) = (self.shape(), self.clock.device);
        let weight = PackedWeight::from_f32(WeightFormat::default(), shape, &self.base.values)?;
        let mut projection = Projection::from_packed(device, &weight, ProjectionOptions::default())?;
        let vectors_of = |folded: &FoldedAdapter| (folded.virtual_rows.len() + folded.low_rank.len()) as u32;
        let vectors = copies * (vectors_of(folded) + lora.map_or(0, vectors_of));
        projection.reserve(vectors, vectors)?;
        for position in 1..=copies {
            projection.place(position, folded)?;
            if let Some(offset) = offset {
                projection.set_offset(position, offset)?;
            }
            if let Some(lora) = lora {
                projection.place(copies + position, lora)?;
            }
        }
        let planning = Planning::Priced(Box::new(self.planner.prices(projection.layer())));
        let x = random_input(device, shape, projection.operands().format(), tokens)?;
        Ok(Adapted { projection: PlannedProjection::of(projection, planning), x })
    }

    fn measure(
        &self,
        folded: &FoldedAdapter,
        offset: Option<&[f32]>,
        tokens: Tokens,
        rounds: usize,
    ) -> Result<Record, CommandError> {
        let Tokens { segments, rows } = tokens;
        let all = tokens.all();
        let components = folded.low_rank.len();
        let is_additive = folded.virtual_rows.iter().all(|row| *row == VirtualRow::default());
        let lora = (components > 0 && is_additive).then(|| lora(self.shape(), components));
        let own = self.adapted((folded, offset), lora.as_ref(), segments, all)?;
        let batch = StepBatch::new((1..=segments).map(|position| (position, rows)));
        let of_lora = StepBatch::new((1..=segments).map(|position| (segments + position, rows)));
        let base_rows = StepBatch::new([(0, all)]);
        let few = (all / 32).max(4);
        let alone = StepBatch::new((0..few).map(|position| (1 + position % segments, 1)));
        let share = |position: u32| all * position / few;
        let between =
            (0..few).flat_map(|position| [(0, share(position + 1) - share(position)), (1 + position % segments, 1)]);
        let beside = StepBatch::new(between);
        let (alone_x, beside_x) = (self.rows(&own, few)?, self.rows(&own, all + few)?);

        let mut times = [(); 4].map(|()| Times::default());
        let [seconds, to_base, to_lora, company] = &mut times;
        let few_base = StepBatch::new([(0, few)]);
        let as_many = StepBatch::new([(0, all + few)]);
        let (own_rows, base_rows): (Case<'_>, Case<'_>) = ((&own, &batch), (&own, &base_rows));
        let (few_rows, few_base, as_many) = ((&alone_x, &alone), (&alone_x, &few_base), (&beside_x, &as_many));
        let cases = [
            Some((None, base_rows)),
            Some((None, own_rows)),
            lora.is_some().then_some((None, (&own, &of_lora))),
            Some((None, (&beside_x, &beside))),
            Some((None, as_many)),
            Some((Some(few_rows), as_many)),
            Some((Some(few_base), as_many)),
        ];
        for round in 0..=rounds {
            let mut taken = [f64::NAN; 7];
            let present = |(case, taken)| Option::zip(case, Some(taken));
            let mut order: Vec<_> = cases.into_iter().zip(&mut taken).filter_map(present).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for (case, taken) in order {
                *taken = timed(self.clock, case)?;
            }
            let [base, adapted, of_lora, both, as_many, behind_own, behind_base] = taken;
            // The first round warms up.
            if round > 0 {
                seconds.push(adapted);
                to_base.push(adapted / base);
                company.push((both - (behind_own - behind_base)) / as_many);
                to_lora.push(adapted / of_lora);
            }
        }
        let shape = own.projection.change(|projection| BatchShape::of(batch.segments(), projection.adapters()));
        let plan = own.projection.change(|projection| self.planner.plan(projection.layer(), &shape, false));
        Ok(Record {
            adapter: String::new(),
            kind: String::new(),
            segments,
            tokens: all,
            rows_over_w0: folded.virtual_rows.len().max(1),
            components,
            plan: plan.to_string(),
            seconds: seconds.median(),
            ratio_to_base: to_base.median(),
            ratio_to_lora: lora.map(|_| to_lora.median()),
            base_rows_beside_it: company.median(),
            spread: to_base.spread(),
        })
    }

    /// The same projection with another number of rows.
    fn rows(&self, adapted: &Adapted, rows: u32) -> Result<Adapted, CommandError> {
        let x = random_input(self.clock.device, self.shape(), LayerFormat::uniform(Element::F32), rows)?;
        Ok(Adapted { projection: adapted.projection.clone(), x })
    }
}

/// A LoRA of so many components.
fn lora(shape: LayerShape, components: usize) -> FoldedAdapter {
    let component = |number: usize| RankOne {
        shrink: random(shape.d as usize, 0.1, 2 * number as u64),
        expand: random(shape.k as usize, 0.1, 2 * number as u64 + 1),
    };
    let low_rank = (0..components).map(component).collect();
    FoldedAdapter { virtual_rows: vec![VirtualRow::default()], low_rank, ..FoldedAdapter::default() }
}

fn human(device: &Device, base: &BaseWeight, records: &[Record]) -> String {
    let mut text = format!("{} ({}), d {}, k {}, f32\n", device.info().name, device.info().id, base.d, base.k);
    let mut batches: Vec<_> = records.iter().map(|record| (record.segments, record.tokens)).collect();
    batches.sort_unstable();
    batches.dedup();
    batches.reverse();
    for (segments, tokens) in batches {
        text += &format!("\n{segments} segments of {} tokens\n", tokens / segments);
        let columns = [
            "<adapter",
            "<kind",
            ">rows over w0",
            ">components",
            "<plan",
            ">time",
            ">× base",
            ">± %",
            ">× LoRA",
            ">base rows beside it",
        ];
        let mut table = output::table(&columns);
        for record in records.iter().filter(|record| (record.segments, record.tokens) == (segments, tokens)) {
            table.add_row(vec![
                record.adapter.clone(),
                record.kind.clone(),
                record.rows_over_w0.to_string(),
                record.components.to_string(),
                record.plan.clone(),
                output::seconds(record.seconds),
                format!("{:.2}", record.ratio_to_base),
                format!("{:.1}", record.spread * 50.0),
                record.ratio_to_lora.map_or("-".to_owned(), |ratio| format!("{ratio:.3}")),
                format!("{:.3}", record.base_rows_beside_it),
            ]);
        }
        text += &output::lines(&table);
    }
    text
}
