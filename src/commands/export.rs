//! `wgrad export` and `wgrad import`: networks for other programs, and from them.

use super::{say, say_wrapped};
use crate::cli::{ExportArgs, ImportArgs};
use serde_json::json;
use std::path::{Path, PathBuf};
use wgrad::export::{
    Imported, OPSET, OnnxOptions, fold_batch_norm, pytorch_module, read_onnx, write_onnx,
    write_safetensors,
};
use wgrad::train::Run;
use wgrad::{Error, Result};

pub fn run(args: &ExportArgs) -> Result<()> {
    for (flag, ending, path) in [
        ("--onnx", "onnx", &args.onnx),
        ("--safetensors", "safetensors", &args.safetensors),
        ("--pytorch", "py", &args.pytorch),
    ] {
        if let Some(path) = path
            && path.extension().is_none_or(|e| e != ending)
        {
            return Err(Error::Usage(format!(
                "expected {flag} to name a file that ends in .{ending}, found {}; give it that ending",
                path.display()
            )));
        }
    }
    let run = Run::open(&args.run)?;
    let (config, model) = (run.config(), run.model());
    let (epoch, [parameters, running]) = run.weights_of(args.weights.which)?;
    let of_epoch = epoch.map_or(String::new(), |epoch| format!(", epoch {epoch}"));
    say_wrapped(&format!(
        "weights     {}{of_epoch} of {}",
        args.weights.which,
        args.run.display()
    ))?;
    let normalization = config.scale_and_shift();
    let class_names = &config.model.class_names;

    if let Some(path) = &args.onnx {
        let mut metadata = vec![("weights".to_string(), args.weights.which.to_string())];
        metadata.extend(epoch.map(|epoch| ("epoch".to_string(), epoch.to_string())));
        metadata.extend(config.id.clone().map(|id| ("run".to_string(), id)));
        let options = OnnxOptions {
            class_names,
            normalization: &normalization,
            with_normalization: args.with_normalization,
            with_softmax: args.with_softmax,
            metadata: &metadata,
        };
        let (bytes, folding) = if args.fold_batch_norm {
            let folded = fold_batch_norm(model, &parameters, &running)?;
            let left = match folded.left {
                0 => String::new(),
                n => format!(", {n} kept that stand behind no convolution"),
            };
            let folding = format!("; {} batch normalisations folded{left}", folded.folded);
            (
                write_onnx(&folded.model, &folded.parameters, &folded.running, &options)?,
                folding,
            )
        } else {
            (
                write_onnx(model, &parameters, &running, &options)?,
                String::new(),
            )
        };
        write(path, &bytes)?;
        let input = match args.with_normalization {
            true => "uint8",
            false => "normalised float32",
        };
        let output = match args.with_softmax {
            true => "probabilities",
            false => "logits",
        };
        let shape = model.input;
        say_wrapped(&format!(
            "onnx        {}, opset {OPSET}: {input} N×{}×{}×{} to {output} N×{}{folding}",
            path.display(),
            shape.channels,
            shape.height,
            shape.width,
            model.classes
        ))?;
    }
    if let Some(path) = &args.safetensors {
        let metadata = json!({
            "wgrad": env!("CARGO_PKG_VERSION"),
            "run": config.id,
            "epoch": epoch,
            "model": config.model,
            "normalization": config.normalization,
        });
        let bytes = tensors(model, &parameters, &running, metadata)?;
        write(path, &bytes)?;
        say_wrapped(&format!(
            "safetensors {}, PyTorch's names and layouts",
            path.display()
        ))?;
    }
    if let Some(path) = &args.pytorch {
        write(path, pytorch_module(model, &normalization).as_bytes())?;
        let weights = args
            .safetensors
            .as_deref()
            .unwrap_or(Path::new("model.safetensors"));
        let module = path.file_stem().unwrap_or_default().to_string_lossy();
        say_wrapped(&format!(
            "pytorch     {}: from {module} import load, normalize; network = load(\"{}\")",
            path.display(),
            weights.display()
        ))?;
    }
    Ok(())
}

pub fn import(args: &ImportArgs) -> Result<()> {
    let path = &args.file;
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let Imported {
        model,
        architecture,
        parameters,
        running,
        class_names,
        normalization,
        notes,
    } = read_onnx(&bytes, path)?;
    let out = match &args.out {
        Some(out) => out.clone(),
        None => PathBuf::from(path.file_stem().unwrap_or_default()),
    };
    let ending = |ending: &str| {
        let mut name = out.clone().into_os_string();
        name.push(ending);
        PathBuf::from(name)
    };
    let (toml, weights) = (ending(".toml"), ending(".safetensors"));
    // Somebody may have worked on the model file since.
    for path in [&toml, &weights] {
        if path.exists() {
            return Err(Error::Usage(format!(
                "expected a new file for what is imported, found {}; remove it, or name others with --out",
                path.display()
            )));
        }
    }
    let normalization = normalization.map(|both| {
        let (scale, shift) = both.split_at(both.len() / 2);
        json!({ "scale": scale, "shift": shift })
    });
    let metadata = json!({
        "wgrad": env!("CARGO_PKG_VERSION"),
        "imported": path.display().to_string(),
        "class_names": class_names,
        "normalization": normalization,
    });
    write(&weights, &tensors(&model, &parameters, &running, metadata)?)?;
    write(&toml, architecture.as_bytes())?;
    say_wrapped(&format!(
        "model    {}: {} to {} classes, {} layers, {} parameters",
        toml.display(),
        model.input,
        model.classes,
        model.layers.len(),
        model.parameter_count()
    ))?;
    say_wrapped(&format!("weights  {}", weights.display()))?;
    if normalization.is_some() {
        say_wrapped(
            "images   the network was trained on images normalised as the weights' metadata say; wgrad train takes mean and deviation of its own training images",
        )?;
    }
    notes
        .iter()
        .try_for_each(|note| say_wrapped(&format!("note     {note}")))?;
    say(&format!(
        "next     wgrad train --model {} --init {}",
        toml.display(),
        weights.display()
    ))
}

fn tensors(
    model: &wgrad::model::Model,
    parameters: &[f32],
    running: &[f32],
    metadata: serde_json::Value,
) -> Result<Vec<u8>> {
    let metadata = metadata.as_object().cloned().unwrap_or_default();
    write_safetensors(model, &[("", parameters)], &[("", running)], metadata)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|e| Error::io("write", path, e))
}
