//! A warm engine allocates nothing.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use flora_host::{GradientsMut, HostEngine, Operands, Values, ValuesMut, Weight};
use flora_ir::Activation;
use flora_plan::batch::{AdapterSlots, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::layer::{Epilogue, LayerShape, WeightFormat};
use flora_plan::plan::Plan;
use flora_plan::schedule::{backward_schedule, schedule};
use flora_plan::weight::PackedWeight;
use half::f16;

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does everything.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: by the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: by the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Within the thread pool: from outside, the pool's own queue takes a block of memory every few dozen calls.
#[test]
fn a_warm_engine_allocates_nothing() {
    let shape = LayerShape { d: 352, k: 700 };
    let (d, k) = (shape.d as usize, shape.k as usize);
    let flora = |first: u32| AdapterSlots {
        virtual_rows: (first..first + 4)
            .map(|slot| VirtualRowSlots { in_scale: Some(slot), out_scale: Some(slot) })
            .collect(),
        low_rank: LowRankSlots { shrink: first, expand: first, rank: 3 },
        is_merged: false,
    };
    let lora = AdapterSlots { low_rank: LowRankSlots { shrink: 2, expand: 3, rank: 5 }, ..AdapterSlots::base() };
    let adapters = [AdapterSlots::base(), flora(0), flora(4), lora];
    let segments: Vec<_> = (0..12).map(|at| Segment { rows: 1 + 5 * at, adapter: at % 4 }).collect();
    let tokens = segments.iter().map(|segment| segment.rows as usize).sum::<usize>();
    let weight = Weight::new(&PackedWeight::from_f32(WeightFormat::Q4_1, shape, &vec![0.25; d * k]).unwrap());
    let (in_pool, out_pool) = (vec![f16::ONE; 8 * d], vec![f16::ONE; 8 * k]);
    let (x, residual, bias) = (vec![f16::ONE; tokens * d], vec![f16::ONE; tokens * k], vec![1.0; k]);
    let mut y = vec![f16::ZERO; tokens * k];
    let operands = Operands {
        weight: &weight,
        bias: Some(&bias),
        in_pool: Values::F16(&in_pool),
        out_pool: Values::F16(&out_pool),
        epilogue: Epilogue { bias: true, activation: Activation::Silu, residual: true },
        merged: None,
    };
    let schedules: Vec<_> =
        Plan::unmerged().map(|plan| schedule(&plan, shape, &segments, &adapters, true).unwrap()).collect();
    let backward = backward_schedule(&Plan::default().with_on_chip_from(4), shape, &segments, &adapters).unwrap();
    let (mut dx, mut ins) = (vec![f16::ZERO; tokens * d], vec![0.0; backward.in_vectors() as usize * d]);
    let mut outs = vec![0.0; backward.out_vectors() as usize * k];
    for engine in [HostEngine::new(), HostEngine::new().rounding_activations()] {
        let mut run = |times: usize| {
            for schedule in schedules.iter().cycle().take(times * schedules.len()) {
                let y = ValuesMut::F16(&mut y);
                engine.execute(&operands, schedule, Values::F16(&x), y, Some(Values::F16(&residual))).unwrap();
                let gradients =
                    GradientsMut { input: Some(ValuesMut::F16(&mut dx)), vectors: Some([&mut ins, &mut outs]) };
                let g = Values::F16(&residual);
                engine.backward(&operands, &backward, Values::F16(&x), g, gradients).unwrap();
            }
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        // It is warm when every thread has had every buffer, and which thread gets what is chance.
        let is_warm = pool.install(|| {
            (0..20).any(|_| {
                let before = ALLOCATIONS.load(Ordering::Relaxed);
                run(20);
                ALLOCATIONS.load(Ordering::Relaxed) == before
            })
        });
        assert!(is_warm, "20 calls of each schedule allocate every time");
    }
}
