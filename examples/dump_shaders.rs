//! Writes every kernel that `verify` runs as WGSL, HLSL, MSL and SPIR-V, for compilers other than naga:
//! `cargo run --release --example dump_shaders FOLDER`.
//!
//! FOLDER/index.jsonl has a line per pipeline: `file` (the WGSL module),
//! `entry`, `constants` (a value for every override), `subgroups` and `matrices` (whether the module uses them),
//! `workgroup_bytes` (of memory that it shares in a workgroup) and `output`, the name of its translations in hlsl60/ (shader
//! model 6.0, or 6.2 with 16-bit floats), hlsl51/ (neither with subgroups nor with these), both without
//! those with matrices, msl/ and spv/.
//! The HLSL names its entry point in its first line.

use naga::back::pipeline_constants::process_overrides;
use naga::back::{PipelineConstants, hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, ShaderStage, TypeInner};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::fs;
use std::path::Path;
use wgrad::gpu::AdapterReport;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let folder = std::env::args()
        .nth(1)
        .ok_or("usage: dump_shaders FOLDER")?;
    let folder = Path::new(&folder);
    for part in ["wgsl", "hlsl60", "hlsl51", "msl", "spv"] {
        fs::create_dir_all(folder.join(part))?;
    }
    // Every size of a subgroup that real adapters have, and matrices of both sides; most of what does not depend on
    // them is equal.
    let mut kernels = Vec::new();
    for (software, lanes, side) in [
        (true, 4, None),
        (true, 8, Some(8)),
        (true, 16, None),
        (false, 32, Some(16)),
    ] {
        kernels.extend(wgrad::verify::kernels(&AdapterReport {
            subgroup_size: Some([lanes; 2]),
            cooperative_matrix: side,
            ..AdapterReport::imagined(software)
        })?);
    }
    let mut modules: Vec<Dumped> = Vec::new();
    let mut places = HashMap::new();
    for kernel in &kernels {
        let text = kernel.source()?.into_owned();
        let place = *places.entry(text.clone()).or_insert(modules.len());
        if place == modules.len() {
            modules.push(Dumped::new(folder, place, kernel.entry, &text)?);
        }
        let pipeline = (kernel.entry, kernel.constants.clone());
        if !modules[place].pipelines.contains(&pipeline) {
            modules[place].pipelines.push(pipeline);
        }
    }
    let mut index = String::new();
    for dumped in &modules {
        for (i, (entry, constants)) in dumped.pipelines.iter().enumerate() {
            let output = format!("{}.{i}.{entry}", dumped.name);
            let named = constants
                .iter()
                .map(|(name, value)| (name.to_string(), *value));
            translate(folder, &output, dumped, entry, &named.collect())
                .map_err(|e| format!("{output}: {e}"))?;
            let line = json!({
                "file": dumped.name,
                "entry": entry,
                "constants": constants.iter().copied().collect::<BTreeMap<_, _>>(),
                "subgroups": dumped.subgroups,
                "matrices": has_matrices(&dumped.module),
                "workgroup_bytes": workgroup_bytes(&dumped.module),
                "output": output,
            });
            index += &format!("{line}\n");
        }
    }
    fs::write(folder.join("index.jsonl"), &index)?;
    println!(
        "{} modules, {} pipelines",
        modules.len(),
        index.lines().count()
    );
    Ok(())
}

/// A module that was written, with its pipelines: entry points and values of all overrides.
struct Dumped {
    name: String,
    module: Module,
    info: ModuleInfo,
    subgroups: bool,
    halves: bool,
    pipelines: Vec<(&'static str, Vec<(&'static str, f64)>)>,
}

impl Dumped {
    fn new(folder: &Path, number: usize, entry: &str, text: &str) -> Result<Dumped> {
        let name = format!("{number:04}-{entry}");
        fs::write(folder.join(format!("wgsl/{name}.wgsl")), text)?;
        let module = naga::front::wgsl::parse_str(text)
            .map_err(|e| format!("{name}: {}", e.emit_to_string(text)))?;
        let info = Validator::new(
            ValidationFlags::all(),
            Capabilities::SUBGROUP
                | Capabilities::SHADER_FLOAT16
                | Capabilities::COOPERATIVE_MATRIX,
        )
        .validate(&module)
        .map_err(|e| format!("{name}: {}", e.emit_to_string(text)))?;
        Ok(Dumped {
            name,
            subgroups: uses_subgroups(&module),
            halves: text.contains("enable f16;"),
            module,
            info,
            pipelines: Vec::new(),
        })
    }
}

/// Whether any function of the module has a subgroup operation.
fn uses_subgroups(module: &Module) -> bool {
    format!("{module:?}").contains("Subgroup")
}

/// Whether it has cooperative matrices, which naga does not translate to HLSL and other compilers of WGSL do not know.
fn has_matrices(module: &Module) -> bool {
    let mut types = module.types.iter();
    types.any(|(_, ty)| matches!(ty.inner, TypeInner::CooperativeMatrix { .. }))
}

/// Bytes of all its variables in workgroup memory.
fn workgroup_bytes(module: &Module) -> u32 {
    let variables = module.global_variables.iter().map(|(_, variable)| variable);
    variables
        .filter(|variable| variable.space == AddressSpace::WorkGroup)
        .map(|variable| module.types[variable.ty].inner.size(module.to_ctx()))
        .sum()
}

/// Writes one entry point with every back end, with the options that wgpu takes for this crate's
/// kernels.
fn translate(
    folder: &Path,
    output: &str,
    dumped: &Dumped,
    entry: &str,
    constants: &PipelineConstants,
) -> Result<()> {
    let point = (ShaderStage::Compute, entry);
    let (module, info) = process_overrides(&dumped.module, &dumped.info, Some(point), constants)?;
    let point = Some((ShaderStage::Compute, entry.to_string()));

    // DXC gets 6.0, or 6.2 for halves; FXC at most 5.1, which has neither these nor subgroup operations.
    let dxc = match dumped.halves {
        true => hlsl::ShaderModel::V6_2,
        false => hlsl::ShaderModel::V6_0,
    };
    for (part, shader_model) in [("hlsl60", dxc), ("hlsl51", hlsl::ShaderModel::V5_1)] {
        let is_fxc = shader_model < hlsl::ShaderModel::V6_0;
        if is_fxc && (dumped.subgroups || dumped.halves) || has_matrices(&module) {
            continue;
        }
        let options = hlsl::Options {
            shader_model,
            // `num_workgroups` comes in through it.
            special_constants_binding: Some(hlsl::BindTarget::default()),
            zero_initialize_workgroup_memory: false,
            ..Default::default()
        };
        let pipeline = hlsl::PipelineOptions {
            entry_point: point.clone(),
        };
        let mut text = String::new();
        let written =
            hlsl::Writer::new(&mut text, &options, &pipeline).write(&module, &info, None)?;
        let name = written.entry_point_names[0].as_ref();
        let name = name.map_err(|e| e.to_string())?;
        fs::write(
            folder.join(format!("{part}/{output}.hlsl")),
            format!("// entry point: {name}\n{text}"),
        )?;
    }

    let options = msl::Options {
        lang_version: (2, 4),
        zero_initialize_workgroup_memory: false,
        ..Default::default()
    };
    let pipeline = msl::PipelineOptions {
        entry_point: point,
        ..Default::default()
    };
    let (text, _) = msl::write_string(&module, &info, &options, &pipeline)?;
    fs::write(folder.join(format!("msl/{output}.metal")), text)?;

    let options = spv::Options {
        // Subgroup operations need it.
        lang_version: (1, 3),
        ..Default::default()
    };
    let pipeline = spv::PipelineOptions {
        shader_stage: ShaderStage::Compute,
        entry_point: entry.into(),
    };
    let words = spv::write_vec(&module, &info, &options, Some(&pipeline))?;
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    fs::write(folder.join(format!("spv/{output}.spv")), bytes)?;
    Ok(())
}
