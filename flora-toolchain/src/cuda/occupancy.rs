//! Theoretical occupancy: how many warps a multiprocessor holds at once, and which resource keeps it from holding more.
//!
//! The limits are those of the table of technical specifications by compute capability in NVIDIA's *CUDA C++ Programming
//! Guide*, the rounding that of its occupancy calculator: a warp's registers come in units of 256 from a quarter of the
//! register file, a block's shared memory in units of 128 bytes and with 1 KiB that the system keeps for itself. The
//! driver is taken to give as much of the first-level cache to shared memory as it can. Clusters are not considered.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::architecture::Architecture;

/// Warps a multiprocessor holds at most.
pub const MAX_WARPS: u32 = 64;
/// Blocks a multiprocessor holds at most.
const MAX_BLOCKS: u32 = 32;
/// Threads a block has at most.
const MAX_THREADS: u32 = 1024;
/// Threads of a warp.
const WARP: u32 = 32;
/// Registers of a multiprocessor, and of a block at most.
const REGISTERS: u32 = 65_536;
/// Parts that a multiprocessor's registers and warps are divided into.
const PARTITIONS: u32 = 4;
/// Registers a thread has at most.
const MAX_REGISTERS: u32 = 255;
/// The unit in which a warp gets registers.
const REGISTER_UNIT: u32 = 256;
/// The unit in which a block gets shared memory, in bytes.
const SHARED_UNIT: u32 = 128;
/// The shared memory that the system keeps a block, in bytes.
const SHARED_RESERVED: u32 = 1024;

impl Architecture {
    /// Bytes of shared memory of a multiprocessor.
    #[must_use]
    pub fn shared_bytes(self) -> u32 {
        match self {
            Self::Sm80 => 164 * 1024,
            Self::Sm90a | Self::Sm100 => 228 * 1024,
        }
    }

    /// Bytes of shared memory, static and dynamic, that a block can have.
    #[must_use]
    pub fn shared_bytes_of_a_block(self) -> u32 {
        self.shared_bytes() - SHARED_RESERVED
    }
}

/// What a block of a launch takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Threads.
    pub threads: u32,
    /// Registers a thread.
    pub registers: u32,
    /// Bytes of shared memory, static and dynamic.
    pub shared_bytes: u32,
}

/// The resource that limits the occupancy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limiter {
    /// The multiprocessor holds no more warps.
    Threads,
    /// Its registers are used up.
    Registers,
    /// Its shared memory is used up.
    SharedMemory,
    /// It holds no more blocks.
    Blocks,
}

impl fmt::Display for Limiter {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Threads => "threads",
            Self::Registers => "registers",
            Self::SharedMemory => "shared memory",
            Self::Blocks => "blocks",
        })
    }
}

/// How full a multiprocessor gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Occupancy {
    /// Blocks at once.
    pub blocks: u32,
    /// Warps at once, of [`MAX_WARPS`].
    pub warps: u32,
    /// What keeps a further block out; of several that do, the first in the order of [`Limiter`].
    pub limiter: Limiter,
}

/// Why a kernel can't be launched, or its occupancy not be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OccupancyError {
    /// The source doesn't say how many threads a block has.
    #[error("the source has no `__launch_bounds__`: say how many threads a block has")]
    UnknownThreads,
    /// The source has dynamic shared memory whose size it doesn't say.
    #[error("the source doesn't say how much dynamic shared memory it needs: say how many bytes a launch gives it")]
    UnknownSharedBytes,
    /// No block has so many threads.
    #[error("a block of {threads} threads can't be launched: it must have 1 to {MAX_THREADS}")]
    Threads {
        /// The threads.
        threads: u32,
    },
    /// A block's registers are more than there are.
    #[error(
        "a block of {threads} threads with {registers} registers each can't be launched: a thread can have \
         {MAX_REGISTERS} and a block {REGISTERS}; use fewer threads a block"
    )]
    Registers {
        /// Threads of the block.
        threads: u32,
        /// Registers a thread.
        registers: u32,
    },
    /// A block's shared memory is more than it can have.
    #[error(
        "{bytes} bytes of shared memory are more than the {most} that a block can have on {architecture}: use smaller tiles"
    )]
    SharedMemory {
        /// The architecture.
        architecture: Architecture,
        /// The bytes.
        bytes: u32,
        /// The most that there can be.
        most: u32,
    },
}

impl Occupancy {
    /// The occupancy of an `architecture`'s multiprocessor by such blocks.
    ///
    /// # Errors
    /// [`OccupancyError::Threads`], [`OccupancyError::Registers`] or [`OccupancyError::SharedMemory`] when not even one
    /// can be launched.
    pub fn of(architecture: Architecture, block: Block) -> Result<Self, OccupancyError> {
        let Block { threads, registers, shared_bytes } = block;
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(OccupancyError::Threads { threads });
        }
        let warps = threads.div_ceil(WARP);
        if registers > MAX_REGISTERS {
            return Err(OccupancyError::Registers { threads, registers });
        }
        // The machine gives even a kernel that needs none some registers.
        let warp_registers = (registers.max(1) * WARP).next_multiple_of(REGISTER_UNIT);
        if warps.next_multiple_of(PARTITIONS) * warp_registers > REGISTERS {
            return Err(OccupancyError::Registers { threads, registers });
        }
        let most = architecture.shared_bytes_of_a_block();
        if shared_bytes > most {
            return Err(OccupancyError::SharedMemory { architecture, bytes: shared_bytes, most });
        }
        let block_bytes = (shared_bytes + SHARED_RESERVED).next_multiple_of(SHARED_UNIT);
        let limits = [
            (Limiter::Threads, MAX_WARPS / warps),
            (Limiter::Registers, REGISTERS / PARTITIONS / warp_registers * PARTITIONS / warps),
            (Limiter::SharedMemory, architecture.shared_bytes() / block_bytes),
            (Limiter::Blocks, MAX_BLOCKS),
        ];
        // `min_by_key` takes the first of equals; the fallback is never needed, as there are four.
        let (limiter, blocks) = limits.into_iter().min_by_key(|(_, blocks)| *blocks).unwrap_or(limits[0]);
        Ok(Self { blocks, warps: blocks * warps, limiter })
    }

    /// The part of the warps that a multiprocessor can hold, 0 to 1.
    #[must_use]
    pub fn fraction(self) -> f64 {
        f64::from(self.warps) / f64::from(MAX_WARPS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Architecture::{Sm80, Sm90a, Sm100};

    #[test]
    fn each_resource_can_be_the_limit() {
        #[rustfmt::skip]
        let table = [
            (Sm80,  256,  32,       0,  8, Limiter::Threads),
            (Sm80,  256,  33,       0,  6, Limiter::Registers),
            (Sm80,  128,  96,  12_288,  5, Limiter::Registers),
            (Sm80,  128,  96,  45_000,  3, Limiter::SharedMemory),
            (Sm90a, 128,  96,  45_000,  5, Limiter::Registers),
            (Sm90a,  32,  16,       0, 32, Limiter::Blocks),
            (Sm100, 1024, 64,       0,  1, Limiter::Registers),
            (Sm100, 256, 255, 232_448,  1, Limiter::Registers),
            (Sm100, 128,  40, 232_448,  1, Limiter::SharedMemory),
            (Sm80,   33,   0,       1, 32, Limiter::Threads),
            (Sm80,   97, 160,       0,  3, Limiter::Registers),
        ];
        for (architecture, threads, registers, shared_bytes, blocks, limiter) in table {
            let block = Block { threads, registers, shared_bytes };
            let occupancy = Occupancy::of(architecture, block).unwrap();
            assert_eq!((occupancy.blocks, occupancy.limiter), (blocks, limiter), "{architecture} {block:?}");
            assert_eq!(occupancy.warps, blocks * threads.div_ceil(32));
            assert!((0.0..=1.0).contains(&occupancy.fraction()));
        }
    }

    #[test]
    fn what_cannot_be_launched_is_an_error() {
        let of = |threads, registers, shared_bytes| Occupancy::of(Sm80, Block { threads, registers, shared_bytes });
        assert_eq!(of(0, 32, 0), Err(OccupancyError::Threads { threads: 0 }));
        assert_eq!(of(1025, 32, 0), Err(OccupancyError::Threads { threads: 1025 }));
        assert_eq!(of(1024, 65, 0), Err(OccupancyError::Registers { threads: 1024, registers: 65 }));
        assert_eq!(of(32, u32::MAX, 0), Err(OccupancyError::Registers { threads: 32, registers: u32::MAX }));
        let most = 163 * 1024;
        assert!(of(32, 32, most).is_ok());
        for bytes in [most + 1, u32::MAX] {
            let error = OccupancyError::SharedMemory { architecture: Sm80, bytes, most };
            assert_eq!(of(32, 32, bytes), Err(error));
        }
    }
}
