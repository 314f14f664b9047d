//! What is known of an adapter, without the adapter: what plans are made for.

use super::Prices;
use serde::Serialize;

/// What is worth knowing about an adapter, as `wgrad devices` and `run.json` show it.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterReport {
    pub name: String,
    pub backend: String,
    /// Where the device sits, as `domain:bus:device.function`; `None` where the driver does not tell.
    pub pci_bus_id: Option<String>,
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
    pub shader_int64: bool,
    /// Side of the square matrices of 16-bit floats that a subgroup multiplies and adds up as floats, 8 or
    /// 16; `None` without such, or with shapes that WGSL cannot say.
    pub cooperative_matrix: Option<u32>,
    /// 32-bit registers that an invocation has before kernels spill: what the hardware has of NVIDIA, elsewhere what
    /// Mesa gives it on AMD.
    #[serde(skip)]
    pub registers: usize,
    /// What operations cost there, for choosing among tiles: assumed unless [`crate::tune::priced`] says otherwise.
    #[serde(skip)]
    pub prices: Prices,
}

impl AdapterReport {
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
            pci_bus_id: None,
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
            shader_f16: true,
            shader_int64: false,
            cooperative_matrix: (!software).then_some(16),
            registers: 128,
            prices: Prices::assumed(software),
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

    /// The shape of its cooperative matrices, for people.
    pub fn matrices(&self) -> String {
        match self.cooperative_matrix {
            Some(side) => format!("{side}×{side}"),
            None => "none".into(),
        }
    }

    /// Bytes that a kernel can be given in one buffer.
    pub fn binding_limit(&self) -> u64 {
        self.max_storage_binding_bytes.min(self.max_buffer_bytes)
    }
}
