//! Which adapter acts on which tokens of a request, those that are generated among them.

use crate::composition::AdapterChoice;

/// Runs of tokens, each with one adapter or none, that cover a sequence whatever its length: none overlap, and none is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spans<A> {
    /// The adapter of the first token.
    first: Option<A>,
    /// Where another begins to act, in rising order and behind the first token; neighbours differ.
    changes: Vec<(usize, Option<A>)>,
}

/// The adapters of a request.
pub type AdapterSpans = Spans<AdapterChoice>;

/// Tokens that follow one another, and what acts on them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span<A> {
    /// The position of its first token in the sequence.
    pub start: usize,
    /// The position behind its last token; `None`: it goes on as long as the sequence does.
    pub end: Option<usize>,
    /// `None` for the base model.
    pub adapter: Option<A>,
}

/// Why spans can't be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpanError {
    /// A span without a token.
    #[error("a span from token {start} to {end} holds no token; its end has to be behind its start")]
    Empty {
        /// Its start.
        start: usize,
        /// Its end.
        end: usize,
    },
    /// Two of one token.
    #[error("two spans hold token {0}; a token has one adapter")]
    Overlap(usize),
}

impl<A> Default for Spans<A> {
    /// The base model.
    fn default() -> Self {
        Self { first: None, changes: Vec::new() }
    }
}

impl<A: PartialEq> Spans<A> {
    /// One adapter, or the base model, for all tokens.
    pub fn whole(adapter: Option<A>) -> Self {
        Self { first: adapter, changes: Vec::new() }
    }

    /// `own` for all tokens that no span holds, in any order.
    ///
    /// # Errors
    /// A span without a token, or two that overlap.
    pub fn new(own: Option<A>, spans: impl IntoIterator<Item = Span<A>>) -> Result<Self, SpanError>
    where
        A: Clone,
    {
        let mut spans: Vec<Span<A>> = spans.into_iter().collect();
        spans.sort_by_key(|span| span.start);
        let mut runs = Vec::with_capacity(2 * spans.len() + 1);
        let mut free = Some(0);
        for Span { start, end, adapter } in spans {
            if let Some(end) = end.filter(|end| *end <= start) {
                return Err(SpanError::Empty { start, end });
            }
            match free {
                Some(free) if free <= start => runs.push((free, own.clone())),
                _ => return Err(SpanError::Overlap(start)),
            }
            runs.push((start, adapter));
            free = end;
        }
        runs.extend(free.map(|free| (free, own)));
        Ok(Self::of_runs(runs))
    }

    /// Of runs that follow one another, the first from token 0 on, each to the start of the next. Those without a token are left out.
    pub(crate) fn of_runs(runs: impl IntoIterator<Item = (usize, Option<A>)>) -> Self {
        let mut spans = Self::default();
        for (start, adapter) in runs {
            while spans.changes.last().is_some_and(|(last, _)| *last >= start) {
                spans.changes.pop();
            }
            let before = spans.changes.last().map_or(&spans.first, |(_, before)| before);
            if start == 0 {
                spans.first = adapter;
            } else if *before != adapter {
                spans.changes.push((start, adapter));
            }
        }
        spans
    }

    /// The same with other names for the adapters.
    pub(crate) fn map<B: PartialEq>(&self, mut name: impl FnMut(&A) -> B) -> Spans<B> {
        Spans::of_runs(self.runs().map(|(start, adapter)| (start, adapter.map(&mut name))))
    }

    /// Where each run starts, and its adapter.
    pub fn runs(&self) -> impl Iterator<Item = (usize, Option<&A>)> {
        let changes = self.changes.iter().map(|(start, adapter)| (*start, adapter.as_ref()));
        std::iter::once((0, self.first.as_ref())).chain(changes)
    }

    /// The adapters, those that have several runs as often.
    pub fn adapters(&self) -> impl Iterator<Item = &A> {
        self.runs().filter_map(|(_, adapter)| adapter)
    }

    /// The adapter of the token at a position.
    pub fn at(&self, position: usize) -> Option<&A> {
        match self.changes.partition_point(|(start, _)| *start <= position) {
            0 => self.first.as_ref(),
            behind => self.changes[behind - 1].1.as_ref(),
        }
    }

    /// Where another adapter than that of the token at a position begins to act.
    pub(crate) fn next_change(&self, position: usize) -> Option<usize> {
        let behind = self.changes.partition_point(|(start, _)| *start <= position);
        self.changes.get(behind).map(|(start, _)| *start)
    }
}

impl From<AdapterChoice> for AdapterSpans {
    fn from(adapter: AdapterChoice) -> Self {
        Self::whole(Some(adapter))
    }
}

impl From<Option<&str>> for AdapterSpans {
    fn from(name: Option<&str>) -> Self {
        Self::whole(name.map(AdapterChoice::from))
    }
}

impl From<Option<String>> for AdapterSpans {
    fn from(name: Option<String>) -> Self {
        Self::whole(name.map(AdapterChoice::from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn span(start: usize, end: Option<usize>, adapter: Option<char>) -> Span<char> {
        Span { start, end, adapter }
    }

    #[test]
    fn what_no_span_holds_is_the_requests_own() {
        let spans = [span(7, None, Some('b')), span(2, Some(4), None), span(4, Some(5), Some('c'))];
        let spans = Spans::new(Some('a'), spans).expect("spans that don't overlap");
        let at: String = (0..9).map(|position| spans.at(position).copied().unwrap_or('-')).collect();
        assert_eq!(at, "aa--caabb");
        assert_eq!(
            [0, 2, 4, 5, 7, 90].map(|position| spans.next_change(position)),
            [Some(2), Some(4), Some(5), Some(7), None, None]
        );
        assert_eq!(Spans::new(None, [span(0, None, Some('a'))]), Ok(Spans::whole(Some('a'))));
        assert_eq!(Spans::new(Some('a'), [span(3, Some(5), Some('a'))]), Ok(Spans::whole(Some('a'))));
    }

    #[test]
    fn spans_hold_tokens_and_do_not_overlap() {
        let of = |spans: &[(usize, Option<usize>)]| {
            Spans::new(None, spans.iter().map(|(start, end)| span(*start, *end, Some('a')))).map(drop)
        };
        assert_eq!(of(&[(3, Some(3))]), Err(SpanError::Empty { start: 3, end: 3 }));
        assert_eq!(of(&[(0, Some(1)), (3, Some(1))]), Err(SpanError::Empty { start: 3, end: 1 }));
        assert_eq!(of(&[(3, Some(5)), (0, Some(4))]), Err(SpanError::Overlap(3)));
        assert_eq!(of(&[(3, None), (9, Some(10))]), Err(SpanError::Overlap(9)));
        assert_eq!(of(&[(3, Some(5)), (3, Some(5))]), Err(SpanError::Overlap(3)));
        assert_eq!(of(&[(3, Some(5)), (5, None)]), Ok(()));
    }

    proptest! {
        /// Each token has the adapter of the one span that holds it, or the request's own.
        #[test]
        fn each_token_has_one_adapter(
            cuts in proptest::collection::btree_set(0usize..30, 0..8),
            adapters in proptest::collection::vec(proptest::option::of(proptest::char::range('a', 'c')), 9),
            own in proptest::option::of(proptest::char::range('a', 'c')),
        ) {
            let cuts: Vec<usize> = cuts.into_iter().collect();
            let spans: Vec<Span<char>> = cuts
                .windows(2)
                .enumerate()
                .filter(|(index, _)| index % 3 != 2)
                .map(|(index, cut)| span(cut[0], Some(cut[1]), adapters[index]))
                .collect();
            let made = Spans::new(own, spans.clone().into_iter().rev()).expect("no overlap");
            for position in 0..40 {
                let held = spans.iter().find(|span| (span.start..span.end.unwrap_or(99)).contains(&position));
                prop_assert_eq!(made.at(position).copied(), held.map_or(own, |span| span.adapter));
                let change = made.next_change(position).unwrap_or(99);
                prop_assert!((position..change.min(40)).all(|other| made.at(other) == made.at(position)));
                prop_assert!(change == 99 || made.at(change) != made.at(position));
            }
        }
    }
}
