//! Whether memory grows.

/// MiB that this process has in memory; 0 where the system doesn't say.
pub(crate) fn resident() -> f64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|text| text.split_whitespace().nth(1)?.parse::<f64>().ok());
    pages.unwrap_or(0.0) * 4096.0 / f64::from(1 << 20)
}

/// The last third of the samples has no more than the second by a tenth and 32 MiB: what allocators keep moves by that.
pub(crate) fn must_be_flat(samples: &[f64]) {
    let third = samples.len() / 3;
    let mean = |samples: &[f64]| samples.iter().sum::<f64>() / samples.len().max(1) as f64;
    let [first, second, last] = [0, third, 2 * third].map(|from| mean(&samples[from..from + third]));
    println!("memory by thirds: {first:.0}, {second:.0}, {last:.0} MiB");
    assert!(last <= second * 1.1 + 32.0, "memory grows: {first:.0}, {second:.0}, {last:.0} MiB");
}
