//! GPUs that are here and that this build has no code for, by what the system says of them without a driver's library.

use std::path::Path;

/// A GPU that this build can't use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    /// What the system calls it.
    pub name: String,
    /// The feature of flora that brings its kind.
    pub feature: &'static str,
}

/// GPUs that Linux lists and that this build has no code for; none on other systems, which have no such list.
pub fn unsupported() -> Vec<Unsupported> {
    of_system(Path::new("/"))
}

/// As [`unsupported`], of a system whose files lie under `root`.
fn of_system(root: &Path) -> Vec<Unsupported> {
    let mut seen = Vec::new();
    let nvidia = entries(&root.join("proc/driver/nvidia/gpus"));
    if !cfg!(feature = "cuda") {
        let name = |path: &std::path::PathBuf| model(path).unwrap_or_else(|| "an NVIDIA GPU".to_owned());
        seen.extend(nvidia.iter().map(|path| Unsupported { name: name(path), feature: "cuda" }));
    }
    if !cfg!(feature = "wgpu") {
        let cards = entries(&root.join("sys/class/drm")).into_iter().filter(|path| is_render_node(path));
        let vendors = cards.filter_map(|path| std::fs::read_to_string(path.join("device/vendor")).ok());
        // NVIDIA's own driver was asked above, and CUDA is the better way to its cards.
        let others = vendors.filter_map(|vendor| vendor_name(vendor.trim()));
        seen.extend(others.map(|vendor| Unsupported { name: format!("a GPU of {vendor}"), feature: "wgpu" }));
    }
    seen
}

/// The folder's entries, sorted; none where there is no such folder.
fn entries(folder: &Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

/// The `Model:` line of what NVIDIA's driver says of a card.
fn model(card: &Path) -> Option<String> {
    let information = std::fs::read_to_string(card.join("information")).ok()?;
    let model = information.lines().find_map(|line| line.strip_prefix("Model:"))?.trim();
    (!model.is_empty()).then(|| model.to_owned())
}

fn is_render_node(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("renderD"))
}

/// Vendors of graphics processors by their PCI numbers.
fn vendor_name(id: &str) -> Option<&'static str> {
    match id {
        "0x1002" => Some("AMD"),
        "0x8086" => Some("Intel"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn cards_that_the_system_lists_are_named_with_their_feature() {
        let root = tempfile::tempdir().expect("a temporary folder");
        assert_eq!(of_system(root.path()), []);
        let nvidia = root.path().join("proc/driver/nvidia/gpus/0000:01:00.0");
        fs::create_dir_all(&nvidia).expect("a folder");
        fs::write(nvidia.join("information"), "Model: \t\t NVIDIA H200\nIRQ: 1\n").expect("a file");
        let device = root.path().join("sys/class/drm/renderD128/device");
        fs::create_dir_all(&device).expect("a folder");
        fs::write(device.join("vendor"), "0x1002\n").expect("a file");
        let mut expected = Vec::new();
        if !cfg!(feature = "cuda") {
            expected.push(Unsupported { name: "NVIDIA H200".to_owned(), feature: "cuda" });
        }
        if !cfg!(feature = "wgpu") {
            expected.push(Unsupported { name: "a GPU of AMD".to_owned(), feature: "wgpu" });
        }
        assert_eq!(of_system(root.path()), expected);
    }
}
