//! What adapters' folders say of texts: trainers save a chat template and a tokenizer with the adapter.

use crate::chat::ChatTemplate;
use crate::error::TokenizerError;
use crate::folder::{FILE_LIMIT, Settings, TEMPLATE, TOKENIZER, vocabulary};
use crate::tokenizer::{Tokenizer, template_file};
use flora_checkpoint::SharedBytes;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// The files that are looked at.
const FILES: [&str; 3] = [TOKENIZER, "tokenizer_config.json", TEMPLATE];

/// The most folders that are remembered.
const REMEMBERED: usize = 1024;

/// What one adapter's folder says of texts, as far as it isn't what the model's says.
#[derive(Debug, Default)]
pub struct AdapterText {
    template: Option<ChatTemplate>,
    end: Option<u32>,
}

impl AdapterText {
    /// The template of conversations with the adapter.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// The token that ends what the adapted model says, beside the model's own.
    pub fn end(&self) -> Option<u32> {
        self.end
    }
}

/// Reads what adapters' folders say of texts, and reads again what has changed.
#[derive(Debug)]
pub struct AdapterTexts {
    tokenizer: Arc<Tokenizer>,
    known: Mutex<HashMap<PathBuf, Known>>,
}

#[derive(Debug)]
struct Known {
    stamps: Stamps,
    text: Result<Arc<AdapterText>, String>,
}

/// What tells one state of the files from another.
type Stamps = [Option<Stamp>; FILES.len()];

/// A file as its path leads to it: device, inode, size, and when it was changed in whatever way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp([i128; 4]);

impl AdapterTexts {
    /// Of adapters of the model that `tokenizer` is of.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, known: Mutex::default() }
    }

    /// What the adapter in `folder` says of texts. May read its files.
    ///
    /// # Errors
    /// Its files can't be read, or its tokens aren't those of the model; said with the file and the mend.
    pub fn of(&self, folder: &Path) -> Result<Arc<AdapterText>, String> {
        let stamps = FILES.map(|name| stamp(&folder.join(name)));
        if stamps.iter().all(Option::is_none) {
            return Ok(Arc::default());
        }
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known().get(folder).filter(|found| found.stamps == stamps) {
            return found.text.clone();
        }
        let text = self.read(folder).map(Arc::new).map_err(|error| error.to_string());
        let mut known = known();
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(folder.to_owned(), Known { stamps, text: text.clone() });
        text
    }

    fn read(&self, folder: &Path) -> Result<AdapterText, TokenizerError> {
        let tokenizer = folder.join(TOKENIZER);
        if tokenizer.is_file() {
            self.compare(&tokenizer)?;
        }
        let settings = Settings::read(folder)?;
        let file = folder.join(TEMPLATE);
        let source = match file.is_file() {
            true => Some(template_file(&file)?),
            false => settings.chat_template().map(str::to_owned),
        };
        let special = self.tokenizer.special_texts().clone().into_iter().chain(settings.special_texts()).collect();
        let source = source.filter(|_| !self.tokenizer.template_is_chosen());
        let end = settings.special("eos_token").and_then(|text| self.tokenizer.special_id(text));
        Ok(AdapterText { template: source.map(|source| ChatTemplate::new(&source, special)), end })
    }

    /// Refuses a tokenizer with a token that the model's hasn't got, or has for something else.
    fn compare(&self, path: &Path) -> Result<(), TokenizerError> {
        let bytes = SharedBytes::read(path, FILE_LIMIT)?;
        for (id, text) in vocabulary(path, bytes.as_slice())? {
            let models = self.tokenizer.token(id);
            if models != Some(&text) {
                return Err(TokenizerError::OtherTokens {
                    path: path.to_owned(),
                    id,
                    adapters: text,
                    models: models.unwrap_or_default().to_owned(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(unix)]
fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::metadata(path).ok()?;
    let changed = i128::from(found.ctime()) * 1_000_000_000 + i128::from(found.ctime_nsec());
    Some(Stamp([found.dev().into(), found.ino().into(), found.size().into(), changed]))
}

#[cfg(not(unix))]
fn stamp(path: &Path) -> Option<Stamp> {
    let found = std::fs::metadata(path).ok()?;
    let since = found.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(Stamp([0, 0, found.len().into(), since.as_nanos().try_into().unwrap_or(i128::MAX)]))
}
