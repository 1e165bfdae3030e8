//! The page of curves: how losses and learning rates of jobs went, over all runs that their metrics tell of.

use std::collections::BTreeMap;

use flora_train::{Event, Happened};

use crate::commands::plot::{Axis, Chart, Look, Series, Sheet};

/// The most points of a curve; where there are more steps, a point is the mean of several.
const MOST_POINTS: usize = 600;

/// The curves of all jobs, by name.
#[derive(Debug, Default)]
pub(super) struct Curves {
    jobs: BTreeMap<String, Curve>,
}

/// Of one job: pairs of a step and what there was at it.
#[derive(Debug, Default)]
struct Curve {
    /// Whether the command that runs now trains it.
    is_shown: bool,
    losses: Vec<[f64; 2]>,
    rates: Vec<[f64; 2]>,
    held_out: Vec<[f64; 2]>,
}

impl Curves {
    /// What a file of metrics tells of runs before this one. Lines that tell of no event are passed over.
    pub(super) fn of_metrics(lines: &str) -> Self {
        let mut curves = Self::default();
        lines.lines().filter_map(|line| serde_json::from_str(line).ok()).for_each(|event| curves.hear(&event));
        curves.jobs.values_mut().for_each(|curve| curve.is_shown = false);
        curves
    }

    pub(super) fn hear(&mut self, event: &Event) {
        let curve = self.jobs.entry(event.job.clone()).or_default();
        curve.is_shown = true;
        match event.what {
            // Steps after the state that it goes on from are made again.
            Happened::Started { step, .. } => {
                let (step, Curve { losses, rates, held_out, .. }) = (step as f64, curve);
                [losses, rates, held_out].into_iter().for_each(|points| points.retain(|[at, _]| *at <= step));
            }
            Happened::Step { step, loss, rate, .. } => {
                curve.losses.push([step as f64, loss]);
                curve.rates.push([step as f64, rate]);
            }
            Happened::Evaluated { step, loss, .. } => curve.held_out.push([step as f64, loss]),
            Happened::Saved { .. } | Happened::NotSaved { .. } | Happened::Ended { .. } => {}
        }
    }

    /// The page.
    pub(super) fn svg(&self) -> String {
        let shown = self.jobs.iter().filter(|(_, curve)| curve.is_shown).enumerate();
        let shown: Vec<_> = shown.map(|(number, (job, curve))| (Look::of(number), job, curve)).collect();
        let chart = |label: &str, points: fn(&Curve) -> &[[f64; 2]]| {
            let all = || shown.iter().flat_map(|(_, _, curve)| points(curve)).copied();
            let (x, y) = (Axis::linear("step", all().map(|[x, _]| x)), Axis::linear(label, all().map(|[_, y]| y)));
            let series = shown.iter().flat_map(|(look, _, curve)| series(*look, points(curve))).collect();
            Chart { x, y, series, verticals: Vec::new() }
        };
        let charts = vec![
            ("Loss on what is learnt, before each step", chart("nats a target", |curve| &curve.losses)),
            ("Loss on what is held out", chart("nats a target", |curve| &curve.held_out)),
            ("Learning rate", chart("rate", |curve| &curve.rates)),
        ];
        Sheet { legend: shown.iter().map(|(look, job, _)| (*look, (*job).clone())).collect(), charts }.svg()
    }
}

/// A line with its marker at every point where there are few, else at the last.
fn series(look: Look, points: &[[f64; 2]]) -> Vec<Series> {
    const FEW: usize = 40;
    let points = thinned(points);
    let own = |look: Look, points: Vec<[f64; 2]>| Series { look, points, bars: Vec::new() };
    match points.last().copied() {
        Some(last) if points.len() > FEW => vec![own(look.unmarked(), points), own(look, vec![last])],
        _ => vec![own(look, points)],
    }
}

/// Means of as many neighbours as it takes for the most points.
fn thinned(points: &[[f64; 2]]) -> Vec<[f64; 2]> {
    let mean = |part: &[[f64; 2]]| {
        let of = |coordinate: usize| part.iter().map(|point| point[coordinate]).sum::<f64>() / part.len() as f64;
        [of(0), of(1)]
    };
    points.chunks(points.len().div_ceil(MOST_POINTS).max(1)).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(job: &str, what: &str) -> String {
        format!("{{\"seconds\":1.5,\"job\":\"{job}\",{what}}}\n")
    }

    fn started(job: &str, step: u64) -> String {
        line(job, &format!("\"event\":\"started\",\"step\":{step},\"steps\":9,\"parameters\":4,\"tokens\":7"))
    }

    fn step(job: &str, step: u64, loss: f64) -> String {
        let rest = "\"steps\":9,\"rate\":0.01,\"norm\":1.0,\"tokens\":8,\"targets\":7";
        line(job, &format!("\"event\":\"step\",\"step\":{step},\"loss\":{loss},{rest}"))
    }

    fn losses(curves: &Curves, job: &str) -> Vec<[f64; 2]> {
        curves.jobs[job].losses.clone()
    }

    #[test]
    fn steps_that_are_made_again_count_once_and_a_fresh_job_begins_anew() {
        let mut lines = started("own", 0) + &(1..=3).map(|at| step("own", at, 4.0)).collect::<String>();
        lines += &line("own", "\"event\":\"evaluated\",\"step\":3,\"loss\":3.5,\"targets\":9,\"best\":true");
        lines += "{\"job\":\"own\",\"event\":\"of another version\"}\nno JSON\n";
        lines += &(started("own", 1) + &step("own", 2, 2.0));
        lines += &line("own", "\"event\":\"ended\",\"step\":2,\"reason\":{\"reason\":\"complete\"}");
        let mut curves = Curves::of_metrics(&lines);
        assert_eq!(losses(&curves, "own"), [[1.0, 4.0], [2.0, 2.0]]);
        assert!(curves.jobs["own"].held_out.is_empty(), "it was evaluated at a step that is made again");
        assert!(!curves.svg().contains("own"), "a job of former runs alone isn't shown");
        curves.hear(&serde_json::from_str(&started("own", 0)).expect("an event"));
        assert!(losses(&curves, "own").is_empty());
    }

    #[test]
    fn every_job_has_a_line_in_every_chart_and_a_name_in_the_legend() {
        let mut curves = Curves::default();
        let mut hear = |line: String| curves.hear(&serde_json::from_str(&line).expect("an event"));
        for job in ["one", "two <&>"] {
            hear(started(job, 0));
            for at in 1..=2000 {
                hear(step(job, at, 5.0 - at as f64 * 1e-3));
                if at % 500 == 0 {
                    let loss = 4.9 - at as f64 * 1e-3;
                    hear(line(
                        job,
                        &format!("\"event\":\"evaluated\",\"step\":{at},\"loss\":{loss},\"targets\":9,\"best\":true"),
                    ));
                }
            }
        }
        let svg = curves.svg();
        assert!(svg.contains("one") && svg.contains("two &lt;&amp;&gt;"), "names are text");
        // Two jobs in three charts, and in the legend; axes and grids are lines of other widths.
        assert_eq!(svg.matches("stroke-width=\"4\"").count(), 2 * 3 + 2);
        let longest = svg.lines().filter(|line| line.contains("<polyline")).map(|line| line.matches(',').count()).max();
        assert!(longest.is_some_and(|points| (400..=MOST_POINTS).contains(&points)), "{longest:?}");
        assert!(["nats a target", "rate", "step", "2000"].iter().all(|label| svg.contains(label)));
    }

    #[test]
    fn a_page_without_events_is_a_page() {
        let svg = Curves::default().svg();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
}
