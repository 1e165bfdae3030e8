//! Grammars of letters: small enough that whatever a test says of them can be seen.

use flora_engine::{CompiledGrammar, Grammar, GrammarState};

/// Texts of letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Letters {
    /// As many `a` as `b` after them, one to four; over by itself.
    Nested,
    /// Any number of `cd`, with `g` in place of a `d` at times; never over by itself.
    Pairs,
    /// `e`, and then a token that no model has.
    Stuck,
    /// `f`, and then what can't be followed.
    Fails,
}

#[derive(Clone, Copy)]
struct State {
    letters: Letters,
    opened: u32,
    closed: u32,
}

impl Letters {
    pub(crate) fn grammar(self) -> Grammar {
        Grammar::new(self)
    }

    /// Whether a text is whole.
    pub(crate) fn is(self, text: &str) -> bool {
        let halves = text.split_at_checked(text.len() / 2);
        match (self, halves) {
            (Self::Nested, Some((a, b))) => {
                (1..=4).contains(&a.len())
                    && a.len() == b.len()
                    && a.bytes().all(|a| a == b'a')
                    && b.bytes().all(|b| b == b'b')
            }
            (Self::Pairs, _) => {
                let pairs = text.as_bytes().chunks(2);
                pairs.into_iter().all(|pair| matches!(pair, [b'c', b'd' | b'g']))
            }
            _ => false,
        }
    }

    /// Whether a text may become whole.
    pub(crate) fn begins_with(self, text: &str) -> bool {
        match self {
            Self::Nested => (1..=4).any(|count| ("a".repeat(count) + &"b".repeat(count)).starts_with(text)),
            Self::Pairs => self.is(text) || self.is(&format!("{text}d")),
            Self::Stuck => text == "e",
            Self::Fails => text == "f",
        }
    }
}

impl CompiledGrammar for Letters {
    fn begin(&self) -> Box<dyn GrammarState> {
        Box::new(State { letters: *self, opened: 0, closed: 0 })
    }
}

impl GrammarState for State {
    fn mask(&mut self, logits: &mut [f32]) -> Result<bool, String> {
        let State { letters, opened, closed } = *self;
        let is_half = opened > closed;
        let allowed: &[usize] = match letters {
            Letters::Nested if closed > 0 => &[1],
            Letters::Nested if opened == 0 => &[0],
            Letters::Nested if opened < 4 => &[0, 1],
            Letters::Nested => &[1],
            Letters::Pairs if is_half => &[3, 6],
            Letters::Pairs => &[2],
            Letters::Stuck if opened == 0 => &[4],
            Letters::Stuck => &[],
            Letters::Fails if opened == 0 => &[5],
            Letters::Fails => return Err("it became too complex".to_owned()),
        };
        for (token, logit) in logits.iter_mut().enumerate() {
            if !allowed.contains(&token) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(letters == Letters::Pairs && !is_half)
    }

    fn advance(&mut self, token: u32) -> Result<bool, String> {
        match token {
            0 | 2 | 4 | 5 => self.opened += 1,
            _ => self.closed += 1,
        }
        Ok(self.letters == Letters::Nested && self.opened == self.closed)
    }
}
