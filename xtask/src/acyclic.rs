//! The files of a folder that is read from its leaves up must not use one another in a circle: none of them could be understood
//! before the others. Rust doesn't mind, so that this test does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use petgraph::algo::tarjan_scc;
use petgraph::graphmap::DiGraphMap;

/// Folders of the workspace, each with the path of its module.
const FOLDERS: [(&str, &str); 2] = [("flora-codegen/src/kernels", "crate::kernels"), ("flora-host/src", "crate")];

/// The modules of a folder by name, each with the text of its files and how deep below the module a file lies; the folder's own
/// file goes by "".
type Modules = BTreeMap<String, Vec<(usize, String)>>;

fn read(folder: &Path) -> Modules {
    let mut modules = Modules::new();
    let mut open = vec![(folder.to_owned(), Vec::<String>::new())];
    while let Some((folder, path)) = open.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder of the workspace") {
            let file: PathBuf = entry.expect("an entry").path();
            let name = file.file_stem().and_then(|name| name.to_str()).expect("a name").to_owned();
            let mut own = path.clone();
            if file.is_dir() {
                own.push(name);
                open.push((file, own));
            } else if file.extension().is_some_and(|extension| extension == "rs") {
                if !matches!(&*name, "mod" | "lib") {
                    own.push(name);
                }
                let text = std::fs::read_to_string(&file).expect("text");
                let module = own.first().cloned().unwrap_or_default();
                modules.entry(module).or_default().push((own.len().saturating_sub(1), text));
            }
        }
    }
    modules
}

/// The code of a file without its comments and its unit tests.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

fn identifier(text: &str) -> (&str, &str) {
    text.split_at(text.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(text.len()))
}

/// Every path of the tree of names at the start of `text`, such as `a::{b, c::d}`, after those in `before`; what follows it.
fn paths<'a>(text: &'a str, before: &[&'a str], found: &mut Vec<Vec<&'a str>>) -> &'a str {
    let mut text = text.trim_start();
    if let Some(group) = text.strip_prefix('{') {
        text = group.trim_start();
        while !text.is_empty() && !text.starts_with('}') {
            let rest = paths(text, before, found).trim_start();
            // What isn't a tree of names ends it, such as `as`.
            let stop = rest.find([',', '}']).unwrap_or(rest.len());
            text = rest[stop..].trim_start_matches(',').trim_start();
        }
        return text.strip_prefix('}').unwrap_or(text);
    }
    let (name, rest) = identifier(text);
    let path = [before, &[name]].concat();
    match rest.strip_prefix("::") {
        Some(rest) if !name.is_empty() => paths(rest, &path, found),
        _ => {
            found.push(path);
            rest
        }
    }
}

/// The paths that a file names and that start at the folder, as seen from `depth` below one of its modules.
fn named<'a>(text: &'a str, root: &str, depth: usize) -> Vec<Vec<&'a str>> {
    let mut found = Vec::new();
    for start in [format!("{root}::"), "super::".repeat(depth + 1)] {
        for (at, _) in text.match_indices(&start) {
            let part_of_a_name = |letter: char| letter.is_alphanumeric() || matches!(letter, '_' | ':');
            if !text[..at].ends_with(part_of_a_name) {
                paths(&text[at + start.len()..], &[], &mut found);
            }
        }
    }
    found
}

/// The modules that use one another, circle by circle.
fn circles(modules: &Modules, root: &str) -> Vec<Vec<String>> {
    let sources: Vec<(&str, usize, String)> = modules
        .iter()
        .flat_map(|(module, files)| files.iter().map(|(depth, text)| (module.as_str(), *depth, code(text))))
        .collect();
    // A name that the folder's own file passes on is used from where it comes from.
    let mut passed_on = BTreeMap::new();
    for (_, _, text) in sources.iter().filter(|(module, ..)| module.is_empty()) {
        for (at, keyword) in text.match_indices("use ") {
            let mut found = Vec::new();
            paths(&text[at + keyword.len()..], &[], &mut found);
            let of_a_module = found.into_iter().filter(|path| path.len() > 1 && modules.contains_key(path[0]));
            passed_on.extend(of_a_module.map(|path| (path[path.len() - 1], path[0])));
        }
    }
    let mut uses = DiGraphMap::<&str, ()>::new();
    for (module, depth, text) in sources.iter().filter(|(module, ..)| !module.is_empty()) {
        for path in named(text, root, *depth) {
            let used = modules.get_key_value(path[0]).map(|(used, _)| used.as_str());
            let used = used.or_else(|| passed_on.get(path[0]).copied());
            if let Some(used) = used.filter(|used| used != module) {
                uses.add_edge(module, used, ());
            }
        }
    }
    let mut circles: Vec<Vec<String>> = tarjan_scc(&uses)
        .into_iter()
        .filter(|set| set.len() > 1)
        .map(|set| set.into_iter().map(str::to_owned).collect())
        .collect();
    circles.iter_mut().for_each(|circle| circle.sort());
    circles.sort();
    circles
}

#[test]
fn files_use_one_another_in_no_circle() {
    for (folder, root) in FOLDERS {
        let modules = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder));
        assert!(modules.len() > 5, "{folder} has moved");
        assert_eq!(circles(&modules, root), Vec::<Vec<String>>::new(), "{folder}");
    }
}

#[test]
fn a_circle_is_seen_however_it_is_written() {
    let seen = |sources: &[(&str, usize, &str)]| {
        let mut modules = Modules::new();
        for (module, depth, text) in sources {
            modules.entry((*module).to_owned()).or_default().push((*depth, (*text).to_owned()));
        }
        circles(&modules, "crate::folder")
    };
    let circle = vec![vec!["one".to_owned(), "two".to_owned()]];
    let leaf = ("leaf", 0, "pub struct Leaf;");
    assert_eq!(seen(&[leaf, ("one", 0, "use super::two::f;"), ("two", 0, "use super::leaf::Leaf;")]), [[""; 0]; 0]);
    assert_eq!(seen(&[leaf, ("one", 0, "use super::two::f;"), ("two", 0, "// super::one\nfn f() {}")]), [[""; 0]; 0]);
    for back in [
        "use super::one;",
        "use super::{leaf::Leaf,\n    one::{self, f as g}};",
        "use crate::folder::{leaf, one};",
        "fn f() { super::one::f() }",
    ] {
        assert_eq!(seen(&[leaf, ("one", 0, "use super::two::f;"), ("two", 0, back)]), circle, "{back}");
    }
    // Through a name that the folder passes on, and from a file below a module.
    let folder = ("", 0, "mod one;\nmod two;\npub use one::{Name, Other};");
    assert_eq!(seen(&[folder, ("one", 0, "use super::two::f;"), ("two", 0, "use super::Name;")]), circle);
    assert_eq!(seen(&[("one", 0, "use super::two::f;"), ("two", 1, "use super::super::one::f;")]), circle);
    assert_eq!(seen(&[("one", 0, "use super::two::f;"), ("two", 1, "use super::one::f;")]), [[""; 0]; 0]);
}
