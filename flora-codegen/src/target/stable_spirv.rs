//! The same disassembly for the same kernel: cubecl declares types, constants, variables and decorations in the order of hash
//! tables, and numbers them so. Here they are numbered and listed as the function body first uses them.

use std::collections::HashMap;

/// A disassembled module, numbered by use.
pub(super) fn stable_spirv(source: &str) -> String {
    let lines: Vec<&str> = source.lines().collect();
    let is_global = |line: &&str| line.starts_with('%') || line.starts_with("OpTypeForwardPointer");
    let body = lines.iter().position(|line| line.contains("OpFunction ")).unwrap_or(lines.len());
    let head = lines[..body].iter().position(is_global).unwrap_or(body);
    let mut numbering = Numbering::default();
    for line in &lines[head..body] {
        if let Some((id, _)) = line.split_once(" = ") {
            numbering.declarations.insert(id.trim(), line);
        }
    }
    let mut function: Vec<String> = Vec::new();
    let mut phis: Vec<&str> = Vec::new();
    for line in lines[body..].iter().chain([&""]) {
        if line.contains(" = OpPhi ") {
            phis.push(line);
            continue;
        }
        // Ids inside the function are no accident, so they put a block's phis in order.
        phis.sort_by_key(|line| number(line.split_once(" = ").map_or("", |(id, _)| id)));
        function.extend(phis.drain(..).map(|phi| numbering.rewrite(phi)));
        function.push(numbering.rewrite(line));
    }
    function.pop();
    // What the function doesn't use, in the order of what names it.
    let mut declared: Vec<String> = lines[..head].iter().map(|line| numbering.rewrite(line)).collect();
    for line in &lines[head..body] {
        numbering.rewrite(line);
    }
    for line in declared.iter_mut().filter(|line| line.starts_with("OpEntryPoint")) {
        sort_interface(line);
    }
    let mut decorations: Vec<usize> = (0..declared.len()).filter(|at| declared[*at].contains("Decorate ")).collect();
    let places = decorations.clone();
    decorations.sort_by(|one, other| {
        let key = |at: usize| (number(declared[at].split('%').nth(1).unwrap_or("")), &declared[at]);
        key(*one).cmp(&key(*other))
    });
    let sorted: Vec<String> = decorations.iter().map(|at| declared[*at].clone()).collect();
    for (place, line) in places.into_iter().zip(sorted) {
        declared[place] = line;
    }
    let mut text = [declared, numbering.globals, function].concat().join("\n");
    text.push('\n');
    text
}

/// Ids by use.
#[derive(Default)]
struct Numbering<'a> {
    /// Global declarations by the id that they declare.
    declarations: HashMap<&'a str, &'a str>,
    numbers: HashMap<String, usize>,
    /// The declarations, in the order of their numbers.
    globals: Vec<String>,
}

impl Numbering<'_> {
    /// The line with its ids numbered; declarations of ids that it is the first to use are listed.
    fn rewrite(&mut self, line: &str) -> String {
        let mut out = String::with_capacity(line.len());
        let mut rest = line;
        while let Some(at) = rest.find('%') {
            let digits = rest[at + 1..].find(|letter: char| !letter.is_ascii_digit());
            let end = digits.map_or(rest.len(), |digits| at + 1 + digits);
            out.push_str(&rest[..at]);
            out.push_str(&format!("%{}", self.number(&rest[at..end])));
            rest = &rest[end..];
        }
        out + rest
    }

    fn number(&mut self, id: &str) -> usize {
        if let Some(number) = self.numbers.get(id) {
            return *number;
        }
        // Types and constants are built of others, which come first; removing the declaration ends a cycle.
        let declaration = self.declarations.remove(id).and_then(|line| line.split_once(" = "));
        let declaration = declaration.map(|(_, operation)| self.rewrite(operation));
        let number = self.numbers.len() + 1;
        self.numbers.insert(id.to_owned(), number);
        if let Some(operation) = declaration {
            self.globals.push(format!("%{number} = {operation}"));
        }
        number
    }
}

fn number(id: &str) -> u64 {
    let digits = id.trim_start_matches(|letter: char| !letter.is_ascii_digit());
    let end = digits.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().unwrap_or(0)
}

/// `OpEntryPoint GLCompute %1 "name" %3 %2 …`
fn sort_interface(line: &mut String) {
    let Some((head, interface)) = line.rsplit_once('"') else { return };
    let mut interface: Vec<&str> = interface.split_whitespace().collect();
    interface.sort_by_key(|id| number(id));
    *line = format!("{head}\" {}", interface.join(" "));
}

#[cfg(test)]
mod tests {
    use super::stable_spirv;

    #[test]
    fn order_and_numbers_of_declarations_dont_matter() {
        let one = "OpEntryPoint GLCompute %9 \"name\" %4 %3\nOpDecorate %4 BuiltIn WorkgroupId\nOpDecorate %3 Binding 0\n\
                   %1 = OpTypeFloat 32\n%2 = OpConstant  %1  4.0\n%3 = OpVariable  %1  Input\n%4 = OpVariable  %1  Input\n\
                   %9 = OpFunction  %1\n%20 = OpPhi  %1  %2\n%21 = OpPhi  %1  %3\n%22 = OpLoad %1 %4\n";
        let other = "OpEntryPoint GLCompute %9 \"name\" %7 %8\nOpDecorate %8 Binding 0\nOpDecorate %7 BuiltIn WorkgroupId\n\
                     %7 = OpVariable  %5  Input\n%5 = OpTypeFloat 32\n%8 = OpVariable  %5  Input\n%6 = OpConstant  %5  4.0\n\
                     %9 = OpFunction  %5\n%21 = OpPhi  %5  %8\n%20 = OpPhi  %5  %6\n%22 = OpLoad %5 %7\n";
        assert_eq!(stable_spirv(one), stable_spirv(other));
        assert!(stable_spirv(one).contains("%4 = OpConstant  %2  4.0"), "{}", stable_spirv(one));
    }
}
