//! An adapter held against a model: whether every module that it adapts is there in its shape, whether every module that its
//! config targets has its tensors, and what of the model's own weights it replaces.
//!
//! An embedding `[vocabulary, d]` is adapted as a projection of one-hot rows, of vocabulary inputs and d outputs; the output matrix
//! is a projection of d inputs and vocabulary outputs.

use super::description::Extent;
use super::replaced::ReplacedRows;
use super::{AdapterError, AdapterFolder, AdapterModule, CONFIG, TENSORS};
use crate::error::FileError;
use crate::model::{Model, Parameter};
use crate::tensor::{StoredTensor, TensorProblem};
use std::collections::BTreeMap;

/// Where the families have their token embedding.
const EMBEDDINGS: [&str; 2] = ["model.embed_tokens", "transformer.wte"];
/// Where they have their output matrix.
pub(super) const HEAD: &str = "lm_head";

/// The two modules of a decoder that know its vocabulary.
#[derive(Clone, Debug)]
pub struct DecoderEnds {
    /// The path of the token embedding.
    pub embedding: String,
    /// The path of the output matrix.
    pub head: &'static str,
    /// Whether the embedding is the output matrix too.
    pub tied: bool,
    tokens: Parameter,
    output: Parameter,
}

impl DecoderEnds {
    /// Those of `model`; `None` where it has no token embedding.
    pub fn of(model: &Model) -> Option<Self> {
        let weight = |path: &str| model.parameter(&format!("{path}.weight")).ok();
        let (embedding, tokens) = EMBEDDINGS.iter().find_map(|path| Some(((*path).to_owned(), weight(path)?)))?;
        let own = weight(HEAD).filter(|own| !is_same(own.stored(), tokens.stored()));
        let (tied, output) = (own.is_none(), own.unwrap_or_else(|| tokens.clone()));
        Some(Self { embedding, head: HEAD, tied, tokens, output })
    }

    /// `[vocabulary, d]`
    pub fn tokens(&self) -> &Parameter {
        &self.tokens
    }

    /// `[vocabulary, d]`
    pub fn output(&self) -> &Parameter {
        &self.output
    }
}

/// What an adapter replaces of a model, where that changes anything.
#[derive(Clone, Debug, Default)]
pub struct Replaced<'a> {
    /// The token embedding `[vocabulary, d]`, of as many tokens as it has.
    pub embedding: Option<&'a StoredTensor>,
    /// The output matrix, likewise.
    pub head: Option<&'a StoredTensor>,
    /// Rows of the token embedding.
    pub embedding_rows: Option<&'a ReplacedRows>,
    /// Rows of the output matrix.
    pub head_rows: Option<&'a ReplacedRows>,
    /// What is added to the outputs of a projection before anything else follows, `[k]`, by path.
    pub bias_offsets: BTreeMap<String, Vec<f32>>,
}

impl AdapterFolder {
    /// Whether what is done to the embedding is done to an output matrix that is tied to it, too.
    pub fn keeps_ties(&self) -> bool {
        self.replaced.keeps_ties
    }

    /// Checks that `model` has every adapted module in the adapter's shape, that every module of `model` that the config targets has
    /// its tensors, and that what else the file holds is of `model`.
    pub fn check_against(&self, model: &Model) -> Result<(), AdapterError> {
        self.replaced_of(model).map(|_| ())
    }

    /// [`check_against`](Self::check_against), and what the adapter replaces of `model`.
    pub fn replaced_of(&self, model: &Model) -> Result<Replaced<'_>, AdapterError> {
        let ends = DecoderEnds::of(model);
        let against = Against { adapter: self, model, ends: ends.as_ref() };
        let replaced = against.replaced()?;
        for (path, module) in &self.modules {
            against.check_shapes(path, module, against.shape(path, &replaced)?)?;
        }
        against.check_targets()?;
        against.check_vocabulary(&replaced)?;
        Ok(replaced)
    }
}

struct Against<'a, 'm> {
    adapter: &'a AdapterFolder,
    model: &'m Model,
    ends: Option<&'m DecoderEnds>,
}

impl<'a> Against<'a, '_> {
    /// Inputs and outputs of the module at `path`.
    fn shape(&self, path: &str, replaced: &Replaced<'_>) -> Result<(usize, usize), AdapterError> {
        if let Some(ends) = self.ends {
            let rows = |own: Option<&StoredTensor>, base: &Parameter| {
                let shape = own.map_or(base.shape(), StoredTensor::shape);
                (shape.first().copied().unwrap_or(0), shape.get(1).copied().unwrap_or(0))
            };
            if path == ends.embedding {
                return Ok(rows(replaced.embedding, &ends.tokens));
            }
            if path == ends.head {
                let (vocabulary, d) = rows(replaced.head, &ends.output);
                return Ok((d, vocabulary));
            }
        }
        let projection = self.model.projection(path)?;
        Ok((projection.d, projection.k))
    }

    fn check_shapes(&self, path: &str, module: &AdapterModule, (d, k): (usize, usize)) -> Result<(), AdapterError> {
        let described = self.adapter.kind.layer(&module.layer).map_or(&[][..], |layer| &layer.tensors);
        for (operand, tensor) in &module.operands {
            let Some(described) = described.iter().find(|tensor| tensor.operand == *operand) else { continue };
            let extent = |(extent, found): (Extent, &usize)| match extent {
                Extent::Inputs => d,
                Extent::Outputs => k,
                Extent::Rank => module.rank,
                Extent::Fixed(number) => number,
                Extent::Any | Extent::Components => *found,
            };
            let expected: Vec<usize> = described.shape().into_iter().zip(&tensor.shape).map(extent).collect();
            if tensor.shape != expected {
                let expected = format!("{expected:?} (the model {} has d {d}, k {k})", self.model.name());
                let problem = TensorProblem::WrongShape { found: tensor.shape.clone(), expected };
                return Err(self.bad(&format!("{path} ({operand})"), problem));
            }
        }
        Ok(())
    }

    /// Every module that the config targets, or lists as saved, has tensors. One that the model doesn't have is nobody's concern.
    fn check_targets(&self) -> Result<(), AdapterError> {
        let adapter = self.adapter;
        let without = |path: &str| {
            Err(AdapterError::ModuleWithoutTensors { path: adapter.path.join(TENSORS), module: path.to_owned() })
        };
        let projections = self.model.projections().iter().map(|projection| projection.path.as_str());
        // The output matrix has the embedding's where both are tied together.
        let is_tied_head =
            |path: &str| adapter.replaced.keeps_ties && self.ends.is_some_and(|ends| ends.tied && path == ends.head);
        let ends = self.ends.iter().flat_map(|ends| [ends.embedding.as_str(), ends.head]);
        let paths = projections.chain(ends).filter(|path| !is_tied_head(path));
        for path in paths {
            if !adapter.modules.contains_key(path)
                && adapter.targets.asks_for(path).map_err(|problem| problem.in_file(&adapter.path.join(CONFIG)))?
            {
                return without(path);
            }
            if adapter.replaced.listed.iter().any(|listed| path.ends_with(listed.as_str()))
                && !adapter.replaced.weights.contains_key(path)
            {
                return without(path);
            }
        }
        Ok(())
    }

    fn replaced(&self) -> Result<Replaced<'a>, AdapterError> {
        let own = &self.adapter.replaced;
        let mut replaced = Replaced::default();
        for (path, weight) in &own.weights {
            let name = format!("{path}.weight");
            let Some(ends) = self.ends.filter(|ends| *path == ends.embedding || path == ends.head) else {
                self.check_equal(path, &name, &weight.tensor)?;
                continue;
            };
            let is_embedding = *path == ends.embedding;
            let base = if is_embedding { &ends.tokens } else { &ends.output };
            self.check_matrix(&name, &weight.tensor, base)?;
            if is_same(&weight.tensor, base.stored()) {
                continue;
            }
            let for_both = ends.tied && (!weight.of_one_module || own.keeps_ties);
            if is_embedding || for_both {
                self.put(&name, &mut replaced.embedding, &weight.tensor)?;
            }
            if !is_embedding || for_both {
                self.put(&name, &mut replaced.head, &weight.tensor)?;
            }
        }
        for (path, rows) in &own.rows {
            let Some(ends) = self.ends.filter(|ends| *path == ends.embedding || path == ends.head) else {
                return Err(self
                    .model
                    .parameter(&format!("{path}.weight"))
                    .err()
                    .map_or_else(|| self.unsupported(&format!("{path}.weight")), AdapterError::from));
            };
            let is_embedding = *path == ends.embedding;
            let weight = if is_embedding { replaced.embedding } else { replaced.head };
            let base = if is_embedding { &ends.tokens } else { &ends.output };
            let shape = weight.map_or(base.shape(), StoredTensor::shape);
            let (vocabulary, d) = (shape.first().copied().unwrap_or(0), shape.get(1).copied().unwrap_or(0));
            let tensor = format!("{path}.token_adapter.trainable_tokens_delta");
            if rows.width() != d {
                let found = vec![rows.rows.len(), rows.width()];
                let expected = format!("[{}, {d}], rows of the model's width,", rows.rows.len());
                return Err(self.bad(&tensor, TensorProblem::WrongShape { found, expected }));
            }
            if let Some(row) = rows.rows.iter().find(|row| **row as usize >= vocabulary) {
                return Err(self.bad(&tensor, TensorProblem::NoSuchRow { row: *row as usize, rows: vocabulary }));
            }
            if self.adapter.modules.contains_key(path) {
                return Err(self.unsupported(&tensor));
            }
            // PEFT keeps a tied output matrix in step, unless it has rows of its own.
            let for_both = ends.tied && is_embedding && !own.rows.contains_key(ends.head);
            if is_embedding || for_both {
                replaced.embedding_rows = Some(rows);
            }
            if !is_embedding || for_both {
                replaced.head_rows = Some(rows);
            }
        }
        self.biases(&mut replaced)?;
        Ok(replaced)
    }

    /// What the biases of the file add to those of the base.
    fn biases(&self, replaced: &mut Replaced<'a>) -> Result<(), AdapterError> {
        let own = &self.adapter.replaced;
        for (path, bias) in &own.biases {
            let name = format!("{path}.bias");
            let Ok(projection) = self.model.projection(path) else {
                let base = self.model.parameter(&name)?.to_f32()?;
                if base != *bias {
                    return Err(self.unsupported(&name));
                }
                continue;
            };
            self.check_length(&name, bias, projection.k)?;
            let base = self.model.bias(path)?.unwrap_or_else(|| vec![0.0; projection.k]);
            let offset: Vec<f32> = bias.iter().zip(&base).map(|(bias, base)| bias - base).collect();
            replaced.bias_offsets.insert(path.clone(), offset);
        }
        for (path, bias) in &own.added_biases {
            let (_, k) = self.shape(path, replaced)?;
            self.check_length(&format!("{path}.lora_B.bias"), bias, k)?;
            let offset = replaced.bias_offsets.entry(path.clone()).or_insert_with(|| vec![0.0; k]);
            offset.iter_mut().zip(bias).for_each(|(offset, bias)| *offset += bias);
        }
        replaced.bias_offsets.retain(|_, offset| offset.iter().any(|offset| *offset != 0.0));
        Ok(())
    }

    /// A vocabulary is as large at one end as at the other.
    fn check_vocabulary(&self, replaced: &Replaced<'_>) -> Result<(), AdapterError> {
        let Some(ends) = self.ends else { return Ok(()) };
        let rows = |own: Option<&StoredTensor>, base: &Parameter| {
            own.map_or(base.shape(), StoredTensor::shape).first().copied().unwrap_or(0)
        };
        let (tokens, logits) = (rows(replaced.embedding, &ends.tokens), rows(replaced.head, &ends.output));
        if replaced.embedding.is_none() && replaced.head.is_none() || tokens == logits {
            return Ok(());
        }
        let problem = TensorProblem::WrongShape {
            found: replaced.head.map_or(ends.output.shape(), StoredTensor::shape).to_vec(),
            expected: format!("a row for each of the {tokens} tokens of `{}`", ends.embedding),
        };
        Err(self.bad(&format!("{}.weight", ends.head), problem))
    }

    fn put(
        &self,
        name: &str,
        place: &mut Option<&'a StoredTensor>,
        tensor: &'a StoredTensor,
    ) -> Result<(), AdapterError> {
        match place {
            // Of two weights for one parameter, which one holds depends on the order in which they are loaded.
            Some(other) if !is_same(other, tensor) => Err(AdapterError::ExtraTensor {
                path: self.adapter.path.join(TENSORS),
                tensor: name.to_owned(),
                problem: "is another weight than its tied one, for a model that has one for both; remove one"
                    .to_owned(),
            }),
            _ => {
                *place = Some(tensor);
                Ok(())
            }
        }
    }

    /// A copy of any other weight changes nothing, or isn't supported.
    fn check_equal(&self, path: &str, name: &str, tensor: &StoredTensor) -> Result<(), AdapterError> {
        let equal = match self.model.stored(path) {
            Ok(stored) => is_same(tensor, &stored.tensor),
            Err(_) => is_same(tensor, self.model.parameter(name)?.stored()),
        };
        if equal { Ok(()) } else { Err(self.unsupported(name)) }
    }

    fn check_matrix(&self, name: &str, tensor: &StoredTensor, base: &Parameter) -> Result<(), AdapterError> {
        match (tensor.shape(), base.shape()) {
            ([rows, columns], [_, d]) if columns == d && *rows > 0 => Ok(()),
            (found, _) => {
                let expected = format!("[tokens, d] as {:?} of the model {}", base.shape(), self.model.name());
                Err(self.bad(name, TensorProblem::WrongShape { found: found.to_vec(), expected }))
            }
        }
    }

    fn check_length(&self, name: &str, bias: &[f32], k: usize) -> Result<(), AdapterError> {
        if bias.len() == k {
            return Ok(());
        }
        let expected = format!("[{k}], the outputs of the module in the model {},", self.model.name());
        Err(self.bad(name, TensorProblem::WrongShape { found: vec![bias.len()], expected }))
    }

    fn bad(&self, tensor: &str, problem: TensorProblem) -> AdapterError {
        FileError::Tensor { path: self.adapter.path.clone(), tensor: tensor.to_owned(), problem }.into()
    }

    fn unsupported(&self, tensor: &str) -> AdapterError {
        AdapterError::UnsupportedReplacement { path: self.adapter.path.join(TENSORS), tensor: tensor.to_owned() }
    }
}

/// Whether two tensors have the same shape and numbers, whatever they are stored in.
fn is_same(one: &StoredTensor, other: &StoredTensor) -> bool {
    if one.shape() != other.shape() {
        return false;
    }
    if one.encoding() == other.encoding() && one.bytes() == other.bytes() {
        return true;
    }
    let Some(rows) = one.shape().first().copied().filter(|_| one.shape().len() == 2) else {
        return one.to_f32() == other.to_f32();
    };
    // Row by row: the first one that differs ends it.
    (0..rows).all(|row| match (one.rows_f32(&[row]), other.rows_f32(&[row])) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    })
}
