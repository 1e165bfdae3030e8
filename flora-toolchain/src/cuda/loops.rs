//! Finds a kernel's main loop in its machine code, since only what runs again and again decides what a kernel costs.
//!
//! The loops are the natural loops of the flow graph: a branch back to a block that every path to the branch passes.
//! Blocks that the assembler moved behind the kernel's end branch back as well, but nothing dominates them so, and they
//! make no loop; loops that start at the same instruction count as one. Each instruction belongs to the innermost loop
//! that holds it. The *main loop* is the one to which most tensor-core instructions belong or, where none belongs to any
//! loop, most f32 multiply-adds; the earlier one of equals. Its *nest* is the outermost loop that holds it: where the
//! products of a tile are a loop of their own, the loads of the next tile are in the nest around it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::LazyLock;

use petgraph::Direction;
use petgraph::algo::dominators;
use petgraph::graph::{DiGraph, NodeIndex};
use regex::Regex;
use serde::{Deserialize, Serialize};

use super::listing::{Instruction, Listing};
use super::mix::{Class, Mix};
use super::pattern;

/// The loop that does a kernel's multiplications.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MainLoop {
    /// How many loops hold it, itself among them: 1 when it lies in no other.
    pub depth: u32,
    /// What it consists of, the loops within it included.
    pub mix: Mix,
    /// What the outermost loop that holds it consists of, this one included; the same as `mix` at depth 1.
    pub nest: Mix,
    /// Loads of 16 bytes or more from global memory in the nest that are under way while the loop multiplies: a product
    /// follows before anything touches the registers that they fill.
    pub loads_ahead: u32,
    /// Bytes that a warp copies from global to shared memory past its registers (`cp.async`), in a pass through the loop.
    pub copied_bytes: u32,
    /// Steps whose loads may be under way while the loop multiplies one: with copies past registers those whose groups its wait
    /// lets be, and the one that it starts; else 1 where there are `loads_ahead`.
    pub stages: u32,
}

impl MainLoop {
    /// The main loop of `kernel`; `None` when no loop multiplies.
    pub(super) fn find(listing: &Listing, kernel: &str) -> Option<Self> {
        let graph = Graph::of(listing, kernel);
        let loops = graph.loops();
        // Indexed as `loops`: the instructions that belong to each.
        let mut own = vec![Vec::new(); loops.len()];
        for (block, range) in graph.blocks.iter().enumerate() {
            let holding = loops.iter().enumerate().filter(|(_, blocks)| blocks.contains(&block));
            if let Some((innermost, _)) = holding.min_by_key(|(_, blocks)| blocks.len()) {
                own[innermost].extend(&listing.instructions[range.clone()]);
            }
        }
        let main = [Class::TensorCore, Class::Fma].into_iter().find_map(|class| {
            let counts = own.iter().map(|own| own.iter().filter(|one| Class::of(one) == class).count());
            // The last of equals in reverse is the first.
            counts.enumerate().filter(|(_, count)| *count > 0).rev().max_by_key(|(_, count)| *count)
        });
        let main = &loops[main?.0];
        let holding: Vec<_> = loops.iter().filter(|blocks| blocks.is_superset(main)).collect();
        let outermost = holding.iter().max_by_key(|blocks| blocks.len())?;
        let mix = |blocks: &BTreeSet<usize>| {
            Mix::of(blocks.iter().flat_map(|block| &listing.instructions[graph.blocks[*block].clone()]))
        };
        let depth = u32::try_from(holding.len()).unwrap_or(u32::MAX);
        let (mix, nest) = (mix(main), mix(outermost));
        let product = if mix.count(Class::TensorCore) > 0 { Class::TensorCore } else { Class::Fma };
        let multiplies: BTreeSet<_> = main
            .iter()
            .flat_map(|block| graph.blocks[*block].clone())
            .filter(|position| Class::of(&listing.instructions[*position]) == product)
            .collect();
        let nested: Vec<_> = outermost.iter().flat_map(|block| graph.blocks[*block].clone()).collect();
        let ahead = nested.iter().enumerate().filter(|(at, position)| {
            let touches = registers(&listing.instructions[**position]);
            let rest = nested[at + 1..].iter();
            let mut rest = rest.skip_while(|next| {
                !multiplies.contains(next) && !touches.iter().any(|own| mentions(&listing.instructions[**next], *own))
            });
            !touches.is_empty() && rest.next().is_some_and(|next| multiplies.contains(next))
        });
        let loads_ahead = u32::try_from(ahead.count()).unwrap_or(u32::MAX);
        let stepped: Vec<_> = nested.iter().map(|position| &listing.instructions[*position]).collect();
        let passed: Vec<_> =
            main.iter().flat_map(|block| &listing.instructions[graph.blocks[*block].clone()]).collect();
        let copied = passed.into_iter().filter(|one| one.opcode == "LDGSTS");
        let copied_bytes = Mix::of(copied).bytes(Class::GlobalLoad) as u32;
        // A step may start several groups of copies.
        let groups = stepped.iter().filter(|one| one.opcode == "LDGDEPBAR").count() as u32;
        let stages = match stepped.iter().filter_map(|one| outstanding(one)).max() {
            Some(left) if groups > 0 => (left + groups) / groups,
            _ => u32::from(loads_ahead > 0),
        };
        Some(Self { depth, mix, nest, loads_ahead, copied_bytes, stages })
    }
}

/// How many groups of copies a wait lets be under way: `DEPBAR.LE SB0, 0x1`.
fn outstanding(instruction: &Instruction) -> Option<u32> {
    let (_, groups) = instruction.operands.split_once(',').filter(|_| instruction.opcode == "DEPBAR")?;
    u32::from_str_radix(groups.trim().strip_prefix("0x")?, 16).ok()
}

/// The registers that a load of 16 bytes or more from global memory fills; none of any other instruction.
fn registers(instruction: &Instruction) -> Vec<u32> {
    let wide = Mix::of([instruction]).wide_global_loads() > 0;
    let first = wide.then(|| named(&instruction.operands).next()).flatten();
    let count = if instruction.modifiers.iter().any(|modifier| modifier == "256") { 8 } else { 4 };
    first.map_or(Vec::new(), |first| (first..first + count).collect())
}

/// Whether an instruction names a register.
fn mentions(instruction: &Instruction, register: u32) -> bool {
    named(&instruction.operands).any(|named| named == register)
}

/// The registers that operands name.
fn named(operands: &str) -> impl Iterator<Item = u32> {
    static REGISTER: LazyLock<Regex> = LazyLock::new(|| pattern(r"\bR(\d+)\b"));
    REGISTER.captures_iter(operands).filter_map(|found| found[1].parse().ok())
}

/// The flow graph of a program.
struct Graph {
    /// The blocks, in the listing's order: instructions that run one after another, as positions in the listing.
    blocks: Vec<Range<usize>>,
    /// From block to block; a node is a position in `blocks`.
    edges: DiGraph<(), ()>,
    /// The block at which the kernel starts.
    entry: usize,
}

impl Graph {
    /// The flow graph of `listing`, in which `kernel` starts at the label `.text.KERNEL`.
    fn of(listing: &Listing, kernel: &str) -> Self {
        let count = listing.instructions.len();
        let targets = |instruction: &Instruction| -> Vec<usize> {
            jumps(instruction).filter_map(|label| listing.labels.get(label)).copied().collect()
        };
        let mut starts: BTreeSet<usize> = listing.labels.values().copied().collect();
        starts.insert(0);
        let ends = listing.instructions.iter().enumerate().filter(|(_, one)| Flow::of(one) != Flow::Next);
        starts.extend(ends.map(|(position, _)| position + 1));
        let starts: Vec<_> = starts.range(..count).copied().collect();
        let blocks: Vec<_> =
            starts.iter().zip(starts.iter().skip(1).chain([&count])).map(|(&start, &end)| start..end).collect();
        let block_at = |position: usize| starts.partition_point(|&start| start <= position).saturating_sub(1);

        let mut edges = DiGraph::new();
        for _ in &blocks {
            edges.add_node(());
        }
        for (block, range) in blocks.iter().enumerate() {
            let Some(last) = listing.instructions.get(range.end - 1) else { continue };
            let next = matches!(Flow::of(last), Flow::Next | Flow::Either).then_some(range.end);
            for target in targets(last).into_iter().chain(next).filter(|target| *target < count) {
                edges.add_edge(NodeIndex::new(block), NodeIndex::new(block_at(target)), ());
            }
        }
        let entry = listing.labels.get(&format!(".text.{kernel}")).map_or(0, |position| block_at(*position));
        Self { blocks, edges, entry }
    }

    /// The natural loops as sets of blocks, by their first block. Two of them are disjoint or one holds the other, unless
    /// the flow has a loop with two entries, which structured sources don't make.
    fn loops(&self) -> Vec<BTreeSet<usize>> {
        if self.blocks.is_empty() {
            return Vec::new();
        }
        let dominators = dominators::simple_fast(&self.edges, NodeIndex::new(self.entry));
        let dominates =
            |head, tail| dominators.dominators(tail).is_some_and(|mut above| above.any(|node| node == head));
        let mut loops: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for edge in self.edges.edge_indices() {
            let Some((tail, head)) = self.edges.edge_endpoints(edge) else { continue };
            if !dominates(head, tail) {
                continue;
            }
            let blocks = loops.entry(head.index()).or_default();
            blocks.insert(head.index());
            let mut open = vec![tail];
            while let Some(block) = open.pop() {
                if blocks.insert(block.index()) {
                    // What the entry doesn't reach is no part of a loop that it does.
                    open.extend(
                        self.edges
                            .neighbors_directed(block, Direction::Incoming)
                            .filter(|before| dominators.dominators(*before).is_some()),
                    );
                }
            }
        }
        loops.into_values().collect()
    }
}

/// Where control goes after an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    /// To the next one.
    Next,
    /// To a target or to the next one.
    Either,
    /// To its targets alone.
    Leave,
    /// To no instruction of the kernel, or back to where a call came from.
    End,
}

/// The opcodes that move control elsewhere, and whether control can come to the instruction behind it all the same.
const TRANSFERS: [(&str, Flow); 11] = [
    ("BRA", Flow::Leave),
    ("BRX", Flow::Leave),
    ("BRXU", Flow::Leave),
    ("JMP", Flow::Leave),
    ("JMX", Flow::Leave),
    ("JMXU", Flow::Leave),
    ("RET", Flow::End),
    ("EXIT", Flow::End),
    ("KILL", Flow::End),
    ("CALL", Flow::Either),
    // Collects a warp's threads at its target.
    ("WARPSYNC", Flow::Either),
];

impl Flow {
    fn of(instruction: &Instruction) -> Self {
        let row = TRANSFERS.iter().find(|(opcode, _)| *opcode == instruction.opcode);
        // A predicate guards it (`@P0 BRA`) or is its first operand (`BRA.U !UP0, …`); `.DIV` and `.ANY` ask the warp.
        let operands = instruction.operands.trim_start_matches(['!', '~']);
        let conditional = || {
            instruction.guarded
                || instruction.modifiers.iter().any(|modifier| ["DIV", "ANY", "CONV"].contains(&modifier.as_str()))
                || ["P", "UP"].iter().any(|predicate| operands.starts_with(predicate))
        };
        match row {
            None => Self::Next,
            Some((_, Self::Leave | Self::End)) if conditional() => Self::Either,
            Some((_, flow)) => *flow,
        }
    }
}

/// The labels that an instruction may move control to.
fn jumps(instruction: &Instruction) -> impl Iterator<Item = &str> {
    // One target as `(.L_x_0), or a table of them: (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)
    static LABEL: LazyLock<Regex> = LazyLock::new(|| pattern(r"\.L_\w+|`\(([^)]+)\)"));
    // A return names the kernel that it belongs to, but goes back to the call.
    let moves = TRANSFERS.iter().any(|(opcode, flow)| *opcode == instruction.opcode && *flow != Flow::End);
    let operands = if moves { instruction.operands.as_str() } else { "" };
    LABEL.captures_iter(operands).filter_map(|found| found.get(1).or(found.get(0))).map(|label| label.as_str())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::{Config, RngSeed};

    use super::*;

    /// A listing of the lines of a program: a label ends in a colon.
    fn listing(program: &str) -> Listing {
        let line = |line: &str| match line.trim() {
            label if label.ends_with(':') => label.to_owned(),
            instruction => format!("        /*0000*/    {instruction} ;"),
        };
        Listing::parse(&program.lines().map(line).collect::<Vec<_>>().join("\n"))
    }

    fn find(program: &str) -> Option<MainLoop> {
        MainLoop::find(&listing(program), "k")
    }

    #[test]
    fn loads_of_a_tile_are_in_the_loop_or_in_the_nest() {
        let main = find(
            ".text.k:
            .L_rows:
            MOV R1, RZ
            .L_steps:
            MOV R1, RZ
            .L_fill:
            LDG.E.128 R4, desc[UR4][R2.64]
            @P0 BRA `(.L_fill)
            .L_products:
            HMMA.16816.F32 R8, R4, R8, R8
            HMMA.16816.F32 R8, R4, R8, R8
            @P0 BRA `(.L_products)
            @P0 BRA `(.L_steps)
            LDG.E R4, desc[UR4][R2.64]
            FFMA R0, R0, R0, R0
            FFMA R0, R0, R0, R0
            FFMA R0, R0, R0, R0
            BRA.U UP0, `(.L_rows)
            EXIT
            .L_end:
            BRA `(.L_end)",
        )
        .unwrap();
        assert_eq!(main.depth, 3);
        assert_eq!(main.mix.to_string(), "tensor core 2 (HMMA.16816.F32×2), branch 1 (BRA×1)");
        assert_eq!(main.nest.count(Class::GlobalLoad), 2);
        assert_eq!(main.nest.wide_global_loads(), 1);
        assert_eq!(main.nest.count(Class::Fma), 3);
    }

    #[test]
    fn loads_ahead_are_touched_after_the_products() {
        let ahead = |program: &str| find(program).unwrap().loads_ahead;
        let waits = "@P0 STS.128 [R2], R12";
        let program = |before: &str, between: &str, after: &str| {
            format!(
                ".L_loop:\n{before}\nLDG.E.128 R12, [R2.64]\n{between}\nHMMA.16816.F32 R4, R8, R10, R4\n{after}\n@P0 BRA `(.L_loop)"
            )
        };
        let products = "HMMA.16816.F32 R4, R8, R10, R4";
        assert_eq!(ahead(&program(waits, "MOV R16, R3", "")), 1);
        assert_eq!(ahead(&program("", "", waits)), 1);
        assert_eq!(ahead(&program("", waits, "")), 0);
        assert_eq!(ahead(&program("", "PRMT R20, R15, R16, R17", "")), 0);
        assert_eq!(ahead(&format!(".L_loop:\n{products}\nLDG.E.128 R12, [R2.64]\n{waits}\n@P0 BRA `(.L_loop)")), 0);
        // A narrow load is none, and the loop of the products may lie in the one that loads.
        assert_eq!(ahead(&format!(".L_loop:\nLDG.E R12, [R2.64]\n{products}\n@P0 BRA `(.L_loop)")), 0);
        let inner = format!(".L_in:\n{products}\n@P0 BRA `(.L_in)");
        assert_eq!(ahead(&format!(".L_loop:\nLDG.E.128 R12, [R2.64]\n{inner}\n{waits}\n@P0 BRA `(.L_loop)")), 1);
    }

    #[test]
    fn stages_are_what_the_wait_leaves_and_what_is_started() {
        let program = |wait: &str, groups: usize| {
            let starts = "LDGDEPBAR\n".repeat(groups);
            format!(
                ".L_loop:\nDEPBAR.LE SB0, {wait}\nLDGSTS.E.BYPASS.128 [R5], [R2.64]\n{starts}HMMA.16816.F32 R4, R8, R10, R4\n\
                 @P0 BRA `(.L_loop)"
            )
        };
        let stages = |wait: &str, groups: usize| find(&program(wait, groups)).unwrap().stages;
        assert_eq!([stages("0x0", 1), stages("0x2", 1), stages("0x4", 2), stages("0x2", 2)], [1, 3, 3, 2]);
        assert_eq!(find(&program("0x0", 1)).unwrap().copied_bytes, 512);
        let products = "HMMA.16816.F32 R4, R8, R10, R4\n@P0 BRA `(.L_loop)";
        let registers = |first: &str| find(&format!(".L_loop:\n{first}\n{products}")).unwrap().stages;
        assert_eq!([registers("LDG.E.128 R12, [R2.64]"), registers("LDS.128 R12, [R2]")], [1, 0]);
    }

    #[test]
    fn unrolled_products_make_the_loop_around_them_the_main_one() {
        let main = find(
            ".L_steps:
            .L_fill:
            FFMA R0, R0, R0, R0
            LDG.E.64 R4, desc[UR4][R2.64]
            @P0 BRA `(.L_fill)
            FFMA R0, R0, R0, R0
            FFMA R0, R0, R0, R0
            @P0 BRA `(.L_steps)
            EXIT",
        )
        .unwrap();
        assert_eq!((main.depth, main.mix.count(Class::Fma), main.mix.count(Class::GlobalLoad)), (1, 3, 1));
        assert_eq!(main.mix, main.nest);
    }

    #[test]
    fn a_block_behind_the_end_that_branches_back_is_no_loop() {
        let program = "@P0 BRA `(.L_slow)
            .L_back:
            FFMA R0, R0, R0, R0
            EXIT
            .L_slow:
            FFMA R0, R0, R0, R0
            BRA `(.L_back)";
        assert_eq!(find(program), None);
        assert_eq!(find(""), None);
        assert_eq!(find("FFMA R0, R0, R0, R0\nEXIT"), None);
    }

    #[test]
    fn tables_of_targets_and_calls_are_followed() {
        let main = find(
            "k:
            .text.k:
            MOV R1, RZ
            .L_steps:
            BRX R2 -0x10 (*\"BRANCH_TARGETS .L_one,.L_two\"*)
            .L_one:
            CALL.REL.NOINC `($k$division)
            .L_two:
            FFMA R0, R0, R0, R0
            @!P0 BRA `(.L_steps)
            EXIT
            $k$division:
            MUFU.RCP R0, R0
            RET.REL.NODEC R2 `(k)",
        )
        .unwrap();
        assert_eq!(main.mix.to_string(), "FMA 1 (FFMA×1), branch 3 (BRA×1 BRX×1 CALL×1)");
        assert_eq!(main.depth, 1);
    }

    #[test]
    fn any_flow_ends_in_an_answer_that_counts_no_more_than_there_is() {
        let config = Config { cases: 400, rng_seed: RngSeed::Fixed(3), failure_persistence: None, ..Config::default() };
        let line = prop_oneof![
            Just("HMMA.16816.F32 R8, R4, R8, R8".to_owned()),
            Just("FFMA R0, R0, R0, R0".to_owned()),
            Just("EXIT".to_owned()),
            Just("@P0 EXIT".to_owned()),
            (0..12).prop_map(|label| format!("BRA `(.L_{label})")),
            (0..12).prop_map(|label| format!("@P0 BRA `(.L_{label})")),
        ];
        proptest!(config, |(lines in proptest::collection::vec((line, proptest::bool::ANY), 0..40))| {
            let mut program = String::new();
            for (label, (line, labelled)) in lines.iter().enumerate() {
                if *labelled {
                    program += &format!(".L_{label}:\n");
                }
                program += &format!("{line}\n");
            }
            let listing = listing(&program);
            if let Some(main) = MainLoop::find(&listing, "k") {
                let all = Mix::of(&listing.instructions).total();
                prop_assert!(main.mix.total() <= main.nest.total() && main.nest.total() <= all);
                prop_assert!(main.depth >= 1);
                prop_assert!(main.mix.count(Class::TensorCore) + main.mix.count(Class::Fma) > 0);
                prop_assert!(main.mix.count(Class::Branch) > 0);
            }
        });
    }
}
