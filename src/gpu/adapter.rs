//! Which adapters there are, what they can do, and which one a request means.

use crate::error::{Error, Result};
use serde::Serialize;

/// Vulkan, Metal and DX12. Never GL: it has no subgroups, and wgpu would pick it silently where
/// Vulkan is missing.
const BACKENDS: wgpu::Backends = wgpu::Backends::VULKAN
    .union(wgpu::Backends::METAL)
    .union(wgpu::Backends::DX12);

/// What helps where no adapter is found.
pub const NO_ADAPTER_HINT: &str = "install a Vulkan driver (Debian/Ubuntu: apt install mesa-vulkan-drivers; Fedora: dnf install mesa-vulkan-drivers; Arch: pacman -S vulkan-swrast)";

/// Which adapter is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The best hardware adapter, then a software adapter.
    Auto,
    /// The best hardware adapter, or nothing.
    Hardware,
    /// The adapters whose name contains this text, case ignored; the best of them.
    Name(String),
}

/// What is worth knowing about an adapter, as `wgrad devices` and `run.json` show it.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterReport {
    pub name: String,
    pub backend: String,
    pub driver: String,
    /// "discrete GPU", "integrated GPU", "virtual GPU", "software" or "other".
    pub kind: &'static str,
    pub software: bool,
    /// Smallest and largest subgroup; `None` without subgroup operations in compute shaders.
    pub subgroup_size: Option<[u32; 2]>,
    pub max_storage_binding_bytes: u64,
    pub max_buffer_bytes: u64,
    pub max_workgroup_storage_bytes: u32,
    pub max_workgroup_invocations: u32,
    pub max_workgroups_per_dimension: u32,
    pub storage_offset_alignment: u32,
    pub timestamp_query: bool,
    pub shader_f16: bool,
}

impl AdapterReport {
    fn of(adapter: &wgpu::Adapter) -> Self {
        let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
        let kind = match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete GPU",
            wgpu::DeviceType::IntegratedGpu => "integrated GPU",
            wgpu::DeviceType::VirtualGpu => "virtual GPU",
            wgpu::DeviceType::Cpu => "software",
            wgpu::DeviceType::Other => "other",
        };
        AdapterReport {
            name: info.name,
            backend: format!("{:?}", info.backend),
            driver: [info.driver, info.driver_info]
                .into_iter()
                .filter(|s| !s.is_empty())
                .collect::<Vec<_>>()
                .join(" "),
            kind,
            software: info.device_type == wgpu::DeviceType::Cpu,
            subgroup_size: features
                .contains(wgpu::Features::SUBGROUP)
                .then_some([info.subgroup_min_size, info.subgroup_max_size]),
            max_storage_binding_bytes: limits.max_storage_buffer_binding_size,
            max_buffer_bytes: limits.max_buffer_size,
            max_workgroup_storage_bytes: limits.max_compute_workgroup_storage_size,
            max_workgroup_invocations: limits.max_compute_invocations_per_workgroup,
            max_workgroups_per_dimension: limits.max_compute_workgroups_per_dimension,
            storage_offset_alignment: limits.min_storage_buffer_offset_alignment,
            timestamp_query: features.contains(wgpu::Features::TIMESTAMP_QUERY),
            shader_f16: features.contains(wgpu::Features::SHADER_F16),
        }
    }

    /// An adapter that is not there, to plan for: a software adapter like Mesa's, or a typical GPU.
    pub fn imagined(software: bool) -> Self {
        AdapterReport {
            name: if software {
                "a software adapter"
            } else {
                "a GPU"
            }
            .into(),
            backend: "Vulkan".into(),
            driver: "none".into(),
            kind: if software { "software" } else { "discrete GPU" },
            software,
            subgroup_size: Some(if software { [8, 8] } else { [32, 32] }),
            max_storage_binding_bytes: 128 << 20,
            max_buffer_bytes: 1 << 30,
            max_workgroup_storage_bytes: 32 << 10,
            max_workgroup_invocations: 1024,
            max_workgroups_per_dimension: 65_535,
            storage_offset_alignment: 256,
            timestamp_query: true,
            shader_f16: false,
        }
    }

    /// One line for people: name, backend, driver, software or hardware.
    pub fn line(&self) -> String {
        format!(
            "{} ({}, {}, {})",
            self.name,
            self.backend,
            self.driver,
            if self.software {
                "software"
            } else {
                "hardware"
            }
        )
    }

    /// Order of preference: discrete before integrated before virtual before software.
    fn rank(&self) -> u8 {
        match self.kind {
            "discrete GPU" => 0,
            "integrated GPU" => 1,
            "virtual GPU" => 2,
            "other" => 3,
            _ => 4,
        }
    }
}

fn enumerate() -> Vec<(wgpu::Adapter, AdapterReport)> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = BACKENDS;
    descriptor.flags = wgpu::InstanceFlags::default().with_env();
    let instance = wgpu::Instance::new(descriptor);
    let mut found: Vec<_> = pollster::block_on(instance.enumerate_adapters(BACKENDS))
        .into_iter()
        .filter(|a| {
            a.get_downlevel_capabilities()
                .flags
                .contains(wgpu::DownlevelFlags::COMPUTE_SHADERS)
        })
        .map(|a| {
            let report = AdapterReport::of(&a);
            (a, report)
        })
        .collect();
    // A stable sort: among equals the order of the driver stays.
    found.sort_by_key(|(_, report)| report.rank());
    found
}

/// Every usable adapter, best first: the first one is what [`Choice::Auto`] takes.
pub fn adapters() -> Vec<AdapterReport> {
    enumerate().into_iter().map(|(_, report)| report).collect()
}

/// The adapter that `choice` means.
///
/// # Errors
/// [`Error::NoAdapter`] when there is none at all (with the package that helps), and
/// [`Error::Usage`] when there are adapters but none fits (with their names).
pub fn choose(choice: &Choice) -> Result<(wgpu::Adapter, AdapterReport)> {
    let found = enumerate();
    if found.is_empty() {
        return Err(Error::NoAdapter(format!(
            "expected a Vulkan, Metal or DX12 adapter, found none; {NO_ADAPTER_HINT}, or use --device cpu"
        )));
    }
    let names = found
        .iter()
        .map(|(_, r)| format!("'{}' ({})", r.name, r.kind))
        .collect::<Vec<_>>()
        .join(", ");
    let fits = |report: &AdapterReport| match choice {
        Choice::Auto => true,
        Choice::Hardware => !report.software,
        Choice::Name(name) => report.name.to_lowercase().contains(&name.to_lowercase()),
    };
    found.into_iter().find(|(_, r)| fits(r)).ok_or_else(|| {
        Error::Usage(match choice {
            Choice::Name(name) => format!(
                "expected --device auto, gpu, cpu or part of an adapter's name, found '{name}'; there is {names}"
            ),
            _ => format!(
                "expected a hardware adapter, found only {names}; use --device auto to accept a software adapter"
            ),
        })
    })
}
