//! An activated adapter (aLoRA) against PEFT, through the engine: it acts from its invocation on, and what comes before is the base
//! model's, which other requests may have computed.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use flora_checkpoint::Model;
use flora_engine::{
    AdapterSource, AdapterSpans, Core, Event, LoadOutcome, Loaded, LogProbabilities, LogitRules, Options, Request,
    Sampling, ScoredToken, StopAt, Vocabulary,
};
use flora_model::{AdapterDirectory, DeviceModel, ServeOptions};
use flora_plan::layer::Element;

use crate::golden::{Prompt, prompts};
use crate::served::golden;
use crate::{device, is_host};

/// The model behind an engine, with its adapters.
pub(crate) struct Served {
    pub(crate) core: Core<DeviceModel>,
    pub(crate) source: AdapterDirectory,
}

/// What a request was told.
#[derive(Default)]
pub(crate) struct Heard {
    pub(crate) prompt: Vec<ScoredToken>,
    pub(crate) said: Vec<ScoredToken>,
}

impl Heard {
    pub(crate) fn tokens(&self) -> Vec<u32> {
        self.said.iter().map(|scored| scored.token).collect()
    }
}

impl Served {
    /// With the adapters of a golden folder.
    pub(crate) fn new(folder: &str, options: Options) -> Self {
        Self::of(&golden(folder).join("adapters"), options)
    }

    /// With the adapters of any folder.
    pub(crate) fn of(folder: &Path, options: Options) -> Self {
        let model = Arc::new(Model::open(&golden("llama_tiny").join("model")).expect("a golden model"));
        let cache_tokens = options.cache_tokens;
        let serve = ServeOptions { adapter_bytes: 4 << 20, cache_tokens, ..ServeOptions::default() };
        let decoder = flora_model::load(&device(), &model, &serve).expect("a decoder of a known family");
        let source = AdapterDirectory::new(Some(folder), &model, Element::F32).expect("built-in layers");
        let core = Core::new(decoder, Arc::new(Vocabulary::new(Vec::new())), options).expect("options that fit");
        Self { core, source }
    }

    pub(crate) fn ask(
        &mut self,
        prompt: &[u32],
        adapters: impl Into<AdapterSpans>,
        max_tokens: u32,
        log_probabilities: LogProbabilities,
    ) -> Heard {
        let request = Request {
            prompt: prompt.to_vec(),
            adapters: adapters.into(),
            sampling: Sampling::Greedy,
            rules: LogitRules::default(),
            grammar: None,
            stop: StopAt { max_tokens, strings: Vec::new(), tokens: Vec::new() },
            log_probabilities,
        };
        let now = Instant::now();
        self.core.submit(request, now).expect("a request that can be run");
        let mut heard = Heard::default();
        loop {
            for order in self.core.take_orders() {
                let read = self.source.read(&order.adapter).expect("a golden adapter");
                let (version, prepared) = (read.version, read.prepared);
                let outcome = LoadOutcome::Prepared { version, facts: prepared.facts(), prepared };
                self.core.loaded(Loaded { adapter: order.adapter, outcome });
            }
            for (_, event) in self.core.step(now) {
                match event {
                    Event::Prompt(scored) => heard.prompt.extend(scored),
                    Event::Text { scored, .. } => heard.said.extend(scored),
                    Event::Finished { .. } => return heard,
                    Event::Failed(error) => panic!("{error}"),
                }
            }
        }
    }
}

/// ln softmax of transformers' logits after the token at `position`.
pub(crate) fn log_probability(prompt: &Prompt, position: usize, token: u32) -> f32 {
    let logits = &prompt.logits[position * prompt.vocabulary.len()..(position + 1) * prompt.vocabulary.len()];
    let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
    let own =
        prompt.vocabulary.iter().position(|known| *known == token as usize).expect("the whole vocabulary is kept");
    (f64::from(logits[own]) - sum.ln()) as f32
}

#[test]
fn it_equals_peft() {
    let (prompts, _) = prompts(&golden("llama_alora").join("outputs"), "alora");
    let both = LogProbabilities { generated: Some(0), prompt: Some(0) };
    let said_alone = LogProbabilities { generated: Some(0), prompt: None };
    for prompt in &prompts {
        let mut served = Served::new("llama_alora", Options { chunk_tokens: 16, ..Options::default() });
        let steps = prompt.continuation.len() as u32;
        let heard = served.ask(&prompt.tokens, Some("alora"), steps, both);
        assert_eq!(heard.tokens(), prompt.continuation, "{}", prompt.name);
        let mut worst = 0.0f32;
        for (position, scored) in heard.prompt.iter().enumerate() {
            let right = log_probability(prompt, position, scored.token);
            worst = worst.max((scored.log_probability - right).abs());
        }
        println!("{}: log-probabilities are off by {worst:.2e}", prompt.name);
        // Logits go up to 20 here, and are sums of f32 through 3 layers.
        assert!(worst < 1e-4, "{}: off by {worst}", prompt.name);
        assert_eq!(heard.prompt.len(), prompt.tokens.len() - 1);

        // The same over what the base model's requests left, and over its own.
        let mut served = Served::new("llama_alora", Options { chunk_tokens: 16, ..Options::default() });
        served.ask(&prompt.tokens, None::<&str>, 1, LogProbabilities::default());
        let shared = served.ask(&prompt.tokens, Some("alora"), steps, said_alone);
        assert_eq!(shared.said, heard.said, "{}: the bits of what is said", prompt.name);
        let first = served.core.metrics().shared_tokens;
        let again = served.ask(&prompt.tokens, Some("alora"), steps, said_alone);
        assert_eq!(again.said, heard.said);
        if is_host() {
            let invoked = match &prompt.name[..] {
                "middle" => 37,
                "twice" => 54,
                "last" => 33,
                "first" => 0,
                _ => prompt.tokens.len() as u64 - 1,
            };
            assert_eq!(first, invoked, "{}: what comes before the invocation", prompt.name);
            assert_eq!(served.core.metrics().shared_tokens - first, prompt.tokens.len() as u64 - 1);
        }
    }
    assert_eq!(prompts.len(), 5);
}
