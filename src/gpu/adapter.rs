//! Which adapters there are, what they can do, and which one a request means.

use crate::error::{Error, Result};
use crate::kernels::{AdapterReport, Prices};

/// Vulkan, Metal and DX12. Never GL: it has no subgroups, and wgpu would pick it silently where
/// Vulkan is missing.
const BACKENDS: wgpu::Backends = wgpu::Backends::VULKAN
    .union(wgpu::Backends::METAL)
    .union(wgpu::Backends::DX12);

/// The number of a vendor of PCI devices.
const NVIDIA: u32 = 0x10de;

/// What gives an adapter for a GPU that the machine has.
pub const GPU_HINT: &str = "where there is a GPU, install its Vulkan driver (AMD, Intel: mesa-vulkan-drivers, on Arch vulkan-radeon or vulkan-intel; NVIDIA: NVIDIA's own driver)";

/// What gives an adapter on any machine.
pub const NO_ADAPTER_HINT: &str = "install a Vulkan driver (Debian/Ubuntu: apt install mesa-vulkan-drivers; Fedora: dnf install mesa-vulkan-drivers; Arch: pacman -S vulkan-swrast; NVIDIA: NVIDIA's own driver)";

/// Which adapter is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The best adapter there is: hardware before software.
    Best,
    /// The best hardware adapter.
    Hardware,
    /// The best software adapter.
    Software,
    /// The adapter at this place in [`adapters`], counted from 1.
    Number(usize),
    /// The one adapter whose name contains this text, case ignored.
    Name(String),
}

/// What the adapter says about itself.
fn report_of(adapter: &wgpu::Adapter) -> AdapterReport {
    let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => "discrete GPU",
        wgpu::DeviceType::IntegratedGpu => "integrated GPU",
        wgpu::DeviceType::VirtualGpu => "virtual GPU",
        wgpu::DeviceType::Cpu => "software",
        wgpu::DeviceType::Other => "other",
    };
    let software = info.device_type == wgpu::DeviceType::Cpu;
    AdapterReport {
        name: info.name,
        backend: format!("{:?}", info.backend),
        pci_bus_id: Some(info.device_pci_bus_id).filter(|id| !id.is_empty()),
        driver: [info.driver, info.driver_info]
            .into_iter()
            .filter(|s| !s.is_empty())
            .collect::<Vec<_>>()
            .join(" "),
        kind,
        software,
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
        shader_int64: features.contains(wgpu::Features::SHADER_INT64),
        cooperative_matrix: cooperative_matrix(&adapter.cooperative_matrix_properties()),
        registers: if info.vendor == NVIDIA { 255 } else { 128 },
        prices: Prices::assumed(software),
    }
}

/// The side of the largest square matrices of 16-bit floats that are added up as floats. The list is what counts,
/// not the feature: drivers run, and not always right, what they do not list.
fn cooperative_matrix(listed: &[wgpu::CooperativeMatrixProperties]) -> Option<u32> {
    let suits = |side: &u32| {
        listed.iter().any(|p| {
            [p.m_size, p.n_size, p.k_size] == [*side; 3]
                && p.ab_type == wgpu::CooperativeScalarType::F16
                && p.cr_type == wgpu::CooperativeScalarType::F32
                && !p.saturating_accumulation
        })
    };
    [16, 8].into_iter().find(suits)
}

/// Order of preference: discrete before integrated before virtual before software.
fn rank(report: &AdapterReport) -> u8 {
    match report.kind {
        "discrete GPU" => 0,
        "integrated GPU" => 1,
        "virtual GPU" => 2,
        "other" => 3,
        _ => 4,
    }
}

/// The backends that may be used: all of ours, or those of them that `WGPU_BACKEND` names.
///
/// # Errors
/// [`Error::Usage`] when it names another one, or none.
fn backends(named: Option<&str>) -> Result<wgpu::Backends> {
    let Some(named) = named else {
        return Ok(BACKENDS);
    };
    let mut backends = wgpu::Backends::empty();
    for name in named.split(',') {
        let backend = wgpu::Backends::from_comma_list(name) & BACKENDS;
        if backend.is_empty() {
            return Err(Error::Usage(format!(
                "expected vulkan, metal or dx12, or several of them with commas between, in the environment variable WGPU_BACKEND, found '{named}'; correct it or unset it"
            )));
        }
        backends |= backend;
    }
    Ok(backends)
}

fn enumerate() -> Result<Vec<(wgpu::Adapter, AdapterReport)>> {
    let named = std::env::var_os("WGPU_BACKEND");
    let backends = backends(named.as_ref().map(|n| n.to_string_lossy()).as_deref())?;
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = backends;
    descriptor.flags = wgpu::InstanceFlags::default().with_env();
    let instance = wgpu::Instance::new(descriptor);
    let mut found: Vec<_> = pollster::block_on(instance.enumerate_adapters(backends))
        .into_iter()
        .filter(|a| {
            a.get_downlevel_capabilities()
                .flags
                .contains(wgpu::DownlevelFlags::COMPUTE_SHADERS)
        })
        .map(|a| {
            let report = report_of(&a);
            (a, report)
        })
        .collect();
    // A stable sort: among equals the order of the driver stays.
    found.sort_by_key(|(_, report)| rank(report));
    Ok(found)
}

/// Every usable adapter, best first, of the backends that the environment variable `WGPU_BACKEND`
/// allows (`vulkan`, `metal`, `dx12`, with commas between; all three where it is not set).
///
/// # Errors
/// [`Error::Usage`] when that variable says something else.
pub fn adapters() -> Result<Vec<AdapterReport>> {
    Ok(enumerate()?.into_iter().map(|(_, report)| report).collect())
}

/// The adapter that `choice` means.
///
/// # Errors
/// [`Error::NoAdapter`] when there is none of its kind (with the package that helps), and
/// [`Error::Usage`] when a number or name fits none or a name fits several (with what there is),
/// and as [`adapters`].
pub fn choose(choice: &Choice) -> Result<(wgpu::Adapter, AdapterReport)> {
    let mut found = enumerate()?;
    if let (true, Ok(backend)) = (found.is_empty(), std::env::var("WGPU_BACKEND")) {
        return Err(Error::NoAdapter(format!(
            "expected an adapter of the environment variable WGPU_BACKEND={backend}, found none; unset it for all backends, or use --device cpu"
        )));
    }
    let reports: Vec<&AdapterReport> = found.iter().map(|(_, report)| report).collect();
    let place = pick(choice, &reports)?;
    Ok(found.swap_remove(place))
}

/// The place of the adapter that `choice` means in `found`, which is sorted best first.
fn pick(choice: &Choice, found: &[&AdapterReport]) -> Result<usize> {
    if found.is_empty() {
        return Err(Error::NoAdapter(format!(
            "expected a Vulkan, Metal or DX12 adapter, found none; {NO_ADAPTER_HINT}, or use --device cpu"
        )));
    }
    let list = |places: &[usize]| {
        let one = |place: &usize| {
            let report = found[*place];
            let pci = report.pci_bus_id.as_ref();
            let pci = pci.map_or(String::new(), |id| format!(", PCI {id}"));
            format!(
                "{} '{}' ({}, {}{pci})",
                place + 1,
                report.name,
                report.kind,
                report.backend
            )
        };
        places.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    let all: Vec<usize> = (0..found.len()).collect();
    let first = |software| found.iter().position(|r| r.software == software);
    match choice {
        Choice::Best => Ok(0),
        Choice::Hardware => first(false).ok_or_else(|| {
            Error::NoAdapter(format!(
                "expected a hardware adapter, found only {}; {GPU_HINT}, or use --device cpu, or --device software",
                list(&all)
            ))
        }),
        Choice::Software => first(true).ok_or_else(|| {
            Error::NoAdapter(format!(
                "expected a software adapter, found only {}; install one (Mesa's lavapipe: mesa-vulkan-drivers, on Arch vulkan-swrast), or choose another --device",
                list(&all)
            ))
        }),
        Choice::Number(number) if (1..=found.len()).contains(number) => Ok(number - 1),
        Choice::Number(number) => Err(Error::Usage(format!(
            "expected the number of an adapter for --device, found {number}; there is {}",
            list(&all)
        ))),
        Choice::Name(name) => {
            let fits = |place: &usize| {
                let known = found[*place].name.to_lowercase();
                known.contains(&name.to_lowercase())
            };
            let fitting: Vec<usize> = all.iter().copied().filter(fits).collect();
            match fitting[..] {
                [place] => Ok(place),
                [] => Err(Error::Usage(format!(
                    "expected --device auto, gpu, software, cpu, or the number or part of the name of an adapter, found '{name}'; there is {}",
                    list(&all)
                ))),
                // One device that two backends show is no question.
                [place, ref others @ ..]
                    if found[place].pci_bus_id.is_some()
                        && others
                            .iter()
                            .all(|o| found[*o].pci_bus_id == found[place].pci_bus_id) =>
                {
                    Ok(place)
                }
                _ => Err(Error::Usage(format!(
                    "expected the name of one adapter, found '{name}', which fits {}; give its number, as in --device {}",
                    list(&fitting),
                    fitting[0] + 1
                ))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(name: &str, backend: &str, pci: Option<&str>, software: bool) -> AdapterReport {
        AdapterReport {
            name: name.into(),
            backend: backend.into(),
            pci_bus_id: pci.map(String::from),
            ..AdapterReport::imagined(software)
        }
    }

    #[test]
    fn devices_of_one_name_are_told_apart() {
        let found = [
            adapter("RTX 4090", "Vulkan", Some("0000:01:00.0"), false),
            adapter("RTX 4090", "Vulkan", Some("0000:02:00.0"), false),
            adapter("Arc A770", "Vulkan", Some("0000:03:00.0"), false),
            adapter("Arc A770", "Dx12", Some("0000:03:00.0"), false),
            adapter("llvmpipe", "Vulkan", None, true),
        ];
        let found: Vec<&AdapterReport> = found.iter().collect();
        let name = |name: &str| pick(&Choice::Name(name.into()), &found);
        let message = name("rtx").unwrap_err().to_string();
        for word in [
            "1 'RTX 4090'",
            "0000:01:00.0",
            "2 'RTX 4090'",
            "0000:02:00.0",
            "--device 1",
        ] {
            assert!(message.contains(word), "no {word:?} in {message}");
        }
        assert!(!message.contains("Arc"), "{message}");
        assert_eq!(name("arc").unwrap(), 2);
        assert_eq!(name("LLVM").unwrap(), 4);
        assert_eq!(pick(&Choice::Number(2), &found).unwrap(), 1);
        for number in [0, 6] {
            let refused = pick(&Choice::Number(number), &found).unwrap_err();
            assert!(matches!(refused, Error::Usage(_)), "{refused}");
            assert!(refused.to_string().contains("5 'llvmpipe'"), "{refused}");
        }
    }

    #[test]
    fn kinds_are_kept_apart() {
        let (gpu, software) = (
            adapter("a", "Vulkan", None, false),
            adapter("b", "Vulkan", None, true),
        );
        let both = [&gpu, &software];
        assert_eq!(pick(&Choice::Best, &both).unwrap(), 0);
        assert_eq!(pick(&Choice::Hardware, &both).unwrap(), 0);
        assert_eq!(pick(&Choice::Software, &both).unwrap(), 1);
        assert_eq!(pick(&Choice::Best, &[&software]).unwrap(), 0);
        for (choice, found, word) in [
            (Choice::Hardware, &[&software][..], "--device software"),
            (Choice::Software, &[&gpu][..], "lavapipe"),
            (Choice::Best, &[][..], "found none"),
        ] {
            let refused = pick(&choice, found).unwrap_err();
            assert!(matches!(refused, Error::NoAdapter(_)), "{refused}");
            assert!(refused.to_string().contains(word), "{refused}");
        }
    }

    #[test]
    fn cooperative_matrices_are_those_that_are_listed() {
        use wgpu::CooperativeScalarType::{F16, F32};
        let of = |[m_size, n_size, k_size]: [u32; 3], ab_type, cr_type| {
            wgpu::CooperativeMatrixProperties {
                m_size,
                n_size,
                k_size,
                ab_type,
                cr_type,
                saturating_accumulation: false,
            }
        };
        let (small, large) = (of([8; 3], F16, F32), of([16; 3], F16, F32));
        assert_eq!(cooperative_matrix(&[]), None);
        assert_eq!(cooperative_matrix(&[small]), Some(8));
        assert_eq!(cooperative_matrix(&[small, large]), Some(16));
        for other in [
            of([16, 8, 16], F16, F32),
            of([8, 16, 16], F16, F32),
            of([8; 3], F32, F32),
            of([16; 3], F16, F16),
            wgpu::CooperativeMatrixProperties {
                saturating_accumulation: true,
                ..large
            },
        ] {
            assert_eq!(cooperative_matrix(&[other]), None, "{other:?}");
        }
    }

    #[test]
    fn the_backends_of_the_environment_are_ours_or_refused() {
        assert_eq!(backends(None).unwrap(), BACKENDS);
        assert_eq!(backends(Some("vk")).unwrap(), wgpu::Backends::VULKAN);
        assert_eq!(
            backends(Some("Vulkan, DX12")).unwrap(),
            wgpu::Backends::VULKAN | wgpu::Backends::DX12
        );
        for nonsense in ["", "gl", "vulkan,gl", "cuda", "vulkan,"] {
            let refused = backends(Some(nonsense)).unwrap_err();
            assert!(matches!(refused, Error::Usage(_)), "{refused}");
            assert!(refused.to_string().contains("WGPU_BACKEND"), "{refused}");
        }
    }
}
