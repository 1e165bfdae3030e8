//! A folder's `tokenizer.model`: the fields of SentencePiece's protocol buffer that matter here.

use super::{Choice, Model, Piece, Prefix, Purpose};
use crate::error::{TokenizerError, VocabularyProblem};
use crate::vocabulary::TOKENS_LIMIT;
use prost::Message;
use std::path::Path;

#[derive(Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<PieceProto>,
    #[prost(message, optional, tag = "2")]
    trainer_spec: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer_spec: Option<NormalizerSpec>,
}

#[derive(Message)]
struct PieceProto {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    /// `Purpose`, 1 where it is missing.
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Message)]
struct TrainerSpec {
    /// 1 is Unigram, 2 BPE; 1 where it is missing.
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    treat_whitespace_as_suffix: Option<bool>,
}

#[derive(Message)]
struct NormalizerSpec {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
}

/// The model in `bytes`, which are those of the file at `path`; `prefix` is how a space is put before texts, if one is.
pub(crate) fn read(path: &Path, bytes: &[u8], prefix: Prefix) -> Result<Model, TokenizerError> {
    let entry = |key: &str, problem: &str| TokenizerError::entry(path, key, problem);
    let proto = ModelProto::decode(bytes).ok().filter(|proto| !proto.pieces.is_empty());
    let proto = proto.ok_or_else(|| {
        entry("the model", "is not SentencePiece's; a folder of another kind needs its tokenizer.json")
    })?;
    let (trainer, normalizer) = (proto.trainer_spec.unwrap_or_default(), proto.normalizer_spec.unwrap_or_default());
    if trainer.treat_whitespace_as_suffix == Some(true) {
        return Err(entry("treat_whitespace_as_suffix", "is set, which is not supported"));
    }
    let choice = match trainer.model_type.unwrap_or(1) {
        1 => Choice::Unigram,
        2 => Choice::Merges(None),
        _ => return Err(entry("model_type", "is neither Unigram nor BPE; others are not supported")),
    };
    if proto.pieces.len() > TOKENS_LIMIT {
        let problem = VocabularyProblem::TooLarge { found: proto.pieces.len() as u64, limit: TOKENS_LIMIT };
        return Err(TokenizerError::Vocabulary { path: path.to_owned(), problem });
    }
    let piece = |PieceProto { piece, score, kind }| {
        let purpose = u64::try_from(kind.unwrap_or(1)).ok().and_then(Purpose::of);
        let purpose = purpose.ok_or_else(|| entry("type", "of a piece is none of SentencePiece's"))?;
        Ok(Piece { text: piece.unwrap_or_default(), score: score.unwrap_or(0.0), purpose })
    };
    Ok(Model {
        pieces: proto.pieces.into_iter().map(piece).collect::<Result<_, TokenizerError>>()?,
        choice,
        prefix: if normalizer.add_dummy_prefix == Some(false) { Prefix::Never } else { prefix },
        removes_spaces: normalizer.remove_extra_whitespaces.unwrap_or(true),
        characters: normalizer.precompiled_charsmap.unwrap_or_default(),
    })
}
