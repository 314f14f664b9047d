//! How a model is trained by default: optimiser, learning-rate schedule, epochs, batch size.
//!
//! Pure numbers without a device: the update rules themselves are `shaders/optimizer.wgsl` and
//! their CPU twins.

use super::augment::Augment;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Update rule and its constants.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum Optimizer {
    /// SGD with momentum and L2 weight decay as in `torch.optim.SGD`:
    /// `g += weight_decay·w; v = momentum·v + g; w −= lr·v`, with Nesterov's momentum
    /// `w −= lr·(g + momentum·v)`.
    Sgd {
        /// From 0 to below 1.
        momentum: f32,
        /// Nesterov's form of it.
        #[serde(default)]
        nesterov: bool,
        /// L2, at least 0.
        weight_decay: f32,
    },
    /// Adam with decoupled weight decay (Loshchilov & Hutter, 2019), as in `torch.optim.AdamW`.
    Adamw {
        /// Share that the first moment keeps of itself.
        beta1: f32,
        /// Share that the second moment keeps of itself.
        beta2: f32,
        /// Added to the root of the second moment.
        epsilon: f32,
        /// At least 0.
        weight_decay: f32,
    },
    /// The sign of a momentum, with decoupled weight decay (Chen et al., 2023, arXiv 2302.06675):
    /// `w = w·(1 − lr·weight_decay) − lr·sign(beta1·m + (1 − beta1)·g); m = beta2·m + (1 − beta2)·g`.
    Lion {
        /// Share of the momentum in the step.
        beta1: f32,
        /// Share that the momentum keeps of itself.
        beta2: f32,
        /// At least 0.
        weight_decay: f32,
    },
    /// Momentum, orthogonalised, for the weights of convolutions that are not grouped (Jordan, 2024,
    /// as in the airbench94_muon of arXiv 2404.00498); SGD with Nesterov's momentum for all else.
    Muon {
        /// Of the convolutions' weights: `v = momentum·v + g`, and orthogonalised is `g + momentum·v`.
        momentum: f32,
        /// L2 weight decay of all else; the norm of a convolution's weight is kept at √OC instead.
        weight_decay: f32,
        /// Learning rate of all else where the recipe's is at its peak.
        other_lr: f32,
        /// Momentum of all else.
        other_momentum: f32,
    },
}

impl Optimizer {
    /// Number of state vectors (each as long as the parameters) that the rule keeps.
    pub fn state_vectors(&self) -> usize {
        match self {
            Optimizer::Sgd { .. } | Optimizer::Lion { .. } | Optimizer::Muon { .. } => 1,
            Optimizer::Adamw { .. } => 2,
        }
    }

    /// The rule by which it updates what is updated element by element.
    pub fn elementwise(&self) -> Optimizer {
        match *self {
            Optimizer::Muon {
                weight_decay,
                other_momentum,
                ..
            } => Optimizer::Sgd {
                momentum: other_momentum,
                nesterov: true,
                weight_decay,
            },
            rule => rule,
        }
    }

    /// What one update needs besides parameters and gradients, for update number `step` (from 1).
    pub fn step_scalars(&self, lr: f64, step: u64) -> StepScalars {
        let (bias1, bias2) = match *self {
            Optimizer::Sgd { .. } | Optimizer::Lion { .. } | Optimizer::Muon { .. } => (1.0, 1.0),
            Optimizer::Adamw { beta1, beta2, .. } => (
                1.0 - f64::from(beta1).powf(step as f64),
                1.0 - f64::from(beta2).powf(step as f64),
            ),
        };
        StepScalars {
            lr: lr as f32,
            bias_correction1: bias1 as f32,
            bias_correction2: bias2 as f32,
        }
    }
}

/// The numbers of an update that change from step to step. Computed once on the host in f64, so
/// that GPU and CPU use the very same ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepScalars {
    /// Learning rate.
    pub lr: f32,
    /// `1 − beta1^step` (AdamW; 1 for the others).
    pub bias_correction1: f32,
    /// `1 − beta2^step` (AdamW; 1 for the others).
    pub bias_correction2: f32,
}

/// How the learning rate moves over the training, or over what a warm-up leaves of it. `rate` is the
/// recipe's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// The same rate at every step.
    Constant,
    /// The rate times `factor` from the end of each of these epochs on, which count from the start of
    /// the training and rise (`torch.optim.lr_scheduler.MultiStepLR`).
    Step {
        /// Rising, from 1.
        epochs: Vec<usize>,
        /// Above 0.
        factor: f32,
    },
    /// Half a cosine from the rate to 0 (Loshchilov & Hutter, 2017, without restarts).
    Cosine,
    /// Cosine up from rate/25 over the first 30 % of the steps, cosine down to rate/250,000 over
    /// the rest (Smith & Topin, 2018; the constants of `torch.optim.lr_scheduler.OneCycleLR`).
    OneCycle,
    /// A straight line up from 0 to the rate at this share of the steps, another down to 0 (Smith,
    /// 2017, for one cycle).
    Triangular {
        /// From 0 to 1.
        peak_at: f32,
    },
    /// A straight line from the rate to 0.
    Linear,
}

impl Schedule {
    /// As recipes call it.
    pub fn name(&self) -> &'static str {
        match self {
            Schedule::Constant => "constant",
            Schedule::Step { .. } => "step",
            Schedule::Cosine => "cosine",
            Schedule::OneCycle => "onecycle",
            Schedule::Triangular { .. } => "triangular",
            Schedule::Linear => "linear",
        }
    }

    /// Learning rate of update number `step` (from 0) out of `total`, with peak or base rate `lr`;
    /// [`Schedule::Step`], which counts epochs, as if there were one.
    pub fn lr_at(&self, lr: f64, step: u64, total: u64) -> f64 {
        let cosine = |from: f64, to: f64, t: f64| {
            to + (from - to) * (1.0 + (std::f64::consts::PI * t.clamp(0.0, 1.0)).cos()) / 2.0
        };
        let (step, total) = (step as f64, total.max(1) as f64);
        match self {
            Schedule::Constant | Schedule::Step { .. } => lr,
            Schedule::Cosine => cosine(lr, 0.0, step / total),
            Schedule::OneCycle => {
                let start = lr / 25.0;
                let peak = 0.3 * total - 1.0;
                if step <= peak {
                    cosine(start, lr, step / peak.max(1.0))
                } else {
                    // The second phase is 0.7 · total long, so there is no division by 0.
                    cosine(lr, start / 1e4, (step - peak) / (total - 1.0 - peak))
                }
            }
            Schedule::Triangular { peak_at } => {
                // The ends of the lines, of rate 0, lie one step before the first and one behind the
                // last, so that no step is for nothing.
                let (at, end) = (step + 1.0, total + 1.0);
                let peak = f64::from(*peak_at) * end;
                if at < peak {
                    lr * at / peak
                } else {
                    lr * (end - at) / (end - peak)
                }
            }
            Schedule::Linear => lr * (1.0 - step / total).max(0.0),
        }
    }
}

/// In which proportion the classes of an epoch come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sampler {
    /// Every training image once.
    #[default]
    Shuffle,
    /// As many images as there are, of every class the same share: images of a rare class several
    /// times, of a frequent one some of them only.
    Balanced,
}

/// What a sample of each class counts in softmax cross-entropy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClassWeights {
    /// `samples / (classes · samples of the class)`, as in scikit-learn's `class_weight="balanced"`.
    Balanced,
    /// One for each class, above 0.
    #[serde(untagged)]
    Given(Vec<f32>),
}

/// How the parameters of one role or place are trained differently from the rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Groups {
    /// Factor on the learning rate of biases and of what normalisations shift and scale by.
    pub bias_lr: f32,
    /// Factor on the learning rate of the last layer's weight.
    pub head_lr: f32,
    /// Factor on the weight decay of biases and of what normalisations shift and scale by; 0 for none. A rule
    /// multiplies its decay by the learning rate, so that `1 / bias_lr` lets them shrink as weights do.
    pub bias_decay: f32,
    /// Parameters that are not trained: their names (`conv2d1.weight`) or a layer's (`conv2d1`), with
    /// `*` for anything. They keep their bits; the running statistics of a frozen normalisation go on, as in
    /// PyTorch's train mode.
    pub freeze: Vec<String>,
}

impl Default for Groups {
    fn default() -> Groups {
        Groups {
            bias_lr: 1.0,
            head_lr: 1.0,
            bias_decay: 1.0,
            freeze: Vec::new(),
        }
    }
}

/// In which views an image is shown for an evaluation; its logits are the views' weighted mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Views {
    /// As it is.
    #[default]
    One,
    /// And mirrored.
    Mirror,
    /// Both, and both moved by a pixel up and left and by a pixel down and right, with half the weight
    /// (Jordan, 2024, arXiv 2404.00498).
    Six,
}

impl Views {
    /// How many there are.
    pub fn count(self) -> usize {
        match self {
            Views::One => 1,
            Views::Mirror => 2,
            Views::Six => 6,
        }
    }
}

impl fmt::Display for Views {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Views::One => "one",
            Views::Mirror => "mirror",
            Views::Six => "six",
        })
    }
}

/// `one`, `mirror` or `six`.
impl FromStr for Views {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "one" => Ok(Views::One),
            "mirror" => Ok(Views::Mirror),
            "six" => Ok(Views::Six),
            _ => Err(format!("expected one, mirror or six, found '{text}'")),
        }
    }
}

/// What activations, their gradients and the weights' working copies are stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit floats; sums, statistics, the loss and the parameters themselves stay 32-bit ones, and the loss is
    /// scaled so that small gradients do not vanish (Micikevicius et al., 2018, "Mixed Precision Training").
    Mixed,
}

impl Precision {
    fn is_default(&self) -> bool {
        *self == Precision::default()
    }
}

/// `f32` or `mixed`.
impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f32" => Ok(Precision::F32),
            "mixed" => Ok(Precision::Mixed),
            _ => Err(format!("expected f32 or mixed, found '{text}'")),
        }
    }
}

/// How several processes exchange the gradients of their shards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exchanged {
    /// By the tree over all shards: the bits depend on the shards alone.
    #[default]
    Exact,
    /// What a process has is added up before: fewer bytes, and bits that depend on the number of processes.
    Fast,
    /// As `Fast`, in 16-bit floats: half the bytes of that. What rounding leaves out is added the next time; a resume
    /// begins with nothing left out.
    Half,
}

impl Exchanged {
    fn is_default(&self) -> bool {
        *self == Exchanged::default()
    }
}

/// How a model is trained. An architecture file brings one along, a recipe file may replace it, and
/// flags override its values one by one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// The update rule.
    pub optimizer: Optimizer,
    /// Learning rate per step, the highest of the schedule.
    pub lr: f64,
    /// How it moves.
    pub schedule: Schedule,
    /// Epochs in which the learning rate rises from 0 to what the schedule says.
    #[serde(default)]
    pub warm_up: f64,
    /// Passes over the training images.
    pub epochs: usize,
    /// Images per optimiser step.
    pub batch_size: usize,
    /// Samples that are computed at a time, at most, where a batch is too large for the device; their
    /// gradients are added up. The same as the whole batch to rounding, but that a batch-norm takes its
    /// statistics of each part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<usize>,
    /// Into how many shards a batch is cut; each is computed by itself, a batch-norm takes its statistics of each,
    /// and they are added up by a fixed tree, so that the bits do not depend on which process computes which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shards: Option<usize>,
    /// Whether a batch-norm takes its statistics of all shards of a batch together; without shards it does.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sync_batch_norm: bool,
    /// How the processes exchange what their shards gave.
    #[serde(default, skip_serializing_if = "Exchanged::is_default")]
    pub exchange: Exchanged,
    /// Parameters that are trained in another way.
    #[serde(default)]
    pub groups: Groups,
    /// Largest L2 norm of all gradients together; a larger one is scaled down to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f32>,
    /// Share that an exponential moving average of the parameters keeps of itself in each step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average: Option<f32>,
    /// How often an epoch takes an image.
    #[serde(default)]
    pub sampler: Sampler,
    /// What happens to an image before the network sees it.
    #[serde(default)]
    pub augment: Augment,
    /// What activations are stored as.
    #[serde(default, skip_serializing_if = "Precision::is_default")]
    pub precision: Precision,
    /// Views of an image that an evaluation takes the mean over.
    #[serde(default)]
    pub views: Views,
    /// Epochs without a better accuracy on the validation split after which training ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience: Option<usize>,
    /// How much of the target of softmax cross-entropy is spread over all classes, from 0 to below 1.
    #[serde(default)]
    pub label_smoothing: f32,
    /// What a sample of each class counts in softmax cross-entropy, above 0; 1 without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class_weights: Option<ClassWeights>,
}

impl Recipe {
    /// Samples that are computed at a time: a batch, or a part of it.
    pub fn step_batch(&self) -> usize {
        let most = self.batch_size.max(1);
        match (self.shards, self.micro_batch) {
            (Some(shards), _) => most.div_ceil(shards.clamp(1, most)),
            (None, Some(micro)) => micro.clamp(1, most),
            (None, None) => self.batch_size,
        }
    }

    /// In how many parts a batch of `count` samples is computed.
    pub fn parts(&self, count: usize) -> usize {
        match self.shards {
            Some(shards) => shards.min(count),
            None => count.div_ceil(self.step_batch()),
        }
    }

    /// The share that the average keeps of itself in update number `step` (from 0): less in the first ones,
    /// so that it forgets the start, as `tf.train.ExponentialMovingAverage` has it with `num_updates`. 0
    /// without an average.
    pub fn average_at(&self, step: u64) -> f32 {
        let warm = (1.0 + step as f64) / (10.0 + step as f64);
        self.average.map_or(0.0, |share| share.min(warm as f32))
    }
}

impl Default for Recipe {
    /// Plain SGD with momentum for one epoch, and nothing besides.
    fn default() -> Recipe {
        Recipe {
            optimizer: Optimizer::Sgd {
                momentum: 0.9,
                nesterov: false,
                weight_decay: 0.0,
            },
            lr: 0.05,
            schedule: Schedule::Constant,
            warm_up: 0.0,
            epochs: 1,
            batch_size: 128,
            micro_batch: None,
            shards: None,
            sync_batch_norm: false,
            exchange: Exchanged::Exact,
            groups: Groups::default(),
            clip_norm: None,
            average: None,
            sampler: Sampler::Shuffle,
            augment: Augment::default(),
            precision: Precision::F32,
            views: Views::One,
            patience: None,
            label_smoothing: 0.0,
            class_weights: None,
        }
    }
}

impl Recipe {
    /// Learning rate of update number `step` (from 0), where an epoch has `per_epoch` updates. The first
    /// `warm_up` epochs, w steps in all, lead from 0 (a step before the training) straight to the
    /// schedule's first rate: step i of them takes (i + 1)/(w + 1) of it, as
    /// `torch.optim.lr_scheduler.LinearLR` does from a factor of 1/(w + 1). The schedule spans the steps
    /// that are left.
    pub fn lr_at(&self, step: u64, per_epoch: usize) -> f64 {
        let total = (per_epoch * self.epochs) as u64;
        let warm = ((self.warm_up * per_epoch as f64).round() as u64).min(total);
        let rate = |step: u64| match &self.schedule {
            Schedule::Step { epochs, factor } => {
                let epoch = step / per_epoch.max(1) as u64;
                let drops = epochs.iter().filter(|e| **e as u64 <= epoch).count();
                self.lr * f64::from(*factor).powi(drops as i32)
            }
            schedule => schedule.lr_at(self.lr, step - warm, total - warm),
        };
        if step < warm {
            rate(warm) * (step + 1) as f64 / (warm + 1) as f64
        } else {
            rate(step)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand from the phases of `torch.optim.lr_scheduler.OneCycleLR`, which end at steps
    /// `0.3·total − 1` and `total − 1`, with max_lr 1: a run of few steps has no first phase.
    #[test]
    fn one_cycle_of_few_steps_is_that_of_pytorch() {
        let (end, pi) = (1.0 / 25.0 / 1e4, std::f64::consts::PI);
        let second = |t: f64| end + (1.0 - end) / 2.0 * (1.0 + (pi * t).cos());
        let rates = |total| (0..total).map(move |i| Schedule::OneCycle.lr_at(1.0, i, total));
        let expected: [&[f64]; 4] = [
            &[end],
            &[second(0.4 / 1.4), end],
            &[second(0.1 / 2.1), second(1.1 / 2.1), end],
            &[1.0 / 25.0, second(0.8 / 2.8), second(1.8 / 2.8), end],
        ];
        for (total, expected) in (1..).zip(expected) {
            for (step, (found, expected)) in rates(total).zip(expected).enumerate() {
                let error = (found - expected).abs();
                assert!(
                    error < 1e-12,
                    "step {step} of {total}: {found}, not {expected}"
                );
            }
        }
    }

    fn rates(schedule: Schedule, warm_up: f64, per_epoch: usize, epochs: usize) -> Vec<f64> {
        let recipe = Recipe {
            lr: 1.0,
            schedule,
            warm_up,
            epochs,
            ..Recipe::default()
        };
        let steps = (per_epoch * epochs) as u64;
        (0..steps).map(|i| recipe.lr_at(i, per_epoch)).collect()
    }

    fn expect(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
            let error = (found - expected).abs();
            assert!(error < 1e-7, "step {step}: {found}, not {expected}");
        }
    }

    /// By torch.optim.lr_scheduler of PyTorch 2.15 with a rate of 1, printed before each step.
    #[test]
    #[rustfmt::skip]
    fn schedules_are_those_of_pytorch() {
        let step = |epochs: &[usize], factor| Schedule::Step { epochs: epochs.into(), factor };
        // MultiStepLR(milestones=[4, 12], gamma=0.1), epochs of 4 steps
        expect(&rates(step(&[1, 3], 0.1), 0.0, 4, 4), &[
            1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01,
        ]);
        // LinearLR(start_factor=1, end_factor=0, total_iters=10)
        expect(&rates(Schedule::Linear, 0.0, 5, 2), &[
            1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1,
        ]);
        // CosineAnnealingLR(T_max=10)
        expect(&rates(Schedule::Cosine, 0.0, 10, 1), &[
            1.0, 0.9755282581475768, 0.9045084971874737, 0.7938926261462366, 0.6545084971874737,
            0.5, 0.34549150281252633, 0.2061073738537635, 0.09549150281252633, 0.024471741852423234,
        ]);
        // CyclicLR(base_lr=0, max_lr=1, step_size_up=3, step_size_down=7), without the zeros at its ends
        expect(&rates(Schedule::Triangular { peak_at: 0.3 }, 0.0, 9, 1), &[
            0.3333333333, 0.6666666667, 1.0, 0.8571428571, 0.7142857143, 0.5714285714, 0.4285714286,
            0.2857142857, 0.1428571429,
        ]);
        assert_eq!(rates(Schedule::Constant, 0.0, 3, 1), [1.0; 3]);
    }

    /// Likewise, the warm-up by a LinearLR(start_factor=1/(w + 1), total_iters=w) for w steps.
    #[test]
    #[rustfmt::skip]
    fn a_warm_up_leads_to_the_schedule_s_first_rate() {
        // ChainedScheduler with MultiStepLR(milestones=[8, 12], gamma=0.5): its epochs are not put off.
        let step = Schedule::Step { epochs: vec![2, 3], factor: 0.5 };
        expect(&rates(step, 1.5, 4, 4), &[
            1.0 / 7.0, 2.0 / 7.0, 3.0 / 7.0, 4.0 / 7.0, 5.0 / 7.0, 6.0 / 7.0, 1.0, 1.0,
            0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25,
        ]);
        // SequentialLR with CosineAnnealingLR(T_max=8) after 4 steps
        expect(&rates(Schedule::Cosine, 1.0, 4, 3), &[
            0.2, 0.4, 0.6, 0.8, 1.0, 0.9619397662556434, 0.8535533905932737, 0.6913417161825449,
            0.5, 0.30865828381745514, 0.14644660940672627, 0.03806023374435664,
        ]);
        // With OneCycleLR(total_steps=10) after 2 steps, up to the 25th part that it begins with.
        let found = rates(Schedule::OneCycle, 1.0, 2, 6);
        expect(&found[..11], &[
            0.04 / 3.0, 0.08 / 3.0, 0.04, 0.52, 1.0, 0.9504846320134737, 0.8117456539497631,
            0.6112620219362893, 0.38874197806371075, 0.18825834605023697, 0.049519367986526286,
        ]);
        // Without one, the very bits of the schedule by itself.
        let alone: Vec<f64> = (0..12).map(|i| Schedule::OneCycle.lr_at(1.0, i, 12)).collect();
        assert_eq!(rates(Schedule::OneCycle, 0.0, 2, 6), alone);
        // All of the training.
        expect(&rates(Schedule::Constant, 1.0, 3, 1), &[0.25, 0.5, 0.75]);
    }

    #[test]
    fn a_schedule_is_written_as_it_was_read() {
        for (schedule, text) in [
            (Schedule::Constant, r#""constant""#),
            (Schedule::Cosine, r#""cosine""#),
            (Schedule::OneCycle, r#""onecycle""#),
            (Schedule::Linear, r#""linear""#),
            (
                Schedule::Triangular { peak_at: 0.25 },
                r#"{"triangular":{"peak_at":0.25}}"#,
            ),
            (
                Schedule::Step {
                    epochs: vec![3, 5],
                    factor: 0.5,
                },
                r#"{"step":{"epochs":[3,5],"factor":0.5}}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&schedule).unwrap(), text);
            assert_eq!(serde_json::from_str::<Schedule>(text).unwrap(), schedule);
        }
    }
}
