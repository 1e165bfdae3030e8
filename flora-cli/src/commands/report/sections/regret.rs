//! What the planner's choices cost against the fastest candidate, as measured.

use std::collections::BTreeMap;

use super::{count, missing, percent};
use crate::commands::output;
use crate::commands::plot::Bars;
use crate::commands::report::document::{Block, Figure, Section, Table, Tile};
use crate::commands::report::page::{Choice, Regret};

const TITLE: &str = "The planner's regret";

pub(super) fn section(planner: &[Regret]) -> Section {
    let id = "regret";
    if planner.is_empty() {
        let sentence = "Measurements of the planner's choices weren't given. This makes them:";
        let commands = ["flora bench planner --json > planner.json", "flora report --planner planner.json"];
        return missing(id, TITLE, sentence, &commands);
    }
    let words = "At every point of a grid that tuning has not timed, all candidates were run. The regret of a point is how much longer \
                 the chosen lowering took than the fastest one: 3 % is 1.03 times as long.";
    let mut blocks = vec![Block::Paragraph(words.to_owned())];
    for regret in planner {
        blocks.push(Block::Heading(format!("{}, {}", regret.device, regret.format)));
        let mut tiles = vec![
            Tile { value: regret.points.to_string(), label: "points" },
            Tile { value: percent(regret.top1), label: "chose the fastest" },
            Tile { value: percent(regret.mean_regret), label: "mean regret" },
            Tile { value: percent(regret.p95_regret), label: "95th percentile" },
            Tile { value: percent(regret.max_regret), label: "worst" },
        ];
        let error = regret.median_error.map(percent);
        tiles.extend(error.map(|value| Tile { value, label: "prediction off by, median" }));
        blocks.push(Block::Tiles(tiles));
        if !regret.results.is_empty() {
            blocks.push(Block::Figures { keys: Vec::new(), figures: vec![histogram(&regret.results)] });
            blocks.push(Block::Heading("By what was chosen".to_owned()));
            blocks.push(Block::Table(by_chosen(&regret.results)));
        }
        if !regret.worst.is_empty() {
            blocks.push(Block::Heading("The worst cases".to_owned()));
            blocks.push(Block::Table(choices(&regret.worst)));
        }
        if !regret.results.is_empty() {
            let summary = format!("Every point: {}", count(regret.results.len(), "result", "results"));
            blocks.push(Block::Folded { summary, table: choices(&regret.results) });
        }
    }
    Section { id, title: TITLE, blocks }
}

fn histogram(results: &[Choice]) -> Figure {
    // Upper ends; a regret of nothing is a bin of its own.
    const BINS: [(f64, &str); 7] = [
        (0.0, "0"),
        (0.01, "≤ 1"),
        (0.03, "≤ 3"),
        (0.1, "≤ 10"),
        (0.3, "≤ 30"),
        (1.0, "≤ 100"),
        (f64::INFINITY, "more"),
    ];
    let mut bars: Vec<_> = BINS.iter().map(|(_, label)| ((*label).to_owned(), 0)).collect();
    for result in results {
        let bin = BINS.iter().position(|(end, _)| result.regret <= *end).unwrap_or(BINS.len() - 1);
        bars[bin].1 += 1;
    }
    let within = results.iter().filter(|result| result.regret <= 0.03).count();
    let caption = format!("{within} of {} are within 3 %.", count(results.len(), "point", "points"));
    let bars = Bars { x: "regret, %", bars };
    Figure { title: "Points by regret".to_owned(), svg: bars.svg(), caption }
}

fn by_chosen(results: &[Choice]) -> Table {
    let mut groups = BTreeMap::<_, Vec<&Choice>>::new();
    for result in results {
        groups.entry((&result.adapter, &result.chosen)).or_default().push(result);
    }
    let mut table = Table::new(&["<adapter", "<chosen", ">points", ">was the fastest", ">mean regret", ">worst"]);
    for ((adapter, chosen), group) in groups {
        let points = group.len() as f64;
        let fastest = group.iter().filter(|result| result.chosen == result.fastest).count();
        let regrets = || group.iter().map(|result| result.regret);
        table.rows.push(vec![
            adapter.clone(),
            chosen.clone(),
            group.len().to_string(),
            percent(fastest as f64 / points),
            percent(regrets().sum::<f64>() / points),
            percent(regrets().fold(0.0, f64::max)),
        ]);
    }
    table
}

fn choices(results: &[Choice]) -> Table {
    let mut table = Table::new(&[
        "<adapter",
        ">d",
        ">k",
        ">tokens",
        ">segments",
        ">adapters",
        ">rank",
        ">regret",
        "<chosen",
        "<fastest",
        "<candidates: measured (predicted)",
    ]);
    for result in results {
        let candidates = result.candidates.iter().map(|candidate| {
            let [seconds, predicted] = [candidate.seconds, candidate.predicted_seconds].map(output::seconds);
            format!("{} {seconds} ({predicted})", candidate.lowering)
        });
        table.rows.push(vec![
            result.adapter.clone(),
            result.d.to_string(),
            result.k.to_string(),
            result.tokens.to_string(),
            result.segments.to_string(),
            match (result.adapters, result.shared) {
                (Some(adapters), _) => adapters.to_string(),
                (None, true) => "shared".to_owned(),
                (None, false) => "distinct".to_owned(),
            },
            result.rank.to_string(),
            percent(result.regret),
            result.chosen.clone(),
            result.fastest.clone(),
            candidates.collect::<Vec<_>>().join(", "),
        ]);
    }
    table
}
