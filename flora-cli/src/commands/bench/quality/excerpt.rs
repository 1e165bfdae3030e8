//! What adapters are held against: a piece of each file, of whole lines, and which of its tokens make each line.
//!
//! Greedy decoding writes a line exactly if, at each of its tokens, the likeliest token after all that stands before is that one.
//! So one pass over the true text says both how many bits it takes and which of its lines would be written, given those above.

use std::ops::Range;
use std::path::Path;

use flora_model::{TargetScore, TrainedModel};
use flora_tokenizer::{Specials, Tokenizer};
use flora_train::data::{Content, read};
use flora_train::{JobId, Sources, TrainSegment};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::commands::error::CommandError;

/// A piece of a file as a segment.
#[derive(Clone, Debug)]
pub(super) struct Excerpt {
    /// Its path below the corpus.
    file: String,
    /// Of the text that the targets are.
    bytes: usize,
    tokens: Vec<u32>,
    targets: Vec<Option<u32>>,
    /// The targets that make each line, the last with its end.
    lines: Vec<Range<usize>>,
}

/// How an adapter does on one file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct FileScore {
    pub(super) file: String,
    pub(super) bytes: usize,
    /// −ln p of the text.
    pub(super) nats: f64,
    /// Lines that are looked at: not empty, whole, and with one above.
    pub(super) lines: usize,
    /// Those that greedy decoding writes exactly.
    pub(super) exact: usize,
}

/// The excerpts of a split.
#[derive(Clone, Debug)]
pub(super) struct Excerpts {
    excerpts: Vec<Excerpt>,
    /// The bytes of each token, where each has its own.
    token_bytes: Option<std::sync::Arc<[Vec<u8>]>>,
    pub(super) digest: String,
}

impl Excerpts {
    /// Of the first `files` files of the folder, at most `bytes` of each.
    pub(super) fn read(
        folder: &Path,
        tokenizer: &Tokenizer,
        (files, bytes): (usize, usize),
    ) -> Result<Self, CommandError> {
        let (examples, _) = read(&Sources { paths: vec![folder.to_owned()], extensions: Vec::new() })?;
        let token_bytes = tokenizer.token_bytes();
        let mut excerpts = Vec::new();
        for example in examples {
            let Content::Source(text) = &example.content else { continue };
            let piece = &text[piece(text, bytes)];
            let tokens = tokenizer.encode(piece, Specials::Plain)?;
            let file = example.file.strip_prefix(folder).unwrap_or(&example.file).display().to_string();
            let of_token = |token: u32| token_bytes.as_ref().and_then(|all| all.get(token as usize));
            let lengths: Option<Vec<usize>> = tokens.iter().map(|token| of_token(*token).map(Vec::len)).collect();
            excerpts.extend(Excerpt::new(file, piece, tokens, lengths.as_deref(), tokenizer.end_token()));
            if excerpts.len() == files {
                break;
            }
        }
        let mut hasher = Sha256::new();
        for excerpt in &excerpts {
            hasher.update((excerpt.tokens.len() as u64).to_le_bytes());
            excerpt.tokens.iter().for_each(|token| hasher.update(token.to_le_bytes()));
            excerpt.targets.iter().flatten().for_each(|token| hasher.update(token.to_le_bytes()));
        }
        let digest = hasher.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { excerpts, token_bytes, digest })
    }

    pub(super) fn files(&self) -> usize {
        self.excerpts.len()
    }

    /// How the adapter that is placed for `job` does, or the base model, in batches of at most `tokens`, a file at least.
    pub(super) fn score(
        &self,
        model: &TrainedModel,
        job: Option<JobId>,
        tokens: usize,
    ) -> Result<Vec<FileScore>, CommandError> {
        let mut scores = Vec::with_capacity(self.excerpts.len());
        let mut rest = &self.excerpts[..];
        while !rest.is_empty() {
            let mut sum = 0;
            let fits = |excerpt: &&Excerpt| {
                sum += excerpt.tokens.len();
                sum <= tokens
            };
            let (batch, after) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            let segments: Vec<_> = batch.iter().map(|own| own.segment(job)).collect();
            let found = model.scores(&segments)?;
            scores.extend(batch.iter().zip(found).map(|(own, found)| self.judge(own, &found)));
            rest = after;
        }
        Ok(scores)
    }

    fn judge(&self, excerpt: &Excerpt, scores: &[TargetScore]) -> FileScore {
        let bytes_of =
            |token: u32| self.token_bytes.as_ref().and_then(|all| all.get(token as usize)).map(Vec::as_slice);
        let is_exact = |line: &&Range<usize>| {
            (*line).clone().all(|at| {
                let (Some(score), Some(Some(target))) = (scores.get(at), excerpt.targets.get(at)) else { return false };
                let is_last = at + 1 == line.end;
                score.likeliest == *target
                    || (is_last && to_line_end(bytes_of(score.likeliest)) == to_line_end(bytes_of(*target)))
            })
        };
        FileScore {
            file: excerpt.file.clone(),
            bytes: excerpt.bytes,
            nats: scores.iter().fold(0.0, |sum, score| sum + score.nats),
            lines: excerpt.lines.len(),
            exact: excerpt.lines.iter().filter(is_exact).count(),
        }
    }
}

/// What a token's bytes say up to the end of a line; `None` where they don't end one.
fn to_line_end(bytes: Option<&[u8]>) -> Option<&[u8]> {
    let bytes = bytes?;
    bytes.iter().position(|byte| *byte == b'\n').map(|end| &bytes[..=end])
}

/// Whole lines of `text`, at most `bytes`, from a third of it on, because files begin with much the same words: licences and imports.
fn piece(text: &str, bytes: usize) -> Range<usize> {
    if text.len() <= bytes {
        return 0..text.len();
    }
    let from = text.floor_char_boundary((text.len() / 3).min(text.len() - bytes));
    let start = match from {
        0 => 0,
        _ => text[from..].find('\n').map_or(from, |end| from + end + 1),
    };
    let limit = text.floor_char_boundary(start + bytes);
    start..text[start..limit].rfind('\n').map_or(limit, |end| start + end + 1)
}

impl Excerpt {
    /// `text` as `tokens`, whose bytes are as many as `lengths` says, after the token `begin`. Without that, the first token is given.
    /// `None` where nothing is left to tell.
    fn new(file: String, text: &str, tokens: Vec<u32>, lengths: Option<&[usize]>, begin: Option<u32>) -> Option<Self> {
        let given = usize::from(begin.is_none());
        let targets: Vec<Option<u32>> = tokens.iter().skip(given).map(|token| Some(*token)).collect();
        if targets.is_empty() {
            return None;
        }
        let lengths = lengths.filter(|lengths| lengths.iter().sum::<usize>() == text.len());
        let bytes = text.len() - lengths.and_then(|lengths| lengths.first()).map_or(0, |first| first * given);
        let lines = lengths.map(|lengths| lines(text, lengths, given)).unwrap_or_default();
        let tokens = begin.into_iter().chain(tokens).take(targets.len()).collect();
        Some(Self { file, bytes, tokens, targets, lines })
    }

    fn segment(&self, job: Option<JobId>) -> TrainSegment<'_> {
        TrainSegment { job, tokens: &self.tokens, targets: &self.targets }
    }
}

/// The targets of each line but the first that isn't blank and that has its end: the tokens that begin within it. Blanks at its
/// beginning may be the end of a token before, and are given then.
fn lines(text: &str, lengths: &[usize], given: usize) -> Vec<Range<usize>> {
    let starts: Vec<usize> = lengths
        .iter()
        .scan(0, |next, length| {
            let start = *next;
            *next += length;
            Some(start)
        })
        .collect();
    let mut lines = Vec::new();
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        let own = start..start + line.len();
        start = own.end;
        let Some(first) = line.find(|letter: char| !letter.is_whitespace()) else { continue };
        let tokens = starts.partition_point(|at| *at < own.start)..starts.partition_point(|at| *at < own.end);
        let is_whole = line.ends_with('\n') && starts.get(tokens.start).is_some_and(|at| *at <= own.start + first);
        if own.start > 0 && is_whole && tokens.start >= given {
            lines.push(tokens.start - given..tokens.end - given);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_whole_lines_of_bounded_size() {
        let text: String = (0..40).map(|line| format!("line {line} é\n")).collect();
        for bytes in [30, 64, 100, 301] {
            let own = piece(&text, bytes);
            let from = (text.len() / 3).min(text.len() - bytes);
            assert!(own.len() <= bytes && own.start >= from, "{own:?} of {bytes}");
            assert!(text[own.clone()].starts_with("line ") && text[own].ends_with('\n'));
        }
        assert_eq!(piece(&text, text.len()), 0..text.len());
        assert_eq!(piece("ééééé", 5), 2..6, "one line, cut at a letter");
    }

    /// ` if x:⏎    y = 1⏎⏎    z` in tokens of which some hold the end of one line and the beginning of the next.
    #[test]
    fn lines_are_the_tokens_that_begin_in_them() {
        let pieces = [" if", " x", ":", "\n   ", " y", " =", " 1", "\n\n   ", " z", "\n", "w"];
        let text = pieces.concat();
        let lengths: Vec<usize> = pieces.iter().map(|piece| piece.len()).collect();
        assert_eq!(
            lines(&text, &lengths, 0),
            [4..8, 8..10],
            "neither the first, nor the empty one, nor the unfinished one"
        );
        assert_eq!(lines(&text, &lengths, 1), [3..7, 7..9]);
    }

    fn excerpts() -> (Excerpts, Vec<u32>) {
        let pieces = ["a", "\n", " b", "c", "\n  ", "\n\n", "x"];
        let bytes: Vec<Vec<u8>> = pieces.iter().map(|piece| piece.as_bytes().to_vec()).collect();
        // a⏎ bc⏎⏎⏎
        let tokens = vec![0, 1, 2, 3, 5];
        let text: String = tokens.iter().map(|token| pieces[*token as usize]).collect();
        let lengths: Vec<usize> = tokens.iter().map(|token| pieces[*token as usize].len()).collect();
        let excerpt = Excerpt::new("f".to_owned(), &text, tokens.clone(), Some(&lengths), Some(9)).expect("a text");
        assert_eq!(
            (excerpt.bytes, &excerpt.tokens[..], &excerpt.lines[..]),
            (7, &[9, 0, 1, 2, 3][..], std::slice::from_ref(&(2..5)))
        );
        (Excerpts { excerpts: vec![excerpt], token_bytes: Some(bytes.into()), digest: String::new() }, tokens)
    }

    #[test]
    fn a_line_is_exact_if_every_token_is_the_likeliest() {
        let (all, tokens) = excerpts();
        let judge = |likeliest: &[u32]| {
            let score = |likeliest: &u32| TargetScore { nats: 0.5, likeliest: *likeliest };
            all.judge(&all.excerpts[0], &likeliest.iter().map(score).collect::<Vec<_>>())
        };
        let right = judge(&tokens);
        assert_eq!((right.lines, right.exact, right.nats), (1, 1, 2.5));
        assert_eq!(judge(&[6, 6, 2, 3, 5]).exact, 1, "other lines don't matter");
        assert_eq!(judge(&[0, 1, 2, 3, 1]).exact, 1, "nor what follows the line's end");
        assert_eq!(judge(&[0, 1, 2, 3, 6]).exact, 0, "it has to end");
        assert_eq!(judge(&[0, 1, 2, 6, 5]).exact, 0);
    }

    #[test]
    fn without_a_token_to_begin_with_the_first_one_is_given() {
        let own = Excerpt::new("f".to_owned(), "ab\nc\n", vec![1, 2, 3, 4], Some(&[1, 1, 1, 2]), None).expect("a text");
        assert_eq!((own.bytes, &own.tokens[..], own.targets.len()), (4, &[1, 2, 3][..], 3));
        assert_eq!(own.lines, std::slice::from_ref(&(2..3)));
        assert!(Excerpt::new("f".to_owned(), "a", vec![1], Some(&[1]), None).is_none());
    }
}
