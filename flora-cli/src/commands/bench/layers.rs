//! `flora bench layers`: one layer by every lowering beside its base GEMM, and beside another program's.

use clap::Args;
use clap::builder::{PossibleValuesParser, RangedU64ValueParser};
use flora::prelude::*;
use flora_plan::lowering::{Row, TABLE};
use flora_runtime::BackendKind;

use super::case::{ADAPTERS, BASE, Case, MIXED, Tokens, Variant, Wanted, variants};
use super::peaks::{BANDWIDTH_BYTES, Peaks};
use super::peer::{Peer, Prepared};
use super::report::{Group, Record, Times, human};
use super::timed::Clock;
use crate::commands::error::CommandError;
use crate::commands::{output, types};

/// Time one layer: shapes × tokens × ranks × adapters × lowerings × types
///
/// Every variant of a shape has its turn, round after round; the first round warms up, the median of the others counts. A timed
/// repetition is untimed calls for 20 ms, one at least, and then the timed ones, on operands that are on the device already.
///
/// floor: max(MACs of the lowering / p, bytes / w), with p the MACs a second of the best large base GEMM and w the bytes a second
/// of the best large epilogue or one-row GEMM, both measured in the same run; each operand is read once and y written once.
///
/// mixed: what base rows cost among rows of other kinds. As many base rows as the other variants have tokens, and between them a
/// few single rows (one for each 32, at least 4), each with an adapter of its own: LoRA, fLoRA, HiRA, IA3 in turn. Single rows are
/// stacked under on_chip too, as the planner has it. Its time is
/// T(base rows alone) + T(mixed batch) − T(a base GEMM over as many rows as the mixed batch has virtual rows), the three taken one
/// after the other. So whatever the batch costs beyond a plain GEMM is charged to the base rows, the reading of the adapters' own
/// vectors too.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Arguments {
    /// The device, as `flora devices` lists it
    #[arg(long, default_value = "host")]
    device: String,
    /// Inputs and outputs of the layer; may be repeated; default 2048,2048
    #[arg(long, value_name = "D,K", value_parser = shape)]
    shape: Vec<LayerShape>,
    /// Segments, each with an adapter of its own, and tokens of each; may be repeated; default 8x32, 4x128 and 32x1
    #[arg(long, value_name = "SEGMENTSxTOKENS", value_parser = tokens)]
    tokens: Vec<Tokens>,
    /// Ranks, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "1,4,16", value_parser = RangedU64ValueParser::<u32>::new().range(1..=1024))]
    ranks: Vec<u32>,
    /// Types of activations and adapters, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "f32", value_parser = types::element())]
    dtype: Vec<Element>,
    /// Formats of the base weight, separated by commas; that of the activations unless given
    #[arg(long, value_delimiter = ',', value_parser = types::weight_format())]
    weight: Vec<WeightFormat>,
    /// Adapters, separated by commas; all unless given
    #[arg(long, value_delimiter = ',', value_parser = adapters())]
    adapters: Vec<String>,
    /// Lowerings, separated by commas; all unless given. `merged` needs a single segment
    #[arg(long, value_delimiter = ',', value_parser = types::lowering())]
    lowerings: Vec<Lowering>,
    /// Let cubes share the depth where a device would be short of work
    #[arg(long)]
    split: bool,
    /// Repetitions that count
    #[arg(long, default_value = "15", value_parser = RangedU64ValueParser::<usize>::new().range(1..=100_000))]
    rounds: usize,
    /// Calls in a timed repetition; unless given 1 on the host, elsewhere as many as take 20 ms, at most 20
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(1..=100_000))]
    calls: Option<usize>,
    /// Bytes that the bandwidth of the floor is measured over; fewer than the device's caches hold give a floor that is too low
    #[arg(long, default_value_t = BANDWIDTH_BYTES, value_parser = RangedU64ValueParser::<u64>::new().range(65_536..=1 << 36))]
    bandwidth_bytes: u64,
    /// A program to alternate with, such as "python benches/peers/torch_lora.py"; `--serve` is added to it
    #[arg(long, value_name = "COMMAND")]
    peer: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn adapters() -> PossibleValuesParser {
    PossibleValuesParser::new(ADAPTERS.iter().map(|(name, _)| *name).chain([MIXED]))
}

/// Two numbers with `separator` between them.
fn pair(text: &str, separator: char, largest: [u32; 2]) -> Result<[u32; 2], String> {
    let (one, other) = text.split_once(separator).ok_or_else(|| format!("there is no `{separator}` in it"))?;
    let number = |text: &str, largest: u32| match text.parse::<u32>() {
        Ok(number) if (1..=largest).contains(&number) => Ok(number),
        _ => Err(format!("`{text}` is no whole number from 1 to {largest}")),
    };
    Ok([number(one, largest[0])?, number(other, largest[1])?])
}

fn shape(text: &str) -> Result<LayerShape, String> {
    pair(text, ',', [65536; 2]).map(|[d, k]| LayerShape { d, k })
}

/// `SEGMENTSxTOKENS`
pub(super) fn tokens(text: &str) -> Result<Tokens, String> {
    pair(text, 'x', [4096, 65536]).map(|[segments, rows]| Tokens { segments, rows })
}

impl Arguments {
    fn cases(&self) -> Vec<Case> {
        let given = |tokens: &[Tokens]| match tokens {
            [] => [(8, 32), (4, 128), (32, 1)].map(|(segments, rows)| Tokens { segments, rows }).to_vec(),
            tokens => tokens.to_vec(),
        };
        let shapes = if self.shape.is_empty() { vec![LayerShape { d: 2048, k: 2048 }] } else { self.shape.clone() };
        let mut cases = Vec::new();
        for format in types::formats(&self.dtype, &self.weight) {
            for shape in &shapes {
                let case = |tokens| Case { shape: *shape, tokens, format };
                cases.extend(given(&self.tokens).into_iter().map(case));
            }
        }
        cases
    }

    fn wanted(&self) -> Wanted {
        let mut ranks = self.ranks.clone();
        ranks.sort_unstable();
        ranks.dedup();
        let adapters = match &self.adapters[..] {
            [] => ADAPTERS.iter().map(|(name, _)| *name).chain([MIXED]).map(str::to_owned).collect(),
            adapters => adapters.to_vec(),
        };
        let lowerings = match &self.lowerings[..] {
            [] => TABLE.iter().map(Row::lowering).collect(),
            lowerings => lowerings.to_vec(),
        };
        Wanted { ranks, adapters, lowerings, split: self.split }
    }
}

/// The peer's variants beside its base, and the adapter that each computes.
const PEER_VARIANTS: [(&str, &str); 3] = [("lora", "lora"), ("flora", "flora"), ("flora_einsum", "flora")];

/// The repetitions of a case, before the peaks of the whole run are known.
struct Taken {
    case: Case,
    own: Vec<(Variant, Times)>,
    peer: Vec<(Prepared, Times)>,
}

pub(super) fn layers(arguments: &Arguments) -> Result<(), CommandError> {
    let device = devices::open(&arguments.device)?;
    let calls = match (arguments.calls, device.info().backend) {
        (Some(calls), _) => [calls; 2],
        (None, BackendKind::Host) => [1, 1],
        (None, _) => [1, 20],
    };
    let clock = Clock { device: &device, calls };
    let (cases, wanted) = (arguments.cases(), arguments.wanted());
    let mut peer = arguments.peer.as_deref().map(Peer::start).transpose()?;
    let mut peaks = Peaks::over(arguments.bandwidth_bytes);

    let bar = output::progress(cases.len() * (arguments.rounds + 1), "measuring");
    let mut taken = Vec::with_capacity(cases.len());
    for case in cases {
        taken.push(measure(clock, case, &wanted, arguments.rounds, peer.as_mut(), &bar)?);
        peaks.measure(clock, case.format.activations)?;
    }
    bar.finish_and_clear();
    drop(peer);

    let name = format!("{} ({})", device.info().name, device.info().id);
    let groups: Vec<_> = taken.iter().map(|taken| group(&name, taken, &peaks)).collect();
    if arguments.json {
        let own = groups.iter().flat_map(|group| &group.own);
        return output::print_json(&own.chain(groups.iter().flat_map(|group| &group.peer)).collect::<Vec<_>>());
    }
    let rate = |element: &Element| format!("{:.1} GMAC/s in {element}", peaks.macs_per_second(*element) * 1e-9);
    let mut rates: Vec<_> = arguments.dtype.iter().map(rate).collect();
    rates.push(format!("{:.1} GB/s", peaks.bytes_per_second() * 1e-9));
    output::print(&human(&name, &rates, &groups))
}

/// Every variant of a case in turn, the peer's between ours, round after round.
fn measure(
    clock: Clock,
    case: Case,
    wanted: &Wanted,
    rounds: usize,
    mut peer: Option<&mut Peer>,
    bar: &indicatif::ProgressBar,
) -> Result<Taken, CommandError> {
    let mut left_out = Vec::new();
    let variants = variants(clock, case, wanted, &mut left_out)?;
    for variant in left_out {
        bar.suspend(|| output::note(&format!("note: left out: {variant}")));
    }
    let mut own: Vec<_> = variants.into_iter().map(|variant| (variant, Times::default())).collect();
    let mut theirs = Vec::new();
    if let Some(peer) = &mut peer {
        for (position, rank) in wanted.ranks.iter().enumerate() {
            let is_wanted = |(_, adapter): &(&str, &str)| wanted.adapters.iter().any(|wanted| wanted == adapter);
            let adapted = PEER_VARIANTS.into_iter().filter(is_wanted).map(|(name, _)| name);
            let base = (position == 0).then_some("base");
            let names: Vec<_> = base.into_iter().chain(adapted).collect();
            if !names.is_empty() {
                theirs.extend(peer.prepare(case, *rank, &names)?.into_iter().map(|one| (one, Times::default())));
            }
        }
    }
    for round in 0..=rounds {
        for position in 0..own.len().max(theirs.len()) {
            if let Some((variant, times)) = own.get_mut(position) {
                let seconds = variant.seconds(clock)?;
                // The first round warms up.
                if round > 0 {
                    times.push(seconds);
                }
            }
            if let (Some(peer), Some((variant, times))) = (&mut peer, theirs.get_mut(position)) {
                let seconds = peer.seconds(variant)?;
                if round > 0 {
                    times.push(seconds);
                }
            }
        }
        bar.inc(1);
    }
    if let Some(peer) = peer {
        let ids: std::collections::BTreeSet<_> = theirs.iter().map(|(variant, _)| variant.id).collect();
        ids.into_iter().try_for_each(|id| peer.drop_case(id))?;
    }
    Ok(Taken { case, own, peer: theirs })
}

/// The records of a case, with the best peaks of the whole run.
fn group(device: &str, Taken { case, own, peer }: &Taken, peaks: &Peaks) -> Group {
    let base = own.first().map_or(f64::NAN, |(_, times)| times.median());
    let theirs = peer.iter().find(|(one, _)| one.described.adapter == BASE);
    let theirs = theirs.map_or(f64::NAN, |(_, times)| times.median());
    Group {
        case: *case,
        own: own.iter().map(|(variant, times)| Record::own(device, *case, variant, times, base, peaks)).collect(),
        peer: peer.iter().map(|(one, times)| Record::peer(one, times, theirs)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_two_numbers_in_range() {
        assert_eq!(shape("12,7"), Ok(LayerShape { d: 12, k: 7 }));
        assert_eq!(tokens("8x32"), Ok(Tokens { segments: 8, rows: 32 }));
        for wrong in ["", "8", "x", "8x", "0x1", "8x32x1", "4097x1", "1x65537", "-1x1", "1x99999999999"] {
            assert!(tokens(wrong).is_err(), "{wrong}");
        }
    }
}
