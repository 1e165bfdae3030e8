//! What the files beside a vocabulary say of it: which tokens are special, which end a text, and the chat template.

use super::FILE_LIMIT;
use crate::error::TokenizerError;
use crate::sentencepiece::Prefix;
use flora_checkpoint::SharedBytes;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::path::Path;
use tokenizers::AddedToken;

pub(crate) const CONFIG: &str = "tokenizer_config.json";
const ADDED: &str = "added_tokens.json";
const GENERATION: &str = "generation_config.json";
const MODEL: &str = "config.json";

/// Names of special tokens that a tokenizer's config may have.
const SPECIAL: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// `tokenizer_config.json`.
#[derive(Default, Deserialize)]
struct Config {
    bos_token: Option<Name>,
    eos_token: Option<Name>,
    unk_token: Option<Name>,
    sep_token: Option<Name>,
    pad_token: Option<Name>,
    cls_token: Option<Name>,
    mask_token: Option<Name>,
    chat_template: Option<Templates>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    legacy: Option<bool>,
    tokenizer_class: Option<String>,
    #[serde(default)]
    added_tokens_decoder: BTreeMap<u32, Listed>,
}

/// A token of `added_tokens_decoder`.
#[derive(Deserialize)]
struct Listed {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

/// A special token, by itself or with its properties.
#[derive(Deserialize)]
#[serde(untagged)]
enum Name {
    Text(String),
    Token { content: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// `generation_config.json`, and `config.json`.
#[derive(Default, Deserialize)]
struct Ends {
    eos_token_id: Option<Ids>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

/// All of it.
pub(crate) struct Settings {
    config: Config,
    added: Vec<(u32, AddedToken)>,
    ends: Vec<u32>,
}

impl Settings {
    pub(crate) fn read(folder: &Path) -> Result<Self, TokenizerError> {
        let mut config: Config = parse_if_there(&folder.join(CONFIG))?.unwrap_or_default();
        let listed = std::mem::take(&mut config.added_tokens_decoder);
        let mut added: Vec<(u32, AddedToken)> =
            listed.into_iter().map(|(id, token)| (id, token.into_added())).collect();
        let more: BTreeMap<String, u32> = parse_if_there(&folder.join(ADDED))?.unwrap_or_default();
        for (text, id) in more {
            if added.iter().all(|(_, token)| token.content != text) {
                added.push((id, AddedToken::from(text, false).normalized(false)));
            }
        }
        added.sort_by_key(|(id, _)| *id);
        // The model's own config counts where there is none for generation, or that says nothing of it.
        let generation: Ends = parse_if_there(&folder.join(GENERATION))?.unwrap_or_default();
        let ends = match generation.eos_token_id {
            Some(ids) => Some(ids),
            None => parse_if_there::<Ends>(&folder.join(MODEL))?.unwrap_or_default().eos_token_id,
        };
        let ends = match ends {
            None => Vec::new(),
            Some(Ids::One(id)) => vec![id],
            Some(Ids::Many(ids)) => ids,
        };
        Ok(Self { config, added, ends })
    }

    /// Tokens beside those of the vocabulary's own file, by id.
    pub(crate) fn added(&self) -> &[(u32, AddedToken)] {
        &self.added
    }

    /// What ends generation.
    pub(crate) fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// How the special token called `name` is written.
    pub(crate) fn special(&self, name: &str) -> Option<&String> {
        let config = &self.config;
        let token = match name {
            "bos_token" => &config.bos_token,
            "eos_token" => &config.eos_token,
            "unk_token" => &config.unk_token,
            "sep_token" => &config.sep_token,
            "pad_token" => &config.pad_token,
            "cls_token" => &config.cls_token,
            "mask_token" => &config.mask_token,
            _ => return None,
        };
        token.as_ref().map(|(Name::Text(text) | Name::Token { content: text })| text)
    }

    /// All special tokens by their names.
    pub(crate) fn special_texts(&self) -> BTreeMap<String, String> {
        SPECIAL.into_iter().filter_map(|name| Some((name.to_owned(), self.special(name)?.clone()))).collect()
    }

    /// The template in the config, of several the one called `default`.
    pub(crate) fn chat_template(&self) -> Option<&str> {
        match self.config.chat_template.as_ref()? {
            Templates::One(template) => Some(template),
            Templates::Named(named) => {
                named.iter().find(|template| template.name == "default").map(|template| &template.template[..])
            }
        }
    }

    /// Whether prompts begin with the token for that.
    pub(crate) fn adds_beginning(&self) -> bool {
        self.config.add_bos_token.unwrap_or(false)
    }

    /// Whether they end with the token for that.
    pub(crate) fn adds_end(&self) -> bool {
        self.config.add_eos_token.unwrap_or(false)
    }

    /// Where a SentencePiece model of this folder puts a space before a text, as transformers has it for the class of the tokenizer.
    pub(crate) fn prefix(&self) -> Prefix {
        let is_llama = self.config.tokenizer_class.as_deref().is_some_and(|class| class.starts_with("Llama"));
        match (is_llama, self.config.legacy) {
            (false, _) => Prefix::Always,
            (true, Some(true)) => Prefix::EachPart,
            (true, None | Some(false)) => Prefix::First,
        }
    }
}

impl Listed {
    fn into_added(self) -> AddedToken {
        AddedToken::from(self.content, self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized)
    }
}

fn parse<T: DeserializeOwned>(path: &Path) -> Result<T, TokenizerError> {
    let bytes = SharedBytes::read(path, FILE_LIMIT)?;
    serde_json::from_slice(bytes.as_slice())
        .map_err(|error| TokenizerError::Json { path: path.to_owned(), problem: error.to_string() })
}

fn parse_if_there<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, TokenizerError> {
    if path.is_file() { parse(path).map(Some) } else { Ok(None) }
}
