//! The verifier (under construction).

use crate::layer::Layer;

/// A layer that the verifier has accepted.
#[derive(Clone, Debug)]
pub struct VerifiedLayer(#[allow(dead_code)] Layer);
