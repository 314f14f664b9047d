//! What `--device` means.

use std::sync::Arc;
use wgrad::gpu::{AdapterReport, Choice, GPU_HINT, Gpu, adapters};
use wgrad::model::Model;
use wgrad::model::recipe::Recipe;
use wgrad::network::{Network, Options};
use wgrad::train::{CpuEngine, Engine};
use wgrad::{Error, Result};

/// Why `auto` takes the CPU, and what would give a GPU; `None` where it takes an adapter.
pub fn cpu_notice(adapters: &[AdapterReport]) -> Option<String> {
    match adapters.first() {
        Some(best) if !best.software => None,
        Some(best) => Some(format!(
            "no hardware adapter found ({} is software, slower than the CPU path), so the CPU does the work; {GPU_HINT}; --device software runs the shaders all the same",
            best.name
        )),
        None => Some(format!(
            "no Vulkan, Metal or DX12 adapter found, so the CPU does the work; {GPU_HINT}"
        )),
    }
}

pub enum Device {
    Gpu(Arc<Gpu>),
    Cpu {
        /// Why, when the CPU was not asked for.
        notice: Option<String>,
    },
}

impl Device {
    /// Opens the device that `requested` means: auto (the best hardware adapter, else the CPU, which
    /// is faster than a software adapter), gpu, software, cpu, or an adapter's number or part of its
    /// name.
    pub fn open(requested: &str) -> Result<Device> {
        let choice = match requested {
            "cpu" => return Ok(Device::Cpu { notice: None }),
            "auto" => match cpu_notice(&adapters()?) {
                Some(notice) => {
                    return Ok(Device::Cpu {
                        notice: Some(notice),
                    });
                }
                None => Choice::Hardware,
            },
            "gpu" => Choice::Hardware,
            "software" => Choice::Software,
            // One or two digits are a number, "4090" is part of a name.
            other => match other.parse() {
                Ok(number) if other.len() < 3 => Choice::Number(number),
                _ => Choice::Name(other.into()),
            },
        };
        Ok(Device::Gpu(Arc::new(Gpu::open(&choice)?)))
    }

    /// Opens what `requested` means as [`Device::open`] does, and without a request the best adapter
    /// there is, for commands that examine the shaders.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where there is none.
    pub fn open_adapter(requested: Option<&str>) -> Result<Device> {
        match requested {
            Some(requested) => Device::open(requested),
            None => Ok(Device::Gpu(Arc::new(Gpu::open(&Choice::Best)?))),
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
