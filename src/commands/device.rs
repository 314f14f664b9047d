//! What `--device` means.

use super::progress::Pulse;
use std::sync::Arc;
use wgrad::engine::{self, CpuEngine, Engine};
use wgrad::gpu::{AdapterReport, Choice, Fault, GPU_HINT, Gpu, adapters};
use wgrad::host::{self, available_memory};
use wgrad::model::Model;
use wgrad::model::recipe::Recipe;
use wgrad::plan::{self, Options};
use wgrad::{Error, Result, verify};

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
        Device::open_choice(&choice)
    }

    /// Opens what `requested` means as [`Device::open`] does, and without a request the best adapter
    /// there is, for commands that examine the shaders.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where there is none.
    pub fn open_adapter(requested: Option<&str>) -> Result<Device> {
        match requested {
            Some(requested) => Device::open(requested),
            None => Device::open_choice(&Choice::Best),
        }
    }

    fn open_choice(choice: &Choice) -> Result<Device> {
        let gpu = Gpu::open(choice)?;
        // The tests of this program have to see it fail.
        let injected = std::env::var("WGRAD_INJECT").ok();
        if let Some((fault, after)) = injected.and_then(|text| Fault::parse(&text)) {
            gpu.inject(fault, after);
        }
        Ok(Device::Gpu(Arc::new(gpu)))
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

    /// Holds a few kernels against the CPU, where there are kernels.
    ///
    /// # Errors
    /// As [`verify::quick`].
    pub fn check(&self, options: &Options) -> Result<()> {
        match self {
            Device::Gpu(gpu) => {
                let _pulse = Pulse::compiling(gpu);
                verify::quick(gpu, options.family, options.precision)
            }
            Device::Cpu { .. } => Ok(()),
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

    /// # Errors
    /// [`Error::Usage`] for a batch that cannot be, or a training that takes more of the machine's own
    /// memory than is free: the system would stop the program in the middle.
    pub fn expect_memory(&self, model: &Model, recipe: &Recipe, options: &Options) -> Result<()> {
        let optimizer = &recipe.optimizer;
        let batch = recipe.step_batch();
        plan::expect_batch(model, batch, options)?;
        let available = available_memory();
        host::expect_memory(
            batch,
            options.micro,
            available,
            |batch| options.batch_advice(batch),
            |batch| match self {
                Device::Cpu { .. } => CpuEngine::memory(model, batch, optimizer, options),
                Device::Gpu(gpu) => {
                    // A checkpoint passes through: parameters and state, and the bytes of the file.
                    let kept = 1 + optimizer.state_vectors() + usize::from(options.average);
                    let vectors = 2 * kept;
                    let checkpoint = 4 * (vectors * model.parameter_elements) as u64;
                    let rows = match gpu.report().software {
                        true => engine::memory(model, batch, optimizer, options, gpu.report())?,
                        false => Vec::new(),
                    };
                    Ok(checkpoint + rows.iter().map(|(_, bytes)| bytes).sum::<u64>())
                }
            },
        )
    }

    /// A network on the device.
    ///
    /// # Errors
    /// As [`Device::expect_kernels`] and [`Device::expect_memory`], or what the device reports.
    pub fn engine(&self, model: &Model, recipe: &Recipe, options: &Options) -> Result<Engine> {
        self.expect_kernels(options)?;
        self.expect_memory(model, recipe, options)?;
        let (batch, optimizer) = (recipe.step_batch(), &recipe.optimizer);
        let _pulse = self.gpu().map(Pulse::compiling);
        Engine::new(self.gpu().cloned(), model, batch, optimizer, options)
    }
}
