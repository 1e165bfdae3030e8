//! The end of a decoder in training: logits, losses and the gradient of the last normalised rows, some rows at a time. So logits of a
//! whole batch, a vocabulary for each token, are never in memory.

use flora_runtime::{Buffer, StepBatch, Wanted};
use rayon::prelude::*;

use crate::error::ServeError;
use crate::host::HostOperations;
use crate::training::recorder::TrainedLinear;
use crate::training::tape::{buffer, floats, into_floats};

/// Logits that are in memory at a time, 32 MiB of them: enough rows of any vocabulary for a pass over the output matrix.
const LOGITS: usize = 1 << 23;

/// What is wanted beside the losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beside {
    Nothing,
    /// The gradient of their sum.
    Gradient,
    /// The token of each row that has the largest logit.
    Likeliest,
}

/// What rows with targets give.
pub(crate) struct RowLosses {
    /// In nats, `[rows]`.
    pub(crate) nats: Vec<f64>,
    /// Of their sum, by the rows `[rows, d]`; empty where it isn't wanted.
    pub(crate) g: Vec<f32>,
    /// `[rows]`; empty where they aren't wanted.
    pub(crate) likeliest: Vec<u32>,
}

/// The losses of normalised rows x `[rows, d]`, each with its target, over the output matrix, which nobody adapts.
pub(crate) fn losses(
    host: &HostOperations,
    output: &TrainedLinear,
    x: &Buffer,
    targets: &[u32],
    beside: Beside,
) -> Result<RowLosses, ServeError> {
    let shape = output.projection.shape();
    let (d, vocabulary) = (shape.d as usize, shape.k as usize);
    let mut all = RowLosses { nats: Vec::with_capacity(targets.len()), g: Vec::new(), likeliest: Vec::new() };
    let rows = (LOGITS / vocabulary.max(1)).max(1);
    for (x, targets) in floats(x)?.chunks(rows * d.max(1)).zip(targets.chunks(rows)) {
        let x = buffer(&host.device, x.to_vec())?;
        let batch = StepBatch::new([(0, targets.len() as u32)]);
        let mut logits = into_floats(output.projection.forward(&x, &batch, None)?)?;
        if beside == Beside::Likeliest {
            all.likeliest.par_extend(logits.par_chunks(vocabulary.max(1)).map(likeliest));
        }
        all.nats.extend(host.engine.cross_entropy(&mut logits, vocabulary, targets)?);
        if beside == Beside::Gradient {
            let gradient = output.projection.backward(&batch, &x, &buffer(&host.device, logits)?, Wanted::Input)?;
            all.g.extend(gradient.dx.map(into_floats).transpose()?.unwrap_or_default());
        }
    }
    Ok(all)
}

/// The position of the largest number, of equal ones the first, as a sampler without temperature takes it; NaN is none.
fn likeliest(logits: &[f32]) -> u32 {
    let larger = |best: (u32, f32), (at, logit): (u32, &f32)| if *logit > best.1 { (at, *logit) } else { best };
    (0..).zip(logits).fold((0, f32::NEG_INFINITY), larger).0
}
