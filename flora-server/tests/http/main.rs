//! The API as its clients see it: answers, errors, what a hostile client can do, connections, and a real client.

mod answers;
mod client;
mod connections;
mod deploy;
mod errors;
mod extras;
mod fields;
mod hostile;
mod logprobs;
mod model;
mod replicas;
mod spans;
mod structured;
mod support;
