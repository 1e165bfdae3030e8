//! flora-toolchain.
