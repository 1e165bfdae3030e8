//! What a client asks for, and what it hears.

use std::num::NonZeroU32;

use crate::decoder::AdapterFailure;
use crate::grammar::Grammar;
use crate::spans::AdapterSpans;

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// Which adapter acts on which of its tokens, those that are generated among them. The logits after a token are those of the
    /// adapter that acts on it.
    pub adapters: AdapterSpans,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// What is done to the logits before that.
    pub rules: LogitRules,
    /// The form that the text has to have, where it has to have one. Before its form is whole, no stop token may come that isn't text
    /// of it, and a text to which nothing can be added is finished ([`FinishReason::Stop`]), whatever [`LogitRules::min_tokens`] says.
    pub grammar: Option<Grammar>,
    /// What ends it.
    pub stop: StopAt,
    /// Whose log-probabilities are told.
    pub log_probabilities: LogProbabilities,
}

/// Which tokens' log-probabilities are told, each with those of so many of the likeliest tokens in its place. They are the
/// model's own, ln softmax of its logits, before any rule or temperature. Under a grammar they are those among the tokens that may
/// come, as vLLM has them: the others have minus infinity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogProbabilities {
    /// Of generated tokens.
    pub generated: Option<u32>,
    /// Of the prompt's tokens, from the second on. The logits of a chunk of the prompt exist at a time, never those of all of it.
    pub prompt: Option<u32>,
}

/// How the next token is chosen from the logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    /// The largest logit; of equal ones, the first.
    Greedy,
    /// Drawn from the softmax.
    Random {
        /// What logits are divided by; above 0.
        temperature: f32,
        /// The smallest set of most likely tokens whose probabilities reach this is drawn from; above 0, at most 1.
        top_p: f32,
        /// Of the request's own generator: the same request with the same seed gives the same tokens.
        seed: u64,
    },
}

/// What is done to the logits before a token is chosen from them. The default does nothing.
///
/// In this order, which is vLLM's: tokens that may not come yet, biases, penalties, temperature, [`min_p`](Self::min_p),
/// [`top_k`](Self::top_k), and [`top_p`](Sampling::Random::top_p) of what is left.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitRules {
    /// What the positive logits of tokens of the prompt and of the text so far are divided by, and the negative ones multiplied
    /// with; above 0, and 1 does nothing.
    pub repetition_penalty: f32,
    /// Taken from the logits of tokens that were generated.
    pub presence_penalty: f32,
    /// Taken from the logits of tokens for each time that they were generated.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub bias: Vec<(u32, f32)>,
    /// Tokens to generate before a stop token may come or stop strings are looked for.
    pub min_tokens: u32,
    /// How many of the likeliest tokens are drawn from; all where it is `None`.
    pub top_k: Option<NonZeroU32>,
    /// Tokens are drawn from whose probability is at least this part of the likeliest's; from 0 to 1.
    pub min_p: f32,
}

impl Default for LogitRules {
    fn default() -> Self {
        Self {
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            bias: Vec::new(),
            min_tokens: 0,
            top_k: None,
            min_p: 0.0,
        }
    }
}

/// What ends a request, whichever comes first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopAt {
    /// Generated tokens; at least 1, unless [`LogProbabilities::prompt`] asks for something else than a text.
    pub max_tokens: u32,
    /// Text that isn't passed on, nor anything after it.
    pub strings: Vec<String>,
    /// Tokens that end a text (`<|im_end|>`); not passed on.
    pub tokens: Vec<u32>,
}

/// What a client hears of its request: any number of [`Event::Prompt`] and [`Event::Text`], then one of the others, always.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The next tokens of the prompt, from its second on, where a request asks for them.
    Prompt(Vec<ScoredToken>),
    /// More text, whole characters; may be empty for a token that only begins one.
    Text {
        /// What the tokens say beyond what was said.
        text: String,
        /// The tokens.
        tokens: Vec<u32>,
        /// The same, where a request asks for their log-probabilities, and then a stop token that ends it too; else none.
        scored: Vec<ScoredToken>,
    },
    /// Done.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
    /// Failed, at whatever point.
    Failed(RequestError),
}

impl Event {
    /// Whether nothing comes after it.
    pub fn is_last(&self) -> bool {
        match self {
            Self::Prompt(_) | Self::Text { .. } => false,
            Self::Finished { .. } | Self::Failed(_) => true,
        }
    }
}

/// A token and how likely it was where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredToken {
    /// The token.
    pub token: u32,
    /// ln of its probability; minus infinity where it has none.
    pub log_probability: f32,
    /// The likeliest tokens in its place, the likeliest first and of equal ones the first, with the same.
    pub likeliest: Vec<(u32, f32)>,
}

/// Why a request is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop string, a stop token, or the end of what the grammar allows.
    Stop,
    /// [`StopAt::max_tokens`], or the model's context is full.
    Length,
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u32,
    /// Generated, the stop token not among them.
    pub completion_tokens: u32,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It can't be run as it is.
    #[error("{0}")]
    Invalid(String),
    /// More requests wait than the engine holds.
    #[error("{waiting} requests wait already and the queue holds no more; try again later")]
    QueueFull {
        /// How many.
        waiting: usize,
    },
    /// One of its adapters can't be had.
    #[error(transparent)]
    Adapter(#[from] AdapterFailure),
    /// The model failed.
    #[error("the model failed: {0}")]
    Model(String),
    /// The engine stops.
    #[error("the engine is shutting down")]
    ShuttingDown,
}
