//! What `--device` means.

use std::sync::Arc;
use wgrad::gpu::{Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::model::Model;
use wgrad::model::recipe::Recipe;
use wgrad::network::{Network, Options};
use wgrad::train::{CpuEngine, Engine};
use wgrad::{Error, Result};

pub enum Device {
    Gpu(Arc<Gpu>),
    Cpu {
        /// Why, when the CPU was not asked for.
        notice: Option<String>,
    },
}

impl Device {
    /// Opens the device that `requested` means: auto, gpu, cpu, or part of an adapter's name.
    pub fn open(requested: &str) -> Result<Device> {
        let choice = match requested {
            "cpu" => return Ok(Device::Cpu { notice: None }),
            "auto" => Choice::Auto,
            "gpu" => Choice::Hardware,
            name => Choice::Name(name.into()),
        };
        match Gpu::open(&choice) {
            Ok(gpu) => Ok(Device::Gpu(Arc::new(gpu))),
            Err(Error::NoAdapter(_)) if choice == Choice::Auto => Ok(Device::Cpu {
                notice: Some(format!(
                    "no Vulkan, Metal or DX12 adapter found, so the CPU does the work; {NO_ADAPTER_HINT}"
                )),
            }),
            Err(e) => Err(e),
        }
    }

    /// The GPU, if it is one.
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        match self {
            Device::Gpu(gpu) => Some(gpu),
            Device::Cpu { .. } => None,
        }
    }

    /// The line to print where the CPU stands in for an adapter.
    pub fn notice(&self) -> Option<&str> {
        match self {
            Device::Cpu { notice } => notice.as_deref(),
            Device::Gpu(_) => None,
        }
    }

    /// The device in one line, for people.
    pub fn description(&self) -> String {
        match self {
            Device::Gpu(gpu) => gpu.report().line(),
            Device::Cpu { .. } => "CPU".into(),
        }
    }

    /// # Errors
    /// [`Error::Usage`] for kernel options on the CPU, which has no kernels to choose.
    pub fn expect_kernels(&self, options: &Options) -> Result<()> {
        match self {
            Device::Cpu { .. } if options.family.is_some() || options.explicit_conv => {
                Err(Error::Usage(
                    "expected a GPU for --kernels and --conv explicit, found the CPU; leave them out or choose another --device".into(),
                ))
            }
            _ => Ok(()),
        }
    }

    /// A network on the device.
    ///
    /// # Errors
    /// As [`Device::expect_kernels`], or what the device reports.
    pub fn engine(
        &self,
        model: &Model,
        recipe: &Recipe,
        options: &Options,
    ) -> Result<Box<dyn Engine>> {
        self.expect_kernels(options)?;
        let (batch, optimizer) = (recipe.batch_size, &recipe.optimizer);
        Ok(match self {
            Device::Gpu(gpu) => {
                Box::new(Network::new(gpu.clone(), model, batch, optimizer, options)?)
            }
            Device::Cpu { .. } => Box::new(CpuEngine::new(model, batch, optimizer)),
        })
    }
}
