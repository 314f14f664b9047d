//! What the matrix products of a training step become on AMD chips, by Mesa's RADV, which compiles for a
//! chip that is not there (and runs nothing): a table of registers, spills, workgroup memory, occupancy
//! and of the instructions in the loop over blocks of terms.
//!
//!     cargo run -- MODEL [--batch N] [--family F] [--chip C]... [--only TEXT] [--all-tiles] [--unchecked]
//!                        [--json] [--dump DIR]
//!
//! All counts are exact. `--json` prints every statistic and the assembly instead, an object a line.

use ash::vk;
use naga::back::spv;
use serde_json::{Map, Value, json};
use std::ffi::{CStr, CString, c_char};
use wgrad::kernels::AdapterReport;
use wgrad::kernels::conv2d::Product;
use wgrad::plan::{Mode, Options, Plan, Target};

const CHIPS: [&str; 3] = ["vega10", "navi21", "gfx1100"];

struct Arguments(Vec<String>);

impl Arguments {
    fn has(&self, flag: &str) -> bool {
        self.0.iter().any(|a| a == flag)
    }

    fn values(&self, flag: &str) -> Vec<&str> {
        let pairs = self.0.windows(2).filter(|pair| pair[0] == flag);
        pairs.map(|pair| pair[1].as_str()).collect()
    }
}

fn main() {
    let arguments = Arguments(std::env::args().skip(1).collect());
    let products = products(&arguments);
    if let Some(dir) = arguments.values("--dump").first() {
        std::fs::create_dir_all(dir).expect("the folder can be made");
        for (i, (layer, product)) in products.iter().enumerate() {
            let name = format!("{i:03}-{layer}-{}.wgsl", product.pass.name());
            let path = std::path::Path::new(dir).join(name.replace(' ', "-"));
            std::fs::write(path, product.source().expect("it renders")).expect("it can be written");
        }
    }
    let chips = match arguments.values("--chip") {
        chips if chips.is_empty() => CHIPS.to_vec(),
        chips => chips,
    };
    for chip in chips {
        // SAFETY: no other thread runs.
        unsafe { std::env::set_var("RADV_FORCE_FAMILY", chip) };
        let Some(driver) = Driver::open() else {
            println!(
                "skipped: expected Mesa's RADV with a null device for {chip}, found none; install mesa-vulkan-drivers"
            );
            continue;
        };
        if !arguments.has("--json") {
            println!("{chip}");
            println!(
                "layer     kernel          tile               parts  VGPRs spilled  bytes waves  fma/valu  reads/fma  branches"
            );
        }
        for (layer, product) in &products {
            let found = driver.compile(product, arguments.has("--unchecked"));
            if arguments.has("--json") {
                let [m, n, k] = product.dimensions();
                let meta = json!({
                    "entry": product.pass.name(), "layer": layer, "tile": product.tile.to_string(),
                    "splits": product.splits(), "slices": product.slices(), "m": m, "n": n, "k": k,
                    "flops": product.flops(), "tileparams": product.tile, "groups": product.workgroups(),
                });
                let mut found = found;
                found.insert(
                    "file".into(),
                    format!("{layer} {}", product.pass.name()).into(),
                );
                found.insert("meta".into(), meta);
                println!("{}", Value::Object(found));
            } else {
                println!("{}", row(layer, product, &found));
            }
        }
    }
}

/// The products of a training step with the name of their layer.
fn products(arguments: &Arguments) -> Vec<(String, Product)> {
    let name = arguments.0.first().expect("expected the name of a model");
    let definition = wgrad::model::load(name).expect("a model");
    let model = definition
        .resolve(definition.input, definition.classes)
        .expect("it resolves");
    let batch = arguments
        .values("--batch")
        .first()
        .map(|n| n.parse().expect("a number"));
    let batch = batch.unwrap_or(definition.recipe.batch_size);
    let family = *arguments.values("--family").first().unwrap_or(&"workgroup");
    let options = Options {
        family: Some(family.parse().expect("a family")),
        ..Options::of(&definition.recipe)
    };
    let adapter = AdapterReport {
        max_workgroup_storage_bytes: 64 << 10,
        max_storage_binding_bytes: 4 << 30,
        max_buffer_bytes: 4 << 30,
        ..AdapterReport::imagined(false)
    };
    let mode = Mode::Train(definition.recipe.optimizer);
    let plan = Plan::new(&model, batch, mode, &options, Target::Gpu(&adapter)).expect("a plan");
    let only = arguments.values("--only");
    let wanted = |(layer, product): &(String, Product)| {
        let name = format!("{layer} {}", product.pass.name());
        only.iter().all(|text| name.contains(text))
    };
    let products = plan.products().into_iter().filter(wanted);
    let tiles = |(layer, product): (String, Product)| {
        let tiles = match arguments.has("--all-tiles") {
            true => product.tiles_on(&adapter),
            false => vec![product.tile],
        };
        tiles
            .into_iter()
            .map(move |tile| (layer.clone(), product.with_tile(tile)))
    };
    products.flat_map(tiles).collect()
}

struct Driver {
    device: ash::Device,
    executables: ash::khr::pipeline_executable_properties::Device,
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
    /// RADV's null device, with what wgpu would ask of it.
    fn open() -> Option<Driver> {
        // SAFETY: plain calls of Vulkan; what the pointers point to lives to the end of each.
        unsafe {
            let entry = ash::Entry::load().ok()?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
            let info = vk::InstanceCreateInfo::default().application_info(&application);
            let instance = entry.create_instance(&info, None).ok()?;
            let adapters = instance.enumerate_physical_devices().ok()?;
            let null = adapters.into_iter().find(|adapter| {
                let properties = instance.get_physical_device_properties(*adapter);
                text(&properties.device_name).contains("Null")
            })?;
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
                _instance: instance,
                _entry: entry,
            })
        }
    }

    /// The compiler's statistics of a product's kernel, and the assembly.
    fn compile(&self, product: &Product, unchecked: bool) -> Map<String, Value> {
        let words = spirv(product, unchecked);
        let mut found = Map::new();
        // SAFETY: as in `open`.
        unsafe {
            let bindings: Vec<_> = (0..4)
                .map(|binding| {
                    vk::DescriptorSetLayoutBinding::default()
                        .binding(binding)
                        .descriptor_count(1)
                        .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                        .stage_flags(vk::ShaderStageFlags::COMPUTE)
                })
                .collect();
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
            let info = vk::ShaderModuleCreateInfo::default().code(&words);
            let module = self
                .device
                .create_shader_module(&info, None)
                .expect("a module");
            let entry = CString::new(product.pass.name()).expect("a name");
            let stage = vk::PipelineShaderStageCreateInfo::default()
                .stage(vk::ShaderStageFlags::COMPUTE)
                .module(module)
                .name(&entry);
            let info = vk::ComputePipelineCreateInfo::default()
                .stage(stage)
                .layout(layout)
                .flags(
                    vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR
                        | vk::PipelineCreateFlags::CAPTURE_INTERNAL_REPRESENTATIONS_KHR,
                );
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
            let mut count = 0;
            let _ = function(
                self.device.handle(),
                &info,
                &mut count,
                std::ptr::null_mut(),
            );
            let mut texts =
                vec![vk::PipelineExecutableInternalRepresentationKHR::default(); count as usize];
            let _ = function(self.device.handle(), &info, &mut count, texts.as_mut_ptr());
            let mut bytes: Vec<_> = texts.iter().map(|t| vec![0u8; t.data_size + 1]).collect();
            for (text, bytes) in texts.iter_mut().zip(&mut bytes) {
                text.p_data = bytes.as_mut_ptr().cast();
            }
            let _ = function(self.device.handle(), &info, &mut count, texts.as_mut_ptr());
            for (one, bytes) in texts.iter().zip(&bytes) {
                let found_text = String::from_utf8_lossy(bytes);
                let found_text = found_text.trim_end_matches('\0');
                found.insert(format!("rep:{}", text(&one.name)), found_text.into());
            }
            self.device.destroy_pipeline(pipeline, None);
            self.device.destroy_shader_module(module, None);
        }
        found
    }
}

/// As wgpu translates it.
fn spirv(product: &Product, unchecked: bool) -> Vec<u32> {
    use naga::proc::BoundsCheckPolicy::{Restrict, Unchecked};
    let source = product.source().expect("it renders");
    let module = naga::front::wgsl::parse_str(&source)
        .unwrap_or_else(|e| panic!("{}", e.emit_to_string(&source)));
    let (flags, all) = (
        naga::valid::ValidationFlags::all(),
        naga::valid::Capabilities::all(),
    );
    let info = naga::valid::Validator::new(flags, all).validate(&module);
    let info = info.unwrap_or_else(|e| panic!("{}", e.emit_to_string(&source)));
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
    let entry = spv::PipelineOptions {
        shader_stage: naga::ShaderStage::Compute,
        entry_point: product.pass.name().into(),
    };
    spv::write_vec(&module, &info, &options, Some(&entry)).expect("it translates")
}

/// Instructions of the loop that has the most multiply-adds of those that have no such loop inside.
#[derive(Default)]
struct Loop {
    multiply_adds: usize,
    vector: usize,
    reads: usize,
    branches: usize,
}

fn hot_loop(assembly: &str) -> Loop {
    let mut blocks: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in assembly.lines() {
        match line.strip_suffix(':').filter(|name| name.starts_with("BB")) {
            Some(name) => blocks.push((name, Vec::new())),
            None => blocks
                .last_mut()
                .into_iter()
                .for_each(|(_, lines)| lines.push(line.trim())),
        }
    }
    let place = |name: &str| blocks.iter().position(|(n, _)| *n == name);
    let mut best = Loop::default();
    let mut shortest = usize::MAX;
    for (end, (_, lines)) in blocks.iter().enumerate() {
        let back = lines
            .iter()
            .filter(|line| line.starts_with("s_") && line.contains("branch"));
        let back = back.filter_map(|line| place(line.split_whitespace().nth(1)?));
        for begin in back.filter(|begin| *begin <= end) {
            let lines = || blocks[begin..=end].iter().flat_map(|(_, lines)| lines);
            let count = |test: fn(&str) -> bool| lines().filter(|line| test(line)).count();
            let multiply_add = |line: &str| {
                let starts = ["v_fma", "v_mac", "v_pk_fma", "v_dual_fmac", "v_mad_f32"];
                starts.iter().any(|s| line.starts_with(s)) && line.contains("f32")
            };
            let found = Loop {
                multiply_adds: count(multiply_add),
                vector: count(|line| line.starts_with("v_")),
                reads: count(|line| line.starts_with("ds_read") || line.starts_with("ds_load")),
                branches: count(|line| line.starts_with("s_cbranch")),
            };
            // A loop around the hot one has as many multiply-adds in more instructions.
            let length = lines().count();
            if found.multiply_adds > best.multiply_adds
                || found.multiply_adds == best.multiply_adds && length < shortest
            {
                (best, shortest) = (found, length);
            }
        }
    }
    best
}

fn row(layer: &str, product: &Product, found: &Map<String, Value>) -> String {
    let number = |name: &str| found.get(name).map_or(0, |v| v.as_u64().unwrap_or(0));
    let assembly = found
        .get("rep:Assembly")
        .and_then(Value::as_str)
        .unwrap_or("");
    let hot = hot_loop(assembly);
    let of = |count: usize, all: usize| count as f64 / all.max(1) as f64;
    let tile = product.tile.to_string();
    format!(
        "{layer:9} {:15} {:18} {:>3}x{} {:6} {:7} {:6} {:5} {:9.2} {:10.3} {:9}",
        product.pass.name().trim_start_matches("conv2d_"),
        tile.trim_start_matches("workgroup ")
            .split(" (")
            .next()
            .unwrap_or(""),
        product.splits(),
        product.slices(),
        number("VGPRs"),
        number("Spilled VGPRs") + number("Spilled SGPRs"),
        number("LDS size"),
        number("Subgroups per SIMD"),
        of(hot.multiply_adds, hot.vector),
        of(hot.reads, hot.multiply_adds),
        // Its own way back is none.
        hot.branches.saturating_sub(1),
    )
}
