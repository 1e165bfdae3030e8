//! What a device keeps with a schedule: the index tables that it has uploaded, for the next layer that runs the same one.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// Things that a device made of a schedule, of types that it alone knows. They are no part of what a schedule says, and a copy has
/// none of them.
#[derive(Default)]
pub struct Kept(Mutex<Vec<Arc<dyn Any + Send + Sync>>>);

impl Kept {
    /// The thing of this type that `is` says yes to, else what `make` makes, which is kept from now on.
    pub fn find_or_keep<T: Any + Send + Sync>(&self, is: impl Fn(&T) -> bool, make: impl FnOnce() -> T) -> Arc<T> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept.iter().filter_map(|thing| Arc::clone(thing).downcast().ok());
        let found: Option<Arc<T>> = known.into_iter().find(|thing: &Arc<T>| is(thing));
        found.unwrap_or_else(|| {
            let made = Arc::new(make());
            kept.push(Arc::clone(&made) as Arc<dyn Any + Send + Sync>);
            made
        })
    }
}

impl Clone for Kept {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Kept")
    }
}
