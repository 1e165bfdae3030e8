//! Reads from a kernel's text what a launch of it needs: the threads of a block and the dynamic shared memory.

use std::sync::LazyLock;

use regex::Regex;

use super::pattern;

/// The threads of a block that the kernel is bound to (`__launch_bounds__`), which PTX gives along three dimensions.
pub(super) fn threads(ptx: &str) -> Option<u32> {
    static THREADS: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?m)^\s*\.maxntid\s+([\d\s,]+)$"));
    let found = THREADS.captures(ptx)?;
    found[1].split(',').try_fold(1u32, |product, extent| product.checked_mul(extent.trim().parse().ok()?))
}

/// Bytes of dynamic shared memory; `None` when there is some and the source doesn't say how much.
///
/// Generated sources lay all shared memory out in one dynamic array. Each part has its size in a comment and its offset
/// in the line below; what a launch must give is where the last part ends.
pub(super) fn dynamic_shared_bytes(source: &str) -> Option<u32> {
    static DECLARED: LazyLock<Regex> = LazyLock::new(|| pattern(r"\bextern\s+__shared__\b"));
    static MENTIONED: LazyLock<Regex> = LazyLock::new(|| pattern(r"\bdynamic_shared_mem\[\d"));
    static PART: LazyLock<Regex> = LazyLock::new(|| {
        pattern(r"// Shared (?:array size: \d+, |value size: )(\d+) bytes[ \t\r]*\n[^\n]*\bdynamic_shared_mem\[(\d+)\]")
    });
    if !DECLARED.is_match(source) {
        return Some(0);
    }
    let parts: Vec<_> = PART.captures_iter(source).collect();
    if parts.is_empty() || parts.len() != MENTIONED.find_iter(source).count() {
        return None;
    }
    let end = |size: &str, offset: &str| offset.parse::<u32>().ok()?.checked_add(size.parse().ok()?);
    parts.iter().try_fold(0, |most: u32, part| Some(most.max(end(&part[1], &part[2])?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_the_product_of_the_extents() {
        assert_eq!(threads(".visible .entry k(\n)\n.maxntid 32, 4, 2\n.minnctapersm 2\n{"), Some(256));
        assert_eq!(threads(".maxntid 96\n"), Some(96));
        assert_eq!(threads(".visible .entry k()\n{"), None);
        assert_eq!(threads(".maxntid 4294967295, 2, 1\n"), None);
    }

    #[test]
    fn dynamic_shared_memory_ends_where_its_last_part_does() {
        let declared = "extern __shared__ __align__(16) uint8 dynamic_shared_mem[];\n";
        let array = |length: u32, size: u64, offset: u64| {
            format!(
                "// Shared array size: {length}, {size} bytes\nfloat *a = reinterpret_cast<float*>(&dynamic_shared_mem[{offset}]);\n"
            )
        };
        let value = "// Shared value size: 4 bytes\nfloat &b = reinterpret_cast<float&>(dynamic_shared_mem[5000]);\n";
        // Two parts may share their bytes, and the last one need not end last.
        let several = format!("{declared}{}{}{}", array(1024, 4096, 0), array(512, 4096, 4096), array(1, 4, 4096));
        assert_eq!(dynamic_shared_bytes(&several), Some(8192));
        assert_eq!(dynamic_shared_bytes(&format!("{declared}{}{value}", array(1, 4, 0))), Some(5004));
        assert_eq!(dynamic_shared_bytes("__shared__ float a[4];"), Some(0));
        // Where a part isn't understood, no figure is better than one that is too small.
        assert_eq!(dynamic_shared_bytes(declared), None);
        assert_eq!(dynamic_shared_bytes("extern __shared__ float4 mine[];"), None);
        assert_eq!(dynamic_shared_bytes(&format!("{declared}{}p = &dynamic_shared_mem[64];", array(1, 4, 0))), None);
        assert_eq!(dynamic_shared_bytes(&format!("{declared}{}", array(1, 4_294_967_295, 4))), None);
    }
}
