//! Mesa's RADV with its null device, and kernels for it.

use ash::vk;
use naga::back::pipeline_constants::process_overrides;
use naga::back::spv;
use serde_json::{Map, Value};
use std::ffi::{CStr, CString, c_char};
use wgrad::kernels::conv2d::Family;
use wgrad::kernels::{AdapterReport, KernelSpec, Work};

/// What a driver compiles.
#[derive(PartialEq, Eq, Hash)]
pub struct Kernel {
    pub source: String,
    entry: &'static str,
    words: Vec<u32>,
    bindings: Vec<u32>,
    /// Lanes of a subgroup, where the kernel counts on them.
    lanes: Option<u32>,
}

impl Kernel {
    /// As wgpu translates it for a training, where products go without naga's checks unless they are to be `checked`.
    pub fn new(spec: &KernelSpec, adapter: &AdapterReport, checked: bool) -> Kernel {
        use naga::proc::BoundsCheckPolicy::{Restrict, Unchecked};
        let unchecked = matches!(spec.work, Work::Product(_)) && !checked;
        let source = spec.source().expect("it renders").into_owned();
        let module = naga::front::wgsl::parse_str(&source)
            .unwrap_or_else(|e| panic!("{}", e.emit_to_string(&source)));
        let (flags, all) = (
            naga::valid::ValidationFlags::all(),
            naga::valid::Capabilities::all(),
        );
        let info = naga::valid::Validator::new(flags, all).validate(&module);
        let info = info.unwrap_or_else(|e| panic!("{}", e.emit_to_string(&source)));
        let constants = spec
            .constants
            .iter()
            .map(|(name, value)| (name.to_string(), *value))
            .collect();
        let point = (naga::ShaderStage::Compute, spec.entry);
        let (module, info) =
            process_overrides(&module, &info, Some(point), &constants).expect("constants that fit");
        let options = spv::Options {
            lang_version: (1, 6),
            bounds_check_policies: naga::proc::BoundsCheckPolicies {
                index: if unchecked { Unchecked } else { Restrict },
                // The device's own.
                buffer: Unchecked,
                image_load: Unchecked,
                binding_array: Unchecked,
            },
            zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
            force_loop_bounding: !unchecked,
            emit_int_div_checks: !unchecked,
            ..Default::default()
        };
        let point = spv::PipelineOptions {
            shader_stage: naga::ShaderStage::Compute,
            entry_point: spec.entry.into(),
        };
        Kernel {
            words: spv::write_vec(&module, &info, &options, Some(&point)).expect("it translates"),
            entry: spec.entry,
            bindings: spec
                .arguments
                .iter()
                .map(|argument| argument.binding)
                .collect(),
            lanes: match &spec.work {
                Work::Product(product) if product.tile.family() == Family::Subgroup => {
                    adapter.subgroup_size.map(|[least, _]| least)
                }
                _ => None,
            },
            source,
        }
    }
}

/// The compiler's statistics of a kernel, and its assembly.
pub struct Compiled(pub Map<String, Value>);

impl Compiled {
    pub fn number(&self, name: &str) -> u64 {
        self.0.get(name).and_then(Value::as_u64).unwrap_or(0)
    }

    /// Registers of both kinds.
    pub fn spilled(&self) -> u64 {
        self.number("Spilled VGPRs") + self.number("Spilled SGPRs")
    }

    pub fn assembly(&self) -> &str {
        self.0
            .get("rep:Assembly")
            .and_then(Value::as_str)
            .unwrap_or("")
    }
}

pub struct Driver {
    device: ash::Device,
    executables: ash::khr::pipeline_executable_properties::Device,
    version: String,
    /// Of the smallest subgroup that it can be asked for.
    least_lanes: u32,
    _instance: ash::Instance,
    _entry: ash::Entry,
}

fn text(chars: &[c_char]) -> String {
    // SAFETY: Vulkan ends its strings with a zero.
    unsafe { CStr::from_ptr(chars.as_ptr()) }
        .to_string_lossy()
        .into_owned()
}

impl Driver {
    /// The null device for `chip`, with what wgpu would ask of it.
    pub fn open(chip: &str) -> Option<Driver> {
        // SAFETY: plain calls of Vulkan; what the pointers point to lives to the end of each. No other
        // thread looks at the environment.
        unsafe {
            std::env::set_var("RADV_FORCE_FAMILY", chip);
            std::env::set_var("MESA_SHADER_CACHE_DISABLE", "true");
            let entry = ash::Entry::load().ok()?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
            let info = vk::InstanceCreateInfo::default().application_info(&application);
            let instance = entry.create_instance(&info, None).ok()?;
            let adapters = instance.enumerate_physical_devices().ok()?;
            let mut found = None;
            for adapter in adapters {
                let mut driver = vk::PhysicalDeviceDriverProperties::default();
                let mut sizes = vk::PhysicalDeviceSubgroupSizeControlProperties::default();
                let mut properties = vk::PhysicalDeviceProperties2::default()
                    .push_next(&mut driver)
                    .push_next(&mut sizes);
                instance.get_physical_device_properties2(adapter, &mut properties);
                if text(&properties.properties.device_name).contains("Null") {
                    found = Some((adapter, text(&driver.driver_info), sizes.min_subgroup_size));
                    break;
                }
            }
            let (null, version, least_lanes) = found?;
            let priorities = [1.0];
            let queues = [vk::DeviceQueueCreateInfo::default().queue_priorities(&priorities)];
            let mut executable =
                vk::PhysicalDevicePipelineExecutablePropertiesFeaturesKHR::default()
                    .pipeline_executable_info(true);
            let mut robust =
                vk::PhysicalDeviceRobustness2FeaturesEXT::default().robust_buffer_access2(true);
            let mut more = vk::PhysicalDeviceVulkan13Features::default()
                .subgroup_size_control(true)
                .compute_full_subgroups(true);
            let features = vk::PhysicalDeviceFeatures::default().robust_buffer_access(true);
            let extensions = [
                ash::khr::pipeline_executable_properties::NAME.as_ptr(),
                ash::ext::robustness2::NAME.as_ptr(),
            ];
            let info = vk::DeviceCreateInfo::default()
                .queue_create_infos(&queues)
                .enabled_features(&features)
                .enabled_extension_names(&extensions)
                .push_next(&mut executable)
                .push_next(&mut robust)
                .push_next(&mut more);
            let device = instance.create_device(null, &info, None).ok()?;
            Some(Driver {
                executables: ash::khr::pipeline_executable_properties::Device::new(
                    &instance, &device,
                ),
                device,
                version,
                least_lanes,
                _instance: instance,
                _entry: entry,
            })
        }
    }

    /// "Mesa …"
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Whether the chip has subgroups of so many lanes as the kernel counts on.
    pub fn can(&self, kernel: &Kernel) -> bool {
        kernel.lanes.is_none_or(|lanes| lanes >= self.least_lanes)
    }

    pub fn compile(&self, kernel: &Kernel) -> Compiled {
        let mut found = Map::new();
        // SAFETY: as in `open`.
        unsafe {
            let bindings = kernel.bindings.iter().map(|binding| {
                vk::DescriptorSetLayoutBinding::default()
                    .binding(*binding)
                    .descriptor_count(1)
                    .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                    .stage_flags(vk::ShaderStageFlags::COMPUTE)
            });
            let bindings: Vec<_> = bindings.collect();
            let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
            let sets = [self
                .device
                .create_descriptor_set_layout(&info, None)
                .expect("a layout")];
            let info = vk::PipelineLayoutCreateInfo::default().set_layouts(&sets);
            let layout = self
                .device
                .create_pipeline_layout(&info, None)
                .expect("a layout");
            let info = vk::ShaderModuleCreateInfo::default().code(&kernel.words);
            let module = self
                .device
                .create_shader_module(&info, None)
                .expect("a module");
            let entry = CString::new(kernel.entry).expect("a name");
            let mut lanes = vk::PipelineShaderStageRequiredSubgroupSizeCreateInfo::default();
            let mut stage = vk::PipelineShaderStageCreateInfo::default()
                .stage(vk::ShaderStageFlags::COMPUTE)
                .module(module)
                .name(&entry);
            if let Some(count) = kernel.lanes {
                lanes = lanes.required_subgroup_size(count);
                stage = stage.push_next(&mut lanes);
            }
            let flags = vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR
                | vk::PipelineCreateFlags::CAPTURE_INTERNAL_REPRESENTATIONS_KHR;
            let info = vk::ComputePipelineCreateInfo::default()
                .stage(stage)
                .layout(layout)
                .flags(flags);
            let made =
                self.device
                    .create_compute_pipelines(vk::PipelineCache::null(), &[info], None);
            let pipeline = made.expect("it compiles")[0];
            let info = vk::PipelineInfoKHR::default().pipeline(pipeline);
            let properties = self.executables.get_pipeline_executable_properties(&info);
            found.insert(
                "wave".into(),
                properties.expect("properties")[0].subgroup_size.into(),
            );
            let info = vk::PipelineExecutableInfoKHR::default().pipeline(pipeline);
            let statistics = self.executables.get_pipeline_executable_statistics(&info);
            for statistic in statistics.expect("statistics") {
                found.insert(text(&statistic.name), statistic.value.u64.into());
            }
            let function = self
                .executables
                .fp()
                .get_pipeline_executable_internal_representations_khr;
            let device = self.device.handle();
            let mut count = 0;
            let _ = function(device, &info, &mut count, std::ptr::null_mut());
            let mut texts =
                vec![vk::PipelineExecutableInternalRepresentationKHR::default(); count as usize];
            let _ = function(device, &info, &mut count, texts.as_mut_ptr());
            let mut bytes: Vec<_> = texts.iter().map(|t| vec![0u8; t.data_size + 1]).collect();
            for (text, bytes) in texts.iter_mut().zip(&mut bytes) {
                text.p_data = bytes.as_mut_ptr().cast();
            }
            let _ = function(device, &info, &mut count, texts.as_mut_ptr());
            for (one, bytes) in texts.iter().zip(&bytes) {
                let content = String::from_utf8_lossy(bytes);
                found.insert(
                    format!("rep:{}", text(&one.name)),
                    content.trim_end_matches('\0').into(),
                );
            }
            self.device.destroy_pipeline(pipeline, None);
            self.device.destroy_shader_module(module, None);
        }
        Compiled(found)
    }
}
