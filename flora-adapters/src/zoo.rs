//! What becomes of every kind of adapter that PEFT has: the table of `docs/adapters.md`, made of the descriptions and their compiled
//! equations, so that it says what is so. `flora explain --zoo` prints it.

use flora_checkpoint::peft::description::LayerDescription;
use flora_ir::text::print_equation;
use flora_plan::lowering::{SparsePass, lowerings_of};
use flora_plan::pipeline::CompiledLayer;

use crate::derive;
use crate::layers::Layers;

/// PEFT's kinds that aren't read, each with the reason. Those of version 0.21 that neither stand here nor have a description don't
/// exist.
const NOT_READ: [(&str, &str); 23] = [
    (
        "ADAMSS",
        "adapts parts of the base weight that its singular values and a clustering of them choose; not described yet",
    ),
    ("ADAPTION_PROMPT", "adds prompts to attention, and changes no linear layer"),
    ("CARTRIDGE", "brings keys and values along, and changes no linear layer"),
    ("CPT", "a prompt, which changes no linear layer"),
    ("DEFT", "projects outputs on directions whose signs a library of linear algebra chooses"),
    ("FOURIERFT", "its places follow from random numbers of PyTorch's, which the file doesn't have"),
    ("FROD", "its rotations follow from singular vectors of the base weights, which the file doesn't have"),
    ("GLORA", "mixes the base layer's bias and weight into a new bias; not described yet"),
    ("LILY", "a router weighs its factors for each token, so that it is no linear map of a row"),
    ("LN_TUNING", "norms, which are no linear layers"),
    ("MULTITASK_PROMPT_TUNING", "a prompt, which changes no linear layer"),
    ("OSF", "splits the base weight by its singular values and trains a part of it; no adapter beside it"),
    ("PEANUT", "a network makes the change from the base weight; not described yet"),
    ("POLY", "the task that a request names weighs its factors, which no request here has"),
    ("PREFIX_TUNING", "brings keys and values along, and changes no linear layer"),
    ("PROMPT_TUNING", "a prompt, which changes no linear layer"),
    ("PSOFT", "turns singular vectors of the base weight, whose signs a library of linear algebra chooses"),
    ("P_TUNING", "a prompt, which changes no linear layer"),
    ("SHADOW", "a second network beside the base model's blocks"),
    ("SUPERTUNING", "changes single weights that their size chooses; not described yet"),
    ("TRAINABLE_TOKENS", "rows of the embedding: served with LoRA (`trainable_token_indices`), not by themselves"),
    ("WAVEFT", "its places follow from random numbers of PyTorch's, which the file doesn't have"),
    (
        "XLORA",
        "a network weighs LoRA adapters for each token, so that it is no linear map of a row: served, and nothing else",
    ),
];

/// One row of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KindOfPeft {
    /// What a config calls it.
    pub peft_type: String,
    /// What flora makes of it.
    pub served: Result<Vec<ServedLayer>, &'static str>,
}

/// One layer of a kind that is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedLayer {
    /// Its name.
    pub name: String,
    /// The equation as it is written.
    pub equation: String,
    /// The equation after the rules.
    pub normal_form: String,
    /// What one row of an adapter of rank r takes, in words.
    pub takes: String,
    /// The operands that aren't in the file as they are, each with the function that makes it.
    pub derived: Vec<String>,
    /// The lowerings of its parts.
    pub lowerings: Vec<&'static str>,
}

/// Every kind that `layers` read and every kind of PEFT that they don't, by name.
pub fn kinds(layers: &Layers) -> Vec<KindOfPeft> {
    let read = layers.kinds().descriptions().map(|kind| {
        let served = kind.layers.iter().filter_map(|described| served(layers, described)).collect();
        KindOfPeft { peft_type: kind.peft_type.clone(), served: Ok(served) }
    });
    let is_read = |name: &str| layers.kinds().described(name).is_some();
    let others = NOT_READ.iter().filter(|(name, _)| !is_read(name));
    let others = others.map(|(name, why)| KindOfPeft { peft_type: (*name).to_owned(), served: Err(why) });
    let mut kinds: Vec<KindOfPeft> = read.chain(others).collect();
    kinds.sort_by(|one, other| one.peft_type.cmp(&other.peft_type));
    kinds
}

fn served(layers: &Layers, described: &LayerDescription) -> Option<ServedLayer> {
    let compiled = layers.compiled(&described.name)?;
    let lowerings = compiled.parts.iter().flat_map(|part| lowerings_of(*part)).map(|row| row.lowering().name());
    let mut names: Vec<&str> = Vec::new();
    lowerings.for_each(|name| {
        if !names.contains(&name) {
            names.push(name)
        }
    });
    if compiled.linear.is_sparse() {
        names.push(SparsePass::NAME);
    }
    Some(ServedLayer {
        name: described.name.clone(),
        equation: print_equation(compiled.written.layer()),
        normal_form: print_equation(compiled.derivation.result().layer()),
        takes: takes(described, compiled),
        derived: described.derived.iter().map(|own| format!("{} by {}", own.operand, own.function)).collect(),
        lowerings: names,
    })
}

/// What a row of an adapter of rank r takes, in words.
fn takes(described: &LayerDescription, compiled: &CompiledLayer) -> String {
    let linear = &compiled.linear;
    let mut derived = described.derived.iter();
    // Of components and entries that functions make, an equation doesn't say how many there are.
    let made = derived.find_map(|derived| derive::function(&derived.function)?.amount);
    let rows = amount(|rank| linear.layout(rank).virtual_rows.len());
    let pairs = match made {
        Some(made) if linear.layout(1).low_rank > 0 => made.to_owned(),
        _ => amount(|rank| linear.layout(rank).low_rank),
    };
    let mut parts = vec![if rows == "1" { "1 row over w0".to_owned() } else { format!("{rows} rows over w0") }];
    parts.extend((pairs != "0").then(|| format!("low-rank components: {pairs}")));
    parts.extend(linear.is_sparse().then(|| format!("entries: {}", made.unwrap_or("those that aren't 0"))));
    parts.extend((!linear.offset.is_empty()).then(|| "a bias".to_owned()));
    parts.join("; ")
}

/// A number that depends on the rank as `of` says: constant, in proportion to it, with 1 beside, or its square.
fn amount(of: impl Fn(usize) -> usize) -> String {
    type OfRank = fn(usize) -> usize;
    let shapes: [(&str, OfRank); 5] =
        [("0", |_| 0), ("1", |_| 1), ("r", |rank| rank), ("r + 1", |rank| rank + 1), ("r²", |rank| rank * rank)];
    let is = |shape: &OfRank| (0..5).all(|rank| of(rank) == shape(rank));
    let found = shapes.iter().find(|(_, shape)| is(shape));
    found.map_or_else(|| format!("{} where r is 8", of(8)), |(name, _)| (*name).to_owned())
}

/// The table in Markdown.
pub fn markdown(layers: &Layers) -> String {
    let mut text =
        "| `peft_type` | equation | normal form | a row of rank r takes | lowerings |\n|---|---|---|---|---|\n"
            .to_owned();
    let cell = |text: &str| text.replace('\n', " ").replace('|', "\\|");
    let mut reasons = "| `peft_type` | why it isn't read |\n|---|---|\n".to_owned();
    for kind in kinds(layers) {
        match &kind.served {
            Err(why) => reasons += &format!("| `{}` | {why} |\n", kind.peft_type),
            Ok(served) => {
                for layer in served {
                    let made = layer.derived.join(", ");
                    let made = if made.is_empty() { made } else { format!(" ({made})") };
                    text += &format!(
                        "| `{}` | `{}`{made} | `{}` | {} | {} |\n",
                        kind.peft_type,
                        cell(&layer.equation),
                        cell(&layer.normal_form),
                        layer.takes,
                        if layer.lowerings.is_empty() {
                            "the base rows' own".to_owned()
                        } else {
                            layer.lowerings.join(", ")
                        }
                    );
                }
            }
        }
    }
    format!("{text}\n{reasons}")
}
