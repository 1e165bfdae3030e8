//! The same text for the same kernel: cubecl numbers CUDA temporaries by a counter that all compilations share, and lists
//! vector types in the order of a hash set.

use std::collections::HashMap;

/// Renumbers temporaries in order of appearance and sorts the leading type definitions.
pub(super) fn stable_source(source: &str) -> String {
    renumber(&sort_definitions(source))
}

const TEMPORARY: &str = "_tmp_";

fn renumber(source: &str) -> String {
    let mut numbers = HashMap::new();
    let mut stable = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find(TEMPORARY) {
        let (before, after) = rest.split_at(at + TEMPORARY.len());
        stable.push_str(before);
        let digits = after.len() - after.trim_start_matches(|digit: char| digit.is_ascii_digit()).len();
        let (number, after) = after.split_at(digits);
        if !number.is_empty() {
            let next = numbers.len();
            stable.push_str(&numbers.entry(number).or_insert(next).to_string());
        }
        rest = after;
    }
    stable.push_str(rest);
    stable
}

/// A definition is `struct __align__(…) name { … };` before the kernel; definitions that stand together are sorted.
fn sort_definitions(source: &str) -> String {
    let mut lines = Vec::new();
    let mut definitions: Vec<Vec<&str>> = Vec::new();
    let mut open = false;
    for line in source.lines() {
        if line.starts_with("struct __align__") {
            definitions.push(Vec::new());
            open = true;
        }
        match definitions.last_mut() {
            Some(definition) if open => {
                definition.push(line);
                open = !line.contains("};");
            }
            Some(_) if line.trim().is_empty() => {}
            _ => {
                definitions.sort();
                lines.extend(definitions.drain(..).flatten());
                lines.push(line);
            }
        }
    }
    definitions.sort();
    lines.extend(definitions.into_iter().flatten());
    let mut text = lines.join("\n");
    text.push('\n');
    text
}
