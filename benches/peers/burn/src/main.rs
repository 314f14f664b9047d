//! Burn: times training steps of one workload and prints one line of JSON.
//!
//!     burn-bench tutorial|lenet5|vgg-cifar wgpu|vulkan|flex
#![recursion_limit = "256"]

#[path = "../../measure.rs"]
mod measure;

use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::pool::{MaxPool2d, MaxPool2dConfig};
use burn::nn::{Linear, LinearConfig, PaddingConfig2d};
use burn::optim::momentum::MomentumConfig;
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn::tensor::activation::relu;
use measure::{LEARNING_RATE, MOMENTUM, Workload};

#[derive(Module, Debug)]
struct Net {
    convs: Vec<Conv2d>,
    convs_per_pool: usize,
    pool: MaxPool2d,
    dense: Vec<Linear>,
}

impl Net {
    fn new(workload: &Workload, device: &Device) -> Self {
        let conv = |&[c_in, c_out, kernel, p]: &[usize; 4]| {
            Conv2dConfig::new([c_in, c_out], [kernel, kernel])
                .with_padding(PaddingConfig2d::Explicit(p, p, p, p))
                .init(device)
        };
        let dense =
            |&[inputs, outputs]: &[usize; 2]| LinearConfig::new(inputs, outputs).init(device);
        Net {
            convs: workload.convs.iter().map(conv).collect(),
            convs_per_pool: workload.convs_per_pool,
            pool: MaxPool2dConfig::new([2, 2]).init(),
            dense: workload.dense.iter().map(dense).collect(),
        }
    }

    fn forward(&self, mut x: Tensor<4>) -> Tensor<2> {
        for (i, conv) in self.convs.iter().enumerate() {
            x = relu(conv.forward(x));
            if (i + 1) % self.convs_per_pool == 0 {
                x = self.pool.forward(x);
            }
        }
        let mut x: Tensor<2> = x.flatten(1, 3);
        for (i, dense) in self.dense.iter().enumerate() {
            x = dense.forward(x);
            if i + 1 < self.dense.len() {
                x = relu(x);
            }
        }
        x
    }
}

fn sgd() -> ModuleOptimizer {
    // Burn dampens by 0.1 unless told otherwise; the others do not.
    let momentum = MomentumConfig::new()
        .with_momentum(MOMENTUM)
        .with_dampening(0.0);
    SgdConfig::new().with_momentum(Some(momentum)).init()
}

fn step(
    net: Net,
    sgd: &mut ModuleOptimizer,
    images: Tensor<4>,
    labels: Tensor<1, Int>,
) -> (Net, Tensor<1>) {
    let logits = net.forward(images);
    let loss = CrossEntropyLossConfig::new()
        .init(&logits.device())
        .forward(logits, labels);
    let gradients = loss.backward();
    let gradients = GradientsParams::from_grads(gradients, &net);
    let net = sgd.step(LEARNING_RATE, net, gradients);
    (net, loss)
}

fn device(backend: &str) -> Device {
    match backend {
        "wgpu" => Device::wgpu(burn::tensor::DeviceKind::DefaultDevice),
        #[cfg(feature = "vulkan")]
        "vulkan" => Device::vulkan(burn::tensor::DeviceKind::DefaultDevice),
        "flex" => Device::flex(),
        _ => {
            eprintln!(
                "error: expected wgpu, flex, or vulkan (when built with that feature) as the \
                 second argument, found '{backend}'"
            );
            std::process::exit(2)
        }
    }
}

fn main() {
    let workload = Workload::from_args();
    let backend = std::env::args().nth(2).unwrap_or_default();
    let base = device(&backend);
    base.seed(0);
    let name = base
        .identity()
        .map_or("CPU".to_string(), |identity| identity.name);
    let device = base.autodiff();

    let [channels, height, width] = workload.image;
    let mut batches = Vec::new();
    for (images, labels) in workload.batches() {
        let labels: Vec<i32> = labels.into_iter().map(|label| label as i32).collect();
        let shape = [workload.batch, channels, height, width];
        batches.push((
            Tensor::<4>::from_data(TensorData::new(images, shape), &device),
            Tensor::<1, Int>::from_data(TensorData::new(labels, [workload.batch]), &device),
        ));
    }
    let mut net = Some(Net::new(workload, &device));
    let mut sgd = sgd();

    let mut batch = batches.iter().cycle();
    let mut last_loss = None;
    let timing = workload.measure(|steps| {
        for (images, labels) in batch.by_ref().take(steps) {
            let before = net.take().expect("put back below");
            let (after, loss) = step(before, &mut sgd, images.clone(), labels.clone());
            net = Some(after);
            last_loss = Some(loss);
        }
        device.sync()
    });
    let timing = timing.expect("every step runs");
    let last_loss: f32 = last_loss.expect("at least one step").into_scalar();
    workload.report(["burn", "0.22.1", &backend, &name], timing, last_loss);
}
