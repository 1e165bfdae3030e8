//! The instruction mix: what a kernel spends its instructions on.
//!
//! The machine has some three hundred opcodes, which differ between generations; a reader wants to know of a dozen kinds.
//! One table says which opcode is of which kind and what of it is worth telling apart: the shape of a tensor-core
//! product, the width of a memory access. The opcodes are those of the instruction-set tables in NVIDIA's *CUDA Binary
//! Utilities* for Ampere, Hopper and Blackwell.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::listing::Instruction;

/// A kind of machine instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Matrix products on tensor cores, by shape: `HMMA.16816.F32`.
    TensorCore,
    /// Multiply-adds in f32.
    Fma,
    /// Other arithmetic and comparisons in floating point, f16 and f64 among them.
    Float,
    /// Integer and logic arithmetic and comparisons, addresses among them.
    Integer,
    /// Conversions between types.
    Conversion,
    /// The special function unit: reciprocals, square roots, exponentials, logarithms, sines.
    SpecialFunction,
    /// Moves and selections between registers, and reads of special registers.
    Move,
    /// Values passed between the threads of a warp.
    Exchange,
    /// Loads of matrix fragments from shared memory (`ldmatrix`), by shape.
    MatrixLoad,
    /// Stores of matrix fragments to shared memory, by shape.
    MatrixStore,
    /// Loads from shared memory, by width.
    SharedLoad,
    /// Stores to shared memory, by width.
    SharedStore,
    /// Loads from global memory, copies to shared memory that pass no register (`cp.async`) among them, by width.
    GlobalLoad,
    /// Stores to global memory, by width.
    GlobalStore,
    /// Copies of whole tiles between global and shared memory (TMA).
    TileCopy,
    /// Loads and stores whose address may lie in any memory.
    Generic,
    /// Loads of constants, a kernel's arguments among them.
    Constant,
    /// Atomic operations.
    Atomic,
    /// Loads from and stores to local memory: spills, and arrays that are indexed by a variable.
    Local,
    /// Barriers, fences and waits for copies.
    Barrier,
    /// Control flow.
    Branch,
    /// Everything that the table doesn't list.
    Other,
}

/// What of an instruction is told apart within its class.
enum Form {
    /// The opcode alone.
    Opcode,
    /// The opcode and all its modifiers.
    Full,
    /// The width of the access.
    Width,
}

/// A row of the table. An opcode may carry its first modifier where that decides.
struct Row {
    class: Class,
    name: &'static str,
    form: Form,
    opcodes: &'static str,
}

#[rustfmt::skip]
const TABLE: [Row; 21] = [
    Row { class: Class::TensorCore, name: "tensor core", form: Form::Full,
          opcodes: "HMMA IMMA BMMA DMMA QMMA OMMA HGMMA IGMMA QGMMA BGMMA UTCHMMA UTCIMMA UTCQMMA UTCOMMA UTCMXQMMA" },
    Row { class: Class::Fma, name: "FMA", form: Form::Opcode,
          opcodes: "FFMA FFMA2 FFMA32I UFFMA" },
    Row { class: Class::Float, name: "other float", form: Form::Opcode,
          opcodes: "FADD FADD2 FADD32I FCHK FMNMX FMNMX3 FMUL FMUL2 FMUL32I FSEL FSET FSETP FSWZADD FHADD FHFMA \
                    HADD2 HADD2_32I HFMA2 HFMA2_32I HMNMX2 HMUL2 HMUL2_32I HSET2 HSETP2 DADD DFMA DMUL DSETP \
                    UFADD UFMNMX UFMUL UFSEL UFSET UFSETP" },
    Row { class: Class::Integer, name: "integer", form: Form::Opcode,
          opcodes: "BMSK BREV FLO IABS IADD IADD3 IADD32I IDP IDP4A IMAD IMNMX IMUL IMUL32I ISCADD ISCADD32I ISETP LEA \
                    LOP LOP3 LOP32I PLOP3 POPC PSETP SGXT SHF SHL SHR VABSDIFF VABSDIFF4 VHMNMX VIADD VIADDMNMX VIMNMX \
                    VIMNMX3 UBMSK UBREV UFLO UIABS UIADD3 UIMAD UIMNMX UISETP ULEA ULOP ULOP3 ULOP32I UPLOP3 UPOPC \
                    UPSETP USGXT USHF USHL USHR UVIADD UVIMNMX UVIMNMX3" },
    // `HADD2.F32` adds zero to one half of a register: how f16 becomes f32.
    Row { class: Class::Conversion, name: "conversion", form: Form::Opcode,
          opcodes: "F2F F2FP F2I F2IP I2F I2FP I2I I2IP FRND HADD2.F32 UF2F UF2FP UF2I UF2IP UI2F UI2FP UI2I UI2IP UFRND" },
    Row { class: Class::SpecialFunction, name: "special function", form: Form::Opcode,
          opcodes: "MUFU" },
    Row { class: Class::Move, name: "move", form: Form::Opcode,
          opcodes: "CS2R MOV MOV32I MOVM P2R PRMT R2P R2UR S2R S2UR SEL CS2UR UMOV UP2UR UPRMT UR2UP USEL LEPC" },
    Row { class: Class::Exchange, name: "warp exchange", form: Form::Opcode,
          opcodes: "ELECT MATCH REDUX CREDUX SHFL VOTE VOTEU" },
    Row { class: Class::MatrixLoad, name: "matrix load", form: Form::Full,
          opcodes: "LDSM" },
    Row { class: Class::MatrixStore, name: "matrix store", form: Form::Full,
          opcodes: "STSM" },
    Row { class: Class::SharedLoad, name: "shared load", form: Form::Width,
          opcodes: "LDS" },
    Row { class: Class::SharedStore, name: "shared store", form: Form::Width,
          opcodes: "STS" },
    Row { class: Class::GlobalLoad, name: "global load", form: Form::Width,
          opcodes: "LDG LDGSTS" },
    Row { class: Class::GlobalStore, name: "global store", form: Form::Width,
          opcodes: "STG" },
    Row { class: Class::TileCopy, name: "tile copy", form: Form::Opcode,
          opcodes: "UBLKCP UBLKRED UBLKPF UTMALDG UTMASTG UTMAREDG UTMAPF" },
    Row { class: Class::Generic, name: "generic memory", form: Form::Full,
          opcodes: "LD ST" },
    Row { class: Class::Constant, name: "constant load", form: Form::Opcode,
          opcodes: "LDC LDCU ULDC" },
    Row { class: Class::Atomic, name: "atomic", form: Form::Opcode,
          opcodes: "ATOM ATOMG ATOMS RED REDG REDAS" },
    Row { class: Class::Local, name: "local memory", form: Form::Full,
          opcodes: "LDL STL" },
    Row { class: Class::Barrier, name: "barrier", form: Form::Opcode,
          opcodes: "ARRIVES B2R BAR CCTL CCTLL DEPBAR ERRBAR FENCE LDGDEPBAR MEMBAR NANOSLEEP R2B SYNCS UCGABAR_ARV \
                    UCGABAR_WAIT UTCBAR UTMACCTL UTMACMDFLUSH WARPGROUP WARPGROUPSET WARPSYNC" },
    Row { class: Class::Branch, name: "branch", form: Form::Opcode,
          opcodes: "BMOV BPT BRA BREAK BRX BRXU BSSY BSYNC CALL ENDCOLLECTIVE EXIT JMP JMX JMXU KILL RET RPCMOV YIELD" },
];

/// The modifiers that give an access' width in bits; without one it is 32 bits.
const WIDTHS: [&str; 7] = ["64", "128", "256", "U8", "S8", "U16", "S16"];

/// Threads of a warp.
pub(super) const WARP: f64 = 32.0;

/// The widths of 16 bytes and more.
const WIDE: [&str; 2] = ["128", "256"];

/// The row of an instruction, and the opcode as the row has it.
fn row(instruction: &Instruction) -> Option<(&'static str, &'static Row)> {
    static ROWS: LazyLock<HashMap<&str, &Row>> = LazyLock::new(|| {
        TABLE.iter().flat_map(|row| row.opcodes.split(' ').map(move |opcode| (opcode, row))).collect()
    });
    let refined = instruction.modifiers.first().and_then(|first| {
        let name = format!("{}.{first}", instruction.opcode);
        ROWS.get_key_value(name.as_str())
    });
    refined.or_else(|| ROWS.get_key_value(instruction.opcode.as_str())).map(|(opcode, row)| (*opcode, *row))
}

impl Class {
    /// The class of an instruction.
    pub(super) fn of(instruction: &Instruction) -> Self {
        row(instruction).map_or(Self::Other, |(_, row)| row.class)
    }
}

impl fmt::Display for Class {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(TABLE.iter().find(|row| row.class == *self).map_or("other", |row| row.name))
    }
}

/// How often each class of instruction occurs in a stretch of machine code, and in which forms: a shape
/// (`HMMA.16816.F32`), the width of an access (`32`, `64`, `128` or `256` bits; `U8`, `S8`, `U16`, `S16` for one that is
/// extended to a register), or else the opcode.
///
/// It counts instructions as they stand in the code, not how often they run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Mix(BTreeMap<Class, BTreeMap<String, u32>>);

impl Mix {
    /// Counts `instructions`.
    pub(super) fn of<'i>(instructions: impl IntoIterator<Item = &'i Instruction>) -> Self {
        let mut mix = Self::default();
        for instruction in instructions {
            let (class, form) = match row(instruction) {
                Some((_, Row { class, form: Form::Full, .. })) => (*class, instruction.full_name()),
                Some((_, Row { class, form: Form::Width, .. })) => (*class, width(instruction).to_owned()),
                Some((opcode, Row { class, form: Form::Opcode, .. })) => (*class, opcode.to_owned()),
                None => (Class::Other, instruction.opcode.clone()),
            };
            *mix.0.entry(class).or_default().entry(form).or_default() += 1;
        }
        mix
    }

    /// The classes that occur, in the order of [`Class`].
    pub fn classes(&self) -> impl Iterator<Item = Class> + '_ {
        self.0.keys().copied()
    }

    /// Bytes that a warp's accesses of `class` have, by the widths in their forms.
    pub(super) fn bytes(&self, class: Class) -> f64 {
        let width = |part: &str| match part {
            "U8" | "S8" => Some(1.0),
            "U16" | "S16" => Some(2.0),
            "32" | "64" | "128" | "256" => part.parse().ok().map(|bits: f64| bits / 8.0),
            _ => None,
        };
        let of = |form: &str| form.split('.').find_map(width).unwrap_or(4.0);
        self.forms(class).map(|(form, count)| f64::from(count) * of(form) * WARP).sum()
    }

    /// How often `class` occurs.
    #[must_use]
    pub fn count(&self, class: Class) -> u32 {
        self.forms(class).map(|(_, count)| count).sum()
    }

    /// The forms in which `class` occurs, and how often.
    pub fn forms(&self, class: Class) -> impl Iterator<Item = (&str, u32)> + '_ {
        self.0.get(&class).into_iter().flatten().map(|(form, count)| (form.as_str(), *count))
    }

    /// How often a thread loads 16 bytes or more from global memory with one instruction.
    #[must_use]
    pub fn wide_global_loads(&self) -> u32 {
        self.forms(Class::GlobalLoad).filter(|(width, _)| WIDE.contains(width)).map(|(_, count)| count).sum()
    }

    /// All instructions.
    #[must_use]
    pub fn total(&self) -> u32 {
        self.classes().map(|class| self.count(class)).sum()
    }
}

/// One line: `tensor core 32 (HMMA.16816.F32×32), integer 40 (IADD3×30 LEA×10)`.
impl fmt::Display for Mix {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, class) in self.classes().enumerate() {
            let forms: Vec<_> = self.forms(class).map(|(form, count)| format!("{form}×{count}")).collect();
            let comma = if position == 0 { "" } else { ", " };
            write!(formatter, "{comma}{class} {} ({})", self.count(class), forms.join(" "))?;
        }
        Ok(())
    }
}

/// The width of a memory access.
fn width(instruction: &Instruction) -> &str {
    instruction.modifiers.iter().map(String::as_str).find(|modifier| WIDTHS.contains(modifier)).unwrap_or("32")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::cuda::listing::Listing;

    #[test]
    fn an_opcode_is_in_one_row_and_a_class_has_one() {
        let opcodes: Vec<_> = TABLE.iter().flat_map(|row| row.opcodes.split(' ')).collect();
        assert_eq!(opcodes.iter().collect::<HashSet<_>>().len(), opcodes.len());
        assert!(opcodes.iter().all(|opcode| !opcode.is_empty()));
        assert_eq!(TABLE.iter().map(|row| row.class).collect::<HashSet<_>>().len(), TABLE.len());
    }

    #[test]
    fn classes_and_forms_are_told_apart() {
        let listing = Listing::parse(
            "
        /*0000*/                   LDG.E.128 R8, desc[UR6][R8.64] ;
        /*0010*/              @!P0 LDG.E.U16.CONSTANT R18, desc[UR6][R18.64+0x7ce] ;
        /*0020*/               @P1 LDG.E R20, desc[UR6][R14.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR6][R2.64] ;
        /*0040*/                   HMMA.16816.F32 R8, R4.reuse, R8, RZ ;
        /*0050*/                   HADD2.F32 R8, -RZ, R4.H0_H0 ;
        /*0060*/                   HADD2 R8, R5, R4 ;
        /*0070*/                   LDSM.16.MT88.4 R8, [R4] ;
        /*0080*/                   STS.U16 [R4], R8 ;
        /*0090*/                   NEVERSEEN.X R8 ;",
        );
        let mix = Mix::of(&listing.instructions);
        assert_eq!(
            mix.to_string(),
            "tensor core 1 (HMMA.16816.F32×1), other float 1 (HADD2×1), conversion 1 (HADD2.F32×1), \
             matrix load 1 (LDSM.16.MT88.4×1), shared store 1 (U16×1), global load 4 (128×2 32×1 U16×1), \
             other 1 (NEVERSEEN×1)"
        );
        assert_eq!((mix.wide_global_loads(), mix.total()), (2, 10));
        let json = serde_json::to_string(&mix).unwrap();
        assert!(json.contains(r#""global_load":{"128":2"#), "{json}");
        assert_eq!(serde_json::from_str::<Mix>(&json).unwrap(), mix);
    }
}
