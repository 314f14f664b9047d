//! Writes every shader module as WGSL, HLSL, MSL and SPIR-V, for compilers other than naga:
//! `cargo run --release --example dump_shaders FOLDER`.
//!
//! FOLDER/index.jsonl has a line per entry point and setting of its switches: `file` (the WGSL module),
//! `entry`, `constants` (a value for every override), `subgroups` (whether the module uses them) and
//! `output`, the name of its translations in hlsl60/, hlsl51/ (not with subgroups), msl/ and spv/.
//! The HLSL names its entry point in its first line.

use naga::back::pipeline_constants::process_overrides;
use naga::back::{PipelineConstants, hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{Module, ShaderStage, TypeInner};
use serde_json::json;
use std::collections::HashSet;
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
    let sources = sources()?;
    let mut index = String::new();
    for (name, text) in &sources {
        fs::write(folder.join(format!("wgsl/{name}.wgsl")), text)?;
        let module = naga::front::wgsl::parse_str(text)
            .map_err(|e| format!("{name}: {}", e.emit_to_string(text)))?;
        let info = Validator::new(ValidationFlags::all(), Capabilities::SUBGROUP)
            .validate(&module)
            .map_err(|e| format!("{name}: {}", e.emit_to_string(text)))?;
        for entry in &module.entry_points {
            for switches in switch_settings(&module) {
                let suffix = if *switches { ".on" } else { "" };
                let output = format!("{name}.{}{suffix}", entry.name);
                let constants = constants(&module, *switches);
                let subgroups = uses_subgroups(&module);
                translate(
                    folder,
                    &output,
                    (&module, &info),
                    &entry.name,
                    &constants,
                    subgroups,
                )
                .map_err(|e| format!("{output}: {e}"))?;
                let line = json!({
                    "file": name,
                    "entry": entry.name,
                    "constants": constants.iter().collect::<std::collections::BTreeMap<_, _>>(),
                    "subgroups": subgroups,
                    "output": output,
                });
                index += &format!("{line}\n");
            }
        }
    }
    fs::write(folder.join("index.jsonl"), &index)?;
    println!(
        "{} modules, {} pipelines",
        sources.len(),
        index.lines().count()
    );
    Ok(())
}

/// Name and text of every WGSL source: the files as they are, and what the templates give.
fn sources() -> Result<Vec<(String, String)>> {
    let mut sources = Vec::new();
    for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders"))? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        if !text.contains("{%") && !text.contains("{{") {
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            sources.push((name.into_owned(), text));
        }
    }
    // Every size of a subgroup that real adapters have; most of the other families' modules are equal.
    let mut seen = HashSet::new();
    for (software, lanes) in [(true, 4), (true, 8), (true, 16), (false, 32)] {
        let adapter = AdapterReport {
            subgroup_size: Some([lanes; 2]),
            ..AdapterReport::imagined(software)
        };
        for (i, product) in wgrad::verify::products(&adapter).into_iter().enumerate() {
            let text = product.source()?;
            if seen.insert(text.clone()) {
                let family = product.tile.family();
                let name = format!("{lanes:02}-{i:04}-{}-{family}", product.pass.name());
                sources.push((name, text));
            }
        }
    }
    sources.sort();
    Ok(sources)
}

/// The settings of a module's switches that are worth compiling: all off and, where it has any, all on.
fn switch_settings(module: &Module) -> &'static [bool] {
    let is_switch = |o: &naga::Override| matches!(module.types[o.ty].inner, TypeInner::Scalar(s) if s.kind == naga::ScalarKind::Bool);
    match module.overrides.iter().any(|(_, o)| is_switch(o)) {
        true => &[false, true],
        false => &[false],
    }
}

/// A value for every override.
fn constants(module: &Module, switches: bool) -> PipelineConstants {
    let value = |o: &naga::Override| match module.types[o.ty].inner {
        TypeInner::Scalar(s) if s.kind == naga::ScalarKind::Bool => f64::from(switches),
        TypeInner::Scalar(s) if s.kind == naga::ScalarKind::Float => 0.5,
        _ => 4.0,
    };
    let named = |o: &naga::Override| (o.name.clone().unwrap_or_default(), value(o));
    module.overrides.iter().map(|(_, o)| named(o)).collect()
}

/// Whether any function of the module has a subgroup operation.
fn uses_subgroups(module: &Module) -> bool {
    format!("{module:?}").contains("Subgroup")
}

/// Writes one entry point with every back end, with the options that wgpu takes for this crate's
/// kernels.
fn translate(
    folder: &Path,
    output: &str,
    (module, info): (&Module, &ModuleInfo),
    entry: &str,
    constants: &PipelineConstants,
    subgroups: bool,
) -> Result<()> {
    let point = (ShaderStage::Compute, entry);
    let (module, info) = process_overrides(module, info, Some(point), constants)?;
    let point = Some((ShaderStage::Compute, entry.to_string()));

    // DXC gets 6.0, FXC at most 5.1, which has no subgroup operations.
    let models = [
        ("hlsl60", hlsl::ShaderModel::V6_0),
        ("hlsl51", hlsl::ShaderModel::V5_1),
    ];
    for (part, shader_model) in models {
        if subgroups && shader_model < hlsl::ShaderModel::V6_0 {
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
