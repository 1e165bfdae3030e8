//! `cargo xtask test`: every test there is, and a table of what ran.
//!
//! Some tests need things from outside (the CUDA compilers, lavapipe, the real model, the client of the OpenAI API, lm-eval, a
//! browser, pytest), which are fetched first. Where one can't be had, what depends on it is listed as not run, loudly; in CI or
//! with `--strict` that fails.

mod python;

use std::fmt;
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use flora_toolchain::{Cache, Chromium, CudaCompiler, CxxCompiler, Lavapipe, lm_eval, openai_client, smollm2};

use crate::cargo::{self, Tally};

/// Cases for each fuzz test, chosen so that all of them take about a minute.
const FUZZ_CASES: &str = "6000";

/// Tests once more on a device that this machine plays. A device compiles its kernels by one thread, so parts run side by side.
struct Part {
    suite: &'static str,
    /// The task of this program that starts the test binary, where it needs one.
    runner: &'static [&'static str],
    device: &'static str,
    /// Tests and filters.
    arguments: &'static [&'static str],
}

const LAVAPIPE: &str = "conformance on lavapipe";
const EMULATED: &str = "conformance on CUDA text";
const SANITIZED: &str = "CUDA text, sanitized";

/// The longest first. An emulated card is slow: every format on one of them, and on the others and under sanitizers a few of each.
/// `docs/gpu.md` says how to run the rest.
const PARTS: [Part; 10] = [
    Part::on_lavapipe(&["--test", "conformance", "--", "isolation::"]),
    Part::on_lavapipe(&["--test", "conformance", "--", "formats::", "golden::", "decoding::"]),
    Part::emulated(
        "cuda-emulated:sm_90",
        &[
            "--test",
            "conformance",
            "--",
            "formats::",
            "decoding::",
            "gradients_equal",
            "of_a_gradient",
            "in_one_batch",
            "a_batch",
            "wrong_batches",
        ],
    ),
    Part::on_lavapipe(&[
        "--test",
        "conformance",
        "--",
        "oracle::",
        "gradients_equal",
        "gradients_over",
        "of_a_gradient",
    ]),
    Part::on_lavapipe(&["--test", "decoders"]),
    Part::on_lavapipe(&["--test", "conformance", "--", "give_peft_s_outputs"]),
    Part::emulated(
        "cuda-emulated:sm_80",
        &["--test", "conformance", "--", "a_merged", "a_split", "a_batch", "gradients_of_one"],
    ),
    Part::emulated(
        "cuda-emulated:sm_100",
        &["--test", "conformance", "--", "a_merged", "a_split", "a_batch", "gradients_of_one"],
    ),
    Part::sanitized(
        &["sanitize", "thread"],
        &["--test", "conformance", "--", "a_split", "a_batch", "gradients_of_one"],
    ),
    Part::sanitized(
        &["sanitize", "address"],
        &["--test", "conformance", "--", "a_split", "a_batch", "gradients_of_one"],
    ),
];

/// How strict to be.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Fail when something could not run; implied by CI=true.
    #[arg(long)]
    strict: bool,
}

/// One line of the table.
struct Row {
    suite: &'static str,
    outcome: Outcome,
    /// What the test binaries that failed said last.
    failures: Vec<String>,
    time: Duration,
}

/// What came of a suite.
enum Outcome {
    /// All of so many tests passed.
    Passed(u64),
    /// Some failed, or could not be built.
    Failed(String),
    /// Nothing ran, and why.
    NotRun(String),
    /// Nothing ran, and nobody expects it to, and why.
    LeftOut(String),
}

/// Runs everything.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let ci = std::env::var("CI").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"));
    let strict = arguments.strict || ci;

    let cuda = need("tests of generated CUDA", CudaCompiler::ensure());
    let model = need("tests on the real model", smollm2());
    let client = need("tests by the openai client", openai_client());
    let lm_eval = need("tests by lm-eval", lm_eval());
    let chromium = need("tests of the page", Chromium::ensure());
    let lavapipe = need(LAVAPIPE, Lavapipe::ensure());
    let cxx = need(EMULATED, CxxCompiler::ensure());

    let mut workspace = cargo::test(&[]);
    // A relative FLORA_CACHE would mean another folder to each test, which runs in its package's.
    if let Ok(cache) = Cache::open() {
        workspace.env("FLORA_CACHE", cache.root());
    }
    for (variable, thing) in [
        ("FLORA_CUDA", &cuda),
        ("FLORA_MODEL", &model),
        ("FLORA_OPENAI", &client),
        ("FLORA_LM_EVAL", &lm_eval),
        ("FLORA_CHROMIUM", &chromium),
        ("FLORA_CXX", &cxx),
    ] {
        workspace.env(variable, presence(thing));
    }
    let mut rows = vec![suite("workspace", workspace)];
    let there = |part: &&Part| if part.suite == LAVAPIPE { lavapipe.is_ok() } else { cxx.is_ok() };
    rows.extend(side_by_side(PARTS.iter().filter(there)));
    rows.extend([lavapipe, cxx].into_iter().filter_map(Result::err));
    let mut fuzz = cargo::test(&["--tests", "fuzz"]);
    fuzz.env("FLORA_FUZZ_CASES", FUZZ_CASES);
    rows.push(suite("fuzz", fuzz));
    rows.extend(python::suites());
    rows.extend([cuda, model, client, lm_eval, chromium].into_iter().filter_map(Result::err));
    report(&rows, strict)
}

/// Whether what `suite` needs was had; the row that says it did not run where that fails.
fn need<T>(suite: &'static str, fetched: Result<T, impl fmt::Display>) -> Result<(), Row> {
    fetched.map(drop).map_err(|error| {
        eprintln!("warning: {error}");
        Row { suite, outcome: Outcome::NotRun(error.to_string()), failures: Vec::new(), time: Duration::ZERO }
    })
}

/// How the tests are told whether a thing is there.
fn presence(thing: &Result<(), Row>) -> &'static str {
    if thing.is_ok() { "required" } else { "absent" }
}

impl Part {
    const fn on_lavapipe(arguments: &'static [&'static str]) -> Self {
        Self { suite: LAVAPIPE, runner: &["lavapipe"], device: "wgpu", arguments }
    }

    const fn emulated(device: &'static str, arguments: &'static [&'static str]) -> Self {
        Self { suite: EMULATED, runner: &[], device, arguments }
    }

    const fn sanitized(runner: &'static [&'static str], arguments: &'static [&'static str]) -> Self {
        Self { suite: SANITIZED, runner, device: "cuda-emulated:sm_90", arguments }
    }

    fn command(&self) -> Command {
        let mut command = cargo::test(&[]);
        if !self.runner.is_empty() {
            // Where this program isn't found, cargo finds no runner and the part fails: without one it would test something else.
            let xtask = std::env::current_exe().unwrap_or_else(|_| "xtask".into());
            let xtask = xtask.to_string_lossy();
            let words = [&[&*xtask], self.runner, &["--"]].concat();
            // Rust's escapes are TOML's. A configuration, not the variable for it, because that is cut at spaces.
            command.arg("--config").arg(format!("target.'cfg(all())'.runner={words:?}"));
        }
        command.args(self.arguments).env("FLORA_TEST_DEVICE", self.device);
        command
    }
}

/// Runs parts, as many at a time as this machine has processors, and adds up those of a suite; a suite's time is from its first start
/// to its last end.
fn side_by_side<'a>(parts: impl Iterator<Item = &'a Part> + Send) -> Vec<Row> {
    let start = Instant::now();
    let waiting = Mutex::new(parts);
    let done: Mutex<Vec<(Duration, Row)>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let next = waiting.lock().map_or(None, |mut parts| parts.next());
                    let Some(part) = next else { return };
                    let began = start.elapsed();
                    let row = suite(part.suite, part.command());
                    if let Ok(mut done) = done.lock() {
                        done.push((began, row));
                    }
                }
            });
        }
    });
    let mut rows: Vec<(Duration, Row)> = Vec::new();
    for (began, row) in done.into_inner().unwrap_or_default() {
        match rows.iter_mut().find(|(_, other)| other.suite == row.suite) {
            None => rows.push((began, row)),
            Some((first, sum)) => {
                let end = (*first + sum.time).max(began + row.time);
                *first = (*first).min(began);
                sum.time = end - *first;
                sum.failures.extend(row.failures);
                sum.outcome = std::mem::replace(&mut sum.outcome, Outcome::Passed(0)).and(row.outcome);
            }
        }
    }
    rows.into_iter().map(|(_, row)| row).collect()
}

/// Runs one suite.
fn suite(suite: &'static str, command: Command) -> Row {
    eprintln!("\n== {suite}");
    let start = Instant::now();
    let (outcome, failures) = match cargo::tally(command) {
        Ok(tally) => (Outcome::of(&tally), tally.failures),
        Err(error) => (Outcome::Failed(format!("cargo can't be run: {error}")), Vec::new()),
    };
    Row { suite, outcome, failures, time: start.elapsed() }
}

/// Prints the table and gives the exit code.
fn report(rows: &[Row], strict: bool) -> ExitCode {
    for Row { suite, failures, .. } in rows {
        for failure in failures {
            println!("\n== what failed in {suite}, again:\n{failure}");
        }
    }
    println!("\n{:<26}{:>9}  result", "suite", "seconds");
    for Row { suite, outcome, time, .. } in rows {
        println!("{suite:<26}{:>9.1}  {outcome}", time.as_secs_f64());
    }
    let failed = rows.iter().any(|row| matches!(row.outcome, Outcome::Failed(_)));
    let not_run = rows.iter().filter(|row| matches!(row.outcome, Outcome::NotRun(_))).count();
    if not_run > 0 {
        let consequence = if strict { "which fails here" } else { "--strict makes that a failure" };
        println!("\nNOT RUN: {not_run} of {}; {consequence}", rows.len());
    }
    if failed || (strict && not_run > 0) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

impl Outcome {
    /// Of two parts of one suite.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Passed(one), Self::Passed(other)) => Self::Passed(one + other),
            (Self::Failed(reason), _) | (_, Self::Failed(reason)) => Self::Failed(reason),
            (Self::NotRun(reason), _) | (_, Self::NotRun(reason)) => Self::NotRun(reason),
            (Self::LeftOut(reason), _) | (_, Self::LeftOut(reason)) => Self::LeftOut(reason),
        }
    }

    fn of(tally: &Tally) -> Self {
        match *tally {
            Tally { failed: 1.., .. } => Self::Failed(format!("{} tests failed", tally.failed)),
            Tally { success: false, .. } => Self::Failed("a build failed or a test was cut off; see above".to_owned()),
            Tally { passed: 0, .. } => Self::NotRun("there is no such test".to_owned()),
            Tally { passed, .. } => Self::Passed(passed),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed(tests) => write!(formatter, "ok: {tests} passed"),
            Self::Failed(reason) => write!(formatter, "FAILED: {reason}"),
            Self::NotRun(reason) => write!(formatter, "NOT RUN: {reason}"),
            Self::LeftOut(reason) => write!(formatter, "left out: {reason}"),
        }
    }
}
