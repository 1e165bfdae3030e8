//! What the server counts and times, and how a scrape reads it together with the engine's own numbers.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::{Method, StatusCode};
use flora_engine::{AdapterRequests, Metrics as EngineMetrics};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, prometheus_text};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Upper bounds in seconds, from a GPU's first token of a short prompt to a host's of a long one.
const FIRST_TOKEN: [f64; 15] = [0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0];
/// Upper bounds in seconds.
const OUTPUT_TOKEN: [f64; 13] = [0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5];

/// The numbers of one server.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    /// What routers of requests read, by the names that vLLM has for it.
    routing: Registry,
    answers: Family<AnswerLabels, Counter>,
    /// Open connections.
    pub(crate) connections: Gauge,
    /// Connections that found no place.
    pub(crate) refused_connections: Counter,
    first_token: Histogram,
    output_token: Histogram,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnswerLabels {
    method: &'static str,
    path: String,
    status: u16,
}

impl Metrics {
    /// Everything at 0; `engine` and `adapters` are asked at every scrape.
    pub(crate) fn new(
        engine: impl Fn() -> EngineMetrics + Clone + Send + Sync + 'static,
        adapters: impl Fn() -> AdapterRequests + Send + Sync + 'static,
    ) -> Self {
        let mut routing = Registry::default();
        routing.register_collector(Box::new(Routing { engine: engine.clone(), adapters }));
        let metrics = Self {
            routing,
            registry: Registry::with_prefix("flora"),
            answers: Family::default(),
            connections: Gauge::default(),
            refused_connections: Counter::default(),
            first_token: Histogram::new(FIRST_TOKEN),
            output_token: Histogram::new(OUTPUT_TOKEN),
        };
        metrics.registered(engine)
    }

    fn registered(mut self, engine: impl Fn() -> EngineMetrics + Send + Sync + 'static) -> Self {
        let registry = &mut self.registry;
        registry.register("http_answers", "Answers by method, path and status", self.answers.clone());
        registry.register("http_connections", "Open connections", self.connections.clone());
        registry.register(
            "http_connections_refused",
            "Connections that found no place",
            self.refused_connections.clone(),
        );
        registry.register(
            "time_to_first_token_seconds",
            "From a request's arrival to the first token of a choice",
            self.first_token.clone(),
        );
        registry.register(
            "time_per_output_token_seconds",
            "Between the first and the last token of a choice, by token",
            self.output_token.clone(),
        );
        registry.register_collector(Box::new(Engine(engine)));
        self
    }

    /// Counts an answer. `path` is the route's pattern, so that no client can make up labels.
    pub(crate) fn answered(&self, method: &Method, path: Option<&str>, status: StatusCode) {
        let method = match *method {
            Method::GET => "GET",
            Method::HEAD => "HEAD",
            Method::POST => "POST",
            _ => "other",
        };
        let labels = AnswerLabels { method, path: path.unwrap_or("other").to_owned(), status: status.as_u16() };
        self.answers.get_or_create(&labels).inc();
    }

    /// Notes when a choice's first token came.
    pub(crate) fn first_token(&self, after: Duration) {
        self.first_token.observe(after.as_secs_f64());
    }

    /// Notes how long a choice's tokens took after its first, where there are such.
    pub(crate) fn output_tokens(&self, took: Duration, tokens: u32) {
        if let Some(later) = tokens.checked_sub(1).filter(|later| *later > 0) {
            self.output_token.observe(took.as_secs_f64() / f64::from(later));
        }
    }

    /// All of it in Prometheus' text format.
    pub(crate) fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_text::encode(&mut text, &self.registry)?;
        prometheus_text::encode(&mut text, &self.routing)?;
        Ok(text)
    }
}

/// The engine's numbers, asked for at every scrape.
struct Engine<F>(F);

impl<F> fmt::Debug for Engine<F> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Engine")
    }
}

impl<F: Fn() -> EngineMetrics + Send + Sync + 'static> Collector for Engine<F> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let now = (self.0)();
        let adapters = now.adapters;
        let count = |number: u64| ConstCounter::new(number);
        for (name, help, number) in [
            ("requests_finished", "Requests that came to their end", now.finished),
            ("requests_failed", "Requests that failed after they were accepted", now.failed),
            ("requests_cancelled", "Requests whose client went away", now.cancelled),
            ("steps", "Batches run", now.steps),
            ("prompt_tokens", "Tokens of prompts", now.prompt_tokens),
            ("generated_tokens", "Tokens generated", now.generated_tokens),
            ("shared_tokens", "Tokens that began as those of another request, and were not run", now.shared_tokens),
            ("recomputed_tokens", "Tokens run again after a pre-emption", now.recomputed_tokens),
            ("preemptions", "Sequences that had to make room", now.preemptions),
            ("adapter_hits", "Requests that found their adapter resident", adapters.hits),
            ("adapter_loads", "Adapters placed on the device", adapters.loads),
            ("adapter_evictions", "Adapters removed to make room", adapters.evictions),
            ("adapter_failures", "Loads of adapters that failed", adapters.failures),
        ] {
            let counter = count(number);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        for (name, help, number) in [
            ("requests_running", "Requests that run", now.running as f64),
            ("requests_waiting", "Requests that wait", now.waiting as f64),
            ("cache_blocks_used", "Blocks of the cache that sequences hold", now.cache_blocks_used as f64),
            (
                "cache_blocks_kept",
                "Blocks of the cache kept for requests that begin alike",
                now.cache_blocks_kept as f64,
            ),
            ("cache_blocks", "Blocks of the cache", now.cache_blocks_total as f64),
            ("last_step_seconds", "How long the last batch took", now.last_step.as_secs_f64()),
            ("adapters_resident", "Adapters on the device", adapters.resident as f64),
            ("adapter_bytes_resident", "Bytes of the adapters on the device", adapters.resident_bytes as f64),
            ("adapters_loading", "Adapters on their way to the device", adapters.loading as f64),
        ] {
            let gauge = ConstGauge::new(number);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}

/// What a router of requests looks at, in the words of vLLM, which the gateway API's inference extension and llm-d read: how many
/// requests run and wait, how full the cache is, and which adapters requests have.
struct Routing<F, G> {
    engine: F,
    adapters: G,
}

impl<F, G> fmt::Debug for Routing<F, G> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Routing")
    }
}

impl<F, G> Collector for Routing<F, G>
where
    F: Fn() -> EngineMetrics + Send + Sync + 'static,
    G: Fn() -> AdapterRequests + Send + Sync + 'static,
{
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (now, adapters) = ((self.engine)(), (self.adapters)());
        let usage = now.cache_blocks_used as f64 / (now.cache_blocks_total as f64).max(1.0);
        for (name, help, number) in [
            ("vllm:num_requests_running", "Requests that run", now.running as f64),
            ("vllm:num_requests_waiting", "Requests that wait", now.waiting as f64),
            ("vllm:kv_cache_usage_perc", "The part of the cache that requests hold, up to 1", usage),
        ] {
            let gauge = ConstGauge::new(number);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let blocks = [("block_size", now.cache_block_tokens), ("num_gpu_blocks", now.cache_blocks_total)];
        let blocks = blocks.map(|(name, number)| (name, number.to_string()));
        let about = [
            ("max_lora", adapters.resident.to_string()),
            ("running_lora_adapters", listed(&adapters.running)),
            ("waiting_lora_adapters", listed(&adapters.waiting)),
        ];
        // The latest of several samples counts, by its value.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        labelled(&mut encoder, "vllm:cache_config_info", "The blocks of the cache", &blocks, 1.0)?;
        labelled(&mut encoder, "vllm:lora_requests_info", "The adapters of requests, now", &about, since)
    }
}

/// A gauge with labels.
fn labelled<const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    labels: &[(&'static str, String); N],
    value: f64,
) -> fmt::Result {
    let gauge = ConstGauge::new(value);
    let mut family = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
    gauge.encode(family.encode_family(labels)?)
}

/// Names as one label. One with a comma would be read as two, and is left out.
fn listed(names: &[String]) -> String {
    let names: Vec<&str> = names.iter().map(String::as_str).filter(|name| !name.contains(',')).collect();
    names.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_tells_of_the_server_and_of_the_engine_as_it_is() {
        let engine = || EngineMetrics {
            running: 3,
            finished: 7,
            waiting: 2,
            cache_blocks_used: 3,
            cache_blocks_total: 12,
            cache_block_tokens: 32,
            ..EngineMetrics::default()
        };
        let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let adapters =
            move || AdapterRequests { running: named(&["a\"b", "c", "d,e"]), waiting: named(&["f"]), resident: 64 };
        let metrics = Metrics::new(engine, adapters);
        metrics.answered(&Method::POST, Some("/v1/completions"), StatusCode::OK);
        metrics.answered(&Method::from_bytes(b"MADE-UP").unwrap(), None, StatusCode::NOT_FOUND);
        metrics.first_token(Duration::from_millis(15));
        metrics.output_tokens(Duration::from_secs(3), 4);
        metrics.output_tokens(Duration::from_secs(3), 1);
        let text = metrics.text().unwrap();
        for line in [
            "flora_http_answers_total{method=\"POST\",path=\"/v1/completions\",status=\"200\"} 1",
            "flora_http_answers_total{method=\"other\",path=\"other\",status=\"404\"} 1",
            "flora_requests_running 3.0",
            "flora_requests_finished_total 7",
            "flora_time_to_first_token_seconds_count 1",
            "flora_time_per_output_token_seconds_sum 1.0",
            "flora_time_per_output_token_seconds_count 1",
            "vllm:num_requests_running 3.0",
            "vllm:num_requests_waiting 2.0",
            "vllm:kv_cache_usage_perc 0.25",
            "vllm:cache_config_info{block_size=\"32\",num_gpu_blocks=\"12\"} 1.0",
        ] {
            assert!(text.lines().any(|found| found == line), "no `{line}` in\n{text}");
        }
        let labels = r#"{max_lora="64",running_lora_adapters="a\"b,c",waiting_lora_adapters="f"} "#;
        let sample = text.lines().find_map(|line| line.strip_prefix("vllm:lora_requests_info")?.strip_prefix(labels));
        assert!(sample.is_some_and(|value| value.parse::<f64>().is_ok_and(|time| time > 1.7e9)), "{text}");
    }
}
