//! Texts of a form, such as JSON of a schema: which tokens may come next. What a grammar is, and how it is compiled, is behind traits,
//! and each text has a state of its own, so that requests with a grammar and without one run in the same batch.

use std::fmt;
use std::sync::Arc;

/// A grammar that was compiled for the tokens of the model; texts by it may be begun on any thread.
pub trait CompiledGrammar: Send + Sync {
    /// The state before the first token of a text.
    fn begin(&self) -> Box<dyn GrammarState>;
}

/// How far a text is in its grammar.
pub trait GrammarState: Send {
    /// Makes the logits `[vocabulary]` of all tokens that may not come next minus infinity. Whether the text may end here.
    ///
    /// # Errors
    /// The grammar can't be followed any further, with the reason for whoever sent it.
    fn mask(&mut self, logits: &mut [f32]) -> Result<bool, String>;

    /// Takes the token that came, one of those that might. Whether nothing can follow, so that the text is over.
    ///
    /// # Errors
    /// As [`mask`](Self::mask).
    fn advance(&mut self, token: u32) -> Result<bool, String>;
}

/// The form that a text has to have.
#[derive(Clone)]
pub struct Grammar(Arc<dyn CompiledGrammar>);

impl Grammar {
    /// The form that `compiled` gives texts.
    pub fn new(compiled: impl CompiledGrammar + 'static) -> Self {
        Self(Arc::new(compiled))
    }

    pub(crate) fn begin(&self) -> Position {
        Position(self.0.begin())
    }
}

impl PartialEq for Grammar {
    /// Whether it is the same one, compiled once.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Grammar(…)")
    }
}

/// Where a text is in its grammar.
pub(crate) struct Position(Box<dyn GrammarState>);

impl Position {
    /// Makes the logits of tokens that may not come next minus infinity, but for `stop_tokens` where the text may end. Whether it may.
    pub(crate) fn mask(&mut self, logits: &mut [f32], stop_tokens: &[u32]) -> Result<bool, String> {
        let ends: Vec<(usize, f32)> =
            stop_tokens.iter().filter_map(|token| Some((*token as usize, *logits.get(*token as usize)?))).collect();
        let may_end = self.0.mask(logits)?;
        if may_end {
            for (token, logit) in ends {
                logits[token] = logit;
            }
        }
        Ok(may_end)
    }

    /// Takes the token that came. Whether the text is over.
    pub(crate) fn advance(&mut self, token: u32) -> Result<bool, String> {
        self.0.advance(token)
    }
}

impl fmt::Debug for Position {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Position(…)")
    }
}
