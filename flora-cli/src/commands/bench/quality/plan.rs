//! `quality.toml`: which adapters are compared, at which learning rates, and how long they are trained.

use std::path::{Path, PathBuf};

use flora_checkpoint::AdapterRequest;
use flora_train::{AdamW, Decay, Evaluation, JobOptions, Length, Start, Warmup};
use serde::{Deserialize, Serialize};
use serde_json::Map;

/// Why a plan can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub(crate) struct PlanError {
    path: PathBuf,
    problem: String,
}

/// The whole comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Plan {
    /// The folders of the corpus that are tried.
    pub(super) languages: Vec<String>,
    /// Of starts and of the order of the data; each is a job.
    pub(super) seeds: Vec<u64>,
    /// Steps of a job that is compared.
    pub(super) steps: u64,
    /// Steps of the jobs that choose a learning rate.
    pub(super) rate_steps: u64,
    /// Sequences of a step.
    pub(super) batch: usize,
    /// Tokens of a sequence.
    pub(super) sequence_length: usize,
    /// The most bytes of a file that are held against an adapter.
    pub(super) excerpt_bytes: usize,
    /// The most files of the validation split that choose a rate.
    pub(super) validation_files: usize,
    /// The most files that adapters are compared on.
    pub(super) held_out_files: usize,
    #[serde(rename = "variant")]
    variants: Vec<Described>,
    /// Whose gain is held against whose.
    #[serde(rename = "comparison", default)]
    pub(super) comparisons: Vec<Comparison>,
}

/// Variants as they are written: one for every rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    /// The kind unless given.
    name: Option<String>,
    kind: String,
    /// None for a kind without rank.
    #[serde(default)]
    ranks: Vec<usize>,
    targets: Vec<String>,
    #[serde(default)]
    options: Map<String, serde_json::Value>,
    rates: Vec<f64>,
}

/// Two names of variants; at every rank that both have, or at all of `of`'s where `with` has none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Comparison {
    pub(super) of: String,
    pub(super) with: String,
}

/// One way to adapt the model.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Variant {
    /// As the plan calls it.
    pub(super) family: String,
    pub(super) request: AdapterRequest,
    pub(super) rates: Vec<f64>,
}

/// The longest plan, in bytes.
const LIMIT: u64 = 1 << 20;

impl Plan {
    pub(super) fn read(path: &Path) -> Result<Self, PlanError> {
        let failed = |problem: String| PlanError { path: path.to_owned(), problem };
        let length = std::fs::metadata(path).map_err(|error| failed(format!("cannot read it: {error}")))?.len();
        if length > LIMIT {
            return Err(failed(format!("it has {length} bytes, and a plan has {LIMIT} at most")));
        }
        let text = std::fs::read_to_string(path).map_err(|error| failed(format!("cannot read it: {error}")))?;
        toml::from_str(&text).map_err(|error| failed(error.to_string()))
    }

    /// What a changed plan must hold. `path` is where it is written.
    pub(super) fn check(&self, path: &Path) -> Result<(), PlanError> {
        let families: Vec<String> = self.variants().into_iter().map(|variant| variant.family).collect();
        let plain = |name: &String| !name.is_empty() && !name.contains(['/', '\\']) && !name.starts_with('.');
        let numbers = [
            ("steps", self.steps as usize),
            ("rate_steps", self.rate_steps as usize),
            ("batch", self.batch),
            ("sequence_length", self.sequence_length),
            ("excerpt_bytes", self.excerpt_bytes),
            ("validation_files", self.validation_files),
        ];
        let zero = numbers.iter().find(|(_, number)| *number == 0);
        let strange = self.comparisons.iter().flat_map(|own| [&own.of, &own.with]);
        let strange = strange.clone().find(|name| !families.contains(name));
        let without_rate = self.variants.iter().find(|own| own.rates.is_empty());
        let problem = match () {
            () if self.languages.is_empty() => "it names no language".to_owned(),
            () if !self.languages.iter().all(plain) => "a language is named as its folder is, and no path".to_owned(),
            () if self.seeds.is_empty() => "it has no seed".to_owned(),
            () if self.variants.is_empty() => "it has no `[[variant]]`".to_owned(),
            () if let Some((name, _)) = zero => format!("`{name}` is 0; it must be at least 1"),
            () if self.held_out_files < super::statistics::LEAST_FILES => {
                let least = super::statistics::LEAST_FILES;
                format!("`held_out_files` must be at least {least}: an interval over fewer says nothing")
            }
            () if let Some(own) = without_rate => {
                format!("the variant `{}` has no learning rate to try in `rates`", own.family())
            }
            () if let Some(name) = strange => {
                format!("a comparison names `{name}`, and the variants are {}", families.join(", "))
            }
            () => match repeated(&self.variants().iter().map(Variant::name).collect::<Vec<_>>()) {
                None => return Ok(()),
                Some(name) => format!("two variants are called `{name}`; give one another `name`"),
            },
        };
        Err(PlanError { path: path.to_owned(), problem })
    }

    /// Keeps the variants of these names alone, and the comparisons among them. `path` is where the plan is written.
    pub(super) fn keep(&mut self, families: &[String], path: &Path) -> Result<(), PlanError> {
        let has = |name: &&String| self.variants.iter().any(|own| own.family() == **name);
        if let Some(unknown) = families.iter().find(|name| !has(name)) {
            return Err(PlanError { path: path.to_owned(), problem: format!("it has no variant `{unknown}`") });
        }
        self.variants.retain(|own| families.iter().any(|name| name == own.family()));
        self.comparisons.retain(|own| families.contains(&own.of) && families.contains(&own.with));
        Ok(())
    }

    /// All variants, one for each rank.
    pub(super) fn variants(&self) -> Vec<Variant> {
        let of = |own: &Described| {
            let ranks: Vec<Option<usize>> =
                if own.ranks.is_empty() { vec![None] } else { own.ranks.iter().copied().map(Some).collect() };
            let variant = |rank| Variant {
                family: own.family().to_owned(),
                rates: own.rates.clone(),
                request: AdapterRequest {
                    layer: own.kind.clone(),
                    rank,
                    alpha: None,
                    targets: own.targets.clone(),
                    options: own.options.clone(),
                },
            };
            ranks.into_iter().map(variant).collect::<Vec<_>>()
        };
        self.variants.iter().flat_map(of).collect()
    }

    /// The pairs of variants that are compared, by their positions in [`Self::variants`].
    pub(super) fn pairs(&self) -> Vec<(usize, usize)> {
        let variants = self.variants();
        let named = |name: &str| {
            let name = name.to_owned();
            (0..).zip(&variants).filter(move |(_, own)| own.family == name)
        };
        let mut pairs = Vec::new();
        for Comparison { of, with } in &self.comparisons {
            for (one, own) in named(of) {
                let matches = |other: &Variant| other.request.rank.is_none() || other.request.rank == own.request.rank;
                pairs.extend(named(with).filter(|(_, other)| matches(other)).map(|(other, _)| (one, other)));
            }
        }
        pairs
    }

    /// A job of a variant.
    pub(super) fn job(&self, variant: &Variant, name: String, (rate, seed, steps): (f64, u64, u64)) -> JobOptions {
        JobOptions {
            name,
            adapter: variant.request.clone(),
            start: Start::Default,
            seed,
            learning_rate: rate,
            decay: Decay::Cosine,
            warmup: Warmup::Fraction(0.05),
            length: Length::Steps(steps),
            sequence_length: self.sequence_length,
            batch: self.batch,
            accumulation: 1,
            optimizer: AdamW::default(),
            largest_norm: Some(1.0),
            evaluation: Evaluation { every: steps, patience: None, least_gain: 0.0 },
            save_every: Some(10),
        }
    }
}

impl Described {
    fn family(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.kind)
    }
}

impl Variant {
    /// Its name with its rank.
    pub(super) fn name(&self) -> String {
        match self.request.rank {
            Some(rank) => format!("{}-r{rank}", self.family),
            None => self.family.clone(),
        }
    }
}

fn repeated(names: &[String]) -> Option<&String> {
    names.iter().enumerate().find(|(at, name)| names[..*at].contains(name)).map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
languages = ["racket"]
seeds = [1, 2, 3]
steps = 100
rate_steps = 40
batch = 4
sequence_length = 128
excerpt_bytes = 1024
validation_files = 32
held_out_files = 96

[[variant]]
kind = "flora"
ranks = [1, 4]
targets = ["q_proj"]
rates = [8e-3]

[[variant]]
kind = "lora"
ranks = [4, 1]
targets = ["q_proj"]
rates = [1e-3]

[[variant]]
name = "ia3-default"
kind = "ia3"
targets = ["k_proj", "down_proj"]
options = { feedforward_modules = ["down_proj"] }
rates = [5e-3]

[[comparison]]
of = "flora"
with = "lora"

[[comparison]]
of = "flora"
with = "ia3-default"
"#;

    fn plan(text: &str) -> Plan {
        toml::from_str(text).expect("a plan")
    }

    #[test]
    fn a_variant_is_one_for_each_rank_and_is_compared_at_its_own() {
        let plan = plan(TEXT);
        plan.check(Path::new("plan.toml")).expect("it makes sense");
        let names: Vec<_> = plan.variants().iter().map(Variant::name).collect();
        assert_eq!(names, ["flora-r1", "flora-r4", "lora-r4", "lora-r1", "ia3-default"]);
        assert_eq!(plan.pairs(), [(0, 3), (1, 2), (0, 4), (1, 4)]);
        let mut fewer = plan.clone();
        let path = Path::new("plan.toml");
        fewer.keep(&["flora".to_owned(), "lora".to_owned()], path).expect("they are there");
        assert!(fewer.clone().keep(&["ia3-default".to_owned()], path).is_err(), "it isn't there any more");
        assert_eq!((fewer.variants().len(), fewer.pairs()), (4, vec![(0, 3), (1, 2)]));
    }

    #[test]
    fn what_makes_no_sense_is_told() {
        let refused = |from: &str, to: &str| {
            let text = TEXT.replace(from, to);
            assert_ne!(text, TEXT, "{from} is in it");
            plan(&text).check(Path::new("plan.toml")).expect_err("it makes no sense").to_string()
        };
        assert!(refused("seeds = [1, 2, 3]", "seeds = []").contains("no seed"));
        assert!(refused("[\"racket\"]", "[\"../racket\"]").contains("no path"));
        assert!(refused("batch = 4", "batch = 0").contains("`batch` is 0"));
        assert!(refused("held_out_files = 96", "held_out_files = 3").contains("at least 8"));
        assert!(refused("rates = [5e-3]", "rates = []").contains("`ia3-default` has no learning rate"));
        assert!(refused("with = \"lora\"", "with = \"dora\"").contains("names `dora`"));
        assert!(refused("ranks = [1, 4]", "ranks = [1, 1]").contains("two variants are called `flora-r1`"));
        assert!(toml::from_str::<Plan>(&TEXT.replace("steps = 100", "steps = 100\nstep = 3")).is_err());
    }
}
