//! `wgrad inspect`: a model on paper.

use super::{say, say_wrapped, table};
use crate::cli::{Conv, InspectArgs};
use indicatif::{BinaryBytes, HumanCount};
use wgrad::Result;
use wgrad::engine::memory;
use wgrad::gpu::AdapterReport;
use wgrad::model::{dot, load, summary};
use wgrad::plan::{Mode, Options, Plan, Target};

pub fn run(args: &InspectArgs) -> Result<()> {
    let definition = load(&args.model)?;
    let model = definition.resolve(definition.input, definition.classes)?;
    if args.dot {
        return say(&dot(&model));
    }
    let mut recipe = definition.recipe.clone();
    recipe.batch_size = args.batch_size.unwrap_or(recipe.batch_size);
    recipe.precision = args.precision.unwrap_or(recipe.precision);
    let batch_size = recipe.step_batch();
    let optimizer = &recipe.optimizer;
    let options = Options {
        family: args.kernels,
        explicit_conv: args.conv == Some(Conv::Explicit),
        ..Options::of(&recipe)
    };
    // What a tensor may take differs from adapter to adapter, and is for training to find.
    let adapter = |software| AdapterReport {
        max_storage_binding_bytes: u64::MAX,
        max_buffer_bytes: u64::MAX,
        ..AdapterReport::imagined(software)
    };
    let (mode, gpu) = (Mode::Train(*optimizer), adapter(false));
    let plan = Plan::new(&model, batch_size, mode, &options, Target::Gpu(&gpu))?;
    if args.plan {
        return say(plan.to_string().trim_end());
    }
    let flops: f64 = plan.specs().map(|spec| spec.cost.flops).sum();
    // Tiles and fusions differ, and an evaluation takes larger batches on a GPU.
    let on = |software| {
        let adapter = adapter(software);
        memory(&model, batch_size, optimizer, &options, &adapter)
    };
    let mut rows: Vec<(String, [u64; 2])> = Vec::new();
    for (column, list) in [on(false)?, on(true)?].into_iter().enumerate() {
        for (what, bytes) in list {
            let at = rows.iter().position(|(name, _)| *name == what);
            let at = at.unwrap_or_else(|| {
                rows.push((what, [0; 2]));
                rows.len() - 1
            });
            rows[at].1[column] = bytes;
        }
    }
    let total = |column: usize| rows.iter().map(|(_, bytes)| bytes[column]).sum::<u64>();
    rows.push(("total".into(), [total(0), total(1)]));
    let rows = rows.into_iter().map(|(what, bytes)| {
        let [gpu, software] = bytes.map(|b| BinaryBytes(b).to_string());
        vec![what, gpu, software]
    });
    say(&format!("{}: {}", model.name, model.input))?;
    say(&summary(&model))?;
    say(&format!(
        "a training step takes {} multiply-adds per image\n",
        HumanCount((flops / 2.0) as u64 / batch_size as u64)
    ))?;
    let batch = match options.micro {
        true => format!("{batch_size} samples of a batch of {}", recipe.batch_size),
        false => format!("batch size {batch_size}"),
    };
    say_wrapped(&format!(
        "GPU memory of a training step, {batch} (the dataset comes on top, a byte per value)"
    ))?;
    say(&table(&["what", "GPU", "software adapter"], rows, 1))
}
