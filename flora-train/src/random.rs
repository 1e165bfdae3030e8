//! Random numbers that follow from a job's seed and from what they are for, not from what was drawn before: a job that is resumed, or
//! whose neighbours come and go, draws the same ones.

/// A generator for one purpose.
pub(crate) fn generator(seed: u64, purpose: &str, index: u64) -> fastrand::Rng {
    // FNV-1a over the purpose, then the finaliser of SplitMix64 over all three.
    let hash = purpose
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let mut mixed = seed;
    for part in [hash, index] {
        mixed = mixed.wrapping_add(part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
    }
    fastrand::Rng::with_seed(mixed)
}

/// A normal number of mean 0 and deviation 1, by Box and Muller.
pub(crate) fn normal(generator: &mut fastrand::Rng) -> f64 {
    // (0, 1]: its logarithm is finite.
    let radius = (-2.0 * (1.0 - generator.f64()).ln()).sqrt();
    radius * (std::f64::consts::TAU * generator.f64()).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn purposes_seeds_and_indices_have_generators_of_their_own() {
        let first = |seed, purpose, index| generator(seed, purpose, index).u64(..);
        assert_eq!(first(1, "a", 0), first(1, "a", 0));
        let all = [first(1, "a", 0), first(2, "a", 0), first(1, "b", 0), first(1, "a", 1), first(0, "", 0)];
        let mut once = all.to_vec();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), all.len());
    }

    #[test]
    fn normal_numbers_have_mean_0_and_deviation_1() {
        let mut generator = generator(3, "normal", 0);
        let numbers: Vec<f64> = (0..10_000).map(|_| normal(&mut generator)).collect();
        let mean = numbers.iter().sum::<f64>() / 1e4;
        let square = numbers.iter().map(|number| number * number).sum::<f64>() / 1e4;
        // Five standard deviations of the mean, and of the mean square.
        assert!(mean.abs() < 0.05 && (square - 1.0).abs() < 0.071, "{mean} {square}");
        assert!(numbers.iter().all(|number| number.is_finite()));
    }
}
