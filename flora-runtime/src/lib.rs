//! flora-runtime.
