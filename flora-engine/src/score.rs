//! How likely tokens were: log-probabilities of a row of logits.

use crate::request::ScoredToken;
use crate::sample::{LogitsError, largest};

/// `token` by a row of logits `[vocabulary]`, with the `alternatives` likeliest: ln softmax, summed in f64.
pub(crate) fn score(logits: &[f32], token: u32, alternatives: u32) -> Result<ScoredToken, LogitsError> {
    let (_, most) = largest(logits)?;
    let above = |logit: f32| f64::from(logit) - f64::from(most);
    let log_sum = logits.iter().map(|logit| above(*logit).exp()).sum::<f64>().ln();
    let log_probability = |logit: f32| (above(logit) - log_sum) as f32;
    let own = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let likeliest = likeliest(logits, alternatives as usize);
    Ok(ScoredToken {
        token,
        log_probability: log_probability(own),
        // Vocabularies are counted in u32.
        likeliest: likeliest.into_iter().map(|token| (token as u32, log_probability(logits[token]))).collect(),
    })
}

/// The positions of the `count` largest, the largest first and of equal ones the first.
fn likeliest(logits: &[f32], count: usize) -> Vec<usize> {
    if count == 0 {
        return Vec::new();
    }
    let larger = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    let mut order: Vec<usize> = (0..logits.len()).collect();
    if count < order.len() {
        order.select_nth_unstable_by(count, larger);
        order.truncate(count);
    }
    order.sort_unstable_by(larger);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let logits = [0.5f32, -1.25, 3.0, 3.0, f32::NEG_INFINITY];
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        for (token, logit) in logits.into_iter().enumerate() {
            let scored = score(&logits, token as u32, 3).expect("finite logits");
            let expected = f64::from(logit) - sum.ln();
            let near = (f64::from(scored.log_probability) - expected).abs() < 1e-6;
            assert!(near || scored.log_probability == f32::NEG_INFINITY && token == 4, "{scored:?}");
            let tokens: Vec<u32> = scored.likeliest.iter().map(|(token, _)| *token).collect();
            assert_eq!(tokens, [2, 3, 0], "of equal ones the first");
        }
        // The same number wherever it is told, so that whoever compares finds the likeliest.
        let scored = score(&logits, 2, 1).expect("finite logits");
        assert_eq!(scored.log_probability.to_bits(), scored.likeliest[0].1.to_bits());
    }

    #[test]
    fn large_logits_and_many_alternatives_are_taken() {
        let scored = score(&[f32::MAX, -f32::MAX, f32::MAX], 0, 100).expect("finite logits");
        assert!((scored.log_probability + 2f32.ln()).abs() < 1e-6);
        assert_eq!(scored.likeliest.len(), 3);
        assert_eq!(score(&[0.0, f32::NAN], 0, 0), Err(LogitsError::NotANumber(1)));
        assert_eq!(score(&[], 0, 0), Err(LogitsError::Nothing));
    }
}
