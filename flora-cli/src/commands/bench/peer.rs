//! Another program that measures the same layer, started as a server and asked for one repetition at a time.
//!
//! One JSON object a line in both directions; the text at the top of `benches/peers/torch_lora.py` defines the protocol.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use flora::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};

use super::case::Case;

const PROTOCOL: u64 = 1;
/// The longest answer.
const LONGEST_ANSWER: u64 = 1 << 20;
/// The longest wait for an answer; a peer that starts, or measures its peaks, takes seconds.
const PATIENCE: Duration = Duration::from_secs(300);
/// Our own threads fall idle before the peer's turn.
const SETTLE: Duration = Duration::from_millis(5);

/// Why the peer is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    #[error("`--peer {0}` is no command: its quotes don't match, or it is empty")]
    NotACommand(String),
    #[error("can't start the peer `{command}`: {source}; the first word of --peer is a program")]
    Start { command: String, source: std::io::Error },
    #[error("the peer `{command}` ended before it answered; its own messages are above, if it had any")]
    Ended { command: String },
    #[error("the peer `{command}` gave no answer for {} s", PATIENCE.as_secs())]
    Silent { command: String },
    #[error("the peer `{command}` answered what its protocol doesn't know: {answer}")]
    Protocol { command: String, answer: String },
    #[error("the peer `{command}` refuses: {reason}")]
    Refused { command: String, reason: String },
}

/// A running peer.
pub(super) struct Peer {
    command: String,
    child: Child,
    /// `None` once it is closed.
    requests: Option<ChildStdin>,
    answers: Receiver<String>,
}

/// What the peer says of a variant before it is measured.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Described {
    pub(super) device: String,
    pub(super) d: u32,
    pub(super) k: u32,
    pub(super) dtype: String,
    pub(super) tokens: u32,
    pub(super) segments: u32,
    pub(super) rank: u32,
    pub(super) adapter: String,
    pub(super) lowering: String,
    pub(super) floor_seconds: f64,
}

/// A variant that the peer has prepared.
#[derive(Clone, Debug)]
pub(super) struct Prepared {
    pub(super) id: u64,
    pub(super) name: String,
    pub(super) described: Described,
}

impl Peer {
    /// Starts `command --serve` and waits for its greeting.
    pub(super) fn start(command: &str) -> Result<Self, PeerError> {
        let words = shlex::split(command).unwrap_or_default();
        let [program, arguments @ ..] = &words[..] else { return Err(PeerError::NotACommand(command.to_owned())) };
        let start = |source| PeerError::Start { command: command.to_owned(), source };
        let mut child = Command::new(program)
            .args(arguments)
            .arg("--serve")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(start)?;
        let (sender, answers) = channel();
        if let Some(output) = child.stdout.take() {
            // A thread of its own, so that a peer that says nothing can be given up.
            std::thread::spawn(move || {
                let mut output = BufReader::new(output);
                loop {
                    let mut line = String::new();
                    let read = (&mut output).take(LONGEST_ANSWER).read_line(&mut line);
                    if !matches!(read, Ok(length) if length > 0) || sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        let requests = child.stdin.take();
        let mut peer = Self { command: command.to_owned(), child, requests, answers };
        let greeting = peer.answer()?;
        match greeting["protocol"].as_u64() {
            Some(PROTOCOL) => Ok(peer),
            _ => Err(peer.unknown(&greeting)),
        }
    }

    /// Prepares variants of a case, by their names.
    pub(super) fn prepare(&mut self, case: Case, rank: u32, variants: &[&str]) -> Result<Vec<Prepared>, PeerError> {
        #[derive(Deserialize)]
        struct Answer {
            id: u64,
            variants: BTreeMap<String, Described>,
        }
        let Case { shape: LayerShape { d, k }, tokens, format } = case;
        let answer = self.ask(&json!({
            "d": d, "k": k, "dtype": format.activations.name(), "segments": tokens.segments,
            "tokens_per_segment": tokens.rows, "rank": rank, "variants": variants,
        }))?;
        let Ok(Answer { id, variants: mut described }) = Answer::deserialize(&answer) else {
            return Err(self.unknown(&answer));
        };
        let prepared = variants.iter().filter_map(|name| {
            described.remove(*name).map(|described| Prepared { id, name: (*name).to_owned(), described })
        });
        let prepared: Vec<_> = prepared.collect();
        if prepared.len() == variants.len() { Ok(prepared) } else { Err(self.unknown(&answer)) }
    }

    /// One timed repetition.
    pub(super) fn seconds(&mut self, variant: &Prepared) -> Result<f64, PeerError> {
        std::thread::sleep(SETTLE);
        let answer = self.ask(&json!({ "run": variant.id, "variant": variant.name }))?;
        let seconds = answer["seconds"].as_f64().filter(|seconds| *seconds > 0.0);
        seconds.ok_or_else(|| self.unknown(&answer))
    }

    /// Frees what was prepared under an id.
    pub(super) fn drop_case(&mut self, id: u64) -> Result<(), PeerError> {
        self.ask(&json!({ "drop": id })).map(drop)
    }

    fn ask(&mut self, request: &Value) -> Result<Value, PeerError> {
        let sent = self
            .requests
            .as_mut()
            .is_some_and(|requests| writeln!(requests, "{request}").and_then(|()| requests.flush()).is_ok());
        if sent { self.answer() } else { Err(PeerError::Ended { command: self.command.clone() }) }
    }

    fn answer(&mut self) -> Result<Value, PeerError> {
        let command = || self.command.clone();
        let line = self.answers.recv_timeout(PATIENCE).map_err(|error| match error {
            RecvTimeoutError::Timeout => PeerError::Silent { command: command() },
            RecvTimeoutError::Disconnected => PeerError::Ended { command: command() },
        })?;
        let answer: Value = serde_json::from_str(&line).map_err(|_| self.unknown(&Value::from(line.as_str())))?;
        match answer.get("error") {
            Some(reason) => {
                let reason = reason.as_str().map_or_else(|| reason.to_string(), str::to_owned);
                Err(PeerError::Refused { command: command(), reason })
            }
            None => Ok(answer),
        }
    }

    fn unknown(&self, answer: &Value) -> PeerError {
        const SHOWN: usize = 200;
        let mut answer = answer.to_string();
        if let Some((end, _)) = answer.char_indices().nth(SHOWN) {
            answer.truncate(end);
            answer += "…";
        }
        PeerError::Protocol { command: self.command.clone(), answer }
    }
}

impl Drop for Peer {
    /// The end of its input ends it; whatever it is doing then is of no use.
    fn drop(&mut self) {
        self.requests = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
