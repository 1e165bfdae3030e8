//! The processor's matrix unit (AMX): sixteen rows of pairs times sixteen columns in one instruction, some eight times the products of
//! vectors of floats in the same time. It reads what [`crate::pairs`] packs.
//!
//! A sum over a slice is made of sums over sixteen pairs, of which the unit adds the first numbers' products and the second ones'
//! apart. Rows don't meet in it, and every number of rows goes through it, so that a row's bits depend on the layer alone.
//!
//! A tile of operands is cleared as soon as it has been used. That frees the register behind it, of which a core has few for its two
//! threads: where another program keeps the other thread busy, loads wait for one another, and clearing makes 88 ns of the 152 that
//! four products take. Rows of x are loaded past the first-level cache, which a strip of the weight then has to itself: 34 ns in place
//! of 45 where the other thread is idle.

use half::bf16;

use crate::fetch::Pieces;
use crate::layout::{MOST_PIECES, STRIP};
use crate::products::Pairs;

/// Proof that this process may use the unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MatrixUnit(());

/// Rows of x that the unit holds at a time: two of its tiles.
pub(crate) const UNIT_ROWS: usize = 32;

/// Rows of packed x times a strip of pairs.
pub(crate) struct UnitProducts<'a> {
    /// As many rows as there are products, and further ones of no matter up to a multiple of [`UNIT_ROWS`].
    pub(crate) x: &'a [bf16],
    pub(crate) rows: usize,
    /// Numbers from one row to the next.
    pub(crate) x_pitch: usize,
    /// Pairs `[depth, STRIP]`.
    pub(crate) weight: &'a [f32],
    /// In pairs, a multiple of [`Pairs::STEP`].
    pub(crate) depth: usize,
    /// What will be needed next.
    pub(crate) ahead: Pieces<'a>,
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use std::arch::asm;
    use std::mem::MaybeUninit;
    use std::sync::OnceLock;

    use super::*;

    /// What the unit's eight tiles hold: the layout that `ldtilecfg` reads.
    #[repr(C, align(64))]
    struct Tiles {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    /// Rows of a tile.
    const ROWS: usize = UNIT_ROWS / 2;

    /// Bytes of a tile's row: half a strip.
    const ROW_BYTES: usize = Pairs::STEP * size_of::<f32>();
    const _: () = assert!(STRIP * size_of::<f32>() == 2 * ROW_BYTES);

    static TILES: Tiles = Tiles {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// A step of two tiles of rows, the second where there is `both`, times two tiles of the weight. `load` loads the rows'.
    macro_rules! step {
        ($load:literal) => {
            concat!(
                $load,
                " tmm4, [{x} + {x_pitch}]\n",
                "tileloadd tmm6, [{weight} + {pitch}]\n",
                "tileloadd tmm7, [{weight} + {pitch} + {half}]\n",
                "tdpbf16ps tmm0, tmm4, tmm6\n",
                "tdpbf16ps tmm1, tmm4, tmm7\n",
                "tilezero tmm4\n",
                "test {both}, {both}\n",
                "jz 6f\n",
                $load,
                " tmm5, [{lower} + {x_pitch}]\n",
                "tdpbf16ps tmm2, tmm5, tmm6\n",
                "tdpbf16ps tmm3, tmm5, tmm7\n",
                "tilezero tmm5\n",
                "6:\n",
                "tilezero tmm6\n",
                "tilezero tmm7\n",
                "add {x}, {half}\n",
                "add {lower}, {half}",
            )
        };
    }

    impl MatrixUnit {
        /// The unit, where the processor has one and the system lets this process use it.
        pub(crate) fn get() -> Option<Self> {
            static GRANTED: OnceLock<bool> = OnceLock::new();
            GRANTED.get_or_init(|| is_there() && is_granted()).then_some(Self(()))
        }

        /// The products `[rows, STRIP]`, sums over the depth; `out` has room for a multiple of [`UNIT_ROWS`].
        ///
        /// # Panics
        /// Where a slice is shorter than its extents say.
        pub(crate) fn multiply<'o>(
            self,
            work: UnitProducts<'_>,
            out: &'o mut [MaybeUninit<[f32; STRIP]>],
        ) -> &'o mut [[f32; STRIP]] {
            let UnitProducts { x, rows, x_pitch, weight, depth, ahead } = work;
            let room = rows.next_multiple_of(UNIT_ROWS);
            let out = &mut out[..room];
            assert!(rows > 0 && depth > 0 && depth.is_multiple_of(Pairs::STEP));
            assert!(x.len() >= (room - 1) * x_pitch + 2 * depth && weight.len() >= depth * STRIP);
            let steps = depth / Pairs::STEP;
            let blocks = room / UNIT_ROWS;
            let (fetched, lines) = ahead.run();
            // SAFETY: the process may use the unit; what is read and written has been compared with the slices, and a fetch is no
            // access. The compiler doesn't use tiles, and they are released at the end.
            unsafe {
                asm!(
                    "ldtilecfg [{line}]",
                    "2:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "mov {step}, {steps}",
                    "3:",
                    // The lines of this step.
                    "mov {line}, {lines}",
                    "test {line}, {line}",
                    "jz 5f",
                    "4:",
                    "prefetcht1 [{fetched}]",
                    "add {fetched}, 64",
                    "dec {line}",
                    "jnz 4b",
                    "5:",
                    step!("tileloaddt1"),
                    "add {weight}, {block}",
                    "dec {step}",
                    "jnz 3b",
                    "tilestored [{out} + {pitch}], tmm0",
                    "tilestored [{out} + {pitch} + {half}], tmm1",
                    "tilestored [{out} + {pitch} + {lower_out}], tmm2",
                    "tilestored [{out} + {pitch} + {lower_out} + {half}], tmm3",
                    // The next rows, from the strip's beginning.
                    "mov {step}, {steps}",
                    "shl {step}, {half_bits}",
                    "sub {x}, {step}",
                    "sub {lower}, {step}",
                    "mov {step}, {x_pitch}",
                    "shl {step}, {unit_bits}",
                    "add {x}, {step}",
                    "add {lower}, {step}",
                    "mov {step}, {steps}",
                    "shl {step}, {block_bits}",
                    "sub {weight}, {step}",
                    "add {out}, {out_bytes}",
                    "dec {blocks}",
                    "jnz 2b",
                    "tilerelease",
                    x = inout(reg) x.as_ptr() => _,
                    lower = inout(reg) x.as_ptr().wrapping_add(ROWS * x_pitch) => _,
                    weight = inout(reg) weight.as_ptr() => _,
                    out = inout(reg) out.as_mut_ptr() => _,
                    fetched = inout(reg) fetched => _,
                    lines = in(reg) lines.div_ceil(steps * blocks),
                    steps = in(reg) steps,
                    blocks = inout(reg) blocks => _,
                    step = out(reg) _,
                    line = inout(reg) &raw const TILES => _,
                    both = in(reg) usize::from(rows > ROWS),
                    x_pitch = in(reg) x_pitch * size_of::<bf16>(),
                    pitch = in(reg) STRIP * size_of::<f32>(),
                    half = const ROW_BYTES,
                    half_bits = const ROW_BYTES.ilog2(),
                    unit_bits = const UNIT_ROWS.ilog2(),
                    lower_out = const ROWS * STRIP * size_of::<f32>(),
                    block = const Pairs::STEP * STRIP * size_of::<f32>(),
                    block_bits = const (Pairs::STEP * STRIP * size_of::<f32>()).ilog2(),
                    out_bytes = const UNIT_ROWS * STRIP * size_of::<f32>(),
                    options(nostack),
                );
                // So many have been written: one or two tiles of every block.
                &mut *(&raw mut out[..rows] as *mut [[f32; STRIP]])
            }
        }

        /// Writes the products of `rows` packed rows, at most [`UNIT_ROWS`], with strips of pieces `[Pairs::STEP, STRIP]`, `steps`
        /// of them a strip, to the columns of `out`, one strip beside the other. Rows lie a pitch of floats apart; up to
        /// [`UNIT_ROWS`] of them are read and written.
        ///
        /// # Panics
        /// Where a slice is shorter than its extents say, or pieces are more than [`MOST_PIECES`].
        pub(crate) fn multiply_pieces(
            self,
            (x, rows, x_pitch): (&[f32], usize, usize),
            pieces: &[&[f32]],
            steps: usize,
            out: &mut [f32],
            out_pitch: usize,
        ) {
            let strips = pieces.len() / steps;
            assert!(rows > 0 && rows <= UNIT_ROWS && strips > 0);
            assert!(pieces.len() == strips * steps && pieces.len() <= MOST_PIECES);
            assert!(x.len() >= (UNIT_ROWS - 1) * x_pitch + steps * Pairs::STEP);
            assert!(out.len() >= (UNIT_ROWS - 1) * out_pitch + strips * STRIP);
            let mut table = [std::ptr::null(); MOST_PIECES];
            for (place, piece) in table.iter_mut().zip(pieces) {
                assert!(piece.len() >= Pairs::STEP * STRIP);
                *place = piece.as_ptr();
            }
            // SAFETY: the process may use the unit; what is read and written has been compared with the slices. The compiler doesn't
            // use tiles, and they are released at the end.
            unsafe {
                asm!(
                    "ldtilecfg [{weight}]",
                    "2:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "mov {step}, {steps}",
                    "3:",
                    "mov {weight}, [{table}]",
                    "add {table}, 8",
                    step!("tileloadd"),
                    "dec {step}",
                    "jnz 3b",
                    "mov {step}, {steps}",
                    "shl {step}, {half_bits}",
                    "sub {x}, {step}",
                    "sub {lower}, {step}",
                    "tilestored [{out} + {out_pitch}], tmm0",
                    "tilestored [{out} + {out_pitch} + {half}], tmm1",
                    "test {both}, {both}",
                    "jz 7f",
                    "mov {weight}, {out_pitch}",
                    "shl {weight}, {rows_bits}",
                    "add {weight}, {out}",
                    "tilestored [{weight} + {out_pitch}], tmm2",
                    "tilestored [{weight} + {out_pitch} + {half}], tmm3",
                    "7:",
                    "add {out}, {strip}",
                    "dec {strips}",
                    "jnz 2b",
                    "tilerelease",
                    weight = inout(reg) &raw const TILES => _,
                    table = inout(reg) table.as_ptr() => _,
                    x = inout(reg) x.as_ptr() => _,
                    lower = inout(reg) x.as_ptr().wrapping_add(ROWS * x_pitch) => _,
                    out = inout(reg) out.as_mut_ptr() => _,
                    strips = inout(reg) strips => _,
                    steps = in(reg) steps,
                    step = out(reg) _,
                    both = in(reg) usize::from(rows > ROWS),
                    x_pitch = in(reg) x_pitch * size_of::<f32>(),
                    out_pitch = in(reg) out_pitch * size_of::<f32>(),
                    pitch = in(reg) STRIP * size_of::<f32>(),
                    half = const ROW_BYTES,
                    half_bits = const ROW_BYTES.ilog2(),
                    rows_bits = const ROWS.ilog2(),
                    strip = const STRIP * size_of::<f32>(),
                    options(nostack),
                );
            }
        }
    }

    fn is_there() -> bool {
        let id = raw_cpuid::CpuId::new();
        id.get_extended_feature_info().is_some_and(|features| features.has_amx_tile() && features.has_amx_bf16())
    }

    /// Asks the system for the unit, whose registers it doesn't keep for processes that haven't.
    fn is_granted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
        const TILE_DATA: libc::c_ulong = 18;
        // SAFETY: the call reads two numbers.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
impl MatrixUnit {
    /// Nothing: no processor or system of this kind has one.
    pub(crate) fn get() -> Option<Self> {
        None
    }

    /// Nobody gets here without a unit.
    pub(crate) fn multiply<'o>(
        self,
        _: UnitProducts<'_>,
        _: &'o mut [std::mem::MaybeUninit<[f32; STRIP]>],
    ) -> &'o mut [[f32; STRIP]] {
        &mut []
    }

    /// Likewise.
    pub(crate) fn multiply_pieces(self, _: (&[f32], usize, usize), _: &[&[f32]], _: usize, _: &mut [f32], _: usize) {}
}
