//! The layer that a person names: built in, or a file in the text form.

use std::path::Path;

use flora::prelude::*;
use flora_adapters::Layers;
use flora_ir::{Diagnostic, builtin, parse, print, verify};

use super::error::CommandError;

/// A compiled layer with its source.
pub(crate) struct NamedLayer {
    pub(crate) source: String,
    pub(crate) compiled: CompiledLayer,
}

/// Reads and compiles `name`. Mistakes are shown in the source, all of them.
pub(crate) fn open(name: &str) -> Result<NamedLayer, CommandError> {
    if let (Some(written), Some(source)) = (builtin::builtin(name), builtin::source(name)) {
        return compiled(name, source.to_owned(), written.clone());
    }
    // Those of kinds whose descriptions have the equations.
    let layers = Layers::builtin()?;
    if let Some(layer) = layers.compiled(name) {
        return Ok(NamedLayer { source: print(layer.written.layer()), compiled: layer.clone() });
    }
    let path = Path::new(name);
    if !path.is_file() {
        let described = layers.kinds().descriptions().flat_map(|kind| &kind.layers).map(|layer| layer.name.as_str());
        let described = described.filter(|name| builtin::builtin(name).is_none()).map(str::to_owned);
        let known = builtin::names().map(str::to_owned).chain(described).collect::<Vec<_>>().join(", ");
        return Err(CommandError::UnknownLayer { name: name.to_owned(), known });
    }
    let failed = |source| CommandError::Io { action: "read", path: path.to_owned(), source };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    let limit = flora_ir::text::MAX_SOURCE_BYTES as u64;
    if length > limit {
        return Err(CommandError::TooMany { what: "the bytes of the layer's source", found: length, limit });
    }
    let source = std::fs::read_to_string(path).map_err(failed)?;
    let layer = parse(&source).map_err(|error| in_source(name, &source, &[error.diagnostic]))?;
    let written = verify(layer).map_err(|mistakes| in_source(name, &source, &mistakes))?;
    compiled(name, source, written)
}

fn compiled(name: &str, source: String, written: flora_ir::VerifiedLayer) -> Result<NamedLayer, CommandError> {
    match compile_verified(written) {
        Ok(compiled) => Ok(NamedLayer { source, compiled }),
        Err(error) => Err(in_source(name, &source, &[error.diagnostic()])),
    }
}

/// Mistakes, shown in the source of `name`.
pub(crate) fn in_source(name: &str, source: &str, mistakes: &[Diagnostic]) -> CommandError {
    let rendered = mistakes.iter().map(|mistake| mistake.render(name, source)).collect::<Vec<_>>().join("\n");
    CommandError::Layer { path: name.into(), rendered }
}
