//! Reads the listing of `nvdisasm -c`: the instructions in their order and the labels between them.

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;

use super::pattern;

/// One machine instruction: `@!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64]`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    /// Whether a predicate may switch it off (`@!P0`).
    pub(super) guarded: bool,
    /// The operation: `LDG`.
    pub(super) opcode: String,
    /// What refines it: `E`, `128`, `CONSTANT`.
    pub(super) modifiers: Vec<String>,
    /// The rest, up to the semicolon.
    pub(super) operands: String,
}

/// A program's machine code.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Listing {
    /// The instructions, without the `NOP`s that fill up the end of a kernel.
    pub(super) instructions: Vec<Instruction>,
    /// The position in `instructions` that a label stands before; their number for a label at the end.
    pub(super) labels: HashMap<String, usize>,
}

impl Listing {
    /// Reads the listing. What is neither an instruction nor a label is passed over.
    pub(super) fn parse(text: &str) -> Self {
        static INSTRUCTION: LazyLock<Regex> = LazyLock::new(|| {
            pattern(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)([^;]*)")
        });
        let mut listing = Self::default();
        for line in text.lines() {
            if let Some(found) = INSTRUCTION.captures(line) {
                if &found[2] == "NOP" {
                    continue;
                }
                listing.instructions.push(Instruction {
                    guarded: found.get(1).is_some(),
                    opcode: found[2].to_owned(),
                    modifiers: found[3].split('.').skip(1).map(str::to_owned).collect(),
                    operands: found[4].trim().to_owned(),
                });
            } else if let Some(label) = line.strip_suffix(':')
                && !label.contains(char::is_whitespace)
            {
                listing.labels.insert(label.to_owned(), listing.instructions.len());
            }
        }
        listing
    }
}

impl Instruction {
    /// The opcode with its modifiers: `HMMA.16816.F32`.
    pub(super) fn full_name(&self) -> String {
        std::iter::once(&self.opcode).chain(&self.modifiers).map(String::as_str).collect::<Vec<_>>().join(".")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_and_labels_are_told_apart() {
        let listing = Listing::parse(
            "\t.section\t.text.k,\"ax\",@progbits
        .size           k,(.L_x_1 - k)
.text.k:
        /*0000*/                   LDG.E.128 R8, desc[UR6][R8.64] ;
        /*0010*/              @!P0 LDG.E.U16.CONSTANT R18, desc[UR6][R18.64+0x7ce] ;
        /*0020*/             @!UP0 UIADD3 UR4, UR5, 0x1, URZ ;
.L_x_0:
        /*10060*/                  BRA `(.L_x_0);
        /*10070*/                  NOP;
.L_x_1:
        // R1 : a comment:",
        );
        let read: Vec<_> =
            listing.instructions.iter().map(|one| (one.guarded, one.full_name(), &*one.operands)).collect();
        let expected = [
            (false, "LDG.E.128", "R8, desc[UR6][R8.64]"),
            (true, "LDG.E.U16.CONSTANT", "R18, desc[UR6][R18.64+0x7ce]"),
            (true, "UIADD3", "UR4, UR5, 0x1, URZ"),
            (false, "BRA", "`(.L_x_0)"),
        ];
        assert_eq!(read, expected.map(|(guarded, name, operands)| (guarded, name.to_owned(), operands)));
        let labels = [(".text.k", 0), (".L_x_0", 3), (".L_x_1", 4)].map(|(label, at)| (label.to_owned(), at));
        assert_eq!(listing.labels, HashMap::from(labels));
    }
}
