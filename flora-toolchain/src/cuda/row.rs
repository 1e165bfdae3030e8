//! A kernel as a row of a table: the columns that main loops are compared by, the same for whoever made the kernel.

use super::Compiled;
use super::bound::{Bound, Source};

/// The columns' names. Cycles are a multiprocessor's for an MMA of 16 × 8 × 16.
#[must_use]
pub fn heading() -> String {
    format!(
        "{:<52} {:<7} {:>6} {:>6} {:>5} {:>4} {:>5} {:>6}  {:>10} {:>5} {:>6} {:>6}  bound",
        "kernel",
        "target",
        "slots",
        "MMAs",
        "insts",
        "regs",
        "spill",
        "stages",
        "arithmetic",
        "issue",
        "shared",
        "global"
    )
}

impl Compiled {
    /// The row of a kernel; `None` where no loop multiplies.
    #[must_use]
    pub fn row(&self, title: &str, source: Source) -> Option<String> {
        let main = self.main_loop.as_ref()?;
        let bound = main.bound(self.architecture, source);
        let Bound { arithmetic, issue, shared, global } = bound;
        let (unit, cycles) = bound.longest();
        Some(format!(
            "{title:<52} {:<7} {:>6.2} {:>6} {:>5} {:>4} {:>5} {:>6}  {arithmetic:>10.2} {issue:>5.2} {shared:>6.2} {global:>6.2}  \
             {cycles:.2} {unit}",
            self.architecture,
            main.slots(),
            main.products(),
            main.mix.total(),
            self.registers,
            self.spill_bytes,
            main.stages,
        ))
    }
}
