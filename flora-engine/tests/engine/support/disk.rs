//! Adapters as they would lie on a disk: they change, break, and go.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flora_engine::{
    AdapterContent, AdapterFacts, AdapterFailure, AdapterSource, Composition, LoadOrder, LoadOutcome, Loaded, Read,
    Unread,
};

use super::decoder::{FakeAdapter, GATED, INVOKED};

/// What invokes the adapter that has to be.
pub(crate) const INVOCATION: [u32; 2] = [7, 6];

/// A folder of adapters; its clones are views of the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk(Arc<Mutex<BTreeMap<String, Stored>>>);

/// An adapter's files.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) version: u64,
    pub(crate) bytes: u64,
    pub(crate) state: Files,
    /// How often they were read.
    pub(crate) reads: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Files {
    Good,
    /// They can't be read.
    Broken,
    /// They are of another model, as the device sees only.
    Unfit,
}

impl Disk {
    pub(crate) fn all(&self) -> MutexGuard<'_, BTreeMap<String, Stored>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes an adapter, over what was there.
    pub(crate) fn write(&self, name: &str, bytes: u64, state: Files) {
        let mut all = self.all();
        let version = all.get(name).map_or(1, |stored| stored.version + 1);
        let reads = all.get(name).map_or(0, |stored| stored.reads);
        all.insert(name.into(), Stored { version, bytes, state, reads });
    }

    pub(crate) fn with(names: &[&str]) -> Self {
        let disk = Self::default();
        for name in names {
            disk.write(name, 1, Files::Good);
        }
        disk
    }

    pub(crate) fn reads(&self, name: &str) -> usize {
        self.all().get(name).map_or(0, |stored| stored.reads)
    }

    /// What a loader would make of an order.
    pub(crate) fn load(&self, order: LoadOrder) -> Loaded<FakeAdapter> {
        let LoadOrder { adapter, known } = order;
        let outcome = match self.version_of(&adapter) {
            Err(failure) => LoadOutcome::Failed { version: None, failure },
            Ok(version) if known == Some(version) => LoadOutcome::Unchanged,
            Ok(_) => match self.read(&adapter) {
                Ok(Read { version, prepared }) => {
                    LoadOutcome::Prepared { version, facts: Self::facts(&prepared), prepared }
                }
                Err(Unread { version, failure }) => LoadOutcome::Failed { version, failure },
            },
        };
        Loaded { adapter, outcome }
    }
}

impl AdapterSource for Disk {
    type Prepared = FakeAdapter;

    fn names(&self) -> Vec<String> {
        self.all().keys().cloned().collect()
    }

    fn version(&self, name: &str) -> Result<u64, AdapterFailure> {
        self.all().get(name).map(|stored| stored.version).ok_or_else(|| AdapterFailure::Unknown(name.into()))
    }

    fn prepare(&self, name: &str) -> Result<Read<FakeAdapter>, Unread> {
        let mut all = self.all();
        let stored = all.get_mut(name).ok_or_else(|| AdapterFailure::Unknown(name.into()))?;
        stored.reads += 1;
        if stored.state == Files::Broken {
            let failure = AdapterFailure::Unusable { name: name.into(), reason: "broken".into() };
            return Err(Unread { version: Some(stored.version), failure });
        }
        let (version, fits) = (stored.version, stored.state == Files::Good);
        let (bytes, parts) = (stored.bytes, vec![(name.to_owned(), version)]);
        Ok(Read { version, prepared: FakeAdapter { name: name.into(), version, bytes, fits, parts } })
    }

    fn compose(&self, composition: &Composition) -> Result<Read<FakeAdapter>, Unread> {
        let parts = composition.parts().map(|(name, _)| Ok(self.prepare(name)?.prepared));
        let parts: Vec<FakeAdapter> = parts.collect::<Result<_, Unread>>()?;
        let versions: BTreeMap<&str, u64> = parts.iter().map(|part| (&*part.name, part.version)).collect();
        let Ok(version) = composition.version(|name| Ok::<_, Infallible>(versions[name]));
        let prepared = FakeAdapter {
            name: composition.to_string(),
            version,
            bytes: parts.iter().map(|part| part.bytes).sum(),
            fits: parts.iter().all(|part| part.fits),
            parts: parts.into_iter().flat_map(|part| part.parts).collect(),
        };
        Ok(Read { version, prepared })
    }

    fn facts(prepared: &FakeAdapter) -> AdapterFacts {
        let FakeAdapter { name, version, bytes, .. } = prepared;
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        let content = AdapterContent(u128::from(hasher.finish()) << 64 | u128::from(*version));
        let invocation = (name == INVOKED).then(|| INVOCATION.to_vec());
        AdapterFacts { bytes: *bytes, content, invocation, gated: name == GATED }
    }
}
