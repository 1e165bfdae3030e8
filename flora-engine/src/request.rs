//! What a client asks for, and what it hears.

use crate::decoder::AdapterFailure;

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// The adapter's name, or `None` for the base model.
    pub adapter: Option<String>,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// What ends it.
    pub stop: StopAt,
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

/// What ends a request, whichever comes first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopAt {
    /// Generated tokens; at least 1.
    pub max_tokens: u32,
    /// Text that isn't passed on, nor anything after it.
    pub strings: Vec<String>,
    /// Tokens that end a text (`<|im_end|>`); not passed on.
    pub tokens: Vec<u32>,
}

/// What a client hears of its request: any number of [`Event::Text`], then one of the others, always.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// More text, whole characters; may be empty for a token that only begins one.
    Text {
        /// What the tokens say beyond what was said.
        text: String,
        /// The tokens.
        tokens: Vec<u32>,
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

/// Why a request is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop string or a stop token.
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
    /// Its adapter can't be had.
    #[error(transparent)]
    Adapter(#[from] AdapterFailure),
    /// The model failed.
    #[error("the model failed: {0}")]
    Model(String),
    /// The engine stops.
    #[error("the engine is shutting down")]
    ShuttingDown,
}
