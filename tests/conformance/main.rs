//! One suite over every device and lowering: outputs equal the oracle, requests are isolated, batches may be empty.
//!
//! `FLORA_TEST_DEVICE` names the device (default: the host); on one that isn't there the suite fails, it is not skipped.

mod case;
mod decoding;
mod formats;
mod golden;
mod gradients;
mod isolation;
mod mixed;
mod on_burn;
mod oracle;
