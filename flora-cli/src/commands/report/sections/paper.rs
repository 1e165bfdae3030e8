//! The paper's question on this device: up to which rank is fLoRA faster than LoRA by batched matmul, and does Eq. 7 say so?

use std::collections::{BTreeMap, BTreeSet};

use super::{count, missing};
use crate::commands::bench::paper::{Choice, Coordinates, Crossing, Curves};
use crate::commands::plot::Axis;
use crate::commands::plot::{Chart, GREY, INK, Look, Series};
use crate::commands::report::document::{Block, Figure, Key, Section, Table};
use crate::commands::report::page::{PaperPanel, Prediction};

const TITLE: &str = "The paper's analysis";

pub(super) fn section(panels: &[PaperPanel]) -> Section {
    let id = "paper";
    if panels.is_empty() {
        let sentence = "Throughput against rank at StarCoder's layers wasn't given. This measures it:";
        let commands =
            ["flora bench paper --weight f32,q8_0,q4_0 --json > paper.json", "flora report --paper paper.json"];
        return missing(id, TITLE, sentence, &commands);
    }
    let words = "Throughput of one adapted layer, every segment of the batch with an adapter of its own. LoRA by bmm and fLoRA by stacked \
                 are the paper's (A.2, Eq. 6); on_chip and fused are flora's own. fLoRA wins left of where its curve crosses that of \
                 LoRA by bmm. Eq. 7 puts that at the rank 1 / (1 − c1·(d + k) / (c2·d·k)), with c1 at that rank and c2 as this device has them. Marks are measured, with bars for the spread between quartiles; lines are what the cost model predicts, or join the marks where it can't.";
    let mut blocks = vec![Block::Paragraph(words.to_owned()), Block::Table(crossings(panels))];
    let words = "Batches are segments × tokens of each. “< 1” says that LoRA by bmm is the faster at every measured rank, \
                 of which 1 is the lowest, “> 16” that fLoRA is, up to rank 16.";
    blocks.push(Block::Paragraph(words.to_owned()));
    blocks.extend(quantised(panels));
    let mut groups = Vec::<(_, Vec<&PaperPanel>)>::new();
    for panel in panels {
        let Coordinates { device, dtype, weight, .. } = &panel.coordinates;
        in_group(&mut groups, (device, dtype, weight, panel.coordinates.batch()), panel);
    }
    let several = groups.iter().map(|((device, ..), _)| device).collect::<BTreeSet<_>>().len() > 1;
    for ((device, dtype, weight, batch), panels) in groups {
        let on = if several { format!(", on {device}") } else { String::new() };
        blocks.push(Block::Heading(format!("{dtype}, base weight {weight}: {batch}{on}")));
        let reasons = panels.iter().filter_map(|panel| match panel.prediction {
            Prediction::None(reason) => Some(reason),
            Prediction::Of { .. } => None,
        });
        let reasons: BTreeSet<_> = reasons.collect();
        blocks.extend(reasons.into_iter().map(|reason| Block::Paragraph(format!("No predictions: {reason}."))));
        let keys = keys(&panels);
        blocks.push(Block::Figures { keys, figures: panels.into_iter().map(figure).collect() });
    }
    Section { id, title: TITLE, blocks }
}

/// Groups in the order in which they come first.
fn in_group<'a, K: PartialEq>(groups: &mut Vec<(K, Vec<&'a PaperPanel>)>, key: K, panel: &'a PaperPanel) {
    match groups.iter_mut().find(|(known, _)| *known == key) {
        Some((_, panels)) => panels.push(panel),
        None => groups.push((key, vec![panel])),
    }
}

/// The curves in the order of the legend.
const CURVES: [(&str, &str, &str); 4] = [
    ("flora", "stacked", "fLoRA by stacked"),
    ("lora", "bmm", "LoRA by bmm"),
    ("flora", "on_chip", "fLoRA by on_chip"),
    ("lora", "fused", "LoRA by fused"),
];

fn keys(panels: &[&PaperPanel]) -> Vec<Key> {
    let mut keys = Vec::new();
    let predicted = panels.iter().any(|panel| matches!(panel.prediction, Prediction::Of { .. }));
    for (number, (adapter, lowering, words)) in CURVES.into_iter().enumerate() {
        if panels.iter().any(|panel| panel.measured.get(adapter, lowering).is_some()) {
            keys.push(Key::new(Look::of(number), words));
        }
    }
    keys.push(Key::new(Look::line(GREY), "base GEMM"));
    keys.push(Key::new(Look::line(INK), "crossing of the first two, measured"));
    if predicted {
        keys.push(Key::new(Look::line(INK).dashed(), "crossing by Eq. 7"));
    }
    keys
}

fn figure(panel: &PaperPanel) -> Figure {
    let Coordinates { model, layer, d, k, tokens, .. } = &panel.coordinates;
    let rate = |seconds: f64| f64::from(*tokens) / seconds;
    let ranks = panel.measured.iter().flat_map(|(_, _, seconds)| seconds.keys()).map(|rank| f64::from(*rank));
    let x = Axis::at("rank", ranks);
    let base = rate(panel.base_seconds);
    let predicted = match &panel.prediction {
        Prediction::Of { curves, .. } => Some(curves),
        Prediction::None(_) => None,
    };
    let rates = |curves: &Curves, adapter: &str, lowering: &str| -> Vec<[f64; 2]> {
        let curve = curves.get(adapter, lowering).into_iter().flatten();
        curve.map(|(rank, seconds)| [f64::from(*rank), rate(*seconds)]).collect()
    };
    let mut series =
        vec![Series { look: Look::line(GREY), points: vec![[x.low(), base], [x.high(), base]], bars: Vec::new() }];
    for (number, (adapter, lowering, _)) in CURVES.into_iter().enumerate() {
        let look = Look::of(number);
        let points = rates(&panel.measured, adapter, lowering);
        let own = panel
            .records
            .iter()
            .filter(|record| (record.adapter.as_str(), record.lowering.as_str()) == (adapter, lowering));
        let bars = own.map(|record| {
            let reach = record.seconds * (record.spread / 2.0).min(0.9);
            [f64::from(record.rank), rate(record.seconds + reach), rate(record.seconds - reach)]
        });
        let bars = bars.collect();
        match predicted {
            Some(curves) => {
                let points = rates(curves, adapter, lowering);
                series.push(Series { look: look.unmarked(), points, bars: Vec::new() });
                series.push(Series { look: look.unjoined(), points: rates(&panel.measured, adapter, lowering), bars });
            }
            None => series.push(Series { look, points, bars }),
        }
    }
    let y = Axis::over("tokens per second", series.iter().flat_map(|series| &series.points).map(|[_, y]| *y));
    let mut verticals = Vec::new();
    let crossing = panel.measured.crossing(Choice::Stacked);
    if let Some(Crossing::At(rank)) = crossing {
        verticals.push((rank, Look::line(INK)));
    }
    let mut caption = format!("d {d}, k {k}. Crossing: measured {}", shown(crossing));
    if let Prediction::Of { eq7, .. } = &panel.prediction {
        if let Crossing::At(rank) = eq7.rank {
            verticals.push((rank, Look::line(INK).dashed()));
        }
        caption += &format!(", by Eq. 7 {}", eq7.rank);
    }
    let title = format!("{model}, {layer}");
    Figure { title, svg: Chart { x, y, series, verticals }.svg(), caption: caption + "." }
}

fn shown(crossing: Option<Crossing>) -> String {
    crossing.map_or_else(|| "-".to_owned(), |crossing| crossing.to_string())
}

/// Measured, predicted and Eq. 7's crossings, with and without on_chip.
fn crossings(panels: &[PaperPanel]) -> Table {
    let mut table = Table::new(&[
        "<batch",
        "<model",
        "<layer",
        "<weight",
        ">c1, ps/MAC",
        ">c2, ps/MAC",
        ">by Eq. 7",
        ">by the cost model",
        ">measured",
        ">by the cost model, with on_chip",
        ">measured, with on_chip",
    ]);
    // The same layer with its weight in other formats comes next.
    let mut layers = Vec::<(_, Vec<&PaperPanel>)>::new();
    for panel in panels {
        let Coordinates { device, model, layer, segments, tokens, dtype, .. } = &panel.coordinates;
        let key = (device, dtype, segments, tokens, model, layer);
        in_group(&mut layers, key, panel);
    }
    for panel in layers.iter().flat_map(|(_, panels)| panels) {
        let Coordinates { model, layer, weight, segments, tokens, .. } = &panel.coordinates;
        let batch = format!("{segments} × {}", tokens / segments);
        let mut row = vec![batch, model.clone(), layer.clone(), weight.clone()];
        let measured = |choice| shown(panel.measured.crossing(choice));
        match &panel.prediction {
            Prediction::Of { curves, eq7 } => row.extend([
                format!("{:.2}", eq7.c1 * 1e12),
                format!("{:.2}", eq7.c2 * 1e12),
                eq7.rank.to_string(),
                shown(curves.crossing(Choice::Stacked)),
                measured(Choice::Stacked),
                shown(curves.crossing(Choice::Best)),
                measured(Choice::Best),
            ]),
            Prediction::None(_) => row.extend([
                "-".to_owned(),
                "-".to_owned(),
                "-".to_owned(),
                "-".to_owned(),
                measured(Choice::Stacked),
                "-".to_owned(),
                measured(Choice::Best),
            ]),
        }
        table.rows.push(row);
    }
    table
}

/// The paper expects a quantised base to move the crossing up: what happened, layer by layer.
fn quantised(panels: &[PaperPanel]) -> Option<Block> {
    let mut layers = BTreeMap::<_, BTreeMap<&str, Crossing>>::new();
    for panel in panels {
        let Coordinates { device, model, layer, segments, tokens, dtype, weight, .. } = &panel.coordinates;
        if let Some(crossing) = panel.measured.crossing(Choice::Stacked) {
            layers.entry((device, model, layer, segments, tokens, dtype)).or_default().insert(weight, crossing);
        }
    }
    // Moves by less are noise.
    const STEADY: f64 = 0.1;
    // [up, neither, down] by weight
    let mut moves = BTreeMap::<&str, [usize; 3]>::new();
    for ((.., dtype), crossings) in &layers {
        let Some(own) = crossings.get(dtype.as_str()) else { continue };
        for (weight, crossing) in crossings.iter().filter(|(weight, _)| *weight != dtype) {
            let ratio = height(crossing) / height(own);
            let direction = if ratio > 1.0 + STEADY {
                0
            } else if ratio < 1.0 / (1.0 + STEADY) {
                2
            } else {
                1
            };
            moves.entry(weight).or_default()[direction] += 1;
        }
    }
    let words = moves.iter().map(|(weight, [up, same, down])| {
        let all = up + same + down;
        let cases = count(all, "case", "cases");
        format!("with {weight} the measured crossing moves up by more than a tenth in {up} of {cases}, down in {down}, and neither in {same}")
    });
    let words: Vec<_> = words.collect();
    let text =
        format!("The paper expects a quantised base weight to move the crossing up. Here, {}.", words.join("; "));
    (!words.is_empty()).then_some(Block::Paragraph(text))
}

/// Crossings by how high they are; beyond the measured ranks, at the end of them.
fn height(crossing: &Crossing) -> f64 {
    match crossing {
        Crossing::Below(rank) => f64::from(*rank),
        Crossing::At(rank) => *rank,
        Crossing::Above(rank) => f64::from(*rank),
    }
}
