//! Tokenizers through the public interface: real vocabularies against other implementations, and files that are wrong.

mod adapters;
mod chat;
mod files;
mod fuzz;
#[path = "../../../flora-checkpoint/tests/checkpoint/gguf_writer.rs"]
#[allow(dead_code, reason = "written for models, of which only the metadata matters here")]
mod gguf_writer;
mod golden;
mod mistakes;
#[path = "../../../flora-checkpoint/tests/checkpoint/mutation.rs"]
mod mutation;
mod round_trip;
mod texts;
