//! The serving experiments as people read them.

use super::super::serving_answer::{Answer, Breakdown, Percentiles, Variant};
use crate::commands::output::{lines, seconds, table};

pub(super) fn human(answer: &Answer) -> String {
    let Answer { device, model, weights, dtype, adapted, sequences, throughput, latency, steps, breakdown } = answer;
    let adapted = adapted.join(", ");
    let mut text = format!(
        "{device}\n{model} ({weights} weights) in {dtype}, {sequences} sequences at once, adapters on {adapted}, one each request\n"
    );
    let name = |variant: &Variant| {
        let rank = if variant.rank == 0 { "-".to_owned() } else { variant.rank.to_string() };
        [variant.adapter.clone(), variant.lowering.clone(), rank]
    };
    if let Some(first) = throughput.first() {
        let bases: Vec<_> = throughput.iter().filter(|one| one.variant.rank == 0).collect();
        let base = bases.iter().map(|one| one.tokens_per_second).sum::<f64>() / bases.len() as f64;
        text += &format!(
            "\nThroughput: {} requests at once, {} prompt and {} generated tokens\n\n",
            first.requests, first.prompt_tokens, first.generated_tokens
        );
        let mut rows =
            table(&["<adapter", "<lowering", ">rank", ">steps", ">seconds", ">tokens/s", ">generated/s", ">of base"]);
        for one in throughput {
            let [adapter, lowering, rank] = name(&one.variant);
            rows.add_row([
                adapter,
                lowering,
                rank,
                one.steps.to_string(),
                format!("{:.1}", one.seconds),
                format!("{:.1}", one.tokens_per_second),
                format!("{:.1}", one.generated_per_second),
                format!("{:.3}", one.tokens_per_second / base),
            ]);
        }
        text += &lines(&rows);
    }
    if let Some(first) = latency.first() {
        text +=
            &format!("\nLatency: {} requests, {} a second expected; p50 / p95 / p99\n\n", first.requests, first.rate);
        let mut rows =
            table(&["<adapter", "<lowering", ">rank", ">first token", ">each further token", ">whole request"]);
        for one in latency {
            let [adapter, lowering, rank] = name(&one.variant);
            let of = |Percentiles { p50, p95, p99 }: Percentiles| {
                format!("{} / {} / {}", seconds(p50), seconds(p95), seconds(p99))
            };
            rows.add_row([
                adapter,
                lowering,
                rank,
                of(one.time_to_first_token),
                of(one.time_per_output_token),
                of(one.latency),
            ]);
        }
        text += &lines(&rows);
    }
    if !breakdown.is_empty() {
        text += &broken_down(breakdown);
    }
    if !steps.is_empty() {
        text += &format!("\nA decoding step of {sequences} sequences\n\n");
        let mut rows = table(&[
            "<model",
            "<adapter",
            "<lowering",
            ">rank",
            ">measured",
            ">of base",
            ">± %",
            ">predicted",
            ">off by",
            ">predicted, of base",
        ]);
        for one in steps {
            let [adapter, lowering, rank] = name(&one.variant);
            let off = one.seconds.map(|measured| (one.predicted_seconds / measured - 1.0) * 100.0);
            rows.add_row([
                one.model.clone(),
                adapter,
                lowering,
                rank,
                one.seconds.map_or("-".to_owned(), seconds),
                one.ratio_to_base.map_or("-".to_owned(), |ratio| format!("{ratio:.3}")),
                one.spread.map_or("-".to_owned(), |spread| format!("{:.1}", spread * 50.0)),
                seconds(one.predicted_seconds),
                off.map_or("-".to_owned(), |off| format!("{off:+.1} %")),
                format!("{:.3}", one.predicted_seconds / one.predicted_base_seconds),
            ]);
        }
        text += &lines(&rows);
        text += "\nOf base: the median of the ratios to the model without adapters, round by round in turn.\n\
                 Predicted: projections by tuned coefficients; of a measured model with the rest of its step without adapters, of\n\
                 others the projections alone.\n";
    }
    text
}

/// A table a workload: a column a variant.
fn broken_down(breakdown: &[Breakdown]) -> String {
    let mut workloads: Vec<&str> = breakdown.iter().map(|one| one.workload.as_str()).collect();
    let mut seen = std::collections::BTreeSet::new();
    workloads.retain(|workload| seen.insert(*workload));
    let mut text = String::new();
    for workload in workloads {
        let own: Vec<_> = breakdown.iter().filter(|one| one.workload == workload).collect();
        text += &format!("\n{workload}\n\n");
        let name = |one: &Breakdown| match one.variant.rank {
            0 => format!(">{}", one.variant.adapter),
            rank => format!(">{} {rank}, {}", one.variant.adapter, one.variant.lowering),
        };
        let columns: Vec<String> = std::iter::once("<".to_owned()).chain(own.iter().map(|one| name(one))).collect();
        let mut rows = table(&columns.iter().map(String::as_str).collect::<Vec<_>>());
        for (at, (part, _)) in own[0].parts.iter().enumerate() {
            let cell = |one: &&Breakdown| {
                let own = one.parts[at].1;
                format!("{} {:4.1} %", seconds(own), own / one.seconds * 100.0)
            };
            rows.add_row(std::iter::once(part.clone()).chain(own.iter().map(cell)).collect::<Vec<_>>());
        }
        let whole = own.iter().map(|one| seconds(one.seconds));
        rows.add_row(std::iter::once("all".to_owned()).chain(whole).collect::<Vec<_>>());
        text += &lines(&rows);
    }
    text
}
