//! What is asked of a request before it may wait, so that nothing behind this point meets one that can't be run.

use std::collections::BTreeSet;

use crate::composition::AdapterChoice;
use crate::decoder::DecoderLimits;
use crate::options::{Options, StopLimits};
use crate::request::{LogitRules, Request, RequestError, Sampling};

/// Longer than any name a folder can have.
const ADAPTER_NAME_BYTES: usize = 255;

/// What requests have to keep to.
#[derive(Clone, Debug)]
pub struct RequestLimits {
    vocabulary: u32,
    context_length: usize,
    cache_tokens: usize,
    /// Adapters that may be resident.
    resident: usize,
    stop: StopLimits,
}

/// A request that can be run.
#[derive(Clone, Debug, PartialEq)]
pub struct Accepted(Request);

impl Accepted {
    pub(crate) fn into_request(self) -> Request {
        self.0
    }
}

impl RequestLimits {
    pub(crate) fn new(decoder: DecoderLimits, options: &Options) -> Self {
        Self {
            vocabulary: decoder.vocabulary,
            context_length: decoder.context_length as usize,
            cache_tokens: options.cache_tokens / options.block_tokens * options.block_tokens,
            resident: options.adapters.resident,
            stop: options.stop,
        }
    }

    /// The most tokens of one sequence, prompt and generated ones: what the model knows and the cache holds.
    pub fn most_tokens(&self) -> usize {
        self.context_length.min(self.cache_tokens)
    }

    /// Tokens of the model's vocabulary.
    pub fn vocabulary(&self) -> u32 {
        self.vocabulary
    }

    /// The most tokens that the model knows.
    pub(crate) fn context_length(&self) -> usize {
        self.context_length
    }

    /// Takes a request that can be run.
    ///
    /// # Errors
    /// [`RequestError::Invalid`] with what is wrong with it.
    pub fn check(&self, request: Request) -> Result<Accepted, RequestError> {
        match self.fault(&request) {
            Some(fault) => Err(RequestError::Invalid(fault)),
            None => Ok(Accepted(request)),
        }
    }

    fn fault(&self, request: &Request) -> Option<String> {
        let prompt = request.prompt.len();
        if prompt == 0 {
            return Some("the prompt is empty; it has to hold at least one token".into());
        }
        let generates = request.stop.max_tokens > 0;
        if prompt + usize::from(generates) > self.context_length {
            let more = if generates { "one more" } else { "them" };
            return Some(format!(
                "the prompt has {prompt} tokens, and the model's context of {} has no room for {more}",
                self.context_length
            ));
        }
        // An adapter may bring a vocabulary of its own: its requests are looked at when it is resident.
        if request.adapters.adapters().next().is_none()
            && let Some(fault) = token_fault(0, &request.prompt, self.vocabulary)
        {
            return Some(fault);
        }
        if !generates && request.log_probabilities.prompt.is_none() {
            return Some(
                "max_tokens is 0 and no log-probabilities of the prompt are asked for; at least one token is generated then"
                    .into(),
            );
        }
        let most = prompt.saturating_add(request.stop.max_tokens as usize).min(self.context_length);
        if most > self.cache_tokens {
            return Some(format!(
                "the prompt and max_tokens come to {most} tokens, and the cache holds {}; ask for fewer",
                self.cache_tokens
            ));
        }
        let adapters: BTreeSet<&AdapterChoice> = request.adapters.adapters().collect();
        if adapters.iter().flat_map(|adapter| adapter.names()).any(|name| name.len() > ADAPTER_NAME_BYTES) {
            return Some(format!("an adapter's name is longer than {ADAPTER_NAME_BYTES} bytes"));
        }
        if adapters.len() > self.resident {
            return Some(format!(
                "the request has {} adapters, and {} may be resident at a time; name fewer in one request",
                adapters.len(),
                self.resident
            ));
        }
        sampling_fault(request.sampling).or_else(|| self.rules_fault(request)).or_else(|| self.stop_fault(request))
    }

    fn rules_fault(&self, request: &Request) -> Option<String> {
        let LogitRules { repetition_penalty, presence_penalty, frequency_penalty, bias, min_tokens, min_p, top_k: _ } =
            &request.rules;
        if !(repetition_penalty.is_finite() && *repetition_penalty > 0.0) {
            return Some(format!("a repetition_penalty of {repetition_penalty}; it has to be a number above 0"));
        }
        for (name, penalty) in [("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)] {
            if !penalty.is_finite() {
                return Some(format!("a {name} of {penalty}; it has to be a number"));
            }
        }
        if !(0.0..=1.0).contains(min_p) {
            return Some(format!("a min_p of {min_p}; it has to be from 0 to 1"));
        }
        if *min_tokens > request.stop.max_tokens {
            return Some(format!("min_tokens is {min_tokens}, and max_tokens only {}", request.stop.max_tokens));
        }
        if bias.len() > self.vocabulary as usize {
            return Some(format!("logit_bias names {} tokens, and there are {}", bias.len(), self.vocabulary));
        }
        bias.iter().find_map(|(token, bias)| {
            if *token >= self.vocabulary {
                Some(format!("logit_bias names token {token}, and there are {}", self.vocabulary))
            } else {
                (!bias.is_finite()).then(|| format!("the logit_bias of token {token} is {bias}; it has to be a number"))
            }
        })
    }

    fn stop_fault(&self, request: &Request) -> Option<String> {
        let (stop, limits) = (&request.stop, &self.stop);
        if stop.strings.len() > limits.strings {
            return Some(format!("{} stop strings; at most {} are taken", stop.strings.len(), limits.strings));
        }
        if stop.strings.iter().any(String::is_empty) {
            return Some("a stop string is empty".into());
        }
        if let Some(string) = stop.strings.iter().find(|string| string.len() > limits.string_bytes) {
            return Some(format!(
                "a stop string has {} bytes; at most {} are taken",
                string.len(),
                limits.string_bytes
            ));
        }
        if stop.tokens.len() > limits.tokens {
            return Some(format!("{} stop tokens; at most {} are taken", stop.tokens.len(), limits.tokens));
        }
        None
    }
}

/// What is wrong with tokens of a prompt, from position `first` on, for a vocabulary.
pub(crate) fn token_fault(first: usize, tokens: &[u32], vocabulary: u32) -> Option<String> {
    let (position, token) = (first..).zip(tokens).find(|(_, token)| **token >= vocabulary)?;
    Some(format!("token {token} at position {position} of the prompt: there are {vocabulary}"))
}

fn sampling_fault(sampling: Sampling) -> Option<String> {
    let Sampling::Random { temperature, top_p, .. } = sampling else {
        return None;
    };
    if !(temperature.is_finite() && temperature > 0.0) {
        return Some(format!("a temperature of {temperature}; it has to be a number above 0"));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Some(format!("a top_p of {top_p}; it has to be above 0 and at most 1"));
    }
    None
}
