//! The engine against a decoder that computes nothing but checks all that it is told.

mod adapters;
mod batching;
mod grammars;
mod schedules;
mod scores;
mod sharing;
mod support;
mod threads;
