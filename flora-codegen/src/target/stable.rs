//! The same text for the same kernel, in CUDA C++ and WGSL. cubecl's text has four accidents: CUDA's temporaries are numbered
//! by a counter that all compilations share; vector types, variables and the places of shared arrays come in the order of hash
//! tables. For SPIR-V see [`super::stable_spirv`].
//!
//! What is changed changes no instruction: names, the order of declarations, and which shared array lies where.

use std::collections::HashMap;

/// CUDA text with its accidents in a fixed order; other text without any comes out as it went in.
pub(super) fn stable_source(source: &str) -> String {
    let lines: Vec<&str> = source.lines().collect();
    let lines = sort_blocks(lines, type_definition, |block| block.join("\n"));
    let lines = sort_blocks(lines, variable, |block| variable_number(block[0]));
    renumber_temporaries(&place_shared_arrays(lines))
}

/// Sorts runs of blocks by `key`. `block` gives the number of lines of the block that starts a slice, or `None`; blank lines
/// inside a run are dropped.
fn sort_blocks<'a, K: Ord>(
    lines: Vec<&'a str>,
    block: impl Fn(&[&'a str]) -> Option<usize>,
    key: impl Fn(&[&'a str]) -> K,
) -> Vec<&'a str> {
    let mut sorted = Vec::with_capacity(lines.len());
    let mut run: Vec<&[&str]> = Vec::new();
    let mut rest = &lines[..];
    while let Some(first) = rest.first() {
        if let Some(length) = block(rest) {
            let (own, after) = rest.split_at(length);
            run.push(own);
            rest = after;
            continue;
        }
        if run.is_empty() || !first.trim().is_empty() {
            run.sort_by_key(|block| key(block));
            sorted.extend(run.drain(..).flatten().copied());
            sorted.push(first);
        }
        rest = &rest[1..];
    }
    run.sort_by_key(|block| key(block));
    sorted.extend(run.into_iter().flatten().copied());
    sorted
}

/// `struct __align__(16) name {` … `};`
fn type_definition(lines: &[&str]) -> Option<usize> {
    lines.first()?.starts_with("struct __align__").then_some(())?;
    Some(lines.iter().position(|line| line.contains("};"))? + 1)
}

/// What names of variables start with, after the blank before them.
const VARIABLES: [&str; 4] = [" l_mut_", " l_arr_", " a_", " shared_memory_"];

/// `type l_mut_1;`, `type l_arr_1[4];`, `var l_mut_1: type;`, `var a_1: array<…>;`, `var<workgroup> shared_memory_1: array<…>;`
fn variable(lines: &[&str]) -> Option<usize> {
    let line = lines.first()?;
    let (_, name) = line.split_once(' ')?;
    let named = VARIABLES.iter().any(|prefix| name.starts_with(&prefix[1..]));
    (named && name.ends_with(';') && !name.contains('=')).then_some(1)
}

/// The number in a variable's name; that of a vector type before it is none.
fn variable_number(line: &str) -> u64 {
    let name = VARIABLES.into_iter().find_map(|prefix| line.split_once(prefix)).map_or("", |(_, rest)| rest);
    number_after(name, "")
}

/// The first number that directly follows `prefix`.
fn number_after(line: &str, prefix: &str) -> u64 {
    let mut places = line.match_indices(prefix).map(|(at, _)| &line[at + prefix.len()..]);
    let number = places.find(|rest| rest.starts_with(|letter: char| letter.is_ascii_digit())).unwrap_or_default();
    let end = number.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(number.len());
    number[..end].parse().unwrap_or(0)
}

/// A shared array is a comment with its size and a pointer into the block's memory.
const SHARED_SIZE: &str = "// Shared array size: ";
const SHARED_PLACE: &str = "&dynamic_shared_mem[";

/// Bytes that every array starts at a multiple of.
const SHARED_ALIGNMENT: u64 = 128;

/// Puts shared arrays in the order of their numbers, one after the other. cubecl lays arrays that are never alive together over
/// each other, and which ones is chance; here they have places of their own, so that a launch may take less shared memory than
/// the text says, never more.
fn place_shared_arrays(lines: Vec<&str>) -> Vec<String> {
    let block = |lines: &[&str]| {
        let sized = lines.first()?.starts_with(SHARED_SIZE) && lines.get(1)?.contains(SHARED_PLACE);
        sized.then_some(2)
    };
    let lines = sort_blocks(lines, block, |block| number_after(block[1], "shared_memory_"));
    let arrays: Vec<(usize, u64, u64)> = (1..lines.len())
        .filter(|at| lines[at - 1].starts_with(SHARED_SIZE) && lines[*at].contains(SHARED_PLACE))
        .map(|at| (at, number_after(lines[at - 1], ", "), number_after(lines[at], SHARED_PLACE)))
        .collect();
    let mut placed: Vec<String> = lines.into_iter().map(str::to_owned).collect();
    let mut next = 0u64;
    for (at, size, place) in arrays {
        placed[at] = placed[at].replace(&format!("{SHARED_PLACE}{place}]"), &format!("{SHARED_PLACE}{next}]"));
        // As far apart as the most demanding array is aligned.
        next = (next + size).next_multiple_of(SHARED_ALIGNMENT);
    }
    placed
}

/// Bytes of shared memory that a launch of such a text has to ask for: to where its last array ends, which is more than cubecl asks for
/// where arrays shared a place. `None` where something else lies there too.
pub(crate) fn shared_bytes(source: &str) -> Option<u32> {
    let lines: Vec<_> = source.lines().collect();
    let arrays = lines.windows(2).filter(|pair| pair[0].starts_with(SHARED_SIZE) && pair[1].contains(SHARED_PLACE));
    let ends: Vec<_> = arrays.map(|pair| number_after(pair[0], ", ") + number_after(pair[1], SHARED_PLACE)).collect();
    let places = lines.iter().filter(|line| line.contains(&SHARED_PLACE[1..]) && !line.starts_with("extern ")).count();
    if places != ends.len() {
        return None;
    }
    u32::try_from(ends.into_iter().max().unwrap_or(0)).ok()
}

const TEMPORARY: &str = "_tmp_";

/// Numbers temporaries in order of appearance.
fn renumber_temporaries(lines: &[String]) -> String {
    let mut numbers = HashMap::new();
    let mut stable = String::new();
    for line in lines {
        let mut rest = line.as_str();
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
        stable.push('\n');
    }
    stable
}

#[cfg(test)]
mod tests {
    use super::{shared_bytes, stable_source};

    #[test]
    fn accidents_are_put_in_order() {
        let one = "struct __align__(8) b {\n  x;\n};\nstruct __align__(8) a {\n  x;\n};\nfloat_8 l_mut_10;\n\n__half_8 l_mut_9;\n\
                   // Shared array size: 4, 16 bytes\nfloat *shared_memory_1 = cast(&dynamic_shared_mem[0]);\n\
                   // Shared array size: 8, 32 bytes\nfloat *shared_memory_0 = cast(&dynamic_shared_mem[16]);\n\
                   a _tmp_7 = _tmp_9 + _tmp_7;\n";
        let expected = "struct __align__(8) a {\n  x;\n};\nstruct __align__(8) b {\n  x;\n};\n__half_8 l_mut_9;\nfloat_8 l_mut_10;\n\
                        // Shared array size: 8, 32 bytes\nfloat *shared_memory_0 = cast(&dynamic_shared_mem[0]);\n\
                        // Shared array size: 4, 16 bytes\nfloat *shared_memory_1 = cast(&dynamic_shared_mem[128]);\n\
                        a _tmp_0 = _tmp_1 + _tmp_0;\n";
        assert_eq!(stable_source(one), expected);
        assert_eq!(stable_source(expected), expected);
        assert_eq!((shared_bytes(one), shared_bytes(expected)), (Some(48), Some(144)));
        assert_eq!(shared_bytes("int a;"), Some(0));
        assert_eq!(shared_bytes(&format!("{one}float &v = cast(dynamic_shared_mem[48]);\n")), None);
    }

    #[test]
    fn wgsl_variables_are_sorted() {
        let one = "var<workgroup> shared_memory_1: array<f32, 4>;\n\nvar<workgroup> shared_memory_0: array<f32, 4>;\n\n\
                   fn f() {\nvar a_19: array<f32, 16>;\n\nvar l_mut_20: u32;\nvar l_mut_5: vec4<f32>;\n";
        let expected = "var<workgroup> shared_memory_0: array<f32, 4>;\nvar<workgroup> shared_memory_1: array<f32, 4>;\n\
                        fn f() {\nvar l_mut_5: vec4<f32>;\nvar a_19: array<f32, 16>;\nvar l_mut_20: u32;\n";
        assert_eq!(stable_source(one), expected);
    }

    #[test]
    fn arrays_that_share_a_place_get_their_own() {
        let source = "// Shared array size: 4, 16 bytes\nfloat *shared_memory_0 = cast(&dynamic_shared_mem[0]);\n\
                      // Shared array size: 4, 16 bytes\nfloat *shared_memory_1 = cast(&dynamic_shared_mem[0]);\n";
        let expected = source.replacen("mem[0]", "mem[128]", 2).replacen("mem[128]", "mem[0]", 1);
        assert_eq!(stable_source(source), expected);
        assert_eq!(stable_source(&expected), expected);
    }
}
