//! Memory of outputs that nobody needs any more, for the outputs that come next. A new vector would be cleared before it is written,
//! by one thread and far from the caches: a tenth of the time of a prompt's projections.

use std::sync::{Arc, Mutex, PoisonError};

use flora_plan::layer::Element;

use crate::owned::OwnedValues;
use crate::values::{Values, ValuesMut};

/// What the host calls itself, for whoever shares its memory: `device.place::<HostPlace>()` is there for the host alone.
#[derive(Clone, Debug, Default)]
pub struct HostPlace {
    /// Of outputs.
    spare: Arc<SpareMemory>,
}

impl HostPlace {
    pub(crate) fn spare(&self) -> &Arc<SpareMemory> {
        &self.spare
    }
}

/// The most vectors that are kept: more than a step has at once.
const MOST: usize = 32;

/// The most bytes of them.
const MOST_BYTES: usize = 64 << 20;

/// A vector is at most so many times as long as what is asked for.
const ROOM: usize = 4;

/// Vectors to use again, the last one given back last: it is the likeliest to be in a cache.
#[derive(Debug, Default)]
pub(crate) struct SpareMemory(Mutex<Vec<OwnedValues>>);

impl SpareMemory {
    /// `count` numbers, whatever they are.
    pub(crate) fn take(self: &Arc<Self>, count: usize, element: Element) -> SpareValues {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |values: &OwnedValues| {
            let values = values.values();
            values.element() == element && (count..=count.saturating_mul(ROOM)).contains(&values.len())
        };
        let values = kept.iter().rposition(fits).map(|at| kept.remove(at));
        drop(kept);
        let values = values.unwrap_or_else(|| OwnedValues::zeros(count, element));
        SpareValues { values, count, home: Arc::clone(self) }
    }

    fn give_back(&self, values: OwnedValues) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(values);
        let bytes = |values: &OwnedValues| values.values().len() * values.values().element().bytes() as usize;
        let mut all: usize = kept.iter().map(bytes).sum();
        while kept.len() > MOST || all > MOST_BYTES {
            all -= bytes(&kept.remove(0));
        }
    }
}

/// Numbers whose memory is used again once they are dropped.
#[derive(Clone, Debug)]
pub struct SpareValues {
    /// What there is room for.
    values: OwnedValues,
    /// What was asked for.
    count: usize,
    home: Arc<SpareMemory>,
}

impl SpareValues {
    /// The numbers.
    pub fn values(&self) -> Values<'_> {
        self.values.values().first(self.count)
    }

    /// The same, to write.
    pub fn values_mut(&mut self) -> ValuesMut<'_> {
        self.values.values_mut().first(self.count)
    }

    /// The numbers, for good.
    pub(crate) fn into_owned(mut self) -> OwnedValues {
        std::mem::replace(&mut self.values, OwnedValues::F32(Vec::new())).resized(self.count)
    }

    /// Writes over those from `first` on, as [`OwnedValues::overwrite`].
    pub(crate) fn overwrite(&mut self, first: usize, values: &[f32]) -> bool {
        first.checked_add(values.len()).is_some_and(|end| end <= self.count) && self.values.overwrite(first, values)
    }
}

impl Drop for SpareValues {
    fn drop(&mut self) {
        let values = std::mem::replace(&mut self.values, OwnedValues::F32(Vec::new()));
        if !values.values().is_empty() {
            self.home.give_back(values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(values: &SpareValues) -> *const f32 {
        let Values::F32(values) = values.values() else { panic!("f32 was asked for") };
        values.as_ptr()
    }

    #[test]
    fn what_is_dropped_is_used_again_where_it_fits() {
        let memory = Arc::new(SpareMemory::default());
        let first = memory.take(100, Element::F32);
        let place = address(&first);
        let second = memory.take(100, Element::F32);
        assert_ne!(address(&second), place, "it is still in use");
        drop(second);
        drop(first);
        assert_eq!(address(&memory.take(30, Element::F32)), place);
        for (count, element) in [(101, Element::F32), (24, Element::F32), (100, Element::Bf16)] {
            let other = memory.take(count, element);
            assert!(other.values().len() == count && other.values().element() == element);
        }
        let taken = memory.take(90, Element::F32);
        let (place, owned) = (address(&taken), taken.into_owned());
        assert_eq!(owned.values().len(), 90);
        assert_ne!(address(&memory.take(90, Element::F32)), place, "it is somebody's own now");
    }

    #[test]
    fn little_is_kept() {
        let memory = Arc::new(SpareMemory::default());
        drop((0..2 * MOST).map(|_| memory.take(10, Element::F16)).collect::<Vec<_>>());
        assert_eq!(memory.0.lock().unwrap().len(), MOST);
        drop(memory.take(MOST_BYTES, Element::F32));
        assert_eq!(memory.0.lock().unwrap().len(), 0, "nothing as large is kept, and what was there was older");
    }
}
