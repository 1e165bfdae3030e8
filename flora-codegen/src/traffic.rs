//! What a launch of the tile kernel moves and multiplies, counted from the launch itself: its blueprint, its items and its tables
//! are what the kernel walks, so that the count can't say something else than the code does.
//!
//! Bytes are those of global memory. Cubes of one column tile run together (items are the fastest axis), so that a tile of w0
//! comes from memory once for as many items as the device runs at once, and from the second-level cache after. Rows, vectors and
//! sums are read again by every column tile; they come from the cache too where all of them fit half of it, and count once for
//! every column tile where they don't.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::kernels::tables::TileRow;
use crate::routine::{Hardware, TileLaunch};
use flora_plan::layer::{LayerFormat, LayerShape};
use flora_plan::schedule::{Scale, ScheduledRow};

/// Bytes of global memory and MACs of one launch, and of the one that adds up where the depth is split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// w0, or the made weights.
    pub weight_bytes: u64,
    /// x.
    pub input_bytes: u64,
    /// In-scales, out-scales, shrink and expand vectors.
    pub adapter_bytes: u64,
    /// y and the residual.
    pub output_bytes: u64,
    /// Index tables, low-rank sums, partial sums.
    pub other_bytes: u64,
    /// Multiply-accumulates of the products, padding of tiles left out.
    pub macs: u64,
    /// Each input and each output once.
    pub floor_bytes: u64,
}

impl Traffic {
    /// All bytes.
    pub fn bytes(&self) -> u64 {
        self.weight_bytes + self.input_bytes + self.adapter_bytes + self.output_bytes + self.other_bytes
    }
}

impl TileLaunch {
    /// What this launch moves for a layer of this shape and these types.
    pub fn traffic(&self, hardware: &Hardware, shape: LayerShape, format: LayerFormat) -> Traffic {
        let (d, k) = (u64::from(shape.d), u64::from(shape.k));
        let (activation, adapter) = (format.activations.bytes(), format.adapters.bytes());
        let Self { rows, items, scales, tasks, .. } = self;

        let mut input_rows = BTreeSet::new();
        let (mut in_slots, mut out_slots) = (BTreeSet::new(), BTreeSet::new());
        let (mut outputs, mut low_rank_macs) = (0u64, 0u64);
        for TileRow { virtual_row, expand, rank, .. } in rows {
            let ScheduledRow { row, in_slot, out_slot, last } = *virtual_row;
            input_rows.insert(row);
            in_slots.extend((in_slot > 0).then_some(in_slot));
            out_slots.extend((out_slot > 0).then_some(out_slot));
            if last == 1 {
                outputs += 1;
                out_slots.extend((expand + 1..).take(*rank as usize));
                low_rank_macs += u64::from(*rank) * (d + k);
            }
        }
        for Scale { in_slot, out_slot } in scales.iter().copied() {
            in_slots.extend((in_slot > 0).then_some(in_slot));
            out_slots.extend((out_slot > 0).then_some(out_slot));
        }
        for task in tasks {
            in_slots.extend((task.shrink + 1..).take(task.ranks as usize));
        }
        let made: u64 = items.iter().map(|item| u64::from(item.end_scale - item.first_scale) * d * k).sum();
        let items_of_most = {
            let mut counts = std::collections::BTreeMap::new();
            items.iter().for_each(|item| *counts.entry(item.weight).or_insert(0u64) += 1);
            counts
        };
        // Each weight once for as many of its items as run together.
        let together = u64::from(hardware.multiprocessors).max(1);
        let passes: u64 = items_of_most.values().map(|count| count.div_ceil(together)).sum();

        let once_inputs = input_rows.len() as u64 * d * activation;
        let once_in_vectors = in_slots.len() as u64 * d * adapter;
        let out_vectors = out_slots.len() as u64 * k * adapter;
        let again =
            if once_inputs + once_in_vectors <= hardware.cache_bytes / 2 { 1 } else { u64::from(self.column_tiles) };
        // Out-vectors and outputs belong to one column tile each; an item of rows that share an adapter reads them by itself.
        let output = outputs * k * activation;
        let residual = if self.blueprint.epilogue.residual { output } else { 0 };
        let partial = if self.blueprint.split { 2 * 4 * u64::from(self.splits) * rows.len() as u64 * k } else { 0 };
        let weight = format.weight.bytes(shape);
        Traffic {
            weight_bytes: passes * weight,
            input_bytes: again * once_inputs,
            adapter_bytes: again * once_in_vectors + out_vectors,
            output_bytes: output + residual,
            other_bytes: self.table_bytes() + 12 * u64::from(self.hidden) + partial,
            macs: rows.len() as u64 * d * k + made + low_rank_macs,
            floor_bytes: items_of_most.len() as u64 * weight
                + once_inputs
                + once_in_vectors
                + out_vectors
                + output
                + residual,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routine::{self, Wanted};
    use crate::target::{Capability, hardware};
    use flora_plan::batch::{AdapterSlots, LowRankSlots, Segment, VirtualRowSlots};
    use flora_plan::layer::{Element, Epilogue, WeightFormat};
    use flora_plan::lowering::Part;
    use flora_plan::plan::Plan;
    use flora_plan::schedule::{Step, schedule};

    fn adapter(part: Part, rank: u32, first: u32) -> AdapterSlots {
        let slots = (first..).take(rank as usize);
        match part {
            Part::Multiplicative => AdapterSlots {
                virtual_rows: slots
                    .map(|slot| VirtualRowSlots { in_scale: Some(slot), out_scale: Some(slot) })
                    .collect(),
                ..AdapterSlots::base()
            },
            Part::Additive => {
                AdapterSlots { low_rank: LowRankSlots { shrink: first, expand: first, rank }, ..AdapterSlots::base() }
            }
        }
    }

    /// 32 requests that decode, each with an adapter of its own, at StarCoder 15B's width: all bytes are within a tenth of the
    /// floor of each input and each output once.
    #[test]
    fn decode_moves_little_more_than_the_floor() {
        let shape = LayerShape { d: 6144, k: 6144 };
        for capability in [Capability::Sm80, Capability::Sm90, Capability::Sm100] {
            let hardware = hardware(capability);
            for weight in WeightFormat::ALL.map(|(_, weight)| weight) {
                let half = [Element::F16, Element::Bf16];
                for activations in half {
                    let format = LayerFormat { weight, ..LayerFormat::uniform(activations) };
                    for (part, rank) in [Part::Multiplicative, Part::Additive]
                        .into_iter()
                        .flat_map(|one| [1, 2, 4, 8, 16].map(|rank| (one, rank)))
                    {
                        let adapters: Vec<_> = (0..32).map(|own| adapter(part, rank, own * rank)).collect();
                        let segments: Vec<_> = (0..32).map(|adapter| Segment { rows: 1, adapter }).collect();
                        let schedule = schedule(&Plan::default(), shape, &segments, &adapters, false).unwrap();
                        let [Step::Gemm(gemm)] = schedule.steps() else { panic!("one launch") };
                        let epilogue = Epilogue::default();
                        let wanted = Wanted { shape, format, epilogue, splits: false };
                        let launch = routine::gemm(&hardware, wanted, gemm).unwrap();
                        let traffic = launch.traffic(&hardware, shape, format);
                        let ratio = traffic.bytes() as f64 / traffic.floor_bytes as f64;
                        assert!(ratio <= 1.1, "{part:?} {format} rank {rank}: {ratio} {traffic:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_base_gemm_reads_and_writes_everything_once() {
        let shape = LayerShape { d: 512, k: 256 };
        let format = LayerFormat::uniform(Element::F16);
        let segments = [Segment { rows: 16, adapter: 0 }];
        let schedule = schedule(&Plan::default(), shape, &segments, &[AdapterSlots::base()], false).unwrap();
        let [Step::Gemm(gemm)] = schedule.steps() else { panic!("one launch") };
        let hardware = hardware(Capability::Sm90);
        let wanted = Wanted { shape, format, epilogue: Epilogue::default(), splits: false };
        let traffic = routine::gemm(&hardware, wanted, gemm).unwrap().traffic(&hardware, shape, format);
        assert_eq!(traffic.weight_bytes, 2 * 512 * 256);
        assert_eq!(traffic.input_bytes, 2 * 16 * 512);
        assert_eq!(traffic.output_bytes, 2 * 16 * 256);
        assert_eq!(traffic.adapter_bytes, 0);
        assert_eq!(traffic.macs, 16 * 512 * 256);
    }
}
