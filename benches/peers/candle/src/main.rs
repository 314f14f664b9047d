//! candle on the CPU: times training steps of one workload and prints one line of JSON.
//!
//!     candle-bench tutorial|lenet5|vgg-cifar

#[path = "../../measure.rs"]
mod measure;

use candle_core::{DType, Device, Result, Tensor, Var, utils};
use candle_nn::{Conv2d, Conv2dConfig, Linear, Module, VarBuilder, VarMap, conv2d, linear, loss};
use measure::{LEARNING_RATE, MOMENTUM, Workload};

struct Net {
    convs: Vec<Conv2d>,
    convs_per_pool: usize,
    dense: Vec<Linear>,
}

impl Net {
    fn new(workload: &Workload, vb: VarBuilder) -> Result<Self> {
        let conv = |(i, &[c_in, c_out, kernel, padding]): (usize, &[usize; 4])| {
            let config = Conv2dConfig {
                padding,
                ..Default::default()
            };
            conv2d(c_in, c_out, kernel, config, vb.pp(format!("conv{i}")))
        };
        let dense = |(i, &[inputs, outputs]): (usize, &[usize; 2])| {
            linear(inputs, outputs, vb.pp(format!("dense{i}")))
        };
        Ok(Net {
            convs: workload
                .convs
                .iter()
                .enumerate()
                .map(conv)
                .collect::<Result<_>>()?,
            convs_per_pool: workload.convs_per_pool,
            dense: workload
                .dense
                .iter()
                .enumerate()
                .map(dense)
                .collect::<Result<_>>()?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, conv) in self.convs.iter().enumerate() {
            x = conv.forward(&x)?.relu()?;
            if (i + 1) % self.convs_per_pool == 0 {
                x = x.max_pool2d(2)?;
            }
        }
        x = x.flatten_from(1)?;
        for (i, dense) in self.dense.iter().enumerate() {
            x = dense.forward(&x)?;
            if i + 1 < self.dense.len() {
                x = x.relu()?;
            }
        }
        Ok(x)
    }
}

/// SGD with momentum, kept by tensor operations: `candle_nn::SGD` has none.
struct Sgd(Vec<(Var, Option<Tensor>)>);

impl Sgd {
    fn step(&mut self, loss: &Tensor) -> Result<()> {
        let gradients = loss.backward()?;
        for (var, velocity) in &mut self.0 {
            let gradient = gradients.get(var).expect("every parameter has a gradient");
            let next = match velocity {
                None => gradient.clone(),
                Some(velocity) => (velocity.affine(MOMENTUM, 0.0)? + gradient)?,
            }
            .detach();
            var.set(&var.sub(&next.affine(LEARNING_RATE, 0.0)?)?)?;
            *velocity = Some(next);
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let workload = Workload::from_args();
    let [channels, height, width] = workload.image;
    let mut batches = Vec::new();
    for (images, labels) in workload.batches() {
        let shape = (workload.batch, channels, height, width);
        batches.push((
            Tensor::from_vec(images, shape, &Device::Cpu)?,
            Tensor::from_vec(labels, workload.batch, &Device::Cpu)?,
        ));
    }
    let vars = VarMap::new();
    let net = Net::new(
        workload,
        VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu),
    )?;
    let mut sgd = Sgd(vars.all_vars().into_iter().map(|var| (var, None)).collect());

    let mut batch = batches.iter().cycle();
    let mut last_loss = f32::NAN;
    let timing = workload.measure(|steps| {
        for (images, labels) in batch.by_ref().take(steps) {
            let loss = loss::cross_entropy(&net.forward(images)?, labels)?;
            sgd.step(&loss)?;
            last_loss = loss.to_scalar()?;
        }
        Result::Ok(())
    })?;
    let device = format!("{} CPU threads", utils::get_num_threads());
    workload.report(["candle", "0.11.1", "cpu", &device], timing, last_loss);
    Ok(())
}
