//! AdamW, as PyTorch has it: decoupled weight decay, moments that are corrected for their start at 0, and clipping by the norm of
//! all gradients.
//!
//! It is written here and not taken from Burn, whose optimizers work on Burn's tensors: forty lines over slices keep Burn out of every
//! build that trains, and a job's numbers in f32 as they are saved. Arithmetic is f64, rounded once into each f32 that is kept.

use serde::{Deserialize, Serialize};

/// What an optimizer does with gradients; the learning rate comes from a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    /// How much of the mean of gradients a step keeps.
    pub beta1: f64,
    /// How much of the mean of their squares it keeps.
    pub beta2: f64,
    /// Added to the root of that.
    pub epsilon: f64,
    /// The part of a parameter that a step of rate 1 takes away.
    pub weight_decay: f64,
}

impl Default for AdamW {
    /// PyTorch's, without weight decay, as transformers has it.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// The means of one tensor's gradients and of their squares.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    /// Of the gradients.
    pub first: Vec<f32>,
    /// Of their squares.
    pub second: Vec<f32>,
}

impl Moments {
    /// Before the first step of a tensor of `length` numbers.
    pub fn zeros(length: usize) -> Self {
        Self { first: vec![0.0; length], second: vec![0.0; length] }
    }
}

impl AdamW {
    /// One step: `step` counts from 1. `gradient` is multiplied by `scale` first.
    pub fn update(
        &self,
        step: u64,
        rate: f64,
        parameters: &mut [f32],
        gradient: &[f64],
        scale: f64,
        moments: &mut Moments,
    ) {
        let power = i32::try_from(step).unwrap_or(i32::MAX);
        let (first_correction, second_correction) =
            (1.0 - self.beta1.powi(power), (1.0 - self.beta2.powi(power)).sqrt());
        let means = moments.first.iter_mut().zip(&mut moments.second);
        for ((parameter, gradient), (first, second)) in parameters.iter_mut().zip(gradient).zip(means) {
            let gradient = gradient * scale;
            let decayed = f64::from(*parameter) * (1.0 - rate * self.weight_decay);
            let mean = f64::from(*first) + (gradient - f64::from(*first)) * (1.0 - self.beta1);
            let square = f64::from(*second) * self.beta2 + gradient * gradient * (1.0 - self.beta2);
            let root = square.sqrt() / second_correction + self.epsilon;
            *parameter = (decayed - rate / first_correction * mean / root) as f32;
            (*first, *second) = (mean as f32, square as f32);
        }
    }
}

/// The Euclidean norm of all gradients together.
pub fn global_norm<'a>(gradients: impl IntoIterator<Item = &'a [f64]>) -> f64 {
    gradients.into_iter().flatten().map(|gradient| gradient * gradient).sum::<f64>().sqrt()
}

/// What gradients of this norm are multiplied by so that theirs is at most `limit`: PyTorch's `clip_grad_norm_`.
pub fn clipping(norm: f64, limit: Option<f64>) -> f64 {
    limit.map_or(1.0, |limit| (limit / (norm + 1e-6)).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three steps of torch 2.9.1 in f64 from (1, −2, 0.5, 0), clipped to a norm of 2.5, with rates 0.1, 0.05 and 0.2.
    #[test]
    fn steps_are_those_of_pytorch() {
        let optimizer = AdamW { beta1: 0.8, beta2: 0.95, epsilon: 1e-3, weight_decay: 0.3 };
        let expected: [[f64; 4]; 3] = [
            [0.8700480509303391, -1.9335158446300666, 0.485, -0.09992794091702113],
            [0.8198431005316139, -1.9432091473396556, 0.5161572718615588, -0.08023524832732519],
            [0.6618336716248716, -1.987212776857211, 0.5927829960173887, -0.022148388041307927],
        ];
        let gradients = [[3.0, -1e-4, 0.0, 2.0], [0.5, 1.0, -0.25, -4.0], [1e-3, 1e3, 2.0, 0.125]];
        let norms = [3.60555127685074, 4.16082924427331, 1000.0020078109843];
        let mut parameters = [1.0f32, -2.0, 0.5, 0.0];
        let mut moments = Moments::zeros(4);
        for (index, gradient) in gradients.iter().enumerate() {
            let norm = global_norm([&gradient[..2], &gradient[2..]]);
            assert!((norm / norms[index] - 1.0).abs() < 1e-14, "{norm}");
            let scale = clipping(norm, Some(2.5));
            let rate = [0.1, 0.05, 0.2][index];
            optimizer.update(index as u64 + 1, rate, &mut parameters, gradient, scale, &mut moments);
            for (parameter, expected) in parameters.iter().zip(expected[index]) {
                // Parameters and moments are rounded to f32 at each step; a moment's error moves a parameter by the rate at most.
                let bound = 4.0 * (index + 1) as f64 * 2f64.powi(-24) * (1.0 + expected.abs());
                assert!((f64::from(*parameter) - expected).abs() < bound, "step {index}: {parameter}, not {expected}");
            }
        }
        assert_eq!(clipping(1e9, None), 1.0);
        assert_eq!(clipping(1.0, Some(2.0)), 1.0);
    }
}
