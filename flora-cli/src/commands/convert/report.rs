//! What a conversion is worth: how much of each layer's update is left over, and what the whole model says of text that wasn't fitted.

use std::path::PathBuf;

use serde::Serialize;

use crate::commands::error::CommandError;
use crate::commands::output;

/// What came out.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) adapter: PathBuf,
    /// Of the text that was fitted on.
    pub(super) tokens: usize,
    pub(super) layers: Vec<OfLayer>,
    pub(super) losses: Losses,
}

/// One layer. Residuals are of its outputs, over what the LoRA adapter adds to them: 0 is the adapter, 1 the base model.
#[derive(Serialize)]
pub(super) struct OfLayer {
    pub(super) path: String,
    pub(super) d: usize,
    pub(super) k: usize,
    pub(super) residual: f64,
    /// On text that wasn't fitted.
    pub(super) held_out_residual: Option<f64>,
    pub(super) half_steps: usize,
    /// The part of the inputs' energy in their strongest directions, as many as [`Self::LEADING`] says.
    pub(super) energy: [f64; 4],
}

impl OfLayer {
    pub(super) const LEADING: [usize; 4] = [1, 4, 16, 64];
}

/// Nats a target, on text that wasn't fitted.
#[derive(Serialize)]
pub(super) struct Losses {
    pub(super) targets: usize,
    pub(super) base: f64,
    pub(super) lora: f64,
    pub(super) fitted: f64,
    pub(super) distilled: Option<f64>,
}

impl Losses {
    /// The part of the LoRA adapter's gain over the base that `loss` keeps.
    fn kept(&self, loss: f64) -> f64 {
        (self.base - loss) / (self.base - self.lora)
    }
}

impl Report {
    pub(super) fn tell(&self, json: bool) -> Result<(), CommandError> {
        if json { output::print_json(self) } else { output::print(&self.text()) }
    }

    fn text(&self) -> String {
        let [one, four, sixteen, most] = OfLayer::LEADING.map(|leading| format!(">in {leading}"));
        let columns = ["<layer", ">d", ">k", ">residual", ">held out", ">half-steps", &one, &four, &sixteen, &most];
        let mut table = output::table(&columns);
        for own in &self.layers {
            let mut row = vec![own.path.clone(), own.d.to_string(), own.k.to_string(), format!("{:.3}", own.residual)];
            row.push(own.held_out_residual.map_or_else(|| "-".to_owned(), |held_out| format!("{held_out:.3}")));
            row.push(own.half_steps.to_string());
            row.extend(own.energy.map(|share| format!("{:.1} %", 100.0 * share)));
            table.add_row(row);
        }
        let mut text = output::lines(&table);
        let Losses { targets, base, lora, fitted, distilled } = &self.losses;
        text += &format!(
            "\nresidual: what is left of the adapter's outputs, by norm; in n: energy of the inputs in their n strongest directions\n\
             fitted on {} tokens; on {targets} others, in nats: base {base:.4}, LoRA {lora:.4}, fitted {fitted:.4} ({:.0} % of its gain)",
            self.tokens,
            100.0 * self.losses.kept(*fitted)
        );
        if let Some(loss) = distilled {
            text += &format!(", distilled {loss:.4} ({:.0} %)", 100.0 * self.losses.kept(*loss));
        }
        text + &format!("\n{}\n", self.adapter.display())
    }
}
