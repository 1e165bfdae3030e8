//! The built command, as a person or a script meets it: answers parse, other people's data comes out right, mistakes are told.
//! Nothing here downloads but what a variable of the environment requires.

mod answers;
mod bench;
mod browser;
mod clients;
mod command;
mod convert;
mod data;
mod export;
#[allow(dead_code, reason = "it can write more than these tests want")]
#[path = "../../../flora-checkpoint/tests/checkpoint/gguf_writer.rs"]
mod gguf_writer;
mod inspect;
mod kinds;
mod mistakes;
mod page;
mod quality;
mod report;
mod server;
mod serving;
mod stored;
mod training;
mod tuning;
mod world;
