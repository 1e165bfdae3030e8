//! A text on its way through a grammar of llguidance.

use std::sync::{Mutex, PoisonError};

use flora_engine::{CompiledGrammar, GrammarState};
use llguidance::Matcher;

use super::{NO_TOKEN, told};

/// A grammar at its beginning.
pub(super) struct Compiled {
    /// Copied for each text, with what it found out about the grammar so far.
    beginning: Mutex<Matcher>,
    tokens: usize,
}

impl Compiled {
    pub(super) fn new(beginning: Matcher, tokens: usize) -> Self {
        Self { beginning: Mutex::new(beginning), tokens }
    }
}

impl CompiledGrammar for Compiled {
    fn begin(&self) -> Box<dyn GrammarState> {
        let matcher = self.beginning.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        Box::new(State { matcher, tokens: self.tokens })
    }
}

struct State {
    matcher: Matcher,
    /// Tokens of the vocabulary; the number after them stands for the end.
    tokens: usize,
}

impl GrammarState for State {
    fn mask(&mut self, logits: &mut [f32]) -> Result<bool, String> {
        let allowed = match self.matcher.compute_mask_or_eos() {
            Ok(allowed) => allowed,
            Err(error) => {
                let reason = told(&error.to_string());
                if reason == NO_TOKEN {
                    logits.fill(f32::NEG_INFINITY);
                    return Ok(false);
                }
                return Err(failure(&reason));
            }
        };
        let known = self.tokens.min(logits.len());
        let (logits, beyond) = logits.split_at_mut(known);
        beyond.fill(f32::NEG_INFINITY);
        allowed.iter_unset_entries(|token| {
            if let Some(logit) = logits.get_mut(token) {
                *logit = f32::NEG_INFINITY;
            }
        });
        Ok(allowed.get(self.tokens))
    }

    fn advance(&mut self, token: u32) -> Result<bool, String> {
        self.matcher.consume_token(token).map_err(|error| failure(&told(&error.to_string())))?;
        Ok(self.matcher.is_stopped())
    }
}

fn failure(reason: &str) -> String {
    format!("the text can't follow its grammar any further: {reason}; ask for a simpler one")
}
