//! Every shader without a GPU: valid WGSL, translatable for Vulkan, Metal and DX12, and in step
//! with the host.

use naga::back::pipeline_constants::process_overrides;
use naga::back::{PipelineConstants, hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, ScalarKind, ShaderStage, StorageAccess, TypeInner};
use std::collections::{HashMap, HashSet};
use std::mem::offset_of;
use std::path::Path;
use std::sync::LazyLock;
use wgrad::gpu::AdapterReport;
use wgrad::kernels::conv2d::{Family, Pass, Product, Tile};
use wgrad::kernels::{Access, Dtype, KernelSpec, Metrics, Step, WORKGROUP_SIZE};
use wgrad::model::{Conv2d, Shape};

/// The kernels of every case, with every size of a subgroup that the families take, on software adapters and
/// on GPUs, where the subgroup family's tiles are smaller, and with matrices of both sides.
static KERNELS: LazyLock<Vec<KernelSpec>> = LazyLock::new(|| {
    let mut seen = HashSet::new();
    let kinds = [
        (true, 4, None),
        (true, 8, Some(8)),
        (true, 16, None),
        (false, 16, None),
        (false, 32, Some(16)),
    ];
    let kernels = kinds.into_iter().flat_map(|(software, lanes, side)| {
        let adapter = AdapterReport {
            subgroup_size: Some([lanes; 2]),
            cooperative_matrix: side,
            shader_int64: lanes == 8,
            ..AdapterReport::imagined(software)
        };
        wgrad::verify::kernels(&adapter).expect("the templates render")
    });
    // What does not depend on it is there once.
    kernels
        .filter(|k| seen.insert(format!("{} {:?} {:?}", k.entry, k.constants, k.work)))
        .collect()
});

/// A WGSL source and what naga makes of it.
struct Source {
    name: String,
    text: String,
    parsed: Result<(Module, ModuleInfo), String>,
}

/// Every WGSL source: the files as they are, and what the templates give.
static SOURCES: LazyLock<Vec<Source>> = LazyLock::new(|| {
    let mut sources = shader_files();
    sources.retain(|(_, text)| !is_template(text));
    let mut seen: HashSet<String> = sources.iter().map(|(_, text)| text.clone()).collect();
    for (i, kernel) in KERNELS.iter().enumerate() {
        let text = kernel.source().unwrap().into_owned();
        if seen.insert(text.clone()) {
            sources.push((format!("{i}: {}", kernel.entry), text));
        }
    }
    let parse = |(name, text): (String, String)| Source {
        parsed: parse(&text),
        name,
        text,
    };
    sources.into_iter().map(parse).collect()
});

/// The files in `shaders/` by name.
fn shader_files() -> Vec<(String, String)> {
    read_folder("shaders", "wgsl")
}

fn is_template(text: &str) -> bool {
    text.contains("{%") || text.contains("{{")
}

fn read_folder(folder: &str, extension: &str) -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read_to_string(&path).unwrap())
        })
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no .{extension} in {}", folder.display());
    files
}

fn parse(source: &str) -> Result<(Module, ModuleInfo), String> {
    let module = naga::front::wgsl::parse_str(source).map_err(|e| e.emit_to_string(source))?;
    let info = Validator::new(
        ValidationFlags::all(),
        Capabilities::SUBGROUP
            | Capabilities::SHADER_FLOAT16
            | Capabilities::SHADER_INT64
            | Capabilities::COOPERATIVE_MATRIX,
    )
    .validate(&module)
    .map_err(|e| e.emit_to_string(source))?;
    Ok((module, info))
}

/// Whether the module has cooperative matrices, which naga does not translate to HLSL (DX12 shows no adapter that has
/// them).
fn has_matrices(module: &Module) -> bool {
    let mut types = module.types.iter();
    types.any(|(_, ty)| matches!(ty.inner, TypeInner::CooperativeMatrix { .. }))
}

/// Runs `check` on every source and fails with all complaints at once.
fn check_sources(check: impl Fn(&Module) -> Vec<String>) {
    let mut complaints = Vec::new();
    for Source { name, parsed, .. } in SOURCES.iter() {
        let found = match parsed {
            Ok((module, _)) => check(module),
            Err(e) => vec![e.clone()],
        };
        complaints.extend(found.into_iter().map(|what| format!("{name}: {what}")));
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// Translates one entry point with every back end, the way wgpu does.
fn translate(
    module: &Module,
    info: &ModuleInfo,
    name: &str,
    constants: &PipelineConstants,
) -> Vec<String> {
    let entry = (ShaderStage::Compute, name);
    let (module, info) = match process_overrides(module, info, Some(entry), constants) {
        Ok((module, info)) => (module.into_owned(), info.into_owned()),
        Err(e) => return vec![format!("{name}: overrides: {e}")],
    };
    let mut complaints = Vec::new();

    let options = spv::Options {
        // Subgroup operations need it.
        lang_version: (1, 3),
        ..Default::default()
    };
    let pipeline = spv::PipelineOptions {
        shader_stage: ShaderStage::Compute,
        entry_point: name.into(),
    };
    if let Err(e) = spv::write_vec(&module, &info, &options, Some(&pipeline)) {
        complaints.push(format!("{name}: SPIR-V: {e}"));
    }

    let options = msl::Options {
        lang_version: (2, 4),
        ..Default::default()
    };
    let pipeline = msl::PipelineOptions {
        entry_point: Some((ShaderStage::Compute, name.into())),
        ..Default::default()
    };
    match msl::write_string(&module, &info, &options, &pipeline) {
        Ok((text, _)) if text.contains("kernel void") => {}
        Ok(_) => complaints.push(format!("{name}: MSL: no kernel in the output")),
        Err(e) => complaints.push(format!("{name}: MSL: {e}")),
    }

    if has_matrices(&module) {
        return complaints;
    }
    let options = hlsl::Options {
        // What wgpu asks of DX12 where 16-bit floats are used.
        shader_model: hlsl::ShaderModel::V6_2,
        // `num_workgroups` comes in through it.
        special_constants_binding: Some(hlsl::BindTarget::default()),
        ..Default::default()
    };
    let pipeline = hlsl::PipelineOptions {
        entry_point: Some((ShaderStage::Compute, name.into())),
    };
    let mut text = String::new();
    match hlsl::Writer::new(&mut text, &options, &pipeline).write(&module, &info, None) {
        Ok(_) if text.contains("numthreads") => {}
        Ok(_) => complaints.push(format!("{name}: HLSL: no kernel in the output")),
        Err(e) => complaints.push(format!("{name}: HLSL: {e}")),
    }
    complaints
}

/// What `kernel` says of itself and its shader says otherwise, and what cannot be translated.
fn check_kernel(kernel: &KernelSpec, module: &Module, info: &ModuleInfo) -> Vec<String> {
    let mut entries = module.entry_points.iter();
    let Some(at) = entries.position(|entry| entry.name == kernel.entry) else {
        return vec!["no entry point of that name".into()];
    };
    let used = info.get_entry_point(at);
    let mut complaints = Vec::new();

    let mut bindings: Vec<_> = kernel.arguments.iter().map(|a| a.binding).collect();
    for (handle, variable) in module.global_variables.iter() {
        let Some(binding) = variable.binding.filter(|_| !used[handle].is_empty()) else {
            continue;
        };
        let name = variable.name.as_deref().unwrap_or_default();
        let Some(argument) = kernel
            .arguments
            .iter()
            .find(|a| a.binding == binding.binding)
        else {
            complaints.push(format!("nothing is bound to {name}"));
            continue;
        };
        bindings.retain(|bound| *bound != argument.binding);
        let AddressSpace::Storage { access } = variable.space else {
            complaints.push(format!("{name} is no storage buffer"));
            continue;
        };
        if access.contains(StorageAccess::STORE) != (argument.access != Access::Read) {
            complaints.push(format!("{name} is {access:?}, {argument:?}"));
        }
        let element = match module.types[variable.ty].inner {
            TypeInner::Array { base, .. } => &module.types[base].inner,
            ref other => other,
        };
        let element = element.scalar().map(|scalar| (scalar.kind, scalar.width));
        let wanted = match argument.view.dtype {
            // Two at a time in the subgroup family.
            Dtype::F32 => [Some((ScalarKind::Float, 4)), Some((ScalarKind::Uint, 8))],
            Dtype::F16 => [Some((ScalarKind::Float, 2)); 2],
            // A row of the step table is a struct.
            Dtype::U32 | Dtype::U8 => [Some((ScalarKind::Uint, 4)), None],
        };
        if !wanted.contains(&element) {
            complaints.push(format!("{name} holds {element:?}, {argument:?}"));
        }
    }
    if !bindings.is_empty() {
        complaints.push(format!("bindings {bindings:?} are not used"));
    }
    // Every adapter binds so many.
    if kernel.arguments.len() > 8 {
        complaints.push(format!("{} bindings", kernel.arguments.len()));
    }

    let mut constants = PipelineConstants::default();
    for (name, value) in &kernel.constants {
        let mut overrides = module.overrides.iter();
        if !overrides.any(|(_, o)| o.name.as_deref() == Some(name)) {
            complaints.push(format!("no override {name}"));
        }
        constants.insert((*name).into(), *value);
    }
    complaints.extend(translate(module, info, kernel.entry, &constants));
    complaints
}

#[test]
fn every_kernel_fits_its_shader_and_translates_to_spirv_msl_and_hlsl() {
    let sources = SOURCES.iter().map(|s| (&*s.text, &s.parsed));
    let parsed: HashMap<_, _> = sources.collect();
    let mut complaints = Vec::new();
    for kernel in KERNELS.iter() {
        let found = match parsed[&*kernel.source().unwrap()] {
            Ok((module, info)) => check_kernel(kernel, module, info),
            Err(e) => vec![e.clone()],
        };
        let what = |what| format!("{}, {:?}: {what}", kernel.entry, kernel.work);
        complaints.extend(found.into_iter().map(what));
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn on_a_gpu_the_subgroup_family_takes_few_registers_and_fuses() {
    let geometry = Conv2d::new(Shape::new(14, 14, 32), 64, [3, 3], [1, 1], [1, 1]).unwrap();
    for (software, lanes, most) in [(true, 8, 128), (false, 16, 8), (false, 32, 8)] {
        let adapter = AdapterReport {
            subgroup_size: Some([lanes; 2]),
            ..AdapterReport::imagined(software)
        };
        for pass in Pass::ALL {
            let family = Family::Subgroup;
            let product = Product::new(geometry, 128, pass, false, None, family, &adapter).unwrap();
            // The first are those that the tuner looks at.
            let tiles = product.tiles_on(&adapter);
            assert_eq!(tiles[0], product.in_model_of(1, &adapter).tile);
            let sums = tiles.iter().map(|tile| match tile {
                Tile::Subgroup { rows, cols, .. } => rows * cols,
                other => panic!("{other} is of another family"),
            });
            assert_eq!(sums.max(), Some(most), "{lanes} lanes");
            let fuses = product.source().unwrap().contains("fma(");
            assert_eq!(fuses, lanes == 32, "{lanes} lanes");
        }
    }
}

#[test]
fn no_module_has_cooperative_matrices_and_subgroup_operations() {
    let (mut matrices, mut subgroups) = (0, 0);
    for Source { name, parsed, .. } in SOURCES.iter() {
        let (module, _) = parsed.as_ref().unwrap();
        let has = [
            has_matrices(module),
            format!("{module:?}").contains("Subgroup"),
        ];
        assert_ne!(has, [true, true], "{name} has both, which crashes a driver");
        matrices += usize::from(has[0]);
        subgroups += usize::from(has[1]);
    }
    assert!(matrices > 0 && subgroups > 0);
}

#[test]
fn a_kernel_that_does_not_fit_its_shader_is_noticed() {
    let kernel = KERNELS.iter().find(|k| k.entry == "col2im").unwrap();
    let (module, info) = parse(&kernel.source().unwrap()).unwrap();
    let complaints = |change: &dyn Fn(&mut KernelSpec)| {
        let mut kernel = kernel.clone();
        change(&mut kernel);
        check_kernel(&kernel, &module, &info).join("\n")
    };
    assert_eq!(complaints(&|_| ()), "");
    let found = complaints(&|k| k.entry = "col2img");
    assert!(found.contains("no entry point"), "{found}");
    let found = complaints(&|k| k.arguments.truncate(2));
    assert!(found.contains("nothing is bound to"), "{found}");
    let found = complaints(&|k| k.arguments[0].binding = 7);
    assert!(found.contains("[7] are not used"), "{found}");
    let found = complaints(&|k| k.arguments[2].access = Access::Read);
    assert!(found.contains("access: Read"), "{found}");
    let found = complaints(&|k| k.arguments[0].view.dtype = Dtype::U8);
    assert!(found.contains("dtype: U8"), "{found}");
    let found = complaints(&|k| k.constants[0].0 = "NN");
    assert!(
        found.contains("no override NN") && found.contains("overrides:"),
        "{found}"
    );
}

#[test]
fn a_broken_source_is_noticed() {
    let fine = "override N: u32;
        @group(0) @binding(0) var<storage, read_write> y: array<u32>;
        @compute @workgroup_size(64) fn main() { y[0] = N; }";
    let (module, info) = parse(fine).unwrap();
    let constants = PipelineConstants::from_iter([("N".to_string(), 4.0)]);
    assert!(translate(&module, &info, "main", &constants).is_empty());
    assert!(!translate(&module, &info, "other", &constants).is_empty());
    assert!(parse(&fine.replace("= N", "= M")).is_err());
    assert!(parse(&fine.replace("= N", "= 1.0")).is_err());
}

/// Keywords that FXC knows in any case.
const ANY_CASE: [&str; 8] = [
    "asm",
    "decl",
    "pass",
    "technique",
    "texture1d",
    "texture2d",
    "texture3d",
    "texturecube",
];

/// The names in `module` that `reserved` has, with or without a size behind.
fn reserved_names(module: &Module, reserved: &HashSet<&str>) -> Vec<String> {
    let functions = module.functions.iter().map(|(_, function)| function);
    let entries = module.entry_points.iter().map(|entry| &entry.function);
    let names = functions.chain(entries).flat_map(|function| {
        let arguments = function.arguments.iter().map(|a| a.name.clone());
        let locals = function.local_variables.iter().map(|(_, l)| l.name.clone());
        let lets = function.named_expressions.values().cloned().map(Some);
        std::iter::once(function.name.clone())
            .chain(arguments)
            .chain(locals)
            .chain(lets)
    });
    let members = module.types.iter().flat_map(|(_, ty)| {
        let members: Vec<_> = match &ty.inner {
            TypeInner::Struct { members, .. } => members.iter().map(|m| m.name.clone()).collect(),
            _ => Vec::new(),
        };
        std::iter::once(ty.name.clone()).chain(members)
    });
    let mut found: Vec<_> = names
        .chain(members)
        .chain(module.constants.iter().map(|(_, c)| c.name.clone()))
        .chain(module.overrides.iter().map(|(_, o)| o.name.clone()))
        .chain(module.global_variables.iter().map(|(_, v)| v.name.clone()))
        .chain(module.entry_points.iter().map(|e| Some(e.name.clone())))
        .flatten()
        .filter(|name| {
            let without = |name: &str| name.trim_end_matches(['1', '2', '3', '4']).to_string();
            let vector = without(name);
            let matrix = vector.strip_suffix('x').map(without).unwrap_or_default();
            [name, &*vector, &*matrix]
                .iter()
                .any(|name| reserved.contains(name))
                || ANY_CASE.contains(&&*name.to_lowercase())
        })
        .collect();
    found.sort();
    found.dedup();
    found
}

fn reserved_words() -> HashSet<&'static str> {
    let lines = include_str!("reserved_words.txt").lines();
    lines
        .filter(|line| !line.starts_with('#'))
        .flat_map(str::split_whitespace)
        .collect()
}

#[test]
fn nothing_is_named_by_a_word_that_another_language_reserves() {
    let reserved = reserved_words();
    check_sources(|module| {
        let names = reserved_names(module, &reserved);
        let complaint = |name| format!("'{name}' is reserved in HLSL, MSL or GLSL");
        names.into_iter().map(complaint).collect()
    });
}

#[test]
fn a_reserved_name_is_noticed_wherever_it_stands() {
    let source = "struct Buffer { half4: u32 }
        const TECHNIQUE = 1u;
        override kernel: u32;
        @group(0) @binding(0) var<storage, read_write> dx: array<Buffer>;
        fn metal(output: u32) -> u32 { return output; }
        @compute @workgroup_size(64) fn main() {
            var lineadj = 1u;
            let float3x2 = metal(lineadj) + kernel + TECHNIQUE;
            dx[0] = Buffer(float3x2);
        }";
    let (module, _) = parse(source).unwrap();
    let mut expected = [
        "Buffer",
        "half4",
        "TECHNIQUE",
        "kernel",
        "dx",
        "metal",
        "output",
        "main",
        "lineadj",
        "float3x2",
    ];
    expected.sort();
    assert_eq!(reserved_names(&module, &reserved_words()), expected);
}

#[test]
fn binding_numbers_are_unique_within_a_file() {
    check_sources(|module| {
        let mut seen = HashSet::new();
        module
            .global_variables
            .iter()
            .filter_map(|(_, variable)| variable.binding)
            .filter(|binding| !seen.insert(*binding))
            .map(|binding| format!("binding {} is there twice", binding.binding))
            .collect()
    });
}

#[test]
fn structs_are_laid_out_as_on_the_host() {
    let step = (
        size_of::<Step>(),
        vec![
            ("first", offset_of!(Step, first)),
            ("count", offset_of!(Step, count)),
            ("lr", offset_of!(Step, lr)),
            ("bias_correction1", offset_of!(Step, bias_correction1)),
            ("bias_correction2", offset_of!(Step, bias_correction2)),
            ("seed", offset_of!(Step, seed)),
            ("epoch", offset_of!(Step, epoch)),
            ("base", offset_of!(Step, base)),
            ("total", offset_of!(Step, total)),
            ("micro", offset_of!(Step, micro)),
            ("average", offset_of!(Step, average)),
            ("skip", offset_of!(Step, skip)),
            ("first_shard", offset_of!(Step, first_shard)),
            ("shards", offset_of!(Step, shards)),
            ("share", offset_of!(Step, share)),
        ],
    );
    let metrics = (
        size_of::<Metrics>(),
        vec![
            ("loss_sum", offset_of!(Metrics, loss_sum)),
            ("correct", offset_of!(Metrics, correct)),
        ],
    );
    let seen = std::sync::Mutex::new(HashSet::new());
    check_sources(|module| {
        let mut complaints = Vec::new();
        for (_, variable) in module.global_variables.iter() {
            // What crosses to the host: elements of the storage buffers.
            let TypeInner::Array { base, stride, .. } = module.types[variable.ty].inner else {
                continue;
            };
            let element = &module.types[base];
            let TypeInner::Struct { members, .. } = &element.inner else {
                continue;
            };
            if !matches!(variable.space, AddressSpace::Storage { .. }) {
                continue;
            }
            let name = element.name.clone().unwrap_or_default();
            let found: Vec<_> = members
                .iter()
                .map(|m| (m.name.as_deref().unwrap_or_default(), m.offset as usize))
                .collect();
            let found = (stride as usize, found);
            match name.as_str() {
                "Step" if found == step => {}
                "Metrics" if found == metrics => {}
                _ => complaints.push(format!("struct {name} is not the host's: {found:?}")),
            }
            seen.lock().unwrap().insert(name);
        }
        complaints
    });
    let seen = seen.into_inner().unwrap();
    assert!(
        seen.contains("Step") && seen.contains("Metrics"),
        "{seen:?}"
    );
}

#[test]
fn workgroup_sizes_are_the_hosts() {
    for (name, source) in shader_files() {
        if is_template(&source) {
            continue;
        }
        let (module, _) = parse(&source).unwrap_or_else(|e| panic!("{name}: {e}"));
        for entry in &module.entry_points {
            assert_eq!(
                entry.workgroup_size,
                [WORKGROUP_SIZE as u32, 1, 1],
                "{name}: {}",
                entry.name
            );
        }
    }
}

/// A shader's constructors are in the module named like it, its entry points have twins of their names (one
/// that ends in 4 is another at four channels a time: it shares them), and none goes without a case.
#[test]
fn entry_points_have_constructors_twins_and_cases() {
    /// Kernels so simple that a twin would say nothing.
    const WITHOUT_TWIN: [&str; 1] = ["advance_step"];
    let constructors = read_folder("src/kernels", "rs");
    let twins = read_folder("src/cpu", "rs");
    let mut complaints = Vec::new();
    for (name, source) in shader_files() {
        if is_template(&source) {
            continue;
        }
        let (module, _) = parse(&source).unwrap_or_else(|e| panic!("{name}: {e}"));
        let file = name.replace(".wgsl", ".rs");
        let mut constructors = constructors.iter().filter(|c| c.0 == file);
        let constructors = constructors.next().map_or("", |c| &c.1);
        for entry in &module.entry_points {
            let name = &entry.name;
            if !KERNELS
                .iter()
                .any(|k| k.entry == name && k.source().unwrap() == source)
            {
                complaints.push(format!("{name}: no case"));
            }
            if !constructors.contains(&format!("\"{name}\"")) {
                complaints.push(format!("{name}: no constructor in src/kernels/{file}"));
            }
            let twin = name.trim_end_matches('4');
            let defines = |text: &str| {
                text.contains(&format!("pub fn {twin}("))
                    || text.contains(&format!("pub fn {twin}<"))
            };
            if !WITHOUT_TWIN.contains(&twin) && !twins.iter().any(|t| defines(&t.1)) {
                complaints.push(format!("{name}: no twin {twin} in src/cpu"));
            }
        }
        if !source.contains("CPU twin") {
            complaints.push(format!("{name}: the header does not name the CPU twin"));
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
