//! The data of jobs, read and encoded once however many jobs learn from them.

use std::sync::Arc;

use flora_tokenizer::Tokenizer;
use flora_train::data::{Document, encode, read, split};
use flora_train::{DataError, Dataset, DescribedJob, HeldOut, Sources};

use crate::commands::error::CommandError;
use crate::commands::output;

/// The most tokens that a job is evaluated on: more say little more, and every evaluation costs its time.
const EVALUATED_TOKENS: usize = 1 << 14;

/// What was read.
pub(super) struct Library<'a> {
    tokenizer: &'a Tokenizer,
    known: Vec<(Sources, Arc<Vec<Document>>)>,
}

impl<'a> Library<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, known: Vec::new() }
    }

    /// What a job learns from, and what it is evaluated on.
    pub(super) fn data_of(&mut self, job: &DescribedJob) -> Result<(Arc<Dataset>, Option<Arc<Dataset>>), CommandError> {
        let options = &job.options;
        let all = self.documents(&job.data)?;
        let (learnt, held) = match &job.held_out {
            HeldOut::Nothing => (all.to_vec(), Vec::new()),
            HeldOut::Sources(sources) => (all.to_vec(), self.documents(sources)?.to_vec()),
            HeldOut::Fraction(part) => split(all.to_vec(), *part, options.seed)?,
        };
        let data = Dataset::new(&learnt, options.sequence_length)?;
        for (count, what) in
            [(data.cut_off, "were cut off at the length of a sequence"), (data.unused, "have nothing to learn")]
        {
            if count > 0 {
                output::note(&format!("{}: {count} of {} documents {what}", options.name, learnt.len()));
            }
        }
        let held = match held.is_empty() {
            true => None,
            false => {
                let sequences = (EVALUATED_TOKENS / options.sequence_length.max(1)).max(1);
                Some(Arc::new(Dataset::new(&held, options.sequence_length)?.of_first(sequences)))
            }
        };
        Ok((Arc::new(data), held))
    }

    fn documents(&mut self, sources: &Sources) -> Result<Arc<Vec<Document>>, DataError> {
        if let Some((_, known)) = self.known.iter().find(|(known, _)| known == sources) {
            return Ok(Arc::clone(known));
        }
        let (examples, skipped) = read(sources)?;
        if let [first, ..] = &skipped[..] {
            let (count, path) = (skipped.len(), first.path.display());
            output::note(&format!("{count} files were passed over, such as {path}: {}", first.reason));
        }
        let documents = Arc::new(encode(&examples, self.tokenizer)?);
        self.known.push((sources.clone(), Arc::clone(&documents)));
        Ok(documents)
    }
}
