//! Networks as ONNX and back. That other programs read what is written is `scripts/check-onnx.sh`'s; here
//! what is imported again gives the same bits.

mod common;

use assert_cmd::Command;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use wgrad::engine::{Engine, Split};
use wgrad::export::{OnnxOptions, fold_batch_norm, pytorch_module, read_onnx, write_onnx};
use wgrad::model::recipe::Optimizer;
use wgrad::model::{
    Definition, Model, Op, SHIPPED, architecture, initial_parameters, initial_running, load,
};
use wgrad::plan::Options;

/// Every operation and activation of the table, and what is particular about their geometries.
const ALL: &str = include_str!("operations.toml");

struct Network {
    model: Model,
    parameters: Vec<f32>,
    running: Vec<f32>,
    normalization: Vec<f32>,
}

fn noise(seed: u32) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    }
}

/// With numbers that no initialisation gives: nothing is 0 or 1.
fn network(definition: &Definition) -> Network {
    let model = definition
        .resolve(definition.input, definition.classes)
        .unwrap();
    let mut noise = noise(7);
    let mut parameters = initial_parameters(&model, 3);
    let mut running = initial_running(&model);
    for layer in &model.layers {
        if layer.op.product().is_none() {
            let range = layer.range();
            parameters[range].iter_mut().for_each(|p| *p += noise());
        }
        // Means within ±0.25, variances from 0.5 to 1.5.
        for parameter in &layer.running {
            let values = &mut running[parameter.start..][..parameter.elements()];
            let one = values[0] == 1.0;
            values
                .iter_mut()
                .for_each(|v| *v += noise() * if one { 1.0 } else { 0.5 });
        }
    }
    let channels = model.input.channels;
    let scale = (0..channels).map(|c| 0.011 + 0.002 * c as f32);
    let shift = (0..channels).map(|c| -1.3 + 0.2 * c as f32);
    Network {
        normalization: scale.chain(shift).collect(),
        model,
        parameters,
        running,
    }
}

/// Logits of a few images, computed without a GPU.
fn logits(model: &Model, parameters: &[f32], running: &[f32], normalization: &[f32]) -> Vec<f32> {
    const IMAGES: usize = 3;
    let mut noise = noise(11);
    let bytes = (0..IMAGES * model.input.elements()).map(|_| ((noise() + 0.5) * 255.0) as u8);
    let options = Options {
        keep_logits: true,
        ..Options::default()
    };
    let sgd = Optimizer::Sgd {
        momentum: 0.0,
        nesterov: false,
        weight_decay: 0.0,
    };
    let mut engine = Engine::new(None, model, IMAGES, &sgd, &options).unwrap();
    engine.set_parameters(parameters).unwrap();
    engine.set_running(running).unwrap();
    let labels = vec![0; IMAGES];
    engine
        .upload_dataset(Split::Test, bytes.collect(), &labels, normalization)
        .unwrap();
    let mut go_on = |_| ControlFlow::Continue(());
    let evaluation = engine.evaluate(Split::Test, &mut go_on).unwrap();
    let logits = evaluation.logits.unwrap();
    assert_eq!(logits.len(), IMAGES * model.classes);
    assert!(logits.iter().all(|z| z.is_finite()), "{logits:?}");
    logits
}

fn onnx(network: &Network, options: &OnnxOptions) -> Vec<u8> {
    let Network {
        model,
        parameters,
        running,
        normalization,
    } = network;
    let options = OnnxOptions {
        normalization,
        ..options.clone()
    };
    write_onnx(model, parameters, running, &options).unwrap()
}

/// Exported and imported again, plain, with everything that can be in the file, and folded.
fn round_trip(definition: &Definition) {
    let name = &definition.name;
    let network = network(definition);
    let (model, normalization) = (&network.model, &network.normalization);
    let expected = logits(model, &network.parameters, &network.running, normalization);
    let class_names: Vec<String> = (0..model.classes)
        .map(|k| format!("class {k}, \"ä\""))
        .collect();
    let path = Path::new("file.onnx");
    for with_all in [false, true] {
        let options = OnnxOptions {
            class_names: &class_names,
            with_normalization: with_all,
            with_softmax: with_all && model.loss == wgrad::model::Loss::SoftmaxCrossEntropy,
            ..OnnxOptions::default()
        };
        let bytes = onnx(&network, &options);
        assert_eq!(bytes, onnx(&network, &options), "{name}: the same bytes");
        let imported = read_onnx(&bytes, path).unwrap();
        assert_eq!(imported.model.name, model.name);
        assert_eq!(imported.model.loss, model.loss);
        assert_eq!(imported.class_names.as_ref(), Some(&class_names));
        assert_eq!(imported.normalization.as_ref(), Some(normalization));
        assert_eq!(imported.model.parameter_count(), model.parameter_count());
        let found = logits(
            &imported.model,
            &imported.parameters,
            &imported.running,
            normalization,
        );
        assert_eq!(found, expected, "{name}");
    }

    let folded = fold_batch_norm(model, &network.parameters, &network.running).unwrap();
    let norms = |model: &Model| {
        let norm = |layer: &&wgrad::model::Layer| matches!(layer.op, Op::BatchNorm { .. });
        model.layers.iter().filter(norm).count()
    };
    assert_eq!(norms(model), folded.folded + folded.left, "{name}");
    assert_eq!(norms(&folded.model), folded.left, "{name}");
    let network = Network {
        model: folded.model,
        parameters: folded.parameters,
        running: folded.running,
        normalization: normalization.clone(),
    };
    let of_folded = logits(
        &network.model,
        &network.parameters,
        &network.running,
        normalization,
    );
    let largest = expected.iter().fold(1.0, |m: f32, z| m.max(z.abs()));
    for (a, b) in of_folded.iter().zip(&expected) {
        assert!((a - b).abs() <= 1e-4 * largest, "{name}: {a} and {b}");
    }
    let imported = read_onnx(&onnx(&network, &OnnxOptions::default()), path).unwrap();
    let found = logits(
        &imported.model,
        &imported.parameters,
        &imported.running,
        normalization,
    );
    assert_eq!(found, of_folded, "{name}, folded");
}

#[test]
fn every_operation_comes_back_as_it_was() {
    round_trip(&Definition::parse(ALL, "operations.toml").unwrap());
}

/// The table of operations is what a model file can say, so what it can say is in [`ALL`].
#[test]
fn every_type_of_layer_is_in_the_test() {
    let docs = include_str!("../docs/models.md");
    let rows = docs.lines().filter(|line| line.starts_with("| `"));
    let layers = rows.filter(|line| line.matches('|').count() >= 4);
    let names: Vec<&str> = layers
        .flat_map(|line| {
            line.split('|')
                .nth(1)
                .unwrap_or_default()
                .split('`')
                .skip(1)
                .step_by(2)
        })
        .filter(|name| load(name).is_err())
        .collect();
    assert!(names.len() >= 20, "{names:?}");
    for name in names {
        let used = [
            format!("type = \"{name}\""),
            format!("activation = \"{name}\""),
        ];
        assert!(used.iter().any(|used| ALL.contains(used)), "{name}");
    }
}

#[test]
fn every_shipped_model_comes_back_as_it_was() {
    for (name, _) in SHIPPED {
        round_trip(&load(name).unwrap());
    }
}

/// An architecture without blocks is the same network.
#[test]
fn a_model_is_written_as_what_reads_as_the_same() {
    let all = Definition::parse(ALL, "operations.toml").unwrap();
    let shipped = SHIPPED.iter().map(|(name, _)| load(name).unwrap());
    for definition in shipped.chain([all]) {
        let mut model = definition
            .resolve(definition.input, definition.classes)
            .unwrap();
        for layer in &mut model.layers {
            layer.name = layer.name.replace('.', "_");
        }
        let text = architecture(&model, "one\ntwo");
        assert!(text.starts_with("# one\n# two\nname = "), "{text}");
        let again = Definition::parse(&text, "again.toml").unwrap();
        let again = again.resolve(model.input, model.classes).unwrap();
        let what = |model: &Model| -> Vec<_> {
            let layers = model.layers.iter();
            layers
                .map(|l| {
                    (
                        l.name.clone(),
                        l.op,
                        l.activation,
                        l.inputs.clone(),
                        l.range(),
                    )
                })
                .collect()
        };
        assert_eq!(what(&again), what(&model), "{text}");
        // The classes are those of the data.
        let more = Definition::parse(&text, "again.toml").unwrap();
        assert_eq!(more.resolve(model.input, 17).unwrap().classes, 17);
    }
}

#[test]
fn a_pytorch_module_names_every_parameter() {
    let network = network(&Definition::parse(ALL, "operations.toml").unwrap());
    let text = pytorch_module(&network.model, &network.normalization);
    for layer in &network.model.layers {
        let added = format!("add(self, \"{}\", nn.", layer.name);
        assert_eq!(
            text.contains(&added),
            !layer.parameters.is_empty(),
            "{added}"
        );
    }
    for line in [
        "nn.Conv2d(8, 8, (3, 3), stride=(1, 1), padding=(0, 0), dilation=(2, 1), groups=4, bias=False)",
        "F.pad(x2, (0, 2, 1, 3), value=0.0)",
        "nn.BatchNorm1d(",
        "value=float(\"-inf\")",
        "SCALE = [0.011, ",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}

#[test]
fn what_an_onnx_file_cannot_hold_is_refused() {
    // 2,560 MB of weights, of which none is ever made.
    let large = ALL.replace("units = 6", "units = 1").replace(
        "{ type = \"dense\", name = \"head\", units = \"classes\" }",
        "{ type = \"dense\", name = \"a\", units = 25000 }, { type = \"dense\", units = 25000 }, { type = \"dense\", units = \"classes\" }",
    );
    let definition = Definition::parse(&large, "operations.toml").unwrap();
    let model = definition.resolve(definition.input, 5).unwrap();
    let error = write_onnx(&model, &[], &[], &OnnxOptions::default()).unwrap_err();
    let line = error.to_string();
    assert!(
        line.contains("at most 2147483647 bytes") && line.contains("--safetensors"),
        "{line}"
    );
    assert_eq!(error.exit_code(), 2);

    let mlp = network(&load("mlp-sigmoid").unwrap());
    let options = OnnxOptions {
        normalization: &mlp.normalization,
        with_softmax: true,
        ..OnnxOptions::default()
    };
    let error = write_onnx(&mlp.model, &mlp.parameters, &mlp.running, &options).unwrap_err();
    assert!(error.to_string().contains("found squared_error"), "{error}");
}

/// The command line, from a training to one that starts from what was exported.
#[test]
fn export_and_import_at_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    common::write_model_and_data(folder.path());
    let wgrad = |line: &str| {
        let mut command = Command::cargo_bin("wgrad").unwrap();
        command.current_dir(folder.path()).args(line.split(' '));
        command
    };
    let good = |line: &str| {
        let output = wgrad(line).assert().success().get_output().stdout.clone();
        String::from_utf8(output).unwrap()
    };
    let bad = |line: &str, code: i32, words: &[&str]| {
        let output = wgrad(line).assert().code(code).get_output().stderr.clone();
        let text = String::from_utf8(output).unwrap();
        assert!(
            words.iter().all(|word| text.contains(word)),
            "{line}: {text}"
        );
    };
    good("train --model small.toml --data shapes --device cpu --epochs 1 --out run");

    bad("export run", 2, &["--onnx"]);
    bad("export run --onnx a.bin", 2, &["ends in .onnx", "a.bin"]);
    bad(
        "export run --fold-batch-norm --safetensors a.safetensors",
        2,
        &["--onnx"],
    );
    bad(
        "export run --weights best --onnx a.onnx",
        2,
        &["--weights last"],
    );
    bad("export nowhere --onnx a.onnx", 1, &["nowhere"]);
    assert!(!at("a.onnx").exists());

    let said = good("export run --onnx a.onnx --safetensors w.safetensors --pytorch net.py");
    for words in [
        "last, epoch 1 of run",
        "a.onnx, opset 17",
        "N×1×8×6 to logits N×4",
        "w.safetensors",
        "net.py",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let weights = |name: &str| {
        let path = at(name);
        let bytes = fs::read(&path).unwrap();
        let definition = load(at("small.toml").to_str().unwrap()).unwrap();
        let model = definition.resolve(definition.input, 4).unwrap();
        let read = wgrad::export::read_safetensors(&model, &bytes, &[""], &[""], &path);
        read.unwrap().vectors.remove(0)
    };
    let trained = weights("run/model.safetensors");
    assert_eq!(weights("w.safetensors"), trained);

    // The names are the model's, so that the weights are too.
    let said = good("import a.onnx --out again");
    assert!(
        said.contains("wgrad train --model again.toml --init again.safetensors"),
        "{said}"
    );
    assert_eq!(weights("again.safetensors"), trained);
    let before = common::contents(folder.path().join("run").as_path()).len();
    bad("import a.onnx --out again", 2, &["new file", "again.toml"]);
    bad("import small.toml", 2, &["expected an ONNX file"]);
    bad("import none.onnx", 1, &["none.onnx"]);
    assert!(!at("small.safetensors").exists());
    good(
        "train --model again.toml --init again.safetensors --data shapes --device cpu --epochs 1 --batch-size 20 --out second",
    );

    // A file that is there is replaced.
    good("export run --onnx a.onnx --with-normalization --with-softmax");
    let imported = read_onnx(&fs::read(at("a.onnx")).unwrap(), &at("a.onnx")).unwrap();
    assert!(
        imported.notes[0].contains("softmax"),
        "{:?}",
        imported.notes
    );
    assert_eq!(
        before,
        common::contents(folder.path().join("run").as_path()).len()
    );

    // The outputs as NumPy has them: as many as there are images.
    good("eval run --device cpu --logits logits.npy");
    let npy = fs::read(at("logits.npy")).unwrap();
    assert_eq!(&npy[..8], b"\x93NUMPY\x01\x00");
    let header = 10 + usize::from(u16::from_le_bytes([npy[8], npy[9]]));
    assert!(String::from_utf8_lossy(&npy[10..header]).contains("'shape': (40, 4)"));
    assert_eq!((header % 64, npy.len()), (0, header + 40 * 4 * 4));
    bad(
        "eval run second --device cpu --logits logits.npy",
        2,
        &["one run for --logits"],
    );
}

/// Where the last layer is a map of several places, its values have another order in PyTorch, flattened by a
/// layer or not.
#[test]
fn outputs_have_the_order_of_the_classes() {
    let head = ALL
        .split("layer = [")
        .next()
        .unwrap()
        .replace("classes = 5", "classes = 10");
    let recipe = ALL.split("[recipe]").last().unwrap();
    let map = "{ type = \"conv2d\", out_channels = 5, kernel = [13, 6], stride = [1, 6] }";
    for layers in [map.to_string(), format!("{map}, {{ type = \"flatten\" }}")] {
        let text = format!("{head}layer = [{layers}]\n[recipe]{recipe}");
        let network = network(&Definition::parse(&text, "map.toml").unwrap());
        let module = pytorch_module(&network.model, &network.normalization);
        let order = "flatten(1)[:, [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]]";
        let whole = module.contains(order);
        let split = module.contains("x1.flatten(1)")
            && module.contains("return x2[:, [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]]");
        assert!(whole || split, "{module}");
        let bytes = onnx(&network, &OnnxOptions::default());
        let error = read_onnx(&bytes, Path::new("map.onnx"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("node 'output/gather' (Gather)"), "{error}");
    }
}
