//! Reads the report of `ptxas -v`: what a kernel takes of the registers, the local and the static shared memory.

use std::sync::LazyLock;

use regex::Regex;

use super::pattern;

/// What `ptxas -v` says of one kernel and the functions that it calls.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Usage {
    /// The kernels' names, in the report's order.
    pub(super) kernels: Vec<String>,
    /// Registers a thread.
    pub(super) registers: u32,
    /// Bytes of local memory a thread: what spills, and arrays that are indexed by a variable.
    pub(super) stack_bytes: u32,
    /// Bytes that spilled values take in stores.
    pub(super) spill_store_bytes: u32,
    /// Bytes that spilled values take in loads.
    pub(super) spill_load_bytes: u32,
    /// Bytes of static shared memory a block.
    pub(super) shared_bytes: u32,
}

impl Usage {
    /// Reads the report; `None` when it speaks of no kernel.
    pub(super) fn parse(report: &str) -> Option<Self> {
        static KERNEL: LazyLock<Regex> = LazyLock::new(|| pattern(r"Compiling entry function '([^']+)'"));
        static REGISTERS: LazyLock<Regex> = LazyLock::new(|| pattern(r"Used (\d+) registers"));
        static STACK: LazyLock<Regex> = LazyLock::new(|| pattern(r"(\d+) bytes stack frame"));
        static STORES: LazyLock<Regex> = LazyLock::new(|| pattern(r"(\d+) bytes spill stores"));
        static LOADS: LazyLock<Regex> = LazyLock::new(|| pattern(r"(\d+) bytes spill loads"));
        static SHARED: LazyLock<Regex> = LazyLock::new(|| pattern(r"(\d+) bytes smem"));
        Some(Self {
            kernels: KERNEL.captures_iter(report).map(|found| found[1].to_owned()).collect(),
            registers: numbers(&REGISTERS, report).max()?,
            stack_bytes: sum(&STACK, report),
            spill_store_bytes: sum(&STORES, report),
            spill_load_bytes: sum(&LOADS, report),
            shared_bytes: numbers(&SHARED, report).max().unwrap_or(0),
        })
    }
}

/// The numbers that `pattern` captures in `text`. Those beyond 32 bits count as the largest.
fn numbers<'t>(pattern: &'t Regex, text: &'t str) -> impl Iterator<Item = u32> + 't {
    pattern.captures_iter(text).map(|found| found[1].parse().unwrap_or(u32::MAX))
}

/// Their sum, over the kernel and the functions that it calls.
fn sum(pattern: &Regex, text: &str) -> u32 {
    numbers(pattern, text).fold(0, u32::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_read() {
        let report = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 392 bytes cmem[0]
ptxas info    : Function properties for called
    8 bytes stack frame, 4 bytes spill stores, 6 bytes spill loads";
        let usage = Usage {
            kernels: vec!["first".to_owned()],
            registers: 255,
            stack_bytes: 24,
            spill_store_bytes: 16,
            spill_load_bytes: 26,
            shared_bytes: 1024,
        };
        assert_eq!(Usage::parse(report), Some(usage));
    }

    #[test]
    fn a_report_on_no_kernel_is_none() {
        assert_eq!(Usage::parse("ptxas info    : 0 bytes gmem"), None);
    }
}
