//! What `flora bench serving --json` prints, and `flora report --serving` reads.

use serde::{Deserialize, Serialize};

/// All of one run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Answer {
    /// The device.
    pub(crate) device: String,
    /// The model whose requests were run.
    pub(crate) model: String,
    /// `stored` or `seeded`.
    pub(crate) weights: String,
    /// The type of activations and adapters.
    pub(crate) dtype: String,
    /// The modules that adapters adapt.
    pub(crate) adapted: Vec<String>,
    /// Requests that run at once.
    pub(crate) sequences: usize,
    /// Everything at once, as the throughput experiment has it.
    pub(crate) throughput: Vec<Throughput>,
    /// Requests that come one by one.
    pub(crate) latency: Vec<Latency>,
    /// Decoding steps: measured beside what the cost model says of them.
    pub(crate) steps: Vec<DecodeStep>,
    /// What steps spend their time on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) breakdown: Vec<Breakdown>,
}

/// What the time of one workload is spent on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Breakdown {
    pub(crate) variant: Variant,
    pub(crate) workload: String,
    /// How many steps were measured.
    pub(crate) steps: u64,
    /// Of the whole workload, or of one of its steps, as its name says; the mean.
    pub(crate) seconds: f64,
    /// By what they are spent on; together all of them.
    pub(crate) parts: Vec<(String, f64)>,
}

/// Who brings which adapters, and how they are computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Variant {
    /// `none`, `lora` or `flora`.
    pub(crate) adapter: String,
    /// What computes the adapter's part; `matmul` for the base, `tuned` where the planner chose step by step.
    pub(crate) lowering: String,
    /// 0 for the base.
    pub(crate) rank: u32,
}

/// All requests at once, each with an adapter of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Throughput {
    #[serde(flatten)]
    pub(crate) variant: Variant,
    pub(crate) requests: usize,
    pub(crate) prompt_tokens: u64,
    pub(crate) generated_tokens: u64,
    pub(crate) steps: u64,
    pub(crate) seconds: f64,
    /// Prompt and generated tokens.
    pub(crate) tokens_per_second: f64,
    /// Generated tokens alone.
    pub(crate) generated_per_second: f64,
}

/// Requests that come at random times, of which so many a second are to be expected.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Latency {
    #[serde(flatten)]
    pub(crate) variant: Variant,
    pub(crate) requests: usize,
    /// Expected arrivals a second.
    pub(crate) rate: f64,
    /// Seconds from a request's arrival to its first token.
    pub(crate) time_to_first_token: Percentiles,
    /// Seconds of each further token of a request.
    pub(crate) time_per_output_token: Percentiles,
    /// Seconds from a request's arrival to its end.
    pub(crate) latency: Percentiles,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Percentiles {
    pub(crate) p50: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
}

/// One token of each of so many sequences.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DecodeStep {
    pub(crate) model: String,
    #[serde(flatten)]
    pub(crate) variant: Variant,
    pub(crate) sequences: u32,
    /// Measured; absent where the step is only predicted.
    pub(crate) seconds: Option<f64>,
    /// Measured, beside the model without adapters that took turns with it: the median of the rounds' ratios.
    #[serde(default)]
    pub(crate) ratio_to_base: Option<f64>,
    /// (third quartile − first quartile) / median of these ratios.
    #[serde(default)]
    pub(crate) spread: Option<f64>,
    /// Predicted: the projections by the device's coefficients, and where the model was measured the rest of its step without
    /// adapters. Where it wasn't, the projections are all there is.
    pub(crate) predicted_seconds: f64,
    /// Predicted for the model without adapters.
    pub(crate) predicted_base_seconds: f64,
}

#[cfg(feature = "serve")]
impl Percentiles {
    /// Of at least one number, by nearest rank.
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (share * values.len() as f64).ceil() as usize;
            values.get(rank.clamp(1, values.len().max(1)) - 1).copied().unwrap_or(f64::NAN)
        };
        Self { p50: at(0.5), p95: at(0.95), p99: at(0.99) }
    }
}
