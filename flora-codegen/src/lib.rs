//! flora-codegen.
