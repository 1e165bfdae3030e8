//! The kinds that folders are read as: the built-in ones and those that were registered.

use super::description::{KindDescription, LayerDescription};
use super::kind_error::KindError;
use std::cmp::Ordering;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, LazyLock};

const BUILTIN: [&str; 23] = [
    include_str!("kinds/lora.toml"),
    include_str!("kinds/ia3.toml"),
    include_str!("kinds/hira.toml"),
    include_str!("kinds/flora.toml"),
    include_str!("kinds/loha.toml"),
    include_str!("kinds/adalora.toml"),
    include_str!("kinds/vera.toml"),
    include_str!("kinds/pvera.toml"),
    include_str!("kinds/vblora.toml"),
    include_str!("kinds/unilora.toml"),
    include_str!("kinds/tinylora.toml"),
    include_str!("kinds/delora.toml"),
    include_str!("kinds/miss.toml"),
    include_str!("kinds/gralora.toml"),
    include_str!("kinds/hra.toml"),
    include_str!("kinds/beft.toml"),
    include_str!("kinds/lokr.toml"),
    include_str!("kinds/c3a.toml"),
    include_str!("kinds/shira.toml"),
    include_str!("kinds/road.toml"),
    include_str!("kinds/oft.toml"),
    include_str!("kinds/boft.toml"),
    include_str!("kinds/randlora.toml"),
];

/// The kinds of adapter that can be read, a row each; by default none. Cloning is cheap.
#[derive(Clone, Debug, Default)]
pub struct AdapterKinds(Vec<Arc<KindDescription>>);

impl AdapterKinds {
    /// LORA (with DoRA), IA3, HIRA, FLORA, and those of PEFT's other kinds that docs/adapters.md lists.
    pub fn builtin() -> Self {
        static KINDS: LazyLock<Vec<Arc<KindDescription>>> = LazyLock::new(|| {
            BUILTIN.iter().filter_map(|text| KindDescription::parse(text).ok().map(Arc::new)).collect()
        });
        Self(KINDS.clone())
    }

    /// The description of one kind alone.
    pub(super) fn only(kind: &AdapterKind) -> Self {
        Self(vec![kind.description.clone()])
    }

    /// Adds a kind.
    ///
    /// # Errors
    /// A description that contradicts itself, or that takes the name of another kind; then nothing is added.
    pub fn register(&mut self, description: KindDescription) -> Result<(), KindError> {
        description.check()?;
        let taken = |what, name: &str| Err(KindError::Taken { what, name: name.to_owned() });
        if self.described(&description.peft_type).is_some() {
            return taken("peft_type", &description.peft_type);
        }
        for layer in &description.layers {
            if self.layer(&layer.name).is_some() {
                return taken("layer", &layer.name);
            }
            if self.0.iter().flat_map(|other| &other.layers).any(|other| other.kind() == layer.kind()) {
                return taken("kind", layer.kind());
            }
        }
        self.0.push(Arc::new(description));
        Ok(())
    }

    /// The description of a `peft_type`.
    pub fn described(&self, peft_type: &str) -> Option<&Arc<KindDescription>> {
        self.0.iter().find(|description| description.peft_type == peft_type)
    }

    /// How the operands of the layer called `name` are found.
    pub fn layer(&self, name: &str) -> Option<&LayerDescription> {
        self.0.iter().flat_map(|description| &description.layers).find(|layer| layer.name == name)
    }

    /// The kind whose modules can be of the layer called `name`.
    pub fn kind_of_layer(&self, name: &str) -> Option<AdapterKind> {
        self.0.iter().find_map(|description| {
            let layer = description.layers.iter().find(|layer| layer.name == name)?;
            Some(AdapterKind::new(description, layer.kind()))
        })
    }

    /// Every description, in the order of registration.
    pub fn descriptions(&self) -> impl Iterator<Item = &Arc<KindDescription>> {
        self.0.iter()
    }

    /// Every `peft_type`, in the order of registration.
    pub fn peft_types(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|description| description.peft_type.as_str())
    }
}

/// A kind of adapter: one name, and the description that it comes from.
#[derive(Clone, Debug)]
pub struct AdapterKind {
    name: Arc<str>,
    description: Arc<KindDescription>,
}

impl AdapterKind {
    pub(super) fn new(description: &Arc<KindDescription>, name: &str) -> Self {
        Self { name: name.into(), description: description.clone() }
    }

    /// The name, as `flora` prints it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How its folders are read.
    pub fn description(&self) -> &Arc<KindDescription> {
        &self.description
    }

    /// How the operands of the layer called `name` are found, if modules of this kind can be of it.
    pub fn layer(&self, name: &str) -> Option<&LayerDescription> {
        self.description.layers.iter().find(|layer| layer.name == name && layer.kind() == self.name())
    }

    /// The names of its layers.
    pub fn layers(&self) -> impl Iterator<Item = &str> {
        let own = self.description.layers.iter().filter(|layer| layer.kind() == self.name());
        own.map(|layer| layer.name.as_str())
    }

    fn key(&self) -> (&str, &str) {
        (&self.name, &self.description.peft_type)
    }
}

impl PartialEq for AdapterKind {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for AdapterKind {}

impl PartialOrd for AdapterKind {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for AdapterKind {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl Hash for AdapterKind {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_builtin_description_is_whole() {
        for text in BUILTIN {
            KindDescription::parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        }
        let kinds = AdapterKinds::builtin();
        assert_eq!(
            kinds.peft_types().collect::<Vec<_>>(),
            [
                "LORA", "IA3", "HIRA", "FLORA", "LOHA", "ADALORA", "VERA", "PVERA", "VBLORA", "UNILORA", "TINYLORA",
                "DELORA", "MISS", "GRALORA", "HRA", "BEFT", "LOKR", "C3A", "SHIRA", "ROAD", "OFT", "BOFT", "RANDLORA"
            ]
        );
        let kind = |layer: &str| kinds.kind_of_layer(layer).map(|kind| kind.name().to_owned());
        assert_eq!(kind("dora").as_deref(), Some("dora"));
        assert_eq!(kind("ia3_feedforward").as_deref(), Some("ia3"));
        assert_eq!(kind("flora_mean").as_deref(), Some("flora"));
        assert_eq!(kind("linear"), None);
    }

    /// The built-in rows are registered by the same function as a researcher's.
    #[test]
    fn builtin_names_don_t_collide() {
        let mut kinds = AdapterKinds::default();
        for text in BUILTIN {
            kinds.register(KindDescription::parse(text).expect("a description")).expect("names of its own");
        }
    }
}
