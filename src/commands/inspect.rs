//! `wgrad inspect`: a model on paper.

use super::{say, table};
use crate::cli::{Conv, InspectArgs};
use indicatif::{BinaryBytes, HumanCount};
use wgrad::model::{load, summary};
use wgrad::network::memory;
use wgrad::{Error, Result};

pub fn run(args: &InspectArgs) -> Result<()> {
    let definition = load(&args.model)?;
    let model = definition.resolve(definition.input, definition.classes)?;
    let batch_size = args.batch_size.unwrap_or(definition.recipe.batch_size);
    if batch_size == 0 {
        return Err(Error::Usage(
            "expected --batch-size of at least 1, found 0; leave it out for the model's own".into(),
        ));
    }
    let optimizer = &definition.recipe.optimizer;
    let explicit_conv = args.conv == Some(Conv::Explicit);
    let memory = memory(&model, batch_size, optimizer, explicit_conv);
    let total: u64 = memory.iter().map(|(_, bytes)| bytes).sum();
    let rows = memory
        .into_iter()
        .chain([("total".to_string(), total)])
        .map(|(what, bytes)| vec![what, BinaryBytes(bytes).to_string()]);
    say(&format!("{}: {}", model.name, model.input))?;
    say(&summary(&model))?;
    say(&format!(
        "a training step takes {} multiply-adds per image\n",
        HumanCount(model.training_multiply_adds())
    ))?;
    say(&format!(
        "GPU memory of a training step, batch size {batch_size} (the dataset comes on top, a byte per value)"
    ))?;
    say(&table(&["what", "memory"], rows, 1))
}
