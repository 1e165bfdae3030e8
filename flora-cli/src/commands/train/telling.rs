//! What people and programs hear of jobs: a bar for each, a line of JSON for every event, a page of curves, and a table at the end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flora_train::{Ending, Event, Happened};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;

use super::curves::Curves;
use crate::commands::error::CommandError;
use crate::commands::output;

/// How long a page of curves stays, while there is news.
const BETWEEN_PAGES: Duration = Duration::from_secs(5);

/// Tells of events as they come.
pub(super) struct Telling {
    began: Instant,
    metrics: File,
    path: PathBuf,
    curves: Curves,
    page: PathBuf,
    /// When the page was written last.
    drawn: Option<Instant>,
    bars: MultiProgress,
    jobs: BTreeMap<String, Told>,
}

/// What is known of one job.
struct Told {
    bar: ProgressBar,
    began: Instant,
    tokens: u64,
    summary: Summary,
}

/// What became of a job.
#[derive(Clone, Debug, Default, Serialize)]
struct Summary {
    job: String,
    steps: u64,
    parameters: usize,
    /// Nats a target of the last step.
    loss: Option<f64>,
    /// On held-out data, of the first evaluation and of the best.
    held_out_before: Option<f64>,
    held_out: Option<f64>,
    /// Of its own data, from its start to its end: those of a shared batch count for its job alone.
    tokens_per_second: f64,
    ended: Option<Ending>,
}

/// An event as a line of the file.
#[derive(Serialize)]
struct Line<'a> {
    /// Since the command began.
    seconds: f64,
    #[serde(flatten)]
    event: &'a Event,
}

impl Telling {
    /// Adds to the file `path`, which is made where there is none, and draws what is in it on `page`.
    pub(super) fn new(path: &Path, page: PathBuf) -> Result<Self, CommandError> {
        let failed = |action| move |source| CommandError::Io { action, path: path.to_owned(), source };
        for parent in [path, &page].into_iter().filter_map(|path| path.parent()) {
            std::fs::create_dir_all(parent).map_err(failed("create"))?;
        }
        let former = match std::fs::read(path) {
            Ok(bytes) => Curves::of_metrics(&String::from_utf8_lossy(&bytes)),
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => Curves::default(),
            Err(source) => return Err(failed("read")(source)),
        };
        let metrics = File::options().append(true).create(true).open(path).map_err(failed("write"))?;
        let (began, bars, jobs) = (Instant::now(), MultiProgress::new(), BTreeMap::new());
        Ok(Self { began, metrics, path: path.to_owned(), curves: former, page, drawn: None, bars, jobs })
    }

    pub(super) fn tell(&mut self, event: &Event) -> Result<(), CommandError> {
        let line = serde_json::to_string(&Line { seconds: self.began.elapsed().as_secs_f64(), event })?;
        let failed = |source| CommandError::Io { action: "write", path: self.path.clone(), source };
        // One call, so that a line is whole where the process ends.
        self.metrics.write_all(format!("{line}\n").as_bytes()).map_err(failed)?;
        self.curves.hear(event);
        let is_news = matches!(event.what, Happened::Evaluated { .. } | Happened::Saved { .. });
        if is_news && self.drawn.is_none_or(|drawn| drawn.elapsed() > BETWEEN_PAGES) {
            self.draw();
        }
        let bars = &self.bars;
        let told = self.jobs.entry(event.job.clone()).or_insert_with(|| {
            let bar = bars.add(ProgressBar::new(0)).with_prefix(event.job.clone());
            let style = ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len} {msg} {eta}");
            let bar = match style {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            };
            bar.enable_steady_tick(Duration::from_millis(500));
            let summary = Summary { job: event.job.clone(), ..Summary::default() };
            Told { bar, began: Instant::now(), tokens: 0, summary }
        });
        told.hear(&event.what);
        Ok(())
    }

    /// Writes the page of curves. Training goes on where that fails.
    fn draw(&mut self) {
        self.drawn = Some(Instant::now());
        if let Err(error) = output::replace(&self.page, self.curves.svg().as_bytes()) {
            self.bars.suspend(|| output::note(&format!("the curves can't be written: {error}")));
        }
    }

    /// The table, or its JSON; an error where a job failed.
    pub(super) fn finish(mut self, out: &Path, json: bool) -> Result<(), CommandError> {
        self.draw();
        let (metrics, page) = (self.path.display(), self.page.display());
        let summaries: Vec<Summary> = self.jobs.into_values().map(|told| told.summary).collect();
        match json {
            true => output::print_json(&summaries)?,
            false => {
                output::print(&table(&summaries))?;
                output::print(&format!("\nadapters in {}, metrics in {metrics}, curves in {page}\n", out.display()))?;
            }
        }
        let is_good = |ended: &Ending| matches!(ended, Ending::Complete | Ending::NoGain | Ending::Stopped);
        let failed = summaries.iter().find(|own| !own.ended.as_ref().is_some_and(is_good));
        match failed {
            None => Ok(()),
            Some(own) => Err(CommandError::NotTrained {
                job: own.job.clone(),
                reason: own.ended.as_ref().map(Ending::to_string).unwrap_or_default(),
            }),
        }
    }
}

impl Told {
    fn hear(&mut self, what: &Happened) {
        let summary = &mut self.summary;
        match what {
            Happened::Started { step, steps, parameters, .. } => {
                (summary.steps, summary.parameters) = (*step, *parameters);
                self.bar.set_length(*steps);
                self.bar.set_position(*step);
                self.bar.reset_eta();
            }
            Happened::Step { step, loss, tokens, .. } => {
                self.tokens += tokens;
                (summary.steps, summary.loss) = (*step, Some(*loss));
                summary.tokens_per_second = self.tokens as f64 / self.began.elapsed().as_secs_f64().max(1e-9);
                self.bar.set_position(*step);
                self.bar.set_message(message(summary));
            }
            Happened::Evaluated { loss, best, .. } => {
                summary.held_out_before.get_or_insert(*loss);
                if *best {
                    summary.held_out = Some(*loss);
                }
                self.bar.set_message(message(summary));
            }
            Happened::NotSaved { problem, .. } => {
                self.bar.suspend(|| output::note(&format!("{}: not saved: {problem}", summary.job)))
            }
            Happened::Ended { reason, .. } => {
                summary.ended = Some(reason.clone());
                self.bar.finish();
            }
            Happened::Saved { .. } => {}
        }
    }
}

fn message(summary: &Summary) -> String {
    let mut message = summary.loss.map(|loss| format!("loss {loss:.3}, ")).unwrap_or_default();
    if let Some(held_out) = summary.held_out {
        message += &format!("held out {held_out:.3}, ");
    }
    format!("{message}{:.0} tokens/s", summary.tokens_per_second)
}

fn table(summaries: &[Summary]) -> String {
    let mut table =
        output::table(&["<job", ">steps", ">parameters", ">loss", ">held out before", ">after", ">tokens/s", "<ended"]);
    let number = |number: Option<f64>| number.map_or_else(|| "-".to_owned(), |number| format!("{number:.4}"));
    for own in summaries {
        table.add_row([
            own.job.clone(),
            own.steps.to_string(),
            own.parameters.to_string(),
            number(own.loss),
            number(own.held_out_before),
            number(own.held_out),
            format!("{:.0}", own.tokens_per_second),
            own.ended.as_ref().map(Ending::to_string).unwrap_or_default(),
        ]);
    }
    output::lines(&table)
}
