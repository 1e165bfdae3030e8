//! flora-macros.
