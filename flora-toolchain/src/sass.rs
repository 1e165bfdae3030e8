//! Reads the reports of `ptxas -v` and the listings of `nvdisasm`.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use regex::Regex;

/// What `ptxas -v` says a source's kernels use.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Registers a thread, of the kernel with the most.
    pub(crate) registers: u32,
    /// Bytes spilled by stores and by loads, of all kernels.
    pub(crate) spill_bytes: u32,
    /// Bytes of static shared memory a block, of the kernel with the most.
    pub(crate) shared_bytes: u32,
}

impl Usage {
    /// Reads the report; `None` when it speaks of no kernel.
    pub(crate) fn parse(report: &str) -> Option<Self> {
        static REGISTERS: LazyLock<Regex> = LazyLock::new(|| pattern(r"Used (\d+) registers"));
        static SPILLS: LazyLock<Regex> = LazyLock::new(|| pattern(r"(\d+) bytes spill (?:stores|loads)"));
        static SHARED: LazyLock<Regex> = LazyLock::new(|| pattern(r"(\d+) bytes smem"));
        Some(Self {
            registers: numbers(&REGISTERS, report).max()?,
            spill_bytes: numbers(&SPILLS, report).sum(),
            shared_bytes: numbers(&SHARED, report).max().unwrap_or(0),
        })
    }
}

/// What a listing consists of.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Mix {
    /// Count by opcode without modifiers. `NOP`, which fills up the end of a kernel, is left out.
    pub(crate) instructions: BTreeMap<String, u32>,
    /// Count of `LDG` by width.
    pub(crate) global_loads: BTreeMap<String, u32>,
}

impl Mix {
    /// Reads the listing.
    pub(crate) fn parse(listing: &str) -> Self {
        // Address, predicate if any, opcode, modifiers: `/*0120*/  @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;`
        static INSTRUCTION: LazyLock<Regex> = LazyLock::new(|| {
            pattern(r"(?m)^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)")
        });
        let mut mix = Self::default();
        for instruction in INSTRUCTION.captures_iter(listing) {
            let (opcode, modifiers) = (&instruction[1], &instruction[2]);
            if opcode == "NOP" {
                continue;
            }
            *mix.instructions.entry(opcode.to_owned()).or_default() += 1;
            if opcode == "LDG" {
                let width = modifiers.split('.').find(|modifier| WIDTHS.contains(modifier)).unwrap_or("32");
                *mix.global_loads.entry(width.to_owned()).or_default() += 1;
            }
        }
        mix
    }
}

/// The modifiers that give a load's width; without one it is 32 bits.
const WIDTHS: [&str; 6] = ["64", "128", "U8", "S8", "U16", "S16"];

/// A pattern of this file.
fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("the patterns above are constants that the tests compile")
}

/// The numbers that `pattern` captures in `text`. Those beyond 32 bits count as the largest.
fn numbers<'t>(pattern: &'t Regex, text: &'t str) -> impl Iterator<Item = u32> + 't {
    pattern.captures_iter(text).map(|found| found[1].parse().unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_taken_together() {
        let report = "ptxas info    : Compiling entry function 'first' for 'sm_80'
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 392 bytes cmem[0]
ptxas info    : Compiling entry function 'second' for 'sm_80'
    0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 32 registers, 2048 bytes smem";
        assert_eq!(Usage::parse(report), Some(Usage { registers: 255, spill_bytes: 40, shared_bytes: 2048 }));
    }

    #[test]
    fn a_report_on_no_kernel_is_none() {
        assert_eq!(Usage::parse("ptxas info    : 0 bytes gmem"), None);
    }

    #[test]
    fn opcodes_and_widths_are_told_apart() {
        let listing = ".text.k:
        /*0000*/                   LDG.E.128 R8, desc[UR6][R8.64] ;
        /*0010*/              @!P0 LDG.E.U16.CONSTANT R18, desc[UR6][R18.64+0x7ce] ;
        /*0020*/               @P1 LDG.E R20, desc[UR6][R14.64] ;
        /*0030*/             @!UP0 UIADD3 UR4, UR5, 0x1, URZ ;
        /*0040*/                   LDG.E.64 R2, [R4.64] ;
        /*0050*/                   HMMA.16816.F32 R8, R4.reuse, R8, RZ ;
.L_x_0:
        /*10060*/                  BRA `(.L_x_0);
        /*10070*/                  NOP;
        // R1 : a comment";
        let mix = Mix::parse(listing);
        let counts = |map: &BTreeMap<String, u32>| map.iter().map(|(key, &n)| format!("{key} {n}")).collect::<Vec<_>>();
        assert_eq!(counts(&mix.instructions), ["BRA 1", "HMMA 1", "LDG 4", "UIADD3 1"]);
        assert_eq!(counts(&mix.global_loads), ["128 1", "32 1", "64 1", "U16 1"]);
    }
}
