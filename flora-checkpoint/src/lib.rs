//! flora-checkpoint.
