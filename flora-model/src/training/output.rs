//! The end of a decoder in training: logits, losses and the gradient of the last normalised rows, some rows at a time. So logits of a
//! whole batch, a vocabulary for each token, are never in memory.

use flora_runtime::{Buffer, StepBatch, Wanted};

use crate::error::ServeError;
use crate::host::HostOperations;
use crate::training::recorder::TrainedLinear;
use crate::training::tape::{buffer, floats, into_floats};

/// Logits that are in memory at a time, 32 MiB of them: enough rows of any vocabulary for a pass over the output matrix.
const LOGITS: usize = 1 << 23;

/// What rows with targets give.
pub(crate) struct RowLosses {
    /// In nats, `[rows]`.
    pub(crate) nats: Vec<f64>,
    /// Of their sum, by the rows `[rows, d]`; empty where it isn't wanted.
    pub(crate) g: Vec<f32>,
}

/// The losses of normalised rows x `[rows, d]`, each with its target, over the output matrix, which nobody adapts.
pub(crate) fn losses(
    host: &HostOperations,
    output: &TrainedLinear,
    x: &Buffer,
    targets: &[u32],
    wants_gradient: bool,
) -> Result<RowLosses, ServeError> {
    let shape = output.projection.shape();
    let (d, vocabulary) = (shape.d as usize, shape.k as usize);
    let mut all = RowLosses { nats: Vec::with_capacity(targets.len()), g: Vec::new() };
    let rows = (LOGITS / vocabulary.max(1)).max(1);
    for (x, targets) in floats(x)?.chunks(rows * d.max(1)).zip(targets.chunks(rows)) {
        let x = buffer(&host.device, x.to_vec())?;
        let batch = StepBatch::new([(0, targets.len() as u32)]);
        let mut logits = into_floats(output.projection.forward(&x, &batch, None)?)?;
        all.nats.extend(host.engine.cross_entropy(&mut logits, vocabulary, targets)?);
        if wants_gradient {
            let gradient = output.projection.backward(&batch, &x, &buffer(&host.device, logits)?, Wanted::Input)?;
            all.g.extend(gradient.dx.map(into_floats).transpose()?.unwrap_or_default());
        }
    }
    Ok(all)
}
